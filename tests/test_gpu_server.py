"""The runner for a server's GPU: everything up to the launch.

No GPU is needed. The packed folder runs by itself, with `fake/cupy.py` in
the place of CuPy, which executes the CUDA source on the processor.
"""
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_inference
import bench_training
import numpy as np
import pytest
import tvm
from d2ltvm import command_line, gpu_server
from d2ltvm.gpu_schedule import build_opencl
from d2ltvm.gpu_server import (CuPyMachine, TVMMachine, check_gpu, gpu_case,
                               gpu_report, measure_gpu, pack_gpu)
from d2ltvm.theory import batch_norm_backward, batch_norm_forward
from d2ltvm.tvm_inference import bn_error
from soak import SOAK, later

FAKE = Path(__file__).parent / 'fake'
CASES = [('inference', (2, 3, 5, 7), 'float32'),
         ('inference', (2, 3, 5, 7), 'float16'),
         ('inference', (2, 3, 8, 8), 'float16'),
         ('training', (8, 5, 13, 13), 'float32'),
         ('training', (2, 2, 64, 128), 'float32'),  # two blocks a channel
         ('training', (8, 3, 6, 8), 'float16')]
needs_compiler = pytest.mark.skipif(
    not shutil.which('g++') or platform.machine() != 'x86_64',
    reason='the stand-in for CuPy needs g++ and an x86 processor')


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('server') / 'gpu folder'
    size = pack_gpu(folder, cases=CASES)
    assert size == sum(path.stat().st_size for path in folder.rglob('*.*'))
    return folder


@pytest.fixture
def folder(packed, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(packed, tmp_path / 'copy'))


def run_alone(folder, cwd, *arguments):
    """Run the folder where there is neither the book nor TVM."""
    blocked = cwd / 'blocked'
    blocked.mkdir(exist_ok=True)
    for name in ('d2ltvm', 'torch', 'tvm'):
        (blocked / f'{name}.py').write_text(
            f'raise ImportError("{name} is not here")')
    return subprocess.run(
        [sys.executable, folder / 'run.py', '--repeat', '2', *arguments],
        cwd=cwd, capture_output=True, text=True, check=False,
        env=os.environ | {'PYTHONPATH': f'{FAKE}{os.pathsep}{blocked}'})


def test_shapes_are_those_of_the_benchmarks():
    assert {*bench_inference.SHAPES} < {*gpu_server.INFERENCE}
    assert {*bench_training.SHAPES} < {*gpu_server.TRAINING}
    assert {(kind, dtype) for kind, shape, dtype in gpu_server.gpu_cases()
            if math.prod(shape) * 4 > 100e6} == {
                (kind, dtype) for kind in ('inference', 'training')
                for dtype in ('float32', 'float16')}


def test_what_is_packed(packed):
    assert sorted(path.name for path in packed.iterdir()) == [
        'kernels', 'plan.json', 'run.py']
    plan = json.loads((packed / 'plan.json').read_text())
    assert [(case['kind'], tuple(case['shape']), case['dtype'])
            for case in plan] == CASES
    steps = [step for case in plan for steps in case['passes'].values()
             for step in steps]
    assert len(steps) == 3 + 3 * 6
    assert {f'{step["name"]}.cu' for step in steps} == {
        path.name for path in (packed / 'kernels').iterdir()}
    assert [*map(len, (plan[-2]['passes']['forward'],
                       plan[-2]['passes']['backward']))] == [3, 3]
    assert plan[-2]['passes']['forward'][0]['grid'] == [2, 2, 1]
    assert {name for name, (_, dtype) in plan[-1]['arrays'].items()
            if dtype == 'float16'} == {'X', 'Y', 'dX', 'dY'}


