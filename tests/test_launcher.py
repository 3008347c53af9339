"""The exchange, the parameter server, and what goes wrong in a run."""
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import distributed as dist
from d2ltvm import launcher
from d2ltvm.mxnet_today import mx
from soak import examples, later
from workers import WORKER, Together, digits, processes, script, wait_for

soak = pytest.mark.soak


@pytest.fixture(autouse=True)
def no_process_is_left(monkeypatch, tmp_path):
    """Whatever a test does: its processes carry a mark, and are gone."""
    mark = f'D2LTVM_TEST={tmp_path}'
    monkeypatch.setenv('D2LTVM_TEST', str(tmp_path))
    yield mark
    assert processes(mark) == {}


@pytest.fixture
def data(tmp_path):
    return digits(tmp_path)


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
    ('sum', [1.0], TypeError, '^values: .* of float32 or float64, got list'),
    ('sum', np.ones(2, 'int64'), TypeError, '^values: .* got int64'),
    ('sum', np.ones((2, 2), 'float32'), ValueError, r'^values: .* \(2, 2\)'),
    ('sum', np.ones(0, 'float32'), ValueError, r'^values: .* \(0,\)'),
    ('sum', np.ones((2, 2)), ValueError, r'^values: .* \(2, 2\)'),
    ('gather', np.ones(2, 'float32'), TypeError, '^row: .* got float32'),
    ('gather', np.ones(()), ValueError, r'^row: .* \(any,\), got'),
    ('gather', None, TypeError, '^row: .* got NoneType')])
def test_exchange_refuses(method, value, kind, message):
    with pytest.raises(kind, match=message):
        getattr(launcher.Exchange(), method)(value)


def test_exchange_counts_what_it_enters_and_leaves(tmp_path):
    """One number up when it begins, and one when it ends; and what it is."""
    report = tmp_path / 'count'
    exchange, seen = launcher.Exchange(), []
    exchange.report_to(report)
    exchange._gather = lambda row: (
        seen.append(report.read_text().strip()), row[None])[1]
    for _ in range(3):
        exchange.gather(np.ones(2), 'layer')
    assert seen == [f'{n} layer, 2 numbers' for n in (1, 3, 5)]
    first, second = (exchange.start_sum(np.ones(1, 'float32'))
                     for _ in range(2))
    assert report.read_text().strip() == '8 a sum of 1 numbers'
    first(), second()
    assert report.read_text().strip() == '10 a sum of 1 numbers'
    assert exchange.rounds == 5
    os.close(exchange.report)


def test_sums_of_several_workers():
    """Begun together, also of float64, in the order of the workers."""
    big = np.array([1e16, 1.0, -1e16])

    def worker(exchange):
        waits = [exchange.start_sum(np.full(n, 1 + exchange.rank, 'float32'))
                 for n in (1, 2, 3)]
        waits.append(exchange.start_sum(big[exchange.rank:][:1]))
        return [wait() for wait in waits]

    for totals in Together(3).run(worker):
        for n, total in enumerate(totals[:3], 1):
            assert total.dtype == np.float32
            assert_array_equal(total, np.full(n, 6))
        assert_array_equal(totals[3], [big.sum()])


def test_workers_that_have_parted():
    """New lengths are compared first: a key that is unknown kills a server."""
    with pytest.raises(RuntimeError, match=r'^exchange: the workers have '
                       r'parted; they push \[4.0, 5.0\] numbers$'):
        Together(2).run(lambda exchange: exchange.sum(
            np.ones(4 + exchange.rank, 'float32')))


def test_rank_is_checked():
    with pytest.raises(ValueError, match=r'^rank: expected 0 to 0, got 1'):
        launcher.Exchange(rank=1)


def test_a_fork_has_no_connection(monkeypatch):
    """It would wait for ever: its store talks by the parent's threads."""
    exchange = launcher.Exchange(0, 2)
    monkeypatch.setattr(launcher.os, 'getpid', lambda: -1)
    with pytest.raises(RuntimeError, match=r'^exchange: a process that was '):
        exchange.sum(np.ones(3, 'float32'))


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'a.npz'
    launcher.save_arrays(path, {'x': np.arange(3)})

    def broken(file, **arrays):
        file.write(b'half of it')
        raise OSError('disk full')

    monkeypatch.setattr(np, 'savez', broken)
    with pytest.raises(OSError, match='disk full'):
        launcher.save_arrays(path, {'x': np.arange(4)})
    with np.load(path) as file:
        assert_array_equal(file['x'], [0, 1, 2])


# -- the launcher: arguments -----------------------------------------------

