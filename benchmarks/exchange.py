"""What an exchange costs, on one machine and over a slow cable.

    python benchmarks/exchange.py [local] [link] [traffic] [steps] ...

Stores medians of alternating rounds in `results/exchange.json`, part by part:

- `local`: sums of three sizes by 1, 2 and 4 workers (4 are more than two
  cores) around a ring, by one worker as a server, by MPI's own `Allreduce`
  and by MXNet's parameter server;
- `link`: the same for 2 workers at the ends of a cable of software;
- `traffic`: what the cable carries while 2 workers send half a megabyte to
  each other at once, by plain sockets and by MPI;
- `steps`: one training step of 2 workers, with the gradients summed after
  the backward pass or while it goes on; on one machine and over the cable.

For `link` and `traffic`, MPI runs twice: as it comes, and with SENDS, where
it only sends, and does not `put` the rest of a long message.

The cable joins two network namespaces, which takes root, the command `ip` and
`/dev/net/tun`. Where the kernel has it, `tc qdisc add dev ... netem delay`
does the same to a pair of veth devices. All parts take some minutes.
"""
import collections
import contextlib
import fcntl
import functools
import itertools
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results/exchange.json'
SIZES = [250, 25000, 250000]  # float32 numbers
DELAY, RATE = 1e-3, 5e6  # seconds one way, bytes a second
ROUNDS = 15
SENDS = {'OMPI_MCA_btl_tcp_flags': 'send'}  # by default send, put and others
PLACES = {'cable': {}, 'cable, sends': SENDS}
MEASURE = f'{Path(__file__).resolve()}:measure'


# -- a cable between two namespaces ----------------------------------------

def why_not():
    """Why this machine cannot have a cable; empty if it can."""
    if not shutil.which('ip'):
        return 'needs the command ip (Debian: apt install iproute2)'
    if not os.access('/dev/net/tun', os.R_OK | os.W_OK):
        return 'needs /dev/net/tun'
    name = f'probe{os.getpid()}'
    made = subprocess.run(['ip', 'netns', 'add', name], capture_output=True,
                          text=True)
    if made.returncode:
        return f'needs root, to make network namespaces: {made.stderr}'
    subprocess.run(['ip', 'netns', 'del', name], check=True)
    return ''


class Cable:
    """Two network namespaces, joined by a cable of software.

    Attributes `names` and `addresses` have the two ends. Everything in them
    and the cable itself is gone after the `with` block. A line of the file
    `log` has direction, begin and end of each packet on its way.
    """

    addresses = '10.77.0.1', '10.77.0.2'
    made = itertools.count()

    def __init__(self, delay=0.0, rate=1e12, log=os.devnull):
        self.options = delay, rate, log
        number = next(self.made)
        self.names = tuple(f'd2l-{os.getpid()}-{number}{end}' for end in 'ab')

    def __enter__(self):
        for name in self.names:
            subprocess.run(['ip', 'netns', 'add', name], check=True)
            subprocess.run(['ip', '-n', name, 'link', 'set', 'lo', 'up'],
                           check=True)
        self.relay = subprocess.Popen(
            [sys.executable, __file__, '--relay', *self.names,
             *map(str, self.options)], stdout=subprocess.PIPE)
        if self.relay.stdout.readline() != b'ready\n':
            self.__exit__()
            raise RuntimeError('the cable could not be made')
        return self

    def __exit__(self, *_):
        self.relay.kill()
        self.relay.wait()
        self.relay.stdout.close()
        for name in self.names:
            found = subprocess.run(['ip', 'netns', 'pids', name], text=True,
                                   capture_output=True).stdout
            for process in found.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(['ip', 'netns', 'del', name], check=True)

    def for_mpirun(self, folder):
        """The environment in which `mpirun` reaches the other end."""
        agent = Path(folder, 'agent')  # in place of ssh
        agent.write_text('#!/bin/sh\nshift\nexec ' + ' '.join(
            self.command(1, 'unshare', '--uts', 'sh', '-c'))
            + ' "hostname the-other; $*"\n')  # or MPI takes it for one machine
        agent.chmod(0o755)
        network = {'PRTE_MCA_prte_if_include': '10.77.0.0/24',
                   'OMPI_MCA_btl_tcp_if_include': '10.77.0.0/24',
                   'OMPI_MCA_btl': 'self,tcp', 'OMPI_MCA_pml': 'ob1',
                   'OMPI_MCA_mpi_yield_when_idle': '1',
                   'PRTE_MCA_plm_ssh_agent': str(agent)}
        rights = {f'{who}_ALLOW_RUN_AS_ROOT{how}': '1'
                  for who in ('OMPI', 'PRTE') for how in ('', '_CONFIRM')}
        return {**os.environ, **network, **rights, 'OMP_NUM_THREADS': '1',
                'PRTE_MCA_hwloc_default_binding_policy': 'none',
                'PYTHONPATH': str(HERE.parent)}

    def command(self, end, *words):
        """The command that runs another one at an end of the cable."""
        return ['ip', 'netns', 'exec', self.names[end], *map(str, words)]


