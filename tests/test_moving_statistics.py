"""PuzzleLib's module: printed values, faults, files; conventions."""
import json
from importlib.metadata import version
from pathlib import Path

import conventions as bench
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from d2ltvm import conventions
from d2ltvm import moving_statistics as ms
from d2ltvm.conventions import convert_statistics
from d2ltvm.mxnet_today import autograd, gluon, mx, nd, npx

STORED = json.loads((Path(__file__).resolve().parent.parent / 'benchmarks'
                     / 'results' / 'conventions.json').read_text())
factors = st.sampled_from([(1.0, 0.1), (1.0, 0.0), (0.1, 0.1), (0.5, 0.2),
                           (0.0, 0.9)])
data = st.fixed_dictionaries({
    'N': st.integers(2, 12), 'F': st.integers(1, 7),
    'offset': st.sampled_from([0, 1000, -1000]),
    'size': st.sampled_from([1e-4, 1, 1e4]),
    'dtype': st.sampled_from(['float32', 'float64']),
    'seed': st.integers(0, 1000)})


def draw(N, F, offset, size, dtype, seed, batches=1):
    rng = np.random.default_rng(seed)
    return (offset + size * rng.normal(size=(batches, N, F))).astype(dtype)


def array(a, semantics=False):
    make = mx.np.array if semantics else nd.array
    return make(a, dtype=a.dtype)


def values(block):
    return {name: p.data().asnumpy()
            for name, p in block.collect_params().items()}


def train(block, X):
    with autograd.record():
        Y = block(X)
    return Y


def replay(batches, init_factor=1.0, min_factor=0.1):
    """Moving mean and unbiased variance in float64."""
    mean, var = 0.0, 1.0
    for n, batch in enumerate(batches.astype('float64'), start=1):
        share = max(init_factor / n, min_factor)
        mean = (1 - share) * mean + share * batch.mean(axis=0)
        var = (1 - share) * var + share * batch.var(axis=0, ddof=1)
    return mean, var


def tolerances(X):
    """Rounding errors of mean, variance and normalized value.

    An entry is off by half an ulp of the largest; a sum of N by up to N of
    them. The variance is a mean of squares of numbers that are off by this
    much. Normalizing divides by the standard deviation.
    """
    eps = np.finfo(X.dtype).eps
    off = (4 + X.shape[-2]) * eps * abs(X).max()
    std = X.astype('float64').std(axis=-2).max()
    least = np.sqrt(X.astype('float64').var(axis=-2).min() + 1e-5)
    var = 3 * off * std + off ** 2 + 20 * eps * std ** 2
    return off, var, 3 * off / least + 4 * var / least ** 2 + 20 * eps


# The rule

def test_factor_is_a_plain_mean_at_first():
    assert [ms.moving_factor(n) for n in (1, 2, 4, 10, 11, 1000)] == [
        1, 0.5, 0.25, 0.1, 0.1, 0.1]
    assert ms.moving_factor(8, 0.5, 0.01) == 0.0625


@given(st.integers(1, 10 ** 9), factors)
def test_factor(n, factors):
    init_factor, min_factor = factors
    assert ms.moving_factor(n, *factors) == max(init_factor / n, min_factor)


@pytest.mark.parametrize(('arguments', 'name'), [
    ((0,), 'n'), ((1, 1.5), 'init_factor'),
    ((1, -0.1), 'init_factor'), ((1, 1, 1.01), 'min_factor'),
    ((1, 1, np.nan), 'min_factor'), ((1, 0, 0), 'init_factor, min_factor')])
def test_factor_errors(arguments, name):
    with pytest.raises(ValueError, match=f'^{name}: '):
        ms.moving_factor(*arguments)


# The parts

@given(data, factors)
def test_update_statistics(data, factors):
    batches = draw(**data, batches=13)
    mean, var, count = (nd.zeros(data['F'], dtype=data['dtype']),
                        nd.ones(data['F'], dtype=data['dtype']),
                        nd.zeros(1, dtype='int64'))
    for batch in batches.astype('float64'):
        statistics = (a.astype(data['dtype']) for a in (
            batch.mean(axis=0), batch.var(axis=0)))
        ms.update_statistics(mean, var, count, *map(array, statistics),
                             data['N'], *factors)
    expected = replay(batches, *factors)
    rtol = 30 * np.finfo(data['dtype']).eps  # 13 roundings of each term
    largest = abs(batches).max()
    assert_allclose(mean.asnumpy(), expected[0], rtol=0, atol=rtol * largest)
    assert_allclose(var.asnumpy(), expected[1], rtol=rtol)
    assert count.asscalar() == 13 and count.dtype == np.int64


@given(data)
def test_normalize_inplace(data):
    X = draw(**data)[0]
    rng = np.random.default_rng(data['seed'])
    mean, gamma, beta = (a.astype(data['dtype']) for a in (
        X.mean(axis=0), *rng.normal(size=(2, data['F']))))
    var = X.var(axis=0, dtype='float64').astype(data['dtype'])
    memory = array(X)
    result = ms.normalize_inplace(
        memory, *map(array, (mean, var, gamma, beta)), 1e-5)
    assert result is None
    X, mean, var, gamma, beta = (
        a.astype('float64') for a in (X, mean, var, gamma, beta))
    scale = gamma / np.sqrt(var + 1e-5)
    size = abs(scale) * (abs(X) + abs(mean)) + abs(beta)
    difference = abs(memory.asnumpy() - ((X - mean) * scale + beta))
    assert (difference <= 6 * np.finfo(data['dtype']).eps * size).all()


