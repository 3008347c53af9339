"""Serve the rendered book on this machine with its code made live.

A Jupyter server of its own shows the pages of `_build/html` and runs their
cells. It listens on 127.0.0.1 alone, every request needs its random token,
and the pages on disk stay as they are: the script that makes their code live
is added on the way to the browser. Ctrl-C and SIGTERM end the server and its
kernels, in whatever way it was started.
"""
import asyncio
import base64
import hashlib
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.serverapp import ServerApp
from tornado import web

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / '_build/html'
THEBE = ROOT / '_build/thebe'
VERSION = 'thebe@0.9.3'
SHA512 = ('Rb/7kVhtlffXra3kIe7OuIGE7awsm2/fGWxw21DiNfnWLnUQiDl9AWqYdshPwZPG'
          '/5DzLpsJRPix2xtCPtJmQQ==')
# A shell has programs in the background ignore Ctrl-C: here it counts anyway
ENDING = signal.SIGINT, signal.SIGTERM


def fetch_thebe(folder=THEBE, npm='npm'):
    """Have the verified scripts of thebe in `folder`, from npm if need be."""
    if folder.exists():
        return
    if not shutil.which(npm):
        sys.exit('error: live code needs thebe, and npm fetches it; install '
                 'npm (Debian and Ubuntu: apt install npm), or use `make lab`')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        scratch = Path(scratch)
        if subprocess.run([npm, 'pack', '--silent', VERSION], cwd=scratch,
                          stdout=subprocess.DEVNULL).returncode:
            sys.exit(f'error: npm cannot fetch {VERSION} (see above)')
        archive, = scratch.glob('*.tgz')
        found = hashlib.sha512(archive.read_bytes()).digest()
        if base64.b64encode(found).decode() != SHA512:
            sys.exit(f'error: what npm gave as {VERSION} is another file')
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter='data', members=[
                member for member in packed
                if member.name.startswith('package/lib/')
                and not member.name.endswith(('.map', '.ts'))])
        try:
            (scratch / 'package/lib').rename(folder)
        except OSError:
            if not folder.exists():  # else another run was quicker
                raise


class File(JupyterHandler, web.StaticFileHandler):
    """A file, for who has the token; a page gets the script `live.js`."""

    @web.authenticated
    async def get(  # type: ignore[override]
            self, path, include_body=True):
        _ = self.xsrf_token  # sets the cookie that the kernel's API wants
        await web.StaticFileHandler.get(self, path, include_body)

    @classmethod
    def get_content(cls, path, start=None, end=None):
        content = Path(path).read_bytes()
        if path.endswith('.html'):
            script = (ROOT / 'tools/live.js').read_bytes()
            content = content.replace(
                b'</body>', b'<script>' + script + b'</script></body>')
        return content[start:end]

    def get_content_size(self):
        return len(self.get_content(self.absolute_path))

    def compute_etag(self):
        return None


class Live(ServerApp):
    """A server that no configuration of the user's opens further."""

    def load_config_file(self, *args, **options):
        pass

    def init_signal(self):
        for number in ENDING:
            asyncio.get_event_loop().add_signal_handler(number, self.stop)


def server(**settings):
    asyncio.set_event_loop(asyncio.new_event_loop())
    app = Live(ip='127.0.0.1', port=0, root_dir=str(ROOT), answer_yes=True,
               allow_root=True, **settings)
    token = app.config.IdentityProvider.token = secrets.token_hex(24)
    app.default_url = f'/book/intro.html?token={token}'
    app.initialize(argv=[], find_extensions=False)
    app.web_app.add_handlers('.*', [
        (r'/book/(.*)', File, {'path': str(BOOK),
                               'default_filename': 'index.html'}),
        (r'/thebe/(.*)', File, {'path': str(THEBE)})])
    return app


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fetch_thebe()
    app = server(open_browser='--quiet' not in sys.argv, log_level='WARN')
    # Once the server listens: this runs after what `initialize` left to do
    app.io_loop.add_callback(lambda: print(
        f'The live book: http://127.0.0.1:{app.port}{app.default_url}\n'
        'Ctrl-C ends it.', flush=True))
    app.start()
