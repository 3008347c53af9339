"""Ask PyTorch and Flax for their conventions, one training step each.

    python benchmarks/conventions.py

Run it with a Python that has `torch`, `flax` or both. What each layer does
with known numbers is written to `results/conventions.json`, beside the
version of the library; a library that is missing keeps what is there. The
page on running statistics draws the conclusions. PyTorch also says what a
layer with a given `state_dict` makes of a few numbers in evaluation mode.
"""
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent / 'results/conventions.json'
SIGNS = np.array([[-1], [1], [-1], [1]], 'float32') * np.ones(3, 'float32')
STATE = {'weight': [2.0, 0.5], 'bias': [1.0, -1.0],
         'running_mean': [0.5, -1.0], 'running_var': [2.0, 4.0]}
INPUT = [[1.5, 5.0], [0.0, -2.0]]


def observe(step):
    """What one step of training shows, on numbers whose statistics we know.

    `step(X, **options)` makes a layer, trains it for one step, and returns
    its output, its mean and variance before the step, its mean after the
    forward pass, and mean and variance at the end.
    """
    def last(X, **options):
        return [float(np.asarray(a).ravel()[-1]) for a in step(X, **options)]

    # Each channel has mean 5, biased variance 4, unbiased variance 16 / 3
    _, *first, between, mean, var = last(5 + 2 * SIGNS)
    return {'first': first, 'mean': mean, 'var': var, 'between': between,
            'mean_of_momentum_0.3': last(5 + 2 * SIGNS, momentum=0.3)[4],
            'output_of_0.01': last(SIGNS / 100)[0]}


def step_torch(X, **options):
    import torch
    layer = torch.nn.BatchNorm1d(3, **options)
    first = layer.running_mean.clone(), layer.running_var.clone()
    Y = layer(torch.tensor(X))
    between = layer.running_mean.clone()
    Y.sum().backward()
    return Y.detach(), *first, between, layer.running_mean, layer.running_var


def step_flax(X, **options):
    import jax
    from flax import nnx
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    first = np.array(layer.mean[...]), np.array(layer.var[...])

    def loss(layer):
        Y = layer(jax.numpy.asarray(X))
        return Y.sum(), (Y, layer.mean[...])

    _, (Y, between) = nnx.grad(loss, has_aux=True)(layer)
    return Y, *first, between, layer.mean[...], layer.var[...]


def evaluate_torch():
    """The output of a layer with the statistics `STATE`."""
    import torch
    layer = torch.nn.BatchNorm1d(2)
    state = {name: torch.tensor(value) for name, value in STATE.items()}
    layer.load_state_dict(state | {'num_batches_tracked': torch.tensor(20)})
    with torch.no_grad():
        return layer.eval()(torch.tensor(INPUT)).tolist()


def main():
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, package, step in (('PyTorch', 'torch', step_torch),
                                ('Flax', 'flax', step_flax)):
        try:
            found = {'version': version(package), **observe(step)}
        except (ImportError, PackageNotFoundError) as error:
            print(f'{name}: left out: {error}')
            continue
        if name == 'PyTorch':
            found['state_dict'] = {**STATE, 'input': INPUT,
                                   'output': evaluate_torch()}
        results[name] = found
        print(f'{name} {found["version"]}: measured')
    text = json.dumps(results, indent=1)
    RESULTS.write_text(re.sub(r'\s+(?=[-\d\]\[])', ' ', text) + '\n')


if __name__ == '__main__':
    main()
