"""Training in the page: NumPy against theory, JavaScript against NumPy."""
import base64
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from d2ltvm.theory import numeric_gradient
from d2ltvm.training_in_page import (
    ACTIVATIONS,
    KINDS,
    Trainer,
    Training,
    _state,
    accuracy,
    activate,
    backward,
    first_weights,
    forward,
    read_digits,
    slope,
    uniform,
)
from soak import SOAK

ASSETS = Path(__file__).resolve().parent.parent / 'assets'
FILE = ASSETS / 'small_digits.js'
DIGITS = read_digits(FILE)
SETTINGS = {'rate': 0.1, 'scale': 1, 'depth': 4, 'batch': 32,
            'activation': 'relu', 'noise': 0.5, 'draw': 1}
CASES = [{}, {'rate': 0.3, 'activation': 'sigmoid', 'draw': 2},
         {'activation': 'tanh', 'depth': 8, 'batch': 16, 'rate': 0.01},
         {'depth': 1, 'batch': 64, 'noise': 2, 'scale': 0.3, 'draw': 9}]
NUMBERS = '''array => {
  const bytes = new Uint8Array(Float64Array.from(array).buffer), parts = [];
  for (let i = 0; i < bytes.length; i += 8192)
    parts.push(String.fromCharCode(...bytes.subarray(i, i + 8192)));
  return btoa(parts.join(""));
}'''
STEPS = 50 if SOAK else 20


def test_the_file_has_the_known_digits():
    known = load_digits()
    lines = FILE.read_text().split('`')[1].split()
    assert lines == [
        f'{label}' + ''.join('0123456789abcdefg'[int(v)] for v in pixels)
        for label, pixels in zip(known.target[:1500], known.data[:1500],
                                 strict=True)]
    assert len(FILE.read_bytes()) < 100_000
    assert abs(DIGITS.images.mean(axis=0)).max() < 1e-14
    assert [len(a) for a in DIGITS] == [1000, 1000, 500, 500]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / 'some.js'
    path.write_text(FILE.read_text().replace('`\n0', '`\n'))
    with pytest.raises(ValueError, match=r'some\.js: expected 1500 lines'):
        read_digits(path)


@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_differences(kind, activation):
    start = Trainer(DIGITS, kind, depth=2, batch=8, draw=4)
    noise = [start.noise_of(i) for i in (0, 1)] if kind == 'noisy' else None
    net, X, labels = start.net, DIGITS.images[:8], DIGITS.labels[:8]
    net['beta'][0] += 0.2

    def run():
        logits, tape = forward(net, X, kind, activation, noise)
        return backward(net, logits, tape, labels, activation, noise)

    _, found = run()
    for name, i in (('W', 0), ('W', 2), ('beta', 0), ('beta', 2),
                    ('gamma', 1)):
        right = net[name][i]

        def loss(part, name=name, i=i, right=right):
            net[name][i] = np.concatenate([part, right[3:]])
            value = run()[0]
            net[name][i] = right
            return value
        expected = numeric_gradient(loss, right[:3].copy())
        np.testing.assert_allclose(found[name][i][:3], expected, rtol=1e-5,
                                   atol=1e-8, err_msg=f'{name} {i}')


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_slopes_are_derivatives(name):
    Z = np.array([-3.0, -0.5, 0.5, 2.0])
    np.testing.assert_allclose(
        slope(activate(Z, name), name),
        (activate(Z + 1e-6, name) - activate(Z - 1e-6, name)) / 2e-6,
        rtol=1e-6, atol=1e-9)


def test_the_scale_changes_training_and_not_the_first_loss():
    losses = {}
    for scale in (0.5, 1, 5):
        trainer = Trainer(DIGITS, 'with', scale=scale)
        for _ in range(10):
            trainer.advance()
        losses[scale] = trainer.losses
    np.testing.assert_allclose(losses[0.5][0], losses[5][0], rtol=1e-3)
    assert losses[0.5][10] < 0.9 * losses[5][10]


