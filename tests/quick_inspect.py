"""`inspect.getmodule` that finds the module of a frame at once.

TVM's parser asks for the source of all frames of the stack, for each program.
Python searches all modules for each frame, which below pytest and in the
kernel of a notebook takes as long as the rest. A kernel runs this file before
its first cell, so it leaves no name behind.
"""


def _install():
    import inspect
    import sys
    search = inspect.getmodule

    def module_of(thing, file=None):
        return (sys.modules.get(thing.f_globals.get('__name__'))
                if inspect.isframe(thing) else search(thing, file))

    inspect.getmodule = module_of


_install()
del _install
