"""Cells with the tag `live` run in the rendered page, without any server.

For them the book holds Python for the browser (Pyodide), NumPy, and those
modules of the package that need nothing else. Where Pyodide and NumPy cannot
be had, the book is built without them, and the build says so.
"""
import base64
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import urllib.request
import zipfile
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pooch
from sphinx.util import logging

sys.path.append(str(Path(__file__).resolve().parents[1] / 'tools'))
import npm

HERE = Path(__file__).resolve().parent
VERSION = '0.27.7'
NUMPY = 'numpy-2.0.2-cp312-cp312-pyodide_2024_0_wasm32.whl'
# Where Pyodide is distributed: as its package of npm, and with its wheels
CORE = f'https://cdn.jsdelivr.net/npm/pyodide@{VERSION}/'
WHEELS = f'https://cdn.jsdelivr.net/pyodide/v{VERSION}/full/'
SHA256 = {
    'pyodide.js':
    'b4cb23a53aba19c221659b9fb40a2f18281d685691dc06647fb0afd0681baf98',
    'pyodide.asm.js':
    '6b4c90de5b7172873f04f21884d0e9d2274e305fe32116558fe3e4fbe3618d51',
    'pyodide.asm.wasm':
    'a50dd1843f805a0b7c45b61037ee0d7b26dfe85efe0e18ef95a34ad24e401f5f',
    'python_stdlib.zip':
    '16611534726e5d8ac2bd8f926410b2dcb8d6f49aa24913463533b457a2115c16',
    'pyodide-lock.json':
    '9c45b916001a750f4102fc287494f3eab215909c7535c626a20db80fd6333e2c',
    NUMPY:
    'ebb61241d962b98b21597d7ce43b67668a6d5bab3acec4fbe958657320d7cd08',
}
# The modules of the package that a cell can import in the page
MODULES = ('__init__', 'checks', 'conventions', 'exercises', 'folding',
           'leave_mxnet', 'mnist', 'theory', 'why')
log = logging.getLogger(__name__)


def store():
    """The folder where what was downloaded stays, below the user's cache."""
    return Path(pooch.os_cache('d2ltvm'), f'pyodide-{VERSION}')


def download(name, folder):
    """Bring one file from where Pyodide is distributed."""
    address = (WHEELS if name == NUMPY else CORE) + name
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            (folder / name).write_bytes(answer.read())
    except OSError as error:
        raise OSError(f'{address} cannot be loaded: {error}') from error


def fetch(names):
    """Have files in the store, each verified before it is kept there.

    Raises
    ------
    OSError, ValueError
        As `sources`.
    """
    missing = [name for name in names if not (store() / name).exists()]
    if not missing:
        return
    store().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store()) as scratch:
        folder = Path(scratch)
        if missing != [NUMPY]:
            with suppress(OSError):  # then they are downloaded
                npm.unpack(f'pyodide@{VERSION}', set(SHA256) - {NUMPY},
                           folder, timeout=120)
        for name in missing:
            if not (folder / name).exists():
                download(name, folder)
            npm.verified(folder / name, SHA256)
            (folder / name).replace(store() / name)


def sources():
    """The content of all files of `SHA256`, by name.

    They come from the folder in `D2LTVM_PYODIDE`, and those that it lacks
    from npm or a download, once.

    Raises
    ------
    OSError
        If there is no such folder, or a file cannot be had.
    ValueError
        If a file is another one.
    """
    own = os.environ.get('D2LTVM_PYODIDE')
    if own and not Path(own).is_dir():
        raise FileNotFoundError(f'D2LTVM_PYODIDE: there is no folder {own}')
    paths = {name: Path(own, name) if own and Path(own, name).exists()
             else store() / name for name in SHA256}
    fetch([name for name, path in paths.items() if path.parent == store()])
    return {name: npm.verified(path, SHA256) for name, path in paths.items()}


def package():
    """A zip of the runner, of the package's modules, and of the digits."""
    paths = {'livecells_runner.py': HERE / 'livecells_runner.py'}
    for name in MODULES:
        paths[f'd2ltvm/{name}.py'] = HERE.parent / f'd2ltvm/{name}.py'
    learn = find_spec('sklearn')
    if learn and learn.origin:
        paths['sklearn/datasets.py'] = HERE / 'livecells_digits.py'
        paths['sklearn/digits.csv.gz'] = Path(
            learn.origin).parent / 'datasets/data/digits.csv.gz'
    files = {name: path.read_bytes() for name, path in paths.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in {'sklearn/__init__.py': b'', **files}.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


@cache
def bundle():
    """The script that brings Python into a page, and the licence of NumPy.

    It is one script because a page that was opened from the disk may load
    scripts and nothing else.
    """
    found = sources()
    code = b'\n'.join((
        found['pyodide.js'], found['pyodide.asm.js'],
        b'self._createPyodideModule = _createPyodideModule;',
        (HERE / 'livecells_worker.js').read_bytes()))
    lock = json.loads(found['pyodide-lock.json']) | {'packages': {}}
    files = {'pyodide.asm.wasm': found['pyodide.asm.wasm'],
             'python_stdlib.zip': found['python_stdlib.zip'],
             'pyodide-lock.json': json.dumps(lock).encode(),
             'numpy.zip': found[NUMPY], 'book.zip': package()}
    script = ('// The licences of what this holds lie beside it\n'
              'window.bookPython = ' + json.dumps({
                  'code': code.decode(), 'files': {
                      name: base64.b64encode(
                          gzip.compress(content, mtime=0)).decode()
                      for name, content in files.items()}}) + ';\n')
    with zipfile.ZipFile(io.BytesIO(found[NUMPY])) as wheel:
        return script, wheel.read('numpy-2.0.2.dist-info/LICENSE.txt')


@cache
def available():
    """The bundle, or None after a sentence in the build that says why."""
    try:
        return bundle()
    except (OSError, ValueError) as error:
        log.info('No code runs in the pages of this book: %s', error)
        return None


def add(app, pagename, templatename, context, doctree):
    """A page with such cells gets the script that runs them."""
    if (app.builder.name == 'html' and 'tag_live' in context.get('body', '')
            and available()):
        size = len(available()[0]) / 1e6
        app.add_js_file('livecells.js', loading_method='defer',
                        **{'data-size': f'{size:.0f}'})


def write(app, error):
    """Put the bundle beside the pages, with the licences."""
    folder = Path(app.outdir, '_static/python')
    shutil.rmtree(folder, ignore_errors=True)
    if error is None and app.builder.name == 'html' and (
            available.cache_info().currsize and available()):
        script, license = available()
        shutil.copytree(HERE / 'licenses', folder)
        (folder / 'LICENSE-NumPy.txt').write_bytes(license)
        (folder / 'bundle.js').write_text(script, 'utf-8')


def setup(app):
    app.connect('html-page-context', add)
    app.connect('build-finished', write)
    return {'parallel_read_safe': True, 'parallel_write_safe': False}
