"""The pages to look things up: what they quote is what happens."""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import reference
import tvm

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r'```python\n(.*?)```(?:\n\n```text\n(.*?)```)?', re.DOTALL)
# A process for each, so `make test` takes every eighth
EXAMPLES = [pytest.param(*found, id=f'{page}-{i}',
                         marks=[pytest.mark.soak] if i % 8 else [])
            for page in ('troubleshooting', 'coming_from')
            for i, found in enumerate(BLOCK.findall(
                (ROOT / f'{page}.md').read_text('utf-8')))]
OFFLINE = '''\
import socket


def getaddrinfo(*args, **kwargs):
    raise socket.gaierror(-3, 'Temporary failure in name resolution')


socket.getaddrinfo = getaddrinfo
'''


@pytest.mark.parametrize(('program', 'quoted'), EXAMPLES)
def test_examples_end_as_quoted(tmp_path, program, quoted):
    if re.search(r'tvm\.cuda|bench_gpu', program) and tvm.cuda(0).exist:
        pytest.skip('there is a GPU')
    (tmp_path / 'sitecustomize.py').write_text(OFFLINE)
    environment = {
        **os.environ, 'XDG_CACHE_HOME': str(tmp_path), 'D2LTVM_DATA': '',
        'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])}
    ran = subprocess.run(
        [sys.executable, '-c', program], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert quoted and ran.stdout.strip().endswith(quoted.strip())
    assert (ran.returncode != 0) == ('Error: ' in quoted)


def quotes():
    """The quotations that stand without a program."""
    text = (ROOT / 'troubleshooting.md').read_text('utf-8')
    return re.findall(r'```text\n(.*?)\n```', BLOCK.sub('', text), re.DOTALL)


def test_other_quotations(tmp_path):
    script, package, differ = quotes()
    ran = subprocess.run(
        ['/bin/sh', ROOT / 'tools/environment.sh'], text=True, check=False,
        capture_output=True, env={'PATH': str(tmp_path)})
    assert ran.stderr.strip() == script
    ran = subprocess.run(
        [sys.executable, '-I', '-S', '-c', 'import d2ltvm'], text=True,
        cwd=tmp_path, capture_output=True, check=False)
    assert ran.stderr.strip().endswith(package)
    assert f"sys.exit('{differ}')" in (ROOT / 'tools/cut.py').read_text()


def test_reference_has_every_public_name():
    """The links of both sides are checked by the build of the book."""
    made = {path.stem for path in (ROOT / 'd2ltvm').glob('*.py')}
    assert set(reference.modules()) == made - {'__init__', '__main__'}
    for module in reference.modules():
        notebook = nbformat.read(ROOT / f'chapters/{module}.ipynb', 4)
        cells = {cell.id: cell.source for cell in notebook.cells}
        found = reference.public(module)
        assert sorted(found) == importlib.import_module(
            f'd2ltvm.{module}').__all__
        for name, cell in found.items():
            assert re.search(rf'^((def|class) )?{name}\b', cells[cell],
                             re.MULTILINE), name
    source = ['<!-- modules -->']

    class App:
        class env:
            note_dependency = staticmethod(lambda path: None)

    reference.fill(App, 'reference', source)
    for module in reference.modules():
        for name in reference.public(module):
            assert f':: d2ltvm.{module}.{name}\n' in source[0]


def test_docstrings_become_links():
    lines = ['See `batch_norm` and `X`, |x|: (eq-batch-norm).']
    reference.link(None, 'function', 'd2ltvm.from_scratch.net', None, None,
                   lines)
    assert lines == [
        'See :py:obj:`~d2ltvm.from_scratch.batch_norm` and ``X``, \\|x\\|: '
        ':eq:`eq-batch-norm`.', '',
        'Derived in :ref:`from_scratch-fn-net`.', '']