# The block

def test_printed_values():
    X = np.arange(18, dtype='float32').reshape(3, 6)
    bn = ms.BatchNorm(6)
    with autograd.train_mode():
        Y = bn(nd.array(X)).asnumpy()
    assert_allclose(bn.mean.data().asnumpy(), [6, 7, 8, 9, 10, 11], rtol=1e-6)
    assert_allclose(bn.var.data().asnumpy(), [36] * 6, rtol=1e-6)
    assert_allclose(Y / bn.scale.data().asnumpy(),
                    np.outer([-1.22474, 0, 1.22474], np.ones(6)), atol=1e-5)


@given(data, factors)
def test_block_against_float64(data, factors):
    batches = draw(**data, batches=4)
    bn = ms.BatchNorm(data['F'], init_factor=factors[0],
                      min_factor=factors[1], seed=data['seed'])
    bn.cast(data['dtype'])
    off_mean, off_var, off_Y = tolerances(batches)
    for X in batches:
        Y = train(bn, array(X)).asnumpy()
        scale = bn.scale.data().asnumpy().astype('float64')
        X = X.astype('float64')
        expected = scale * (X - X.mean(axis=0)) / np.sqrt(
            X.var(axis=0) + 1e-5)
        assert Y.dtype == data['dtype']
        assert_allclose(Y, expected, rtol=0, atol=2 * off_Y)
    mean, var = replay(batches, *factors)
    stored = [p.data().asnumpy() for p in (bn.mean, bn.var)]
    assert_allclose(stored[0], mean, rtol=0, atol=2 * off_mean)
    assert_allclose(stored[1], var, rtol=1e-5, atol=4 * off_var)
    # testing: by what is stored, which stays
    Y = bn(array(batches[0])).asnumpy()
    mean, var = (a.astype('float64') for a in stored)
    expected = scale * (batches[0] - mean) / np.sqrt(var + 1e-5)
    terms = (abs(batches[0]) + abs(mean)) / np.sqrt(var + 1e-5)
    eps = np.finfo(data['dtype']).eps
    assert (abs(Y - expected) <= 8 * eps * terms).all()
    assert_array_equal(bn.mean.data().asnumpy(), stored[0])
    assert_array_equal(bn.var.data().asnumpy(), stored[1])
    assert bn.count.data().asnumpy() == [4]


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_gradients_against_the_operator(N, F, seed):
    rng = np.random.default_rng(seed)
    X, weight = (nd.array(a, dtype='float64')
                 for a in rng.normal(3, 2, size=(2, N, F)))
    bn = ms.BatchNorm(F, seed=seed)
    bn.cast('float64')
    bn.initialize()
    X.attach_grad()
    gradients = []
    for norm in (bn, lambda X: nd.BatchNorm(
            X, bn.scale.data(), bn.bias.data(), nd.zeros(F, dtype='float64'),
            nd.ones(F, dtype='float64'), eps=1e-5, fix_gamma=False)):
        train(norm, X).backward(weight)
        gradients.append([a.asnumpy().copy() for a in (
            X.grad, bn.scale.grad(), bn.bias.grad())])
    for ours, builtin in zip(*gradients, strict=True):
        # two examples: terms of size 1 / std cancel to almost nothing
        assert_allclose(ours, builtin, rtol=1e-7, atol=1e-8)


def test_both_kinds_of_arrays(semantics):
    X = draw(8, 3, 2, 3, 'float32', 0)[0]
    norm = ms.BatchNorm(3, seed=0)
    # after set_np, Gluon lets no block return an NDArray
    kinds = [True] if semantics else [False, True]
    for kind in kinds:
        x = array(X, kind)
        x.attach_grad()
        with autograd.record():
            Y = norm(x)
            loss = (Y * Y * Y).sum()
        loss.backward()
        assert abs(norm.scale.grad().asnumpy()).min() > 0
        assert abs(x.grad.asnumpy()).max() > 0
        assert type(Y) is type(norm(x)) is type(x)
        scale = norm.scale.data().asnumpy()
        assert_allclose(Y.asnumpy(), scale * (X - X.mean(axis=0))
                        / np.sqrt(X.var(axis=0) + 1e-5), atol=1e-5)
    assert norm.count.data().asnumpy() == [len(kinds)]
    mean, var = replay(np.stack([X]))
    assert_allclose(norm.mean.data().asnumpy(), mean, rtol=1e-5)
    assert_allclose(norm.var.data().asnumpy(), var, rtol=1e-5)


def test_made_before_used_after_set_np():
    X = draw(8, 3, 2, 3, 'float32', 0)[0]
    norm, reference = ms.BatchNorm(3, seed=0), ms.BatchNorm(3, seed=0)
    norm.initialize()
    expected = train(reference, nd.array(X)).asnumpy()
    npx.set_np()
    try:
        assert_array_equal(train(norm, mx.np.array(X)).asnumpy(), expected)
    finally:
        npx.reset_np()


def test_no_backward_pass_and_nothing_recorded():
    norm = ms.BatchNorm(2)
    with autograd.record():
        norm(nd.array([[1, 2], [3, 6]]))
        assert_array_equal(norm.mean.data().asnumpy(), [2, 4])
        assert autograd.is_recording()
    assert norm.mean.grad_req == norm.count.grad_req == 'null'


