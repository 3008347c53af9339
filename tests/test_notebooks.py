"""What holds for every notebook: stored outputs, tags, contents."""
import ast
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import opening
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / 'chapters').glob('*.ipynb'))
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
IGNORED = 'nbval-ignore-output'
each = pytest.mark.parametrize('notebook', NOTEBOOKS.values(),
                               ids=NOTEBOOKS)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def test_every_notebook_is_in_the_book():
    toc = yaml.safe_load((ROOT / '_toc.yml').read_text())
    listed = [chapter['file'] for part in toc['parts']
              for chapter in part['chapters']]
    assert {f'chapters/{name}' for name in NOTEBOOKS} <= set(listed)


@each
def test_outputs_come_from_one_complete_run(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_metadata_is_clean(notebook):
    assert set(notebook.metadata) == {'kernelspec', 'language_info'}
    assert notebook.metadata.language_info == {'name': 'python'}
    for cell in notebook.cells:
        known = (set(opening.METADATA) if cell.id == opening.CELL_ID
                 else {'tags', 'mystnb'})
        assert set(cell.metadata) <= known, cell.id


@each
def test_no_output_to_stderr_and_no_failure(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.get('name') != 'stderr', cell.id
            assert output.output_type != 'error', cell.id


@each
def test_no_path_of_a_machine(notebook):
    text = nbformat.writes(notebook)
    assert not re.search(r'(?<![\w.])/(root|home|Users|tmp|work)/', text)


@each
def test_pictures_have_caption_and_alternative_text(notebook):
    for cell in code_cells(notebook):
        kinds = {kind for output in cell.outputs
                 for kind in output.get('data', {})}
        if kinds & {'image/png', 'image/svg+xml'}:
            mystnb = cell.metadata['mystnb']
            assert len(mystnb['image']['alt']) > 40, cell.id
            assert mystnb['figure']['caption'], cell.id


def contrast_with_white(color):
    """Ratio of luminances by WCAG 2.2 of a colour #rrggbb."""
    channels = np.array([int(color[k:k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92,
                      ((channels + 0.055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


def test_lines_and_marks_stand_out_from_white_paper():
    sources = {(name, cell.id): cell.source
               for name, notebook in NOTEBOOKS.items() if name != 'interactive'
               for cell in code_cells(notebook)}
    sources['benchmarks', ''] = (ROOT / 'benchmarks/figures.py').read_text()
    colors = {(*place, color) for place, source in sources.items()
              for color in re.findall(r"'(#[0-9A-Fa-f]{6})'", source)
              if not re.search(r'\b(ec|edgecolor|stroke)=', source)}
    assert len(colors) > 20
    assert [(*place, color) for *place, color in colors
            if contrast_with_white(color) < 3] == []


@each
def test_lines_of_code_fit_the_page(notebook):
    for cell in code_cells(notebook):
        assert max(map(len, cell.source.split('\n'))) < 80, cell.id


@each
def test_saved_functions_have_docstrings(notebook):
    for cell in code_cells(notebook):
        if cell.source.startswith('# Save to the d2ltvm package.'):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    assert ast.get_docstring(node), node.name


def test_stored_training_is_the_full_one():
    """Ten epochs on MNIST, not short, not offline."""
    printed = {cell.id: ''.join(output.get('text', '')
                                for output in cell.outputs)
               for cell in code_cells(NOTEBOOKS['from_scratch'])}
    assert '60000 training images, 10000 test images' in printed['load']
    tested = [float(share) for share in re.findall(
        r'^epoch .* ([\d.]+) in testing$', printed['train'], re.MULTILINE)]
    assert len(tested) == 10
    assert tested[0] >= 0.985 and tested[9] >= 0.992  # seed 0
    stored = json.loads((ROOT / 'benchmarks/results/accuracy_by_seed.json'
                         ).read_text())
    assert max(run['settled'][9] for run in stored.values()) >= 0.993


@each
def test_stored_outputs_come_from_the_real_digits(notebook):
    """Without them the notebooks go on with others, and say so."""
    for cell in code_cells(notebook):
        if cell.id != 'check-load-digits':  # which provokes it
            for output in cell.outputs:
                assert 'neither in a folder' not in output.get('text', '')


def test_stored_lenet_is_the_full_one():
    """Ten epochs; both normalized networks pass 0.98, the plain one not."""
    table, = (''.join(output.get('text', '') for output in cell.outputs)
              for cell in code_cells(NOTEBOOKS['gluon_module'])
              if cell.id == 'table')
    rows = re.findall(r'^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$', table,
                      re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    plain, ours, builtin = map(float, rows[-1][1:])
    if table.startswith('MNIST'):
        assert plain < 0.95 and min(ours, builtin) > 0.98


def test_most_outputs_are_compared():
    """At most 15 % of the cells with output are exempt from comparison."""
    with_output = [cell for notebook in NOTEBOOKS.values()
                   for cell in code_cells(notebook) if cell.outputs]
    exempt = [cell.id for cell in with_output
              if IGNORED in cell.metadata.get('tags', [])]
    assert 0 < len(exempt) <= 0.15 * len(with_output), exempt


LOADERS = {'load_mnist', 'load_digits', 'load_fashion_mnist', 'load_clothes'}


def calls(node, names):
    """Whether code calls one of these when it is run, not when defined."""
    if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
        return False
    if isinstance(node, ast.Call) and getattr(
            node.func, 'id', getattr(node.func, 'attr', '')) in names:
        return True
    return any(calls(child, names) for child in ast.iter_child_nodes(node))


@each
def test_what_depends_on_the_data_of_this_machine_is_not_compared(notebook):
    """A loader says where the data come from: without a network, too."""
    for cell in code_cells(notebook):
        source = re.sub('^%.*', '', cell.source, flags=re.MULTILINE)
        if 'mock.patch' not in source and calls(ast.parse(source), LOADERS):
            assert IGNORED in cell.metadata.get('tags', ()), cell.id
