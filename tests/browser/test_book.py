"""The rendered book as a reader meets it in the browser."""
import gzip
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / '_build/html'
SCREENSHOTS = ROOT / '_build/screenshots'
TOC = yaml.safe_load((ROOT / '_toc.yml').read_text())
CHAPTERS = [TOC['root'], *(chapter['file'] for part in TOC['parts']
                           for chapter in part['chapters'])]
PAGES = [f'{name}.html' for name in (*CHAPTERS, 'genindex', 'search')]
AXE = {'runOnly': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa',
                   'best-practice'],
       'rules': {'target-size': {'enabled': True}},
       'preload': False, 'resultTypes': ['violations']}
# One word of each colour is enough: a page has thousands of them
PRUNE = '''() => {
  const main = document.querySelector("main"), seen = new Set();
  const place = document.createComment("");
  main.replaceWith(place);
  for (const e of main.querySelectorAll(".highlight span, mjx-container")) {
    const around = e.closest(".cell_input, .cell_output, table, .admonition");
    const kind = [e.tagName, e.className, e.parentElement?.className,
                  around?.className].join();
    if (seen.has(kind)) e.remove(); else seen.add(kind);
  }
  place.replaceWith(main);
}'''
each = pytest.mark.parametrize('page', PAGES)
themes = pytest.mark.parametrize('theme', ['light', 'dark'])


def with_text(text):
    """The pages of the book that have it."""
    pages = [page for page in PAGES if text in (BOOK / page).read_text()]
    return pages or pytest.skip(f'no page has {text}')


def assert_axe_clean(tab):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    found = axe.run(tab, options=AXE).response['violations']
    assert [f'{rule["id"]}: {node["html"]}' for rule in found
            for node in rule['nodes']] == []


# Display equations that pass the column, or lie under their number
WIDE = """() => [...document.querySelectorAll(
    'article mjx-container[display="true"]')].flatMap(equation => {
  const box = equation.closest("div.math") ?? equation.parentElement;
  const column = box.getBoundingClientRect();
  const seen = equation.querySelector("mjx-math").getBoundingClientRect();
  const number = box.querySelector(".eqno")?.getBoundingClientRect();
  const end = number ? number.left : column.right;
  return seen.left < column.left - 1 || seen.right > end + 1 ||
    box.scrollWidth > box.clientWidth
    ? [`${box.id}: ${Math.round(seen.width)} of ` +
       Math.round(end - column.left)] : [];
})"""
# Everything that would be cut at the right edge of the paper
CUT = """() => [...document.querySelectorAll(
  "article pre, article table, article img, article svg, article mjx-container"
)].filter(e => e.checkVisibility() && (
  e.getBoundingClientRect().right > innerWidth + 1 ||
  (e.matches("pre, table") && e.scrollWidth > e.clientWidth + 1))).map(
  e => e.outerHTML.slice(0, 120))"""
# What a viewer can tell apart: text in the figures drawn by the page itself.
# axe leaves text in SVG alone.
CONTRAST = """() => {
  const rgb = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
    v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce(
    (sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = rgb(getComputedStyle(node).backgroundColor);
      if (color.length == 3) return color;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("article figure svg text")].map(t => {
    const [a, b] = [light(rgb(getComputedStyle(t).fill)),
                    light(behind(t))].sort((x, y) => y - x);
    return [t.textContent, (a + .05) / (b + .05)];
  }).filter(([, ratio]) => ratio < 4.5);
}"""
# Some time after a change of the size the theme has the keyboard reach what
# can be scrolled
SETTLED = """() => [...document.querySelectorAll(
  "pre, .cell_output > .output, .pst-scrollable-table-container")].every(
  e => e.tabIndex === 0 || (e.scrollWidth <= e.clientWidth &&
                            e.scrollHeight <= e.clientHeight))"""
DARK = 'document.documentElement.dataset.theme = "dark"'


def look(tab, page, theme, width, picture=True):
    """A picture; nothing scrolls sideways, is too wide, or too pale."""
    tab.set_viewport_size({'width': width, 'height': 900})
    assert tab.evaluate('document.documentElement.dataset.theme') == theme
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    assert tab.evaluate(WIDE) == []
    assert tab.evaluate(CONTRAST) == []
    if picture:
        SCREENSHOTS.mkdir(exist_ok=True)
        name = f'{page.replace("/", "-")[:-5]}-{theme}-{width}.png'
        tab.screenshot(path=SCREENSHOTS / name, full_page=True,
                       animations='disabled')  # of the resize


