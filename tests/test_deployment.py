"""The deployed network: loaders, threads, any batch, other processors."""
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te
from tvm.target import Target

from d2ltvm import deployment as dp
from d2ltvm import library_file as lf
from d2ltvm.cpu_schedule import host_target
from d2ltvm.gpu_schedule import compile_ptx, cuda_target
from d2ltvm.mnist import parse_idx
from soak import examples, later

SHAPES = (20, 1, 3, 3), (50, 20, 5, 5), (128, 800), (10, 128)
FACTS = {'format': lf.FORMAT, 'tvm': lf.tvm_version(), 'batch': '1',
         'device': 'cpu', 'machine': platform.machine(), 'needs': '',
         'threads': '1', 'target': ''}
without_gpu = pytest.mark.skipif(tvm.cuda(0).exist, reason='there is a GPU')


def draw_layers(seed):
    rng = np.random.default_rng(seed)
    return [(rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype('f4'),
             rng.normal(0, 0.1, shape[0]).astype('f4')) for shape in SHAPES]


def reference(X, layers):
    """Logits in float64, and the sum of the sizes of all their terms."""
    X = X.astype('float64')
    size = abs(X)
    for i, (W, b) in enumerate(layers):
        W, b = W.astype('float64'), b.astype('float64')
        if i < 2:
            X, size = (np.einsum('nchwyx,ocyx->nohw', np.lib.stride_tricks.
                                 sliding_window_view(x, W.shape[2:], (2, 3)),
                                 w, optimize=True) + c.reshape(-1, 1, 1)
                       for x, w, c in ((X, W, b), (size, abs(W), abs(b))))
            h = X.shape[2] // 2
            X, size = (np.maximum(x, 0)[:, :, :2 * h, :2 * h].reshape(
                len(x), -1, h, 2, h, 2).mean((3, 5)) for x in (X, size))
        else:
            X = X.reshape(len(X), -1) @ W.T + b
            size = size.reshape(len(X), -1) @ abs(W).T + abs(b)
            X = np.maximum(X, 0) if i == 2 else X
    return X, size


def draw_images(n, seed=0):
    return np.random.default_rng(seed).integers(
        256, size=(n, 28, 28)).astype('uint8')


@pytest.fixture(scope='session')
def layers():
    return draw_layers(0)


@pytest.fixture(scope='session')
def folder(layers, tmp_path_factory):
    """Holds two networks and the program."""
    folder = tmp_path_factory.mktemp('deployed')
    dp.export_network(layers, folder / 'one.so')
    dp.export_network(draw_layers(1), folder / 'three.so', batch=3)
    dp.export_network(draw_layers(1), folder / 'symbolic.so', batch=None)
    dp.export_network(layers, folder / 'two.so', threads=2)
    dp.build_classifier(folder)
    return folder


@pytest.fixture(scope='session')
def one(folder):
    return dp.load_network(folder / 'one.so')


@pytest.fixture(scope='session')
def three(folder):
    return dp.load_network(folder / 'three.so')


@pytest.fixture(scope='session')
def symbolic(folder):
    return dp.load_network(folder / 'symbolic.so')


@pytest.fixture(scope='session')
def library(folder):
    """A good file without its colophon."""
    content = (folder / 'one.so').read_bytes()
    return content[:int(content[-26:-10], 16)]


# Export

@pytest.mark.parametrize(('error', 'name', 'change'), [
    (ValueError, 'batch', {'batch': 0}),
    (TypeError, 'batch', {'batch': 1.5}),
    (ValueError, 'threads', {'threads': 0}),
    (TypeError, 'threads', {'threads': 'two'}),
    (ValueError, 'batch', {'target': 'cuda', 'batch': None}),
    (ValueError, 'target', {'target': 'c'}),
    (ValueError, 'target', {'target': {'kind': 'llvm', 'mcpu': 'native'}}),
    (ValueError, 'layers', {'layers': []}),
    (TypeError, r'(W of )?layers\[0\]', {'layers': [(1, 2)] * 4})])
