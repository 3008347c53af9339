"""The layer as a Gluon block: numbers, modes, state, compiled networks."""
import subprocess
import sys

import numpy as np
import pytest
from d2ltvm.mxnet_today import autograd, gluon, init, mx, nd
from d2l import mxnet as d2l
from hypothesis import given
from hypothesis import strategies as st
from mxnet.gluon import nn
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import gluon_module as gm
from d2ltvm.mnist import Digits, digits_28
from soak import SOAK, later


@pytest.fixture
def array(semantics):
    """Maker of arrays, with `npx.set_np()` off and on."""
    return mx.np.array if semantics else nd.array


@st.composite
def cases(draw):
    """X, gamma, beta, moving mean and variance as NumPy arrays.

    One or more channels, not square, far from zero, tiny and huge.
    """
    N, C, H, W = (draw(st.integers(low, 5)) for low in (2, 1, 1, 1))
    shape = draw(st.sampled_from([(N, C), (N, C, H, W)]))
    offset = draw(st.sampled_from([0, -3, 1000]))
    scale = draw(st.sampled_from([1e-3, 1, 1e3]))
    dtype = draw(st.sampled_from(['float32', 'float64']))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    X = scale * rng.normal(offset, 1, shape)
    gamma, beta, moving_mean = rng.normal(size=(3, C))
    return [a.astype(dtype) for a in (
        X, gamma, beta, scale * moving_mean,
        scale ** 2 * rng.uniform(0.5, 2, C))]


def per_channel(a, ndim):
    return np.reshape(a, (1, -1) + (1,) * (ndim - 2))


def reference(X, gamma, beta, moving_mean, moving_var, eps, momentum,
              training):
    """The three results in float64 NumPy, and the tolerance of each.

    Reading x already costs half a unit in its last place u * |x|; sums and
    products cost a few more. The output divides this by the deviation, the
    variance multiplies it by twice the deviation.
    """
    u = 32 * np.finfo(X.dtype).eps
    X, gamma, beta, mean, var = (
        a.astype('float64') for a in (X, gamma, beta, moving_mean, moving_var))
    moving = mean, var
    axes = (0, *range(2, X.ndim))
    if training:
        mean, var = X.mean(axes), X.var(axes)
        moving = [(1 - momentum) * old + momentum * new
                  for old, new in zip(moving, (mean, var), strict=True)]
    std = np.sqrt(var + eps)
    g, b, m, s = (per_channel(a, X.ndim) for a in (gamma, beta, mean, std))
    Y = g * (X - m) / s + b
    size = abs(X).max() + abs(mean).max()
    # an error d of the mean also shifts the variance, by d ** 2
    shift = u * size
    tolerances = (
        u * (abs(gamma) * size / std).max() * (1 + (shift / std).max())
        + u * (abs(gamma) * size / std ** 3 * shift ** 2 / u).max()
        + u * (abs(Y).max() + abs(beta).max()),
        u * size, u * (var.max() + moving[1].max()) + shift * np.sqrt(
            var.max()) + shift ** 2)
    return (Y, *moving), tolerances


@pytest.mark.parametrize('training', [True, False])
@given(cases(), st.sampled_from([1e-5, 1e-2]), st.sampled_from([0, 0.1, 1]))
def test_function_against_float64(training, case, eps, momentum):
    expected, tolerances = reference(*case, eps, momentum, training)
    arrays = [nd.array(a, dtype=a.dtype) for a in case]
    with autograd.train_mode() if training else autograd.predict_mode():
        results = gm.batch_norm(*arrays, eps, momentum)
    for ours, true, tolerance in zip(results, expected, tolerances,
                                     strict=True):
        assert ours.dtype == case[0].dtype
        assert_allclose(ours.asnumpy(), true, rtol=0, atol=tolerance)
    for a, before in zip(arrays, case, strict=True):
        assert_array_equal(a.asnumpy(), before)


KINDS = [(gm.BatchNorm, False), (gm.BatchNormLayer, False),
         (gm.BatchNormLayer, True)]
each_kind = pytest.mark.parametrize(
    ('kind', 'hybrid'), KINDS, ids=['scratch', 'layer', 'compiled'])


SHARE = 1 - float(np.float32(0.9))  # the operator's momentum is float32


def make_layer(case, kind=gm.BatchNormLayer, hybrid=False, **options):
    """A layer with the dtype and the values of a case."""
    layer = kind(**options)
    layer.initialize()
    layer.cast(case[0].dtype)
    for parameter, value in zip(layer.params.values(), case[1:], strict=True):
        parameter.shape = value.shape
        parameter.set_data(nd.array(value, dtype=parameter.dtype))
    layer.hybridize(hybrid)
    return layer


@pytest.mark.parametrize('training', [True, False])
@given(cases())
def test_block_from_scratch_against_float64(training, case):
    expected, tolerances = reference(*case, 1e-5, 0.1, training)
    layer, X = make_layer(case, gm.BatchNorm), nd.array(
        case[0], dtype=case[0].dtype)
    with autograd.train_mode() if training else autograd.predict_mode():
        Y = layer(X)
    results = (Y, layer.moving_mean.data(), layer.moving_var.data())
    for ours, true, tolerance in zip(results, expected, tolerances,
                                     strict=True):
        assert ours.dtype == case[0].dtype
        assert_allclose(ours.asnumpy(), true, rtol=0, atol=tolerance)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('hybrid', [False, True])
