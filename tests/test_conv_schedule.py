"""Convolutions: by their definition and by Winograd, tiles, registers."""
import math

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import s_tir, te

from d2ltvm import conv_schedule as module
from d2ltvm.folding import conv_float64
from soak import examples

def run_conv(X, W, b, side, lanes, held, winograd=False):
    """A convolution with its schedule, on the plain target."""
    write, schedule = (
        (module.winograd_relu_pool, module.schedule_winograd) if winograd
        else (module.conv_relu_pool, module.schedule_conv))
    tiles, more = -(-len(W) // held), -len(W) % held
    W, b = (np.pad(a, [(0, more), *((0, 0),) * (a.ndim - 1)]) for a in (W, b))
    if winograd:
        W = module.winograd_weights(W)
    W = W.reshape(tiles, held, *W.shape[1:]).transpose(0, 3, 4, 2, 1)
    x, w, c = (te.placeholder(a.shape, name=name) for a, name in (
        (X, 'X'), (W, 'W'), (b, 'b')))
    P = write(lambda *at: x[at], w, c, len(X), side, 'P')
    sch = s_tir.Schedule(te.create_prim_func([x, w, c, P]))
    reduction = schedule(sch, 'P', lanes, held)
    sch.decompose_reduction(*reduction)
    out = np.full([int(n) for n in P.shape], np.nan, 'float32')
    arrays = (np.ascontiguousarray(a) for a in (X, W, b))
    tensors = [*map(tvm.runtime.tensor, arrays), tvm.runtime.tensor(out)]
    tvm.compile(sch.mod, target='llvm')['main'](*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize('winograd', [False, True])
@settings(max_examples=examples(25))
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 11),
       st.sampled_from([1, 3, 5]), st.integers(1, 5),
       st.sampled_from([4, 8, 16]), st.integers(1, 6),
       st.sampled_from([1e-4, 1, 1e4]), st.sampled_from([0, 1000]))
def test_convolution(winograd, batch, channels, outputs, kernel, side, lanes,
                     held, scale, offset):
    """Also one channel, sides that no vector divides, offset 1000."""
    rng = np.random.default_rng(batch + 10 * outputs)
    n = 2 * side + kernel - 1
    X = scale * (offset + rng.normal(size=(batch, channels, n, n)))
    W = rng.normal(size=(outputs, channels, kernel, kernel))
    X, W, b = (a.astype('float32') for a in (X, W, rng.normal(size=outputs)))
    got = run_conv(X, W, b, side, lanes, held, winograd)
    exact = conv_float64(X, W, b).reshape(batch, outputs, -1)
    assert not got[:, outputs:].any()  # what fills up the last tile
    got = got[:, :outputs]
    # n products and n additions, each rounded by 2**-24 of what it handles
    terms = W[0].size + 6
    size = conv_float64(abs(X), abs(W), abs(b)).max()
    np.testing.assert_allclose(got, exact, rtol=0,
                               atol=terms * 2 ** -24 * size)


@pytest.mark.parametrize('k', [1, 3, 5, 7, 9])
def test_two_outputs_of_a_filter(k):
    A, B, G = module.winograd_matrices(k)
    assert A.shape == (k + 1, 2) and B.shape == (k + 1, k + 1)
    assert G.shape == (k + 1, k)
    rng = np.random.default_rng(k)
    d, g = rng.normal(size=k + 1), rng.normal(size=k)
    np.testing.assert_allclose(A.T @ ((G @ g) * (B.T @ d)),
                               np.convolve(d, g[::-1], 'valid'), atol=1e-10)


def test_four_outputs_are_those_of_the_definition():
    A, B, G = module.winograd_matrices(5)
    rng = np.random.default_rng(0)
    d, g = rng.normal(size=(6, 6)), rng.normal(size=(5, 5))
    exact = [[(d[y:y + 5, x:x + 5] * g).sum() for x in (0, 1)]
             for y in (0, 1)]
    np.testing.assert_allclose(
        A.T @ ((G @ g @ G.T) * (B.T @ d @ B)) @ A, exact, atol=1e-12)


@pytest.mark.parametrize('value, error', [
    (0, ValueError), (-1, ValueError), (4, ValueError), (17, ValueError),
    (3., TypeError),
    ('3', TypeError), (None, TypeError)])
def test_taps_that_are_none(value, error):
    with pytest.raises(error, match=r'^k: expected'):
        module.winograd_matrices(value)


def test_winograd_weights():
    W = np.random.default_rng(0).normal(size=(3, 2, 5, 5)).astype('float32')
    U, G = module.winograd_weights(W), module.winograd_matrices(5)[2]
    assert U.shape == (3, 2, 6, 6) and U.dtype == np.float32
    exact = G @ W[2, 1].astype('float64') @ G.T
    np.testing.assert_allclose(U[2, 1], exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('W, error', [
    (np.ones((3, 3), 'float32'), ValueError),
    (np.ones((2, 2, 5, 3), 'float32'), ValueError),
    (np.ones((2, 2, 4, 4), 'float32'), ValueError),
    (np.ones((2, 2, 3, 3)), TypeError), ([[[[1.]]]], TypeError)])
def test_weights_that_are_none(W, error):
    with pytest.raises(error, match=r'^(W|k): expected'):
        module.winograd_weights(W)


@pytest.mark.parametrize('winograd', [False, True])
def test_nan_reaches_the_pooled_pixels_that_read_it(winograd):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1, 2, 12, 12)).astype('float32')
    W = rng.normal(size=(3, 2, 5, 5)).astype('float32')
    X[0, 1, 0, 0] = X[0, 0, 11, 7] = np.nan
    got = run_conv(X, W, np.zeros(3, 'float32'), 4, 4, 3, winograd)
    found = np.isnan(got[0].reshape(3, 4, 4))
    expected = np.zeros((4, 4), bool)
    expected[0, 0] = expected[3, 1:4] = True
    assert (found == expected).all()


@given(st.integers(1, 100), st.sampled_from([4, 8, 16]))
def test_vectors_of_a_tile_divide_the_pixels(pixels, lanes):
    vectors = module.winograd_vectors(pixels, lanes)
    assert 1 <= vectors <= 4
    assert pixels % (math.gcd(pixels, lanes) * vectors) == 0


@given(st.integers(1, 200), st.sampled_from([15, 16, 32]),
       st.integers(1, 4))
def test_a_tile_fits_and_needs_fewest_instructions(channels, registers,
                                                   vectors):
    h = module.tile_channels(channels, registers, vectors)
    assert vectors * h + h + 1 <= registers

    def instructions(h):
        return -(-channels // h) * (vectors * h + h + vectors)

    assert all(instructions(h) <= instructions(other) for other in range(
        1, (registers - 1) // (vectors + 1) + 1))
    if vectors == 4:
        assert h == module.tile_channels(channels, registers)
