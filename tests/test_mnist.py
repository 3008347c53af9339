"""The digits: every way in which a file can be missing, wrong or half."""
import errno
import gzip
import hashlib
import http.server
import io
import logging
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pooch
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from sklearn import datasets

from d2ltvm import mnist

PAGE = b'<html>Please log in to use this network.</html>'


def idx(array):
    """An IDX file, made independently of the notebook."""
    sizes = struct.pack(f'>{array.ndim}I', *array.shape)
    return struct.pack('>HBB', 0, 8, array.ndim) + sizes + bytes(array.flat)


def sha(content):
    return hashlib.sha256(content).hexdigest()


IMAGES = np.arange(12, dtype='uint8').reshape(2, 2, 3) * 20
TINY = idx(IMAGES)
ALTERED = TINY[:-1] + bytes([TINY[-1] ^ 1])


@pytest.fixture
def files(monkeypatch):
    """A small stand-in for the four files: name -> content."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype='uint8')
              for shape in ((5, 28, 28), (5,), (3, 28, 28), (3,))]
    contents = dict(zip(mnist.FILES, map(idx, arrays), strict=True))
    monkeypatch.setattr(mnist, 'FILES', {
        name: (array.shape, sha(content)) for array, (name, content)
        in zip(arrays, contents.items(), strict=True)})
    return contents


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder in place of the user's; no variable set."""
    for name in ('D2LTVM_DATA', 'D2LTVM_MIRROR'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(pooch, 'os_cache', tmp_path.joinpath)
    monkeypatch.setattr(pooch.get_logger(), 'level', logging.DEBUG)
    return tmp_path / 'd2ltvm'


class Server(http.server.ThreadingHTTPServer):
    """Answers `/WAY/NAME.gz` in the way asked for; notes the requests."""

    def __init__(self, contents):
        super().__init__(('127.0.0.1', 0), Handler)
        self.contents, self.requests = contents, []
        self.asked, self.stop = threading.Event(), threading.Event()

    def mirror(self, way):
        return f'http://127.0.0.1:{self.server_port}/{way}/'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        way, name = self.path.strip('/').split('/')
        self.server.requests.append((way, name))
        content = self.server.contents[name.removesuffix('.gz')]
        body = {'altered': gzip.compress(content[:-1]
                                         + bytes([content[-1] ^ 1])),
                'page': PAGE, 'empty': b'', 'unpacked': content,
                'other': gzip.compress(b'something else'),
                'cut': gzip.compress(content)[:-9],
                'fashion-mnist': content,
                }.get(way, gzip.compress(content, 1))
        self.send_response({'missing': 404, 'forbidden': 403,
                            'broken': 500}.get(way, 200))
        if way == 'encoded':  # the wrapping is the transfer's, not the file's
            self.send_header('Content-Encoding', 'gzip')
        if way != 'no-length':
            extra = 9999 if way in ('truncated', 'stalled') else 0
            self.send_header('Content-Length', str(len(body) + extra))
        self.end_headers()
        self.wfile.write(body)
        if way == 'stalled':
            self.server.asked.set()
            self.server.stop.wait(60)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(files, cache):
    with Server({**files, 'tiny': TINY}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def closed(cache):
    """A mirror at a port where nothing listens."""
    with Server({}) as server:
        return server.mirror('none')


def write(folder, contents, packed=()):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        if name in packed:
            (folder / f'{name}.gz').write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def check(data, files):
    for array, content in zip(data[:4], files.values(), strict=True):
        assert idx(array) == content
        assert array.dtype == 'uint8' and array.flags.writeable


# The format

@pytest.mark.parametrize('shape', [(3,), (2, 3), (0, 28, 28), (1, 2, 1, 3)])
def test_parse_idx(shape):
    array = np.arange(np.prod(shape), dtype='uint8').reshape(shape)
    found = mnist.parse_idx(idx(array))
    assert found.dtype == 'uint8' and found.flags.writeable
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize('content, expected', [
    (b'', 'IDX header.*got nothing'),
    (TINY[:3], 'IDX header'),
    (TINY[:4], 'IDX header.*got 00 00 08 03'),  # no sizes
    (TINY[:15], 'IDX header'),
    (b'\1' + TINY[1:], 'IDX header'),
    (b'\0\0\x0d' + TINY[3:], 'IDX header'),  # floating point
    (b'\0\0\x08\0' + b'x', 'IDX header'),  # rank 0
    (gzip.compress(TINY, mtime=0), 'IDX header'),
    (PAGE, 'IDX header'),
    (TINY[:-1], 'needs 28 bytes, got 27'),
    (TINY + b'\0', 'needs 28 bytes, got 29'),
    (b'\0\0\x08\3' + b'\xff' * 12, f'needs {16 + (2**32 - 1)**3} bytes'),
])
def test_parse_idx_refuses(content, expected):
    with pytest.raises(ValueError, match=f'^digits.gz: .*{expected}'):
        mnist.parse_idx(content, 'digits.gz')


def test_parse_idx_refuses_what_is_not_bytes():
    with pytest.raises(TypeError, match=r'^content: need bytes, got str$'):
        mnist.parse_idx('abc')


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.binary())
def test_property_parse_idx(shape, noise):
    array = np.random.default_rng(len(noise)).integers(
        0, 256, shape, dtype='uint8')
    np.testing.assert_array_equal(mnist.parse_idx(idx(array)), array)
    if noise:  # anything behind it is refused
        with pytest.raises(ValueError, match='needs'):
            mnist.parse_idx(idx(array) + noise)


def test_read_idx_takes_any_packing(tmp_path):
    path = tmp_path / 'tiny.gz'
    for content in [TINY, *(gzip.compress(TINY, n) for n in range(10))]:
        path.write_bytes(content)
        found = mnist.read_idx(path, (2, 2, 3), sha(TINY))
        np.testing.assert_array_equal(found, IMAGES)


def flips(content):
    """`content` with each of its bits flipped in turn."""
    number, size = int.from_bytes(content, 'big'), len(content)
    for bit in range(8 * size):
        yield (number ^ 1 << bit).to_bytes(size, 'big')


def test_read_idx_notices_every_bit_and_every_cut(tmp_path):
    path = tmp_path / 'tiny'
    packed = gzip.compress(TINY)
    cuts = [content[:end] for content in (TINY, packed)
            for end in range(len(content))]
    for content in [*flips(TINY), *cuts]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'^{path}: '):
            mnist.read_idx(path, (2, 2, 3), sha(TINY))
    harmless = 0  # a bit of the gzip header that says nothing of the content
    for content in flips(packed):
        path.write_bytes(content)
        try:
            array = mnist.read_idx(path, (2, 2, 3), sha(TINY))
        except ValueError as error:
            assert str(error).startswith(f'{path}: ')
        else:
            np.testing.assert_array_equal(array, IMAGES)
            harmless += 1
    assert harmless < 8 * 10  # the header has ten bytes


