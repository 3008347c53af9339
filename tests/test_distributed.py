"""Statistics over workers, the parameter server, and what goes wrong."""
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

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
from soak import examples

WORKER = 'd2ltvm.distributed:train_worker'
soak = pytest.mark.soak


@pytest.fixture(autouse=True)
def no_process_is_left(monkeypatch, tmp_path):
    """Whatever a test does: its processes carry a mark, and are gone."""
    mark = f'D2LTVM_TEST={tmp_path}'
    monkeypatch.setenv('D2LTVM_TEST', str(tmp_path))
    yield mark
    assert processes(mark) == {}


def processes(mark):
    """Process number -> command, of those whose environment has a mark."""
    found = {}
    for path in Path('/proc').glob('[0-9]*'):
        try:
            if (mark.encode() in (path / 'environ').read_bytes().split(b'\0')
                    and int(path.name) != os.getpid()):
                found[int(path.name)] = (path / 'cmdline').read_text()
        except OSError:
            continue
    return found


def script(folder, source, name='main'):
    path = folder / 'program.py'
    path.write_text('import os, signal, sys, time\nfrom pathlib import Path\n'
                    'from d2ltvm.mxnet_today import mx\nimport numpy as np\n'
                    'from d2ltvm.distributed import *\n' + source)
    return f'{path}:{name}'


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(0)
    path = tmp_path / 'data.npz'
    dist.save_arrays(path, {
        'images': draw.integers(256, size=(64, 28, 28)).astype('uint8'),
        'labels': draw.integers(10, size=64).astype('uint8')})
    return str(path)


class Together:
    """Exchanges of several workers in threads, without MXNet's store."""

    def __init__(self, workers):
        self.workers, self.slots = workers, [None] * workers
        self.barrier = threading.Barrier(workers)

    def exchange(self, rank):
        exchange = dist.Exchange()
        exchange.rank, exchange.workers, exchange.store = (
            rank, self.workers, self)

        def push_and_pull(values):
            self.slots[rank] = values
            self.barrier.wait()
            total = np.zeros_like(values)
            for slot in self.slots:
                total = total + slot
            self.barrier.wait()
            return total

        exchange._push_and_pull = push_and_pull
        return exchange

    def run(self, function):
        results, errors = [None] * self.workers, []

        def one(rank):
            try:
                results[rank] = function(self.exchange(rank))
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,))
                   for rank in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(
                e, threading.BrokenBarrierError)), errors[0])
        return results


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


# -- the exchange ----------------------------------------------------------

ROWS = st.lists(st.floats(width=64), min_size=1, max_size=8)


@given(rows=st.lists(ROWS, min_size=1, max_size=5))
@settings(max_examples=examples(30))
def test_gather_keeps_every_bit(rows):
    """Also nan, infinities, -0 and subnormal numbers, of any worker."""
    n = min(map(len, rows))
    rows = np.array([row[:n] for row in rows])
    tables = Together(len(rows)).run(
        lambda exchange: exchange.gather(rows[exchange.rank]))
    for table in tables:
        assert table.tobytes() == rows.tobytes()


@pytest.mark.parametrize(('method', 'value', 'kind', 'message'), [
    ('sum', [1.0], TypeError, '^values: expected an array of float32, got li'),
    ('sum', np.ones(2, 'int64'), TypeError, '^values: .* got int64'),
    ('sum', np.ones((2, 2), 'float32'), ValueError, r'^values: .* \(2, 2\)'),
    ('sum', np.ones(0, 'float32'), ValueError, r'^values: .* \(0,\)'),
    ('sum', np.ones((2, 2)), ValueError, r'^row: .* \(2, 2\)'),
    ('gather', np.ones(2, 'float32'), TypeError, '^row: .* got float32'),
    ('gather', np.ones(()), ValueError, r'^row: expected shape \(n,\)'),
    ('gather', None, TypeError, '^row: .* got NoneType')])
def test_exchange_refuses(method, value, kind, message):
    with pytest.raises(kind, match=message):
        getattr(dist.Exchange(), method)(value)


