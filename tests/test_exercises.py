"""The checker of exercises, its specifications, and the exercises' pages."""
import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from numpy.testing import assert_allclose
from soak import SOAK

from d2ltvm import exercises, theory, why
from d2ltvm.exercises import FAULTS, check, task

ROOT = Path(__file__).resolve().parent.parent
TABLE = {row.name: row for row in exercises.table()}
VARIANTS = [(row.name, i) for row in TABLE.values()
            for i in range(len(row.wrong))]


def right(name, *inputs):
    return TABLE[name].right(*inputs)


def test_there_are_enough():
    assert len(TABLE) == len(exercises.table()) >= 25
    used = {fault for row in TABLE.values() for fault, _ in row.wrong}
    assert used | {'order'} == set(FAULTS) and len(used) >= 15
    assert len(set(FAULTS.values())) == len(FAULTS)


@pytest.mark.parametrize('name', TABLE)
def test_the_right_function_is_right(name):
    for seed in range(20 if SOAK else 3):
        report = check(name, TABLE[name].right, seed)
        assert report and not report.complaint and not report.diagnosis
        assert all(exact for exact, _, _ in report.outputs.values())


@pytest.mark.parametrize(('name', 'i'), VARIANTS,
                         ids=[f'{n}-{TABLE[n].wrong[i][0]}-{i}'
                              for n, i in VARIANTS])
def test_each_wrong_variant_is_named(name, i):
    fault, variant = TABLE[name].wrong[i]
    for seed in range(10 if SOAK else 1):
        report = check(name, variant, seed)
        assert not report and report.complaint
        assert FAULTS[fault] in report.diagnosis


@pytest.mark.parametrize(('name', 'i'), VARIANTS,
                         ids=[f'{n}-{TABLE[n].wrong[i][0]}-{i}'
                              for n, i in VARIANTS])
def test_no_wrong_variant_is_right_when_rounded(name, i):
    row = TABLE[name]
    assert not all(
        exercises._close(value.astype('float32'), right, row.tolerance)
        for sample in exercises._samples(row, 0)
        for value, right in zip(*(
            exercises._run(row, f, sample).values()
            for f in (row.wrong[i][1], row.right)), strict=True))


def test_inputs_may_be_awkward_and_right_outputs_are_numbers():
    for row in TABLE.values():
        for sample in exercises._samples(row, 1):
            for value in exercises._run(row, row.right, sample).values():
                assert np.isfinite(value).all()
    padded = [sample['X'] for sample in exercises._samples(
        TABLE['masked-statistics'], 0)]
    assert 0 < sum(np.isnan(X).any() for X in padded) < len(padded)


def test_signature_of_each_row():
    for row in TABLE.values():
        names = [part.split(':')[0] for part in row.inputs.split()]
        for f in (row.right, *(f for _, f in row.wrong)):
            inspect.signature(f).bind(*names)


# Answers as a reader writes them, not those of the table

def held(dY, X, gamma, eps):
    return gamma * dY / np.sqrt(X.var(axis=0) + eps)


def no_path_through_the_mean(dY, X, gamma, eps):
    rho = (X.var(0) + eps) ** -.5
    X_hat = (X - X.mean(0)) * rho
    return gamma * rho * (dY - X_hat * (dY * X_hat).sum(0) / len(X))


def divided_by_less(dY, X, gamma, eps):
    m, rho = len(X) - 1, (X.var(0, ddof=1) + eps) ** -.5
    X_hat = (X - X.mean(0)) * rho
    return gamma * rho / m * (
        m * dY - dY.sum(0) - X_hat * (dY * X_hat).sum(0))


def leaking(X, gamma, beta, mean, var, momentum, eps, training):
    used = (X.mean(0), X.var(0)) if training else (mean, var)
    Y = gamma * (X - used[0]) / np.sqrt(used[1] + eps) + beta
    return (Y, momentum * mean + (1 - momentum) * X.mean(0),
            momentum * var + (1 - momentum) * X.var(0))


def turned(X, gamma, beta, mean, var, momentum, eps, training):
    if not training:
        return gamma * (X - mean) / np.sqrt(var + eps) + beta, mean, var
    new = X.mean(0), X.var(0)
    Y = gamma * (X - new[0]) / np.sqrt(new[1] + eps) + beta
    return (Y, mean + momentum * (new[0] - mean),
            var + momentum * (new[1] - var))


def normalized(axis=0, ddof=0, scale=np.sqrt):
    def f(X, eps):
        return ((X - X.mean(axis, keepdims=True))
                / scale(X.var(axis, ddof=ddof, keepdims=True) + eps))
    return f


