"""The operator in C++: float64, MXNet, the operator in Python, its build."""
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from d2ltvm.mxnet_today import autograd, mx, nd
from hypothesis import given, settings
from numpy.testing import assert_allclose, assert_array_equal
from soak import SOAK, examples, later
from test_training_operator import (
    draw, judge, judge_by_mxnet, mx_run, named, shapes)

from d2ltvm import cpp_operator as module
from d2ltvm import from_scratch as fs
from d2ltvm.training_operator import CompiledBatchNorm

BOTH = CompiledBatchNorm, module.CppBatchNorm


def ones(*shapes):
    return [nd.ones(shape) for shape in shapes]


def call(*inputs, kernels=None, **options):
    """The operator without its class: Y."""
    return module.load_operator()(
        *inputs, kernels=kernels or module.register_kernels(True, False),
        **{'momentum': 0.9, 'eps': 1e-5, **options})[0]


# Results

@pytest.mark.usefixtures('semantics')
@pytest.mark.parametrize('relu', [False, True])
@settings(max_examples=examples(20))
@given(shapes)
def test_against_float64_and_python(relu, shape):
    if shape[0] * int(np.prod(shape[2:])) == 1:
        return  # refused: one value per channel
    arrays = draw(shape)
    layers = [kind(momentum=0.9, relu=relu) for kind in BOTH]
    python, ours = ([*mx_run(named(layer), *arrays), *(
        a.asnumpy() for a in layer.moving['bn'])] for layer in layers)
    for a, b in zip(python, ours, strict=True):
        assert_array_equal(a, b)
    *results, mean, var = ours  # the first batch
    judge((*results, mean / 10, 0.9 + var / 10), *arrays, relu=relu)


@pytest.mark.parametrize('shape', [(16, 5, 9, 7), (32, 11)])
def test_against_the_operator_of_mxnet(shape):
    judge_by_mxnet(module.CppBatchNorm(), shape)


def test_numbers_arrive_with_all_their_bits():
    """They travel as text."""
    X, _, gamma, beta = map(nd.array, draw((8, 3)))
    for momentum, eps in ((1 / 3, 2. ** -126), (1e-300, 1e30), (0, 1e-5)):
        layers = [kind(momentum, eps) for kind in BOTH]
        for layer in layers:
            for scale in (1, 2):
                Y = layer(scale * X, gamma, beta, 'bn')
            layer.found = [Y, *layer.moving['bn']]
        for a, b in zip(*(layer.found for layer in layers), strict=True):
            assert_array_equal(a.asnumpy(), b.asnumpy())


def test_statistics_and_inference_are_those_of_python():
    _, _, gamma, beta = map(nd.array, draw((8, 3)))
    found = []
    for kind in BOTH:
        layer = kind(momentum=0.8, relu=True)
        for seed in range(3):
            layer(nd.array(draw((8, 3), seed)[0]), gamma, beta, 'bn')
        found.append([*layer.moving['bn'], layer.infer(
            nd.array(draw((8, 3), 9)[0]), gamma, beta, 'bn')])
    for a, b in zip(*found, strict=True):
        assert_array_equal(a.asnumpy(), b.asnumpy())


def test_slices_share_the_memory_and_nothing_is_recorded_outside():
    X, _, gamma, beta = map(nd.array, draw((9, 3, 5, 7)))
    for part in (X[1:], X[2:4], X.transpose((0, 1, 3, 2))):
        ours, python = (kind()(part, gamma, beta, 'bn').asnumpy()
                        for kind in BOTH)
        assert_array_equal(ours, python)


# Gradients; what is frozen and what adds up is in test_layers.py

@pytest.mark.parametrize('uses', [2, later(20)])
def test_one_array_used_often(uses):
    """MXNet adds up the gradients of what was computed."""
    X, dY, gamma, beta = draw((8, 3, 4, 5))
    found = []
    for kind in BOTH:
        arrays = first, *parameters = [nd.array(a) for a in (X, gamma, beta)]
        for a in arrays:
            a.attach_grad('add')
        for _ in range(2):
            with autograd.record():
                H, layer = 2 * first, kind()
                Y = sum((k + 1) * layer(H, *parameters, f'{k}')
                        for k in range(uses))
            Y.backward(nd.array(dY))
        found.append([a.grad.asnumpy() for a in arrays])
    for a, b in zip(*found, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4 * abs(b).max())


