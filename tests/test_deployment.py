"""The library file: colophon, loader, program without Python, wrong files."""
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import relax, te
from tvm.target import Target

from d2ltvm import deployment as dp
from d2ltvm.cpu_schedule import host_target
from d2ltvm.gpu_schedule import cuda_target
from d2ltvm.mnist import parse_idx
from soak import examples

SHAPES = (20, 1, 3, 3), (50, 20, 5, 5), (128, 800), (10, 128)
FACTS = {'format': '1', 'tvm': dp.tvm_version(), 'batch': '1',
         'device': 'cpu', 'machine': platform.machine(), 'needs': '',
         'target': ''}
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
    dp.build_classifier(folder)
    return folder


@pytest.fixture(scope='session')
def one(folder):
    return dp.load_network(folder / 'one.so')


@pytest.fixture(scope='session')
def three(folder):
    return dp.load_network(folder / 'three.so')


@pytest.fixture(scope='session')
def library(folder):
    """A good file without its colophon."""
    content = (folder / 'one.so').read_bytes()
    return content[:int(content[-26:-10], 16)]


# The colophon

names = st.text(st.characters(codec='ascii', exclude_characters='=\n\r',
                              exclude_categories=['Cc']), min_size=1)
values = st.text(st.characters(codec='ascii', exclude_categories=['Cc']))


@given(st.binary(max_size=300), st.dictionaries(names, values, max_size=4))
@example(b'', {})
@example(b'a=b\n\nd2ltvm 0', {'a': 'b=c', 'd2ltvm 0': ''})
def test_property_colophon_comes_back(library, facts):
    content = dp.append_colophon(library, facts)
    assert content.startswith(library)
    assert dp.read_colophon(content) == facts


@given(st.binary(max_size=200), st.dictionaries(names, values, max_size=3),
       st.data())
def test_property_damage_is_found(library, facts, data):
    content = dp.append_colophon(library, facts)
    at = data.draw(st.integers(0, len(content) - 1))
    burst = data.draw(st.binary(min_size=1, max_size=4).filter(any))
    broken = bytearray(content)
    for i, change in enumerate(burst[:len(content) - at]):
        broken[at + i] ^= change
    damaged = [content[:at], content + burst, content[:at] + content[at + 1:]]
    for each in damaged + [bytes(broken)] * (broken != content):
        with pytest.raises(ValueError, match=r'^x\.so: expected'):
            dp.read_colophon(each, 'x.so')


@pytest.mark.parametrize('facts', [{'a': 'b\nc'}, {'a\n': ''}, {'a=': 'b'},
                                   {'': 'b'}, {'a': '\r'}])
def test_facts_must_fit_a_line(facts):
    with pytest.raises(ValueError, match=r'^facts: expected'):
        dp.append_colophon(b'', facts)


# Processors

def features(**target):
    return dp.needed_features(Target({'kind': 'llvm', **target}))


def test_levels_of_x86():
    at = {level: features(mcpu=f'x86-64-v{level}',
                          mtriple='x86_64-linux-gnu')[1]
          for level in (2, 3, 4)}
    assert at[2] < at[3] < at[4]
    assert {'avx2', 'fma'} <= at[3] - at[2]
    assert {'avx512f', 'avx512vl'} <= at[4] - at[3]
    machine, arm = features(mcpu='neoverse-n1', mtriple='aarch64-linux-gnu')
    assert machine == 'aarch64' and {'asimd', 'atomics'} <= arm


def test_switched_off_features_are_not_needed():
    with_, without = (features(mcpu='x86-64-v4', mtriple='x86_64-linux-gnu',
                               mattr=mattr)[1]
                      for mattr in ([], ['-avx512bw']))
    assert with_ - without == {'avx512bw'}


def test_this_machine_runs_its_own_code():
    machine, needed = dp.needed_features(host_target())
    assert machine == platform.machine() and needed <= dp.cpu_features()


def test_unknown_family():
    with pytest.raises(ValueError, match=r'^target: .*got riscv64'):
        features(mtriple='riscv64-linux-gnu')


# Export

