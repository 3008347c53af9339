"""The set-up takes the right Python, or says in one sentence why it cannot."""
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'tools/environment.sh'
# Programs that claim to be Python: they answer the script's questions in turn
OTHER_VERSION = 'exit 1'
NO_WHEEL = 'case "$2" in *libc*) exit 1;; *) exit 0;; esac'
NO_VENV = '[ "$1" = -c ]'
ALL_NAMES = ('python3.11', 'python3', 'python')


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)


def set_up(tmp_path, programs, **variables):
    """Run the script with these programs alone; what it printed."""
    folder = tmp_path / 'bin'
    for name, answers in programs.items():
        program(folder / name, answers)
    for name in ('cat', 'find', 'rm', 'sh', 'uname'):
        if not (folder / name).exists():
            folder.mkdir(exist_ok=True)
            (folder / name).symlink_to(shutil.which(name))
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ('PYTHON', 'VENV')}
    return subprocess.run(
        ['/bin/sh', SCRIPT], cwd=tmp_path, text=True, capture_output=True,
        check=False, env={**inherited, 'PATH': str(folder),
                          'PYENV_ROOT': str(tmp_path / 'pyenv'), **variables})


def assert_refused(tmp_path, ran, expected):
    assert ran.returncode == 1 and ran.stdout == ''
    assert ran.stderr.startswith('error: ') and expected in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / '.venv').exists()


@pytest.mark.parametrize(('answers', 'expected'), [
    (OTHER_VERSION, 'Python 3.11, 3.12 or 3.13 is needed'),
    (NO_WHEEL, 'no common wheel for this machine'),
    (NO_VENV, 'cannot make a virtual environment')])
def test_one_clear_sentence(tmp_path, answers, expected):
    ran = set_up(tmp_path, dict.fromkeys(ALL_NAMES, answers))
    assert_refused(tmp_path, ran, expected)


@pytest.mark.parametrize(('found', 'taken'), [
    (['bin/python3.11', 'bin/python3.13', 'bin/python3.12'], 'python3.13'),
    (['bin/python3', 'bin/python3.11'], 'python3.11'),
    (['bin/python3'], 'python3'),
    (['bin/python3.11', 'pyenv/versions/3.12.1/bin/python'],
     'versions/3.12.1/bin/python')])
def test_the_newest_is_taken(tmp_path, found, taken):
    for path in found:
        program(tmp_path / path, NO_VENV)
    ran = set_up(tmp_path, {})
    assert_refused(tmp_path, ran, f'{taken} cannot make a virtual')


def test_the_named_python_is_taken(tmp_path):
    programs = dict.fromkeys(['python3.13', 'python3.11', 'mine'], NO_VENV)
    ran = set_up(tmp_path, programs, PYTHON='mine')
    assert_refused(tmp_path, ran, 'error: mine cannot make a virtual')


@pytest.mark.parametrize('named', ['nosuch', 'old', '/no/such/python'])
def test_a_wrong_python_is_refused_by_name(tmp_path, named):
    ran = set_up(tmp_path, {'python3.13': NO_VENV, 'old': OTHER_VERSION},
                 PYTHON=named)
    assert_refused(tmp_path, ran, f'PYTHON={named} is not CPython 3.11')


def test_make_looks_at_a_named_python_each_time():
    """Also in a folder that has its environment."""
    outer = {'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS'}  # if make runs this test
    ran = subprocess.run(
        ['make', 'check', 'PYTHON=/no/such/python'], cwd=ROOT, text=True,
        env={k: v for k, v in os.environ.items() if k not in outer},
        capture_output=True, check=False)
    assert ran.returncode == 2 and 'PYTHON=/no/such/python is' in ran.stderr
    assert ran.stdout == ''


def test_uv_brings_a_python(tmp_path):
    """A stand-in for uv: it puts a Python where it says that it is."""
    python = tmp_path / 'uv/python3.13'
    program(tmp_path / 'hidden', NO_VENV)
    uv = f'''case "$1 $2 $3" in
"python install 3.13") mkdir -p {python.parent}; \
cp {tmp_path}/hidden {python};;
"python find 3.13") echo {python};;
*) exit 1;;
esac'''
    for name in ('cp', 'mkdir'):
        (tmp_path / 'bin').mkdir(exist_ok=True)
        (tmp_path / 'bin' / name).symlink_to(shutil.which(name))
    ran = set_up(tmp_path, {**dict.fromkeys(ALL_NAMES, OTHER_VERSION),
                            'uv': uv})
    assert ran.stdout == 'Python 3.13 comes by uv ...\n'
    assert ran.stderr.startswith(f'error: {python} cannot make a virtual')


def test_uv_that_cannot_bring_one(tmp_path):
    ran = set_up(tmp_path, {**dict.fromkeys(ALL_NAMES, OTHER_VERSION),
                            'uv': 'echo no network >&2; exit 1'})
    assert ran.returncode == 1
    assert ran.stderr == ('no network\nerror: uv could not bring Python 3.13 '
                          '(see above)\n')


@pytest.mark.parametrize('folder', ['.venv', 'other place'])
def test_a_second_run_finds_nothing_to_do(tmp_path, folder):
    """Until what it pins changes, or the folder moves."""
    (tmp_path / 'tools').mkdir()
    for name in ('requirements.txt', 'pyproject.toml', 'tools/environment.sh'):
        (tmp_path / name).touch()
    program(tmp_path / folder / 'bin/python', '[ "$1" = -c ]')
    ready = tmp_path / folder / '.ready'
    ready.write_text(f'{tmp_path}\n')
    run = {'tmp_path': tmp_path, 'programs': {'python3.12': NO_VENV},
           'VENV': folder}
    ran = set_up(**run)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, '', '')
    os.utime(tmp_path / 'requirements.txt', (2e9, 2e9))
    ran = set_up(**run)
    assert ran.returncode == 1 and 'Installing the pinned' in ran.stdout
    assert 'of requirements.txt could not be installed' in ran.stderr
    assert not ready.exists()
    ready.write_text('/another/folder\n')
    assert 'cannot make a virtual' in set_up(**run).stderr


def test_the_pins_are_those_of_the_lists():
    """One lock, with hashes and without an address, for all Pythons."""
    lock = (ROOT / 'requirements.txt').read_text()
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    assert project['requires-python'] == '>=3.11,<3.14'
    names = [line.split('==')[0] for line in lock.splitlines()
             if '==' in line and not line.startswith('#')]
    assert len(names) == len(set(names)) > 100
    extras = project['optional-dependencies']
    for extra in ('tvm', 'mxnet', 'onnx', 'book'):
        for name in extras[extra]:
            assert name.split('==')[0] in names
    for line in (ROOT / 'mxnet.txt').read_text().splitlines():
        assert line.startswith('#') or f'\n{line} ' in lock
    for text in (lock, (ROOT / 'benchmarks/requirements.txt').read_text()):
        assert '://' not in text and '-url' not in text
        for line in text.splitlines():
            assert line.startswith(('    --hash=sha256:', '#')) or (
                '==' in line)
