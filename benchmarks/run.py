"""Run the benchmark suites: `make bench`.

    python benchmarks/run.py [SUITE ...]
    python benchmarks/run.py --keep

A suite is a file `bench_SUITE.py` in this folder with a function `run`. It
returns a dict with a `title`, a `baseline` and

- `times`, {name: (low, median, high)}: quartiles, in seconds, of times that
  were measured in alternating rounds, or
- `cases`, a list of dicts with `shape`, `part` and such `times`: see
  `side_by_side.measure`, which measures engines in processes of their own.

This program prints a table, and stores the results, with a description of
the machine, in `own/SUITE.json`, and a figure in `own/SUITE.png`. Git ignores
this folder, and the page *Measurements* shows what is in it beside the results
of the book. These lie in `results`; with `--keep` (`make bench-keep` also
executes their pages again) those in `own` take their place. Results of a
machine with other instructions go beside them instead, into a folder that is
named by these, such as `results/avx2`.
"""
import importlib
import json
import os
import platform
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib

import figures
import side_by_side

matplotlib.use('agg')
HERE = Path(__file__).resolve().parent
OWN, BOOK = HERE / 'own', HERE / 'results'
PACKAGES = ('apache-tvm', 'mxnet', 'numpy')


def instructions(flags):
    """The widest vectors of a processor, from the flags of its system."""
    for flag, name in (('avx512f', 'AVX-512'), ('avx2', 'AVX2')):
        if flag in flags:
            return name
    return platform.machine()


def machine():
    """The processor, the cores this process may use, the versions."""
    first, _, _ = Path('/proc/cpuinfo').read_text().partition('\n\n')
    about = {key.strip(): value.strip() for key, _, value in (
        line.partition(':') for line in first.splitlines())}
    name = about.get('model name', platform.machine())
    if 'cpu family' in about:
        name += ' (family {cpu family}, model {model})'.format(**about)
    huge = Path('/sys/kernel/mm/transparent_hugepage/enabled')
    chosen = re.search(r'\[(\w+)\]', huge.read_text() if huge.exists() else '')
    return {'processor': name,
            'instructions': instructions(about.get('flags', '').split()),
            'cores': len(os.sched_getaffinity(0)),
            'huge pages': chosen[1] if chosen else 'none',
            'python': platform.python_version(),
            **{name: version(name) for name in PACKAGES}}


def table_of_times(result):
    """Lines of a table: one row for each function."""
    base = result['times'][result['baseline']][1]
    return [f'  {name:20} {1e3 * median:9.3f} ms '
            f'({1e3 * low:.3f} to {1e3 * high:.3f})'
            f'{median / base:8.2f} x {result["baseline"]}'
            for name, (low, median, high) in result['times'].items()]


def cell(case, peer):
    """Median, half of the spread in per cent, ratio; a dash if missing."""
    if peer not in case['times']:
        return '-'
    low, median, high = case['times'][peer]
    return (f'{1e6 * median:.4g} ±{50 * (high - low) / median:.0f}% '
            f'{case["ratios"][peer][1]:.2f}x')


def table_of_cases(result):
    """Lines of a table: one row for each shape and part."""
    peers = list(dict.fromkeys(peer for case in result['cases']
                               for peer in case['times']))
    rows = [['microseconds, spread, ratio to ' + result['baseline'], *peers]]
    rows += [['{} {}'.format('x'.join(map(str, case['shape'])), case['part']),
              *(cell(case, peer) for peer in peers)]
             for case in result['cases']]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  ' + '  '.join(word.ljust(width) for word, width in zip(
        row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f'  left out: {name} {why}'
                    for name, why in result['left_out'].items()]


def as_text(result):
    """JSON with a line for each key, lists of numbers in one line."""
    text = json.dumps(result, indent=1)
    return re.sub(r'\[[^][{}"]*\]', lambda found: ' '.join(
        found[0].split()), text) + '\n'


def write(suite, result, folder):
    """Complete the results of a suite, store them and their figure."""
    if 'cases' not in result:
        base = result['times'][result['baseline']][1]
        result['ratios'] = {name: round(times[1] / base, 3)
                            for name, times in result['times'].items()}
    result['machine'] = machine()
    folder.mkdir(exist_ok=True)
    (folder / f'{suite}.json').write_text(as_text(result))
    figures.save(result, folder / f'{suite}.png')


def report(suite):
    """Run one suite, print its table, store its results."""
    try:
        result = importlib.import_module(f'bench_{suite}').run()
    except side_by_side.NotMeasured as why:
        return print(f'{suite}: not measured, {why}', flush=True)
    print(f'{result["title"]} ({suite})')
    lines = (table_of_cases if 'cases' in result else table_of_times)(result)
    print('\n'.join(lines), flush=True)
    write(suite, result, OWN)


def place(machine, known):
    """Where the results of a machine belong: in BOOK, or in a folder of it.

    The pages quote one machine. One with other instructions stands beside.
    """
    own = machine['instructions']
    for suite in known:
        path = BOOK / f'{suite}.json'
        if path.exists() and own != json.loads(path.read_text())[
                'machine'].get('instructions', own):
            return BOOK / re.sub(r'\W', '', own).lower()
    return BOOK


def keep(known):
    """Make the own results those of the book; all must be of one machine."""
    own = [json.loads(path.read_text())['machine']
           for path in OWN.glob('*.json')]
    if not own:
        sys.exit(f'error: no results in {OWN}; run `make bench` first')
    book, machines = place(own[0], known), {}
    for suite in known:
        path = OWN / f'{suite}.json'
        if path.exists() or (book / path.name).exists():
            path = path if path.exists() else book / path.name
            found = json.loads(path.read_text())['machine']
            machines.setdefault(json.dumps(found), []).append(str(path))
    if len(machines) > 1:
        places = ' and '.join(paths[0] for paths in machines.values())
        sys.exit(f'error: {places} are of different machines or versions; '
                 'run all suites, by `make bench`, first')
    book.mkdir(exist_ok=True)
    for suite in known:
        for path in OWN.glob(f'{suite}.*'):
            shutil.copyfile(path, book / path.name)
            print(f'kept {(book / path.name).relative_to(BOOK)}')


def main():
    known = sorted(path.stem.removeprefix('bench_')
                   for path in HERE.glob('bench_*.py'))
    if sys.argv[1:] == ['--keep']:
        return keep(known)
    suites = sys.argv[1:] or known
    unknown = set(suites) - set(known)
    if unknown:
        sys.exit(f'unknown suite {sorted(unknown)}; known: {known}')
    for suite in suites:
        report(suite)


if __name__ == '__main__':
    main()
