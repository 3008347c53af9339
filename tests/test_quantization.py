"""Quantization against loops in whole numbers, its limits, its refusals."""
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import quantization as qu
from d2ltvm.folding import SHAPES, network_float64


def drawn_layers(seed=0, scale=1.):
    rng = np.random.default_rng(seed)
    return [((scale * rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])))
             .astype('float32'), rng.normal(0, 0.1, shape[0])
             .astype('float32')) for shape in SHAPES]


def pictures(n, seed=1):
    return np.random.default_rng(seed).random((n, 1, 28, 28), 'float32')


@pytest.mark.usefixtures('semantics')
@given(st.integers(0, 2 ** 32), st.sampled_from(qu.BITS), st.booleans(),
       st.sampled_from([(3, 2), (1, 1), (4, 2, 3), (2, 3, 2, 2)]),
       st.sampled_from(['float32', 'float64']), st.booleans())
def test_weights_are_the_nearest(seed, bits, per_channel, shape, dtype, dead):
    W = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    W[0] *= 0 if dead else 100
    kept = W.copy()
    q, step = qu.quantize_weights(W, bits, per_channel)
    assert_array_equal(W, kept)
    assert q.dtype == np.int8 and q.shape == W.shape
    assert step.shape == W.shape[:1] and (step > 0).all()
    top = 2 ** (bits - 1) - 1
    assert abs(q.astype(int)).max() == (top if W.any() else 0)
    for row, whole, width in zip(W.astype('float64'), q, step, strict=True):
        assert abs(row - whole * width).max() <= 0.5 * width * (1 + 1e-12)
        if per_channel and row.any():
            assert abs(whole.astype(int)).max() == top
            assert_allclose(width, abs(row).max() / top)
    if not per_channel:
        assert len(set(step)) == 1


def test_a_dead_channel_has_the_longest_step():
    W = np.array([[0., 0], [1, 2], [3, 4]])
    assert_allclose(qu.quantize_weights(W)[1] * 127, [4, 2, 4])
    assert_allclose(qu.quantize_weights(0 * W)[1] * 127, 1)


@pytest.mark.parametrize(('error', 'message', 'arguments'), [
    (TypeError, '^W: expected', ([[1.]],)),
    (TypeError, '^W: expected', (np.ones((2, 2), 'int8'),)),
    (ValueError, '^W: expected finite', (np.ones(3),)),
    (ValueError, '^W: expected finite', (np.ones((0, 3)),)),
    (ValueError, '^W: expected finite', (np.full((2, 2), np.nan),)),
    (ValueError, '^W: expected finite', (np.full((2, 2), np.inf),)),
    (ValueError, '^bits: expected', (np.ones((2, 2)), 9)),
    (ValueError, '^bits: expected', (np.ones((2, 2)), 1))])
def test_bad_weights_are_named(error, message, arguments):
    with pytest.raises(error, match=message):
        qu.quantize_weights(*arguments)


def test_the_hook_sees_what_each_layer_gets():
    layers, X, seen = drawn_layers(), pictures(3), []

    def change(i, inputs):
        seen.append((i, inputs.shape))
        return inputs
    Y = network_float64(layers, X, change)
    assert_allclose(Y, network_float64(layers, X), rtol=1e-12)
    assert seen == [(0, (3, 1, 28, 28)), (1, (3, 20, 13, 13)),
                    (2, (3, 50, 4, 4)), (3, (3, 128))]
    doubled = network_float64(
        layers, X, lambda i, x: 2 * x if i == 0 else x)
    assert_allclose(doubled, network_float64(layers, 2 * X), rtol=1e-12)


def test_calibration_takes_the_largest_of_all_images():
    layers, X = drawn_layers(), pictures(4)
    each = [qu.calibrate(layers, X[i:i + 1]) for i in range(4)]
    assert_allclose(qu.calibrate(layers, X), np.max(each, axis=0))
    assert each[0][0] == X[0].max()
    # in floating point, twice as bright images have inputs twice as large
    plain = [(W, 0 * b) for W, b in layers]
    assert_allclose(qu.calibrate(plain, 2 * X), 2 * qu.calibrate(plain, X),
                    rtol=1e-6)
    dark = qu.calibrate(plain, 0 * X)
    assert_array_equal(dark, np.ones(4))


@pytest.mark.parametrize(('error', 'message', 'images'), [
    (TypeError, '^images: expected', np.ones((1, 1, 28, 28), 'uint8')),
    (ValueError, '^images: expected shape', np.ones((1, 28, 28))),
    (ValueError, '^images: expected at least one', np.ones((0, 1, 28, 28))),
    (ValueError, '^images: expected at least', np.full((1, 1, 28, 28), -1.)),
    (ValueError, '^images: expected', np.full((1, 1, 28, 28), np.nan))])
