"""The library file: colophon, features of processors, what is refused."""
import platform

import numpy as np
import pytest
import tvm
from hypothesis import example, given
from hypothesis import strategies as st
from tvm import te
from tvm.target import Target

from d2ltvm import library_file as lf
from d2ltvm.cpu_schedule import host_target

FACTS = {'format': lf.FORMAT, 'tvm': lf.tvm_version(), 'batch': '1',
         'device': 'cpu', 'machine': platform.machine(), 'needs': '',
         'threads': '1', 'target': ''}


# The colophon

names = st.text(st.characters(codec='ascii', exclude_characters='=\n\r',
                              exclude_categories=['Cc']), min_size=1)
values = st.text(st.characters(codec='ascii', exclude_categories=['Cc']))


@given(st.binary(max_size=300), st.dictionaries(names, values, max_size=4))
@example(b'', {})
@example(b'a=b\n\nd2ltvm 0', {'a': 'b=c', 'd2ltvm 0': ''})
def test_property_colophon_comes_back(library, facts):
    content = lf.append_colophon(library, facts)
    assert content.startswith(library)
    assert lf.read_colophon(content) == facts


@given(st.binary(max_size=200), st.dictionaries(names, values, max_size=3),
       st.data())
def test_property_damage_is_found(library, facts, data):
    content = lf.append_colophon(library, facts)
    at = data.draw(st.integers(0, len(content) - 1))
    burst = data.draw(st.binary(min_size=1, max_size=4).filter(any))
    broken = bytearray(content)
    for i, change in enumerate(burst[:len(content) - at]):
        broken[at + i] ^= change
    damaged = [content[:at], content + burst, content[:at] + content[at + 1:]]
    for each in damaged + [bytes(broken)] * (broken != content):
        with pytest.raises(ValueError, match=r'^x\.so: expected'):
            lf.read_colophon(each, 'x.so')


@pytest.mark.parametrize('facts', [{'a': 'b\nc'}, {'a\n': ''}, {'a=': 'b'},
                                   {'': 'b'}, {'a': '\r'}])
def test_facts_must_fit_a_line(facts):
    with pytest.raises(ValueError, match=r'^facts: expected'):
        lf.append_colophon(b'', facts)


# Processors

def features(**target):
    return lf.needed_features(Target({'kind': 'llvm', **target}))


def test_levels_of_x86():
    at = {level: features(mcpu=f'x86-64-v{level}',
                          mtriple='x86_64-linux-gnu')[1]
          for level in (2, 3, 4)}
    assert at[2] < at[3] < at[4]
    assert {'avx2', 'fma'} <= at[3] - at[2]
    assert {'avx512f', 'avx512vl'} <= at[4] - at[3]
    machine, arm = features(mcpu='neoverse-n1', mtriple='aarch64-linux-gnu')
    assert machine == 'aarch64' and {'asimddp', 'atomics'} <= arm


def test_switched_off_features_are_not_needed():
    with_, without = (features(mcpu='x86-64-v4', mtriple='x86_64-linux-gnu',
                               mattr=mattr)[1]
                      for mattr in ([], ['-avx512bw']))
    assert with_ - without == {'avx512bw'}


def test_this_machine_runs_its_own_code():
    machine, needed = lf.needed_features(host_target())
    assert machine == platform.machine() and needed <= lf.cpu_features()


def test_unknown_family():
    with pytest.raises(ValueError, match=r'^target: .*got riscv64'):
        features(mtriple='riscv64-linux-gnu')


# Facts

def test_facts_that_fit():
    for change in {}, {'batch': 'any'}, {'batch': '64', 'threads': '12'}:
        lf.check_facts({**FACTS, **change}, 'x.so')


@pytest.mark.parametrize(('change', 'message'), [
    ({'format': '1'}, 'expected format 2, got format 1'),
    ({'machine': 's390x'}, 'got one for s390x'),
    ({'needs': 'avx1024'}, 'needs avx1024'),
    ({'tvm': '0.26'}, 'got one for TVM 0.26'),
    ({'batch': '0'}, "a number for the fact batch, got '0'"),
    ({'threads': 'any'}, "a number for the fact threads, got 'any'"),
    ({'threads': ''}, "a number for the fact threads, got ''")])
def test_facts_that_do_not_fit(change, message):
    with pytest.raises(RuntimeError, match=rf'^x\.so: .*{message}'):
        lf.check_facts({**FACTS, **change}, 'x.so')


@pytest.mark.parametrize('name', lf.NEEDED_FACTS)
def test_a_missing_fact_is_named(name):
    facts = {key: value for key, value in FACTS.items() if key != name}
    with pytest.raises(RuntimeError, match=f'the facts {name}, got none'):
        lf.check_facts(facts, 'x.so')


# Writing and loading

@pytest.fixture(scope='module')
def double():
    x = te.placeholder((4,), name='x')
    return tvm.compile(te.create_prim_func(
        [x, te.compute((4,), lambda i: 2 * x[i])]), target='llvm')


def test_what_is_written_is_loaded(double, tmp_path):
    path = tmp_path / 'double.so'
    lf.write_library(double, path, FACTS)
    content = path.read_bytes()
    assert lf.read_colophon(content) == FACTS
    assert list(tmp_path.iterdir()) == [path]
    result = tvm.runtime.empty((4,), 'float32')
    lf.load_bytes(content)['main'](
        tvm.runtime.tensor(np.arange(4, dtype='f4')), result)
    np.testing.assert_array_equal(result.numpy(), [0, 2, 4, 6])


@pytest.mark.parametrize('linker', ['no-such-thing', 'false'])
def test_a_linker_that_fails_leaves_the_old_file(double, tmp_path, linker):
    path = tmp_path / 'double.so'
    path.write_text('old')
    with pytest.raises(RuntimeError, match=f'{linker} cannot link'):
        lf.write_library(double, path, FACTS, linker)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_no_library_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    with pytest.raises(RuntimeError):
        lf.load_bytes(b'hello')
    assert not list(tmp_path.iterdir())
