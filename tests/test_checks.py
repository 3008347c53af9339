"""Checks of arguments: what passes, what is refused, and with which words."""
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ltvm import checks, leave_mxnet, theory

FINITE32 = float(np.finfo('float32').tiny), float(np.finfo('float32').max)


# --- numbers, counts, words --------------------------------------------------


@pytest.mark.parametrize('value', [
    1, 0.5, np.float16(1), np.float32(1), np.int64(1), Fraction(1, 2),
    np.longdouble(1), *FINITE32, np.float32(FINITE32[0]),
    np.float32(FINITE32[1]), np.float16(6e-8)])
def test_check_number_accepts(value):
    checks.check_number('eps', value)


@pytest.mark.parametrize(('error', 'message', 'arguments', 'limits'), [
    (ValueError, 'a: expected 0 to 1, got 1.5', (1.5, 0, 1), {}),
    (ValueError, 'a: expected 0 to 1, got nan', (math.nan, 0, 1), {}),
    (ValueError, 'a: expected at least 0 and less than 1, got 1', (1, 0),
     {'below': 1}),
    (ValueError, 'a: expected .*, got 1e-38', (1e-38,), {}),
    (ValueError, 'a: expected .*, got 0.0', (np.float16(0),), {}),
    (ValueError, 'a: expected .*, got inf', (np.float16(np.inf),), {}),
    (ValueError, 'a: expected .*, got 1e-40', (np.float64(1e-40),), {}),
    (TypeError, 'a: expected a number, got complex', (1j,), {}),
    (TypeError, 'a: expected a number, got ndarray', (np.ones(1),), {}),
    (TypeError, 'a: expected a number, got str', ('1', 0, 1), {}),
    (TypeError, 'a: expected a number, got bool', (True, 0, 1), {})])
def test_check_number_refuses(error, message, arguments, limits):
    with pytest.raises(error, match=f'^{message}$'):
        checks.check_number('a', *arguments, **limits)
    for good in (0, 1) if not limits else (0, 0.9):
        checks.check_number('a', good, 0, 1, **limits)


@given(st.floats(allow_nan=True), st.floats(-2, 0), st.floats(0, 2))
def test_check_number_is_the_interval(value, least, most):
    for kind in (float, np.float64):
        number = kind(value)
        if least <= value <= most:
            checks.check_number('a', number, least, most)
        else:
            with pytest.raises(ValueError, match=r'^a: expected '):
                checks.check_number('a', number, least, most)


@pytest.mark.parametrize(('error', 'message', 'arguments'), [
    (ValueError, 'a: expected 1 or more, got 0', (0,)),
    (ValueError, 'a: expected 2 or more, got 1', (np.int32(1), 2)),
    (TypeError, 'a: expected an integer, got 2.0', (2.0,)),
    (TypeError, 'a: expected an integer, got None', (None,)),
    (TypeError, 'a: expected an integer, got True', (True,))])
def test_check_count(error, message, arguments):
    checks.check_count('a', np.int64(2), 2)
    with pytest.raises(error, match=f'^{message}$'):
        checks.check_count('a', *arguments)


def test_check_choice():
    for good in ('b', np.str_('a')):
        checks.check_choice('kind', good, ('a', 'b'))
    for wrong in ('c', None, ['a'], np.array(['a', 'b']), 1):
        with pytest.raises(ValueError, match=r"^kind: expected one of "
                                             r"\('a', 'b'\), got "):
            checks.check_choice('kind', wrong, ['a', 'b'])


# --- arrays ------------------------------------------------------------------


class Named(np.ndarray):
    """A subclass, as `np.memmap` is one."""


def test_check_array_accepts():
    X = np.ones((2, 3))
    checks.check_array('X', X)
    checks.check_array('X', X.astype('float32'), shape=(2, 3))
    checks.check_array('X', X.view(Named), 'float64', (None, 3))
    checks.check_array('X', X.astype('int64'), 'int64')
    checks.check_array('X', np.array(1.0), shape=())


