"""A page of Chromium as a worker: `python place.py FOLDER`.

The page is on a server of this machine, which serves the folder. Commands
come on stdin, answers go to stdout, as worker.py has it; `answer.mjs`, in the
page, does the work.
"""
import json
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.append(str(Path(__file__).resolve().parents[2] / 'tools'))
from pdf import chromium

ANSWER = "command => import('/answer.mjs').then(m => m.answer(command))"


class Quiet(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map,  # noqa: RUF012
                      '.mjs': 'text/javascript', '.wasm': 'application/wasm'}

    def log_message(self, *args):
        pass


def serve(folder, commands, say):
    server = ThreadingHTTPServer(('127.0.0.1', 0),
                                 partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        # The page is our own; a container has no user for the sandbox
        browser = playwright.chromium.launch(executable_path=chromium(),
                                             args=['--no-sandbox'])
        page = browser.new_page()
        page.goto(f'http://127.0.0.1:{server.server_port}/')
        say(versions={'Chromium': browser.version}, threads=1)
        for line in commands:
            say(**page.evaluate(ANSWER, json.loads(line)))
        browser.close()
    server.shutdown()


def main():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what a library prints must not look like an answer

    def say(**answer):
        answers.write(json.dumps(answer) + '\n')
        answers.flush()

    if chromium() is None:
        return say(cannot='is not installed (Debian: apt install chromium)')
    serve(sys.argv[1], sys.stdin, say)


if __name__ == '__main__':
    main()
