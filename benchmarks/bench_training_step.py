"""One training step of the digit network, by its normalization."""
import side_by_side
from d2ltvm import from_scratch as fs
from d2ltvm.cpp_operator import CppBatchNorm, build_operator
from d2ltvm.mxnet_today import autograd, nd
from d2ltvm.training_operator import CompiledBatchNorm

BATCH_SIZE = 64


def builtin():
    """MXNet's operator, with moving statistics that it keeps itself."""
    moving = {}

    def norm(H, gamma, beta, scope_name):
        if scope_name not in moving:
            moving[scope_name] = nd.zeros_like(gamma), nd.ones_like(gamma)
        return nd.BatchNorm(H, gamma, beta, *moving[scope_name], eps=1e-5,
                            momentum=0.9, fix_gamma=False)

    return norm


def run():
    share = side_by_side.others()
    images = nd.random.uniform(shape=(BATCH_SIZE, 1, 28, 28))
    labels = nd.arange(BATCH_SIZE) % 10

    def step(norm, **options):
        params = fs.init_params()

        def timed():
            with autograd.record():
                loss = fs.softmax_cross_entropy(
                    fs.net(images, params, norm, **options), labels)
            loss.backward()
            fs.sgd(params, 0.001)
            nd.waitall()

        return timed

    from_scratch, _ = fs.training_and_testing(fs.MovingStatistics())
    layers = {'compiled': CompiledBatchNorm, 'in C++': CppBatchNorm}
    try:
        build_operator()
    except RuntimeError as error:
        print(f'  left out: in C++ ({error})')
        del layers['in C++']
    steps = {'built-in': step(builtin()), 'from scratch': step(from_scratch)}
    for name, layer in layers.items():
        steps[name] = step(layer())
        steps[f'{name}, with relu'] = step(layer(relu=True),
                                           activation=lambda H: H)
    times = fs.median_times({**steps, 'none': step(fs.no_norm)}, rounds=20,
                            repeats=10)
    return {'title': f'training step, batch size {BATCH_SIZE}',
            'baseline': 'built-in', 'busy': share,
            'threads': side_by_side.threads(), 'times': times}