def test_the_copies_differ_in_the_layer_alone():
    plain, normal, noisy = (Trainer(DIGITS, kind) for kind in KINDS)
    for other in (normal, noisy):
        for W, same in zip(plain.net['W'], other.net['W'], strict=True):
            np.testing.assert_array_equal(W, same)
        np.testing.assert_array_equal(plain.tape[0][0], other.tape[0][0])
    received = noisy.tape[0][2]
    factor, shift = noisy.noise_of(0)
    np.testing.assert_allclose(received, factor * normal.tape[0][2] + shift)
    assert factor.min() >= 1 and factor.max() <= 1.25
    assert abs(shift).max() <= 0.5
    assert (noisy.noise_of(0) != noisy.noise_of(1)).all()
    noisy.advance()
    assert (noisy.noise_of(0)[0] != factor).all()


def test_an_overflow_ends_a_training():
    trainer = Trainer(DIGITS, 'without', scale=10.0, draw=2)
    for _ in range(40):
        trainer.advance()
    assert trainer.step < 40 and not np.isfinite(trainer.losses[-1])
    assert np.isfinite(trainer.losses[:-1]).all()
    state = _state([trainer], [[(0, 0.1)]], 40)
    assert (state['loss0'], state['share0']) == ('overflow', '–')
    assert None in state['sizes0']


@pytest.mark.parametrize(('error', 'message', 'wrong'), [
    (ValueError, r"kind: expected one of .*'noisy'.* got 'x'",
     {'kind': 'x'}),
    (ValueError, 'activation: expected one of', {'activation': 'gelu'}),
    (ValueError, 'rate: expected', {'rate': 0}),
    (ValueError, 'scale: expected', {'scale': -1.0}),
    (ValueError, 'noise: expected', {'noise': -0.5}),
    (TypeError, 'depth: expected an integer', {'depth': 2.0}),
    (ValueError, 'batch: expected 1 or more', {'batch': 0}),
    (TypeError, 'draw: expected an integer', {'draw': None})])
def test_wrong_settings_are_named(error, message, wrong):
    with pytest.raises(error, match=f'^{message}'):
        Trainer(**{'digits': DIGITS, 'kind': 'with', **wrong})
    with pytest.raises(ValueError, match=r'^rate: expected a number from 0'):
        Training(FILE, rate=9)
    with pytest.raises(ValueError, match=r'^steps: expected 0 or more'):
        Training(FILE, steps=-1)


def scripts(*names, change=('', '')):
    """The text of files of the page, with a part of it changed."""
    text = '\n'.join((ASSETS / f'{name}.js').read_text() for name in names)
    assert change[0] in text
    return text.replace(*change)


@pytest.fixture(scope='module')
def window(chromium):
    return chromium.new_page()


@pytest.fixture
def page(window):
    """An empty page in the same window: nothing of another test is left."""
    window.goto('about:blank')
    return window


def numbers(page, expression):
    return np.frombuffer(base64.b64decode(page.evaluate(
        f'({NUMBERS})({expression})')))


def differences(page, text, steps=STEPS, **changed):
    """Of each step: the largest difference from NumPy, beside the largest.

    All parameters, all gradients and the loss, for each network.
    """
    settings = {**SETTINGS, **changed}
    page.add_script_tag(content=text + f'''
const trainers = training.KINDS.map(kind => new training.Trainer(
  training.readDigits(smallDigits), kind, {json.dumps(settings)}));
const flat = ({{losses, net, gradients}}) => [[losses.at(-1)], ...[
  net, gradients].flatMap(part => [...part.W, ...part.gamma, ...part.beta])
  ].flatMap(array => [...array]);
const next = () => {{
  const all = trainers.flatMap(flat);
  trainers.forEach(trainer => trainer.advance());
  return all;
}};''')
    ours = [Trainer(DIGITS, kind, **settings) for kind in KINDS]
    found = []
    for _ in range(steps + 1):
        theirs, place = numbers(page, 'next()'), 0
        for trainer in ours:
            worst = abs(theirs[place] / trainer.losses[-1] - 1)
            place += 1
            for part in (trainer.net, trainer.gradients):
                for array in (a for key in ('W', 'gamma', 'beta')
                              for a in part[key]):
                    other = theirs[place:place + array.size]
                    place += array.size
                    if array.any():
                        worst = max(worst, abs(other - array.ravel()).max()
                                    / abs(array).max())
                    else:
                        assert not other.any()
            found.append(worst)
            trainer.advance()
        assert place == len(theirs)
    assert [t.step for t in ours] == [steps + 1] * 3
    return found


