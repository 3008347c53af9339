"""The one style of the figures: sizes as seen, and no two drawings differ."""
import io
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

PIXELS = 96 / 72  # of a page, for each point
PHONE = 358  # the width of a column on a phone, in pixels


@pytest.fixture(autouse=True)
def style():
    with plt.style.context('d2ltvm.book'), mpl.rc_context({'backend': 'agg'}):
        yield
    plt.close('all')


def drawn(**options):
    figure, ax = plt.subplots()
    ax.plot(np.arange(5.0), np.arange(5.0) ** 2, 'o-', label='a curve')
    ax.set(xlabel='batch', ylabel='loss', title='A title')
    ax.legend()
    file = io.BytesIO()
    figure.savefig(file, **options)
    return figure, file.getvalue()


def test_two_drawings_are_the_same():
    first, second = (drawn(format='svg', metadata={'Date': None})[1]
                     for _ in range(2))
    assert first == second
    assert b'<dc:date>' not in first


def test_text_has_one_size_and_can_be_read_on_a_phone():
    figure, data = drawn(format='svg')
    texts = [text for text in figure.findobj(mpl.text.Text)
             if text.get_text()]
    sizes = {text.get_fontsize() for text in texts}
    assert len(texts) > 8 and sizes == {11.0}
    width = float(re.search(rb'<svg [^>]*?width="([\d.]+)pt"', data)[1])
    assert 500 < width * PIXELS < 672  # the column of a page
    assert 11 * PIXELS * PHONE / (width * PIXELS) > 9.5


def test_a_bitmap_has_twice_the_pixels():
    _, data = drawn(format='png')
    width = int.from_bytes(data[16:20])
    assert width >= 2 * 5.6 * 96


def test_curves_are_seen_on_white():
    """At least 3 to 1, as a graphical object needs (WCAG 1.4.11)."""
    def light(color):
        channel = np.array(mpl.colors.to_rgb(color))
        linear = np.where(channel <= .04045, channel / 12.92,
                          ((channel + .055) / 1.055) ** 2.4)
        return linear @ [.2126, .7152, .0722]

    for color in plt.rcParams['axes.prop_cycle'].by_key()['color']:
        assert 1.05 / (light(color) + .05) > 3, color
