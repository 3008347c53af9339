"""MXNet on NumPy 2: who sees the old names, in which order, on which GPU."""
import ctypes
import ctypes.util
import importlib
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from d2ltvm import mxnet_today as mt
from d2ltvm.mxnet_today import gluon, mx, nd
from soak import later

ROOT = Path(__file__).resolve().parent.parent
OLD = ('Inf', 'NaN', 'PZERO', 'alltrue', 'product', 'in1d', 'trapz', 'compat')


def run(program, *folders, arguments=(), **environment):
    """Exit status and all that a Python of its own prints."""
    path = os.pathsep.join([*map(str, folders), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, '-c', program, *arguments], text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'PYTHONPATH': path, **environment})
    return ran.returncode, ran.stdout.strip()


def package(folder, version='1.9.1', text='', libinfo=True):
    """A stand-in for MXNet."""
    (folder / 'mxnet').mkdir()
    (folder / 'mxnet/__init__.py').write_text(
        f'import numpy as np\nname = "stand-in"\n{text}\n')
    if libinfo:
        (folder / 'mxnet/libinfo.py').write_text(
            f'# a comment\n__version__ = "{version}"\n')
    return folder


# The old names

def test_old_names_mean_what_they_meant():
    old = mt.old_numpy()
    a = np.array([[3., 1], [2, 4]])
    np.testing.assert_array_equal(old.msort(a), [[2, 1], [3, 4]])
    np.testing.assert_array_equal(old.in1d(a, [1, 4]), [0, 1, 0, 1])
    np.testing.assert_array_equal(old.in1d(a, [1, 4], invert=True),
                                  [1, 0, 1, 0])
    assert old.trapz([0, 1, 4]) == 0.5 + 2.5 and old.product([2, 3]) == 6
    assert old.alltrue([1, 0]) == False and old.sometrue([1, 0])  # noqa: E712
    assert old.round_(2.567, 1) == 2.6
    assert old.bool is bool and old.int is int
    assert np.signbit(old.NZERO) and not np.signbit(old.PZERO)
    assert old.PINF == old.Inf == -old.NINF == np.inf
    assert np.isnan(old.NAN) and np.isnan(old.NaN)
    assert isinstance('text', old.compat.basestring)
    for name in ('mirr', 'npv', 'pmt', 'ppmt', 'pv', 'rate'):
        with pytest.raises(RuntimeError, match='NEP 32'):
            getattr(old, name)(1, [2])


def test_new_names_are_those_of_numpy():
    old = mt.old_numpy()
    for name in set(dir(np)) - {'bool', 'int', *OLD}:
        assert getattr(old, name) is getattr(np, name), name
    assert old.testing is np.testing  # which NumPy loads when it is asked
    with pytest.raises(AttributeError):
        old.no_such_name  # noqa: B018
    assert mt.old_numpy() is old


@pytest.mark.parametrize(('text', 'numbers'), [
    ('1.9.1', [1, 9, 1]), ('2.5.0rc1', [2, 5, 0, 1]), ('1.17', [1, 17]),
    ('2.0.0+cu13.bw.20260614', [2, 0, 0, 13, 20260614]), ('', [])])
def test_old_version(text, numbers):
    assert mt.old_version(text) == numbers


@pytest.mark.parametrize(('value', 'expected'), [
    ((np.int64(2), 3), '(2, 3)'), ([np.float32(0.5)], '[0.5]'),
    ((np.int64(2),), '(2,)'), (((np.int8(1), 2), (3, 4)), '((1, 2), (3, 4))'),
    ((True, np.bool_(False)), '(True, False)'), (np.int64(7), '7'),
    (np.float64(1e-3), '0.001'), ('float32', 'float32'), ((), '()'),
    (None, 'None'), (('a', 1), "('a', 1)")])
def test_text_for_cpp(value, expected):
    options = np.get_printoptions()
    assert mt.OldText()(value) == expected
    assert np.get_printoptions() == options


def test_text_is_a_type_of_its_own():
    assert isinstance('a', mt.OldText())
    assert not isinstance(b'a', mt.OldText())
    assert isinstance('a', (int, mt.OldText()))


