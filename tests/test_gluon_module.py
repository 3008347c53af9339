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


def make_layer(case, make=gm.BatchNorm, **kwargs):
    layer = make(**kwargs)
    layer.initialize()
    layer.cast(case[0].dtype)
    values = zip(('gamma', 'beta', 'moving_mean', 'moving_var'), case[1:],
                 strict=True)
    for name, value in values:
        parameter = getattr(layer, name)
        parameter.shape = value.shape
        parameter.set_data(nd.array(value, dtype=value.dtype))
    return layer


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('hybrid', [False, True])
@given(cases())
def test_block_against_float64(hybrid, training, case):
    expected, tolerances = reference(*case, 1e-5, 0.1, training)
    layer, X = make_layer(case), nd.array(case[0], dtype=case[0].dtype)
    net = nn.HybridSequential()
    net.add(layer)
    net.hybridize(hybrid)
    with autograd.train_mode() if training else autograd.predict_mode():
        Y = net(X)
    results = (Y, layer.moving_mean.data(), layer.moving_var.data())
    for ours, true, tolerance in zip(results, expected, tolerances,
                                     strict=True):
        assert ours.dtype == case[0].dtype
        assert_allclose(ours.asnumpy(), true, rtol=0, atol=tolerance)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('hybrid', [False, True])
@pytest.mark.parametrize('shape', [(6, 3), (4, 2, 3, 5), (5, 1, 2, 1)])
def test_gradients_by_central_differences(shape, hybrid, training):
    rng, C = np.random.default_rng(0), shape[1]
    case = [rng.normal(3, 2, shape), *rng.normal(size=(3, C)),
            rng.uniform(0.5, 2, C)]
    weight = rng.normal(size=shape)
    layer, X = make_layer(case), nd.array(case[0], dtype='float64')
    layer.hybridize(hybrid)
    X.attach_grad()
    with autograd.record(training):
        Y = layer(X)
    Y.backward(nd.array(weight, dtype='float64'))
    gradients = X.grad, layer.gamma.grad(), layer.beta.grad()
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
        assert_allclose(gradient.asnumpy(), numeric, rtol=1e-5, atol=1e-7)
    total = abs(X.grad.asnumpy().sum((0, *range(2, len(shape))))).max()
    assert (total < 1e-10) == training


@pytest.mark.parametrize('hybrid', [False, True])
def test_gradients_are_added_if_asked(hybrid):
    layer, X = gm.BatchNorm(3), nd.array(np.random.default_rng(0).normal(
        size=(6, 3)))
    layer.initialize()
    layer.hybridize(hybrid)
    sums = []
    for how in ('write', 'add'):
        layer.gamma.grad_req = how
        X.attach_grad(how)
        for _ in range(2):
            with autograd.record():
                loss = (layer(X) ** 3 * nd.arange(18).reshape((6, 3))).sum()
            loss.backward()
        sums.append([a.asnumpy() for a in (X.grad, layer.gamma.grad())])
    for once, twice in zip(*sums, strict=True):
        assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-3)


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


def test_training_needs_two_values():
    one = nd.ones((1, 3))
    with autograd.train_mode(), pytest.raises(ValueError, match='X: training'):
        gm.batch_norm(**{**GOOD, 'X': one})
    layer = gm.BatchNorm()
    layer.initialize()
    with autograd.train_mode(), pytest.raises(ValueError, match='X: training'):
        layer(one)
    assert_array_equal(layer.moving_mean.data().asnumpy(), 0)
    assert layer(one).shape == (1, 3)  # testing one example is fine


def test_compiled_network_refuses(capfd):
    def network(**kwargs):
        net = nn.HybridSequential()
        net.add(gm.BatchNorm(**kwargs))
        net.initialize()
        net.hybridize()
        return net

    with pytest.raises(ValueError, match='cannot be inferred'):
        network()(nd.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match='cannot be inferred'):
        network(num_dims=4)(nd.zeros((2, 3)))
    printed = capfd.readouterr().out
    assert 'X: expected 2 or 4 dimensions, got 3' in printed
    assert 'X: expected 4 dimensions, got 2' in printed
    with pytest.raises(mx.MXNetError, match=r'Provided = \[3\].*\[5\]'):
        network(num_features=3)(nd.zeros((2, 5)))
    with autograd.train_mode(), pytest.raises(mx.MXNetError):
        network()(nd.zeros((1, 3))).asnumpy()
    assert 'X: training needs more than one value' in capfd.readouterr().out


