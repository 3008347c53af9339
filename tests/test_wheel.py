"""The wheel, installed alone in a fresh environment, does what it says."""
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from soak import SOAK

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sys.executable).with_name('uv')
HERE = f'{sys.version_info.major}.{sys.version_info.minor}'
VERSIONS = ['3.11', '3.12', '3.13'] if SOAK else [HERE]
FOLD = '''import numpy as np, onnx, sys
from onnx import numpy_helper, parser
model = parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] X) => (float[N, 4, 6, 6] Y) {
    A = Conv (X, W)
    Y = BatchNormalization (A, gamma, beta, mean, var) }""")
for name in ('W', 'gamma', 'beta', 'mean', 'var'):
    shape = (4, 3, 3, 3) if name == 'W' else 4
    model.graph.initializer.append(numpy_helper.from_array(
        np.random.default_rng(1).uniform(1, 2, shape).astype('f'), name))
onnx.save(model, sys.argv[1])
'''
CLIENT = '''import numpy as np
from d2ltvm.conventions import convert_statistics

mean, var, momentum = convert_statistics(
    np.zeros(2), np.ones(2), 0.1, 'pytorch', 'keras', 8)
reveal_type(momentum)
convert_statistics(mean, var, 'a', 'keras', 8)
'''


def run(*command, cwd=None):
    inherited = {name: value for name, value in os.environ.items()
                 if not name.startswith(('PYTHON', 'VIRTUAL_ENV', 'D2LTVM'))}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=inherited,
                          text=True, capture_output=True, check=False)


def output(*command, cwd=None, status=0):
    ran = run(*command, cwd=cwd)
    assert ran.returncode == status, ran.stdout + ran.stderr
    return ran.stdout


def interpreter(version):
    """A Python of this version, found where tools/environment.sh looks."""
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'))
    for path in (Path(sys.base_prefix, f'bin/python{version}'),
                 shutil.which(f'python{version}'),
                 *pyenv.glob(f'versions/{version}.*/bin/python')):
        if path and Path(path).exists() and run(
                path, '-c', 'import venv').returncode == 0:
            return path
    return pytest.skip(f'no Python {version} on this machine')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from a copy, without a network."""
    folder = tmp_path_factory.mktemp('wheel')
    shutil.copytree(ROOT / 'd2ltvm', folder / 'd2ltvm',
                    ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, folder)
    output(UV, 'build', '--wheel', '--offline', '--no-build-isolation',
           '--python', sys.executable, '--out-dir', folder / 'dist', folder)
    path, = (folder / 'dist').glob('*.whl')
    return path


def test_the_wheel_holds_the_package_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist()
                 if '.dist-info/' not in name}
    assert names == {f'd2ltvm/{path.name}'
                     for path in (ROOT / 'd2ltvm').iterdir()
                     if path.name != '__pycache__'}


@pytest.fixture(scope='module', params=VERSIONS)
def installed(request, wheel, tmp_path_factory):
    """A fresh environment with the wheel and its extra `onnx`."""
    folder = tmp_path_factory.mktemp('alone')
    python = folder / 'env/bin/python'
    output(UV, 'venv', '--offline', '--python', interpreter(request.param),
           folder / 'env')
    pins = ['--constraints', ROOT / 'requirements.txt']
    install = [UV, 'pip', 'install', '--python', python, *pins]
    # Without an index nothing can be said: that is found out by packages of
    # the lock, not by the wheel
    extra = tomllib.loads((ROOT / 'pyproject.toml').read_text())[
        'project']['optional-dependencies']['onnx']
    there = run(*install, 'numpy', *extra)
    if there.returncode:
        pytest.skip(f'no package index: {there.stderr.splitlines()[-1]}')
    output(UV, 'pip', 'uninstall', '--python', python, 'numpy', *extra)
    output(*install, f'{wheel}[onnx]')
    return folder, python


def test_it_is_imported_from_where_it_is_installed(installed):
    folder, python = installed
    printed = output(python, '-c', 'import d2ltvm, importlib.metadata as m; '
                     'print(d2ltvm.__file__, d2ltvm.__version__, '
                     'm.version("d2ltvm"))', cwd=folder).split()
    assert printed[0].startswith(f'{folder}/env/')
    assert printed[1] == printed[2]


def test_the_commands_run(installed, tmp_path):
    folder, python = installed
    helped = output(python, '-m', 'd2ltvm', '--help', cwd=tmp_path)
    assert helped.startswith('usage: d2ltvm ')
    assert output(folder / 'env/bin/d2ltvm', '--help', cwd=tmp_path) == helped
    output(sys.executable, '-c', FOLD, tmp_path / 'in.onnx')
    printed = output(folder / 'env/bin/d2ltvm', 'fold', 'in.onnx', 'out.onnx',
                     cwd=tmp_path)
    assert '\n1 of 1 folded; ' in printed
    printed = output(python, '-m', 'd2ltvm', 'fold', 'out.onnx', 'x.onnx',
                     cwd=tmp_path, status=1)
    assert printed == '0 of 0 folded; nothing is written\n'


def test_a_client_gets_the_types(installed, tmp_path):
    _, python = installed
    (tmp_path / 'client.py').write_text(CLIENT)
    ran = run(sys.executable, '-m', 'mypy', '--strict', '--python-executable',
              python, '--cache-dir', os.devnull, 'client.py',
              cwd=tmp_path)
    lines = ran.stdout.splitlines()
    assert any('client.py:6: note: Revealed type is "float | None"'
               in line or 'client.py:6: note: Revealed type is '
               '"builtins.float | None"' in line
               or 'client.py:6: note: Revealed type is '
               '"Union[builtins.float, None]"' in line
               for line in lines), ran.stdout
    errors = [line for line in lines if ': error: ' in line]
    assert errors and all(line.startswith('client.py:7: ')
                          for line in errors), ran.stdout