@pytest.mark.parametrize(('change', 'kind', 'message'), [
    ({'workers': 0}, ValueError, '^workers: expected 1 or more, got 0'),
    ({'workers': 1.5}, TypeError, '^workers: expected an integer'),
    ({'workers': True}, TypeError, '^workers: expected an integer'),
    ({'servers': -1}, ValueError, '^servers: expected 1 or more, got -1'),
    ({'timeout': 0}, ValueError, '^timeout: expected at least'),
    ({'timeout': float('nan')}, ValueError, '^timeout: expected at least'),
    ({'patience': '9'}, TypeError, '^patience: expected a number, got str'),
    ({'reference': 'main'}, ValueError, "^reference: expected 'module:func"),
    ({'reference': ':main'}, ValueError, "^reference: expected 'module:func"),
    ({'reference': None}, ValueError, "^reference: expected 'module:func"),
    ({'engine': 'pipes'}, ValueError, '^engine: .* got .pipes'),
    ({'host': 'no.such.invalid'}, ValueError, '^host: .*no.such.invalid'),
    ({'host': '203.0.113.1'}, ValueError, "^host: expected a .*'203.0.113.1'"),
    ({'port': 'x'}, TypeError, "^port: expected an integer, got 'x'"),
    ({'port': 0}, ValueError, '^port: expected 1 or more, got 0'),
    ({'port': 65536}, ValueError, '^port: expected at most 65535'),
    ({'arguments': [1]}, TypeError, r'^arguments: expected a dict.* \[1\]'),
    ({'arguments': {'a': {1}}}, TypeError, '^arguments: .* JSON')])
def test_launch_refuses(change, kind, message):
    with pytest.raises(kind, match=message):
        launcher.launch(**{'reference': WORKER, **change})


def test_a_launch_may_take_for_ever():
    launcher.check_launch(WORKER, None, None, 'mpi', 1, 1, np.inf, np.inf)


@pytest.mark.parametrize('reference', [
    'no.such:main', 'd2ltvm.distributed:no_such', '/no/such.py:main', 'main'])
def test_unknown_function(reference):
    with pytest.raises(ValueError, match=r'^reference: expected'):
        launcher.find_function(reference)


def test_file_that_is_no_python(tmp_path):
    with pytest.raises(ValueError, match=r'^reference: expected .* syntax'):
        launcher.find_function(script(tmp_path, 'this is no program\n'))


def test_free_port():
    port = launcher.free_port()
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', port))
    with pytest.raises(RuntimeError, match=r"^host: found no free port at '2"):
        launcher.free_port('203.0.113.1')  # an address of nobody


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


@pytest.mark.parametrize(('workers', 'servers'), [(1, 1), later(2, 2)])
def test_run_listens_at_loopback_only(tmp_path, workers, servers):
    """The page on the launcher has sums of two workers by a server."""
    results = launcher.launch(script(tmp_path, LISTEN), workers,
                              servers=servers)
    for result in results:
        assert_array_equal(result['rows'],
                           [[1 / 3, rank] for rank in range(workers)])
        assert_array_equal(result['total'], 2 * [sum(range(workers + 1))])
        # 1 scheduler, the servers, the workers: all at 127.0.0.1
        assert result['places'].tolist() == (1 + servers + workers) * [
            '0100007F']


ACCIDENT = '''
from d2ltvm.distributed import train_worker


def main(exchange, what, folder, data, at=21):
    """After two steps, something happens to a process of this run."""
    mark_it = exchange.mark

    def mark(text, ended=False):
        if exchange.rank == 1 and exchange.rounds == at and not ended:
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
            run = f"D2LTVM_RUN={os.environ['D2LTVM_RUN']}".encode()
            for path in Path('/proc').glob('[0-9]*'):
                try:
                    has = (path / 'environ').read_bytes().split(b'\\0')
                except OSError:
                    continue
                if role in has and run in has:
                    os.kill(int(path.name), signal.SIGKILL)
        mark_it(text, ended)

    exchange.mark = mark
    return train_worker(exchange, data, steps=6, batch=8, every=2,
                        checkpoint=folder + '/checkpoint.npz')
'''


STUCK = r'no progress for 1.5 s; waiting for worker 1, after 21 exch'


