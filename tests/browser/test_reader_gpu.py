"""The button that runs programs on the reader's GPU; here it is software."""
import json

import pytest

from d2ltvm.reader_gpu import ReaderGpu


def show(browser, *figures):
    """The figures on a page of localhost, which WebGPU takes for secure."""
    tab = browser.new_page()
    tab.on('pageerror', lambda error: pytest.fail(str(error)))
    page = '<!DOCTYPE html><html lang="en"><body>' + ''.join(
        figure._repr_html_() for figure in figures)
    tab.route('**/*', lambda route: route.fulfill(
        body=page, content_type='text/html; charset=utf-8'))
    tab.goto('http://localhost/')
    return tab


def finished(figure):
    """Press the button, and wait until it can be pressed again."""
    figure.locator('button').click()
    figure.locator('button:enabled').wait_for(timeout=300_000)
    return figure.locator('[role=status]').inner_text()


@pytest.mark.parametrize('kind', ['inference', 'training'])
def test_the_button_checks_and_times(webgpu, kind):
    figure = ReaderGpu(kind, [(1, 2, 4, 4), (3, 2, 12, 10)])
    tab = show(webgpu, figure)
    assert finished(tab.locator('figure')).endswith('All results are right.')
    assert tab.locator('tbody tr').count() == 2
    for path in tab.locator('[data-line]').all():
        assert path.get_attribute('d').count('L') == 1
    with tab.expect_download() as download:
        tab.get_by_text('Save the result').click()
    assert download.value.suggested_filename == f'gpu-{kind}.json'
    saved = json.loads(download.value.path().read_text())
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
