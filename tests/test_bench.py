"""The benchmarks: how they measure, not how fast anything is."""
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import bench_copy
import bench_import
import data
import engines
import figures
import run
import side_by_side
import worker
from soak import later

ROOT = Path(__file__).resolve().parent.parent
FAKE = textwrap.dedent('''
    import os, sys, time
    sys.path.insert(0, sys.argv[1])
    import engines, worker

    class Fake(engines.Engine):
        name = packages = ()
        threads = 2
        def inference(self, X, mean, var, gamma, beta):
            self.out = X * 0
            def right():
                each = -1, 1, 1
                scale = gamma / (var + 1e-5) ** 0.5
                self.out = ((X - mean.reshape(each)) * scale.reshape(each)
                            + beta.reshape(each))
            def read():
                return {'Y': self.out}
            def die():
                right()
                die.calls += 1
                if die.calls > 1:
                    sys.exit('no more')
            die.calls = 0
            return {'call': {'right': (right, read),
                             'wrong': (lambda: None, read),
                             'none': 'has no compiler',
                             'dies': (die, read)}}

    if 'child' in sys.argv and not os.fork():
        time.sleep(10000)  # and keeps the pipes open
    if 'slow' in sys.argv:
        time.sleep(10000)
    worker.main.__globals__['ENGINES'] = {'Fake': Fake}
    sys.argv[1] = 'Fake'
    worker.main()
''')


@pytest.fixture
def fake(tmp_path):
    """Starts workers whose engine is a fake; ends them afterwards."""
    program, started = tmp_path / 'fake.py', []
    program.write_text(FAKE)

    def start(*args, **more):
        started.append(side_by_side.Worker(
            'Fake', [sys.executable, str(program), str(ROOT / 'benchmarks'),
                     *args], count=2, **more))
        return started[-1]

    yield start
    for one in started:
        if not one.stderr.closed:
            one.close()


def test_protocol_and_what_is_left_out(fake):
    one, left_out = fake(), {}
    assert one.hello == {'versions': {}, 'threads': 2}
    parts = side_by_side.prepare([one], 'inference', (2, 3, 4, 5), left_out)
    (_, form, error), (_, other, _) = parts['call']
    assert (form, other) == ('right', 'dies') and error < 1e-6
    assert left_out.pop('Fake, call, none, 2 threads') == 'has no compiler'
    assert 'is wrong by' in left_out.pop('Fake, call, wrong, 2 threads')
    times = side_by_side.take_turns(parts['call'], 'call', 3, left_out)
    assert left_out.pop('Fake, dies, 2 threads') == (
        'stopped: status 1; no more')
    assert left_out.pop('Fake, right, 2 threads').startswith('stopped')
    assert times == left_out == {}
    assert one.ask(time='call', form='right', seconds=0)['cannot'].startswith(
        'stopped')


def test_a_worker_without_operator(fake):
    one, left_out = fake(), {}
    workers = [one]
    assert side_by_side.prepare(workers, 'training', (2, 3, 4, 5),
                                left_out) == {}
    assert left_out == {'Fake': 'has no operator for training'}
    assert workers == []


def read(path):
    """A file in /proc; nothing once its process has gone."""
    try:
        return path.read_text()
    except OSError:
        return ''


def test_a_worker_that_leaves_a_child_behind(fake):
    one = fake('child')
    assert 'cannot' not in one.hello
    command = read(Path(f'/proc/{one.process.pid}/cmdline'))
    family = [path.parent for path in Path('/proc').glob('[0-9]*/cmdline')
              if read(path) == command]
    assert len(family) == 2
    one.close()
    for path in family:  # gone, or dead and not yet missed
        while (stat := read(path / 'stat')) and ') Z ' not in stat:
            time.sleep(0.01)


def test_a_worker_that_hangs_or_is_not_there(fake):
    assert fake('slow', timeout=0.1).hello == {
        'cannot': 'gave no answer in 0.1 s'}
    missing = side_by_side.Worker('Nobody', ['/nowhere/python'])
    assert missing.hello['cannot'].startswith('cannot be started: No such')
    missing.close()