def test_read_idx_names_file_expected_and_found(tmp_path):
    path = tmp_path / 'tiny'
    path.write_bytes(ALTERED)
    with pytest.raises(ValueError, match=f'{path}.*{sha(TINY)}.*'
                                         f'{sha(ALTERED)}'):
        mnist.read_idx(path, (2, 2, 3), sha(TINY))
    with pytest.raises(ValueError, match=r'need shape \(2, 6\), got \(2, 2,'):
        mnist.read_idx(path, (2, 6), sha(ALTERED))


# A folder

def test_folder(files, cache, tmp_path):
    packed = list(files)[1:3]
    write(tmp_path / 'own', files, packed)
    for folder in (tmp_path / 'own', str(tmp_path / 'own')):
        data = mnist.load_mnist(folder)
        check(data, files)
        assert data.source == 'MNIST, from the folder given'


def test_argument_before_variable_before_download(
        files, cache, tmp_path, monkeypatch, server, capfd):
    monkeypatch.setattr(mnist, 'MIRRORS', [server.mirror('good')])
    write(tmp_path / 'own', files)
    monkeypatch.setenv('D2LTVM_DATA', str(tmp_path / 'nowhere'))
    check(mnist.load_digits(tmp_path / 'own'), files)
    monkeypatch.setenv('D2LTVM_DATA', str(tmp_path / 'own'))
    data = mnist.load_digits()
    check(data, files)
    assert data.source == 'MNIST, from the folder in D2LTVM_DATA'
    assert not server.requests and not cache.exists()
    assert capfd.readouterr() == ('', '')
    monkeypatch.setenv('D2LTVM_DATA', '')  # counts as not set
    check(mnist.load_digits(), files)
    assert len(server.requests) == 4


