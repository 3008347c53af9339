"""The GPU programs of training on WebGPU: in software, without a window."""
import base64

import numpy as np
import pytest

from d2ltvm.gpu_schedule import launch_plan, wgsl_source
from d2ltvm.gpu_training import gpu_grid
from gpu_programs import programs_of, run_all
from test_training_operator import draw, judge

RUN = '''async ({wgsl, kernel, grid, arrays}) => {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) return null;
  const device = await adapter.requestDevice();
  device.pushErrorScope("validation");
  const module = device.createShaderModule({code: wgsl});
  const pipeline = await device.createComputePipelineAsync(
    {layout: "auto", compute: {module, entryPoint: kernel}});
  const U = GPUBufferUsage, buffer = (size, usage, data) => {
    const made = device.createBuffer({size, usage: usage | U.COPY_DST});
    if (data) device.queue.writeBuffer(made, 0, data);
    return made;
  };
  const buffers = {}, entries = [];
  for (const [, place, name] of wgsl.matchAll(
      /@binding\\((\\d+)\\) var<storage, \\w+> (\\w+)_ptr/g)) {
    const data = Uint8Array.from(atob(arrays[name]), c => c.charCodeAt(0));
    buffers[name] = buffer(data.length, U.STORAGE | U.COPY_SRC, data);
    entries.push({binding: +place, resource: {buffer: buffers[name]}});
  }
  const [, place] = wgsl.match(/@binding\\((\\d+)\\) var<uniform>/);
  entries.push({binding: +place, resource: {buffer: buffer(
    4, U.UNIFORM, new Uint32Array([grid[0] - 1]))}});
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  pass.setBindGroup(0, device.createBindGroup(
    {layout: pipeline.getBindGroupLayout(0), entries}));
  pass.dispatchWorkgroups(...grid);
  pass.end();
  const results = {};
  for (const [name, source] of Object.entries(buffers)) {
    results[name] = buffer(source.size, U.MAP_READ);
    encoder.copyBufferToBuffer(source, 0, results[name], 0, source.size);
  }
  device.queue.submit([encoder.finish()]);
  for (const name of Object.keys(results)) {
    await results[name].mapAsync(GPUMapMode.READ);
    let text = "";
    for (const byte of new Uint8Array(results[name].getMappedRange()))
      text += String.fromCharCode(byte);
    results[name] = btoa(text);
  }
  const error = await device.popErrorScope();
  device.destroy();
  return {results, error: error && error.message};
}'''


@pytest.fixture(scope='module')
def tab(webgpu):
    """A page that may use WebGPU."""
    tab = webgpu.new_page()
    tab.route('**/*', lambda route: route.fulfill(
        body='<!DOCTYPE html>', content_type='text/html'))
    tab.goto('http://localhost/')  # WebGPU asks for a secure context
    return tab


def on_webgpu(tab, program):
    """A function that runs the program with NumPy arrays."""
    launch, = launch_plan(program, 'webgpu')
    wgsl = wgsl_source(program)

    def call(*arrays):
        given = {param.name: array for param, array in zip(
            program.params, arrays, strict=True)}
        done = tab.evaluate(RUN, {
            'wgsl': wgsl, 'kernel': launch.kernel, 'grid': launch.grid,
            'arrays': {name: base64.b64encode(array.tobytes()).decode()
                       for name, array in given.items()}})
        if done is None:
            pytest.skip('this Chromium has no WebGPU')
        assert done['error'] is None
        for name, text in done['results'].items():
            given[name][...] = np.frombuffer(
                base64.b64decode(text), 'float32').reshape(given[name].shape)
    return call


def cases():
    """Four are always run."""
    few = [((4, 3, 5, 5), 1000, False), ((33, 19), 0, True),
           ((2, 3, 24, 24), 1000, True), ((1, 3, 1, 1), 0, False)]
    shapes = ((8, 5, 13, 13), (2, 16, 28, 28), (300, 9), (64, 3, 1, 1),
              (3, 2, 96, 96), (1, 1))
    return few + [pytest.param(shape, offset, relu, marks=pytest.mark.soak)
                  for shape in shapes for offset in (0, 1000, -10000)
                  for relu in (False, True)]


@pytest.mark.parametrize(('shape', 'offset', 'relu'), cases())
def test_on_webgpu(tab, shape, offset, relu):
    arrays = draw(shape, 0, offset)
    grid = gpu_grid(shape, threads=64, steps=2)
    calls = [(program, on_webgpu(tab, program))
             for program in programs_of(grid, relu)]
    judge(run_all(calls, *arrays), *arrays, relu=relu)
    if shape == (33, 19):  # NaN in, NaN out, behind a rectifier too
        arrays[0][2, 1] = np.nan
        Y, dX, *_ = run_all(calls, *arrays)
        for result in (Y, dX):
            assert np.isnan(result[:, 1]).all()
            assert np.isfinite(np.delete(result, 1, axis=1)).all()
