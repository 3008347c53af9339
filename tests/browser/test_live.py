"""Live code: an edited cell runs, for who has the token and nobody else."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def running():
    """A live book: process and address. Whatever happens here, it ends."""
    if not (ROOT / '_build/thebe').exists() and not shutil.which('npm'):
        pytest.skip('no npm to fetch thebe with')
    # As a shell starts what runs in the background: Ctrl-C is ignored
    with subprocess.Popen(
            ['/bin/sh', '-c', 'trap "" INT; exec "$@"', 'sh', sys.executable,
             ROOT / 'tools/live.py', '--quiet'], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONWARNINGS': 'default'}) as server:
        try:
            line = server.stdout.readline()
            while "Warning: " in line or line.startswith(" "):
                line = server.stdout.readline()  # of Jupyter, about itself
            if 'npm cannot fetch' in line:
                pytest.skip(line)
            address = re.match(r'The live book: (http://\S+)', line)
            if not address:
                server.terminate()  # so that all of its words can be read
                pytest.fail(line + server.stdout.read())
            yield server, address[1]
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                raise


def children(pid):
    """The processes that a process has started and that still run."""
    found = set()
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(')')[2].split()[:2]
            if int(parent) == pid and state != 'Z':
                found.add(path.parent)
    return found


def assert_it_ends(server, address, number):
    """A signal ends the server and its kernels."""
    parts = urlsplit(address)
    ask = urllib.request.Request(
        f'{parts.scheme}://{parts.netloc}/api/kernels', data=b'{}',
        headers={'Authorization': parts.query.replace('=', ' ')})
    with urllib.request.urlopen(ask) as answer:
        assert answer.status == 201
    kernels = children(server.pid)
    assert kernels
    server.send_signal(number)
    assert server.wait(60) == 0
    for kernel in kernels:
        assert not kernel.exists()


@pytest.fixture(scope='module')
def live(book):
    """The address of the live book, with its token; SIGTERM ends it."""
    with running() as (server, address):
        yield address
        assert_it_ends(server, address, signal.SIGTERM)


def test_a_signal_ends_the_server_and_its_kernels():
    with running() as (server, address):
        assert_it_ends(server, address, signal.SIGINT)


def test_nobody_without_the_token_gets_in(live):
    parts = urlsplit(live)
    assert parts.hostname == '127.0.0.1' and len(parts.query) > 40
    origin = f'{parts.scheme}://{parts.netloc}'
    for path in ('/api/kernels', '/api/contents', '/book/intro.html'):
        try:
            with urllib.request.urlopen(origin + path) as answer:
                assert 'login' in answer.url
        except urllib.error.HTTPError as error:
            assert error.code == 403
            error.close()


@pytest.mark.parametrize(('page', 'code', 'printed'), [
    pytest.param(
        'theory', 'import numpy as np\nx = np.array([[1.0], [3.0]])\n'
        'print(x.var(0, ddof=0) + 41)', '[42.]', marks=pytest.mark.soak),
    ('tvm_inference',
     'import d2ltvm\nprint(d2ltvm.batch_norm.__name__, 6 * 7)',
     'batch_norm 42')])
def test_an_edited_cell_runs(visit, live, page, code, printed):
    origin = live.split('/book/')[0]
    token = urlsplit(live).query
    tab = visit(f'chapters/{page}.html?{token}', at=f'{origin}/book/')
    before = tab.locator('.cell_output').count()
    assert tab.locator('.live-bar').count() == 1  # this one runs all cells
    tab.get_by_role('button', name='Make the code of this page live').click()
    tab.get_by_text('ready: change a cell').wait_for(timeout=60_000)
    assert tab.locator('.cell_output').count() >= before
    cells = tab.locator('.thebe-cell:visible')
    cells.first.get_by_role('button', name='run', exact=True).click()
    cell = cells.nth(1)
    cell.locator('.CodeMirror').click()
    tab.keyboard.press('Control+a')
    tab.keyboard.insert_text(code)
    tab.keyboard.press('Shift+Enter')
    tab.locator('.cell_output', has_text=printed).first.wait_for(
        timeout=60_000)