def test_export_refuses(layers, tmp_path, error, name, change):
    path = tmp_path / 'network.so'
    with pytest.raises(error, match=f'^{name}: '):
        dp.export_network(**{'layers': layers, 'path': path, **change})
    assert not list(tmp_path.iterdir())


def test_failed_export_leaves_the_old_file(layers, tmp_path, monkeypatch):
    path = tmp_path / 'network.so'
    path.write_text('old')
    foreign = ('aarch64' if platform.machine() == 'x86_64' else 'x86_64')
    with pytest.raises(RuntimeError, match='cannot link'):
        dp.export_network(layers, path, target={
            'kind': 'llvm', 'mtriple': f'{foreign}-linux-gnu'})
    with pytest.raises(FileNotFoundError):
        dp.export_network(layers, tmp_path / 'missing' / 'network.so')
    monkeypatch.setattr('tvm.support.cc.get_cc', lambda: None)
    with pytest.raises(RuntimeError, match='linker is needed'):
        dp.export_network(layers, path)
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_facts_of_a_file(folder, three):
    assert three.facts == lf.read_colophon(
        (folder / 'three.so').read_bytes())
    assert three.batch == 3 and three.facts['batch'] == '3'
    assert three.facts['machine'] == platform.machine()
    assert (folder / 'three.so').stat().st_mode & 0o444 == 0o444


# Loading

@settings(max_examples=examples(25))
@given(seed=st.integers(0, 2 ** 32), offset=st.sampled_from([0, 0.5, 1000]),
       scale=st.sampled_from([1e-30, 1e-3, 1, 1e3, 1e30]))
def test_property_logits(semantics, one, three, layers, seed, offset, scale):
    """Before and after `npx.set_np()`; each layer rounds once per term."""
    rng = np.random.default_rng(seed)
    for network, weights in ((one, layers), (three, draw_layers(1))):
        X = scale * (offset + rng.normal(size=(network.batch, 1, 28, 28)))
        X = X.astype('float32')
        Y = network(X)
        expected, size = reference(X, weights)
        assert Y.dtype == np.float32 and Y.shape == (network.batch, 10)
        # 1078 roundings in a row at most, of 2**-24, and never all one way
        assert (abs(Y - expected) <= 1e-5 * size).all()


def test_any_memory(one, layers):
    X = np.random.default_rng(0).normal(size=(2, 1, 28, 29)).astype('f4')
    for view in (X[:1, ..., 1:], X[1:, ..., :28], X[:1, :, ::-1, 28:0:-1],
                 X[:1, ..., 1:].swapaxes(2, 3)):
        np.testing.assert_array_equal(one(view), one(view.copy()))
    kept = one(X[:1, ..., 1:])
    copy = kept.copy()
    one(X[1:, ..., 1:])
    np.testing.assert_array_equal(kept, copy)  # results are not reused


def test_nan_stays_in_its_row(three):
    X = np.zeros((3, 1, 28, 28), 'float32')
    X[1, 0, 10, 10] = np.nan
    Y = three(X)
    assert np.isnan(Y[1]).all() and np.isfinite(Y[[0, 2]]).all()


@pytest.mark.parametrize(('error', 'X'), [
    (ValueError, np.zeros((1, 28, 28), 'float32')),
    (ValueError, np.zeros((2, 1, 28, 28), 'float32')),
    (TypeError, np.zeros((1, 1, 28, 28))), (TypeError, [0]),
    (TypeError, None)])
def test_wrong_input(one, error, X):
    with pytest.raises(error, match=r'^X: expected .*got'):
        one(X)


@given(st.integers(0, 8), st.integers(0, 99))
def test_property_classify(one, three, n, seed):
    images = draw_images(n, seed)
    for network in one, three:
        labels = network.classify(images)
        assert labels.shape == (n,) and labels.dtype == np.int64
    if n:
        expected, _ = reference(images[:, None] / 255, draw_layers(1))
        np.testing.assert_array_equal(labels, expected.argmax(axis=1))


@pytest.mark.parametrize(('error', 'images'), [
    (TypeError, np.zeros((1, 28, 28))), (TypeError, [0]),
    (ValueError, np.zeros((28, 28), 'uint8')),
    (ValueError, np.zeros((1, 28, 27), 'uint8'))])