def test_layer_used_twice_counts_twice():
    norm, X = ms.BatchNorm(2), nd.array([[1, 2], [3, 6]])
    with autograd.record():
        Y = norm(norm(X))
    Y.backward()
    assert norm.count.data().asscalar() == 2


def test_constant_feature():
    norm = ms.BatchNorm(2)
    Y = train(norm, nd.full((4, 2), 7)).asnumpy()
    assert_allclose(Y, np.zeros((4, 2)), atol=1e-3)
    assert_allclose(norm.var.data().asnumpy(), [0, 0], atol=1e-10)


@pytest.mark.parametrize('value', [0.1, 100, -3e8])
def test_a_constant_feature_gives_exactly_the_bias(value):
    norm, X = ms.BatchNorm(2), nd.full((3, 2), value)
    norm.initialize()
    norm.bias.set_data(nd.array([0.3, -7]))
    bias = norm.bias.data().asnumpy()
    for Y in train(norm, X), norm(X):  # testing: by what training stored
        assert_array_equal(Y.asnumpy(), np.broadcast_to(bias, (3, 2)))


def test_a_large_mean_costs_no_digits():
    X = np.float32(1000 + 1e-3 * np.arange(16))[:, None]
    exact = X.astype('float64') - X.mean(dtype='float64')
    expected = exact / np.sqrt((exact ** 2).mean() + 1e-5)
    norm = ms.BatchNorm(1, sscale=0)
    assert_allclose(train(norm, nd.array(X)).asnumpy(), expected, atol=1e-5)


def test_no_testing_with_a_negative_variance():
    norm = ms.BatchNorm(2, name='bn')
    norm.initialize()
    norm.var.set_data(nd.array([1, -1e-3]))
    for inplace in (False, True):
        norm.inplace = inplace
        with pytest.raises(ValueError, match=r'^bn: var: expected no neg'):
            norm(nd.ones((2, 2)))


def test_nan_is_not_hidden():
    norm, X = ms.BatchNorm(2), np.random.default_rng(0).normal(size=(4, 2))
    X[0, 0] = np.nan
    Y = train(norm, nd.array(X)).asnumpy()
    assert np.isnan(Y[:, 0]).all() and np.isfinite(Y[:, 1]).all()


# Settings

def test_scales_are_drawn(semantics):
    def scales(**options):
        norm = ms.BatchNorm(4000, **options)
        norm.initialize()
        return norm.scale.data().asnumpy()

    before = np.random.get_state()[1].copy()
    assert_array_equal(scales(seed=3), scales(seed=3))
    assert (scales(seed=3) != scales(seed=4)).any()
    mx.random.seed(5)
    first = scales(sscale=0.5)
    mx.random.seed(5)
    assert_array_equal(first, scales(sscale=0.5))
    for drawn in (first, scales(sscale=0.5, seed=0)):
        # five standard errors
        assert abs(drawn.mean() - 1) < 5 * 0.5 / np.sqrt(4000)
        assert abs(drawn.std() / 0.5 - 1) < 5 / np.sqrt(8000)
    assert_array_equal(scales(sscale=0), np.ones(4000))
    assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize('affine', [True, False])
def test_affine(affine):
    norm = ms.BatchNorm(3, affine=affine)
    norm.initialize()
    before = values(norm)
    trainer = gluon.Trainer(norm.collect_params(), 'sgd',
                            {'learning_rate': 1, 'wd': 0.1})
    X = nd.array(draw(8, 3, 0, 1, 'float32', 0)[0])
    X.attach_grad()
    with autograd.record():
        loss = nd.square(norm(X) - 1).sum()
    loss.backward()
    if not affine:
        assert_array_equal(norm.scale.data().asnumpy(), [1, 1, 1])
    trainer.step(1)
    for parameter in (norm.scale, norm.bias):
        changed = parameter.data().asnumpy() != before[parameter.name]
        assert changed.all() == affine and changed.any() == affine
    assert_array_equal(norm.bias.data().asnumpy() == 0, [not affine] * 3)
    assert norm.count.data().asscalar() == 1  # statistics, all the same


@pytest.mark.parametrize(('change', 'error'), [
    ({'m': 1}, ValueError), ({'m': 0}, ValueError), ({'m': 2.5}, TypeError),
    ({'var': nd.ones(1)}, ValueError),
    ({'batch_mean': nd.ones(2)}, ValueError),
    ({'batch_var': nd.ones(2)}, ValueError),
    ({'batch_var': nd.ones((1, 3))}, ValueError),
    ({'batch_var': nd.ones(3, dtype='float64')}, TypeError),
    ({'init_factor': None}, TypeError)])
def test_a_refused_update_changes_nothing(change, error):
    arguments = {'mean': nd.zeros(3), 'var': nd.ones(3),
                 'count': nd.zeros(1, dtype='int64'),
                 'batch_mean': nd.ones(3), 'batch_var': nd.ones(3), 'm': 4}
    arguments |= change
    kept = [arguments[name] for name in ('mean', 'var', 'count')]
    before = [a.asnumpy() for a in kept]
    with pytest.raises(error, match=f'^{next(iter(change))}: expected'):
        ms.update_statistics(**arguments)
    for a, b in zip(kept, before, strict=True):
        assert_array_equal(a.asnumpy(), b)


