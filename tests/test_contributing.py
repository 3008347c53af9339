"""What the project tells people who carry it on works as written."""
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'CONTRIBUTING.md').read_text('utf-8')
COMMANDS = [line for block in re.findall(r'```sh\n(.*?)```', TEXT, re.DOTALL)
            for line in block.splitlines()]
MAKEFILE = (ROOT / 'Makefile').read_text()
TARGETS = re.search(r'^\.PHONY: (book .*)', MAKEFILE, re.MULTILINE)[1].split()
SLOW = {'make lab', 'make lock', 'make notebooks'}
# `make test` does the same without a copy of the project
LONG = {'make check', '.venv/bin/python -m pytest tests/test_notebooks.py',
        '.venv/bin/python tools/execute.py chapters/mnist.ipynb'}


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the project that has this environment as its own."""
    root = tmp_path_factory.mktemp('clone') / 'project'
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        '.*venv*', '.git', '.*_cache', '_build', '*.egg-info', 'results',
        '__pycache__'))
    (root / '.venv').symlink_to(sys.prefix)
    (root / '.fresh').write_text(f'{root}\n')  # stands in for .venv/.ready
    return root


def run(root, command):
    """Run a shell command of the text in a copy; return what it prints."""
    if 'pre-commit' in command:
        if not shutil.which('git'):
            pytest.skip('pre-commit needs git')
        command = f'git init --quiet && git add --all && {command}'
    # The copy borrows this environment: no Python that was named to the make
    # around this test may make it anew
    outer = {'PYTHON', 'VENV', 'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS'}
    inherited = {name: value for name, value in os.environ.items()
                 if name not in outer}
    ran = subprocess.run(
        command, shell=True, cwd=root, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**inherited, 'D2LTVM_SHORT': '1', 'GIT_CONFIG_GLOBAL': '',
             'PRE_COMMIT_HOME': str(root.parent / 'pre-commit')})
    assert ran.returncode == 0, f'{command}\n{ran.stdout}'
    return ran.stdout


def test_short():
    assert len(TEXT.splitlines()) < 40
    assert len(COMMANDS) >= 8 and LONG <= set(COMMANDS)


@pytest.mark.parametrize('command', [
    pytest.param(command, marks=pytest.mark.soak) if command in LONG
    else command for command in dict.fromkeys(COMMANDS)])
def test_each_command_runs(clone, command):
    target = command.removeprefix('make ')
    if command in SLOW:
        assert target in TARGETS
        command += ' --dry-run'
    if command.startswith('make'):
        command += ' ready=.fresh'
    run(clone, command)


def test_checks_before_a_commit_are_the_first_step_of_the_tests():
    recipe = re.search(r'^check: .*\n((?:\t.*\n)+)', MAKEFILE, re.MULTILINE)
    config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
    hooks = config['repos'][0]['hooks']
    entries = recipe[1].replace('$(python)', '$(venv)/bin/python').replace(
        '$(venv)', '.venv').split('\n\t')
    assert [hook['entry'] for hook in hooks] == [
        entry.strip() for entry in entries]
    assert re.search(r'^test: check\b', MAKEFILE, re.MULTILINE)
    assert len(hooks) == 4


@pytest.mark.soak
def test_checks_before_a_commit_pass(clone):
    printed = run(clone, '.venv/bin/pre-commit run --all-files')
    assert printed.count('Passed') == 4


def test_a_check_can_fail(clone):
    path = clone / 'd2ltvm' / 'theory.py'
    whole = path.read_text()
    path.write_text(whole + '\n# by hand\n')
    with pytest.raises(AssertionError, match='package and notebooks differ'):
        run(clone, '.venv/bin/pre-commit run cut --all-files')
    path.write_text(whole)


@pytest.mark.parametrize('name', ['test', 'publish'])
def test_workflows_call_make_alone(name):
    path = ROOT / '.github' / 'workflows' / f'{name}.yml'
    flow = yaml.safe_load(path.read_text())
    assert flow['name'] == name and True in flow  # YAML reads `on` as True
    steps = [step for job in flow['jobs'].values() for step in job['steps']]
    assert [step['run'] for step in steps if 'run' in step] == [
        {'test': 'make test', 'publish': 'make book'}[name]]
    for step in steps:
        assert 'run' in step or re.fullmatch(r'actions/[\w-]+@v\d+',
                                             step['uses'])
    pages = [step['with']['path'] for step in steps
             if 'upload-pages' in step.get('uses', '')]
    assert pages == ([] if name == 'test' else ['_build/html'])


def test_changelog_knows_this_version():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    log = (ROOT / 'CHANGELOG.md').read_text()
    assert f'\n## [{project["version"]}]' in log
    assert log.index('[Unreleased]') < log.index(project['version'])
