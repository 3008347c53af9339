"""Execute the notebooks and store their outputs: `make notebooks`.

    python tools/execute.py [NOTEBOOK ...]

Without arguments it runs every notebook of the table of contents, in order.
A notebook is written only after all of its cells have run, in one step, so
that a run that fails or is interrupted leaves the stored one as it was.
"""
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
METADATA = {'kernelspec': {'display_name': 'Python 3', 'language': 'python',
                           'name': 'python3'},
            'language_info': {'name': 'python'}}


def notebooks():
    """The notebooks that `_toc.yml` lists, in its order."""
    toc = yaml.safe_load((ROOT / '_toc.yml').read_text())
    chapters = [c for part in toc['parts'] for c in part['chapters']]
    paths = [ROOT / f'{chapter["file"]}.ipynb' for chapter in chapters]
    return [path for path in paths if path.exists()]


def shrink(data):
    """A picture, in base64, with a palette of 128 colours: a third as large.

    Drawings have few colours; what changes is below what eyes can see.
    """
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    small = io.BytesIO()
    picture.convert('RGB').quantize(128, dither=Image.Dither.NONE).save(
        small, 'png', optimize=True)
    shrunk = base64.b64encode(small.getvalue()).decode()
    return min(data, shrunk, key=len)


def execute(path):
    """Run one notebook from its first cell to its last and store it."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name='python3',
                   resources={'metadata': {'path': str(path.parent)}},
                   record_timing=False, coalesce_streams=True).execute()
    for cell in notebook.cells:
        for output in cell.get('outputs', ()):
            png = output.get('data', {}).get('image/png')
            if png:
                output['data']['image/png'] = shrink(png)
    notebook.metadata = METADATA  # no kernel version: it would drift
    partial = path.with_suffix('.partial')
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def main():
    os.environ['D2LTVM_OWN'] = ''  # the book shows no results but its own
    for path in [Path(p).resolve() for p in sys.argv[1:]] or notebooks():
        start = time.monotonic()
        print(f'{path.relative_to(ROOT)} ...', end=' ', flush=True)
        try:
            execute(path)
        except (CellExecutionError, DeadKernelError) as error:
            sys.exit(f'failed; the stored notebook is unchanged\n{error}')
        print(f'{time.monotonic() - start:.0f} s', flush=True)


if __name__ == '__main__':
    main()
