"""What is measured: each engine's batch norm, in its own best form.

A class is an engine. Making an instance imports it and raises ImportError if
that fails. A method is a suite: it takes the arrays of `data.py` and returns

    {part: {form: (run, read)}}

`run()` does the work and waits for it; `read()` returns the results of the
last run as arrays, by their names in `data.py`. An engine may have several
forms of one part; the faster one counts. Outputs are allocated beforehand
where the engine can write into given memory.
"""
import sys

import numpy as np

from data import EPS, MOMENTUM, aligned


class Engine:
    """The attributes that the measuring program reads."""

    name = ''  # of the engine
    peer = ''  # its name in tables, if two engines share one there
    second = False  # True: it lives in the second environment, .venv-bench
    packages = ()  # whose versions are stated
    environ = {}  # variables it needs  # noqa: RUF012
    threads = None  # how many it says it uses

    def inference(self, X, mean, var, gamma, beta):
        raise NotImplementedError('has no such operator')

    def training(self, X, dY, gamma, beta):
        raise NotImplementedError('has no operator for training')

    def network(self, X, **layers):
        raise NotImplementedError('was not given the network')


def blank(array):
    """An output that holds no right result by chance."""
    return aligned(np.full_like(array, np.nan))


def four(layers):
    """The layers of the network as pairs (W, b)."""
    return [(layers[f'W{i}'], layers[f'b{i}']) for i in range(1, 5)]


AVX2 = 'AVX2 build'  # a part of the network suite; peers are as they are


class TVM(Engine):
    """The operators of this book."""

    name = 'TVM'
    packages = ('apache-tvm',)

    def __init__(self):
        import tvm
        self.tensor = tvm.runtime.from_dlpack  # shares NumPy's memory
        self.threads = tvm.runtime.num_threads()

    def inference(self, X, mean, var, gamma, beta):
        from d2ltvm.cpu_schedule import inference_kernel
        kernel, Y = inference_kernel(X.shape), blank(X)
        args = [self.tensor(a) for a in (X, *(
            a.reshape(-1, 1, 1) for a in (mean, var, gamma, beta)), Y)]
        return {'call': {'': (lambda: kernel(*args), lambda: {'Y': Y})}}

    def training(self, X, dY, gamma, beta):
        from d2ltvm.training_operator import compile_kernels
        kernels = compile_kernels(False, parallel=True)
        saved = aligned(np.zeros((5, len(gamma)), 'float32'))
        made = {name: blank(gamma) for name in (
            'dgamma', 'dbeta', 'moving_mean', 'moving_var')}
        made.update(Y=blank(X), dX=blank(X))
        made['moving_mean'].fill(0)
        made['moving_var'].fill(1)
        fixed = [*map(self.tensor, (
            X, gamma, beta, made['Y'], made['moving_mean'],
            made['moving_var'], saved)), MOMENTUM, EPS]
        given = [*map(self.tensor, (
            dY, X, saved, made['dX'], made['dgamma'], made['dbeta']))]

        def both():
            kernels.forward(*fixed)
            kernels.backward(*given)

        return parts(lambda: kernels.forward(*fixed),
                     lambda: kernels.backward(*given), both, lambda: made)


    def network(self, X, **layers):
        import tvm
        from d2ltvm import network_schedule as schedule
        kept, X_shared = {}, self.tensor(X)

        def forms(target):
            module = schedule.network_module(four(layers), len(X), target)
            main = tvm.relax.VirtualMachine(
                tvm.compile(module, target), tvm.cpu())['main']
            call = schedule.compile_network(four(layers), len(X), target)

            def tensors():
                kept['Y'] = main(X_shared)

            def arrays():
                kept['Y'] = call(X)

            return {'NumPy arrays': (arrays, lambda: {'Y': kept['Y']}),
                    'Relax module': (tensors, lambda: {
                        'Y': kept['Y'].numpy()})}

        host = schedule.cpu_target()
        made = {'call': forms(host)}
        if 'avx2' in tvm.target.codegen.llvm_get_cpu_features(host):
            made[AVX2] = forms(schedule.cpu_target(
                {'kind': 'llvm', 'mcpu': 'x86-64-v3'}))
        return made


def parts(forward, backward, both, read):
    """One form of each part of training. The parts share their results."""
    first = 'Y', 'moving_mean', 'moving_var'

    def some(names):
        results = read()
        return {name: results[name] for name in names if name in results}

    last = 'dX', 'dgamma', 'dbeta'
    return {'forward': {'': (forward, lambda: some(first))},
            'backward': {'': (backward, lambda: some(last))},
            'forward + backward': {'': (both, lambda: some(
                ('Y', *last)))}}


