"""The browser of the tests, without a window."""
import pdf
import pytest
from playwright.sync_api import sync_playwright


def chromium():
    """For a fixture: the Chromium of this machine, or a skip."""
    path = pdf.chromium()
    if path is None:
        pytest.skip('no browser: install Chromium (Debian: apt install '
                    'chromium)')
    with sync_playwright() as playwright:
        # The pages are our own; a container has no user for the sandbox
        browser = playwright.chromium.launch(executable_path=path,
                                             args=['--no-sandbox'])
        yield browser
        browser.close()
