"""Compile our GPU kernels by NVIDIA's compiler, and read what it made.

    python benchmarks/gpu_compiled.py

No GPU is needed. For each architecture of `ARCHS` the script notes how many
registers a thread needs, the bytes of shared memory of a block, what was
spilled from registers into memory, how many of the loads and stores move 16
bytes, and the occupancy, in `results/gpu_compiled.json`. The compiler and
the disassembler come from the package index, into a folder that is deleted
at the end; `--tools FOLDER` takes them from there instead.
"""
import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / 'results/gpu_compiled.json'
PACKAGES = ('nvidia-cuda-nvcc==13.0.*', 'nvidia-cuda-crt==13.0.*',
            'nvidia-nvvm==13.0.*', 'nvidia-cuda-runtime==13.0.*',
            'nvidia-cuda-cccl==13.0.*',
            'nvidia-cuda-cuobjdump==13.2.*', 'nvidia-cuda-nvdisasm==13.2.*')
ARCHS = 'sm_75', 'sm_80', 'sm_90', 'sm_100'
INFERENCE = [(shape, dtype) for dtype in ('float32', 'float16')
             for shape in ((32, 64, 56, 56), (32, 64, 57, 57))]
TRAINING = ('moments', 'statistics', 'normalize', 'gradient sums', 'factors',
            'input gradient')


def run(*command):
    return subprocess.run(list(map(str, command)), check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def find(tools, name):
    """A program of the packages, wherever they have put it."""
    path, = {path.resolve() for path in Path(tools).rglob(f'bin/{name}')}
    path.chmod(0o755)
    return path


def resources(text):
    """Registers, shared and spilled bytes from `cuobjdump -res-usage`."""
    number = {key: int(value) for key, value in
              re.findall(r'\b(REG|STACK|SHARED|LOCAL):(\d+)', text)}
    return {'registers': number['REG'], 'shared': number['SHARED'],
            'spilled': number['STACK'] + number['LOCAL']}


def accesses(text):
    """Of loads and stores in a disassembly: [those of 16 bytes, all]."""
    found = {}
    for name in ('LDG', 'STG'):
        all_ = re.findall(rf'\b{name}(?:\.\w+)*', text)
        found[name] = [sum('.128' in each for each in all_), len(all_)]
    return found


def compiled(source, arch, tools, folder):
    """What the compiler has made of a source with one kernel."""
    path = Path(folder, 'kernel.cu')
    path.write_text(source)
    cubin = path.with_suffix('.cubin')
    include = [f'-I{each}' for each in sorted({
        each.parent for each in Path(tools).rglob('include/cuda_fp16.h')})]
    run(find(tools, 'nvcc'), '-w', '-cubin', f'-arch={arch}', *include, '-o',
        cubin, path)
    usage = run(find(tools, 'cuobjdump'), '-res-usage', cubin)
    code = run(find(tools, 'nvdisasm'), cubin)
    return resources(usage) | accesses(code)


def measured(mod, tools, folder):
    """What is stored of a program with one kernel."""
    from d2ltvm.gpu_schedule import cuda_source, launch_plan, occupancy
    launch, = launch_plan(mod, 'cuda')
    threads = math.prod(launch.block)
    arch = {}
    for name in ARCHS:
        made = compiled(cuda_source(mod, name), name, tools, folder)
        # From sm_90 on it counts 1024 bytes that the system takes as well
        assert made['shared'] - launch.shared in (0, 1024)
        made['shared'] = launch.shared
        arch[name] = made | {'occupancy': occupancy(
            threads, made['registers'], made['shared'], name)}
    return {'threads': threads, 'source': digest(mod), 'arch': arch}


def digest(mod):
    """By which the tests know that a program is still the one compiled."""
    from d2ltvm.gpu_schedule import cuda_source
    return hashlib.sha256(cuda_source(mod, 'sm_90').encode()).hexdigest()


def inference():
    """The kernel of `gpu_schedule`, for the shapes of `INFERENCE`."""
    from d2ltvm.gpu_schedule import cuda_schedule
    for shape, dtype in INFERENCE:
        yield {'shape': list(shape), 'dtype': dtype}, cuda_schedule(
            shape, dtype).mod


def training():
    """The kernels of `gpu_training` for one shape, with a rectifier."""
    from d2ltvm.gpu_training import (
        backward_programs,
        forward_programs,
        gpu_grid,
    )
    shape = INFERENCE[0][0]
    for dtype in ('float32', 'float16'):
        grid = gpu_grid(shape, dtype=dtype)
        programs = forward_programs(grid, True) + backward_programs(grid, True)
        for name, program in zip(TRAINING, programs, strict=True):
            yield {'name': name, 'shape': list(shape), 'dtype': dtype}, program


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--tools', type=Path, help='folder of the packages')
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tools = arguments.tools or Path(folder, 'tools')
        if not arguments.tools:
            run(sys.executable, '-m', 'uv', 'pip', 'install', '--quiet',
                '--no-deps', '--target', tools, *PACKAGES)
        version, = re.findall(r'release [\d.]+, V([\d.]+)',
                              run(find(tools, 'nvcc'), '--version'))
        results = {'nvcc': version} | {
            kind.__name__: [facts | measured(mod, tools, folder)
                            for facts, mod in kind()]
            for kind in (inference, training)}
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