@pytest.mark.parametrize(('name', 'value', 'error'), [
    ('X', nd.ones((2, 3, 3, 3)), ValueError), ('X', nd.ones(3), ValueError),
    ('mean', nd.ones(2), ValueError), ('var', nd.ones((1, 3)), ValueError),
    ('gamma', nd.ones(2), ValueError), ('beta', nd.ones(2), ValueError),
    ('beta', nd.ones(3, dtype='float64'), TypeError),
    ('var', nd.array([1, 1, -1]), ValueError),
    ('X', mx.np.ones((4, 3)), TypeError),
    ('eps', 0, ValueError), ('eps', None, TypeError)])
def test_a_refused_normalization_changes_nothing(name, value, error):
    arguments = {'X': nd.full((4, 3), 7), 'mean': nd.zeros(3),
                 'var': nd.ones(3), 'gamma': nd.full(3, 2),
                 'beta': nd.zeros(3), 'eps': 1e-5, name: value}
    before = arguments['X'].asnumpy()
    with pytest.raises(error, match=f'^{name}: expected'):
        ms.normalize_inplace(**arguments)
    assert_array_equal(arguments['X'].asnumpy(), before)


@pytest.mark.parametrize(('name', 'value', 'error'), [
    ('n', 'a', TypeError), ('n', np.nan, TypeError), ('n', 0, ValueError),
    ('n', 1.5, TypeError),
    ('min_factor', None, TypeError)])
def test_moving_factor_refuses(name, value, error):
    with pytest.raises(error, match=f'^{name}: expected'):
        ms.moving_factor(**{'n': 1, name: value})


@pytest.mark.parametrize(('options', 'error', 'name'), [
    ({'size': 0}, ValueError, 'size'), ({'size': 2.0}, TypeError, 'size'),
    ({'size': True}, TypeError, 'size'),
    ({'epsilon': 0}, ValueError, 'epsilon'),
    ({'epsilon': np.nan}, ValueError, 'epsilon'),
    ({'epsilon': None}, TypeError, 'epsilon'),
    ({'init_factor': None}, TypeError, 'init_factor'),
    ({'sscale': 'a'}, TypeError, 'sscale'),
    ({'init_factor': 2}, ValueError, 'init_factor'),
    ({'min_factor': -1}, ValueError, 'min_factor'),
    ({'sscale': -1}, ValueError, 'sscale'),
    ({'sscale': np.inf}, ValueError, 'sscale'),
    ({'name': 7}, TypeError, 'name'), ({'name': ''}, TypeError, 'name')])
def test_setting_errors(options, error, name):
    with pytest.raises(error, match=f'^{name}: '):
        ms.BatchNorm(**{'size': 3, **options})


@pytest.mark.parametrize(('X', 'error', 'text'), [
    (np.ones((4, 3)), TypeError, 'X: expected an MXNet array'),
    (nd.ones((4, 3), dtype='float64'), TypeError,
     'X: expected an NDArray of float32, got float64'),
    (nd.ones((4, 3), dtype='int32'), TypeError,
     'X: expected an NDArray of float32, got int32'),
    (nd.ones((4, 2)), ValueError, r'X: expected shape \(any, 3\)'),
    (nd.ones((4, 3, 1, 1)), ValueError, r'X: expected shape \(any, 3\)'),
    (nd.ones(3), ValueError, r'X: expected shape \(any, 3\)')])
@pytest.mark.parametrize('training', [True, False])
def test_input_errors(X, error, text, training):
    norm = ms.BatchNorm(3, name='layer7')
    with autograd.train_mode() if training else autograd.predict_mode():
        with pytest.raises(error, match=f'^layer7: {text}'):
            norm(X)
    norm.initialize()
    assert norm.count.data().asscalar() == 0


def test_one_example_is_for_inference_only():
    norm = ms.BatchNorm(3, name='bn')
    assert norm(nd.ones((1, 3))).shape == (1, 3)
    with autograd.train_mode(), pytest.raises(
            ValueError, match=r'^bn: X: expected 2 or more .*, got 1$'):
        norm(nd.ones((1, 3)))
    assert norm.count.data().asscalar() == 0


def test_name_and_representation():
    norm = ms.BatchNorm(3, name='bn')
    assert norm.name == 'bn' and repr(norm) == "BatchNorm(3, name='bn')"
    assert set(norm.collect_params()) == {
        f'bn_{name}' for name in ('scale', 'bias', 'mean', 'var', 'count')}


def test_in_a_network_initialize_says_nothing():
    net = gluon.nn.Sequential()
    net.add(gluon.nn.Dense(3), ms.BatchNorm(3))
    net.initialize()  # warnings are errors here
    train(net, nd.ones((4, 2))).backward()
    net.cast('float64')
    assert net[1].count.data().dtype == np.int64
    assert net[1].mean.data().dtype == np.float64
    assert net(nd.ones((4, 2), dtype='float64')).dtype == np.float64
    with pytest.raises(TypeError, match='dtype: expected float32 or'):
        net.cast('float16')


# In place

