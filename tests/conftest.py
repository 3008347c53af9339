"""What several test files share."""
import os
import sys

import chrome
import pytest
import quick_inspect
from hypothesis import HealthCheck, settings

from d2ltvm.mxnet_today import mx
from soak import SOAK, examples

# The same examples on every run, but for soaking; a slow machine is no failure
settings.register_profile(
    'book', deadline=None, derandomize=not SOAK, max_examples=examples(40),
    database=None, suppress_health_check=[
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile('book')

# The kernels of notebooks run it, too
os.environ['PYTHONSTARTUP'] = quick_inspect.__file__


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: takes long; for `make soak`')


def pytest_collection_modifyitems(config, items):
    """What takes long is left out."""
    long = set() if SOAK else {
        item for item in items if item.get_closest_marker('soak')}
    if long:
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=list(long))


@pytest.fixture(params=[False, True], ids=['nd', 'set_np'])
def semantics(request):
    """MXNet as it starts, and after `npx.set_np()`, as d2l wants it."""
    if request.param:
        mx.npx.set_np()
    yield request.param
    mx.npx.reset_np()


# One for each file: asyncio is blocked as long as it runs
chromium = pytest.fixture(scope='module')(chrome.chromium)


@pytest.fixture
def without_mxnet(monkeypatch):
    """As if MXNet were not installed; afterwards it is as loaded as before."""
    for name in [name for name in sys.modules if name.startswith('mxnet')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'mxnet', None)
