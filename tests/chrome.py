"""The browser of the tests, without a window."""
import pdf
import pytest
from playwright.sync_api import sync_playwright

# The pages are our own, and a container has no user for the sandbox; no host
# but this machine is found
ALONE = ['--no-sandbox',
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']


def chromium():
    """For a fixture: the Chromium of this machine, or a skip."""
    path = pdf.chromium()
    if path is None:
        pytest.skip('no browser: install Chromium (Debian: apt install '
                    'chromium)')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ALONE)
        yield browser
        browser.close()
