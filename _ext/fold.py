"""Docstrings in the cells of a page show their first line.

What follows it stands in a `<details>` inside of the highlighted code: a
click or Enter opens it, without any script, and paper shows it. The text of
the cell stays whole, character by character, so that the copy button, live
code and a selection by hand all give code that runs. The notebook and the
package are not touched.
"""
import ast
import re
from html import unescape

from docutils import nodes

MARK = '# Save to the d2ltvm package.'
QUOTES = re.compile(r"""(.*)((?:"|&quot;){3}|(?:'|&#39;){3})(.*)""")
OPEN = ('<details class="docstring"><summary aria-label="Docstring of {name}"'
        '></summary>')


def docstrings(source):
    """Find the docstrings that go on after their first line.

    Parameters
    ----------
    source : str
        Python code; of code that does not parse, such as that with a magic
        of IPython, nothing is folded.

    Returns
    -------
    list of (name, first, last) : (str, int, int)
        Whose docstring it is, `Class.method` for a method, and the numbers of
        its first and last line, counted from 0.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    lines = source.split('\n')
    found = []

    def look(node, path):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef,
                                      ast.AsyncFunctionDef)):
                look(child, path)
                continue
            name = [*path, child.name]
            text = ast.get_docstring(child, clean=False)
            if text is not None and text.partition('\n')[2].strip():
                doc = child.body[0]
                assert doc.end_lineno is not None
                first, last = doc.lineno - 1, doc.end_lineno - 1
                # Only one whose quotes open and close it can be folded
                if lines[last].rstrip().endswith(('"""', "'''")):
                    found.append(('.'.join(name), first, last))
            look(child, name)

    look(tree, [])
    return sorted(found, key=lambda entry: entry[1])


def folded(html, source):
    """Fold the docstrings of a highlighted block.

    Parameters
    ----------
    html : str
        What the highlighter made of `source`: one `<pre>`, each line of it
        with spans of its own.
    source : str
        The code of the block.

    Returns
    -------
    str
        The block with a `<details>` around what follows the first line of
        each docstring. Its text, without the tags, is that of `html`.
    """
    match = re.fullmatch('(.*<pre>(?:<span></span>)?)(.*)(</pre>.*)', html,
                         re.DOTALL)
    assert match is not None, html
    head, code, tail = match.groups()
    lines = code.split('\n')
    if text(lines[0]) == MARK:
        lines[0] = f'<span class="saved">{lines[0]}</span>'
    for name, first, last in docstrings(source):
        split = QUOTES.fullmatch(lines[last])
        assert split is not None, lines[last]
        before, quotes, after = split.groups()
        tags = re.findall('<[^>]*>', before)
        if tags and tags[-1] != '</span>':  # the quotes stand in a span
            before, quotes = f'{before}</span>', f'{tags[-1]}{quotes}'
        lines[first] += OPEN.format(name=name)
        lines[last] = f'{before}</details>{quotes}{after}'
    result = '\n'.join(lines)
    assert text(result) == text(code), source
    return head + result + tail


def text(html):
    return unescape(re.sub('<[^>]*>', '', html))


def visit(translator, node):
    """Highlight the code as always, then fold it."""
    try:
        type(translator).visit_literal_block(translator, node)
    except nodes.SkipNode:
        if (node.parent.get('nb_element') == 'cell_code_source'
                and text(translator.body[-1]).strip('\n') == node.astext()):
            translator.body[-1] = folded(translator.body[-1], node.astext())
        raise


def depart(translator, node):
    type(translator).depart_literal_block(translator, node)


def setup(app):
    app.add_node(nodes.literal_block, override=True, html=(visit, depart))
    return {'version': '1', 'parallel_read_safe': True,
            'parallel_write_safe': True}
