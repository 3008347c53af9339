"""What runs in the page, in Firefox: one window for all of it."""
import json

import numpy as np
import pytest
import test_pyodide
from numpy.testing import assert_allclose
from test_digit_pad import (
    BOOK, CHAPTER, DIGITS, LOGITS, ROOT, images, packed)
from test_pyodide import BUSY, DISK, LIVE, number

from d2ltvm import webassembly as wa
from d2ltvm.network_schedule import compile_network

__all__ = ['images']


def test_a_digit_is_drawn_and_read(fox, book, images):
    fox.asked.clear()
    fox.go((BOOK / CHAPTER).as_uri())
    pad = 'document.querySelector("figure.digit-pad")'
    fox.wait(f'{pad}.matches("[data-live]")')
    for digit in 3, 4:  # one stroke, and two
        fox.click(f'{pad}.querySelector(".clear")')
        for stroke in DIGITS[digit]:
            fox.drag(f'{pad}.querySelector(".pad")',
                     np.array(stroke) / 280)
        fox.wait(f'{pad}.querySelector(".reads").textContent.startsWith('
                 f'"It reads {digit}")')
    shares = json.loads(fox.evaluate(
        f'JSON.stringify([...{pad}.querySelectorAll(".bars .share")].map('
        'share => parseFloat(share.textContent)))'))
    assert np.argmax(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.6)
    logits = json.loads(fox.evaluate(
        f'JSON.stringify(({LOGITS})({json.dumps(packed(images[:20]))}))'))
    network = compile_network(wa.digit_layers(wa.stored_network(
        ROOT / 'assets/digit_network.js')), 20, threads=1)
    native = network(images[:20].reshape(20, 1, 28, 28))
    assert_allclose(logits, native, atol=1e-5 * abs(native).max())
    assert {url.partition(':')[0] for url in fox.asked} <= {'file', 'data'}


@test_pyodide.pytestmark
def test_a_cell_runs(fox):
    fox.asked.clear()
    fox.go(f'{DISK}chapters/conventions.html')
    index = number('conventions', 'check-layer-arrays')
    fox.click('document.querySelector(".live-bar button")')
    fox.wait('document.querySelector(".live-bar [role=status]").textContent'
             '.startsWith("Python: ready")')
    cell = f'document.querySelectorAll({json.dumps(LIVE)})[{index}]'
    fox.click(f'{cell}.querySelector("pre.live-code")')
    fox.press('Control+a', *'if 6:', '\ue007', *'print(6 * 7, "a/b")',
              'Shift+\ue007')
    fox.wait(f'!{cell}.querySelector({json.dumps(BUSY)})')
    assert fox.evaluate(
        f'{cell}.querySelector(".cell_output").innerText') == '42 a/b\n'
    assert {address.split(':')[0] for address in fox.asked} <= {
        'file', 'blob', 'data'}