def test_inplace(semantics):
    X = draw(6, 3, 2, 3, 'float32', 1)[0]
    plain, inplace = (ms.BatchNorm(3, seed=0, inplace=flag)
                      for flag in (False, True))
    for norm in (plain, inplace):
        norm.initialize()
        for parameter, value in ((norm.mean, [1, 2, 3]),
                                 (norm.var, [4, 5, 6])):
            parameter.set_data(array(np.float32(value), semantics))
    for kind in [True] if semantics else [False, True]:
        x = array(X, kind)
        part = x[2:4]
        assert inplace(x) is x
        assert_allclose(x.asnumpy(), plain(array(X, kind)).asnumpy(),
                        rtol=1e-6, atol=1e-6)
        assert_array_equal(part.asnumpy(), x.asnumpy()[2:4])


@pytest.mark.parametrize('mode', [
    autograd.train_mode, autograd.record,
    lambda: autograd.record(train_mode=False)])
def test_inplace_is_for_inference(mode):
    norm, X = ms.BatchNorm(3, inplace=True, name='bn'), nd.ones((4, 3))
    with mode(), pytest.raises(RuntimeError, match='bn: inplace=True'):
        norm(X)
    assert_array_equal(X.asnumpy(), np.ones((4, 3)))
    norm.initialize()
    assert norm.count.data().asscalar() == 0


# Files

def network(empty=False, size=4):
    net = gluon.nn.Sequential(prefix='net_')
    net.add(gluon.nn.Dense(size, in_units=3, prefix='first_'),
            ms.BatchNorm(size, name='bn', empty=empty),
            gluon.nn.Dense(1, in_units=size, prefix='last_'))
    return net


def steps(net, batches, semantics=False):
    trainer = gluon.Trainer(net.collect_params(), 'sgd',
                            {'learning_rate': 0.1})
    for X in batches:
        with autograd.record():
            Y = net(array(X, semantics)) - 1
            loss = (Y * Y).mean()
        loss.backward()
        trainer.step(1)


def test_resumed_training_is_the_same(tmp_path, semantics):
    batches = draw(6, 3, 1, 2, 'float32', 2, batches=14)
    start, half = (str(tmp_path / name) for name in ('start', 'half'))
    whole, first = network(), network()
    whole.initialize()
    whole.save_parameters(start)
    ms.load_checked(first, start)
    steps(whole, batches, semantics)
    steps(first, batches[:6], semantics)
    first.save_parameters(half)
    by_gluon, by_us = network(), network(empty=True)
    by_gluon.load_parameters(half)
    ms.load_checked(by_us, half)
    expected = values(whole)
    for net in (by_gluon, by_us):
        steps(net, batches[6:], semantics)
        got = values(net)
        assert got.keys() == expected.keys()
        for name in got:
            assert_array_equal(got[name], expected[name], name)
        assert got['bn_count'] == [14]


def test_block_alone_goes_through_a_file(tmp_path, semantics):
    norm = ms.BatchNorm(3, seed=1)
    train(norm, array(draw(5, 3, 1, 1, 'float32', 0)[0], semantics))
    norm.save_parameters(str(tmp_path / 'norm'))
    for options in ({'empty': True}, {'seed': 2}):
        copy = ms.BatchNorm(3, **options)
        copy.load_parameters(tmp_path / 'norm')
        for a, b in zip(values(norm).values(), values(copy).values(),
                        strict=True):
            assert_array_equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize('saved_with_np', [False, True])
def test_files_of_the_other_mode(tmp_path, saved_with_np):
    file = str(tmp_path / 'norm')
    try:
        if saved_with_np:
            npx.set_np()
        norm = ms.BatchNorm(3, seed=1)
        norm.initialize()
        norm.save_parameters(file)
        npx.reset_np() if saved_with_np else npx.set_np()
        copy = ms.BatchNorm(3, empty=True)
        copy.load_parameters(file)
        assert_array_equal(copy.scale.data().asnumpy(),
                           norm.scale.data().asnumpy())
    finally:
        npx.reset_np()


def test_loading_draws_no_numbers(tmp_path):
    net = network()
    net.initialize()
    net.save_parameters(str(tmp_path / 'net'))
    mx.random.seed(1)
    expected = nd.random.normal(shape=3).asnumpy()
    mx.random.seed(1)
    ms.load_checked(network(empty=True), tmp_path / 'net')
    assert_array_equal(nd.random.normal(shape=3).asnumpy(), expected)


def test_loaded_values_of_another_size(tmp_path):
    norm = ms.BatchNorm(5)
    norm.initialize()
    norm.save_parameters(str(tmp_path / 'norm'))
    net = gluon.nn.Sequential()
    net.add(ms.BatchNorm(4, empty=True, name='bn'))
    gluon.Block.load_parameters(net[0], str(tmp_path / 'norm'))  # unchecked
    with pytest.raises(ValueError, match='bn: the values that were loaded'):
        net(nd.ones((2, 4)))


def test_loading_to_a_device(tmp_path):
    file = tmp_path / 'net'
    net, here, there = network(), network(empty=True), network(empty=True)
    net.initialize()
    net.save_parameters(str(file))
    here.initialize(ctx=mx.cpu(1))
    ms.load_checked(here, file)
    ms.load_checked(there, file, ctx=mx.cpu(1))
    for net in (here, there):
        for parameter in net.collect_params().values():
            assert parameter.list_ctx() == [mx.cpu(1)]
        train(net, nd.ones((2, 3), ctx=mx.cpu(1)))


