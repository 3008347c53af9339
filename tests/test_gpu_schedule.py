"""The CUDA schedule: indices checked on the processor, source, arguments."""
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import te
from tvm.script import tirx as T
from tvm.target import Target

from d2ltvm import gpu_schedule as module
from d2ltvm.tvm_inference import batch_norm, batch_norm_float64, bn_error
from soak import examples

# float32: at most 5 roundings of 2**-24; float16: one of 2**-11 on top
BOUND = {'float32': 1e-6, 'float16': 2 ** -11 + 1e-6}
TARGET = module.cuda_target('sm_90')
LLVM = Target({'kind': 'llvm'})
NO_GPU = not tvm.cuda(0).exist
without_gpu = pytest.mark.skipif(not NO_GPU, reason='there is a GPU')
needs_nvcc = pytest.mark.skipif(not shutil.which('nvcc'),
                                reason='nvcc is not installed')


def kernel_of(source):
    return source[source.rindex('__global__'):]


def data(shape, dtype='float32', seed=0, offset=0., scale=1.):
    rng = np.random.default_rng(seed)
    C = shape[1]
    X = offset + scale * rng.normal(size=shape)
    params = (offset + scale * rng.normal(size=C),
              scale ** 2 * rng.chisquare(3, C), *rng.normal(size=(2, C)))
    return X.astype(dtype), *(p.reshape(C, 1, 1).astype('float32')
                              for p in params)


def serial(sch):
    """A function of X and the parameters; `in_place` writes over X."""
    bn = tvm.compile(module.serial_program(sch.mod), target='llvm')['main']

    def run(X, *params, in_place=False):
        x = tvm.runtime.tensor(X)
        out = x if in_place else tvm.runtime.tensor(np.full_like(X, np.nan))
        bn(x, *map(tvm.runtime.tensor, params), out)
        return out.numpy()
    return run


def assert_correct(Y, X, mean, var, gamma, beta, eps):
    exact = batch_norm_float64(X, mean, var, gamma, beta, eps)
    terms = batch_norm_float64(abs(X), -abs(mean), var, abs(gamma),
                               abs(beta), eps)
    allowed = 1e-6 * terms
    if Y.dtype == 'float16':  # 11 digits, and half the smallest number
        allowed += 2 ** -11 * abs(exact) * (1 + 1e-6) + 2 ** -25
    assert (abs(Y - exact) <= allowed).all()


# Index arithmetic, for random shapes

@settings(max_examples=examples(40))  # each compiles
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 5),
                       st.integers(1, 40), st.integers(1, 40)),
       dtype=st.sampled_from(['float32', 'float16']),
       threads=st.sampled_from([32, 64, 256, 1024]),
       blocks=st.sampled_from([1, 7, 40, 1056]),
       seed=st.integers(0, 2 ** 32), offset=st.sampled_from([0, 1000]),
       scale=st.sampled_from([1e-2, 1, 30]),
       eps=st.sampled_from([1e-5, 1e-3, 1.0]))
@example((1, 1, 1, 1), 'float32', 256, 1056, 0, 0, 1, 1e-5)
@example((3, 5, 1, 1), 'float16', 256, 1056, 0, 0, 1, 1e-5)
@example((7, 3, 1, 3), 'float32', 32, 1, 0, 1000, 1, 1e-5)
@example((1, 3, 61, 57), 'float32', 32, 12, 0, 0, 1, 1e-5)
def test_property_every_element_once(shape, dtype, threads, blocks, seed,
                                     offset, scale, eps):
    sch = module.cuda_schedule(shape, dtype, eps, threads, blocks)
    arrays = data(shape, dtype, seed, offset, scale)
    run = serial(sch)
    Y = run(*arrays)
    assert_correct(Y, *arrays, eps)  # NaN, an element left out, fails
    # In place, an element that is written twice would be wrong
    np.testing.assert_array_equal(run(*arrays, in_place=True), Y)


@settings(max_examples=examples(10))
@given(scale=st.sampled_from([1e-15, 1e-3, 1e3, 1e15]),
       offset=st.sampled_from([0, 1000]), seed=st.integers(0, 2 ** 32))
