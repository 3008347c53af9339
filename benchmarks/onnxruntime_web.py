"""ONNX Runtime Web: the files of npm's package that a page needs at least.

They come from a folder that the environment variable D2LTVM_ORT_WEB names, or
from npm, which is asked once; then they lie in the user's cache.
"""
import os
import sys
import tempfile
from pathlib import Path

import pooch

sys.path.append(str(Path(__file__).resolve().parents[1] / 'tools'))
import npm

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


def fetch():
    """Have npm pack the package; verify and keep three of its files.

    Raises
    ------
    OSError, ValueError
        As `files`.
    """
    store().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store().parent) as scratch:
        kept = Path(scratch, 'kept')
        kept.mkdir()
        npm.unpack(f'onnxruntime-web@{VERSION}', SHA256, kept, 'package/dist')
        for name in SHA256:
            npm.verified(kept / name, SHA256)
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
        npm.verified(path, SHA256)
    return paths
