"""Every layer of the package, beside MXNet's: what is frozen, what adds up.

What wants no gradient must take no other gradient with it.
"""
import functools
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from d2ltvm.mxnet_today import autograd, mx, nd
from mxnet.gluon import nn
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import (
    cpp_operator,
    distributed,
    fast_operations,
    from_scratch,
    gluon_module,
    moving_statistics,
    own_gradient,
    training_operator,
)
from soak import SOAK, later

GAMMA, BETA = [1, -2, 3], [0.5, 0, -1]


class Arrays:
    """A function of X, gamma and beta, as a layer that has its arrays.

    `bare` leaves a frozen array without `attach_grad`.
    """

    def __init__(self, function, bare=False):
        self.function, self.bare = function, bare

    def prepare(self, how):
        self.arrays = [nd.array(GAMMA), nd.array(BETA)]
        for array, req in zip(self.arrays, how, strict=True):
            if req != 'null' or not self.bare:
                array.attach_grad(req)

    def __call__(self, X):
        return self.function(X, *self.arrays)

    def gradients(self):
        return [array.grad for array in self.arrays]


class Block:
    """A block of Gluon, in the same way."""

    def __init__(self, make, gamma='gamma', beta='beta', hybrid=False):
        self.make, self.names, self.hybrid = make, (gamma, beta), hybrid

    def prepare(self, how):
        self.block = self.make()
        self.block.initialize()
        if self.hybrid:
            self.block.hybridize()
        self.parameters = [getattr(self.block, name) for name in self.names]
        for parameter, values, req in zip(self.parameters, (GAMMA, BETA), how,
                                          strict=True):
            parameter.set_data(nd.array(values))
            parameter.grad_req = req

    def __call__(self, X):
        return self.block(X)

    def gradients(self):
        return [None if parameter.grad_req == 'null' else parameter.grad()
                for parameter in self.parameters]


FUNCTIONS = {
    'distributed.SyncBatchNorm': forked.sync_batch_norm,
    'distributed.synchronised': forked.synchronised,
    'training_operator.BatchNormFunction': forked.function,
    'training_operator.CompiledBatchNorm': forked.compiled,
    'cpp_operator.CppBatchNorm': lambda X, gamma, beta:
        cpp_operator.CppBatchNorm()(X, gamma, beta, 'bn'),
    'fast_operations.fast_batch_norm': lambda X, gamma, beta:
        fast_operations.fast_batch_norm(X, gamma, beta)[0],
    'from_scratch.pure_batch_norm': from_scratch.pure_batch_norm,
    'from_scratch.batch_norm': lambda X, gamma, beta: from_scratch.batch_norm(
        X, gamma, beta, scope_name='bn',
        moving=from_scratch.MovingStatistics())}
LAYERS = {
    **{name: Arrays(f) for name, f in FUNCTIONS.items()},
    **{f'{name}, bare': Arrays(f, bare=True)
       for name, f in FUNCTIONS.items()},
    'gluon_module.BatchNormLayer': Block(
        lambda: gluon_module.BatchNormLayer(3)),
    'gluon_module.BatchNormLayer, compiled': Block(
        lambda: gluon_module.BatchNormLayer(3), hybrid=True),
    'gluon_module.BatchNorm': Block(lambda: gluon_module.BatchNorm(3)),
    'moving_statistics.BatchNorm': Block(
        lambda: moving_statistics.BatchNorm(3), 'scale', 'bias')}
BUILT_IN = Block(lambda: nn.BatchNorm(in_channels=3))


def test_no_layer_is_left_out():
    """What is public and normalizes a batch in training is in the table."""
    found = {f'{module.__name__.removeprefix("d2ltvm.")}.{name}'
             for module in (cpp_operator, distributed, fast_operations,
                            from_scratch, gluon_module, moving_statistics,
                            training_operator)
             for name in module.__all__
             if 'norm' in name.lower() or name == 'synchronised'}
    parts = {
        'from_scratch.no_norm', 'from_scratch.normalize_batch',
        'gluon_module.batch_norm', 'gluon_module.NormalizationState',
        'moving_statistics.normalize_inplace',
        'training_operator.BatchNormOperator',
        'training_operator.BatchNormProperty'}
    assert found - parts == {name.split(',')[0] for name in LAYERS}


def run(layer, how, X_req, shape, passes):
    """Y, and the gradients by X and all that stands before it."""
    rows, weight, dY = np.random.default_rng(0).normal(size=(3, *shape))
    layer.prepare(how)
    first, second = nd.array(rows), nd.array(weight)
    first.attach_grad(X_req)
    second.attach_grad('write' if X_req == 'null' else X_req)
    for _ in range(passes):
        with autograd.record():  # deeper in a network, by both arrays
            X = first * second if X_req != 'null' else first
            Y = layer(X)
            loss = (Y * nd.array(dY)).sum() + (second * second).sum()
        loss.backward()
    return [Y.asnumpy(), *(
        gradient if gradient is None else gradient.asnumpy() for gradient in (
            None if X_req == 'null' else first.grad, second.grad,
            *layer.gradients()))]


