"""The digit pad under mouse, finger and keys; its numbers against Python."""
import base64
import os
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_book import assert_axe_clean

from d2ltvm import webassembly as wa
from d2ltvm.conv_schedule import vector_registers
from d2ltvm.cpu_schedule import host_target
from d2ltvm.folding import network_layers
from d2ltvm.mnist import digits_28, load_mnist
from d2ltvm.network_schedule import network_cut, packed_weights
from soak import SOAK

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / '_build/html'
TITLE, CHAPTER = 'intro.html', 'chapters/webassembly.html'
# Give the pad images as lists, get its logits
LOGITS = '''packed => {
  const pad = document.querySelector("figure.digit-pad");
  const images = new Float32Array(
    Uint8Array.from(atob(packed), c => c.charCodeAt(0)).buffer);
  return Array.from({length: images.length / 784}, (_, i) => [
    ...pad.classify(images.slice(784 * i, 784 * (i + 1)))]);
}'''
SEPARATE = '''([images, statistics]) => {
  const pad = document.querySelector("figure.digit-pad");
  const {logits, stages} = pad.separate(images, statistics);
  return [[...logits], stages.map(stage => ["receives", "gives"].map(
    at => [[...stage[at].mean], [...stage[at].variance]]))];
}'''


def packed(images):
    """The bytes of images, as a text that a page unpacks."""
    return base64.b64encode(images.astype('<f4').tobytes()).decode()


def logits_of(tab, images):
    return tab.evaluate(LOGITS, packed(images))


def pad_of(tab):
    tab.locator('figure.digit-pad[data-live]').wait_for()
    return tab.locator('figure.digit-pad')


@pytest.fixture(scope='module')
def images():
    """200 digits, as the network gets them."""
    data = load_mnist() if os.environ.get('D2LTVM_DATA') else digits_28()
    return data.test_images[:200].reshape(200, 784) / np.float32(255)


def weights_of(tab, weights):
    """The weights that the page has given to its module, shaped as these."""
    texts = tab.evaluate('''() => document.querySelector(
      "figure.digit-pad").arrays.slice(1, -1).map(array => {
        const bytes = new Uint8Array(array.buffer, array.byteOffset,
                                     array.byteLength);
        return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(""));
      })''')
    return [np.frombuffer(base64.b64decode(text), '<f4').reshape(like.shape)
            for text, like in zip(texts, weights, strict=True)]


# As if the browser knew no other instructions than those of one build
ONLY = '''const validate = WebAssembly.validate;
WebAssembly.validate = code => validate(code) && code.length ===
  atob(digitBuilds[location.search.slice(1)]).length;
'''


def test_the_page_computes_what_python_does(visit, book, images):
    """Its weights, but for a last bit; with them all logits, bit by bit."""
    pytest.importorskip('wasmtime')
    layers = wa.digit_layers(wa.stored_network(
        ROOT / 'assets/digit_network.js'))
    first, *_ = wa.BUILDS
    tab = visit(f'{CHAPTER}?{first}', before=ONLY)
    for build in wa.BUILDS:
        if build != first:
            tab.goto(f'{book}{CHAPTER}?{build}')
        assert pad_of(tab).evaluate('pad => pad.build') == build
        logits = np.array(logits_of(tab, images), 'float32')
        weights = packed_weights(layers, network_cut(
            layers, 1, wa.wasm_target(build), 1))
        given = weights_of(tab, weights)
        for array, right in zip(given, weights, strict=True):
            # Math.pow and NumPy's may round differently
            assert_allclose(array, right, rtol=2 ** -23)
        run = wa.load_module(wa.pad_module(build))
        expected = np.concatenate([
            run('network', image.reshape(1, 1, 28, 28), *given)
            for image in images])
        assert_allclose(logits, expected, atol=1e-5 * abs(expected).max())
        if build != 'relaxed' or vector_registers(host_target()) > 15:
            assert_array_equal(logits, expected)
        logits = np.array(tab.evaluate('''([image, at]) => {
          const pad = document.querySelector("figure.digit-pad");
          const broken = Float32Array.from(image);
          broken[at] = NaN;
          return [...pad.classify(broken)].map(Number.isNaN);
        }''', [images[0].tolist(), 300]))
        assert logits.all()
        again = logits_of(tab, images[:1])
        assert np.isfinite(again).all()