@needs_compiler
def test_the_folder_runs_alone(packed, tmp_path):
    ran = run_alone(packed, tmp_path, '-o', 'result.json')
    assert (ran.returncode, ran.stderr) == (0, '')
    assert ran.stdout.count('checked and measured') == len(CASES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'blocked', 'result.json']
    found = json.loads((tmp_path / 'result.json').read_text())
    assert found['gpu'] == 'the processor' and found['torch'] is None
    assert found['clock'] == gpu_server.EVENTS
    assert ran.stdout.startswith('clock: events of the GPU\n')
    assert {'driver', 'cuda', 'cupy', 'numpy', 'python'} < {*found}
    for (kind, shape, dtype), result in zip(CASES, found['results'],
                                            strict=True):
        assert result['bytes'] == math.prod(shape) * int(dtype[-2:]) // 8
        assert {*result['errors']} == {'0', '1000'}
        for errors in result['errors'].values():
            assert {*errors} == ({'out'} if kind == 'inference' else {
                'Y', 'dX', 'dgamma', 'dbeta', 'moving'})
            for name, error in errors.items():
                half = dtype == 'float16' and name in ('out', 'Y', 'dX')
                assert error < (1e-3 if half else 2e-6)
        times = result['microseconds']
        assert {*times} == {'copy', *(
            ['inference'] if kind == 'inference' else
            ['forward', 'backward', 'training'])}
        for each in times.values():
            for spread in each.values():
                assert 0 < spread['low'] <= spread['median']
                assert spread['median'] <= spread['high']
    report = gpu_report(tmp_path / 'result.json').split('\n')
    assert report[0].startswith('the processor (sm_90), by CuPy')
    assert report[1] == 'clock: events of the GPU'
    assert len(report) == 2 + 3 + 3 * 3
    assert all('no PyTorch, a copy' in line for line in report[2:])


@needs_compiler
@pytest.mark.parametrize('fault', ['source', 'arguments', 'grid'])
def test_a_wrong_program_is_found_before_anything_is_timed(
        folder, tmp_path, fault):
    plan = json.loads((folder / 'plan.json').read_text())
    step = plan[3]['passes']['backward'][2]
    if fault == 'source':
        path = folder / 'kernels' / f'{step["name"]}.cu'
        text = path.read_text()
        assert text != text.replace(' - ', ' + ')
        path.write_text(text.replace(' - ', ' + '))
    elif fault == 'arguments':
        names = step['arguments']
        first, second = names.index('X'), names.index('dY')
        names[first], names[second] = names[second], names[first]
    else:
        step['grid'][0] -= 1  # the last channel is left out
    (folder / 'plan.json').write_text(json.dumps(plan))
    ran = run_alone(folder, tmp_path)
    assert (ran.returncode, ran.stdout) == (2, 'clock: events of the GPU\n')
    assert ran.stderr.startswith(
        'RuntimeError: training, [8, 5, 13, 13], float32, offset 0: dX is '
        'wrong, relative error ') and ran.stderr.count('\n') == 1
    assert not (tmp_path / 'gpu.json').exists()


def test_another_folder(tmp_path):
    ran = run_alone(tmp_path, tmp_path)  # holds no run.py
    assert ran.returncode == 2
    (tmp_path / 'run.py').write_text(
        Path(gpu_server.__file__).read_text()
        + "\nif __name__ == '__main__':\n    sys.exit(run_packed())\n")
    ran = run_alone(tmp_path, tmp_path)
    assert ran.returncode == 2 and ran.stderr.endswith(
        'expected a folder written by `gpu --pack`, which has a file '
        'plan.json\n')
    ran = run_alone(tmp_path, tmp_path, '-o', 'none/gpu.json')
    assert ran.returncode == 2 and 'none/gpu.json: expected' in ran.stderr


