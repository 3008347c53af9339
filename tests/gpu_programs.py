"""All programs of `gpu_training` in a row, on whatever executes them."""
import numpy as np

from d2ltvm.gpu_training import backward_programs, forward_programs


def programs_of(grid, relu=False):
    return *forward_programs(grid, relu), *backward_programs(grid, relu)


def empty(param):
    """An array for a parameter, full of NaN."""
    return np.full(tuple(map(int, param.shape)), np.nan, str(param.dtype))


def run_all(calls, X, dY, gamma, beta, momentum=0.9, eps=1e-5):
    """Run pairs of a program and what executes it.

    Returns Y, dX, dgamma, dbeta, moving mean and variance.
    """
    arrays = {'X': X.ravel(), 'dY': dY.ravel(), 'gamma': gamma, 'beta': beta,
              'numbers': np.array([momentum, eps], 'float32'),
              'moving': np.stack([0 * gamma, 0 * gamma + 1])}
    for program, call in calls:
        for param in program.params:
            arrays.setdefault(param.name, empty(param))
        call(*(arrays[param.name] for param in program.params))
    return (arrays['Y'].reshape(X.shape), arrays['dX'].reshape(X.shape),
            arrays['dgamma'], arrays['dbeta'], *arrays['moving'])
