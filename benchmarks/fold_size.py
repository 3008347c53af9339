"""What does it cost to fold a large model?

    python benchmarks/fold_size.py

Makes a model of 500 MB, a chain of convolutions with 1024 channels and a
normalization behind each, and folds it by `fold_onnx.fold_file`, the check
apart; for comparison it is loaded and saved by ONNX alone. Each takes its
turn in a fresh process, several times. Then a model of more than 2 GB, its
weights in a file of their own, is folded once, with the check. Needs 10 GB of
disk and 8 GB of memory. All goes into `results/fold_size.json`: seconds
(the median of the turns), and the largest resident memory of the process as
a share of the size of the model.
"""
import json
import multiprocessing
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import helper

RESULTS = Path(__file__).resolve().parent / 'results/fold_size.json'
CHANNELS, TURNS = 1024, 5


def make(path, megabytes, apart):
    """A model of this size, written weight by weight; returns its size."""
    from d2ltvm.fold_onnx import _save
    rng = np.random.default_rng(0)
    layers = round(megabytes * 2 ** 20 / (4 * 9 * CHANNELS ** 2))
    nodes, weights, name = [], {}, 'X'
    block = (rng.random((CHANNELS, CHANNELS, 3, 3), 'float32') - 0.5) / 28
    for i in range(layers):
        weights |= {f'W{i}': block, **{
            f'{letter}{i}': rng.uniform(0.5, 1.5, CHANNELS).astype('float32')
            for letter in 'GBMV'}}
        nodes += [
            helper.make_node('Conv', [name, f'W{i}'], [f'A{i}'],
                             pads=[1, 1, 1, 1]),
            helper.make_node('BatchNormalization',
                             [f'A{i}', *(f'{each}{i}' for each in 'GBMV')],
                             [f'Y{i}'])]
        name = f'Y{i}'
    graph = helper.make_graph(
        nodes, 'large',
        [helper.make_tensor_value_info('X', 1, ['N', CHANNELS, 8, 8])],
        [helper.make_tensor_value_info(name, 1, ['N', CHANNELS, 8, 8])],
        [onnx.TensorProto(name=key, data_type=1, dims=value.shape)
         for key, value in weights.items()])
    _save(helper.make_model(graph, ir_version=8, opset_imports=[
        helper.make_opsetid('', 17)]), weights, path, apart)
    return sum(each.stat().st_size for each in path.parent.glob('*'))


def plain(source, target):
    """Load and save, as ONNX does it."""
    onnx.save(onnx.load(source), target)


def folded(source, target):
    """Fold without the check."""
    from d2ltvm import fold_onnx
    fold_onnx.largest_difference = lambda *args: 0.0
    verdicts, _ = fold_onnx.fold_file(source, target)
    assert all(each.layers for each in verdicts)


def checked(source, target):
    """Fold with the check; what it said."""
    from d2ltvm import fold_onnx
    verdicts, difference = fold_onnx.fold_file(source, target)
    return {'folded': sum(bool(each.layers) for each in verdicts),
            'normalizations': len(verdicts),
            'difference': float(f'{difference:.1g}')}


def measured(connection, work, *paths):
    """In a process of its own: seconds, bytes of memory, and the result."""
    from d2ltvm import fold_onnx  # noqa: F401  loads it before the clock
    start = time.perf_counter()
    result = work(*map(str, paths))
    seconds = time.perf_counter() - start
    status = Path('/proc/self/status').read_text()  # of Linux
    peak = 1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1])
    connection.send((seconds, peak, result))


def alone(work, *paths):
    """Run `measured` in a fresh process."""
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(theirs, work, *paths))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def main():
    found = {'versions': {'onnx': version('onnx'),
                          'Python': sys.version.split()[0]}}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, 'in.onnx'), Path(folder, 'out.onnx')
        size = make(source, 500, False)
        runs = {'plain': [], 'folded': []}
        for _ in range(TURNS):
            for name, work in (('plain', plain), ('folded', folded)):
                runs[name].append(alone(work, source, target)[:2])
        found['500 MB'] = {'bytes': size} | {
            name: {'seconds': round(median(row[0] for row in rows), 2),
                   'peak_by_size': round(max(row[1] for row in rows) / size,
                                         2)}
            for name, rows in runs.items()}
        print(found['500 MB'], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, 'in.onnx'), Path(folder, 'out.onnx')
        size = make(source, 2400, True)
        seconds, peak, result = alone(checked, source, target)
        onnx.checker.check_model(str(target))
        found['above 2 GB'] = {
            'bytes': size, 'seconds_with_check': round(seconds, 1),
            'peak_by_size_with_check': round(peak / size, 2), **result,
            'files': sorted(each.name for each in Path(folder).iterdir())}
        print(found['above 2 GB'])
    RESULTS.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
    main()