def tun(name, end):
    """A device whose packets a file gives and takes, in a namespace."""
    file = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
    wanted = struct.pack('16sH', b'cable%d', 0x1001)  # IFF_TUN | IFF_NO_PI
    made = fcntl.ioctl(file, 0x400454ca, wanted)  # TUNSETIFF: with its number
    device = made[:16].rstrip(b'\0').decode()
    for words in (['link', 'set', device, 'netns', name],
                  ['-n', name, 'address', 'add', f'{Cable.addresses[end]}/24',
                   'dev', device],
                  ['-n', name, 'link', 'set', device, 'up', 'mtu', '9000',
                   'txqueuelen', '10000']):
        subprocess.run(['ip', *words], check=True)
    return file


def relay(first, second, delay, rate, log):
    """Carry packets both ways, each `delay` later, `rate` bytes a second."""
    files = tun(first, 0), tun(second, 1)
    queues = {file: collections.deque() for file in files}
    free = dict.fromkeys(files, 0.0)  # when the line to there is free
    log = open(log, 'w', buffering=1)  # until it is killed
    print('ready', flush=True)
    while True:
        now, waits = time.monotonic(), []
        for file, queue in queues.items():
            while queue and queue[0][0] <= now:
                os.write(file, queue.popleft()[1])
            waits += [queue[0][0] - now] if queue else []
        for file in select.select(files, [], [], min(waits, default=None))[0]:
            packet = os.read(file, 65536)
            there = files[file == files[0]]
            begin = max(time.monotonic(), free[there])
            free[there] = begin + len(packet) / rate
            queues[there].append((free[there] + delay, packet))
            log.write(f'{files.index(there)} {begin:.6f} {free[there]:.6f}\n')


# -- what the workers measure ----------------------------------------------

def medians(exchange, ways, repeats=1, rounds=ROUNDS):
    """Quartiles of the seconds of each function, in alternating rounds.

    Of several calls in a row, so that nobody runs ahead; of the slowest
    worker.
    """
    times = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, function in ways.items():
            exchange.gather(np.zeros(1))
            begin = time.perf_counter()
            for _ in range(repeats):
                function()
            if number >= 2:
                times[name].append((time.perf_counter() - begin) / repeats)
    return {name: exchange.gather(np.quantile(t, (0.25, 0.5, 0.75))).max(0)
            for name, t in times.items()}


def time_sums(exchange, sizes, rounds=ROUNDS):
    """Seconds of a sum: 'WAY SIZE' -> quartiles."""
    from d2ltvm import distributed as dist
    found = {}
    for size in sizes:
        values = np.ones(size, 'float32')
        ways = {'MXNet server': functools.partial(exchange.sum, values)}
        if isinstance(exchange, dist.MPIExchange):
            comm, total = exchange.gradients, np.empty_like(values)
            ways = {
                'ring': functools.partial(dist.ring_sum, comm, values),
                'server': functools.partial(dist.server_sum, comm, values),
                'Allreduce': functools.partial(comm.Allreduce, values, total)}
        found |= {f'{way} {values.nbytes}': times for way, times in medians(
            exchange, ways, 5, rounds).items()}
    return found