def test_empty_block():
    norm = ms.BatchNorm(3, empty=True, name='hidden')
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r'^hidden: made with empty='
                           r'True .* load_parameters'):
            norm(nd.ones((2, 3)))
        norm.initialize()  # allocates nothing
        assert not any(map(ms._is_allocated,
                           norm.collect_params().values()))


def test_every_cut_of_a_file_is_noticed(tmp_path):
    norm = ms.BatchNorm(3)
    norm.initialize()
    file = tmp_path / 'norm'
    norm.save_parameters(str(file))
    content, before = file.read_bytes(), values(norm)
    for length in range(0, len(content), 5):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match='norm: damaged'):
            norm.load_parameters(file)
    for name, value in values(norm).items():
        assert_array_equal(value, before[name])


@pytest.mark.parametrize(('change', 'text'), [
    ({'1.count': None}, r"missing: \['1.count'\]"),
    ({'extra': nd.ones(1)}, r"unknown: \['extra'\]"),
    ({'2.weight': nd.ones((1, 5))}, r'2.weight: expected shape \(1, 4\)'),
    ({'1.mean': nd.ones(4, dtype='float64')},
     '1.mean: expected an NDArray of float32, got float64'),
    ({'1.count': nd.ones(1)}, '1.count: expected an NDArray of int64'),
    ({'2.bias': nd.array([np.nan])}, '2.bias: holds NaN'),
    ({'1.var': nd.array([1, 1, -1, 1])}, 'bn: var: expected no negative'),
    ({'1.count': nd.array([-1], dtype='int64')}, 'bn: count: expected 0 or'),
    ({'1.scale': nd.ones(5)}, r'expected shape \(4,\)'),
    ({'1.count': nd.ones(2, dtype='int64')}, r'expected shape \(1,\)|count')])
@pytest.mark.parametrize('empty', [False, True])
def test_wrong_files_change_nothing(tmp_path, change, text, empty):
    net = network()
    net.initialize()
    file = str(tmp_path / 'file')
    net.save_parameters(file)
    arrays = {name: a for name, a in (nd.load(file) | change).items()
              if a is not None}
    nd.save(file, arrays)
    target = network(empty=empty)
    target[0].initialize()
    target[2].initialize()
    if not empty:
        target[1].initialize()
    before = values(target) if not empty else {}
    with pytest.raises(ValueError, match=text):
        ms.load_checked(target, file)
    if empty:
        assert not ms._is_allocated(target[1].scale)
    for name, value in before.items():
        assert_array_equal(target.collect_params()[name].data().asnumpy(),
                           value)


def test_other_errors_of_files(tmp_path):
    norm = ms.BatchNorm(3)
    with pytest.raises(FileNotFoundError):
        norm.load_parameters(tmp_path / 'nothing')
    nd.save(str(tmp_path / 'list'), [nd.ones(3)])
    with pytest.raises(ValueError, match='list: damaged, or not a file of'):
        norm.load_parameters(tmp_path / 'list')
    (tmp_path / 'text').write_text('no parameters at all')
    with pytest.raises(ValueError, match='text: damaged'):
        norm.load_parameters(tmp_path / 'text')


# Conversion

def collect(batches, convention, momentum, first=1.0):
    """What a library of this convention would store, in float64."""
    weighs, stored = conventions.CONVENTIONS[convention]
    share = momentum if weighs == 'new' else 1 - momentum
    mean, var = 0.0, first
    for X in batches:
        mean = (1 - share) * mean + share * X.mean(axis=0)
        var = (1 - share) * var + share * X.var(
            axis=0, ddof=stored == 'unbiased')
    return mean, var


kinds = st.sampled_from(sorted(conventions.CONVENTIONS))


@given(data, kinds, kinds, st.integers(1, 12),
       st.floats(0.01, 0.99), st.sampled_from([0, 1, 5]))
def test_conversion_is_what_the_target_would_have(
        data, source, target, updates, momentum, first):
    batches = draw(**data, batches=updates).astype('float64')
    mean, var = collect(batches, source, momentum, first)
    converted = convert_statistics(
        mean.astype(data['dtype']), var.astype(data['dtype']), momentum,
        source, target, data['N'], updates, first)
    same = (conventions.CONVENTIONS[source][0]
            == conventions.CONVENTIONS[target][0])
    assert_allclose(converted[2], momentum if same else 1 - momentum)
    expected = collect(batches, target, converted[2], first)
    # var carries the rounding of the first value's rest, factor 2 at most
    eps = np.finfo(data['dtype']).eps
    assert_allclose(converted[0], expected[0], rtol=4 * eps, atol=1e-10)
    assert_allclose(converted[1], expected[1], rtol=1e3 * np.finfo(
        'float64').eps + 8 * eps, atol=4 * eps * first)
    assert converted[0].dtype == converted[1].dtype == data['dtype']


@given(data, kinds, kinds, st.floats(0, 1))
def test_round_trip(data, source, target, momentum):
    X = draw(**data)[0].astype('float64')
    mean, var = X.mean(axis=0), 2 + X.var(axis=0)  # above the first value
    for updates in (None, 7):
        there = convert_statistics(mean, var, momentum, source, target,
                                      data['N'], updates)
        back = convert_statistics(*there, target, source, data['N'],
                                     updates)
        for got, expected in zip(back, (mean, var, momentum), strict=True):
            assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


