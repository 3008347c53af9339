"""The rendered book as a reader meets it in the browser."""
import gzip
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from lxml import html

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
# Of what is alike, some are enough: a page has thousands of colored words, and
# an index hundreds of entries. Alike are functions and words of one kind at
# one place; a paragraph, an entry or a cell goes where enough others have each
# of the kinds in it.
PRUNE = '''() => {
  const kinds = new Map();
  const kind = e => {
    if (!kinds.has(e)) kinds.set(e, [
      e.tagName, /\\S/.test(e.textContent), ...[...e.attributes].map(
        a => a.name === "class" ? a.value : a.name).sort()].join(" "));
    return kinds.get(e);
  };
  for (const [names, most, where] of [
      ["dl.py", 3, "own"],
      [".highlight span, .sig *, code, em, strong, mjx-container, .term, " +
       ".bibtex-citation", 1, "own"],
      ["section > p", 2, "page"],
      ["li, tr, dl, dd > p, [role=listitem]", 2, "place"],
      [".cell:not(:has(figure, form, dialog, table, img))", 2, "page"]]) {
    const seen = new Map();
    for (const e of document.body.querySelectorAll(names)) {
      if (!e.isConnected || e.closest("figure, form, dialog") ||
          where === "own" && e.closest("a, button, summary")) continue;
      const around = e.closest(
        ".cell_input, .cell_output, table, .admonition")?.className;
      const alike = where === "own"
        ? [[kind(e.parentElement.parentElement), kind(e.parentElement), around,
            kind(e)].join()]
        : [e, ...e.querySelectorAll(":not(mjx-container *)")].map(kind);
      const place = where === "place" ? e.parentElement : document;
      if (!seen.has(place)) seen.set(place, new Map());
      const count = seen.get(place);
      if (alike.every(k => count.get(k) >= most)) e.remove();
      else for (const k of new Set(alike))
        count.set(k, (count.get(k) ?? 0) + 1);
    }
  }
}'''
each = pytest.mark.parametrize('page', PAGES)
themes = pytest.mark.parametrize('theme', ['light', 'dark'])


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
# The theme looks again when the window changes, but not when a page that
# is slow to be laid out does so later
RESIZED = 'dispatchEvent(new Event("resize"))'
DARK = 'document.documentElement.dataset.theme = "dark"'


def look(tab, theme, width):
    """Nothing scrolls sideways, is too wide, or too pale."""
    tab.set_viewport_size({'width': width, 'height': 900})
    assert tab.evaluate('document.documentElement.dataset.theme') == theme
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    assert tab.evaluate(WIDE) == []
    assert tab.evaluate(CONTRAST) == []


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
    """On paper, and in two forms: opened in one, changed to the other.

    What is opened dark and narrow becomes light and wide, and the next page
    goes the other way.
    """
    forms = [('light', 1280), ('dark', 390)]
    if PAGES.index(page) % 2:
        forms.reverse()
    tab = visit(page, *forms[0])
    assert_formulas_are_rendered(tab)
    look(tab, *forms[0])
    assert_nothing_is_cut_on_paper(tab)
    tab.evaluate(DARK.replace('dark', forms[1][0]))
    look(tab, *forms[1])
    tab.evaluate(RESIZED)
    tab.wait_for_function(SETTLED)
    tab.evaluate(PRUNE)
    assert_axe_clean(tab)


@pytest.mark.soak
@each
@themes
@pytest.mark.parametrize('width', [390, 1280])
def test_page_in_every_form(visit, page, theme, width):
    """Opened so, not changed afterwards; no word is left out."""
    tab = visit(page, theme, width)
    assert_formulas_are_rendered(tab)
    look(tab, theme, width)
    SCREENSHOTS.mkdir(exist_ok=True)
    name = f'{page.replace("/", "-")[:-5]}-{theme}-{width}.png'
    tab.screenshot(path=SCREENSHOTS / name, full_page=True,
                   animations='disabled')  # of the resize
    tab.evaluate(RESIZED)
    tab.wait_for_function(SETTLED)
    assert_axe_clean(tab)


@cache
def parsed():
    return {path.relative_to(BOOK).as_posix():
            html.fromstring(path.read_text())
            for path in BOOK.rglob('*.html')
            if '_static' not in path.relative_to(BOOK).parts}


def test_links_anchors_and_pictures(book):
    """All of them lead somewhere; only a reader's click leaves the book."""
    pages = parsed()
    ids = {name: {*page.xpath('//@id'), *page.xpath('//a/@name')}
           for name, page in pages.items()}
    wrong = []
    for name, page in pages.items():
        for tag in page.iter('*'):
            for key in ('href', 'src', 'action', 'data-src', 'poster'):
                target = tag.get(key)
                if not target or target.startswith('data:'):
                    continue
                parts = urlsplit(target)
                if parts.scheme or parts.netloc:
                    if tag.tag != 'a' or parts.scheme not in (
                            'https', 'http', 'mailto'):
                        wrong.append((name, tag.tag, target))
                    continue
                path, anchor = urldefrag(target)
                path = unquote(path.split('?')[0])
                file = ((BOOK / name).parent / path).resolve() if path \
                    else BOOK / name
                if not file.is_file():
                    wrong.append((name, tag.tag, target))
                elif anchor and tag.tag == 'a':
                    known = ids.get(file.relative_to(BOOK).as_posix(), set())
                    if unquote(anchor) not in known:
                        wrong.append((name, tag.tag, target))
    assert wrong == []


def test_every_picture_has_a_text_in_its_place(book):
    wrong = []
    for name, page in parsed().items():
        for image in page.xpath('//article//img'):
            alt = image.get('alt') or ''
            if len(alt) < 20 or alt.startswith('_images/'):
                wrong.append((name, image.get('src')))
        for drawing in page.xpath('//article//svg'):
            if not (drawing.get('aria-label') or drawing.get('aria-labelledby')
                    or drawing.xpath(
                        'ancestor-or-self::*[@aria-hidden="true"]')):
                wrong.append((name, html.tostring(drawing)[:80]))
    assert wrong == []


def test_nothing_of_another_host_or_a_live_kernel_is_in_the_book(book):
    for path in BOOK.rglob('*.html'):
        text = path.read_text().lower()
        for word in ('unpkg.com', 'jsdelivr', 'cdnjs', 'thebe.js', 'token='):
            assert word not in text, (path, word)


@pytest.mark.parametrize('page', [
    page for page in PAGES if (BOOK / page).is_file()
    and 'type="range"' in (BOOK / page).read_text()])
def test_sliders_work_by_keyboard_and_change_the_picture(visit, page):
    sliders = 'article input[type=range]'
    for slider in visit(page).locator(sliders).all():
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


@pytest.mark.parametrize('page', [
    'intro.html', 'chapters/own_gradient.html',
    pytest.param('chapters/theory.html', marks=pytest.mark.soak)])
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
    tab = visit(page, before='// a window of its own, which has read nothing')
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
