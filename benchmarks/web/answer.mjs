// One place of the suite `webassembly`: Node, or a page of a browser.
//
// It answers the commands of worker.py, and {"start": engine}: seconds from
// nothing loaded to the first logits. bench_webassembly.py writes the files
// that are read here, into the folder of this one.
import {load} from "./load.mjs";

const node = globalThis.process?.versions?.node;
const BUILDS = ["scalar", "simd", "relaxed"];
const PIXELS = 28 * 28, CROPPED = 26 * 26;
const WARM_UP = 50, LEAST = 20;  // milliseconds; a page's clock is coarse

const read = async name => {
  const address = new URL(name, import.meta.url);
  if (node) return (await import("node:fs/promises")).readFile(address);
  return new Uint8Array(await (await fetch(address)).arrayBuffer());
};
const numbers = async (name, Type = Float32Array) => {
  const {buffer, byteOffset, byteLength} = await read(name);
  return new Type(buffer.slice(byteOffset, byteOffset + byteLength));
};
const settings = async () => JSON.parse(
  new TextDecoder().decode(await read("settings.json")));

// ---- Programs: `run` gives a result, or a promise of one if it `waits`;
// `put` gives it one image of those that are checked

const functions = async build => {
  const code = await read(`${build}.wasm`);
  if (!WebAssembly.validate(code))
    throw Error("some of its instructions are not known here");
  return load(code);
};

const network = async build => {
  const {arrays, call} = (await functions(build)).network;
  const result = arrays.at(-1);
  const weights = await numbers("weights.f32");
  const images = await numbers("images.f32");
  let at = 0, image;
  for (const array of arrays.slice(1, -1)) {
    array.set(weights.subarray(at, at + array.length));
    at += array.length;
  }
  return {
    put: i => { image = images.subarray(PIXELS * i, PIXELS * (i + 1)); },
    run: () => {
      arrays[0].set(image);
      result.fill(NaN);
      call();
      return result.slice();
    },
  };
};

// X, and mean, variance, gamma, beta
const operands = async () => {
  const all = await numbers("operands.f32"), size = all.length - 4 * 32;
  return [0, 32, 64, 96, 128].map((end, i) => i
    ? all.subarray(size + end - 32, size + end) : all.subarray(0, size));
};

// With `copied`, the data come from elsewhere and go there
const operator = async (build, name, copied) => {
  const {arrays, call} = (await functions(build))[name];
  const given = await operands(), result = arrays.at(-1);
  given.forEach((array, i) => arrays[i].set(array));
  result.fill(NaN);
  const out = new Float32Array(result.length);
  return {put: () => {}, run: copied ? () => {
    arrays[0].set(given[0]);
    call();
    out.set(result);
    return out;
  } : () => {
    call();
    return result;
  }};
};

const inJavaScript = async () => {
  const [X, mean, variance, gamma, beta] = await operands();
  const Y = new Float32Array(X.length), pixels = X.length / mean.length;
  return {put: () => {}, run: () => {
    for (let c = 0; c < mean.length; ++c) {
      const scale = gamma[c] / Math.sqrt(variance[c] + 1e-5);
      const shift = beta[c] - mean[c] * scale;
      for (let i = pixels * c; i < pixels * (c + 1); ++i)
        Y[i] = X[i] * scale + shift;
    }
    return Y;
  }};
};

const onnx = async (model, shape, inputs, options) => {
  const ort = await import("./ort.wasm.min.mjs");
  ort.env.logLevel = "error";
  Object.assign(ort.env.wasm, {
    numThreads: 1, wasmPaths: new URL("./", import.meta.url).href});
  const session = await ort.InferenceSession.create(
    new Uint8Array(await read(model)),
    {executionProviders: ["wasm"], ...options});
  const size = shape.reduce((a, b) => a * b, 1);
  const X = new ort.Tensor("float32", inputs.slice(0, size), shape);
  const feeds = {X};
  return {
    waits: true,
    put: i => X.data.set(inputs.subarray(size * i, size * (i + 1))),
    run: async () => (await session.run(feeds)).Y.data,
  };
};
const theirNetwork = async (model, options) => onnx(
  `${model}.onnx`, [1, 1, 26, 26], await numbers("cropped.f32"), options);
