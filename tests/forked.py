"""A program: layers that are used in a process, in its fork, and again.

Its argument says how often. It imports only what these layers need.
"""
import os
import signal
import sys

import numpy as np

from d2ltvm import distributed, from_scratch, training_operator
from d2ltvm.mxnet_today import autograd, nd


def sync_batch_norm(X, gamma, beta):
    return distributed.SyncBatchNorm(distributed.Exchange())(gamma, beta, X)


def synchronised(X, gamma, beta):
    norm = distributed.synchronised(distributed.Exchange(),
                                    from_scratch.MovingStatistics())
    return norm(X, gamma, beta, 'bn')


def function(X, gamma, beta):
    moving = np.zeros((2, 3), 'float32')
    return training_operator.BatchNormFunction(*moving, 0.9, 1e-5)(
        gamma, beta, X)


def compiled(X, gamma, beta):
    return training_operator.CompiledBatchNorm()(X, gamma, beta, 'bn')


def step(layer):
    arrays = [nd.arange(12).reshape((4, 3)), nd.ones(3), nd.zeros(3)]
    for array in arrays:
        array.attach_grad()
    with autograd.record():
        Y = layer(*arrays)
    Y.backward(nd.ones((4, 3)))
    return arrays[2].grad


def fork(layer, wait):
    beta_gradient = step(layer)
    if wait:
        assert (beta_gradient.asnumpy() == 4).all()
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(0 if (step(layer).asnumpy() == 4).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (step(layer).asnumpy() == 4).all()


if __name__ == '__main__':
    for layer in (sync_batch_norm, function, compiled):
        # while MXNet's threads work, too
        for wait in (True, False) * int(sys.argv[1]):
            print(layer.__name__, 'wait', wait, flush=True)
            fork(layer, wait)