def weights_times_all(X, mask):
    weight = mask[..., None] / mask.sum()
    mean = (weight * X).sum(axis=(0, 1))
    return mean, (weight * (X - mean) ** 2).sum(axis=(0, 1))


def sums_without_divisor(dY, X, gamma, eps):
    X_hat = normalized()(X, eps)
    return gamma / np.sqrt(X.var(0) + eps) * (
        dY - dY.sum(0) - X_hat * (dY * X_hat).sum(0))


def chain_without_half(dY, X, gamma, eps):
    c, m = X - X.mean(0), len(X)
    rho = ((c ** 2).mean(0) + eps) ** -0.5
    dX_hat = dY * gamma
    drho = (dX_hat * c).sum(0)
    dvar = -drho * rho ** 3
    dc = dX_hat * rho + dvar * 2 * c / m
    dmean = -dc.sum(0)
    return (dY.sum(0), (dY * c * rho).sum(0), dX_hat, drho, dvar, dc, dmean,
            dc + dmean / m)


HANDWRITTEN = [
    ('backward-dx', 'held', held),
    ('backward-dx', 'mean-path', no_path_through_the_mean),
    ('backward-dx', 'divisor', divided_by_less),
    ('backward-dx', 'no-gamma',
     lambda dY, X, gamma, eps: theory.batch_norm_backward(
         dY, theory.batch_norm_forward(X, np.ones_like(gamma), gamma,
                                       eps)[1])[0]),
    ('normalize', 'axes', normalized(axis=1)),
    ('normalize', 'unbiased', normalized(ddof=1)),
    ('normalize', 'root', normalized(scale=lambda v: v)),
    ('normalize', 'no-eps', lambda X, eps: normalized()(X, 0)),
    ('normalize', 'constant-eps', lambda X, eps: normalized()(X, 1e-5)),
    ('normalize', 'eps-outside',
     lambda X, eps: (X - X.mean(0)) / (X.std(0) + eps)),
    ('normalize', 'not-centred',
     lambda X, eps: X / (X.var(0) + eps) ** .5),
    ('train-step', 'updated-in-evaluation', leaking),
    ('train-step', 'momentum', turned),
    ('moving-average', 'momentum',
     lambda moving, batch, momentum:
     moving - momentum * (moving - batch)),
    ('torch-step', 'stored-biased',
     lambda X, var, momentum:
     var + momentum * (((X - X.mean(0)) ** 2).sum(0) / len(X) - var)),
    ('population', 'between',
     lambda count, mean, var:
     (np.average(mean, 0, count), np.average(var, 0, count))),
    ('population', 'unweighted',
     lambda count, mean, var: (
         mean.mean(0), var.mean(0) + mean.var(0))),
    ('half-mean', 'float16',
     lambda X: X.sum(axis=0, dtype='float16') / len(X)),
    ('shifted-variance', 'cancel',
     lambda X: (X * X).sum(axis=0) / np.float32(len(X))
     - X.mean(axis=0) ** 2),
    ('batch-statistics', 'deviation',
     lambda X: (X.mean(0), np.sqrt(X.var(0)))),
    ('forward', 'beta-scaled',
     lambda X, gamma, beta, eps: gamma * (normalized()(X, eps) + beta)),
    ('fold-dense', 'bias',
     lambda W, b, gamma, beta, mean, var, eps: (
         (gamma / np.sqrt(var + eps))[:, None] * W,
         beta - mean * gamma / np.sqrt(var + eps))),
    ('rms-norm', 'mean-subtracted',
     lambda X, gamma, eps: why.normalize(X, 'layer', gamma, eps=eps)),
    ('quantize', 'tensor-step',
     lambda W: (np.rint(W / abs(W).max() * 127).astype('int8'),
                np.full(len(W), abs(W).max() / 127))),
    ('masked-statistics', 'padding',
     lambda X, mask: (X.reshape(-1, X.shape[-1]).mean(0),
                      X.reshape(-1, X.shape[-1]).var(0))),
    ('masked-statistics', 'nan-times-0', weights_times_all),
    ('backward-dx', 'm-forgotten', sums_without_divisor),
    ('backward-dx', 'var-sign',
     lambda dY, X, gamma, eps: gamma / np.sqrt(X.var(0) + eps) * (
         dY - dY.mean(0) + normalized()(X, eps) * (
             dY * normalized()(X, eps)).mean(0))),
    ('backward-chain', 'half', chain_without_half),
    ('forward', 'root', lambda X, gamma, beta, eps:
     gamma * (X - X.mean(0)) / (X.var(0) + eps) + beta),
    ('forward-images', 'root', lambda X, gamma, beta, eps: (
        gamma * normalized((0, 1, 2), scale=lambda v: v)(
            np.moveaxis(X, 1, -1), eps) + beta).transpose(0, 3, 1, 2)),
    ('rms-norm', 'm-forgotten', lambda X, gamma, eps:
     gamma * X / np.sqrt((X ** 2).sum(1, keepdims=True) + eps)),
    ('batch-statistics', 'm-forgotten',
     lambda X: (X.sum(0), ((X - X.mean(0)) ** 2).sum(0))),
    ('batch-statistics', 'order', lambda X: (X.var(0), X.mean(0))),
    ('fold-dense', 'not-centred',
     lambda W, b, gamma, beta, mean, var, eps: (
         W * (gamma / np.sqrt(var + eps))[:, None],
         b * gamma / np.sqrt(var + eps) + beta)),
    ('fold-dense', 'shift',
     lambda W, b, gamma, beta, mean, var, eps: (
         W * (gamma / np.sqrt(var + eps))[:, None],
         b * gamma / np.sqrt(var + eps))),
    ('fold-dense', 'bias-unscaled',
     lambda W, b, gamma, beta, mean, var, eps: (
         W * (gamma / np.sqrt(var + eps))[:, None],
         b + beta - mean * gamma / np.sqrt(var + eps))),
    ('ghost-batches', 'part-number', lambda X, n, eps: np.concatenate(
        [normalized()(part, eps) for part in np.array_split(X, n)
         if len(part)])),
    ('quantize', 'no-abs', lambda W: (
        np.rint(W / abs(W).max(1)[:, None] * 127).astype('int8'),
        W.max(1) / 127))]


