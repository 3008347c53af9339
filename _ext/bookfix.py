"""Keep the console clean: the theme adds some of its scripts twice."""


def drop_doubled_scripts(app, pagename, templatename, context, doctree):
    seen, scripts = set(), []
    for script in context.get('script_files', []):
        attributes = getattr(script, 'attributes', None) or {}
        key = (getattr(script, 'filename', None) or '',
               attributes.get('body', ''))
        if key not in seen:
            seen.add(key)
            scripts.append(script)
    context['script_files'] = scripts


def setup(app):
    app.connect('html-page-context', drop_doubled_scripts, priority=900)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
