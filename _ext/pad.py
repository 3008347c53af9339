"""The digit pad: `{digit-pad}` and `{digit-timing}` in a page draw it.

Their HTML lies beside this file and names what its page has to load: the
style, the weights, the test digits, the script, and the modules in
WebAssembly, which are compiled here from the schedules of the book.
"""
import base64
import json
import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

EXTENSIONS = Path(__file__).resolve().parent
sys.path.insert(0, str(EXTENSIONS.parent))  # the package of this book


class Pad(Directive):
    """One of the two figures, word for word."""

    def run(self):
        name = self.name.replace('-', '_')
        text = (EXTENSIONS / f'{name}.html').read_text('utf-8')
        return [nodes.raw('', text, format='html')]


def write_builds(app):
    """Compile the modules, and store them as the script that sets them."""
    if app.builder.format != 'html':
        return
    from d2ltvm.webassembly import BUILDS, pad_module
    builds = {build: base64.b64encode(pad_module(build)).decode()
              for build in BUILDS}
    path = Path(app.outdir, '_static', 'digit_builds.js')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'globalThis.digitBuilds = {json.dumps(builds)}\n')


def setup(app):
    app.add_directive('digit-pad', Pad)
    app.add_directive('digit-timing', Pad)
    app.connect('builder-inited', write_builds)
    return {'version': '1', 'parallel_read_safe': True,
            'parallel_write_safe': True}