def test_one_sentence_for_a_missing_peer(monkeypatch, tmp_path):
    monkeypatch.setattr(side_by_side, 'SECOND', tmp_path / 'python')
    monkeypatch.setattr(side_by_side, 'ENGINES', {
        'PyTorch': engines.PyTorch})
    assert side_by_side.start() == ([], {
        'PyTorch': 'needs the environment .venv-bench, which could not be '
        'made: see benchmarks/environment.sh'})
    monkeypatch.setattr(side_by_side, 'SECOND', Path(sys.executable))
    workers, left_out = side_by_side.start()  # that one has no torch
    assert workers == []
    assert left_out == {
        'PyTorch': "cannot be imported: No module named 'torch'"}


def test_set_up_that_fails_is_a_warning(tmp_path):
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nexit 1\n')
    python.chmod(0o755)
    ran = subprocess.run(['sh', ROOT / 'benchmarks' / 'environment.sh'],
                         cwd=tmp_path, capture_output=True, text=True,
                         check=True)
    assert ran.stderr.startswith('warning: ')
    assert 'run without the engines' in ran.stderr
    assert not (tmp_path / '.venv-bench').exists()


def test_protocol_in_this_process():
    class Fails(engines.Engine):
        threads = None

        def inference(self, **arrays):
            raise MemoryError

    answers = io.StringIO()
    worker.serve(Fails, ['{"prepare": "inference", "shape": [1, 2, 3, 4]}',
                         '{"time": "call", "form": "", "seconds": 0}'],
                 answers)
    hello, first, second = map(json.loads, answers.getvalue().splitlines())
    assert hello['threads'] >= 1
    assert first == {'cannot': 'failed: MemoryError'}
    assert second['cannot'].startswith('failed')


def test_seconds_per_call_counts_calls():
    calls = []
    seconds = worker.seconds_per_call(lambda: calls.append(1), 0.001)
    assert 0 < seconds < 0.01 and len(calls) > 10


def test_share_of_the_machine_that_others_use():
    assert 0 <= side_by_side.busy(0.05) <= 1


@pytest.mark.parametrize('engine', ['TVM', later('MXNet naive')])
def test_every_engine_runs_with_one_thread_and_with_all(monkeypatch, engine):
    monkeypatch.setattr(side_by_side, 'ENGINES', {
        name: engines.ENGINES[name] for name in ('NumPy', engine)})
    monkeypatch.setattr(side_by_side, 'threads', lambda: 2)
    workers, left_out = side_by_side.start()
    try:
        assert left_out == {}
        assert [(one.name, one.form('x')) for one in workers] == [
            ('NumPy', 'x, 1 thread'), (engine, 'x, 1 thread'),
            (engine, 'x, 2 threads')]
        assert workers[2].form('') == '2 threads'
        assert {name: found['threads'] for name, found in
                side_by_side.stated(workers).items()} == {
                    'NumPy': [1], engine: [1, 2]}
    finally:
        for one in workers:
            one.close()


def rounds_of(**more):
    return {('TVM', ''): [1.0, 2.0, 4.0], ('PyTorch', 'given output'):
            [3.0, 6.0, 12.0], ('PyTorch', 'new output'): [9.0, 9.0, 9.0],
            ('MXNet threaded', ''): [8.0, 8.0, 8.0],
            ('MXNet naive', ''): [5.0, 5.0, 5.0]} | more


def test_aggregation():
    times = rounds_of()
    got = side_by_side.aggregate(times, dict.fromkeys(times, 1e-7))
    assert list(got['times']) == ['TVM', 'PyTorch', 'MXNet']
    assert got['times']['TVM'] == [1.5, 2.0, 3.0]
    assert got['forms'] == {'PyTorch': 'given output', 'MXNet': 'naive'}
    assert got['all_forms'] == {
        'PyTorch, given output': 6.0, 'PyTorch, new output': 9.0,
        'MXNet, threaded': 8.0, 'MXNet, naive': 5.0}
    # taken within each round: 3, 3, 3; a ratio of quartiles is no ratio
    assert got['ratios']['PyTorch'] == [3.0, 3.0, 3.0]
    assert got['ratios']['MXNet'] == [1.875, 2.5, 3.75]
    assert got['errors']['TVM'] == 1e-7
    # the copy is measured by the process of TVM, and is nobody's form
    times |= {('TVM', 'copy, 1 thread'): [0.5, 1.0, 2.0],
              ('TVM', 'copy, 2 threads'): [0.6, 1.1, 2.1]}
    got = side_by_side.aggregate(times, dict.fromkeys(times, 0))
    assert got['ratios']['copy'] == [0.5, 0.5, 0.5]
    assert got['times']['TVM'] == [1.5, 2.0, 3.0]
    assert got['forms']['copy'] == '1 thread'
    for form in ('', 'copy, 1 thread', 'copy, 2 threads'):
        del times['TVM', form]
    with pytest.raises(RuntimeError, match='no times of TVM'):
        side_by_side.aggregate(times, {})