def test_wrong_folder_is_an_error(
        files, cache, tmp_path, monkeypatch, server):
    monkeypatch.setattr(mnist, 'MIRRORS', [server.mirror('good')])
    last = list(files)[-1]
    write(tmp_path / 'own', files)
    (tmp_path / 'own' / last).unlink()
    with pytest.raises(FileNotFoundError,
                       match=rf'{last}.*{tmp_path}/own \(the folder given'):
        mnist.load_digits(tmp_path / 'own')
    monkeypatch.setenv('D2LTVM_DATA', str(tmp_path / 'nowhere'))
    with pytest.raises(FileNotFoundError,
                       match=f'{tmp_path}/nowhere.*D2LTVM_DATA'):
        mnist.load_digits()
    assert not server.requests


@pytest.mark.parametrize('packed', [False, True])
def test_damaged_folder_is_an_error(files, tmp_path, packed):
    name = list(files)[2]
    altered = files[name][:-1] + bytes([files[name][-1] ^ 1])
    write(tmp_path / 'own', {**files, name: altered}, files if packed else ())
    with pytest.raises(ValueError, match=f'own/{name}.*{sha(files[name])}.*'
                                         f'{sha(altered)}'):
        mnist.load_digits(tmp_path / 'own')


# Mirrors and cache

def test_download_once(files, cache, monkeypatch, server, closed, capfd):
    monkeypatch.setattr(mnist, 'MIRRORS', [server.mirror('good')])
    log = io.StringIO()
    monkeypatch.setattr(pooch.get_logger().handlers[0], 'stream', log)
    data = mnist.load_mnist()
    check(data, files)
    assert data.source == 'MNIST, from the cache'
    out, err = capfd.readouterr()
    assert err == log.getvalue() == ''
    assert [line.split('\r')[-1] for line in out.split('\n')] == [
        *(f'{name}.gz [{"#" * 30}]' for name in files), '']
    assert pooch.get_logger().level == logging.DEBUG
    monkeypatch.setattr(mnist, 'MIRRORS', [closed])
    check(mnist.load_mnist(), files)
    assert capfd.readouterr() == ('', '')
    assert sorted(path.name for path in cache.iterdir()) == sorted(files)


@pytest.mark.parametrize('way', [
    'altered', 'broken', 'cut', 'empty', 'forbidden', 'missing', 'other',
    'page', 'truncated', 'closed'])
def test_next_mirror(way, files, cache, monkeypatch, server, closed):
    bad = closed if way == 'closed' else server.mirror(way)
    monkeypatch.setattr(mnist, 'MIRRORS', [bad, server.mirror('good')])
    check(mnist.load_mnist(), files)
    assert sorted(path.name for path in cache.iterdir()) == sorted(files)


