"""Live code: an edited cell runs, for who has the token and nobody else."""
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


@pytest.fixture(scope='module')
def live(book):
    """The address of the live book, with its token."""
    if not (ROOT / '_build/thebe').exists() and not shutil.which('npm'):
        pytest.skip('no npm to fetch thebe with')
    with subprocess.Popen(
            [sys.executable, ROOT / 'tools/live.py', '--quiet'], cwd=ROOT,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONWARNINGS': 'default'}) as server:
        line = server.stdout.readline()
        address = re.search(r'http://\S+', line)
        if 'npm cannot fetch' in line:
            pytest.skip(line)
        if address is None:
            pytest.fail(line + server.stdout.read())
        yield address.group()
        server.send_signal(signal.SIGINT)  # Ctrl-C
        assert server.wait(20) == 0, server.stdout.read()


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
    ('theory', 'x = np.array([[1.0], [3.0]])\nprint(x.var(0, ddof=0) + 41)',
     '[42.]'),
    ('tvm_inference',
     'import d2ltvm\nprint(d2ltvm.batch_norm.__name__, 6 * 7)',
     'batch_norm 42')])
def test_an_edited_cell_runs(visit, live, page, code, printed):
    origin = live.split('/book/')[0]
    token = urlsplit(live).query
    tab = visit(f'chapters/{page}.html?{token}', at=f'{origin}/book/')
    before = tab.locator('.cell_output').count()
    tab.get_by_role('button', name='Make the code of this page live').click()
    tab.get_by_text('ready: change a cell').wait_for(timeout=60_000)
    assert tab.locator('.cell_output').count() >= before
    cells = tab.locator('.thebe-cell:visible')
    for index in range(2):  # the imports of the page
        cells.nth(index).get_by_role('button', name='run', exact=True).click()
    cell = cells.nth(2)
    cell.locator('.CodeMirror').click()
    tab.keyboard.press('Control+a')
    tab.keyboard.insert_text(code)
    tab.keyboard.press('Shift+Enter')
    tab.locator('.cell_output', has_text=printed).first.wait_for(
        timeout=60_000)