@pytest.mark.parametrize('changed', CASES, ids=str)
def test_javascript_is_numpy_at_each_step(page, changed):
    found = differences(page, scripts('small_digits', 'training'), **changed)
    assert len(found) == (STEPS + 1) * 3 and max(found) < 1e-12


@pytest.mark.parametrize('change', [
    ('dgamma[c] / m', 'dgamma[c] / (m - 1)'), ('1 - h * h', '1 - h'),
    ('sum / TRAINED', 'sum / 1500'), ('EPS = 1e-5', 'EPS = 1e-6'),
    ('- this.settings.rate *', '+ this.settings.rate *')], ids=str)
def test_a_fault_in_javascript_is_found(page, change):
    text = scripts('small_digits', 'training', change=change)
    found = differences(page, text, 2, activation='tanh', depth=2)
    assert max(found) > 1e-9


@pytest.mark.parametrize('changed', CASES, ids=str)
def test_javascript_shows_what_python_shows(page, changed):
    settings = {**SETTINGS, **changed}
    page.add_script_tag(content=scripts(
        'small_digits', 'training', 'training_figure'))
    theirs = page.evaluate('''settings => {
  const digits = training.readDigits(smallDigits);
  const trainers = training.KINDS.map(
    kind => new training.Trainer(digits, kind, settings));
  const shares = trainers.map(trainer => [[0, trainer.accuracy()]]);
  for (let step = 1; step <= 40; step++)
    trainers.forEach((trainer, n) => {
      trainer.advance();
      if (step % 20 === 0) shares[n].push([step, trainer.accuracy()]);
    });
  return training.state(trainers, shares, 40);
}''', settings)
    ours = [Trainer(DIGITS, kind, **settings) for kind in KINDS]
    shares = [[(0, accuracy(trainer))] for trainer in ours]
    for step in range(1, 41):
        for trainer, share in zip(ours, shares, strict=True):
            trainer.advance()
            if step % 20 == 0:
                share.append((step, accuracy(trainer)))
    expected = _state(ours, shares, 40)
    assert set(theirs) == set(expected)
    for key, value in expected.items():
        if isinstance(value, str):
            assert theirs[key] == value
        else:
            np.testing.assert_allclose(np.array(theirs[key]), value,
                                       rtol=1e-9, atol=1e-9, err_msg=key)


def test_random_numbers_are_the_same_to_the_bit(page):
    page.add_script_tag(content=scripts('training'))
    for stream, start in ((1, 0), (912, 5000), (102, 10 ** 6)):
        np.testing.assert_array_equal(
            uniform(stream, start, 1000), numbers(page, (
                f'Array.from({{length: 1000}}, (_, k) => training.uniform('
                f'{stream}, {start} + k))')))


def test_first_weights_have_their_scale():
    for scale in (0.1, 1.0, 10.0):
        *hidden, last = first_weights(6, scale, 2)['W']
        for W in hidden:
            np.testing.assert_allclose(W.std(), scale * np.sqrt(2 / len(W)),
                                       rtol=0.06)
        np.testing.assert_allclose(last.std(), np.sqrt(2 / len(last)),
                                   rtol=0.1)


def test_the_figure_is_the_same_every_time_and_describes_itself():
    first, second = (Training(FILE, steps=20, batch=0) for _ in range(2))
    assert first._repr_html_() == second._repr_html_()
    html = first._repr_html_()
    assert 'http' not in html and 'src=' not in html
    assert html.count('<script>globalThis.bookDrawing') == 1
    assert 'Step <span data-number="step" data-digits="0">20</span>' in html
    assert len(html.encode()) < 40e3
    assert first.chosen(first.settings) == {**SETTINGS, 'batch': 2}