# What MXNet does with them

@pytest.mark.parametrize('use', [
    lambda n: nd.zeros((n, 3)).shape,
    lambda n: nd.random.uniform(shape=(n, 3)).shape,
    lambda n: nd.ones((6,)).reshape((n, 3)).shape,
    lambda n: mx.sym.zeros((n, 3)).infer_shape()[1][0],
    lambda n: mx.sym.var('x', shape=(n, 3)).infer_shape()[1][0],
    lambda n: mx.np.ones((n, 3)).shape,
    lambda n: mx.np.pad(mx.np.ones((n, 1)), ((0, 0), (1, 1)),
                        mode='constant').shape])
def test_numpy_integers_in_shapes(use):
    assert use(np.int64(2)) == (2, 3)


def test_deferred_shapes_take_numpy_integers():
    dense = gluon.nn.Dense(np.array([1, 2]).max() + 1)
    dense.initialize()
    dense.hybridize()
    assert dense(nd.ones((2, 4))).shape == (2, 3)


def test_csv_files_take_numpy_integers(tmp_path):
    np.savetxt(tmp_path / 'a.csv', np.ones((4, 2)), delimiter=',')
    batch = mx.io.CSVIter(data_csv=str(tmp_path / 'a.csv'), batch_size=2,
                          data_shape=(np.int64(2),)).next()
    assert batch.data[0].shape == (2, 2)


def test_optimize_for_still_asks_for_text():
    with pytest.raises(AssertionError):
        mx.sym.var('x').optimize_for(2)


@pytest.mark.parametrize('kind', ['nd', 'np'])
@pytest.mark.parametrize('shape', [(2, 3), (1,), (3, 1, 2)])
def test_numpy_reads_arrays_of_mxnet(kind, shape):
    values = np.arange(np.prod(shape), dtype='float32').reshape(shape)
    X = getattr(mx, kind).array(values)
    for read in (np.array, np.asarray):
        got = read(X)
        assert type(got) is np.ndarray and got.dtype == np.float32
        np.testing.assert_array_equal(got, values)
        assert read(X, dtype='int64').dtype == np.int64
    np.asarray(X)[...] = -1  # a copy
    np.testing.assert_array_equal(X.asnumpy(), values)
    assert np.array([X, X]).shape == (2, *shape)


def test_operators_still_belong_to_mxnet():
    """Before `__array__` NumPy left them alone; it still does."""
    X = nd.array([1, 2])
    for Z in (np.float32(2) * X, X * np.float32(2), 2 - X):
        assert type(Z) is nd.NDArray
    assert type(np.exp(mx.np.ones(2))) is mx.np.ndarray
    for Z in (X, X.as_np_ndarray()):
        with pytest.raises(TypeError, match='not supported'):
            np.ones(2) + Z


def test_a_label_that_is_an_array_is_written_by_hand():
    """The way that the page shows around `recordio.pack`."""
    label = np.array([3, 4], 'float32')
    packed = struct.pack('IfQQ', len(label), 0, 5, 0) + label.tobytes()
    header, data = mx.recordio.unpack(packed + b'data')
    assert header.id == 5
    np.testing.assert_array_equal(header.label, label)
    assert data == b'data'


# Who sees it

def test_modules_of_mxnet_see_the_stand_in_and_no_others():
    d2l = pytest.importorskip('d2l.mxnet')
    old, seen = mt.old_numpy(), 0
    for name, module in list(sys.modules.items()):
        ours = name.partition('.')[0] == 'mxnet'
        for value in list(getattr(module, '__dict__', {}).values()):
            if value is old:
                assert ours, name
                seen += 1
            elif value is np:
                assert not ours, name
    assert seen > 30
    assert d2l.np is mx.np and not hasattr(d2l.pd.core.algorithms.np, 'Inf')
    for name in OLD:
        assert not hasattr(np, name) and hasattr(old, name)
    assert np.bool is np.bool_