def test_exchange_counts_what_it_enters_and_leaves(tmp_path):
    report = tmp_path / 'count'
    exchange, seen = dist.Exchange(report=report), []
    exchange.store = exchange.buffers
    exchange._push_and_pull = lambda values: (
        seen.append(report.read_text()), values)[1]
    for _ in range(6):
        exchange.sum(np.ones(1, 'float32'))
    assert seen == ['1', '3', '5', '7', '9', '11']
    assert report.read_text() == '12' and exchange.rounds == 6
    os.close(exchange.report)


def test_rank_is_checked():
    with pytest.raises(ValueError, match=r'^rank: expected 0 to 0, got 1'):
        dist.Exchange(rank=1)


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


def test_a_fork_has_no_connection(monkeypatch):
    """It would wait for ever: its store talks by the parent's threads."""
    class Store:
        num_workers = 2

    exchange = dist.Exchange(0, Store())
    monkeypatch.setattr(dist.os, 'getpid', lambda: -1)
    with pytest.raises(RuntimeError, match=r'^exchange: a process that was '):
        exchange.sum(np.ones(3, 'float32'))


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


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
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
    exchange = dist.Exchange()
    exchange.workers = workers
    with pytest.raises(ValueError, match=f'^batch: expected {least} to 64, '
                       f'for {workers} workers, got {batch}'):
        dist.train_worker(exchange, data, steps=1, batch=batch, sync=sync)


def test_smallest_batch_without_synchronisation(data):
    results = Together(2).run(lambda exchange: dist.train_worker(
        exchange, data, steps=1, batch=4, sync=False, dtype='float64'))
    assert all(np.isfinite(result['losses']).all() for result in results)


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
    with pytest.raises(ValueError, match=r'^every: expected at least 1'):
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


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'a.npz'
    dist.save_arrays(path, {'x': np.arange(3)})

    def broken(file, **arrays):
        file.write(b'half of it')
        raise OSError('disk full')

    monkeypatch.setattr(np, 'savez', broken)
    with pytest.raises(OSError, match='disk full'):
        dist.save_arrays(path, {'x': np.arange(4)})
    with np.load(path) as file:
        assert_array_equal(file['x'], [0, 1, 2])


# -- the launcher: arguments -----------------------------------------------

@pytest.mark.parametrize(('change', 'kind', 'message'), [
    ({'workers': 0}, ValueError, '^workers: expected more than 0, got 0'),
    ({'workers': 1.5}, TypeError, '^workers: expected a whole number'),
    ({'workers': True}, TypeError, '^workers: expected a whole number'),
    ({'servers': -1}, ValueError, '^servers: expected more than 0'),
    ({'timeout': 0}, ValueError, '^timeout: expected more than 0'),
    ({'timeout': float('nan')}, ValueError, '^timeout: expected more'),
    ({'patience': '9'}, TypeError, "^patience: expected a number, got '9'"),
    ({'reference': 'main'}, ValueError, "^reference: expected 'module:func"),
    ({'reference': ':main'}, ValueError, "^reference: expected 'module:func"),
    ({'reference': None}, ValueError, "^reference: expected 'module:func"),
    ({'port': 'x'}, TypeError, "^port: expected a whole number, got 'x'"),
    ({'port': 0}, ValueError, '^port: expected more than 0, got 0'),
    ({'port': 65536}, ValueError, '^port: expected at most 65535'),
    ({'arguments': [1]}, TypeError, r'^arguments: expected a dict.* \[1\]'),
    ({'arguments': {'a': {1}}}, TypeError, '^arguments: .* JSON')])
def test_launch_refuses(change, kind, message):
    with pytest.raises(kind, match=message):
        dist.launch(**{'reference': WORKER, **change})


@pytest.mark.parametrize('reference', [
    'no.such:main', 'd2ltvm.distributed:no_such', '/no/such.py:main', 'main'])
def test_unknown_function(reference):
    with pytest.raises(ValueError, match=r'^reference: expected'):
        dist.find_function(reference)


def test_file_that_is_no_python(tmp_path):
    with pytest.raises(ValueError, match=r'^reference: expected .* syntax'):
        dist.find_function(script(tmp_path, 'this is no program\n'))


def test_free_port():
    port = dist.free_port()
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', port))
    with pytest.raises(RuntimeError, match=r"^host: found no free port at '2"):
        dist.free_port('203.0.113.1')  # an address of nobody


