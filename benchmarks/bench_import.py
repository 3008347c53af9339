"""How long the package and its modules take to import, in a new process."""
import subprocess
import sys

import numpy as np

import side_by_side

MODULES = ('d2ltvm', 'd2ltvm.mnist', 'd2ltvm.tvm_inference',
           'd2ltvm.from_scratch', 'tvm', 'mxnet')
# MXNet with the help that it needs to be imported at all
PROGRAM = """
import importlib, sys, time
start = time.perf_counter()
if sys.argv[1] == 'mxnet':
    importlib.import_module('d2ltvm.mxnet_today').prepare()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""


def seconds(module):
    ran = subprocess.run([sys.executable, '-c', PROGRAM, module], check=True,
                         capture_output=True, text=True)
    return float(ran.stdout)


def run():
    share = side_by_side.others()
    rounds = [[seconds(module) for module in MODULES] for _ in range(7)]
    quartiles = np.quantile(rounds, (0.25, 0.5, 0.75), axis=0).T
    return {'title': 'import', 'baseline': 'mxnet', 'busy': share,
            'threads': side_by_side.threads(),
            'times': dict(zip(MODULES, quartiles.tolist(), strict=True))}