def test_every_engine_gets_the_same_threads():
    count = 3
    variables = side_by_side.environment(count, {'MORE': '1'})
    for name in ('OMP', 'TVM', 'MKL', 'OPENBLAS'):  # whatever is set here
        assert variables[f'{name}_NUM_THREADS'] == str(count)
    assert variables['TVM_BIND_THREADS'] == '0' and variables['MORE'] == '1'


@pytest.mark.parametrize('offset', [0, 100])
def test_exact_gradients_are_those_of_the_definition(offset):
    """Against differences of the forward pass, in float64."""
    arrays = {name: array.astype('float64')
              for name, array in data.training((3, 2, 2, 5)).items()}
    arrays['X'] += offset
    exact, h = data.training_exact(**arrays), 1e-4
    for name in ('X', 'gamma', 'beta'):
        for i in (0, 1):
            loss = []
            for sign in (1, -1):
                moved = {key: array.copy() for key, array in arrays.items()}
                moved[name].flat[i] += sign * h
                loss.append((data.training_exact(**moved)['Y']
                             * arrays['dY']).sum())
            np.testing.assert_allclose((loss[0] - loss[1]) / (2 * h),
                                       exact[f'd{name}'].flat[i], rtol=1e-5,
                                       atol=1e-6)
    axes = (0, 2, 3)
    np.testing.assert_allclose(exact['moving_mean'],
                               0.1 * arrays['X'].mean(axes), atol=1e-12)
    np.testing.assert_allclose(exact['moving_var'],
                               0.9 + 0.1 * arrays['X'].var(axes), rtol=1e-9)


def test_error_sees_every_result():
    exact = {'Y': np.array([1.0, -4.0]), 'dX': np.array([2.0])}
    assert data.error({'Y': np.array([1.0, -4.0])}, exact) == 0
    assert data.error({'Y': np.array([1.0, -3.0]), 'dX': exact['dX']},
                      exact) == 0.25
    assert data.error({'dX': np.array([np.nan])}, exact) == float('inf')
    with pytest.raises(ValueError, match='dX: expected shape'):
        data.error({'dX': np.ones(2)}, exact)


def test_processes_of_the_copy(monkeypatch):
    monkeypatch.setattr(side_by_side, 'SECONDS', 1e-4)
    result = side_by_side.measure_copy('copy', [1000, 70_000], 2, rounds=2)
    assert result['baseline'] == 'process 1' and result['left_out'] == {}
    assert set(result['engines']) == {'process 1', 'process 2'}
    for count, case in zip((1000, 70_000), result['cases'], strict=True):
        assert case['shape'] == [count]
        assert set(case['times']) == {'process 1', 'process 2'}
        assert case['ratios']['process 1'] == [1, 1, 1]
        assert case['errors'] == {'process 1': 0, 'process 2': 0}


def test_copies_are_as_large_as_what_they_judge():
    counts = bench_copy.counts()
    assert counts == sorted(set(counts))
    assert 4 * max(counts) <= engines.COPY_MOST
    operator = engines.TVM()
    for count in (1000, 2000):  # in the same memory
        run, read = operator.copied(np.ones(10, 'float32'), count)
        assert not np.array_equal(read()['X'], np.ones(10))
        run()
        np.testing.assert_array_equal(read()['X'], np.ones(10))
        assert (operator.buffers[1][:count] == 1).all()
    assert [buffer.nbytes for buffer in operator.buffers] == 2 * [
        engines.COPY_MOST]