def test_wrong_images(one, error, images):
    with pytest.raises(error, match=r'^images: expected'):
        one.classify(images)


def test_replaced_file(layers, tmp_path):
    path, X = tmp_path / 'network.so', np.ones((1, 1, 28, 28), 'float32')
    dp.export_network(layers, path)
    first = dp.load_network(path)
    before, content = first(X), path.read_bytes()
    with open(path, 'rb') as reader:
        start = reader.read(1000)
        dp.export_network([*layers[:3], tuple(a / 2 for a in layers[3])],
                          path)
        assert start + reader.read() == content  # the old file, to the end
    assert path.read_bytes() != content
    second = dp.load_network(path)
    np.testing.assert_array_equal(first(X), before)
    np.testing.assert_allclose(2 * second(X), before, rtol=1e-6)


def test_many_loads_leave_nothing_open(folder, one, monkeypatch, tmp_path):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    X = np.ones((1, 1, 28, 28), 'float32')
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(examples(20)):
        np.testing.assert_array_equal(
            dp.load_network(folder / 'one.so')(X), one(X))
    assert len(os.listdir('/proc/self/fd')) <= before + 2
    assert not list(tmp_path.iterdir())


def test_threads_share_a_network(one, folder):
    """Each thread gets the answers to its own questions."""
    images = [draw_images(20, seed) for seed in range(4)]
    expected = [one.classify(part) for part in images]
    shared, wrong = dp.load_network(folder / 'one.so'), []

    def ask(part, labels):
        for _ in range(20):
            wrong.extend(shared.classify(part) != labels)
        dp.load_network(folder / 'three.so')

    threads = [threading.Thread(target=ask, args=pair)
               for pair in zip(images, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * 20 * 20 and not any(wrong)


# Threads and any number of images

@settings(max_examples=examples(15))
@given(n=st.integers(1, 70), seed=st.integers(0, 2 ** 32))
def test_property_any_number_of_images(symbolic, n, seed):
    X = np.random.default_rng(seed).normal(size=(n, 1, 28, 28)).astype('f4')
    Y = symbolic(X)
    expected, size = reference(X, draw_layers(1))
    assert Y.shape == (n, 10) and Y.dtype == np.float32
    assert (abs(Y - expected) <= 1e-5 * size).all()


def test_any_number_says_so(symbolic):
    assert symbolic.batch is None and symbolic.facts['batch'] == 'any'
    with pytest.raises(ValueError, match=r'^X: expected .*any'):
        symbolic(np.zeros((2, 1, 28, 27), 'float32'))
    with pytest.raises(ValueError, match=r'^X, its images: expected 1 or'):
        symbolic(np.zeros((0, 1, 28, 28), 'float32'))
    X = np.zeros((3, 1, 28, 28), 'float32')
    X[1, 0, 10, 10] = np.nan
    Y = symbolic(X)
    assert np.isnan(Y[1]).all() and np.isfinite(Y[[0, 2]]).all()


def test_every_function_for_any_number_is_marked(layers, monkeypatch):
    """One that is not marked `noalias` costs all others theirs."""
    seen, build = [], tvm.compile
    monkeypatch.setattr(tvm, 'compile', lambda module, *args, **kwargs: (
        seen.append(module), build(module, *args, **kwargs))[1])
    dp.compile_any_batch(layers, host_target())
    marks = [f.attrs.get('tirx.noalias') for f in seen[0].functions.values()
             if isinstance(f, tvm.tirx.PrimFunc)]
    assert len(marks) > 1 and all(marks)


@pytest.mark.parametrize(('planned', 'batch', 'pool', 'wanted', 'got'), [
    (1, '1', 4, None, 1), (2, '1', 4, None, 2), (8, '1', 4, None, 4),
    (2, '1', 4, 4, 4), (2, '1', 4, 1, 1), (1, 'any', 4, 3, 3),
    (2, '1', 4, np.int64(2), 2)])
def test_threads_that_fit(monkeypatch, planned, batch, pool, wanted, got):
    monkeypatch.setattr(tvm.runtime, 'num_threads', lambda: pool)
    assert dp.fitting_threads(
        {'threads': str(planned), 'batch': batch}, wanted) == got


@pytest.mark.parametrize(('error', 'planned', 'wanted', 'message'), [
    (ValueError, 1, 2, '1, for the file has no parallel loop, got 2'),
    (ValueError, 2, 5, '1 to 4, the number that TVM has here, got 5'),
    (ValueError, 2, 0, '1 or more, got 0'),
    (TypeError, 2, 1.0, 'expected an integer')])
def test_threads_that_do_not_fit(monkeypatch, error, planned, wanted,
                                 message):
    monkeypatch.setattr(tvm.runtime, 'num_threads', lambda: 4)
    with pytest.raises(error, match=f'^threads: expected .*{message[9:]}'):
        dp.fitting_threads({'threads': str(planned), 'batch': '1'}, wanted)


def test_threads_at_load(folder, tmp_path):
    """In a process whose pool has two; afterwards it still has them."""
    np.save(tmp_path / 'images.npy', draw_images(3))
    script = f'''if True:
        import os
        import numpy as np
        import tvm
        from d2ltvm.deployment import load_network, use_threads
        path = {str(folder / "two.so")!r}
        images = np.load({str(tmp_path / "images.npy")!r})
        names = 'TVM_BIND_THREADS', 'TVM_THREAD_POOL_SPIN_COUNT'
        for name in names:
            os.environ.pop(name, None)
        cores = os.sched_getaffinity(0)
        for threads in None, 1, 2:
            network = load_network(path, threads)
            assert [os.environ[name] for name in names] == ['0', '0']
            print(network.threads, *network.classify(images))
            tasks = [*map(int, os.listdir('/proc/self/task'))]
            assert len(tasks) > 1  # none of them is pinned to a core
            assert all(os.sched_getaffinity(task) == cores for task in tasks)
            assert tvm.runtime.num_threads() == 2
        with use_threads(1):
            assert tvm.runtime.num_threads() == 1
        assert tvm.runtime.num_threads() == 2'''
    run = subprocess.run([sys.executable, '-c', script], text=True,
                         capture_output=True, env={
        **os.environ, 'TVM_NUM_THREADS': '2', 'TVM_USE_RUNTIME_LIB': '1',
        'PYTHONPATH': str(Path(dp.__file__).parent.parent)})
    assert run.returncode == 0, run.stderr
    labels = ' '.join(map(str, dp.load_network(
        folder / 'one.so').classify(draw_images(3))))
    assert run.stdout.splitlines() == [f'2 {labels}', f'1 {labels}',
                                       f'2 {labels}']


def test_cpp_takes_the_threads_of_the_file(folder, tmp_path):
    """Counted while it works on: its pipe takes no 80 kB of answers."""
    dp.write_idx(tmp_path / 'images', np.broadcast_to(
        np.uint8(0), (2000, 28, 28)))  # some 100 bytes of logits each

    def tasks(**variables):
        with subprocess.Popen(['./classify', 'two.so', tmp_path / 'images',
                               '--logits'], cwd=folder, env=variables,
                              stdout=subprocess.PIPE) as running:
            assert len(running.stdout.readline().split()) == 10
            count = len(os.listdir(f'/proc/{running.pid}/task'))
            running.kill()
        return count

    number = {n: tasks(TVM_NUM_THREADS=str(n)) for n in (1, 2, 3)}
    assert number[2] == number[1] + 1 and number[3] == number[1] + 2
    assert tasks() == number[min(2, os.cpu_count())]


def test_cpp_logits(folder, one, tmp_path):
    images = draw_images(4)
    dp.write_idx(tmp_path / 'images', images)
    run = classify(folder, 'one.so', tmp_path / 'images', '--logits')
    logits = np.array(run.stdout.split(), 'float32').reshape(4, 10)
    X = (images[:, None] / np.float32(255)).astype('float32')
    np.testing.assert_array_equal(
        logits, np.concatenate([one(X[i:i + 1]) for i in range(4)]))


def test_cpp_opens_the_network_once(folder, tmp_path):
    """What it checks it loads: a pipe gives its bytes a single time."""
    dp.write_idx(tmp_path / 'images', draw_images(2))
    run = subprocess.run(
        ['./classify', '/dev/stdin', tmp_path / 'images'], cwd=folder,
        env={'TMPDIR': str(tmp_path)}, capture_output=True,
        input=(folder / 'one.so').read_bytes())
    assert (run.returncode, run.stderr) == (0, b'')
    assert run.stdout == classify(
        folder, 'one.so', tmp_path / 'images').stdout.encode()
    assert [path.name for path in tmp_path.iterdir()] == ['images']


# Another processor

CROSS, EMULATOR = 'aarch64-linux-gnu-g++', 'qemu-aarch64'
LIBRARIES = Path(__file__).resolve().parent.parent / '_build' / 'aarch64'


@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)),
    reason=f'needs {CROSS} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, '
           'qemu-user)')
