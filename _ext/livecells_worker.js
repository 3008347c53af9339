// Python in a worker, so that the page stays alive while a cell runs. Before
// this text stands Pyodide's own: a page that was opened from the disk may
// load nothing by its address, so that all of it comes in one message.
const MOST = 100_000;  // characters that a cell may print
const tell = (kind, more) => postMessage({ kind, ...more });
let receive;
const files = new Promise(resolve => { receive = resolve; });

// Pyodide asks for its files: they are here already, packed
self.fetch = async address => {
  const name = String(address.url ?? address).split("/").pop();
  const packed = (await files)[name];
  if (packed === undefined) throw new Error(`the book has no file ${name}`);
  const text = atob(packed), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const type = name.endsWith(".wasm") ? "wasm" : "octet-stream";
  return new Response(
    new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")),
    { headers: { "Content-Type": `application/${type}` } });
};

const started = (async () => {
  const python = await loadPyodide({ indexURL: "https://book.invalid/" });
  tell("state", { text: "loading NumPy" });
  for (const name of ["numpy.zip", "book.zip"])
    python.unpackArchive(await (await fetch(name)).arrayBuffer(), "zip",
      { extractDir: "/lib/python3.12/site-packages" });
  python.runPython("import numpy");
  const runner = python.pyimport("livecells_runner");
  tell("ready");
  return runner;
})();
const crash = error => tell("crash", { text: String(error).split("\n")[0] });
started.catch(crash);

// What a cell prints goes to the page at once, a flood of it in pieces
const outlet = () => {
  let waiting = "", type, total = 0, sent = 0, last = 0;
  const flush = () => {
    if (!waiting) return;
    tell("output", { type, text: waiting });
    waiting = "";
    sent += 1;
    last = performance.now();
  };
  const show = (kind, text) => {
    if (kind !== type) flush();
    type = kind;
    if (total > MOST && kind !== "error") return;
    total += text.length;
    waiting += total > MOST && kind === "stream"
      ? "\n… the rest is not shown\n" : text;
    if (sent < 200 || performance.now() > last + 50) flush();
  };
  return { show, flush };
};

onmessage = async ({ data }) => {
  if (data.files) {
    receive(data.files);
    return;
  }
  try {
    const runner = await started, { show, flush } = outlet();
    const right = runner.run(data.code, data.name, show);
    flush();
    tell("end", { right });
  } catch (error) {
    crash(error);
  }
};