def test_numpy_builtins_and_programs_are_not_touched(tmp_path):
    """Without distutils, too: Python 3.12 has none, and 3.11 warns of it."""
    (tmp_path / 'mxnet_of_mine.py').write_text('import numpy, mxnet')
    status, text = run('''
import builtins, importlib, sys, types, warnings, numpy
sys.modules['distutils'] = sys.modules['setuptools'] = None
before, names = dict(vars(numpy)), dict(vars(builtins))
from d2ltvm.mxnet_today import mx
import mxnet_of_mine as mine
for name, value in vars(numpy).items():
    if not isinstance(value, types.ModuleType):  # NumPy loads some late
        assert before[name] is value, name
assert vars(builtins) == names and mx.ndarray.ndarray.np is not numpy
slow = {'sklearn', 'scipy.stats'}
print(mine.numpy is numpy, mine.mxnet is mx, slow.isdisjoint(sys.modules),
      mx.contrib.quantization.stats.entropy([.5, .5], [.5, .5]))
warnings.simplefilter('ignore')
from d2ltvm import mxnet_today
importlib.reload(mxnet_today)
assert mxnet_today.prepare() and mxnet_today.mx is mx
assert sum(hasattr(f, 'helps_mxnet') for f in sys.meta_path) == 1
importlib.reload(mx.gluon.utils)
print(hasattr(mx.gluon.utils.np, 'Inf'))''', tmp_path,
        SETUPTOOLS_USE_DISTUTILS='stdlib', PYTHONWARNINGS='error:distutils')
    assert (status, text.split('\n')[-2:]) == (
        0, ['True True True 0.0', 'True'])


# In which order

FAILED = '''
try:
    import mxnet
except (AttributeError, ImportError):
    pass
else:
    raise SystemExit('it needed no help')
'''


@pytest.mark.soak  # the page's cell `orders` has the first, in `make test`
@pytest.mark.parametrize('before', [
    FAILED,
    'from d2ltvm import mxnet_today; mxnet_today.prepare(); import mxnet'])
def test_any_order(before):
    status, text = run(f'''
{before}
from d2ltvm import mxnet_today
from d2ltvm.mxnet_today import mx, nd
import mxnet, sys
assert mxnet_today.prepare() and mx is mxnet and mxnet.nd is nd
assert sum(hasattr(f, 'helps_mxnet') for f in sys.meta_path) == 1
print(nd.ones(3).sum().asscalar())''')
    assert (status, text.split('\n')[-1]) == (0, '3.0')


def test_imported_without_help_is_refused(monkeypatch):
    monkeypatch.setattr(sys, 'meta_path', [
        finder for finder in sys.meta_path
        if not hasattr(finder, 'helps_mxnet')])
    with pytest.raises(ImportError, match='^mxnet was imported without help;'
                       r' restart Python and call .*prepare\(\) first$'):
        mt.prepare()
    assert not any(hasattr(f, 'helps_mxnet') for f in sys.meta_path)


def test_the_finder_is_put_in_front(monkeypatch):
    """Others that came later, such as pytest's, would pass it by."""
    monkeypatch.setattr(sys, 'meta_path', [object(), *sys.meta_path])
    assert mt.prepare()
    assert [hasattr(f, 'helps_mxnet') for f in sys.meta_path].index(True) == 0
    assert sum(hasattr(f, 'helps_mxnet') for f in sys.meta_path) == 1


@pytest.mark.soak
def test_pytest_does_no_harm(tmp_path):
    """It rewrites modules named test_*.py, even `mxnet.test_utils`."""
    (tmp_path / 'test_it.py').write_text('''
import numpy as np
from d2ltvm.mxnet_today import mx


def test_it():
    assert hasattr(mx.test_utils.np, 'Inf') and not hasattr(np, 'Inf')
    mx.test_utils.check_numeric_gradient(
        mx.sym.var('x') * 2, [np.ones(2, 'float32')])
''')
    status, text = run(
        'from d2ltvm import mxnet_today; mxnet_today.prepare()\n'
        'import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))',
        arguments=['-q', '-p', 'no:cacheprovider', '--rootdir', tmp_path,
                   '-W', 'ignore', tmp_path])
    assert status == 0 and '1 passed' in text, text


