"""The scheduled network: shapes, targets, tiles, NaN, wrong arguments."""
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, s_tir, te

from d2ltvm import network_schedule as module
from d2ltvm.folding import network_float64
from soak import examples, later

SHAPES = (20, 1, 3, 3), (50, 20, 5, 5), (128, 800), (10, 128)
LINUX = 'x86_64-linux-gnu'


def draw_layers(shapes=SHAPES, seed=0, scale=1):
    """Weights that keep the size of what passes; `scale` for the first."""
    rng, layers = np.random.default_rng(seed), []
    for i, shape in enumerate(shapes):
        factor = np.sqrt(2 / math.prod(shape[1:])) * (1 if i else scale)
        layers.append((
            (factor * rng.normal(size=shape)).astype('float32'),
            (0.3 * rng.normal(size=shape[0])).astype('float32')))
    return layers


def draw_images(batch, seed=1):
    return np.random.default_rng(seed).random((batch, 1, 28, 28), 'float32')


@functools.cache
def compiled(batch, threads=None):
    """The network of `draw_layers()`; once for all tests that share it."""
    return module.compile_network(draw_layers(), batch, threads=threads)


def bound(layers, images):
    """Error that float32 may make: see the comments."""
    # Each layer adds n products: the rounding errors of the sum are at most
    # n * 2**-24 of the sum of the sizes, and usually about sqrt(n) of it.
    # The sizes are those of the network with positive weights.
    sizes = [(abs(W), abs(b)) for W, b in layers]
    terms = max(W[0].size for W, _ in layers)
    return 4 * math.sqrt(terms) * 2 ** -24 * network_float64(
        sizes, abs(images)).max()


def check(got, layers, images):
    expected = network_float64(layers, images)
    assert got.shape == expected.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0,
                               atol=bound(layers, images))


# Pieces

@settings(max_examples=examples(25))
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 3),
       st.integers(1, 70), st.sampled_from([4, 16]),
       st.sampled_from([16, 32]))
def test_dense(rows, groups, vectors, features, lanes, registers):
    rng, batch, outputs = np.random.default_rng(0), rows * groups, \
        vectors * lanes
    X, W = (rng.normal(size=shape).astype('float32') for shape in (
        (batch, features), (features, outputs)))
    x, w = (te.placeholder(a.shape, name='X') for a in (X, W))
    k = te.reduce_axis((0, features), 'k')
    Y = te.compute((batch, outputs), lambda i, o: te.sum(
        x[i, k] * w[k, o], axis=k), name='Y')
    sch = s_tir.Schedule(te.create_prim_func([x, w, Y]))
    sch.split(sch.get_loops(sch.get_sblock('Y'))[0], [None, rows])
    sch.decompose_reduction(
        *module.schedule_dense(sch, 'Y', rows, lanes, registers))
    out = tvm.runtime.tensor(np.full((batch, outputs), np.nan, 'float32'))
    tvm.compile(sch.mod, target='llvm')['main'](
        *map(tvm.runtime.tensor, (X, W)), out)
    size = (abs(X) @ abs(W)).max()
    np.testing.assert_allclose(out.numpy(), X.astype('float64') @ W, rtol=0,
                               atol=(features + 1) * 2 ** -24 * size)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 60),
       st.integers(1, 6))