@pytest.mark.skipif(
    not (LIBRARIES / 'libtvm_runtime.so').is_file(),
    reason="needs TVM's runtime for aarch64 in _build/aarch64 (the page on "
           'deployment says how)')
@pytest.mark.soak  # the page on deployment has one image, in two threads
@pytest.mark.parametrize(('batch', 'threads'), [(1, 1), (3, 2), (None, 1)])
def test_arm_gives_the_same_logits(layers, tmp_path, batch, threads):
    """Emulated; each layer rounds once per term, in an order of its own."""
    facts = dp.export_network(
        layers, tmp_path / 'network.so', batch, threads=threads,
        linker=CROSS, target={'kind': 'llvm', 'mtriple': 'aarch64-linux-gnu'})
    assert facts['machine'] == 'aarch64'
    dp.build_classifier(tmp_path, CROSS, LIBRARIES)
    images = draw_images(4)
    dp.write_idx(tmp_path / 'images', images)
    run = subprocess.run(
        [EMULATOR, '-L', '/usr/aarch64-linux-gnu', './classify',
         'network.so', 'images', '--logits'], cwd=tmp_path,
        capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, '')
    logits = np.array(run.stdout.split(), 'float32').reshape(4, 10)
    X = (images[:, None] / np.float32(255)).astype('float32')
    expected, size = reference(X, layers)
    assert (abs(logits - expected) <= 1e-5 * size).all()
    with pytest.raises(RuntimeError, match='got one for aarch64'):
        dp.load_network(tmp_path / 'network.so')


