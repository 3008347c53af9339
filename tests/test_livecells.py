"""Cells that run in their page: where Python comes from, what a cell shows."""
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import livecells
import livecells_runner
import nbformat
import nbformat.v4
import pytest

from npm_package import give_npm, small_files

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = 'http://127.0.0.1:9/'  # where nobody answers


def marked(path):
    """The cells of a notebook that run in its page."""
    return [cell for cell in nbformat.read(path, 4).cells
            if 'live' in cell.metadata.get('tags', ())]


PAGES = {path.stem: marked(path)
         for path in sorted((ROOT / 'chapters').glob('*.ipynb'))
         if marked(path)}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with small files in place of the real ones; no other source."""
    folder = small_files(livecells, tmp_path, monkeypatch)
    monkeypatch.setattr(livecells, 'CORE', NOWHERE)
    monkeypatch.setattr(livecells, 'WHEELS', NOWHERE)
    monkeypatch.delenv('D2LTVM_PYODIDE', raising=False)
    return folder


def stored():
    folder = livecells.store()
    return {path.name for path in folder.iterdir()} if folder.exists() else {}


def test_the_folder_that_is_named_is_enough(own, monkeypatch):
    monkeypatch.setenv('D2LTVM_PYODIDE', str(own))
    assert livecells.sources() == {
        path.name: path.read_bytes() for path in own.iterdir()}
    assert not stored()


def test_another_file_in_the_folder_is_refused(own, monkeypatch):
    monkeypatch.setenv('D2LTVM_PYODIDE', str(own))
    (own / livecells.NUMPY).write_text('something else')
    with pytest.raises(ValueError, match=f'{own}/numpy.*SHA-256'):
        livecells.sources()


def test_a_folder_that_is_missing_is_named(own, monkeypatch):
    monkeypatch.setenv('D2LTVM_PYODIDE', str(own / 'no'))
    with pytest.raises(FileNotFoundError, match=f'D2LTVM_PYODIDE.*{own}/no'):
        livecells.sources()


def test_what_the_folder_lacks_comes_from_npm_once(own, tmp_path, monkeypatch):
    give_npm(tmp_path, own, leave={livecells.NUMPY})
    monkeypatch.setenv('D2LTVM_PYODIDE', str(own))
    expected = {path.name: path.read_bytes() for path in own.iterdir()}
    core = set(expected) - {livecells.NUMPY}
    for name in core:
        (own / name).unlink()
    assert livecells.sources() == expected
    (tmp_path / 'bin/npm').unlink()
    assert stored() == core
    assert livecells.sources() == expected
    (own / livecells.NUMPY).unlink()
    with pytest.raises(OSError, match=r'numpy.*cannot be loaded'):
        livecells.sources()


def test_a_damaged_package_is_not_kept(own, tmp_path):
    for path in own.iterdir():
        path.write_text('damaged')
    give_npm(tmp_path, own, leave={livecells.NUMPY})
    with pytest.raises(ValueError, match='SHA-256'):
        livecells.sources()
    assert not stored()


@pytest.mark.parametrize('damaged', [False, True])
def test_a_download_is_verified(own, monkeypatch, damaged):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    expected = {path.name: path.read_bytes() for path in own.iterdir()}
    if damaged:
        (own / livecells.NUMPY).write_text('damaged')
    server = ThreadingHTTPServer(('127.0.0.1', 0),
                                 partial(Quiet, directory=own))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ('CORE', 'WHEELS'):
        monkeypatch.setattr(livecells, name,
                            f'http://127.0.0.1:{server.server_port}/')
    try:
        if damaged:
            with pytest.raises(ValueError, match='SHA-256'):
                livecells.sources()
            assert livecells.NUMPY not in stored()
        else:
            assert livecells.sources() == expected
    finally:
        server.shutdown()
        server.server_close()
    if not damaged:
        assert livecells.sources() == expected  # nobody is asked again


def test_without_npm_and_network_an_error_names_the_address(own):
    with pytest.raises(OSError, match=f'{NOWHERE}.*cannot be loaded'):
        livecells.sources()
    assert not stored()


def test_licences_are_those_of_what_is_shipped():
    licenses = ROOT / '_ext/licenses'
    assert 'Mozilla Public License Version 2.0' in (
        licenses / 'LICENSE-Pyodide.txt').read_text()
    assert 'PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2' in (
        licenses / 'LICENSE-Python.txt').read_text()
    notice = (licenses / 'NOTICE.txt').read_text()
    assert f'Pyodide {livecells.VERSION}' in notice
    assert f'NumPy {livecells.NUMPY.split("-")[1]}' in notice


def run(*codes, name='cell 1'):
    """What some cells show, and whether the last one ended well."""
    shown, space = [], {'__name__': '__main__'}
    for code in codes:
        right = livecells_runner.run(
            code, name, lambda *output: shown.append(output), space)
    return joined(shown), right


def joined(outputs):
    """Neighbours of one kind become one."""
    together = []
    for kind, text in outputs:
        if together and together[-1][0] == kind and kind != 'svg':
            together[-1][1] += text
        else:
            together.append([kind, text])
    return together


class Drawing:
    def _repr_svg_(self):
        return '<svg/>'


def test_a_cell_shows_what_a_notebook_would():
    assert run('x = 6', 'print("x is", x)\nx * 7') == (
        [['stream', 'x is 6\n'], ['text', '42\n']], True)
    assert run('None', 'x = 1', '', '# nothing') == ([], True)


def test_a_cell_that_asks_gets_a_sentence():
    ((kind, text),), right = run('name = input("Who? ")')
    assert (kind, right) == ('error', False)
    assert text.endswith('a cell cannot ask; write the value into it\n')
    assert run('import sys\nprint("to", file=sys.stderr)\nprint("of")') == (
        [['stderr', 'to\n'], ['stream', 'of\n']], True)
    assert run('def f():\n    return __name__', 'f()') == (
        [['text', "'__main__'\n"]], True)


def test_a_drawing_is_shown_in_its_place():
    drawing = 'from test_livecells import Drawing\n'
    assert run(drawing + 'Drawing()') == ([['svg', '<svg/>']], True)
    shown, right = run(drawing + 'Drawing')
    assert right and shown[0][0] == 'text'
    assert run(drawing + 'print(1)\ndisplay(Drawing(), 2)\nprint(3)') == (
        [['stream', '1\n'], ['svg', '<svg/>'], ['text', '2\n'],
         ['stream', '3\n']], True)
    assert run("display({'image/svg+xml': '<svg>', 'text/plain': ''}, "
               'raw=True)') == ([['svg', '<svg>']], True)


@pytest.mark.parametrize(('code', 'last'), [
    ('1 / 0', 'ZeroDivisionError: division by zero'),
    ('1 +', 'SyntaxError: invalid syntax'),
    ('exit(3)', 'SystemExit: 3'),
    ('from d2ltvm.checks import check_number\n'
     'check_number("eps", "small")', 'TypeError: eps: expected ')])
def test_an_error_is_told_from_the_cell_on(code, last):
    shown, right = run(code, name='cell 7')
    assert not right
    kind, text = shown[-1]
    assert kind == 'error'
    assert text.rstrip().split('\n')[-1].startswith(last)
    assert 'File "cell 7", line' in text
    assert 'livecells_runner' not in text
    assert code.split('\n')[-1] in text


def test_an_error_names_the_cell_of_its_function():
    space, shown = {}, []
    for number, code in enumerate(('def f(x):\n    return 1 / x', 'f(0)'), 1):
        livecells_runner.run(code, f'cell {number}',
                             lambda *output: shown.append(output), space)
    text = shown[-1][1]
    assert text.index('"cell 2", line 1') < text.index('"cell 1", line 2')
    assert 'return 1 / x' in text


ALONE = '''
import json, sys
sys.path.insert(0, sys.argv[1])
KNOWN = {*sys.stdlib_module_names, "numpy", "d2ltvm", "sklearn",
         "livecells_runner"}


class Refuse:
    """The page has Python, NumPy, and what the book puts beside them."""

    def find_spec(self, name, path=None, target=None):
        name = name.partition(".")[0]
        if name not in KNOWN and not name.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"no {name} here", name=name)


sys.meta_path.insert(0, Refuse())
import d2ltvm, livecells_runner
assert d2ltvm.__file__.startswith(sys.argv[1]), d2ltvm.__file__
found = []
for code in json.load(sys.stdin):
    shown = []
    right = livecells_runner.run(code, "cell",
                                 lambda *output: shown.append(output))
    found.append([right, shown])
json.dump(found, sys.stdout)
'''


def run_alone(tmp_path, codes):
    """Run cells with what the page has, and nothing else."""
    archive = tmp_path / 'book.zip'
    archive.write_bytes(livecells.package())
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('D2LTVM_SHORT', 'PYTHONPATH')}
    ran = subprocess.run(
        [sys.executable, '-c', ALONE, archive], input=json.dumps(codes),
        stdout=subprocess.PIPE, text=True, check=True, env=environment,
        cwd=tmp_path)
    return json.loads(ran.stdout)


def in_the_book(cell):
    """What the book shows below a cell, in the form of the runner."""
    shown = []
    for output in cell.outputs:
        if output.output_type == 'stream':
            shown.append(('stream', output.text))
        elif 'image/svg+xml' in output.data:
            shown.append(('svg', output.data['image/svg+xml']))
        else:
            shown.append(('text', output.data['text/plain'] + '\n'))
    return joined(shown)


def test_modules_in_the_page_need_numpy_alone(tmp_path):
    names = [name for name in livecells.MODULES if name != '__init__']
    found = run_alone(tmp_path, [f'import d2ltvm.{name}' for name in names])
    assert [name for name, (right, _) in zip(names, found, strict=True)
            if not right] == []


@pytest.mark.parametrize('page', PAGES)
def test_marked_cells_print_what_the_book_shows(tmp_path, page):
    """From the first to the last, with the outputs that are stored."""
    cells = PAGES[page]
    found = run_alone(tmp_path, [cell.source for cell in cells])
    for cell, (right, shown) in zip(cells, found, strict=True):
        assert right, shown
        if 'nbval-ignore-output' not in cell.metadata.tags:
            assert joined(shown) == in_the_book(cell), cell.id


def test_pages_of_the_first_part_have_cells_that_run():
    assert {'theory', 'why', 'moving_statistics', 'conventions'} <= set(PAGES)
    assert len(PAGES['theory']) >= 15


def test_the_digits_of_the_page_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits
    theirs = load_digits()
    (right, shown), = run_alone(tmp_path, [
        'from sklearn import datasets\n'
        'd = datasets.load_digits()\n'
        'd.images.shape, d.images.sum(), d.target.sum(), d.target.dtype'])
    assert right and shown[0][1] == repr((
        theirs.images.shape, theirs.images.sum(), theirs.target.sum(),
        theirs.target.dtype)) + '\n'
