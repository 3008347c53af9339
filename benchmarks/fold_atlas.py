"""Which tool folds which batch normalization, and is it right?

    python benchmarks/fold_atlas.py [zoo]

Small networks, one for each case, go through every tool that the Python which
runs this has: d2ltvm, Relax, ONNX Runtime, onnxoptimizer, onnxsim, PyTorch.
The tables are kept in `results/fold_atlas.json`, each tool with its version;
one that is missing keeps what is there. With `zoo` as argument, networks of
MXNet's model zoo are folded and timed in ONNX Runtime, before and after in
turn, into `results/fold_zoo.json`. An entry says 'folded', 'left',
'refused' (the tool raised an error) or by how much the output is wrong, as a
share of the largest number in it. Outputs are compared with those of the
untouched model, computed by ONNX Runtime without its optimizations, or in
PyTorch by itself.
"""
import json
import re
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

RESULTS = Path(__file__).resolve().parent / 'results/fold_atlas.json'
ZOO = RESULTS.with_name('fold_zoo.json')
NORM = 'BatchNormalization <epsilon = 0.001>'
# name: (shape of the input, nodes, shape of the weights, channels)
CASES = {
    'Conv': ('N, 4, 9, 9', f'''A = Conv <pads = [1, 1, 1, 1]> (X, W)
        Y = {NORM} (A, G, B, M, V)''', (6, 4, 3, 3), 6),
    'Conv 1-D': ('N, 4, 9', f'''A = Conv (X, W)
        Y = {NORM} (A, G, B, M, V)''', (6, 4, 3), 6),
    'Conv 3-D': ('N, 2, 5, 5, 5', f'''A = Conv (X, W)
        Y = {NORM} (A, G, B, M, V)''', (6, 2, 3, 3, 3), 6),
    'Conv, grouped': ('N, 4, 9, 9', f'''A = Conv <group = 2> (X, W)
        Y = {NORM} (A, G, B, M, V)''', (6, 2, 3, 3), 6),
    'Conv, depthwise': ('N, 6, 9, 9', f'''A = Conv <group = 6> (X, W)
        Y = {NORM} (A, G, B, M, V)''', (6, 1, 3, 3), 6),
    'Conv, bias as an Add': ('N, 4, 9, 9', f'''A = Conv (X, W)
        C = Add (A, B4)
        Y = {NORM} (C, G, B, M, V)''', (6, 4, 3, 3), 6),
    'Conv, Identity between': ('N, 4, 9, 9', f'''A = Conv (X, W)
        C = Identity (A)
        Y = {NORM} (C, G, B, M, V)''', (6, 4, 3, 3), 6),
    'ConvTranspose': ('N, 4, 9, 9', f'''A = ConvTranspose (X, W)
        Y = {NORM} (A, G, B, M, V)''', (4, 6, 3, 3), 6),
    'ConvTranspose, grouped': ('N, 4, 9, 9', f'''
        A = ConvTranspose <group = 2> (X, W)
        Y = {NORM} (A, G, B, M, V)''', (4, 3, 3, 3), 6),
    'Gemm': ('N, 4', f'''A = Gemm <transB = 1> (X, W, B)
        Y = {NORM} (A, G, B, M, V)''', (6, 4), 6),
    'Gemm with alpha and beta': ('N, 4', f'''
        A = Gemm <alpha = 0.5, beta = 2.0> (X, W, B)
        Y = {NORM} (A, G, B, M, V)''', (4, 6), 6),
    'MatMul': ('N, 4', f'''A = MatMul (X, W)
        Y = {NORM} (A, G, B, M, V)''', (4, 6), 6),
    'MatMul, bias as an Add': ('N, 4', f'''A = MatMul (X, W)
        C = Add (A, B)
        Y = {NORM} (C, G, B, M, V)''', (4, 6), 6),
    'Gemm, Reshape between': ('N, 4', f'''A = Gemm <transB = 1> (X, W)
        C = Reshape (A, S)
        Y = {NORM} (C, G, B, M, V)''', (24, 4), 6),
    'before Conv': ('N, 4, 9, 9', f'''A = {NORM} (X, G, B, M, V)
        Y = Conv (A, W)''', (6, 4, 3, 3), 4),
    'before Gemm': ('N, 4', f'''A = {NORM} (X, G, B, M, V)
        Y = Gemm (A, W)''', (4, 6), 4),
    'before Flatten, Gemm': ('N, 4, 3, 3', f'''
        A = {NORM} (X, G, B, M, V)
        C = Flatten (A)
        Y = Gemm (C, W)''', (36, 6), 4),
    'before two Convs': ('N, 4, 9, 9', f'''A = {NORM} (X, G, B, M, V)
        C = Conv (A, W)
        D = Conv (A, U)
        Y = Add (C, D)''', (6, 4, 3, 3), 4),
    'float16': ('N, 4, 9, 9', f'''A = Conv (X, W)
        Y = {NORM} (A, G, B, M, V)''', (6, 4, 3, 3), 6),
    'before a padded Conv': ('N, 4, 9, 9', f'''
        A = {NORM} (X, G, B, M, V)
        Y = Conv <pads = [1, 1, 1, 1]> (A, W)''', (6, 4, 3, 3), 4),
    'second reader': ('N, 4, 9, 9', f'''A = Conv (X, W)
        C = {NORM} (A, G, B, M, V)
        Y = Add (A, C)''', (6, 4, 3, 3), 6),
    'training mode': ('N, 4, 9, 9', '''A = Conv (X, W)
        Y, P, Q = BatchNormalization <training_mode = 1> (A, G, B, M, V)''',
                           (6, 4, 3, 3), 6),
}


