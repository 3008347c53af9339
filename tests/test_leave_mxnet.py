"""Files of MXNet, read without it."""
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from d2ltvm import leave_mxnet as lm
from d2ltvm.conventions import _read_arrays
from d2ltvm.mxnet_today import gluon, mx, nd
from fold_atlas import exported, run
from soak import SOAK, examples

NETWORKS = {  # of the model zoo, and a size of image that it bears
    'mobilenet0.25': 64, 'resnet18_v2': 64, 'squeezenet1.0': 224,
    'resnet18_v1': 64, 'mobilenetv2_0.25': 64, 'densenet121': 224,
    'inceptionv3': 299, 'vgg11_bn': 224, 'alexnet': 224}


def export(net, folder, X):
    """The files of a network, and its output."""
    net.hybridize()
    Y = net(nd.array(X)).asnumpy()
    net.export(str(folder / 'net'))
    return folder / 'net-0000.params', folder / 'net-symbol.json', Y


def output(model, X):
    return run(model, {model.graph.input[0].name: np.float32(X)})[0]


@pytest.fixture
def small(tmp_path):
    """A small network, with all that may be wrong in it."""
    mx.random.seed(1)
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3, padding=1, in_channels=2),
            gluon.nn.BatchNorm(scale=False, in_channels=4),
            gluon.nn.Activation('relu'), gluon.nn.MaxPool2D(2),
            gluon.nn.Dense(3, in_units=36))
    net.initialize()
    return *export(net, tmp_path, np.ones((1, 2, 6, 6))), net


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.soak] if i > 2 else [])
    for i, name in enumerate(NETWORKS)])
def test_networks_of_the_zoo_answer_as_in_mxnet(name, tmp_path):
    params, symbol, X, Y = exported(name, NETWORKS[name], tmp_path, seed=2)
    arrays = lm.read_params(params)
    assert {key.removeprefix('arg:').removeprefix('aux:'): value.shape
            for key, value in nd.load(str(params)).items()} == {
        key: value.shape for key, value in arrays.items()}
    model = lm.to_onnx(arrays, symbol, ('N', *X.shape[1:]))
    np.testing.assert_allclose(output(model, X), Y, rtol=1e-4,
                               atol=1e-5 * abs(Y).max())


def test_a_checkpoint_of_a_module(tmp_path):
    """It ends in SoftmaxOutput, and its gamma is fixed by default."""
    data = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=3, name='fc')
    net = mx.sym.SoftmaxOutput(mx.sym.BatchNorm(data, name='bn'),
                               name='softmax')
    module = mx.mod.Module(net)
    module.bind([('data', (4, 5))], [('softmax_label', (4,))],
                for_training=False)
    module.init_params(mx.init.Uniform(1))
    args, aux = module.get_params()
    args['bn_gamma'][:] = 7  # MXNet does not look at it
    aux['bn_moving_mean'][:] = nd.array([1, -1, 0])
    module.set_params(args, aux)
    X = np.random.default_rng(3).normal(size=(4, 5))
    module.forward(mx.io.DataBatch([nd.array(X)]), is_train=False)
    module.save_checkpoint(str(tmp_path / 'net'), 3)
    model = lm.to_onnx(lm.read_params(tmp_path / 'net-0003.params'),
                       tmp_path / 'net-symbol.json', (4, 5))
    np.testing.assert_allclose(
        output(model, X), module.get_outputs()[0].asnumpy(), rtol=1e-5)
    used = lm.effective_params(
        lm.read_params(tmp_path / 'net-0003.params'),
        lm.read_symbol(tmp_path / 'net-symbol.json')[0])
    assert (used['bn_gamma'] == 1).all()
    assert lm.epsilons(lm.read_symbol(tmp_path / 'net-symbol.json')[0]) == {
        'bn': 1e-3}


def test_nothing_else_is_loaded(small):
    """MXNet and TVM need not be there."""
    params, symbol, *_ = small
    program = f'''
import sys
sys.modules['mxnet'] = sys.modules['tvm'] = None
from d2ltvm import leave_mxnet as lm
from d2ltvm.conventions import _read_arrays
model = lm.to_onnx(lm.read_params({str(params)!r}), {str(symbol)!r},
                   ('N', 2, 6, 6))
print(len(model.graph.node))'''
    ran = subprocess.run([sys.executable, '-c', program], check=True,
                         capture_output=True, text=True)
    assert ran.stdout == '6\n'