def test_backward_twice_and_after_a_change():
    arrays = X, dY, gamma, beta = [*map(nd.array, draw((8, 3)))]
    right = mx_run(named(CompiledBatchNorm()), *map(nd.NDArray.asnumpy,
                                                    arrays))[1:]
    for a in (X, gamma, beta):
        a.attach_grad()
    with autograd.record():
        Y = module.CppBatchNorm()(X, gamma, beta, 'bn')
    gamma[:] = 100
    for _ in range(2):
        Y.backward(dY, retain_graph=True)
        for a, b in zip((X, gamma, beta), right, strict=True):
            assert_array_equal(a.grad.asnumpy(), b)


def test_mxnet_still_overwrites():
    """Else the class need not copy."""
    X, gamma, beta, mean, var = ones((4, 3), 3, 3, 3, 3)
    beta.attach_grad('add')
    for _ in range(3):
        with autograd.record():
            Y = call(X, gamma, beta, mean, var)
        Y.backward()
    assert (beta.grad.asnumpy() == 4).all()


def test_only_what_has_a_gradient_is_copied(monkeypatch):
    copied = []
    monkeypatch.setattr(module.nd, 'identity', lambda array, copy=nd.identity:
                        (copied.append(array.shape), copy(array))[1])
    X, gamma, beta = ones((4, 3), 3, 3)
    gamma.attach_grad()
    module.CppBatchNorm()(X, gamma, beta, 'bn')
    assert copied == [(3,)]


# Refusals; the checks are those of CompiledBatchNorm

@pytest.mark.parametrize(('arrays', 'message'), [
    ((np.ones((4, 3)), 3, 3), '^X: expected an NDArray'),
    (((4, 3), 2, 3), '^gamma: expected'),
    ((4, 3, 3), '^X: expected'), (((1, 3), 3, 3), '^X: training needs more')])
def test_refusals(arrays, message):
    layer = module.CppBatchNorm()
    inputs = [a if isinstance(a, np.ndarray) else nd.ones(a) for a in arrays]
    with pytest.raises((TypeError, ValueError), match=message):
        layer(*inputs, 'bn')
    assert not layer.moving


def test_options_are_refused():
    for options in ({'momentum': 1}, {'eps': 0}, {'relu': 1}):
        name, = options
        with pytest.raises((TypeError, ValueError), match=f'^{name}: '):
            module.CppBatchNorm(**options)


def test_the_bare_operator_says_what_is_wrong():
    X, *rest = ones((4, 3), 3, 3, 3, 3)
    for bad, message in (
            (lambda: call(X, *rest, kernels='none'),
             r'none\.forward: TVM has no such function'),
            (lambda: module.load_operator()(X, *rest, momentum=0.9, eps=1),
             'kernels: expected this option'),
            (lambda: call(nd.ones(4), *rest), 'X: expected two axes or more'),
            (lambda: call(nd.ones((4, 3, 2)), *rest),
             r'dense\.forward: Mismatched X\.ndim'),
            (lambda: call(X, *rest[1:], nd.ones(2)), 'Shape inconsistent'),
            (lambda: call(X.astype('float64'), *rest), 'Type inconsistent')):
        with pytest.raises(mx.MXNetError, match=message):
            bad().wait_to_read()


# Processes

def child(program, **environment):
    """What a process with the tests' own modules prints."""
    folder = Path(forked.__file__).parent
    ran = subprocess.run(
        [sys.executable, '-W', 'error', '-W',
         'ignore::DeprecationWarning', '-c', program], text=True,
        capture_output=True, check=False, timeout=300, env={
            **os.environ, **environment,
            'PYTHONPATH': f'{folder}{os.pathsep}{folder.parent}'})
    assert (ran.returncode, ran.stderr) == (0, ''), ran.stderr
    return ran.stdout


def test_fork_and_a_process_that_ends_with_work_queued():
    print_ends = '''
import forked
from d2ltvm import from_scratch as fs
from d2ltvm.cpp_operator import CppBatchNorm
from d2ltvm.mxnet_today import nd

def in_cpp(X, gamma, beta):
    return CppBatchNorm()(X, gamma, beta, 'bn')

for wait in (True, False) * FORKS:
    forked.fork(in_cpp, wait)
params, images = fs.init_params(), nd.random.uniform(shape=(64, 1, 28, 28))
norm = CppBatchNorm(relu=True)
for _ in range(STEPS):
    with fs.autograd.record():
        loss = fs.softmax_cross_entropy(fs.net(
            images, params, norm, activation=lambda H: H), nd.arange(64) % 10)
    loss.backward()
    fs.sgd(params, 0.001)
print('ends')'''
    for _ in range(5 if SOAK else 1):
        assert child(print_ends.replace('FORKS', '20' if SOAK else '2')
                     .replace('STEPS', '10')) == 'ends\n'


