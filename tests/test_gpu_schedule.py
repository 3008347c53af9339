"""The GPU schedule: run as OpenCL, its source read, arguments, occupancy."""
import functools
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import gpu_compiled
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
from soak import SOAK, examples, later

os.environ.setdefault('POCL_KERNEL_CACHE', '0')  # delete them at the end

# float32: at most 5 roundings of 2**-24; float16: one of 2**-11 on top
BOUND = {'float32': 1e-6, 'float16': 2 ** -11 + 1e-6}
TARGET = module.cuda_target('sm_90')
LLVM = Target({'kind': 'llvm'})
NO_GPU = not tvm.cuda(0).exist
KINDS = 'opencl', 'cuda', 'webgpu'
without_gpu = pytest.mark.skipif(not NO_GPU, reason='there is a GPU')
needs_nvcc = pytest.mark.skipif(not shutil.which('nvcc'),
                                reason='nvcc is not installed')


def needs(platform):
    """Skip a test where this OpenCL driver is missing, and say so."""
    try:
        module._opencl_device(platform)
        lacking = ''
    except (ImportError, RuntimeError) as error:
        lacking = str(error)
    return pytest.mark.skipif(bool(lacking), reason=lacking or 'there it is')


needs_pocl, needs_oclgrind = needs('Portable'), needs('Oclgrind')


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


def run(sch, X, *params):
    """The output of a schedule as OpenCL; NaN where it writes nothing."""
    out = np.full_like(X, np.nan)
    module.build_opencl(sch.mod)(X, *params, out)
    return out


def assert_correct(Y, X, mean, var, gamma, beta, eps):
    exact = batch_norm_float64(X, mean, var, gamma, beta, eps)
    terms = batch_norm_float64(abs(X), -abs(mean), var, abs(gamma),
                               abs(beta), eps)
    allowed = 1e-6 * terms
    if Y.dtype == 'float16':  # 11 digits, and half the smallest number
        allowed += 2 ** -11 * abs(exact) * (1 + 1e-6) + 2 ** -25
    assert (abs(Y - exact) <= allowed).all()


def reverse(threads=64, blocks=4, dtype='float32'):
    """Each block turns its row around, through shared memory."""
    @T.prim_func(s_tir=True)
    def main(X: T.Buffer((blocks, threads), dtype),
             Y: T.Buffer((blocks, threads), dtype)):
        for b in T.thread_binding(blocks, thread='blockIdx.x'):
            for t in T.thread_binding(threads, thread='threadIdx.x'):
                with T.sblock('thread'):
                    a = T.sblock_alloc_buffer((threads,), dtype,
                                              scope='shared')
                    a[t] = X[b, t]
                    T.evaluate(T.tvm_storage_sync('shared'))
                    Y[b, t] = a[threads - 1 - t]
    return main


def pointwise(function, source='float32', result='float32', size=64):
    @T.prim_func(s_tir=True)
    def main(X: T.Buffer((size,), source), Y: T.Buffer((size,), result)):
        for b in T.thread_binding((size + 63) // 64, thread='blockIdx.x'):
            for t in T.thread_binding(64, thread='threadIdx.x'):
                with T.sblock('thread'):
                    if b * 64 + t < size:
                        Y[b * 64 + t] = function(X[b * 64 + t])
    return main


def soak_example(*values):
    """An example for `make soak` alone."""
    return example(*values) if SOAK else lambda test: test


# Random shapes, run

@needs_pocl
@settings(max_examples=examples(18), deadline=None)  # each compiles
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 5),
                       st.integers(1, 40), st.integers(1, 40)),
       dtype=st.sampled_from(['float32', 'float16']),
       threads=st.sampled_from([32, 64, 256, 1024]),
       blocks=st.sampled_from([1, 7, 40, 1056]),
       seed=st.integers(0, 2 ** 32), offset=st.sampled_from([0, 1000]),
       scale=st.sampled_from([1e-2, 1, 30]),
       eps=st.sampled_from([1e-5, 1e-3, 1.0]))
@soak_example((1, 1, 1, 1), 'float32', 256, 1056, 0, 0, 1, 1e-5)
@example((3, 5, 1, 1), 'float16', 256, 1056, 0, 0, 1, 1e-5)
@soak_example((7, 3, 1, 3), 'float32', 32, 1, 0, 1000, 1, 1e-5)
@example((1, 3, 61, 57), 'float32', 32, 12, 0, 0, 1, 1e-5)
def test_property_every_element(shape, dtype, threads, blocks, seed, offset,
                                scale, eps):
    sch = module.cuda_schedule(shape, dtype, eps, threads, blocks)
    arrays = data(shape, dtype, seed, offset, scale)
    assert_correct(run(sch, *arrays), *arrays, eps)  # NaN fails


@needs_pocl
@settings(max_examples=examples(9), deadline=None)
@given(scale=st.sampled_from([1e-15, 1e-3, 1e3, 1e15]),
       offset=st.sampled_from([0, 1000]), seed=st.integers(0, 2 ** 32))