def test_plan_is_no_worse_than_any_other(batch, threads, channels, held):
    rows, each = module.plan(batch, threads, channels, held)
    assert batch % rows == 0 and each % held == 0 and 1 <= rows <= 8
    assert each < channels + held

    def cost(rows, each):
        """Of the thread that has most tasks, counted one by one."""
        first, second, dense = module.TIMES
        tasks = [0] * threads
        for task in range(batch // rows * -(-channels // each)):
            tasks[task % threads] += rows * first + (
                rows * second + dense) * each / channels
        return max(tasks)

    whole = -(-channels // held) * held
    assert cost(rows, each) <= min(cost(1, held), cost(1, whole)) + 1e-6
    if threads == 1:
        assert each == whole


@pytest.mark.parametrize('held', [3, 5])
def test_two_threads_share_a_single_image_evenly(held):
    rows, each = module.plan(1, 2, 50, held)
    assert rows == 1 and 25 <= each < 25 + held


@pytest.mark.parametrize('batch, cores', [(1, 2), (64, 1), (63, 2), (64, 4)])
def test_only_the_ratios_of_the_times_matter(batch, cores):
    assert module.plan(batch, cores, times=[1e6 * t for t in module.TIMES]
                       ) == module.plan(batch, cores)


@pytest.mark.parametrize('winograd', [True, False])
def test_packed_weights(winograd):
    layers = draw_layers(((3, 1, 3, 3), (4, 3, 5, 5), (5, 64), (2, 5)))
    cut = module.Cut(lanes=8, first=1, second=2, rows=1, each=6,
                     winograd=winograd)
    packed = module.packed_weights(layers, cut)
    k = 6 if winograd else 5
    assert [a.shape for a in packed] == [
        (3, 3, 3, 1, 1), (3,), (3, k, k, 3, 2), (6,), (96, 8), (8,),
        (8, 8), (8,)]
    second = layers[1][0]
    if winograd:
        second = module.winograd_weights(second)
    np.testing.assert_array_equal(packed[2][1, 4, 1, 2, 1],
                                  second[3, 2, 4, 1])
    np.testing.assert_array_equal(packed[4][:64, :5], layers[2][0].T)
    np.testing.assert_array_equal(packed[6][:5, :2], layers[3][0].T)
    assert not packed[2][2].any() and not packed[3][4:].any()
    assert not packed[4][64:].any()
    for i, outputs in ((4, 5), (5, 5), (6, 2), (7, 2)):
        assert not packed[i][..., outputs:].any()
    assert not packed[6][5:].any()
    assert all(a.flags.c_contiguous for a in packed)


# The whole

@settings(max_examples=examples(12))
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 12),
       st.integers(1, 12), st.sampled_from([1, 3, 5]),
       st.sampled_from([1, 3, 5, 7]), st.integers(1, 40), st.integers(1, 17),
       st.sampled_from([1e-5, 1, 1e5]))
def test_networks_of_other_sizes(batch, threads, c1, c2, k1, k2, hidden,
                                 classes, scale):
    side = ((28 - k1 + 1) // 2 - k2 + 1) // 2
    layers = draw_layers(((c1, 1, k1, k1), (c2, c1, k2, k2),
                          (hidden, c2 * side ** 2), (classes, hidden)),
                         scale=scale)
    images = draw_images(batch)
    network = module.compile_network(layers, batch, threads=threads)
    check(network(images), layers, images)


@settings(max_examples=examples(4))
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([3, 5]))
def test_by_definition(batch, threads, k):
    side = (13 - k + 1) // 2
    layers, images = draw_layers((
        (4, 1, 3, 3), (7, 4, k, k), (9, 7 * side ** 2), (10, 9))), \
        draw_images(batch)
    network = module.compile_network(layers, batch, threads=threads,
                                     winograd=False)
    check(network(images), layers, images)
    script = module.schedule_network(layers, batch, 'llvm', threads,
                                     winograd=False).mod.script()
    assert 'conv2_pixels' not in script
    assert 'conv2_pixels' in module.schedule_network(
        layers, batch, 'llvm', threads).mod.script()


FIRST = (1, 2), (3, None), (16, 1), (64, 5)


@pytest.mark.parametrize(('batch', 'threads'), [*FIRST, *(
    later(batch, threads) for batch in (1, 2, 3, 5, 13, 16, 64)
    for threads in (None, 1, 2, 5) if (batch, threads) not in FIRST)])
def test_batches(batch, threads):
    layers, images = draw_layers(), draw_images(batch)
    network = compiled(batch, threads)
    check(network(images), layers, images)
    check(network(images[::-1]), layers, images[::-1])  # any strides


@pytest.mark.parametrize('cpu', ['x86-64', 'x86-64-v3', None])
def test_targets_that_this_machine_can_run(cpu):
    host = module.cpu_target()
    if cpu == 'x86-64-v3' and 'avx2' not in (
            tvm.target.codegen.llvm_get_cpu_features(host)):
        pytest.skip('no AVX2 here')
    target = {'kind': 'llvm', 'mcpu': cpu} if cpu else None
    layers, images = draw_layers(), draw_images(8)
    check(module.compile_network(layers, 8, target)(images), layers, images)


@pytest.mark.parametrize('cpu, triple, lanes, vectors, held', [
    ('x86-64', LINUX, 4, 4, 2), ('x86-64-v3', LINUX, 8, 2, 5),
    ('x86-64-v4', LINUX, 16, 1, 10), ('', 'aarch64-linux-gnu', 4, 4, 5)])
def test_the_tile_follows_the_target(cpu, triple, lanes, vectors, held):
    options = {'mcpu': cpu} if cpu else {}
    target = module.cpu_target({'kind': 'llvm', 'mtriple': triple, **options})
    layers = draw_layers()
    sch = module.schedule_network(layers, 4, target, 2)
    loops = sch.get_loops(sch.get_sblock('conv2'))
    assert [int(sch.get(loop).extent) for loop in loops[-3:]] == [
        held, vectors, lanes]
    text = sch.mod.script()
    assert text.count('T.parallel(') == 1
    assert f'T.vectorized({2 * lanes})' not in text
    built = tvm.compile(module.network_module(layers, 4, target, 2), target)
    assert built.mod.imports[0].inspect_source('asm')