def test_fit_exchange_time():
    P, n = [1, 2, 4, 4], [1e3, 1e5, 1e3, 1e6]
    truth = 1e-4, 2e-4, 1e-9
    t = [truth[0] + p * (truth[1] + 2 * m * truth[2])
         for p, m in zip(P, n, strict=True)]
    assert_allclose(dist.fit_exchange_time(P, n, t), truth, rtol=1e-6)
    falling = dist.fit_exchange_time(P, n, [4, 3, 2, 1])
    assert (falling >= 0).all()
    for seconds in ([1, 2], [1, 2, 3, 0]):
        with pytest.raises(ValueError, match=r'^seconds: expected three'):
            dist.fit_exchange_time(P[:len(seconds)], n[:len(seconds)],
                                   seconds)


@given(st.tuples(*[st.floats(0, 1)] * 3).filter(lambda x: sum(x) > 0.01))
def test_fit_finds_the_truth(truth):
    P = np.repeat([1, 2, 4], 3)
    n = np.tile([1., 10, 100], 3)
    t = truth[0] + P * (truth[1] + 2 * n * truth[2])
    fitted = dist.fit_exchange_time(P, n, t)
    again = fitted[0] + P * (fitted[1] + 2 * n * fitted[2])
    assert_allclose(again, t, rtol=1e-6)


# -- the launcher: runs ----------------------------------------------------

LISTEN = '''
def main(exchange):
    """Ports that processes of this run listen at, and where."""
    mark = f"D2LTVM_RUN={os.environ['D2LTVM_RUN']}".encode()
    sockets = set()
    for path in Path('/proc').glob('[0-9]*'):
        try:
            if mark in (path / 'environ').read_bytes().split(b'\\0'):
                for fd in os.listdir(path / 'fd'):
                    sockets.add(os.path.realpath(path / 'fd' / fd))
        except OSError:
            continue
    sockets = {os.path.basename(name) for name in sockets}
    rows = [row.split() for kind in ('tcp', 'tcp6')
            for row in Path('/proc/net', kind).read_text().split('\\n')[1:-1]]
    places = [row[1].split(':')[0] for row in rows
              if row[3] == '0A' and f'socket:[{row[9]}]' in sockets]
    rows = exchange.gather(np.array([1 / 3, exchange.rank]))
    total = exchange.sum(np.full(2, 1 + exchange.rank, 'float32'))
    return {'places': np.array(places), 'rows': rows, 'total': total}
'''


def test_run_listens_at_loopback_only(tmp_path):
    results = dist.launch(script(tmp_path, LISTEN), 2, servers=2)
    for result in results:
        assert_array_equal(result['rows'], [[1 / 3, 0], [1 / 3, 1]])
        assert_array_equal(result['total'], [3, 3])
        # 1 scheduler, 2 servers, 2 workers: all at 127.0.0.1
        assert result['places'].tolist() == 5 * ['0100007F']


ACCIDENT = '''
def main(exchange, what, folder, data, at=21):
    """After two steps, something happens to a process of this run."""
    def sum_until(values):
        if exchange.rank == 1 and exchange.rounds == at:
            print('last words', flush=True)
            Path(folder, 'accident').touch()
            if what == 'raise':
                raise KeyError('something is wrong')
            if what == 'sleep':
                time.sleep(1000)
            if what == 'fork':
                if os.fork() == 0:
                    time.sleep(1000)
                sys.exit(3)
            if what.startswith('SIG'):
                os.kill(os.getpid(), getattr(signal, what))
            role = f'DMLC_ROLE={what}'.encode()
            mark = f"D2LTVM_RUN={os.environ['D2LTVM_RUN']}".encode()
            for path in Path('/proc').glob('[0-9]*'):
                try:
                    has = (path / 'environ').read_bytes().split(b'\\0')
                except OSError:
                    continue
                if role in has and mark in has:
                    os.kill(int(path.name), signal.SIGKILL)
        return Exchange.sum(exchange, values)

    exchange.sum = sum_until
    return train_worker(exchange, data, steps=6, batch=8, every=2,
                        checkpoint=folder + '/checkpoint.npz')
'''


STUCK = r'no progress for 1.5 s; waiting for worker 1, after 21 exch'


@pytest.mark.parametrize(('what', 'message'), [
    pytest.param('fork', r'worker 1 failed with exit code 1; its last words:'
                 r'(.|\n)*SystemExit: 3', marks=soak),
    pytest.param('SIGSTOP', STUCK, marks=soak),
    ('sleep', STUCK),
    ('server', r'server 0 was killed by SIGKILL')])
