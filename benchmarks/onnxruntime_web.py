"""ONNX Runtime Web: the files of npm's package that a page needs at least.

They come from a folder that the environment variable D2LTVM_ORT_WEB names, or
from npm, which is asked once; then they lie in the user's cache.
"""
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pooch

VERSION = '1.30.0'
SHA256 = {
    'ort.wasm.min.mjs':
    '219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b',
    'ort-wasm-simd-threaded.mjs':
    'e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b',
    'ort-wasm-simd-threaded.wasm':
    '3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2',
}


def store():
    """The folder where what was downloaded stays, below the user's cache."""
    return Path(pooch.os_cache('d2ltvm'), f'onnxruntime-web-{VERSION}')


def verify(path):
    """Refuse another file than the one that its name promises.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is another one.
    """
    if pooch.file_hash(str(path)) != SHA256[path.name]:
        raise ValueError(f'{path} is damaged or of another version: its '
                         'SHA-256 is not the expected one')


def fetch():
    """Have npm pack the package; verify and keep three of its files.

    Raises
    ------
    OSError, ValueError
        As `files`.
    """
    store().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store().parent) as scratch:
        try:
            subprocess.run(
                ['npm', 'pack', '--silent', f'onnxruntime-web@{VERSION}'],
                cwd=scratch, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise OSError('npm is missing, or cannot fetch onnxruntime-web '
                          f'{VERSION}') from error
        archive, = Path(scratch).glob('*.tgz')
        kept = Path(scratch, 'kept')
        kept.mkdir()
        with tarfile.open(archive) as packed:
            for name in SHA256:
                file = packed.extractfile(f'package/dist/{name}')
                assert file is not None, name
                (kept / name).write_bytes(file.read())
                verify(kept / name)
        kept.replace(store())


def files():
    """The paths of all files of `SHA256`, verified.

    Raises
    ------
    OSError
        If a file cannot be had.
    ValueError
        If a file is another one.
    """
    own = os.environ.get('D2LTVM_ORT_WEB')
    if own and not Path(own).is_dir():
        raise FileNotFoundError(f'D2LTVM_ORT_WEB: there is no folder {own}')
    if not own and not store().exists():
        fetch()
    paths = [Path(own or store(), name) for name in SHA256]
    for path in paths:
        verify(path)
    return paths