@pytest.mark.parametrize(('name', 'fault', 'f'), HANDWRITTEN, ids=[
    f'{name}-{fault}' for name, fault, _ in HANDWRITTEN])
def test_a_readers_fault_is_named(name, fault, f):
    report = check(name, f)
    assert not report and FAULTS[fault] in report.diagnosis
    assert FAULTS[fault] in repr(report)


# Answers that are right on convenient inputs alone

def ones(value):
    return np.ones_like(value)


def is_number(value):
    return np.ndim(value) == 0


def changed(name, key, change):
    """The right function, which sees one of its inputs changed."""
    at = [part.split(':')[0] for part in TABLE[name].inputs.split()].index(key)
    return lambda *inputs: right(name, *(
        change(value) if i == at else value for i, value in enumerate(inputs)))


INPUTS = [(row.name, key, value) for row in TABLE.values()
          for key, value in exercises._samples(row, 0)[-1].items()]


@pytest.mark.parametrize(('name', 'key', 'value'), INPUTS,
                         ids=[f'{name}-{key}' for name, key, _ in INPUTS])
def test_each_input_must_be_read(name, key, value):
    if is_number(value):
        assert not check(name, changed(name, key, lambda _: value))
    elif value.dtype.kind == 'f':
        assert not check(name, changed(name, key, ones))
        negative = any((sample[key] < 0).any()
                       for sample in exercises._samples(TABLE[name], 0))
        positive = f'{key}:+' in TABLE[name].inputs
        assert negative != positive
        if negative and name != 'shifted-variance':  # columns of one sign
            assert not check(name, changed(name, key, abs))
    else:
        assert not check(name, changed(name, key, ones))


@pytest.mark.parametrize('name', [n for n in TABLE if n != 'batches-until'])
def test_small_inputs_are_not_enough(name):
    def f(*inputs):
        answer = right(name, *inputs)
        small = all(isinstance(x, bool | float) or max(np.shape(x) or [x]) <= 4
                    for x in inputs)
        return answer if small else exercises._named(
            TABLE[name], answer) and tuple(0 * np.array(x) for x in (
                exercises._named(TABLE[name], answer).values()))

    assert not check(name, f)


