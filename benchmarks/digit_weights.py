"""Train the digit network that the book's pages run in the browser.

    python benchmarks/digit_weights.py [EPOCHS]

Ten passes over MNIST with seed 0, the training of the page from_scratch; a
few minutes on two cores. Two files in `assets` are replaced:

- `digit_network.js`: every parameter, the running statistics of the training,
  and the population statistics afterwards, as float16. Nothing is folded.
- `digit_samples.js`: the first 64 test images with their labels.

Sphinx copies the folder `assets` (`html_static_path` of `_config.yml`), and
the pages with the digit pad load both. `webassembly.stored_network` reads the
first.
"""
import base64
import json
import sys
from pathlib import Path

import numpy as np

from d2ltvm import from_scratch as fs
from d2ltvm.folding import network_parameters
from d2ltvm.mnist import load_mnist
from d2ltvm.mxnet_today import nd

ASSETS = Path(__file__).resolve().parent.parent / 'assets'
SAMPLES = 64


def trained(digits, epochs, seed=0):
    """Parameters, running and population statistics, as float32 arrays."""
    running = {i: (nd.zeros(width), nd.ones(width))
               for i, width in ((1, 20), (2, 50), (3, 128))}

    def norm(H, gamma, beta, scope_name):
        """MXNet's layer, which moves the running statistics itself."""
        return nd.BatchNorm(H, gamma, beta, *running[int(scope_name[-1])],
                            eps=1e-5, momentum=0.9, fix_gamma=False)

    params, rng = fs.init_params(seed=seed), np.random.default_rng(seed)
    population = fs.MovingStatistics()
    for epoch in range(1, epochs + 1):
        for X, y in fs.batches(digits.train_images, digits.train_labels, 64,
                               rng=rng):
            fs.train_step(X, y, params, norm, learning_rate=1e-3)
        fs.settle(population, digits.train_images[:10000], params)
        right = fs.accuracy(digits.test_images, digits.test_labels, params,
                            fs.training_and_testing(population)[1])
        print(f'epoch {epoch:2}: {right:.4f} of the test images are right',
              flush=True)
    return network_parameters(params, population) | {
        f'running_{name}{i}': array.asnumpy() for i in running
        for name, array in zip(('mean', 'var'), running[i], strict=True)}


def write_script(name, variable, content):
    """A script that sets one variable, one line for each entry."""
    lines = ',\n'.join(f'{json.dumps(key)}: {json.dumps(value)}'
                       for key, value in content.items())
    (ASSETS / name).write_text(f'globalThis.{variable} = {{\n{lines}\n}}\n')


def encoded(array):
    return base64.b64encode(np.ascontiguousarray(array)).decode()


def main():
    digits = load_mnist()
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    arrays = trained(digits, epochs)
    write_script('digit_network.js', 'digitNetwork', {
        name: [array.shape, encoded(array.astype('<f2'))]
        for name, array in arrays.items()})
    write_script('digit_samples.js', 'digitSamples', {
        'labels': digits.test_labels[:SAMPLES].tolist(),
        'images': encoded(digits.test_images[:SAMPLES])})


if __name__ == '__main__':
    main()