def test_a_machine_without_cupy_or_gpu(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cupy', None)
    with pytest.raises(ModuleNotFoundError, match='reached by CuPy, which'):
        CuPyMachine(packed)
    monkeypatch.setitem(sys.modules, 'cupy', SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False)))
    with pytest.raises(RuntimeError, match='no NVIDIA GPU: CuPy finds none'):
        CuPyMachine(packed)


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, in this process."""
    monkeypatch.delitem(sys.modules, 'cupy', raising=False)
    monkeypatch.syspath_prepend(FAKE)
    import cupy
    yield cupy
    del sys.modules['cupy']


@pytest.mark.parametrize(('key', 'value', 'message'), [
    ('grid', [1, 65536, 1], 'too large a grid'),
    ('grid', [2 ** 31, 1, 1], 'too large a grid'),
    ('block', [1024, 2, 1], 'too large a block'),
    ('block', [1, 1, 65], 'too large a block')])
def test_too_large_a_launch(cupy, packed, key, value, message):
    machine = CuPyMachine(packed)
    case = machine.cases[0]
    step = case['passes']['inference'][0]
    step[key] = value
    with pytest.raises(ValueError, match=f'{step["name"]}: {message}'):
        check_gpu(case, machine)


@needs_compiler
def test_too_little_memory_leaves_out_a_case(cupy, packed, monkeypatch):
    def asarray(array):
        if array.shape == (2, 3, 5, 7) and array.dtype == 'float32':
            raise MemoryError('Out of memory allocating 840 bytes')
        return np.array(array)

    monkeypatch.setattr(cupy, 'asarray', asarray)
    machine, said = CuPyMachine(packed), []
    machine.cases = machine.cases[:2]
    first, second = measure_gpu(machine, 1, said.append)['results']
    assert first['left out'] == ('too little memory: Out of memory '
                                 'allocating 840 bytes')
    assert 'microseconds' not in first and 'microseconds' in second
    assert [line.split(': ')[1] for line in said] == [
        gpu_server.EVENTS, 'too little memory', 'checked and measured']


class NoEvent:
    """An event of a runtime that has none."""

    def __init__(self):
        raise RuntimeError('operation not supported')


class EmptyEvent:
    """An event of a device that does not keep the time."""

    def record(self):
        pass

    synchronize = record


@needs_compiler
@pytest.mark.parametrize(('event', 'why'), [
    (NoEvent, 'RuntimeError: operation not supported'),
    (EmptyEvent, 'they say 0 s'), (None, 'AttributeError: ')])
def test_events_that_do_not_work(cupy, packed, monkeypatch, tmp_path, event,
                                 why):
    """Another clock is read, and the result says so."""
    if event is None:
        monkeypatch.delattr(cupy.cuda, 'Event')
    else:
        monkeypatch.setattr(cupy.cuda, 'Event', event)
        monkeypatch.setattr(cupy.cuda, 'get_elapsed_time',
                            lambda begin, end: 0.0)
    machine, said = CuPyMachine(packed), []
    machine.cases = machine.cases[:1]
    found = measure_gpu(machine, 3, said.append)
    assert found['clock'] == machine.clock and machine.clock.startswith(
        f"this computer's, launches included; no events of the GPU: {why}")
    assert said[0] == f'clock: {machine.clock}'
    for times in found['results'][0]['microseconds'].values():
        assert all(each['low'] > 0 for each in times.values())
    path = tmp_path / 'gpu.json'
    path.write_text(json.dumps(found))
    assert gpu_report(path).split('\n')[1] == f'clock: {machine.clock}'


@needs_compiler
def test_events_that_fail_later_are_an_error(cupy, packed, monkeypatch):
    machine = CuPyMachine(packed)
    machine.cases = machine.cases[:1]
    monkeypatch.setattr(cupy.cuda, 'get_elapsed_time',
                        lambda begin, end: -1.0)
    with pytest.raises(RuntimeError, match=r'^clock: events of the GPU say '
                       r'that a call takes -0\.001 s'):
        measure_gpu(machine, 3, lambda line: None)


def test_source_that_the_compiler_refuses(cupy, packed, monkeypatch):
    class CompileException(Exception):
        """CuPy's has no other base, either."""

    def module(**given):
        raise CompileException('error: identifier "half8" is undefined')

    monkeypatch.setattr(cupy, 'RawModule', module)
    machine = CuPyMachine(packed)
    name = machine.cases[0]['passes']['inference'][0]['name']
    with pytest.raises(RuntimeError, match=f'^{name}: CompileException: err'):
        check_gpu(machine.cases[0], machine)


