"""What engineers type finds the page that answers it, as the first result."""
from urllib.parse import quote

import pytest

# What is typed, and the page that answers
WORDS = {
    'eval mode': 'practice',
    'inference worse than training': 'practice',
    'freeze batch norm': 'practice',
    'small batch': 'practice',
    'sync batch norm': 'distributed',
    'fold batch norm': 'folding',
    'int8': 'quantization',
    'quantization': 'quantization',
    'convert running_var': 'moving_statistics',
    'GPU': 'gpu_schedule'}


@pytest.mark.parametrize('words', WORDS)
def test_what_engineers_type_finds_its_page_first(visit, words):
    tab = visit(f'search.html?q={quote(words)}')
    results = tab.locator('#search-results li a')
    results.first.wait_for()
    tab.wait_for_function(  # all of them: the best may come last
        'document.querySelector("#search-results .search-summary")'
        '?.textContent.match(/found|finished|matching/i)')
    found = [link.get_attribute('href') for link in results.all()]
    assert found[0].startswith(f'chapters/{WORDS[words]}.html'), found[:4]
