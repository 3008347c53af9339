"""The scheduled operator: shapes, addresses, targets, wrong arguments."""
import inspect
import math
import re
import shutil
import subprocess
import sys

import d2ltvm
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te
from tvm.script import tirx as T
from tvm.target import Target, codegen

from d2ltvm import cpu_schedule as module
from d2ltvm.mxnet_today import mx
from d2ltvm.tvm_inference import batch_norm, batch_norm_float64, bn_error
from soak import examples, later

BOUND = 1e-6  # seven float32 roundings are at most 4.2e-7
BASELINE = Target({'kind': 'llvm'})


def misaligned(array, offset=4):
    """A copy that starts `offset` bytes after a multiple of 64."""
    memory = np.empty(array.nbytes + 128, 'uint8')
    start = -memory.ctypes.data % 64 + offset
    view = memory[start:start + array.nbytes].view(array.dtype)
    view = view.reshape(array.shape)
    view[...] = array
    return view


def draw(shape, seed=0, offset=0, scale=1, dtype='float32'):
    """X, mean, var, gamma, beta."""
    rng = np.random.default_rng(seed)
    C = shape[1]
    X = scale * (offset + rng.normal(size=shape))
    params = (scale * (offset + rng.normal(size=C)),
              scale ** 2 * rng.chisquare(3, C), *rng.normal(size=(2, C)))
    return [X.astype(dtype), *(p.reshape(C, 1, 1).astype('float32')
                               for p in params)]


def run(kernel, arrays):
    """The result, computed between bytes that must not change."""
    size = arrays[0].size
    memory = np.full(size + 64, 7, arrays[0].dtype)
    out = memory[32:32 + size].reshape(arrays[0].shape)
    out[...] = math.nan
    kernel(*arrays, out)
    assert (memory[:32] == 7).all() and (memory[32 + size:] == 7).all()
    return out


@pytest.fixture(scope='module')
def kernel():
    return module.inference_kernel((2, 3, 13, 5))


@pytest.fixture
def arrays():
    return draw((2, 3, 13, 5))


def test_the_names_of_the_book_are_also_at_the_top():
    for name in ('bench_workload', 'bench_bn_tvm', 'bn_timer_mxnet',
                 'bench_bn_mxnet'):
        assert getattr(d2ltvm, name) is getattr(module, name)
    for name, parameters in (('bench_workload', ['workload']),
                             ('bench_bn_tvm', ['func', 'sizes', 'target']),
                             ('bn_timer_mxnet', ['c', 'n', 'ctx']),
                             ('bench_bn_mxnet', ['sizes', 'ctx'])):
        assert [*inspect.signature(getattr(module, name)).parameters
                ] == parameters


# Numbers

@settings(max_examples=examples(30))  # each compiles
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 9),
                       st.integers(1, 20), st.integers(1, 20)),
       seed=st.integers(0, 2 ** 32), offset=st.sampled_from([0, 1000]),
       scale=st.sampled_from([1e-15, 1e-3, 1, 1e3, 1e15]),
       eps=st.sampled_from([1e-12, 1e-5, 1.0]),
       address=st.integers(0, 15).map(lambda i: 4 * i),
       baseline=st.booleans(), parallel=st.booleans())
def test_property_against_float64(monkeypatch, shape, seed, offset, scale,
                                  eps, address, baseline, parallel):
    monkeypatch.setattr(module, 'PARALLEL_FROM', 1 if parallel else 2 ** 40)
    kernel = module.inference_kernel(
        shape, BASELINE if baseline else None, eps=eps)
    arrays = [misaligned(array, address)
              for array in draw(shape, seed, offset, scale)]
    assert bn_error(run(kernel, arrays), *arrays, eps=eps) < BOUND


@settings(max_examples=examples(12))
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 40),
                       st.sampled_from([1, 1, 3, 7]),
                       st.sampled_from([1, 1, 5, 16])),
       seed=st.integers(0, 2 ** 32), offset=st.sampled_from([0, 1000]),
       baseline=st.booleans())
def test_property_float16_is_rounded_once(shape, seed, offset, baseline):
    kernel = module.inference_kernel(
        shape, BASELINE if baseline else None, 'float16')
    arrays = draw(shape, seed, offset, dtype='float16')
    arrays[0] = misaligned(arrays[0], 2)
    Y, exact = run(kernel, arrays), batch_norm_float64(*arrays)
    terms = batch_norm_float64(abs(arrays[0]), -abs(arrays[1]), arrays[2],
                               abs(arrays[3]), abs(arrays[4]))
    with np.errstate(over='ignore'):  # beyond 65504 both are infinite
        half = exact.astype('float16')
    finite = np.isfinite(half) & np.isfinite(Y)
    error = abs(Y.astype('float64') - exact)
    # half a step of float16, and the float32 arithmetic before it
    bound = 2.0 ** -11 * abs(exact) + 2.0 ** -25 + BOUND * terms
    assert (error <= bound * (1 + 1e-6))[finite].all()
    assert (abs(exact[~finite]) > 65000).all()


