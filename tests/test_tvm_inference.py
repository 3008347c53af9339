"""The compiled inference operator: numbers, awkward arrays, bad arguments."""
import inspect
import math
import platform
import signal
import subprocess
import sys

import d2ltvm
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te

from d2ltvm import tvm_inference as module
from d2ltvm.mxnet_today import mx
from soak import examples

BOUND = 1e-6  # six float32 roundings are at most 3.6e-7


def test_the_references_refuse_other_shapes():
    X, *params, _ = module.get_bn_data(3, 4)
    for i in range(4):
        wrong = [p.reshape(3) if i == j else p for j, p in enumerate(params)]
        with pytest.raises(ValueError, match=r'must have shape \(c, 1, 1\)'):
            module.batch_norm_float64(X, *wrong)
    with pytest.raises(ValueError, match='Y must have shape'):
        module.bn_error(X[None], X, *params)


def build(c, n, eps=1e-5):
    func = te.create_prim_func(module.batch_norm(c, n, eps))
    return tvm.compile(func, target='llvm')['main']


@pytest.fixture(scope='module')
def func():
    return build(3, 5)


@pytest.fixture
def arrays():
    return list(module.get_bn_data(3, 5)[:5])


# The definition

def test_the_names_are_also_at_the_top():
    for name in ('batch_norm', 'get_bn_data', 'get_bn_data_mxnet',
                 'batch_norm_mxnet', 'run_bn'):
        assert getattr(d2ltvm, name) is getattr(module, name)


def test_batch_norm_shapes():
    tensors = module.batch_norm(np.int32(3), np.uint8(5))
    shapes = [tuple(int(length) for length in t.shape) for t in tensors]
    assert shapes == [(3, 5, 5), *4 * [(3, 1, 1)], (3, 5, 5)]
    assert [t.op.name for t in tensors[:5]] == ['X', 'Mean', 'Var', 'Gamma',
                                                'Beta']


@pytest.mark.parametrize('function', [module.batch_norm, module.get_bn_data,
                                      module.get_bn_data_mxnet])
@pytest.mark.parametrize('name', ['c', 'n'])
@pytest.mark.parametrize('value, error', [
    (0, ValueError), (-3, ValueError), (2.0, TypeError), ('2', TypeError),
    (None, TypeError), (True, TypeError), (np.bool_(1), TypeError),
    (np.float64(2), TypeError), (np.array([2]), TypeError),
    (2 ** 31, ValueError), (10 ** 30, ValueError)])
def test_bad_sizes(function, name, value, error):
    with pytest.raises(error, match=rf'^({name}|c, n): expected'):
        function(**{'c': 2, 'n': 2, name: value})


def test_sizes_that_together_are_too_large():
    with pytest.raises(ValueError, match=r'c = 1, n = 46341'):
        module.batch_norm(np.int32(1), np.int32(46341))
    module.batch_norm(1, 46340)


BAD_EPS = [(0, ValueError), (-1e-5, ValueError), (math.nan, ValueError),
           (math.inf, ValueError), (1e-46, ValueError), (1e39, ValueError),
           (True, TypeError), ('1e-5', TypeError), (None, TypeError),
           (1j, TypeError), (np.array([1e-5]), TypeError),
           (np.float16(0), ValueError), (np.float32('inf'), ValueError)]


@pytest.mark.parametrize('eps, error', BAD_EPS)
def test_bad_eps(eps, error):
    with pytest.raises(error, match=r'^eps: expected'):
        module.batch_norm(2, 2, eps)
    with pytest.raises(error, match=r'^eps: expected'):
        module.batch_norm_mxnet(*module.get_bn_data_mxnet(2, 2), eps=eps)


# The reference

def test_float64_reference_against_loops(arrays):
    X, mean, var, gamma, beta = (array.tolist() for array in arrays)
    looped = [[[(x - mean[i][0][0]) / math.sqrt(var[i][0][0] + 1e-3)
                * gamma[i][0][0] + beta[i][0][0] for x in row]
               for row in X[i]] for i in range(3)]
    Y = module.batch_norm_float64(*arrays, eps=1e-3)
    assert Y.dtype == np.float64
    np.testing.assert_allclose(Y, looped, rtol=1e-12, atol=1e-15)


