"""The grid of training runs: its layer, its equal starts, its memory."""
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from d2ltvm import from_scratch as fs
from d2ltvm.mnist import digits_28
from d2ltvm.mxnet_today import autograd, nd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'benchmarks'))
import ablation


@pytest.fixture
def digits():
    """Of 300 images 256 train, in four batches."""
    part = digits_28()
    return part._replace(train_images=part.train_images[:300],
                         train_labels=part.train_labels[:300])


def test_operator_gives_the_values_of_the_layer():
    """Loss and all gradients of the network, from the same weights.

    With a smooth activation: at the kink of a rectifier the last digit of a
    number decides on a part of the gradient.
    """
    images = nd.array(np.random.default_rng(0).uniform(size=(32, 1, 28, 28)))
    results = []
    for norm in (ablation.operator,
                 fs.training_and_testing(fs.MovingStatistics())[0]):
        params = fs.init_params(0.05, seed=1)
        with autograd.record():
            loss = fs.softmax_cross_entropy(fs.net(
                images, params, norm, activation=nd.tanh), nd.arange(32) % 10)
        loss.backward()
        results.append({'loss': loss.asnumpy(), **{
            name: p.grad.asnumpy() for name, p in params.items()}})
    for name, found in results[0].items():
        expected = results[1][name]
        zero = name in ('b1', 'b2', 'b3')  # but for rounding
        assert_allclose(found, expected, rtol=1e-4,
                        atol=1e-3 if zero else 1e-4 * abs(expected).max())


def test_both_sides_start_alike(digits, monkeypatch):
    """The same first weights and the same batches, with the same seed."""
    seen = {}

    def train_step(X, y, params, norm, rate):
        seen.setdefault(norm, []).append(
            (params['W2'].asnumpy().copy(), X.asnumpy(), y.asnumpy()))
        return 1.0

    monkeypatch.setattr(fs, 'train_step', train_step)
    for layer in (True, False):
        ablation.one_run(digits, 0.05, 0.01, 3, layer, epochs=2, training=256)
    with_layer, without = seen[ablation.operator], seen[fs.no_norm]
    assert len(with_layer) == len(without) == 8
    for a, b in zip(with_layer, without, strict=True):
        for found, expected in zip(a, b, strict=True):
            np.testing.assert_array_equal(found, expected)
    labels = np.concatenate([y for _, _, y in without[:4]])
    np.testing.assert_array_equal(np.sort(labels),
                                  np.sort(digits.train_labels[:256]))


def test_a_run_learns_and_tells(digits):
    run = ablation.one_run(digits, 0.05, 0.01, 0, True, epochs=3,
                           training=256)
    assert ablation.key(run) == (0, 0.05, 0.01, True)
    assert len(run['loss']) == len(run['validation']) == 3
    assert run['loss'][2] < run['loss'][0] and run['test'] > 0.5


def test_what_diverges_is_stored_as_none(digits):
    run = ablation.one_run(digits, 1, 1e6, 0, False, epochs=1, training=256)
    assert run['loss'] == [None]


def test_runs_are_stored_and_not_repeated(tmp_path, monkeypatch, digits):
    path = tmp_path / 'ablation.json'
    monkeypatch.setattr(ablation, 'load_mnist', lambda: digits)
    monkeypatch.setattr(ablation, 'RESULTS', path)
    for function in (ablation.load, ablation.store):
        monkeypatch.setattr(function, '__defaults__', (path,))
    calls = []

    def one_run(digits, *run):
        calls.append(run)
        if len(calls) == 7:
            raise KeyboardInterrupt
        names = 'scale', 'rate', 'seed', 'layer'
        return dict(zip(names, run, strict=True), test=0.5, loss=[None, 1])

    monkeypatch.setattr(ablation, 'one_run', one_run)
    with pytest.raises(KeyboardInterrupt):
        ablation.main(0, 2)
    assert len(ablation.load()) == 6
    ablation.main(0, 2)
    ablation.main(1, 2)
    assert len(set(calls)) == 24 == len(ablation.load()) == len(calls) - 1
    assert ablation.load() == sorted(ablation.load(), key=ablation.key)
