"""The package as it is imported."""
import subprocess
import sys

import pytest

HEAVY = {'d2l', 'matplotlib', 'mxnet', 'tvm'}


@pytest.mark.parametrize(('program', 'loaded'), [
    ('import d2ltvm', set()),
    ('import d2ltvm.mnist', set()),
    ('from d2ltvm import get_bn_data; get_bn_data(2, 3)', {'tvm'}),
    ('import d2ltvm.theory', set()),
    ('import d2ltvm.from_scratch', {'mxnet'}),
    ('import d2ltvm.moving_statistics', {'mxnet'}),
    ('import d2ltvm.gluon_module', {'d2l', 'matplotlib', 'mxnet'})])
def test_nothing_is_loaded_before_it_is_needed(program, loaded):
    ran = subprocess.run(
        [sys.executable, '-c', f'{program}; import sys; '
         f'print(*({HEAVY} & set(sys.modules)))'],
        check=True, capture_output=True, text=True)
    assert set(ran.stdout.split()) == loaded
