"""The set-up says in one sentence why it cannot go on."""
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / 'tools/environment.sh'
# Programs that claim to be Python: they answer the script's questions in turn
OTHER_VERSION = 'exit 1'
NO_WHEEL = 'case "$2" in *libc*) exit 1;; *) exit 0;; esac'
NO_VENV = '[ "$1" = -c ]'


@pytest.mark.parametrize(('answers', 'expected'), [
    (OTHER_VERSION, 'Python 3.11 is needed'),
    (NO_WHEEL, 'no common wheel for this machine'),
    (NO_VENV, 'python3.11-venv')])
def test_one_clear_sentence(tmp_path, answers, expected):
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('python3.11', 'python3', 'python'):
        (programs / name).write_text(f'#!/bin/sh\n{answers}\n')
        (programs / name).chmod(0o755)
    for name in ('cat', 'rm', 'uname'):
        (programs / name).symlink_to(f'/bin/{name}')
    ran = subprocess.run(['/bin/sh', SCRIPT], cwd=tmp_path, text=True,
                         capture_output=True, check=False,
                         env={**os.environ, 'PATH': str(programs),
                              'PYTHON': ''})
    assert ran.returncode == 1 and ran.stdout == ''
    assert ran.stderr.startswith('error: ') and expected in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / '.venv').exists()