@given(cases())
def test_layer_against_float64(hybrid, training, case):
    """In a network, with the momentum of the other convention."""
    expected, tolerances = reference(*case, 1e-5, SHARE, training)
    layer, X = make_layer(case, momentum=0.9), nd.array(
        case[0], dtype=case[0].dtype)
    net = nn.HybridSequential()
    net.add(layer)
    net.hybridize(hybrid)
    with autograd.record(training):
        Y = net(X)
    if training:
        Y.backward()  # moves the statistics
    results = (Y, layer.moving_mean.data(), layer.moving_var.data())
    for ours, true, tolerance in zip(results, expected, tolerances,
                                     strict=True):
        assert ours.dtype == case[0].dtype
        assert_allclose(ours.asnumpy(), true, rtol=0, atol=tolerance)


def results_of(layer, X, dY, training, passes=1, X_req='write'):
    """Y, the gradients that are asked for, and the moving statistics."""
    X.attach_grad(X_req)
    for _ in range(passes):
        with autograd.record(training):
            Y = layer(X)
        Y.backward(dY, train_mode=training)
    parameters = list(layer.params.values())
    return [a.asnumpy() for a in (
        Y, X.grad, *(p.grad() for p in parameters[:2] if p.grad_req != 'null'),
        *(p.data() for p in parameters[2:]))]


@pytest.mark.parametrize('mode', ['training', 'testing', 'frozen'])
@pytest.mark.parametrize('hybrid', [False, True])
@pytest.mark.parametrize(('shape', 'axis'), [
    ((6, 3), 1), ((6, 3), -1), ((4, 3, 5), 1), ((4, 5, 3), 2),
    ((4, 2, 3, 5), 1), ((5, 1, 2, 1), 1), ((4, 3, 5, 2), 3),
    ((2, 3, 2, 2, 3), 1), ((2, 3, 2, 2, 3), -1)])
def test_layer_against_the_formula(shape, axis, hybrid, mode):
    """Output and gradients; the channels are moved to axis 1 and back."""
    rng, C = np.random.default_rng(0), shape[axis]
    X, dY = rng.normal(3, 2, shape), rng.normal(size=shape)
    values = [*rng.normal(size=(3, C)), rng.uniform(0.5, 2, C)]
    layer = make_layer([X, *values], hybrid=hybrid, axis=axis,
                       use_global_stats=mode == 'frozen')
    Y, dX, dgamma, dbeta, *moving = results_of(
        layer, nd.array(X, dtype='float64'), nd.array(dY, dtype='float64'),
        mode != 'testing')
    X, dY, Y, dX = (np.moveaxis(a, axis, 1).reshape(X.shape[0], C, -1)
                    if axis % X.ndim != 1 else a.reshape(*a.shape[:2], -1)
                    for a in (X, dY, Y, dX))
    batch = X.mean((0, 2)), X.var((0, 2))
    mean, var = batch if mode == 'training' else values[2:]
    X_hat = (X - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
    g = dY * values[0][:, None]
    through = g - (mode == 'training') * (
        g.mean((0, 2), keepdims=True)
        + X_hat * (g * X_hat).mean((0, 2), keepdims=True))
    share = SHARE * (mode == 'training')
    for ours, true in (
            (Y, X_hat * values[0][:, None] + values[1][:, None]),
            (dX, through / np.sqrt(var + 1e-5)[:, None]),
            (dgamma, (dY * X_hat).sum((0, 2))), (dbeta, dY.sum((0, 2))),
            (moving[0], (1 - share) * values[2] + share * batch[0]),
            (moving[1], (1 - share) * values[3] + share * batch[1])):
        assert_allclose(ours, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [True, False])
@each_kind
@pytest.mark.parametrize('shape', [(6, 3), (4, 2, 3, 5), (5, 1, 2, 1)])
def test_gradients_by_central_differences(shape, kind, hybrid, training):
    rng, C = np.random.default_rng(0), shape[1]
    case = [rng.normal(3, 2, shape), *rng.normal(size=(3, C)),
            rng.uniform(0.5, 2, C)]
    weight = rng.normal(size=shape)
    layer, X = make_layer(case, kind, hybrid), nd.array(case[0],
                                                        dtype='float64')
    _, *gradients, _, _ = results_of(layer, X, nd.array(
        weight, dtype='float64'), training)
    for value, gradient in zip(case, gradients, strict=False):
        numeric = np.empty_like(value)
        for i in np.ndindex(value.shape):
            kept, sides = value[i], []
            for step in (1e-5, -1e-5):
                value[i] = kept + step
                (Y, *_), _ = reference(*case, 1e-5, 0.1, training)
                sides.append((Y * weight).sum())
            value[i] = kept
            numeric[i] = (sides[0] - sides[1]) / 2e-5
        assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)
    total = abs(gradients[0].sum((0, *range(2, len(shape))))).max()
    assert (total < 1e-10) == training


@pytest.mark.parametrize(('kind', 'hybrid', 'null', 'frozen'), [
    (kind, hybrid, null, frozen) for kind, hybrid in KINDS
    for null in (False, True) for frozen in (False, True)
    if kind is gm.BatchNormLayer or not frozen])
