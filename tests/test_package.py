"""The package as it is imported."""
import importlib
import inspect
import pydoc
import subprocess
import sys
import tomllib
from pathlib import Path

import d2ltvm
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / 'd2ltvm').glob('*.py')
                 if path.stem not in ('__init__', '__main__'))
OVERRIDES = tomllib.loads((ROOT / 'pyproject.toml').read_text())[
    'tool']['mypy']['overrides']
TYPED = [name for table in OVERRIDES
         if not table.get('ignore_errors', True) for name in table['module']]

HEAVY = {'d2l', 'matplotlib', 'mxnet', 'tvm'}


@pytest.mark.parametrize('steps', [
    {'from d2ltvm import get_bn_data; get_bn_data(2, 3)': {'tvm'}},
    {'import d2ltvm': set(),
     'import d2ltvm.mnist': set(),
     'import d2ltvm.theory': set(),
     'import d2ltvm.from_scratch': {'mxnet'},
     'import d2ltvm.moving_statistics': {'mxnet'}}])
def test_nothing_is_loaded_before_it_is_needed(steps):
    """One process for each list, in the order of what is loaded.

    What `gluon_module` loads, its own tests say.
    """
    program = 'import sys\n' + ''.join(
        f'{step}\nprint("loaded", *({HEAVY} & set(sys.modules)))\n'
        for step in steps)
    ran = subprocess.run([sys.executable, '-c', program], check=True,
                         capture_output=True, text=True)
    assert [set(line.split()) - {'loaded'}
            for line in ran.stdout.splitlines()] == list(steps.values())


def test_names_are_those_of_the_book_and_the_modules():
    assert dir(d2ltvm) == sorted({*d2ltvm.__all__, *MODULES})
    for name in MODULES:
        assert getattr(d2ltvm, name) is importlib.import_module(
            f'd2ltvm.{name}')
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = d2ltvm.nothing


def test_help_begins_with_one_line_for_each_module():
    text = pydoc.plain(pydoc.render_doc(d2ltvm))
    width = max(map(len, MODULES))
    for name in MODULES:
        title = importlib.import_module(f'd2ltvm.{name}').__doc__
        assert f'    {name:<{width}}  {title}\n' in text
    assert text.index('DESCRIPTION') < text.index('PACKAGE CONTENTS')


def definitions(module):
    """Public functions, and methods that are written out."""
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type):
            yield from (member for member in vars(value).values()
                        if inspect.isfunction(member)
                        and member.__module__ == module.__name__
                        and '<string>' not in member.__code__.co_filename)
        elif callable(value):
            yield inspect.unwrap(value)


@pytest.mark.parametrize('name', TYPED)
def test_every_argument_has_a_type(name):
    assert len(TYPED) >= 4
    for function in definitions(importlib.import_module(name)):
        signature = inspect.signature(function)
        assert signature.return_annotation is not signature.empty, function
        for i, (key, argument) in enumerate(signature.parameters.items()):
            assert ((i, key) == (0, 'self')
                    or argument.annotation is not signature.empty), function
