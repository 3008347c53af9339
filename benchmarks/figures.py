"""The figures of the benchmarks, from results as `run.py` stores them."""
import io
import math

import matplotlib.pyplot as plt
from PIL import Image

STYLES = {  # colour, marker: told apart without colour, too
    'TVM': ('#D55E00', 'o'), 'copy': ('#000000', ''),
    'PyTorch': ('#0072B2', 's'), 'ONNX Runtime': ('#009E73', '^'),
    'OpenVINO': ('#997700', 'v'), 'JAX': ('#AA4499', 'D'),
    'MXNet': ('#0072B2', 'x'), 'NumPy': ('#555555', '+')}


def panels_of(cases):
    """The cases that one panel shows, by its title.

    Several numbers of images of one size make a panel of their own.
    """
    groups = {}
    for case in cases:
        key = case['part'], *case['shape'][1:]
        groups.setdefault(key, []).append(case)
    if len(cases[0]['shape']) == 4 and all(
            len(group) > 1 for group in groups.values()):
        return {f'{part}, {h} × {w} pixels': group
                for (part, _, h, w), group in groups.items()}
    return {part: [case for case in cases if case['part'] == part]
            for part in dict.fromkeys(case['part'] for case in cases)}


def draw_part(ax, title, cases):
    """Draw microseconds over the size of X, or over the number of images."""
    images = 'pixels' in title

    def position(case):
        size = math.prod(case['shape'])
        return case['shape'][0] if images else 4e-6 * size

    cases = sorted(cases, key=lambda case: math.prod(case['shape']))
    peers = dict.fromkeys(peer for case in cases for peer in case['times'])
    for peer in peers:
        color, marker = STYLES.get(peer, ('#555555', '.'))
        drawn = [case for case in cases if peer in case['times']]
        ax.loglog([position(case) for case in drawn],
                  [1e6 * case['times'][peer][1] for case in drawn],
                  color=color, marker=marker, markersize=5,
                  linestyle='--' if peer == 'copy' else '-',
                  linewidth=2 if peer in ('TVM', 'copy') else 0.8,
                  zorder=3 if peer in ('TVM', 'copy') else 2, label=peer)
    ax.set(xlabel='images' if images else 'size of X (MB)', title=title)


def draw_cases(result):
    """Draw every part of a suite over the size of the data, log-log."""
    parts = panels_of(result['cases'])
    figure, panels = plt.subplots(
        len(parts), figsize=(5.6, 1.2 + 2.8 * len(parts)), sharey=True,
        squeeze=False)
    for ax, (title, cases) in zip(panels[:, 0], parts.items(), strict=True):
        draw_part(ax, title, cases)
        ax.set_ylabel('time of a call (µs)')
    figure.legend(*panels[0, 0].get_legend_handles_labels(), ncols=3,
                  loc='outside upper center')
    return figure


def draw_medians(ax, times, title):
    """Draw the median of each function, with its quartiles."""
    names = list(times)
    low, median, high = ([1e3 * t[i] for t in times.values()]
                         for i in range(3))
    spread = [[m - a for a, m in zip(low, median, strict=True)],
              [b - m for m, b in zip(median, high, strict=True)]]
    ax.errorbar(median, names, xerr=spread, fmt='o', color='#0072B2',
                capsize=4)
    ax.margins(y=0.5 / len(names))
    ax.invert_yaxis()
    if max(median) > 20 * min(median):
        ax.set(xscale='log')
    else:
        ax.set(xlim=(0, 1.1 * max(high)))
    ax.set(xlabel='milliseconds', title=title)


def draw_times(result):
    """One panel, for a suite of functions."""
    figure, ax = plt.subplots(figsize=(5.6, 0.9 + 0.35 * len(result['times'])))
    draw_medians(ax, result['times'], result['title'])
    return figure


def draw_parts(result):
    """A panel for each part of a suite that has no shapes to compare."""
    counts = [len(case['times']) for case in result['cases']]
    figure, panels = plt.subplots(
        len(counts), figsize=(5.6, sum(0.9 + 0.35 * n for n in counts)),
        height_ratios=counts, squeeze=False)
    for ax, case in zip(panels[:, 0], result['cases'], strict=True):
        draw_medians(ax, case['times'], case['part'])
    return figure


def draw(result):
    """Draw the results of one suite; returns the figure."""
    with plt.style.context('d2ltvm.book'):
        if 'cases' not in result:
            return draw_times(result)
        parts = [case['part'] for case in result['cases']]
        alone = len(parts) > 1 and len(set(parts)) == len(parts)
        return (draw_parts if alone else draw_cases)(result)


def save(result, path):
    """Draw the results of one suite into a file."""
    figure, drawn = draw(result), io.BytesIO()
    figure.savefig(drawn, dpi=150)
    plt.close(figure)
    Image.open(drawn).convert('RGB').quantize(
        128, dither=Image.Dither.NONE).save(path, optimize=True)