@pytest.mark.parametrize('slash', ['', '/'])
def test_mirror_of_the_environment(slash, files, cache, monkeypatch, server,
                                   closed):
    """It takes the place of the others, for better or worse."""
    monkeypatch.setattr(mnist, 'MIRRORS', [closed])
    monkeypatch.setenv('D2LTVM_MIRROR', server.mirror('good')[:-1] + slash)
    check(mnist.load_mnist(), files)
    monkeypatch.setattr(mnist, 'MIRRORS', [server.mirror('good')])
    monkeypatch.setenv('D2LTVM_MIRROR', server.mirror('missing')[:-1] + slash)
    check(mnist.load_mnist(), files)  # from the cache
    for path in cache.iterdir():
        path.unlink()
    with pytest.raises(ConnectionError, match=r'^no mirror delivers train-im'
                       rf'[\w-]+; {server.mirror("missing")}: 404[^;]*$'):
        mnist.load_mnist()


@pytest.mark.parametrize('way', ['encoded', 'no-length', 'unpacked'])
def test_ways_of_sending(way, cache, server):
    path = mnist.fetch('tiny', sha(TINY), [server.mirror(way)])
    assert Path(path) == cache / 'tiny'
    assert Path(path).read_bytes() == TINY


@pytest.mark.parametrize('way, error, reason', [
    ('altered', ValueError, f'{sha(TINY)}.*{sha(ALTERED)}'),
    ('cut', ValueError, 'damaged gzip'),
    ('empty', ValueError, sha(b'')),
    ('other', ValueError, sha(b'something else')),
    ('page', ValueError, sha(PAGE)),
    ('broken', ConnectionError, '500'),
    ('forbidden', ConnectionError, '403'),
    ('missing', ConnectionError, '404'),
    ('truncated', ConnectionError, 'ChunkedEncodingError'),
])
def test_no_mirror(way, error, reason, cache, server, closed):
    mirrors = [server.mirror(way), closed]
    with pytest.raises(error, match=f'no mirror delivers tiny; '
                       f'{mirrors[0]}: .*{reason}.*; '
                       f'{mirrors[1]}: ConnectionError'):
        mnist.fetch('tiny', sha(TINY), mirrors)
    assert not list(cache.iterdir())
    assert pooch.get_logger().level == logging.DEBUG


def test_bar_of_a_broken_download_ends(cache, server, capfd):
    server.contents['big'] = np.random.default_rng(0).bytes(600_000)
    with pytest.raises(ConnectionError):
        mnist.fetch('big', sha(TINY), [server.mirror('truncated')])
    out = capfd.readouterr().out
    assert '[####' in out and out.endswith(']\n')


@pytest.mark.parametrize('content', [
    b'', TINY[:20], ALTERED, TINY + b'\0'],
    ids=['empty', 'half', 'altered', 'longer'])
def test_damaged_cache(content, cache, server, closed):
    write(cache, {'tiny': content, 'tmp0000': TINY[:9]})
    with pytest.raises(ConnectionError):
        mnist.fetch('tiny', sha(TINY), [closed])
    path = mnist.fetch('tiny', sha(TINY), [closed, server.mirror('good')])
    assert Path(path).read_bytes() == TINY


