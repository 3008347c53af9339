"""The figure that trains, as a reader uses it."""
import re

from test_book import BOOK, CONTRAST, DARK, SETTLED, assert_axe_clean

PAGE = 'chapters/training_in_page.html'
FIGURE = 'figure[data-explorer="Training"]'
# The rest of the page has tests of its own
ALONE = f'''() => document.querySelector("article").replaceChildren(
  document.querySelector("article h1"),
  ...document.querySelectorAll(`.try, {FIGURE}`))'''
PATHS = f'''() => [...document.querySelectorAll(`{FIGURE} [data-path]`)].map(
  path => path.getAttribute("d"))'''


def wait_for(tab, step):
    """Until the figure stands at this step and trains no more."""
    tab.wait_for_function('''([figure, step]) => {
      const of = document.querySelector(figure);
      return of.querySelector("[data-number=step]").textContent === step &&
        of.querySelector("[data-do=run]").textContent === "Run";
    }''', arg=[FIGURE, str(step)], timeout=120_000)


def table(tab):
    return tab.locator(f'{FIGURE} td').all_text_contents()


def button(tab, name):
    return tab.locator(FIGURE).get_by_role('button', name=name, exact=True)


def slider(tab, name):
    return tab.locator(f'{FIGURE} [name={name}]')


def test_it_runs_to_what_python_has_drawn(visit):
    tab = visit(PAGE)
    numbers, paths = table(tab), tab.evaluate(PATHS)
    assert all(float(number) < 1 for number in numbers)
    button(tab, 'Step').click()
    wait_for(tab, 1)
    assert table(tab) != numbers and tab.evaluate(PATHS) != paths
    button(tab, 'Step').click()
    wait_for(tab, 2)
    button(tab, 'Run').evaluate('run => { run.click(); run.click(); }')
    wait_for(tab, 2)  # that was a pause
    assert tab.url.endswith('#steps=2')
    button(tab, 'Run').click()
    wait_for(tab, 300)
    assert table(tab) == numbers
    button(tab, 'Reset').click()
    wait_for(tab, 0)
    assert tab.url.endswith('#steps=0')


def test_by_keyboard_alone(visit):
    tab = visit(PAGE)
    button(tab, 'Reset').focus()
    tab.keyboard.press('Enter')
    wait_for(tab, 0)
    losses = table(tab)[::2]
    slider(tab, 'scale').focus()
    tab.keyboard.press('ArrowRight')
    assert slider(tab, 'scale').get_attribute('aria-valuetext') == '3'
    wait_for(tab, 0)
    without, *others = table(tab)[::2]
    # The layer takes the scale away, up to epsilon
    assert float(without) > 2 * float(losses[0])
    for before, after in zip(losses[1:], others, strict=True):
        assert abs(float(before) - float(after)) < 0.01
    tab.locator(f'{FIGURE} [name=activation]:checked').focus()
    tab.keyboard.press('ArrowDown')
    button(tab, 'Step').focus()
    tab.keyboard.press('Space')
    wait_for(tab, 1)
    assert tab.url.endswith('#scale=3&activation=tanh&steps=1')
    button(tab, 'First settings').focus()
    tab.keyboard.press('Enter')
    tab.wait_for_function('location.hash === "#steps=300"')
    assert slider(tab, 'scale').input_value() == '2'


def go(tab, address):
    """As if the reader wrote it behind the page's own."""
    tab.evaluate('address => { location.hash = address; }', address)


def test_an_address_is_a_state(visit):
    state = '#rate=1&batch=2&depth=2&activation=sigmoid&steps=5'
    tab = visit(PAGE + state)
    wait_for(tab, 5)
    values = [slider(tab, name).input_value()
              for name in ('rate', 'batch', 'depth', 'noise')]
    assert values == ['5', '0', '2', '1']
    assert slider(tab, 'rate').get_attribute('aria-valuetext') == '1'
    assert slider(tab, 'activation').nth(2).is_checked()
    there, paths = table(tab), tab.evaluate(PATHS)
    go(tab, '#steps=3')
    wait_for(tab, 3)
    assert table(tab) != there
    go(tab, state)
    wait_for(tab, 5)
    assert (table(tab), tab.evaluate(PATHS)) == (there, paths)


def test_what_an_address_asks_in_vain_is_said(visit):
    tab = visit(f'{PAGE}#noise=0&rate=7&steps=2')
    status = tab.locator(f'{FIGURE} [role=status]')
    for wrong in ('rate=7', 'depth=9', 'steps=301', 'colour=red',
                  'activation=gelu'):
        if wrong not in tab.url:
            go(tab, f'#noise=0&{wrong}' + '&steps=2' * ('steps' not in wrong))
        status.get_by_text(f'left out: {wrong}.').wait_for()
        assert slider(tab, 'rate').input_value() == '3'


