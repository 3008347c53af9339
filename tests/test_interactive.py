"""Figures with sliders: Python against the book, browser against Python."""
import json
import math
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ltvm import interactive
from d2ltvm.gpu_training import Reduction
from d2ltvm.interactive import (
    Axes,
    Backward,
    MovingStatistics,
    Schedule,
    Slider,
    Transform,
)
from d2ltvm.theory import (
    batch_norm_backward,
    batch_norm_forward,
    numeric_gradient,
)
from d2ltvm.why import KINDS, normalize
from soak import examples

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'inference.json'
MAKERS = {'transform': Transform, 'moving': MovingStatistics,
          'backward': Backward, 'axes': Axes, 'reduction': Reduction,
          'schedule': lambda **settings: Schedule(RESULTS, **settings)}
each = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
# What all figures have from one template: two of them in `make test`
some = pytest.mark.parametrize('make', [
    pytest.param(make, id=name, marks=[] if name in (
        'transform', 'backward') else pytest.mark.soak)
    for name, make in MAKERS.items()])


def state_of(explorer):
    return explorer.state(explorer.settings, explorer.data)


def drawn(explorer, seed):
    """Settings at random places of all controls."""
    rng = np.random.default_rng(seed)
    settings = {}
    for name, control in explorer.controls.items():
        if isinstance(control, Slider):
            steps = round((control.high - control.low) / control.step)
            value = round(control.low + control.step
                          * int(rng.integers(steps + 1)), 6)
            settings[name] = int(value) if value == int(value) else value
        else:
            settings[name] = str(rng.choice(list(control.options)))
    return settings


@given(st.floats(-1e6, 1e6), st.integers(0, 4))
def test_numbers_are_rounded_half_up(value, digits):
    text = interactive._rounded(value, digits)
    if '.' in text:
        assert len(text.split('.')[1]) == digits
    unit = Decimal(1).scaleb(-digits)
    exact = (Decimal(value) / unit + Decimal('0.5')).to_integral_value(
        ROUND_FLOOR) * unit
    assert abs(Decimal(text.replace('−', '-')) - exact) <= (
        unit if abs(value) * 10 ** digits % 1 > 0.499 else 0)
    assert text not in ('−0', '−0.0', '−0.00', '−0.000', '−0.0000')


def test_outlines_stay_inside_their_panel():
    panel = -1, 1, 10, 110, 0, 2, 90, 10
    assert interactive._outline('line', [(-9, 0), (0, 1), None, (1, 9)],
                                panel) == 'M10.0 90.0L60.0 50.0M110.0 10.0'
    assert interactive._outline('boxes', [(-1, 0, 0, 1)],
                                panel) == 'M10.0 90.0H60.0V50.0H10.0z'
    assert interactive._outline('dots', [(0, 1)], panel) == 'M60.0 50.0h.01'


@each
def test_settings_that_are_not_there_are_refused(make):
    name = next(name for name, control in make().controls.items()
                if isinstance(control, Slider))
    high = make().controls[name].high
    for wrong in (high + 1, 'x', True, high - 1e-3):
        with pytest.raises(ValueError, match=f'^{name}: expected a number '
                                             'from .* in steps of'):
            make(**{name: wrong})
    whole = Axes(n=np.int64(3), c=2.0).settings
    assert [type(whole[key]) for key in 'nc'] == [int, int]
    with pytest.raises(TypeError, match=r'^colour: expected one of'):
        make(colour=1)
    with pytest.raises(ValueError, match=r"^kind: expected one of .*'xs'"):
        Axes(kind='xs')
    with pytest.raises(ValueError, match=r"^kind: expected one of .*'batch'"):
        Axes(kind=['batch'])


@each
def test_html_is_the_same_every_time_and_describes_itself(make):
    first, second = make(), make()
    assert first._repr_html_() == second._repr_html_()
    assert len(first._repr_html_().encode()) < 25e3
    assert len(first.alt) > 100 and first.alt in repr(first)
    assert 'http' not in first._repr_html_()


@pytest.mark.parametrize('seed', range(12))
def test_transform_is_that_of_the_book(seed):
    settings = drawn(Transform(), seed)
    state = state_of(Transform(**settings))
    x = np.array([p[0] for p in state['xTicks'][::3]])
    Y, _ = batch_norm_forward(x[:, None], np.array([settings['gamma']], float),
                              np.array([settings['beta']], float),
                              10.0 ** settings['eps'])
    y = [p[0] for p in state['yTicks'][::3]]
    np.testing.assert_allclose(y, Y[:, 0], rtol=1e-12, atol=1e-12)
    assert len(x) == state['m'] == 2 ** settings['m']
    np.testing.assert_allclose(
        [state['yMean'], state['yStd']], [Y.mean(), Y.std()], atol=1e-12)
    for key in 'xhy':
        assert max(bar[3] for bar in state[f'{key}Bars']) == 1