@pytest.mark.parametrize('shape', [
    (2, 8, 99, 77), later((1, 2, 301, 303)), (1, 1, 1, 40000),
    later((7, 5000, 1, 1)), (64, 1003, 1, 1), later((1, 40000, 1, 1)),
    later((3, 1, 128, 129)), (300, 64, 1, 3)])
def test_large_shapes_in_parallel(shape):
    text = module.inference_schedule(shape, 8).mod.script()
    assert text.count('T.parallel') == 1
    arrays = draw(shape)
    Y = run(module.inference_kernel(shape), arrays)
    assert bn_error(Y, *arrays) < BOUND


@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 80),
                       st.integers(1, 40), st.integers(1, 80)),
       seed=st.integers(0, 2 ** 32 - 1), offset=st.sampled_from((0, 1, 1000)),
       lanes=st.sampled_from((4, 8, 16)), piece=st.sampled_from((16, 1024)),
       place=st.sampled_from((0, 4, 16, 32)))
def test_property_streaming(shape, seed, offset, lanes, piece, place):
    """Past the caches: rests, rows that are aligned now and then."""
    made = tvm.compile(module._streaming_program(shape, lanes, 1e-5, piece),
                       target=module.host_target())['main']
    arrays = draw(shape, seed, offset)
    given = [misaligned(array, place) for array in arrays]
    out = misaligned(np.full_like(arrays[0], np.nan), place)
    made(*given, out)
    assert bn_error(out, *arrays) < BOUND
    made(*given, given[0])  # in place
    np.testing.assert_array_equal(given[0], out)


@pytest.mark.parametrize(('shape', 'least'), [
    later((4, 64, 224, 224), None), later((1, 13, 1024, 1025), None),
    ((1, 13, 128, 129), 13 * 2 ** 14)])
def test_large_data_stream(shape, least, monkeypatch):
    called = []
    if least:  # what is large, so that the arrays need not be
        monkeypatch.setattr(module, 'STREAM_FROM', least)
    monkeypatch.setattr(module, '_streaming_program', lambda *args, f=(
        module._streaming_program): called.append(args) or f(*args))
    kernel = module.inference_kernel(shape)
    arrays = draw(shape)
    out = misaligned(np.full_like(arrays[0], np.nan), 0)
    kernel(*arrays, out)
    assert called and bn_error(out, *arrays) < BOUND
    called.clear()
    for other in ((4, 64, 30, 30), (2, 3, 2048, 1024), (65536, 4, 7, 7)):
        module.inference_kernel(other)
    assert not called
    module.inference_kernel(shape, dtype='float16')
    assert not called


def test_all_threads_give_the_same_bits(monkeypatch):
    shape = (4, 6, 31, 33)
    arrays, results = draw(shape), []
    for limit in (1, 2 ** 40):
        monkeypatch.setattr(module, 'PARALLEL_FROM', limit)
        results.append(run(module.inference_kernel(shape), arrays))
    assert results[0].tobytes() == results[1].tobytes()


def test_tensors_and_output_in_the_place_of_the_input(kernel, arrays):
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    out = tvm.runtime.empty(arrays[0].shape, 'float32')
    kernel(*tensors, out)
    expected = out.numpy()
    kernel(*tensors, tensors[0])
    assert tensors[0].numpy().tobytes() == expected.tobytes()
    assert bn_error(expected, *arrays) < BOUND


@pytest.mark.parametrize('place', range(5))
def test_inputs_may_be_read_only(kernel, arrays, place):
    expected = run(kernel, arrays)
    arrays[place].flags.writeable = False
    assert run(kernel, arrays).tobytes() == expected.tobytes()
    assert not arrays[place].flags.writeable
    with pytest.raises(TypeError, match='Expected 6 arguments'):
        kernel(*arrays)


