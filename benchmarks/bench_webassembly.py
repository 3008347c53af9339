"""The network and the operator as WebAssembly, in Node and in Chromium.

The module is the one behind the digit pad of the book, the other engine ONNX
Runtime Web. Both read the images of 26 x 26 pixels, use one thread, and are
given the input and give the result outside of their memory. A place, Node or
a page, is one process with all programs in it; these take turns.
"""
import base64
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

import data
import onnxruntime_web
import side_by_side
from engines import CROPPED, FULL, ONNXRuntime

HERE = Path(__file__).resolve().parent
THEIRS = 'ONNX Runtime Web'
OPERATOR = 1, 32, 28, 28
BASELINE = 'simd'  # what every browser has, and ONNX Runtime Web, too
STARTS = 7


class Place(side_by_side.Worker):
    """Node or a page, in a process that ends by itself when told so."""

    def close(self):
        if self.process and self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                pass
        super().close()


@cache
def node():
    """Node, with the switch that older ones need for the build relaxed."""
    switch = '--experimental-wasm-relaxed-simd'
    try:
        known = subprocess.run(['node', switch, '-e', ''],
                               capture_output=True).returncode == 0
    except OSError:
        known = False
    return ['node', switch] if known else ['node']


def commands(folder):
    """What starts each place."""
    return {'Chromium': [sys.executable, f'{HERE}/web/place.py', str(folder)],
            'Node': [*node(), f'{folder}/answer.mjs']}


def write_network(folder):
    """Weights, images and models of the stored digit network."""
    from d2ltvm import webassembly as wa
    from d2ltvm.folding import network_float64, network_layers
    from d2ltvm.network_schedule import network_cut, packed_weights
    assets = HERE.parent / 'assets'
    parameters = wa.stored_network(assets / 'digit_network.js')
    layers = wa.digit_layers(parameters)
    cuts = {network_cut(layers, 1, wa.wasm_target(build), 1)
            for build in wa.BUILDS}
    cut, = cuts  # one order of the weights for all builds
    np.concatenate([array.ravel() for array in packed_weights(
        layers, cut)]).tofile(folder / 'weights.f32')
    for build in wa.BUILDS:
        (folder / f'{build}.wasm').write_bytes(wa.pad_module(build))

    samples = json.loads((assets / 'digit_samples.js').read_text(
        'utf-8').partition('=')[2])
    images = np.frombuffer(base64.b64decode(samples['images']), 'uint8')
    images = images.reshape(-1, 1, FULL, FULL) / np.float32(255)
    network_float64(layers, images).tofile(folder / 'network.f64')
    cropped = images[:, :, :CROPPED, :CROPPED]
    cropped.tofile(folder / 'cropped.f32')
    framed = np.full_like(images, np.nan)  # ours must not read the frame
    framed[:, :, :CROPPED, :CROPPED] = cropped
    framed.tofile(folder / 'images.f32')

    plain, norms = network_layers(parameters)
    plain = [(W, np.zeros(len(W), W.dtype) if b is None else b)
             for W, b in plain]
    onnx = ONNXRuntime()
    for name, given in ('folded', (layers, [])), ('unfolded', (plain, norms)):
        (folder / f'{name}.onnx').write_bytes(onnx.network_model(
            cropped[:1], *given))
    return len(images)


def write_operator(folder):
    """Arguments and model of batch normalization."""
    arrays = data.inference(OPERATOR)
    np.concatenate([array.ravel() for array in arrays.values()]).tofile(
        folder / 'operands.f32')
    data.inference_exact(**arrays)['Y'].tofile(folder / 'operator.f64')
    (folder / 'operator.onnx').write_bytes(ONNXRuntime().operator_model(
        **arrays))
    return 1


def write(folder):
    """Everything that a place reads; why ONNX Runtime Web is missing.

    Returns
    -------
    dict of str to str
        Engine and, to be read after its name, why.
    """
    for path in (HERE / 'web').glob('*.mjs'):
        shutil.copy(path, folder)
    (folder / 'index.html').write_text('<!doctype html><title>x</title>')
    counts = {'network': write_network(folder),
              'operator': write_operator(folder)}
    left_out = {}
    try:
        for path in onnxruntime_web.files():
            shutil.copy(path, folder)
    except (OSError, ValueError) as error:
        left_out[THEIRS] = f'cannot be had: {error}'
    (folder / 'settings.json').write_text(json.dumps({
        'theirs': None if left_out else THEIRS, 'counts': counts}))
    return left_out


