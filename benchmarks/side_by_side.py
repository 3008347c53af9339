"""Measure engines side by side: each in its own process, taking turns.

Only one engine works at a time; the others wait for their next command. In
each round every form of every engine has one turn, and a ratio is taken
within a round, so that a disturbance of the machine hits both of its sides.
"""
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from engines import COPY, ENGINES

HERE = Path(__file__).resolve().parent
SECOND = HERE.parent / '.venv-bench' / 'bin' / 'python'
BASELINE = 'TVM'
TOLERANCE = 1e-4  # of the largest value; MXNet's sums are off by 1.5e-5
ROUNDS, SECONDS = 15, 0.012  # of a turn
PAUSE = 0.01  # seconds; threads of the engine before go to sleep


class NotMeasured(Exception):
    """A suite lacks what it measures; the message says what."""


def threads():
    """As many as cores that this process may use."""
    return len(os.sched_getaffinity(0))


def busy(seconds=1):
    """Share of all cores' time that others use while we do nothing."""
    def used_and_all():
        first = Path('/proc/stat').read_text().split('\n', 1)[0]
        times = list(map(int, first.split()[1:9]))
        return sum(times) - times[3] - times[4], sum(times)  # idle, waiting

    before = used_and_all()
    time.sleep(seconds)
    used, total = np.subtract(used_and_all(), before)
    return round(float(used / max(total, 1)), 2)


def environment(count, more):
    """So many threads for everyone, pinned to cores by nobody.

    TVM's threads would stay awake for 0.15 s after a call, into the turns
    of others, were they not told to spin less.
    """
    names = ('OMP', 'MKL', 'OPENBLAS', 'TVM')
    return {**os.environ, **dict.fromkeys(
        [f'{name}_NUM_THREADS' for name in names] + ['PJRT_NPROC', 'NPROC'],
        str(count)), 'TVM_BIND_THREADS': '0',
        'TVM_THREAD_POOL_SPIN_COUNT': '10000', **more}


class Worker:
    """An engine in its process; see worker.py for what it understands.

    Parameters
    ----------
    name : str
        Of the engine.
    command : list of str
        Starts the process.
    more : dict of str to str
        Environment variables it needs.
    timeout : float
        Seconds that it may take to answer; some compile for long.
    count : int, optional
        Its threads; as many as cores by default.
    """

    def __init__(self, name, command, more=None, timeout=600, count=None):
        self.name, self.timeout = name, timeout
        self.threads = count or threads()
        self.stderr = tempfile.TemporaryFile('w+')
        self.process = None
        try:
            self.process = subprocess.Popen(
                command, env=environment(self.threads, more or {}),
                text=True, bufsize=1, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=self.stderr,
                start_new_session=True)
        except OSError as error:
            self.hello = {'cannot': f'cannot be started: {error.strerror}'}
        else:
            self.hello = self.answer()

    def form(self, name):
        """A form and its threads, in words."""
        plural = 's' if self.threads > 1 else ''
        return ', '.join(filter(None, (
            name, f'{self.threads} thread{plural}')))

    def answer(self):
        """The next answer, or one that says why there is none."""
        ready, _, _ = select.select([self.process.stdout], [], [],
                                    self.timeout)
        if not ready:
            self.process.kill()
            return {'cannot': f'gave no answer in {self.timeout:g} s'}
        line = self.process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            return {'cannot': f'stopped: {self.last_words()}'}

    def last_words(self):
        """How the process ended, and its last line on stderr."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.stderr.seek(0)
        lines = self.stderr.read().strip().splitlines()
        how = signal.Signals(-code).name if code < 0 else f'status {code}'
        return '; '.join([how, *lines[-1:]])

    def ask(self, **command):
        """Send a command, wait for the answer."""
        try:
            self.process.stdin.write(json.dumps(command) + '\n')
        except OSError:
            return {'cannot': f'stopped: {self.last_words()}'}
        return self.answer()

    def close(self):
        """End the process, and those that it has started."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.stderr.close()