def test_conversion_leaves_its_arguments_alone():
    mean, var = np.zeros(2), np.ones(2)
    result = convert_statistics(mean, var, None, 'd2l', 'pytorch', 2)
    assert_array_equal(result[1], [2, 2])
    assert result[2] is None
    for array_ in result[:2]:
        array_[:] = 7
    assert_array_equal([mean, var], [[0, 0], [1, 1]])
    same = convert_statistics([1, 2], [3, 4], 0.1, 'd2l', 'topi')
    assert_array_equal(same[1], [3, 4])
    assert same[1].dtype == np.float64


@given(data)
def test_conversion_takes_what_mxnet_has(data):
    X = draw(**data)[0]
    mean, var = X.mean(axis=0), X.var(axis=0)
    expected = convert_statistics(mean, var, 0.9, 'gluon', 'pytorch',
                                     data['N'])
    for semantics in (False, True):
        got = convert_statistics(
            array(mean, semantics), array(var, semantics), 0.9, 'gluon',
            'pytorch', data['N'])
        for a, b in zip(got[:2], expected[:2], strict=True):
            assert type(a) is np.ndarray and a.dtype == data['dtype']
            assert_array_equal(a, b)


def test_a_large_variance_that_still_fits():
    for source, target, factor in (('gluon', 'pytorch', 2),
                                   ('pytorch', 'gluon', 0.5)):
        var = np.float32([1.6e38, 1])
        result = convert_statistics([0, 0], var, None, source, target, 2)
        assert_array_equal(result[1], factor * var)


def test_the_dtype_after_conversion():
    for before, after in (('float16', 'float32'), ('float32', 'float32'),
                          ('int64', 'float64'), ('float64', 'float64')):
        result = convert_statistics(
            np.zeros(2, before), np.ones(2, before), 0.9, 'mxnet', 'pytorch',
            4)
        assert {array.dtype.name for array in result[:2]} == {after}


def test_conversion_of_the_operators_statistics():
    batches = draw(5, 3, 1, 2, 'float32', 3, batches=9)
    mean, var = nd.zeros(3), nd.ones(3)
    norm = ms.BatchNorm(3, init_factor=0.2, min_factor=0.2)
    for X in map(nd.array, batches):
        X.attach_grad()
        with autograd.record():
            Y = nd.BatchNorm(X, nd.ones(3), nd.zeros(3), mean, var,
                             momentum=0.8) + norm(X)
        Y.backward()
    arguments = mean.asnumpy(), var.asnumpy(), 0.8, 'mxnet', 'puzzlelib', 5
    got = convert_statistics(*arguments, updates=9)
    assert_allclose(got[0], norm.mean.data().asnumpy(), rtol=1e-5, atol=1e-6)
    assert_allclose(got[1], norm.var.data().asnumpy(), rtol=1e-5)
    assert_allclose(got[2], 0.2)
    rough = convert_statistics(*arguments)
    assert_allclose(rough[1] - got[1], 0.8 ** 9 / 4, rtol=1e-3)


@pytest.mark.parametrize(('options', 'text'), [
    ({'source': 'caffe'}, 'source: expected one of'),
    ({'target': None}, 'target: expected one of'),
    ({'count': None}, 'count: expected the number of values'),
    ({'count': 1}, 'count: '), ({'count': np.nan}, 'count: '),
    ({'mean': np.zeros(3)}, r'mean, var: expected one shape \(C,\)'),
    ({'mean': np.zeros((1, 2)), 'var': np.ones((1, 2))}, 'mean, var: '),
    ({'count': 4.0}, 'count: '),
    ({'mean': np.array([0, np.nan])}, 'mean: expected finite'),
    ({'var': np.array([1, -1])}, 'var: expected finite numbers, none neg'),
    ({'var': np.array([1, np.inf])}, 'var: expected finite numbers'),
    ({'momentum': 1.1}, 'momentum: '), ({'momentum': np.nan}, 'momentum: '),
    ({'updates': -1}, 'updates: '),
    ({'updates': 1, 'first_var': np.nan}, 'first_var: '),
    ({'updates': 1, 'momentum': None}, 'momentum: expected a number'),
    ({'count': 2, 'var': np.full(2, 3.3e38, 'float32')},
     'var: expected a variance that fits float32 after conversion'),
    ({'updates': 1, 'var': np.array([0.5, 1])}, 'var: expected at least 0.9')
])
def test_conversion_errors(options, text):
    good = {'mean': np.zeros(2), 'var': np.ones(2), 'momentum': 0.9,
            'source': 'mxnet', 'target': 'pytorch', 'count': 4}
    convert_statistics(**good)
    with pytest.raises((TypeError, ValueError), match=f'^{text}'):
        convert_statistics(**{**good, **options})


# Names

def test_names_of_a_gluon_file(tmp_path, semantics):
    net = gluon.nn.Sequential()
    net.add(gluon.nn.Dense(3, in_units=2), gluon.nn.BatchNorm(in_channels=3),
            ms.BatchNorm(3, seed=0))
    net.initialize()
    steps(net, draw(5, 2, 1, 2, 'float32', 0, batches=2), semantics)
    net.save_parameters(str(tmp_path / 'net'))
    file = nd.load(str(tmp_path / 'net'))
    theirs, ours = net[1], net[2]
    for prefix, parameters in (
            ('1.', (theirs.running_mean, theirs.running_var, theirs.gamma,
                    theirs.beta)),
            ('2.', (ours.mean, ours.var, ours.scale, ours.bias))):
        found = conventions.layer_arrays(file, prefix)
        assert list(found) == ['mean', 'var', 'gamma', 'beta']
        for value, parameter in zip(found.values(), parameters, strict=True):
            assert type(value) is np.ndarray
            assert_array_equal(value, parameter.data().asnumpy())
        assert (found['mean'] != 0).all()


