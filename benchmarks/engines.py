"""What is measured: each engine's batch norm, in its own best form.

A class is an engine. Making an instance imports it and raises ImportError if
that fails. A method is a suite: it takes the arrays of `data.py` and returns

    {part: {form: (run, read)}}

`run()` does the work and waits for it; `read()` returns the results of the
last run as arrays, by their names in `data.py`. An engine may have several
forms of one part; the fastest one counts. In place of a pair may stand words
that say why there is no such form here. Outputs are allocated beforehand where
the engine can write into given memory. Each engine runs twice, with one thread
and with all of them.
"""
import sys

import numpy as np

from data import EPS, LAYERS, MOMENTUM, NORM, aligned, folded, memory


class Engine:
    """The attributes that the measuring program reads."""

    name = ''  # of the engine
    peer = ''  # its name in tables, if two engines share one there
    second = False  # True: it lives in the second environment, .venv-bench
    packages = ()  # whose versions are stated
    environ = {}  # variables it needs  # noqa: RUF012
    threads = None  # how many it says it uses
    single = False  # True: it has no threads to share the work

    def inference(self, X, mean, var, gamma, beta):
        raise NotImplementedError('has no such operator')

    def training(self, X, dY, gamma, beta):
        raise NotImplementedError('has no operator for training')

    def network(self, X, **arrays):
        """The network, folded beforehand, and as it was trained."""
        made = {'call': self.graph(X, folded(arrays), [])}
        if is_cropped(X):
            made['unfolded'] = self.graph(X, *unfolded(arrays))
        return made

    def graph(self, X, layers, norms):
        """Forms of the network: layers (W, b), and (gamma, beta, mean, var)
        of the normalization after each of the first ones, or none."""
        raise NotImplementedError('was not given the network')

    def copy(self, X):
        raise NotImplementedError('was not asked for a copy')


def blank(array):
    """An output that holds no right result by chance."""
    return aligned(np.full_like(array, np.nan))


def tried(make):
    """What `make` returns, or why it cannot: a compiler may be missing."""
    try:
        return make()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f'failed: {lines[0]}'


def unfolded(arrays):
    """Layers (W, b) of the network, and its normalizations."""
    layers = [(arrays[f'W{i}'], arrays[f'b{i}'])
              for i in range(1, len(LAYERS) + 1)]
    norms = [tuple(arrays[f'{name}{i}'] for name in NORM)
             for i in range(1, len(LAYERS))]
    return layers, norms


FULL, CROPPED = 28, 26  # pixels of a side: all, and those that are not lost


def is_cropped(X):
    """Without the pixels that pooling drops: no logit depends on them."""
    return X.shape[2] == CROPPED


DEFINED = 'definition'  # all products of the convolution
AVX2 = 'AVX2 build'  # a part of the network suite; peers are as they are
COPY = 'copy'  # a form of ours that stands in the tables by itself


COPY_MOST = 2 ** 26  # bytes of the largest copy; a power of two, so that
# the huge pages of every process are equally full