def case(name):
    """A model and an input for it."""
    shape, nodes, weight, channels = CASES[name]
    rng = np.random.default_rng(len(name))
    dtype = 'float16' if name == 'float16' else 'float32'
    kind = {'float16': 'float16', 'float32': 'float'}[dtype]
    rank = {'Gemm, Reshape between': 3, 'before Flatten, Gemm': 2}.get(
        name, shape.count(',') + 1)
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net ({kind}[{shape}] X) '
        f'=> ({kind}[{", ".join("abcde"[:rank])}] Y) {{ {nodes} }}')
    values = {
        'W': rng.normal(size=weight), 'U': rng.normal(size=weight),
        'G': rng.uniform(0.5, 2, channels), 'B': rng.normal(size=channels),
        'B4': rng.normal(size=(channels, 1, 1)),
        'M': rng.normal(size=channels), 'V': rng.uniform(0.5, 2, channels),
        'S': np.array([0, channels, -1])}
    used = {each for node in model.graph.node for each in node.input}
    for each in sorted(used & set(values)):
        array = values[each]
        model.graph.initializer.append(numpy_helper.from_array(
            array if array.dtype.kind == 'i' else array.astype(dtype), each))
    sizes = [3, *map(int, shape.split(',')[1:])]
    return model, rng.normal(size=sizes).astype(dtype)


def count(model):
    return sum(node.op_type == 'BatchNormalization'
               for node in model.graph.node)