@pytest.mark.parametrize('count', [1, 1000, data.HUGE, data.HUGE + 4])
def test_memory_starts_on_a_boundary(count):
    block = data.memory(count)
    assert block.nbytes == count
    edge = data.HUGE if count >= data.HUGE else 64
    assert block.ctypes.data % edge == 0
    block[:] = 7
    assert (block == 7).all()


def test_large_memory_asks_for_huge_pages():
    """And can get them: it is private, and marked for the system."""
    block = data.memory(2 * data.HUGE)
    start = block.ctypes.data
    maps = re.split(r'^(?=[0-9a-f]+-)', Path('/proc/self/smaps').read_text(),
                    flags=re.MULTILINE)
    own, = (area for area in maps[1:] if int(area.split('-')[0], 16) <= start
            < int(re.match(r'[0-9a-f]+-([0-9a-f]+)', area)[1], 16))
    assert own.split()[1] == 'rw-p'
    if Path('/sys/kernel/mm/transparent_hugepage').exists():
        assert 'hg' in re.search(r'VmFlags:(.*)', own)[1].split()


@pytest.mark.parametrize('suite', ['inference', 'training', 'network', 'copy'])
@pytest.mark.parametrize('name', [name for name, engine in
                                  engines.ENGINES.items()
                                  if not engine.second])
def test_engines_of_the_book_are_right(name, suite):
    """As the worker checks them, on a shape with remainders."""
    one, shape = engines.ENGINES[name](), (3, 4, 5, 7)
    one.threads = one.threads or 2
    if suite == 'network':
        shape = (3, 1, 26, 26)
    if ((suite == 'copy' and name != 'TVM')
            or (suite == 'network' and name == 'NumPy')):
        with pytest.raises(NotImplementedError, match='was not'):
            worker.prepare(one, suite, shape)
        return
    _, answer = worker.prepare(one, suite, shape)
    assert answer['errors']
    for forms in answer['errors'].values():
        assert max(forms.values()) < 2e-6
    if suite == 'network':
        assert set(answer['errors']) >= {'call', 'unfolded'}


def test_cropping_changes_no_logit():
    """What pooling drops of 28 x 28 pixels is all that 26 x 26 lack."""
    arrays = data.network((2, 1, 28, 28))
    full = data.network_exact(**arrays)['Y']
    arrays['X'] = arrays['X'][:, :, :26, :26]
    np.testing.assert_allclose(data.network_exact(**arrays)['Y'], full,
                               rtol=1e-12)
    arrays['X'] = arrays['X'][:, :, :25, :25]
    with pytest.raises(ValueError):
        data.network_exact(**arrays)


def a_result():
    times = rounds_of(copy=None)
    del times['copy']
    case = side_by_side.aggregate(times, dict.fromkeys(times, 1e-7))
    lonely = {key: {'TVM': value['TVM']} if 'TVM' in value else {}
              for key, value in case.items()}
    return {'title': 'a title', 'baseline': 'TVM', 'rounds': 3, 'threads': 2,
            'engines': {}, 'left_out': {'JAX': 'has gone'}, 'cases': [
                {'shape': [1, 2, 3, 4], 'part': 'call', **case},
                {'shape': [2, 2, 3, 4], 'part': 'call', **lonely}]}


def test_table_file_and_figure(tmp_path):
    result = a_result()
    head, first, second, last = run.table_of_cases(result)
    assert head.split()[-3:] == ['TVM', 'PyTorch', 'MXNet']
    assert first.split()[:2] == ['1x2x3x4', 'call']
    assert '6e+06 ±38% 3.00x' in first
    assert second.split()[-2:] == ['-', '-']
    assert last == '  left out: JAX has gone'
    run.write('some', result, tmp_path)
    stored = json.loads((tmp_path / 'some.json').read_text())
    assert stored == json.loads(json.dumps(result))
    assert {'processor', 'instructions', 'cores', 'huge pages', 'python',
            'apache-tvm', 'mxnet', 'numpy'} == set(stored['machine'])
    assert (tmp_path / 'some.png').stat().st_size < 60_000