def test_bn_error(arrays):
    exact = module.batch_norm_float64(*arrays)
    assert module.bn_error(exact, *arrays) == 0
    assert 0 < module.bn_error(exact.astype('float32'), *arrays) < 2 ** -24
    terms = (abs(arrays[3]) * (abs(arrays[0]) + abs(arrays[1]))
             / np.sqrt(arrays[2] + 1e-5) + abs(arrays[4]))
    off = exact.copy()
    off[2, 4, 0] += 0.01 * terms[2, 4, 0]
    assert module.bn_error(off, *arrays) == pytest.approx(0.01, rel=1e-5)
    off[2, 4, 0] = math.nan
    assert not module.bn_error(off, *arrays) < BOUND
    assert module.bn_error(exact, *arrays, eps=1e-2) > BOUND


def test_bn_error_where_all_terms_are_zero():
    zeros = np.zeros((1, 2, 2)), *4 * [np.zeros((1, 1, 1))]
    assert module.bn_error(np.zeros((1, 2, 2)), *zeros) == 0
    assert module.bn_error(np.full((1, 2, 2), 1e-30), *zeros) > 1


# The data

@pytest.mark.parametrize('c, n', [(32, 28), (1, 1), (3, 5)])
def test_data_are_those_of_the_book(c, n):
    legacy = np.random
    state = legacy.get_state()
    try:
        legacy.seed(0)
        data = legacy.normal(size=(c, n, n)).astype('float32')
        mean = legacy.normal(size=(c, 1, 1)).astype('float32')
        var = legacy.normal(loc=1.0, size=(c, 1, 1)).astype('float32')
        gamma = legacy.normal(size=(c, 1, 1)).astype('float32')
        beta = legacy.normal(size=(c, 1, 1)).astype('float32')
    finally:
        legacy.set_state(state)
    ours = module.get_bn_data(c, n)
    expected = data, mean, np.absolute(var), gamma, beta
    for mine, theirs in zip(ours[:5], expected, strict=True):
        assert mine.dtype == np.float32 and mine.shape == theirs.shape
        assert mine.tobytes() == theirs.tobytes()
    assert ours[5].shape == (c, n, n) and ours[5].dtype == np.float32


def test_data_leave_the_global_state_alone():
    legacy = np.random
    state = legacy.get_state()
    try:
        legacy.seed(7)
        expected = legacy.normal(size=3)
        legacy.seed(7)
        first = module.get_bn_data(2, 3)
        assert (legacy.normal(size=3) == expected).all()
    finally:
        legacy.set_state(state)
    second = module.get_bn_data(2, 3)
    for a, b in zip(first, second, strict=True):
        assert not np.shares_memory(a, b)
    assert (first[0] == second[0]).all()


def test_constructor_is_applied_to_each_array():
    seen = []
    result = module.get_bn_data(2, 3, lambda a: seen.append(a) or len(seen))
    assert result == (1, 2, 3, 4, 5, 6)
    assert [a.shape for a in seen] == [(2, 3, 3), *4 * [(2, 1, 1)], (2, 3, 3)]
    *inputs, out = module.get_bn_data(2, 3, tvm.runtime.tensor)
    build(2, 3)(*inputs, out)  # `out` of the constructor is written to
    assert module.bn_error(out.numpy(), *module.get_bn_data(2, 3)[:5]) < BOUND


def test_constructor_must_be_callable():
    with pytest.raises(TypeError, match=r'^constructor must be callable'):
        module.get_bn_data(2, 3, 'float32')


# The compiled operator

@pytest.mark.parametrize('c, n, eps', [
    (32, 28, 1e-5), (1, 1, 1e-5), (1, 7, 1e-3), (5, 1, np.float32(0.5)),
    (3, 13, 1)])
def test_operator_against_float64(c, n, eps):
    *arrays, _ = module.get_bn_data(c, n)
    Y = module.run_bn(build(c, n, eps), *arrays)
    assert Y.shape == (c, n, n) and Y.dtype == np.float32
    assert module.bn_error(Y, *arrays, eps=eps) < BOUND