class Copy(Engine):
    """The limit: all threads copy as many bytes as the operator must move."""

    name = 'copy'
    packages = ('apache-tvm',)

    def __init__(self):
        import tvm
        self.tensor = tvm.runtime.from_dlpack
        self.threads = tvm.runtime.num_threads()

    def form(self, X, arrays):
        """A copy of half the bytes of so many arrays like X."""
        from d2ltvm.cpu_schedule import parallel_copy
        count = X.size * arrays // 2
        arrays = [aligned(np.resize(X, count))]
        arrays.append(blank(arrays[0]))
        copy, args = parallel_copy(count), [*map(self.tensor, arrays)]
        return {'': (lambda: copy(*args), lambda: {
            'X': arrays[1][:X.size].reshape(X.shape)})}

    def inference(self, X, mean, var, gamma, beta):
        return {'call': self.form(X, 2)}  # read X, write Y

    def training(self, X, dY, gamma, beta):
        return {'forward': self.form(X, 2),
                'backward': self.form(X, 3),  # read X and dY, write dX
                'forward + backward': self.form(X, 5)}


class NumPy(Engine):
    """One thread: NumPy's arithmetic knows no more."""

    name = 'NumPy'
    packages = ('numpy',)
    threads = 1

    def inference(self, X, mean, var, gamma, beta):
        mean, var, gamma, beta = (a.reshape(-1, 1, 1)
                                  for a in (mean, var, gamma, beta))
        out, eps = blank(X), np.float32(EPS)

        def formula():
            np.subtract(X, mean, out=out)
            np.divide(out, np.sqrt(var + eps), out=out)
            np.multiply(out, gamma, out=out)
            np.add(out, beta, out=out)

        def folded():
            scale = gamma / np.sqrt(var + eps)
            np.multiply(X, scale, out=out)
            np.add(out, beta - mean * scale, out=out)

        def read():
            return {'Y': out}

        return {'call': {'formula': (formula, read),
                         'folded': (folded, read)}}

    def training(self, X, dY, gamma, beta):
        axes, m, eps = (0, 2, 3), X.size // X.shape[1], np.float32(EPS)
        each = (1, -1, 1, 1)
        keep, X_hat, Y, dX = {}, blank(X), blank(X), blank(X)
        moving = np.stack([np.zeros_like(gamma), np.ones_like(gamma)])

        def forward():
            mean = X.mean(axes, keepdims=True)
            np.subtract(X, mean, out=X_hat)
            var = np.einsum('nchw,nchw->c', X_hat, X_hat) / m
            moving[:] *= MOMENTUM
            moving[:] += (1 - MOMENTUM) * np.stack([mean.ravel(), var])
            inv_std = (1 / np.sqrt(var + eps)).reshape(each)
            np.multiply(X_hat, inv_std, out=X_hat)
            np.multiply(X_hat, gamma.reshape(each), out=Y)
            np.add(Y, beta.reshape(each), out=Y)
            keep['inv_std'] = inv_std

        def backward():
            dbeta = dY.sum(axes)
            dgamma = np.einsum('nchw,nchw->c', dY, X_hat)
            np.multiply(X_hat, (dgamma / -m).reshape(each), out=dX)
            np.add(dX, dY, out=dX)
            np.subtract(dX, (dbeta / m).reshape(each), out=dX)
            np.multiply(dX, gamma.reshape(each) * keep['inv_std'], out=dX)
            keep.update(dgamma=dgamma, dbeta=dbeta)

        def both():
            forward()
            backward()

        return parts(forward, backward, both, lambda: {
            'Y': Y, 'dX': dX, 'moving_mean': moving[0],
            'moving_var': moving[1], **keep})