def test_property_scales(scale, offset, seed):
    X, *params = data((2, 3, 5, 9), 'float32', seed, offset * scale, scale)
    out = np.full_like(X, np.nan)
    built_once()(X, *params, out)
    assert bn_error(out, X, *params, 1e-12) < BOUND['float32']


@functools.cache
def built_once():
    return module.build_opencl(
        module.cuda_schedule((2, 3, 5, 9), eps=1e-12).mod)


@needs_oclgrind
@settings(max_examples=examples(12), deadline=None)
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 3),
                       st.integers(1, 15), st.integers(1, 15)),
       dtype=st.sampled_from(['float32', 'float16']),
       threads=st.sampled_from([32, 64]), blocks=st.sampled_from([1, 9]))
@example((2, 3, 13, 13), 'float32', 32, 9)
@example((2, 1, 9, 13), 'float16', 32, 9)
def test_property_no_races_and_nothing_out_of_bounds(shape, dtype, threads,
                                                     blocks):
    sch = module.cuda_schedule(shape, dtype, 1e-5, threads, blocks)
    arrays = data(shape, dtype)
    out = np.full_like(arrays[0], np.nan)
    assert module.find_races(sch.mod, *arrays, out) == []
    assert_correct(out, *arrays, 1e-5)


@settings(max_examples=examples(40), deadline=None)
@given(N=st.integers(1, 64), C=st.integers(1, 512), H=st.integers(1, 500),
       W=st.integers(1, 500), dtype=st.sampled_from(['float32', 'float16']),
       threads=st.integers(1, 32), blocks=st.integers(1, 4000))
def test_property_the_launch_is_within_the_limits(N, C, H, W, dtype, threads,
                                                  blocks):
    if N * C * H * W >= 2 ** 30:
        return
    launch, = module.launch_plan(module.cuda_schedule(
        (N, C, H, W), dtype, threads=32 * threads, blocks=blocks).mod, 'cuda')
    (x, y, z), (width, *rest) = launch.grid, launch.block
    assert x == N * C and 1 <= y <= 65535 and z == 1 and rest == [1, 1]
    assert x * y <= max(blocks, N * C)
    assert width % 32 == 0 and width <= 32 * threads


@needs_pocl
def test_special_values():
    X, *params = data((2, 3, 3, 3))
    X[0, 1, 1, 1] = np.nan
    params[1][2] = 0
    params[1][0] = -1
    Y = run(module.cuda_schedule((2, 3, 3, 3)), X, *params)
    expected = np.zeros(Y.shape, bool)
    expected[:, 0] = expected[0, 1, 1, 1] = True
    np.testing.assert_array_equal(np.isnan(Y), expected)


# The launch plan

@pytest.mark.parametrize('kind', KINDS)
def test_plan(kind):
    launch, = module.launch_plan(module.cuda_schedule((2, 3, 13, 13)).mod,
                                 kind)
    assert launch == ('main_kernel', ('beta', 'gamma', 'mean', 'var', 'X',
                                      'out'), ('out',), (6, 1, 1),
                      (64, 1, 1), 0)
    launch, = module.launch_plan(reverse(), kind)
    assert launch == ('main_kernel', ('X', 'Y'), ('Y',), (4, 1, 1),
                      (64, 1, 1), 256)


def two_kernels():
    @T.prim_func(s_tir=True)
    def main(A: T.Buffer((32,), 'float32'), B: T.Buffer((32,), 'float32'),
             unused: T.Buffer((32,), 'float32')):
        for t in T.thread_binding(32, thread='threadIdx.x'):
            with T.sblock('first'):
                B[t] = A[t] + T.float32(1)
        for t in T.thread_binding(32, thread='threadIdx.y'):
            with T.sblock('second'):
                A[t] = B[31 - t] * T.float32(2)
    return main


def test_plan_of_two_kernels():
    first, second = module.launch_plan(two_kernels())
    assert first.written == ('B',) and second.written == ('A',)
    assert first.block == (32, 1, 1) and second.block == (1, 32, 1)
    assert first.kernel != second.kernel
    for launch in first, second:
        assert set(launch.arguments) == {'A', 'B'}
        assert launch.kernel in module.opencl_source(two_kernels())


@needs_pocl
def test_two_kernels_run_one_after_the_other():
    A, B, unused = (np.arange(32, dtype='float32') for _ in range(3))
    module.build_opencl(two_kernels())(A, B, unused)
    np.testing.assert_array_equal(B, np.arange(32) + 1)
    np.testing.assert_array_equal(A, 2 * (32 - np.arange(32)))


@pytest.mark.parametrize('kind, threads, blocks, dtype, name', [
    ('cuda', 1025, 1, 'float16', 'block'), ('webgpu', 257, 1, 'float32',
                                            'block'),
    ('cuda', 1024, 1, 'float32', None), ('webgpu', 256, 1, 'float32', None),
    ('opencl', 4096, 1, 'float32', None)])