def test_large_mean(func, arrays):
    arrays[0] += 1000
    arrays[1] += 1000
    Y = module.run_bn(func, *arrays)
    # X - mean is exact here: the result is as good as for small means
    exact = module.batch_norm_float64(*arrays)
    np.testing.assert_allclose(Y, exact, rtol=0, atol=1e-6 * abs(exact).max())


def test_zero_variance(func, arrays):
    arrays[2][:] = [[[0]], [[-0.0]], [[1e-12]]]
    Y = module.run_bn(func, *arrays)
    assert np.isfinite(Y).all()
    assert module.bn_error(Y, *arrays) < BOUND
    arrays[0][:] = arrays[1]
    expected = np.broadcast_to(arrays[4], Y.shape)
    np.testing.assert_array_equal(module.run_bn(func, *arrays), expected)


@pytest.mark.parametrize('place', range(5))
def test_nan_reaches_what_depends_on_it(func, arrays, place):
    arrays[place][1, 0, 0] = math.nan
    Y = module.run_bn(func, *arrays)
    expected = np.zeros(Y.shape, bool)
    expected[(1, 0, 0) if place == 0 else 1] = True
    np.testing.assert_array_equal(np.isnan(Y), expected)


def misaligned(array):
    """A copy that starts 4 bytes after a multiple of 64."""
    memory = np.empty(array.nbytes + 128, 'uint8')
    start = -memory.ctypes.data % 64 + 4
    copy = memory[start:start + array.nbytes].view(array.dtype)
    copy = copy.reshape(array.shape)
    copy[...] = array
    assert copy.ctypes.data % 64 == 4
    return copy


