"""Statistics over workers, the layer, and training with it."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import distributed as dist
from d2ltvm import from_scratch as fs
from d2ltvm.mxnet_today import autograd, mx, nd
from d2ltvm.theory import (batch_norm_backward, batch_norm_forward,
                           merge_statistics)
from soak import examples, later
from workers import WORKER, Together, digits


@pytest.fixture
def data(tmp_path):
    return digits(tmp_path)


# -- statistics ------------------------------------------------------------

@given(st.data())
def test_parts_merge_to_the_whole(data):
    """Any split; against float64 NumPy.

    Tolerance: the data are rounded to their dtype first, so only the
    arithmetic, in float64, is judged. A mean is off by a few roundings of
    the largest value, a deviation too, hence the terms in `offset`.
    """
    rank = data.draw(st.sampled_from([2, 4]))
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)
                      .filter(lambda sizes: sum(sizes) > 0))
    C = data.draw(st.integers(1, 4))
    inner = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)))
    offset = data.draw(st.sampled_from([0, 1, -1000, 1000]))
    scale = data.draw(st.sampled_from([1e-15, 1, 1e15]))
    dtype = data.draw(st.sampled_from(['float32', 'float64']))
    seed = data.draw(st.integers(0, 2 ** 32 - 1))
    shape = (sum(sizes), C, *(inner if rank == 4 else ()))
    X = np.random.default_rng(seed).normal(offset, 1, shape) * scale
    X = X.astype(dtype)
    parts = [dist.own_part(x) for x in np.split(X, np.cumsum(sizes)[:-1])]
    order = data.draw(st.permutations(parts))
    count, mean, M2 = merge_statistics(order)
    axes = (0, *range(2, rank))
    exact = X.astype('longdouble')
    assert count == X.size // C
    largest = float(abs(exact).max())
    assert_allclose(mean, exact.mean(axes).astype('float64'), rtol=1e-14,
                    atol=1e-15 * largest)
    assert_allclose(M2 / count, exact.var(axes).astype('float64'),
                    rtol=1e-12, atol=(1e-15 * largest) ** 2)


def test_own_part_refuses():
    with pytest.raises(ValueError, match=r'^X: expected shape \(N, F\)'):
        dist.own_part(np.zeros((2, 3, 4)))
    count, mean, M2 = dist.own_part(np.zeros((0, 3, 5, 7)))
    assert count == 0 and mean.shape == M2.shape == (3,)


# -- the layer -------------------------------------------------------------

def run_layer(X, gamma, beta, dY, cuts):
    """Y, dgamma, dbeta, dX of each worker."""
    def worker(exchange):
        mine = [np.split(a, cuts)[exchange.rank] for a in (X, dY)]
        layer = dist.SyncBatchNorm(exchange)
        Y = layer.forward(*(nd.array(a, dtype=X.dtype)
                            for a in (gamma, beta, mine[0])))
        back = layer.backward(nd.array(mine[1], dtype=X.dtype))
        return [a.asnumpy() for a in (Y, *back)]

    return Together(len(cuts) + 1).run(worker)


@given(st.data())
@settings(max_examples=examples(30))
def test_layer_is_that_of_the_whole_batch(data):
    """Against float64 on the whole batch; float32 results are rounded once.

    The tolerance is a few roundings of the largest number that appears. In
    float64 the mean itself, of size `offset`, is rounded.
    """
    rank, C = data.draw(st.sampled_from([2, 4])), data.draw(st.integers(1, 3))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    inner = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)))
    offset = data.draw(st.sampled_from([0, 1000]))
    scale = data.draw(st.sampled_from([1e-6, 1, 1e6]))
    dtype = data.draw(st.sampled_from(['float32', 'float64']))
    draw = np.random.default_rng(data.draw(st.integers(0, 1000)))
    shape = (sum(sizes), C, *(inner if rank == 4 else ()))
    X, dY = draw.normal(offset, 1, shape) * scale, draw.normal(size=shape)
    gamma, beta = draw.normal(1, 0.5, C), draw.normal(size=C)
    X, dY, gamma, beta = (a.astype(dtype) for a in (X, dY, gamma, beta))
    parts = run_layer(X, gamma, beta, dY, np.cumsum(sizes)[:-1])
    Y, cache = batch_norm_forward(*(a.astype('float64')
                                    for a in (X, gamma, beta)))
    dX, dgamma, dbeta = batch_norm_backward(dY.astype('float64'), cache)
    unit = 1e-6 if dtype == 'float32' else 1e-10
    joined = (np.concatenate([part[i] for part in parts]) for i in (0, 3))
    for got, exact in zip(joined, (Y, dX), strict=True):
        assert got.dtype == dtype
        assert_allclose(got, exact, rtol=10 * unit,
                        atol=unit * max(abs(exact).max(), cache[1].max()))
    for i, exact in ((1, dgamma), (2, dbeta)):
        got = sum(part[i] for part in parts)
        assert_allclose(got, exact, rtol=10 * unit,
                        atol=10 * unit * abs(dY).sum())


def test_each_worker_returns_its_own_share():
    """Their sum, not each of them, is the gradient of the whole."""
    draw = np.random.default_rng(0)
    X, dY = draw.normal(size=(2, 8, 3))
    parts = run_layer(X, np.ones(3), np.zeros(3), dY, (3,))
    for part, rows in zip(parts, np.split(dY, (3,)), strict=True):
        assert_allclose(part[2], rows.sum(0), rtol=1e-12)


@pytest.mark.usefixtures('semantics')
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_layer_alone_in_autograd(dtype):
    """One worker is a plain layer; dense, recorded, moving statistics."""
    draw = np.random.default_rng(0)
    X, dY = draw.normal(size=(2, 6, 3)).astype(dtype)
    arrays = {name: nd.array(a, dtype=dtype) for name, a in (
        ('H', X), ('gamma', np.full(3, 2.0)), ('beta', np.ones(3)))}
    for a in arrays.values():
        a.attach_grad()
    moving = fs.MovingStatistics()
    norm = dist.synchronised(dist.Exchange(), moving, momentum=0.7)
    for _ in range(2):
        with autograd.record():
            Y = norm(**arrays, scope_name='a')
        Y.backward(nd.array(dY, dtype=dtype))
    expected, cache = batch_norm_forward(X, np.full(3, 2, dtype),
                                         np.ones(3, dtype))
    tolerance = 1e-5 if dtype == 'float32' else 1e-12
    assert_allclose(Y.asnumpy(), expected, rtol=tolerance, atol=tolerance)
    for a, exact in zip(arrays.values(), batch_norm_backward(dY, cache),
                        strict=True):
        assert_allclose(a.grad.asnumpy(), exact, rtol=tolerance,
                        atol=10 * tolerance)
    assert_allclose(moving.var['a'].asnumpy(), X.var(0), rtol=tolerance)
    assert moving.mean['a'].dtype == np.dtype(dtype)


@pytest.mark.parametrize('shape', [(12, 3), (12, 3, 2, 3)])
def test_a_worker_without_images_takes_part(shape):
    """Its share is empty; the others get what they would get alone."""
    draw = np.random.default_rng(0)
    X, dY = draw.normal(size=(2, *shape))
    gamma, beta = draw.normal(size=(2, 3))

    def worker(exchange):
        with mx.util.np_shape():
            mine = [nd.array(np.split(a, (5, 5))[exchange.rank],
                             dtype='float64') for a in (X, dY)]
            arrays = [*(nd.array(a, dtype='float64') for a in (gamma, beta)),
                      mine[0]]
            for a in arrays:
                a.attach_grad()
            moving = fs.MovingStatistics()
            norm = dist.synchronised(exchange, moving)
            with autograd.record():
                Y = norm(arrays[2], *arrays[:2], 'bn')
            Y.backward(mine[1])
            return [a.asnumpy() for a in (Y, *(a.grad for a in arrays),
                                          moving.mean['bn'])]

    parts = Together(3).run(worker)
    Y, cache = batch_norm_forward(X, gamma, beta)
    dX, dgamma, dbeta = batch_norm_backward(dY, cache)
    assert parts[1][0].shape == (0, *shape[1:])
    for place, exact in ((0, Y), (3, dX)):
        assert_allclose(np.concatenate([part[place] for part in parts]),
                        exact, rtol=1e-9, atol=1e-12)
    for place, exact in ((1, dgamma), (2, dbeta)):
        assert_allclose(sum(part[place] for part in parts), exact, rtol=1e-9,
                        atol=1e-12)
    axes = (0, *range(2, X.ndim))
    for part in parts:
        assert_allclose(part[4], X.mean(axes), rtol=1e-9)


@pytest.mark.parametrize('shape', [(0, 3), (0, 3, 2, 2)])
def test_no_worker_has_an_image(shape):
    X = nd.array(np.zeros(shape))
    with pytest.raises(ValueError, match=r'^X: training needs .*, got 0$'):
        dist.SyncBatchNorm(dist.Exchange())(nd.ones(3), nd.zeros(3), X)


@pytest.mark.parametrize(('bad', 'error', 'message'), [
    ({'X': nd.ones((2, 3, 4))}, ValueError, 'X: expected a non-empty array'),
    ({'X': nd.array(np.zeros((4, 3, 0, 2)))}, ValueError, 'X: expected a non'),
    ({'X': np.ones((4, 3))}, TypeError, 'X: expected an NDArray'),
    ({'X': nd.ones((4, 3), dtype='float16')}, TypeError, 'X: expected an ND'),
    ({'gamma': nd.ones(3, dtype='float64')}, TypeError, 'gamma: expected an'),
    ({'beta': None}, TypeError, 'beta: expected an NDArray'),
    ({'beta': nd.ones(4)}, ValueError, r'beta: expected shape \(3,\)')])
def test_layer_names_a_bad_array(bad, error, message):
    arrays = {'gamma': nd.ones(3), 'beta': nd.zeros(3), 'X': nd.ones((4, 3))}
    arrays.update(bad)
    with pytest.raises(error, match=f'^{message}'):
        dist.SyncBatchNorm(dist.Exchange())(*arrays.values())


def test_layer_refuses():
    for momentum in (-0.1, 1, float('nan')):
        with pytest.raises(ValueError, match=r'^momentum: expected'):
            dist.synchronised(dist.Exchange(), fs.MovingStatistics(),
                              momentum)
    for eps in (0, -1, float('nan'), float('inf')):
        with pytest.raises(ValueError, match=r'^eps: expected'):
            dist.synchronised(dist.Exchange(), fs.MovingStatistics(),
                              eps=eps)
        with pytest.raises(ValueError, match=r'^eps: expected'):
            dist.SyncBatchNorm(dist.Exchange(), eps)
    with pytest.raises(TypeError, match=r'^momentum: expected a number'):
        dist.synchronised(dist.Exchange(), fs.MovingStatistics(), '0.9')
    norm = dist.synchronised(dist.Exchange(), fs.MovingStatistics())
    with pytest.raises(ValueError, match=r'^X: training needs more than'):
        norm(nd.ones((1, 3)), nd.ones(3), nd.zeros(3), scope_name='a')
    with pytest.raises(ValueError, match=r'^gamma: expected shape'):
        norm(nd.ones((4, 3)), nd.ones(2), nd.zeros(3), scope_name='a')


# -- training, in one process ----------------------------------------------

def test_alone_is_the_network_from_scratch(data):
    state = dist.train_worker(dist.Exchange(), data, steps=3, batch=8,
                              dtype='float64')
    params = {name: p.astype('float64')
              for name, p in fs.init_params().items()}
    for p in params.values():
        p.attach_grad()
    moving, losses = fs.MovingStatistics(), []
    norm, _ = fs.training_and_testing(moving)
    with np.load(data) as file:
        images, labels = file['images'], file['labels']
    for step in range(3):
        rows = dist.step_rows(step, 64, 8)
        losses.append(fs.train_step(
            nd.array(images[rows, None], dtype='float64') / 255,
            nd.array(labels[rows], dtype='float64'), params, norm, 1e-3))
    for name, p in params.items():
        assert_allclose(state[f'param.{name}'], p.asnumpy(), rtol=1e-8,
                        atol=1e-11)
    for scope, value in moving.var.items():
        assert_allclose(state[f'var.{scope}'], value.asnumpy()[None],
                        rtol=1e-9)
    assert_allclose(state['losses'], losses, rtol=1e-9)


@pytest.mark.parametrize('dtype', [
    later('float32'), 'float64'])  # the page on the launcher has float32
def test_resume_alone(data, tmp_path, dtype):
    """Every checkpoint leads to the same end, to the last bit."""
    arguments = {'data': data, 'batch': 8, 'dtype': dtype}
    unbroken = dist.train_worker(dist.Exchange(), steps=4, **arguments)
    arguments |= {'checkpoint': str(tmp_path / 'c.npz'), 'every': 2}
    dist.train_worker(dist.Exchange(), steps=3, **arguments)
    resumed = dist.train_worker(dist.Exchange(), steps=4, **arguments)
    assert len(resumed.pop('losses')) == 2
    for key, value in resumed.items():
        assert_array_equal(value, unbroken[key], err_msg=key)


def test_step_rows():
    a, b = (dist.step_rows(step, 50, 20, seed=1) for step in (0, 1))
    assert len(set(a)) == 20 and set(a) <= set(range(50))
    assert set(a) != set(b)
    assert_array_equal(a, dist.step_rows(0, 50, 20, seed=1))
    assert set(a) != set(dist.step_rows(0, 50, 20, seed=2))


@pytest.mark.parametrize(('workers', 'sync', 'batch', 'least'), [
    (4, True, 3, 4), (4, True, 65, 4), (4, False, 7, 8), (1, True, 1, 2),
    (2, False, 2, 4)])
def test_batch_that_does_not_fit(data, workers, sync, batch, least):
    exchange = dist.Exchange(0, workers)
    with pytest.raises(ValueError, match=f'^batch: expected {least} to 64, '
                       f'for {workers} workers, got {batch}'):
        dist.train_worker(exchange, data, steps=1, batch=batch, sync=sync)


def test_smallest_batch_without_synchronisation(data):
    results = Together(2).run(lambda exchange: dist.train_worker(
        exchange, data, steps=1, batch=4, sync=False, dtype='float64'))
    assert all(np.isfinite(result['losses']).all() for result in results)


@pytest.mark.soak
def test_own_statistics_in_processes(data):
    """By MPI as in threads, to the bit; each worker has its own."""
    arguments = {'data': data, 'steps': 3, 'batch': 16, 'sync': False}
    threads = Together(2).run(
        lambda exchange: dist.train_worker(exchange, **arguments))
    for state, expected in zip(dist.launch(WORKER, 2, arguments, engine='mpi'),
                               threads, strict=True):
        assert (state['mean.bn3'][0] != state['mean.bn3'][1]).any()
        for key, value in expected.items():
            assert_array_equal(state[key], value, err_msg=key)


def test_checkpoint_of_a_later_step(data, tmp_path):
    arguments = {'data': data, 'batch': 8, 'every': 2,
                 'checkpoint': str(tmp_path / 'c.npz')}
    dist.train_worker(dist.Exchange(), steps=2, **arguments)
    done = dist.train_worker(dist.Exchange(), steps=2, **arguments)
    assert done['step'] == 2 and done['losses'].size == 0
    with pytest.raises(ValueError, match=r'^steps: expected at least 2, the '
                       'step of the checkpoint, got 1'):
        dist.train_worker(dist.Exchange(), steps=1, **arguments)


def test_checkpoints_that_are_none(data, tmp_path):
    path = tmp_path / 'c.npz'
    text = tmp_path / 'text'
    text.write_text('no archive')
    dist.save_arrays(path, {'x': np.ones(3)})
    for checkpoint in (path, text):
        with pytest.raises(ValueError, match=r'^checkpoint: expected a file '
                           f'of train_worker, got {checkpoint}: '):
            dist.train_worker(dist.Exchange(), data, steps=1, batch=8,
                              checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match=r'^every: expected 1 or more, got 0'):
        dist.train_worker(dist.Exchange(), data, steps=1, batch=8, every=0,
                          checkpoint=str(tmp_path / 'new.npz'))


def test_moving_statistics_of_workers_merge():
    state = {'step': np.array(3), 'mean.a': np.array([[0., 1], [2, 1]]),
             'var.a': np.array([[1., 4], [3, 6]])}
    merged = dist.merged_moving(state)
    assert_allclose(merged.mean['a'].asnumpy(), [1, 1])
    assert_allclose(merged.var['a'].asnumpy(), [2 + 1, 5])
    second = dist.merged_moving(state, slice(1, 2))
    assert_allclose(second.var['a'].asnumpy(), [3, 6])


def test_go_on_with_other_workers():
    """As many as before: each its own statistics; else the merged ones."""
    exchange = dist.Exchange()
    state = {f'param.{name}': p.asnumpy() + 1
             for name, p in fs.init_params().items()}
    state |= {'step': np.array(7), 'mean.a': np.array([[0., 1], [2, 1]]),
              'var.a': np.array([[1., 4], [3, 6]])}
    for rank, workers, mean in ((0, 2, [0, 1]), (1, 2, [2, 1]),
                                (1, 3, [1, 1])):
        exchange.rank, exchange.workers = rank, workers
        params = fs.init_params(seed=5)
        step, moving = dist.unpack_state(state, params, exchange)
        assert step == 7
        assert_allclose(moving.mean['a'].asnumpy(), mean)
        assert_array_equal(params['W1'].asnumpy(), state['param.W1'])


def test_buckets_change_nothing(data):
    """Two workers in threads; a sum of two has one order, so to the bit."""
    def trained(**bucket):
        return Together(2).run(lambda exchange: dist.train_worker(
            exchange, data, steps=2, batch=8, **bucket))

    one = trained()
    for bucket in (1, 100_000):
        for state, expected in zip(trained(bucket=bucket), one, strict=True):
            for key, value in expected.items():
                assert_array_equal(state[key], value,
                                   err_msg=f'{bucket} {key}')


def test_buckets():
    """All names once, the last layer first; gamma and beta join."""
    params = fs.init_params()
    names = ('W4 b4 gamma3 beta3 W3 b3 gamma2 beta2 W2 b2 gamma1 beta1 W1 '
             'b1').split()
    groups = dist.buckets(params)
    assert len(groups) == 1 and sorted(groups[0]) == sorted(names)
    single = dist.buckets(params, 1)
    assert [group[0] for group in single] == ['W4', 'W3', 'W2', 'W1']
    assert [set(group) for group in dist.buckets(params, 100_000)] == [
        set(names[:8]), set(names[8:12]), set(names[12:])]


def test_a_skipped_layer_is_noticed():
    """Of the same width: without names, its statistics would be taken."""
    def worker(exchange):
        for name in ('a', 'b', 'c'):
            if (exchange.rank, name) != (1, 'b'):
                dist.SyncBatchNorm(exchange, name=name)(
                    nd.ones(3), nd.zeros(3), nd.ones((4, 3)))

    with pytest.raises(RuntimeError, match=r'^gather: worker \d is elsewhere '
                       r'than worker \d, at [bc], forward, 7 numbers$'):
        Together(2).run(worker)


def test_fit_exchange_time():
    P, n, k = [2, 4, 4], [1e3, 1e5, 1e6], [2, 4, 1]
    truth = 1e-4, 1e-9
    t = [2 * (p - 1) * (truth[0] + truth[1] * m / parts)
         for p, m, parts in zip(P, n, k, strict=True)]
    assert_allclose(dist.fit_exchange_time(P, n, k, t), truth, rtol=1e-6)
    falling = dist.fit_exchange_time(P, n, k, [4, 3, 2])
    assert (falling >= 0).all()
    for count, seconds in ((1, [1]), (3, [1, 2, 0])):
        with pytest.raises(ValueError, match=r'^seconds: expected two or'):
            dist.fit_exchange_time(P[:count], n[:count], k[:count], seconds)
    with pytest.raises(ValueError, match=r'of several workers'):
        dist.fit_exchange_time([1, 2], n[:2], k[:2], [1, 2])


@given(st.tuples(*[st.floats(0, 1)] * 2).filter(lambda x: sum(x) > 0.01))
def test_fit_finds_the_truth(truth):
    P, n = np.repeat([2, 4, 8], 3), np.tile([1., 10, 100], 3)
    for k in (np.ones(9), P):
        t = 2 * (P - 1) * (truth[0] + truth[1] * n / k)
        fitted = dist.fit_exchange_time(P, n, k, t)
        again = 2 * (P - 1) * (fitted[0] + fitted[1] * n / k)
        assert_allclose(again, t, rtol=1e-6)


def test_names_that_moved_are_still_here():
    from d2ltvm import launcher
    for name in ('Exchange', 'ServerExchange', 'find_function', 'free_port',
                 'launch', 'save_arrays', 'work'):
        assert getattr(dist, name) is getattr(launcher, name)