def test_a_block_that_is_too_large(kind, threads, blocks, dtype, name):
    mod = reverse(threads, blocks, dtype=dtype)
    if name is None:
        assert module.launch_plan(mod, kind)[0].block[0] == threads
        return
    with pytest.raises(ValueError, match=rf'^{name}: expected at most .* for '
                       rf'{kind}, 64 along z, got \({threads}, 1, 1\)'):
        module.launch_plan(mod, kind)


def grid_of(x, y):
    @T.prim_func(s_tir=True)
    def main(Y: T.Buffer((1,), 'float32')):
        for i in T.thread_binding(x, thread='blockIdx.x'):
            for j in T.thread_binding(y, thread='blockIdx.y'):
                with T.sblock('thread'):
                    if i + j == 0:
                        Y[0] = T.float32(1)
    return main


@pytest.mark.parametrize('kind', ['cuda', 'webgpu'])
def test_a_grid_that_is_too_large(kind):
    assert module.launch_plan(grid_of(70000, 65535), kind)[0].grid == (
        70000, 65535, 1)
    with pytest.raises(ValueError, match=r'^grid: expected at most .*got '
                       r'\(1, 65536, 1\)'):
        module.launch_plan(grid_of(1, 65536), kind)
    with pytest.raises(ValueError, match=r'^grid: expected'):
        (module.cuda_source if kind == 'cuda' else module.wgsl_source)(
            grid_of(1, 65536))


@pytest.mark.parametrize('kind', KINDS)
def test_a_launch_without_threads(kind):
    with pytest.raises(ValueError, match=r'^mod: expected at least one block'):
        module.launch_plan(pointwise(lambda x: x, size=0), kind)


@pytest.mark.parametrize('kind, kilobytes', [('cuda', 48), ('webgpu', 16)])
def test_too_much_shared_memory(kind, kilobytes):
    def uses(size):
        @T.prim_func(s_tir=True)
        def main(X: T.Buffer((32,), 'float32'), Y: T.Buffer((32,),
                                                            'float32')):
            for t in T.thread_binding(32, thread='threadIdx.x'):
                with T.sblock('thread'):
                    a = T.sblock_alloc_buffer((size,), scope='shared')
                    a[t] = X[t]
                    a[size - 1 - t] = X[t]
                    T.evaluate(T.tvm_storage_sync('shared'))
                    Y[t] = a[31 - t] + a[size - 32 + t]
        return main
    assert module.launch_plan(uses(256 * kilobytes),
                              kind)[0].shared == 1024 * kilobytes
    with pytest.raises(ValueError, match=r'^shared: expected at most '
                       f'{1024 * kilobytes} bytes for {kind}'):
        module.launch_plan(uses(256 * kilobytes + 1), kind)


@pytest.mark.parametrize('function', [
    module.launch_plan, module.cuda_source, module.opencl_source,
    module.wgsl_source, module.build_opencl])
def test_a_program_without_bound_loops(function):
    func = te.create_prim_func(batch_norm(2, 3))
    with pytest.raises(ValueError, match=r'^mod: expected loops that are'):
        function(func)


@pytest.mark.parametrize('function', [
    module.launch_plan, module.cuda_source, module.opencl_source,
    module.wgsl_source, module.build_opencl])
@pytest.mark.parametrize('mod, name', [
    (module.cuda_schedule((1, 3, 4, 4)), 'Schedule'), ('', 'str'),
    (None, 'NoneType')])
def test_bad_program(function, mod, name):
    with pytest.raises(TypeError, match=r'mod: expected an IRModule or PrimFu'
                       f'nc, got {name}'):
        function(mod)


def test_a_program_of_any_size():
    @T.prim_func(s_tir=True)
    def main(x: T.handle, y: T.handle):
        n = T.int32()
        X = T.match_buffer(x, (n,))
        Y = T.match_buffer(y, (n,))
        for i in T.thread_binding(n, thread='blockIdx.x'):
            with T.sblock('Y'):
                Y[i] = X[i]
    with pytest.raises(ValueError, match=r'^mod: expected'):
        module.launch_plan(main)


@functools.cache
def host_works():
    """Bound loops, and something that the host would have to do besides."""
    @T.prim_func(s_tir=True)
    def loop(X: T.Buffer((32,), 'float32'), Y: T.Buffer((32,), 'float32')):
        for _k in range(3):
            for t in T.thread_binding(32, thread='threadIdx.x'):
                Y[t] = Y[t] + X[t]

    @T.prim_func(s_tir=True)
    def loop_number(X: T.Buffer((32,), 'float32'),
                    Y: T.Buffer((32,), 'float32')):
        for k in range(3):
            for t in T.thread_binding(32, thread='threadIdx.x'):
                Y[t] = Y[t] + X[t] * T.Cast('float32', k)

    @T.prim_func(s_tir=True)
    def before(X: T.Buffer((32,), 'float32'), Y: T.Buffer((32,), 'float32')):
        Y[0] = T.float32(100)
        for t in T.thread_binding(32, thread='threadIdx.x'):
            Y[t] = Y[t] + X[t]

    @T.prim_func(s_tir=True)
    def after(X: T.Buffer((32,), 'float32'), Y: T.Buffer((32,), 'float32')):
        for t in T.thread_binding(32, thread='threadIdx.x'):
            Y[t] = X[t]
        for i in range(32):
            Y[i] = T.float32(100)

    @T.prim_func(s_tir=True)
    def condition(X: T.Buffer((32,), 'float32'),
                  Y: T.Buffer((32,), 'float32')):
        if X[0] > T.float32(0):
            for t in T.thread_binding(32, thread='threadIdx.x'):
                Y[t] = X[t]

    @T.prim_func(s_tir=True)
    def claim(X: T.Buffer((32,), 'float32'), Y: T.Buffer((32,), 'float32')):
        assert X[0] > T.float32(0), 'no'
        for t in T.thread_binding(32, thread='threadIdx.x'):
            Y[t] = X[t]
    return {'loop': loop, 'loop_number': loop_number, 'before': before,
            'after': after, 'condition': condition, 'claim': claim}