def test_property_scales(scale, offset, seed):
    X, *params = data((2, 3, 5, 9), 'float32', seed, offset * scale, scale)
    sch = module.cuda_schedule((2, 3, 5, 9), eps=1e-12)
    Y = serial(sch)(X, *params)
    assert bn_error(Y, X, *params, 1e-12) < BOUND['float32']


@settings(max_examples=examples(60))
@given(N=st.integers(1, 64), C=st.integers(1, 512), H=st.integers(1, 500),
       W=st.integers(1, 500), dtype=st.sampled_from(['float32', 'float16']),
       threads=st.integers(1, 32), blocks=st.integers(1, 4000))
def test_property_the_launch_is_within_the_limits(N, C, H, W, dtype, threads,
                                                  blocks):
    if N * C * H * W >= 2 ** 30:
        return
    text = module.cuda_schedule((N, C, H, W), dtype, threads=32 * threads,
                                blocks=blocks).mod.script()
    grid = {name: int(extent) for extent, name in re.findall(
        r'thread_binding\((\d+), thread="([^"]*)"', text)}
    assert grid['blockIdx.x'] == N * C < 2 ** 31
    assert 1 <= grid['blockIdx.y'] <= 65535
    assert grid['blockIdx.x'] * grid['blockIdx.y'] <= max(blocks, N * C)
    assert grid['threadIdx.x'] <= 32 * threads
    assert grid['threadIdx.x'] % 32 == 0


def test_special_values():
    X, *params = data((2, 3, 3, 3))
    X[0, 1, 1, 1] = np.nan
    params[1][2] = 0
    params[1][0] = -1
    Y = serial(module.cuda_schedule((2, 3, 3, 3)))(X, *params)
    expected = np.zeros(Y.shape, bool)
    expected[:, 0] = expected[0, 1, 1, 1] = True
    np.testing.assert_array_equal(np.isnan(Y), expected)


# The generated source

@pytest.mark.parametrize('dtype, vector', [('float32', 'float4'),
                                           ('float16', 'uint4')])
@pytest.mark.parametrize('size', [28, 13, 57])
def test_source(dtype, vector, size):
    sch = module.cuda_schedule((2, 3, size, size), dtype)
    body = kernel_of(module.cuda_source(sch.mod, TARGET))
    assert body.count(f'*({vector}*)(x_ptr') == 1
    assert body.count(f'*({vector}*)(y_ptr') == 1
    for name in ('mean', 'var', 'gamma', 'beta'):
        assert body.count(f'{name}_ptr[') == 1
    assert body.index('sqrtf') < body.index('*(' + vector)
    assert ('for (' in body) == ('for k in range(1)' not in sch.mod.script()
                                 and 'for k in' in sch.mod.script())


def test_tvm_proves_the_alignment_of_vectors():
    # If this fails, the kernel may load from misaligned addresses
    sch = module.cuda_schedule((2, 3, 13, 13))
    wrong = sch.mod.script().replace('r * 169 + 4 - 1) // 4', 'r * 169)')
    wrong = wrong.replace(') * 4 + l]', ') + l]').replace(
        ') * 4 + j]', ') + j]')
    assert wrong.count('r * 169) + (') == 3  # guard, load and store
    body = kernel_of(module.cuda_source(tvm.script.from_source(wrong),
                                        TARGET))
    assert 'float4*)(x_ptr' not in body


def test_several_steps_are_a_loop():
    sch = module.cuda_schedule((1, 1, 64, 64), threads=32, blocks=2)
    assert 'for k in range(16)' in sch.mod.script()
    assert '< 16; ++' in kernel_of(module.cuda_source(sch.mod, TARGET))


@needs_nvcc
@pytest.mark.parametrize('arch', ['sm_80', 'sm_90'])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('size, edges', [(24, 0), (13, 2)])
def test_ptx(arch, dtype, size, edges):
    target = module.cuda_target(arch)
    sch = module.cuda_schedule((2, 3, size, size), dtype)
    compiler, ptx = module.compile_ptx(
        module.cuda_source(sch.mod, target), target)
    assert compiler == 'nvcc' and f'.target {arch}' in ptx
    loads = re.findall(r'ld\.global\S*', ptx)
    stores = re.findall(r'st\.global\S*', ptx)
    assert len(loads) == 4 + 1 + edges and len(stores) == 1 + edges
    assert sum('.v4' in a for a in loads) == 1
    assert sum('.v4' in a for a in stores) == 1
    assert 'local' not in ptx  # everything is in registers


