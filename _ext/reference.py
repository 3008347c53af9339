"""The page `reference`: every module in reading order, tied to its notebook.

The cutter writes `# chapters/NAME.ipynb, cell ID` above each definition. That
line leads both ways: the notebook's cell gets a label `NAME-ID` and a line
that names its entries, an entry gets a link to the section of its cell.
"""
import importlib
import json
import re
import sys
from functools import cache
from pathlib import Path

import yaml
from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this package, not one installed elsewhere
PAGE, SLOT = 'reference', '<!-- modules -->'
CELL = re.compile(
    r'^# chapters/(\w+)\.ipynb, cell (\S+)\n(?:[#@].*\n)*'
    r'(?:(?:def|class) )?(\w+)', re.MULTILINE)


@cache
def modules():
    """Names of the generated modules, in the order of the book."""
    parts = yaml.safe_load((ROOT / '_toc.yml').read_text('utf-8'))['parts']
    names = [chapter['file'].removeprefix('chapters/')
             for part in parts for chapter in part['chapters']]
    return [name for name in names
            if (ROOT / 'd2ltvm' / f'{name}.py').is_file()]


@cache
def public(module):
    """Public name -> id of the cell that defines it."""
    text = (ROOT / 'd2ltvm' / f'{module}.py').read_text('utf-8')
    names = importlib.import_module(f'd2ltvm.{module}').__all__
    return {name: cell for _, cell, name in CELL.findall(text)
            if name in names}


def fill(app, docname, source):
    """Put a section for each module into the page."""
    if docname != PAGE:
        return
    for path in (__file__, ROOT / '_toc.yml'):
        app.env.note_dependency(str(path))
    text = ''
    for module in modules():
        text += (f'({PAGE}-{module})=\n## {module}\n\nFrom the page '
                 f'{{ref}}`{module}`.\n\n```{{eval-rst}}\n'
                 f'.. py:module:: d2ltvm.{module}\n\n')
        for name in public(module):
            value = getattr(importlib.import_module(f'd2ltvm.{module}'), name)
            kind, option = (('class', 'members') if isinstance(value, type)
                            else ('function', '') if callable(value)
                            else ('data', 'no-value'))
            text += f'.. auto{kind}:: d2ltvm.{module}.{name}\n'
            text += f'   :{option}:\n' if option else ''
        text += '```\n\n'
    source[0] = source[0].replace(SLOT, text)


def mark_cells(app, doctree):
    """Label each saved cell of a notebook and name its entries below it."""
    docname = app.env.docname
    module = docname.removeprefix('chapters/')
    if docname == module or module not in modules():
        return
    cells = json.loads(
        Path(app.env.doc2path(docname)).read_text('utf-8'))['cells']
    entries: dict[str, list[str]] = {}
    for name, cell in public(module).items():
        entries.setdefault(cell, []).append(name)
    labels = app.env.get_domain('std').labels
    for node in list(doctree.findall(nodes.container)):
        if node.get('nb_element') != 'cell_code':
            continue
        cell = cells[node['cell_index']]['id']
        if cell not in entries:
            continue
        section = node.parent
        while not isinstance(section, nodes.section):
            section = section.parent
        node['ids'].append(f'cell-{cell}')
        labels[f'{module}-{cell}'] = (
            docname, f'cell-{cell}', section.next_node(nodes.title).astext())
        line = nodes.paragraph('', 'Reference: ', classes=['entries'])
        for i, name in enumerate(sorted(entries[cell])):
            line += [nodes.Text(', ' if i else ''), addnodes.pending_xref(
                '', nodes.literal(name, name), refdomain='py', reftype='obj',
                reftarget=f'd2ltvm.{module}.{name}', refdoc=docname,
                refexplicit=True, refwarn=True)]
        node.insert(1, line)


def link(app, what, name, obj, options, lines):
    """Turn equations and names of a docstring into links; name its cell."""
    _, module, *path = name.split('.')
    if module not in modules():
        return
    names = public(module)

    def code(match):
        word = match[1]
        if word in names and word not in path:
            return f':py:obj:`~d2ltvm.{module}.{word}`'
        return f'``{word}``'

    if what == 'data':
        short = len(repr(obj)) < 60
        lines[:] = [f'A constant, ``{obj!r}``.' if short else 'A constant.']
    text = '\n'.join(lines).replace('|', r'\|')  # no substitutions
    text = re.sub(r'(?<!`)`([^`]+)`(?!`)', code, text)
    lines[:] = re.sub(r'\((eq-[\w-]+)\)', r':eq:`\1`', text).split('\n')
    if len(path) == 1:
        lines += ['', f'Derived in :ref:`{module}-{names[path[0]]}`.', '']


def skip(app, what, name, obj, skipped, options):
    """Leave out what NamedTuple makes of its fields."""
    return True if type(obj).__name__ == '_tuplegetter' else None


def setup(app):
    app.connect('source-read', fill)
    app.connect('doctree-read', mark_cells)
    app.connect('autodoc-process-docstring', link, priority=400)
    app.connect('autodoc-skip-member', skip)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