@soak  # the page on the launcher has a worker that stops, and one that dies
@pytest.mark.parametrize(('what', 'message'), [
    ('fork', r'worker 1 failed with exit code 1; its last words:'
     r'(.|\n)*SystemExit: 3'),
    ('SIGSTOP', STUCK),
    ('sleep', STUCK),
    ('scheduler', r'scheduler was killed by SIGKILL'),
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

    monkeypatch.setattr(launcher, 'time', Clock())
    with pytest.raises(RuntimeError, match=message):
        launcher.launch(script(tmp_path, ACCIDENT), 2, {
            'what': what, 'folder': str(tmp_path), 'data': data},
            patience=1.5)
    assert (tmp_path / 'checkpoint.npz').exists()


def test_error_in_the_backward_pass_is_raised(tmp_path, data, capfd):
    """By MXNet, which prints what happened; here, in threads."""
    main = launcher.find_function(script(tmp_path, ACCIDENT))
    with pytest.raises(mx.MXNetError):
        Together(2).run(lambda exchange: main(
            exchange, 'raise', str(tmp_path), data, at=25))
    assert "KeyError: 'something is wrong'" in ''.join(capfd.readouterr())


@soak
@pytest.mark.parametrize(('engine', 'failed'), [
    ('mpi', 'mpirun'), ('server', 'worker 1')])
def test_error_in_the_backward_pass_is_shown(tmp_path, data, engine, failed):
    with pytest.raises(RuntimeError, match=f'(?s)^{failed} failed with exit '
                       "code 1; .*KeyError: 'something"):
        launcher.launch(script(tmp_path, ACCIDENT), 2, {
            'what': 'raise', 'folder': str(tmp_path), 'data': data, 'at': 25},
            engine=engine)


@soak
def test_training_goes_on_after_an_accident(tmp_path, data):
    """Statistics and parameters as if nothing had happened."""
    arguments = {'data': data, 'steps': 6, 'batch': 8, 'every': 2}
    unbroken = launcher.launch(WORKER, 2, arguments)
    with pytest.raises(RuntimeError, match='worker 1 was killed by SIGKILL'):
        launcher.launch(script(tmp_path, ACCIDENT), 2, {
            'what': 'SIGKILL', 'folder': str(tmp_path), 'data': data})
    checkpoint = str(tmp_path / 'checkpoint.npz')
    with np.load(checkpoint) as state:
        assert state['step'] == 2
    arguments['checkpoint'] = checkpoint
    resumed = launcher.launch(WORKER, 2, arguments)
    for got, expected in zip(resumed, unbroken, strict=True):
        assert_array_equal(got.pop('losses'), expected.pop('losses')[2:])
        assert got.keys() == expected.keys()
        for key in expected:
            assert_array_equal(got[key], expected[key], err_msg=key)


@soak
def test_workers_are_one_process(data):
    """Three synchronised workers, unequal shares, float64: 1e-10."""
    arguments = {'data': data, 'steps': 2, 'batch': 8, 'dtype': 'float64'}
    three = launcher.launch(WORKER, 3, arguments)
    one = dist.train_worker(launcher.Exchange(), **arguments)
    for state in three:
        for key, value in one.items():
            assert_allclose(state[key], np.broadcast_to(
                value, state[key].shape), rtol=1e-8,
                atol=1e-10 * abs(value).max(), err_msg=key)


def test_time_is_over(tmp_path):
    with pytest.raises(RuntimeError, match=r'^the run is not over after 0.1 '
                       r's; waiting for scheduler, server 0, worker 0'):
        launcher.launch(script(tmp_path, '''
def main(exchange):
    time.sleep(1000)
'''), 1, timeout=0.1)


def test_port_is_taken():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match="^port: expected a free one at "
                           f"'localhost', got {port}, which is taken"):
            launcher.launch(WORKER, 1, host='localhost', port=port)


def test_a_name_of_this_machine():
    address, port = launcher.meeting_place('localhost', None)
    assert address == '127.0.0.1' and launcher.is_free(address, port)


@pytest.mark.parametrize('begun', [False, later(True)])
def test_nothing_is_left_when_the_launcher_is_killed(tmp_path, begun,
                                                     no_process_is_left):
    """Before or after the worker has begun."""
    reference = script(tmp_path, '''
def main(exchange, path):
    Path(path).touch()
    time.sleep(1000)
''')
    sign = tmp_path / 'sign'
    program = ('from d2ltvm.launcher import launch\n'
               f'launch({reference!r}, 1, {{"path": {str(sign)!r}}})')
    launcher = subprocess.Popen([sys.executable, '-c', program])
    if begun:
        wait_for(sign.exists)
    wait_for(lambda: len(processes(no_process_is_left)) == 4)
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not processes(no_process_is_left))


def test_nothing_is_left_after_an_interrupt(tmp_path, monkeypatch,
                                            no_process_is_left):
    def interrupted(*args):
        wait_for(lambda: len(processes(no_process_is_left)) == 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, 'watch', interrupted)
    with pytest.raises(KeyboardInterrupt):
        launcher.launch(WORKER, 2)


def test_a_stopped_process_is_late():
    """If the counts of the workers are the same."""
    run = {f'worker {i}': subprocess.Popen(['sleep', '1000'])
           for i in range(2)}
    run['worker 1'].send_signal(signal.SIGSTOP)
    try:
        wait_for(lambda: launcher.is_stopped(run['worker 1']), 60)
        assert launcher.slowest(run, dict.fromkeys(run, (3, 'a'))) == [
            'worker 1']
    finally:
        for process in run.values():
            process.kill()
            process.wait()
    assert not launcher.is_stopped(run['worker 1'])


def test_who_is_late_and_who_has_parted(tmp_path):
    """From the counts of the workers alone."""
    for rank, text in enumerate(['7 b, forward', '7 c, forward', '9 d']):
        (tmp_path / f'worker {rank}.count').write_text(text.ljust(80))
    counts = launcher.read_counts({}, tmp_path)
    assert counts['worker 2'] == (9, 'd')
    assert launcher.slowest({}, counts) == ['worker 0', 'worker 1']
    assert launcher.parted(counts) == ''  # worker 2 has only gone ahead
    del counts['worker 2']
    assert launcher.parted(counts) == (
        '; the workers have parted: worker 0 is at b, forward, worker 1 is '
        'at c, forward')
