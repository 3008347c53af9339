"""The family of batch normalization; references are loops in float64."""
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from test_theory import (
    DTYPES,
    ROUNDING,
    draw,
    offsets,
    reference,
    seeds,
    shapes,
)

from d2ltvm import theory, why


@given(st.sampled_from(why.KINDS), shapes, st.sampled_from(DTYPES), seeds,
       offsets, st.sampled_from((1e-30, 1.0, 1e30)), st.data())
def test_normalize(kind, shape, dtype, seed, offset, scale, data):
    assume(kind != 'instance' or len(shape) == 4)
    groups = None
    if kind == 'group':
        groups = data.draw(st.sampled_from(
            [g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    X, gamma, beta = draw(shape, dtype, seed, offset, scale)
    gamma = data.draw(st.sampled_from((None, gamma)))
    beta = data.draw(st.sampled_from((None, beta)))
    expected, *_ = reference(X, kind, gamma, beta, groups)
    Y = why.normalize(X, kind, gamma, beta, groups)
    assert Y.dtype == X.dtype and Y.shape == X.shape
    assert_allclose(Y, expected, rtol=0,
                    atol=(1 + abs(expected).max()) * ROUNDING[dtype])


def test_the_family_closes():
    X, gamma, beta = draw((3, 6, 4, 5), 'float32', 0)
    assert_array_equal(why.normalize(X, 'batch', gamma, beta),
                       theory.batch_norm_forward(X, gamma, beta)[0])
    assert_array_equal(why.normalize(X, 'group', groups=1),
                       why.normalize(X, 'layer'))
    assert_array_equal(why.normalize(X, 'group', groups=np.int64(6)),
                       why.normalize(X, 'instance'))
    for kind in ('layer', 'instance', 'rms'):
        assert_array_equal(why.normalize(X[:1], kind),
                           why.normalize(X, kind)[:1])
    assert not np.allclose(why.normalize(X[:1], 'batch'),
                           why.normalize(X, 'batch')[:1])


@pytest.mark.parametrize('kind', why.KINDS)
def test_constant_data_gives_exactly_beta(kind):
    X = np.full((3, 4, 5, 2), 7.1)
    beta = np.array([0.3, -1, 0, 2])
    Y = why.normalize(X, kind, np.full(4, 3.0), beta,
                      groups=2 if kind == 'group' else None)
    if kind == 'rms':  # nothing is subtracted
        assert_allclose(Y - beta[:, None, None], 3, rtol=1e-6)
    else:
        assert_array_equal(Y, np.broadcast_to(beta[:, None, None], X.shape))


def test_layer_norm_beside_mxnet():
    from d2ltvm.mxnet_today import nd
    X = np.random.default_rng(0).normal(size=(4, 90)).astype('float32')
    theirs = nd.LayerNorm(nd.array(X), nd.ones(90), nd.zeros(90)).asnumpy()
    assert_allclose(why.normalize(X, 'layer'), theirs, rtol=1e-5, atol=1e-5)


def normalize(**change):
    good = {'X': np.ones((2, 6, 2, 2)), 'kind': 'batch'}
    return why.normalize(**{**good, **change})


@pytest.mark.parametrize(('error', 'message', 'call'), [
    (ValueError, "kind: expected one of .*'rms'.* got 'weight'",
     lambda: normalize(kind='weight')),
    (ValueError, 'kind: expected', lambda: normalize(kind=None)),
    (ValueError, r"X: expected .*\(N, C, H, W\).*'instance'",
     lambda: normalize(X=np.ones((4, 6)), kind='instance')),
    (ValueError, 'groups: expected a divisor of 6, .*got 4',
     lambda: normalize(kind='group', groups=4)),
    (TypeError, 'groups: expected an integer, got None',
     lambda: normalize(kind='group')),
    (TypeError, 'groups: expected an integer, got 2.0',
     lambda: normalize(kind='group', groups=2.0)),
    (ValueError, 'groups: expected 1 or more, got 0',
     lambda: normalize(kind='group', groups=0)),
    (ValueError, 'eps: expected at least', lambda: normalize(eps=0)),
    (TypeError, 'eps: expected a number, got None',
     lambda: normalize(eps=None)),
    (ValueError, "groups: expected None for kind 'layer', got 2",
     lambda: normalize(kind='layer', groups=2)),
    (ValueError, 'gamma: expected shape',
     lambda: normalize(kind='group', groups=2, gamma=np.ones(2))),
    (TypeError, 'beta: expected',
     lambda: normalize(beta=np.ones(6, 'float32'))),
    (TypeError, 'X: expected', lambda: normalize(X=np.ones((2, 6), int)))])
def test_wrong_arguments_are_named(error, message, call):
    with pytest.raises(error, match=f'^{message}'):
        call()
