"""Batch normalization in NumPy, its gradients, its family, its statistics.

References are written anew in plain loops with `math.fsum`, in float64.
Tolerances: the functions compute in float64 and round once, so float32
results carry half a unit of the last place (6e-8, relative), and float64
results a few units (1e-16) of the largest numbers involved.
"""
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import theory

DTYPES = ('float32', 'float64')
ROUNDING = {'float32': 2e-7, 'float64': 1e-14}
size = st.integers(1, 6)
shapes = st.one_of(st.tuples(size, size), st.tuples(size, size, size, size))
seeds = st.integers(0, 2 ** 32 - 1)
offsets = st.sampled_from((0, 1, -1000, 5000))


def draw(shape, dtype, seed, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    C = shape[1]
    return [a.astype(dtype) for a in (
        scale * rng.normal(offset, 1, shape), rng.normal(1, 0.5, C),
        rng.normal(0, 1, C))]


def sets_of(X, kind, groups=None):
    """Boolean masks of the values that share their statistics."""
    N, C = X.shape[:2]
    examples = [slice(None)] if kind == 'batch' else [[n] for n in range(N)]
    width = {'batch': 1, 'instance': 1}.get(kind, C // (groups or 1))
    for example in examples:
        for first in range(0, C, width):
            mask = np.zeros(X.shape, bool)
            mask[example, first:first + width] = True
            yield mask


def reference(X, kind='batch', gamma=None, beta=None, groups=None, eps=1e-5):
    """Normalization by loops; also the means and variances of the sets."""
    Y, means, variances = np.empty(X.shape), [], []
    for mask in sets_of(X, kind, groups):
        values = X[mask].astype('float64')
        first = values[0] if kind != 'rms' else 0.0  # an exact shift
        mean = math.fsum(values - first) / len(values)
        mean *= kind != 'rms'
        rest = values - first - mean
        var = math.fsum(rest ** 2) / len(values)
        Y[mask] = rest / math.sqrt(var + eps)
        means.append(first + mean)
        variances.append(var)
    for c in range(X.shape[1]):
        Y[:, c] *= 1 if gamma is None else float(gamma[c])
        Y[:, c] += 0 if beta is None else float(beta[c])
    return Y, np.array(means), np.array(variances)


def numeric(f, X, step=1e-4):
    """Central differences of fourth order."""
    gradient = np.empty_like(X)
    for i in np.ndindex(X.shape):
        values = []
        for k in (-2, -1, 1, 2):
            moved = X.copy()
            moved[i] += k * step
            values.append(f(moved))
        a, b, c, d = values
        gradient[i] = (a - 8 * b + 8 * c - d) / (12 * step)
    return gradient


# --- statistics and forward pass ---------------------------------------------


@given(shapes, st.sampled_from(DTYPES), seeds, offsets,
       st.sampled_from((1e-30, 1e-3, 1.0, 1e30)))
def test_forward(shape, dtype, seed, offset, scale):
    X, gamma, beta = draw(shape, dtype, seed, offset, scale)
    Y, _ = theory.batch_norm_forward(X, gamma, beta)
    assert Y.dtype == X.dtype and Y.shape == X.shape
    expected, *_ = reference(X, 'batch', gamma, beta)
    # the offset costs nothing: differences of near numbers are exact
    assert_allclose(Y, expected, rtol=0,
                    atol=(1 + abs(expected).max()) * ROUNDING[dtype])


@given(shapes, st.sampled_from(DTYPES), seeds, offsets,
       st.sampled_from((1e-18, 1.0, 1e18)))
def test_centre(shape, dtype, seed, offset, scale):
    X, *_ = draw(shape, dtype, seed, offset, scale)
    axes = (0, *range(2, X.ndim))
    kept = X.copy()
    centred, mean, var = theory.centre(X, axes)
    assert_array_equal(X, kept)
    assert centred.dtype == mean.dtype == var.dtype == np.float64
    assert mean.shape == var.shape == tuple(
        1 if i in axes else n for i, n in enumerate(shape))
    _, means, variances = reference(X)
    assert_allclose(mean.ravel(), means, rtol=1e-14,
                    atol=1e-14 * scale)
    assert_allclose(var.ravel(), variances, rtol=1e-11,
                    atol=1e-30 * scale ** 2 * (1 + offset ** 2))
    assert_allclose(centred + mean, X, rtol=1e-14,
                    atol=1e-14 * scale)


def test_the_short_form_would_be_noticed():
    X, gamma, beta = draw((64, 3, 8, 8), 'float32', 0, 1000)
    expected, *_ = reference(X, 'batch', gamma, beta)
    short = (X ** 2).mean((0, 2, 3)) - X.mean((0, 2, 3)) ** 2
    assert abs(short / X.var((0, 2, 3), 'float64') - 1).max() > 1e-2
    Y, _ = theory.batch_norm_forward(X, gamma, beta)
    assert_allclose(Y, expected, atol=1e-6)


def test_many_values_keep_their_mean():
    """Sums over the axes 0, 2, 3 in float32 would lose it."""
    X = np.full((256, 2, 64, 64), 5000.123, 'float32')
    _, mean, var = theory.centre(X, (0, 2, 3))
    assert_allclose(mean.ravel(), X[0, :, 0, 0].astype(float), rtol=1e-15)
    assert (var < 1e-20).all()


@pytest.mark.parametrize('value', [0.1, 5000.123, 1e6 / 3])
def test_the_mean_is_corrected(value):
    """A sum of a million equal numbers is not exact, even in float64."""
    X = np.full((256, 1, 64, 64), value)
    centred, _, var = theory.centre(X, (0, 2, 3))
    assert abs(centred).max() <= 2e-16 * value
    assert var.max() <= (2e-16 * value) ** 2


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('value', [100, 7.1, -0.1, 1e6 / 3, 5000.123, 1e-20])
@pytest.mark.parametrize('shape', [(1, 2, 3, 3), (7, 2), (1, 2), (999, 2),
                                   (64, 2, 9, 9)])
def test_a_constant_channel_gives_exactly_beta(dtype, value, shape):
    X = np.full(shape, value, dtype)
    gamma, beta = np.array([[3, -2], [0.3, 1e-8]], dtype)
    centred, mean, var = theory.centre(X, (0, *range(2, X.ndim)))
    assert not centred.any() and not var.any()
    assert_array_equal(mean.ravel(), X.reshape(shape[0], 2, -1)[0, :, 0])
    Y, cache = theory.batch_norm_forward(X, gamma, beta)
    wanted = beta.reshape((1, 2) + (1,) * (X.ndim - 2))
    assert_array_equal(Y, np.broadcast_to(wanted, shape))
    dX, dgamma, _ = theory.batch_norm_backward(Y, cache)
    assert not dgamma.any()
    assert_allclose(dX, 0, atol=1e4 * ROUNDING[dtype])
    mean, var = theory.population_statistics([X, X])
    assert not var.any()


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_mean_of_1000_costs_no_digits(dtype):
    """Sixteen values, a thousandth apart, against exact fractions."""
    X = (1000 + np.arange(16) * 1e-3).astype(dtype)[:, None]
    exact = [Fraction(float(x)) for x in X[:, 0]]
    mean = sum(exact) / 16
    var = sum((x - mean) ** 2 for x in exact) / 16
    expected = [float(x - mean) / math.sqrt(float(var) + 1e-5) for x in exact]
    one = np.ones(1, dtype)
    Y, _ = theory.batch_norm_forward(X, one, 0 * one)
    assert_allclose(Y[:, 0], expected, rtol=0, atol=ROUNDING[dtype])
    assert_allclose(theory.population_statistics([X[:5], X[5:]])[1],
                    float(var), rtol=1e-9)


def test_an_outlier_costs_nothing_either():
    """A shift by the first value, 1e9 away, would lose nine digits."""
    X = np.random.default_rng(0).normal(size=(4096, 3))
    X[0] = 1e9
    _, mean, var = theory.centre(X, (0,))
    for c in range(3):
        exact = [Fraction(float(x)) for x in X[:, c]]
        right = sum(exact) / 4096
        assert_allclose(mean[0, c], float(right), rtol=1e-14)
        assert_allclose(var[0, c], float(
            sum((x - right) ** 2 for x in exact) / 4096), rtol=1e-13)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('X', [[[3, -7, 1e6]], [[7.1, 0, -5000.3]] * 9])
def test_no_variance_gives_beta(X, dtype):
    X, beta = np.array(X, dtype), np.array([1, 2, 3], dtype)
    Y, cache = theory.batch_norm_forward(X, np.ones(3, dtype), beta)
    assert_allclose(Y, np.broadcast_to(beta, X.shape), atol=1e-6)
    dX, dgamma, _ = theory.batch_norm_backward(np.ones_like(X), cache)
    assert_allclose(dX, 0, atol=1e-9)
    assert_allclose(dgamma, 0, atol=1e-6)


def test_gamma_and_beta_can_undo_it():
    X, *_ = draw((9, 4, 3, 2), 'float64', 1, 20)
    mean, var = X.mean((0, 2, 3)), X.var((0, 2, 3))
    Y, _ = theory.batch_norm_forward(X, np.sqrt(var + 1e-5), mean)
    assert_allclose(Y, X, rtol=1e-12)


def test_nan_stays_in_its_channel():
    X, gamma, beta = draw((5, 3, 2, 2), 'float32', 0)
    X[1, 1, 0, 1] = np.nan
    Y, _ = theory.batch_norm_forward(X, gamma, beta)
    assert np.isnan(Y[:, 1]).all() and np.isfinite(Y[:, [0, 2]]).all()


def test_views_and_orders_give_the_same():
    X, gamma, beta = draw((6, 4, 5, 3), 'float32', 2)
    expected, _ = theory.batch_norm_forward(X, gamma, beta)
    for same in (np.asfortranarray(X),
                 np.moveaxis(np.moveaxis(X, 1, 3).copy(), 3, 1),
                 np.repeat(X, 2, axis=3)[..., ::2]):
        Y, cache = theory.batch_norm_forward(same, gamma, beta)
        assert_allclose(Y, expected, rtol=1e-6, atol=1e-6)
        assert theory.batch_norm_backward(same, cache)[0].shape == X.shape


# --- backward pass -----------------------------------------------------------


@given(shapes, seeds, offsets)
def test_backward_by_central_differences(shape, seed, offset):
    X, gamma, beta = draw(shape, 'float64', seed, offset)
    assume(X.size > X.shape[1])
    dY = np.random.default_rng(seed + 1).normal(size=shape)
    arguments = [X, gamma, beta]
    # not where tiny batches nearly coincide: there no step is small enough
    assume(reference(X)[2].min() > 0.05)
    ours = theory.batch_norm_backward(
        dY, theory.batch_norm_forward(*arguments)[1])
    for i in range(3):
        def loss(value, i=i):
            X, gamma, beta = (
                value if i == j else a for j, a in enumerate(arguments))
            return math.fsum((reference(X, 'batch', gamma, beta)[0]
                              * dY).ravel())

        # step 1e-4: error of order 1e-16 * (3 / var)^4, rounding 1e-10
        assert_allclose(ours[i], numeric(loss, arguments[i]), rtol=1e-6,
                        atol=1e-5)


@given(shapes, st.sampled_from(DTYPES), seeds, offsets)
def test_backward_in_both_precisions(shape, dtype, seed, offset):
    """Against the formula, by loops, and what follows from it."""
    X, gamma, beta = draw(shape, dtype, seed, offset)
    dY = np.random.default_rng(seed + 1).normal(size=shape).astype(dtype)
    _, cache = theory.batch_norm_forward(X, gamma, beta)
    dX, dgamma, dbeta = theory.batch_norm_backward(dY, cache)
    assert dX.dtype == dgamma.dtype == dbeta.dtype == X.dtype
    assert dX.shape == shape and dgamma.shape == dbeta.shape == (shape[1],)
    X_hat, _, variances = reference(X)
    for c, mask in enumerate(sets_of(X, 'batch')):
        g, x = dY[mask].astype(float), X_hat[mask]
        m = len(g)
        along, total = math.fsum(g * x), math.fsum(g)
        scale = float(gamma[c]) / math.sqrt(variances[c] + 1e-5)
        atol = ROUNDING[dtype] * m * 10
        assert_allclose(dbeta[c], total, rtol=ROUNDING[dtype], atol=atol)
        assert_allclose(dgamma[c], along, rtol=ROUNDING[dtype], atol=atol)
        expected = scale * (g - total / m - x * along / m)
        atol *= 1 + abs(scale)
        assert_allclose(dX[mask], expected, rtol=ROUNDING[dtype], atol=atol)
        # a common shift of the inputs changes nothing
        assert_allclose(math.fsum(dX[mask].astype(float)), 0, atol=atol)


def test_constant_statistics_would_be_noticed():
    X, gamma, beta = draw((64, 8), 'float64', 0)
    dY = np.random.default_rng(1).normal(size=X.shape)
    _, cache = theory.batch_norm_forward(X, gamma, beta)
    dX, *_ = theory.batch_norm_backward(dY, cache)
    wrong = gamma * cache[1] * dY
    assert np.linalg.norm(wrong - dX) > 0.1 * np.linalg.norm(dX)
    assert abs(wrong.sum(axis=0)).max() > 1 > abs(dX.sum(axis=0)).max()


def test_the_cache_is_a_copy():
    X, gamma, beta = draw((8, 3), 'float64', 0)
    dY = X[::-1].copy()
    _, cache = theory.batch_norm_forward(X, gamma, beta)
    before = theory.batch_norm_backward(dY, cache)
    X[:], gamma[:], beta[:] = 1, 2, 3
    for old, new in zip(before, theory.batch_norm_backward(dY, cache),
                        strict=True):
        assert_array_equal(old, new)


@given(shapes, seeds)
def test_numeric_gradient(shape, seed):
    X, *_ = draw(shape, 'float64', seed)
    kept = X.copy()
    X.flags.writeable = False
    ours = theory.numeric_gradient(lambda X: np.sin(X).sum() + X.sum() ** 2, X)
    assert_array_equal(X, kept)
    # error cos(x) step^2 / 6, rounding about 1e-16 * sum^2 / step
    assert_allclose(ours, np.cos(X) + 2 * X.sum(), rtol=1e-6, atol=1e-6)


# --- beside MXNet -------------------------------------------------------


def test_against_mxnet_before_and_after_set_np():
    from d2ltvm.mxnet_today import autograd, nd, npx
    rng = np.random.default_rng(0)
    X, dY = rng.normal(size=(2, 4, 6, 3, 5)).astype('float32')
    gamma, beta = rng.normal(size=(2, 6)).astype('float32')

    def found():
        Y, cache = theory.batch_norm_forward(X, gamma, beta)
        numeric = theory.numeric_gradient(lambda x: (x ** 2).sum(),
                                          np.ones(3))
        return (*theory.population_statistics([X[:1], X[1:]]), numeric, Y,
                *theory.batch_norm_backward(dY, cache))

    before = mean, var, numeric, *ours = found()
    npx.set_np()
    try:
        after = found()
    finally:
        npx.reset_np()
    for a, b in zip(before, after, strict=True):
        assert_array_equal(a, b)
    arrays = [nd.array(a) for a in (X, gamma, beta)]
    for a in arrays:
        a.attach_grad()
    with autograd.record():
        Y = nd.BatchNorm(*arrays, nd.zeros(6), nd.ones(6), eps=1e-5,
                         fix_gamma=False)
    Y.backward(nd.array(dY))
    for a, b in zip(ours, (Y, *(a.grad for a in arrays)), strict=True):
        assert_allclose(a, b.asnumpy(), rtol=1e-4, atol=1e-4)
    assert_allclose(mean, X.mean((0, 2, 3), 'float64'))
    assert_allclose(var, X.var((0, 2, 3), 'float64'))
    assert_allclose(numeric, 2, rtol=1e-8)


# --- population statistics ---------------------------------------------------


@given(st.lists(st.tuples(size, st.one_of(st.none(), st.tuples(size, size))),
                min_size=1, max_size=6), size, st.sampled_from(DTYPES), seeds,
       offsets, st.sampled_from((1e-18, 1.0, 1e18)))
def test_population_statistics(sizes, C, dtype, seed, offset, scale):
    """Batches of all sizes, dense and convolutional, far from zero."""
    batches = [draw((N, C, *(pixels or ())), dtype, seed + i, offset + i,
                    scale)[0] for i, (N, pixels) in enumerate(sizes)]
    mean, var = theory.population_statistics(iter(batches))
    assert mean.dtype == var.dtype == np.float64
    assert mean.shape == var.shape == (C,)
    for c in range(C):
        values = np.concatenate([X[:, c].ravel() for X in batches])
        _, (expected_mean,), (expected_var,) = reference(values[:, None])
        assert_allclose(mean[c], expected_mean, rtol=1e-13,
                        atol=1e-13 * scale)
        # 5000 in float64 leaves twelve digits of a deviation of size one
        assert_allclose(var[c], expected_var, rtol=1e-10,
                        atol=1e-22 * (1 + offset ** 2) * scale ** 2)


def test_the_variance_of_the_means_counts():
    batches = [np.full((4, 1), value) for value in (0.0, 2.0)]
    mean, var = theory.population_statistics(batches)
    assert_allclose((mean, var), [[1], [1]], rtol=1e-15)
    mean, var = theory.population_statistics([np.zeros((30, 1)),
                                              np.full((10, 1), 4.0)])
    assert_allclose((mean, var), [[1], [3]], rtol=1e-15)


# --- merging -----------------------------------------------------------------


def triple(values):
    """Count, mean and M2 by exact sums."""
    if not len(values):
        return 0, math.nan, math.nan
    mean = math.fsum(values) / len(values)
    return len(values), mean, math.fsum((v - mean) ** 2 for v in values)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
       seeds, st.sampled_from((0, 1e6, -1e6)),
       st.sampled_from((1e-12, 1.0, 1e12)), st.randoms(use_true_random=False))
def test_merging_any_split_in_any_order(sizes, seed, offset, scale, order):
    """Also empty parts, parts of one value, parts far from each other."""
    rng = np.random.default_rng(seed)
    pieces = [scale * (rng.normal(size=n) + offset * rng.choice((0, 1)))
              for n in sizes]
    count, expected_mean, expected_M2 = triple(np.concatenate(pieces))
    parts = [triple(piece) for piece in pieces]
    order.shuffle(parts)
    cut = order.randint(0, len(parts))
    groups = [theory.merge_statistics(group)
              for group in (parts[:cut], parts[cut:])
              if any(part[0] for part in group)]
    for merged in theory.merge_statistics(parts), \
            theory.merge_statistics(groups):
        assert merged[0] == count
        # a mean is rounded by 1e-16 of the offset, its square is added
        assert_allclose(merged[1], expected_mean, rtol=1e-14,
                        atol=1e-15 * scale * (1 + abs(offset)))
        assert_allclose(merged[2], expected_M2, rtol=1e-9,
                        atol=1e-14 * scale ** 2)


def test_merging_takes_any_arithmetic():
    from d2ltvm.mxnet_today import nd
    tvm = pytest.importorskip('tvm')
    parts = (2, [1.0, 4.0], [8.0, 0.5]), (6, [3.0, 0.0], [1.0, 2.0])
    expected = theory.merge_statistics(
        [(n, np.array(mean), np.array(M2)) for n, mean, M2 in parts])
    assert_allclose(expected[1], [2.5, 1], rtol=1e-15)
    assert_allclose(expected[2], [15, 26.5], rtol=1e-15)
    _, *arrays = theory.merge_statistics(
        [(n, nd.array(mean), nd.array(M2)) for n, mean, M2 in parts])
    for got, right in zip(arrays, expected[1:], strict=True):
        assert_allclose(got.asnumpy(), right, rtol=1e-6)
    a, b, c, d, e, f = (tvm.tirx.Var(x, 'float32') for x in 'abcdef')
    total, mean, _ = theory.merge_statistics([(a, b, c), (d, e, f)])
    assert str(total) == 'a + d'
    assert str(mean) == 'b + (e - b) * (d / (a + d))'


# --- wrong arguments ---------------------------------------------------------


def forward(**change):
    good = {'X': np.ones((2, 3)), 'gamma': np.ones(3), 'beta': np.zeros(3)}
    return theory.batch_norm_forward(**{**good, **change})


def backward(dY):
    return theory.batch_norm_backward(dY, forward()[1])


@pytest.mark.parametrize(('error', 'message', 'call'), [
    (ValueError, r'X: expected .*\(2, 3, 4\)',
     lambda: forward(X=np.ones((2, 3, 4)))),
    (ValueError, r'X: expected .*\(3,\)', lambda: forward(X=np.ones(3))),
    (ValueError, r'X: expected a non-empty', lambda: forward(
        X=np.ones((0, 3)))),
    (TypeError, 'X: expected .*float16',
     lambda: forward(X=np.ones((2, 3), 'float16'))),
    (TypeError, 'X: expected .*int64', lambda: forward(
        X=np.ones((2, 3), 'int64'))),
    (TypeError, 'X: expected .*complex128', lambda: forward(
        X=np.ones((2, 3), complex))),
    (TypeError, 'X: expected .*list', lambda: forward(X=[[1.0, 2, 3]])),
    (TypeError, 'X: expected .*NoneType', lambda: forward(X=None)),
    (ValueError, r'gamma: expected shape \(3,\), got \(4,\)',
     lambda: forward(gamma=np.ones(4))),
    (ValueError, r'gamma: expected shape .*\(1, 3\)',
     lambda: forward(gamma=np.ones((1, 3)))),
    (ValueError, 'beta: expected shape', lambda: forward(beta=np.ones(1))),
    (TypeError, 'gamma: expected .*float64.*float32',
     lambda: forward(gamma=np.ones(3, 'float32'))),
    (TypeError, 'gamma: expected .*got float$', lambda: forward(gamma=1.0)),
    (TypeError, 'gamma: expected .*float64', lambda: forward(
        gamma=np.float64(1))),
    (TypeError, 'beta: expected .*NoneType', lambda: forward(beta=None)),
    (TypeError, 'beta: expected .*list', lambda: forward(beta=[0.0, 0, 0])),
    (ValueError, 'eps: expected at least 1.175e-38 .* 3.403e.38, got 0',
     lambda: forward(eps=0)),
    (ValueError, 'eps: expected at least', lambda: forward(eps=-1e-5)),
    (ValueError, 'eps: expected at least', lambda: forward(eps=math.nan)),
    (ValueError, 'eps: expected at least', lambda: forward(eps=math.inf)),
    (ValueError, 'eps: expected at least', lambda: forward(eps=1e39)),
    (TypeError, 'eps: expected a number, got str', lambda: forward(eps='1')),
    (TypeError, 'eps: expected a number, got None',
     lambda: forward(eps=None)),
    (TypeError, 'eps: expected a number, got bool',
     lambda: forward(eps=True)),
    (ValueError, r'dY: expected shape \(2, 3\), got \(3, 2\)',
     lambda: backward(np.ones((3, 2)))),
    (TypeError, 'dY: expected .*float32',
     lambda: backward(np.ones((2, 3), 'float32'))),
    (TypeError, 'dY: expected', lambda: backward([[1.0] * 3] * 2)),
    (TypeError, 'X: expected .*float64, got float32',
     lambda: theory.numeric_gradient(np.sum, np.ones(3, 'float32'))),
    (TypeError, 'X: expected .*float64, got float',
     lambda: theory.numeric_gradient(np.sum, 1.0)),
    (TypeError, 'X: expected', lambda: theory.numeric_gradient(
        np.sum, np.float64(1))),
    (ValueError, 'step: expected at least .*, got 0',
     lambda: theory.numeric_gradient(np.sum, np.ones(3), 0)),
    (TypeError, 'step: expected a number, got NoneType',
     lambda: theory.numeric_gradient(np.sum, np.ones(3), None)),
    (ValueError, 'parts: expected at least one',
     lambda: theory.merge_statistics([(0, 1.0, 1.0)])),
    (ValueError, 'parts: expected counts from 0 on, got -1',
     lambda: theory.merge_statistics([(-1, 1.0, 1.0)])),
    (ValueError, 'parts: expected counts from 0 on, got nan',
     lambda: theory.merge_statistics([(np.nan, 1.0, 1.0)])),
    (ValueError, r'parts: expected means and M2 of one shape, got .*\(2,\)',
     lambda: theory.merge_statistics([(1, np.ones(2), np.ones(2)),
                                      (1, np.ones(3), np.ones(3))])),
    (ValueError, r'parts: expected means and M2 of one shape',
     lambda: theory.merge_statistics([(1, np.ones(2), 1.0)])),
    (ValueError, 'batches: expected at least one',
     lambda: theory.population_statistics([])),
    (ValueError, r'batches: expected 3 channels .*\(2, 4\)',
     lambda: theory.population_statistics([np.ones((2, 3)),
                                           np.ones((2, 4))])),
    (ValueError, 'batches: expected a non-empty',
     lambda: theory.population_statistics([np.ones((0, 3))])),
    (ValueError, r'batches: expected .*\(3, 2, 2\)',
     lambda: theory.population_statistics(np.ones((4, 3, 2, 2)))),
    (TypeError, 'batches: expected .*int64',
     lambda: theory.population_statistics([np.ones((2, 3), int)]))])
def test_wrong_arguments_are_named(error, message, call):
    with pytest.raises(error, match=f'^{message}'):
        call()


def test_dense_batches_of_one_teach_only_beta():
    _, cache = theory.batch_norm_forward(np.ones((1, 3)), np.ones(3),
                                         np.zeros(3))
    dX, dgamma, dbeta = theory.batch_norm_backward(np.ones((1, 3)), cache)
    assert not dX.any() and not dgamma.any() and dbeta.all()


def test_only_numpy_is_loaded():
    ran = subprocess.run(
        [sys.executable, '-c', 'import d2ltvm.theory, sys; print(*('
         "{'mxnet', 'tvm', 'matplotlib', 'sklearn'} & set(sys.modules)))"],
        check=True, capture_output=True, text=True)
    assert ran.stdout.split() == []