def start(folder, left_out):
    """The places that can be started."""
    workers = []
    for name, command in commands(folder).items():
        worker = Place(name, command, count=1)
        if 'cannot' in worker.hello:
            left_out[name] = worker.hello['cannot']
            worker.close()
        else:
            workers.append(worker)
    return workers


def race(worker, suite, shape, rounds, left_out):
    """Check, then time all programs of one place: a case."""
    parts = side_by_side.prepare([worker], suite, shape, left_out)
    if suite not in parts:
        raise RuntimeError(f'{worker.name}: no program of the {suite} is '
                           f'right: {left_out}')
    contestants = parts[suite]
    times = side_by_side.take_turns(contestants, suite, rounds, left_out)

    def split(form):
        program, _, settings = form.partition(', ')
        return program, settings.removesuffix('1 thread').rstrip(', ')

    times = {split(form): seconds for (_, form), seconds in times.items()}
    errors = {split(worker.form(form)): error
              for _, form, error in contestants}
    return {'shape': list(shape), 'part': f'{suite}, {worker.name}',
            **side_by_side.aggregate(times, errors, BASELINE)}


def sizes(folder):
    """Bytes of the code that a page loads, as they are and compressed."""
    from d2ltvm.webassembly import BUILDS
    files = {build: ('load.mjs', f'{build}.wasm') for build in BUILDS}
    if all((folder / name).exists() for name in onnxruntime_web.SHA256):
        files[THEIRS] = tuple(onnxruntime_web.SHA256)
    found = {}
    for engine, names in files.items():
        contents = [(folder / name).read_bytes() for name in names]
        found[engine] = [sum(map(len, contents)), sum(
            len(gzip.compress(content, mtime=0)) for content in contents)]
    return found


def starting(folder, places, engines, times):
    """Seconds from nothing loaded to the first logits, in fresh processes.

    Returns
    -------
    dict of str to dict of str to list
        Place -> engine -> quartiles.
    """
    found = {place: {engine: [] for engine in engines} for place in places}
    for i in range(times):
        for place in places:
            worker = Place(place, commands(folder)[place], count=1)
            for engine in engines[::1 if i % 2 else -1]:
                answer = worker.ask(start=engine == THEIRS)
                if 'cannot' in answer:
                    raise RuntimeError(f'{place}, {engine}, start: '
                                       + answer['cannot'])
                found[place][engine].append(answer['seconds'])
            worker.close()
    return {place: {engine: side_by_side.quartiles(seconds)
                    for engine, seconds in of_place.items()}
            for place, of_place in found.items()}


def run(rounds=side_by_side.ROUNDS, starts=STARTS):
    """Measure; see `side_by_side.measure` for what is returned.

    `sizes` and `starts` are as `sizes` and `starting` return them.

    Raises
    ------
    side_by_side.NotMeasured
        If there is neither Node nor Chromium.
    """
    share = side_by_side.others()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        left_out = write(folder)
        workers = start(folder, left_out)
        if not workers:
            raise side_by_side.NotMeasured('; '.join(
                f'{name} {why}' for name, why in left_out.items()))
        engines = side_by_side.stated(workers)
        try:
            cases = [race(worker, suite, shape, rounds, left_out)
                     for suite, shape in (
                         ('network', (1, 1, CROPPED, CROPPED)),
                         ('operator', OPERATOR))
                     for worker in workers]
        finally:
            for worker in workers:
                worker.close()
        raced = [BASELINE] + [THEIRS] * (THEIRS not in left_out)
        if THEIRS not in left_out:
            engines[THEIRS] = {'versions': {
                'onnxruntime-web': onnxruntime_web.VERSION}, 'threads': [1]}
        return {'title': 'WebAssembly', 'baseline': BASELINE,
                'rounds': rounds, 'threads': 1, 'busy': share,
                'engines': engines, 'left_out': left_out, 'cases': cases,
                'sizes': sizes(folder), 'starts': starting(
                    folder, [worker.name for worker in workers], raced,
                    starts)}