@pytest.mark.parametrize('names', [
    ('running_mean', 'running_var', 'weight', 'bias'),
    ('moving_mean', 'moving_var', 'gamma', 'beta'),
    ('moving_mean', 'moving_variance', 'gamma', 'beta'),
    ('mean', 'var', 'scale', 'bias')])
def test_names_of_libraries(names):
    values = np.arange(8.0).reshape(4, 2)
    layer = {f'a.bn_{name}': value
             for name, value in zip(names, values, strict=True)}
    other = {f'b.bn_{name}': -value
             for name, value in zip(names, values, strict=True)}
    found = conventions.layer_arrays({**other, **layer, 'weight': 7}, 'a.bn_')
    assert_array_equal([*found.values()], values)
    for value in found.values():
        value += 1  # copies
    assert_array_equal([*layer.values()], values)
    bare = {name: layer[f'a.bn_{name}'] for name in names[:2]}
    found = conventions.layer_arrays(bare)
    assert_array_equal(found['gamma'], [1, 1])
    assert_array_equal(found['beta'], [0, 0])


@pytest.mark.parametrize(('change', 'error', 'text'), [
    ({'bn.running_var': None}, ValueError,
     r"arrays: expected one of \('running_var', .* prefix 'bn.', got \[\]"),
    ({'bn.moving_mean': np.zeros(2)}, ValueError, 'arrays: expected one of'),
    ({'bn.weight': np.ones(3)}, ValueError, 'bn.weight: expected shape'),
    ({'bn.running_mean': np.ones((1, 2))}, ValueError,
     'bn.running_mean: expected shape'),
    ({'bn.bias': np.ones(2, int)}, TypeError, 'bn.bias: expected a NumPy'),
    ({'bn.running_var': np.array([1, -1e-9])}, ValueError,
     'bn.var: expected no negative')])
def test_layers_that_are_refused(change, error, text):
    arrays = {'bn.running_mean': np.zeros(2), 'bn.running_var': np.ones(2),
              'bn.weight': np.ones(2), 'bn.bias': np.zeros(2)}
    conventions.layer_arrays(arrays, 'bn.')
    arrays = {name: a for name, a in (arrays | change).items()
              if a is not None}
    with pytest.raises(error, match=f'^{text}'):
        conventions.layer_arrays(arrays, 'bn.')


# What other libraries were seen to do

def test_observation_of_a_known_rule():
    def step(X, momentum=0.25):
        mean = momentum * X.mean(axis=0)
        var = 1 - momentum + momentum * X.var(axis=0, ddof=1)
        return (X / np.sqrt(X.var(axis=0) + 1e-3), np.zeros(3), np.ones(3),
                0 * mean, mean, var)

    seen = bench.observe(step)
    assert seen['first'] == [0, 1] and seen['between'] == 0
    assert_allclose([seen['mean'], seen['var'], seen['mean_of_momentum_0.3']],
                    [1.25, 0.75 + 0.25 * 16 / 3, 1.5], rtol=1e-6)
    assert_allclose(seen['output_of_0.01'], 0.01 / np.sqrt(1.1e-3),
                    rtol=1e-5)


def test_stored_observations():
    """By the formulas that PyTorch and Flax document."""
    for name, share, var, with_03 in (('PyTorch', 0.1, 16 / 3, 1.5),
                                      ('Flax', 0.01, 4, 3.5)):
        seen = STORED[name]
        assert seen['first'] == [0, 1] and seen['between'] == seen['mean']
        assert_allclose([seen['mean'], seen['var'],
                         seen['mean_of_momentum_0.3']],
                        [5 * share, 1 - share + share * var, with_03],
                        rtol=1e-6)
    state = STORED['PyTorch']['state_dict']
    mean, var, gamma, beta = conventions.layer_arrays({
        name: np.array(value) for name, value in state.items()}).values()
    assert_allclose(
        state['output'], gamma * (np.array(state['input']) - mean)
        / np.sqrt(var + 1e-5) + beta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(('name', 'package', 'step'), [
    ('PyTorch', 'torch', bench.step_torch),
    ('Flax', 'flax', bench.step_flax)])
def test_the_library_itself(name, package, step):
    pytest.importorskip(package, reason=f'{package} is not installed')
    seen = bench.observe(step)
    for key, value in seen.items():
        assert_allclose(value, STORED[name][key], rtol=1e-6, err_msg=version(
            package))
    if name == 'PyTorch':
        assert_allclose(bench.evaluate_torch(),
                        STORED[name]['state_dict']['output'], rtol=1e-6,
                        atol=1e-6)


def test_the_example_for_users_of_pytorch_prints_its_outputs():
    page = (Path(__file__).resolve().parent.parent
            / 'coming_from.md').read_text('utf-8')
    output = STORED['PyTorch']['state_dict']['output']
    assert str(np.float32(output).round(4)) in page