def test_an_emptied_address_is_the_first_settings(visit):
    tab = visit(PAGE)
    drawn = tab.evaluate(PATHS)
    go(tab, '#rate=1&activation=sigmoid&steps=4')
    wait_for(tab, 4)
    assert slider(tab, 'rate').input_value() == '5'
    go(tab, '#')
    tab.wait_for_function('''figure => {
      const of = document.querySelector(figure);
      const step = of.querySelector("[data-number=step]").textContent;
      if (+step < 20) return false;
      of.querySelector("[data-do=run]").click();  // which is a pause
      return true;
    }''', arg=FIGURE)
    assert slider(tab, 'rate').input_value() == '3'
    assert slider(tab, 'activation').nth(0).is_checked()
    # It trains as Python did; the first three lines are the losses
    for now, whole in list(zip(tab.evaluate(PATHS), drawn, strict=True))[:3]:
        assert len(now) > 20 and whole.startswith(now)
    go(tab, '#rate=1&steps=4')
    wait_for(tab, 4)
    go(tab, '#')
    slider(tab, 'scale').focus()
    tab.keyboard.press('ArrowRight')
    assert tab.url.endswith('#scale=3&steps=300')


def test_a_histogram_has_the_colour_of_its_line(visit):
    tab = visit(PAGE)
    for theme in ('light', 'dark'):
        tab.evaluate(DARK.replace('dark', theme))
        colours = tab.evaluate("""figure => [0, 1, 2].map(n => {
          const [line, bars] = ["losses", "inputs"].map(name =>
            getComputedStyle(document.querySelector(
              `${figure} [data-path=${name}${n}]`)));
          return [line.stroke, bars.stroke, bars.fill];
        })""", FIGURE)
        assert all(len(set(same)) == 1 for same in colours)
        assert len({line for line, *_ in colours}) == 3

def test_an_address_of_a_section_is_left_alone(visit):
    tab = visit(PAGE + '#training-in-page-network')
    assert not tab.locator(FIGURE).get_by_text('Pause').count()
    assert table(tab)[0] != '' and 'steps' not in tab.url


def test_by_touch_on_a_phone_in_the_dark(visit):
    tab = visit(PAGE, 'dark', width=390, has_touch=True, is_mobile=True)
    buttons = tab.locator(f'{FIGURE} button')
    for box in (one.bounding_box() for one in buttons.all()):
        assert min(box['width'], box['height']) >= 24
    button(tab, 'Reset').tap()
    wait_for(tab, 0)
    batch = slider(tab, 'batch')
    batch.scroll_into_view_if_needed()
    box = batch.bounding_box()
    tab.touchscreen.tap(box['x'] + 3, box['y'] + box['height'] / 2)
    wait_for(tab, 0)
    assert tab.url.endswith('#batch=2&steps=0')
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    assert tab.evaluate(CONTRAST) == []
    tab.evaluate(ALONE)
    tab.wait_for_function(SETTLED)
    assert_axe_clean(tab)


def test_a_button_of_the_text_sets_the_figure(visit):
    tab = visit(PAGE)
    tries = tab.get_by_role('button', name='Show it in the figure')
    assert tries.count() == 5
    tries.nth(3).click()
    assert slider(tab, 'batch').get_attribute('aria-valuetext') == '2'
    assert slider(tab, 'rate').get_attribute('aria-valuetext') == '0.03'
    wait_for(tab, 300)
    run = button(tab, 'Run')
    assert run.evaluate('run => run === document.activeElement')
    top = run.bounding_box()['y']
    assert 0 <= top <= 900
    assert tab.url.endswith('#rate=0.03&batch=2&steps=300')
    assert float(table(tab)[2]) > 3 * float(table(tab)[0])


def test_an_overflow_is_said(visit):
    tab = visit(PAGE + '#scale=10&draw=2&steps=60')
    wait_for(tab, 60)
    assert table(tab)[:2] == ['overflow', '–']
    assert all(re.fullmatch(r'\d\.\d{3}', text) for text in table(tab)[2:])


def test_without_scripts_the_picture_and_its_numbers_are_there(visit):
    tab = visit(PAGE, java_script_enabled=False)
    figure = tab.locator(FIGURE)
    assert figure.locator('svg').is_visible() and len(table(tab)) == 6
    assert not figure.locator('button').first.is_visible()
    assert not figure.locator('input').first.is_visible()
    assert tab.get_by_role('button', name='Show it').count() == 0


def test_it_works_from_a_file(chromium, book):
    """With no server: nothing is fetched, and the address may change."""
    context = chromium.new_context(viewport={'width': 1280, 'height': 900})
    tab, complaints = context.new_page(), []
    tab.on('pageerror', lambda error: complaints.append(str(error)))
    tab.on('request', lambda request: request.url.startswith(
        ('file:', 'data:', 'blob:')) or complaints.append(request.url))
    tab.goto((BOOK / PAGE).as_uri() + '#steps=2')
    wait_for(tab, 2)
    button(tab, 'Step').click()
    wait_for(tab, 3)
    assert tab.url.endswith('#steps=3')
    context.close()
    assert complaints == []


def test_on_paper_there_are_no_controls(visit):
    tab = visit(PAGE + '#steps=4')
    wait_for(tab, 4)
    tab.emulate_media(media='print')
    assert not tab.locator(f'{FIGURE} button').first.is_visible()
    assert not tab.locator('.try button').first.is_visible()
    assert tab.locator(f'{FIGURE} svg').is_visible()


def test_axe_is_content_after_use(visit):
    tab = visit(PAGE + '#rate=1&steps=3')
    wait_for(tab, 3)
    for theme in ('light', 'dark'):
        tab.evaluate(DARK.replace('dark', theme))
        assert tab.evaluate(CONTRAST) == []
    tab.evaluate(ALONE)
    tab.wait_for_function(SETTLED)
    assert_axe_clean(tab)