def mutated(content, rng):
    """The content with some bytes changed, cut, or put in twice."""
    new = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(new) + 1)
        match rng.randrange(4):
            case 0:
                new[at:at + rng.choice((1, 4, 8))] = rng.randbytes(
                    rng.choice((1, 4, 8)))
            case 1:
                new[at:at + 8] = rng.choice((
                    bytes(8), b'\xff' * 8, (2 ** 40).to_bytes(8, 'little')))
            case 2:
                del new[at:]
            case 3:
                new[at:at] = new[:rng.randrange(64)]
    return bytes(new)


def test_damaged_parameter_files_are_refused(small, tmp_path):
    """No other error than the documented one, whatever stands in the file."""
    content = small[0].read_bytes()
    rng, path, refused = random.Random(4), tmp_path / 'damaged', 0
    for _ in range(examples(10_000)):
        path.write_bytes(mutated(content, rng))
        try:
            for array in lm.read_params(path).values():
                assert array.nbytes <= 2 * len(content)
        except ValueError as error:
            assert str(error).startswith(f'{path}, byte ')
            refused += 1
    assert refused > examples(10_000) / 4


def test_damaged_symbol_files_are_refused(small, tmp_path):
    params, symbol, *_ = small
    arrays, text = lm.read_params(params), symbol.read_bytes()
    graph = json.loads(text)
    rng, path = random.Random(5), tmp_path / 'damaged'
    values = [None, 'null', 3, -1, '(1,', '(2, 2)', [], {}, [[0]], 'None']

    def change(place):
        key = rng.choice(list(place) if isinstance(place, dict)
                         else range(len(place)))
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.9:
            change(inner)
        else:
            place[key] = rng.choice(values)

    for i in range(examples(1000)):
        if i % 2:
            path.write_bytes(mutated(text, rng))
        else:
            new = json.loads(text)
            change(new)
            path.write_text(json.dumps(new))
        try:
            lm.to_onnx(arrays, path, (1, 2, 6, 6))
        except ValueError as error:
            assert str(error)
    assert graph == json.loads(text)


@pytest.mark.parametrize(('names', 'message'), [
    (['arg:w', 'aux:w'], "each name once, got 'w' again"),
    (['w'], None)])
def test_names(tmp_path, names, message):
    path = tmp_path / 'p'
    nd.save(str(path), {name: nd.ones(1) for name in names})
    if message is None:
        assert list(lm.read_params(path)) == ['w']
    else:
        with pytest.raises(ValueError, match=message):
            lm.read_params(path)


@pytest.mark.parametrize('kind', ['row_sparse', 'csr'])
def test_sparse_arrays_are_refused(tmp_path, kind):
    path = tmp_path / 'p'
    nd.save(str(path), {'s': nd.ones((3, 2)).tostype(kind)})
    with pytest.raises(ValueError, match='expected a dense array, of kind 0'):
        lm.read_params(path)


def test_missing_weights_are_named(small):
    params, symbol, *_ = small
    arrays = lm.read_params(params)
    weight = next(name for name in arrays if name.endswith('weight'))
    del arrays[weight]
    with pytest.raises(ValueError, match=weight):
        lm.to_onnx(arrays, symbol, (1, 2, 6, 6))


def test_a_shape_that_does_not_fit_is_refused(small):
    params, symbol, *_ = small
    with pytest.raises(ValueError, match='does not fit'):
        lm.to_onnx(lm.read_params(params), symbol, (1, 2, 6))


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.npz'
    lm.write_arrays(path, {'a': np.arange(3)})
    old = path.read_bytes()

    def full(*args, **options):
        raise OSError('no space left')

    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(OSError, match='no space left'):
        lm.write_arrays(path, {'a': np.arange(4)})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']


@pytest.mark.parametrize('ending', ['npz', 'safetensors'])
@pytest.mark.parametrize('name', ['file', 'allow_pickle', '__metadata__',
                                  'a\0b', '../a', 'a/b', '', 'a.npy', 'ü'])
def test_any_name_comes_back_or_is_refused(tmp_path, ending, name):
    path = tmp_path / f'a.{ending}'
    arrays = {name: np.arange(3), 'a': np.ones((2, 2), 'float16')}
    try:
        lm.write_arrays(path, arrays)
    except ValueError as error:
        assert repr(name) in str(error) and not path.exists()
        return
    found = _read_arrays(path)
    assert set(found) == set(arrays)
    np.testing.assert_array_equal(found[name], [0, 1, 2])


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.npz or \.safetensors, "
                                         r"got 'a\.pt'"):
        lm.write_arrays(tmp_path / 'a.pt', {})


def test_the_count_of_soak():
    assert not SOAK or examples(10_000) == 100_000
