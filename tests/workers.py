"""What the tests of several processes share."""
import os
import threading
import time
from pathlib import Path

import numpy as np

from d2ltvm.launcher import ServerExchange, save_arrays
from d2ltvm.mxnet_today import nd

WORKER = 'd2ltvm.distributed:train_worker'


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


def digits(folder):
    """A file of 64 random images and labels."""
    draw, path = np.random.default_rng(0), folder / 'data.npz'
    save_arrays(path, {
        'images': draw.integers(256, size=(64, 28, 28)).astype('uint8'),
        'labels': draw.integers(10, size=64).astype('uint8')})
    return str(path)


def script(folder, source, name='main'):
    path = folder / 'program.py'
    path.write_text('import os, signal, sys, time\nfrom pathlib import Path\n'
                    'import numpy as np\n' + source)
    return f'{path}:{name}'


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'this takes too long'
        time.sleep(0.05)


class Together:
    """Exchanges of several workers in threads, with a store of threads."""

    def __init__(self, workers):
        self.workers, self.slots = workers, [None] * workers
        self.barrier = threading.Barrier(workers)

    def exchange(self, rank):
        return ServerExchange(rank, Store(self, rank))

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


class Store:
    """A store of one of these workers: what is pulled is the sum."""

    def __init__(self, together, rank):
        self.together, self.rank = together, rank
        self.num_workers, self.keys = together.workers, {}

    def init(self, key, value):
        self.together.barrier.wait()  # as MXNet does
        self.keys[key] = value.shape

    def push(self, key, value):
        assert self.keys[key] == value.shape and value.dtype == np.float32
        self.together.slots[self.rank] = key, value.asnumpy()

    def pull(self, key, out):
        self.together.barrier.wait()
        slots = list(self.together.slots)
        self.together.barrier.wait()
        assert {name for name, _ in slots} == {key}
        out[:] = nd.array(sum(value for _, value in slots))
