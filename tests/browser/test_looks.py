"""How a page looks, and what it does under hand and key."""
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / '_build/html'
TOC = yaml.safe_load((ROOT / '_toc.yml').read_text())
PAGES = [f'{name}.html' for name in (TOC['root'], *(
    chapter['file'] for part in TOC['parts'] for chapter in part['chapters']))]


@cache
def texts():
    """Those of the pages, the shortest first."""
    return dict(sorted(((page, (BOOK / page).read_text()) for page in PAGES
                        if (BOOK / page).is_file()),
                       key=lambda page: len(page[1])))


def with_text(text, times=1):
    """The shortest page of the book that has it, so often."""
    for page, found in texts().items():
        if found.count(text) >= times:
            return page
    return pytest.skip(f'no page has {text}')


@pytest.mark.parametrize('system', ['light', 'dark'])
def test_a_first_visit_has_the_theme_of_the_system(chromium, book, system):
    context = chromium.new_context(color_scheme=system)
    tab = context.new_page()
    messages = []
    tab.on('console', lambda message: messages.append(message.text)
           if message.type in ('error', 'warning') else None)
    # What is there before the theme's own script runs
    tab.add_init_script('''addEventListener("DOMContentLoaded", () => {
      window.early = document.documentElement.dataset.theme; });''')
    theme = 'document.documentElement.dataset.theme'
    page, other = list(texts())[:2]
    tab.goto(book + page)
    assert tab.evaluate(theme) == system == tab.evaluate('early')
    tab.emulate_media(color_scheme='dark' if system == 'light' else 'light')
    tab.goto(book + other)
    assert tab.evaluate(theme) != system
    tab.locator('.theme-switch-button:visible').first.click()
    chosen = tab.evaluate(theme)
    tab.emulate_media(color_scheme='dark' if chosen == 'light' else 'light')
    tab.reload()
    assert tab.evaluate(theme) == chosen
    assert messages == []
    context.close()


def test_headings_grow_smaller(visit):
    tab = visit(with_text('<h3>'))
    sizes = [tab.locator(f'article h{level}').first.evaluate(
        'h => [parseFloat(getComputedStyle(h).fontSize),'
        ' +getComputedStyle(h).fontWeight]') for level in (1, 2, 3)]
    for (larger, bolder), (size, weight) in pairwise(sizes):
        assert larger > 1.2 * size and bolder >= weight


@pytest.mark.parametrize('width', [1280, 390])
def test_a_term_explains_itself(visit, width):
    tab = visit(with_text('class="term"', 4), width=width)
    for term in tab.locator('.term').all()[:4]:
        link, tip = term.locator('a'), term.locator('.tip')
        assert not tip.is_visible()
        link.focus()
        assert tip.is_visible() and len(tip.inner_text()) > 20
        box, word = tip.bounding_box(), link.bounding_box()
        assert box['x'] >= 0 and box['x'] + box['width'] <= width
        # Beside the word, not over it
        assert (box['y'] >= word['y'] + word['height'] - 8
                or box['y'] + box['height'] <= word['y'] + 8)
        assert link.get_attribute('aria-describedby') == \
            tip.get_attribute('id')
        tab.keyboard.press('Escape')
        assert not tip.is_visible()
        link.blur()
        tab.mouse.move(2, 2)
        link.hover()
        assert tip.is_visible()
        tab.mouse.move(2, 2)
        assert not tip.is_visible()


def test_a_term_explains_itself_without_a_script(visit):
    tab = visit(with_text('class="term"'), java_script_enabled=False)
    tab.locator('.term a').first.focus()
    assert tab.locator('.tip').first.is_visible()


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_a_figure_opens_by_click_and_key(visit, theme):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    tab = visit(with_text('class="enlarge"'), theme, width=390)
    link, dialog = (tab.locator(name).first
                    for name in ('a.enlarge', 'dialog.enlarged'))
    before = link.locator('img').bounding_box()['width']
    at = tab.url
    link.click()
    image = dialog.locator('img')
    assert image.bounding_box()['width'] > 1.5 * before
    assert image.get_attribute('alt') == link.locator('img').get_attribute(
        'alt')
    found = axe.run(tab, context='dialog.enlarged', options={
        'preload': False}).response['violations']
    assert [rule['id'] for rule in found] == []
    dialog.locator('button').click()
    assert not dialog.is_visible()
    link.focus()
    link.press('Enter')
    assert dialog.is_visible()
    tab.keyboard.press('Escape')
    assert not dialog.is_visible()
    assert link.evaluate('a => a === document.activeElement')
    assert tab.url == at


def test_a_figure_is_a_link_without_a_script(visit):
    tab = visit(with_text('class="enlarge"'), java_script_enabled=False)
    link = tab.locator('a.enlarge').first
    name = link.locator('img').get_attribute('src').split('/')[-1]
    link.click()
    assert tab.url.endswith(name)


