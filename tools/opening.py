"""Write the first cell of every notebook: `make package`.

    python tools/opening.py [--check]

A notebook may be opened alone, on Colab or as a downloaded file. Its first
cell, which the rendered book leaves out, finds the package d2ltvm or says
which commands install it: from `public_repository` of `_config.yml` if that
is set, else from a clone. `--check` writes nothing, and exits with status 1
if a cell is missing or differs.
"""
import os
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
CELL_ID = 'find-d2ltvm'
# Folded in JupyterLab and on Colab
METADATA = {'tags': ['remove-cell'], 'cellView': 'form',
            'jupyter': {'source_hidden': True}}
SOURCE = '''\
#@title Find the package d2ltvm
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec('d2ltvm') is None:
    if not Path('../d2ltvm/__init__.py').is_file():
        raise ImportError("""this page needs the package d2ltvm. Run
{commands}
and restart the kernel""")
    sys.path.insert(0, '..')  # a clone of the book'''


def commands(root=ROOT):
    """The lines of a shell that install the package and what it needs."""
    config = yaml.safe_load((root / '_config.yml').read_text('utf-8'))
    address = config['sphinx']['config']['public_repository']
    pins = ' '.join(line for line in (root / 'mxnet.txt').read_text(
        'utf-8').splitlines() if not line.startswith('#'))
    extras = 'd2ltvm[mxnet,tvm,onnx]'
    package = (f'pip install "{extras} @ git+{address}"' if address else
               f'pip install "{extras} @ file:///PATH/OF/A/CLONE"')
    return [package, f'pip install --no-deps {pins}']


def with_opening(notebook, source):
    """Put the cell after the title; return whether anything changed."""
    cells = [cell for cell in notebook.cells if cell.id != CELL_ID]
    old = notebook.cells[1]
    if (old.id, old.source, old.metadata) == (CELL_ID, source, METADATA):
        return False
    # Nothing that a run has stored depends on these lines
    new = nbformat.v4.new_code_cell(
        source, id=CELL_ID, metadata=METADATA,
        execution_count=old.execution_count if old.id == CELL_ID else None)
    notebook.cells = [cells[0], new, *cells[1:]]
    return True


def main(arguments=None, root=ROOT):
    check = (sys.argv[1:] if arguments is None else arguments) == ['--check']
    source = SOURCE.format(commands='\n'.join(
        f'    {line}' for line in commands(root)))
    for path in sorted((root / 'chapters').glob('*.ipynb')):
        notebook = nbformat.read(path, as_version=4)
        if not with_opening(notebook, source):
            continue
        if check:
            sys.exit(f'{path.name}: its first cell is not that of '
                     'tools/opening.py; run `make package`')
        partial = path.with_suffix('.partial')
        nbformat.write(notebook, partial)
        os.replace(partial, path)
        print('changed:', path.name)


if __name__ == '__main__':
    main()
