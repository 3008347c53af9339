// Load a module of d2ltvm.webassembly. Each of its functions becomes the
// arrays that it takes, the result last, and a call without arguments.
const STACK = 2 ** 19;  // bytes, as in d2ltvm.webassembly
const length = shape => shape.reduce((a, b) => a * b, 1);

export const load = async code => {
  const module = await WebAssembly.compile(code);
  const [section] = WebAssembly.Module.customSections(module, "shapes");
  const shapes = Object.entries(
    JSON.parse(new TextDecoder().decode(section)));
  const most = Math.max(...shapes.map(([, given]) => given.reduce(
    (sum, shape) => sum + 4 * length(shape) + 64, STACK)));
  const memory = new WebAssembly.Memory({initial: Math.ceil(most / 65536)});
  const stack = new WebAssembly.Global({value: "i32", mutable: true}, STACK);
  const {exports} = await WebAssembly.instantiate(module, {env: {
    __linear_memory: memory, __stack_pointer: stack}});
  return Object.fromEntries(shapes.map(([name, given]) => {
    let free = STACK;
    const arrays = given.map(shape => {
      const view = new Float32Array(memory.buffer, free, length(shape));
      free += 4 * view.length + 63 & ~63;
      return view;
    });
    const places = arrays.map(view => view.byteOffset);
    return [name, {arrays, call: () => exports[name](...places)}];
  }));
};