def test_bad_images_are_named(error, message, images):
    with pytest.raises(error, match=message):
        qu.calibrate(drawn_layers(), images)


def by_loops(layers, largest, image, bits, per_channel):
    """The network for one image: Python's whole numbers, one sum at a time."""
    top, X, scale = 2 ** bits - 1, image.astype('float64'), np.ones(1)
    for i, (W, b) in enumerate(layers):
        q, step = qu.quantize_weights(W, bits, per_channel)
        unit = step * largest[i] / top
        X = X * scale.reshape((-1,) + (1,) * (X.ndim - 1)) * (
            top / largest[i])
        X = np.clip(np.rint(X), 0, top).astype('int64')
        q, b = q.astype('int64'), np.rint(b / unit).astype('int64')
        if i < 2:
            k, side = W.shape[-1], X.shape[-1] - W.shape[-1] + 1
            Y = np.zeros((len(q), side, side), 'int64')
            for v in range(k):
                for u in range(k):
                    Y += np.einsum('oc,cyx->oyx', q[:, :, v, u],
                                   X[:, v:v + side, u:u + side])
            Y = np.maximum(Y + b[:, None, None], 0)
            half = side // 2
            Y = Y[:, :2 * half, :2 * half].reshape(len(q), half, 2, half, 2)
            X = Y.sum((2, 4)) / 4
        else:
            X = q @ X.reshape(-1) + b
            X = np.maximum(X, 0) if i == 2 else X
        scale = unit
    return X * scale


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('per_channel', [False, True])
def test_network_is_that_of_the_loops(bits, per_channel):
    layers, X = drawn_layers(), pictures(3)
    largest = qu.calibrate(layers, X)
    network = qu.quantized_network(layers, largest, bits, per_channel)
    right = [by_loops(layers, largest, x, bits, per_channel) for x in X]
    # equal but for a factor that two orders of multiplication round apart
    assert_allclose(network(X), right, rtol=1e-9, atol=1e-9)


def test_eight_bits_are_near_and_more_bits_nearer():
    layers, X = drawn_layers(), pictures(32)
    right, largest = network_float64(layers, X), qu.calibrate(layers, X)
    errors = [np.sqrt(((qu.quantized_network(layers, largest, bits)(X)
                        - right) ** 2).mean()) / right.std()
              for bits in (8, 6, 4)]
    assert errors[0] < 0.05 and errors[0] < errors[1] < errors[2]


def test_larger_inputs_are_cut_off():
    layers, X = drawn_layers(), pictures(2)
    network = qu.quantized_network(layers, qu.calibrate(layers, X))
    assert_array_equal(network(np.full_like(X, 100)),
                       network(np.full_like(X, X.max())))


def test_nan_is_not_hidden():
    layers, X = drawn_layers(), pictures(2)
    network = qu.quantized_network(layers, qu.calibrate(layers, X))
    X[1, 0, 10, 10] = np.nan
    Y = network(X)
    assert np.isfinite(Y[0]).all() and np.isnan(Y[1]).all()


def test_bad_networks_are_named():
    layers, largest = drawn_layers(), np.ones(4)
    for bad in (layers[:3], layers[::-1], []):
        for function in (lambda x: qu.calibrate(x, pictures(1)),
                         lambda x: qu.quantized_network(x, largest)):
            with pytest.raises(ValueError, match=r'^layers: expected'):
                function(bad)
    wide = [(W.astype('float64'), b) for W, b in layers]
    with pytest.raises(TypeError, match=r'^layers: expected.*float64'):
        qu.quantized_network(wide, largest)
    for bad, error in (([1.] * 4, TypeError), (np.ones(3), ValueError),
                       (np.zeros(4), ValueError), (-largest, ValueError),
                       (np.full(4, np.inf), ValueError),
                       (np.full(4, np.nan), ValueError)):
        with pytest.raises(error, match=r'^largest: expected'):
            qu.quantized_network(layers, bad)
    with pytest.raises(ValueError, match=r'^bits: expected'):
        qu.quantized_network(layers, largest, 16)
    W, b = layers[1]
    layers[1] = W, b + np.float32(1e6)
    with pytest.raises(ValueError, match=r'^layers\[1\]: expected sums that'):
        qu.quantized_network(layers, np.full(4, 1e-3))


def test_nothing_but_numpy_is_loaded():
    ran = subprocess.run(
        [sys.executable, '-c', 'import d2ltvm.quantization, sys; print(*('
         '{"mxnet", "tvm"} & set(sys.modules)))'],
        check=True, capture_output=True, text=True)
    assert ran.stdout.split() == []
