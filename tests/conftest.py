"""What several test files share."""
import mxnet as mx
import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run; a slow machine is no failure
settings.register_profile(
    'book', deadline=None, derandomize=True, max_examples=40, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile('book')


@pytest.fixture(params=[False, True], ids=['nd', 'set_np'])
def semantics(request):
    """MXNet as it starts, and after `npx.set_np()`, as d2l wants it."""
    if request.param:
        mx.npx.set_np()
    yield request.param
    mx.npx.reset_np()