@pytest.mark.parametrize('shapes, label', [
    (((1, 1, 28, 28), (64, 1, 28, 28)), 'images'),
    (((1, 2, 3, 4), (1, 2, 6, 8)), 'size of X (MB)')])
def test_figure_over_images_or_bytes(shapes, label):
    result = a_result()
    for case, shape in zip(result['cases'], shapes, strict=True):
        case['shape'] = shape
    figure = figures.draw(result)
    assert figure.axes[0].get_xlabel() == label
    assert [ax.get_title() for ax in figure.axes] == [
        'call, 28 × 28 pixels' if label == 'images' else 'call']
    figures.plt.close(figure)


def test_suites_of_functions_keep_their_format(tmp_path):
    result = {'title': 't', 'baseline': 'a', 'times': {
        'a': (1.0, 2.0, 3.0), 'b': (2.0, 3.0, 5.0)}}
    assert '1.50 x a' in run.table_of_times(result)[1]
    run.write('some', result, tmp_path)
    stored = json.loads((tmp_path / 'some.json').read_text())
    assert stored['ratios'] == {'a': 1.0, 'b': 1.5}
    assert set(bench_import.MODULES) >= {'tvm', 'mxnet'}


def test_the_step_without_a_compiler_leaves_one_layer_out(monkeypatch,
                                                          capsys):
    import bench_training_step as bench

    def names():
        return [*bench.run()['times']]

    def missing():
        raise RuntimeError('no compiler')

    monkeypatch.setattr(bench, 'BATCH_SIZE', 4)
    monkeypatch.setattr(bench.fs, 'median_times', lambda steps, **_: {
        name: step() for name, step in steps.items()})
    every = names()
    assert {'built-in', 'compiled, with relu', 'in C++, with relu',
            'none'} < {*every} and capsys.readouterr().out == ''
    monkeypatch.setattr(bench, 'build_operator', missing)
    assert names() == [name for name in every if 'C++' not in name]
    assert 'left out: in C++ (no compiler)' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['numpy', later('mxnet')])
def test_a_package_can_be_imported_for_its_time(name):
    """MXNet with our help."""
    assert bench_import.seconds(name) > 0


def test_exact_network_is_that_of_the_definition():
    """One logit against sums written out, normalizations by themselves."""
    arrays = data.network((2, 1, 28, 28))
    got = data.network_exact(**arrays)['Y']

    def normalized(i, Z):
        gamma, beta, mean, var = (
            arrays[f'{name}{i}'].astype('float64').reshape(
                -1, *(1,) * (Z.ndim - 1)) for name in data.NORM)
        return np.maximum(gamma * (Z - mean) / np.sqrt(var + data.EPS)
                          + beta, 0)

    image = arrays['X'][1]
    for i in (1, 2):
        W, b = (arrays[f'{kind}{i}'].astype('float64') for kind in 'Wb')
        k, side = W.shape[2], image.shape[1] - W.shape[2] + 1
        conv = normalized(i, np.array([[[(W[o] * image[
            :, y:y + k, x:x + k]).sum() + b[o] for x in range(side)]
            for y in range(side)] for o in range(len(W))]))
        half = side // 2
        image = sum(conv[:, i:2 * half:2, j:2 * half:2]
                    for i in (0, 1) for j in (0, 1)) / 4
    hidden = normalized(3, arrays['W3'] @ image.ravel() + arrays['b3'])
    np.testing.assert_allclose(got[1], arrays['W4'] @ hidden + arrays['b4'],
                               rtol=1e-6, atol=1e-6)


def test_committed_results_of_the_network():
    """The quickest peers, for one image and many; the AVX2 build, too."""
    folder = ROOT / 'benchmarks' / 'results'
    result = json.loads((folder / 'network.json').read_text())
    cases = {(case['shape'][0], case['part']): case
             for case in result['cases']}
    assert set(cases) >= {(1, 'call'), (64, 'call')}
    for (_, part), case in cases.items():
        peers = {'ONNX Runtime'} if part == engines.AVX2 else {
            'MXNet', 'PyTorch', 'ONNX Runtime'}
        assert {'TVM'} | peers <= set(case['times'])
        assert max(case['errors'].values()) < 1e-5
    assert set(result['engines']) | set(result['left_out']) >= set(
        engines.ENGINES)


