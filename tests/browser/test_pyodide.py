"""Cells that run in their page: loaded, changed, broken, stopped, reset."""
import re
from pathlib import Path

import nbformat
import pytest
from test_book import DARK, SETTLED, assert_axe_clean

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / '_build/html'
DISK = f'{BOOK.as_uri()}/'
LIVE = 'div.cell.tag_live'
PAGES = [path.stem for path in sorted((BOOK / 'chapters').glob('*.html'))
         if 'livecells.js' in path.read_text()]
pytestmark = pytest.mark.skipif(
    not PAGES, reason='the book was built without Python for its pages '
    '(D2LTVM_PYODIDE names a folder with it)')
BUSY = 'button[aria-label^="Stop"]'


def sources(page):
    return [cell for cell in nbformat.read(
        ROOT / f'chapters/{page}.ipynb', 4).cells
        if 'live' in cell.metadata.get('tags', ())]


def number(page, id):
    """Where a cell stands among those that run."""
    return [cell.id for cell in sources(page)].index(id)


def begin(tab):
    """Press the button, and wait for Python."""
    button = tab.get_by_role('button', name='Run the code of this page here')
    size = round((BOOK / '_static/python/bundle.js').stat().st_size / 1e6)
    assert f'{size}\xa0MB' in tab.locator('.live-bar').inner_text()
    assert tab.evaluate('window.bookPython') is None  # nothing before a click
    button.focus()
    tab.keyboard.press('Enter')
    tab.locator('.live-bar [role=status]', has_text='Python: ready').wait_for(
        timeout=180_000)


class Cell:
    """A cell of a page, by its number from 0."""

    def __init__(self, tab, index):
        self.tab = tab
        self.box = tab.locator(LIVE).nth(index)
        self.code = self.box.locator('pre.live-code')
        self.out = self.box.locator('.cell_output')
        self.said = self.box.locator('.live-tools [role=status]')
        self.name = f'cell {index + 1}'

    def write(self, code):
        self.code.focus()
        self.tab.keyboard.press('Control+a')
        self.tab.keyboard.insert_text(code)

    def run(self, wait=True):
        self.code.focus()
        self.tab.keyboard.press('Shift+Enter')
        if wait:
            self.ends()

    def ends(self):
        self.box.locator(BUSY).wait_for(state='detached', timeout=180_000)

    def press(self, name):
        button = self.box.get_by_role('button', name=f'{name} {self.name}')
        button.focus()
        self.tab.keyboard.press('Enter')


# Keep of a page what its cell needs: the rest has tests of its own
ALONE = f'''index => document.querySelector("article").replaceChildren(
  document.querySelector("article h1"), document.querySelector(".live-bar"),
  document.querySelectorAll("{LIVE}")[index])'''


def test_a_reader_changes_breaks_and_stops_cells(visit):
    """From the disk, by keyboard alone."""
    tab = visit('chapters/conventions.html', at=DISK)
    begin(tab)
    index = number('conventions', 'check-layer-arrays')
    check = Cell(tab, index)
    before = check.out.inner_text()
    check.run()  # and those above it
    assert check.out.inner_text().strip() == before.strip()
    assert 'done in' in check.said.inner_text()
    assert 'done in' in Cell(tab, 0).said.text_content()

    # New lines are indented as those before them; no key leaves the cell
    check.write('for i in range(2):')
    check.code.press('Enter')
    tab.keyboard.type('print(i / 4, biased[i])  # a/b')
    assert check.code.inner_text() == (
        'for i in range(2):\n    print(i / 4, biased[i])  # a/b')
    assert 'changed' in check.said.inner_text()
    check.run()
    assert check.out.inner_text().split('\n')[:2] == ['0.0 4.0', '0.25 9.0']

    check.write('biased')
    check.run()
    assert check.out.inner_text().strip() == 'array([4., 9.])'

    check.write('print("before")\nbiased @ np.ones(3)')
    check.run()
    shown = check.out.inner_text()
    assert shown.startswith('before') and 'ValueError: matmul' in shown
    assert f'File "{check.name}", line 2' in shown
    assert 'an error' in check.said.inner_text()

    # A picture; and the page lives while Python is busy
    check.write('class Dot:\n    def _repr_svg_(self):\n'
                '        return (\'<svg xmlns="http://www.w3.org/2000/svg" '
                'width="9" height="9"><circle r="9"/></svg>\')\n\n\nDot()')
    check.run()
    picture = check.out.locator('img')
    assert picture.evaluate('i => i.decode().then(() => i.naturalWidth)') == 9
    assert check.name in picture.get_attribute('alt')

    check.write('print("on and on")\nwhile True:\n    pass')
    check.run(wait=False)
    check.out.get_by_text('on and on').wait_for()
    assert tab.evaluate('new Promise(done => setTimeout(done, 50, 1))') == 1
    check.press('Stop')
    assert 'stopped' in check.said.inner_text()
    check.press('Reset')
    assert check.out.inner_text().strip() == before.strip()
    check.run()  # Python anew
    assert check.out.inner_text().strip() == before.strip()

    check.write('1 / 0')
    check.run()
    tab.set_viewport_size({'width': 390, 'height': 900})
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    tab.evaluate(ALONE, index)
    for look, width in ((DARK, 390), (DARK.replace('dark', 'light'), 1280)):
        tab.evaluate(look)
        tab.set_viewport_size({'width': width, 'height': 900})
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        tab.wait_for_function(SETTLED)
        assert_axe_clean(tab)