def test_transform_answers_its_question():
    for seed in range(8):  # batches of two: −1 and 1
        state = state_of(Transform(m=1, batch=seed + 1, stretch=3))
        assert {round(p[0]) for p in state['hTicks'][::3]} == {-1, 1}
    peaks = state_of(Transform(form='peaks', m=9))
    middle = [bar for bar in peaks['hBars'] if -0.5 <= bar[0] < 0.5]
    assert all(bar[3] < 0.2 for bar in middle)


@pytest.mark.parametrize('rule', ['constant', 'factor'])
@pytest.mark.parametrize('length', [1, 60, 100, 101, 200])
def test_moving_mean_is_the_weighted_mean(rule, length):
    """Equation (eq-moving) as a weighted sum, in exact fractions."""
    state = state_of(MovingStatistics(rule=rule, momentum=0.9, first=-2.0,
                                      batches=length, jump=-4.0))
    share = [max(Fraction(1, n), Fraction(1, 10)) if rule == 'factor'
             else Fraction(1, 10) for n in range(1, length + 1)]
    left, weights = Fraction(1), []
    for a in reversed(share):
        weights.insert(0, a * left)
        left *= 1 - a
    mean = left * -2 + sum(w * Fraction(y) for w, (_, y) in zip(
        weights, state['dots'], strict=True))
    np.testing.assert_allclose(state['moving'], float(mean), rtol=1e-10)
    np.testing.assert_allclose(state['left'], float(100 * left), atol=1e-10)
    assert state['true'] == (0 if length > 100 else 4)
    assert state['error'] == state['true'] - state['moving']


def test_moving_answers_its_question():
    state = state_of(MovingStatistics(momentum=0.99, batches=60))
    assert round(state['left']) == 55 and state['error'] > 2
    errors = [state_of(MovingStatistics(rule=rule, momentum=0.9, jump=3.0,
                                        batches=110))['error']
              for rule in ('constant', 'factor')]
    assert abs(errors[0] - errors[1]) < 1e-3
    assert 0.25 < errors[0] / 3 < 0.45


@pytest.mark.parametrize('seed', range(12))
def test_gradients_are_those_of_differences(seed):
    settings = drawn(Backward(), seed)
    state = state_of(Backward(**settings))
    x, g, d = (np.array([[state[f'{key}{i}']] for i in range(1, 6)], float)
               for key in 'xgd')
    gamma = np.array([settings['gamma']], float)
    numeric = numeric_gradient(lambda x: (batch_norm_forward(
        x, gamma, np.zeros(1))[0] * g).sum(), x)
    np.testing.assert_allclose(d, numeric, rtol=1e-5, atol=1e-6)
    assert abs(state['sum']) < 1e-12
    _, cache = batch_norm_forward(x, gamma, np.zeros(1))
    np.testing.assert_array_equal(d, batch_norm_backward(g, cache)[0])
    if settings['loss'] in ('alike', 'along'):  # as the answer says
        assert abs(d).max() < 1e-3


@pytest.mark.parametrize('seed', range(examples(20)))
def test_cells_that_share_a_mean(seed):
    settings = drawn(Axes(), seed)
    explorer = Axes(**settings)
    at = tuple(settings[key] - 1 for key in 'nchw')
    # from 1 on: RMS normalization leaves a 0 as it is
    X = np.array(explorer.data, float).reshape(3, 4, 2, 3) + 1
    state = explorer.state(settings, X.ravel())
    groups = 2 ** settings['groups'] if settings['kind'] == 'group' else None
    # who shares: a large change of it changes the result
    Y = normalize(X, settings['kind'], groups=groups)
    shares = 0
    for i in np.ndindex(X.shape):
        changed = X.copy()
        changed[i] += 1000
        shares += abs(normalize(changed, settings['kind'], groups=groups)
                      - Y)[at] > 1e-3
    assert state['count'] == shares == len(state['shared'])
    assert state['means'] * shares == X.size
    assert state['result'] == Y[at] and state['value'] == X[at]
    assert state['picked'][0] in state['shared']
    assert state['what'] == ('one mean square' if settings['kind'] == 'rms'
                             else 'one mean and one variance')