def arc(cx, cy, rx, ry, start, stop, steps=16):
    """Points on an ellipse; degrees, clockwise from the right."""
    return [(cx + rx * np.cos(a), cy + ry * np.sin(a))
            for a in np.radians(np.linspace(start, stop, steps))]


DIGITS = [
    [arc(140, 140, 55, 85, -90, 270, 24)],
    [[(140, 50), (138, 140), (135, 230)]],
    [[*arc(135, 95, 50, 45, -170, 20), (160, 150), (90, 220), (195, 218)]],
    [[*arc(135, 95, 45, 42, -150, 90), *arc(135, 185, 52, 46, -90, 150)]],
    [[(100, 50), (85, 145), (190, 145)], [(175, 60), (165, 235)]],
    [[(185, 55), (110, 55), (102, 130), *arc(130, 175, 55, 52, -110, 150)]],
    [[(165, 45), (120, 110), *arc(140, 180, 48, 48, -160, 200, 20)]],
    [[(85, 65), (195, 62), (155, 140), (125, 235)]],
    [[(140 + 48 * np.sin(2 * t), 140 - 92 * np.cos(t))
      for t in np.linspace(0, 2 * np.pi, 40)]],
    [[*arc(140, 95, 45, 45, 0, -360, 20), (182, 150), (165, 235)]],
]


def draw(tab, strokes, steps=3):
    """With the mouse, in units of the field, which has 280 of them."""
    field = tab.locator('.digit-pad .pad')
    field.scroll_into_view_if_needed()
    box = field.bounding_box()

    def at(point):
        return (box['x'] + point[0] * box['width'] / 280,
                box['y'] + point[1] * box['height'] / 280)
    for first, *more in strokes:
        tab.mouse.move(*at(first))
        tab.mouse.down()
        for point in more:
            tab.mouse.move(*at(point), steps=steps)
        tab.mouse.up()


def test_ten_drawn_digits_are_read_right(visit):
    tab = visit(TITLE)
    pad, read = pad_of(tab), []
    for strokes in DIGITS:
        pad.locator('.clear').click()
        draw(tab, strokes, steps=3 if SOAK else 1)
        read.append(pad.locator('.reads').inner_text()[:10])
    assert read == [f'It reads {digit}' for digit in range(10)]
    shares = [float(text.split()[0]) for text in
              pad.locator('.bars .share').all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=0.6)
    assert pad.locator('.bars .first').count() == 1
    assert 'an image' in pad.locator('.time').inner_text()


def test_a_drawing_is_scaled_and_centred_as_mnist(visit):
    tab = visit(TITLE)
    pad_of(tab)
    for place, size in ((20, 70), (150, 110)):
        picture = np.array(tab.evaluate('''strokes => [...document
          .querySelector("figure.digit-pad").raster(strokes, 280)]''', [
            [[place, place], [place + size, place],
             [place + size / 2, place + size]]])).reshape(28, 28)
        assert picture.min() == 0 and picture.max() == 1
        ys, xs = np.indices((28, 28))
        for axis in ys, xs:
            assert (axis * picture).sum() / picture.sum() == pytest.approx(
                14, abs=0.2)  # what leaves the picture is cut
            seen = axis[picture > 0.5]
            assert 17 <= seen.max() - seen.min() + 1 <= 21