def test_killed_run(cache, server):
    program = ('import sys; from d2ltvm import mnist; '
               'mnist.fetch("tiny", sys.argv[1], sys.argv[2:3], sys.argv[3])')
    child = subprocess.Popen(
        [sys.executable, '-c', program, sha(TINY), server.mirror('stalled'),
         cache], env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    try:
        assert server.asked.wait(60)
    finally:
        child.kill()
        child.wait()
    assert not (cache / 'tiny').exists()
    path = mnist.fetch('tiny', sha(TINY), [server.mirror('good')])
    assert Path(path).read_bytes() == TINY


@pytest.fixture
def read_only(monkeypatch):
    """Let no temporary file be made; permission bits do not stop root."""
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', 'tmp')
    monkeypatch.setattr('tempfile.NamedTemporaryFile', refuse)


def test_read_only_cache(files, cache, monkeypatch, server, read_only):
    monkeypatch.setattr(mnist, 'MIRRORS', [server.mirror('good')])
    write(cache, files)
    check(mnist.load_digits(), files)
    name = list(files)[1]
    for spoil in (lambda path: path.write_bytes(b'half'), Path.unlink):
        spoil(cache / name)
        with pytest.raises(OSError, match=f'{name}.*{cache}.*Permission '
                                          'denied.*D2LTVM_DATA') as caught:
            mnist.load_digits()
        assert not isinstance(caught.value, ConnectionError)
    assert not server.requests


def test_cache_path_is_a_file(cache, server):
    cache.write_text('not a folder')
    with pytest.raises(OSError, match=f'cache folder {cache}.*D2LTVM_DATA'):
        mnist.fetch('tiny', sha(TINY), [server.mirror('good')])
    assert cache.read_text() == 'not a folder'


def test_full_disk(cache, server, monkeypatch):
    def full(path, content):
        with open(path, 'wb') as file:
            file.write(content[:9])
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match=f'{cache}.*No space left'):
        mnist.fetch('tiny', sha(TINY), [server.mirror('good')])
    assert not list(cache.iterdir())


# The small digits