def start():
    """Start every engine that can be started, with one thread and with all.

    Returns
    -------
    workers : list of Worker
    left_out : dict of str to str
        Engine and, to be read after its name, why.
    """
    workers, left_out = [], {}
    for name, engine in ENGINES.items():
        if engine.second and not SECOND.exists():
            left_out[name] = ('needs the environment .venv-bench, which could '
                              'not be made: see benchmarks/environment.sh')
            continue
        python = str(SECOND) if engine.second else sys.executable
        for count in sorted({1} if engine.single else {1, threads()}):
            worker = Worker(name, [python, str(HERE / 'worker.py'), name],
                            engine.environ, count=count)
            if 'cannot' in worker.hello:
                left_out[name] = worker.hello['cannot']
                worker.close()
            else:
                workers.append(worker)
    return workers, left_out


def prepare(workers, suite, shape, left_out):
    """Let the workers make and check everything for one shape.

    Returns
    -------
    dict
        Part -> list of (worker, form, error). Who cannot or is wrong is
        missing, and named in `left_out`.
    """
    parts, checksums = {}, {}
    for worker in list(workers):
        answer = worker.ask(prepare=suite, shape=shape)
        if 'cannot' in answer:
            left_out[worker.name] = answer['cannot']
            workers.remove(worker)
            worker.close()
            continue
        checksums[worker.name] = answer['checksum']
        for part, forms in answer['errors'].items():
            for form, error in forms.items():
                title = ', '.join((worker.name, part, worker.form(form)))
                if isinstance(error, str):
                    left_out[title] = error
                elif error <= TOLERANCE:
                    parts.setdefault(part, []).append((worker, form, error))
                else:
                    left_out[title] = (
                        f'is wrong by {error:.1g} of the largest value')
    if len(set(checksums.values())) > 1:
        raise RuntimeError(f'the engines got different data: {checksums}')
    return parts


def take_turns(contestants, part, rounds, left_out):
    """Time all forms of one part in rounds.

    Returns
    -------
    dict of (str, str) to list of float
        Engine, form with threads -> seconds per call, one number a round.
    """
    times = {(worker.name, worker.form(form)): []
             for worker, form, _ in contestants}
    for i in range(rounds):
        first = i % len(contestants)  # nobody always follows the same one
        for worker, form, _ in contestants[first:] + contestants[:first]:
            key = worker.name, worker.form(form)
            if key not in times:
                continue
            time.sleep(PAUSE)
            answer = worker.ask(time=part, form=form, seconds=SECONDS)
            if 'cannot' in answer:
                left_out[', '.join(key)] = answer['cannot']
                del times[key]
            else:
                times[key].append(answer['seconds'])
    return times


def quartiles(numbers):
    """Lower quartile, median, upper quartile: four digits."""
    return [float(f'{q:.4g}') for q in np.quantile(numbers,
                                                   (0.25, 0.5, 0.75))]


def aggregate(times, errors, baseline=BASELINE):
    """From rounds to medians, spread and ratios.

    Parameters
    ----------
    times : dict of (str, str) to list of float
        Engine, form -> seconds per call in each round.
    errors : dict of (str, str) to float
    baseline : str
        The peer that others are divided by.

    Returns
    -------
    dict
        `times`, `ratios`: peer -> quartiles, in seconds and relative to
        the baseline of the same round; `errors`: peer -> number; `forms`:
        peer -> the form that counts, the fastest one; `all_forms`: median
        seconds of each, where there are several.
    """
    peers = {}
    for engine, form in times:
        peer = getattr(ENGINES.get(engine), 'peer', '') or engine
        if form.split(', ')[0] == COPY:
            peer = COPY if engine == BASELINE else engine
        peers.setdefault(peer, []).append((engine, form))
    best = {peer: min(rows, key=lambda row: np.median(times[row]))
            for peer, rows in peers.items()}
    if baseline not in best:
        raise RuntimeError(f'there are no times of {baseline}')
    base = np.array(times[best[baseline]])

    def label(peer, row):
        if peer == COPY:
            return row[1].removeprefix(COPY + ', ')
        return ', '.join(word for word in (row[0].removeprefix(peer).strip(),
                                           row[1]) if word)

    return {
        'times': {peer: quartiles(times[row]) for peer, row in best.items()},
        'ratios': {peer: quartiles(np.array(times[row]) / base)
                   for peer, row in best.items()},
        'errors': {peer: float(f'{errors[row]:.1e}')
                   for peer, row in best.items()},
        'forms': {peer: label(peer, row) for peer, row in best.items()
                  if len(peers[peer]) > 1},
        'all_forms': {f'{peer}, {label(peer, row)}': quartiles(times[row])[1]
                      for peer, rows in peers.items() if len(rows) > 1
                      for row in rows}}


