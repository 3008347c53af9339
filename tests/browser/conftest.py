"""The rendered book behind a server, and how a reader visits it."""
import re
import threading
from collections import defaultdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import chrome
import firefox
import pdf
import pytest

# The theme that the system asks for, whatever was chosen before
THEME = '''if (location.protocol !== "about:")
  localStorage.mode = localStorage.theme =
    matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
'''
BOOK = Path(__file__).resolve().parents[2] / '_build/html'


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays with one process, which then has its windows and servers.

    All pages would be one long file: each of them goes where there is time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition('::')[0]
            return nodeid if file.endswith('test_book.py') else file

    return ByFile(config, log)


@pytest.fixture(scope='session')
def book():
    """The address of the rendered book, served to this machine alone."""
    if not (BOOK / 'index.html').exists():
        pytest.skip('the book is not rendered: run `make book` first')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def end_headers(self):
            # Nothing changes while it is read
            self.send_header('Cache-Control', 'max-age=86400')
            super().end_headers()

    server = ThreadingHTTPServer(('127.0.0.1', 0),
                                 partial(Quiet, directory=BOOK))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


# One for all files here: none of them needs asyncio
chromium = pytest.fixture(scope='package')(chrome.chromium)


@pytest.fixture(scope='module')
def webgpu(chromium):
    """A browser whose WebGPU computes on the processor."""
    browser = chromium.browser_type.launch(
        executable_path=pdf.chromium(), args=[
            *chrome.ALONE, '--enable-unsafe-webgpu',
            '--use-webgpu-adapter=swiftshader'])
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def fox():
    """Firefox, where it is installed."""
    if firefox.path() is None:
        pytest.skip('no Firefox (Debian: apt install firefox-esr)')
    pytest.importorskip('websocket')
    window = firefox.Firefox()
    yield window
    window.close()


class Window:
    """A tab in a profile of its own, which keeps what fails in it."""

    def __init__(self, chromium, at, before='', **options):
        self.complaints = []
        self.context = chromium.new_context(reduced_motion='reduce',
                                            **options)
        if options.get('java_script_enabled', True):
            self.context.add_init_script(THEME + before)
        # A route would refuse too, but takes the cache from the browser
        self.own = (urljoin(at, '/'), 'data:', 'blob:', 'about:')
        self.context.on('request', self.request)
        self.tab = self.context.new_page()
        self.tab.on('console', self.console)
        self.tab.on('pageerror',
                    lambda error: self.complaints.append(str(error)))
        self.tab.on('response', lambda answer: answer.ok
                    or answer.status == 304 or self.complaints.append(
                        f'{answer.status} {answer.url}'))

    def request(self, request):
        if not request.url.startswith(self.own):
            self.complaints.append(f'asked another host: {request.url}')

    def console(self, message):
        # Sphinx's search looks for an id with a dot as if it were a class;
        # a picture shown by itself has the browser ask for the host's icon
        if message.type in ('error', 'warning') and not re.search(
                r"content block not found.* #module-\w+\.", message.text
                ) and message.location['url'] != f'{self.own[0]}favicon.ico':
            self.complaints.append(f'{message.type}: {message.text}')

    def leave(self):
        """As a fresh profile has it; what the page still says is heard."""
        self.tab.evaluate('localStorage.clear(); sessionStorage.clear()')
        self.context.clear_cookies()
        self.tab.goto('about:blank')
        self.tab.mouse.move(0, 0)


@pytest.fixture(scope='package')
def windows(chromium):
    """Those that are free, to be used again, by their options."""
    return defaultdict(list)


@pytest.fixture
def visit(chromium, book, windows):
    """Open a page; at the end, nothing may have failed.

    A window is used again, because its process has then read the scripts of
    the book, the larger part of the work. One that runs a script `before`
    those of the page, or shows another book, is closed at the end.
    """
    kept, closed = [], []

    def visit(page, theme='light', width=1280, at=book, before='',
              **options):
        free = windows[repr(sorted(options.items()))]
        if before or at != book:
            window = Window(chromium, at, before, **options)
            closed.append(window)
        else:
            window = free.pop() if free else Window(chromium, at, **options)
            kept.append((free, window))
        tab = window.tab
        tab.set_viewport_size({'width': width, 'height': 900})
        tab.emulate_media(media='null', color_scheme=theme)
        tab.goto(at + page)
        if options.get('java_script_enabled', True):
            tab.evaluate('window.MathJax?.startup?.promise?.then(() => 0)')
        return tab

    yield visit
    complaints = []
    for free, window in kept:
        window.leave()
        complaints += window.complaints
        window.complaints.clear()
        free.append(window)
    for window in closed:
        window.context.close()
        complaints += window.complaints
    assert complaints == []