@needs_nvcc
def test_source_that_is_wrong():
    with pytest.raises(RuntimeError, match='error'):
        module.compile_ptx('extern "C" __global__ void f() { x }', TARGET)


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(module.shutil, 'which', lambda name: None)
    monkeypatch.setitem(sys.modules, 'cuda.bindings', None)
    monkeypatch.setitem(sys.modules, 'cuda', None)
    assert module.compile_ptx('', TARGET) == module.compile_ptx('') == (
        None, '')


def test_nvrtc_is_the_second_choice(monkeypatch):
    asked = []
    monkeypatch.setattr(module.shutil, 'which', lambda name: None)
    bindings = types.ModuleType('cuda.bindings')
    bindings.nvrtc = types.ModuleType('cuda.bindings.nvrtc')
    monkeypatch.setitem(sys.modules, 'cuda', types.ModuleType('cuda'))
    monkeypatch.setitem(sys.modules, 'cuda.bindings', bindings)
    monkeypatch.setattr(module.nvcc, 'compile_cuda', lambda *args, **options:
                        asked.append((args, options)) or bytearray(b'ptx'))
    assert module.compile_ptx('source', TARGET) == ('nvrtc', 'ptx')
    assert asked == [(('source', 'ptx', 'sm_90'), {'compiler': 'nvrtc'})]


# The serial program

def test_serial_program_needs_bound_loops():
    func = te.create_prim_func(batch_norm(2, 3))
    with pytest.raises(ValueError, match=r'^mod: expected loops that are'):
        module.serial_program(func)
    with pytest.raises(ValueError, match=r'^mod: expected loops that are'):
        module.cuda_source(func, TARGET)


def test_serial_program_refuses_shared_memory():
    @T.prim_func(s_tir=True)
    def main(X: T.Buffer((32,), 'float32')):
        for t in T.thread_binding(32, thread='threadIdx.x'):
            with T.sblock('thread'):
                a = T.sblock_alloc_buffer((32,), scope='shared')
                a[t] = X[t]
                X[t] = a[31 - t]
    with pytest.raises(ValueError, match=r'^mod: .* share memory'):
        module.serial_program(main)


def test_serial_program_sees_a_wrong_bound():
    sch = module.cuda_schedule((2, 3, 13, 13))
    X, *params = data((2, 3, 13, 13))
    text = sch.mod.script()
    assert 'r * 169 + 4 - 1' in text
    wrong = tvm.s_tir.Schedule(tvm.script.from_source(
        text.replace('r * 169 + 4 - 1', 'r * 169')))
    Y = serial(wrong)(X, *params)
    assert not bn_error(Y, X, *params) < 1e-6


# Arguments

@pytest.mark.parametrize('function', [module.cuda_schedule,
                                      module.cuda_kernel, module.bench_gpu])
@pytest.mark.parametrize('name, value', [
    *(('shape', shape) for shape in (
        (3, 28, 28), (0, 3, 2, 2), (1, 3, 2.0, 2), (1, True, 2, 2), 7, None,
        '1234', (1, 1, 2 ** 15, 2 ** 15))),
    *(('dtype', d) for d in ('float64', 'bfloat16', None)),
    *(('eps', e) for e in (0, -1e-5, np.nan, np.inf, True, '1', 1e-46))])
def test_bad_arguments(function, name, value):
    arguments = {'shape': (1, 3, 4, 4), name: value}
    error = TypeError if value in (True, '1') else ValueError
    with pytest.raises(error, match=rf'^{name}: expected'):
        function(**arguments)


@pytest.mark.parametrize('name, value', [
    ('threads', 0), ('threads', 33), ('threads', 1056), ('threads', 32.),
    ('threads', None), ('blocks', 0), ('blocks', 65536), ('blocks', '8')])
def test_bad_launch(name, value):
    with pytest.raises(ValueError, match=rf'^{name}: expected'):
        module.cuda_schedule((1, 3, 4, 4), **{name: value})


@pytest.mark.parametrize('arch', ['H100', 'sm90', 'sm_', 'sm_1', 90, '',
                                  'sm_90x'])
def test_bad_arch(arch):
    with pytest.raises(ValueError, match=r'^arch: expected'):
        module.cuda_target(arch)


