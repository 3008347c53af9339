"""Firefox, by the protocol that it speaks itself, WebDriver BiDi."""
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path


def path():
    """The Firefox of this machine, or None."""
    return shutil.which('firefox-esr') or shutil.which('firefox')


class Firefox:
    """A window that nobody sees, with a fresh profile.

    Attributes
    ----------
    asked : list of str
        The addresses that the pages have asked for.
    """

    def __init__(self):
        import websocket
        self.asked, self.count = [], 0
        self.profile = tempfile.TemporaryDirectory()
        log = Path(self.profile.name, 'log')
        with log.open('w') as file:
            self.process = subprocess.Popen(
                [path(), '--headless', '--no-remote', '--profile',
                 self.profile.name, '--remote-debugging-port=0'],
                stdout=subprocess.DEVNULL, stderr=file)
        while not (found := re.search(r'BiDi listening on (ws://\S+)',
                                      log.read_text())):
            if self.process.poll() is not None:
                raise OSError(f'Firefox has ended: {log.read_text()}')
            time.sleep(0.1)
        self.socket = websocket.create_connection(
            f'{found[1]}/session', timeout=120, suppress_origin=True)
        self.ask('session.new', capabilities={})
        self.ask('session.subscribe', events=['network.beforeRequestSent'])
        tree = self.ask('browsingContext.getTree')
        self.context = tree['contexts'][0]['context']
        self.ask('browsingContext.activate', context=self.context)

    def ask(self, method, **parameters):
        """Send a command and wait for its result."""
        self.count += 1
        self.socket.send(json.dumps({'id': self.count, 'method': method,
                                     'params': parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get('method') == 'network.beforeRequestSent':
                self.asked.append(answer['params']['request']['url'])
            if answer.get('id') == self.count:
                break
        if answer['type'] == 'error':
            raise OSError(f'{method}: {answer["message"]}')
        return answer['result']

    def go(self, address):
        self.ask('browsingContext.navigate', context=self.context,
                 url=address, wait='complete')

    def evaluate(self, expression):
        """The value of an expression, a string or a number, in the page."""
        found = self.ask('script.evaluate', expression=expression,
                         target={'context': self.context}, awaitPromise=True)
        if found['type'] == 'exception':
            raise OSError(found['exceptionDetails']['text'])
        return found['result'].get('value')

    def wait(self, expression, seconds=120):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f'Boolean({expression})'):
            assert time.monotonic() < end, expression
            time.sleep(0.1)

    def click(self, element):
        """Click in the middle of an element, given as an expression."""
        self.evaluate(f'{element}.scrollIntoView({{block: "center"}})')
        x, y = (self.evaluate(
            f'(box => Math.round(box.{side} + box.{size} / 2))'
            f'({element}.getBoundingClientRect())')
            for side, size in (('left', 'width'), ('top', 'height')))
        self.ask('input.performActions', context=self.context, actions=[
            {'type': 'pointer', 'id': 'mouse', 'actions': [
                {'type': 'pointerMove', 'x': x, 'y': y},
                {'type': 'pointerDown', 'button': 0},
                {'type': 'pointerUp', 'button': 0}]}])

    def drag(self, element, points):
        """Draw a line with the mouse: points as shares of an element."""
        self.evaluate(f'{element}.scrollIntoView({{block: "center"}})')
        left, top, width, height = json.loads(self.evaluate(
            '(box => JSON.stringify([box.left, box.top, box.width, '
            f'box.height]))({element}.getBoundingClientRect())'))
        moves = [{'type': 'pointerMove', 'x': round(left + x * width),
                  'y': round(top + y * height)} for x, y in points]
        self.ask('input.performActions', context=self.context, actions=[
            {'type': 'pointer', 'id': 'mouse', 'actions': [
                moves[0], {'type': 'pointerDown', 'button': 0}, *moves[1:],
                {'type': 'pointerUp', 'button': 0}]}])

    def press(self, *keys):
        """Press keys one after the other; 'Shift+\\ue007' holds Shift."""
        actions = []
        for key in keys:
            *held, last = key.split('+') if len(key) > 1 else [key]
            held = [{'Shift': '\ue008', 'Control': '\ue009'}[k] for k in held]
            actions += [{'type': 'keyDown', 'value': k}
                        for k in (*held, last)]
            actions += [{'type': 'keyUp', 'value': k}
                        for k in (last, *reversed(held))]
        self.ask('input.performActions', context=self.context, actions=[
            {'type': 'key', 'id': 'keys', 'actions': actions}])

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.profile.cleanup()