def run(model, inputs):
    """All outputs, by ONNX Runtime without its optimizations."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, inputs)


def by_d2ltvm(model, X):
    from d2ltvm import fold_onnx
    fold_onnx.fold_model(model)
    return count(model), run(model, {'X': X})[0]


def by_onnxruntime(model, X):
    """Its optimizations, without the last, which renames what it leaves."""
    import onnxruntime
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
        options.optimized_model_filepath = str(Path(folder, 'optimized.onnx'))
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(),
                                               options)
        Y = session.run(['Y'], {'X': X})[0]
        return count(onnx.load(options.optimized_model_filepath)), Y


def by_onnxoptimizer(model, X):
    """Every pass that it has for fusion and elimination."""
    import onnxoptimizer
    model = onnxoptimizer.optimize(model, [
        name for name in onnxoptimizer.get_available_passes()
        if name.startswith(('fuse', 'eliminate'))])
    return count(model), run(model, {'X': X})[0]


def by_onnxsim(model, X):
    import onnxsim
    model, _ = onnxsim.simplify(model)
    return count(model), run(model, {'X': X})[0]


def by_relax(model, X):
    """Its importer, inference form, then the pass for convolutions."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx
    module = from_onnx(model, {'X': list(X.shape)}, keep_params_in_input=False)
    module = relax.transform.FoldBatchnormToConv2D()(module)
    left = str(module).count('nn.batch_norm')
    if str(module).count('nn.conv2d(') > sum(
            node.op_type == 'Conv' for node in model.graph.node):
        return 'layer copied', None
    target = tvm.target.Target('llvm')
    built = relax.VirtualMachine(tvm.compile(module, target), tvm.cpu())
    Y = built['main'](tvm.runtime.tensor(X))
    Y = Y if hasattr(Y, 'numpy') else Y[0]
    return left, Y.numpy()


TOOLS = {'d2ltvm': ('numpy', by_d2ltvm),
         'ONNX Runtime': ('onnxruntime', by_onnxruntime),
         'onnxoptimizer': ('onnxoptimizer', by_onnxoptimizer),
         'onnxsim': ('onnxsim', by_onnxsim),
         'Relax': ('apache-tvm', by_relax)}


def verdict(tool, name):
    model, X = case(name)
    expected = run(model, {'X': X})[0].astype('float64')
    try:
        left, Y = tool(model, X)
    except ModuleNotFoundError:
        raise
    except Exception:  # whatever a tool raises
        return 'refused'
    if Y is None:
        return left
    error = abs(Y - expected).max() / abs(expected).max()
    if not error < (2e-2 if name == 'float16' else 1e-4):
        return f'wrong by {error:.1g}'
    return 'left' if left else 'folded'