@functools.cache
def built_in(*case):
    return run(BUILT_IN, *case)


DENSE_ALONE = 'moving_statistics.BatchNorm'


@pytest.mark.parametrize('frozen', [
    '', 'gamma', 'beta', 'gamma beta', 'X', 'X gamma', 'X beta'])
@pytest.mark.parametrize(('name', 'shape', 'passes'), [
    *((name, (8, 3), 1) for name in LAYERS),
    *((name, (8, 3) if name == DENSE_ALONE else (1, 3, 2, 3), 3)
      for name in LAYERS),
    *(later(name, *case) for name in LAYERS if name != DENSE_ALONE
      for case in (((8, 3), 3), ((1, 3, 2, 3), 1)))])
def test_what_is_frozen_and_what_adds_up(name, frozen, passes, shape):
    """One pass writes, three passes add; against the built-in layer."""
    want = 'write' if passes == 1 else 'add'
    how = tuple('null' if p in frozen.split() else want
                for p in ('gamma', 'beta'))
    X_req = 'null' if 'X' in frozen else want
    case = how, X_req, shape, passes
    for got, expected, req in zip(
            run(LAYERS[name], *case), built_in(*case),
            ('', X_req, '', *how), strict=True):
        if req == 'null':
            continue
        assert abs(expected).max() > 0.01
        assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', [
    'distributed.SyncBatchNorm', 'training_operator.BatchNormFunction'])
@pytest.mark.parametrize('by', ['X', 'gamma', 'beta'])
def test_a_single_gradient_by_autograd_grad(name, by):
    """No variable but this one is asked for."""
    rng = np.random.default_rng(0)
    arrays = dict(zip(('X', 'gamma', 'beta'), (
        nd.array(rng.normal(size=(8, 3))), nd.array(GAMMA), nd.array(BETA)),
        strict=True))
    dY = nd.array(rng.normal(size=(8, 3)))
    for array in arrays.values():
        array.attach_grad()
    with autograd.record():
        Y = FUNCTIONS[name](**arrays)
    got, = autograd.grad(Y, [arrays[by]], dY, retain_graph=True)
    Y.backward(dY)
    assert abs(got.asnumpy()).max() > 0.01
    assert_array_equal(got.asnumpy(), arrays[by].grad.asnumpy())


def test_layer_works_after_fork():
    """Used in the parent, then in a child, then in the parent."""
    ran = subprocess.run(  # a deadlock would wait for ever
        [sys.executable, '-W', 'ignore', forked.__file__,
         '20' if SOAK else '2'], check=False, capture_output=True, text=True,
        timeout=600, env={**os.environ, 'PYTHONPATH': str(
            Path(forked.__file__).parent.parent)})
    assert ran.returncode == 0, ran.stdout + ran.stderr


# The class behind two of them

class Product(own_gradient.Function):
    """Two outputs, from inputs of any shape."""

    def forward(self, a, b):
        self.kept = a, b
        return a * b, a + b

    def backward(self, dproduct, dsum):
        a, b = self.kept
        return dproduct * b + dsum, dproduct * a + dsum


def test_function_with_several_outputs():
    rng = np.random.default_rng(0)
    for frozen in (None, 0, 1):
        arrays = [nd.array(a, dtype='float64') for a in rng.normal(
            size=(2, 3, 4))]
        dp, ds = (nd.array(a, dtype='float64') for a in rng.normal(
            size=(2, 3, 4)))
        for place, array in enumerate(arrays):
            array.attach_grad('null' if place == frozen else 'write')
        with autograd.record():
            outputs = Product()(*arrays)
        autograd.backward(list(outputs), [dp, ds])
        for place, array in enumerate(arrays):
            if place != frozen:
                assert_allclose(array.grad.asnumpy(), (
                    dp * arrays[1 - place] + ds).asnumpy(), rtol=1e-14)


@pytest.mark.parametrize(('bad', 'message'), [
    (np.ones(2), r'^input 1: expected an NDArray of float32, got ndarray'),
    (nd.ones(2, dtype='float64'), r'^input 1: .* got float64'),
    (mx.np.ones(2), r'^input 1: expected an NDArray'),
    (None, r'^input 1: expected an NDArray')])
def test_function_refuses(bad, message):
    with pytest.raises(TypeError, match=message):
        Product()(nd.ones(2), bad)


def test_function_is_used_once():
    product = Product()
    product(nd.ones(2), nd.ones(2))
    with pytest.raises(RuntimeError, match=r'^Product: called twice'):
        product(nd.ones(2), nd.ones(2))


def test_function_takes_empty_arrays():
    with mx.util.np_shape():
        arrays = nd.zeros((0, 3)), nd.zeros((0, 3))
        for array in arrays:
            array.attach_grad()
        with autograd.record():
            Y, _ = Product()(*arrays)
        Y.backward()
        assert Y.shape == arrays[0].grad.shape == (0, 3)
