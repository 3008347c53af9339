"""Press the button of the page *On your own GPU*, and keep what it saves.

    python benchmarks/reader_gpu.py

A browser without a window runs both figures, inference and training. Its
WebGPU is software: SwiftShader, which computes on the processor. So the page
can show what the figure looks like, with errors that count and times that
say nothing about a GPU. All goes into `results/reader_gpu.json`. Needs
Chromium; takes some minutes.
"""
import json
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks/results/reader_gpu.json'
SOFTWARE = ('--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader')


def show(browser, *figures, fail=sys.exit):
    """The figures on a page of localhost, which WebGPU takes for secure."""
    tab = browser.new_page()
    tab.on('pageerror', lambda error: fail(str(error)))
    page = '<!DOCTYPE html><html lang="en"><body>' + ''.join(
        figure._repr_html_() for figure in figures)
    tab.route('**/*', lambda route: route.fulfill(
        body=page, content_type='text/html; charset=utf-8'))
    tab.goto('http://localhost/')
    return tab


def finished(figure, seconds=300):
    """Press the button, and wait until it can be pressed again."""
    figure.locator('button').click()
    figure.locator('button:enabled').wait_for(timeout=1000 * seconds)
    return figure.locator('[role=status]').inner_text()


def saved(tab):
    """What the link under the figure saves."""
    with tab.expect_download() as download:
        tab.get_by_text('Save the result').click()
    return json.loads(download.value.path().read_text())


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]
    from pdf import chromium

    from d2ltvm.reader_gpu import ReaderGpu
    results = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=['--no-sandbox', *SOFTWARE])
        for kind in ('inference', 'training'):
            tab = show(browser, ReaderGpu(kind))
            said = finished(tab.locator('figure'), 3600)
            if not said.endswith('All results are right.'):
                sys.exit(said)
            results.append(saved(tab))
        browser.close()
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
