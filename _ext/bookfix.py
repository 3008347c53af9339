"""What the book adds to its theme: it is whole without any other host."""
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns

from sphinx.util.index_entries import split_index_msg

# Of MathJax only what a page with TeX can ask for, 6 of 24 MB
MATHJAX = ignore_patterns('adaptors', 'mml*', 'node-main.js', 'svg*',
                          'tex-chtml-*', 'tex-mml-*', 'tex-svg*')


def copy_mathjax(app, error):
    if error is None and app.builder.format == 'html':
        package = find_spec('sphinx-mathjax-offline')
        assert package and package.submodule_search_locations
        copytree(Path(package.submodule_search_locations[0],
                      'static/mathjax'),
                 Path(app.outdir, '_static/mathjax'), ignore=MATHJAX,
                 dirs_exist_ok=True)


def draw_explorers(app, docname, source):
    """A line `<!-- explorer NAME -->` of a page becomes that figure."""
    def figure(match):
        interactive = import_module('d2ltvm.interactive')
        app.env.note_dependency(interactive.__file__)
        figure = getattr(interactive, match[1])()
        return f'```{{raw}} html\n{figure._repr_html_()}\n```'

    if app.env.doc2path(docname).endswith('.md'):
        source[0] = re.sub(r'^<!-- explorer (\w+) -->$', figure, source[0],
                           flags=re.MULTILINE)


def keep_index(app, env):
    """The search has the index of all pages; Sphinx forgets unchanged ones."""
    for page, entries in env.get_domain('index').entries.items():
        env._search_index_index_entries[page] = sorted({
            (text, target, main) for kind, value, target, main, _ in entries
            if kind == 'single' for text in split_index_msg(kind, value)})


def drop_remote_scripts(app, pagename, templatename, context, doctree):
    """Live code comes from `make live`, not from a host far away."""
    context['script_files'] = [
        script for script in context.get('script_files', [])
        if 'thebe' not in (script.filename or '')
        and 'THEBE' not in script.attributes.get('body', '')]


def add_files(app, pagename, templatename, context, doctree):
    """A figure with `data-files` brings scripts and styles to its page."""
    named = re.findall(r'<figure data-files="([^"]+)"',
                       context.get('body', ''))
    for name in dict.fromkeys(' '.join(named).split()):
        if name.endswith('.css'):
            app.add_css_file(name)
        else:
            app.add_js_file(name, defer='defer')


def repair_roles(app, pagename, templatename, context, doctree):
    """A list of references has items; docutils gives them a retired role."""
    context['body'] = context.get('body', '').replace(
        'role="doc-biblioentry"', 'role="listitem"')


def launch_buttons(app, config):
    """Binder and Colab need a repository that they can read."""
    if config.public_repository:
        config.html_theme_options.update(
            repository_url=config.public_repository,
            repository_branch='main',
            launch_buttons={'notebook_interface': 'jupyterlab',
                            'binderhub_url': 'https://mybinder.org',
                            'colab_url': 'https://colab.research.google.com'})


def setup(app):
    app.add_config_value('public_repository', '', 'html')
    app.connect('config-inited', launch_buttons)
    app.connect('source-read', draw_explorers)
    app.connect('env-updated', keep_index)
    app.connect('html-page-context', drop_remote_scripts, priority=900)
    app.connect('html-page-context', add_files)
    app.connect('html-page-context', repair_roles)
    app.connect('build-finished', copy_mathjax)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