# Wrong files, in Python and in C++

def classify(folder, *arguments):
    return subprocess.run(['./classify', *map(str, arguments)], cwd=folder,
                          env={}, capture_output=True, text=True)


def refused(folder, tmp_path, content, error, message):
    """Both loaders refuse the content; neither dies."""
    path = tmp_path / 'wrong.so'
    path.write_bytes(content)
    with pytest.raises(error, match=rf'wrong\.so: .*{message}'):
        dp.load_network(path)
    dp.write_idx(tmp_path / 'images', draw_images(1))
    run = classify(folder, path, tmp_path / 'images')
    assert run.returncode == 1 and run.stdout == ''
    assert re.match(r'classify: .*wrong\.so', run.stderr)


def test_truncated_files(folder, tmp_path):
    content = (folder / 'one.so').read_bytes()
    ends = np.random.default_rng(0).integers(len(content), size=12)
    for end in (0, 1, 32, 33, 4096, *ends, len(content) - 1):
        refused(folder, tmp_path, content[:end], ValueError, 'got')


def test_damaged_files(folder, tmp_path):
    content = (folder / 'one.so').read_bytes()
    places = np.random.default_rng(1).integers(len(content), size=8)
    for place in (0, 100, *places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        refused(folder, tmp_path, bytes(damaged), ValueError,
                'checksum is wrong')


@pytest.mark.parametrize(('change', 'message'), [
    ({'format': '1'}, 'expected format 2, got format 1'),
    ({'machine': 's390x'}, 'got one for s390x'),
    ({'needs': 'fpu avx1024'}, 'needs .*avx1024'),
    ({'threads': '0'}, 'for the fact threads'),
    ({'batch': 'many'}, 'for the fact batch'),
    ({'tvm': '0.26'}, 'expected a library for TVM .*, got one for TVM 0.26'),
    pytest.param({'device': 'cuda'}, 'expected a GPU', marks=without_gpu)])
def test_foreign_files(folder, library, tmp_path, change, message):
    content = lf.append_colophon(library, {**FACTS, **change})
    refused(folder, tmp_path, content, RuntimeError, message)


def test_facts_that_are_missing(folder, library, tmp_path):
    content = lf.append_colophon(library, {'format': lf.FORMAT})
    refused(folder, tmp_path, content, RuntimeError,
            'expected the facts batch device machine needs threads tvm, '
            'got none')


@pytest.mark.parametrize('content', [
    b'hello\n', b'\x7fELF', bytes(40), b'd2ltvm ', b'd2ltvm 00000',
    b'd2ltvm 0000000000000000', b'd2ltvm 0000000000000000 0000000\n'])
def test_other_files(folder, tmp_path, content):
    refused(folder, tmp_path, content, ValueError, 'expected a network')


def test_a_library_without_a_network(folder, tmp_path):
    x = te.placeholder((4,), name='x')
    kernel = te.create_prim_func([x, te.compute((4,), lambda i: x[i])])
    path = tmp_path / 'kernel.so'
    lf.write_library(tvm.compile(kernel, target='llvm'), path, FACTS)
    refused(folder, tmp_path, path.read_bytes(), RuntimeError,
            'expected a library with a network')
    content = lf.append_colophon(b'hello', FACTS)
    refused(folder, tmp_path, content, RuntimeError, 'expected a library')


def test_a_processor_without_avx512(folder, library, tmp_path, monkeypatch):
    """An AVX-512 library is refused before any instruction of it runs."""
    needs = lf.needed_features(Target({
        'kind': 'llvm', 'mcpu': 'x86-64-v4',
        'mtriple': 'x86_64-linux-gnu'}))[1]
    path = tmp_path / 'v4.so'
    path.write_bytes(lf.append_colophon(
        library, {**FACTS, 'needs': ' '.join(sorted(needs))}))
    older = frozenset(f for f in needs if not f.startswith('avx512'))
    monkeypatch.setattr(lf, 'cpu_features', lambda: older)
    monkeypatch.setattr(tvm.runtime, 'load_module', pytest.fail)
    with pytest.raises(RuntimeError, match=r'needs avx512bw .*avx512vl;'):
        dp.load_network(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        dp.load_network(tmp_path / 'missing.so')
    with pytest.raises(IsADirectoryError):
        dp.load_network(tmp_path)


# The runtime alone, and C++

def test_the_runtime_is_enough(folder, one, tmp_path):
    images = draw_images(5)
    np.save(tmp_path / 'images.npy', images)
    script = f'''if True:
        import sys
        import numpy as np
        from d2ltvm.deployment import load_network
        net = load_network({str(folder / "one.so")!r})
        print(*net.classify(np.load({str(tmp_path / "images.npy")!r})))
        maps = open('/proc/self/maps').read()
        assert 'libtvm_runtime' in maps and 'libtvm_compiler' not in maps
        assert 'mxnet' not in sys.modules and 'libmxnet' not in maps'''
    run = subprocess.run(
        [sys.executable, '-W', 'error', '-c', script], text=True,
        capture_output=True, env={
            **os.environ, 'TVM_USE_RUNTIME_LIB': '1',
            'PYTHONPATH': str(Path(dp.__file__).parent.parent)})
    assert run.returncode == 0, run.stderr
    assert [*map(int, run.stdout.split())] == one.classify(images).tolist()


@pytest.mark.parametrize('name', ['one', 'three', 'symbolic'])
@pytest.mark.parametrize('n', [0, 1, 7])
def test_cpp_names_the_same_digits(folder, request, tmp_path, name, n):
    images = draw_images(n)
    labels = request.getfixturevalue(name).classify(images)
    dp.write_idx(tmp_path / 'images', images)
    run = classify(folder, f'{name}.so', tmp_path / 'images')
    assert (run.returncode, run.stderr) == (0, '')
    assert [*map(int, run.stdout.split())] == labels.tolist()
    labels[:n // 2] = (labels[:n // 2] + 1) % 10
    dp.write_idx(tmp_path / 'labels', labels.astype('uint8'))
    run = classify(folder, f'{name}.so', tmp_path / 'images',
                   tmp_path / 'labels')
    first, *times = run.stdout.splitlines()
    assert first == f'{n - n // 2} of {n} right'
    assert len(times) == (n > 0)
    assert all(re.fullmatch(r'\S+ us a call, \S+ images a second', line)
               and float(line.split()[0]) > 0 for line in times)


@pytest.mark.parametrize('classes', [later(10), 5, later(17)])
def test_white_is_one(folder, tmp_path, classes):
    """A network that asks whether the first pixels are 255 or 254."""
    layers = [(np.zeros(shape, 'float32'), np.zeros(shape[0], 'float32'))
              for shape in (*SHAPES[:3], (classes, 128))]
    for W, _ in layers:
        W[(0, 0, *(size // 2 for size in W.shape[2:]))] = 1
    layers[3][1][1:] = 254.5 / 255, *(classes - 2) * [-1]
    dp.export_network(layers, tmp_path / 'network.so', 2)
    images = np.array([255, 254, 0, 255, 254], 'uint8')
    dp.write_idx(tmp_path / 'images',
                 np.broadcast_to(images[:, None, None], (5, 28, 28)))
    images = parse_idx((tmp_path / 'images').read_bytes())
    network = dp.load_network(tmp_path / 'network.so')
    assert network.classify(images).tolist() == [0, 1, 1, 0, 1]
    X = np.zeros((2, 1, 28, 28), 'float32')
    assert network(X).shape == (2, classes)
    run = classify(folder, tmp_path / 'network.so', tmp_path / 'images')
    assert run.stdout.split() == ['0', '1', '1', '0', '1']


def test_cpp_needs_no_python(folder):
    lines = subprocess.run(['ldd', folder / 'classify'], text=True,
                           capture_output=True, check=True).stdout
    assert 'python' not in lines and 'not found' not in lines
    found = re.findall(r'(libtvm\w*)\S* => (\S+)', lines)
    assert {name for name, _ in found} == {'libtvm_ffi', 'libtvm_runtime'}
    assert {Path(path).parent for _, path in found} == {folder.resolve()}


def test_cpp_refuses_other_images(folder, tmp_path):
    path, good = tmp_path / 'images', tmp_path / 'good'
    dp.write_idx(good, draw_images(2))
    content = good.read_bytes()
    for wrong, message in (
            (content[:-1], 'expected 2 times 784 bytes'), (b'', 'empty'),
            (content[:15], 'not an IDX file of bytes with 3 axes'),
            (b'\0\0\x0d' + content[3:], 'not an IDX file of bytes'),
            (content + b'0', 'expected 2 times 784 bytes')):
        path.write_bytes(wrong)
        run = classify(folder, 'one.so', path)
        assert run.returncode == 1 and message in run.stderr
    dp.write_idx(path, np.zeros(3, 'uint8'))
    for arguments, message in (
            (('one.so', good, path), 'as many labels as images'),
            (('one.so', good, good), 'not an IDX file of bytes with 1 axes'),
            (('one.so', tmp_path / 'missing'), 'cannot be read'),
            (('missing.so', good), 'missing.so: cannot be read'),
            (('one.so',), 'use: classify NETWORK IMAGES [LABELS | --logits]')):
        run = classify(folder, *arguments)
        assert (run.returncode, run.stdout) == (1, '')
        assert message in run.stderr


def test_cpp_refuses_images_of_other_size(folder, tmp_path):
    """56 rows of 14 pixels have as many bytes as 28 of 28."""
    dp.write_idx(tmp_path / 'images', np.zeros((2, 56, 14), 'uint8'))
    run = classify(folder, 'one.so', tmp_path / 'images')
    assert run.returncode == 1 and 'axes of length 28' in run.stderr


def test_the_sources_are_installed_with_the_package():
    root = Path(dp.__file__).parent
    config = tomllib.loads((root.parent / 'pyproject.toml').read_text())
    patterns = config['tool']['setuptools']['package-data']['d2ltvm']
    taken = {path.name for pattern in patterns for path in root.glob(pattern)}
    assert {'classify.cc', 'library_file.h'} <= taken
    assert taken == {path.name for path in root.iterdir()
                     if path.is_file() and path.suffix != '.py'}


def test_build_refuses(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"^compiler: .*'no-such-thing'"):
        dp.build_classifier(tmp_path, 'no-such-thing')
    with pytest.raises(RuntimeError, match='false fails'):
        dp.build_classifier(tmp_path, 'false')
    with pytest.raises(FileNotFoundError, match='nowhere'):
        dp.build_classifier(tmp_path, runtime=tmp_path / 'nowhere')


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4),
       st.integers(0, 99))
def test_property_idx(tmp_path, shape, seed):
    array = np.random.default_rng(seed).integers(
        256, size=shape).astype('uint8')
    dp.write_idx(tmp_path / 'array', array)
    np.testing.assert_array_equal(
        parse_idx((tmp_path / 'array').read_bytes()), array)
    with pytest.raises(TypeError, match=r'^array: expected'):
        dp.write_idx(tmp_path / 'array', array.astype('int8'))


# CUDA

@pytest.mark.soak  # the page on deployment walks those for one image
def test_cuda_kernels_walked_by_the_processor(layers):
    module = dp.cuda_network(layers, 2, cuda_target('sm_90'))
    walked = tvm.IRModule({
        name: f if isinstance(f, relax.Function) else tvm.script.from_source(
            re.sub(r'T\.thread_binding\((.*?), thread="[^"]*"\)',
                   r'range(\1)', f.script()))
        for name, f in module.functions.items()})
    run = relax.VirtualMachine(tvm.compile(walked, target='llvm'),
                               tvm.cpu())['main']
    X = np.random.default_rng(0).normal(size=(2, 1, 28, 28)).astype('f4')
    expected, size = reference(X, layers)
    Y = run(tvm.runtime.tensor(X)).numpy()
    assert (abs(Y - expected) <= 1e-5 * size).all()


def check_nan_passes(code, target):
    """No max is left in the program of the GPU: there it would drop NaN."""
    source = code.inspect_source()
    assert source.count('__global__') > 5 and 'max(' not in source
    compiler, ptx = compile_ptx(source, target)
    if compiler is not None:
        assert not re.search(r'max(\.\w+)*\.f32', ptx)
        # Greater, equal or unordered: what is not less than 0 stays, and NaN
        assert len(re.findall(r'setp\.geu(?:\.ftz)?\.f32', ptx)) == 3


def test_cuda_library(layers, tmp_path, monkeypatch):
    path, target, built = tmp_path / 'network.so', cuda_target('sm_90'), []
    build = tvm.compile
    monkeypatch.setattr(tvm, 'compile', lambda *args, **kwargs: (
        built.append(build(*args, **kwargs)), built[-1])[1])
    facts = dp.export_network(layers, path, 2, target)
    check_nan_passes(built[0].mod.imports[0].imports[0], target)
    assert facts['device'] == 'cuda' and facts['batch'] == '2'
    if tvm.cuda(0).exist:
        X = np.ones((2, 1, 28, 28), 'float32')
        expected, size = reference(X, layers)
        Y = dp.load_network(path)(X)
        assert (abs(Y - expected) <= 1e-5 * size).all()
    else:
        with pytest.raises(RuntimeError, match='expected a GPU'):
            dp.load_network(path)


def test_nan_passes_by_selection(layers):
    """Checked on the processor: 0 for less than 0, NaN for NaN."""
    from d2ltvm.folding import relax_network
    chosen = dp.select_relu(relax_network(layers, 1))
    assert 'maximum' not in chosen['main'].script()
    run = relax.VirtualMachine(tvm.compile(chosen, target='llvm'),
                               tvm.cpu())['main']
    X = np.random.default_rng(0).normal(size=(1, 1, 28, 28)).astype('f4')
    expected, size = reference(X, layers)
    Y = run(tvm.runtime.tensor(X)).numpy()
    assert (abs(Y - expected) <= 1e-5 * size).all()
    X[0, 0, 10, 10] = np.nan
    assert np.isnan(run(tvm.runtime.tensor(X)).numpy()).all()