class MXNet(Engine):
    """The threaded engine, MXNet's default."""

    name = 'MXNet threaded'
    peer = 'MXNet'
    packages = ('mxnet',)

    def __init__(self):
        from d2ltvm.mxnet_today import mx
        self.mx = mx

    def operator(self, X, gamma, beta, mean, var, **more):
        return self.mx.nd.BatchNorm(X, gamma, beta, mean, var, EPS, MOMENTUM,
                                    fix_gamma=False, **more)

    def inference(self, X, mean, var, gamma, beta):
        X, mean, var, gamma, beta, out = map(self.mx.nd.array, (
            X, mean, var, gamma, beta, blank(X)))

        def run():
            self.operator(X, gamma, beta, mean, var, use_global_stats=True,
                          out=out)
            out.wait_to_read()

        return {'call': {'': (run, lambda: {'Y': out.asnumpy()})}}

    def training(self, X, dY, gamma, beta):
        autograd = self.mx.autograd
        X, dY, gamma, beta, mean, var, out = map(self.mx.nd.array, (
            X, dY, gamma, beta, 0 * beta, 0 * beta + 1, blank(X)))
        names = {'dX': X, 'dgamma': gamma, 'dbeta': beta}
        kept = {}
        for array in names.values():
            array.attach_grad()

        def forward():
            with autograd.train_mode():
                kept['Y'] = self.operator(X, gamma, beta, mean, var, out=out)
            out.wait_to_read()

        def record():
            with autograd.record():
                kept['Y'] = self.operator(X, gamma, beta, mean, var)

        def back(retain):
            kept['Y'].backward(dY, retain_graph=retain)
            for array in names.values():
                array.grad.wait_to_read()

        def backward():
            if 'recorded' not in kept:
                record()
                kept['recorded'] = True
            back(retain=True)

        def both():
            kept.pop('recorded', None)
            record()
            back(retain=False)

        return parts(forward, backward, both, lambda: {
            'Y': kept['Y'].asnumpy(), **{
                name: array.grad.asnumpy() for name, array in names.items()}})


    def network(self, X, **layers):
        """A Gluon network, hybridized."""
        mx, nn = self.mx, self.mx.gluon.nn
        net, kept = nn.HybridSequential(), {}
        for i, (W, b) in enumerate(four(layers)):
            relu = 'relu' if i < 3 else None
            if W.ndim == 4:
                layer = nn.Conv2D(len(W), W.shape[2:], activation=relu,
                                  in_channels=W.shape[1])
                net.add(layer, nn.AvgPool2D())
            else:
                layer = nn.Dense(len(W), activation=relu,
                                 in_units=W.shape[1])
                net.add(layer)
            layer.initialize()
            layer.weight.set_data(mx.nd.array(W))
            layer.bias.set_data(mx.nd.array(b))
        net.hybridize(static_alloc=True, static_shape=True)
        X = mx.nd.array(X)

        def run():
            kept['Y'] = net(X)
            kept['Y'].wait_to_read()

        return {'call': {'': (run, lambda: {'Y': kept['Y'].asnumpy()})}}


class MXNetNaive(MXNet):
    """The naive engine: each operator is finished before the next starts."""

    name = 'MXNet naive'
    environ = {'MXNET_ENGINE_TYPE': 'NaiveEngine'}  # noqa: RUF012


