"""How the pages look: terms explain themselves, figures can be enlarged.

All of it is done once, when a page is written, and works without a script:
a term of the glossary gets its definition beside it, which style sheets show
on hover and focus; a picture becomes a link to itself, which `book.js` opens
on the page; cells of tables that hold a number do not break, nor do the lines
of what is printed in columns.
"""
import re
from html import escape, unescape
from pathlib import Path

from docutils import nodes

ASSETS = Path(__file__).resolve().parent.parent / 'assets'
# The theme of the system, before anything is drawn; a choice goes before it
THEME = '''(() => {
  let mode;
  try {
    mode = localStorage.mode || "auto";
    localStorage.mode = mode;
    if (mode === "auto") {
      localStorage.theme = matchMedia("(prefers-color-scheme: dark)").matches
        ? "dark" : "light";
      document.documentElement.dataset.theme = localStorage.theme;
      document.documentElement.dataset.mode = mode;
    }
  } catch { /* no storage: the theme is light */ }
})();'''
TERM = re.compile(
    r'<a class="reference internal" href="[^"]*#(?P<term>term-[^"]+)"'
    r'(?: title="[^"]*")?><span class="xref std std-term">.*?</span></a>')
IMAGE = re.compile(r'(<a\b[^>]*>\s*)?(<img\b[^>]*?src="([^"]+)"[^>]*>)')
CELL = re.compile(r'<(t[dh])((?: [^<>]*)?)>((?:<p>)?)([^<>]+?)((?:</p>)?)'
                  r'</\1>')
NUMBER = re.compile(r'[-−+]?\d[\d\s.,:%×x±+−–-]*(?:[a-zµμ]{1,2})?')
OUTPUT = re.compile(r'(<div class="output [^"]*"><div class="highlight"><pre)'
                    r'(>)(.*?)</pre>', re.DOTALL)
# What a line of text can show of the formulas in a definition
SYMBOLS = {r'\max': 'max', r'\gamma': 'γ', r'\beta': 'β', r'\epsilon': 'ε',
           r'\mu': 'μ', r'\sigma': 'σ', r'\times': '×', r'\cdot': '·',
           r'\,': ' ', r'\ ': ' '}


def definitions(env, builder):
    """The text of each definition of the glossary, by the id of its term."""
    if not hasattr(builder, 'definitions'):
        builder.definitions = {}
        if 'glossary' in env.found_docs:
            tree = env.get_doctree('glossary')
            for item in tree.findall(nodes.definition_list_item):
                text = plain(item[-1][0])
                for term in item.findall(nodes.term):
                    for name in term['ids']:
                        builder.definitions[name] = text
    return builder.definitions


def plain(paragraph):
    """The text of a definition, without what leads to other pages."""
    text = ''
    for node in paragraph.children:
        kind = node.get('reftype') if isinstance(node, nodes.Element) else None
        if isinstance(node, nodes.math):
            formula = node.astext()
            for name, sign in SYMBOLS.items():
                formula = formula.replace(name, sign)
            text += formula
        elif kind == 'term' or kind is None:
            text += node.astext()
        elif kind == 'eq':
            text += '\0'
        else:
            text += '\0'  # a reference: its sentence goes without it
    text = re.sub(r'\s*\([^()]*\0[^()]*\)', '', text)
    text = re.sub(r',?\s*\0', '', text)
    text = re.sub(r'\s*\[[^\]]*\d{4}\w?\]', '', text)
    return ' '.join(text.split())


def explain(body, known):
    """Put its definition behind each link to a term of the glossary."""
    count = 0

    def tip(match):
        nonlocal count
        text = known.get(match['term'])
        if not text:
            return match[0]
        count += 1
        link = match[0].replace('<a ', f'<a aria-describedby="tip-{count}" ',
                                1)
        return (f'<span class="term">{link}<span class="tip" role="tooltip" '
                f'id="tip-{count}">{escape(text)}</span></span>')

    return TERM.sub(tip, body)