def assert_formulas_are_rendered(tab):
    formulas = tab.locator('.math').count()
    assert tab.locator('mjx-container').count() == formulas
    assert tab.locator('mjx-merror, [data-mjx-error]').count() == 0


def assert_nothing_is_cut_on_paper(tab):
    tab.emulate_media(media='print')
    # The width of A4 between margins of 15 mm, at 75 %
    tab.set_viewport_size({'width': 907, 'height': 1000})
    assert tab.evaluate(CUT) == []
    tab.emulate_media(media='screen')


@each
def test_page(visit, page):
    """In one visit: light and dark, wide and narrow, on paper, by axe."""
    tab = visit(page)
    assert_formulas_are_rendered(tab)
    look(tab, page, 'light', 1280)
    look(tab, page, 'light', 390, picture=False)
    assert_nothing_is_cut_on_paper(tab)
    tab.set_viewport_size({'width': 390, 'height': 900})
    tab.evaluate(DARK)
    look(tab, page, 'dark', 390)
    look(tab, page, 'dark', 1280, picture=False)
    tab.evaluate(PRUNE)
    tab.wait_for_function(SETTLED)
    assert_axe_clean(tab)
    tab.evaluate(DARK.replace('dark', 'light'))
    tab.set_viewport_size({'width': 390, 'height': 900})
    tab.wait_for_function(SETTLED)
    assert_axe_clean(tab)


@pytest.mark.soak
@each
@themes
@pytest.mark.parametrize('width', [390, 1280])
def test_page_in_every_form(visit, page, theme, width):
    """Opened so, not changed afterwards; every word is looked at."""
    tab = visit(page, theme, width)
    assert_formulas_are_rendered(tab)
    look(tab, page, theme, width)
    tab.wait_for_function(SETTLED)
    assert_axe_clean(tab)


@pytest.mark.parametrize(('theme', 'width'), [
    ('light', 1280), ('dark', 390)])
def test_a_page_that_is_opened_so(visit, theme, width):
    """The forms that `test_page` reaches by a change."""
    tab = visit('intro.html', theme, width)
    look(tab, 'intro.html', theme, width)
    tab.evaluate(PRUNE)
    tab.wait_for_function(SETTLED)
    assert_axe_clean(tab)


def parsed():
    return {path.relative_to(BOOK).as_posix():
            BeautifulSoup(path.read_text(), 'html.parser')
            for path in BOOK.rglob('*.html')
            if '_static' not in path.relative_to(BOOK).parts}


def test_links_anchors_and_pictures(book):
    """All of them lead somewhere; only a reader's click leaves the book."""
    pages = parsed()
    ids = {name: {tag.get('id') for tag in page.find_all(id=True)}
           | {tag['name'] for tag in page.find_all('a', attrs={'name': True})}
           for name, page in pages.items()}
    wrong = []
    for name, page in pages.items():
        for tag in page.find_all(True):
            for key in ('href', 'src', 'action', 'data-src', 'poster'):
                target = tag.get(key)
                if not target or target.startswith('data:'):
                    continue
                parts = urlsplit(target)
                if parts.scheme or parts.netloc:
                    if tag.name != 'a' or parts.scheme not in (
                            'https', 'http', 'mailto'):
                        wrong.append((name, tag.name, target))
                    continue
                path, anchor = urldefrag(target)
                path = unquote(path.split('?')[0])
                file = ((BOOK / name).parent / path).resolve() if path \
                    else BOOK / name
                if not file.is_file():
                    wrong.append((name, tag.name, target))
                elif anchor and tag.name == 'a':
                    known = ids.get(file.relative_to(BOOK).as_posix(), set())
                    if unquote(anchor) not in known:
                        wrong.append((name, tag.name, target))
    assert wrong == []


def test_every_picture_has_a_text_in_its_place(book):
    wrong = []
    for name, page in parsed().items():
        for image in page.select('article img'):
            alt = image.get('alt') or ''
            if len(alt) < 20 or alt.startswith('_images/'):
                wrong.append((name, image['src']))
        for drawing in page.select('article svg'):
            if not (drawing.get('aria-label') or drawing.get('aria-labelledby')
                    or drawing.get('aria-hidden') == 'true'
                    or drawing.find_parent(attrs={'aria-hidden': 'true'})):
                wrong.append((name, str(drawing)[:80]))
    assert wrong == []


