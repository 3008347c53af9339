"""Docstrings fold on the pages; the text of the code stays whole."""
import ast
from pathlib import Path

import fold
import nbformat
import pytest
from bs4 import BeautifulSoup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

CHAPTERS = sorted(Path(__file__).resolve().parents[1].glob(
    'chapters/*.ipynb'))
CODE = '''# Save to the d2ltvm package.
@decorated
class Layer:
    """A layer.

    It has a < b & "c".
    """

    def forward(self, X):
        r\'\'\'Forward: \\alpha.

        Long.\'\'\'
        def inner():
            """Inner.

            More.
            """
            text = """
            no docstring"""
            return text

    def short(self):
        """One line."""

    async def later(self):
        """Ends below.
        """
        return """a

        b"""
'''


def block(source):
    html = highlight(source, PythonLexer(stripnl=False), HtmlFormatter())
    return html, BeautifulSoup(fold.folded(html, source), 'html.parser')


def test_each_docstring_folds_by_itself():
    assert fold.docstrings(CODE) == [
        ('Layer', 3, 6), ('Layer.forward', 9, 11),
        ('Layer.forward.inner', 13, 16)]
    _, page = block(CODE)
    parts = page.select('pre > details.docstring')
    assert [part.summary['aria-label'] for part in parts] == [
        'Docstring of Layer', 'Docstring of Layer.forward',
        'Docstring of Layer.forward.inner']
    assert parts[0].get_text() == '\n\n    It has a < b & "c".\n    '
    assert parts[1].get_text() == '\n\n        Long.'
    assert page.select_one('pre > .saved').get_text() == fold.MARK


def test_what_is_seen_is_code_with_one_line_of_docstring():
    _, page = block(CODE)
    for part in page.select('details'):
        part.decompose()
    seen = page.get_text()
    assert '"""A layer."""' in seen and "r'''Forward: \\alpha.'''" in seen
    before, after = (ast.parse(text) for text in (CODE, seen))
    for tree in (before, after):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                node.body[0] = ast.Pass() if ast.get_docstring(node) \
                    else node.body[0]
    assert ast.dump(before) == ast.dump(after)


@pytest.mark.parametrize('source', [
    '%matplotlib inline\nimport numpy', 'x = 1', 'def f(): pass',
    'def f():\n    "a" \\\n    "b\\n"', 'def broken(:',
    '"""Of a cell.\n\n"""'])
def test_nothing_else_is_folded(source):
    assert fold.docstrings(source) == []
    html, page = block(source)
    assert str(page) == str(BeautifulSoup(html, 'html.parser'))


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda path: path.stem)
def test_the_code_of_the_book_stays_whole(path):
    """Every saved docstring of several lines is folded, none loses a sign."""
    folds = long = 0
    for cell in nbformat.read(path, 4).cells:
        if not cell.source.startswith(fold.MARK):
            continue
        page = block(cell.source)[1]
        assert page.pre.get_text() == cell.source.strip('\n') + '\n'
        folds += len(page.select('details.docstring'))
        long += sum(
            len(text.strip().splitlines()) > 1
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and (text := ast.get_docstring(node)))
    assert folds == long
