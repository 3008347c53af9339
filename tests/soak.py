"""How much the tests try: enough in `make test`, far more in `make soak`."""
import os

SOAK = bool(os.environ.get('D2LTVM_SOAK'))


def examples(count):
    """How many random cases to try: a fifth of `count`, or tenfold."""
    return 10 * count if SOAK else max(count // 5, 3)