# Which MXNet

@pytest.mark.parametrize(('version', 'helped'), [
    ('1.9.1', True), later('1.6.0', True), later('2.0.0', False),
    ('2.0.0+cu13.bw.20260614', False), ('', False)])
def test_other_versions_are_left_alone(tmp_path, version, helped):
    status, text = run('''
import sys
from d2ltvm import mxnet_today
count = len(sys.meta_path)
print([mxnet_today.mxnet_version(), mxnet_today.prepare(),
       len(sys.meta_path) - count, mxnet_today.name,
       hasattr(mxnet_today.np, 'Inf'), mxnet_today.mx.np.__name__])
import numpy
assert (mxnet_today.mx.np is numpy) != mxnet_today.prepare()''',
                       package(tmp_path, version))
    assert (status, text) == (
        0, str([version, helped, int(helped), 'stand-in', False, 'numpy']))


def test_a_package_that_does_not_say_its_version(tmp_path):
    status, text = run(
        'from d2ltvm import mxnet_today as m\n'
        'print(repr(m.mxnet_version()), m.prepare(), m.name)',
        package(tmp_path, libinfo=False))
    assert (status, text) == (0, "'' False stand-in")


def test_missing_mxnet(monkeypatch):
    monkeypatch.setattr(sys, 'path', [str(ROOT)])
    with pytest.raises(ModuleNotFoundError, match="named 'mxnet'") as caught:
        mt.mxnet_version()
    assert caught.value.name == 'mxnet'
    for use in (mt.prepare, lambda: mt.nd):
        with pytest.raises(ImportError, match=r"^d2ltvm\.mxnet_today needs "
                           r"the package 'mxnet', .* pip install --no-deps"):
            use()


def test_names_that_mxnet_misses_are_told(tmp_path):
    """Python would say 'cannot import name', and hide the reason."""
    status, text = run('from d2ltvm.mxnet_today import nd',
                       package(tmp_path, text='np.gone_in_3_0'))
    assert status == 1 and text.split('\n')[-1] == (
        "ImportError: MXNet does not find a name: module 'numpy' has no "
        "attribute 'gone_in_3_0'")
    for name in ('_private', '__path__'):
        with pytest.raises(AttributeError, match=name):
            getattr(mt, name)
    with pytest.raises(AttributeError, match=r"'mxnet' has no .*'no_such'"):
        mt.no_such  # noqa: B018


# Copies and processes

@pytest.mark.parametrize('value', [
    nd.array([[1, 2]]), mx.np.array([[1, 2]]), mx.cpu(), mx.init.Xavier(),
    mx.gluon.nn.Dense, mx.nd.zeros])
