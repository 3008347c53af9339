"""The rendered book behind a server, and one browser to look at it."""
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import pytest

BOOK = Path(__file__).resolve().parents[2] / '_build/html'


@pytest.fixture(scope='session')
def book():
    """The address of the rendered book, served to this machine alone."""
    if not (BOOK / 'index.html').exists():
        pytest.skip('the book is not rendered: run `make book` first')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0),
                                 partial(Quiet, directory=BOOK))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='session')
def chromium():
    sync_api = pytest.importorskip('playwright.sync_api')
    path = next(filter(None, map(shutil.which, (
        'chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None:
        pytest.skip('no browser: install Chromium (Debian: apt install '
                    'chromium)')
    with sync_api.sync_playwright() as playwright:
        # The pages are our own; a container has no user for the sandbox
        browser = playwright.chromium.launch(executable_path=path,
                                             args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, book):
    """Open a page in a fresh profile; at the end, nothing may have failed."""
    contexts, complaints = [], []

    def visit(page, theme='light', width=1280, at=book, **options):
        context = chromium.new_context(
            viewport={'width': width, 'height': 900}, color_scheme=theme,
            reduced_motion='reduce', **options)
        contexts.append(context)
        if options.get('java_script_enabled', True):
            context.add_init_script(f'localStorage.mode = "{theme}";'
                                    f'localStorage.theme = "{theme}"')

        def ask(route):
            complaints.append(f'asked another host: {route.request.url}')
            route.abort()

        def console(message):
            if message.type in ('error', 'warning'):
                complaints.append(f'{message.type}: {message.text}')

        own = '|'.join(map(re.escape, (urljoin(at, '/'), 'data:', 'blob:')))
        context.route(re.compile(f'^(?!{own})'), ask)
        tab = context.new_page()
        tab.on('console', console)
        tab.on('pageerror', lambda error: complaints.append(str(error)))
        tab.on('response', lambda answer: answer.ok or answer.status == 304
               or complaints.append(f'{answer.status} {answer.url}'))
        tab.goto(at + page)
        if options.get('java_script_enabled', True):
            tab.evaluate('window.MathJax?.startup?.promise?.then(() => 0)')
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