def test_charts_have_no_white_slab_at_night(visit):
    tab = visit(with_text('class="enlarge"'), 'dark')
    image = tab.locator('article a.enlarge img:not(.shades)').first
    style = image.evaluate('''i => { const s = getComputedStyle(i);
      return [s.filter, s.backgroundColor, s.padding]; }''')
    assert style == ['invert(0.93) hue-rotate(180deg)', 'rgba(0, 0, 0, 0)',
                     '0px']


def test_numbers_in_tables_stay_on_their_line(visit):
    page = with_text('class="number')
    assert visit(page, width=390).evaluate('''() =>
      [...document.querySelectorAll("article .number")].filter(cell => {
        const range = document.createRange();
        range.selectNodeContents(document.createTreeWalker(
          cell, NodeFilter.SHOW_TEXT).nextNode());
        return new Set([...range.getClientRects()].map(
          r => Math.round(r.top))).size > 1;
      }).map(cell => cell.textContent)''') == []


# How many lines each of them takes, and how many were printed
LINES = '''() => [...document.querySelectorAll(
  "article pre.columns")].filter(pre => pre.checkVisibility()).map(
  pre => { const s = getComputedStyle(pre); return [
    (pre.clientHeight - parseFloat(s.paddingTop)
     - parseFloat(s.paddingBottom)) / parseFloat(s.lineHeight),
    pre.textContent.trimEnd().split("\\n").length]; })'''


def test_printed_columns_stay_in_their_lines(visit):
    tab = visit(with_text('<pre class="columns"', 4))
    for width in (1280, 390):
        tab.set_viewport_size({'width': width, 'height': 900})
        lines = tab.evaluate(LINES)
        assert lines
        for seen, printed in lines:
            assert abs(seen - printed) < 0.5


def test_the_words_of_an_explorer_stand_below_its_drawing(visit):
    """No empty space there: the controls beside it are taller."""
    tab = visit('intro.html')
    drawing, words, form = (tab.locator(f'figure.explorer {name}').first
                            .bounding_box()
                            for name in ('svg', '[role=status]', 'form'))
    below = drawing['y'] + drawing['height']
    assert 0 <= words['y'] - below < 40
    assert words['x'] + words['width'] <= form['x']


def test_tables_of_few_columns_fit_a_phone(visit):
    found = visit('coming_from.html', width=390).evaluate('''() =>
      [...document.querySelectorAll("article table")].filter(
      table => table.rows[0].cells.length <= 3).map(table => [
        table.getBoundingClientRect().width,
        table.parentElement.clientWidth])''')
    assert found
    for table, column in found:
        assert table <= column + 1


def test_contents_mark_the_section_that_is_read(visit):
    tab = visit('chapters/theory.html')
    entries = tab.locator('#contents-of-page > ul > li > a')
    sections = tab.locator('article > section > section')
    assert entries.count() == sections.count() > 3
    for i in (3, 1, 4, 0):  # jumps, so that no heading passes the window
        sections.nth(i).evaluate(
            's => scrollTo({top: s.offsetTop + 20, behavior: "instant"})')
        tab.wait_for_function(
            'i => document.querySelectorAll("#contents-of-page > ul > li")[i]'
            '.classList.contains("active")', arg=i)
        assert tab.locator('#contents-of-page > ul > li.active').count() == 1
    last = entries.count() - 1
    entries.nth(last).click()
    tab.wait_for_function(
        'i => document.querySelectorAll("#contents-of-page > ul > li > a")[i]'
        '.classList.contains("active")', arg=last)


def test_the_ring_around_a_button_touches_nothing(visit):
    tab = visit(with_text('type="reset"'))
    button = tab.locator('figure.explorer button').first
    tab.locator('figure.explorer input').last.focus()
    button.focus()
    ring, below, above = button.evaluate('''b => {
      const s = getComputedStyle(b), r = b.getBoundingClientRect();
      const wide = parseFloat(s.outlineWidth) + parseFloat(s.outlineOffset);
      const figure = b.closest("figure");
      const others = [...figure.querySelectorAll(
        "input, label, output, p, figcaption")].filter(
        e => !e.contains(b)).map(e => e.getBoundingClientRect()).filter(
        o => o.left < r.right && o.right > r.left);
      return [[r.top - wide, r.bottom + wide],
        Math.min(1e9, ...others.map(o => o.top).filter(t => t > r.top)),
        Math.max(...others.map(o => o.bottom).filter(t => t < r.bottom))];
    }''')
    assert above <= ring[0] and ring[1] <= below


@pytest.mark.parametrize('width', [1280, 390])
def test_the_journey_can_be_read_and_walked(visit, width):
    tab = visit('intro.html', width=width)
    drawing = tab.locator('figure.drawing svg')
    assert drawing.locator('a').count() == 15
    scale = drawing.evaluate('s => s.getScreenCTM().a')
    assert 12 * scale >= 10  # the smallest text, in pixels
    for text in drawing.locator('text').all():
        box = text.bounding_box()
        assert box['x'] >= 0 and box['x'] + box['width'] <= width
    drawing.locator('a').nth(3).focus()
    tab.keyboard.press('Enter')
    tab.wait_for_url('**/chapters/from_scratch.html')