def time_steps(exchange, batch, bucket, rounds=ROUNDS):
    """Seconds of a training step: way -> quartiles."""
    from d2ltvm import distributed as dist
    from d2ltvm import from_scratch as fs
    from d2ltvm.mxnet_today import mx, nd
    params = fs.init_params()
    for p in params.values():
        p.attach_grad()
    draw = np.random.default_rng(exchange.rank)
    X = nd.array(draw.random((batch // exchange.workers, 1, 28, 28)))
    y = nd.arange(batch // exchange.workers) % 10
    norm = dist.synchronised(exchange, fs.MovingStatistics())

    layers_only = dist.Exchange()  # its sums are those of one worker

    def step(size, exchange=exchange):
        dist.train_step(exchange, X, y, params, norm, 1e-3, size)
        mx.nd.waitall()

    return medians(exchange, {
        'after': lambda: step(None), 'overlapped': lambda: step(bucket),
        'no sum': lambda: step(None, layers_only)}, rounds=rounds)


class Sockets:
    """One connection between the ends of a cable, in place of MPI."""

    def __init__(self, end):
        self.rank, address = end, (Cable.addresses[0], 5000)
        if end == 0:
            with socket.create_server(address) as listener:
                self.wire, _ = listener.accept()
            return
        for _ in range(100):  # until the other end listens
            with contextlib.suppress(OSError):
                self.wire = socket.create_connection(address)
                return
            time.sleep(0.1)
        raise RuntimeError('the other end of the cable does not listen')

    def Sendrecv(self, values, there, recvbuf, source):
        thread = threading.Thread(target=self.wire.sendall, args=[values])
        thread.start()
        left = memoryview(recvbuf)
        while left:
            left = left[self.wire.recv_into(left):]
        thread.join()


def time_swaps(exchange, size, repeats=5):
    """Begin and end of some swaps of so many bytes with the other worker."""
    comm = getattr(exchange, 'gradients', exchange)
    values, got = np.ones(size, 'uint8'), np.empty(size, 'uint8')
    other = 1 - exchange.rank
    for number in range(repeats + 2):
        if number == 2:
            begin = time.monotonic()
        comm.Sendrecv(values, other, recvbuf=got, source=other)
    return {'seconds': (begin, time.monotonic())}


def measure(exchange, what, **arguments):
    """What `launch` runs: `time_sums`, `time_steps` or `time_swaps`."""
    return {name: np.array(times) for name, times in globals()[what](
        exchange, **arguments).items()}


def over_cable(cable, reference, arguments, settings=()):
    """What one worker at each end of a cable returns; that of worker 0."""
    from d2ltvm.launcher import WORK_MPI, find_mpirun
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'arguments.json').write_text(json.dumps(arguments))
        subprocess.run(cable.command(
            0, find_mpirun(), '--host', ','.join(cable.addresses), '-n', 2,
            sys.executable, '-c', WORK_MPI, folder, reference), check=True,
            timeout=1200, env={**cable.for_mpirun(folder), **dict(settings)})
        with np.load(Path(folder, 'worker 0.npz')) as file:
            return dict(file)


def both_ways(log, begin, end):
    """The share of a time in which packets are on their way both ways."""
    direction, first, last = np.loadtxt(log).T
    moments = np.linspace(begin, end, 10_000)
    busy = [np.searchsorted(first[direction == way], moments)
            > np.searchsorted(last[direction == way], moments)
            for way in (0, 1)]
    return np.logical_and(*busy).mean()


def traffic(size=500_000, repeats=5):
    """Seconds of a swap, and its share of traffic both ways: entries."""
    found = []
    for way, settings in (('sockets', None), *PLACES.items()):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, 'log')
            with Cable(DELAY, RATE, log) as cable:
                if settings is None:
                    ends = [subprocess.Popen(
                        cable.command(end, sys.executable, __file__,
                                      '--sockets', end, size, repeats),
                        stdout=subprocess.PIPE) for end in (0, 1)]
                    (begin, end), _ = [
                        json.loads(process.communicate(timeout=100)[0])
                        for process in ends]
                else:
                    begin, end = over_cable(
                        cable, MEASURE, {'what': 'time_swaps', 'size': size,
                                         'repeats': repeats},
                        settings)['seconds']
            share = both_ways(log, begin, end)
        found.append({'way': way.replace('cable', 'MPI'), 'bytes': size,
                      'seconds': round((end - begin) / repeats, 5),
                      'both ways': round(share, 3)})
    return found


def local(workers, what, engine, **arguments):
    """What workers on this machine measure."""
    from d2ltvm.launcher import launch
    return launch(MEASURE, workers, {
        'what': what, **arguments}, engine=engine, timeout=1200)[0]


def as_sums(place, workers, found):
    """Entries of the results: one for each way, with its sizes."""
    ways = list(dict.fromkeys(name.rpartition(' ')[0] for name in found))
    return [{'place': place, 'workers': workers, 'way': way, 'seconds': {
        name.rpartition(' ')[2]: np.round(times, 7).tolist()
        for name, times in found.items() if name.startswith(f'{way} ')}}
        for way in ways]


def as_steps(place, found):
    """Entries of the results: one for each way."""
    return [{'place': place, 'way': way, 'seconds': np.round(
        times, 7).tolist()} for way, times in found.items()]


def main(parts):
    from run import machine
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = machine()
    results |= {'processor': here['processor'], 'cores': here['cores'],
                'load': round(os.getloadavg()[0], 1),  # 0 if nobody else works
                'Open MPI': version('openmpi'), 'delay': DELAY, 'rate': RATE}
    again = [place for place, part in (('local', 'local'), *(
        (place, 'link') for place in PLACES)) if part in parts]
    kept = [s for s in results.get('sums', []) if s['place'] not in again]
    if 'local' in parts:
        for workers in (1, 2, 4):
            for engine in ('mpi', 'server'):
                kept += as_sums('local', workers, local(
                    workers, 'time_sums', engine, sizes=SIZES))
    steps = {'batch': 64, 'bucket': 100_000, 'rounds': 2 * ROUNDS}
    if 'steps' in parts:
        results['steps'] = as_steps('local', local(2, 'time_steps', 'mpi',
                                                   **steps))
    if 'traffic' in parts:
        results['traffic'] = traffic()
    if {'link', 'steps'} & set(parts):
        with Cable(DELAY, RATE) as cable:
            for place in PLACES if 'link' in parts else ():
                kept += as_sums(place, 2, over_cable(
                    cable, MEASURE, {'what': 'time_sums', 'sizes': SIZES},
                    PLACES[place]))
            if 'steps' in parts:
                results['steps'] += as_steps('cable', over_cable(
                    cable, MEASURE, {'what': 'time_steps', **steps}))
    results['sums'] = sorted(kept, key=lambda s: (
        s['place'], s['workers'], s['way']))
    text = json.dumps(results, indent=1)
    RESULTS.write_text(re.sub(r'\[[^][{}"]*\]', lambda found: ' '.join(
        found[0].split()), text) + '\n')
    print(text)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--relay']:
        relay(*sys.argv[2:4], *map(float, sys.argv[4:6]), sys.argv[6])
    elif sys.argv[1:2] == ['--sockets']:
        end, size, repeats = map(int, sys.argv[2:])
        print(json.dumps(time_swaps(Sockets(end), size, repeats)['seconds']))
    else:
        main(sys.argv[1:] or ['local', 'link', 'traffic', 'steps'])