@pytest.mark.parametrize('shape', [(3, 5), (2, 3, 7), (2, 3, 2, 3, 5)])
def test_other_axes_are_reshaped(shape):
    """As the docstring says; no array is copied."""
    arrays, out = draw(shape), np.empty(shape, 'float32')
    N, C = shape[:2]
    X, Y = (a.reshape(N, C, 1, -1) for a in (arrays[0], out))
    assert np.shares_memory(Y, out)
    module.inference_kernel(X.shape)(X, *arrays[1:], Y)
    exact = batch_norm_float64(X, *arrays[1:]).reshape(shape)
    np.testing.assert_allclose(out, exact, atol=BOUND * abs(exact).max())


def test_a_file_mapped_for_reading(kernel, arrays, tmp_path):
    np.save(tmp_path / 'X.npy', arrays[0])
    expected = run(kernel, arrays)
    arrays[0] = np.load(tmp_path / 'X.npy', mmap_mode='r')
    assert run(kernel, arrays).tobytes() == expected.tobytes()


OVERLAPPING = ((2, 3, 13, 5), (1, 64, 40, 41), (4, 64, 224, 224))


@pytest.mark.parametrize('shape', OVERLAPPING)
@pytest.mark.parametrize('form', ['arrays', 'tensors'])
def test_output_over_an_input_is_refused(shape, form):
    """Whether it begins within the input or ends in it, and by name."""
    kernel, size = module.inference_kernel(shape), math.prod(shape)
    share = tvm.runtime.from_dlpack if form == 'tensors' else lambda a: a
    memory, out = module.aligned_empty(2 * size), module.aligned_empty(shape)
    params = [module.aligned_empty((shape[1], 1, 1)) for _ in range(4)]
    for array in memory, out, *params:
        array[:] = 1
    parts = [memory[i:i + size].reshape(shape) for i in (0, 16)]
    for X, beyond in (parts, parts[::-1]):
        with pytest.raises(ValueError, match=r'^out: expected X itself, or '
                           'memory apart from X'):
            kernel(*map(share, (X, *params, beyond)))
    within = out.reshape(-1)[:shape[1]].reshape(-1, 1, 1)
    for place, name in enumerate(('mean', 'var', 'gamma', 'beta')):
        given = [*params[:place], within, *params[place + 1:]]
        with pytest.raises(ValueError, match='^out: expected memory apart '
                           f'from {name}'):
            kernel(*map(share, (parts[0], *given, out)))
    assert (memory == 1).all() and (out == 1).all()


def test_neighbours_are_no_overlap():
    shape = (1, 4, 2, 2)
    memory = np.ones(16 + 4 + 16, 'float32')
    X, mean, out = (memory[i:i + n] for i, n in ((0, 16), (16, 4), (20, 16)))
    module.inference_kernel(shape)(
        X.reshape(shape), mean.reshape(4, 1, 1), *np.ones((3, 4, 1, 1),
                                                          'float32'),
        out.reshape(shape))
    np.testing.assert_allclose(out, 1)


@pytest.mark.parametrize('made', [
    lambda: module.inference_schedule((1, 64, 40, 41), 8).mod['main'],
    lambda: module._streaming_program((1, 64, 40, 41), 8, 1e-5)])
def test_programs_promise_nothing_of_aliases(made):
    assert 'tirx.noalias' not in (made().attrs or {})


def test_nan_stays_where_it_is(kernel, arrays):
    arrays[0][1, 2, 3, 4] = math.nan
    arrays[2][0] = -1  # a negative variance
    Y = run(kernel, arrays)
    wrong = np.isnan(arrays[0])
    wrong[:, 0] = True
    np.testing.assert_array_equal(np.isnan(Y), wrong)


def test_constant_channel(kernel, arrays):
    arrays[0][:, 1] = arrays[1][1] = 3.5
    arrays[2][1] = 0
    Y = run(kernel, arrays)
    np.testing.assert_allclose(Y[:, 1], arrays[4][1, 0, 0], rtol=1e-3)
    assert bn_error(Y, *arrays) < BOUND


# The schedule

@settings(max_examples=examples(25))
@given(shape=st.tuples(*4 * [st.integers(1, 40)])
       | st.tuples(st.integers(1, 99), st.integers(1, 999), *2 * [st.just(1)]),
       lanes=st.sampled_from([4, 8, 16]))
def test_property_no_condition_is_left(shape, lanes):
    """A condition per lane costs the vectors."""
    N, C, H, W = shape
    text = module.inference_schedule(shape, lanes).mod.script()
    assert 'T.where' not in text
    length = C if H * W == 1 else H * W
    assert (f'T.vectorized({lanes})' in text) == (length >= lanes)
    large = N * C * H * W >= module.PARALLEL_FROM
    assert text.count('T.parallel') == large