def torch_verdicts():
    """PyTorch's functions take two modules; other cases are not offered."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
    nn, found = torch.nn, dict.fromkeys(CASES, 'not offered')
    torch.manual_seed(0)

    def check(name, layer, norm, X, fuse, **options):
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            whole = nn.Sequential(layer, norm).eval()
            Y, Z = whole(X), None
            try:
                Z = fuse(layer, norm, **options)(X)
            except RuntimeError:
                found[name] = 'refused'
                return
        error = ((Z - Y).abs().max() / Y.abs().max()).item()
        found[name] = 'folded' if error < 1e-4 else f'wrong by {error:.1g}'

    for name, rank, shape, options in (
            ('Conv', 2, (3, 4, 9, 9), {'padding': 1}),
            ('Conv 1-D', 1, (3, 4, 9), {}), ('Conv 3-D', 3, (3, 4, 5, 5, 5),
                                             {}),
            ('Conv, grouped', 2, (3, 4, 9, 9), {'groups': 2}),
            ('Conv, depthwise', 2, (3, 6, 9, 9), {'groups': 6})):
        layer = getattr(nn, f'Conv{rank}d')(shape[1], 6, 3, **options)
        norm = getattr(nn, f'BatchNorm{rank}d')(6)
        check(name, layer, norm, torch.randn(shape), fuse_conv_bn_eval)
    for name, groups in (('ConvTranspose', 1), ('ConvTranspose, grouped', 2)):
        layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
        check(name, layer, nn.BatchNorm2d(6), torch.randn(3, 4, 9, 9),
              fuse_conv_bn_eval, transpose=True)
    check('Gemm', nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(3, 4),
          fuse_linear_bn_eval)
    return found


def exported(name, size, folder, seed=0):
    """A network of MXNet's model zoo, random, with plausible statistics.

    Returns the paths of its two files, one image, and its output for it.
    """
    from d2ltvm.mxnet_today import mx, nd
    from mxnet.gluon.model_zoo import vision
    mx.random.seed(seed)
    net = vision.get_model(name)
    net.initialize(mx.init.Xavier())
    net.hybridize()
    X = nd.random.normal(shape=(1, 3, size, size))
    net(X)
    for key, parameter in net.collect_params().items():
        if key.endswith(('running_mean', 'beta')):
            parameter.set_data(nd.random.normal(0, 0.1, parameter.shape))
        if key.endswith(('running_var', 'gamma')):
            parameter.set_data(nd.random.uniform(0.5, 2, parameter.shape))
    Y = net(X).asnumpy()
    net.export(str(Path(folder, 'net')))
    return (Path(folder, 'net-0000.params'), Path(folder, 'net-symbol.json'),
            X.asnumpy(), Y)


def zoo(rounds=20):
    """Fold networks of the zoo, and time both models in turn."""
    import onnxruntime
    from d2ltvm import fold_onnx, leave_mxnet
    found = {}
    for name, size in (('resnet18_v1', 224), ('resnet18_v2', 224),
                       ('vgg11_bn', 224), ('mobilenet1.0', 224),
                       ('mobilenetv2_1.0', 224), ('densenet121', 224),
                       ('inceptionv3', 299)):
        with tempfile.TemporaryDirectory() as folder:
            params, symbol, X, _ = exported(name, size, folder)
            model = leave_mxnet.to_onnx(leave_mxnet.read_params(params),
                                        symbol, ('N', *X.shape[1:]))
            old, new = Path(folder, 'old.onnx'), Path(folder, 'new.onnx')
            onnx.save(model, old)
            verdicts, difference = fold_onnx.fold_file(old, new)
            sessions = [onnxruntime.InferenceSession(str(path))
                        for path in (old, new)]
            nodes = [len(onnx.load(path).graph.node) for path in (old, new)]
        inputs = {sessions[0].get_inputs()[0].name: X}
        times = [[], []]
        for _ in range(rounds):
            for session, column in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session.run(None, inputs)
                column.append(time.perf_counter() - start)
        before, after = (float(np.median(column[2:])) for column in times)
        reasons = [each.reason.split(';')[0] for each in verdicts
                   if not each.layers]
        found[name] = {
            'normalizations': len(verdicts), 'left': len(reasons),
            'nodes': nodes, 'difference': float(f'{difference:.1g}'),
            'ms': [round(1e3 * before, 2), round(1e3 * after, 2)],
            'reasons': dict(Counter(map(kind_of_reason, reasons)))}
        print(name, found[name], flush=True)
    ZOO.write_text(json.dumps(
        {'onnxruntime': version('onnxruntime'), 'networks': found},
        indent=1) + '\n')


def kind_of_reason(reason):
    """Without the names of nodes: 'a concat reads it, too'."""
    if 'input of the model' in reason:
        return 'it comes first'
    for pattern, words in ((r'is also read by \S*?([a-z]+)\d*$',
                            'a {} reads its input as well'),
                           (r'([a-z]+)\d* stands before it$',
                            'a {} stands before it')):
        if match := re.search(pattern, reason):
            return words.format(*match.groups())
    return reason


def main():
    if sys.argv[1:] == ['zoo']:
        return zoo()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (package, tool) in TOOLS.items():
        try:
            results[name] = {
                'version': version(package) if name != 'd2ltvm' else '',
                'cases': {each: verdict(tool, each) for each in CASES}}
            print(f'{name}: tried')
        except (ModuleNotFoundError, PackageNotFoundError) as error:
            print(f'{name}: left out: {error}')
    try:
        results['PyTorch'] = {'cases': torch_verdicts()}
        results['PyTorch']['version'] = version('torch')
        print('PyTorch: tried')
    except ModuleNotFoundError as error:
        print(f'PyTorch: left out: {error}')
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
