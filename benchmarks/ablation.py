"""Train the digit network with and without batch normalization.

    OMP_NUM_THREADS=1 python benchmarks/ablation.py [PART PARTS]

Two initial scales by two learning rates by three seeds, each with and without
the layer: 24 runs of four epochs. A seed draws the same first weights and the
same batches for both. They train on the first 50000 digits; the last 10000
training digits validate after each epoch, with statistics that have settled on
10000 of the first; the test images are seen once, after the last epoch.

Each run is stored in `results/ablation.json` when it is done; runs that stand
there are not repeated. Two processes share the work: `0 2` and `1 2`. On one
thread a run takes two to four minutes. The layer is MXNet's operator, which
gives the values of ours faster.
"""
import fcntl
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

from d2ltvm import from_scratch as fs
from d2ltvm.mnist import load_mnist
from d2ltvm.mxnet_today import nd

RESULTS = Path(__file__).resolve().parent / 'results/ablation.json'
SCALES, RATES, SEEDS = (0.01, 0.05), (0.001, 0.01), (0, 1, 2)
EPOCHS, BATCH, TRAINING = 4, 64, 50000


def operator(H, gamma, beta, scope_name):
    """The layer in training, by MXNet's operator: see `net`."""
    moving = nd.zeros_like(gamma), nd.ones_like(gamma)  # not used
    return nd.BatchNorm(H, gamma, beta, *moving, eps=1e-5, fix_gamma=False)


def one_run(digits, scale, rate, seed, layer, epochs=EPOCHS,
            training=TRAINING):
    """Train once; returns what is stored of it, a dict."""
    images, labels = digits.train_images, digits.train_labels
    params, moving = fs.init_params(scale, seed), fs.MovingStatistics()
    norm = operator if layer else fs.no_norm
    test_norm = fs.training_and_testing(moving)[1] if layer else norm
    rng = np.random.default_rng(seed)
    run = {'scale': scale, 'rate': rate, 'seed': seed, 'layer': layer,
           'loss': [], 'validation': []}
    for _ in range(epochs):
        losses = [fs.train_step(X, y, params, norm, rate) for X, y in
                  fs.batches(images[:training], labels[:training], BATCH,
                             rng=rng)]
        mean = sum(losses) / training
        run['loss'].append(round(mean, 5) if math.isfinite(mean) else None)
        if layer:
            fs.settle(moving, images[:min(training, 10000)], params)
        run['validation'].append(fs.accuracy(
            images[training:], labels[training:], params, test_norm))
    run['test'] = fs.accuracy(digits.test_images, digits.test_labels, params,
                              test_norm)
    return run


def key(run):
    """What tells one run from the others."""
    return run['seed'], run['scale'], run['rate'], run['layer']


def load(path=RESULTS):
    """The runs that are stored: a list of dicts, in the order of `key`."""
    return json.loads(path.read_text()) if path.exists() else []


def store(run, path=RESULTS):
    """Add one run to the file, whoever else does so at the same time."""
    with path.with_suffix('.lock.partial').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = {key(old): old for old in [*load(path), run]}
        text = json.dumps(sorted(runs.values(), key=key), indent=1)
        new = path.with_suffix('.partial')
        new.write_text(re.sub(r'\s+(?=[\d\]n])', ' ', text) + '\n')
        os.replace(new, path)


def main(part=0, parts=1):
    """Train what is missing of every `parts`-th pair of runs."""
    digits = load_mnist()
    pairs = itertools.product(SEEDS, SCALES, RATES)
    for seed, scale, rate in itertools.islice(pairs, part, None, parts):
        for layer in (True, False):
            if (seed, scale, rate, layer) in map(key, load()):
                continue
            run = one_run(digits, scale, rate, seed, layer)
            store(run)
            print(run, flush=True)


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