const theirOperator = async options => onnx(
  "operator.onnx", [1, 32, 28, 28], (await operands())[0], options);

// ---- The forms of each suite; a form is named "engine, settings"

const level = graphOptimizationLevel => ({graphOptimizationLevel});
const LEVELS = {
  ...Object.fromEntries(["all", "layout", "extended", "basic", "disabled"].map(
    name => [name, level(name)])),
  "all, no arena": {...level("all"), enableCpuMemArena: false,
                    enableMemPattern: false}};

const suites = {
  network: theirs => Object.fromEntries([
    ...BUILDS.map(build => [build, () => network(build)]),
    ...theirs ? [
      ...Object.entries(LEVELS).map(([name, options]) => [
        `${theirs}, folded, ${name}`,
        () => theirNetwork("folded", options)]),
      [`${theirs}, unfolded, all`,
       () => theirNetwork("unfolded", LEVELS.all)]] : []]),
  operator: theirs => Object.fromEntries([
    ...BUILDS.map(build => [build, () => operator(build, "scheduled")]),
    ["simd with copies", () => operator("simd", "scheduled", true)],
    ...BUILDS.map(build => [
      `written ${build}`, () => operator(build, "written")]),
    ["JavaScript", inJavaScript],
    ...theirs ? [
      [`${theirs}, all`, () => theirOperator(LEVELS.all)]] : []]),
};

// ---- Right, then quick

const errorOf = async ({put, run}, exact, count) => {
  const size = exact.length / count;
  let apart = 0, largest = 0;
  for (let i = 0; i < count; ++i) {
    put(i);
    const result = await run();
    if (result.length !== size) return `gives ${result.length} numbers`;
    for (let j = 0; j < size; ++j) {
      const right = exact[size * i + j], off = Math.abs(result[j] - right);
      if (Number.isNaN(off)) return "gives NaN";
      apart = Math.max(apart, off);
      largest = Math.max(largest, Math.abs(right));
    }
  }
  put(0);
  return apart / largest;
};

const several = async ({run, waits}, calls) => {
  const start = performance.now();
  if (waits) for (let i = 0; i < calls; ++i) await run();
  else for (let i = 0; i < calls; ++i) run();
  return performance.now() - start;
};

const secondsPerCall = async (form, least) => {
  let calls = 1, last = 0;
  for (let warm = 0; warm < WARM_UP; warm += last) {
    calls *= 2;
    last = await several(form, calls);
  }
  const number = Math.max(1, Math.round(least * calls / last));
  return await several(form, number) / number / 1000;
};

let forms = {};
const commands = {
  prepare: async ({prepare}) => {
    const {theirs, counts} = await settings(), errors = {};
    const exact = await numbers(`${prepare}.f64`, Float64Array);
    forms = {};
    for (const [name, make] of Object.entries(suites[prepare](theirs)))
      try {
        forms[name] = await make();
        errors[name] = await errorOf(
          forms[name], exact, counts[prepare]);
      } catch (error) {
        errors[name] = `failed: ${error.message.split("\n")[0]}`;
      }
    return {errors: {[prepare]: errors}, checksum: exact.length};
  },
  time: async ({form, seconds}) => ({seconds: await secondsPerCall(
    forms[form], Math.max(LEAST, 1000 * seconds))}),
  start: async ({start: theirs}) => {
    const before = performance.now();
    const form = await (theirs ? theirNetwork("folded", LEVELS.all)
                               : network("simd"));
    form.put(0);
    await form.run();
    return {seconds: (performance.now() - before) / 1000};
  },
};
export const answer = async command => {
  try {
    for (const name of Object.keys(commands))
      if (name in command) return await commands[name](command);
    return {cannot: "was asked for something unknown"};
  } catch (error) {
    return {cannot: `failed: ${error.message}`};
  }
};

if (node) {
  const {createInterface} = await import("node:readline");
  const say = given => process.stdout.write(`${JSON.stringify(given)}\n`);
  say({versions: {Node: node}, threads: 1});
  for await (const line of createInterface({input: process.stdin}))
    say(await answer(JSON.parse(line)));
}