def test_tab_leads_through_the_cells(visit):
    """The code of a cell is no trap, its buttons follow it.

    A docstring that is folded is part of the code.
    """
    tab = visit('chapters/conventions.html')
    tab.get_by_role('button', name='Run the code of this page here').click()
    first = Cell(tab, 0)
    first.code.focus()
    tab.keyboard.type('1')
    seen = []
    for _ in range(4):
        tab.keyboard.press('Tab')
        seen.append(tab.evaluate(
            'document.activeElement.getAttribute("aria-label")'))
    assert [name for name in seen if name and 'cell 1' in name] == [
        'Run cell 1', 'Reset cell 1']

    cell = Cell(tab, number('conventions', 'fn-layer-arrays'))
    source = next(cell.source for cell in sources('conventions')
                  if cell.id == 'fn-layer-arrays')
    assert cell.code.inner_text().rstrip() == source
    cell.code.focus()
    tab.keyboard.press('Control+End')
    tab.keyboard.type('  # new')
    assert cell.code.inner_text().rstrip() == source + '  # new'
    assert cell.code.locator('span').count() == 0
    cell.press('Reset')
    assert cell.code.inner_text().rstrip() == source
    assert cell.code.locator('span').count() > 50


def test_a_browser_that_lacks_something_gets_a_sentence(visit, book):
    page = 'chapters/conventions.html'
    tab = visit(f'{page}?WebAssembly',
                before='delete window[location.search.slice(1)]')
    bar = tab.locator('.live-bar')
    for name in ('WebAssembly', 'Worker', 'DecompressionStream'):
        if name not in tab.url:
            tab.goto(f'{book}{page}?{name}')
        assert bar.inner_text().endswith(f'it has no {name}.')
        assert bar.locator('button').count() == 0


def test_paper_and_a_page_without_script_stay_as_they_are(visit):
    tab = visit('chapters/conventions.html')
    bar = tab.locator('.live-bar')
    assert bar.is_visible()
    tab.emulate_media(media='print')
    assert not bar.is_visible()
    tab = visit('chapters/conventions.html', java_script_enabled=False)
    assert tab.locator('.live-bar').count() == 0
    assert 'unbiased' in tab.locator(LIVE).first.inner_text()


def test_pages_without_such_cells_have_no_script_for_them(book):
    for path in BOOK.rglob('*.html'):
        text = path.read_text()
        assert ('livecells.js' in text) == ('tag_live' in text), path


def test_the_licences_are_there(book):
    folder = BOOK / '_static/python'
    notice = (folder / 'NOTICE.txt').read_text()
    for name in re.findall(r'LICENSE-\w+\.txt', notice):
        assert len((folder / name).read_text()) > 1000


def in_the_book(cell):
    return ''.join(output.get('text') or output.data.get('text/plain') + '\n'
                   for output in cell.outputs
                   if 'image/svg+xml' not in output.get('data', {}))


@pytest.mark.soak
@pytest.mark.parametrize('page', PAGES)
@pytest.mark.parametrize('disk', [True, False])
def test_every_cell_prints_what_the_book_shows(visit, book, page, disk):
    cells = sources(page)
    tab = visit(f'chapters/{page}.html', at=DISK if disk else book)
    begin(tab)
    last = Cell(tab, len(cells) - 1)
    last.box.locator('.live-tools button').first.evaluate('b => b.click()')
    last.box.locator(BUSY).wait_for(state='detached', timeout=600_000)
    for index, source in enumerate(cells):
        cell = Cell(tab, index)
        assert 'done in' in cell.said.text_content(), (
            source.id, cell.out.text_content())
        if 'nbval-ignore-output' not in source.metadata.tags:
            assert ''.join(cell.out.locator('pre').all_text_contents()
                           ).strip() == in_the_book(source).strip(), source.id


@pytest.mark.soak
def test_a_flood_of_output_is_cut_and_python_survives_its_errors(visit):
    tab = visit('chapters/conventions.html', at=DISK)
    begin(tab)
    cell = Cell(tab, 0)
    cell.write('for i in range(10**6):\n    print(i)')
    cell.run()
    assert cell.out.inner_text().rstrip().endswith('the rest is not shown')
    assert len(cell.out.inner_text()) < 110_000
    for code, error in (
            ('def f(x):\n    return f(x + 1)\n\n\nf(0)', 'RecursionError'),
            ('import numpy as np\nnp.ones(10**11)', 'Maximum allowed'),
            ('import scipy', 'ModuleNotFoundError'),
            ('raise KeyboardInterrupt', 'KeyboardInterrupt')):
        cell.write(code)
        cell.run()
        assert error in cell.out.inner_text()
        cell.write('6 * 7')
        cell.run()
        assert cell.out.inner_text().strip() == '42'
