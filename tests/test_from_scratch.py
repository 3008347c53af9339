"""The layer from scratch: printed values, faults, awkward input, training."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import from_scratch as fs
from d2ltvm.mnist import Digits, digits_28
from d2ltvm.mxnet_today import autograd, mx, nd
from soak import examples

# Every test runs in both semantics of MXNet
pytestmark = pytest.mark.usefixtures('semantics')

A = np.array([[1, 7], [5, 4], [6, 10]])
A_PRINTED = [[-1.38872862, 0], [0.46290955, -1.22474384],
             [0.9258191, 1.22474384]]
B = np.array([1, 6, 5, 7, 4, 3, 2, 5, 6, 3, 2, 4, 5, 3, 2, 5])
B = B.reshape(2, 2, 2, 2)
B_PRINTED = [[[[-1.63784397, 0.88191599], [0.37796399, 1.38586795]],
              [[0.30779248, -0.51298743], [-1.33376741, 1.12857234]]],
             [[[0.88191599, -0.62993997], [-1.13389194, -0.12598799]],
              [[1.12857234, -0.51298743], [-1.33376741, 1.12857234]]]]
SHAPES = [(8, 3), (2, 1), (8, 3, 5, 7), (1, 3, 5, 7), (6, 1, 4, 4),
          (5, 2, 1, 1)]


def per_channel(X, values):
    return np.reshape(values, (1, -1) + (1,) * (X.ndim - 2))


def reference(X, gamma, beta, eps=1e-5):
    """Output, mean and variance in float64 NumPy."""
    X = X.astype('float64')
    axes = (0, *range(2, X.ndim))
    mean, var = X.mean(axes), X.var(axes)
    X_hat = (X - per_channel(X, mean)) / np.sqrt(per_channel(X, var) + eps)
    return per_channel(X, gamma) * X_hat + per_channel(X, beta), mean, var


def draw(shape, offset=0, dtype='float32', seed=0):
    rng = np.random.default_rng(seed)
    C = shape[1]
    return [a.astype(dtype) for a in (
        rng.normal(offset, 1, shape), rng.normal(1, 0.5, C),
        rng.normal(0, 1, C))]


@pytest.mark.parametrize(('data', 'printed'), [(A, A_PRINTED),
                                               (B, B_PRINTED)])
def test_printed_values(data, printed):
    ones, zeros = nd.ones(2), nd.zeros(2)
    for layer in (fs.pure_batch_norm, fs.batch_norm):
        Y = layer(nd.array(data), ones, zeros)
        assert_allclose(Y.asnumpy(), printed, atol=1e-6)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5),
                                                  ('float64', 1e-12)])
def test_against_float64(shape, dtype, tolerance):
    X, gamma, beta = draw(shape, dtype=dtype)
    Y = fs.pure_batch_norm(*(nd.array(a, dtype=dtype)
                             for a in (X, gamma, beta)))
    expected, *_ = reference(X, gamma, beta)
    assert Y.dtype == np.dtype(dtype)
    assert_allclose(Y.asnumpy(), expected, rtol=tolerance,
                    atol=10 * tolerance)


def test_large_mean():
    """Constants give exactly beta; thousandths near 1000 keep their digits."""
    X, gamma, beta = draw((8, 3, 16, 16), offset=1000)
    expected, mean, var = reference(X, gamma, beta)
    Y, *ours = fs.normalize_batch(*map(nd.array, (X, gamma, beta)))
    assert_allclose(ours[0].asnumpy(), mean, rtol=1e-6)
    assert_allclose(ours[1].asnumpy(), var, rtol=1e-5)
    assert_allclose(Y.asnumpy(), expected, atol=1e-5)
    X = (1000 + 1e-3 * np.arange(16.)[:, None]).astype('float32')
    Y = fs.pure_batch_norm(nd.array(X), nd.ones(1), nd.zeros(1))
    assert_allclose(Y.asnumpy(), reference(X, [1], [0])[0], atol=1e-6)


@pytest.mark.parametrize('value', [7.1, 100, 1000.1, 1e30])
@pytest.mark.parametrize('shape', [(4, 2), (1, 2), (1, 2, 3, 3),
                                   (64, 2, 26, 26)])
def test_constant_channel_gives_exactly_beta(shape, value):
    beta = nd.array([0, 1.5])
    Y = fs.pure_batch_norm(nd.full(shape, value), nd.full(2, 3), beta)
    assert_array_equal(Y.asnumpy(), np.broadcast_to(
        per_channel(Y, beta.asnumpy()), shape))


@pytest.mark.parametrize('is_training', [True, False])
def test_constant_in_the_whole_layer(is_training):
    X, moving = nd.full((8, 1, 5, 5), 1000.1), fs.MovingStatistics()
    for training in (True, is_training):
        for norm in fs.training_and_testing(moving)[not training:]:
            Y = norm(X, nd.ones(1), nd.full(1, 2), scope_name='a')
            assert_array_equal(Y.asnumpy(), np.full(X.shape, 2, 'float32'))


def test_strided_array():
    X, gamma, beta = draw((8, 6, 10, 7))
    view = nd.array(X).transpose((0, 1, 3, 2))[2:6]
    expected, *_ = reference(X.transpose((0, 1, 3, 2))[2:6], gamma, beta)
    Y = fs.pure_batch_norm(view, nd.array(gamma), nd.array(beta))
    assert_allclose(Y.asnumpy(), expected, atol=1e-5)


def test_nan_is_not_hidden():
    X, gamma, beta = draw((4, 2, 3, 3))
    X[0, 0, 0, 0] = np.nan
    Y = fs.pure_batch_norm(*map(nd.array, (X, gamma, beta))).asnumpy()
    assert np.isnan(Y[:, 0]).all() and np.isfinite(Y[:, 1]).all()


@pytest.mark.parametrize('shape', [(6, 3), (4, 2, 3, 5)])
def test_gradients_by_central_differences(shape):
    arguments = draw(shape, dtype='float64')
    weight = np.random.default_rng(1).normal(size=shape)
    arrays = [nd.array(a, dtype='float64') for a in arguments]
    for a in arrays:
        a.attach_grad()
    with autograd.record():
        Y = fs.pure_batch_norm(*arrays)
    Y.backward(nd.array(weight, dtype='float64'))

    def loss():
        return (reference(*arguments)[0] * weight).sum()

    for value, array in zip(arguments, arrays, strict=True):
        numeric = np.empty_like(value)
        for i in np.ndindex(value.shape):
            kept, step = value[i], 1e-5
            value[i] = kept + step
            up = loss()
            value[i] = kept - step
            numeric[i] = (up - loss()) / (2 * step)
            value[i] = kept
        assert_allclose(array.grad.asnumpy(), numeric, rtol=1e-5, atol=1e-7)
    # the statistics are not constants: the gradient of X sums to zero
    axes = (0, *range(2, len(shape)))
    assert_allclose(arrays[0].grad.asnumpy().sum(axes), 0, atol=1e-10)


@pytest.mark.parametrize(('name', 'change'), [
    ('X', {'X': nd.zeros((2, 3, 4))}),
    ('X', {'X': nd.zeros(3)}),
    ('gamma', {'gamma': nd.ones(4)}),
    ('gamma', {'gamma': nd.ones((1, 3))}),
    ('beta', {'beta': nd.ones(1)}),
    ('eps', {'eps': 0}),
    ('eps', {'eps': -1e-5}),
    ('eps', {'eps': 1e-50}),
    ('eps', {'eps': float('inf')}),
    ('eps', {'eps': float('nan')})])
def test_bad_arguments_are_named(name, change):
    good = {'X': nd.ones((2, 3)), 'gamma': nd.ones(3), 'beta': nd.zeros(3)}
    for function in (fs.pure_batch_norm, fs.batch_norm):
        with pytest.raises(ValueError, match=f'^{name}: expected'):
            function(**{**good, **change})


@pytest.mark.parametrize(('name', 'change'), [
    ('X', {'X': np.ones((2, 3))}),
    ('X', {'X': nd.ones((2, 3), dtype='int32')}),
    ('X', {'X': nd.ones((2, 3), dtype='float16')}),
    ('gamma', {'gamma': [1, 1, 1]}),
    ('gamma', {'gamma': nd.ones(3, dtype='float64')}),
    ('gamma', {'gamma': mx.np.ones(3)}),
    ('X', {'X': mx.np.ones((2, 3))}),
    ('eps', {'eps': None}), ('eps', {'eps': 'a'}),
    ('beta', {'beta': None})])
def test_bad_types_are_named(name, change):
    good = {'X': nd.ones((2, 3)), 'gamma': nd.ones(3), 'beta': nd.zeros(3)}
    for function in (fs.pure_batch_norm, fs.batch_norm):
        with pytest.raises(TypeError, match=f'^{name}: expected'):
            function(**{**good, **change})


def test_the_dtype_that_is_expected_is_named():
    with pytest.raises(TypeError, match=r'^gamma: expected .* of float64, '
                                        r'got float32$'):
        fs.pure_batch_norm(nd.ones((2, 3), dtype='float64'), nd.ones(3),
                           nd.zeros(3))
    with pytest.raises(TypeError, match=r'^X: expected an NDArray .*ndarray'):
        fs.pure_batch_norm(mx.np.ones((2, 3)), nd.ones(3), nd.zeros(3))


def test_batch_norm_refuses():
    ones, zeros = nd.ones(3), nd.zeros(3)
    X, moving = nd.ones((4, 3)), fs.MovingStatistics()
    for momentum in (-0.1, 1, float('nan')):
        with pytest.raises(ValueError, match='momentum'):
            fs.batch_norm(X, ones, zeros, momentum, scope_name='a',
                          moving=moving)
    with pytest.raises(TypeError, match=r'^momentum: expected a number'):
        fs.batch_norm(X, ones, zeros, None, scope_name='a', moving=moving)
    with pytest.raises(ValueError, match='more than one value'):
        fs.batch_norm(X[:1], ones, zeros, scope_name='a', moving=moving)
    with pytest.raises(ValueError, match='moving: testing needs'):
        fs.batch_norm(X, ones, zeros, is_training=False)
    with pytest.raises(RuntimeError, match=r"'conv7'.*train this layer"):
        fs.batch_norm(X, ones, zeros, scope_name='conv7', is_training=False,
                      moving=moving)
    assert moving.mean == moving.var == {}  # nothing was half-written
    fs.batch_norm(X, ones, zeros, scope_name='a', moving=moving)
    with pytest.raises(ValueError, match="scope_name: 'a' has 3 channels"):
        fs.batch_norm(nd.ones((4, 1)), nd.ones(1), nd.zeros(1),
                      scope_name='a', moving=moving)
    with pytest.raises(ValueError, match="scope_name: 'a' has 3 channels"):
        fs.batch_norm(nd.ones((4, 1)), nd.ones(1), nd.zeros(1),
                      is_training=False, scope_name='a', moving=moving)
    for is_training in (True, False):
        with pytest.raises(ValueError, match=r"scope_name: 'a' has 3 channels "
                                             r'of float32, got 3 .*float64'):
            fs.batch_norm(*(a.astype('float64') for a in (X, ones, zeros)),
                          scope_name='a', is_training=is_training,
                          moving=moving)
    for kept in (moving.mean['a'], moving.var['a']):
        assert kept.shape == (3,) and kept.dtype == np.float32


@pytest.mark.parametrize('name', ['', None, 3])
@pytest.mark.parametrize('is_training', [True, False])
def test_layers_without_a_name_share_nothing(name, is_training):
    moving = fs.MovingStatistics()
    arguments = nd.ones((4, 3)), nd.ones(3), nd.zeros(3)
    with pytest.raises(ValueError, match=r'^scope_name: expected a name, '
                                         rf'another .* got {name!r}$'):
        fs.batch_norm(*arguments, scope_name=name, is_training=is_training,
                      moving=moving)
    assert moving.mean == moving.var == {}
    fs.batch_norm(*arguments, scope_name='')  # nothing is kept


def test_negative_variance_is_refused():
    moving, ones = fs.MovingStatistics(), nd.ones(3)
    moving.update('a', ones, nd.array([1, -2, 1]), 0.9)
    with pytest.raises(ValueError, match=r"^var\['a'\]: expected no negative "
                                         r'numbers, got -2$'):
        fs.batch_norm(nd.ones((4, 3)), ones, ones, scope_name='a',
                      is_training=False, moving=moving)


def test_moving_statistics_follow_the_formula():
    moving, mean, var = fs.MovingStatistics(), None, None
    for seed in range(4):
        X, gamma, beta = draw((8, 3, 4, 4), offset=seed, seed=seed)
        fs.batch_norm(*map(nd.array, (X, gamma, beta)), momentum=0.7,
                      scope_name='a', moving=moving)
        _, m, v = reference(X, gamma, beta)
        mean = m if mean is None else 0.7 * mean + 0.3 * m
        var = v if var is None else 0.7 * var + 0.3 * v
    assert_allclose(moving.mean['a'].asnumpy(), mean, rtol=1e-5, atol=1e-6)
    assert_allclose(moving.var['a'].asnumpy(), var, rtol=1e-5)


def test_testing_changes_nothing():
    X, gamma, beta = map(nd.array, draw((8, 3)))
    moving = fs.MovingStatistics()
    fs.batch_norm(X, gamma, beta, scope_name='a', moving=moving)
    before = [v['a'].asnumpy().copy() for v in (moving.mean, moving.var)]
    for _ in range(3):
        fs.batch_norm(5 * X + 7, gamma, beta, scope_name='a',
                      is_training=False, moving=moving)
    for old, new in zip(before, (moving.mean, moving.var), strict=True):
        assert_array_equal(new['a'].asnumpy(), old)


def test_testing_one_example_does_not_depend_on_the_others():
    X, gamma, beta = map(nd.array, draw((8, 3)))
    moving = fs.MovingStatistics()
    fs.batch_norm(X, gamma, beta, scope_name='a', moving=moving)
    together, alone = (
        fs.batch_norm(x, gamma, beta, is_training=False, scope_name='a',
                      moving=moving) for x in (X, X[:1]))
    assert_allclose(together[:1].asnumpy(), alone.asnumpy(), rtol=1e-6)


def test_two_networks_do_not_share_statistics():
    images = nd.random.uniform(shape=(8, 1, 28, 28))
    first, second = fs.MovingStatistics(), fs.MovingStatistics()
    params = fs.init_params()
    fs.net(images, params, fs.training_and_testing(first)[0])
    kept = first.mean['bn1'].asnumpy().copy()
    fs.net(1 - images, params, fs.training_and_testing(second)[0])
    assert_array_equal(first.mean['bn1'].asnumpy(), kept)
    assert not np.array_equal(second.mean['bn1'].asnumpy(), kept)


def test_moving_statistics_are_not_recorded():
    """Else each batch would keep the graph of all batches before it."""
    X, gamma, beta = map(nd.array, draw((8, 3)))
    X.attach_grad()
    moving = fs.MovingStatistics()
    with autograd.record():
        fs.batch_norm(X, gamma, beta, scope_name='a', moving=moving)
    with pytest.raises(mx.MXNetError, match='not in a computational graph'):
        moving.mean['a'].backward()


def test_debug_prints_the_statistics(capsys):
    fs.batch_norm(nd.array(A), nd.ones(2), nd.zeros(2), scope_name='first',
                  debug=True)
    line = capsys.readouterr().out
    assert line == 'first: mean 4 to 7, variance 4.667 to 6\n'


def test_network_shapes(capsys):
    images = nd.zeros((64, 1, 28, 28))
    fs.net(images, fs.init_params(), fs.no_norm, debug=True)
    shapes = [line.partition(': ')[2]
              for line in capsys.readouterr().out.splitlines()]
    assert shapes == ['(64, 20, 13, 13)', '(64, 50, 4, 4)', '(64, 800)',
                      '(64, 128)', '(64, 10)']


def test_parameters_follow_the_seed_only():
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    first, same = fs.init_params(seed=5), fs.init_params(seed=5)
    other = fs.init_params(seed=6)
    assert_array_equal(np.random.get_state()[1], state)
    for name in first:
        assert_array_equal(first[name].asnumpy(), same[name].asnumpy())
        assert not np.array_equal(first[name].asnumpy(),
                                  other[name].asnumpy())
    assert abs(first['gamma3'].mean().asscalar() - 1) < 0.01
    assert abs(first['W3'].asnumpy().std() - 0.01) < 1e-4


def test_loss_survives_large_logits():
    logits = nd.array([[0, 1], [200, 201]])
    loss = fs.softmax_cross_entropy(logits, nd.array([0, 1])).asscalar()
    expected = np.log1p(np.e) + np.log1p(np.exp(-1))
    assert_allclose(loss, expected, rtol=1e-5)


def test_batches_cover_everything_once():
    images = np.arange(10, dtype='uint8')[:, None, None] * np.ones(
        (1, 28, 28), 'uint8')
    labels = np.arange(10, dtype='uint8')
    rng = np.random.default_rng(0)
    seen = list(fs.batches(images, labels, 4, rng=rng))
    assert [X.shape for X, _ in seen] == [(4, 1, 28, 28)] * 2 + [
        (2, 1, 28, 28)]
    X = np.concatenate([X.asnumpy() for X, _ in seen])
    y = np.concatenate([y.asnumpy() for _, y in seen])
    assert sorted(y) == list(range(10)) and list(y) != list(range(10))
    assert_allclose(X[:, 0, 0, 0] * 255, y, rtol=1e-6)


def test_accuracy_counts():
    digits = digits_28()
    images, labels = digits.test_images[:50], digits.test_labels[:50]
    params = fs.init_params()
    params['W4'][:] = 0
    params['b4'][:] = nd.one_hot(nd.array([3]), 10)[0]  # always says 3
    share = fs.accuracy(images, labels, params, fs.no_norm, batch_size=7)
    assert share == np.mean(labels == 3) > 0


def test_training_learns_and_repeats(capsys):
    digits = digits_28()
    digits = Digits(digits.train_images[:640], digits.train_labels[:640],
                    digits.test_images, digits.test_labels, 'part')
    histories = []
    for epochs in (2, 1):
        moving = fs.MovingStatistics()
        histories.append(fs.train(digits, fs.init_params(),
                                  *fs.training_and_testing(moving),
                                  epochs=epochs))
    assert histories[0][:1] == histories[1]
    assert histories[0][-1][2] > 0.8
    lines = [line for line in capsys.readouterr().out.splitlines()
             if 'accuracy' in line]
    assert len(lines) == 3


def test_settled_statistics_are_those_of_all_images():
    digits, params = digits_28(), fs.init_params()
    images, moving = digits.train_images[:250], fs.MovingStatistics()
    moving.update('bn1', nd.ones(20), nd.ones(20), 0.9)
    fs.settle(moving, images, params, batch_size=100)
    assert sorted(moving.mean) == sorted(moving.var) == ['bn1', 'bn2', 'bn3']
    X = nd.array(images[:, None] / 255)
    H = nd.Convolution(X, params['W1'], params['b1'], kernel=(3, 3),
                       num_filter=20).asnumpy()
    assert_allclose(moving.mean['bn1'].asnumpy(), H.mean((0, 2, 3)),
                    rtol=1e-4, atol=1e-6)
    assert_allclose(moving.var['bn1'].asnumpy(), H.var((0, 2, 3)), rtol=1e-4)


def test_interrupted_settling_changes_nothing():
    moving, params = fs.MovingStatistics(), fs.init_params()
    moving.update('bn1', nd.ones(20), nd.ones(20), 0.9)
    kept = moving.mean['bn1']
    images = np.zeros((101, 28, 28), 'uint8')
    images[0] = 1
    params['W3'] = params['W3'][:10]  # fails behind the second layer
    with pytest.raises(mx.MXNetError):
        fs.settle(moving, images, params, batch_size=50)
    assert moving.mean == {'bn1': kept}


def test_statistics_settle_before_the_test(capsys):
    digits, calls = digits_28(), []

    def test_norm(H, gamma, beta, scope_name):
        calls.append('test')
        return H

    digits = digits._replace(train_images=digits.train_images[:64],
                             train_labels=digits.train_labels[:64])
    fs.train(digits, fs.init_params(), fs.no_norm, test_norm, epochs=3,
             before_test=lambda: calls.append('settle'))
    # three layers, for the training images and for the test images
    assert calls == 3 * ['settle', *6 * ['test']]


def test_a_single_image_is_no_batch():
    images, labels = np.ones((9, 28, 28), 'uint8'), np.zeros(9, 'uint8')
    sizes = [len(X) for X, _ in fs.batches(images, labels, 4)]
    assert sizes == [4, 5]
    assert [len(X) for X, _ in fs.batches(images[:1], labels[:1], 4)] == [1]


@pytest.mark.parametrize(('error', 'name', 'change'), [
    (ValueError, 'batch_size', {'batch_size': 0}),
    (ValueError, 'batch_size', {'batch_size': -1}),
    (TypeError, 'batch_size', {'batch_size': 2.0}),
    (ValueError, 'labels', {'labels': np.zeros(9)}),
    (TypeError, 'images', {'images': np.ones((5, 28, 28))}),
    (TypeError, 'images', {'images': [[1]]})])
def test_batches_refuses(error, name, change):
    good = {'images': np.ones((5, 28, 28), 'uint8'), 'labels': np.zeros(5),
            'batch_size': 2}
    with pytest.raises(error, match=f'^{name}: expected'):
        next(fs.batches(**good | change))
    images, labels, batch_size = (good | change).values()
    with pytest.raises(error, match=f'^{name}: expected'):
        fs.train(Digits(images, labels, images, labels, ''), {}, fs.no_norm,
                 fs.no_norm, batch_size=batch_size)


def test_labels_out_of_range_count_as_the_last_and_first():
    logits = nd.array([[1, 2, 4]])
    for label, counts_as in ((7, 2), (-1, 0)):
        assert_array_equal(*(
            fs.softmax_cross_entropy(logits, nd.array([i])).asnumpy()
            for i in (label, counts_as)))


def test_no_images_are_refused():
    none, moving = np.zeros((0, 28, 28), 'uint8'), fs.MovingStatistics()
    params = fs.init_params()
    with pytest.raises(ValueError, match='images: expected'):
        fs.accuracy(none, none[:, 0, 0], params, fs.no_norm)
    with pytest.raises(ValueError, match='images: expected'):
        fs.settle(moving, none, params)


@pytest.mark.parametrize(('cuda', 'count', 'card', 'device', 'reason'), [
    (False, 0, None, mx.cpu(), 'it is built without CUDA'),
    (True, 0, None, mx.cpu(), 'it finds no GPU'),
    (True, 2, ('Tesla T4, compute capability 7.5', True), mx.gpu(0),
     'GPU 0 of 2 is Tesla T4, compute capability 7.5'),
    (True, 1, ('H100, compute capability 9.0', False), mx.cpu(),
     'GPU 0 of 1 is H100, compute capability 9.0, for which it holds no '
     'programs')])
def test_device_is_chosen_and_named(capsys, monkeypatch, cuda, count, card,
                                    device, reason):
    class Features:
        def is_enabled(self, name):
            return cuda and name == 'CUDA'

    monkeypatch.setattr(mx.runtime, 'Features', Features)
    monkeypatch.setattr(mx.context, 'num_gpus', lambda: count)
    monkeypatch.setattr(fs, 'describe_gpu', lambda: card)
    assert fs.choose_device() == device
    assert capsys.readouterr().out == (
        f'MXNet computes on {device}: {reason}\n')


# Random shapes, offsets and scales against float64

@st.composite
def activations(draw):
    """X, gamma, beta; one value per channel in a batch is left out."""
    dense = draw(st.booleans())
    N, C, H, W = (draw(st.integers(1, k)) for k in (6, 4, 5, 7))
    shape = (max(N, 2), C) if dense else (N, C, H, max(W, 2))
    dtype = draw(st.sampled_from(['float32', 'float64']))
    rng = np.random.default_rng(draw(st.integers(0, 2 ** 32)))
    scale = draw(st.sampled_from([1e-15, 1e-3, 1, 1e3, 1e12]))
    X = scale * (draw(st.sampled_from([0, 1000])) + rng.normal(size=shape))
    gamma, beta = rng.normal(1, 0.5, C), rng.normal(size=C)
    return [a.astype(dtype) for a in (X, gamma, beta)]


def rounding(X, gamma, beta, var, eps=1e-5):
    """What rounding may do to the output, per channel.

    Each of a few operations rounds by half of `finfo.eps`, relative to the
    terms that are added: |gamma| |X| / sqrt(var + eps) and |beta|.
    """
    largest = np.abs(X.astype('float64')).max((0, *range(2, X.ndim)))
    terms = np.abs(gamma) * largest / np.sqrt(var + eps) + np.abs(beta)
    return 16 * np.finfo(X.dtype).eps * terms


@given(activations())
def test_property_statistics_and_output(semantics, arrays):
    X, gamma, beta = arrays
    expected, mean, var = reference(X, gamma, beta)
    like = {'dtype': X.dtype}
    arguments = [nd.array(a, **like) for a in arrays]
    found = [a.asnumpy() for a in fs.normalize_batch(*arguments)[1:]]
    unit = np.finfo(X.dtype).eps
    largest = np.abs(X.astype('float64')).max((0, *range(2, X.ndim)))
    assert (abs(found[0] - mean) <= 16 * unit * largest).all()
    # the mean is off by d: the squares are off by d * d and 2 d |x - mean|
    off = 16 * unit * largest
    assert (abs(found[1] - var) <= 16 * unit * var + off ** 2
            + 2 * off * np.sqrt(var)).all()
    # the error of the variance, bounded above, moves the output in proportion
    shift = abs(expected - per_channel(X, beta)) * per_channel(
        X, abs(found[1] - var) / (var + 1e-5))
    limit = per_channel(X, rounding(X, gamma, beta, var)) + shift
    for layer in (fs.pure_batch_norm, fs.batch_norm):
        Y = layer(*arguments)
        assert Y.dtype == X.dtype and Y.shape == X.shape
        assert (abs(Y.asnumpy() - expected) <= limit).all()


@given(st.lists(activations(), min_size=1, max_size=4),
       st.sampled_from([0, 0.5, 0.9, 0.99]))
def test_property_moving_statistics(semantics, runs, momentum):
    """Each run has its scope; its two batches are mixed by the formula."""
    moving = fs.MovingStatistics()
    for scope, (X, gamma, beta) in enumerate(runs):
        halves = X, X[::-1] * X.dtype.type(0.5)
        for half in halves:
            fs.batch_norm(*(nd.array(a, dtype=X.dtype)
                            for a in (half, gamma, beta)), momentum,
                          scope_name=str(scope), moving=moving)
        stats = [[a.asnumpy() for a in fs.normalize_batch(*(
            nd.array(a, dtype=X.dtype) for a in (half, gamma, beta)))[1:]]
            for half in halves]
        for found, first, second in zip(moving[str(scope)], *stats,
                                        strict=True):
            assert_allclose(found.asnumpy(), momentum * first.astype('float64')
                            + (1 - momentum) * second, rtol=1e-6)


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 99))
def test_property_batches(semantics, n, batch_size, seed):
    """Each image once, with its label; never a batch of one, unless asked."""
    images = np.arange(n, dtype='uint8')[:, None, None] + np.zeros(
        (1, 28, 28), 'uint8')
    for rng in (None, np.random.default_rng(seed)):
        seen = [(X.asnumpy(), y.asnumpy()) for X, y in fs.batches(
            images, images[:, 0, 0], batch_size, rng=rng)]
        order = np.concatenate([y for _, y in seen])
        assert_array_equal(np.sort(order), np.arange(n))
        assert rng is not None or (order == np.arange(n)).all()
        assert batch_size == 1 or min(len(y) for _, y in seen) > 1
        for X, y in seen:
            assert X.shape == (len(y), 1, 28, 28)
            assert_allclose(255 * X[:, 0, 3, 5], y, rtol=1e-6)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 99),
       st.sampled_from([1e-3, 1, 100]))
def test_property_loss_and_its_gradient(semantics, N, K, seed, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(N, K))).astype('float32')
    labels = rng.integers(K, size=N)
    wide = logits.astype('float64')
    log_softmax = wide - wide.max(axis=1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(axis=1, keepdims=True))
    X = nd.array(logits)
    X.attach_grad()
    with autograd.record():
        loss = fs.softmax_cross_entropy(X, nd.array(labels))
    loss.backward()
    # the library's logarithm is off by 1.5e-6 where one class is certain
    size = 1 + abs(wide).max()
    assert_allclose(loss.asscalar(), -log_softmax[range(N), labels].sum(),
                    atol=3e-6 * N * size, rtol=1e-6)
    assert_allclose(X.grad.asnumpy(), np.exp(log_softmax)
                    - np.eye(K)[labels], atol=3e-6 * size)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3),
       st.floats(0, 10, width=32), st.integers(0, 99))
def test_property_sgd(semantics, shape, learning_rate, seed):
    value, grad = np.random.default_rng(seed).normal(
        size=(2, *shape)).astype('float32')
    param = nd.array(value)
    param.attach_grad()
    param.grad[:] = nd.array(grad)
    fs.sgd({'w': param}, learning_rate)
    assert_allclose(param.asnumpy(), value - learning_rate * grad, rtol=1e-6,
                    atol=1e-6 * (1 + learning_rate) * abs(grad).max())


@settings(max_examples=examples(8))
@given(st.integers(1, 25), st.integers(1, 9), st.integers(0, 99))
def test_property_accuracy_and_settling(semantics, n, batch_size, seed):
    """Against the network itself, image by image, and all images at once."""
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(n + 1, 28, 28)).astype('uint8')
    labels = rng.integers(10, size=n + 1).astype('uint8')
    params, moving = fs.init_params(0.1, seed), fs.MovingStatistics()
    fs.settle(moving, images, params, batch_size=n + 1)
    X = nd.array(images[:, None] / 255)
    named = fs.net(X, params, fs.no_norm).asnumpy().argmax(axis=1)
    assert fs.accuracy(images, labels, params, fs.no_norm,
                       batch_size=batch_size) == np.mean(named == labels)
    H = nd.Convolution(X, params['W1'], params['b1'], kernel=(3, 3),
                       num_filter=20).asnumpy().astype('float64')
    assert_allclose(moving.mean['bn1'].asnumpy(), H.mean((0, 2, 3)),
                    rtol=1e-4, atol=1e-6)
    assert_allclose(moving.var['bn1'].asnumpy(), H.var((0, 2, 3)), rtol=1e-4)
