"""A small book: buttons that open a page elsewhere; cells without a Python."""
import os
import subprocess
import sys
from pathlib import Path

import nbformat.v4
import pytest
import yaml
from bs4 import BeautifulSoup
from soak import later

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module', params=[
    later(''), 'https://github.com/some/where'])
def book(request, tmp_path_factory):
    """The address of the book, its folder, and what the build printed.

    The folder that is named for Python in the page is not there.
    """
    folder = tmp_path_factory.mktemp('book')
    config = yaml.safe_load((ROOT / '_config.yml').read_text())
    del config['bibtex_bibfiles']
    del config['sphinx']['local_extensions']['pad']  # would compile it
    assert 'public_repository' in config['sphinx']['config']
    config['sphinx']['config'] |= {'public_repository': request.param}
    (folder / '_config.yml').write_text(yaml.safe_dump(config))
    (folder / '_toc.yml').write_text(
        'format: jb-book\nroot: intro\nchapters:\n- file: chapters/page\n')
    (folder / 'intro.md').write_text('# Title\n')
    for name in ('_ext', 'assets'):
        (folder / name).symlink_to(ROOT / name)
    (folder / 'chapters').mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_markdown_cell('# Page'),
        nbformat.v4.new_code_cell('6 * 7', metadata={'tags': ['live']})],
        metadata={'kernelspec': {'name': 'python3', 'display_name': 'P'}}),
        folder / 'chapters/page.ipynb')
    ran = subprocess.run(
        [Path(sys.executable).with_name('jupyter-book'), 'build', folder],
        check=True, capture_output=True, text=True,
        env={**os.environ, 'D2LTVM_PYODIDE': str(folder / 'no')})
    return request.param, folder, ran.stdout


def test_launch_buttons(book):
    """They are there if one setting says where."""
    repository, folder, _ = book
    page = BeautifulSoup((folder / '_build/html/chapters/page.html')
                         .read_text(), 'html.parser')
    links = {link['href'] for link in page.select('a[href^="http"]')
             if 'mybinder' in link['href'] or 'colab' in link['href']}
    assert links == ({
        'https://mybinder.org/v2/gh/some/where/main'
        '?urlpath=lab/tree/chapters/page.ipynb',
        'https://colab.research.google.com/github/some/where/blob/main/'
        'chapters/page.ipynb'} if repository else set())


def test_without_its_sources_the_book_is_built_and_says_so(book):
    _, folder, printed = book
    assert ('No code runs in the pages of this book: D2LTVM_PYODIDE: there is '
            f'no folder {folder}/no') in printed
    page = (folder / '_build/html/chapters/page.html').read_text()
    assert 'tag_live' in page and 'livecells.js' not in page
    assert not (folder / '_build/html/_static/python').exists()