def test_schedule_is_the_roofline_of_the_measurements():
    cases = json.loads(RESULTS.read_text())['cases']
    for i, case in enumerate(cases):
        elements, times = math.prod(case['shape']), case['times']
        for program, moved in (('stages', 32), ('folded', 8)):
            state = state_of(Schedule(RESULTS, shape=i, program=program))
            np.testing.assert_allclose(
                state['floor'], 1e6 * times['copy'][1] * moved / 8, rtol=1e-3)
            assert state['bytes'] == moved * elements / 1e6
            # two threads, 16 lanes, 3 GHz, one operation each
            operations = {'stages': 4, 'folded': 2}[program] * elements
            np.testing.assert_allclose(state['arithmetic'],
                                       1e6 * operations / (2 * 16 * 3e9))
            np.testing.assert_allclose(
                10 ** state['yours'][0][1] * 1e9, operations / max(
                    state['floor'], state['arithmetic']) * 1e6)
        np.testing.assert_allclose(state['TVM'], 1e6 * times['TVM'][1],
                                   rtol=1e-3)
        assert len(state['engines']) == len(times) - 3


def test_schedule_answers_its_question():
    enough = [[state_of(Schedule(RESULTS, shape=shape, lanes=i))['limit']
               for i in range(5)].index('bandwidth') for shape in (2, 5)]
    assert enough[0] == 3 > enough[1]  # 2 ** 3 lanes


# From here on in a browser

READ = '''figure => ({
  numbers: [...figure.querySelectorAll("[data-number], [data-of]")]
    .map(e => e.textContent),
  paths: [...figure.querySelectorAll("[data-path]")]
    .map(e => e.getAttribute("d"))})'''
SET = '''(figure, settings) => {
  const form = figure.querySelector("form");
  for (const [name, value] of Object.entries(settings))
    form.elements[name].value = value;
  form.dispatchEvent(new Event("input"));
}'''


@pytest.fixture(scope='module')
def window(chromium):
    """One page for each kind that is wanted; the tests write it anew."""
    pages = {}

    def of(**options):
        kind = repr(options)
        if kind not in pages:
            pages[kind] = chromium.new_context(**options).new_page()
        return pages[kind]
    yield of
    for page in pages.values():
        page.context.close()


@pytest.fixture
def show(window):
    """Open figures on a page; complaints fail the test."""
    pages, complaints, listeners = [], [], {
        'pageerror': lambda error: complaints.append(str(error)),
        'console': lambda line: complaints.append(line.text),
        'request': lambda request: complaints.append(request.url)}

    def open_page(*explorers, **options):
        page = window(**options)
        page.goto('about:blank')  # whatever another test has left
        for event, listener in listeners.items():
            page.on(event, listener)
        pages.append(page)
        page.set_content(
            '<!DOCTYPE html><html lang="en"><meta name="viewport" '
            'content="width=device-width"><body>' + ''.join(
                explorer._repr_html_() for explorer in explorers))
        return page
    yield open_page
    for page in pages:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
    assert not complaints


def assert_soon(figure, state):
    """The button redraws a moment after the click."""
    for _ in range(1000):
        if figure.evaluate(READ) == state:
            break
    assert figure.evaluate(READ) == state


def expected(page, explorer):
    """What Python writes: parsed, and no script of it run."""
    return page.evaluate(
        f'html => ({READ})(new DOMParser().parseFromString('
        'html, "text/html").querySelector("figure"))',
        explorer._repr_html_())


@each
def test_browser_computes_what_python_does(make, show):
    page = show(make())
    figure = page.locator('figure')
    assert figure.evaluate(READ) == expected(page, make())
    shown = []
    for seed in range(examples(25)):
        settings = drawn(make(), seed)
        figure.evaluate(SET, settings)
        shown.append(figure.evaluate(READ))
        assert shown[-1] == expected(page, make(**settings)), settings
    assert shown[0] != shown[1]
    page.get_by_role('button').click()  # start again
    assert_soon(figure, expected(page, make()))


@each
def test_every_control_works_by_keyboard(make, show):
    page, settings = show(make()), make().settings
    for name, control in make().controls.items():
        if isinstance(control, Slider):
            page.locator(f'[name="{name}"]').focus()
            up = settings[name] < control.high
            page.keyboard.press('ArrowRight' if up else 'ArrowLeft')
            value = round(settings[name]
                          + (control.step if up else -control.step), 6)
            settings[name] = int(value) if value == int(value) else value
        else:
            page.locator(f'[name="{name}"]:checked').focus()
            page.keyboard.press('ArrowDown')
            options = [*control.options, *control.options]
            settings[name] = options[options.index(settings[name]) + 1]
        assert page.locator('figure').evaluate(READ) == expected(
            page, make(**settings)), name