def test_one_thread_has_no_parallel_loop():
    target = module.cpu_target('llvm')
    script = module.network_module(draw_layers(), 8, target, 1).script()
    assert 'T.parallel' not in script


@pytest.mark.parametrize('row, column', [(26, 0), (0, 26), (27, 27)])
def test_nan_that_pooling_drops(row, column):
    images, network = draw_images(1), compiled(1, 2)
    before = network(images)
    images[0, 0, row, column] = np.nan
    np.testing.assert_array_equal(network(images), before)


@pytest.mark.parametrize('row, column', [(0, 0), (13, 7), (25, 25)])
def test_nan_stays_in_its_row(row, column):
    images, network = draw_images(3), compiled(3)
    before = network(images)
    images[1, 0, row, column] = np.nan
    after = network(images)
    assert np.isnan(after[1]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    images[1, 0, row, column] = np.inf  # inf - inf in most sums
    assert not np.isfinite(network(images)[1]).any()


def test_the_module_is_relax_with_its_weights():
    layers, images = draw_layers(), draw_images(2)
    target = module.cpu_target()
    built = module.network_module(layers, 2, target)
    assert isinstance(built['main'], relax.Function)
    assert len(built['main'].params) == 1
    run = relax.VirtualMachine(tvm.compile(built, target), tvm.cpu())['main']
    for arrays in layers:  # its own copy
        for array in arrays:
            array[...] = 0
    got = run(tvm.runtime.tensor(images)).numpy()
    check(got, draw_layers(), images)


def test_results_are_new_writable_arrays():
    network = compiled(3)
    first = network(draw_images(3))
    kept = first.copy()
    second = network(draw_images(3, seed=5))
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)
    first[...] = 0


def test_threads_wait_for_each_other():
    layers, batch = draw_layers(), 16
    network = compiled(batch, 1)
    images = [draw_images(batch, seed) for seed in range(examples(100))]
    with ThreadPoolExecutor(4) as pool:
        for got, given_images in zip(pool.map(network, images), images,
                                     strict=True):
            check(got, layers, given_images)


@pytest.mark.parametrize('offset', [0, 4, 20])
def test_any_address(offset):
    images = draw_images(3)
    memory = np.empty(images.nbytes + 128, 'uint8')
    start = -memory.ctypes.data % 64 + offset
    view = memory[start:start + images.nbytes].view('float32')
    view = view.reshape(images.shape)
    view[...] = images
    check(compiled(3)(view), draw_layers(), images)


@pytest.mark.parametrize('semantics', [later(False), True], indirect=True)
def test_before_and_after_set_np(semantics):
    layers, images = draw_layers(), draw_images(2)
    check(module.compile_network(layers, 2)(images), layers, images)


# Refusals

def changed(i, W=None, b=None):
    layers = draw_layers()
    layers[i] = (layers[i][0] if W is None else W,
                 layers[i][1] if b is None else b)
    return layers


F = np.float32


@pytest.mark.parametrize('layers, error, words', [
    (draw_layers()[:3], ValueError, 'layers: expected four pairs.*got list '
     'of 3'),
    (None, ValueError, 'layers: expected four pairs.*got NoneType'),
    ([*draw_layers()[:3], 5], ValueError, r'layers\[3\]: expected a pair'),
    ([*draw_layers()[:3], draw_layers()[3][:1]], ValueError,
     r'layers\[3\]: expected a pair'),
    (changed(1, b=np.zeros(50)), TypeError,
     r'b of layers\[1\]: expected .* of float32, got float64'),
    (changed(0, W=[1]), TypeError, r'W of layers\[0\]: expected a.*list'),
    (changed(0, W=np.ones((20, 3, 3, 3), F)), ValueError,
     r'W of layers\[0\]: expected shape \(any, 1, any, any\), '
     r'got \(20, 3, 3, 3\)'),
    (changed(0, W=np.ones((20, 1, 3, 5), F)), ValueError, r'layers\[0\]'),
    (changed(0, W=np.ones((20, 1, 4, 4), F)), ValueError, 'with odd k, got'),
    (changed(1, W=np.ones((50, 20, 25), F)), ValueError, r'layers\[1\]'),
    (changed(1, b=np.ones(49, F)), ValueError, r'layers\[1\].*\(49,\)'),
    (changed(1, W=np.ones((50, 20, 13, 13), F)), ValueError,
     r'W of layers\[1\]: expected a smaller kernel'),
    (changed(2, W=np.ones((128, 801), F)), ValueError,
     r'W of layers\[2\]: expected shape \(any, 800\), got'),
    (changed(2, W=np.ones((0, 800), F), b=np.ones(0, F)), ValueError,
     r'layers\[2\]: .*at least one output'),
    (changed(3, W=np.ones((10, 127), F)), ValueError,
     r'W of layers\[3\]: expected shape \(any, 128\)')])
