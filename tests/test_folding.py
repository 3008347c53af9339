"""The fold against MXNet in float64, its refusals, the network in Relax."""
import subprocess
import sys

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from tvm import relax
from tvm_ffi import structural_equal

from d2ltvm import folding
from d2ltvm import from_scratch as fs
from d2ltvm.mnist import Digits
from d2ltvm.mxnet_today import mx, nd

# The biggest relative error of one rounding
UNIT = {'float32': 2.0 ** -24, 'float64': 2.0 ** -53}


def linear(X, W, b, kind, groups=1, **options):
    """The linear layer by MXNet, in float64."""
    X, W = (nd.array(a, dtype='float64') for a in (X, W))
    outputs = W.shape[1] * groups if kind == 'transposed' else len(W)
    b = nd.zeros(outputs, dtype='float64') if b is None else nd.array(
        b, dtype='float64')
    if kind == 'dense':
        return (nd.dot(X, W.T) + b).asnumpy()
    operator = nd.Convolution if kind == 'conv' else nd.Deconvolution
    return operator(X, W, b, kernel=W.shape[2:], num_filter=outputs,
                    num_group=groups, no_bias=False, **options).asnumpy()


def per_channel(X, *arrays):
    return [a.astype('float64').reshape((1, -1) + (1,) * (X.ndim - 2))
            for a in arrays]


def normalize(X, gamma, beta, mean, var, eps):
    gamma, beta, mean, var = per_channel(X, gamma, beta, mean, var)
    return gamma * (X - mean) / np.sqrt(var + eps) + beta