@pytest.mark.parametrize(('kwargs', 'match'), [
    ({'num_features': 0}, 'num_features: .* got 0'),
    ({'num_features': -1}, 'num_features: .* got -1'),
    ({'num_dims': 3}, 'num_dims: expected 2, 4 or None, got 3'),
    ({'eps': 0}, 'eps: .* got 0'),
    ({'momentum': 1.5}, 'momentum: expected 0 to 1, got 1.5')])
def test_constructor_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match):
        gm.BatchNorm(**kwargs)


@pytest.mark.parametrize(('name', 'value'), [
    ('num_features', 2.5), ('num_features', '3'), ('eps', None),
    ('momentum', 'a')])
def test_constructor_refuses_types(name, value):
    with pytest.raises(TypeError, match=f'^{name}: expected'):
        gm.BatchNorm(**{name: value})


@pytest.mark.parametrize(('error', 'name', 'change'), [
    (ValueError, 'batch_size', {'batch_size': 0}),
    (ValueError, 'labels', {'labels': np.zeros(9)}),
    (TypeError, 'images', {'images': np.ones((5, 28, 28))})])
def test_batches_refuses(error, name, change):
    good = {'images': np.ones((5, 28, 28), 'uint8'), 'labels': np.zeros(5),
            'batch_size': 2}
    with pytest.raises(error, match=f'^{name}: expected'):
        gm.Batches(**good | change)


@pytest.mark.parametrize(('kwargs', 'shape', 'match'), [
    ({}, (2, 3, 4), r'2 or 4 dimensions, got shape \(2, 3, 4\)'),
    ({'num_dims': 4}, (2, 3), r'4 dimensions, got shape \(2, 3\)'),
    ({'num_dims': 2}, (2, 3, 1, 1), '2 dimensions, got shape'),
    ({'num_features': 3}, (2, 5), r'3 channels.*got shape \(2, 5\)'),
    ({'num_features': 3}, (2, 1), r'3 channels.*got shape \(2, 1\)')])
@pytest.mark.parametrize('hybrid', [False, True])
def test_wrong_input_is_refused(hybrid, kwargs, shape, match, array):
    layer = gm.BatchNorm(**kwargs)
    layer.initialize()
    layer.hybridize(hybrid)
    with pytest.raises(ValueError, match=f'X: expected {match}'):
        layer(array(np.ones(shape), dtype='float32'))


@pytest.mark.parametrize('hybrid', [False, True])
def test_channels_are_found(hybrid, array):
    layer = gm.BatchNorm()
    layer.initialize()
    layer.hybridize(hybrid)
    Y = layer(array(np.ones((2, 5, 3, 4)), dtype='float32'))
    assert Y.shape == (2, 5, 3, 4)
    assert {p.shape for p in layer.params.values()} == {(5,)}
    with pytest.raises(ValueError, match='5 channels'):
        layer(array(np.ones((2, 4)), dtype='float32'))
    assert '5' in repr(layer)


def test_parameters_are_registered():
    layer = gm.BatchNorm(3)
    kinds = {name.split('_', 1)[1]: p.grad_req
             for name, p in layer.collect_params().items()}
    assert kinds == {'gamma': 'write', 'beta': 'write', 'moving_mean': 'null',
                     'moving_var': 'null'}
    layer.initialize(init.Constant(7))  # must not reach these
    values = [p.data().asnumpy()[0] for p in layer.params.values()]
    assert values == [1, 0, 0, 1]


