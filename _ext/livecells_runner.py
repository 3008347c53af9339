"""Runs a cell as a notebook does; the worker of the page calls it."""
import ast
import contextlib
import io
import linecache
import traceback

SPACE = {'__name__': '__main__'}  # the variables of all cells
SVG = 'image/svg+xml'


class Writer(io.TextIOBase):
    """A file for `print` that shows what is written."""

    def __init__(self, kind, show):
        self.kind, self.show = kind, show

    def write(self, text):
        self.show(self.kind, text)
        return len(text)


def present(value, show):
    """Show the SVG that a value draws of itself, or else its text."""
    draw = getattr(value, '_repr_svg_', None)
    picture = draw() if callable(draw) and not isinstance(value, type) else 0
    if picture:
        show('svg', picture)
    else:
        show('text', f'{value!r}\n')


def ask(*prompt):
    """In the place of `input`."""
    raise RuntimeError('input: a cell cannot ask; write the value into it')


def run(code, name, show, space=SPACE):
    """Run a cell; if its last line is an expression, show the value.

    Parameters
    ----------
    code, name : str
        The cell, and what tracebacks call it.
    show : callable
        Gets the kind of each output ('stream', 'stderr', 'text', 'svg' or
        'error') and its text.
    space : dict
        Where the variables are kept.

    Returns
    -------
    bool
        False after an error, which has been shown.
    """
    def display(*values, raw=False):
        for value in values:
            if raw and SVG in value:
                show('svg', value[SVG])
            else:
                present(value, show)

    space.update(display=display, input=ask)
    linecache.cache[name] = len(code), None, code.splitlines(True), name
    with (contextlib.redirect_stdout(Writer('stream', show)),
          contextlib.redirect_stderr(Writer('stderr', show))):
        try:
            tree = ast.parse(code, name)
            last = (tree.body.pop() if tree.body
                    and isinstance(tree.body[-1], ast.Expr) else None)
            exec(compile(tree, name, 'exec'), space)
            if isinstance(last, ast.Expr):
                expression = ast.Expression(last.value)
                value = eval(compile(expression, name, 'eval'), space)
                if value is not None:
                    present(value, show)
            return True
        except BaseException as error:
            frames = error.__traceback__
            while frames and frames.tb_frame.f_code.co_filename != name:
                frames = frames.tb_next  # above the cell they are ours
            show('error', ''.join(traceback.format_exception(
                type(error), error, frames)))
            return False