def width(path):
    """Pixels of a page that a bitmap is wide, if it is drawn for 150 dpi.

    Matplotlib writes into it how large it is to be seen: 5.6 inches at
    200 dpi are 1120 pixels, for 538 of the page. None for other files.
    """
    try:
        data = path.read_bytes()[:200]
    except OSError:
        return None
    place = data.find(b'pHYs')
    if not data.startswith(b'\x89PNG') or place < 0 or data[place + 12] != 1:
        return None
    density = int.from_bytes(data[place + 4:place + 8]) * 0.0254
    if density < 150:
        return None
    return round(int.from_bytes(data[16:20]) / density * 96)


def enlarge(body, files=None):
    """Make a link to itself of each picture that is none.

    `files` has the paths of pictures by their names on the page; with it,
    bitmaps with more pixels than the page get their width.
    """
    def link(match):
        around, image, source = match.groups()
        path = (files or {}).get(source.rpartition('/')[2])
        pixels = None if path is None or 'width' in image else width(path)
        if pixels:
            image = image.replace('<img ', f'<img width="{pixels}" ', 1)
        if around:
            return around + image
        return (f'<a class="enlarge" href="{source}" title="Enlarge">{image}'
                '</a>')

    return IMAGE.sub(link, body)


def keep_numbers(body):
    """Mark the cells of tables that hold one number, so that it stays whole.

    >>> keep_numbers('<td>2.49 ± 0.47</td><td>a word</td>')
    '<td class="number">2.49 ± 0.47</td><td>a word</td>'
    """
    def mark(match):
        tag, attributes, start, text, end = match.groups()
        if not NUMBER.fullmatch(unescape(text).strip()):
            return match[0]
        if 'class="' in attributes:
            attributes = attributes.replace('class="', 'class="number ', 1)
        else:
            attributes += ' class="number"'
        return f'<{tag}{attributes}>{start}{text}{end}</{tag}>'

    return CELL.sub(mark, body)


def keep_columns(body):
    """Mark printed columns, which a line that wraps would tear apart.

    Columns are what two spaces separate, in half of the lines or more.
    """
    def mark(match):
        start, end, printed = match.groups()
        lines = unescape(re.sub('<[^>]+>', '', printed)).strip('\n').split(
            '\n')
        rows = sum(bool(re.search(r'\S {2,}\S', line)) for line in lines)
        if len(lines) < 2 or 2 * rows < len(lines):
            return match[0]
        return f'{start} class="columns"{end}{printed}</pre>'

    return OUTPUT.sub(mark, body)


def finish(app, pagename, templatename, context, doctree):
    if 'body' not in context or app.builder.format != 'html':
        return
    files = {name: Path(app.srcdir, path)
             for path, name in app.builder.images.items()}
    body = keep_columns(keep_numbers(enlarge(context['body'], files)))
    if app.builder.name == 'html':  # on paper nothing can be pointed at
        body = explain(body, definitions(app.env, app.builder))
    context['body'] = body


def mark_shades(app, doctree):
    """Pictures in which light and dark mean something keep them at night."""
    for cell in doctree.findall(nodes.container):
        if cell.get('nb_element') == 'cell_code' and re.search(
                r'\b(imshow|matshow|pcolor\w*|heat\w*)\(',
                ''.join(block.astext() for block in cell.findall(
                    nodes.literal_block))):
            for image in cell.findall(nodes.image):
                image['classes'].append('shades')


def draw(app, docname, source):
    """A line `<!-- drawing NAME -->` becomes the drawing `assets/NAME.svg`.

    Its links lead from the title page; the printed book has all on one page.
    """
    def drawing(match):
        path = ASSETS / f'{match[1]}.svg'
        app.env.note_dependency(str(path))
        text = path.read_text('utf-8').strip()
        if app.builder.name == 'singlehtml':
            text = re.sub(r'href="([^"#]+)\.html"', r'href="#document-\1"',
                          text)
        return (f'```{{raw}} html\n<figure class="drawing">\n{text}\n'
                '</figure>\n```')

    if app.env.doc2path(docname).endswith('.md'):
        source[0] = re.sub(r'^<!-- drawing ([\w-]+) -->$', drawing, source[0],
                           flags=re.MULTILINE)


def setup(app):
    app.add_js_file(None, body=THEME, priority=100)
    app.connect('source-read', draw)
    app.connect('doctree-read', mark_shades)
    app.connect('html-page-context', finish)
    return {'version': '1', 'parallel_read_safe': True,
            'parallel_write_safe': True}