def network(norm=gm.BatchNorm):
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
    for _ in range(25):
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
    net(X)
    with autograd.record():
        plain = net(X).asnumpy()
    mean = net[1].moving_mean.data().asnumpy().copy()
    assert abs(mean).max() > 0
    tested = net(X).asnumpy()
    net.hybridize()
    for _ in range(2):
        assert_allclose(net(X).asnumpy(), tested, rtol=1e-4, atol=1e-5)
        assert_array_equal(net[1].moving_mean.data().asnumpy(), mean)
    with autograd.train_mode():
        assert_allclose(net(X).asnumpy(), plain, rtol=1e-4, atol=1e-4)
    assert_allclose(net[1].moving_mean.data().asnumpy(), 1.9 * mean, rtol=1e-4)
    assert abs(net(X).asnumpy() - tested).max() > 1e-3
    net.hybridize(False)
    with autograd.train_mode():
        assert_allclose(net(X).asnumpy(), plain, rtol=1e-4, atol=1e-4)


def test_plain_sequential():
    net, X = nn.Sequential(), nd.random.normal(shape=(8, 3))
    net.add(gm.BatchNorm(), nn.Dense(2))
    net.initialize()
    with autograd.record():
        net(X)
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
            net(X)
    path = str(tmp_path / 'net.params')
    net.save_parameters(path)
    copy.load_parameters(path)
    assert abs(copy[1].moving_mean.data().asnumpy()).max() > 0
    assert_allclose(copy(X).asnumpy(), net(X).asnumpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('hybrid', [False, True])
def test_statistics_live_on_the_device_of_the_input(hybrid):
    layer = gm.BatchNorm()
    devices = [mx.cpu(0), mx.cpu(1)]
    layer.initialize(ctx=devices)
    layer.hybridize(hybrid)
    for i, device in enumerate(devices):
        X = nd.random.normal(10 * i, shape=(32, 3), ctx=device)
        with autograd.record():
            Y = layer(X)
        assert Y.context == device
        mean = layer.moving_mean.data(device)
        assert mean.context == device
        assert_allclose(mean.asnumpy(), 0.1 * X.asnumpy().mean(0), rtol=1e-4,
                        atol=1e-5)


@pytest.mark.parametrize('hybrid', [False, True])
def test_gpu(hybrid):
    if not mx.context.num_gpus():
        pytest.skip('MXNet sees no GPU here')
    layer, X = gm.BatchNorm(), nd.random.normal(shape=(8, 3, 4, 5))
    layer.initialize(ctx=mx.gpu())
    layer.hybridize(hybrid)
    with autograd.record():
        Y = layer(X.as_in_context(mx.gpu()))
    assert Y.context == layer.moving_mean.data().context == mx.gpu()
    with autograd.train_mode():
        expected, *_ = gm.batch_norm(X, nd.ones(3), nd.zeros(3), nd.zeros(3),
                                     nd.ones(3))
    assert_allclose(Y.asnumpy(), expected.asnumpy(), rtol=1e-4, atol=1e-5)


def test_function_returns_the_kind_it_got(array):
    arrays = [array(a.asnumpy()) for a in GOOD.values()]
    kinds = {type(a) for a in arrays}
    for mode in (autograd.train_mode, autograd.predict_mode):
        with mode():
            assert {type(a) for a in gm.batch_norm(*arrays)} == kinds


@pytest.mark.parametrize(('before', 'after'), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_import_leaves_the_switch_alone(before, after):
    """And works with the switch thrown before or after the import."""
    program = f'''
import numpy as np
from d2ltvm.mxnet_today import mx
mx.npx.set_np(shape={before}, array={before})
from d2ltvm import gluon_module as gm
assert mx.util.is_np_array() == mx.util.is_np_shape() == {bool(before)}
mx.npx.set_np(shape={after}, array={after})
array = mx.np.array if {after} else mx.nd.array
results = []
for hybrid in (False, True):
    layer = gm.BatchNorm()
    layer.initialize()
    layer.hybridize(hybrid)
    X = array(np.arange(24).reshape(4, 2, 3, 1) ** 2, dtype='float32')
    X.attach_grad()
    with mx.autograd.record():
        loss = (layer(X) ** 3).sum()
    loss.backward()
    results.append((X.grad.asnumpy(), layer.moving_var.data().asnumpy()))
for a, b in zip(*results):
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


@pytest.mark.timeout(120)
@pytest.mark.parametrize('hybrid', [False, True])
def test_fit(hybrid, array, capfd):
    digits = part(640)
    model = gm.BNLeNetScratch(lr=0.5)
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
