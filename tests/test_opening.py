"""A notebook opened alone finds the package, or says how to get it."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import opening
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / 'chapters').glob('*.ipynb'))
LINES = opening.commands()
ALONE = [path for path in PATHS if path.stem != 'measurements']


def first_cells(path):
    """The cell that finds the package, and all imports of the page."""
    cells = nbformat.read(path, as_version=4).cells
    sources = [re.sub('^%.*', '', cell.source, flags=re.M) for cell in cells
               if cell.id == opening.CELL_ID
               or re.fullmatch('imports(-.*)?|page-imports', cell.id)]
    assert len(sources) > 1
    return sources


def run(python, sources, cwd, **variables):
    """Run cells, one list for each notebook, in a process of its own."""
    program = '''import json, sys
for name, cells in json.load(sys.stdin).items():
    space = {}
    for cell in cells:
        exec(compile(cell, name, 'exec'), space)
    print('#', name, *sorted({'nd', 'tvm'} & set(space)))
'''
    inherited = {name: value for name, value in os.environ.items()
                 if not name.startswith(('PYTHON', 'D2LTVM'))}
    return subprocess.run(
        [*python, '-c', program], input=json.dumps(sources), cwd=cwd,
        env={**inherited, **variables}, text=True, capture_output=True,
        check=False)


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """The package as pip installs it, and nothing else, in a folder."""
    folder = tmp_path_factory.mktemp('installed')
    project = folder / 'project'
    project.mkdir()
    for name in ('d2ltvm', 'LICENSE', 'README.md', 'pyproject.toml'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, project / name)
    subprocess.run([Path(sys.executable).with_name('uv'), 'pip', 'install',
                    '--quiet', '--offline', '--no-deps',
                    '--no-build-isolation', '--python', sys.executable,
                    '--target', folder / 'packages', project], check=True)
    return folder / 'packages'


def isolated(*folders):
    """A Python that imports from these folders: no clone, no *.pth file."""
    paths = [*map(str, folders), *(path for path in sys.path
                                   if path.endswith('site-packages'))]
    return {'PYTHONPATH': os.pathsep.join(paths)}


def test_all_notebooks_run_outside_of_the_repository(installed, tmp_path):
    ran = run([sys.executable, '-S'], {
        path.stem: first_cells(path) for path in ALONE}, tmp_path,
        **isolated(installed))
    assert ran.returncode == 0, ran.stderr
    lines = [line.split()[1:] for line in ran.stdout.splitlines()
             if line.startswith('# ')]
    imported = {name: names for name, *names in lines}
    assert list(imported) == [path.stem for path in ALONE]
    assert 'nd' in imported['from_scratch'] and 'tvm' in imported['folding']


def test_measurements_need_a_clone(installed, tmp_path):
    cells = first_cells(ROOT / 'chapters/measurements.ipynb')
    ran = run([sys.executable, '-S'], {'measurements': cells}, tmp_path,
              **isolated(installed))
    assert ran.stderr.endswith('open it in a clone of the book\n')


@pytest.mark.parametrize('path', PATHS[:1], ids=lambda path: path.stem)
def test_without_the_package_they_say_how_to_get_it(path, tmp_path):
    ran = run([sys.executable, '-S'], {path.stem: first_cells(path)},
              tmp_path, **isolated())
    assert ran.returncode == 1
    message = ran.stderr[ran.stderr.index('ImportError: '):]
    assert message == (
        'ImportError: this page needs the package d2ltvm. Run\n'
        f'    {LINES[0]}\n    {LINES[1]}\nand restart the kernel\n')


def test_in_a_clone_without_installation(tmp_path):
    shutil.copytree(ROOT / 'd2ltvm', tmp_path / 'd2ltvm')
    (tmp_path / 'chapters').mkdir()
    ran = run([sys.executable, '-S'], {
        'conventions': first_cells(ROOT / 'chapters/conventions.ipynb')},
        tmp_path / 'chapters', **isolated())
    assert ran.returncode == 0, ran.stderr


def small_book(tmp_path, address):
    """A project with one notebook of two cells."""
    (tmp_path / 'chapters').mkdir()
    (tmp_path / 'mxnet.txt').write_text('# why\nmxnet==9\nd2l==8\n')
    (tmp_path / '_config.yml').write_text(
        f'sphinx:\n  config:\n    public_repository: "{address}"\n')
    cells = [nbformat.v4.new_markdown_cell('# Title'),
             nbformat.v4.new_code_cell('1 + 1')]
    path = tmp_path / 'chapters/page.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_address_of_the_book_stands_in_the_cell(tmp_path, capsys):
    path = small_book(tmp_path, 'https://example.org/book')
    opening.main([], tmp_path)
    assert capsys.readouterr().out == 'changed: page.ipynb\n'
    title, cell, code = nbformat.read(path, as_version=4).cells
    assert (title.source, code.source) == ('# Title', '1 + 1')
    assert ('    pip install "d2ltvm[mxnet,tvm,onnx] @ '
            'git+https://example.org/book"\n'
            '    pip install --no-deps mxnet==9 d2l==8\n') in cell.source
    opening.main(['--check'], tmp_path)
    opening.main([], tmp_path)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('fault', ['missing', 'other text', 'other tags'])
def test_a_fault_is_found_and_mended(tmp_path, capsys, fault):
    path = small_book(tmp_path, '')
    opening.main([], tmp_path)
    right = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    if fault == 'missing':
        del notebook.cells[1]
    elif fault == 'other text':
        notebook.cells[1].source += '\n'
    else:
        notebook.cells[1].metadata.tags = []
    nbformat.write(notebook, path)
    wrong = path.read_text()
    with pytest.raises(SystemExit, match=r'page.ipynb: its first cell'):
        opening.main(['--check'], tmp_path)
    assert path.read_text() == wrong
    opening.main([], tmp_path)
    assert path.read_text() == right


@pytest.mark.skipif('D2LTVM_SOAK' not in os.environ, reason='only in `make '
                    'soak`: it installs everything')
def test_the_two_commands_install_what_the_notebooks_need(tmp_path):
    """A fresh environment, the two lines of the cell, each notebook alone."""
    python = tmp_path / 'env/bin/python'
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'env'],
                   check=True)
    shutil.copytree(ROOT, tmp_path / 'clone', ignore=shutil.ignore_patterns(
        '.*', '_build', 'chapters', '*.egg-info'))
    for line in LINES:
        command = line.replace('/PATH/OF/A/CLONE', str(tmp_path / 'clone'))
        subprocess.run(f'{python} -m {command} --quiet', shell=True,
                       check=True, stderr=subprocess.DEVNULL)
    for path in ALONE:
        ran = run([python], {path.stem: first_cells(path)}, tmp_path)
        assert ran.returncode == 0, (path.stem, ran.stderr)
