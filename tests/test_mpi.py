"""Training by MPI: the same as by the parameter server, and what goes wrong.

Over a cable of software, too, which joins two network namespaces; these tests
are skipped where the user may not make them.
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import exchange as bench
from d2ltvm import distributed as dist
from d2ltvm import launcher
from soak import later
from workers import WORKER, Together, digits, processes, script, wait_for

ROOT = Path(__file__).resolve().parent.parent
soak = pytest.mark.soak


@pytest.fixture(autouse=True)
def no_process_is_left(monkeypatch, tmp_path):
    """Whatever a test does: its processes carry a mark, and are gone."""
    mark = f'D2LTVM_TEST={tmp_path}'
    monkeypatch.setenv('D2LTVM_TEST', str(tmp_path))
    yield mark
    wait_for(lambda: processes(mark) == {}, 60)


ALL = '''
from d2ltvm.distributed import ring_sum, server_sum, train_worker


def main(exchange, data):
    """Everything that workers do with each other."""
    rank, P = exchange.rank, exchange.workers
    exact = np.array([1e16, 1.0, -1e16])[rank:][:1]
    waits = [exchange.start_sum(a) for a in (
        np.full(3, 1 + rank, 'float32'), exact, np.arange(5) / 4 + rank)]
    result = {'rows': exchange.gather(np.array([1 / 3, -0.0, rank]), 'x')}
    result |= {f'sum{i}': wait() for i, wait in enumerate(waits)}
    for dtype in ('float32', 'float64'):
        state = train_worker(exchange, data, steps=2, batch=2 * P, seed=1,
                             dtype=dtype, bucket=BUCKET)
        result |= {f'{dtype} {key}': value for key, value in state.items()}
    if hasattr(exchange, 'gradients'):
        for n in (1, 2, 7):
            values = np.arange(n, dtype='float32') + rank
            for way in (ring_sum, server_sum):
                result[f'{way.__name__} {n}'] = way(
                    exchange.gradients, values)
    return result
'''


@pytest.mark.parametrize(('other', 'workers'), [
    ('threads', 2), later('server', 2), later('server', 3)])
def test_both_engines_give_the_same_bits(tmp_path, other, workers):
    """float64, and sums of two: there the order of additions is one."""
    data, results = digits(tmp_path), {}
    for engine, bucket in (('mpi', '50_000'), (other, 'None')):
        reference = script(tmp_path, ALL.replace('BUCKET', bucket))
        if engine == 'threads':  # the server's exchange, with another store
            main = launcher.find_function(reference)
            results[engine] = Together(workers).run(
                lambda exchange, main=main: main(exchange, data))
        else:
            results[engine] = launcher.launch(
                reference, workers, {'data': data}, engine=engine)
    total = workers * (workers + 1) / 2
    for rank, (mpi, server) in enumerate(zip(*results.values(), strict=True)):
        assert mpi['rows'].tobytes() == np.array(
            [[1 / 3, -0.0, r] for r in range(workers)]).tobytes()
        assert_array_equal(mpi['sum0'], np.full(3, total))
        for key, value in server.items():
            if workers == 2 or 'float32' not in key:
                assert_array_equal(mpi[key], value, err_msg=key)
        for name in ('ring_sum', 'server_sum'):
            for n in (1, 2, 7):
                assert_array_equal(
                    mpi[f'{name} {n}'], workers * np.arange(n)
                    + workers * (workers - 1) / 2, err_msg=f'{name} {n}')
        assert_array_equal(mpi['float32 param.W1'],
                           results['mpi'][0]['float32 param.W1'],
                           err_msg=f'worker {rank}')


SUM = '''
import sys
import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
own = np.random.default_rng(comm.Get_rank()).normal(size=130_000)
own, total = own.astype("float32"), np.empty(130_000, "float32")
comm.Allreduce(own, total)
if comm.Get_rank() == 0:
    np.save(sys.argv[1], total)
'''


def test_mpi_adds_in_the_same_order_in_every_run(tmp_path):
    """Of four workers, where another order gives other bits."""
    totals = []
    for name in ('first', 'second'):
        path = tmp_path / f'{name}.npy'
        subprocess.run(
            [launcher.find_mpirun(), '--allow-run-as-root', '--oversubscribe',
             '-n', '4', sys.executable, '-m', 'mpi4py', '-c', SUM, str(path)],
            check=True, timeout=300)
        totals.append(np.load(path))
    assert_array_equal(*totals)
    rows = [np.random.default_rng(rank).normal(size=130_000).astype('float32')
            for rank in range(4)]
    forward, backward = (sum(order[1:], start=order[0])
                         for order in (rows, rows[::-1]))
    assert_allclose(totals[0], forward, atol=1e-5)
    assert (forward != backward).any()


def test_mpi4py_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mpi4py', None)
    with pytest.raises(ModuleNotFoundError, match=r"^MPIExchange needs the "
                       "package 'mpi4py', which is not installed"):
        dist.MPIExchange()
    with pytest.raises(ModuleNotFoundError, match=r"^launch\(engine='mpi'\) "
                       "needs the package 'mpi4py'"):
        launcher.launch(WORKER, engine='mpi')


def test_mpirun_is_missing(monkeypatch):
    monkeypatch.setattr(launcher.shutil, 'which', lambda *_, **__: None)
    with pytest.raises(RuntimeError, match='needs the command mpirun, which '
                       'is not found; the package openmpi has it'):
        launcher.launch(WORKER, engine='mpi')


def test_mpi_without_threads(monkeypatch):
    class MPI:
        THREAD_MULTIPLE, Query_thread = 3, staticmethod(lambda: 2)

    class Package:
        pass

    Package.MPI = MPI
    monkeypatch.setitem(sys.modules, 'mpi4py', Package)
    with pytest.raises(RuntimeError, match='expected an MPI that several'):
        dist.MPIExchange()


ACCIDENT = '''
def main(exchange, what):
    exchange.gather(np.ones(1), 'first')
    if exchange.rank == 1:
        if what == 'raise':
            raise KeyError('something is wrong')
        os.kill(os.getpid(), getattr(signal, what))
    exchange.gather(np.ones(1), 'second')
    return {}
'''


@soak  # the page on the launcher has a worker that raises an error
@pytest.mark.parametrize(('what', 'message'), [
    ('raise', r"(?s)^mpirun failed with exit code 1; .*KeyError: 'something"),
    ('SIGKILL', r'(?s)^mpirun failed with exit code .*rank 1 .* signal 9'),
    ('SIGSTOP', r'^no progress for 10 s; waiting for worker 1, '
     r'after 1 exchanges')])
def test_accident_ends_the_run(tmp_path, what, message):
    with pytest.raises(RuntimeError, match=message):
        launcher.launch(script(tmp_path, ACCIDENT), 2, {'what': what},
                        patience=10 if what == 'SIGSTOP' else 300,
                        engine='mpi')


def test_nothing_is_left_when_the_launcher_is_killed(tmp_path,
                                                     no_process_is_left):
    reference = script(tmp_path, '''
def main(exchange, path):
    Path(path).touch()
    time.sleep(1000)
''')
    sign = tmp_path / 'sign'
    program = ('from d2ltvm.launcher import launch\n'
               f'launch({reference!r}, 1, {{"path": {str(sign)!r}}}, '
               'engine="mpi")')
    started = subprocess.Popen([sys.executable, '-c', program])
    wait_for(sign.exists)
    running = processes(no_process_is_left)
    assert len(running) == 4
    for process in running:  # what needs no MXNet starts without it
        assert 'libmxnet' not in Path(f'/proc/{process}/maps').read_text()
    started.kill()
    started.wait()
    wait_for(lambda: not processes(no_process_is_left))


# -- two machines that are made of one -------------------------------------

@pytest.fixture(scope='module')
def cable():
    """Two network namespaces, joined; packets take a hundredth second."""
    if reason := bench.why_not():
        pytest.skip(f'two network namespaces: {reason}')
    with bench.Cable(delay=0.01) as joined:
        yield joined


def commands_of(page, cell):
    """The lines of the shell in a cell of text, in order."""
    notebook = nbformat.read(ROOT / f'chapters/{page}.ipynb', 4)
    text = next(c.source for c in notebook.cells if c.id == cell)
    return re.search(r'```bash\n(.*?)```', text, re.DOTALL)[1]


def test_cable_delays(cable):
    """A round trip takes twice as long as one way, and not for ever."""
    server = subprocess.Popen(cable.command(1, sys.executable, '-c', '''
import socket
with socket.create_server(("10.77.0.2", 7777)) as listener:
    print("ready", flush=True)
    one, _ = listener.accept()
    one.sendall(one.recv(1))
'''), stdout=subprocess.PIPE)
    assert server.stdout.readline() == b'ready\n'
    seconds = subprocess.run(cable.command(0, sys.executable, '-c', '''
import socket, time
one = socket.create_connection(("10.77.0.2", 7777))
begin = time.monotonic()
one.sendall(b"x")
assert one.recv(1) == b"x"
print(time.monotonic() - begin)
'''), stdout=subprocess.PIPE, check=True, text=True).stdout
    assert server.wait() == 0 and float(seconds) >= 0.02
    server.stdout.close()


def equal_in_both(folder):
    """Both workers end with the same parameters; returns the steps."""
    with (np.load(folder / 'worker 0.npz') as one,
          np.load(folder / 'worker 1.npz') as two):
        for key in one:
            if key.startswith('param.'):
                assert_array_equal(one[key], two[key], err_msg=key)
        return int(one['step'])


@soak
def test_commands_of_the_parameter_server(cable, tmp_path):
    """Those of the page, with scheduler and worker 0 at one end."""
    text = commands_of('launcher', 'cluster').replace(
        '10.0.0.1', cable.addresses[0]).replace('FOLDER', str(tmp_path))
    text = text.replace('python', shlex.quote(sys.executable))
    exports = '\n'.join(line for line in text.split('\n')
                        if line.startswith('export'))
    scheduler, server, worker = re.findall(
        r'^DMLC_ROLE=(?:.|\n)*?"(?:.|\n)*?"', text, re.MULTILINE)
    second = worker.replace(f"'{tmp_path}', 0", f"'{tmp_path}', 1")
    assert second != worker
    (tmp_path / 'arguments.json').write_text(json.dumps(
        {'data': digits(tmp_path), 'steps': 3, 'batch': 8}))
    running = [subprocess.Popen(
        cable.command(end, 'sh', '-c', f'{exports}\n{command}'),
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
        for end, command in ((0, scheduler), (1, server), (0, worker),
                             (1, second))]
    try:
        for process in running:
            assert process.wait(600) == 0
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert equal_in_both(tmp_path) == 3


def test_commands_of_mpi(cable, tmp_path):
    """The program and the command of the page; alone it gives the same."""
    if ' ' in launcher.find_mpirun():
        pytest.skip('mpirun cannot start programs of a path with a blank on '
                    'another machine')
    notebook = nbformat.read(ROOT / 'chapters/distributed.ipynb', 4)
    text = next(c.source for c in notebook.cells if c.id == 'cluster')
    program = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
    program = program.replace('steps=400', 'steps=3')
    (tmp_path / 'train.py').write_text(program)
    command = commands_of('distributed', 'cluster').split('\n')[0]
    for name, address in zip(('10.0.0.1', '10.0.0.2'), cable.addresses,
                             strict=True):
        command = command.replace(name, address)
    command = command.replace('mpirun', shlex.quote(launcher.find_mpirun()))
    command = command.replace('python', shlex.quote(sys.executable))
    os.rename(digits(tmp_path), tmp_path / 'digits.npz')
    subprocess.run(cable.command(0, 'sh', '-c', command), cwd=tmp_path,
                   env=cable.for_mpirun(tmp_path), check=True, timeout=600)
    alone = dist.train_worker(dist.Exchange(), str(tmp_path / 'digits.npz'),
                              steps=3, batch=16)
    with np.load(tmp_path / 'trained.npz') as state:
        assert state['mean.bn1'].shape[0] == 2  # two workers
        for key, value in alone.items():
            assert_allclose(state[key][:1] if '.bn' in key else state[key],
                            value, rtol=1e-3, atol=1e-4, err_msg=key)


def test_a_cable_leaves_nothing():
    if reason := bench.why_not():
        pytest.skip(f'two network namespaces: {reason}')
    with bench.Cable() as joined:
        sleeper = subprocess.Popen(joined.command(0, 'sleep', '1000'))
        time.sleep(0.1)
        relay = joined.relay.pid
    assert sleeper.wait(60) == -signal.SIGKILL
    assert not Path('/proc', str(relay)).exists()
    names = subprocess.run(['ip', 'netns', 'list'], capture_output=True,
                           text=True, check=True).stdout
    assert not set(joined.names) & set(names.split())


def test_traffic_both_ways(tmp_path):
    """Of ten seconds, two are busy in both directions."""
    log = tmp_path / 'log'
    log.write_text('0 100 103\n1 101 102\n0 103 104\n1 103 109\n1 109 112\n')
    assert_allclose(bench.both_ways(log, 100, 110), 0.2, atol=0.001)


def test_sockets_carry_both_ways(tmp_path):
    """Two ends swap bytes by plain sockets; the cable writes it down."""
    if reason := bench.why_not():
        pytest.skip(f'two network namespaces: {reason}')
    log = tmp_path / 'log'
    with bench.Cable(rate=5e6, log=log) as joined:
        ends = [subprocess.Popen(joined.command(
            end, sys.executable, bench.__file__, '--sockets', end, 50_000, 2),
            stdout=subprocess.PIPE) for end in (0, 1)]
        for process in ends:
            begin, end = json.loads(process.communicate(timeout=60)[0])
            assert process.returncode == 0 and begin < end
            assert bench.both_ways(log, begin, end) > 0


def test_stored_times():
    """Each way and place, and the quartiles in order."""
    found = json.loads(bench.RESULTS.read_text())
    assert found['processor'] and found['cores'] >= 1
    assert {(s['place'], s['workers'], s['way']) for s in found['sums']} == {
        *(('local', P, way) for P in (1, 2, 4) for way in (
            'ring', 'server', 'Allreduce', 'MXNet server')),
        *((place, 2, way) for place in bench.PLACES
          for way in ('ring', 'server', 'Allreduce'))}
    assert [s['way'] for s in found['traffic']] == [
        'sockets', 'MPI', 'MPI, sends']
    for swap in found['traffic']:
        assert swap['seconds'] > 0 and 0 <= swap['both ways'] <= 1
    assert {(s['place'], s['way']) for s in found['steps']} == {
        (place, way) for place in ('local', 'cable')
        for way in ('after', 'overlapped', 'no sum')}
    times = [s['seconds'] for s in found['steps']]
    for entry in found['sums']:
        assert list(entry['seconds']) == [str(4 * n) for n in bench.SIZES]
        times += entry['seconds'].values()
    for low, median, high in times:
        assert 0 < low <= median <= high
