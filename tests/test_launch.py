"""Buttons that open a page elsewhere are there if one setting says where."""
import subprocess
import sys
from pathlib import Path

import nbformat.v4
import pytest
import yaml
from bs4 import BeautifulSoup
from soak import later

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize('repository', [
    later(''), 'https://github.com/some/where'])
def test_launch_buttons(tmp_path, repository):
    config = yaml.safe_load((ROOT / '_config.yml').read_text())
    del config['bibtex_bibfiles']
    assert 'public_repository' in config['sphinx']['config']
    config['sphinx']['config'] |= {'public_repository': repository}
    (tmp_path / '_config.yml').write_text(yaml.safe_dump(config))
    (tmp_path / '_toc.yml').write_text(
        'format: jb-book\nroot: intro\nchapters:\n- file: chapters/page\n')
    (tmp_path / 'intro.md').write_text('# Title\n')
    for name in ('_ext', 'assets'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'chapters').mkdir()
    nbformat.write(nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell('# Page')],
        metadata={'kernelspec': {'name': 'python3', 'display_name': 'P'}}),
        tmp_path / 'chapters/page.ipynb')
    subprocess.run(
        [Path(sys.executable).with_name('jupyter-book'), 'build', '-q',
         tmp_path], check=True, capture_output=True)
    page = BeautifulSoup((tmp_path / '_build/html/chapters/page.html')
                         .read_text(), 'html.parser')
    links = {link['href'] for link in page.select('a[href^="http"]')
             if 'mybinder' in link['href'] or 'colab' in link['href']}
    assert links == ({
        'https://mybinder.org/v2/gh/some/where/main'
        '?urlpath=lab/tree/chapters/page.ipynb',
        'https://colab.research.google.com/github/some/where/blob/main/'
        'chapters/page.ipynb'} if repository else set())