def test_offline_sentence(files, cache, monkeypatch, server, capfd):
    monkeypatch.setattr(mnist, 'MIRRORS', [
        server.mirror(way) for way in ('missing', 'forbidden', 'broken')])
    data = mnist.load_digits()
    out, err = capfd.readouterr()
    assert err == '' and out.count('\n') == 1 and out.endswith('.\n')
    assert 'MNIST' in out and data.source in out
    for array, expected in zip(data, mnist.digits_28(), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert len(server.requests) == 3  # the first file only
    assert not list(cache.iterdir())


def test_wrong_content_is_not_hidden(files, cache, monkeypatch, server):
    monkeypatch.setattr(mnist, 'MIRRORS', [server.mirror('altered')])
    with pytest.raises(ValueError, match='no mirror delivers train-images'):
        mnist.load_digits()


def test_digits_28():
    data, source = mnist.digits_28(), datasets.load_digits()
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert images.shape == (1797, 28, 28) and len(data.train_labels) == 1500
    assert images.dtype == labels.dtype == 'uint8'
    np.testing.assert_array_equal(labels, source.target)
    expected = ndimage.zoom(source.images, (1, 2.5, 2.5), order=1,
                            mode='nearest', grid_mode=True) * 255 / 16
    expected = np.pad(expected, ((0, 0), (4, 4), (4, 4)))
    np.testing.assert_allclose(images, expected, rtol=0, atol=0.5 + 1e-9)


# Fashion-MNIST

@pytest.fixture
def clothes(monkeypatch):
    """A small stand-in for its four packed files: name -> content."""
    rng = np.random.default_rng(1)
    contents, known = {}, {}
    for name, shape in zip(mnist.FASHION_FILES, (
            (4, 28, 28), (4,), (2, 28, 28), (2,)), strict=True):
        contents[name] = gzip.compress(
            idx(rng.integers(0, 256, shape, dtype='uint8')))
        known[name] = shape, sha(contents[name])
    monkeypatch.setattr(mnist, 'FASHION_FILES', known)
    return contents


def check_clothes(data, clothes):
    check(data, {name: gzip.decompress(content)
                 for name, content in clothes.items()})


def test_clothes_from_folders(clothes, files, cache, tmp_path, monkeypatch):
    write(tmp_path, files)
    monkeypatch.setenv('D2LTVM_DATA', str(tmp_path))
    check(mnist.load_clothes(), files)  # no folder fashion-mnist: no download
    write(tmp_path / 'fashion-mnist', clothes)
    for data in (mnist.load_clothes(), mnist.load_fashion_mnist(),
                 mnist.load_fashion_mnist(tmp_path / 'fashion-mnist')):
        check_clothes(data, clothes)
        assert data.source.startswith('Fashion-MNIST, from the folder')
    check(mnist.load_mnist(), files)
    assert not cache.exists()
    last = list(clothes)[-1]
    (tmp_path / 'fashion-mnist' / last).unlink()
    with pytest.raises(FileNotFoundError, match=f'need {last} in '):
        mnist.load_clothes()


def test_clothes_are_downloaded_packed(clothes, cache, monkeypatch, server):
    for name, content in clothes.items():  # sent as they are: `unpacked`
        server.contents[name.removesuffix('.gz')] = content
    monkeypatch.setattr(mnist, 'FASHION_MIRRORS', [
        server.mirror('missing'), server.mirror('unpacked')])
    for _ in range(2):  # the second time from the cache
        check_clothes(mnist.load_clothes(), clothes)
        assert len(server.requests) == 8
    assert sorted((cache / 'fashion-mnist').iterdir()) == sorted(
        cache / 'fashion-mnist' / name for name in clothes)


@pytest.mark.parametrize('slash', ['', '/'])
def test_clothes_lie_below_the_mirror_of_the_environment(
        slash, clothes, cache, monkeypatch, server, closed):
    for name, content in clothes.items():
        server.contents[name.removesuffix('.gz')] = content
    monkeypatch.setattr(mnist, 'FASHION_MIRRORS', [closed])
    monkeypatch.setenv('D2LTVM_MIRROR', server.mirror('')[:-2] + slash)
    check_clothes(mnist.load_clothes(), clothes)
    assert {way for way, _ in server.requests} == {'fashion-mnist'}


@pytest.mark.parametrize('address', ['localhost', '/data/mnist', 'ftp://a'])
def test_an_address_that_is_none(address, cache, monkeypatch):
    monkeypatch.setenv('D2LTVM_MIRROR', address)
    for load in (mnist.load_digits, mnist.load_clothes):
        with pytest.raises(ValueError, match=r'^D2LTVM_MIRROR: expected .* '
                           f'got {address!r}$'):
            load()


def test_no_clothes_offline(clothes, files, cache, monkeypatch, closed,
                            capfd):
    monkeypatch.setattr(mnist, 'FASHION_MIRRORS', [closed])
    monkeypatch.setattr(mnist, 'MIRRORS', [closed])
    data = mnist.load_clothes()
    assert 'scikit-learn' in data.source
    assert capfd.readouterr().out.startswith('Fashion-MNIST cannot be had')


def test_damaged_clothes(clothes, tmp_path):
    name = list(clothes)[1]
    packed = clothes[name]  # the ninth byte only says who packed it
    altered = packed[:9] + bytes([packed[9] ^ 1]) + packed[10:]
    write(tmp_path / 'own', {**clothes, name: altered})
    with pytest.raises(ValueError, match=f'{name}.*{sha(clothes[name])}.*'
                                         f'{sha(altered)}'):
        mnist.load_fashion_mnist(tmp_path / 'own')


# Packages and the real data

def test_optional_packages(files, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pooch', None)
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    write(tmp_path / 'own', files)
    check(mnist.load_digits(tmp_path / 'own'), files)
    with pytest.raises(ImportError, match=r'downloading MNIST needs.*pooch'):
        mnist.load_digits()
    with pytest.raises(ImportError, match=r'small digits needs.*scikit-learn'):
        mnist.digits_28()


@pytest.mark.skipif(not os.environ.get('D2LTVM_DATA'),
                    reason='D2LTVM_DATA names no folder with MNIST')
def test_real_mnist():
    data = mnist.load_mnist()
    assert [array.shape for array in data[:4]] == [
        (60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
    assert [*data.train_labels[:10]] == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert [*data.test_labels[:10]] == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    pixels = data.train_images.astype('float32') / 255
    assert pixels.mean(dtype='float64') == pytest.approx(0.13066, abs=5e-6)
    assert pixels.std(dtype='float64') == pytest.approx(0.30811, abs=5e-6)