@pytest.mark.parametrize('steps', [10, later(300)])
def test_training_is_that_of_python(steps):
    """Every loss, bit for bit: nothing is read too early or too late."""
    losses = []
    for kind in BOTH:
        rng, params, norm = np.random.default_rng(0), fs.init_params(), kind(
            relu=True)
        losses.append([])
        for _ in range(steps):
            images = nd.array(rng.uniform(size=(16, 1, 28, 28)))
            with autograd.record():
                loss = fs.softmax_cross_entropy(
                    fs.net(images, params, norm, activation=lambda H: H),
                    nd.arange(16) % 10)
            loss.backward()
            fs.sgd(params, 1e-3)
            losses[-1].append(loss)
    for a, b in zip(*losses, strict=True):
        assert a.asscalar() == b.asscalar()


# The build

def test_no_compiler_or_one_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match=r"^compiler: .*'no-such-thing'"):
        module.build_operator(tmp_path, 'no-such-thing')
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(RuntimeError, match=r'^false fails: '):
        module.build_operator(tmp_path, 'false')
    with pytest.raises(FileNotFoundError):
        module.build_operator(tmp_path, 'true')
    assert [*tmp_path.iterdir()] == []
    Path(tmp_path, 'file').touch()
    with pytest.raises(FileExistsError):
        module.build_operator(tmp_path / 'file')


def compiler(folder, *lines):
    """A program in the place of g++ that counts its calls."""
    path = folder / 'compiler'
    path.write_text('\n'.join(('#!/bin/sh', f'echo >> {folder}/calls',
                               *lines)))
    path.chmod(0o755)
    return path


def test_one_build_for_the_same_inputs(tmp_path, monkeypatch):
    fake = compiler(tmp_path, 'cp batch_norm.cc batch_norm.so')
    cache = tmp_path / 'cache' / 'd2ltvm'
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache.parent))
    first = module.build_operator(compiler=str(fake))
    assert first == module.build_operator(compiler=str(fake))
    assert [*cache.iterdir()] == [first] and first.suffix == '.so'
    fake.rename(tmp_path / 'gone')  # what is there needs no compiler
    assert module.build_operator(compiler=str(fake)) == first
    (tmp_path / 'gone').rename(fake)
    monkeypatch.setattr(module.tvm_ffi, '__version__', 'another')
    assert module.build_operator(compiler=str(fake)) != first
    assert (tmp_path / 'calls').read_text() == '\n\n'


def test_the_words_of_the_compiler_are_told(tmp_path):
    fake = compiler(tmp_path, 'echo lib_api.h: not there >&2', 'exit 1')
    with pytest.raises(RuntimeError, match=r'fails: lib_api\.h: not th'):
        module.build_operator(tmp_path / 'cache', str(fake))
    assert [*(tmp_path / 'cache').iterdir()] == []


@pytest.mark.soak
def test_the_source_gives_no_warning(tmp_path):
    """Beyond those of the headers."""
    command = module.build_command()
    includes = ['-isystem' + word[2:] for word in command
                if word.startswith('-I')]
    source = Path(module.__file__).with_name('batch_norm.cc')
    ran = subprocess.run(
        [command[0], '-std=c++17', '-fsyntax-only', '-Wall', '-Wextra',
         '-Werror', *includes, source], capture_output=True, text=True,
        check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_layer_without_a_library_changes_nothing(monkeypatch):
    def missing():
        raise RuntimeError('compiler: expected a C++ compiler')

    monkeypatch.setattr(module, 'load_operator', missing)
    layer = module.CppBatchNorm()
    with pytest.raises(RuntimeError, match=r'^compiler: '):
        layer(*ones((4, 3), 3, 3), 'bn')
    assert not layer.moving


def test_lines_of_the_source_fit_a_page():
    source = Path(module.__file__).with_name('batch_norm.cc').read_text()
    assert max(map(len, source.splitlines())) < 80