def test_a_finger_draws(visit):
    tab = visit(TITLE, width=390, has_touch=True, is_mobile=True)
    pad, field = pad_of(tab), tab.locator('.digit-pad .pad')
    field.scroll_into_view_if_needed()
    box, top = field.bounding_box(), tab.evaluate('scrollY')
    finger = tab.context.new_cdp_session(tab)
    for kind, share in [('touchStart', 0.2), *(
            ('touchMove', 0.2 + i / 20) for i in range(1, 13)),
            ('touchEnd', None)]:
        finger.send('Input.dispatchTouchEvent', {
            'type': kind, 'touchPoints': [] if share is None else [{
                'x': box['x'] + box['width'] / 2,
                'y': box['y'] + share * box['height']}]})
    pad.locator('.reads', has_text='It reads 1').wait_for()
    assert tab.evaluate('scrollY') == top  # the page stays


def has_ink(tab, x, y):
    return tab.locator('.digit-pad .pad').evaluate("""(pad, [x, y]) => {
      const copy = document.createElement("canvas");
      const context = copy.getContext("2d", {willReadFrequently: true});
      context.drawImage(pad, 0, 0);
      return context.getImageData(x, y, 1, 1).data[3] > 0;
    }""", [x, y])


def test_two_fingers_draw_two_strokes(visit):
    tab = visit(TITLE, width=390, has_touch=True, is_mobile=True)
    pad_of(tab)
    field = tab.locator('.digit-pad .pad')
    field.scroll_into_view_if_needed()
    box, finger = field.bounding_box(), tab.context.new_cdp_session(tab)
    for kind, share in (('touchStart', 0.2), ('touchMove', 0.4),
                        ('touchMove', 0.8), ('touchEnd', None)):
        finger.send('Input.dispatchTouchEvent', {
            'type': kind, 'touchPoints': [] if share is None else [
                {'x': box['x'] + across * box['width'],
                 'y': box['y'] + share * box['height'], 'id': i}
                for i, across in enumerate((0.25, 0.75))]})
    assert has_ink(tab, 70, 140) and has_ink(tab, 210, 140)
    assert not has_ink(tab, 140, 140)


def test_strokes_that_leave_the_pad_or_are_cleared(visit):
    tab = visit(TITLE)
    pad = pad_of(tab)
    draw(tab, [[(40, 40), (40, 240), (-60, 240), (-60, 20), (200, 20)]])
    assert has_ink(tab, 40, 140) and has_ink(tab, 150, 20)
    assert not has_ink(tab, 2, 140)  # there was no ink outside
    box = pad.locator('.pad').bounding_box()
    tab.mouse.move(box['x'] + 60, box['y'] + 60)
    tab.mouse.down()
    pad.locator('.clear').evaluate('button => button.click()')
    assert pad.locator('.reads').inner_text() == 'Draw a digit.'
    tab.mouse.move(box['x'] + 60, box['y'] + 160, steps=4)
    tab.mouse.up()
    pad.locator('.reads', has_text='It reads').wait_for()


def test_an_empty_pad_says_what_it_reads(visit):
    tab = visit(TITLE)
    pad, details = pad_of(tab), tab.locator('.digit-pad summary')
    reads = pad.locator('.reads')
    details.click()
    pad.locator('.reads', has_text='a test digit. It reads 7').wait_for()
    assert pad.locator('.stages svg').count() == 6
    pad.locator('.clear').click()
    details.click()
    assert reads.inner_text() == 'Draw a digit.'
    assert pad.locator('.stages svg').count() == 0


