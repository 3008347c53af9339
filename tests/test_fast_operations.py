"""The layer in fast operations: the values of the plain one, and the timer."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from test_from_scratch import (SHAPES, activations, draw, per_channel,
                               reference)

from d2ltvm import fast_operations as fo
from d2ltvm import from_scratch as fs
from d2ltvm.mxnet_today import autograd, nd

# Every test runs in both semantics of MXNet
pytestmark = pytest.mark.usefixtures('semantics')


def gradients(layer, arrays, weight):
    arrays = [nd.array(a, dtype=a.dtype) for a in arrays]
    for a in arrays:
        a.attach_grad()
    with autograd.record():
        Y = layer(*arrays)
    Y.backward(nd.array(weight, dtype=weight.dtype))
    return [Y.asnumpy(), *(a.grad.asnumpy() for a in arrays)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-4),
                                                  ('float64', 1e-11)])
def test_output_and_gradients_are_those_of_the_plain_layer(shape, dtype,
                                                           tolerance):
    arrays = draw(shape, offset=3, dtype=dtype)
    weight = np.random.default_rng(1).normal(size=shape).astype(dtype)
    ours, plain = (gradients(layer, arrays, weight) for layer in (
        lambda *a: fo.fast_batch_norm(*a)[0], fs.pure_batch_norm))
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == np.dtype(dtype)
        assert_allclose(a, b, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize('value', [7.1, 100, 1000.1, 1e30])
@pytest.mark.parametrize('shape', [(4, 2), (1, 2, 3, 3), (64, 2, 26, 26)])
def test_constant_channel_gives_exactly_beta(shape, value):
    beta, X = nd.array([0, 1.5]), nd.full(shape, value)
    Y, mean, var = fo.fast_batch_norm(X, nd.full(2, 3), beta)
    expected = np.broadcast_to(per_channel(X, beta.asnumpy()), shape)
    assert_array_equal(Y.asnumpy(), expected)
    assert_array_equal(mean.asnumpy(), np.full(2, value, 'float32'))
    assert_array_equal(var.asnumpy(), np.zeros(2))
    Y = fo.apply_statistics(X, mean, var, nd.full(2, 3), beta, 1e-5)
    assert_array_equal(Y.asnumpy(), expected)


def test_near_a_thousand():
    X = (1000 + 1e-3 * np.arange(16.)[:, None]).astype('float32')
    expected = reference(X, [1], [0])[0]
    Y = fo.fast_batch_norm(nd.array(X), nd.ones(1), nd.zeros(1))[0]
    assert_allclose(Y.asnumpy(), expected, atol=1e-6)
    with autograd.train_mode():
        operator = nd.BatchNorm(nd.array(X), nd.ones(1), nd.zeros(1),
                                nd.zeros(1), nd.ones(1), eps=1e-5)
    assert abs(operator.asnumpy() - expected).max() > 1e-3


def test_nan_stays_in_its_channel():
    X, gamma, beta = draw((4, 2, 3, 3))
    X[0, 0, 0, 0] = np.nan
    Y = fo.fast_batch_norm(*map(nd.array, (X, gamma, beta)))[0].asnumpy()
    assert np.isnan(Y[:, 0]).all() and np.isfinite(Y[:, 1]).all()


@pytest.mark.parametrize(('error', 'name', 'change'), [
    (ValueError, 'X', {'X': nd.zeros((2, 3, 4))}),
    (TypeError, 'X', {'X': np.ones((2, 3))}),
    (ValueError, 'gamma', {'gamma': nd.ones(4)}),
    (TypeError, 'beta', {'beta': nd.zeros(3, dtype='float64')}),
    (ValueError, 'eps', {'eps': 0})])
def test_bad_arguments_are_named(error, name, change):
    good = {'X': nd.ones((2, 3)), 'gamma': nd.ones(3), 'beta': nd.zeros(3)}
    with pytest.raises(error, match=f'^{name}: expected'):
        fo.fast_batch_norm(**good | change)


@given(activations())
def test_property_shifted_statistics(semantics, arrays):
    X = arrays[0]
    shifted, first, mean, var = (
        a.asnumpy() for a in fo.shifted_statistics(
            nd.array(X, dtype=X.dtype)))
    wide = X.astype('float64')
    axes, unit = (0, *range(2, X.ndim)), np.finfo(X.dtype).eps
    assert_array_equal(first, X[(0, slice(None), *[0] * (X.ndim - 2))])
    exact = wide - per_channel(X, first)
    assert (abs(shifted - exact) <= unit * abs(exact)).all()
    largest = abs(exact).max(axes)
    off = 16 * unit * largest
    assert (abs(mean - exact.mean(axes)) <= off).all()
    wide_var = wide.var(axes)
    assert (abs(var - wide_var) <= 16 * unit * wide_var + off ** 2
            + 2 * off * np.sqrt(wide_var)).all()


@given(activations())
def test_property_channel_mean(semantics, arrays):
    X = arrays[0]
    found = fo.channel_mean(nd.array(X, dtype=X.dtype)).asnumpy()
    axes, wide = (0, *range(2, X.ndim)), X.astype('float64')
    assert (abs(found - wide.mean(axes))
            <= 16 * np.finfo(X.dtype).eps * abs(wide).max(axes)).all()


@given(activations())
def test_property_scale_shift(semantics, arrays):
    X, scale, shift = (nd.array(a, dtype=a.dtype) for a in arrays)
    wide = [a.astype('float64') for a in arrays]
    terms = abs(wide[0] * per_channel(X, wide[1])), abs(
        per_channel(X, wide[2]))
    expected = (wide[0] * per_channel(X, wide[1])
                + per_channel(X, wide[2]))
    error = abs(fo.scale_shift(X, scale, shift).asnumpy() - expected)
    assert (error <= 2 * np.finfo(X.dtype).eps * sum(terms)).all()


@given(activations(), st.integers(0, 99))
def test_property_apply_statistics(semantics, arrays, seed):
    X, gamma, beta = arrays
    rng = np.random.default_rng(seed)
    mean, var = X.mean((0, *range(2, X.ndim))), rng.uniform(1, 2, len(gamma))
    mean, var = mean.astype(X.dtype), var.astype(X.dtype)
    Y = fo.apply_statistics(*(nd.array(a, dtype=X.dtype) for a in (
        X, mean, var, gamma, beta)), 1e-5).asnumpy()
    wide = X.astype('float64') - per_channel(X, mean)
    factor = per_channel(X, gamma / np.sqrt(var.astype('float64') + 1e-5))
    expected = factor * wide + per_channel(X, beta)
    terms = abs(factor * wide) + abs(per_channel(X, beta))
    assert (abs(Y - expected) <= 8 * np.finfo(X.dtype).eps * terms).all()


def test_alternating_times():
    calls = []
    times = fo.median_times({'a': lambda: calls.append('a'),
                             'b': lambda: calls.append('b')},
                            rounds=2, repeats=2, warm=0)
    assert ''.join(calls) == 'ab' + 'aabb' * 2
    fo.median_times({'a': lambda: calls.append('a')}, 1, 1, warm=1e-3)
    assert len(calls) > 2 + 8 + 2
    assert all(0 <= low <= median <= high
               for low, median, high in times.values())


def test_old_places_for_one_more_version():
    assert fs.median_times is fo.median_times
    assert fs.apply_statistics is fo.apply_statistics