def test_layers_that_do_not_fit(layers, error, words):
    for function in (module.check_layers,
                     lambda layers: module.network_module(layers, 1)):
        with pytest.raises(error, match=words):
            function(layers)


NO_COUNTS = [(0, ValueError), (-1, ValueError), (2.0, TypeError),
             ('1', TypeError), (True, TypeError)]


@pytest.mark.parametrize('name', ['batch', 'threads'])
@pytest.mark.parametrize(('value', 'error'), NO_COUNTS)
def test_numbers_that_are_none(name, value, error):
    arguments = {'batch': 1, 'threads': 1, name: value}
    with pytest.raises(error, match=f'^{name}: expected '):
        module.network_module(draw_layers(), **arguments)
    with pytest.raises(error, match=f'^{name}: expected '):
        module.schedule_network(draw_layers(), target='llvm', **arguments)
    with pytest.raises(error, match=f'^{name}: expected '):
        module.plan(**arguments)


@pytest.mark.parametrize('name', ['channels', 'held'])
@pytest.mark.parametrize(('value', 'error'), NO_COUNTS)
def test_numbers_of_a_plan_that_are_none(name, value, error):
    with pytest.raises(error, match=f'^{name}: expected '):
        module.plan(1, 1, **{name: value})


@pytest.mark.parametrize(('times', 'error'), [
    ((1, -1, 1), ValueError), ((np.nan, 1, 1), ValueError),
    (('1', 1, 1), TypeError)])
def test_times_of_a_plan_that_are_none(times, error):
    with pytest.raises(error, match=r'^times: expected '):
        module.plan(1, 1, times=times)


@pytest.mark.parametrize('cut', [
    module.Cut(16, 3, 3, 1, 51), module.Cut(16, 5, 3, 1, 50)])
def test_a_cut_that_does_not_fit(cut):
    with pytest.raises(ValueError, match=r'^cut: expected'):
        module.packed_weights(draw_layers(), cut)


@pytest.mark.parametrize('value', [None, 'no', 2])
def test_winograd_is_a_flag(value):
    for function in (module.schedule_network, module.network_module,
                     module.compile_network):
        with pytest.raises(TypeError, match=r'^winograd: expected'):
            function(draw_layers(), 1, 'llvm', 1, winograd=value)


@pytest.mark.parametrize(('value', 'error'), NO_COUNTS)
def test_other_numbers_that_are_none(value, error):
    cut = module.Cut(8, 2, 3, 1, 51)
    with pytest.raises(error, match=r'^batch: expected '):
        module.network_program(draw_layers(), value, cut)
    with pytest.raises(error, match=r'^channels: expected '):
        module.tile_channels(value, 16)
    with pytest.raises(error, match=r'^registers: expected '):
        module.tile_channels(50, value)


@pytest.mark.parametrize('target, words', [
    ('nonsense', 'TVM refuses'), ('cuda', 'expected kind llvm'),
    ({'kind': 'llvm', 'mcpu': 'native'}, "LLVM knows no processor 'native'"),
    ({'kind': 'llvm', 'mtriple': 'foo-bar'}, "LLVM knows no machine 'foo"),
    (3, 'TVM refuses')])
def test_targets_that_are_none(target, words):
    for function in (module.cpu_target,
                     lambda t: module.compile_network(draw_layers(), 1, t)):
        with pytest.raises(ValueError, match=f'target: {words}'):
            function(target)


def test_another_architecture_only_for_a_module():
    triple = tvm.target.codegen.llvm_get_system_triple()
    triple = 'aarch64-linux-gnu' if triple.startswith('x86_64') else LINUX
    target = {'kind': 'llvm', 'mtriple': triple}
    module.network_module(draw_layers(), 1, target)
    with pytest.raises(ValueError, match='target: expected the architecture '
                       f'of this machine, as in .*, got {triple!r}'):
        module.compile_network(draw_layers(), 1, target)


def test_images_that_do_not_fit():
    network, images = compiled(3), draw_images(3)
    for wrong in (images.astype('float64'), images.tolist(), None):
        with pytest.raises(TypeError, match='images: expected a NumPy array '
                           'of float32'):
            network(wrong)
    for wrong in (images[:1], images[:, 0], images[..., :27]):
        with pytest.raises(ValueError, match=r'images: expected shape '
                           r'\(3, 1, 28, 28\), got'):
            network(wrong)
    check(network(images), draw_layers(), images)