@pytest.mark.parametrize(('error', 'name', 'change'), [
    (ValueError, 'batch', {'batch': 0}),
    (TypeError, 'batch', {'batch': 1.5}),
    (ValueError, 'target', {'target': 'c'}),
    (ValueError, 'target', {'target': {'kind': 'llvm', 'mcpu': 'native'}}),
    (ValueError, 'layers', {'layers': []}),
    (TypeError, r'layers\[0\]', {'layers': [(1, 2)] * 4})])
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
    assert three.facts == dp.read_colophon(
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
    ({'format': '2'}, 'expected format 1, got format 2'),
    ({'machine': 's390x'}, 'got one for s390x'),
    ({'needs': 'fpu avx1024'}, 'needs .*avx1024'),
    ({'tvm': '0.26'}, 'expected a library for TVM .*, got one for TVM 0.26'),
    pytest.param({'device': 'cuda'}, 'expected a GPU', marks=without_gpu)])
def test_foreign_files(folder, library, tmp_path, change, message):
    content = dp.append_colophon(library, {**FACTS, **change})
    refused(folder, tmp_path, content, RuntimeError, message)


def test_facts_that_are_missing(folder, library, tmp_path):
    content = dp.append_colophon(library, {'format': '1'})
    refused(folder, tmp_path, content, RuntimeError,
            'expected the facts batch device machine needs tvm, got none')


@pytest.mark.parametrize('content', [
    b'hello\n', b'\x7fELF', bytes(40), b'd2ltvm ', b'd2ltvm 00000',
    b'd2ltvm 0000000000000000', b'd2ltvm 0000000000000000 0000000\n'])
def test_other_files(folder, tmp_path, content):
    refused(folder, tmp_path, content, ValueError, 'expected a network')


def test_a_library_without_a_network(folder, tmp_path):
    x = te.placeholder((4,), name='x')
    kernel = te.create_prim_func([x, te.compute((4,), lambda i: x[i])])
    path = tmp_path / 'kernel.so'
    dp.write_library(tvm.compile(kernel, target='llvm'), path, FACTS)
    refused(folder, tmp_path, path.read_bytes(), RuntimeError,
            'expected a library with a network')
    content = dp.append_colophon(b'hello', FACTS)
    refused(folder, tmp_path, content, RuntimeError, 'expected a library')


def test_a_processor_without_avx512(folder, library, tmp_path, monkeypatch):
    """An AVX-512 library is refused before any instruction of it runs."""
    needs = features(mcpu='x86-64-v4', mtriple='x86_64-linux-gnu')[1]
    path = tmp_path / 'v4.so'
    path.write_bytes(dp.append_colophon(
        library, {**FACTS, 'needs': ' '.join(sorted(needs))}))
    older = frozenset(f for f in needs if not f.startswith('avx512'))
    monkeypatch.setattr(dp, 'cpu_features', lambda: older)
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


@pytest.mark.parametrize('name', ['one', 'three'])
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
    assert run.stdout == f'{n - n // 2} of {n} right\n'


@pytest.mark.parametrize('classes', [10, 5, 17])
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
            (('one.so',), 'use: classify NETWORK IMAGES [LABELS]')):
        run = classify(folder, *arguments)
        assert (run.returncode, run.stdout) == (1, '')
        assert message in run.stderr


def test_cpp_refuses_images_of_other_size(folder, tmp_path):
    """56 rows of 14 pixels have as many bytes as 28 of 28."""
    dp.write_idx(tmp_path / 'images', np.zeros((2, 56, 14), 'uint8'))
    run = classify(folder, 'one.so', tmp_path / 'images')
    assert run.returncode == 1 and 'axes of length 28' in run.stderr


def test_build_refuses(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"^compiler: .*'no-such-thing'"):
        dp.build_classifier(tmp_path, 'no-such-thing')
    monkeypatch.setattr(dp, 'CPP_READ', 'nonsense')
    with pytest.raises(RuntimeError, match='nonsense'):
        dp.build_classifier(tmp_path)


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


def test_cuda_library(layers, tmp_path):
    path, target = tmp_path / 'network.so', cuda_target('sm_90')
    facts = dp.export_network(layers, path, 2, target)
    assert facts['device'] == 'cuda' and facts['batch'] == '2'
    if tvm.cuda(0).exist:
        X = np.ones((2, 1, 28, 28), 'float32')
        expected, size = reference(X, layers)
        Y = dp.load_network(path)(X)
        assert (abs(Y - expected) <= 1e-5 * size).all()
    else:
        with pytest.raises(RuntimeError, match='expected a GPU'):
            dp.load_network(path)
