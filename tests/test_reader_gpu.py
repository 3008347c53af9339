"""What the button for the reader's GPU is given; a browser presses it."""
import functools
import json
import math

import pytest
import reader_gpu

from d2ltvm.reader_gpu import ReaderGpu

# With all its batches, whose sources take long to write
whole = functools.cache(ReaderGpu)


@pytest.mark.parametrize(('kind', 'passes', 'count'), [
    ('inference', 2, 1), ('training', 3, 3)])
def test_the_plan_names_everything(kind, passes, count):
    shape = (3, 2, 12, 10)
    run, = ReaderGpu(kind, [shape]).plan['runs']
    values = math.prod(shape)
    assert run['bytes'] == 4 * passes * values and run['sizes']['X'] == values
    assert len(run['launches']) == count
    for launch in run['launches']:
        names = launch['names']
        assert set(names) <= set(run['sizes'])
        assert f'fn {launch["kernel"]}(' in launch['wgsl']
        # An array for each binding, and the number of blocks
        assert launch['wgsl'].count('var<storage') == len(names)
        assert f'@binding({len(names)}) var<uniform>' in launch['wgsl']


def test_the_figure_is_small_and_asks_nobody():
    text = whole('training')._repr_html_()
    assert len(text) < 100e3
    assert 'http' not in text.replace('come from https,', '')
    assert ReaderGpu.alt in repr(ReaderGpu('inference', []))


@pytest.mark.parametrize(('arguments', 'message'), [
    (('other',), r'^kind: expected one of'),
    (('training', [(2, 3)]), r'^shapes: expected \(N, C, H, W\)'),
    (('inference', [(2, 3, 5, 5)]), r'^shapes: .* multiple of 4')])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReaderGpu(*arguments)


@pytest.mark.parametrize(('place', 'kind'), [(0, 'inference'),
                                             (1, 'training')])
def test_the_stored_result_is_of_software_and_of_todays_batches(place, kind):
    found = json.loads(reader_gpu.RESULTS.read_text())[place]
    assert found['kind'] == kind
    assert found['adapter']['architecture'] == 'swiftshader'
    runs = whole(kind).plan['runs'][:len(found['rows'])]
    assert len(runs) >= 2  # a software GPU stops when it gets slow
    for row, run in zip(found['rows'], runs, strict=True):
        assert (row['shape'], row['bytes']) == (run['shape'], run['bytes'])
        assert 0 < row['error'] < 1e-5 and row['copy_rate'] > 0
        assert row['rate'] == pytest.approx(row['bytes'] / row['seconds'])