def locked(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize('change', [
    misaligned, locked, np.asfortranarray,
    lambda a: a[::-1].copy()[::-1],  # negative strides
    lambda a: np.repeat(a, 2, axis=0)[::2],  # gaps
    lambda a: np.broadcast_to(a, a.shape)])
def test_any_layout_gives_the_same_bits(func, arrays, change):
    expected = module.run_bn(func, *arrays)
    changed = [change(array) for array in arrays]
    before = [array.copy() for array in changed]
    np.testing.assert_array_equal(module.run_bn(func, *changed), expected)
    for array, old in zip(changed, before, strict=True):
        np.testing.assert_array_equal(array, old)


NAMES = ['X', 'mean', 'var', 'gamma', 'beta']


@pytest.mark.parametrize('place', range(5))
@pytest.mark.parametrize('change', [
    lambda a: a.tolist(), lambda a: None, np.ma.array,
    lambda a: a.astype('float64'), lambda a: a.astype('float16'),
    lambda a: a.astype('>f4'), lambda a: a.astype('int32'),
    tvm.runtime.tensor])
def test_bad_types(func, arrays, place, change):
    arrays[place] = change(arrays[place])
    with pytest.raises(TypeError, match=f'^{NAMES[place]}: expected a NumPy'):
        module.run_bn(func, *arrays)


@pytest.mark.parametrize('place', range(5))
@pytest.mark.parametrize('change', [
    lambda a: a.ravel(), lambda a: a[None], lambda a: a[:, :, 0],
    lambda a: np.array(a[0, 0, 0])])
def test_bad_shapes(func, arrays, place, change):
    arrays[place] = change(arrays[place])
    with pytest.raises(ValueError, match=f'^{NAMES[place]}: expected shape'):
        module.run_bn(func, *arrays)


@pytest.mark.parametrize('name, change', [
    ('mean', lambda a: a[:2]), ('beta', lambda a: np.concatenate([a, a])),
    ('var', lambda a: a.reshape(1, 3, 1)), ('gamma', lambda a: a[:0])])
def test_parameters_must_fit_the_channels(func, arrays, name, change):
    place = NAMES.index(name)
    arrays[place] = change(arrays[place])
    with pytest.raises(ValueError, match=rf'^{name}: .*\(3, 1, 1\), got'):
        module.run_bn(func, *arrays)


@pytest.mark.parametrize('c, part', [
    (3, np.s_[:, :4, :4]), (3, np.s_[:, :, :4]), (2, np.s_[:2]),
    (0, np.s_[:0])])
def test_arrays_that_do_not_fit_the_function(func, arrays, c, part):
    X = arrays[0][part]
    with pytest.raises(ValueError, match=r'^X with shape .* does not fit'):
        module.run_bn(func, X, *(array[:c] for array in arrays[1:]))


@pytest.mark.parametrize('other', [0.0, math.nan])
def test_negative_variance(func, arrays, other):
    arrays[2][:, 0, 0] = [other, -1e-30, 1]
    with pytest.raises(ValueError, match=r'^var: expected no negative'):
        module.run_bn(func, *arrays)


def test_func_must_be_callable(arrays):
    with pytest.raises(TypeError, match=r'^func must be callable'):
        module.run_bn('main', *arrays)


def test_misaligned_arrays_survive_run_bn():
    """And end the process without it, which is why it copies."""
    code = f'''
import sys
import numpy as np
import tvm
from d2ltvm.tvm_inference import batch_norm, bn_error, get_bn_data, run_bn

{inspect.getsource(misaligned)}
bn = tvm.compile(tvm.te.create_prim_func(batch_norm(32, 28)),
                 target='llvm')['main']
arrays = get_bn_data(32, 28)
*X, out = map(misaligned, arrays)
assert bn_error(run_bn(bn, *X), *arrays[:5]) < 1e-6
assert 'mxnet' not in sys.modules  # loaded by its own functions only
print('done', flush=True)
bn(*X, out)
'''
    result = subprocess.run([sys.executable, '-c', code], text=True,
                            capture_output=True)
    assert result.stdout == 'done\n'
    if platform.machine() == 'x86_64':  # others may load unaligned vectors
        # If this fails, TVM has learnt to check addresses
        assert result.returncode == -signal.SIGSEGV


# MXNet

@pytest.mark.parametrize('c, n', [(32, 28), (1, 1), (3, 5)])
def test_mxnet_against_float64_and_tvm(c, n):
    *inputs, out = module.get_bn_data_mxnet(c, n)
    *arrays, _ = module.get_bn_data(c, n)
    assert inputs[0].shape == out.shape == (1, c, n, n)
    for theirs, ours in zip(inputs, arrays, strict=True):
        assert theirs.dtype == np.float32
        assert theirs.asnumpy().tobytes() == ours.tobytes()
    assert module.batch_norm_mxnet(*inputs, out) is None
    for theirs, ours in zip(inputs, arrays, strict=True):
        assert theirs.asnumpy().tobytes() == ours.tobytes()  # unchanged
    Y = out[0].asnumpy()
    assert module.bn_error(Y, *arrays) < BOUND
    np.testing.assert_allclose(Y, module.run_bn(build(c, n), *arrays),
                               rtol=1e-6, atol=1e-6 * abs(Y).max())


def test_mxnet_batch_that_is_not_square():
    X = np.random.default_rng(0).normal(size=(4, 3, 2, 7)).astype('float32')
    params = module.get_bn_data(3, 1)[1:5]
    params[1][0] = 0
    data, *others = map(mx.nd.array, (X, *params))
    module.batch_norm_mxnet(data, *others, data, eps=1e-3)  # in place
    assert module.bn_error(data.asnumpy(), X, *params, eps=1e-3) < BOUND


def test_mxnet_uses_the_given_statistics_in_training_mode_too():
    *inputs, out = module.get_bn_data_mxnet(3, 5)
    with mx.autograd.train_mode():
        module.batch_norm_mxnet(*inputs, out)
    *arrays, _ = module.get_bn_data(3, 5)
    assert module.bn_error(out[0].asnumpy(), *arrays) < BOUND


NAMES_MXNET = ['data', 'mean', 'var', 'gamma', 'beta', 'out']


@pytest.mark.parametrize('place', range(6))
@pytest.mark.parametrize('change, error', [
    (lambda a: a.asnumpy(), TypeError),
    (lambda a: a.astype('float64'), TypeError),
    (lambda a: a.astype('float16'), TypeError),
    (lambda a: a.reshape(-1), ValueError),
    (lambda a: a.expand_dims(0), ValueError)])
def test_mxnet_bad_arrays(place, change, error):
    arrays = list(module.get_bn_data_mxnet(3, 5))
    arrays[place] = change(arrays[place])
    with pytest.raises(error, match=f'^{NAMES_MXNET[place]}: expected'):
        module.batch_norm_mxnet(*arrays)


@pytest.mark.parametrize('place', range(1, 6))
def test_mxnet_arrays_that_are_too_short(place):
    arrays = list(module.get_bn_data_mxnet(3, 5))
    arrays[place] = (arrays[place][:2] if place < 5
                     else arrays[place][:, :, :4])
    with pytest.raises(ValueError, match=f'^{NAMES_MXNET[place]}: expected'):
        module.batch_norm_mxnet(*arrays)


@pytest.mark.parametrize('other', [0.0, math.nan])
def test_mxnet_negative_variance_writes_nothing(other):
    *inputs, out = module.get_bn_data_mxnet(3, 5)
    inputs[2][:] = mx.nd.array([other, -1e-30, 1]).reshape((3, 1, 1))
    out[:] = 7
    with pytest.raises(ValueError, match=r'^var: expected no negative'):
        module.batch_norm_mxnet(*inputs, out)
    assert (out.asnumpy() == 7).all()


@pytest.mark.parametrize('ctx', ['tpu', '', None, 'Context', mx.cpu()])
def test_bad_ctx(ctx):
    with pytest.raises(ValueError, match=r'^ctx: expected'):
        module.get_bn_data_mxnet(2, 2, ctx)


@pytest.mark.skipif(mx.context.num_gpus() > 0, reason='there is a GPU')
def test_ctx_without_gpu():
    with pytest.raises(ValueError, match=r'^ctx is .gpu., but'):
        module.get_bn_data_mxnet(2, 2, 'gpu')


def test_missing_mxnet_is_named(request):
    arrays = module.get_bn_data_mxnet(2, 2)
    request.getfixturevalue('without_mxnet')
    with pytest.raises(ImportError, match=r'batch_norm_mxnet needs .*mxnet'):
        module.batch_norm_mxnet(*arrays)
    with pytest.raises(ImportError, match=r'get_bn_data_mxnet needs .*mxnet'):
        module.get_bn_data_mxnet(2, 2)


# Random sizes, offsets and scales

@settings(max_examples=examples(15))  # each compiles
@given(c=st.integers(1, 9), n=st.integers(1, 9),
       seed=st.integers(0, 2 ** 32), offset=st.sampled_from([0, 1000]),
       scale=st.sampled_from([1e-15, 1e-3, 1, 1e3, 1e15]),
       eps=st.sampled_from([1e-12, 1e-5, 1.0]))
def test_property_tvm_and_mxnet_against_float64(
        semantics, c, n, seed, offset, scale, eps):
    rng = np.random.default_rng(seed)
    X = scale * (offset + rng.normal(size=(c, n, n)))
    params = [p.reshape(c, 1, 1) for p in (
        scale * (offset + rng.normal(size=c)),
        scale ** 2 * rng.chisquare(3, c), *rng.normal(size=(2, c)))]
    arrays = [a.astype('float32') for a in (X, *params)]
    Y = module.run_bn(build(c, n, eps), *arrays)
    assert module.bn_error(Y, *arrays, eps=eps) < BOUND
    data, *others = map(mx.nd.array, (arrays[0][None], *arrays[1:]))
    out = mx.nd.empty((1, c, n, n))
    if eps > 1e-11:  # its operator may refuse smaller ones
        module.batch_norm_mxnet(data, *others, out, eps=eps)
        assert module.bn_error(out[0].asnumpy(), *arrays, eps=eps) < BOUND


@given(c=st.integers(1, 9), n=st.integers(1, 9))
def test_property_data_in_both_forms(semantics, c, n):
    ours, theirs = module.get_bn_data(c, n), module.get_bn_data_mxnet(c, n)
    for a, b in zip(ours[:5], theirs[:5], strict=True):
        np.testing.assert_array_equal(np.broadcast_to(a, b.shape),
                                      b.asnumpy())
    assert [a.shape for a in ours] == [
        (c, n, n), *4 * [(c, 1, 1)], (c, n, n)]