class PyTorch(Engine):
    """ATen's operators, called directly, without autograd's record."""

    name = 'PyTorch'
    second = True
    packages = ('torch',)

    def __init__(self):
        import torch
        torch.set_grad_enabled(False)
        self.torch, self.aten = torch, torch.ops.aten
        self.threads = torch.get_num_threads()

    def inference(self, X, mean, var, gamma, beta):
        torch, kept = self.torch, {}
        X, mean, var, gamma, beta, out = map(torch.from_numpy, (
            X, mean, var, gamma, beta, blank(X)))
        empty = [torch.empty(0), torch.empty(0)]
        operator = self.aten.native_batch_norm.out
        batch_norm = torch.nn.functional.batch_norm

        def fresh():
            kept['Y'] = batch_norm(X, mean, var, gamma, beta, False, 0, EPS)

        def given():
            operator(X, gamma, beta, mean, var, False, 0.0, EPS, out=out,
                     save_mean=empty[0], save_invstd=empty[1])

        return {'call': {'new output': (fresh, lambda: {
            'Y': kept['Y'].numpy()}), 'given output': (given, lambda: {
                'Y': out.numpy()})}}

    def training(self, X, dY, gamma, beta):
        torch, m = self.torch, X.size // X.shape[1]
        X, dY, gamma, beta, Y, dX = map(torch.from_numpy, (
            X, dY, gamma, beta, blank(X), blank(X)))
        mean, var, dgamma, dbeta, *saved = (
            torch.zeros_like(beta) + (i == 1) for i in range(6))
        new = 1 - MOMENTUM  # PyTorch's momentum is the share of the new value
        made = {'Y': Y, 'dX': dX, 'dgamma': dgamma, 'dbeta': dbeta}
        out, out_back = self.aten.native_batch_norm.out, \
            self.aten.native_batch_norm_backward.out

        def forward():
            out(X, gamma, beta, mean, var, True, new, EPS, out=Y,
                save_mean=saved[0], save_invstd=saved[1])

        def backward():
            out_back(dY, X, gamma, mean, var, *saved, True, EPS,
                     [True, True, True], out0=dX, out1=dgamma, out2=dbeta)

        def both():
            forward()
            backward()

        def read():  # it keeps the unbiased variance
            return {**{name: a.numpy() for name, a in made.items()},
                    'moving_mean': mean.numpy(), 'moving_var': MOMENTUM + (
                        var.numpy() - MOMENTUM) * ((m - 1) / m)}

        fresh = {}

        def forward_fresh():
            fresh['Y'], *fresh['saved'] = self.aten.native_batch_norm(
                X, gamma, beta, mean, var, True, new, EPS)

        def backward_fresh():
            fresh['dX'], fresh['dgamma'], fresh['dbeta'] = (
                self.aten.native_batch_norm_backward(
                    dY, X, gamma, mean, var, *fresh['saved'], True, EPS,
                    [True, True, True]))

        def both_fresh():
            forward_fresh()
            backward_fresh()

        def read_fresh():
            return {name: a.numpy() for name, a in fresh.items()
                    if name != 'saved'}

        given = parts(forward, backward, both, read)
        new_ones = parts(forward_fresh, backward_fresh, both_fresh,
                         read_fresh)
        return {part: {'given output': given[part][''],
                       'new output': new_ones[part]['']} for part in given}


    def network(self, X, **layers):
        torch, nn, kept = self.torch, self.torch.nn, {}
        stages = []
        for i, (W, b) in enumerate(four(layers)):
            if W.ndim == 4:
                layer = nn.Conv2d(W.shape[1], len(W), W.shape[2:])
            else:
                layer = nn.Linear(W.shape[1], len(W))
                stages += [nn.Flatten()] if i == 2 else []
            layer.weight.copy_(torch.from_numpy(W))
            layer.bias.copy_(torch.from_numpy(b))
            stages.append(layer)
            stages += [nn.ReLU()] if i < 3 else []
            stages += [nn.AvgPool2d(2)] if i < 2 else []
        net, X = nn.Sequential(*stages).eval(), torch.from_numpy(X)
        frozen = torch.jit.freeze(torch.jit.trace(net, X))
        fused = torch.jit.optimize_for_inference(frozen)

        def form(function):
            def run():
                kept['Y'] = function(X)
            for _ in range(3):  # TorchScript compiles in its first calls
                run()
            return run, lambda: {'Y': kept['Y'].numpy()}

        return {'call': {'eager': form(net), 'frozen': form(frozen),
                         'frozen, optimized': form(fused)}}


class ONNXRuntime(Engine):
    """The processor's provider, inputs and outputs bound beforehand."""

    name = 'ONNX Runtime'
    second = True
    packages = ('onnxruntime', 'onnx')

    def __init__(self):
        import onnx
        import onnxruntime
        self.onnx, self.ort = onnx, onnxruntime

    def form(self, nodes, given, X, out):
        """Bind a graph from X to Y: the only form."""
        helper, ort = self.onnx.helper, self.ort
        info = [helper.make_tensor_value_info(name, 1, array.shape)
                for name, array in (('X', X), ('Y', out))]
        graph = helper.make_graph(
            nodes, 'graph', info[:1], info[1:], [
                self.onnx.numpy_helper.from_array(array, name)
                for name, array in given.items()])
        model = helper.make_model(graph, ir_version=10, opset_imports=[
            helper.make_opsetid('', 15)])
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = ort.InferenceSession(model.SerializeToString(), options,
                                       ['CPUExecutionProvider'])
        X, out = map(ort.OrtValue.ortvalue_from_numpy, (X, out))
        binding = session.io_binding()
        binding.bind_ortvalue_input('X', X)
        binding.bind_ortvalue_output('Y', out)
        return {'': (lambda: session.run_with_iobinding(binding),
                     lambda: {'Y': out.numpy()})}

    def inference(self, X, mean, var, gamma, beta):
        given = {'gamma': gamma, 'beta': beta, 'mean': mean, 'var': var}
        node = self.onnx.helper.make_node(
            'BatchNormalization', ['X', *given], ['Y'], epsilon=EPS)
        return {'call': self.form([node], given, X, blank(X))}

    def network(self, X, **layers):
        nodes, last = [], 'X'

        def add(kind, *inputs, output=None, **attributes):
            nonlocal last
            output = output or f'{kind}{len(nodes)}'
            nodes.append(self.onnx.helper.make_node(
                kind, [last, *inputs], [output], **attributes))
            last = output

        for i in range(1, 5):
            if i == 3:
                add('Flatten')
            if i < 3:
                add('Conv', f'W{i}', f'b{i}')
            else:
                add('Gemm', f'W{i}', f'b{i}', transB=1,
                    output='Y' if i == 4 else None)
            if i < 4:
                add('Relu')
            if i < 3:
                add('AveragePool', kernel_shape=[2, 2], strides=[2, 2])
        out = np.full((len(X), len(layers['b4'])), np.nan, 'float32')
        form = self.form(nodes, layers, X, aligned(out))
        return {'call': form, AVX2: form}