SHORTCUTS = [
    ('masked-statistics', 'mask counts, and is not applied', lambda X, mask: (
        np.nansum(X, (0, 1)) / mask.sum(),
        np.nansum(X ** 2, (0, 1)) / mask.sum()
        - (np.nansum(X, (0, 1)) / mask.sum()) ** 2)),
    ('masked-statistics', 'padding is NaN', lambda X, mask: (
        np.nanmean(X, (0, 1)), np.nanvar(X, (0, 1)))),
    ('masked-statistics', 'padding is 0', lambda X, mask: (
        X[X.any(-1)].mean(0), X[X.any(-1)].var(0))),
    ('masked-statistics', 'padding comes last', lambda X, mask: (
        X[np.arange(mask.shape[1]) < mask.sum(1)[:, None]].mean(0),
        X[np.arange(mask.shape[1]) < mask.sum(1)[:, None]].var(0))),
    ('border-value', 'gamma is positive', lambda gamma, beta, mean, var, eps:
     mean - beta * np.sqrt(var + eps) / abs(gamma)),
    ('border-value', 'one sign for all', lambda gamma, beta, mean, var, eps:
     mean - beta * np.sqrt(var + eps) / abs(gamma) * np.sign(gamma[0])),
    ('moving-share', 'first is 1',
     lambda n, first, least: max(1 / n, least)),
    ('moving-share', 'first is above least',
     lambda n, first, least: first if n == 1 else max(first / n, least)),
    ('ghost-batches', 'n divides', lambda X, n, eps: np.concatenate(
        [normalized()(part, eps) for part in np.split(
            X[:len(X) // n * n], len(X) // n)] + [X[len(X) // n * n:]])
     if len(X) >= n else X),
    ('ghost-batches', 'two parts', lambda X, n, eps: np.concatenate(
        [normalized()(part, eps) for part in (X[:n], X[n:]) if len(part)])),
    ('group-norm', 'up to 2 groups', lambda X, groups, eps:
     right('group-norm', X, groups, eps) * (groups <= 2)),
    ('group-norm', 'an even number of channels', lambda X, groups, eps:
     right('group-norm', X, groups, eps) * (X.shape[1] % 2 == 0)),
    ('format-idx', 'sizes of one byte', lambda array: bytes(
        [0, 0, 8, array.ndim]) + b''.join(
            bytes([0, 0, 0, n % 256]) for n in array.shape)
        + array.tobytes()),
    ('format-idx', 'sizes of two bytes', lambda array: bytes(
        [0, 0, 8, array.ndim]) + b''.join(
            bytes([0, 0, n // 256 % 256, n % 256]) for n in array.shape)
        + array.tobytes()),
    ('format-idx', 'sizes of three bytes', lambda array: bytes(
        [0, 0, 8, array.ndim]) + b''.join(
            b'\0' + (n % (1 << 24)).to_bytes(3, 'big') for n in array.shape)
        + array.tobytes()),
    ('shifted-variance', 'the offset is 3000', lambda X:
     ((X - 3000) ** 2).mean(0) - (X - 3000).mean(0) ** 2),
    ('shifted-variance', 'one offset for all', lambda X:
     ((X - X[0, 0]) ** 2).mean(0) - (X - X[0, 0]).mean(0) ** 2),
    ('shifted-variance', 'the variance is 1', lambda X: ones(X[0])),
    ('half-mean', '2000 values',
     lambda X: X.sum(0, dtype='float32') / np.float32(2000)),
    ('half-mean', 'the first values', lambda X: X[:1000].mean(0, 'float32')),
    ('quantize', 'three rows', lambda W: (
        right('quantize', W)[0], right('quantize', W)[1] * (len(W) == 3))),
    ('batches-until', 'rounded', lambda momentum, least:
     round(np.log(least) / np.log(momentum))),
    ('batches-until', 'a few momenta', lambda momentum, least:
     right('batches-until', momentum, least)
     if momentum in (0.5, 0.75, 0.9, 0.99) else 0),
    ('population', 'all parts are alike', lambda count, mean, var: (
        mean.mean(0), var.mean(0) + mean.var(0))),
    ('batch-statistics', 'at most 8 examples', lambda X: (
        X.mean(0) * (len(X) <= 8), X.var(0))),
    ('backward-dx-end', 'dmean is not read', lambda dc, dmean:
     dc - dc.mean(0)),
    ('start-removed', 'first is positive', lambda moving, first, momentum, n:
     right('start-removed', moving, abs(first), momentum, n)),
    ('forward-images', 'as many rows as columns',
     lambda X, *params: right('forward-images', X, *params)
     * (X.shape[2] == X.shape[3])),
    ('channel-statistics', 'an even number of channels', lambda X: tuple(
        x * (X.shape[1] % 2 == 0) for x in right('channel-statistics', X)))]


@pytest.mark.parametrize(('name', 'f'), [
    (name, f) for name, _, f in SHORTCUTS],
    ids=[f'{name}-{what}'.replace(' ', '-') for name, what, _ in SHORTCUTS])
def test_a_shortcut_is_refused(name, f):
    for seed in range(5 if SOAK else 2):
        assert not check(name, f, seed)


# Values count, whatever holds them

FORMS = {
    'list': list, 'lists': lambda outputs: [x.tolist() for x in outputs],
    'floats': lambda outputs: tuple(x.astype('float64') for x in outputs),
    'wide': lambda outputs: tuple(x.astype('longdouble') for x in outputs),
    'float32': lambda outputs: tuple(x.astype('float32') for x in outputs)}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', TABLE)
def test_a_right_answer_may_come_in_any_form(name, form):
    row = TABLE[name]

    def f(*inputs):
        outputs = tuple(exercises._named(row, row.right(*inputs)).values())
        if row.dtype:
            outputs = outputs[0].astype(row.dtype), *outputs[1:]
        held = FORMS[form](outputs)
        if row.dtype and form != 'list':
            held = outputs[0], *held[1:]
        return held if len(held) > 1 else held[0]

    report = check(name, f)
    assert report, report
    assert all(close for _, close, _ in report.outputs.values())


@pytest.mark.parametrize(('name', 'f'), [
    ('batch-statistics', lambda X: np.array([X.mean(0), X.var(0)])),
    ('batches-until', lambda *a: float(right('batches-until', *a))),
    ('batches-until', lambda *a: np.int32(right('batches-until', *a))),
    ('moving-share', lambda *a: np.float32(right('moving-share', *a))),
    ('half-mean', lambda X: X.mean(0, 'float64')),
    ('format-idx', lambda array: bytearray(right('format-idx', array))),
    ('format-idx', lambda array: list(right('format-idx', array))),
    ('masked-statistics', lambda X, mask: (
        np.ma.array(X, mask=~np.broadcast_to(mask[..., None], X.shape)
                    ).mean((0, 1)), X[mask].var(0)))])
def test_right_values_are_right(name, f):
    report = check(name, f)
    assert report and not report.complaint


def test_where_a_dtype_matters_the_task_says_so():
    assert [row.name for row in TABLE.values() if row.dtype] == [
        'shifted-variance', 'quantize']
    assert 'q: (O, I), int8' in task('quantize').split('\n')
    assert 'var: (F,), float32' in task('shifted-variance').split('\n')
    report = check('quantize', lambda W: (
        right('quantize', W)[0].astype('int64'), right('quantize', W)[1]))
    assert report.complaint == ('q has the right values, but dtype int64; '
                                'asked for is int8')


def test_a_tolerance_is_said():
    assert task('forward').endswith('tolerance: 1e-09 * (1 + the largest '
                                    'number)')
    off = 1.1e-9 * (1 + 2.25)  # the largest number that is drawn is 9 / 4
    assert not check('backward-dx-hat', lambda dY, gamma: dY * gamma + 1e-7)
    assert check('moving-average', lambda *a: right(
        'moving-average', *a) + 0.9e-9)
    assert not check('moving-average', lambda *a: right(
        'moving-average', *a) + off)


def test_handwritten_faults_are_at_least_fifteen():
    assert len({fault for _, fault, _ in HANDWRITTEN}) >= 15


@pytest.mark.parametrize(('name', 'kind'), [
    ('backward-dx', 'batch'), ('layer-norm-backward', 'layer'),
    ('rms-backward', 'rms')])
@pytest.mark.parametrize('eps', [1e-5, 0.3])
def test_gradients_beside_differences(name, kind, eps):
    rng = np.random.default_rng(1)
    X, dY, gamma = (rng.normal(size=s) for s in ((5, 4), (5, 4), 4))
    slopes = theory.numeric_gradient(lambda X: (
        dY * why.normalize(X, kind, gamma, eps=eps)).sum(), X)
    assert_allclose(right(name, dY, X, gamma, eps), slopes, rtol=1e-6,
                    atol=1e-8)


def test_chain_beside_differences():
    """Each intermediate value is moved, and what follows it computed."""
    rng = np.random.default_rng(2)
    X, dY = rng.normal(size=(2, 5, 3))
    gamma, beta = rng.normal(size=(2, 3))
    mean, eps = X.mean(0), 0.2
    c = X - mean
    var = (c ** 2).mean(0)
    rho = (var + eps) ** -0.5

    def loss(c=c, rho=None, var=None, X_hat=None, gamma=gamma, beta=beta):
        var = (c ** 2).mean(0) if var is None else var
        rho = (var + eps) ** -0.5 if rho is None else rho
        X_hat = c * rho if X_hat is None else X_hat
        return (dY * (gamma * X_hat + beta)).sum()

    def slopes(name, at):
        return theory.numeric_gradient(lambda x: loss(**{name: x}), at)

    expected = [slopes('beta', beta), slopes('gamma', gamma),
                slopes('X_hat', c * rho), slopes('rho', rho),
                slopes('var', var), slopes('c', c),
                theory.numeric_gradient(lambda x: loss(X - x), mean),
                theory.numeric_gradient(lambda x: loss(x - x.mean(0)), X)]
    found = right('backward-chain', dY, X, gamma, eps)
    for ours, theirs in zip(found, expected, strict=True):
        assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
    # The single steps, fed with these values, give the same
    dbeta, dgamma, dX_hat, drho, dvar, dc, dmean, dX = found
    for name, inputs, value in (
            ('dbeta', (dY,), dbeta), ('dgamma', (dY, c * rho), dgamma),
            ('dx-hat', (dY, gamma), dX_hat), ('drho', (dX_hat, c), drho),
            ('dvar', (drho, var, eps), dvar), ('dmean', (dc,), dmean),
            ('dc', (dX_hat, dvar, c, rho), dc),
            ('dx-end', (dc, dmean), dX)):
        assert_allclose(right(f'backward-{name}', *inputs), value,
                        rtol=1e-12)


def test_images_beside_theory():
    rng = np.random.default_rng(3)
    X, dY = rng.normal(size=(2, 3, 2, 4, 5))
    gamma, beta = rng.normal(size=(2, 2))
    Y, cache = theory.batch_norm_forward(X, gamma, beta, 0.1)
    assert_allclose(right('forward-images', X, gamma, beta, 0.1), Y)
    for ours, theirs in zip(right('backward-images', dY, X, gamma, 0.1),
                            theory.batch_norm_backward(dY, cache),
                            strict=True):
        assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('groups', [1, 2])
def test_groups_beside_why(groups):
    X = np.random.default_rng(4).normal(size=(3, 4, 2, 3))
    assert_allclose(right('group-norm', X, groups, 0.1),
                    why.normalize(X, 'group', groups=groups, eps=0.1))


def test_statistics_beside_one_value_at_a_time():
    values = np.random.default_rng(5).normal(3, 2, (9, 2))
    mean, M2 = values[0], np.zeros(2)
    for n, x in enumerate(values[1:], 1):
        mean, M2 = right('welford', n, mean, M2, x)
    assert_allclose([mean, M2 / 9], [values.mean(0), values.var(0)])
    parts = np.split(values, [2, 3])
    whole = right('population', np.array([2., 1., 6.]),
                  np.array([p.mean(0) for p in parts]),
                  np.array([p.var(0) for p in parts]))
    assert_allclose(whole, [values.mean(0), values.var(0)])


def test_folding_beside_the_two_layers():
    rng = np.random.default_rng(6)
    W, X = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    b, gamma, beta, mean = rng.normal(size=(4, 3))
    var = rng.uniform(1, 2, 3)

    def norm(Z, *params):
        return right('evaluation', Z, *params, 0.1)

    folded, bias = right('fold-dense', W, b, gamma, beta, mean, var, 0.1)
    assert_allclose(X @ folded.T + bias,
                    norm(X @ W.T + b, gamma, beta, mean, var))
    params = *rng.normal(size=(3, 4)), rng.uniform(1, 2, 4)
    folded, bias = right('fold-before', W, b, *params, 0.1)
    assert_allclose(X @ folded.T + bias, norm(X, *params) @ W.T + b)
    value = right('border-value', *params, 0.1)
    assert_allclose(norm(value, *params), 0, atol=1e-12)
    s, t = right('scale-and-shift', *params, 0.1)
    assert_allclose(X * s + t, norm(X, *params))


def test_moving_values_beside_a_loop():
    batches, moving = np.random.default_rng(7).normal(size=(6, 3)), 5.0
    for batch in batches:
        moving = right('moving-average', moving, batch, 0.75)
    weights = 0.25 * 0.75 ** np.arange(5, -1, -1)
    assert_allclose(right('start-removed', moving, 5.0, 0.75, 6),
                    weights @ batches / weights.sum())
    assert right('batches-until', 0.9, 0.01) == 44
    assert 0.9 ** 44 < 0.01 <= 0.9 ** 43
    X = np.random.default_rng(8).normal(size=(6, 2))
    assert_allclose(right('unbiased-variance', X.var(0), 6),
                    X.var(0, ddof=1))


@pytest.mark.parametrize(('name', 'f', 'complaint'), [
    ('batch-statistics', lambda X: X.mean(0),
     'it returns 1 value, expected 2: mean, var'),
    ('batch-statistics', lambda X: [X.mean(0)] * 3,
     'it returns 3 values, expected 2: mean, var'),
    ('batch-statistics', lambda X: (x for x in (X.mean(0), X.var(0))),
     'it returns 1 value, expected 2: mean, var'),
    ('normalize', lambda X, eps: [[1.0]],
     r'X_hat has shape \(1, 1\), expected \(2, 1\)'),
    ('normalize', lambda X, eps: [[1.0], [1.0, 2.0]],
     'X_hat is no array: '),
    ('normalize', lambda X, eps: [None], 'X_hat is of type list, expected'),
    ('normalize', lambda X, eps: None, 'X_hat is of type NoneType, '),
    ('normalize', lambda X, eps: X.astype(complex),
     'X_hat has dtype complex128, expected real numbers'),
    ('normalize', lambda X, eps: X.astype(str), 'X_hat has dtype <U32, '),
    ('normalize', lambda X, eps: X @ 0, r'it raises ValueError: matmul'),
    ('normalize', lambda X: X, 'it raises TypeError: .* 1 positional'),
    ('normalize', lambda X, eps: 1 / 0, 'it raises ZeroDivisionError: '),
    ('normalize', lambda X, eps: right('normalize', X, eps)[:1],
     r'X_hat has shape \(1, 1\), expected \(2, 1\)'),
    ('normalize', lambda X, eps: X * np.nan,
     'X_hat is NaN where a number is expected'),
    ('normalize', lambda X, eps: X + np.inf, 'X_hat is off'),
    ('normalize', lambda X, eps: right('normalize', X, eps).astype('f4') + .1,
     r'X_hat is off \(in float32\)'),
    ('half-mean', lambda X: X.mean(0), r'mean is off \(in float16\)'),
    ('half-mean', lambda X: X.mean(0, 'float32') + 1, 'mean is off$')])
def test_what_has_the_wrong_form_is_said(name, f, complaint):
    report = check(name, f)
    assert not report and re.match(complaint, report.complaint)
    assert report.complaint in repr(report) and report.inputs


def test_a_change_in_place_is_said():
    def f(X, eps):
        X -= X.mean(axis=0)
        return X / np.sqrt((X ** 2).mean(axis=0) + eps)

    report = check('normalize', f)
    assert report.complaint == 'it changes its argument X; work on a copy'
    assert report.outputs['X_hat'][1]  # the numbers are right


def test_a_sign_is_named_without_a_variant():
    report = check('backward-dgamma', lambda dY, X: -(dY * X).sum(axis=0))
    assert report.diagnosis == f'dgamma: {FAULTS["sign"]}'


def test_each_output_has_its_diagnosis():
    def f(dY, X, gamma, eps):
        g = gamma[:, None, None]
        axes = 0, 2, 3
        rho = (X.var(axes, keepdims=True) + eps) ** -.5
        X_hat = (X - X.mean(axes, keepdims=True)) * rho
        return g * rho * dY, (dY * X_hat).mean(axes), dY.sum(axes)

    report = check('backward-images', f)
    assert report.diagnosis == (f'dX: {FAULTS["held"]}; '
                                f'dgamma: {FAULTS["mean-for-sum"]}')
    assert report.outputs['dbeta'][1] and not report.outputs['dX'][1]


def test_an_unknown_fault_is_not_named():
    report = check('forward', lambda X, gamma, beta, eps: X)
    assert not report and report.diagnosis == ''
    assert report.complaint == 'Y is off' and 'Diagnosis' not in repr(report)


def test_the_counterexample_is_the_smallest_that_was_drawn():
    def wrong_from_four_on(X):
        return X.mean(0), X.var(0) + (len(X) >= 4)

    report = check('batch-statistics', wrong_from_four_on)
    sizes = [sample['X'].size for sample in exercises._samples(
        TABLE['batch-statistics'], 0) if len(sample['X']) >= 4]
    assert report.inputs['X'].size == min(sizes)
    assert_allclose(report.got['var'] - report.expected['var'], 1)
    assert report.outputs == {'mean': (True, True, 0.0), 'var': (
        False, False, pytest.approx(1))}
    assert report.diagnosis == ''


def test_rounding_is_approximately_right():
    report = check('batch-statistics', lambda X: (
        X.mean(0) + 1e-13, X.var(0)))
    assert report
    exact, approximate, largest = report.outputs['mean']
    assert not exact and approximate and 0 < largest < 1e-11
    assert 'exact: False | approximate: True ' in repr(report)


def test_one_mistake_in_the_last_input_is_found():
    calls = []

    def f(*inputs):
        calls.append(inputs)
        return right('moving-average', *inputs) + (len(calls) == 36)

    assert not check('moving-average', f)
    assert len(calls) == 36


def test_a_report_repeats_and_leaves_the_generator_alone():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first, second = (repr(check('backward-dx', held)) for _ in range(2))
    assert first == second != repr(check('backward-dx', held, seed=1))
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize(('error', 'message', 'call'), [
    (ValueError, "name: expected .*backward-dx.* got 'backward_dx'",
     lambda: check('backward_dx', held)),
    (ValueError, "name: expected .* got ''", lambda: task('')),
    (ValueError, 'name: expected .* got None', lambda: task(None)),
    (TypeError, 'f: expected a function, got ndarray',
     lambda: check('forward', np.ones(2))),
    (TypeError, 'seed: expected an integer',
     lambda: check('forward', held, 0.5)),
    (ValueError, 'seed: expected 0 or more',
     lambda: check('forward', held, -1))])
def test_wrong_arguments_are_named(error, message, call):
    with pytest.raises(error, match=f'^{message}'):
        call()


def test_a_task_has_arguments_and_shapes():
    lines = task('backward-images').split('\n')
    assert 'f(dY, X, gamma, eps) -> dX, dgamma, dbeta' in lines
    assert 'X: (N, C, H, W)' in lines and 'gamma: (C,)' in lines
    assert all(len(line) < 80 for row in TABLE for line in
               task(row).split('\n'))


def test_numpy_is_enough():
    ran = subprocess.run(
        [sys.executable, '-c', 'import sys\nbefore = set(sys.modules)\n'
         'import d2ltvm.exercises\n'
         'print(*{name.split(".")[0] for name in sys.modules} - '
         'sys.stdlib_module_names - {n.split(".")[0] for n in before})'],
        check=True, capture_output=True, text=True)
    loaded = {name for name in ran.stdout.split() if 'cython' not in name}
    assert loaded == {'d2ltvm', 'numpy'}


# The pages

def text_of(page):
    notebook = nbformat.read(ROOT / f'chapters/{page}.ipynb', as_version=4)
    return '\n\n'.join(cell.source for cell in notebook.cells
                       if cell.cell_type == 'markdown')


def test_the_page_lists_each_exercise_with_what_it_asks_and_its_page():
    listed = re.findall(r'^\| `([\w-]+)` \| (.*) \| \{ref\}`.*<(\w+)>` \|$',
                        text_of('exercises'), re.MULTILINE)
    assert sorted(listed) == sorted(
        (row.name, row.asks, row.page) for row in TABLE.values())


def test_the_page_solves_each_exercise():
    notebook = nbformat.read(ROOT / 'chapters/exercises.ipynb', 4)
    solved = '\n'.join(cell.source for cell in notebook.cells
                       if cell.id.startswith('solution-'))
    for name in TABLE:
        assert f"'{name.removeprefix('backward-')}'" in solved or (
            f"'{name}'" in solved), name


NAMED = [path.stem for path in sorted((ROOT / 'chapters').glob('*.ipynb'))
         if '## Exercises\n' in text_of(path.stem)
         and '\n### Solutions\n' in text_of(path.stem) + '\n']


def test_the_pages_of_the_first_part_are_complete():
    assert {'theory', 'why', 'from_scratch', 'gluon_module',
            'moving_statistics', 'practice'} <= set(NAMED)


@pytest.mark.parametrize('page', NAMED)
def test_each_exercise_of_a_page_has_a_name_and_an_answer(page):
    asked = text_of(page).split('## Exercises\n')[1]
    names = re.findall(r'^\d+\. \*\*([\w-]+)\*\* ', asked, re.MULTILINE)
    assert len(names) == len(re.findall(r'^\d+\. ', asked.split('\n### ')[0],
                                        re.MULTILINE)) > 0
    answers = re.findall(r'^`{3,}\{admonition\} Answer: ([\w-]+)$', asked,
                         re.MULTILINE)
    assert answers == names and len(set(names)) == len(names)
