"""Print the whole book into one PDF, through a Chromium without a window.

It is tagged for screen readers, has an outline, page numbers and live links;
folded answers are open, and figures with sliders show their first state.
"""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pikepdf
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / '_build/paper'
PDF = ROOT / '_build/book.pdf'
FOOTER = ('<div style="width: 100%; font: 8pt sans-serif; text-align: center">'
          '<span class="pageNumber"></span></div>')


def chromium():
    """The browser of this machine, or None."""
    return next(filter(None, map(shutil.which, (
        'chromium', 'chromium-browser', 'google-chrome'))), None)


def print_page(source, target, browser):
    with sync_playwright() as playwright:
        # The page is our own; a container has no user for the sandbox
        window = playwright.chromium.launch(executable_path=browser,
                                            args=['--no-sandbox'])
        page = window.new_page(color_scheme='light')
        page.goto(source.as_uri())
        page.emulate_media(media='print')
        page.evaluate('MathJax.startup.promise.then(() => 0)')
        page.evaluate('''() => {
          document.documentElement.dataset.theme = "light";
          document.querySelectorAll("details").forEach(d => d.open = true);
          document.querySelectorAll(".toggle-hidden").forEach(
            e => e.classList.remove("toggle-hidden"));
          document.querySelectorAll(".cell_input, .cell_output pre").forEach(
            e => e.classList.toggle("long", e.offsetHeight > 400));
          // The pages of the book number their references alike
          for (const item of document.querySelectorAll(".citation[id]")) {
            for (const link of document.querySelectorAll(
                `.bibtex-citation a[href$="#${item.id}"]`))
              link.setAttribute("href", `#reference-${item.id}`);
            item.id = `reference-${item.id}`;
          }
        }''')
        titles = page.evaluate("""() => [...document.querySelectorAll(
          "h1, h2, h3, h4, h5, h6")].filter(h => h.checkVisibility()).map(
          h => h.textContent.replace(/#$/, "").trim())""")
        page.pdf(path=target, format='A4', scale=0.75, print_background=True,
                 outline=True, tagged=True, display_header_footer=True,
                 header_template='<span></span>', footer_template=FOOTER,
                 margin=dict(top='16mm', bottom='18mm', left='15mm',
                             right='15mm'))
        window.close()
    name_outline(target, titles)


def name_outline(path, titles):
    """Chromium garbles headings that wrap or move on: name them anew.

    It also writes every small object on its own: packed, a third is left.
    """
    bare = {re.sub(r'\W', '', title): title for title in titles}
    bare |= {short * 2: title for short, title in bare.items()}
    with pikepdf.open(path, allow_overwriting_input=True) as pdf:
        for entry in below(pdf.Root.Outlines):
            title = str(entry.Title)
            entry.Title = bare.get(re.sub(r'\W', '', title), title)
        pdf.save(path,
                 object_stream_mode=pikepdf.ObjectStreamMode.generate)


def below(entry):
    child = entry.get('/First')
    while child is not None:
        yield child
        yield from below(child)
        child = child.get('/Next')


if __name__ == '__main__':
    browser = chromium()
    if browser is None:
        sys.exit('error: `make pdf` prints with Chromium, and there is none; '
                 'install it (Debian and Ubuntu: apt install chromium)')
    subprocess.run([Path(sys.executable).with_name('jupyter-book'), 'build',
                    ROOT, '--builder', 'singlehtml', '--path-output', PAPER,
                    '-n', '-q'], check=True)
    print_page(PAPER / '_build/singlehtml/intro.html', PDF, browser)
    print(f'{PDF}: {PDF.stat().st_size / 1e6:.1f} MB')