@some
def test_first_state_needs_no_script(make, show):
    with_script, without = (
        show(make(), viewport={'width': 800, 'height': 900},
             java_script_enabled=on) for on in (True, False))
    assert with_script.locator('svg').screenshot() == without.locator(
        'svg').screenshot()
    for page in with_script, without:
        for place in page.locator('[data-number]').all()[:3]:
            assert place.text_content().strip()
    assert with_script.locator('input').first.is_visible()
    assert not without.locator('input').first.is_visible()


@some
def test_fits_a_phone_and_answers_a_finger(make, show):
    page = show(make(), viewport={'width': 390, 'height': 800},
                has_touch=True, is_mobile=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    slider = page.locator('input[type=range]').last
    slider.scroll_into_view_if_needed()
    before, box = slider.input_value(), slider.bounding_box()
    assert box['height'] >= 24  # large enough for a finger
    page.touchscreen.tap(box['x'] + 0.35 * box['width'],
                         box['y'] + box['height'] / 2)
    assert slider.input_value() != before
    value = float(slider.input_value())
    name = slider.get_attribute('name')
    value = int(value) if value == int(value) else value
    assert page.locator('figure').evaluate(READ) == expected(
        page, make(**{name: value}))


def test_a_tap_picks_a_cell(show):
    page = show(Axes(), viewport={'width': 390, 'height': 800},
                has_touch=True, is_mobile=True)
    page.locator('[data-set="n=3&c=4&h=2&w=1"]').tap()
    assert page.locator('figure').evaluate(READ) == expected(
        page, Axes(n=3, c=4, h=2, w=1))


def centre_of(page, name):
    box = page.locator(f'[data-drag="{name}"]').bounding_box()
    return box['x'] + box['width'] / 2, box['y'] + box['height'] / 2


def test_the_axes_know_all_kinds():
    assert set(Axes.controls['kind'].options) == set(KINDS)


def test_dots_are_dragged_by_the_mouse(show):
    page = show(Backward(), viewport={'width': 800, 'height': 900},
                java_script_enabled=True)
    x, y = centre_of(page, 'x5')  # at 0.5, near the middle
    unit = page.locator('svg').bounding_box()['width'] / 400 * 12.5
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y - 2 * unit, steps=4)
    figure = page.locator('figure')
    assert figure.evaluate(READ) == expected(page, Backward(x5=2.5))
    page.mouse.move(x, y - 400)  # far above: the end of the slider
    assert figure.evaluate(READ) == expected(page, Backward(x5=4))
    page.mouse.up()
    page.mouse.move(x, y + 100)  # let go: nothing moves any more
    assert figure.evaluate(READ) == expected(page, Backward(x5=4))
    page.get_by_role('button').click()
    assert_soon(figure, expected(page, Backward()))


def test_dots_are_dragged_by_a_finger(show):
    page = show(Backward(), viewport={'width': 390, 'height': 800},
                has_touch=True, is_mobile=True)
    for i in range(1, 6):
        box = page.locator(f'[data-drag="x{i}"]').bounding_box()
        assert min(box['width'], box['height']) >= 24
    x, y = centre_of(page, 'x5')
    unit = page.locator('svg').bounding_box()['width'] / 400 * 12.5
    top = page.evaluate('window.scrollY')
    session = page.context.new_cdp_session(page)
    for kind, down in (('touchStart', 0), ('touchMove', 0.5),
                       ('touchMove', 1.5), ('touchEnd', None)):
        session.send('Input.dispatchTouchEvent', {
            'type': kind, 'touchPoints': [] if down is None else [
                {'x': x, 'y': y + down * unit}]})
    assert page.locator('figure').evaluate(READ) == expected(
        page, Backward(x5=-1.0))
    assert page.evaluate('window.scrollY') == top  # the page stays


def test_dots_are_moved_by_the_keyboard(show):
    page = show(Backward())
    grip = page.get_by_role('slider', name='x₂').and_(
        page.locator('[data-drag]'))
    grip.focus()
    for key, value in (('ArrowUp', 1.1), ('ArrowRight', 1.2),
                       ('ArrowDown', 1.1), ('PageUp', 2.1),
                       ('PageDown', 1.1)):
        page.keyboard.press(key)
        assert grip.get_attribute('aria-valuenow') == str(value)
        assert page.locator('figure').evaluate(READ) == expected(
            page, Backward(x2=value)), key
    assert page.evaluate('document.activeElement.dataset.drag') == 'x2'


def test_figures_of_one_kind_do_not_disturb_each_other(show):
    page = show(Axes(), Axes(kind='layer'))
    first, second = page.locator('figure').all()
    first.evaluate(SET, {'kind': 'group', 'c': 4})
    assert second.evaluate(READ) == expected(page, Axes(kind='layer'))
    assert first.evaluate(READ) == expected(page, Axes(kind='group', c=4))