class TVM(Engine):
    """The operators of this book, and the yardstick: a copy.

    The copy moves as many bytes as the operator must read and write, with all
    its threads. It runs in the same process, in the same rounds.
    """

    name = 'TVM'
    packages = ('apache-tvm',)

    def __init__(self):
        import tvm
        self.tensor = tvm.runtime.from_dlpack  # shares NumPy's memory
        self.threads = tvm.runtime.num_threads()
        self.buffers = []

    def copied(self, X, count):
        """A copy of so many elements, in the same memory as any other one."""
        from d2ltvm.cpu_schedule import parallel_copy
        if not self.buffers:
            self.buffers = [memory(COPY_MOST).view('float32')
                            for _ in range(2)]
        source, target = (buffer[:count] for buffer in self.buffers)
        source[:], target[:] = np.resize(X, count), np.nan
        copy = parallel_copy(count)
        args = self.tensor(source), self.tensor(target)
        return lambda: copy(*args), lambda: {
            'X': target[:X.size].reshape(X.shape)}

    def copy(self, X):
        return {'call': {COPY: self.copied(X, X.size)}}

    def inference(self, X, mean, var, gamma, beta):
        from d2ltvm.cpu_schedule import inference_kernel
        kernel, Y = inference_kernel(X.shape), blank(X)
        args = [self.tensor(a) for a in (X, *(
            a.reshape(-1, 1, 1) for a in (mean, var, gamma, beta)), Y)]
        return {'call': {'': (lambda: kernel(*args), lambda: {'Y': Y}),
                         COPY: self.copied(X, X.size)}}

    def training(self, X, dY, gamma, beta):
        from d2ltvm.training_operator import compile_kernels
        kernels = compile_kernels(False, parallel=self.threads > 1)
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

        all_parts = parts(lambda: kernels.forward(*fixed),
                          lambda: kernels.backward(*given), both,
                          lambda: made)
        # the arrays that are read and written, halved: X, Y; X, dY, dX; all
        for (part, forms), arrays in zip(all_parts.items(), (2, 3, 5),
                                         strict=True):
            all_parts[part] = forms | {COPY: self.copied(
                X, X.size * arrays // 2)}
        return all_parts

    def network(self, X, **arrays):
        """It folds both networks; the second one as part of its making.

        Ours takes images of 28 x 28, of which it reads 26 x 26. So smaller
        images lie in a frame, and NaN around them shows if any is read.
        """
        import tvm
        from d2ltvm import network_schedule as schedule
        from d2ltvm.folding import fold_batch_norm
        kept, cropped, framed = {}, is_cropped(X), np.full(
            (*X.shape[:2], FULL, FULL), np.nan, 'float32')
        framed[:, :, :X.shape[2], :X.shape[3]] = X
        X = aligned(framed)
        X_shared = self.tensor(X)

        def forms(target, layers):
            call = schedule.compile_network(layers, len(X), target)

            def numpy_arrays():
                kept['Y'] = call(X)

            def relax(winograd):
                module = schedule.network_module(
                    layers, len(X), target, winograd=winograd)
                main = tvm.relax.VirtualMachine(
                    tvm.compile(module, target), tvm.cpu())['main']

                def tensors():
                    kept['Y'] = main(X_shared)

                return tensors, lambda: {'Y': kept['Y'].numpy()}

            return {'NumPy arrays': (numpy_arrays, lambda: {'Y': kept['Y']}),
                    'Relax module': relax(True), DEFINED: relax(False)}

        host, layers = schedule.cpu_target(), folded(arrays)
        made = {'call': forms(host, layers)}
        if cropped:
            layers, norms = unfolded(arrays)
            made['unfolded'] = forms(host, [
                fold_batch_norm(*layer, *norm, EPS,
                                'conv' if layer[0].ndim == 4 else 'dense')
                for layer, norm in zip(layers, norms, strict=False)
                ] + layers[3:])
            if 'avx2' in tvm.target.codegen.llvm_get_cpu_features(host):
                made[AVX2] = forms(schedule.cpu_target(
                    {'kind': 'llvm', 'mcpu': 'x86-64-v3'}), folded(arrays))
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


class NumPy(Engine):
    """One thread: NumPy's arithmetic knows no more."""

    name = 'NumPy'
    packages = ('numpy',)
    threads, single = 1, True

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


    def graph(self, X, layers, norms):
        """Gluon: hybridized, and rewritten by its oneDNN backend."""
        mx, nn = self.mx, self.mx.gluon.nn
        X, static = mx.nd.array(X), {'static_alloc': True,
                                     'static_shape': True}

        def add(net, layer, **values):
            net.add(layer)
            layer.initialize()
            for name, value in values.items():
                getattr(layer, name).set_data(mx.nd.array(value))

        def build():
            net = nn.HybridSequential()
            for i, (W, b) in enumerate(layers):
                kind = {} if norms or i == 3 else {'activation': 'relu'}
                layer = (nn.Conv2D(len(W), W.shape[2:],
                                   in_channels=W.shape[1], **kind)
                         if W.ndim == 4 else
                         nn.Dense(len(W), in_units=W.shape[1], **kind))
                add(net, layer, weight=W, bias=b)
                if i < len(norms):
                    gamma, beta, mean, var = norms[i]
                    add(net, nn.BatchNorm(epsilon=EPS, in_channels=len(W)),
                        gamma=gamma, beta=beta, running_mean=mean,
                        running_var=var)
                    net.add(nn.Activation('relu'))
                if W.ndim == 4:
                    net.add(nn.AvgPool2D())
            return net

        def form(net):
            kept = {}

            def run():
                kept['Y'] = net(X)
                kept['Y'].wait_to_read()

            return run, lambda: {'Y': kept['Y'].asnumpy()}

        hybrid, rewritten = build(), build()
        hybrid.hybridize(**static)
        rewritten.optimize_for(X, backend='MKLDNN', **static)
        return {'hybridized': form(hybrid), 'oneDNN': form(rewritten)}


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
        # it would go on without compiling after a few shapes
        torch._dynamo.config.recompile_limit = 1000
        self.torch, self.aten = torch, torch.ops.aten
        self.threads = torch.get_num_threads()

    def inference(self, X, mean, var, gamma, beta):
        torch, made = self.torch, {}
        images, mean, var, gamma, beta, out = map(torch.from_numpy, (
            X, mean, var, gamma, beta, blank(X)))
        empty = [torch.empty(0), torch.empty(0)]
        operator = self.aten.native_batch_norm.out
        functional = torch.nn.functional.batch_norm

        def given(X, out):
            def run():
                operator(X, gamma, beta, mean, var, False, 0.0, EPS, out=out,
                         save_mean=empty[0], save_invstd=empty[1])
            return run, lambda: {'Y': out.numpy()}

        def fresh(function):
            kept = {}

            def run():
                kept['Y'] = function(images, mean, var, gamma, beta, False,
                                     0.0, EPS)
            return run, lambda: {'Y': kept['Y'].numpy()}

        made = {'new output': fresh(functional),
                'given output': given(images, out)}
        X, out = (a.to(memory_format=torch.channels_last)
                  for a in (images, out))
        made['given output, channels last'] = given(X, out)
        made['compiled'] = tried(lambda: fresh(
            torch.compile(functional, dynamic=False)))
        return {'call': made}

    def training(self, X, dY, gamma, beta):
        torch = self.torch
        gamma, beta, X, dY, Y, dX = map(torch.from_numpy, (
            gamma, beta, X, dY, blank(X), blank(X)))
        last = [a.to(memory_format=torch.channels_last)
                for a in (X, dY, Y, dX)]
        makers = {
            'given output': lambda: self.given(X, dY, Y, dX, gamma, beta),
            'new output': lambda: self.fresh(X, dY, gamma, beta),
            'given output, channels last': lambda: self.given(
                *last, gamma, beta),
            'compiled': lambda: self.fresh(X, dY, gamma, beta, True)}
        made = {}
        for name, make in makers.items():
            forms = tried(make) if name == 'compiled' else make()
            for part in ('forward', 'backward', 'forward + backward'):
                made.setdefault(part, {})[name] = (
                    forms if isinstance(forms, str) else forms[part][''])
        return made

    def given(self, X, dY, Y, dX, gamma, beta):
        """ATen's operators write into Y and dX."""
        torch, m = self.torch, X.numel() // X.shape[1]
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

        return parts(forward, backward, both, read)

    def fresh(self, X, dY, gamma, beta, compiled=False):
        """The same operators, each with a new output; perhaps compiled."""
        torch, kept = self.torch, {}
        mean, var = torch.zeros_like(beta), torch.ones_like(beta)
        new = 1 - MOMENTUM

        def normalize(X, gamma, beta, mean, var):
            return torch.ops.aten.native_batch_norm(
                X, gamma, beta, mean, var, True, new, EPS)

        def gradients(dY, X, gamma, mean, var, *saved):
            return torch.ops.aten.native_batch_norm_backward(
                dY, X, gamma, mean, var, *saved, True, EPS,
                [True, True, True])

        if compiled:
            normalize, gradients = (torch.compile(function, dynamic=False)
                                    for function in (normalize, gradients))

        def forward():
            kept['Y'], *kept['saved'] = normalize(X, gamma, beta, mean, var)

        def backward():
            kept['dX'], kept['dgamma'], kept['dbeta'] = gradients(
                dY, X, gamma, mean, var, *kept['saved'])

        def both():
            forward()
            backward()

        both()  # the first call compiles
        return parts(forward, backward, both, lambda: {
            name: a.numpy() for name, a in kept.items() if name != 'saved'})

    def graph(self, X, layers, norms):
        """Eager, TorchScript and compiled, in both orders of the axes."""
        torch, nn = self.torch, self.torch.nn

        def norm(gamma, beta, mean, var, kind):
            layer = kind(len(gamma), EPS)
            layer.load_state_dict({
                name: torch.from_numpy(array) for name, array in (
                    ('weight', gamma), ('bias', beta),
                    ('running_mean', mean), ('running_var', var))},
                strict=False)
            return layer

        def build():
            stages = []
            for i, (W, b) in enumerate(layers):
                conv = W.ndim == 4
                layer = (nn.Conv2d(W.shape[1], len(W), W.shape[2:]) if conv
                         else nn.Linear(W.shape[1], len(W)))
                layer.weight.copy_(torch.from_numpy(W))
                layer.bias.copy_(torch.from_numpy(b))
                stages += [nn.Flatten()] if i == 2 else []
                stages.append(layer)
                if i < len(norms):
                    stages.append(norm(*norms[i], nn.BatchNorm2d if conv
                                       else nn.BatchNorm1d))
                stages += [nn.ReLU()] if i < 3 else []
                stages += [nn.AvgPool2d(2)] if conv else []
            return nn.Sequential(*stages).eval()

        def form(function, X):
            kept = {}

            def run():
                kept['Y'] = function(X)

            for _ in range(3):  # some compile in their first calls
                run()
            return run, lambda: {'Y': kept['Y'].numpy()}

        made, images = {}, torch.from_numpy(X)
        for order, words in ((torch.contiguous_format, ''),
                             (torch.channels_last, ', channels last')):
            net = build().to(memory_format=order)
            X = images.to(memory_format=order)
            frozen = torch.jit.freeze(torch.jit.trace(net, X))
            optimized = torch.jit.optimize_for_inference(
                torch.jit.trace(net, X))
            for name, function in (
                    ('eager', net), ('frozen', frozen),
                    ('frozen, optimized', optimized),
                    ('compiled', torch.compile(net, dynamic=False))):
                made[name + words] = tried(
                    lambda function=function, X=X: form(function, X))
        return made


class ONNXRuntime(Engine):
    """The processor's provider, inputs and outputs bound beforehand."""

    name = 'ONNX Runtime'
    second = True
    packages = ('onnxruntime', 'onnx')

    def __init__(self):
        import onnx
        import onnxruntime
        self.onnx, self.ort = onnx, onnxruntime

    def model(self, nodes, given, X, out):
        """The bytes of a model from X to Y."""
        helper = self.onnx.helper
        info = [helper.make_tensor_value_info(name, 1, array.shape)
                for name, array in (('X', X), ('Y', out))]
        graph = helper.make_graph(
            nodes, 'graph', info[:1], info[1:], [
                self.onnx.numpy_helper.from_array(array, name)
                for name, array in given.items()])
        return helper.make_model(graph, ir_version=10, opset_imports=[
            helper.make_opsetid('', 15)]).SerializeToString()

    def form(self, model, X, out):
        """Bind the bytes of a model: the only form."""
        ort = self.ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = ort.InferenceSession(model, options,
                                       ['CPUExecutionProvider'])
        X, out = map(ort.OrtValue.ortvalue_from_numpy, (X, out))
        binding = session.io_binding()
        binding.bind_ortvalue_input('X', X)
        binding.bind_ortvalue_output('Y', out)
        return {'': (lambda: session.run_with_iobinding(binding),
                     lambda: {'Y': out.numpy()})}

    def operator_model(self, X, mean, var, gamma, beta):
        given = {'gamma': gamma, 'beta': beta, 'mean': mean, 'var': var}
        node = self.onnx.helper.make_node(
            'BatchNormalization', ['X', *given], ['Y'], epsilon=EPS)
        return self.model([node], given, X, X)

    def inference(self, X, **arrays):
        model = self.operator_model(X, **arrays)
        return {'call': self.form(model, X, blank(X))}

    def network_model(self, X, layers, norms):
        nodes, last, given = [], 'X', {}

        def add(kind, *arrays, output=None, **attributes):
            nonlocal last
            names = [f'{kind}{len(nodes)}.{i}' for i in range(len(arrays))]
            given.update(zip(names, arrays, strict=True))
            output = output or f'{kind}{len(nodes)}'
            nodes.append(self.onnx.helper.make_node(
                kind, [last, *names], [output], **attributes))
            last = output

        for i, (W, b) in enumerate(layers):
            if i == 2:
                add('Flatten')
            if W.ndim == 4:
                add('Conv', W, b)
            else:
                add('Gemm', W, b, transB=1, output='Y' if i == 3 else None)
            if i < len(norms):
                add('BatchNormalization', *norms[i], epsilon=EPS)
            if i < 3:
                add('Relu')
            if W.ndim == 4:
                add('AveragePool', kernel_shape=[2, 2], strides=[2, 2])
        return self.model(nodes, given, X, self.logits(X, layers))

    def logits(self, X, layers):
        return aligned(np.full((len(X), len(layers[3][1])), np.nan,
                               'float32'))

    def graph(self, X, layers, norms):
        return self.form(self.network_model(X, layers, norms), X,
                         self.logits(X, layers))

    def network(self, X, **arrays):
        made = super().network(X, **arrays)
        return made | ({AVX2: made['call']} if is_cropped(X) else {})


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

    def forms(self, node, given, X, Y):
        """Two ways to call what computes `node` from `given`."""
        ov = self.openvino
        request = ov.Core().compile_model(ov.Model([node], [given]), 'CPU', {
            'INFERENCE_NUM_THREADS': self.threads, 'NUM_STREAMS': 1,
            'INFERENCE_PRECISION_HINT': 'f32'}).create_infer_request()
        kept = {'X': X, 'Y': Y}  # a tensor does not keep its memory
        X, out = (ov.Tensor(a, shared_memory=True) for a in kept.values())
        request.set_input_tensor(X)
        request.set_output_tensor(out)

        def waiting():
            request.start_async()
            request.wait()

        def read():
            return {'Y': kept['Y']}

        return {'infer': (lambda: request.infer(share_outputs=True), read),
                'start and wait': (waiting, read)}

    def inference(self, X, mean, var, gamma, beta):
        from openvino import opset13
        given = opset13.parameter(X.shape, np.float32)
        node = opset13.batch_norm_inference(
            given, *map(opset13.constant, (gamma, beta, mean, var)), EPS)
        return {'call': self.forms(node, given, X, blank(X))}

    def graph(self, X, layers, norms):
        from openvino import opset13 as op
        node = given = op.parameter(X.shape, np.float32)
        for i, (W, b) in enumerate(layers):
            if W.ndim == 4:
                node = op.convolution(node, op.constant(W), [1, 1], [0, 0],
                                      [0, 0], [1, 1])
            else:
                if i == 2:
                    node = op.reshape(node, op.constant([len(X), -1]), False)
                node = op.matmul(node, op.constant(W), False, True)
            node = op.add(node, op.constant(
                b.reshape(1, -1, *(1,) * (W.ndim - 2))))
            if i < len(norms):
                node = op.batch_norm_inference(
                    node, *map(op.constant, norms[i]), EPS)
            if i < 3:
                node = op.relu(node)
            if W.ndim == 4:
                node = op.avg_pool(node, [2, 2], [0, 0], [0, 0], [2, 2], True)
        out = np.full((len(X), len(layers[3][1])), np.nan, 'float32')
        return self.forms(node, given, X, aligned(out))


class JAX(Engine):
    """Compiled by XLA, with outputs of its own and in donated memory."""

    name = 'JAX'
    second = True
    packages = ('jax', 'jaxlib')

    def __init__(self):
        import jax
        self.jax = jax

    def forms(self, function, args, pick, read):
        """With new outputs, and with those of the call before, donated.

        `pick(result)` names the large ones. XLA may write the next result
        into the memory of these arguments, which `function` does not use.
        """
        jax = self.jax
        wait = jax.block_until_ready
        new, fresh, given = jax.jit(function), {}, {}

        def into(old, *args):
            return function(*args)

        donated = jax.jit(into, donate_argnums=0, keep_unused=True)

        def run_fresh():
            fresh['result'] = wait(new(*args))

        def run_given():
            given['result'] = wait(donated(pick(given['result']), *args))

        given['result'] = wait(new(*args))
        return {'new output': (run_fresh, lambda: read(fresh['result'])),
                'donated output': (run_given,
                                   lambda: read(given['result']))}

    def inference(self, X, mean, var, gamma, beta):
        jnp = self.jax.numpy

        def batch_norm(X, mean, var, gamma, beta):
            mean, var, gamma, beta = (a.reshape(-1, 1, 1)
                                      for a in (mean, var, gamma, beta))
            scale = gamma / jnp.sqrt(var + EPS)
            return X * scale + (beta - mean * scale)

        args = [*map(jnp.asarray, (X, mean, var, gamma, beta))]
        return {'call': self.forms(batch_norm, args, lambda Y: Y, lambda Y: {
            'Y': np.asarray(Y)})}

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

        def named(names, arrays):
            return {name: np.asarray(array)
                    for name, array in zip(names, arrays, strict=True)}

        args = X, gamma, beta, moving
        _, back, _ = jax.jit(pull)(*args)
        gradients = 'dX', 'dgamma', 'dbeta'
        return {
            'forward': self.forms(
                layer, args, lambda result: result[0], lambda result: named(
                    ('Y', 'moving_mean', 'moving_var'),
                    (result[0], *result[1]))),
            'backward': self.forms(
                lambda f, dY: f(dY), (back, dY), lambda result: result[0],
                lambda result: named(gradients, result)),
            'forward + backward': self.forms(
                train, (dY, *args), lambda result: (result[0], result[1][0]),
                lambda result: named(('Y', *gradients),
                                     (result[0], *result[1])))}

    def graph(self, X, layers, norms):
        """In both orders of the axes."""
        lax, jnp = self.jax.lax, self.jax.numpy
        layers, norms = ([[*map(jnp.asarray, one)] for one in many]
                         for many in (layers, norms))

        def form(order):
            first = order == 'NCHW'
            square = (1, 1, 2, 2) if first else (1, 2, 2, 1)

            def over(vector, H):  # the channels of H
                return vector.reshape(-1, 1, 1) if first and H.ndim == 4 \
                    else vector

            def net(H):
                for i, (W, b) in enumerate(layers):
                    if W.ndim == 4:
                        H = lax.conv_general_dilated(
                            H, W, (1, 1), 'VALID', dimension_numbers=(
                                order, 'OIHW', order))
                    else:
                        if H.ndim == 4:  # features in the order of NCHW
                            H = H if first else H.transpose(0, 3, 1, 2)
                            H = H.reshape(len(H), -1)
                        H = H @ W.T
                    H = H + over(b, H)
                    if i < len(norms):
                        gamma, beta, mean, var = norms[i]
                        scale = gamma / jnp.sqrt(var + EPS)
                        H = H * over(scale, H) + over(beta - mean * scale, H)
                    H = jnp.maximum(H, 0) if i < 3 else H
                    if W.ndim == 4:
                        H = lax.reduce_window(H, 0.0, lax.add, square, square,
                                              'VALID') / 4
                return H

            images = X if first else np.moveaxis(X, 1, -1)
            kept, net = {}, self.jax.jit(net)
            images = jnp.asarray(np.ascontiguousarray(images))

            def run():
                kept['Y'] = self.jax.block_until_ready(net(images))

            return run, lambda: {'Y': np.asarray(kept['Y'])}

        return {'channels first': form('NCHW'),
                'channels last': form('NHWC')}


ENGINES = {engine.name: engine for engine in (
    TVM, NumPy, MXNet, MXNetNaive, PyTorch, ONNXRuntime, OpenVINO, JAX)}
