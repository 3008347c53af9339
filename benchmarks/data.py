"""The arrays of each suite, from a seed, and what must come out in float64."""
import numpy as np

EPS, MOMENTUM = 1e-5, 0.9  # MOMENTUM: share of the old moving statistics
LAYERS = (20, 1, 3, 3), (50, 20, 5, 5), (128, 800), (10, 128)  # of W


def aligned(array):
    """A copy that starts on a boundary of 64 bytes, as every engine likes."""
    memory = np.empty(array.nbytes + 64, 'uint8')
    start = -memory.ctypes.data % 64
    copy = memory[start:start + array.nbytes].view(array.dtype)
    copy = copy.reshape(array.shape)
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
    """Arguments of `Engine.network`: images, and layers that are folded."""
    rng = np.random.default_rng(seed)
    arrays = {'X': rng.random(shape, 'float32')}
    for i, size in enumerate(LAYERS, start=1):
        scale = np.sqrt(2 / np.prod(size[1:]))
        arrays[f'W{i}'] = rng.normal(0, scale, size).astype('float32')
        arrays[f'b{i}'] = rng.normal(0, 0.3, size[0]).astype('float32')
    return {name: aligned(array) for name, array in arrays.items()}


def network_exact(X, **arrays):
    """Logits of the digit network, in float64."""
    X, arrays = X.astype('float64'), {
        name: array.astype('float64') for name, array in arrays.items()}
    for i in (1, 2):
        W = arrays[f'W{i}']
        windows = np.lib.stride_tricks.sliding_window_view(
            X, W.shape[2:], (2, 3))
        X = np.tensordot(windows, W, [(1, 4, 5), (1, 2, 3)])
        X = np.maximum(X + arrays[f'b{i}'], 0).transpose(0, 3, 1, 2)
        h, w = (side // 2 for side in X.shape[2:])  # a last odd one is lost
        X = X[:, :, :2 * h, :2 * w].reshape(
            *X.shape[:2], h, 2, w, 2).mean((3, 5))
    H = X.reshape(len(X), -1) @ arrays['W3'].T + arrays['b3']
    return {'Y': np.maximum(H, 0) @ arrays['W4'].T + arrays['b4']}


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
          'network': (network, network_exact)}