def test_accident_ends_the_run(tmp_path, data, what, message, monkeypatch):
    class Clock:
        """Stands still until the accident: a busy machine is none."""

        sleep, begin = time.sleep, 0.0

        def monotonic(self):
            if not (tmp_path / 'accident').exists():
                return 0.0
            self.begin = self.begin or time.monotonic()
            return time.monotonic() - self.begin

    monkeypatch.setattr(dist, 'time', Clock())
    with pytest.raises(RuntimeError, match=message):
        dist.launch(script(tmp_path, ACCIDENT), 2, {
            'what': what, 'folder': str(tmp_path), 'data': data},
            patience=1.5)
    assert (tmp_path / 'checkpoint.npz').exists()


def test_error_in_the_backward_pass_is_shown(tmp_path, data):
    with pytest.raises(RuntimeError, match=r"(?s)worker 1 .*KeyError: 'some"):
        dist.launch(script(tmp_path, ACCIDENT), 2, {
            'what': 'raise', 'folder': str(tmp_path), 'data': data, 'at': 25})


@soak
def test_training_goes_on_after_an_accident(tmp_path, data):
    """Statistics and parameters as if nothing had happened."""
    arguments = {'data': data, 'steps': 6, 'batch': 8, 'every': 2}
    unbroken = dist.launch(WORKER, 2, arguments)
    with pytest.raises(RuntimeError, match='worker 1 was killed by SIGKILL'):
        dist.launch(script(tmp_path, ACCIDENT), 2, {
            'what': 'SIGKILL', 'folder': str(tmp_path), 'data': data})
    checkpoint = str(tmp_path / 'checkpoint.npz')
    with np.load(checkpoint) as state:
        assert state['step'] == 2
    resumed = dist.launch(WORKER, 2, {**arguments, 'checkpoint': checkpoint})
    for got, expected in zip(resumed, unbroken, strict=True):
        assert_array_equal(got.pop('losses'), expected.pop('losses')[2:])
        assert got.keys() == expected.keys()
        for key in expected:
            assert_array_equal(got[key], expected[key], err_msg=key)


@soak
def test_workers_are_one_process(data):
    """Three synchronised workers, unequal shares, float64: 1e-10."""
    arguments = {'data': data, 'steps': 2, 'batch': 8, 'dtype': 'float64'}
    three = dist.launch(WORKER, 3, arguments)
    one = dist.train_worker(dist.Exchange(), **arguments)
    for state in three:
        for key, value in one.items():
            assert_allclose(state[key], np.broadcast_to(
                value, state[key].shape), rtol=1e-8,
                atol=1e-10 * abs(value).max(), err_msg=key)


def test_time_is_over(tmp_path):
    with pytest.raises(RuntimeError, match=r'^the run is not over after 1 s; '
                       r'waiting for scheduler, server 0, worker 0'):
        dist.launch(script(tmp_path, '''
def main(exchange):
    time.sleep(1000)
'''), 1, timeout=1)


def test_port_is_taken(tmp_path):
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen()
        with pytest.raises(RuntimeError, match=r'^scheduler .*(fail|kill)ed'):
            dist.launch(WORKER, 1, port=listener.getsockname()[1])


def test_nothing_is_left_when_the_launcher_is_killed(tmp_path,
                                                     no_process_is_left):
    reference = script(tmp_path, '''
def main(exchange, path):
    Path(path).touch()
    time.sleep(1000)
''')
    sign = tmp_path / 'sign'
    program = ('from d2ltvm.distributed import launch\n'
               f'launch({reference!r}, 1, {{"path": {str(sign)!r}}})')
    launcher = subprocess.Popen([sys.executable, '-c', program])
    wait_for(sign.exists)
    assert len(processes(no_process_is_left)) == 4
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not processes(no_process_is_left))


def test_nothing_is_left_after_an_interrupt(tmp_path, monkeypatch,
                                            no_process_is_left):
    def interrupted(*args):
        assert len(processes(no_process_is_left)) == 4
        raise KeyboardInterrupt

    monkeypatch.setattr(dist, 'watch', interrupted)
    with pytest.raises(KeyboardInterrupt):
        dist.launch(WORKER, 2)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'this takes too long'
        time.sleep(0.05)
