"""What the book adds to a page when it is written."""
import looks
import matplotlib.pyplot as plt
import pytest
from docutils import nodes
from sphinx import addnodes

LINK = ('<a class="reference internal" href="../glossary.html#term-{0}">'
        '<span class="xref std std-term">{0}</span></a>')


def test_a_term_is_explained_where_it_stands():
    body = f'<p>A {LINK.format("batch")}, a {LINK.format("thing")}.</p>'
    seen = looks.explain(body, {'term-batch': 'A <set> of examples.'})
    assert seen == (
        '<p>A <span class="term">'
        + LINK.format('batch').replace('<a ', '<a aria-describedby="tip-1" ')
        + '<span class="tip" role="tooltip" id="tip-1">A &lt;set&gt; of '
        f'examples.</span></span>, a {LINK.format("thing")}.</p>')


def test_a_definition_is_plain_text():
    paragraph = nodes.paragraph()
    paragraph += nodes.Text('The batch of\n')
    paragraph += nodes.math('', r'\max(x, \gamma)')
    for kind, label in (('term', 'values'), ('ref', 'theory-moving')):
        paragraph += nodes.Text(' (' if kind == 'ref' else ' ')
        paragraph += addnodes.pending_xref('', nodes.inline('', label),
                                           reftype=kind)
    paragraph += nodes.Text('), done [Ioffe, 2015].')
    assert looks.plain(paragraph) == 'The batch of max(x, γ) values, done.'


def test_a_picture_becomes_a_link_to_itself_once():
    image = '<img alt="A plot" src="../_images/a.png" />'
    linked = f'<a class="enlarge" href="../_images/a.png" title="Enlarge">' \
             f'{image}</a>'
    assert looks.enlarge(f'<p>{image}</p>') == f'<p>{linked}</p>'
    assert looks.enlarge(linked) == linked


@pytest.mark.parametrize(('dpi', 'seen'), [(200, 538), (100, None)])
def test_a_bitmap_is_as_wide_as_it_was_drawn(tmp_path, dpi, seen):
    figure = plt.figure(figsize=(5.6, 1))
    figure.savefig(tmp_path / 'a.png', dpi=dpi)
    plt.close(figure)
    assert looks.width(tmp_path / 'a.png') == seen
    assert looks.width(tmp_path / 'none.png') is None
    page = looks.enlarge('<img src="_images/b.png" />',
                         {'b.png': tmp_path / 'a.png'})
    assert (f'width="{seen}"' in page) == (seen is not None)


@pytest.mark.parametrize('text', [
    '2.49 ± 0.47', '−3', '12', '32 × 64 × 56 × 56', '98.7 %', '1,234.5',
    '+0.5', '1.2 µs', '0.1 – 0.3'])
def test_a_number_is_kept_whole(text):
    for tag in ('td', 'th'):
        assert looks.keep_numbers(f'<{tag}>{text}</{tag}>') == (
            f'<{tag} class="number">{text}</{tag}>')
    assert looks.keep_numbers(f'<td class="a b"><p>{text}</p></td>') == (
        f'<td class="number a b"><p>{text}</p></td>')


@pytest.mark.parametrize('cell', [
    '<td>a word</td>', '<td></td>', '<td>2 words here</td>',
    '<td>2.49 <b>x</b></td>', '<p>12</p>', '<td>-</td>'])
def test_words_may_break(cell):
    assert looks.keep_numbers(cell) == cell


PRINTED = ('<div class="output stream highlight-myst-ansi notranslate">'
           '<div class="highlight"><pre{}><span></span>{}\n</pre>')


@pytest.mark.parametrize(('text', 'columns'), [
    ('epoch  source\n    1  0.9883', True),
    ('fast      1.2\n<span>slow</span>     10.4\nin all, both', True),
    ('first &lt;=  3\nthen  4', True),
    ('one line  alone', False),
    ('ValueError: eps\nTypeError: X', False),
    ('a  b\nc\nd', False),
    ('    indented\n    lines', False)])
def test_columns_are_kept_whole(text, columns):
    found = looks.keep_columns(PRINTED.format('', text))
    assert found == PRINTED.format(' class="columns"' * columns, text)
    code = '<div class="highlight"><pre>a  b\nc  d</pre></div>'
    assert looks.keep_columns(code) == code