def others():
    """Share of the machine that others use, with a warning if it is much."""
    share = busy()
    if share > 0.05:
        print(f'warning: other programs use {share:.0%} of this machine; '
              'the times will mean little', file=sys.stderr)
    return share


def stated(workers):
    """Versions and numbers of threads, as each engine states them."""
    engines = {}
    for worker in workers:
        engine = engines.setdefault(worker.name, {
            'versions': worker.hello['versions'], 'threads': []})
        engine['threads'].append(worker.hello['threads'])
    return engines


def measure(suite, title, shapes, rounds=ROUNDS):
    """Measure one suite for all shapes.

    Returns
    -------
    dict
        `title`, `baseline`, `rounds`, `threads`, `busy`: the share of the
        machine that others used just before, `engines`: versions and
        threads as each engine states them, `left_out`: engine -> why,
        `cases`: list of dicts with `shape`, `part` and what `aggregate`
        returns.
    """
    share = others()
    workers, left_out = start()
    engines = stated(workers)
    try:
        cases, used = [], set()
        for shape in shapes:
            parts = prepare(workers, suite, shape, left_out)
            if BASELINE in left_out:
                raise RuntimeError(f'{BASELINE} {left_out[BASELINE]}')
            for part, contestants in parts.items():
                times = take_turns(contestants, part, rounds, left_out)
                errors = {(worker.name, worker.form(form)): error
                          for worker, form, error in contestants}
                used |= {engine for engine, _ in times}
                cases.append({'shape': shape, 'part': part,
                              **aggregate(times, errors)})
    finally:
        for worker in workers:
            worker.close()
    return {'title': title, 'baseline': BASELINE, 'rounds': rounds,
            'threads': threads(), 'busy': share, 'engines': {
                name: engine for name, engine in engines.items()
                if name in used},
            'left_out': left_out, 'cases': cases}


def measure_copy(title, counts, processes=5, rounds=ROUNDS):
    """The yardstick in several fresh processes, one against the other.

    Returns
    -------
    dict
        As of `measure`; the peers are the processes, the shapes numbers of
        elements.
    """
    share, workers, left_out = others(), [], {}
    command = [sys.executable, str(HERE / 'worker.py'), BASELINE]
    try:
        for i in range(processes):
            workers.append(Worker(f'process {i + 1}', command))
            if 'cannot' in workers[-1].hello:
                raise RuntimeError(f'{BASELINE} '
                                   + workers[-1].hello['cannot'])
        cases, engines = [], stated(workers)
        for count in counts:
            contestants = prepare(workers, 'copy', [count], left_out)['call']
            times = take_turns(contestants, 'call', rounds, left_out)
            errors = {(worker.name, worker.form(form)): error
                      for worker, form, error in contestants}
            cases.append({'shape': [count], 'part': 'call', **aggregate(
                times, errors, workers[0].name)})
    finally:
        for worker in workers:
            worker.close()
    return {'title': title, 'baseline': workers[0].name, 'rounds': rounds,
            'threads': threads(), 'busy': share, 'engines': engines,
            'left_out': left_out, 'cases': cases}
