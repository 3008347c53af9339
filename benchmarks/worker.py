"""One engine in a process of its own: `python worker.py ENGINE`.

It speaks JSON, one object a line: commands come on stdin, answers go to
stdout. It starts with `{"versions": {...}, "threads": n}`, or with
`{"cannot": sentence}` if the engine cannot be imported. Then

    {"prepare": suite, "shape": [...]}
        makes the arrays, runs every form once, compares with float64 and
        answers {"errors": {part: {form: error}}, "checksum": n}, with words
        in place of the error of a form that cannot be made, or
        {"cannot": words that go on after the engine's name}
    {"time": part, "form": form, "seconds": s}
        calls it for about s seconds, after a short warm-up, and answers
        {"seconds": time of one call}
"""
import json
import os
import sys
import timeit
import zlib
from importlib.metadata import version

import data
from engines import ENGINES

WARM_UP = 0.05  # seconds; until the scheduler has spread woken threads


def sentence(error):
    """The first line of an error, with its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def prepare(engine, suite, shape):
    """Make the arrays of a suite, check every form: forms and answer."""
    make, exact = data.SUITES[suite]
    arrays = make(tuple(shape))
    checksum = 0
    for array in arrays.values():
        checksum = zlib.crc32(array, checksum)
    forms = getattr(engine, suite)(**arrays)
    expected, errors = exact(**arrays), {}
    for part, of_part in forms.items():
        errors[part] = {}
        for form, pair in of_part.items():
            if isinstance(pair, str):  # why there is none
                errors[part][form] = pair
                continue
            run, read = pair
            run()
            results = read()
            errors[part][form] = data.error(results, expected)
            for name in {'Y', 'dX'} & set(results):  # for the next form
                if results[name].flags.writeable:
                    results[name].fill(float('nan'))
    return forms, {'errors': errors, 'checksum': checksum}


def seconds_per_call(run, seconds):
    """Warm up, then time so many calls that they take about `seconds`."""
    timer, calls, warm = timeit.Timer(run), 1, 0.0
    while warm < WARM_UP:
        last = timer.timeit(calls)
        warm += last
        each, calls = last / calls, calls * 2
    number = max(1, round(seconds / each))
    return timer.timeit(number) / number


def serve(make_engine, commands, answers):
    """Answer every command; `make_engine` makes the engine."""
    def say(**answer):
        answers.write(json.dumps(answer) + '\n')
        answers.flush()

    try:
        engine = make_engine()
    except Exception as error:  # an engine may fail in any way
        return say(cannot=f'cannot be imported: {sentence(error)}')
    if engine.threads is None:
        engine.threads = int(os.environ.get('OMP_NUM_THREADS', 1))
    say(versions={name: version(name) for name in engine.packages},
        threads=engine.threads)
    forms = {}
    for line in commands:
        command = json.loads(line)
        try:
            if 'prepare' in command:
                forms = {}  # frees the memory of the shape before
                forms, answer = prepare(engine, command['prepare'],
                                        command['shape'])
            else:
                run, _ = forms[command['time']][command['form']]
                answer = {'seconds': seconds_per_call(run,
                                                      command['seconds'])}
        except NotImplementedError as error:
            answer = {'cannot': str(error)}
        except Exception as error:  # whatever happens has to be reported
            answer = {'cannot': f'failed: {sentence(error)}'}
        say(**answer)


def main():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what a library prints must not look like an answer
    serve(ENGINES[sys.argv[1]], sys.stdin, answers)


if __name__ == '__main__':
    main()
