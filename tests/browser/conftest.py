"""The rendered book behind a server, and how a reader visits it."""
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import firefox
import pdf
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


@pytest.fixture(scope='module')
def webgpu(chromium):
    """A browser whose WebGPU computes on the processor."""
    browser = chromium.browser_type.launch(
        executable_path=pdf.chromium(), args=[
            '--no-sandbox', '--enable-unsafe-webgpu',
            '--use-webgpu-adapter=swiftshader'])
    yield browser
    browser.close()


@pytest.fixture
def fox():
    """Firefox, where it is installed."""
    if firefox.path() is None:
        pytest.skip('no Firefox (Debian: apt install firefox-esr)')
    pytest.importorskip('websocket')
    window = firefox.Firefox()
    yield window
    window.close()


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
            # Sphinx's search looks for an id with a dot as if it were a class
            if message.type in ('error', 'warning') and not re.search(
                    r"content block not found.* #module-\w+\.", message.text):
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
