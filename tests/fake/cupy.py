"""Stands in for CuPy: a GPU that is the processor.

Arrays are NumPy's. A kernel is compiled from its CUDA source by g++: each
thread of a block is a thread of the processor, and `__syncthreads` is a
barrier for all of them. Blocks run one after the other. Types, order and
number of the arguments are compared with the source.
"""
import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy import copyto  # noqa: F401

__version__ = 'none: the processor stands in'
PROLOGUE = '''
#include <pthread.h>
#define alignas(n) __attribute__((aligned(n)))
#define __global__
#define __launch_bounds__(n)
#define __shared__ static
extern "C" float sqrtf(float);
typedef unsigned uint;
struct uint3 { uint x, y, z; };
struct alignas(16) uint4 { uint x, y, z, w; };
struct alignas(8) uint2 { uint x, y; };
struct uint1 { uint x; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
static __thread uint3 threadIdx, blockIdx;
static pthread_barrier_t gate;
static void __syncthreads() { pthread_barrier_wait(&gate); }
'''
HALF = '''
#include <immintrin.h>
#define half2 uint1
#define half4 uint2
struct half {
  unsigned short bits;
  half() = default;
  half(float x) : bits(_cvtss_sh(x, 0)) {}
  operator float() const { return _cvtsh_ss(bits); }
};
'''
ENTRY = '''
static uint grid[3], block[3];
static void** given;
static void* each_thread(void* place) {
  uint t = (uint)(unsigned long)place;
  threadIdx = {t %% block[0], t / block[0] %% block[1],
               t / block[0] / block[1]};
  for (uint z = 0; z < grid[2]; ++z)
    for (uint y = 0; y < grid[1]; ++y)
      for (uint x = 0; x < grid[0]; ++x) {
        blockIdx = {x, y, z};
        %s(%s);
        __syncthreads();  // shared memory belongs to one block
      }
  return nullptr;
}
extern "C" void run(const uint* g, const uint* b, void** arguments) {
  for (int i = 0; i < 3; ++i) grid[i] = g[i], block[i] = b[i];
  given = arguments;
  uint n = b[0] * b[1] * b[2];
  pthread_t threads[1024];
  pthread_barrier_init(&gate, nullptr, n);
  for (uint t = 0; t < n; ++t)
    pthread_create(threads + t, nullptr, each_thread, (void*)(long)t);
  for (uint t = 0; t < n; ++t) pthread_join(threads[t], nullptr);
  pthread_barrier_destroy(&gate);
}
'''
FOLDER = Path(tempfile.gettempdir(), f'd2ltvm-fake-cupy-{os.getuid()}')


def compiled(source):
    name, params = re.search(
        r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?'
        r'(\w+)\(([^()]*)\) \{', source).groups()
    types = re.findall(r'(\w+)\* __restrict__ \w+', params)
    assert len(types) == params.count(',') + 1, params
    code = PROLOGUE + HALF * ('half' in source) + source + ENTRY % (
        name, ', '.join(f'({each}*)given[{place}]'
                        for place, each in enumerate(types)))
    FOLDER.mkdir(exist_ok=True)
    made = FOLDER / (hashlib.sha256(code.encode()).hexdigest() + '.so')
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as partial:
            subprocess.run(
                ['g++', '-x', 'c++', '-std=c++17', '-O1', '-mf16c', '-w',
                 '-fno-strict-aliasing', '-ffp-contract=off', '-pthread',
                 '-shared', '-fPIC', '-o', f'{partial}/made', '-'],
                input=code, text=True, check=True)
            os.replace(f'{partial}/made', made)
    return name, types, ctypes.CDLL(str(made)).run


class RawModule:
    def __init__(self, *, code=None, path=None):
        if path is not None:
            raise NotImplementedError('the processor runs no cubin')
        self.name, self.types, self.run = compiled(
            code[code.index('extern "C"'):])

    def get_function(self, name):
        assert name == self.name

        def function(grid, block, args):
            assert [each.dtype for each in args] == [
                {'float': 'float32', 'half': 'float16'}[name]
                for name in self.types]
            assert all(each.flags.c_contiguous for each in args)
            assert all(type(size) is tuple and len(size) == 3
                       for size in (grid, block))
            three = ctypes.c_uint * 3
            self.run(three(*grid), three(*block), (
                ctypes.c_void_p * len(args))(*(a.ctypes.data for a in args)))
        return function


class Event:
    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


def asarray(array):
    return np.array(array)


def zeros(shape, dtype):  # nothing has to be flushed here
    return np.zeros(1, dtype)


def asnumpy(array):
    return np.array(array)


cuda = SimpleNamespace(
    is_available=lambda: True, Event=Event,
    get_elapsed_time=lambda begin, end: 1e3 * (end.time - begin.time),
    Device=lambda: SimpleNamespace(compute_capability='90'),
    runtime=SimpleNamespace(
        deviceSynchronize=lambda: None,
        getDeviceProperties=lambda device: {
            'name': b'the processor', 'totalGlobalMem': 1, 'l2CacheSize': 1},
        driverGetVersion=lambda: 0, runtimeGetVersion=lambda: 0))