def test_pickle(value):
    copy = pickle.loads(pickle.dumps(value))
    assert type(copy) is type(value)
    if hasattr(value, 'asnumpy'):
        np.testing.assert_array_equal(copy.asnumpy(), value.asnumpy())


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_workers_of_a_data_loader():
    data = gluon.data.ArrayDataset(np.arange(8, dtype='float32'))
    batches = [batch.asnumpy().tolist()
               for batch in gluon.data.DataLoader(data, 4, num_workers=2)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.soak
def test_spawned_children(tmp_path):
    """They read the file again, with its imports; forked ones inherit."""
    script = tmp_path / 'script.py'
    script.write_text('''
import multiprocessing
from d2ltvm.mxnet_today import nd


def total(X):
    return int(X.sum().asscalar())


if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print(pool.map(total, [nd.ones(3)]))
''')
    status, text = run('import runpy, sys; sys.argv = sys.argv[1:]\n'
                       'runpy.run_path(sys.argv[0], run_name="__main__")',
                       arguments=[script])
    assert status == 0 and '[3]' in text.split('\n')


def test_programs_that_cannot_be_edited(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(
        'from d2ltvm import mxnet_today\nmxnet_today.prepare()\n')
    status, text = run('import mxnet; print(mxnet.name, mxnet.infinity)',
                       package(tmp_path, text='infinity = np.Inf'))
    assert (status, text) == (0, 'stand-in inf')


# On a GPU

needs_compiler = pytest.mark.skipif(shutil.which('cc') is None,
                                    reason='no C compiler')


def library(path, name, *needs, text='int nothing;'):
    """A small shared library that needs others."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ['cc', '-shared', '-fPIC', '-x', 'c', '-', '-o', path / name,
         f'-Wl,-soname,{name},--no-as-needed', *[f'-L{p.parent}' for p in
                                                 needs],
         *[f'-l:{p.name}' for p in needs],
         '-Wl,--allow-shlib-undefined'],
        input=text, text=True, check=True)
    return path / name


@pytest.fixture
def cuda(tmp_path):
    """A MXNet that needs two libraries, one of which needs a third."""
    root = tmp_path / 'site'
    lib = root / 'nvidia'
    third = library(lib / 'cublas/lib', 'libcublasLt.so.11')
    one = library(lib / 'cublas/lib', 'libcublas.so.11', third)
    two = library(lib / 'cuda_runtime/lib', 'libcudart.so.11.0')
    package(root)
    library(root / 'mxnet', 'libmxnet.so', one, two)
    return root


LOAD = '''
import sys
from d2ltvm import mxnet_today
try:
    print(sorted(mxnet_today.load_cuda(*sys.argv[1:])))
except (ImportError, NotADirectoryError) as error:
    print(type(error).__name__, error)
print(mxnet_today.load_cuda(*sys.argv[1:]))
'''
THREE = "['libcublas.so.11', 'libcublasLt.so.11', 'libcudart.so.11.0']"


@needs_compiler
def test_libraries_of_the_packages_are_opened(cuda):
    assert run(LOAD, cuda) == (0, f'{THREE}\n[]')
    assert run('from d2ltvm.mxnet_today import name; print(name)', cuda) == (
        0, 'stand-in')  # MXNet has them opened when it starts


@needs_compiler
def test_libraries_of_a_folder_are_opened(cuda, tmp_path):
    (cuda / 'nvidia').rename(tmp_path / 'elsewhere')
    status, text = run('from d2ltvm.mxnet_today import name', cuda)
    assert status == 1 and re.search(
        r'ImportError: this MXNet needs libcu\S+, which is not in the '
        r'packages nvidia-\*-cu11; requirements-gpu.txt names', text)
    assert run(LOAD, cuda, arguments=[tmp_path / 'elsewhere']) == (
        0, f'{THREE}\n[]')


@needs_compiler
def test_libraries_that_the_system_finds_are_left_to_it(cuda):
    path = os.pathsep.join(
        str(cuda / 'nvidia' / name / 'lib') for name in (
            'cublas', 'cuda_runtime'))
    assert run(LOAD, cuda, LD_LIBRARY_PATH=path) == (0, '[]\n[]')


@needs_compiler
def test_what_is_missing_is_named(cuda, tmp_path):
    (cuda / 'nvidia/cublas/lib/libcublasLt.so.11').unlink()
    _, text = run(LOAD, cuda)
    assert 'ImportError this MXNet needs libcublasLt.so.11, which' in text
    (tmp_path / 'empty').mkdir()
    _, text = run(LOAD, cuda, arguments=[tmp_path / 'empty'])
    assert f'which is not in {tmp_path / "empty"}; requirem' in text


@needs_compiler
def test_missing_driver_is_named(tmp_path):
    driver = library(tmp_path / 'driver', 'libcuda.so.1')
    package(tmp_path)
    library(tmp_path / 'mxnet', 'libmxnet.so', driver)
    if ctypes.util.find_library('cuda'):
        pytest.skip('there is a driver')
    _, text = run(LOAD, tmp_path)
    assert text.startswith(
        "ImportError this MXNet needs libcuda.so.1 of NVIDIA's driver, which "
        'is not installed; without a GPU, take mxnet==1.9.1')


@needs_compiler
def test_other_faults_are_left_to_mxnet(tmp_path):
    """They have nothing to do with CUDA."""
    other = library(tmp_path / 'other', 'libgfortran_of_mine.so')
    package(tmp_path)
    library(tmp_path / 'mxnet', 'libmxnet.so', other)
    assert run(LOAD, tmp_path) == (0, '[]\n[]')


def test_nothing_is_opened_for_the_cpu(monkeypatch):
    assert mt.load_cuda() == [] and mt.load_cuda(ROOT) == []
    with pytest.raises(NotADirectoryError, match=r"^folder: expected one that "
                       r"holds .* got 'no such'"):
        mt.load_cuda('no such')
    with pytest.raises(NotADirectoryError):
        mt.load_cuda(__file__)
    monkeypatch.setattr(sys, 'path', [str(ROOT)])
    with pytest.raises(ModuleNotFoundError):
        mt.load_cuda()


DRIVER = '''
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int index)
{ *device = 7 + index; return index == 0 || index == 1 ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device)
{ strncpy(name, device == 7 ? "One" : "Two", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device)
{ *value = attribute == 75 ? device == 7 ? 7 : 9 : 5; return 0; }
'''


@needs_compiler
def test_gpus_are_described(tmp_path):
    """A library in C plays the driver, with two cards."""
    library(tmp_path, 'libcuda.so.1', text=DRIVER)
    status, text = run('''
from d2ltvm.mxnet_today import describe_gpu
print(describe_gpu(), describe_gpu(1))
try:
    describe_gpu(2)
except RuntimeError as error:
    print(error)''', LD_LIBRARY_PATH=str(tmp_path))
    assert (status, text) == (
        0, "('One, compute capability 7.5', True) "
        "('Two, compute capability 9.5', False)\n"
        'GPU 2: cuDeviceGet of the driver returns 101')


@pytest.mark.parametrize(('major', 'served'), [
    (3, False), (5, True), (6, True), (7, True), (8, True), (9, False),
    (10, False), (12, False)])
def test_which_cards_are_served(monkeypatch, major, served):
    class Driver:
        def cuDeviceGetAttribute(self, number, attribute, device):
            number._obj.value = {75: major, 76: 0}[attribute]

        def __getattr__(self, name):
            return lambda *arguments: 0

    monkeypatch.setattr(ctypes, 'CDLL', lambda name: Driver())
    assert mt.describe_gpu()[1] is served


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f'{name}: cannot open shared object file')

    monkeypatch.setattr(ctypes, 'CDLL', missing)
    with pytest.raises(RuntimeError, match=r"^NVIDIA's driver is not inst"):
        mt.describe_gpu()


def test_versions_for_a_gpu():
    """MXNet is the same version as on the CPU; all are pinned."""
    lines = (ROOT / 'requirements-gpu.txt').read_text().split('\n')
    pins = dict(line.split('==') for line in lines
                if line and not line.startswith('#'))
    assert pins['mxnet-cu112'] == re.search(
        r'^mxnet==(.*)$', (ROOT / 'mxnet.txt').read_text(), re.MULTILINE)[1]
    assert len(pins) == 10
    assert all(re.fullmatch(r'nvidia-[a-z-]+-cu11', name)
               for name in pins if name != 'mxnet-cu112')


def test_the_module_needs_numpy_alone():
    status, text = run('''
import sys
from d2ltvm import mxnet_today
mxnet_today.prepare()
print([name for name in ('mxnet', 'requests', 'scipy', 'd2ltvm.theory')
       if name in sys.modules])''')
    assert (status, text) == (0, '[]')
    module = importlib.import_module('d2ltvm.mxnet_today')
    assert isinstance(module, types.ModuleType) and module is mt


def test_numpy_1(monkeypatch):
    """1.23 has all that MXNet asks for; the gaps of 1.24 are others."""
    monkeypatch.setattr(np, '__version__', '1.23.5')
    assert mt.prepare() is False
    monkeypatch.setattr(np, '__version__', '1.26.4')
    with pytest.raises(ImportError, match=r'expected NumPy 2 or later, or 1.23'
                                          r', got 1\.26\.4$'):
        mt.prepare()
