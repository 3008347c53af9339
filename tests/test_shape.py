"""What `make shape` counts."""
import nbformat
import pdf
import pytest
import shape

SAVED = '''# Save to the d2ltvm package.
def f(x):
    """One.

    Parameters
    ----------
    x : int
    """

    return x'''


def notebook(path, *cells):
    book = nbformat.v4.new_notebook()
    for source, *tags in cells:
        cell = nbformat.v4.new_code_cell(source)
        cell.metadata['tags'] = list(tags)
        book.cells.append(cell)
    book.cells.append(nbformat.v4.new_markdown_cell('# A title\n\n1\n2'))
    nbformat.write(book, path)
    return path


@pytest.fixture
def root(tmp_path):
    """A project of two pages, of which one is a notebook."""
    (tmp_path / 'chapters').mkdir()
    (tmp_path / '_toc.yml').write_text(
        'parts: [{chapters: [{file: chapters/one}, {file: words}]}]')
    notebook(tmp_path / 'chapters/one.ipynb', (SAVED,), ('x = 1\n\ny = 2',),
             ('a\nb\nc', 'hide-input'), ('import x', 'remove-cell'),
             ('\n'.join('abcdefghijklmnop'), 'hide-output'))
    return tmp_path


def test_a_reader_sees_one_line_of_a_docstring():
    assert shape.seen_lines(SAVED) == 4
    assert shape.seen_lines('%matplotlib inline\n\nx = 1\n') == 2


def test_hidden_cells_do_not_count(root):
    assert shape.cells(root / 'chapters/one.ipynb') == [2, 4, 16]


def test_cells_are_printed_and_a_missing_book_is_named(root, capsys):
    with pytest.raises(SystemExit, match='make book'):
        shape.main([], root)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].split() == ['one', '3', '4', '67%*', '16']
    with pytest.raises(SystemExit, match='no page of the book: two'):
        shape.main(['two'], root)


def test_a_page_is_measured(root, capsys):
    if pdf.chromium() is None:
        pytest.skip('no browser: install Chromium (Debian: apt install '
                    'chromium)')
    html = root / '_build/html'
    (html / 'chapters').mkdir(parents=True)
    (html / 'index.html').write_text('')
    (html / 'chapters/one.html').write_text(
        '<!doctype html><body style="margin: 0; height: 20000px"><article>'
        '<p style="margin: 0">Three words, γ<a class="headerlink">#</a> - '
        '<span class="math">E = m</span></p>'
        '<div class="cell"><div class="cell_input" style="height: 4000px">'
        '<div class="highlight"><pre>x = 1</pre></div></div>'
        '<div class="cell_output"><div class="highlight" style="height: '
        '9000px">2</div></div></div>'
        '<details><summary>-</summary><div class="cell_input" '
        'style="height: 5000px"></div></details>'
        '<div class="highlight" style="height: 4000px">sh</div></article>')
    shape.main(['one'], root)
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        'one', '20000*', '40%*', '3*']
