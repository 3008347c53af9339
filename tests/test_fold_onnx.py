"""Any model of ONNX is folded as far as it can be, and stays the same."""
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from d2ltvm import fold_onnx
from d2ltvm import leave_mxnet as lm
from fold_atlas import exported, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser
from soak import examples

TOLERANCE = {'float16': 2e-2, 'float32': 1e-4, 'float64': 1e-9}


class Builder:
    """Grows a random network, node by node, with the value `name` at its end.

    `shape` is that of the value. `foldable` counts the normalizations that
    have to go.
    """

    def __init__(self, draw, rank, dtype):
        self.draw, self.dtype, self.rank = draw, dtype, rank
        self.rng = np.random.default_rng(draw(st.integers(0, 2 ** 31)))
        self.nodes, self.weights, self.outputs = [], [], []
        channels = draw(st.sampled_from([2, 4, 6]))
        self.shape = (2, channels, *[9] * (rank - 2))
        self.input_shape = self.shape
        self.name, self.count, self.foldable = 'X', 0, 0

    def weight(self, array):
        self.count += 1
        name = f'w{self.count}'
        array = np.asarray(array)
        kind = array.dtype if array.dtype.kind == 'i' else self.dtype
        tensor = numpy_helper.from_array(array.astype(kind), name)
        match self.draw(st.integers(0, 3)):
            case 0:
                self.nodes.append(helper.make_node('Constant', [], [name],
                                                   value=tensor))
            case 1:
                tensor.name = f'{name}_first'
                self.weights.append(tensor)
                self.nodes.append(helper.make_node(
                    'Identity', [tensor.name], [name]))
            case _:
                self.weights.append(tensor)
        return name

    def normal(self, *shape):
        return self.rng.normal(size=shape) / np.sqrt(max(
            1, np.prod(shape[1:])))

    def node(self, op, *constants, **attributes):
        self.count += 1
        new = f'v{self.count}'
        self.nodes.append(helper.make_node(
            op, [self.name, *constants], [new], **attributes))
        self.name = new

    def linear(self, before=False):
        """A linear layer; without padding if a normalization is before it."""
        draw, (n, channels, *space) = self.draw, self.shape
        outputs = draw(st.sampled_from([2, 4, 6]))
        if not space:
            self.dense(channels, outputs)
            return
        groups = draw(st.sampled_from([1, 2, channels]))
        outputs *= groups
        turned = not before and draw(st.booleans())
        kernel = draw(st.integers(1, 3))
        pad = 0 if before else draw(st.integers(0, kernel - 1))
        shape = (channels, outputs // groups) if turned else (
            outputs, channels // groups)
        constants = [self.weight(self.normal(*shape, *[kernel] * len(space)))]
        if draw(st.booleans()):
            constants.append(self.weight(self.normal(outputs)))
        stride = draw(st.integers(1, 2)) if space[0] > 4 else 1
        if space[0] < kernel:
            return
        self.node('ConvTranspose' if turned else 'Conv', *constants,
                  group=groups, pads=[pad] * 2 * len(space),
                  strides=[stride] * len(space))
        size = ((space[0] - 1) * stride + kernel - 2 * pad if turned else
                (space[0] + 2 * pad - kernel) // stride + 1)
        self.shape = (n, outputs, *[size] * len(space))

    def dense(self, inputs, outputs):
        W = self.normal(outputs, inputs)
        kind = self.draw(st.sampled_from(['MatMul', 'Gemm', 'plain']))
        if kind == 'MatMul':
            self.node('MatMul', self.weight(W.T))
        elif kind == 'plain':
            self.node('Gemm', self.weight(W), transB=1)
        else:
            self.node('Gemm', self.weight(W.T),
                      self.weight(self.normal(1, outputs)[0]),
                      alpha=0.5, beta=2.0)
        self.shape = (self.shape[0], outputs)

    def bias(self):
        channels = self.shape[1]
        self.node('Add', self.weight(self.rng.normal(
            size=(channels, *[1] * (len(self.shape) - 2)))))

    def norm(self, foldable, shift=True):
        channels = self.shape[1]
        gamma, beta, mean = self.rng.normal(size=(3, channels))
        if not shift:
            beta = mean = 0 * beta
        var = self.rng.uniform(0.1, 2, size=channels)
        self.node('BatchNormalization', *map(self.weight, (
            gamma, beta, mean, var)), epsilon=1e-3)
        self.foldable += foldable

    def model(self):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        graph = helper.make_graph(
            self.nodes, 'random',
            [helper.make_tensor_value_info('X', kind,
                                           ['N', *self.input_shape[1:]])],
            [helper.make_tensor_value_info(name, kind, None)
             for name in (self.name, *self.outputs)], self.weights)
        return helper.make_model(graph, ir_version=8, opset_imports=[
            helper.make_opsetid('', 17)])


@st.composite
def networks(draw):
    """A model, its input, and how many normalizations have to go at least."""
    rank = draw(st.integers(2, 5))
    dtypes = ['float32', 'float16'] + ['float64'] * (rank == 2)
    grown = Builder(draw, rank, draw(st.sampled_from(dtypes)))
    for _ in range(draw(st.integers(1, 4))):
        match draw(st.integers(0, 6)):
            case 0:
                grown.linear()
                if draw(st.booleans()):
                    grown.bias()
                grown.norm(has_layer(grown))
            case 1:
                grown.linear()
                grown.node('Identity')
                grown.norm(has_layer(grown))
            case 2:
                grown.node('Relu')
                grown.norm(False)
                grown.linear(before=True)
            case 3 if len(grown.shape) > 2:
                grown.node('Flatten')
                grown.shape = (2, int(np.prod(grown.shape[1:])))
                grown.linear()
                grown.norm(True)
            case 4:
                grown.linear()
                grown.outputs.append(grown.name)  # somebody else reads it
                grown.norm(False)
            case 5:
                grown.norm(False)
                grown.node('Relu')
            case 6 if len(grown.shape) == 2 and grown.dtype != 'float64':
                wide = grown.draw(st.sampled_from([2, 4]))
                grown.dense(grown.shape[1], wide * 9)
                grown.node('Reshape', grown.weight(np.array([0, wide, -1])))
                grown.shape = (2, wide, 9)
                grown.norm(True)
    X = grown.rng.normal(size=grown.input_shape).astype(grown.dtype)
    return grown.model(), X, grown.foldable


def has_layer(grown):
    """Whether a linear layer stands where the normalization comes."""
    ops = [node.op_type for node in grown.nodes
           if node.op_type not in ('Constant', 'Identity', 'Add')]
    return bool(ops) and ops[-1] in fold_onnx.KINDS


@settings(max_examples=examples(150))
@given(networks())
def test_random_networks_stay_the_same(network):
    model, X, foldable = network
    if not model.graph.node:
        return
    before = run(model, {'X': X})
    verdicts = fold_onnx.fold_model(model)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(
        model, strict_mode=True), full_check=True)
    after = run(model, {'X': X})
    left = [node for node in model.graph.node
            if node.op_type == 'BatchNormalization']
    assert len(left) == sum(not each.layers for each in verdicts)
    assert sum(bool(each.layers) for each in verdicts) >= foldable, verdicts
    for old, new in zip(before, after, strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype
        old, new = old.astype('float64'), new.astype('float64')
        assert np.isfinite(old).all()
        np.testing.assert_allclose(
            new, old, rtol=0, atol=TOLERANCE[str(X.dtype)] * max(
                abs(old).max(initial=0), 1))


def model_of(text, dtype='float32', **shapes):
    """A model from ONNX's text; weights of these shapes are drawn."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net ' + text)
    rng = np.random.default_rng(7)
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(
            rng.uniform(0.5, 2, size=shape).astype(dtype), name))
    return model


NORM = 'BatchNormalization (A, G, B, M, V)'
CHANNELS = dict.fromkeys('GBMV', (4,))


def conv(rest, **more):
    """A convolution into A, and what comes after it."""
    return model_of('(float[N, 4, 5, 5] X) => (float[a, b, c, d] Y) '
                    f'{{ A = Conv (X, W) {rest} }}', W=(4, 4, 3, 3),
                    **CHANNELS, **more)


@pytest.mark.parametrize(('model', 'reason'), [
    (conv(f'C = {NORM} Y = Add (A, C)'), 'A is also read by Add Y'),
    (conv('D = Identity (A) Y, P, Q = BatchNormalization '
          '<training_mode = 1> (D, G, B, M, V)'), 'it is in training mode'),
    (conv(f'C = Relu (A) Y = {NORM.replace("A", "C")}'),
     'Relu C stands before it'),
    (conv(f'C = Conv (X, W) D = {NORM} Y = Add (C, D)'),
     'W is also read by Conv C'),
    (conv(f'C = Add (A, K) Y = {NORM.replace("A", "C")}', K=(5,)),
     'a constant of shape (5,) is added'),
    (model_of('(float[N, 4, 5, 5] A) => (float[a, b, c, d] Y) {'
              f'C = {NORM} Y = Conv <pads = [1, 1, 1, 1]> (C, W) }}',
              W=(4, 4, 3, 3), **CHANNELS), 'padding: expected 0'),
    (model_of('(float[N, 4] X, float[4] G) => (float[a, b] Y) {'
              f'A = MatMul (X, W) Y = {NORM} }}', W=(4, 4),
              **{name: (4,) for name in 'BMV'}), 'G is no constant'),
    (model_of('(float[N, 3, 4] X) => (float[a, b, c] Y) {'
              f'A = MatMul (X, W) Y = {NORM} }}', W=(4, 3),
              **dict.fromkeys('GBMV', (3,))), 'is not known to take rows')])
def test_what_is_left_alone_has_its_reason(model, reason):
    before = model.SerializeToString(deterministic=True)
    verdict, = fold_onnx.fold_model(model)
    assert verdict.layers == () and reason in verdict.reason
    assert model.SerializeToString(deterministic=True) == before


def test_a_shared_weight_is_copied_if_asked():
    model = conv(f'C = Conv (X, W) D = {NORM} Y = Add (C, D)')
    X = np.random.default_rng(1).normal(size=(2, 4, 5, 5)).astype('float32')
    before, = run(model, {'X': X})
    verdict, = fold_onnx.fold_model(model, copy_shared=True)
    assert verdict.layers == ('Conv A',)
    np.testing.assert_allclose(run(model, {'X': X})[0], before, rtol=1e-4)


def test_a_result_that_does_not_fit_is_left():
    model = conv(f'Y = {NORM}')
    for tensor in model.graph.initializer:
        factor = 1e38 if tensor.name in 'WG' else 1
        tensor.CopyFrom(numpy_helper.from_array(np.float32(
            factor * numpy_helper.to_array(tensor)), tensor.name))
    verdict, = fold_onnx.fold_model(model)
    assert 'W: expected results that fit float32' in verdict.reason


def test_weights_of_the_old_format_are_constants():
    """Before version 4 they stand among the inputs, and go with the node."""
    model = conv(f'Y = {NORM}')
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(
            tensor.name, tensor.data_type, tensor.dims))
    verdict, = fold_onnx.fold_model(model)
    assert verdict.layers == ('Conv A',)
    assert {each.name for each in model.graph.input} == {
        'X', 'W_folded', 'W_bias'}
    onnx.checker.check_model(model)


def test_a_branch_counts_as_a_reader():
    """An If reads A inside of its branch alone."""
    def branch(name):
        return helper.make_graph(
            [helper.make_node('Identity', ['A'], [name])], name, [],
            [helper.make_tensor_value_info(name, 1, None)])

    model = conv(f'Y = {NORM}')
    model.graph.node.insert(1, helper.make_node(
        'If', ['condition'], ['Z'], then_branch=branch('t'),
        else_branch=branch('e')))
    model.graph.input.append(helper.make_tensor_value_info('condition', 9,
                                                           [1]))
    verdict, = fold_onnx.fold_model(model)
    assert 'A is also read by If Z' in verdict.reason


@pytest.mark.parametrize(('version', 'ok'), [(6, False), (7, True),
                                             (99, False)])
def test_operator_sets(version, ok):
    model = conv(f'Y = {NORM}')
    model.opset_import[0].version = version
    if ok:
        assert fold_onnx.fold_model(model)[0].layers
        return
    with pytest.raises(ValueError, match='operator set from 7 to'):
        fold_onnx.fold_model(model)


def saved(tmp_path, model, **options):
    path = tmp_path / 'in.onnx'
    onnx.save_model(model, str(path), **options)
    return path


def test_files(tmp_path):
    """The source stays; the target is whole; nothing else is left."""
    path = saved(tmp_path, conv(f'Y = {NORM}'))
    content = path.read_bytes()
    verdicts, difference = fold_onnx.fold_file(path, tmp_path / 'out.onnx')
    assert verdicts[0].layers and difference < 1e-5
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.onnx',
                                                          'out.onnx']
    with pytest.raises(ValueError, match='another file than the one that'):
        fold_onnx.fold_file(path, path)


def test_nothing_to_fold_writes_nothing(tmp_path):
    path = saved(tmp_path, conv(f'C = {NORM} Y = Add (A, C)'))
    verdicts, _ = fold_onnx.fold_file(path, tmp_path / 'out.onnx')
    assert not verdicts[0].layers
    assert [p.name for p in tmp_path.iterdir()] == ['in.onnx']


def test_weights_in_a_file_of_their_own(tmp_path):
    path = saved(tmp_path, conv(f'Y = {NORM}'), save_as_external_data=True,
                 location='weights', size_threshold=0)
    _, difference = fold_onnx.fold_file(path, tmp_path / 'out.onnx')
    assert difference < 1e-5
    assert (tmp_path / 'out.onnx.data').exists() or (
        tmp_path / 'out.onnx').stat().st_size > 500


def test_a_wrong_fold_is_never_written(tmp_path, monkeypatch):
    """The faults that other tools shipped are found by the check."""
    def without_bias(W, b, gamma, beta, mean, var, eps, *args, **options):
        scale = gamma / np.sqrt(var + eps)
        return W * scale[:, None, None, None], beta - mean

    def epsilon_outside(W, b, gamma, beta, mean, var, eps, *args, **options):
        scale = gamma / (np.sqrt(var) + 1e-2)
        return W * scale[:, None, None, None], beta - mean * scale

    def wrong_axis(W, b, gamma, beta, mean, var, eps, *args, **options):
        scale = gamma / np.sqrt(var + eps)
        return W * scale[:, None, None], beta - mean * scale

    path = saved(tmp_path, model_of(
        '(float[N, 4, 5, 5] X) => (float[a, b, c, d] Y) '
        f'{{ A = Conv (X, W) Y = {NORM} }}', W=(4, 4, 4, 4), **CHANNELS))
    for fault in (without_bias, epsilon_outside, wrong_axis):
        monkeypatch.setattr(fold_onnx, 'fold_batch_norm', fault)
        with pytest.raises(ValueError, match='expected outputs that agree'):
            fold_onnx.fold_file(path, tmp_path / 'out.onnx')
        assert [p.name for p in tmp_path.iterdir()] == ['in.onnx']


def test_damaged_files_are_refused(tmp_path):
    """Whatever stands in a file: folded and checked, left, or refused."""
    content = conv(f'C = Relu (A) D = {NORM.replace("A", "C")} '
                   'Y = Conv (D, U)', U=(2, 4, 1, 1)).SerializeToString()
    rng, path, ends = random.Random(4), tmp_path / 'damaged.onnx', Counter()
    for _ in range(examples(400)):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            verdicts, difference = fold_onnx.fold_file(
                path, tmp_path / 'out.onnx')
            assert difference <= 1e-4
            ends[any(each.layers for each in verdicts)] += 1
        except ValueError as error:
            assert str(error)
            ends['refused'] += 1
    assert min(ends[True], ends['refused']) > 5
    assert {each.name for each in tmp_path.iterdir()} == {
        'damaged.onnx', 'out.onnx'}


@pytest.mark.parametrize('content', [b'', b'no model', b'\x08\x08\x3a\xff'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / 'in.onnx'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'in\.onnx|model: '):
        fold_onnx.fold_file(path, tmp_path / 'out.onnx')
    assert [p.name for p in tmp_path.iterdir()] == ['in.onnx']


def test_open_axes_take_the_lengths_that_are_named(tmp_path):
    model = model_of('(float[N, 4, H, 2] X) => (float[a, b, c, d] Y) '
                     f'{{ A = Conv (X, W) Y = {NORM} }}', W=(4, 4, 3, 2),
                     **CHANNELS)
    path = saved(tmp_path, model)
    with pytest.raises(ValueError, match=r"sizes: .*'X': \(2, 4, 1, 2\)"):
        fold_onnx.fold_file(path, tmp_path / 'out.onnx', {'H': 1})
    fold_onnx.fold_file(path, tmp_path / 'out.onnx', {'H': 3, 'N': 1})


MADE = {  # constants that nodes make, as programs export them
    'Identity': 'W = Identity (U) V = Identity (G)',
    'Transpose': 'W = Transpose <perm = [1, 0, 3, 2]> (U) V = Identity (G)',
    'Constant': """W = Identity (U)
        V = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()""",
    'ConstantOfShape': """S = Constant <value_ints = [4, 4, 3, 3]> ()
        W = ConstantOfShape <value = float[1] {0.5}> (S)
        V = Identity (G)"""}


@pytest.mark.parametrize('kind', MADE)
def test_constants_that_are_made_by_nodes(kind):
    """PyTorch writes equal arrays once, and copies them by Identity."""
    model = model_of('(float[N, 4, 5, 5] X) => (float[a, b, c, d] Y) '
                     f'{{ {MADE[kind]} A = Conv (X, W) Y = {NORM} }}',
                     U=(4, 4, 3, 3), **dict.fromkeys('GBM', (4,)))
    X = np.random.default_rng(1).normal(size=(2, 4, 5, 5)).astype('float32')
    before, = run(model, {'X': X})
    verdict, = fold_onnx.fold_model(model)
    assert verdict.layers == ('Conv A',)
    assert [node.op_type for node in model.graph.node] == ['Conv']
    assert {each.name for each in model.graph.initializer} >= {
        'W_folded', 'W_bias'}
    np.testing.assert_allclose(run(model, {'X': X})[0], before, rtol=1e-4)


@pytest.mark.parametrize('shape', ['[1000000, 1000000]', '[-1]'])
def test_a_constant_without_end_is_not_computed(shape):
    model = model_of('(float[N, 4] X) => (float[a, b] Y) {'
                     f'S = Constant <value_ints = {shape}> () '
                     'U = ConstantOfShape (S) W = Reshape (U, T) '
                     f'A = MatMul (X, W) Y = {NORM} }}', **CHANNELS)
    model.graph.initializer.append(numpy_helper.from_array(
        np.array([4, -1]), 'T'))
    try:
        verdict, = fold_onnx.fold_model(model)
    except ValueError as error:
        assert 'damaged' in str(error)
    else:
        assert verdict.layers == ()


@pytest.mark.parametrize(('reshape', 'folded'), [
    ('Reshape <allowzero = 1>', True), ('Reshape', True),
    ('Transpose <perm = [1, 0]>', False)])
def test_what_stands_in_between(reshape, folded):
    """PyTorch's newer exporter says allowzero where no zero stands."""
    second = ' (A, S)' if 'Reshape' in reshape else ' (A)'
    model = model_of(f'(float[4, 3] X) => (float[a, b] Y) {{'
                     f'A = MatMul (X, W) C = {reshape}{second} '
                     f'Y = {NORM.replace("A", "C")} }}', W=(3, 4), **CHANNELS)
    model.graph.initializer.append(numpy_helper.from_array(
        np.array([-1, 4]), 'S'))
    verdict, = fold_onnx.fold_model(model)
    assert bool(verdict.layers) == folded


def test_two_normalizations_behind_each_other():
    model = model_of(
        f'(float[N, 4] X) => (float[a, b] Y) {{ A = MatMul (X, W) C = {NORM} '
        f'D = {NORM.replace("A", "C")} Y = {NORM.replace("A", "D")} }}',
        W=(4, 4), **CHANNELS)
    X = np.random.default_rng(1).normal(size=(2, 4)).astype('float32')
    before, = run(model, {'X': X})
    assert all(each.layers for each in fold_onnx.fold_model(model))
    assert [node.op_type for node in model.graph.node] == ['MatMul', 'Add']
    np.testing.assert_allclose(run(model, {'X': X})[0], before, rtol=1e-4)


def test_an_old_normalization_of_each_element_is_left():
    """Operator set 7 has `spatial`; then the statistics have more axes."""
    model = model_of(
        '(float[N, 4, 5, 5] X) => (float[N, 4, 3, 3] Y) { A = Conv (X, W) '
        'Y = BatchNormalization <spatial = 0> (A, G, B, M, V) }',
        W=(4, 4, 3, 3), **dict.fromkeys('GBMV', (4, 3, 3)))
    model.opset_import[0].version = 7
    verdict, = fold_onnx.fold_model(model)
    assert verdict.layers == () and 'numbers do not' in verdict.reason


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
def test_each_dtype_is_checked(tmp_path, dtype):
    """ONNX Runtime has no Conv in float64: then the reference compares."""
    kind = {'float64': 'double', 'float32': 'float'}.get(dtype, dtype)
    model = model_of(f'({kind}[N, 4, 5, 5] X) => ({kind}[a, b, c, d] Y) '
                     f'{{ A = Conv (X, W) Y = {NORM} }}', dtype,
                     W=(4, 4, 3, 3), **CHANNELS)
    path = saved(tmp_path, model)
    verdicts, difference = fold_onnx.fold_file(path, tmp_path / 'out.onnx')
    assert verdicts[0].layers and difference < TOLERANCE[dtype] / 4
    found = onnx.load(tmp_path / 'out.onnx').graph.initializer
    assert {numpy_helper.to_array(each).dtype for each in found} == {
        np.dtype(dtype)}


@pytest.mark.parametrize(('old', 'new', 'apart'), [
    ('Sqrt', 'Sqrt', 0), ('Sqrt', 'Abs', np.inf), ('Abs', 'Sqrt', np.inf),
    ('Log', 'Log', 0), ('Abs', 'Relu', 1), ('Identity', 'Neg', 2)])
def test_numbers_that_are_not_finite(tmp_path, old, new, apart):
    """Where both have none the others count; if none is left, nothing."""
    files = []
    for i, op in enumerate((old, new)):
        files.append(tmp_path / f'{i}.onnx')
        onnx.save(model_of(f'(float[9] X) => (float[9] Y) {{ Y = {op} (X) }}'),
                  files[-1])
    found = fold_onnx.largest_difference(*files)
    assert found == apart or 0.1 < found < apart
    for i, op in enumerate((old, new)):
        onnx.save(model_of(f'(float[9] X) => (float[9] Y) {{ A = Abs (X) '
                           f'B = Neg (A) Y = {op} (B) }}'), files[i])
    if old == new:  # of negative numbers alone
        assert fold_onnx.largest_difference(*files) == np.inf


@pytest.mark.parametrize('epsilon', [-5.0, float('nan')])
def test_an_epsilon_that_is_none(epsilon):
    model = conv(f'Y = {NORM}')
    model.graph.node[1].attribute.append(
        helper.make_attribute('epsilon', epsilon))
    verdict, = fold_onnx.fold_model(model)
    assert 'its epsilon is' in verdict.reason


def test_without_onnxruntime_the_reference_compares(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    path = saved(tmp_path, conv(f'Y = {NORM}'))
    assert fold_onnx.fold_file(path, tmp_path / 'out.onnx')[1] < 1e-5
    with pytest.raises(ValueError, match='sizes: the model does not run'):
        fold_onnx.largest_difference(saved(tmp_path, model_of(
            '(float[N, 4] X) => (float[a, b] Y) { Y = MatMul (X, W) }',
            W=(5, 4))), path)


def test_weights_that_are_written_one_by_one(tmp_path):
    """The same model as in memory, in one file and in two."""
    model = conv(f'Y = {NORM}')
    large = np.random.default_rng(3).normal(size=(4, 4, 40, 40))
    next(each for each in model.graph.initializer if each.name == 'W'
         ).CopyFrom(numpy_helper.from_array(large.astype('float32'), 'W'))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 41
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 41
    model.doc_string, model.producer_name = 'words', 'nobody'
    model.metadata_props.add(key='a', value='b')
    one = saved(tmp_path, model)
    two = tmp_path / 'two.onnx'
    onnx.save_model(model, two, save_as_external_data=True, location='data')
    found = []
    for path in (one, two):
        fold_onnx.fold_file(path, tmp_path / f'out-{path.name}')
        found.append(onnx.load(tmp_path / f'out-{path.name}'))
        onnx.checker.check_model(str(tmp_path / f'out-{path.name}'),
                                 full_check=True)
    model = onnx.load(one)  # saving has changed it
    fold_onnx.fold_model(model)
    for each in (model, *found):
        each.graph.initializer.sort(key=lambda tensor: tensor.name)
        for tensor in each.graph.initializer:  # what ONNX leaves of the place
            tensor.ClearField('data_location')
    assert found == [model, model]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'data', 'in.onnx', 'out-in.onnx', 'out-two.onnx',
        'out-two.onnx.data', 'two.onnx']


def test_weights_of_the_source_are_never_replaced(tmp_path, monkeypatch):
    """Files of the same name elsewhere do not matter."""
    path = saved(tmp_path, conv(f'Y = {NORM}'), save_as_external_data=True,
                 location='out.onnx.data', size_threshold=0)
    content = (tmp_path / 'out.onnx.data').read_bytes()
    for target in ('out.onnx', 'out.onnx.data'):
        with pytest.raises(ValueError, match='hold no weights of the source'):
            fold_onnx.fold_file(path, tmp_path / target)
    assert (tmp_path / 'out.onnx.data').read_bytes() == content
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    assert fold_onnx.fold_file('in.onnx', 'folder/out.onnx')[0][0].layers


@pytest.mark.parametrize('change', [
    lambda tensor: tensor.__setattr__('raw_data', tensor.raw_data[:-1]),
    lambda tensor: tensor.dims.append(2)])
def test_a_weight_of_the_wrong_size_is_named(change):
    model = conv(f'Y = {NORM}')
    change(next(each for each in model.graph.initializer if each.name == 'W'))
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(ValueError, match='model: damaged: W: '):
        fold_onnx.fold_model(model)
    assert model.SerializeToString(deterministic=True) == before


LIGHT = Path(onnx.__file__).parent / 'backend/test/data/light'


@pytest.mark.parametrize(('name', 'folded'), [
    ('resnet50', 53),
    pytest.param('inception_v2', 69, marks=pytest.mark.soak),
    pytest.param('shufflenet', 49, marks=pytest.mark.soak),
    pytest.param('densenet121', 59, marks=pytest.mark.soak)])
def test_networks_of_others(tmp_path, name, folded):
    """Those that ONNX tests itself with; nodes make their weights."""
    path = LIGHT / f'light_{name}.onnx'
    if not path.exists():
        pytest.skip('this version of onnx brings no networks')
    verdicts, difference = fold_onnx.fold_file(path, tmp_path / 'out.onnx')
    assert sum(bool(each.layers) for each in verdicts) == folded
    assert difference < 1e-5


@pytest.mark.parametrize('name', [
    'resnet18_v1', pytest.param('mobilenetv2_0.25', marks=pytest.mark.soak),
    pytest.param('vgg11_bn', marks=pytest.mark.soak)])
def test_networks_of_the_zoo_lose_all(tmp_path, name):
    size = 224 if name.startswith('vgg') else 64
    params, symbol, *_ = exported(name, size, tmp_path)
    model = lm.to_onnx(lm.read_params(params), symbol, ('N', 3, size, size))
    verdicts, difference = fold_onnx.fold_file(
        saved(tmp_path, model), tmp_path / 'out.onnx')
    assert all(each.layers for each in verdicts) and difference < 1e-5
