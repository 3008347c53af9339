"""The button that runs programs on the reader's GPU; here it is software."""
from functools import partial

import pytest
import reader_gpu
from reader_gpu import finished

from d2ltvm.reader_gpu import ReaderGpu

show = partial(reader_gpu.show, fail=pytest.fail)


@pytest.mark.parametrize('kind', ['inference', 'training'])
def test_the_button_checks_and_times(webgpu, kind):
    figure = ReaderGpu(kind, [(1, 2, 4, 4), (3, 2, 12, 10)])
    tab = show(webgpu, figure)
    assert finished(tab.locator('figure')).endswith('All results are right.')
    assert tab.locator('tbody tr').count() == 2
    for path in tab.locator('[data-line]').all():
        assert path.get_attribute('d').count('L') == 1
    saved = reader_gpu.saved(tab)
    assert tab.locator('a').get_attribute('download') == f'gpu-{kind}.json'
    assert saved['kind'] == kind and saved['adapter']['vendor']
    assert [row['shape'] for row in saved['rows']] == [
        run['shape'] for run in figure.plan['runs']]
    for row in saved['rows']:
        assert 0 < row['error'] < 1e-5
        assert row['rate'] == pytest.approx(row['bytes'] / row['seconds'])
        assert row['copy_rate'] > 0


@pytest.mark.parametrize(('old', 'new', 'said'), [
    (' - ', ' + ', 'results are wrong'),
    ('fn ', 'function ', 'It failed.')])
def test_a_fault_is_seen(webgpu, old, new, said):
    figure = ReaderGpu('training', [(3, 2, 4, 4)])
    launch = figure.plan['runs'][0]['launches'][2]
    assert old in launch['wgsl']
    launch['wgsl'] = launch['wgsl'].replace(old, new)
    assert said in finished(show(webgpu, figure).locator('figure'))


def test_no_gpu_is_a_sentence(chromium):
    tab = show(chromium, ReaderGpu('inference', [(1, 2, 4, 4)]))
    assert finished(tab.locator('figure')).startswith(
        'This browser offers no GPU')
    assert tab.locator('a').is_hidden()
    tab.close()


def test_two_figures_do_not_disturb_each_other(webgpu):
    tab = show(webgpu, ReaderGpu('inference', [(1, 2, 4, 4)]),
               ReaderGpu('training', [(1, 2, 4, 4)]))
    first, second = tab.locator('figure').all()
    assert finished(second).endswith('right.')
    assert first.locator('[role=status]').inner_text() == 'Not run yet.'
