"""Print the shape of each page of the book: `make shape`.

    python tools/shape.py [PAGE ...]

Two tables, one line for each notebook. The first counts the lines of its code
cells as a reader sees them: docstrings folded to their first line, without
blank lines, and without the cells that are hidden or removed. The second is
measured in a browser, 1280 pixels wide, on the rendered book in `_build/html`:
the height of the page, the share of it that is code, the words of its text
(without code, outputs, figures and formulas). A star marks a number beyond
the aims below, which are habits of readable textbooks; it fails nothing.
"""
import sys
from pathlib import Path
from statistics import median_high

import nbformat
import yaml
from pdf import chromium
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / '_ext'))
import fold  # noqa: E402

MEDIAN, SHORT, SHARE_SHORT, LONGEST = 8, 15, 0.85, 40
CODE, HEIGHT, WORDS = 0.35, 16_000, range(1000, 2501)

MEASURE = '''() => {
  const height = e => e.getBoundingClientRect().height;
  const code = [...document.querySelectorAll(
    "article .cell_input, article .highlight")].filter(
    e => !e.parentElement.closest(`.cell_input, .highlight, .cell_output,
      details:not([open])`));
  const text = document.querySelector("article").cloneNode(true);
  text.querySelectorAll(`.cell, .highlight, figure, svg, script, style, .math,
    mjx-container, .headerlink, .toggle-button, .entries`).forEach(
    e => e.remove());
  return {
    height: document.documentElement.scrollHeight,
    code: code.reduce((sum, e) => sum + height(e), 0),
    words: (text.textContent.match(/[^\\s]*[\\p{L}\\p{N}][^\\s]*/gu) ?? [])
      .length,
  };
}'''


def seen_lines(source):
    """Count the lines of a cell that a reader sees, without blank ones."""
    lines = source.split('\n')
    for _, first, last in fold.docstrings(source):
        lines[first + 1:last + 1] = [''] * (last - first)
    return sum(bool(line.strip()) for line in lines)


def cells(path):
    """Lines of each code cell of a notebook that is not hidden, sorted."""
    return sorted(
        seen_lines(cell.source) for cell in nbformat.read(path, 4).cells
        if cell.cell_type == 'code' and not any(
            tag.startswith(('hide-cell', 'hide-input', 'remove-cell',
                            'remove-input'))
            for tag in cell.metadata.get('tags', [])))


def notebooks(root=ROOT):
    """The notebooks of the book, in reading order."""
    toc = yaml.safe_load((root / '_toc.yml').read_text('utf-8'))
    return [path for part in toc['parts'] for chapter in part['chapters']
            if (path := root / f'{chapter["file"]}.ipynb').is_file()]


def star(value, within, text):
    return f'{text}{" " if within(value) else "*"}'


def print_cells(paths):
    print(f'{"lines of code cells":24}{"cells":>6}{"median":>8}'
          f'{f"<= {SHORT}":>8}{"longest":>9}')
    for path in paths:
        sizes = cells(path)
        if not sizes:
            print(f'{path.stem:24}{0:6}')
            continue
        middle, short = median_high(sizes), sum(
            size <= SHORT for size in sizes) / len(sizes)
        print(f'{path.stem:24}{len(sizes):6}'
              + star(middle, lambda n: n <= MEDIAN, f'{middle:7}')
              + star(short, lambda s: s >= SHARE_SHORT, f'{short:7.0%}')
              + star(sizes[-1], lambda n: n <= LONGEST, f'{sizes[-1]:8}'))


def measure(pages, browser):
    """Height, height of the code (pixels) and words of rendered pages."""
    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=browser,
                                            args=['--no-sandbox'])
        tab = window.new_page(viewport={'width': 1280, 'height': 900})
        for page in pages:
            tab.goto(page.as_uri())
            tab.evaluate('window.MathJax?.startup?.promise?.then(() => 0)')
            yield tab.evaluate(MEASURE)
        window.close()


def print_pages(paths, browser, book=ROOT / '_build/html'):
    print(f'\n{"1280 pixels wide":24}{"height":>8}{"code":>8}{"words":>8}')
    pages = [book / 'chapters' / f'{path.stem}.html' for path in paths]
    there = [page for page in pages if page.is_file()]
    for page, found in zip(there, measure(there, browser), strict=True):
        share = found['code'] / found['height']
        print(f'{page.stem:24}'
              + star(found['height'], lambda h: h <= HEIGHT,
                     f'{found["height"]:7}')
              + star(share, lambda s: s <= CODE, f'{share:7.0%}')
              + star(found['words'], lambda n: n in WORDS,
                     f'{found["words"]:7}'))
    for page in pages:
        if page not in there:
            print(f'{page.stem}: not rendered')


def main(names, root=ROOT):
    paths = [path for path in notebooks(root)
             if not names or path.stem in names]
    unknown = set(names) - {path.stem for path in paths}
    if unknown:
        sys.exit(f'error: no page of the book: {", ".join(sorted(unknown))}')
    print_cells(paths)
    browser = chromium()
    if not (root / '_build/html/index.html').is_file():
        sys.exit('\nno rendered book in _build/html: run `make book` first, '
                 'its pages are measured')
    if browser is None:
        sys.exit('\nno browser to measure the pages with; install Chromium '
                 '(Debian and Ubuntu: apt install chromium)')
    print_pages(paths, browser, root / '_build/html')


if __name__ == '__main__':
    main(sys.argv[1:])
