"""The commands of the package, as a shell sees them."""
import io
import itertools
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from d2ltvm import command_line, conventions
from d2ltvm.command_line import main
from d2ltvm.mxnet_today import gluon, nd
from onnx import numpy_helper, parser
from safetensors.numpy import load_file, save_file


def run(*arguments, cwd=None):
    return subprocess.run([sys.executable, '-m', 'd2ltvm', *arguments],
                          cwd=cwd, text=True, capture_output=True,
                          check=False)


@pytest.fixture
def model(tmp_path):
    """A file with a convolution and a normalization."""
    made = parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 8, 8] X) => (float[N, 4, 6, 6] Y) {
        A = Conv (X, W)
        Y = BatchNormalization (A, gamma, beta, mean, var) }''')
    for name in ('W', 'gamma', 'beta', 'mean', 'var'):
        made.graph.initializer.append(numpy_helper.from_array(
            np.ones((4, 3, 3, 3) if name == 'W' else 4, 'float32'), name))
    onnx.save(made, tmp_path / 'in.onnx')
    return tmp_path


def test_help_names_the_commands():
    ran = run('--help')
    assert ran.returncode == 0 and ran.stderr == ''
    assert all(f'\n    {name} ' in ran.stdout
               for name in ('fold', 'params', 'convert', 'gpu'))


@pytest.mark.parametrize(('name', 'words'), [
    ('fold', ['--dim NAME=LENGTH', '--copy-shared']),
    ('params', ['--output FILE', '--shape N,3,224,224', '--list']),
    ('convert', ['--from', '--to', '--count M', '--momentum']),
    ('gpu', ['--output FILE', '--repeat', '--pack FOLDER', '--arch sm_90'])])
def test_help_of_a_command(name, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([name, '--help'])
    said = capsys.readouterr()
    assert exit_.value.code == 0 and said.err == ''
    assert all(word in said.out for word in words)


def test_fold(model):
    ran = run('fold', 'in.onnx', 'out.onnx', cwd=model)
    assert (ran.returncode, ran.stderr) == (0, '')
    assert 'folded into Conv A\n1 of 1 folded; ' in ran.stdout
    ran = run('fold', 'out.onnx', 'again.onnx', cwd=model)
    assert (ran.returncode, ran.stdout, ran.stderr) == (
        1, '0 of 0 folded; nothing is written\n', '')
    assert sorted(path.name for path in model.iterdir()) == [
        'in.onnx', 'out.onnx']


def test_a_bar_after_two_seconds(model, monkeypatch, capsys):
    """Only on a terminal, and it goes when the work is done."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    command = ['fold', str(model / 'in.onnx'), str(model / 'out.onnx')]
    clock = itertools.count(step=0.01)
    monkeypatch.setattr(command_line.time, 'monotonic', lambda: next(clock))
    for step, seen in ((0.01, False), (3, True)):
        clock = itertools.count(step=step)
        monkeypatch.setattr(sys, 'stderr', Terminal())
        assert main(command) == 0
        shown = sys.stderr.getvalue()
        for what in ('folding', 'writing', 'checking'):
            assert (what in shown) == seen
        assert shown.rpartition('\r')[2].strip() == ''
    monkeypatch.setitem(sys.modules, 'tqdm', None)
    assert main(command) == 0
    assert sys.stderr.getvalue() == shown
    monkeypatch.undo()
    assert main(command) == 0  # no terminal
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize(('arguments', 'message'), [
    (['fold', 'none.onnx', 'x.onnx'], 'none.onnx'),
    (['fold', 'in.onnx', 'in.onnx'], 'another file than the one that'),
    (['fold', 'in.onnx', 'nowhere/x.onnx'], 'nowhere'),
    (['fold', 'in.onnx', 'x.onnx', '--dim', 'M=3'], "of axes, ['N'], got"),
    (['params', 'in.onnx'], "expected MXNet's mark"),
    (['params', 'nobody\x1b[31m'], 'nobody\\x1b[31m'),
    (['gpu', '--arch', 'sm_90'], 'expected --pack FOLDER with --arch'),
    (['gpu', '--pack', ''], 'expected a new or an empty folder'),
    (['convert', 'in.onnx', '--from', 'pytorch', '--to', 'flax', '-o', 'x'],
     'expected .npz or .safetensors')])
def test_a_refusal_is_one_line(model, arguments, message):
    ran = run(*arguments, cwd=model)
    assert ran.returncode == 2 and ran.stdout == ''
    line, = ran.stderr.splitlines()
    assert line.startswith(f'd2ltvm {arguments[0]}: ') and message in line
    assert [path.name for path in model.iterdir()] == ['in.onnx']


@pytest.mark.parametrize('arguments', [
    [], ['unknown'], ['fold', 'a'], ['fold', 'a', 'b', '--dim', 'N'],
    ['fold', 'a', 'b', '--dim', 'N=0'],
    *(['params', 'a', 'b', '-o', 'c.onnx', '--shape', shape]
      for shape in ('N,-1', '', 'N,,3', '0,3')),
    ['convert', 'a', '-o', 'b', '--from', 'pytorch', '--to', 'torch']])
def test_wrong_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith('usage: d2ltvm')


def test_params(tmp_path, capsys):
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(4, 3, in_channels=2),
            gluon.nn.BatchNorm(scale=False, in_channels=4, epsilon=0.25))
    net.initialize()
    net[1].gamma.set_data(nd.full(4, 7))
    net.hybridize()
    net(nd.ones((1, 2, 5, 5)))
    net.export(str(tmp_path / 'net'))
    files = [str(tmp_path / 'net-0000.params'),
             str(tmp_path / 'net-symbol.json')]
    assert main(['params', files[0]]) == 0
    listed = capsys.readouterr().out
    assert 'gamma float32 (4,)\n' in listed and 'epsilon' not in listed
    for source in files:  # by another name, it would be replaced
        link = tmp_path / 'link.npz'
        link.symlink_to(source)
        assert main(['params', *files, '-o', str(link)]) == 2
        assert 'another file than the one' in capsys.readouterr().err
        link.unlink()
    for ending, load in (('npz', np.load), ('safetensors', load_file)):
        output = tmp_path / f'out.{ending}'
        assert main(['params', *files, '-o', str(output)]) == 0
        assert ': epsilon 0.25\n' in capsys.readouterr().out
        gamma, = (value for name, value in load(output).items()
                  if name.endswith('gamma'))
        assert (gamma == 1).all()
    facts = conventions.read_facts(output)
    assert {name.rpartition('_')[2]: value for name, value in facts.items()
            } == {'epsilon': '0.25', 'gamma': 'True'}
    again = tmp_path / 'again.safetensors'
    assert main(['convert', '--from', 'gluon', '--to', 'keras', str(output),
                 '-o', str(again)]) == 0
    assert ': epsilon 0.25, gamma is 1 and not trained\n' in (
        capsys.readouterr().out)
    assert conventions.read_facts(again) == facts
    output = tmp_path / 'out.onnx'
    assert main(['params', *files, '-o', str(output)]) == 2
    assert '--shape' in capsys.readouterr().err and not output.exists()
    assert main(['params', *files, '-o', str(output), '--shape',
                 'N,2,5,5']) == 0
    assert [node.op_type for node in onnx.load(output).graph.node] == [
        'Conv', 'BatchNormalization']


@pytest.mark.parametrize('ending', ['npz', 'safetensors'])
def test_convert_all_layers_of_a_file(tmp_path, ending):
    rng = np.random.default_rng(1)
    state = {f'{layer}.{name}': rng.uniform(1, 2, size=3).astype('float32')
             for layer in ('0', 'features.bn1')
             for name in ('weight', 'bias', 'running_mean', 'running_var')}
    state['other.weight'] = np.ones((2, 2), 'float32')
    path = tmp_path / f'in.{ending}'
    (np.savez if ending == 'npz' else lambda file, **arrays: save_file(
        arrays, file))(path, **state)
    output = tmp_path / 'out.npz'
    assert main(['convert', '--from', 'pytorch', '--to', 'gluon',
                 '--count', '10', str(path), '-o', str(output)]) == 0
    with np.load(output) as found:
        assert set(found) == set(state)
        for name, value in state.items():
            factor = 0.9 if name.endswith('running_var') else 1
            np.testing.assert_allclose(found[name], factor * value, 1e-6)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('a.pt', b'', r'got .a\.pt., which can run code'),
    ('a.npz', b'', 'damaged'), ('a.npz', b'PK\x03\x04', 'damaged'),
    ('a.safetensors', b'\xff' * 20, 'damaged')])
def test_a_file_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        conventions.convert_file(path, tmp_path / 'out.npz', 'gluon', 'flax')
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize('dtype', ['BF16', 'F8_E4M3'])
def test_numbers_that_numpy_lacks(tmp_path, dtype):
    path, size = tmp_path / 'a.safetensors', 2 if dtype == 'BF16' else 1
    head = json.dumps({f'running_{name}': {
        'dtype': dtype, 'shape': [1],
        'data_offsets': [i * size, (i + 1) * size]}
        for i, name in enumerate(('mean', 'var'))}).encode()
    path.write_bytes(len(head).to_bytes(8, 'little') + head + bytes(2 * size))
    with pytest.raises(ValueError, match=r'a\.safetensors: |got bfloat16|f8'):
        conventions.convert_file(path, tmp_path / 'out.npz', 'gluon', 'flax')


def test_the_file_that_is_read_is_not_written(tmp_path):
    path = tmp_path / 'in.npz'
    np.savez(path, running_var=np.ones(3), running_mean=np.ones(3))
    with pytest.raises(ValueError, match='output: expected another file'):
        conventions.convert_file(path, path, 'gluon', 'flax')


def test_objects_and_files_without_a_layer_are_refused(tmp_path):
    path, output = tmp_path / 'in.npz', tmp_path / 'out.npz'
    np.savez(path, running_var=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match='objects in place of numbers'):
        conventions.convert_file(path, output, 'gluon', 'flax')
    np.savez(path, weight=np.ones(3), variance_of_it=np.ones(3))
    with pytest.raises(ValueError, match='expected a variance, called'):
        conventions.convert_file(path, output, 'gluon', 'flax')
    np.savez(path, **{'a.running_var': np.ones(3)})
    with pytest.raises(ValueError, match=r'^a\.: arrays: expected one of'):
        conventions.convert_file(path, output, 'gluon', 'flax')


def test_tools_need_neither_mxnet_nor_tvm():
    program = '''
import sys
sys.modules['mxnet'] = sys.modules['tvm'] = None
from d2ltvm.command_line import main
try:
    main(['fold', '--help'])
except SystemExit as error:
    import d2ltvm.fold_onnx
    print(error.code)'''
    ran = subprocess.run([sys.executable, '-c', program], check=True,
                         capture_output=True, text=True)
    assert ran.stdout.endswith('\n0\n')