@pytest.mark.parametrize(('lanes', 'error'), [
    (1, ValueError), (0, ValueError), (-4, ValueError), (4.0, TypeError),
    ('4', TypeError), (None, TypeError), (True, TypeError)])
def test_bad_lanes(lanes, error):
    with pytest.raises(error, match=r'^lanes: expected'):
        module.inference_schedule((1, 2, 3, 4), lanes)


@pytest.mark.parametrize('shape, loop', [
    ((1, 32, 28, 28), None), ((1, 64, 28, 28), 64),
    ((1, 1, 999, 999), 999 ** 2 // 8), ((64, 1000, 1, 1), 64)])
def test_where_the_program_becomes_parallel(shape, loop):
    text = module.inference_schedule(shape, 8).mod.script()
    assert text.count('T.parallel') == (loop is not None)
    assert loop is None or f'T.parallel({loop})' in text
    assert 'T.vectorized(8)' in text


# Targets

def test_host_target_has_nothing_that_the_machine_lacks(capfd):
    target = module.host_target()
    present = tvm.get_global_func('tvm.codegen.llvm.GetHostCPUFeatures')()
    features = codegen.llvm_get_cpu_features(target)
    assert all(present.get(feature, True) for feature in features)
    assert codegen.llvm_get_system_cpu() == target.attrs['mcpu']
    kernel = module.inference_kernel((1, 2, 9, 9), target)
    arrays = draw((1, 2, 9, 9))
    assert bn_error(run(kernel, arrays), *arrays) < BOUND
    assert capfd.readouterr().err == ''


def test_host_target_of_an_unknown_processor(monkeypatch, capfd):
    monkeypatch.setattr(codegen, 'llvm_get_system_cpu', lambda: 'abacus')
    target = module.host_target()
    assert 'mcpu' not in target.attrs
    arrays = draw((1, 2, 9, 9))
    kernel = module.inference_kernel((1, 2, 9, 9))
    assert bn_error(run(kernel, arrays), *arrays) < BOUND
    assert capfd.readouterr().err == ''


def test_host_target_of_a_machine_that_hides_features(monkeypatch):
    if not codegen.llvm_is_valid_cpu('x86-64-v4',
                                     codegen.llvm_get_system_triple()):
        pytest.skip('not an x86-64 processor')
    get = tvm.get_global_func
    hidden = {f: False for f in codegen.llvm_get_cpu_features(
        Target({'kind': 'llvm', 'mcpu': 'x86-64-v4'})) if 'avx512' in f}
    monkeypatch.setattr(codegen, 'llvm_get_system_cpu', lambda: 'x86-64-v4')
    monkeypatch.setattr(tvm, 'get_global_func', lambda name, *args: (
        (lambda: hidden) if 'HostCPUFeatures' in name else get(name, *args)))
    target = module.host_target()
    assert not [f for f in codegen.llvm_get_cpu_features(target)
                if 'avx512' in f]
    assert module.vector_lanes(target) == 8
    code = tvm.compile(module.inference_schedule((1, 2, 9, 9), 8).mod,
                       target=target).mod.inspect_source('asm')
    assert 'ymm' in code and 'zmm' not in code


@pytest.mark.parametrize('cpu, triple, lanes', [
    ('x86-64', 'x86_64-linux-gnu', 4), ('x86-64-v2', 'x86_64-linux-gnu', 4),
    ('sandybridge', 'x86_64-linux-gnu', 8),
    ('x86-64-v3', 'x86_64-linux-gnu', 8),
    ('x86-64-v4', 'x86_64-linux-gnu', 16),
    ('neoverse-n1', 'aarch64-linux-gnu', 4),
    ('generic', 'aarch64-linux-gnu', 4)])
def test_vector_lanes(cpu, triple, lanes):
    target = Target({'kind': 'llvm', 'mcpu': cpu, 'mtriple': triple})
    assert module.vector_lanes(target) == lanes


@pytest.mark.parametrize('target', ['llvm', None, 16])
def test_vector_lanes_needs_a_target(target):
    with pytest.raises(TypeError, match=r'^target: expected'):
        module.vector_lanes(target)


@pytest.mark.parametrize('target', [
    'abacus', {'kind': 'abacus'}, {}, 16, 'c', {'kind': 'cuda', 'arch': 'x'},
    {'kind': 'llvm', 'mcpu': 'native'}, {'kind': 'llvm', 'mcpu': 'abacus'},
    {'kind': 'llvm', 'mcpu': 'znver4', 'mtriple': 'aarch64-linux-gnu'},
    {'kind': 'llvm', 'mtriple': 'foo-bar'},
    {'kind': 'llvm', 'mcpu': 'x86-64', 'mtriple': 'foo-bar'}])
def test_bad_target(target):
    for function in (module.cpu_target, lambda target:
                     module.inference_kernel((1, 2, 3, 4), target)):
        with pytest.raises(ValueError, match=r'^target: '):
            function(target)


def test_target_of_another_architecture():
    host = codegen.llvm_get_system_triple().split('-')[0]
    other = 'x86_64' if host == 'aarch64' else 'aarch64'
    target = {'kind': 'llvm', 'mtriple': f'{other}-linux-gnu'}
    for form in (target, Target(target)):
        with pytest.raises(ValueError, match=r'^target: expected the archi'
                           f'tecture of this machine.*got .{other}-linux'):
            module.inference_kernel((1, 2, 3, 4), form)
    assert module.cpu_target(target).attrs['mtriple'] == target['mtriple']
    same = {'kind': 'llvm', 'mtriple': f'{host}-linux-gnu'}
    assert module.cpu_target(same, here=True).attrs['mtriple'] == (
        same['mtriple'])


def test_target_in_three_forms():
    arrays = draw((1, 2, 3, 4))
    for target in ('llvm', {'kind': 'llvm'}, BASELINE):
        Y = run(module.inference_kernel((1, 2, 3, 4), target), arrays)
        assert bn_error(Y, *arrays) < BOUND


# Wrong arguments

@pytest.mark.parametrize('function', [
    module.inference_kernel,
    lambda *args, **options: module.inference_schedule(
        args[0], 8, *args[1:], **options)])
@pytest.mark.parametrize('name, value', [
    *(('shape', shape) for shape in (
        (3, 4, 4), (1, 2, 3, 4, 5), (1, 0, 3, 4), (-1, 2, 3, 4), None, 7,
        (1, 2, 3, 4.0), (1, 2, 3, '4'), (1, 2, 3, True), (1, 2, 3, None),
        'abcd', (1, 1, 2 ** 16, 2 ** 15), (1, 1, 1, 2 ** 64))),
    *(('dtype', dtype) for dtype in ('float64', 'bfloat16', 'int8', None, 4)),
    *(('eps', eps) for eps in (0, -1e-5, math.nan, math.inf, 1e-46, 1e39,
                               '1e-5', None, True, 1j, np.float16(0)))])
def test_bad_build(function, name, value):
    options = {'shape': (1, 2, 3, 4), name: value}
    error = TypeError if name == 'eps' and (
        value in ('1e-5', None, 1j) or value is True) else ValueError
    with pytest.raises(error, match=f'^{name}: expected .* got'):
        function(options.pop('shape'), **options)


def test_largest_shape_and_numpy_integers():
    shape = (np.int64(1), np.int32(1), np.uint8(1), np.int64(2 ** 31 - 1))
    module.inference_schedule(shape, 16)
    module.inference_kernel([np.int64(1), 2, 3, 4],
                            dtype=np.dtype('float16'), eps=np.float32(1))


NAMES = ['X', 'mean', 'var', 'gamma', 'beta', 'out']


@pytest.mark.parametrize('place', range(6))
@pytest.mark.parametrize('change, error, message', [
    (lambda a: a.astype('float64'), TypeError, '{}.dtype'),
    (lambda a: a.astype('float16'), TypeError, '{}.dtype'),
    (lambda a: a.astype('int32'), TypeError, '{}.dtype'),
    (lambda a: a.reshape(-1), ValueError, '{}.ndim'),
    (lambda a: a[None], ValueError, '{}.ndim'),
    (lambda a: np.concatenate([a, a]), ValueError, r'{}.shape\[0\]'),
    (lambda a: a[:0], ValueError, r'{}.shape\[0\]'),
    (lambda a: np.repeat(a, 2, 0)[::2], ValueError, '{}.strides'),
    (lambda a: None, TypeError, 'argument #{}'),
    (lambda a: 3, TypeError, 'argument #{}')])
def test_bad_call(kernel, arrays, place, change, error, message):
    arrays.append(np.zeros_like(arrays[0]))
    before = arrays[-1].copy()
    arrays[place] = change(arrays[place])
    what = place if '#' in message else NAMES[place]
    with pytest.raises(error, match=message.format(what)):
        kernel(*arrays)
    if place < 5:
        np.testing.assert_array_equal(arrays[-1], before)


def test_bad_layout_and_bad_number(kernel, arrays):
    out = np.empty((2, 3, 13, 5), 'float32')
    with pytest.raises(ValueError, match=r'X.strides'):
        kernel(np.asfortranarray(arrays[0]), *arrays[1:], out)
    with pytest.raises(TypeError, match='Expected 6 arguments'):
        kernel(*arrays)
    out.flags.writeable = False
    with pytest.raises((TypeError, BufferError), match='readonly'):
        kernel(*arrays, out)
    arrays[0].flags.writeable = False
    with pytest.raises((TypeError, BufferError), match='readonly'):
        kernel(*arrays, out)


def test_in_a_process_of_its_own():
    """What threads are told, how many they are, and no address ends it."""
    code = f'''
import os
import threading
import numpy as np
VARIABLES = 'TVM_BIND_THREADS', 'TVM_THREAD_POOL_SPIN_COUNT'
for name in VARIABLES:
    os.environ.pop(name, None)
os.environ['TVM_NUM_THREADS'] = '2'
before = dict(os.environ)
from tvm import s_tir, te
from d2ltvm import cpu_schedule, network_schedule
from d2ltvm.cpu_schedule import calm_threads, inference_kernel, peak_rate
from d2ltvm.deployment import fitting_threads
from d2ltvm.tvm_inference import batch_norm
assert dict(os.environ) == before  # importing changes nothing

def parallel(size):
    sch = s_tir.Schedule(te.create_prim_func(batch_norm(*size)))
    sch.parallel(sch.get_loops(sch.get_sblock('T_add_1'))[0])
    return sch

def bench():
    cpu_schedule.bench_workload = lambda workload: workload(1)
    cpu_schedule.bench_bn_tvm(parallel, [(2, 3)], 'llvm')

def tasks():
    return set(map(int, os.listdir('/proc/self/task')))

def ask(call, cores):
    for name in VARIABLES:
        os.environ.pop(name, None)
    others = tasks()
    call()
    started = tasks() - others
    print([os.environ[name] for name in VARIABLES], len(started),
          all(os.sched_getaffinity(task) == cores for task in started))

layers = [(np.ones(shape, 'float32'), np.ones(shape[0], 'float32'))
          for shape in ((1, 1, 3, 3), (1, 1, 5, 5), (1, 16), (1, 1))]
# Each thread of Python gets threads of its own from TVM
for call in (lambda: cpu_schedule.parallel_copy(9), lambda: peak_rate(2),
             bench, lambda: fitting_threads(dict(threads=2, batch=1)),
             lambda: network_schedule.network_module(layers, 1)):
    thread = threading.Thread(target=ask, args=(call, os.sched_getaffinity(0)))
    thread.start()
    thread.join()
os.environ.pop(VARIABLES[1])
os.environ['TVM_BIND_THREADS'] = '1'
for call in calm_threads, lambda: inference_kernel((1, 2, 3, 4)):
    call()
    print(os.environ['TVM_BIND_THREADS'],
          os.environ.pop('TVM_THREAD_POOL_SPIN_COUNT'))
os.environ['TVM_BIND_THREADS'] = '0'
assert peak_rate(2) > 0
try:
    peak_rate(3)
except ValueError as error:
    print(error)
{inspect.getsource(misaligned)}
for shape in ((1, 1, 64, 64), (2, 64, 1, 1), (2, 8, 64, 65)):
    bn = inference_kernel(shape)
    params = np.ones((4, shape[1], 1, 1), 'float32')
    for offset in range(0, 64, 4):
        X, *others = [misaligned(a, offset)
                      for a in (np.ones(shape, 'float32'), *params)]
        bn(X, *others, misaligned(X, offset))
print('done')
'''
    result = subprocess.run([sys.executable, '-c', code], text=True,
                            capture_output=True)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.splitlines() == [
        *["['0', '0'] 1 True"] * 5, '1 0', '1 0',
        'threads: expected 2 or less, as TVM has, got 3', 'done']


# The copy

@settings(max_examples=examples(20))
@given(count=st.integers(1, 5000), parts=st.integers(1, 60),
       seed=st.integers(0, 99))
def test_property_copy(count, parts, seed):
    X = np.random.default_rng(seed).normal(size=count).astype('float32')
    memory = np.full(count + 32, 7, 'float32')
    start = -memory.ctypes.data % 64 // 4
    out = memory[start:start + count]
    module.parallel_copy(count, parts)(tvm.runtime.tensor(X), out)
    assert out.tobytes() == X.tobytes()
    assert (memory[:start] == 7).all() and (memory[start + count:] == 7).all()


@pytest.mark.parametrize('name', ['count', 'parts'])
@pytest.mark.parametrize(('value', 'error'), [
    (0, ValueError), (-1, ValueError), (2.0, TypeError), ('2', TypeError),
    (True, TypeError)])
def test_bad_copy(name, value, error):
    with pytest.raises(error, match=f'^{name}: expected'):
        module.parallel_copy(**{'count': 4, 'parts': 2, name: value})


# Benchmarks

@pytest.mark.parametrize('seconds, runs', [
    (2, [1, 1]), (0.5, [1, 1, 5]), (0.01, [1, 1, 100]),
    (0, [1, 1, 10 ** 7])])
def test_bench_workload(seconds, runs):
    asked = []
    assert module.bench_workload(
        lambda n: asked.append(n) or seconds * n) == pytest.approx(seconds)
    assert asked == runs


def quick(monkeypatch):
    """Two runs instead of a second of them."""
    def workload(run):
        assert run(1) > 0
        return run(2) / 2
    monkeypatch.setattr(module, 'bench_workload', workload)


def test_bench_bn_tvm(monkeypatch):
    quick(monkeypatch)
    seen = []

    def func(size):
        seen.append(size)
        prim_func = te.create_prim_func(batch_norm(*size))
        return (tvm.s_tir.Schedule(prim_func) if size[0] == 2
                else tvm.IRModule({'main': prim_func}))
    times = module.bench_bn_tvm(func, [(2, 3), [4, 100]], 'llvm')
    assert seen == [(2, 3), (4, 100)]
    assert times.dtype == np.float64 and times.shape == (2,)
    assert (times > 0).all() and (times < 10).all()
    assert module.bench_bn_tvm(func, [], BASELINE).shape == (0,)


def test_bench_mxnet(semantics, monkeypatch):
    quick(monkeypatch)
    times = module.bench_bn_mxnet([(2, 3), (8, 300)])
    assert times.dtype == np.float64 and times.shape == (2,)
    assert (times > 0).all() and (times < 10).all()
    timer = module.bn_timer_mxnet(2, 3, 'cpu')
    assert 0 < timer(1) and 0 < timer(3) < 10


@pytest.mark.parametrize('sizes', [7, None, [7], [(1, 2, 3)], [None]])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=r'^sizes: expected'):
        module.bench_bn_tvm(lambda size: None, sizes, 'llvm')
    with pytest.raises(ValueError, match=r'^sizes: expected'):
        module.bench_bn_mxnet(sizes)


@pytest.mark.parametrize('made', [
    lambda s: (s, []), lambda s: [s], lambda s: None, lambda s: 'main'])
def test_bench_of_what_is_no_schedule(made):
    """As `(sch, args)` of the book of 2020."""
    sch = tvm.s_tir.Schedule(te.create_prim_func(batch_norm(2, 2)))
    with pytest.raises(TypeError, match=r'^func: expected it to return a '
                       f'schedule.*got {type(made(sch)).__name__}'):
        module.bench_bn_tvm(lambda size: made(sch), [(2, 2)], 'llvm')


def test_bad_bench():
    with pytest.raises(TypeError, match=r'^workload: expected'):
        module.bench_workload(3)
    with pytest.raises(TypeError, match=r'^func: expected'):
        module.bench_bn_tvm(None, [(2, 2)], 'llvm')
    with pytest.raises(ValueError, match=r'^c: expected 1 or more'):
        module.bn_timer_mxnet(0, 2, 'cpu')
    with pytest.raises(TypeError, match=r'^n: expected an integer'):
        module.bench_bn_mxnet([(2, 2.5)])
    with pytest.raises(ValueError, match=r'^ctx: expected'):
        module.bench_bn_mxnet([(2, 2)], 'tpu')


@pytest.mark.skipif(mx.context.num_gpus() > 0, reason='there is a GPU')
def test_no_gpu():
    with pytest.raises(ValueError, match=r'^ctx is .gpu., but'):
        module.bn_timer_mxnet(2, 2, 'gpu')


def test_missing_mxnet_is_named(without_mxnet):
    with pytest.raises(ImportError, match=r'bn_timer_mxnet needs .*mxnet'):
        module.bn_timer_mxnet(2, 2, 'cpu')


# Memory, peak rate, rectifier

@given(shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
       dtype=st.sampled_from(['float32', 'float64', 'float16', 'int8', bool]))
def test_property_aligned_empty(shape, dtype):
    array = module.aligned_empty(shape, dtype)
    array[...] = 1
    assert array.shape == shape and array.dtype == dtype
    assert array.flags.c_contiguous and array.flags.writeable
    assert array.ctypes.data % 64 == 0 or not array.size
    if array.size and dtype is not bool:
        tvm.runtime.from_dlpack(array)  # which checks the address


def test_aligned_empty_of_one_length():
    assert module.aligned_empty(np.int64(3)).shape == (3,)


@pytest.mark.parametrize('shape, error', [
    (-1, ValueError), ((2, -1), ValueError), (2.0, TypeError),
    ((2, 2.0), TypeError), (None, TypeError), ('23', TypeError),
    (True, TypeError)])
def test_aligned_empty_of_a_bad_shape(shape, error):
    with pytest.raises(error, match=r'^shape: expected'):
        module.aligned_empty(shape)


@pytest.mark.parametrize('dtype', [object, 'O', [('a', object)], 'V0'])
def test_aligned_empty_of_a_bad_dtype(dtype):
    with pytest.raises(TypeError, match=r'^dtype: expected'):
        module.aligned_empty(2, dtype)


def test_peak_rate():
    wide, narrow = module.peak_rate(), module.peak_rate(1, BASELINE)
    assert 0 < narrow < 1e12 and 0 < wide < 1e12
    assert module.peak_rate(np.int64(1)) > 0


@pytest.mark.parametrize('threads, error', [
    (0, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError),
    (10 ** 9, ValueError)])
def test_peak_rate_of_bad_threads(threads, error):
    with pytest.raises(error, match=r'^threads: expected'):
        module.peak_rate(threads)


def test_peak_rate_of_a_bad_target():
    with pytest.raises(ValueError, match=r'^target: expected kind llvm'):
        module.peak_rate(1, 'c')


SPECIAL = [-math.inf, -1, -1e-45, -0.0, 0, 1e-45, 2, math.inf, math.nan,
           -math.nan]


def rectified(dtype='float32', lanes=None):
    """A program that applies `relu`, in vectors if wanted."""
    x = te.placeholder((80,), name='x', dtype=dtype)
    sch = tvm.s_tir.Schedule(te.create_prim_func(
        [x, te.compute((80,), lambda i: module.relu(x[i]), name='y')]))
    if lanes:
        loop, = sch.get_loops(sch.get_sblock('y'))
        sch.vectorize(sch.split(loop, [None, lanes])[1])
    return sch.mod


def check_rectified(main, dtype='float32'):
    X = module.aligned_empty(80, dtype)
    with np.errstate(under='ignore'):
        X[:] = 8 * SPECIAL
    Y = module.aligned_empty(80, dtype)
    main(X, Y)
    np.testing.assert_array_equal(Y, np.where(X < 0, 0, X))
    np.testing.assert_array_equal(np.isnan(Y), np.isnan(X))
    assert np.isnan(X).sum() == 16


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('lanes', [None, 4, 16])
@pytest.mark.parametrize('target', [BASELINE, None])
def test_relu_on_llvm(dtype, lanes, target):
    check_rectified(tvm.compile(
        rectified(dtype, lanes),
        target=target or module.host_target())['main'], dtype)


@pytest.mark.skipif(not shutil.which('cc'), reason='needs a C compiler')
def test_relu_in_c(tmp_path):
    made = tvm.compile(rectified(), target='c')
    assert 'max(' not in made.mod.inspect_source()
    made.export_library(str(tmp_path / 'relu.so'))
    check_rectified(tvm.runtime.load_module(str(tmp_path / 'relu.so'))['main'])


@pytest.mark.parametrize('kind', ['cuda', 'opencl', 'metal', 'webgpu'])
def test_relu_compares_on_gpus(kind):
    """What TVM writes for them holds no maximum, which would drop NaN."""
    sch = tvm.s_tir.Schedule(rectified())
    sch.bind(*sch.get_loops(sch.get_sblock('y')), 'threadIdx.x')
    arch = {'arch': 'sm_90'} if kind == 'cuda' else {}
    made = tvm.compile(sch.mod, target=Target(
        {'kind': kind, **arch}, host={'kind': 'llvm'}))
    text = made.mod.imports[0].inspect_source()
    assert ' < 0' in text and not re.search(r'\bf?max\(', text)


def test_relu_in_tvmscript():
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((80,), 'float32'), y: T.Buffer((80,), 'float32')):
        for i in range(80):
            y[i] = module.relu(x[i])
    check_rectified(tvm.compile(main, target=BASELINE)['main'])


@pytest.mark.parametrize('x', [1.0, None, te.var('i'), np.ones(2), 'float'])
def test_relu_of_something_else(x):
    with pytest.raises(TypeError, match=r'^x: expected an expression'):
        module.relu(x)
