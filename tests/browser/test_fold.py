"""A folded docstring: seen, opened, copied, printed."""
from pathlib import Path

import nbformat
import pytest
from lxml import html

ROOT = Path(__file__).resolve().parents[2]
BOOK, CHAPTERS = ROOT / '_build/html', ROOT / 'chapters'
MARK = '# Save to the d2ltvm package.'
FOLDED = [page for page in sorted((BOOK / 'chapters').glob('*.html'))
          if 'class="docstring"' in page.read_text()]
SHORTEST = min(FOLDED, key=lambda page: page.stat().st_size, default=None)
needed = pytest.mark.skipif(not FOLDED, reason='no docstring is folded')


def first(visit, **options):
    """The shortest page that has one: what the buttons do is on each."""
    tab = visit(f'chapters/{SHORTEST.name}', **options)
    return tab, tab.locator('details.docstring').first


def saved_cells(name):
    return [cell.source for cell in nbformat.read(
        CHAPTERS / f'{name}.ipynb', 4).cells if cell.source.startswith(MARK)]


@needed
@pytest.mark.parametrize('path', FOLDED, ids=lambda path: path.stem)
def test_pages_have_the_whole_source_and_show_one_line(path):
    page = html.fromstring(path.read_text())
    blocks = [block.text_content().strip('\n') for block in page.xpath(
        '//*[contains(@class, "cell_input")]//pre')
        if block.text_content().startswith(MARK)]
    assert blocks == [cell.strip('\n') for cell in saved_cells(path.stem)]
    for part in page.xpath('//details[@class="docstring"]'):
        assert 'open' not in part.attrib
        before = part.xpath('string(preceding-sibling::node()[1])')
        assert before.lstrip('r')[:3] in ('"""', "'''")
        after = part.xpath('string(following-sibling::node()[1])')
        assert after in ('"""', "'''")


@needed
@pytest.mark.parametrize('script', [True, False])
@pytest.mark.parametrize('width', [1280, 390])
def test_a_docstring_opens_by_key_and_click(visit, script, width):
    tab, part = first(visit, java_script_enabled=script, width=width)
    button, rest = part.locator('summary'), part.locator('.sd').first
    block = part.locator('xpath=..')
    button.scroll_into_view_if_needed()
    closed = block.bounding_box()['height']
    assert not rest.is_visible()
    box = button.bounding_box()
    assert box['x'] >= 0 and box['x'] + box['width'] <= width
    button.focus()
    button.press('Enter')
    assert rest.is_visible()
    lines = part.text_content().count('\n')
    opened = block.bounding_box()['height']
    assert opened - closed > 15 * lines
    button.click()
    assert not rest.is_visible()
    assert block.bounding_box()['height'] == closed
    assert tab.evaluate('scrollX') == 0


@needed
def test_the_button_has_a_name_and_says_whether_it_is_open(visit):
    tab, part = first(visit)
    session = tab.context.new_cdp_session(tab)
    for state in (False, True):
        node = session.send('Runtime.evaluate', {
            'expression': 'document.querySelector(".docstring > summary")'})
        tree = session.send('Accessibility.getPartialAXTree', {
            'objectId': node['result']['objectId'], 'fetchRelatives': False})
        seen, = tree['nodes']
        assert seen['name']['value'].startswith('Docstring of ')
        values = {item['name']: item['value'].get('value')
                  for item in seen['properties']}
        assert values['expanded'] is state and values['focusable']
        part.locator('summary').press('Enter')


@needed
def test_a_copy_is_the_whole_cell(visit):
    tab, part = first(visit)
    tab.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    cell = part.locator('xpath=ancestor::div[contains(@class, "highlight ")'
                        ' or @class="highlight"]')
    cell.hover()
    cell.locator('button.copybtn').click()
    copied = tab.evaluate('navigator.clipboard.readText()')
    tab.context.clear_permissions()
    assert copied.strip() in [source.strip()
                              for source in saved_cells(SHORTEST.stem)]


@needed
def test_paper_shows_the_docstring(visit):
    tab, part = first(visit)
    assert not part.locator('.sd').first.is_visible()
    tab.emulate_media(media='print')
    assert part.locator('.sd').last.is_visible()
    assert not part.locator('summary').is_visible()


@needed
@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_a_page_with_open_docstrings_is_accessible(visit, theme):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    tab, _ = first(visit, theme=theme)
    # A page has thousands of words in colors: one cell stands for them
    tab.evaluate('''() => {
      const cells = [...document.querySelectorAll("div.cell")];
      const keep = cells.find(c => c.querySelector("details.docstring"));
      cells.forEach(c => c === keep || c.remove());
      keep.querySelectorAll("details").forEach(d => d.open = true);
    }''')
    found = axe.run(tab, options={
        'runOnly': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa',
                    'best-practice'],
        'rules': {'target-size': {'enabled': True}},
        'preload': False}).response['violations']
    assert [f'{rule["id"]}: {node["html"]}' for rule in found
            for node in rule['nodes']] == []