class OpenVINO(Engine):
    """The processor's plugin in float32, tensors set beforehand."""

    name = 'OpenVINO'
    second = True
    packages = ('openvino',)

    def __init__(self):
        # its import would start a process that reports over the network
        sys.modules['openvino_telemetry'] = None
        import openvino
        self.openvino = openvino

    def inference(self, X, mean, var, gamma, beta):
        ov = self.openvino
        from openvino import opset13
        given = opset13.parameter(X.shape, np.float32)
        node = opset13.batch_norm_inference(
            given, *map(opset13.constant, (gamma, beta, mean, var)), EPS)
        request = ov.Core().compile_model(ov.Model([node], [given]), 'CPU', {
            'INFERENCE_NUM_THREADS': self.threads, 'NUM_STREAMS': 1,
            'INFERENCE_PRECISION_HINT': 'f32'}).create_infer_request()
        kept = {'X': X, 'Y': blank(X)}  # a tensor does not keep its memory
        X, out = (ov.Tensor(a, shared_memory=True) for a in kept.values())
        request.set_input_tensor(X)
        request.set_output_tensor(out)

        def waiting():
            request.start_async()
            request.wait()

        def read():
            return {'Y': kept['Y']}

        return {'call': {
            'infer': (lambda: request.infer(share_outputs=True), read),
            'start and wait': (waiting, read)}}


class JAX(Engine):
    """Compiled by XLA; it has no way to write into given memory."""

    name = 'JAX'
    second = True
    packages = ('jax', 'jaxlib')

    def __init__(self):
        import jax
        self.jax = jax

    def compiled(self, function, *args):
        """A form that keeps its result and waits for it."""
        kept, function = {}, self.jax.jit(function)

        def run():
            kept['result'] = self.jax.block_until_ready(function(*args))

        return run, kept

    def inference(self, X, mean, var, gamma, beta):
        jnp = self.jax.numpy

        def batch_norm(X, mean, var, gamma, beta):
            mean, var, gamma, beta = (a.reshape(-1, 1, 1)
                                      for a in (mean, var, gamma, beta))
            scale = gamma / jnp.sqrt(var + EPS)
            return X * scale + (beta - mean * scale)

        run, kept = self.compiled(batch_norm, *map(jnp.asarray, (
            X, mean, var, gamma, beta)))
        return {'call': {'': (run, lambda: {'Y': np.asarray(
            kept['result'])})}}

    def training(self, X, dY, gamma, beta):
        jax, jnp = self.jax, self.jax.numpy
        X, dY, gamma, beta = map(jnp.asarray, (X, dY, gamma, beta))
        moving = 0 * beta, 0 * beta + 1

        def layer(X, gamma, beta, moving):
            mean, var = X.mean((0, 2, 3)), X.var((0, 2, 3))
            scale = gamma / jnp.sqrt(var + EPS)
            each = (-1, 1, 1)
            Y = (X - mean.reshape(each)) * scale.reshape(each)
            return Y + beta.reshape(each), [
                MOMENTUM * old + (1 - MOMENTUM) * batch
                for old, batch in zip(moving, (mean, var), strict=True)]

        def pull(X, gamma, beta, moving):
            return jax.vjp(lambda *args: layer(*args, moving), X, gamma, beta,
                           has_aux=True)

        def train(dY, *args):
            Y, back, moving = pull(*args)
            return Y, back(dY), moving

        args = X, gamma, beta, moving
        _, back, _ = jax.jit(pull)(*args)
        forward, first = self.compiled(layer, *args)
        backward, last = self.compiled(lambda f, dY: f(dY), back, dY)
        both, all_of_it = self.compiled(train, dY, *args)
        gradients = 'dX', 'dgamma', 'dbeta'

        def named(names, arrays):
            return {name: np.asarray(array)
                    for name, array in zip(names, arrays, strict=True)}

        return {
            'forward': {'': (forward, lambda: named(
                ('Y', 'moving_mean', 'moving_var'),
                (first['result'][0], *first['result'][1])))},
            'backward': {'': (backward, lambda: named(
                gradients, last['result']))},
            'forward + backward': {'': (both, lambda: named(
                ('Y', *gradients), (all_of_it['result'][0],
                                    *all_of_it['result'][1])))}}


ENGINES = {engine.name: engine for engine in (
    TVM, Copy, NumPy, MXNet, MXNetNaive, PyTorch, ONNXRuntime, OpenVINO, JAX)}