@pytest.mark.parametrize('suite', ['inference', 'training'])
def test_committed_results(suite):
    """Complete: processor, threads, versions, spread, the limit."""
    folder = ROOT / 'benchmarks' / 'results'
    result = json.loads((folder / f'{suite}.json').read_text())
    assert result['machine']['processor'] and result['threads'] >= 1
    assert 0 <= result['busy'] <= 1
    assert set(result['engines']) | set(result['left_out']) >= set(
        engines.ENGINES)
    for engine in result['engines'].values():
        assert engine['versions'] and engine['threads']
    for case in result['cases']:
        assert {'TVM', 'copy'} <= set(case['times'])
        assert case['ratios'].keys() == case['times'].keys()
        assert case['ratios']['TVM'] == [1.0, 1.0, 1.0]
        assert max(case['errors'].values()) <= side_by_side.TOLERANCE
        for low, median, high in case['times'].values():
            assert 0 < low <= median <= high
    assert (folder / f'{suite}.png').stat().st_size < 60_000


def test_figures_have_a_style_for_every_engine():
    peers = {engine.peer or name for name, engine in engines.ENGINES.items()}
    assert peers | {engines.COPY} == set(figures.STYLES)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Own results and those of the book, both empty."""
    for name in ('OWN', 'BOOK'):
        monkeypatch.setattr(run, name, tmp_path / name)
        (tmp_path / name).mkdir()
    return run.OWN, run.BOOK


def test_a_run_leaves_the_results_of_the_book_alone(folders, monkeypatch,
                                                    capsys):
    class Suite:
        run = staticmethod(a_result)

    monkeypatch.setitem(sys.modules, 'bench_some', Suite)
    own, book = folders
    own.rmdir()
    run.report('some')
    assert {path.name for path in own.iterdir()} == {'some.json', 'some.png'}
    assert list(book.iterdir()) == []
    assert capsys.readouterr().out.startswith('a title (some)\n')


def test_own_results_are_kept(folders, capsys):
    own, book = folders
    run.write('one', a_result(), own)
    (book / 'one.json').write_text('{"machine": {"processor": "another"}}')
    (book / 'other.json').write_text('none of `make bench`')
    run.keep(['one', 'two'])
    assert sorted(capsys.readouterr().out.splitlines()) == [
        'kept one.json', 'kept one.png']
    for name in ('one.json', 'one.png'):
        assert (book / name).read_bytes() == (own / name).read_bytes()
    assert (book / 'other.json').read_text() == 'none of `make bench`'


@pytest.mark.parametrize('flags, name', [
    (['fma', 'avx2', 'avx512f'], 'AVX-512'), (['fma', 'avx2'], 'AVX2')])
def test_instructions_of_a_processor(flags, name):
    assert run.instructions(flags) == name
    assert run.instructions(['avx']) not in ('AVX-512', 'AVX2')


def test_other_instructions_stand_beside(folders, monkeypatch, capsys):
    """And leave the machine that the pages quote where it is."""
    own, book = folders
    monkeypatch.setattr(run, 'instructions', lambda flags: 'AVX-512')
    run.write('one', a_result(), own)
    run.write('two', a_result(), own)
    run.keep(['one', 'two'])
    quoted = (book / 'one.json').read_bytes()
    monkeypatch.setattr(run, 'instructions', lambda flags: 'AVX2')
    run.write('one', a_result(), own)
    for path in own.glob('two.*'):
        path.unlink()
    (book / 'avx2').mkdir()
    (book / 'avx2' / 'two.json').write_text('{"machine": {}}')
    with pytest.raises(SystemExit, match='are of different machines'):
        run.keep(['one', 'two'])
    (book / 'avx2' / 'two.json').unlink()
    capsys.readouterr()
    run.keep(['one', 'two'])
    assert sorted(capsys.readouterr().out.splitlines()) == [
        'kept avx2/one.json', 'kept avx2/one.png']
    assert (book / 'one.json').read_bytes() == quoted
    assert json.loads((book / 'avx2' / 'one.json').read_text())[
        'machine']['instructions'] == 'AVX2'


def test_results_of_two_machines_are_not_mixed(folders):
    own, book = folders
    with pytest.raises(SystemExit, match=r'no results in .*make bench'):
        run.keep(['one'])
    run.write('one', a_result(), own)
    before = '{"machine": {"processor": "another"}}'
    (book / 'two.json').write_text(before)
    with pytest.raises(SystemExit, match=r'(?s)OWN/one.json and .*BOOK/two'
                       r'\.json are of different machines'):
        run.keep(['one', 'two'])
    assert [path.name for path in book.iterdir()] == ['two.json']


def shown(notebook):
    """What `make test` compares: by cell, without pictures."""
    return {cell.id: [[output.get('text'), {
        key: value for key, value in output.get('data', {}).items()
        if key != 'image/png'}] for output in cell.outputs]
        for cell in notebook.cells if cell.cell_type == 'code'
        and 'nbval-ignore-output' not in cell.metadata.get('tags', ())}


def copy_of_results(source, folder, without=''):
    """Results of an imagined machine, where every ratio is 12.34."""
    folder.mkdir(parents=True)
    for suite in ('inference', 'network'):
        result = json.loads((source / f'{suite}.json').read_text())
        result['machine'] |= {'processor': 'Abacus', 'cores': 77,
                              'instructions': 'beads'}
        for case in result['cases']:
            case['ratios'] = {peer: [0.5, 12.34, 0.7]
                              for peer in case['ratios'] if peer != without}
        (folder / f'{suite}.json').write_text(json.dumps(result))


def test_other_results_stand_beside_those_of_the_book(tmp_path, monkeypatch):
    """Own ones, and those of other instructions; nothing else changes."""
    monkeypatch.delenv('D2LTVM_OWN', raising=False)
    bench, results = tmp_path / 'benchmarks', ROOT / 'benchmarks/results'
    (tmp_path / 'chapters').mkdir()
    shutil.copytree(results, bench / 'results')
    (bench / 'figures.py').symlink_to(ROOT / 'benchmarks/figures.py')
    copy_of_results(results, bench / 'own', without='MXNet')
    copy_of_results(results, bench / 'results/beads')
    stored = nbformat.read(ROOT / 'chapters/measurements.ipynb', 4)
    page = nbformat.read(ROOT / 'chapters/measurements.ipynb', 4)
    NotebookClient(page, kernel_name='python3', coalesce_streams=True,
                   resources={'metadata': {'path': tmp_path / 'chapters'}}
                   ).execute()

    def said(notebook, name):
        cell, = (cell for cell in notebook.cells if cell.id == name)
        return ''.join(output.get('text', '') + output.get('data', {}).get(
            'text/markdown', '') for output in cell.outputs)

    assert ({name: out for name, out in shown(page).items() if name != 'other'}
            == {name: out for name, out in shown(stored).items()
                if name != 'other'})
    assert said(stored, 'own') == 'no results of your own yet\n'
    for name in ('own', 'other'):
        assert said(page, name).count('Abacus, beads, 77 cores') == 1
        assert said(page, name).count('**12.34**') >= 6
    assert '**-**' in said(page, 'own').split('MXNet', 1)[1].split('\n')[0]
    assert '**12.34**' in said(page, 'other').split('MXNet')[1].split('\n')[0]


def test_own_results_are_ignored_and_the_right_pages_are_executed():
    assert 'benchmarks/own/' in (ROOT / '.gitignore').read_text().split()
    recipe = re.search(r'^bench-keep: .*\n((?:\t.*\n)+)',
                       (ROOT / 'Makefile').read_text(), re.MULTILINE)[1]
    suites = [path.stem.removeprefix('bench_')
              for path in (ROOT / 'benchmarks').glob('bench_*.py')]
    places = re.compile(r'benchmarks/results(/({}).json|\'\))'.format(
        '|'.join(suites)))
    pages = {path.stem for path in (ROOT / 'chapters').glob('*.ipynb')
             if any(places.search(cell.source) for cell in
                    nbformat.read(path, 4).cells if cell.cell_type == 'code')}
    assert pages == set(re.findall(r'\w+', recipe)) & {
        path.stem for path in (ROOT / 'chapters').glob('*.ipynb')}
