"""Statistics read, re-estimated, diagnosed, frozen; the table of symptoms."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import practice
from d2ltvm.mxnet_today import autograd, gluon, mx, nd

nn = gluon.nn
PAGE = Path(__file__).resolve().parent.parent / 'chapters/practice.ipynb'
TEXT = '\n'.join(''.join(cell['source']) for cell in
                 json.loads(PAGE.read_text('utf-8'))['cells']
                 if cell['cell_type'] == 'markdown')


def network(*layers, X, dtype='float64'):
    mx.random.seed(0)
    net = nn.HybridSequential()
    net.add(*layers)
    net.initialize(mx.init.Normal(1))
    net.cast(dtype)
    net(X)
    return net


def dense(X, **settings):
    return network(nn.Dense(6), nn.BatchNorm(**settings),
                   nn.Activation('relu'), nn.Dense(5),
                   nn.BatchNorm(**settings), X=X)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def X(rng):
    return nd.array(rng.normal(3, 2, size=(40, 4)), dtype='float64')


def step(net, X):
    with autograd.record():
        Y = (net(X) ** 2).sum()
    Y.backward()


def test_layers_are_found_in_their_order_and_nested(X):
    inner = nn.HybridSequential()
    inner.add(nn.Dense(3), nn.BatchNorm())
    net = network(nn.BatchNorm(), inner, nn.BatchNorm(scale=False), X=X)
    assert practice.batch_norms(net) == [net[0], inner[1], net[2]]
    assert practice.batch_norms(net[0]) == [net[0]]


@pytest.mark.parametrize('net, error, words', [
    (None, TypeError, 'net: expected a gluon.Block, got NoneType'),
    (nn.Dense(3), ValueError, 'at least one gluon.nn.BatchNorm, got none')])
def test_what_has_no_layers_is_refused(net, error, words):
    for call in (practice.batch_norms, practice.read_statistics,
                 practice.freeze, lambda net: practice.reestimate(net, [1]),
                 lambda net: practice.diagnose(net, None, len)):
        with pytest.raises(error, match=words):
            call(net)


def test_written_statistics_are_used(X):
    net = network(nn.BatchNorm(epsilon=0.5), X=X)
    mean, var = np.arange(4.), np.arange(4.) + 0.5
    practice.write_statistics(net, [(mean, var)])
    assert_array_equal(practice.read_statistics(net), [(mean, var)])
    assert_allclose(net(X).asnumpy(),
                    (X.asnumpy() - mean) / np.sqrt(var + 0.5))


def test_statistics_for_another_network_are_refused(X):
    with pytest.raises(ValueError, match='zip'):
        practice.write_statistics(dense(X), [(np.zeros(6), np.ones(6))])


def by_hand(net, X):
    """Means and variances layer by layer in float64, each by its own."""
    X, found = X.asnumpy(), []
    for layer in net:
        if isinstance(layer, nn.BatchNorm):
            found.append((X.mean(axis=0), X.var(axis=0)))
            X = (X - X.mean(axis=0)) / np.sqrt(
                X.var(axis=0) + layer._kwargs['eps'])
            X = X * layer.gamma.data().asnumpy() + layer.beta.data().asnumpy()
        elif isinstance(layer, nn.Dense):
            X = X @ layer.weight.data().asnumpy().T
        elif isinstance(layer, nn.Activation):
            X = np.maximum(X, 0)
    return found


@pytest.mark.parametrize('cuts', [[], [1], [13, 14], [39]])
def test_population_statistics_of_any_parts(X, cuts):
    net = dense(X, gamma_initializer=mx.init.One())
    net[1].gamma.set_data(nd.arange(1, 7))
    net[1].beta.set_data(nd.arange(6) - 2)
    parts = [X[int(a):int(b)] for a, b in zip([0, *cuts], [*cuts, 40],
                                              strict=True)]
    practice.reestimate(net, iter(parts))
    for got, expected in zip(practice.read_statistics(net), by_hand(net, X),
                             strict=True):
        assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('shape, axis', [
    ((6, 3), 1), ((6, 3), -1), ((6, 3, 5), 1), ((6, 3, 5), -1),
    ((4, 3, 5, 2), 1), ((4, 3, 5, 2), 3), ((2, 3, 4, 2, 3), 1)])
def test_any_rank_and_axis(rng, shape, axis):
    X = nd.array(rng.normal(5, 2, size=shape), dtype='float64')
    net = network(nn.BatchNorm(axis=axis), X=X)
    practice.reestimate(net, [X])
    axes = tuple({*range(X.ndim)} - {axis % X.ndim})
    (mean, var), = practice.read_statistics(net)
    assert_allclose(mean, X.asnumpy().mean(axis=axes))
    assert_allclose(var, X.asnumpy().var(axis=axes))


def test_evaluation_then_equals_training_with_this_batch(rng):
    X = nd.array(rng.normal(size=(6, 2, 5, 5)), dtype='float64')
    net = network(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Activation('relu'),
                  nn.Conv2D(3, 2), nn.BatchNorm(), X=X)
    with autograd.train_mode():
        expected = net(X).asnumpy()
    assert abs(net(X).asnumpy() - expected).max() > 0.1
    practice.reestimate(net, [X])
    assert_allclose(net(X).asnumpy(), expected, atol=1e-10)


def test_dropout_is_off_and_parameters_stay(X):
    net = network(nn.Dropout(0.9), nn.BatchNorm(), X=X)
    before = net[1].gamma.data().asnumpy()
    with autograd.record():  # the caller's mode does not matter
        practice.reestimate(net, [X])
        assert autograd.is_recording() and autograd.is_training()
    (mean, var), = practice.read_statistics(net)
    assert_allclose(mean, X.asnumpy().mean(axis=0))
    assert_allclose(var, X.asnumpy().var(axis=0))
    assert_array_equal(net[1].gamma.data().asnumpy(), before)


def test_half_precision_sums_in_full(rng):
    X = nd.array(rng.normal(100, 1, size=(5000, 2)), dtype='float16')
    net = network(nn.BatchNorm(), X=X, dtype='float16')
    practice.reestimate(net, [X])
    (mean, var), = practice.read_statistics(net)
    assert mean.dtype == 'float32'
    assert_allclose(mean, X.asnumpy().astype('float64').mean(axis=0))
    assert_allclose(var, X.asnumpy().astype('float64').var(axis=0), rtol=1e-6)


def test_a_layer_that_stands_in_two_places_hears_both(X):
    shared = nn.BatchNorm()
    net = network(shared, nn.Dense(4), shared, X=X)
    practice.reestimate(net, [X])
    # In the second place arrives what the old statistics led to
    assert net[0] is net[2]
    (mean, _), = practice.read_statistics(net)
    assert abs(mean - X.asnumpy().mean(axis=0)).min() > 0.01


def test_a_layer_that_is_not_called_keeps_its_statistics(X):
    class Skips(nn.HybridSequential):
        def forward(self, X):
            return self[0](X)

    net = Skips()
    net.add(nn.BatchNorm(in_channels=4), nn.BatchNorm(in_channels=4))
    net.initialize()
    net.cast('float64')
    practice.reestimate(net, [X])
    (first, _), (second, _) = practice.read_statistics(net)
    assert abs(first).min() > 1
    assert_array_equal(second, 0)


@pytest.mark.parametrize('called', [False, True])
def test_a_hybridized_network_is_refused(X, called):
    net = dense(X)
    net.hybridize()
    if called:
        net(X)
    before = practice.read_statistics(net)
    with pytest.raises(ValueError, match=r'hybridize\(False\)'):
        practice.reestimate(net, [X])
    for new, old in zip(practice.read_statistics(net), before, strict=True):
        assert_array_equal(new, old)
    net.hybridize(False)
    practice.reestimate(net, [X])


def test_no_batch_is_refused(X):
    with pytest.raises(ValueError, match='batches: expected at least one'):
        practice.reestimate(dense(X), [])


def test_hooks_are_gone_afterwards_even_after_a_failure(X):
    net = dense(X)
    practice.reestimate(net, [X])
    with pytest.raises(mx.MXNetError):
        practice.reestimate(net, [X, X[:, :2]])
    assert not any(layer._forward_pre_hooks
                   for layer in practice.batch_norms(net))


def test_diagnosis_tells_bad_statistics_from_good_ones(X):
    net = dense(X)
    practice.reestimate(net, [X])
    wanted = net(X).asnumpy()

    def score(Y):
        return -abs(Y.asnumpy() - wanted).max()

    fine = practice.diagnose(net, X, score)
    assert fine.evaluation == 0 and fine.batch > -1e-10
    for _, shift, ratio in fine.layers:
        assert shift < 1e-9 and abs(ratio - 1) < 1e-9
    stored = practice.read_statistics(net)
    (mean, var), second = stored
    practice.write_statistics(net, [(mean + 2 * np.sqrt(var), 9 * var),
                                    second])
    bad = practice.diagnose(net, X, score)
    assert bad.evaluation < -0.5 and bad.batch > -1e-10
    (name, shift, ratio), (_, other, _) = bad.layers
    assert name == net[1].name
    assert abs(shift - 2) < 1e-3 and abs(ratio - 9) < 1e-3 and other < 1e-9


def test_diagnosis_leaves_the_network_alone(X):
    net = dense(X)
    before = practice.read_statistics(net)
    for score in (lambda Y: 0, lambda Y: 1 / 0):
        try:
            practice.diagnose(net, X, score)
        except ZeroDivisionError:
            pass
        for new, old in zip(practice.read_statistics(net), before,
                            strict=True):
            assert_array_equal(new, old)


@pytest.mark.parametrize('hybridized', [False, True])
def test_frozen_layers_do_not_move_and_thaw(X, hybridized):
    net = dense(X)
    if hybridized:
        net.hybridize()
    step(net, X)
    before = practice.read_statistics(net)
    practice.freeze(net)
    with autograd.predict_mode():
        expected = net(X).asnumpy()
    with autograd.record():
        Y = net(X)
    Y.backward()
    assert_allclose(Y.asnumpy(), expected, rtol=1e-12)
    for new, old in zip(practice.read_statistics(net), before, strict=True):
        assert_array_equal(new, old)
    assert {layer.gamma.grad_req for layer in practice.batch_norms(net)} == {
        'null'}
    practice.freeze(net, False)
    step(net, X)
    assert abs(practice.read_statistics(net)[0][0] - before[0][0]).min() > 0
    assert abs(net[1].gamma.grad().asnumpy()).max() > 0


@pytest.mark.parametrize('req', ['write', 'add'])
def test_gradients_of_frozen_layers_are_those_of_a_line(X, req):
    net = dense(X)
    practice.reestimate(net, [X[:11]])
    practice.freeze(net)
    weight = net[0].weight
    weight.grad_req = req
    for _ in range(2):
        step(net, X)
    (m, v), (m2, v2) = practice.read_statistics(net)
    a, b = 1 / np.sqrt(v + 1e-5), 1 / np.sqrt(v2 + 1e-5)
    W, W2 = (net[k].weight.data().asnumpy() for k in (0, 3))
    x = X.asnumpy()
    hidden = (x @ W.T - m) * a
    dY = 2 * (np.maximum(hidden, 0) @ W2.T - m2) * b * b
    dW = ((dY @ W2) * (hidden > 0) * a).T @ x
    times = 2 if req == 'add' else 1
    assert_allclose(weight.grad().asnumpy(), times * dW, rtol=1e-9, atol=1e-9)


def test_what_was_never_learned_stays_unlearned(X):
    net = network(nn.BatchNorm(scale=False), X=X)
    practice.freeze(net)
    practice.freeze(net, False)
    assert net[0].gamma.grad_req == 'null'
    assert net[0].beta.grad_req == 'write'


def test_every_section_stands_in_the_table_of_symptoms():
    table, _ = TEXT.split('## ', 1)
    labels = re.findall(r'^\((practice-[\w-]+)\)=\n## ', TEXT, re.MULTILINE)
    assert len(labels) == 13
    assert re.findall(r'{ref}`(practice-[\w-]+)`', table) == labels
    for words in ('eval mode', 'model.eval()', 'Inference worse than training',
                  'Freeze batch norm', 'Small batch'):
        assert re.search(f'^#+ .*{re.escape(words)}', TEXT, re.MULTILINE)