def test_a_damaged_plan(folder, tmp_path):
    (folder / 'plan.json').write_text('[{')
    ran = run_alone(folder, tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith(
        f'ValueError: {folder}: its plan.json is damaged: ')
    assert ran.stderr.count('\n') == 1


def test_a_compiled_file_is_taken_if_there_is_one(cupy, folder, monkeypatch):
    machine, taken = CuPyMachine(folder), []

    def module(code=None, path=None):
        taken.append(path)
        return SimpleNamespace(get_function=lambda name: None)

    monkeypatch.setattr(cupy, 'RawModule', module)
    step = machine.cases[0]['passes']['inference'][0]
    arrays = dict.fromkeys(step['arguments'])
    for arch in ('sm_80', 'sm_90'):  # the stand-in is an sm_90
        path = folder / 'kernels' / f'{step["name"]}.{arch}.cubin'
        path.touch()
        machine.prepare(step, arrays)
    assert taken == [None, str(path)]


@pytest.mark.skipif(not shutil.which('nvcc'), reason='there is no nvcc')
def test_nvcc_compiles_the_source_behind_our_prologue(tmp_path):
    archs, cases, count = (
        (('sm_75', 'sm_80', 'sm_90', 'sm_100'), CASES[1:6:2], 13)
        if SOAK else (('sm_90',), CASES[1:2], 1))
    pack_gpu(tmp_path / 'made', archs, cases)
    kernels = tmp_path / 'made/kernels'
    assert len([*kernels.glob('*.cu')]) == count
    for arch in archs:
        made = [*kernels.glob(f'*.{arch}.cubin')]
        assert len(made) == count
        assert all(path.read_bytes()[:4] == b'\x7fELF' for path in made)
    with pytest.raises(RuntimeError, match='archs: nvcc refuses'):
        pack_gpu(tmp_path / 'wrong', ['sm_1'], CASES[:1])
    assert [*tmp_path.iterdir()] == [tmp_path / 'made']


def test_what_is_not_packed(tmp_path, monkeypatch):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/file').touch()
    for path in (tmp_path / 'full', tmp_path / 'full/file'):
        with pytest.raises(FileExistsError, match='or an empty folder'):
            pack_gpu(path)
    with pytest.raises(FileNotFoundError, match='no folder to put it in'):
        pack_gpu(tmp_path / 'none/folder')
    with pytest.raises(ValueError, match='shape: expected'):
        pack_gpu(tmp_path / 'new', cases=[
            ('training', (2 ** 10, 2 ** 10, 2 ** 10, 1), 'float32')])
    with pytest.raises(ValueError, match='cases: expected one at least'):
        pack_gpu(tmp_path / 'new', cases=[])
    with pytest.raises(TypeError, match='archs: expected a list of names'):
        pack_gpu(tmp_path / 'new', 'sm_90')
    monkeypatch.setenv('PATH', '')
    with pytest.raises(FileNotFoundError, match='archs: nvcc is not'):
        pack_gpu(tmp_path / 'new', ['sm_90'])
    assert [*tmp_path.iterdir()] == [tmp_path / 'full']


def test_an_empty_folder_is_filled(tmp_path):
    pack_gpu(tmp_path, cases=CASES[:1])
    assert len([*tmp_path.iterdir()]) == 3


@pytest.mark.parametrize(('case', 'message'), [
    (('other', (2, 3, 4, 4), 'float32'), "^kind: expected 'inference' or"),
    (('training', (2, 3, 4, 4), 'float64'), '^dtype: expected one of'),
    (('inference', (2, 3, 4, 4), 'float64'), '^dtype: expected one of'),
    (('training', (2, 3, 4), 'float32'), '^shape: expected')])
def test_a_wrong_case(case, message):
    with pytest.raises(ValueError, match=message):
        gpu_case(*case, lambda name, program: name)


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('kind', ['inference', 'training'])
def test_the_exact_values_are_those_of_the_book(kind, dtype):
    case = {'kind': kind, 'shape': (4, 3, 5, 6), 'dtype': dtype}
    given = gpu_server._inputs(case, 3)
    exact = gpu_server._exact(given)
    x = given['X'].astype('float64')
    gamma, beta = (given[name].astype('float64') for name in ('gamma',
                                                              'beta'))
    if kind == 'inference':
        each = [given[name].reshape(-1, 1, 1) for name in (
            'mean', 'var', 'gamma', 'beta')]
        y, terms = exact['out']
        assert bn_error(y, given['X'], *each) < 1e-12
        wrong = y + 1e-3 * terms
        assert bn_error(wrong, given['X'], *each) == pytest.approx(1e-3)
        return
    Y, cache = batch_norm_forward(x, gamma, beta, gpu_server.EPS)
    dX, dgamma, dbeta = batch_norm_backward(
        given['dY'].astype('float64'), cache)
    for name, value in (('Y', Y), ('dX', dX), ('dgamma', dgamma),
                        ('dbeta', dbeta)):
        np.testing.assert_allclose(exact[name][0].reshape(value.shape),
                                   value, atol=1e-12)
    np.testing.assert_allclose(exact['moving'][0].reshape(2, 3), [
        0.1 * x.mean((0, 2, 3)), 0.9 + 0.1 * x.var((0, 2, 3))])


class Processor(TVMMachine):
    """TVM's processor, where OpenCL stands in for what CUDA compiles."""

    def __init__(self, cases):
        super().__init__(tvm.cpu(0))
        self.cases = [gpu_case(*case, lambda name, program: program)
                      for case in cases]
        self.tvm = SimpleNamespace(**vars(tvm) | {'compile': self.compile})

    def compile(self, mod, target):
        assert target.kind.name == 'cuda'
        program = build_opencl(mod)

        def run(*tensors):
            arrays = [tensor.numpy() for tensor in tensors]
            program(*arrays)
            for tensor, array in zip(tensors, arrays, strict=True):
                tensor.copyfrom(array)
        return {'main': run}


def test_the_way_through_tvm(monkeypatch):
    monkeypatch.setattr(gpu_server, 'FLUSH', 1024)
    machine = Processor([CASES[0], *(
        [CASES[3], CASES[5]] if SOAK else
        [('training', (2, 2, 4, 4), 'float32')])])
    found = measure_gpu(machine, 3, lambda line: None)
    assert found['way'] == 'TVM' and found['repeat'] == 3
    assert found['clock'] == gpu_server.EVENTS
    for result in found['results']:
        assert max(error for errors in result['errors'].values()
                   for error in errors.values()) < (
                       2e-6 if result['dtype'] == 'float32' else 1e-3)
        assert all(each['median'] > 0 for times in result[
            'microseconds'].values() for each in times.values())
    calls = []
    assert len(machine.seconds(lambda: calls.append(1), 5)) == 5
    assert len(calls) == 6  # the first is not timed
    source, target = machine.put(np.arange(3)), machine.put(np.zeros(3, int))
    machine.copy(source, target)
    assert machine.get(target).tolist() == [0, 1, 2]


def test_a_tvm_without_its_timer(monkeypatch):
    from tvm.runtime import _ffi_api
    monkeypatch.setattr(gpu_server, 'FLUSH', 1024)
    monkeypatch.delattr(_ffi_api, 'RPCTimeEvaluator')
    found = measure_gpu(Processor(CASES[:1]), 3, lambda line: None)
    assert 'no events of the GPU: AttributeError' in found['clock']
    assert all(each['low'] > 0 for times in found['results'][0][
        'microseconds'].values() for each in times.values())


@pytest.mark.parametrize(('shape', 'dtype'), [
    ((1, 3, 1, 1), 'float32'), later((2, 1, 1, 3), 'float16'),
    later((1, 1, 1, 1), 'float32'), later((2, 1, 1, 3), 'float32'),
    later((1, 3, 1, 1), 'float16'), later((1, 1, 1, 1), 'float16')])
def test_one_value_a_channel_is_no_false_alarm(shape, dtype, monkeypatch):
    """The exact gradient of X is 0 there, and no error is relative to it."""
    monkeypatch.setattr(gpu_server, 'FLUSH', 1024)
    machine = Processor([('training', shape, dtype)])
    for offset in (0, 1000):
        errors = check_gpu(machine.cases[0], machine, offset)
        assert all(map(math.isfinite, errors.values()))


@pytest.mark.parametrize('repeat', [0, -1, 1.5, '3', None])
def test_repeat_is_a_count(repeat, monkeypatch):
    monkeypatch.setattr(gpu_server, 'FLUSH', 1024)
    with pytest.raises(ValueError, match='repeat: expected at least 1'):
        measure_gpu(Processor([]), repeat)


def test_a_race_against_pytorch_on_the_same_arrays():
    torch = pytest.importorskip('torch')
    for kind, shape, dtype in (CASES[0], CASES[3], CASES[5]):
        case = gpu_case(kind, shape, dtype, lambda name, program: name)
        given = gpu_server._inputs(case, 0)
        arrays = gpu_server._placed(case, given,
                                    SimpleNamespace(put=np.array))
        exact = gpu_server._exact(given)
        passes = gpu_server._passes_of_torch(torch, case, arrays)
        y, _ = exact['out' if kind == 'inference' else 'Y']
        for calls in passes.values():
            assert len(calls) == 3
            for name, call in calls.items():
                if not name.startswith('cuDNN'):  # needs a GPU
                    with torch.no_grad():
                        np.testing.assert_allclose(
                            call().numpy(), y, atol=1e-5, rtol=0 if
                            dtype == 'float32' else 2 ** -10)


def test_a_peer_that_fails_is_noted(monkeypatch):
    machine = SimpleNamespace(seconds=lambda call, repeat: [1.0] * repeat,
                              clock='a clock')
    exact = np.ones(3, 'float32')

    def tensor(array):
        return SimpleNamespace(cpu=lambda: SimpleNamespace(
            numpy=lambda: array))

    def refuses():
        raise RuntimeError('not on this card')

    assert gpu_server._peer(lambda: tensor(exact), exact, machine, 2) == {
        'median': 1e6, 'low': 1e6, 'high': 1e6}
    for wrong in (2 * exact, np.nan * exact):
        assert gpu_server._peer(lambda wrong=wrong: tensor(wrong), exact,
                                machine, 2).startswith('another result')
    assert gpu_server._peer(refuses, exact, machine, 2) == (
        'RuntimeError: not on this card')


def test_report(tmp_path):
    path = tmp_path / 'gpu.json'
    assert gpu_report(path).startswith('Not measured: there is no gpu.json')
    for text in ('', '[]', '{}', '{"results": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match='expected what `gpu` writes'):
            gpu_report(path)
    spread = {'median': 20.0, 'low': 19.0, 'high': 21.0}
    path.write_text(json.dumps({
        'gpu': 'A card', 'arch': 'sm_90', 'way': 'CuPy', 'torch': '2.13.0',
        'clock': gpu_server.EVENTS,
        'repeat': 60, 'results': [
            {'kind': 'inference', 'shape': [1, 8, 28, 28],
             'dtype': 'float32', 'microseconds': {
                 'copy': {'the device': spread | {'median': 17.5}},
                 'inference': {'the book': spread, 'slow': {'median': 40.0},
                               'quick': {'median': 30.0},
                               'none': 'RuntimeError: no'}}},
            {'kind': 'training', 'shape': [9, 9, 9, 9], 'dtype': 'float32',
             'left out': 'too little memory'}]}))
    first, clock, second, third = gpu_report(path).split('\n')
    assert clock == 'clock: events of the GPU'
    assert first == ('A card (sm_90), by CuPy, PyTorch 2.13.0, medians of '
                     '60')
    assert second.split() == ('inference 1x8x28x28 float32 20.0 us, PyTorch '
                              '30.0, a copy 17.5').split()
    assert third.endswith('too little memory')


def test_the_command_packs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_server, 'INFERENCE', CASES[0][1:2])
    monkeypatch.setattr(gpu_server, 'TRAINING', ())
    folder = tmp_path / 'made'
    assert command_line.main(['gpu', '--pack', str(folder)]) == 0
    assert (folder / 'run.py').exists()
    assert f'written to {folder}' in capsys.readouterr().out
    assert command_line.main(['gpu', '--pack', str(folder)]) == 2
    assert capsys.readouterr().err == (
        f'd2ltvm gpu: {folder}: expected a new or an empty folder\n')
    link = tmp_path / 'link'
    for goal in 'nowhere', 'link':
        link.symlink_to(tmp_path / goal)
        assert command_line.main(['gpu', '--pack', str(link)]) == 2
        assert f'{link}: expected a new or' in capsys.readouterr().err
        link.unlink()


@pytest.mark.skipif(tvm.cuda(0).exist, reason='there is a GPU')
def test_the_command_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'cupy', None)
    output = tmp_path / 'gpu.json'
    assert command_line.main(['gpu', '-o', str(output)]) == 2
    assert capsys.readouterr().err.startswith(
        'd2ltvm gpu: the GPU is reached by CuPy, which is not installed')
    monkeypatch.setitem(sys.modules, 'cupy', SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: False)))
    assert command_line.main(['gpu', '-o', str(output)]) == 2
    assert capsys.readouterr().err == (
        'd2ltvm gpu: no NVIDIA GPU: CuPy finds none\n')
    assert command_line.main(['gpu', '-o', str(tmp_path)]) == 2
    assert 'expected a file in a folder' in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='TVM finds none'):
        TVMMachine()
    assert not [*tmp_path.iterdir()]