@pytest.mark.parametrize('target', [LLVM, 90])
def test_bad_target(target):
    with pytest.raises(ValueError, match='target: expected a Target of kind'):
        module.cuda_kernel((1, 3, 4, 4), target)
    sch = module.cuda_schedule((1, 3, 4, 4))
    with pytest.raises(ValueError, match='target: expected a Target of kind'):
        module.cuda_source(sch.mod, target)
    with pytest.raises(ValueError, match='target: expected a Target of kind'):
        module.compile_ptx('', target)


@pytest.mark.parametrize('function', [module.cuda_source,
                                      module.serial_program])
@pytest.mark.parametrize('mod, name', [
    (module.cuda_schedule((1, 3, 4, 4)), 'Schedule'), ('', 'str'),
    (None, 'NoneType')])
def test_bad_program(function, mod, name):
    with pytest.raises(TypeError, match='mod: expected an IRModule or PrimFu'
                       f'nc, got {name}'):
        function(mod)


def test_arch_of_the_gpu(monkeypatch):
    gpu = types.SimpleNamespace(exist=True, compute_version='12.0')
    monkeypatch.setattr(module.tvm, 'cuda', lambda index: gpu)
    assert module.cuda_target().attrs['arch'] == 'sm_120'


@without_gpu
def test_without_gpu():
    assert module.cuda_target().attrs['arch'] == 'sm_90'
    with pytest.raises(RuntimeError, match=r'^bench_gpu needs a GPU'):
        module.bench_gpu((1, 3, 4, 4))
    bn = module.cuda_kernel((1, 3, 4, 4))
    X, *params = map(tvm.runtime.tensor, data((1, 3, 4, 4)))
    with pytest.raises(ValueError, match='expected cuda'):
        bn(X, *params, X)


# The measurement, with the processor in the place of the GPU

@pytest.fixture
def pretend(monkeypatch):
    class Cpu:
        exist, device_name, device = True, 'pretended', tvm.cpu()

        def sync(self):
            self.device.sync()

    def build(shape, target, dtype, eps):
        sch = module.cuda_schedule(shape, dtype, eps)
        return tvm.compile(module.serial_program(sch.mod),
                           target='llvm')['main']

    tensor = tvm.runtime.tensor
    monkeypatch.setattr(module.tvm, 'cuda', lambda index: Cpu())
    monkeypatch.setattr(module.tvm.runtime, 'tensor',
                        lambda array, device: tensor(array))
    monkeypatch.setattr(module, 'cuda_kernel', build)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_bench_gpu(pretend, dtype):
    result = module.bench_gpu((2, 3, 13, 13), dtype)
    assert result == json.loads(json.dumps(result))
    assert result['device'] == 'pretended'
    assert result['bytes'] == 2 * 6 * 169 * np.dtype(dtype).itemsize
    assert result['error'] < BOUND[dtype]
    assert {'TVM', 'copy'} <= set(result['seconds'])
    assert all(0 < t < 1 for t in result['seconds'].values())
    assert result['versions']['TVM'] == tvm.__version__


def test_bench_gpu_refuses_a_wrong_kernel(pretend, monkeypatch):
    monkeypatch.setattr(module, 'cuda_kernel',
                        lambda *args: lambda *tensors: None)
    with pytest.raises(RuntimeError, match=r'^the kernel is wrong'):
        module.bench_gpu((2, 3, 13, 13))


def test_seconds(monkeypatch):
    now = [0.]
    monkeypatch.setattr(module.time, 'perf_counter', lambda: now[0])
    calls = []

    def call():
        calls.append(1)
        now[0] += 0.01

    assert module._seconds(call, lambda: None) == pytest.approx(0.01)
    assert len(calls) == 1 + 1 + 2 + 4 + 8 + 5 * 8


def test_peers_are_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.setitem(sys.modules, 'cupy', None)
    X, *params = data((1, 3, 4, 4))
    assert module._peers(X, *params, 1e-5) == {}


@pytest.mark.skipif(NO_GPU, reason='no GPU that TVM can use')
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('shape', [(2, 3, 28, 28), (2, 3, 13, 13),
                                   (3, 5, 1, 1), (1, 2, 301, 299)])
def test_on_a_gpu(shape, dtype):
    result = module.bench_gpu(shape, dtype)
    assert result['error'] < 2 * BOUND[dtype]
