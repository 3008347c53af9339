"""The arrays of each suite, from a seed, and what must come out in float64."""
import contextlib
import mmap

import numpy as np

EPS, MOMENTUM = 1e-5, 0.9  # MOMENTUM: share of the old moving statistics
LAYERS = (20, 1, 3, 3), (50, 20, 5, 5), (128, 800), (10, 128)  # of W
NORM = 'gamma', 'beta', 'mean', 'var'
HUGE = 2 ** 21  # bytes of a large page


def memory(count):
    """So many bytes, from a boundary of 64 bytes; large ones in huge pages.

    The system is asked for huge pages. Where it has none, or knows no such
    thing, these are ordinary ones.
    """
    edge = HUGE if count >= HUGE else 64
    if edge == HUGE:
        block = mmap.mmap(-1, count + edge,  # shared memory would get none
                          mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
        block = np.frombuffer(block, 'uint8')
    else:
        block = np.empty(count + edge, 'uint8')
    start = -block.ctypes.data % edge
    return block[start:start + count]


def aligned(array):
    """A copy in such memory, as every engine likes it."""
    copy = memory(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def inference(shape, seed=0):
    """Arguments of `Engine.inference`: float32, parameters of shape (C,)."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal(shape, 'float32')
    mean, gamma, beta = rng.normal(size=(3, shape[1])).astype('float32')
    var = rng.uniform(0.5, 2, shape[1]).astype('float32')
    arrays = {'X': X, 'mean': mean, 'var': var, 'gamma': gamma, 'beta': beta}
    return {name: aligned(array) for name, array in arrays.items()}


def training(shape, seed=0):
    """Arguments of `Engine.training`: float32, parameters of shape (C,)."""
    rng = np.random.default_rng(seed)
    X, dY = (rng.standard_normal(shape, 'float32') for _ in range(2))
    X += 1
    gamma, beta = rng.normal(size=(2, shape[1])).astype('float32')
    arrays = {'X': X, 'dY': dY, 'gamma': gamma, 'beta': beta}
    return {name: aligned(array) for name, array in arrays.items()}


def inference_exact(X, mean, var, gamma, beta):
    """Y for given statistics, in float64; X for the copy."""
    scale = gamma / np.sqrt(var.astype('float64') + EPS)
    Y = X * scale.reshape(-1, 1, 1)
    Y += (beta - mean * scale).reshape(-1, 1, 1)
    return {'X': X, 'Y': Y}


def training_exact(X, dY, gamma, beta):
    """Y, moving statistics from 0 and 1, gradients: all in float64."""
    axes, each, m = (0, 2, 3), (-1, 1, 1), X.size // X.shape[1]
    mean = X.mean(axes, dtype='float64')
    X_hat = X - mean.reshape(each)
    var = np.einsum('nchw,nchw->c', X_hat, X_hat) / m
    inv_std = 1 / np.sqrt(var + EPS)
    X_hat *= inv_std.reshape(each)
    dbeta = dY.sum(axes, dtype='float64')
    dgamma = np.einsum('nchw,nchw->c', X_hat, dY, dtype='float64')
    dX = X_hat * (dgamma / -m).reshape(each)
    dX += dY
    dX -= (dbeta / m).reshape(each)
    dX *= (gamma * inv_std).reshape(each)
    X_hat *= gamma.reshape(each)
    X_hat += beta.reshape(each)
    return {'X': X, 'Y': X_hat, 'dX': dX, 'dgamma': dgamma, 'dbeta': dbeta,
            'moving_mean': (1 - MOMENTUM) * mean,
            'moving_var': MOMENTUM + (1 - MOMENTUM) * var}


def network(shape, seed=0):
    """Arguments of `Engine.network`: images, layers and normalizations.

    The first three layers are followed by a normalization each.
    """
    rng = np.random.default_rng(seed)
    arrays = {'X': rng.random(shape, 'float32')}
    for i, size in enumerate(LAYERS, start=1):
        scale = np.sqrt(2 / np.prod(size[1:]))
        made = {'W': rng.normal(0, scale, size),
                'b': rng.normal(0, 0.3, size[0])}
        if i < len(LAYERS):
            made |= {'gamma': rng.uniform(0.5, 1.5, size[0]),
                     'beta': rng.normal(0, 0.3, size[0]),
                     'mean': rng.normal(0, 0.3, size[0]),
                     'var': rng.uniform(0.5, 2, size[0])}
        arrays |= {f'{name}{i}': array.astype('float32')
                   for name, array in made.items()}
    return {name: aligned(array) for name, array in arrays.items()}


def folded(arrays, dtype='float32'):
    """The layers as pairs (W, b) that do the work of the normalizations."""
    layers = []
    for i in range(1, len(LAYERS) + 1):
        own = {name: arrays[f'{name}{i}'].astype('float64')
               for name in ('W', 'b', *NORM) if f'{name}{i}' in arrays}
        W, b = own['W'], own['b']
        if 'gamma' in own:
            scale = own['gamma'] / np.sqrt(own['var'] + EPS)
            W = W * scale.reshape(-1, *(1,) * (W.ndim - 1))
            b = (b - own['mean']) * scale + own['beta']
        layers.append((aligned(W.astype(dtype)), aligned(b.astype(dtype))))
    return layers


def network_exact(X, **arrays):
    """Logits of the digit network, in float64."""
    X, layers = X.astype('float64'), folded(arrays, 'float64')
    for W, b in layers[:2]:
        windows = np.lib.stride_tricks.sliding_window_view(
            X, W.shape[2:], (2, 3))
        X = np.tensordot(windows, W, [(1, 4, 5), (1, 2, 3)])
        X = np.maximum(X + b, 0).transpose(0, 3, 1, 2)
        h, w = (side // 2 for side in X.shape[2:])  # a last odd one is lost
        X = X[:, :, :2 * h, :2 * w].reshape(
            *X.shape[:2], h, 2, w, 2).mean((3, 5))
    (W3, b3), (W4, b4) = layers[2:]
    H = np.maximum(X.reshape(len(X), -1) @ W3.T + b3, 0)
    return {'Y': H @ W4.T + b4}


def copy(shape, seed=0):
    """Arguments of `Engine.copy`."""
    rng = np.random.default_rng(seed)
    return {'X': aligned(rng.standard_normal(shape, 'float32'))}


def copy_exact(X):
    """The same."""
    return {'X': X}


def error(results, exact):
    """Largest error of any result, relative to the largest exact value."""
    worst = 0.0
    for name, result in results.items():
        if result.shape != exact[name].shape:
            raise ValueError(f'{name}: expected shape {exact[name].shape}, '
                             f'got {result.shape}')
        difference = abs(result - exact[name]).max() / abs(exact[name]).max()
        worst = max(worst, float(difference)) if difference == difference \
            else float('inf')
    return worst


SUITES = {'inference': (inference, inference_exact),
          'training': (training, training_exact),
          'network': (network, network_exact),
          'copy': (copy, copy_exact)}
