"""The suite `webassembly`: its files, its places, what is left out."""
import json
import shutil
from pathlib import Path

import numpy as np
import pdf
import pytest

import bench_webassembly as suite
import figures
import onnxruntime_web as ort
import run
import side_by_side
from npm_package import give_npm, small_files

ROOT = Path(__file__).resolve().parent.parent
PLACES = {'Node': shutil.which('node'), 'Chromium': pdf.chromium()}
WHY = {'Node': 'no Node (Debian: apt install nodejs)',
       'Chromium': 'no Chromium (Debian: apt install chromium)'}


# ---- Where ONNX Runtime Web comes from

@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with small files in place of the real ones; no npm."""
    folder = small_files(ort, tmp_path, monkeypatch)
    monkeypatch.delenv('D2LTVM_ORT_WEB', raising=False)
    return folder


def test_the_folder_that_is_named_is_enough(package, monkeypatch):
    monkeypatch.setenv('D2LTVM_ORT_WEB', str(package))
    assert sorted(ort.files()) == sorted(package.iterdir())
    (package / 'ort.wasm.min.mjs').write_text('something else')
    with pytest.raises(ValueError, match=r'ort.wasm.min.mjs .*SHA-256'):
        ort.files()
    monkeypatch.setenv('D2LTVM_ORT_WEB', str(package / 'no'))
    with pytest.raises(FileNotFoundError, match=r'D2LTVM_ORT_WEB.*/no'):
        ort.files()


def test_npm_is_asked_once(package, tmp_path):
    give_npm(tmp_path, package, 'package/dist')
    contents = [path.read_text() for path in ort.files()]
    assert contents == [f'content of {name}' for name in ort.SHA256]
    (tmp_path / 'bin/npm').unlink()
    assert [path.read_text() for path in ort.files()] == contents


def test_a_damaged_package_is_not_kept(package, tmp_path):
    (package / 'ort.wasm.min.mjs').write_text('damaged')
    give_npm(tmp_path, package, 'package/dist')
    with pytest.raises(ValueError, match='SHA-256'):
        ort.files()
    assert list(ort.store().parent.iterdir()) == []


def test_without_npm_a_sentence_says_so(package):
    with pytest.raises(OSError, match='npm is missing, or cannot fetch'):
        ort.files()


# ---- The race

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """All that a place reads, without ONNX Runtime Web."""
    folder = tmp_path_factory.mktemp('files')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('D2LTVM_ORT_WEB', str(folder / 'no'))
        left_out = suite.write(folder)
    assert left_out[suite.THEIRS].startswith('cannot be had: D2LTVM_ORT_WEB')
    return folder


@pytest.fixture
def place(files, request):
    """Starts a place for a folder; ends it afterwards."""
    started = []

    def start(name, folder=files):
        if not PLACES[name]:
            pytest.skip(WHY[name])
        started.append(suite.Place(name, suite.commands(folder)[name],
                                   count=1))
        return started[-1]

    yield start
    for one in started:
        one.close()
        assert one.process.returncode == 0  # it ended by itself


@pytest.mark.parametrize('name', PLACES)
def test_every_program_is_right_before_it_is_timed(place, name):
    worker, left_out = place(name), {}
    network = suite.race(worker, 'network', (1, 1, 26, 26), 2, left_out)
    assert network['part'] == f'network, {name}'
    operator = suite.race(worker, 'operator', suite.OPERATOR, 2, left_out)
    builds = {'scalar', 'simd', 'relaxed'} - {
        key.split(', ')[-2] for key in left_out}
    assert builds >= {'scalar', 'simd'}
    assert set(network['times']) == builds
    assert set(operator['times']) == builds | {
        f'written {build}' for build in builds} | {
            'simd with copies', 'JavaScript'}
    for case in network, operator:
        assert max(case['errors'].values()) < 1e-5
        assert min(case['errors'].values()) > 0  # it is not the exact result
        assert case['ratios']['simd'] == [1, 1, 1]
        assert all(0 < low <= median <= high
                   for low, median, high in case['times'].values())


def damaged(files, folder):
    """The files with other weights, and one module that is none."""
    shutil.copytree(files, folder)
    weights = np.fromfile(folder / 'weights.f32', 'float32')
    weights[:100] *= 1.1
    weights.tofile(folder / 'weights.f32')
    (folder / 'scalar.wasm').write_bytes(b'no module')
    return folder


def test_what_is_wrong_is_not_timed(place, files, tmp_path):
    worker, left_out = place('Node', damaged(files, tmp_path / 'x')), {}
    with pytest.raises(RuntimeError, match='no program of the network'):
        suite.race(worker, 'network', (1, 1, 26, 26), 1, left_out)
    assert left_out.pop('Node, network, scalar, 1 thread').startswith(
        'failed: ')
    assert 'is wrong by' in left_out.pop('Node, network, simd, 1 thread')


def test_a_frame_that_is_read_shows(place, files, tmp_path):
    """The images of ours have NaN around the 26 x 26 pixels."""
    folder = shutil.copytree(files, tmp_path / 'x')
    images = np.fromfile(folder / 'images.f32', 'float32').reshape(-1, 28, 28)
    assert np.isnan(images[:, 26:]).all() and np.isnan(images[..., 26:]).all()
    images[0, 25, 25] = np.nan
    images.tofile(folder / 'images.f32')
    left_out = {}
    with pytest.raises(RuntimeError):
        suite.race(place('Node', folder), 'network', (1, 1, 26, 26), 1,
                   left_out)
    assert left_out['Node, network, simd, 1 thread'] == 'gives NaN'


def test_an_unknown_command(place):
    assert 'unknown' in place('Node').ask(sing=1)['cannot']


def test_starts_and_sizes(files):
    places = [name for name, found in PLACES.items() if found]
    if not places:
        pytest.skip('; '.join(WHY.values()))
    starts = suite.starting(files, places[:1], ['simd'], 2)
    low, median, high = starts[places[0]]['simd']
    assert 0 < low <= median <= high < 60
    sizes = suite.sizes(files)
    assert set(sizes) == {'scalar', 'simd', 'relaxed'}
    for raw, packed in sizes.values():
        assert 1000 < packed < raw < 40_000


def test_without_a_place_the_suite_is_left_out(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(suite, 'write', lambda folder: {})
    monkeypatch.setattr(suite, 'commands', lambda folder: {
        'Node': ['/nowhere/node']})
    monkeypatch.setattr(run, 'OWN', tmp_path)
    run.report('webassembly')
    said = capsys.readouterr().out
    assert said.startswith('webassembly: not measured, Node cannot be started')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_onnx_runtime_web_computes_the_same(files, tmp_path, place):
    """All of its forms, where its files are already here."""
    try:
        if not ort.os.environ.get('D2LTVM_ORT_WEB') and not (
                ort.store().exists()):
            pytest.skip('ONNX Runtime Web was not fetched: `make bench` does')
        paths = ort.files()
    except (OSError, ValueError) as error:
        pytest.skip(str(error))
    folder = shutil.copytree(files, tmp_path / 'x')
    for path in paths:
        shutil.copy(path, folder)
    settings = json.loads((folder / 'settings.json').read_text())
    (folder / 'settings.json').write_text(json.dumps(
        settings | {'theirs': suite.THEIRS}))
    for name, shape, forms in (('network', (1, 1, 26, 26), 7),
                               ('operator', suite.OPERATOR, 1)):
        left_out = {}
        parts = side_by_side.prepare([place('Node', folder)], name, shape,
                                     left_out)
        errors = [error for _, form, error in parts[name]
                  if form.startswith(suite.THEIRS)]
        assert len(errors) == forms and max(errors) < 1e-5


# ---- Results

def test_committed_results():
    """Both places, both engines; what the page shows."""
    result = json.loads((ROOT / 'benchmarks/results/webassembly.json'
                         ).read_text())
    assert result['machine']['processor'] and result['threads'] == 1
    assert {case['part'] for case in result['cases']} == {
        f'{what}, {name}' for what in ('network', 'operator')
        for name in PLACES}
    for case in result['cases']:
        assert {'scalar', 'simd', suite.THEIRS} <= set(case['times'])
        assert case['ratios'].keys() == case['times'].keys()
        assert max(case['errors'].values()) <= 1e-5
        for low, median, high in case['times'].values():
            assert 0 < low <= median <= high
    assert set(result['sizes']) == {'scalar', 'simd', 'relaxed', suite.THEIRS}
    assert set(result['starts']) == set(PLACES)
    assert {'Node', 'Chromium', suite.THEIRS} <= set(result['engines'])


def test_a_figure_with_a_panel_for_each_part():
    result = json.loads((ROOT / 'benchmarks/results/webassembly.json'
                         ).read_text())
    figure = figures.draw(result)
    assert [ax.get_title() for ax in figure.axes] == [
        case['part'] for case in result['cases']]
    figures.plt.close(figure)
    assert (ROOT / 'benchmarks/results/webassembly.png').stat(
        ).st_size < 60_000
