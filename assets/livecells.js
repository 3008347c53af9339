// Cells with the tag `live` run in their page, once a reader asks for it. The
// book brings Python and NumPy along: _ext/livecells.py
(() => {
  const script = document.currentScript;
  const marked = [...document.querySelectorAll("div.cell.tag_live")];
  // The server of `make live` runs every cell, and has put its bar here
  if (document.querySelector(".live-bar") || !marked.length) return;

  const bar = document.createElement("p");
  bar.className = "live-bar";
  document.querySelector("article h1").after(bar);
  const missing = ["Worker", "WebAssembly", "DecompressionStream"].find(
    name => !(name in window));
  if (missing) {
    bar.textContent = "The code of this page can be run here, but not by " +
      `this browser: it has no ${missing}.`;
    return;
  }

  const make = (tag, name, text = "") => {
    const made = document.createElement(tag);
    made.className = name;
    made.textContent = text;
    return made;
  };
  const button = (name, text, action) => {
    const made = make("button", name, text);
    made.type = "button";
    made.onclick = action;
    return made;
  };
  const start = button("btn btn-primary", "Run the code of this page here",
    () => {
      start.disabled = true;
      marked.forEach(open);
      load();
    });
  const status = make("span", "", "Loads Python and NumPy from the book, " +
    `${script.dataset.size}\u00a0MB. They run in this page: nothing leaves ` +
    "it.");
  status.setAttribute("role", "status");
  bar.append(start, " ", status);

  // Python itself, which runs one cell after the other
  let bundle = null, worker = null, ready = false, current = null, queue = [];
  const cells = [];

  const load = () => {
    status.textContent = "Python: loading";
    bundle ??= new Promise((resolve, reject) => {
      const tag = document.createElement("script");
      tag.src = new URL("python/bundle.js", script.src);
      tag.onload = () => resolve(window.bookPython);
      tag.onerror = () => {
        bundle = null;
        reject(new Error("the file python/bundle.js cannot be loaded"));
      };
      document.head.append(tag);
    });
    bundle.then(launch).catch(fail);
  };
  const launch = ({ code, files }) => {
    if (worker) return;
    status.textContent = "Python: starting";
    const own = worker = new Worker(URL.createObjectURL(
      new Blob([code], { type: "text/javascript" })));
    own.onmessage = ({ data }) => own === worker && hear[data.kind](data);
    own.onerror = fail;
    own.postMessage({ files });
  };
  const hear = {
    state: ({ text }) => { status.textContent = `Python: ${text}`; },
    ready: () => {
      ready = true;
      status.textContent = "Python: ready. Change a cell, and run it by its " +
        "button or with Shift+Enter.";
      next();
    },
    output: ({ type, text }) => add(current, type, text),
    end: ({ right }) => {
      const cell = current;
      current = null;
      become(cell, right ? "done" : "wrong");
      if (!right) {
        cell.box.querySelector("details.hide")?.setAttribute("open", "");
        for (const one of queue) become(one, "dropped");
        queue = [];
      }
      next();
    },
    crash: ({ text }) => stop(`Python: failed. ${text}`),
  };
  const fail = error => stop(`Python: failed. ${error.message ?? error}`);
  const stop = text => {
    worker?.terminate();
    worker = current = null;
    ready = false;
    queue = [];
    for (const cell of cells) {
      if (busy(cell)) become(cell, "stopped");
      cell.fresh = true;
    }
    status.textContent = text;
  };
  const next = () => {
    if (!ready || current || !queue.length) return;
    current = queue.shift();
    current.out.replaceChildren();
    current.fresh = false;
    current.since = performance.now();
    become(current, "running");
    worker.postMessage({ code: codeOf(current.pre), name: current.name });
  };

  // A cell runs after those above it that are fresh: new, or changed since
  const run = cell => {
    for (const one of cells.slice(0, cell.id + 1))
      if ((one === cell || one.fresh) && !busy(one)) {
        queue.push(one);
        become(one, "waiting");
      }
    if (worker) next(); else load();
  };
  const busy = cell => cell.state === "waiting" || cell.state === "running";
  const become = (cell, state) => {
    const seconds = (performance.now() - cell.since) / 1000;
    cell.state = state;
    cell.button.textContent = busy(cell) ? "Stop" : "Run";
    cell.reset.disabled = busy(cell);
    cell.button.setAttribute("aria-label",
      `${cell.button.textContent} ${cell.name}`);
    cell.said.textContent = `${cell.name}: ` + {
      new: "as in the book", changed: "changed", waiting: "waiting",
      running: "running", done: `done in ${seconds.toFixed(1)} s`,
      wrong: "an error", stopped: "stopped",
      dropped: "not run, because of an error above" }[state];
  };

  const textOf = node => {
    const copy = node.cloneNode(true);
    copy.querySelectorAll("br").forEach(line => line.replaceWith("\n"));
    return copy.textContent;
  };
  const codeOf = pre => textOf(pre).replace(/\n+$/, "");
  const textBefore = (pre, node, offset) => {
    const range = new Range(), before = make("pre", "");
    range.setStart(pre, 0);
    range.setEnd(node, offset);
    before.append(range.cloneContents());
    return textOf(before);
  };

  // Code that is changed becomes plain, else its colours would spread
  const plain = pre => {
    if (!pre.querySelector("span")) return;
    const selection = getSelection();
    const [from, to] = ["anchor", "focus"].map(end => textBefore(
      pre, selection[`${end}Node`], selection[`${end}Offset`]).length);
    pre.textContent = textOf(pre);
    selection.setBaseAndExtent(pre.firstChild, from, pre.firstChild, to);
  };
  // A new line begins where the line before it does
  const breakLine = pre => {
    const { startContainer, startOffset } = getSelection().getRangeAt(0);
    const line = textBefore(pre, startContainer, startOffset).split("\n").pop();
    document.execCommand("insertText", false, "\n" + line.match(/^ */)[0] +
      (/:\s*$/.test(line) ? "    " : ""));
  };

  const classes = { stream: "stream", stderr: "stderr", text: "text_plain",
                    error: "traceback", svg: "image_svg" };
  const add = (cell, type, text) => {
    const last = cell.out.lastElementChild;
    if (type !== "svg" && last?.classList.contains(classes[type])) {
      last.firstChild.textContent += text;
      return;
    }
    const part = make("div", `output ${classes[type]}`);
    part.append(type === "svg" ? picture(cell, text) : make("pre", "", text));
    cell.out.append(part);
  };
  // A figure of the book keeps its number and its caption
  const picture = (cell, text) => {
    const known = cell.out.querySelector("figure") ? null : cell.figure;
    const figure = known?.cloneNode(true) ?? make("figure", "");
    if (!known)
      figure.innerHTML = '<a class="enlarge" title="Enlarge"><img></a>';
    const link = figure.querySelector("a.enlarge"), image = link.firstChild;
    link.href = image.src = "data:image/svg+xml," + encodeURIComponent(text);
    if (!known || codeOf(cell.pre) !== cell.before)
      image.alt = `Figure that ${cell.name} draws`;
    return figure;
  };

  // Make a cell of the page one that can be changed and run
  const open = (box, id) => {
    const pre = box.querySelector(".cell_input pre"), before = codeOf(pre);
    for (const folded of pre.querySelectorAll("details")) {
      folded.querySelector("summary").remove();
      folded.replaceWith(...folded.childNodes);
    }
    const cell = { box, pre, id, name: `cell ${id + 1}`, fresh: true,
                   before, figure: box.querySelector("figure.align-default") };
    cell.out = box.querySelector(".cell_output");
    if (!cell.out) {
      cell.out = make("div", "cell_output");
      box.append(cell.out);
    }
    const kept = { code: pre.cloneNode(true), out: [...cell.out.childNodes] };
    cells.push(cell);

    try {
      pre.contentEditable = "plaintext-only";
    } catch {
      pre.contentEditable = "true";
    }
    pre.classList.add("live-code");
    pre.spellcheck = false;
    for (const [name, value] of Object.entries({
      role: "textbox", "aria-multiline": "true", autocapitalize: "off",
      autocorrect: "off", "aria-label": `Code of ${cell.name}` }))
      pre.setAttribute(name, value);

    cell.button = button("", "", () => busy(cell)
      ? stop("Python: stopped, its variables are gone. The next run starts " +
             "it anew.")
      : run(cell));
    const reset = cell.reset = button("", "Reset", () => {
      pre.replaceChildren(...kept.code.cloneNode(true).childNodes);
      cell.out.replaceChildren(...kept.out);
      cell.fresh = reset.hidden = true;
      become(cell, "new");
      pre.focus();
    });
    reset.setAttribute("aria-label", `Reset ${cell.name}`);
    reset.hidden = true;
    cell.said = make("span", "");
    cell.said.setAttribute("role", "status");
    const tools = make("div", "live-tools");
    tools.append(cell.button, reset, cell.said);
    box.querySelector(".cell_input").after(tools);
    become(cell, "new");

    pre.addEventListener("beforeinput", () => plain(pre));
    pre.addEventListener("input", () => {
      reset.hidden = codeOf(pre) === before;
      cell.fresh = true;
      if (!busy(cell)) become(cell, reset.hidden ? "new" : "changed");
    });
    pre.addEventListener("keydown", event => {
      // What is typed is no shortcut of the page
      if (!event.ctrlKey && !event.metaKey && event.key !== "Escape")
        event.stopPropagation();
      if (event.key !== "Enter") return;
      event.preventDefault();
      if (!event.shiftKey) breakLine(pre);
      else if (!busy(cell)) run(cell);
    });
  };
})();