@pytest.mark.parametrize(('error', 'message', 'value', 'options'), [
    (TypeError, 'a: expected a NumPy array of float32 or float64, got list',
     [1.0], {}),
    (TypeError, 'a: .*, got NoneType', None, {}),
    (TypeError, 'a: .*, got a scalar float64', np.float64(1), {}),
    (TypeError, 'a: .*, got MaskedArray', np.ma.ones(3), {}),
    (TypeError, 'a: .*, got int64', np.ones(3, 'int64'), {}),
    (TypeError, 'a: .*, got float16', np.ones(3, 'float16'), {}),
    (TypeError, 'a: .*, got complex128', np.ones(3, complex), {}),
    (TypeError, 'a: expected a NumPy array of uint8, got float64',
     np.ones(3), {'dtypes': 'uint8'}),
    (ValueError, r'a: expected shape \(3,\), got \(4,\)', np.ones(4),
     {'shape': (3,)}),
    (ValueError, r'a: expected shape \(any, 3\), got \(2, 4\)',
     np.ones((2, 4)), {'shape': (None, 3)}),
    (ValueError, r'a: expected shape \(\), got \(1,\)', np.ones(1),
     {'shape': ()}),
    # the kind of thing comes first, whatever else is wrong
    (TypeError, 'a: .*, got float32', np.ones(4, 'float32'),
     {'dtypes': 'float64', 'shape': (3,)})])
def test_check_array_refuses(error, message, value, options):
    with pytest.raises(error, match=f'^{message}$'):
        checks.check_array('a', value, **options)


def test_arrays_of_mxnet():
    from d2ltvm.mxnet_today import mx, nd
    checks.check_array('X', nd.ones((2, 3)), shape=(2, None),
                       kind=nd.NDArray)
    checks.check_batch(nd.ones((2, 3)), gamma=nd.ones(3), kind=nd.NDArray)
    for wrong, got in ((np.ones(3), 'ndarray'), (mx.np.ones(3), 'ndarray'),
                       (nd.ones(3, dtype='int32'), 'int32')):
        with pytest.raises(TypeError, match='^X: expected an NDArray of '
                                            f'float32 or float64, got {got}'):
            checks.check_array('X', wrong, kind=nd.NDArray)
    with pytest.raises(TypeError, match=r'^gamma: .* float32, got float64$'):
        checks.check_batch(nd.ones((2, 3)), kind=nd.NDArray,
                           gamma=nd.ones(3, dtype='float64'))
    with pytest.raises(ValueError, match=r'^moving_var: .* got -1$'):
        checks.check_variance('moving_var', nd.array([1, -1]))


# --- the arguments of a layer ------------------------------------------------


def test_check_batch_accepts():
    for dtype in ('float32', 'float64'):
        for shape in ((1, 1), (4, 3), (2, 3, 1, 7)):
            channels = np.ones(shape[1], dtype)
            checks.check_batch(np.ones(shape, dtype), 1e-5, gamma=channels,
                               beta=channels)
    for shape in ((4, 3, 2), (2, 3, 4, 5, 6)):
        checks.check_batch(np.ones(shape), ranks=(2, 3, 4, 5),
                           gamma=np.ones(3))
    checks.check_batch(np.ones((0, 3)), empty=True, gamma=np.ones(3))


@pytest.mark.parametrize(('error', 'message', 'X', 'options'), [
    (ValueError, r'X: expected a non-empty array of shape \(N, F\) or '
     r'\(N, C, H, W\), got shape \(3,\)', np.ones(3), {}),
    (ValueError, r'X: .* got shape \(0, 3\)', np.ones((0, 3)), {}),
    (ValueError, r'X: .* got shape \(4, 0\)', np.ones((4, 0)),
     {'empty': True}),
    (ValueError, r'batches: .* got shape \(2, 3, 4\)', np.ones((2, 3, 4)),
     {'name': 'batches'}),
    (ValueError, r'X: .* \(N, F\) or \(N, C, L\), got .*\(2, 3, 4, 5\)',
     np.ones((2, 3, 4, 5)), {'ranks': (2, 3)}),
    (TypeError, 'X: .*, got int64', np.ones((2, 3), 'int64'), {}),
    (TypeError, 'gamma: expected a NumPy array of float64, got float32',
     np.ones((2, 3)), {'gamma': np.ones(3, 'float32')}),
    (ValueError, r'beta: expected shape \(3,\), got \(3, 1\)',
     np.ones((2, 3)), {'gamma': np.ones(3), 'beta': np.ones((3, 1))}),
    (TypeError, 'beta: expected .*, got NoneType', np.ones((2, 3)),
     {'beta': None}),
    (ValueError, 'eps: expected at least .*, got 0', np.ones((2, 3)),
     {'eps': 0})])