# In short all functions refuse one, and one refuses all
@pytest.mark.parametrize('function, what, got', [
    pytest.param(function, what, got, marks=[] if what == 'after' or
                 function is module.launch_plan else pytest.mark.soak)
    for function in (
        module.launch_plan, module.cuda_source, module.opencl_source,
        module.wgsl_source, module.build_opencl)
    for what, got in (
        ('loop', 'For'), ('loop_number', 'For'), ('before', 'BufferStore'),
        ('after', 'For'), ('condition', 'IfThenElse'),
        ('claim', 'AssertStmt'))])
def test_work_of_the_host_is_refused(function, what, got):
    with pytest.raises(ValueError, match=r'^mod: expected launches of kernels'
                       f'.* got {got} outside'):
        function(host_works()[what])


@pytest.mark.parametrize('function', [
    module.launch_plan, module.cuda_source, module.opencl_source,
    module.wgsl_source, module.build_opencl])
@pytest.mark.parametrize('layout, message', [
    ({'strides': (1, 2)}, r'X without .*strides \(1, 2\), elem_offset 0'),
    ({'elem_offset': 2}, r'X without .*strides \(\), elem_offset 2')])
def test_strides_and_offsets_are_refused(function, layout, message):
    @T.prim_func(s_tir=True)
    def main(X: T.Buffer((2, 3), 'float32', **layout),
             Y: T.Buffer((2, 3), 'float32')):
        for t in T.thread_binding(6, thread='threadIdx.x'):
            Y[t // 3, t % 3] = X[t // 3, t % 3]
    with pytest.raises(ValueError, match=r'^mod: expected ' + message):
        function(main)


@pytest.mark.parametrize('function', [
    module.launch_plan, module.cuda_source, module.opencl_source,
    module.wgsl_source, module.build_opencl])
def test_a_parameter_that_is_a_number_is_refused(function):
    @T.prim_func(s_tir=True)
    def main(X: T.Buffer((32,), 'float32'), n: T.int32,
             Y: T.Buffer((32,), 'float32')):
        for t in T.thread_binding(32, thread='threadIdx.x'):
            if t < n:
                Y[t] = X[t]
    with pytest.raises(ValueError, match=r'^mod: expected arrays as parameter'
                       's, got n of type int32'):
        function(main)


def test_a_program_with_memory_of_its_own():
    @T.prim_func(s_tir=True)
    def main(X: T.Buffer((64,), 'float32'), Y: T.Buffer((64,), 'float32')):
        between = T.sblock_alloc_buffer((64,))
        for i in T.thread_binding(64, thread='threadIdx.x'):
            with T.sblock('first'):
                between[i] = X[i]
        for i in T.thread_binding(64, thread='threadIdx.x'):
            with T.sblock('second'):
                Y[i] = between[63 - i]
    with pytest.raises(ValueError, match=r'^mod: expected kernels that work'):
        module.launch_plan(main)


@pytest.mark.parametrize('kind', ['metal', 'llvm', '', None])
def test_bad_kind(kind):
    with pytest.raises(ValueError, match=r'^kind: expected one of'):
        module.gpu_target(kind)
    with pytest.raises(ValueError, match=r'^kind: expected one of'):
        module.launch_plan(reverse(), kind)


# OpenCL

@needs_pocl
def test_program_tells_what_it_is():
    program = module.build_opencl(reverse())
    assert program.device.startswith('Portable Computing Language')
    assert program.plan == module.launch_plan(reverse())
    assert program.source == module.opencl_source(reverse())


@needs_pocl
def test_shared_memory_and_barriers():
    X = np.arange(256, dtype='float32').reshape(4, 64)
    Y = np.zeros_like(X)
    module.build_opencl(reverse())(X, Y)
    np.testing.assert_array_equal(Y, X[:, ::-1])


@needs_pocl
def test_bad_arrays():
    program = module.build_opencl(reverse())
    X, Y = np.ones((2, 4, 64), 'float32')
    with pytest.raises(TypeError, match=r'^arrays: expected X, Y, got 1'):
        program(X)
    with pytest.raises(TypeError, match=r'^Y: expected a NumPy array of floa'):
        program(X, Y.astype('float64'))
    with pytest.raises(TypeError, match=r'^X: expected a NumPy array of floa'):
        program(tvm.runtime.tensor(X), Y)
    with pytest.raises(ValueError, match=r'^X: expected shape \(4, 64\), got'):
        program(X.reshape(64, 4), Y)
    with pytest.raises(ValueError, match=r'^X: expected a contiguous array'):
        program(np.ones((64, 4), 'float32').T, Y)
    Y.flags.writeable = False
    with pytest.raises(ValueError, match=r'^Y: expected an array that can be'):
        program(X, Y)
    program(Y, X)  # one that is only read may be protected


@needs_pocl
def test_memory_that_two_outputs_share():
    program = module.build_opencl(two_kernels())
    memory, unused = np.zeros(40, 'float32'), np.ones(32, 'float32')
    with pytest.raises(ValueError, match=r'^B: expected other memory than'):
        program(memory[:32], memory[8:], unused)
    assert (memory == 0).all()
    program(unused, memory[:32], unused)  # one output, and what is read
    with pytest.raises(ValueError, match=r'^B: expected other memory than'):
        program(unused, unused, memory[:32])


@needs_pocl
def test_arrays_that_are_refused_are_not_changed():
    program = module.build_opencl(two_kernels())
    A, B = np.ones((2, 32), 'float32')
    with pytest.raises(ValueError, match=r'^unused'):
        program(A, B, np.ones(31, 'float32'))
    assert (A == 1).all() and (B == 1).all()


@needs_pocl
@pytest.mark.parametrize('bits', [np.arange(2 ** 16, dtype='uint16')])
def test_every_float16_is_converted_as_by_numpy(bits):
    X = bits.view('float16')
    up = np.zeros(X.size, 'float32')
    module.build_opencl(pointwise(lambda x: T.Cast('float32', x), 'float16',
                                  size=X.size))(X, up)
    np.testing.assert_array_equal(up, X.astype('float32'))
    # Back again, from all numbers, all ties between two, and their neighbours
    ties = up[:-1] / 2 + up[1:] / 2
    given = np.concatenate([up, ties, np.nextafter(ties, np.float32(1e9)),
                            np.nextafter(ties, np.float32(-1e9))])
    down = np.zeros(given.size, 'float16')
    module.build_opencl(pointwise(lambda x: T.Cast('float16', x), 'float32',
                                  'float16', given.size))(given, down)
    with np.errstate(over='ignore', invalid='ignore'):
        np.testing.assert_array_equal(down, given.astype('float16'))


@needs_pocl
@pytest.mark.parametrize('function, result', [
    (lambda x: x + x, 'float16'), (lambda x: T.float16(0.5), 'float16'),
    (lambda x: T.Cast('int32', x), 'int32'),
    (lambda x: T.Select(x < T.float16(0), T.float32(1), T.float32(0)),
     'float32'), (lambda x: T.max(x, x * T.float16(2)), 'float16')])
def test_arithmetic_in_float16_is_refused(function, result):
    with pytest.raises(ValueError, match=r'^mod: this device stores float16 '):
        module.build_opencl(pointwise(function, 'float16', result))


@needs_pocl
def test_a_device_that_computes_in_float16_gets_the_plain_source(monkeypatch):
    sch, seen = module.cuda_schedule((1, 1, 4, 4), 'float16'), []
    device = types.SimpleNamespace(extensions='cl_khr_fp16 cl_khr_fp64')
    monkeypatch.setattr(module, '_opencl_device', lambda platform: device)
    monkeypatch.setattr(module, 'OpenCLProgram',
                        lambda *arguments: seen.extend(arguments))
    module.build_opencl(sch.mod)
    assert seen[2] == module.opencl_source(sch.mod) and seen[3] is device


@needs_pocl
def test_a_block_that_is_too_large_for_the_device():
    with pytest.raises(ValueError, match=r'^block: expected at most \d+ threa'
                       r'ds on Portable.*, got \(65536, 1, 1\)'):
        module.build_opencl(reverse(2 ** 16, 1))


@needs_pocl
def test_source_that_the_driver_refuses():
    with pytest.raises(RuntimeError, match=r'^Portable.* refuses the source'):
        module.build_opencl(reverse(), '__kernel void main_kernel() { x }')


@needs_pocl
def test_a_device_without_memory(monkeypatch):
    import pyopencl
    program = module.build_opencl(reverse())

    def fails(*arguments, **options):
        raise pyopencl.MemoryError('out of resources')
    monkeypatch.setattr(pyopencl, 'Buffer', fails)
    with pytest.raises(MemoryError, match=r'^Portable.* no memory for 2048 b'):
        program(*np.ones((2, 4, 64), 'float32'))


@needs_pocl
@pytest.mark.parametrize('source, error, message', [
    ('__kernel void other() {}', ValueError, '^source: .*main_kernel'),
    (b'', TypeError, '^source: expected a str, got bytes')])
def test_source_without_the_kernel(source, error, message):
    with pytest.raises(error, match=message):
        module.build_opencl(reverse(), source)


@needs_pocl
def test_a_driver_without_a_device(monkeypatch):
    import pyopencl

    def fails():
        raise pyopencl.LogicError('clGetDeviceIDs failed: DEVICE_NOT_FOUND')
    for found in (list, fails):
        monkeypatch.setattr(pyopencl, 'get_platforms', lambda found=found: [
            types.SimpleNamespace(name='Portable', get_devices=found)])
        with pytest.raises(RuntimeError, match=r'^platform: Portable has no '):
            module.build_opencl(reverse())


def test_a_driver_that_is_missing():
    pytest.importorskip('pyopencl')
    with pytest.raises(RuntimeError, match=r"^platform: no OpenCL driver is na"
                       "med like 'Voodoo'"):
        module.build_opencl(reverse(), platform='Voodoo')


def test_no_driver_at_all(monkeypatch):
    pyopencl = pytest.importorskip('pyopencl')

    def none():
        raise pyopencl.LogicError('clGetPlatformIDs failed')
    monkeypatch.setattr(pyopencl, 'get_platforms', none)
    with pytest.raises(RuntimeError, match=r'there are \[\]\. The packages '
                       'pocl-binary-distribution'):
        module.build_opencl(reverse())


def test_without_pyopencl(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyopencl', None)
    with pytest.raises(ModuleNotFoundError, match=r"^OpenCL needs the package "
                       r"'pyopencl', .* pip install \"\.\[opencl\]\""):
        module.build_opencl(reverse())


# Races

@needs_oclgrind
def test_a_missing_barrier_is_found_and_its_line_named():
    X = np.arange(256, dtype='float32').reshape(4, 64)
    Y = np.zeros_like(X)
    assert module.find_races(reverse(), X, Y) == []
    np.testing.assert_array_equal(Y, X[:, ::-1])
    source = module.opencl_source(reverse())
    wrong = source.replace('barrier(CLK_LOCAL_MEM_FENCE);', '')
    assert wrong != source
    reports = module.find_races(reverse(), X, Y, source=wrong)
    assert len(reports) >= 64
    assert all('data race' in report and 'a_ptr[' in report
               for report in reports)


@needs_oclgrind
def test_an_address_out_of_bounds_is_found():
    source = module.opencl_source(reverse())
    wrong = source.replace('Y_ptr[', 'Y_ptr[1 + ')
    assert wrong != source
    reports = module.find_races(reverse(), *np.ones((2, 4, 64), 'float32'),
                                source=wrong)
    assert any('Invalid write of size 4' in report for report in reports)


@needs_oclgrind
def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv('OCLGRIND_LOG', 'mine')
    monkeypatch.delenv('OCLGRIND_DATA_RACES', raising=False)
    before = dict(os.environ)
    module.find_races(reverse(), *np.ones((2, 4, 64), 'float32'))
    assert os.environ == before
    with pytest.raises(TypeError):
        module.find_races(reverse(), 1, 2)
    assert os.environ == before


@needs_oclgrind
def test_a_wrong_bound_is_found():
    sch = module.cuda_schedule((2, 3, 13, 13))
    X, *params = data((2, 3, 13, 13))
    text = sch.mod.script()
    assert 'r * 169 + 4 - 1' in text
    wrong = tvm.script.from_source(
        text.replace('r * 169 + 4 - 1', 'r * 169'))
    out = np.full_like(X, np.nan)
    module.find_races(wrong, X, *params, out)
    assert not bn_error(out, X, *params) < 1e-6


# The generated source

@pytest.mark.parametrize('dtype, vector, size', [
    ('float32', 'float4', 28), ('float16', 'uint4', 13),
    ('float32', 'float4', 57), later('float16', 'uint4', 28),
    later('float32', 'float4', 13), later('float16', 'uint4', 57)])
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


def test_an_architecture_stands_for_its_target():
    mod = module.cuda_schedule((1, 3, 4, 4)).mod
    assert module.cuda_source(mod, 'sm_90') == module.cuda_source(mod, TARGET)
    with pytest.raises(ValueError, match=r'^arch: expected'):
        module.cuda_source(mod, 'H100')


@pytest.mark.parametrize('program', [
    module.cuda_schedule((2, 3, 13, 13)).mod, reverse()])
def test_source_for_webgpu(program):
    source, (launch,) = module.wgsl_source(program), module.launch_plan(
        program, 'webgpu')
    bound = dict(re.findall(r'var<storage, (\w+)> (\w+)_ptr', source))
    assert len(re.findall('var<storage, ', source)) == len(launch.arguments)
    assert set(bound) == {'read', 'read_write'}
    assert f'@workgroup_size({launch.block[0]}, 1, 1)' in source
    assert f'fn {launch.kernel}(' in source and 'packGridDimX' in source


def test_source_that_tvm_cannot_write():
    with pytest.raises(ValueError, match=r'^mod: TVM writes no source for web'
                       r'gpu: .*only allows vector with lanes'):
        module.wgsl_source(module.cuda_schedule((1, 1, 4, 4), 'float16').mod)


@needs_nvcc
@pytest.mark.parametrize('arch', [later('sm_80'), 'sm_90'])
@pytest.mark.parametrize('dtype, size, edges', [
    ('float32', 24, 0), later('float32', 13, 2), later('float16', 24, 0),
    ('float16', 13, 2)])
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
    with pytest.raises(RuntimeError, match=r'error'):
        module.compile_ptx('extern "C" __global__ void f() { x }', TARGET)


@pytest.mark.parametrize('source', [None, b'', 7])
def test_source_that_is_no_text(source):
    with pytest.raises(TypeError, match=r'^source: expected a str, got '):
        module.compile_ptx(source)


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


# Occupancy

@settings(max_examples=examples(300))
@given(threads=st.integers(1, 1024), registers=st.integers(1, 255),
       shared=st.sampled_from([0, 1, 1000, 16384, 40000]),
       arch=st.sampled_from(['sm_75', 'sm_80', 'sm_90', 'sm_100']))
def test_property_occupancy_by_placing_one_block_after_the_other(
        threads, registers, shared, arch):
    warps, blocks, memory, taken, step = module.MULTIPROCESSORS[arch]
    free, held, resident = [2 ** 14] * 4, 0, 0
    warp = 256 * int(np.ceil(32 * registers / 256))
    while held < blocks:
        held += 1
        memory -= step * int(np.ceil((shared + taken) / step))
        for _ in range(0, threads, 32):
            free[int(np.argmax(free))] -= warp
            resident += 1
        if memory < 0 or min(free) < 0 or resident > warps:
            held -= 1
            break
    assert module.occupancy(threads, registers, shared, arch) == (
        held * int(np.ceil(threads / 32)) / warps)


@pytest.mark.parametrize('threads, registers, shared, arch, expected', [
    (128, 37, 0, 'sm_70', 12 * 4 / 64), (320, 37, 0, 'sm_70', 4 * 10 / 64),
    (1024, 32, 0, 'sm_90', 1), (1024, 65, 0, 'sm_90', 0),
    (32, 16, 0, 'sm_90', 0.5), (32, 16, 0, 'sm_75', 0.5),
    (256, 16, 227 * 1024, 'sm_90', 8 / 64),
    (256, 16, 228 * 1024, 'sm_90', 0), (256, 16, 64 * 1024, 'sm_75', 0.25)])
def test_occupancy(threads, registers, shared, arch, expected):
    assert module.occupancy(threads, registers, shared, arch) == expected


@pytest.mark.parametrize('name, value', [
    ('threads', 0), ('threads', 1025), ('threads', 32.5), ('registers', 0),
    ('registers', 256), ('shared', -1), ('arch', 'sm_20'), ('arch', 90)])
def test_occupancy_of_bad_arguments(name, value):
    given = {'threads': 32, 'registers': 32, name: value}
    with pytest.raises((TypeError, ValueError), match=f'^{name}: expected'):
        module.occupancy(**given)


STORED = json.loads(gpu_compiled.RESULTS.read_text())


@pytest.mark.parametrize('kind', [gpu_compiled.inference,
                                  gpu_compiled.training])
def test_stored_compilations_are_of_the_kernels_of_today(kind):
    stored = STORED[kind.__name__]
    for row, (facts, mod) in zip(stored, kind(), strict=True):
        assert row | facts == row
        assert row['source'] == gpu_compiled.digest(mod), (
            'run benchmarks/gpu_compiled.py')
        launch, = module.launch_plan(mod, 'cuda')
        assert row['threads'] == np.prod(launch.block)
        assert list(row['arch']) == list(gpu_compiled.ARCHS)
        for arch, made in row['arch'].items():
            assert made['shared'] == launch.shared
            assert made['occupancy'] == module.occupancy(
                row['threads'], made['registers'], made['shared'], arch)


@needs_nvcc
def test_registers_as_the_assembler_says(tmp_path):
    """`ptxas -v` is another way to ask than the script's."""
    import subprocess
    row = STORED['inference'][0]
    mod = module.cuda_schedule(row['shape'], row['dtype']).mod
    path = tmp_path / 'kernel.cu'
    path.write_text(module.cuda_source(mod, 'sm_90'))
    said = subprocess.run(
        ['nvcc', '-cubin', '-arch=sm_90', '-Xptxas=-v', '-o',
         tmp_path / 'kernel.cubin', path], capture_output=True, text=True,
        check=True)
    version = subprocess.run(['nvcc', '--version'], capture_output=True,
                             text=True, check=True).stdout
    if f'V{STORED["nvcc"]}' not in version:
        pytest.skip('another version of nvcc than the stored one')
    used, = re.findall(r'Used (\d+) registers', said.stderr + said.stdout)
    assert int(used) == row['arch']['sm_90']['registers']


def test_what_the_script_reads():
    assert gpu_compiled.resources(
        'Fatbin elf code:\n Function main_kernel:\n  REG:28 STACK:8 SHARED:16'
        ' LOCAL:4 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0') == {
            'registers': 28, 'shared': 16, 'spilled': 12}
    assert gpu_compiled.accesses(
        'LDG.E.CONSTANT R2, desc[UR4][R2.64] ;\n@!P0 LDG.E.128.CONSTANT R4\n'
        'STG.E.128 desc[UR4]\nSTG.E desc\nSTS R4\nLDC R1') == {
            'LDG': [1, 2], 'STG': [1, 2]}


def test_the_script_finds_tools_and_fails_without(tmp_path):
    with pytest.raises(ValueError):
        gpu_compiled.find(tmp_path, 'nvcc')
    tool = Path(tmp_path, 'nvidia/cu13/bin/nvcc')
    tool.parent.mkdir(parents=True)
    tool.write_text('')
    assert gpu_compiled.find(tmp_path, 'nvcc') == tool.resolve()
    assert os.access(tool, os.X_OK)


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
    with pytest.raises(ValueError, match=r'target: expected a Target of kind'):
        module.cuda_kernel((1, 3, 4, 4), target)
    sch = module.cuda_schedule((1, 3, 4, 4))
    with pytest.raises(ValueError, match=r'target: expected a Target of kind'):
        module.cuda_source(sch.mod, target)
    with pytest.raises(ValueError, match=r'target: expected a Target of kind'):
        module.compile_ptx('', target)


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
    with pytest.raises(ValueError, match=r'expected cuda'):
        bn(X, *params, X)


# The measurement, with the processor in the place of the GPU

@pytest.fixture
def pretend(monkeypatch):
    class Cpu:
        exist, device_name, device = True, 'pretended', tvm.cpu()

        def sync(self):
            self.device.sync()

    def build(shape, target, dtype, eps):
        program = module.build_opencl(
            module.cuda_schedule(shape, dtype, eps).mod)

        def bn(*tensors):
            arrays = [tensor.numpy() for tensor in tensors]
            program(*arrays)
            tensors[-1].copyfrom(arrays[-1])
        return bn

    tensor = tvm.runtime.tensor
    monkeypatch.setattr(module.tvm, 'cuda', lambda index: Cpu())
    monkeypatch.setattr(module.tvm.runtime, 'tensor',
                        lambda array, device: tensor(array))
    monkeypatch.setattr(module, 'cuda_kernel', build)


@needs_pocl
@pytest.mark.parametrize('dtype', [later('float32'), 'float16'])
def test_bench_gpu(pretend, dtype):
    result = module.bench_gpu((2, 3, 13, 13), dtype, fresh=2 ** 16)
    assert result == json.loads(json.dumps(result))
    assert result['device'] == 'pretended'
    moved = 2 * 6 * 169 * np.dtype(dtype).itemsize
    assert result['bytes'] == moved
    assert (result['pairs'] - 1) * moved < 2 ** 16 <= result['pairs'] * moved
    assert result['error'] < BOUND[dtype]
    assert {'TVM', 'copy'} <= set(result['seconds'])
    assert all(0 < t < 1 for t in result['seconds'].values())
    assert result['versions']['TVM'] == tvm.__version__


def test_bench_gpu_refuses_a_wrong_kernel(pretend, monkeypatch):
    monkeypatch.setattr(module, 'cuda_kernel',
                        lambda *args: lambda *tensors: None)
    with pytest.raises(RuntimeError, match=r'^the kernel is wrong'):
        module.bench_gpu((2, 3, 13, 13), fresh=1)


def test_a_gpu_without_memory(pretend, monkeypatch):
    def fails(message):
        def tensor(array, device):
            raise tvm.error.InternalError(message)
        monkeypatch.setattr(module.tvm.runtime, 'tensor', tensor)
    fails('CUDA: out of memory')
    with pytest.raises(MemoryError, match=r'^pretended has no memory for '
                       f'{2 * 2 * 4 * 3 * 16} bytes'):
        module.bench_gpu((1, 3, 4, 4), fresh=1)
    fails('something else')
    with pytest.raises(tvm.error.InternalError, match=r'something else'):
        module.bench_gpu((1, 3, 4, 4), fresh=1)


@needs_pocl
def test_a_gpu_without_memory_for_the_others(pretend, monkeypatch):
    def fails(*arguments):
        raise RuntimeError('CUDA out of memory. Tried to allocate 1 GiB')
    monkeypatch.setattr(module, '_peers', fails)
    with pytest.raises(MemoryError, match=r'^pretended has no memory for'):
        module.bench_gpu((1, 3, 4, 4), fresh=1)


def test_bench_gpu_checks_what_is_fresh():
    with pytest.raises(ValueError, match=r'^fresh: expected'):
        module.bench_gpu((1, 3, 4, 4), fresh=0)


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
    assert module._peers(2, X, *params, 1e-5) == {}


@pytest.mark.skipif(NO_GPU, reason='no GPU that TVM can use')
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('shape', [(2, 3, 28, 28), (2, 3, 13, 13),
                                   (3, 5, 1, 1), (1, 2, 301, 299)])
def test_on_a_gpu(shape, dtype):
    result = module.bench_gpu(shape, dtype)
    assert result['error'] < 2 * BOUND[dtype]
