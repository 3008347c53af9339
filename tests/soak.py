"""How much the tests try: enough in `make test`, far more in `make soak`."""
import os

import pytest

SOAK = bool(os.environ.get('D2LTVM_SOAK'))


def examples(count):
    """How many random cases to try: a tenth of `count`, or tenfold."""
    return 10 * count if SOAK else max(count // 10, 2)


def later(*values):
    """A case of `parametrize` for `make soak` alone."""
    return pytest.param(*values, marks=pytest.mark.soak)
