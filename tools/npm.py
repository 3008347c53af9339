"""Files from npm's registry, each verified before it is used."""
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path


def verified(path, sha256):
    """The content of a file.

    Parameters
    ----------
    path : Path
    sha256 : dict
        The digest of each name.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is another file than the one that its name promises.
    """
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256[path.name]:
        raise ValueError(f'{path} is damaged or of another version: its '
                         'SHA-256 is not the expected one')
    return content


def unpack(package, names, folder, inside='package', timeout=300):
    """Have npm bring a package, and keep some files of it in a folder.

    Parameters
    ----------
    package : str
        Name and version, as 'pyodide@0.27.7'.
    names : iterable of str
        The files; `inside` is their folder in the package.
    folder : Path
    inside : str
    timeout : float
        Seconds.

    Raises
    ------
    OSError
        If npm is missing, or cannot fetch it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            subprocess.run(['npm', 'pack', '--silent', package], cwd=scratch,
                           check=True, capture_output=True, timeout=timeout)
        except (OSError, subprocess.SubprocessError) as error:
            raise OSError('npm is missing, or cannot fetch '
                          + package.replace('@', ' ')) from error
        archive, = Path(scratch).glob('*.tgz')
        with tarfile.open(archive) as packed:
            for name in names:
                file = packed.extractfile(f'{inside}/{name}')
                assert file is not None, name
                (folder / name).write_bytes(file.read())