def test_what_freezing_freezes(kind, hybrid, null, frozen):
    layer = kind(3, **({'use_global_stats': True} if frozen else {}))
    layer.initialize()
    layer.hybridize(hybrid)
    layer.gamma.grad_req = layer.beta.grad_req = 'null' if null else 'write'
    X = nd.random.normal(5, 2, shape=(8, 3))
    X.attach_grad()
    with autograd.record():
        loss = (layer(X) ** 2).sum()
    loss.backward()
    trainer = gluon.Trainer(layer.collect_params(), 'sgd')
    trainer.step(1)
    gamma, beta, mean, var = (p.data().asnumpy()
                              for p in layer.params.values())
    assert ((gamma == 1).all() and (beta == 0).all()) == null
    assert ((mean == 0).all() and (var == 1).all()) == frozen


@pytest.mark.parametrize('hybrid', [False, True])
@pytest.mark.parametrize('kwargs', [{'scale': False}, {'center': False},
                                    {'scale': False, 'center': False}])
def test_without_scale_or_center(kwargs, hybrid):
    """These parameters stay 1 and 0, and the rest is as MXNet's."""
    X, dY = (nd.random.normal(size, shape=(6, 3, 2)) for size in (3, 1))
    results = []
    for kind in (gm.BatchNormLayer, nn.BatchNorm):
        layer = kind(**kwargs)
        layer.initialize()
        layer.hybridize(hybrid)
        results.append(results_of(layer, X.copy(), dY, True))
        trainer = gluon.Trainer(layer.collect_params(), 'sgd')
        trainer.step(1)
        for name, first in (('gamma', 1), ('beta', 0)):
            off = not kwargs.get({'gamma': 'scale', 'beta': 'center'}[name],
                                 True)
            stayed = (getattr(layer, name).data().asnumpy() == first).all()
            assert stayed == off
    for ours, builtin in zip(*results, strict=True):
        assert_allclose(ours, builtin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('hybrid', [False, True])
@pytest.mark.parametrize('inside', [False, True])
def test_float16(inside, hybrid, array):
    """Numbers whose squares no float16 can hold; statistics in float32."""
    board = 512 * (-1.) ** np.indices((8, 2, 16, 16)).sum(0)
    noise = np.random.default_rng(0).normal(50, 1, (8, 2, 16, 16))
    for X, mean, var in ((board, 0, 512 ** 2), (noise, 50, 1)):
        layer = gm.BatchNormLayer()
        net = nn.HybridSequential()
        net.add(layer)
        net = net if inside else layer
        net.initialize()
        net.cast('float16')
        net.hybridize(hybrid)
        X = array(X, dtype='float16')
        X.attach_grad()
        with autograd.record():
            Y = net(X)
            loss = (Y * X).sum()
        loss.backward()
        assert Y.dtype == X.grad.dtype == np.float16
        assert {np.dtype(p.dtype) for p in layer.params.values()} == {
            np.dtype('float32')}
        exact = X.asnumpy().astype('float64')
        assert_allclose(Y.asnumpy(), (exact - exact.mean((0, 2, 3), keepdims=1)
                                      ) / exact.std((0, 2, 3), keepdims=1),
                        rtol=2e-3, atol=2e-3)
        assert_allclose(layer.moving_mean.data().asnumpy(), 0.1 * mean,
                        atol=0.01)
        assert_allclose(layer.moving_var.data().asnumpy(), 0.9 + 0.1 * var,
                        rtol=0.01)
        assert np.isfinite(X.grad.asnumpy()).all()


@each_kind
def test_float16_is_refused_without_cast(kind, hybrid):
    layer = kind(3)
    layer.initialize()
    layer.hybridize(hybrid)
    with pytest.raises(TypeError, match=r'^X: .*float32, got float16'):
        layer(nd.ones((4, 3), dtype='float16'))


def test_block_from_scratch_refuses_float16():
    layer = gm.BatchNorm(3)
    layer.initialize()
    layer.cast('float16')
    with pytest.raises(TypeError, match=r'^X: expected .*float32 or float64'):
        layer(nd.ones((4, 3), dtype='float16'))


def test_float16_in_a_compiled_network_without_cast():
    """Goes on in float32, as a symbol does not tell its dtype."""
    net = nn.HybridSequential()
    net.add(gm.BatchNormLayer())
    net.initialize()
    net.hybridize()
    with autograd.train_mode():
        Y = net(nd.array([[512.], [-512]] * 8, dtype='float16'))
    assert Y.dtype == np.float32
    assert_allclose(abs(Y.asnumpy()), 1, rtol=1e-5)


@pytest.mark.parametrize('dtype', ['int32', 'uint8'])
def test_cast_refuses(dtype):
    with pytest.raises(ValueError, match=r'^dtype: expected'):
        gm.BatchNormLayer(3).cast(dtype)


@pytest.mark.parametrize('beta', [0, 0.3])
@pytest.mark.parametrize('number', [100, 1e-3, 12345.678, -7])
@each_kind
def test_constant_channel_gives_beta(kind, hybrid, number, beta):
    layer = kind(1)
    layer.initialize()
    layer.hybridize(hybrid)
    layer.beta.set_data(nd.array([beta]))
    for shape in ((1, 1, 3, 3), (7, 1)):
        X = nd.full(shape, number)
        with autograd.train_mode():
            Y = layer(X).asnumpy()
        if kind is gm.BatchNorm or number in (100, -7):
            assert_array_equal(Y, np.float32(beta))
        else:  # the operator's sum may round
            assert_allclose(Y, operator(X).asnumpy() + np.float32(beta),
                            rtol=0, atol=1e-6)


def operator(X):
    """MXNet's operator alone, in training."""
    C = X.shape[1]
    with autograd.train_mode():
        return nd.BatchNorm(X, nd.ones(C), nd.zeros(C), nd.zeros(C),
                            nd.ones(C), fix_gamma=False, eps=1e-5)


@each_kind
@pytest.mark.parametrize('shape', [(16, 1), (4, 1, 2, 2)])
def test_large_mean_costs_no_more_than_the_operator(shape, kind, hybrid):
    X = nd.array((1000 + np.arange(16) * 1e-3).reshape(shape))
    exact = X.asnumpy().astype('float64')
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    layer = kind(1)
    layer.initialize()
    layer.hybridize(hybrid)
    with autograd.train_mode():
        error = abs(layer(X).asnumpy() - exact).max()
    allowed = abs(operator(X).asnumpy() - exact).max()
    assert error <= allowed < 0.05
    if kind is gm.BatchNorm:
        assert error < 1e-6


@pytest.mark.parametrize(('kind', 'hybrid', 'frozen'), [
    (kind, hybrid, frozen) for kind, hybrid in KINDS
    for frozen in (False, True) if kind is gm.BatchNormLayer or not frozen])
@pytest.mark.parametrize('inside', [False, True])
def test_negative_variance_is_refused(inside, frozen, kind, hybrid, array):
    """Also where the layer is a part of a compiled network."""
    layer = kind(3, **({'use_global_stats': True} if frozen else {}))
    net = nn.HybridSequential()
    net.add(layer)
    net = net if inside else layer
    net.initialize()
    net.hybridize(hybrid)
    X = array(np.ones((4, 3)), dtype='float32')
    net(X)  # makes the graph
    layer.moving_var.set_data(array([1, -0.5, 1]))
    with pytest.raises(ValueError, match=r'^moving_var: .* got -0.5'):
        net(X)
    if frozen:
        with autograd.train_mode(), pytest.raises(ValueError, match='got -0'):
            net(X)


def test_function_refuses_negative_variance():
    for mode in (autograd.train_mode, autograd.predict_mode):
        with mode(), pytest.raises(ValueError, match=r'^moving_var: expected'):
            gm.batch_norm(**{**GOOD, 'moving_var': nd.array([1, -1, 1])})


@each_kind
@pytest.mark.parametrize('shape', [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_batch_is_refused(shape, kind, hybrid):
    mx.npx.set_np()  # without it there are no empty arrays
    try:
        layer = kind(3)
        layer.initialize()
        layer.hybridize(hybrid)
        for mode in (autograd.train_mode, autograd.predict_mode):
            with mode(), pytest.raises(ValueError, match=r'^X: .*non-empty'):
                layer(mx.np.zeros(shape))
    finally:
        mx.npx.reset_np()


def test_statistics_are_not_recorded():
    layer, X = gm.BatchNorm(3), nd.random.normal(shape=(4, 3))
    layer.initialize()
    X.attach_grad()
    with autograd.record():
        layer(X)
        _, mean, _ = gm.batch_norm(X, nd.ones(3), nd.zeros(3), nd.zeros(3),
                                   nd.ones(3))
    with pytest.raises(mx.MXNetError, match='not in a computational graph'):
        mean.backward()


GOOD = {'X': nd.ones((2, 3)), 'gamma': nd.ones(3), 'beta': nd.zeros(3),
        'moving_mean': nd.zeros(3), 'moving_var': nd.ones(3)}


@pytest.mark.parametrize(('name', 'value'), [
    ('X', nd.zeros((2, 3, 4))), ('X', nd.zeros((2, 4))),
    ('gamma', nd.ones((1, 3))), ('beta', nd.ones(4)),
    ('moving_mean', nd.ones(4)), ('moving_var', nd.ones((1, 3))),
    ('eps', 0), ('eps', float('nan')), ('eps', float('inf')),
    ('momentum', -0.1), ('momentum', 1.1), ('momentum', float('nan'))])
def test_bad_values_are_named(name, value):
    name_told = 'gamma' if name == 'X' and value.ndim == 2 else name
    with pytest.raises(ValueError, match=f'^{name_told}: expected'):
        gm.batch_norm(**{**GOOD, name: value})


@pytest.mark.parametrize(('name', 'value'), [
    ('X', np.ones((2, 3))), ('X', nd.ones((2, 3), dtype='float16')),
    ('gamma', [1, 1, 1]), ('beta', nd.zeros(3, dtype='float64')),
    ('moving_mean', None), ('moving_var', nd.ones(3, dtype='float64')),
    ('eps', None), ('momentum', None), ('momentum', 'a')])
def test_bad_types_are_named(name, value):
    with pytest.raises(TypeError, match=f'^{name}: expected'):
        gm.batch_norm(**{**GOOD, name: value})


@each_kind
def test_training_needs_two_values(kind, hybrid):
    one = nd.ones((1, 3))
    with autograd.train_mode(), pytest.raises(ValueError, match='X: training'):
        gm.batch_norm(**{**GOOD, 'X': one})
    layer = kind()
    layer.initialize()
    layer.hybridize(hybrid)
    with autograd.train_mode(), pytest.raises(ValueError, match='X: training'):
        layer(one)
    assert layer(one).shape == (1, 3)  # testing one example is fine
    assert_array_equal(layer.moving_mean.data().asnumpy(), 0)


def test_a_frozen_layer_trains_with_one_value():
    layer = gm.BatchNormLayer(use_global_stats=True)
    layer.initialize()
    with autograd.train_mode():
        assert_allclose(layer(nd.full((1, 3), 7)).asnumpy(), 7, rtol=1e-4)


def test_compiled_network_as_its_text_says():
    """A single value gives beta there; another number of channels fails.

    The operator alone would read behind its parameters.
    """
    net = nn.HybridSequential()
    net.add(gm.BatchNormLayer(3))
    net.initialize()
    net.hybridize()
    with autograd.train_mode():
        assert_array_equal(net(nd.full((1, 3), 7)).asnumpy(), 0)
    with pytest.raises(mx.MXNetError, match=r'\(3 vs. 5\)'):
        net(nd.zeros((2, 5))).asnumpy()


@pytest.mark.parametrize('inside', [False, True])
def test_block_from_scratch_cannot_be_compiled(inside):
    layer = gm.BatchNorm(3)
    net = nn.HybridSequential()
    net.add(layer)
    net = net if inside else layer
    net.initialize()
    net(nd.ones((2, 3)))
    net.hybridize()
    with pytest.raises(TypeError, match=r'^X: .* BatchNorm cannot be hybrid'):
        net(nd.ones((2, 3)))
    net.hybridize(False)
    assert net(nd.ones((2, 3))).shape == (2, 3)


@pytest.mark.parametrize(('kind', 'kwargs', 'match'), [
    *((kind, {name: value}, f'{name}: expected .* got {value}')
      for kind in (gm.BatchNorm, gm.BatchNormLayer)
      for name, value in (('num_features', 0), ('num_features', -1),
                          ('eps', 0), ('momentum', 1.5))),
    (gm.BatchNorm, {'num_dims': 3}, 'num_dims: expected .* got 3'),
    (gm.BatchNormLayer, {'axis': -33}, 'axis: expected .* got -33')])
def test_constructor_refuses(kind, kwargs, match):
    with pytest.raises(ValueError, match=match):
        kind(**kwargs)


@pytest.mark.parametrize('kind', [gm.BatchNorm, gm.BatchNormLayer])
@pytest.mark.parametrize(('name', 'value'), [
    ('num_features', 2.5), ('num_features', '3'), ('eps', None),
    ('momentum', 'a')])
def test_constructor_refuses_types(kind, name, value):
    with pytest.raises(TypeError, match=f'^{name}: expected'):
        kind(**{name: value})


def test_momentum_keeps_the_meaning_of_its_source():
    """0.1 of the new value in the book's block, 0.9 of the old in ours."""
    X = nd.random.normal(5, 2, shape=(64, 3))
    for kind, kwargs in ((gm.BatchNorm, {}), (gm.BatchNormLayer, {}),
                         (gm.BatchNorm, {'momentum': 0.1}),
                         (gm.BatchNormLayer, {'momentum': 0.9})):
        layer = kind(**kwargs)
        layer.initialize()
        with autograd.record():
            Y = layer(X)
        Y.backward()
        assert_allclose(layer.moving_mean.data().asnumpy(),
                        0.1 * X.asnumpy().mean(0), rtol=1e-5)


@pytest.mark.parametrize(('error', 'name', 'change'), [
    (ValueError, 'batch_size', {'batch_size': 0}),
    (ValueError, 'labels', {'labels': np.zeros(9)}),
    (TypeError, 'images', {'images': np.ones((5, 28, 28))})])
def test_batches_refuses(error, name, change):
    good = {'images': np.ones((5, 28, 28), 'uint8'), 'labels': np.zeros(5),
            'batch_size': 2}
    with pytest.raises(error, match=f'^{name}: expected'):
        gm.Batches(**good | change)


@pytest.mark.parametrize(('kind', 'kwargs', 'shape', 'match'), [
    (gm.BatchNorm, {}, (2, 3, 4), r'.*H, W\), got shape \(2, 3, 4\)'),
    (gm.BatchNorm, {'num_dims': 4}, (2, 3), r'4 dimensions, got shape'),
    (gm.BatchNorm, {'num_dims': 2}, (2, 3, 1, 1), '2 dimensions, got shape'),
    *((kind, {'num_features': 3}, shape, r'3 channels.*got shape \(2, ')
      for kind in (gm.BatchNorm, gm.BatchNormLayer)
      for shape in ((2, 5), (2, 1), (2, 5, 3, 3))),
    (gm.BatchNormLayer, {}, (3,), r'.*channels on axis 1, got shape \(3,\)'),
    (gm.BatchNormLayer, {'axis': 3}, (2, 3, 4), '.*channels on axis 3, got'),
    (gm.BatchNormLayer, {'axis': -3}, (2, 3), '.*channels on axis -3, got'),
    (gm.BatchNormLayer, {'num_features': 3, 'axis': -1}, (2, 3, 4),
     r'3 channels on axis -1, got shape \(2, 3, 4\)')])
@pytest.mark.parametrize('hybrid', [False, True])
def test_wrong_input_is_refused(hybrid, kind, kwargs, shape, match, array):
    layer = kind(**kwargs)
    layer.initialize()
    layer.hybridize(hybrid and kind is gm.BatchNormLayer)
    with pytest.raises(ValueError, match=f'^X: expected {match}'):
        layer(array(np.ones(shape), dtype='float32'))


@each_kind
def test_channels_are_found(kind, hybrid, array):
    layer = kind()
    layer.initialize()
    layer.hybridize(hybrid)
    Y = layer(array(np.ones((2, 5, 3, 4)), dtype='float32'))
    assert Y.shape == (2, 5, 3, 4)
    assert {p.shape for p in layer.params.values()} == {(5,)}
    with pytest.raises(ValueError, match='5 channels'):
        layer(array(np.ones((2, 4)), dtype='float32'))
    assert repr(layer) == f'{kind.__name__}(5)'


def test_channels_are_found_on_the_last_axis(array):
    net = nn.HybridSequential()
    net.add(gm.BatchNormLayer(axis=-1))
    net.initialize()
    net.hybridize()
    assert net(array(np.ones((2, 3, 5)), dtype='float32')).shape == (2, 3, 5)
    assert net[0].gamma.shape == (5,)


@pytest.mark.parametrize('kind', [gm.BatchNorm, gm.BatchNormLayer])
def test_parameters_are_registered(kind):
    layer = kind(3)
    kinds = {name.split('_', 1)[1]: p.grad_req
             for name, p in layer.collect_params().items()}
    assert kinds == {'gamma': 'write', 'beta': 'write', 'moving_mean': 'null',
                     'moving_var': 'null'}
    layer.initialize(init.Constant(7))  # must not reach these
    values = [p.data().asnumpy()[0] for p in layer.params.values()]
    assert values == [1, 0, 0, 1]


def test_shared_parameters():
    """Two layers share on request, and never without one."""
    first = gm.BatchNormLayer(3)
    second = gm.BatchNormLayer(3, params=first.params)
    other = gm.BatchNormLayer(3)
    assert second.moving_var is first.moving_var is not other.moving_var
    for layer in (first, other):
        layer.initialize()
    first.moving_var.set_data(nd.array([1, -1, 1]))
    with pytest.raises(ValueError, match='moving_var'):
        second(nd.ones((2, 3)))
    other(nd.ones((2, 3)))


def network(norm=gm.BatchNormLayer):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(16, 3), norm(), nn.Activation('sigmoid'),
            nn.Conv2D(32, 3), norm(), nn.Activation('sigmoid'),
            nn.AvgPool2D(2), nn.Conv2D(8, 1), norm(), nn.Dense(64), norm(),
            nn.Activation('sigmoid'), nn.Dense(10))
    net.initialize(init.Xavier())
    return net


def copy_values(source, target):
    for a, b in zip(source.collect_params().values(),
                    target.collect_params().values(), strict=True):
        b.set_data(a.data())


@pytest.mark.timeout(120)  # a deadlock would wait for ever
@pytest.mark.parametrize('static', [False, True])
def test_compiled_network_trains_like_the_builtin_one(static, array):
    """Every step, on new numbers: a race shows in some steps only."""
    rng = np.random.default_rng(0)

    def draw():
        return array(rng.uniform(size=(32, 1, 20, 20)), dtype='float32')

    ours, builtin, X = network(), network(nn.BatchNorm), draw()
    ours(X), builtin(X)
    ours.hybridize(static_alloc=static)
    loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
    trainers = [(net, gluon.Trainer(net.collect_params(), 'sgd',
                                    {'learning_rate': 0.05}))
                for net in (ours, builtin)]
    labels = array(np.arange(32) % 10)
    for _ in range(100 if SOAK else 8):
        copy_values(ours, builtin)
        X, results = draw(), []
        for net, trainer in trainers:
            with autograd.record():
                loss = loss_of(net(X), labels).mean()
            loss.backward()
            trainer.step(1)
            results.append([loss.asnumpy(), *(
                p.data().asnumpy() if p.grad_req == 'null'
                else p.grad().asnumpy()
                for p in net.collect_params().values())])
        for a, b in zip(*results, strict=True):
            assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_modes_of_a_compiled_network(array):
    net = network()
    X = array(np.random.default_rng(0).normal(5, size=(16, 1, 16, 16)),
              dtype='float32')

    def train():
        with autograd.record():
            Y = net(X)
        Y.backward()
        return Y.asnumpy()

    net(X)
    plain = train()
    mean = net[1].moving_mean.data().asnumpy().copy()
    assert abs(mean).max() > 0
    tested = net(X).asnumpy()
    net.hybridize()
    for _ in range(2):
        assert_allclose(net(X).asnumpy(), tested, rtol=1e-4, atol=1e-5)
        assert_array_equal(net[1].moving_mean.data().asnumpy(), mean)
    assert_allclose(train(), plain, rtol=1e-4, atol=1e-4)
    assert_allclose(net[1].moving_mean.data().asnumpy(), 1.9 * mean, rtol=1e-4)
    assert abs(net(X).asnumpy() - tested).max() > 1e-3
    net.hybridize(False)
    assert_allclose(train(), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', [gm.BatchNorm, gm.BatchNormLayer])
def test_plain_sequential(kind):
    net, X = nn.Sequential(), nd.random.normal(shape=(8, 3))
    net.add(kind(), nn.Dense(2))
    net.initialize()
    with autograd.record():
        Y = net(X)
    Y.backward()
    assert_allclose(net[0].moving_mean.data().asnumpy(),
                    0.1 * X.asnumpy().mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('hybrid', [False, True])
def test_saved_and_loaded(tmp_path, hybrid, array):
    X = array(np.random.default_rng(0).normal(3, size=(8, 1, 16, 16)),
              dtype='float32')
    net, copy = network(), network()
    net.hybridize(hybrid)
    for _ in range(3):
        with autograd.record():
            Y = net(X)
        Y.backward()
    path = str(tmp_path / 'net.params')
    net.save_parameters(path)
    copy.load_parameters(path)
    assert abs(copy[1].moving_mean.data().asnumpy()).max() > 0
    assert_allclose(copy(X).asnumpy(), net(X).asnumpy(), rtol=1e-4, atol=1e-5)


@each_kind
def test_statistics_live_on_the_device_of_the_input(kind, hybrid):
    layer = kind()
    devices = [mx.cpu(0), mx.cpu(1)]
    layer.initialize(ctx=devices)
    layer.hybridize(hybrid)
    for i, device in enumerate(devices):
        X = nd.random.normal(10 * i, shape=(32, 3), ctx=device)
        with autograd.record():
            Y = layer(X)
        Y.backward()
        assert Y.context == device
        mean = layer.moving_mean.data(device)
        assert mean.context == device
        assert_allclose(mean.asnumpy(), 0.1 * X.asnumpy().mean(0), rtol=1e-4,
                        atol=1e-5)


@each_kind
def test_gpu(kind, hybrid):
    if not mx.context.num_gpus():
        pytest.skip('MXNet sees no GPU here')
    layer, X = kind(), nd.random.normal(shape=(8, 3, 4, 5))
    layer.initialize(ctx=mx.gpu())
    layer.hybridize(hybrid)
    with autograd.record():
        Y = layer(X.as_in_context(mx.gpu()))
    Y.backward()
    assert Y.context == layer.moving_mean.data().context == mx.gpu()
    with autograd.train_mode():
        expected, mean, _ = gm.batch_norm(X, nd.ones(3), nd.zeros(3),
                                          nd.zeros(3), nd.ones(3))
    assert_allclose(Y.asnumpy(), expected.asnumpy(), rtol=1e-4, atol=1e-5)
    assert_allclose(layer.moving_mean.data().asnumpy(), mean.asnumpy(),
                    rtol=1e-4, atol=1e-5)


def test_function_returns_the_kind_it_got(array):
    arrays = [array(a.asnumpy()) for a in GOOD.values()]
    kinds = {type(a) for a in arrays}
    for mode in (autograd.train_mode, autograd.predict_mode):
        with mode():
            assert {type(a) for a in gm.batch_norm(*arrays)} == kinds


# A layer is used in the parent, then in a child; plain, then compiled
FORK = '''
import os
import signal
from mxnet.gluon import nn
from d2ltvm.mxnet_today import autograd, nd


def step():
    with autograd.record():
        Y = net(nd.arange(50).reshape((2, 1, 5, 5)))
    Y.backward()
    return net[1].moving_mean.data().asnumpy()


for hybrid in (False, True):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), gm.BatchNormLayer(), nn.Dense(2))
    net.initialize(mx.init.Xavier())
    net.hybridize(hybrid)
    first = step()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if (abs(step()) > 1.5 * abs(first)).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (abs(step()) > 1.5 * abs(first)).all()
'''


@pytest.mark.timeout(120)  # a deadlock would wait for ever
@pytest.mark.parametrize(('before', 'after'), [
    (0, 1), later(1, 0), later(0, 0), later(1, 1)])
def test_import_leaves_the_switch_alone(before, after):
    """Works with the switch thrown before or after it, and after a fork."""
    program = f'''
import sys
import numpy as np
from d2ltvm.mxnet_today import mx
mx.npx.set_np(shape={before}, array={before})
from d2ltvm import gluon_module as gm
assert mx.util.is_np_array() == mx.util.is_np_shape() == {bool(before)}
assert {{'d2l', 'matplotlib'}} <= set(sys.modules) and 'tvm' not in sys.modules
{'' if before else FORK}
mx.npx.set_np(shape={after}, array={after})
array = mx.np.array if {after} else mx.nd.array
results = []
for kind, hybrid in ((gm.BatchNorm, False), (gm.BatchNormLayer, False),
                     (gm.BatchNormLayer, True)):
    layer = kind()
    layer.initialize()
    layer.hybridize(hybrid)
    X = array(np.arange(24).reshape(4, 2, 3, 1) ** 2, dtype='float32')
    X.attach_grad()
    with mx.autograd.record():
        loss = (layer(X) ** 3).sum()
    loss.backward()
    results.append((X.grad.asnumpy(), layer.moving_var.data().asnumpy()))
for compared in results[1:]:
    for a, b in zip(results[0], compared):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
assert gm.BNLeNet()(array(np.zeros((2, 1, 28, 28)), dtype='float32')
                    ).shape == (2, 10)
'''
    ran = subprocess.run([sys.executable, '-c', program], check=False,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 'Error' not in ran.stdout + ran.stderr


def test_networks(array):
    X = array(np.random.default_rng(0).uniform(size=(4, 1, 28, 28)),
              dtype='float32')
    models = [make(lr=0.3, num_classes=7) for make in (gm.BNLeNetScratch,
                                                       gm.BNLeNet)]
    outputs = [model(X) for model in models]
    for model, Y in zip(models, outputs, strict=True):
        assert isinstance(model, d2l.Classifier)
        assert model.lr == 0.3 and Y.shape == (4, 7)
    assert [type(b).__name__ for b in models[0].net] == [
        *2 * ['Conv2D', 'BatchNorm', 'Activation', 'AvgPool2D'],
        *2 * ['Dense', 'BatchNorm', 'Activation'], 'Dense']
    copy_values(*models)
    with autograd.train_mode():
        outputs = [model(X).asnumpy() for model in models]
    assert_allclose(*outputs, rtol=1e-3, atol=1e-4)


def part(n):
    digits = digits_28()
    return digits._replace(train_images=digits.train_images[:n],
                           train_labels=digits.train_labels[:n])


@pytest.mark.parametrize(('n', 'count', 'last'), [(20, 3, 4), (17, 2, 9),
                                                  (16, 2, 8), (1, 1, 1)])
def test_pictures(n, count, last, array):
    digits = part(n)
    data = gm.Pictures(digits, batch_size=8, seed=1)
    train = data.train_dataloader()
    seen = [(X.asnumpy(), y.asnumpy()) for X, y in train]
    assert len(seen) == len(train) == count and len(seen[-1][0]) == last
    X, y = (np.concatenate(a) for a in zip(*seen, strict=True))
    assert X.shape == (n, 1, 28, 28) and X.dtype == np.float32
    assert y.shape == (n,) and y.dtype == np.int32
    assert X.min() >= 0 and X.max() <= 1

    def rows(images, labels):
        return sorted(map(bytes, np.column_stack(
            [np.rint(255 * images).reshape(n, -1), labels]).astype('uint8')))

    assert rows(X, y) == rows(digits.train_images / 255, digits.train_labels)
    again = gm.Pictures(digits, batch_size=8, seed=1).train_dataloader()
    assert_array_equal(next(iter(again))[1].asnumpy(), seen[0][1])
    if n > 1:  # another pass, another order
        assert any((a.asnumpy() != b).any() for (_, a), (_, b) in
                   zip(train, seen, strict=True))
    validation = data.val_dataloader()
    y = np.concatenate([y.asnumpy() for _, y in validation])
    assert_array_equal(y, digits.test_labels)
    kind, = {type(a) for batch in train for a in batch}
    assert kind is type(array([0]))


@pytest.mark.parametrize(('found', 'chosen', 'asked', 'used'), [
    (0, 'cpu', 1, 1), (1, 'gpu', 1, 1), (1, 'gpu', 0, 0), (1, 'cpu', 1, 0),
    (1, 'cpu', 0, 0)])
def test_fit_takes_no_card_without_programs(monkeypatch, found, chosen,
                                            asked, used):
    """As `choose_device` says; d2l's trainer takes what it finds."""
    seen = []

    class Trainer:
        def __init__(self, max_epochs, num_gpus):
            seen.append(num_gpus)

        def fit(self, model, data):
            model.board.data = {'train_loss': [], 'val_loss': [],
                                'val_acc': []}

    monkeypatch.setattr(gm.d2l, 'Trainer', Trainer)
    monkeypatch.setattr(mx.context, 'num_gpus', lambda: found)
    monkeypatch.setattr(gm, 'choose_device', getattr(mx, chosen))
    gm.fit(gm.BNLeNet(), None, 1, asked)
    assert seen == [used]


@pytest.mark.timeout(120)
@pytest.mark.parametrize('hybrid', [False, True])
def test_fit(hybrid, array, capfd):
    digits = part(320)
    model = (gm.BNLeNet if hybrid else gm.BNLeNetScratch)(lr=0.5)
    model.net.hybridize(hybrid)
    data = gm.Pictures(digits, batch_size=32)
    history = gm.fit(model, data, max_epochs=2)
    assert history.shape == (2, 3) and history.dtype == np.float64
    assert history[1, 0] < history[0, 0]  # it learns
    X = array(digits.test_images[:, None] / 255, dtype='float32')
    correct = model(X).asnumpy().argmax(1) == digits.test_labels
    assert_allclose(history[1, 2], correct.mean(), rtol=1e-5)
    assert gm.fit(model, data, max_epochs=1).shape == (1, 3)  # starts anew
    assert capfd.readouterr() == ('', '')


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
def test_property_pictures(array, n, batch_size, seed):
    """Each training image once in every pass, with its label."""
    images = np.arange(n, dtype='uint8')[:, None, None] + np.zeros(
        (1, 28, 28), 'uint8')
    labels = images[:, 0, 0]
    data = gm.Pictures(Digits(images, labels, images, labels, 'numbers'),
                       batch_size, seed)
    train, test = data.train_dataloader(), data.val_dataloader()
    for loader in (train, train, test):
        seen = [(X.asnumpy(), y.asnumpy()) for X, y in loader]
        assert len(seen) == len(loader)
        order = np.concatenate([y for _, y in seen])
        assert_array_equal(np.sort(order), labels)
        assert loader is train or (order == labels).all()
        for X, y in seen:
            assert X.shape == (len(y), 1, 28, 28)
            assert_allclose(255 * X[:, 0, 3, 5], y, rtol=1e-6)
