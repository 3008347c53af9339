"""A package of npm that is not there: small files, and a program `npm`."""
import hashlib
import shlex
import tarfile


def small_files(module, tmp_path, monkeypatch):
    """A folder with small files in place of `module.SHA256`'s; no npm."""
    folder = tmp_path / 'own'
    folder.mkdir()
    for name in module.SHA256:
        (folder / name).write_text(f'content of {name}')
    monkeypatch.setattr(module, 'SHA256', {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in module.SHA256})
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    return folder


def give_npm(tmp_path, folder, inside='package', leave=()):
    """A program `npm` that packs the files of a folder, but for some."""
    archive = tmp_path / 'packed.tgz'
    with tarfile.open(archive, 'w:gz') as packed:
        for path in folder.iterdir():
            if path.name not in leave:
                packed.add(path, f'{inside}/{path.name}')
    npm = tmp_path / 'bin/npm'
    npm.parent.mkdir(exist_ok=True)
    npm.write_text('#!/bin/sh\n[ "$1" = pack ] && '
                   f'/bin/cp {shlex.quote(str(archive))} .\n')
    npm.chmod(0o755)
