"""What several test files share."""
import sys

import pdf
import pytest
from hypothesis import HealthCheck, settings
from playwright.sync_api import sync_playwright

from d2ltvm.mxnet_today import mx
from soak import SOAK, examples

# The same examples on every run, but for soaking; a slow machine is no failure
settings.register_profile(
    'book', deadline=None, derandomize=not SOAK, max_examples=examples(40),
    database=None, suppress_health_check=[
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile('book')


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: takes long; for `make soak`')


def pytest_collection_modifyitems(config, items):
    """What takes long is left out."""
    long = [] if SOAK else [
        item for item in items if item.get_closest_marker('soak')]
    if long:
        items[:] = [item for item in items if item not in set(long)]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(params=[False, True], ids=['nd', 'set_np'])
def semantics(request):
    """MXNet as it starts, and after `npx.set_np()`, as d2l wants it."""
    if request.param:
        mx.npx.set_np()
    yield request.param
    mx.npx.reset_np()


@pytest.fixture(scope='module')  # asyncio is blocked as long as it runs
def chromium():
    """A browser without a window, the one of this machine."""
    path = pdf.chromium()
    if path is None:
        pytest.skip('no browser: install Chromium (Debian: apt install '
                    'chromium)')
    with sync_playwright() as playwright:
        # The pages are our own; a container has no user for the sandbox
        browser = playwright.chromium.launch(executable_path=path,
                                             args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def without_mxnet(monkeypatch):
    """As if MXNet were not installed; afterwards it is as loaded as before."""
    for name in [name for name in sys.modules if name.startswith('mxnet')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'mxnet', None)
