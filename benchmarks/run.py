"""Run the benchmark suites: `make bench`.

    python benchmarks/run.py [SUITE ...]

A suite is a file `bench_SUITE.py` in this folder. Its function `run` returns
``{'title': str, 'baseline': str, 'times': {name: (low, median, high)}}``, in
seconds: quartiles of times that were measured in alternating rounds. This
program prints them with their ratios to the baseline and stores them, with a
description of the machine, in `results/SUITE.json`.
"""
import importlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ('apache-tvm', 'mxnet', 'numpy')


def machine():
    """The processor, the cores this process may use, the versions."""
    names = [line.partition(':')[2].strip()
             for line in Path('/proc/cpuinfo').read_text().splitlines()
             if line.startswith('model name')]
    return {'processor': names[0] if names else platform.machine(),
            'cores': len(os.sched_getaffinity(0)),
            'python': platform.python_version(),
            **{name: version(name) for name in PACKAGES}}


def report(suite):
    """Run one suite, print its table, store its results."""
    result = importlib.import_module(f'bench_{suite}').run()
    base = result['times'][result['baseline']][1]
    print(f'{result["title"]} ({suite})')
    for name, (low, median, high) in result['times'].items():
        print(f'  {name:20} {1e3 * median:9.3f} ms '
              f'({1e3 * low:.3f} to {1e3 * high:.3f})'
              f'{median / base:8.2f} x {result["baseline"]}')
    result['ratios'] = {name: round(times[1] / base, 3)
                        for name, times in result['times'].items()}
    result['machine'] = machine()
    path = HERE / 'results' / f'{suite}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')


def main():
    known = sorted(path.stem.removeprefix('bench_')
                   for path in HERE.glob('bench_*.py'))
    suites = sys.argv[1:] or known
    unknown = set(suites) - set(known)
    if unknown:
        sys.exit(f'unknown suite {sorted(unknown)}; known: {known}')
    for suite in suites:
        report(suite)


if __name__ == '__main__':
    main()