@st.composite
def problems(draw, before=False):
    """A linear layer, its input, a normalization, and options of MXNet."""
    kind = draw(st.sampled_from(['conv', 'conv', 'dense']
                                + ([] if before else ['transposed'] * 2)))
    dtype = draw(st.sampled_from(['float32', 'float64']))
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32)))
    size = draw(st.sampled_from([1e-8, 1, 1e8]))
    groups = 1 if kind == 'dense' else draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    rank = 0 if kind == 'dense' else draw(
        st.integers(1 if kind == 'conv' else 2, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape = ((inputs, outputs // groups) if kind == 'transposed'
             else (outputs, inputs // groups))
    X = rng.normal(draw(st.sampled_from([0, 1000])), 1, (
        draw(st.integers(1, 3)), inputs, *(7, 6)[:rank]))
    W = size * rng.normal(size=(*shape, *kernel))
    b = size * rng.normal(size=outputs) if draw(st.booleans()) else None
    channels = inputs if before else outputs
    gamma, beta, mean, var = rng.normal(size=(4, channels))
    var = abs(var) * draw(st.sampled_from([0, 1e-12, 1, 1e12]))
    arrays = [None if a is None else a.astype(dtype)
              for a in (W, b, gamma, beta, size * mean, var)]
    options = {} if kind == 'dense' else {
        'stride': tuple(draw(st.integers(1, 3)) for _ in kernel)}
    if kind == 'conv':
        options['dilate'] = tuple(draw(st.integers(1, 2)) for _ in kernel)
    if kind != 'dense' and not before:
        options['pad'] = tuple(draw(st.integers(0, n - 1)) for n in kernel)
    return kind, groups, X, arrays, options, draw(
        st.sampled_from([1e-5, 1e-3, 1.0]))


@pytest.mark.usefixtures('semantics')
@given(problems())
def test_fold_after(problem):
    """No more error than the rounding of each result allows."""
    kind, groups, X, (W, b, *norm), options, eps = problem
    kept = [a if a is None else a.copy() for a in (W, b, *norm)]
    new_W, new_b = folding.fold_batch_norm(W, b, *norm, eps, kind,
                                           groups=groups)
    for a, old in zip((W, b, *norm), kept, strict=True):
        assert_array_equal(a, old)
    assert new_W.dtype == new_b.dtype == W.dtype
    assert new_W.shape == W.shape

    options['groups'] = groups
    Y = normalize(linear(X, W, b, kind, **options), *norm, eps)
    folded = linear(X, new_W, new_b, kind, **options)
    terms = linear(abs(X), abs(new_W), abs(new_b), kind, **options)
    # the terms that cancel in the layers apart, in float64
    gamma, beta, mean, var = per_channel(Y, *norm)
    size = linear(abs(X), abs(W), None if b is None else abs(b), kind,
                  **options) + abs(mean)
    size = size * abs(gamma) / np.sqrt(var + eps) + abs(beta)
    allowed = UNIT[str(W.dtype)] * terms + 1e-13 * size
    assert (abs(folded - Y) <= 1.01 * allowed).all()


@pytest.mark.usefixtures('semantics')
@given(problems(before=True))
def test_fold_before(problem):
    kind, groups, X, (W, b, *norm), options, eps = problem
    new_W, new_b = folding.fold_batch_norm(W, b, *norm, eps, kind,
                                           before=True, groups=groups)
    assert new_W.dtype == new_b.dtype == W.dtype
    assert new_W.shape == W.shape

    options['groups'] = groups
    Y = linear(normalize(X, *norm, eps), W, b, kind, **options)
    folded = linear(X, new_W, new_b, kind, **options)
    terms = linear(abs(X), abs(new_W), abs(new_b), kind, **options)
    gamma, beta, mean, var = per_channel(X, *norm)
    spread = (abs(X) + abs(mean)) * abs(gamma) / np.sqrt(var + eps)
    size = linear(spread + abs(beta), abs(W), None if b is None else abs(b),
                  kind, **options)
    allowed = UNIT[str(W.dtype)] * terms + 1e-13 * size
    assert (abs(folded - Y) <= 1.01 * allowed).all()


def arguments(**change):
    good = {'W': np.ones((4, 2, 3, 3)), 'b': np.ones(4),
            'gamma': np.ones(4), 'beta': np.zeros(4), 'mean': np.ones(4),
            'var': np.ones(4)}
    return good | change


@pytest.mark.parametrize(('name', 'change'), [
    ('W', {'W': np.ones(4)}),
    ('W', {'W': np.ones((4, 2))}),
    ('W', {'W': np.ones((4, 0, 3, 3))}),
    ('W', {'W': np.ones((4, 2, 3, 3)), 'kind': 'dense'}),
    ('b', {'b': np.ones(3)}),
    ('gamma', {'gamma': np.ones(1)}),
    ('beta', {'beta': np.ones((4, 1))}),
    ('mean', {'mean': np.ones(2)}),
    ('mean', {'mean': np.ones(4), 'gamma': np.ones(2), 'beta': np.ones(2),
              'before': True}),
    ('var', {'var': np.ones(5)}),
    ('var', {'var': np.array([1, 1, -1e-9, 1])}),
    ('var', {'var': np.array([1, 1, np.nan, 1])}),
    ('var', {'var': np.array([1, 1, np.inf, 1])}),
    ('eps', {'eps': 0}),
    ('eps', {'eps': -1e-5}),
    ('eps', {'eps': float('nan')}),
    ('eps', {'eps': float('inf')}),
    ('padding', {'padding': '0'}),
    ('padding', {'padding': (0, 0.5)}),
    ('padding', {'padding': -1}),
    ('padding', {'padding': None}),
    ('kind', {'kind': 'convolution'}),
    ('groups', {'groups': 3}),
    ('groups', {'groups': 0}),
    ('groups', {'W': np.ones((4, 2)), 'kind': 'dense', 'groups': 2}),
    ('W', {'gamma': np.full(4, 1e300), 'W': np.full((4, 2, 3, 3), 1e300)})])
def test_bad_arguments_are_named(name, change):
    with pytest.raises(ValueError, match=f'^{name}: expected'):
        folding.fold_batch_norm(**arguments(**change))


@pytest.mark.parametrize(('name', 'change'), [
    ('W', {'W': nd.ones((4, 2, 3, 3))}),
    ('W', {'W': np.ones((4, 2, 3, 3), 'float16')}),
    ('W', {'W': np.ones((4, 2, 3, 3), 'int64')}),
    ('b', {'b': [1, 1, 1, 1]}),
    ('gamma', {'gamma': 1}),
    ('var', {'var': None}),
    ('eps', {'eps': None}),
    ('eps', {'eps': True}),
    ('groups', {'groups': 2.0})])
def test_bad_types_are_named(name, change):
    with pytest.raises(TypeError, match=f'^{name}: expected'):
        folding.fold_batch_norm(**arguments(**change))


def test_overflow_of_float32_is_refused():
    big = {name: np.full_like(a, 1e38, dtype='float32')
           for name, a in arguments().items()}
    with pytest.raises(ValueError, match=r'^W: expected results that fit'):
        folding.fold_batch_norm(**big | {'var': np.zeros(4, 'float32')})


@pytest.mark.parametrize('padding', [1, (0, 1), (2, 2)])
def test_a_shift_before_padding_is_refused(padding):
    W, ones, zeros = np.ones((4, 2, 3, 3)), np.ones(2), np.zeros(2)
    options = {'before': True, 'padding': padding}
    with pytest.raises(ValueError, match=r'^padding: expected 0'):
        folding.fold_batch_norm(W, None, ones, ones, zeros, ones, **options)
    with pytest.raises(ValueError, match=r'^kind: .* not every output sees'):
        folding.fold_batch_norm(W, None, *(np.ones(4),) * 2, np.zeros(4),
                                np.ones(4), kind='transposed', before=True)
    # a scale alone is no harm: zeros stay zeros
    norm = np.array([2., -3]), zeros, zeros, np.array([1., 4])
    new_W, new_b = folding.fold_batch_norm(W, None, *norm, **options)
    X = np.random.default_rng(0).normal(size=(2, 2, 5, 6))
    pad = padding if isinstance(padding, tuple) else (padding,) * 2
    right = linear(normalize(X, *norm, 1e-5), W, None, 'conv', pad=pad)
    assert_allclose(linear(X, new_W, new_b, 'conv', pad=pad), right,
                    rtol=1e-12, atol=1e-12)
    assert not new_b.any()


def test_padding_is_no_matter_after_the_layer():
    plain = folding.fold_batch_norm(**arguments())
    padded = folding.fold_batch_norm(**arguments(padding=(1, 1)))
    for a, b in zip(plain, padded, strict=True):
        assert_array_equal(a, b)


def test_transposed_scale_before():
    rng = np.random.default_rng(1)
    W, X = rng.normal(size=(4, 3, 2, 3)), rng.normal(size=(2, 4, 5, 6))
    zeros = np.zeros(4)
    norm = rng.normal(size=4), zeros, zeros, abs(rng.normal(size=4))
    folded = folding.fold_batch_norm(W, None, *norm, kind='transposed',
                                     before=True, groups=2)
    right = linear(normalize(X, *norm, 1e-5), W, None, 'transposed', 2)
    assert_allclose(linear(X, *folded, 'transposed', 2), right, rtol=1e-12,
                    atol=1e-12)


@pytest.mark.usefixtures('semantics')
@pytest.mark.parametrize('before', [False, True])
@pytest.mark.parametrize('kind', ['conv', 'transposed', 'dense'])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_no_scale_is_one_and_no_shift_is_zero(kind, before, dtype):
    rng = np.random.default_rng(2)
    W = rng.normal(size=(4, 4) if kind == 'dense' else (4, 4, 3, 3))
    b, gamma, beta, mean, var = rng.random((5, 4)).astype(dtype)
    W, mean = W.astype(dtype), np.zeros_like(mean) if before else mean
    ones, zeros = np.ones(4, dtype), np.zeros(4, dtype)
    options = {'kind': kind, 'before': before}
    for missing, there in (((None, None), (ones, zeros)),
                           ((gamma, None), (gamma, zeros)),
                           ((None, zeros if before else beta),
                            (ones, zeros if before else beta))):
        for bias in b, None:
            got = folding.fold_batch_norm(W, bias, *missing, mean, var,
                                          **options)
            right = folding.fold_batch_norm(W, bias, *there, mean, var,
                                            **options)
            for a, c in zip(got, right, strict=True):
                assert a.dtype == dtype
                assert_array_equal(a, c)


def test_statistics_may_not_be_missing():
    for name in 'mean', 'var':
        with pytest.raises(TypeError, match=f'^{name}: expected'):
            folding.fold_batch_norm(**arguments(gamma=None, beta=None,
                                                **{name: None}))


def test_the_algebra_needs_numpy_alone():
    ran = subprocess.run([sys.executable, '-c', """
import sys
for name in 'mxnet', 'tvm', 'tqdm':
    sys.modules[name] = None  # an import of it fails
import numpy as np
from d2ltvm import folding
W, b = folding.fold_batch_norm(np.ones((2, 3)), None, None, None, np.ones(2),
                               np.ones(2), kind='dense', eps=3.)
print(W[0, 0], b[0])
try:
    folding.relax_network([], 1)
except ModuleNotFoundError as error:
    print(error)
"""], check=True, capture_output=True, text=True)
    first, second = ran.stdout.splitlines()
    assert first == '0.5 -0.5'
    assert second.startswith("relax_network needs the package 'apache-tvm'")


# The network

@pytest.fixture(scope='module')
def digits():
    rng = np.random.default_rng(0)
    return Digits(rng.integers(256, size=(130, 28, 28)).astype('uint8'),
                  rng.integers(10, size=130).astype('uint8'), None, None, '')


def drawn_network(seed=0, scale=0.1):
    """Parameters and statistics that no training would give."""
    rng = np.random.default_rng(seed)
    params, moving = fs.init_params(scale, seed), fs.MovingStatistics()
    for i in 1, 2, 3:
        width = params[f'beta{i}'].shape[0]
        params[f'gamma{i}'][:] = nd.array(rng.normal(size=width))
        params[f'beta{i}'][:] = nd.array(rng.normal(size=width))
        moving.update(f'bn{i}', nd.array(rng.normal(size=width)),
                      nd.array(rng.uniform(0.1, 2, size=width)), 0)
    return params, moving


BUILT = []  # pairs of a module and its function; most tests share two


def run(module, X):
    """Run a module; what is equal to one before is not compiled again."""
    main = next((main for other, main in BUILT
                 if structural_equal(module, other)), None)
    if main is None:
        main = relax.VirtualMachine(
            tvm.compile(module, target='llvm'), tvm.cpu())['main']
        BUILT.append((module, main))
    return main(tvm.runtime.tensor(X)).numpy()


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(n, 1, 28, 28)).astype('float32')


def in_mxnet(X, params, moving):
    norm = fs.training_and_testing(moving)[1]
    return fs.net(nd.array(X), params, norm).asnumpy()


@pytest.mark.usefixtures('semantics')
@pytest.mark.parametrize('batch', [
    pytest.param(1, marks=pytest.mark.soak), 3])
def test_relax_network_is_mxnets(batch):
    params, moving = drawn_network(batch)
    X = pictures(batch)
    right = in_mxnet(X, params, moving)
    parameters = folding.network_parameters(params, moving)
    layers = folding.fold_network(params, moving)
    for network in parameters, layers:
        Y = run(folding.relax_network(network, batch), X)
        assert Y.dtype == np.float32
        assert_allclose(Y, right, rtol=1e-5, atol=1e-5 * abs(right).max())
    # eps is used, in both ways alike
    Y = run(folding.relax_network(parameters, batch, eps=1.), X)
    assert abs(Y - right).max() > 0.01 * abs(right).max()
    layers = folding.fold_network(params, moving, eps=1.)
    assert_allclose(folding.network_float64(layers, X), Y,
                    rtol=1e-5, atol=1e-5 * abs(right).max())


def test_images_do_not_depend_on_each_other():
    parameters = folding.network_parameters(*drawn_network(3))
    module, X = folding.relax_network(parameters, 3), pictures(3)
    alone = run(module, np.stack([X[0], 5 * X[1], X[2]]))
    assert_array_equal(run(module, X)[0], alone[0])


def test_numbers_of_numpy():
    network = folding.network_parameters(*drawn_network())
    module = folding.relax_network(network, np.int64(2), np.float64(1e-3))
    tvm.ir.assert_structural_equal(
        module, folding.relax_network(network, 2, 1e-3))


@pytest.mark.parametrize(('row', 'column', 'seen'), [
    (25, 25, True), (26, 0, False), (0, 27, False)])
def test_nan_where_pooling_drops(row, column, seen):
    X = pictures(3)
    X[:, 0, row, column] = np.nan
    Y = run(folding.relax_network(folding.fold_network(*drawn_network(3)), 3),
            X)
    assert np.isnan(Y).all() if seen else np.isfinite(Y).all()


def test_nan_is_not_hidden():
    params, moving = drawn_network(3)
    X = pictures(3)
    X[1, 0, 10, 10] = np.nan
    for network in (folding.network_parameters(params, moving),
                    folding.fold_network(params, moving)):
        Y = run(folding.relax_network(network, 3), X)
        assert np.isfinite(Y[::2]).all() and np.isnan(Y[1]).all()


def test_missing_biases():
    params, moving = drawn_network()
    parameters, X = folding.network_parameters(params, moving), pictures(2)
    right = in_mxnet(X, params, moving)
    for i in 1, 2, 3:
        parameters[f'mean{i}'] = (parameters[f'mean{i}']
                                  - parameters.pop(f'b{i}'))
    Y = run(folding.relax_network(parameters, 2), X)
    assert_allclose(Y, right, rtol=1e-5, atol=1e-5 * abs(right).max())


def test_fold_network_shapes():
    layers = folding.fold_network(*drawn_network())
    assert tuple(W.shape for W, _ in layers) == folding.SHAPES
    for W, b in layers:
        assert b.shape == (len(W),)
        assert W.dtype == b.dtype == np.float32
        assert W.flags.c_contiguous and b.flags.c_contiguous


@pytest.mark.usefixtures('semantics')
def test_network_float64_is_mxnets():
    params, moving = drawn_network(3)
    X = pictures(3)
    Y = folding.network_float64(folding.fold_network(params, moving), X)
    assert Y.dtype == np.float64
    assert_allclose(Y, in_mxnet(X, params, moving), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('side', 'kernel'), [(9, 3), (8, 3), (6, 5), (4, 1)])
def test_conv_float64_is_that_of_loops(side, kernel):
    rng = np.random.default_rng(side)
    X, W = rng.normal(size=(2, 3, side, side)), rng.normal(
        size=(4, 3, kernel, kernel))
    b, half = rng.normal(size=4), (side - kernel + 1) // 2
    Y = np.maximum(linear(X, W, b, 'conv'), 0)[:, :, :2 * half, :2 * half]
    right = (Y[:, :, ::2, ::2] + Y[:, :, 1::2, ::2] + Y[:, :, ::2, 1::2]
             + Y[:, :, 1::2, 1::2]) / 4
    assert_allclose(folding.conv_float64(X, W, b), right, rtol=1e-12,
                    atol=1e-12)


def test_parameters_are_copies():
    params, moving = drawn_network()
    parameters = folding.network_parameters(params, moving)
    assert len(parameters) == 20
    kept = params['W1'].asnumpy()
    parameters['W1'][:] = 7
    assert_array_equal(params['W1'].asnumpy(), kept)


def test_bad_networks_are_named():
    params, moving = drawn_network()
    parameters = folding.network_parameters(params, moving)
    for name, bad in (('W3', parameters['W3'].T), ('var2', np.ones(20)),
                      ('b4', np.ones(1)), ('gamma1', None)):
        with pytest.raises(ValueError, match=f'^{name}: expected'):
            folding.relax_network(parameters | {name: bad}, 1)
    with pytest.raises(ValueError, match=r'^W1: expected.*none'):
        folding.network_layers({})
    layers = folding.fold_network(params, moving)
    W, b = layers[0]
    for bad in (layers[:3], layers[::-1], [], [(W, b[:7]), *layers[1:]]):
        with pytest.raises(ValueError, match=r'^network: expected'):
            folding.relax_network(bad, 1)
    for batch, error in ((0, ValueError), (-1, ValueError), (1.0, TypeError),
                         ('2', TypeError), (None, TypeError),
                         (True, TypeError)):
        with pytest.raises(error, match=r'^batch: expected'):
            folding.relax_network(layers, batch)
    for eps, error in ((0, ValueError), (-1, ValueError), (None, TypeError),
                       (float('nan'), ValueError)):
        with pytest.raises(error, match=r'^eps: expected'):
            folding.relax_network(parameters, 1, eps)
    for bad in ([(W.astype('float64'), b), *layers[1:]],
                parameters | {'mean2': np.zeros(50)}):
        with pytest.raises(TypeError, match=r'^network: expected.*float64'):
            folding.relax_network(bad, 1)
    with pytest.raises(RuntimeError, match='bn1'):
        folding.network_parameters(params, fs.MovingStatistics())


@pytest.mark.usefixtures('semantics')
def test_training_is_repeatable(digits, monkeypatch):
    monkeypatch.delenv('D2LTVM_SHORT', raising=False)
    state = np.random.get_state()[1].copy()
    runs = [folding.network_parameters(*folding.trained_network(
        digits, seed=seed, images=images))
        for seed, images in ((1, None), (1, 130), (2, 130), (1, 100))]
    assert_array_equal(np.random.get_state()[1], state)
    for name, value in runs[0].items():
        assert_array_equal(value, runs[1][name])
        for other in runs[2:]:
            assert (value != other[name]).any()


def test_statistics_are_settled(digits):
    """They are those of the trained parameters, not of the training."""
    params, moving = folding.trained_network(digits, images=100)
    X = nd.array(digits.train_images[:100, None] / 255)
    H = nd.Convolution(X, params['W1'], params['b1'], kernel=(3, 3),
                       num_filter=20).asnumpy()
    assert_allclose(moving.mean['bn1'].asnumpy(), H.mean((0, 2, 3)),
                    rtol=1e-4, atol=1e-6)
    assert_allclose(moving.var['bn1'].asnumpy(), H.var((0, 2, 3)), rtol=1e-4)


def test_short_mode_takes_few_images(monkeypatch):
    seen = []
    monkeypatch.setattr(fs, 'train_step',
                        lambda X, *_, **__: seen.append(len(X)))
    monkeypatch.setattr(fs, 'settle', lambda *_: None)
    digits = Digits(np.zeros((2000, 28, 28), 'uint8'),
                    np.zeros(2000, 'uint8'), None, None, '')
    for short, images in (('1', 1536), ('', 2000)):
        monkeypatch.setenv('D2LTVM_SHORT', short)
        seen.clear()
        folding.trained_network(digits)
        assert sum(seen) == images


def test_seed_orders_the_images(monkeypatch):
    seen = []
    monkeypatch.setattr(fs, 'train_step',
                        lambda X, y, *_, **__: seen.extend(y.asnumpy()))
    monkeypatch.setattr(fs, 'settle', lambda *_: None)
    digits = Digits(np.zeros((100, 28, 28), 'uint8'),
                    np.arange(100, dtype='uint8'), None, None, '')
    for seed in (0, 1):
        folding.trained_network(digits, seed, epochs=2, images=100)
    orders = {tuple(seen[i:i + 100]) for i in range(0, 400, 100)}
    assert len(orders) == 4 and tuple(range(100)) not in orders
    for order in orders:
        assert sorted(order) == list(range(100))


@pytest.mark.parametrize(('change', 'error'), [
    ({'epochs': 0}, ValueError), ({'epochs': 1.5}, TypeError),
    ({'images': 1}, ValueError), ({'images': 'all'}, TypeError)])
def test_bad_training_is_named(digits, change, error):
    with pytest.raises(error, match=f'^{next(iter(change))}: expected'):
        folding.trained_network(digits, **change)


def test_context_is_left_alone():
    before = mx.context.current_context()
    folding.fold_network(*drawn_network())
    assert mx.context.current_context() == before