def test_keys_alone(visit):
    tab = visit(TITLE)
    pad, field = pad_of(tab), tab.locator('.digit-pad .pad')
    for _ in range(200):
        tab.keyboard.press('Tab')
        if field.evaluate('field => field === document.activeElement'):
            break
    for key in (*['ArrowUp'] * 9, ' ', *['ArrowDown'] * 18, ' '):
        tab.keyboard.press(key)
    pad.locator('.reads', has_text='It reads 1').wait_for()
    assert pad.locator('.pen').inner_text() == 'The pen is up.'
    tab.keyboard.press('Delete')
    tab.keyboard.press('Tab')
    assert pad.locator('.clear').evaluate(
        'button => button === document.activeElement')
    for digit in range(10):
        tab.keyboard.press('Tab')
        tab.keyboard.press('Enter')
        pad.locator('.reads', has_text=f'It reads {digit}').wait_for()
    tab.keyboard.press('Tab')
    tab.keyboard.press('Enter')
    pad.locator('.stages svg').first.wait_for()
    tab.keyboard.press('Tab')
    tab.keyboard.press('ArrowDown')
    assert pad.locator('input[value=running]').is_checked()
    assert 'differ by' in pad.locator('.difference').inner_text()


def exact_network(parameters, X, statistics):
    """Logits of the first image, moments around each normalization."""
    start, stages = 'running_' * (statistics == 'running'), []
    p = {name: a.astype('float64') for name, a in parameters.items()}
    layers, _ = network_layers(parameters)
    for i, (W, b) in enumerate(layers, start=1):
        W = W.astype('float64')
        if W.ndim == 4:
            k = W.shape[-1]
            X = np.lib.stride_tricks.sliding_window_view(
                X, (1, 1, k, k))[:, :, :, :, 0, 0]
            X = np.tensordot(X, W, ((1, 4, 5), (1, 2, 3))) + b  # N, H, W, C
        else:
            X = X.reshape(len(X), -1) @ W.T + b
        if i == 4:
            return X[0], stages
        axes = tuple(range(X.ndim - 1))
        own = X.mean(axes), X.var(axes)
        mean, var = own if statistics == 'batch' else (
            p[f'{start}mean{i}'], p[f'{start}var{i}'])
        X = (X - mean) / np.sqrt(var + 1e-5) * p[f'gamma{i}'] + p[f'beta{i}']
        stages.append((own, (X.mean(axes), X.var(axes))))
        X = np.maximum(X, 0)
        if W.ndim == 4:
            h = X.shape[1] // 2
            X = X[:, :2 * h, :2 * h].reshape(
                len(X), h, 2, h, 2, -1).mean((2, 4)).transpose(0, 3, 1, 2)
    raise AssertionError


def test_what_normalizations_receive_and_give(visit, images):
    tab = visit(CHAPTER)
    pad_of(tab)
    parameters = wa.stored_network(ROOT / 'assets/digit_network.js')
    for statistics, count in product(('population', 'running', 'batch'),
                                     (1, 8)):
        X = images[:count].astype('float64')
        logits, stages = tab.evaluate(SEPARATE,
                                      [X.ravel().tolist(), statistics])
        expected, moments = exact_network(
            parameters, X.reshape(count, 1, 28, 28), statistics)
        assert_allclose(logits, expected, atol=1e-9 * abs(expected).max())
        for found, right in zip(stages, moments, strict=True):
            for a, b in zip(found, right, strict=True):
                assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        if statistics == 'population':
            assert_allclose(logits_of(tab, images[:1])[0],
                            expected, atol=1e-5 * abs(expected).max())


def test_statistics_are_switched(visit):
    tab = visit(CHAPTER)
    pad = pad_of(tab)
    pad.locator('summary').click()
    answers, many = {}, '64' if SOAK else '8'
    for statistics in 'population', 'running', 'batch':
        pad.locator(f'input[value={statistics}]').check()
        for digit in 2, 3:
            for count in '1', many:
                pad.locator(f'input[name=images][value="{count}"]').check()
                pad.get_by_label(f'Test digit {digit}').click()
                answers[statistics, digit, count] = pad.locator(
                    '.bars .share').all_inner_texts()
    for statistics in 'population', 'running':
        assert answers[statistics, 2, '1'] == answers[statistics, 2, many]
    assert answers['population', 2, '1'] != answers['population', 3, '1']
    # One number for each channel is its own mean
    assert answers['batch', 2, '1'] == answers['batch', 3, '1']
    assert answers['batch', 2, many] != answers['batch', 3, many]
    assert pad.locator('input[value=separate]').is_disabled()
    assert pad.locator('.stages svg').count() == 6
    pad.locator('input[value=population]').check()
    pad.locator('input[value=separate]').check()
    assert 'differ by' in pad.locator('.difference').inner_text()