def test_nothing_of_another_host_or_a_live_kernel_is_in_the_book(book):
    for path in BOOK.rglob('*.html'):
        text = path.read_text().lower()
        for word in ('unpkg.com', 'jsdelivr', 'cdnjs', 'thebe.js', 'token='):
            assert word not in text, (path, word)


def test_sliders_work_by_keyboard_and_change_the_picture(visit):
    for page in with_text('type="range"'):
        for slider in visit(page).locator('article input[type=range]').all():
            figure = slider.locator('xpath=ancestor::figure')
            before, value = figure.inner_html(), slider.input_value()
            slider.focus()
            for key in ('ArrowRight', 'ArrowLeft', 'ArrowLeft'):
                slider.press(key)
                if slider.input_value() != value:
                    break
            name = f'{page}: {slider.get_attribute("name")}'
            assert slider.input_value() != value, name
            assert figure.inner_html() != before, name
            assert figure.locator('[role=status], output').count(), name


def test_search_finds_a_term(visit):
    tab = visit('intro.html')
    tab.keyboard.press('Control+k')
    tab.keyboard.type('hybridize')
    tab.keyboard.press('Enter')
    tab.wait_for_url('**/search.html?q=hybridize*')
    link = tab.locator('#search-results li a').first
    link.wait_for()
    found = tab.locator('#search-results li a').all_text_contents()
    assert any('Gluon' in title for title in found), found
    link.click()
    assert 'hybridize' in tab.locator('article').inner_text().lower()


FOCUSED = """() => {
  const e = document.activeElement, s = getComputedStyle(e);
  const box = e.getBoundingClientRect();
  let shown = 1;
  for (let n = e; n; n = n.parentElement) shown *= getComputedStyle(n).opacity;
  e.dataset.seen = (+(e.dataset.seen ?? 0)) + 1;
  return {html: e.outerHTML.slice(0, 120), body: e === document.body,
    seen: +e.dataset.seen, visible: box.width * box.height > 0 && shown > .5,
    marked: s.outlineStyle != "none" && parseFloat(s.outlineWidth) >= 2};
}"""
REACHABLE = """() => [...document.querySelectorAll(
  "a[href], button, input, summary, select, textarea")].filter(e =>
  e.tabIndex >= 0 && !e.disabled && e.checkVisibility(
    {visibilityProperty: true}) && !e.closest("[inert]")
  && !e.dataset.seen && !(e.type === "radio")).map(
  e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize('page', ['intro.html', 'chapters/theory.html'])
def test_tab_reaches_everything_and_shows_where_it_is(visit, page):
    tab = visit(page)
    for _ in range(2000):
        tab.keyboard.press('Tab')
        focused = tab.evaluate(FOCUSED)
        if focused['body'] or focused['seen'] > 1:
            break
        assert focused['visible'] and focused['marked'], focused['html']
    assert tab.evaluate(REACHABLE) == []


def test_answers_open_and_theme_changes_by_keyboard(visit):
    tab = visit('chapters/theory.html')
    button = tab.locator('.admonition.dropdown button.toggle-button').first
    answer = tab.locator('.admonition.dropdown').first
    hidden = answer.evaluate('a => a.classList.contains("toggle-hidden")')
    assert hidden
    button.focus()
    button.press('Enter')
    assert not answer.evaluate('a => a.classList.contains("toggle-hidden")')
    switch = tab.locator('.theme-switch-button:visible').first
    switch.focus()
    for _ in range(3):
        switch.press('Enter')
        if tab.evaluate('document.documentElement.dataset.theme') == 'dark':
            break
    assert tab.evaluate('document.documentElement.dataset.theme') == 'dark'


@pytest.mark.parametrize('page', ['intro.html', 'chapters/theory.html'])
def test_first_page_is_light(visit, page):
    """Few requests, few bytes when gzipped, whichever page comes first.

    What must be there before anything is shown, styles and the scripts of
    the head, is the smaller part.
    """
    tab = visit(page)
    tab.wait_for_load_state('networkidle')
    loaded = tab.evaluate("""performance.getEntriesByType("resource").map(
      e => [e.name, e.renderBlockingStatus])""")
    weights = {url: len(gzip.compress((BOOK / unquote(
        urlsplit(url).path[1:])).read_bytes()))
        for url in {tab.url, *(url for url, _ in loaded)}}
    first = sum(weights[url] for url in {tab.url, *(
        url for url, status in loaded if status == 'blocking')})
    assert first < 0.25e6, f'{first / 1e6:.2f} MB'
    assert sum(weights.values()) < 1.5e6, weights
    assert len(loaded) < 50, sorted(weights)