def test_check_batch_refuses(error, message, X, options):
    with pytest.raises(error, match=f'^{message}$'):
        checks.check_batch(X, **options)


# --- variances ---------------------------------------------------------------


@pytest.mark.parametrize('good', [
    0.0, -0.0, 4, [0, 1e30], np.zeros((3, 1, 1), 'float16'), [math.nan, 1],
    math.inf, np.ones(0)])
def test_check_variance_accepts(good):
    checks.check_variance('var', good)


@pytest.mark.parametrize('wrong', [
    -1e-30, [1, -2.5], np.full((2, 2), -1, 'float32'), [math.nan, -1],
    -math.inf])
def test_check_variance_refuses(wrong):
    least = np.nanmin(np.asarray(wrong, float))
    with pytest.raises(ValueError, match='^v: expected no negative numbers, '
                                         f'got {least:g}$'):
        checks.check_variance('v', wrong)


@pytest.mark.parametrize('wrong', [math.nan, [1, math.inf], [-math.inf, 0],
                                   [2, -1]])
def test_check_variance_of_finite_numbers(wrong):
    checks.check_variance('v', [0, 1], finite=True)
    with pytest.raises(ValueError, match=r'^v: expected finite numbers, none '
                                         r'negative, got '):
        checks.check_variance('v', wrong, finite=True)


# --- refusals that are shown -------------------------------------------------


@pytest.mark.parametrize('kind', [ValueError, TypeError, RuntimeError,
                                  FileExistsError, NotImplementedError])
def test_refused_prints_the_error(kind, capsys):
    def function(*args, **options):
        raise kind(f'{args} {options}')
    checks.refused(function, 1, function=2)
    assert capsys.readouterr().out == (
        f"{kind.__name__}: (1,) {{'function': 2}}\n")


def test_refused_leaves_out_the_signature_of_tvm(capsys):
    def function():
        raise ValueError('Wrong X when calling:\n  `f(X: Tensor)`,\n  expected'
                         ' one of\n  `int`')
    checks.refused(function)
    assert capsys.readouterr().out == (
        'ValueError: Wrong X when calling: expected one of\n  `int`\n')


def test_refused_refuses_what_is_accepted(capsys):
    with pytest.raises(AssertionError, match=r'^the call was accepted$'):
        checks.refused(len, [])
    with pytest.raises(KeyError):
        checks.refused({}.pop, 'x')
    assert not capsys.readouterr().out


# --- where they are found ----------------------------------------------------


def test_they_are_importable_from_theory_as_before():
    assert theory.check_number is checks.check_number
    assert theory.check_count is checks.check_count


def test_nothing_but_numpy_is_loaded():
    ran = subprocess.run(
        [sys.executable, '-c', 'import d2ltvm.checks, sys; print(*('
         "{'mxnet', 'tvm', 'matplotlib', 'sklearn'} & set(sys.modules)))"],
        check=True, capture_output=True, text=True)
    assert ran.stdout.split() == []


def test_check_pairs():
    W, b = np.ones((2, 3), 'float32'), np.ones(2, 'float32')
    shapes = (2, 3), (2, 3)
    checks.check_pairs('x', [(W, b), [W, None]], shapes)
    for wrong in ([(W, b)], [(W, b), (W.T, None)], [(W, b), (W, W)], [],
                  [(W, b), (None, b)]):
        with pytest.raises(ValueError, match=r'^x: expected weights of shape'):
            checks.check_pairs('x', wrong, shapes)
    for wrong in (W.astype('float64'), W.tolist()):
        with pytest.raises(TypeError, match=r'^x: expected arrays of float32'):
            checks.check_pairs('x', [(W, b), (wrong, b)], shapes)


def test_no_device_becomes_a_file(tmp_path):
    """A stand-in for /dev/null, which a move would replace as well."""
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match='target: expected the name of a '
                       'file, got a device or a pipe'):
        checks.check_output('target', pipe)
    with pytest.raises(FileExistsError, match='device'), \
            leave_mxnet.whole_file(pipe):
        pass
    assert pipe.is_fifo()
    (tmp_path / 'link').symlink_to('new')
    with leave_mxnet.whole_file(tmp_path / 'link') as part:
        part.write_text('whole')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'new').read_text() == 'whole'