@pytest.mark.parametrize(('page', 'theme', 'width'), [
    (TITLE, 'dark', 390), (CHAPTER, 'light', 390),
    pytest.param(TITLE, 'light', 1280, marks=pytest.mark.soak),
    pytest.param(CHAPTER, 'dark', 1280, marks=pytest.mark.soak)])
def test_axe_after_use(visit, page, theme, width):
    tab = visit(page, theme, width)
    pad = pad_of(tab)
    draw(tab, DIGITS[3])
    pad.locator('summary').click()
    pad.locator('input[value=batch]').check()
    pad.locator('.stages svg').first.wait_for()
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    # The rest of the page has tests of its own
    tab.evaluate('''() => {
      const pad = document.querySelector("figure.digit-pad");
      document.querySelector("article").replaceChildren(
        document.querySelector("article h1"), pad);
      scrollTo(0, 0);
    }''')
    assert_axe_clean(tab)


def test_times_are_measured_here(visit):
    tab = visit(CHAPTER)
    figure = tab.locator('figure.digit-timing[data-live]')
    figure.get_by_role('button').click()
    figure.get_by_text('Done.').wait_for(timeout=120_000)
    rows = [row.locator('td').all_inner_texts()
            for row in figure.locator('tbody tr').all()]
    assert len(rows) == 1 + 3 * 2 + 3
    for _, time, error in rows:
        assert float(time) > 0
        assert 0 < float(error.replace('\u2212', '-')) < 1e-3


def test_it_works_from_a_file(chromium, book):
    """Offline, and nothing but files is asked for."""
    context, asked = chromium.new_context(offline=True), []
    tab = context.new_page()
    tab.on('request', lambda request: asked.append(request.url))
    tab.on('pageerror', lambda error: asked.append(str(error)))
    for page in TITLE, CHAPTER:
        tab.goto((BOOK / page).as_uri())
        pad = pad_of(tab)
        pad.get_by_label('Test digit 4').click()
        pad.locator('.reads', has_text='It reads 4').wait_for()
    assert {url.partition(':')[0] for url in asked} <= {'file', 'data'}
    context.close()


def test_a_browser_without_it_gets_a_sentence(visit):
    tab = visit(CHAPTER, java_script_enabled=False)
    for name in 'pad', 'timing':
        figure = tab.locator(f'figure.digit-{name}')
        assert 'Where scripts' in figure.inner_text()
        assert not figure.locator('button, summary, table').first.is_visible()
    tab = visit(CHAPTER, before='delete globalThis.WebAssembly')
    for name in 'pad', 'timing':
        figure = tab.locator(f'figure.digit-{name}')
        figure.get_by_text('this browser has no WebAssembly').wait_for()
        assert not figure.locator('button, summary, table').first.is_visible()


def test_paper_has_a_sentence_in_its_place(visit):
    tab = visit(CHAPTER)
    pad_of(tab)
    tab.emulate_media(media='print')
    for name in 'pad', 'timing':
        parts = tab.locator(f'figure.digit-{name} > *')
        assert [part.is_visible() for part in parts.all()] == [
            True, *(parts.count() - 1) * [False]]
        assert 'Where scripts' in parts.first.inner_text()


def test_pages_without_a_pad_do_not_load_it(book):
    having = set()
    for path in BOOK.rglob('*.html'):
        text = path.read_text()
        if re.search(r'<script[^>]*\bdigit_\w+\.js', text):
            having.add(path.relative_to(BOOK).as_posix())
    assert having == {TITLE, CHAPTER}
