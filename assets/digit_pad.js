// The digit pad: draw a digit, and the book's compiled network names it.
//
// digit_network.js has the weights, digit_samples.js some test digits, and
// digit_builds.js the modules that `pad_module` of d2ltvm.webassembly makes.
(() => {
  const STACK = 2 ** 19;  // bytes, as in d2ltvm.webassembly
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const product = shape => shape.reduce((a, b) => a * b, 1);
  const largest = values => values.reduce((a, b) => Math.max(a, b), 0);

  // ---- The module: the best build that this browser knows

  const known = () => typeof WebAssembly !== "object" ? [] :
    ["relaxed", "simd", "scalar"].filter(
      build => WebAssembly.validate(bytes(digitBuilds[build])));

  // Each function as its arrays, the last one the result, and a call
  const load = async build => {
    const module = await WebAssembly.compile(bytes(digitBuilds[build]));
    const [section] = WebAssembly.Module.customSections(module, "shapes");
    const shapes = JSON.parse(new TextDecoder().decode(section));
    const sizes = Object.values(shapes).map(given => given.reduce(
      (sum, shape) => sum + 4 * product(shape) + 64, STACK));
    const memory = new WebAssembly.Memory(
      {initial: Math.ceil(largest(sizes) / 65536)});
    const stack = new WebAssembly.Global({value: "i32", mutable: true}, STACK);
    const instance = await WebAssembly.instantiate(
      module, {env: {__linear_memory: memory, __stack_pointer: stack}});
    return Object.fromEntries(Object.entries(shapes).map(([name, given]) => {
      let free = STACK;
      const arrays = given.map(shape => {
        const view = new Float32Array(memory.buffer, free, product(shape));
        free += 4 * view.length + 63 & ~63;
        return view;
      });
      const places = arrays.map(view => view.byteOffset);
      const call = () => instance.exports[name](...places);
      return [name, {shapes: given, arrays, call}];
    }));
  };

  // ---- The weights: stored as float16; what follows computes in float64

  const half = h => {
    const power = h >> 10 & 31, rest = h & 1023;
    return (h >> 15 ? -1 : 1) * (
      power ? 2 ** (power - 25) * (1024 + rest) : 2 ** -24 * rest);
  };

  const readNetwork = () => Object.fromEntries(
    Object.entries(digitNetwork).map(([name, [, text]]) => [
      name, Float64Array.from(new Uint16Array(bytes(text).buffer), half)]));

  // Of normalization i: gamma, beta, and the statistics of a name
  const norm = (network, i, statistics) => {
    const start = statistics === "running" ? "running_" : "";
    return {gamma: network[`gamma${i}`], beta: network[`beta${i}`],
            mean: network[`${start}mean${i}`],
            variance: network[`${start}var${i}`]};
  };

  // y = scale * x + shift, of each channel
  const scaleAndShift = ({gamma, beta, mean, variance}) => {
    const scale = gamma.map((g, c) => g / Math.sqrt(variance[c] + 1e-5));
    return {scale, shift: beta.map((b, c) => b - mean[c] * scale[c])};
  };

  // G of Winograd's convolution, a row for each of its k + 1 points, as
  // winograd_matrices of d2ltvm.conv_schedule has it
  const winogradRows = k => {
    const pairs = Array.from({length: (k - 1) / 2},
                             (_, i) => 1.5 ** (2 * i - (k - 3) / 2));
    const points = [0, ...pairs, ...pairs.map(a => -a)];
    const powers = (a, below) =>
      Array.from({length: k}, (_, v) => a ** v / below);
    const rows = points.map(a => powers(
      a, product(points.filter(b => b !== a).map(b => a - b))));
    return [...rows, powers(0, 1).reverse()];  // the last is at infinity
  };
  const unitRows = k => Array.from({length: k}, (_, row) =>
    Array.from({length: k}, (_, v) => Number(v === row)));

  // Fold the normalizations into the weights, and lay these as the module
  // reads them: (tiles, k, k, in, held) or (in, out), filled up with zeros.
  // Where it has k + 1 rows and columns, it takes G g G^T of k x k taps g
  const foldInto = (arrays, shapes, network, statistics) => {
    for (let i = 1; i < 5; ++i) {
      const W = network[`W${i}`], b = network[`b${i}`], outputs = b.length;
      const {scale, shift} = i < 4
        ? scaleAndShift(norm(network, i, statistics))
        : {scale: b.map(() => 1), shift: b.map(() => 0)};
      const inArray = arrays[2 * i - 1], shape = shapes[2 * i - 1];
      inArray.fill(0);
      arrays[2 * i].fill(0);
      b.forEach((value, o) => {
        arrays[2 * i][o] = value * scale[o] + shift[o];
      });
      if (i > 2) {
        W.forEach((value, at) => {
          const input = Math.floor(at / outputs), o = at % outputs;
          inArray[input * shape[1] + o] = value * scale[o];
        });
        continue;
      }
      const [, points, , inputs, held] = shape;
      const [, own, , k] = digitNetwork[`W${i}`][0], taps = k * k;
      const rows = points === k ? unitRows(k) : winogradRows(k);
      for (let map = 0; map < outputs * own; ++map) {
        const o = Math.floor(map / own), tile = Math.floor(o / held);
        // Rounded to float32 before, as Python does
        const g = Float32Array.from(
          W.subarray(taps * map, taps * (map + 1)), w => w * scale[o]);
        const at = tile * points * points * inputs + map % own;
        rows.forEach((left, a) => rows.forEach((right, e) => {
          let sum = 0;
          for (let v = 0; v < k; ++v)
            for (let u = 0; u < k; ++u)
              sum += left[v] * g[v * k + u] * right[u];
          inArray[(at + (a * points + e) * inputs) * held + o % held] = sum;
        }));
      }
    }
  };

  // ---- The same network, layer by layer, on several images

  const conv = (X, W, b, inputs, side, k) => {
    const images = X.length / inputs / side / side, outputs = b.length;
    const out = side - k + 1, Y = new Float64Array(
      images * outputs * out * out);
    for (let n = 0; n < images; ++n)
      for (let o = 0; o < outputs; ++o) {
        const to = (n * outputs + o) * out * out;
        Y.fill(b[o], to, to + out * out);
        for (let c = 0; c < inputs; ++c)
          for (let v = 0; v < k; ++v)
            for (let u = 0; u < k; ++u) {
              const w = W[((o * inputs + c) * k + v) * k + u];
              for (let y = 0; y < out; ++y) {
                const row = ((n * inputs + c) * side + y + v) * side + u;
                for (let x = 0; x < out; ++x)
                  Y[to + y * out + x] += w * X[row + x];
              }
            }
      }
    return Y;
  };

  const dense = (X, W, b) => {
    const outputs = b.length, inputs = W.length / outputs;
    const Y = new Float64Array(X.length / inputs * outputs);
    for (let n = 0; n < Y.length / outputs; ++n)
      for (let o = 0; o < outputs; ++o) {
        let sum = b[o];
        for (let c = 0; c < inputs; ++c)
          sum += X[n * inputs + c] * W[c * outputs + o];
        Y[n * outputs + o] = sum;
      }
    return Y;
  };

  // Mean and variance of each channel, over all images and pixels: two passes
  const moments = (X, channels, pixels) => {
    const mean = new Float64Array(channels), variance = mean.slice();
    const channel = i => Math.floor(i / pixels) % channels;
    const count = X.length / channels;
    X.forEach((x, i) => { mean[channel(i)] += x / count; });
    X.forEach((x, i) => {
      variance[channel(i)] += (x - mean[channel(i)]) ** 2 / count;
    });
    return {mean, variance};
  };

  const reluAndPool = (X, side) => {
    const half = Math.floor(side / 2), maps = X.length / side / side;
    const Y = new Float64Array(maps * half * half);
    for (let m = 0; m < maps; ++m)
      for (let y = 0; y < half; ++y)
        for (let x = 0; x < half; ++x) {
          const at = (m * side + 2 * y) * side + 2 * x;
          Y[(m * half + y) * half + x] = [0, 1, side, side + 1].reduce(
            (sum, step) => sum + Math.max(0, X[at + step]), 0) / 4;
        }
    return Y;
  };

  // Logits of the first image, and the moments around each normalization
  const separate = (network, images, statistics) => {
    const stages = [];
    const normalize = (X, i, pixels) => {
      const given = norm(network, i, statistics), channels = given.beta.length;
      const receives = moments(X, channels, pixels);
      if (statistics === "batch") Object.assign(given, receives);
      const {scale, shift} = scaleAndShift(given);
      const Y = X.map((x, at) => {
        const c = Math.floor(at / pixels) % channels;
        return x * scale[c] + shift[c];
      });
      stages.push({receives, gives: moments(Y, channels, pixels)});
      return Y;
    };
    const {W1, b1, W2, b2, W3, b3, W4, b4} = network;
    let X = Float64Array.from(images);
    X = reluAndPool(normalize(conv(X, W1, b1, 1, 28, 3), 1, 676), 26);
    X = reluAndPool(normalize(conv(X, W2, b2, 20, 13, 5), 2, 81), 9);
    X = normalize(dense(X, W3, b3), 3, 1).map(x => Math.max(0, x));
    return {logits: dense(X, W4, b4).slice(0, 10), stages};
  };

  // ---- From strokes to an image as in MNIST: a box of 20 x 20 pixels,
  // the centre of mass in the middle of 28 x 28

  const drawLine = (pixels, [ax, ay], [bx, by], pen) => {
    const dx = bx - ax, dy = by - ay, square = dx * dx + dy * dy || 1;
    for (let y = 0; y < 28; ++y)
      for (let x = 0; x < 28; ++x) {
        const t = ((x - ax) * dx + (y - ay) * dy) / square;
        const near = Math.min(1, Math.max(0, t));
        const far = Math.sqrt(
          (x - ax - near * dx) ** 2 + (y - ay - near * dy) ** 2);
        pixels[28 * y + x] = Math.max(
          pixels[28 * y + x], Math.min(1, pen + 0.5 - far));
      }
  };

  const raster = (strokes, side, pen = 1.2) => {
    const points = strokes.flat(), pixels = new Float32Array(784);
    if (!points.length) return pixels;
    const range = axis => points.reduce(([low, high], point) =>
      [Math.min(low, point[axis]), Math.max(high, point[axis])],
      [Infinity, -Infinity]);
    const [left, right] = range(0), [top, bottom] = range(1);
    const scale = (20 - 2 * pen) / Math.max(
      right - left, bottom - top, side / 5);  // a dot stays a dot
    const draw = (dx, dy) => {
      const place = ([x, y]) => [x * scale + dx, y * scale + dy];
      pixels.fill(0);
      for (const stroke of strokes)
        stroke.forEach((point, i) => drawLine(
          pixels, place(stroke[Math.max(i - 1, 0)]), place(point), pen));
    };
    const dx = 13.5 - scale * (left + right) / 2;
    const dy = 13.5 - scale * (top + bottom) / 2;
    draw(dx, dy);
    let mass = 0, massX = 0, massY = 0;
    pixels.forEach((value, i) => {
      mass += value;
      massX += value * (i % 28);
      massY += value * Math.floor(i / 28);
    });
    draw(dx + 14 - massX / mass, dy + 14 - massY / mass);
    return pixels;
  };

  // ---- Times: the quickest of some rounds, each long enough for the clock

  const quickest = (call, least = 20, rounds = 5) => {
    let calls = 1, best = Infinity;
    // A round may look long only because the system was busy: once one is
    // too short, all are done again
    for (let done = 0; done < rounds; ++done) {
      const start = performance.now();
      for (let i = 0; i < calls; ++i) call();
      const time = performance.now() - start;
      if (time < least) {
        calls *= 2;
        best = Infinity;
        done = -1;
      } else
        best = Math.min(best, time / calls);
    }
    return 1000 * best;  // microseconds
  };

  // ---- What is seen

  const softmax = logits => {
    const top = Math.max(...logits), e = logits.map(x => Math.exp(x - top));
    const sum = e.reduce((a, b) => a + b);
    return Array.from(e, x => x / sum);
  };
  const percent = share => `${(100 * share).toFixed(1)} %`;
  const make = (name, options = {}, ...children) => {
    const element = Object.assign(document.createElement(name), options);
    element.append(...children);
    return element;
  };
  const paint = (canvas, pixels) => {
    const context = canvas.getContext("2d");
    const picture = context.createImageData(28, 28);
    pixels.forEach((value, i) => picture.data.set(
      [255 * value, 255 * value, 255 * value, 255], 4 * i));
    context.putImageData(picture, 0, 0);
  };
  const signed = value => value.toFixed(2).replace("-", "\u2212");

  // Mean and deviation of each channel, as lines from low to high
  const picture = (title, {mean, variance}) => {
    const deviation = variance.map(Math.sqrt);
    const low = Math.min(0, ...mean.map((m, c) => m - deviation[c]));
    const high = Math.max(0, ...mean.map((m, c) => m + deviation[c]));
    const height = value => (96 - 92 * (value - low) / (high - low || 1))
      .toFixed(1);
    const step = 300 / mean.length;
    const x = c => ((c + 0.5) * step).toFixed(1);
    let lines = "", dots = "";
    mean.forEach((m, c) => {
      lines += `M${x(c)} ${height(m - deviation[c])}V${
        height(m + deviation[c])}`;
      dots += `M${x(c)} ${height(m)}h.01`;
    });
    const words = `${title}: means from ${signed(Math.min(...mean))} to ${
      signed(Math.max(...mean))}, deviations from ${
      signed(Math.min(...deviation))} to ${signed(Math.max(...deviation))}`;
    const figure = make("div", {className: "stage"});
    figure.innerHTML = `<svg viewBox="0 0 300 100" role="img" aria-label="${
      words}" preserveAspectRatio="none"><path class="zero" d="M0 ${
      height(0)}H300"/><path class="spread" style="--wide: ${
      Math.min(6, 0.6 * step)}" d="${lines}"/><path class="mean" d="${
      dots}"/></svg>`;
    figure.append(make("p", {className: "small"}, `${words}.`));
    return figure;
  };

  const start = async figure => {
    const find = name => figure.querySelector(name);
    const builds = known();
    if (!builds.length) {
      find(".missing").textContent = "Here a digit could be drawn and read, " +
        "but this browser has no WebAssembly, or it is switched off.";
      return;
    }
    const network = readNetwork(), {network: module} = await load(builds[0]);
    const samples = bytes(digitSamples.images), pad = find(".pad");
    const sample = i => Float32Array.from(
      samples.subarray(784 * i, 784 * (i + 1)), value => value / 255);
    const form = find("form"), details = find("details");
    let strokes = [], pixels = null, folded = null, later = 0;
    let pen = [140, 140], down = false, timed = false, note = "";
    const drawing = new Map();  // the stroke of each finger that is down

    const classify = (image, statistics = "population") => {
      if (folded !== statistics)
        foldInto(module.arrays, module.shapes, network, statistics);
      folded = statistics;
      module.arrays[0].set(image);
      module.call();
      return module.arrays.at(-1).slice();
    };
    const settings = () => Object.fromEntries(new FormData(form));

    const showAnswer = logits => {
      const shares = softmax(logits);
      const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]);
      shares.forEach((share, i) => {
        const row = find(".bars").children[i];
        row.classList.toggle("first", i === order[0]);
        row.style.setProperty("--share", share);
        row.lastChild.textContent = percent(share);
      });
      return Number.isNaN(shares[0]) ? "These are not numbers." :
        `${note}It reads ${order[0]}: ${percent(shares[order[0]])}, then ${
          order[1]}.`;
    };

    // Everything that depends on the layers one by one, where it is open
    const showStages = () => {
      const {statistics, images, form: kind} = settings();
      const batch = new Float32Array(784 * images);
      batch.set(pixels);
      for (let i = 1; i < images; ++i) batch.set(sample(i - 1), 784 * i);
      const {logits, stages} = separate(network, batch, statistics);
      find(".stages").replaceChildren(...stages.map((stage, i) => make(
        "section", {}, make("p", {}, `Normalization ${i + 1}, ${
          stage.gives.mean.length} channels`),
        picture("receives", stage.receives), picture("gives", stage.gives))));
      if (statistics === "batch") {
        find(".difference").textContent = "Statistics of the batch cannot " +
          "be folded: they are not known before the batch is there.";
        return logits;
      }
      const module = classify(pixels, statistics);
      const apart = largest(Array.from(logits, (x, i) =>
        Math.abs(x - module[i])));
      find(".difference").textContent = "The logits, folded and separate, " +
        `differ by ${apart.toExponential(1).replace("-", "\u2212")} at most.`;
      return kind === "separate" ? logits : module;
    };

    const show = done => {
      clearTimeout(later);
      paint(find(".picture"), pixels);
      const {statistics} = settings(), open = details.open;
      let words = "";
      if (!open || statistics !== "batch") words = showAnswer(
        classify(pixels, open ? statistics : "population"));
      const rest = () => {
        if (open) words = showAnswer(showStages());
        find(".reads").textContent = words;
        if (timed) return;
        timed = true;
        find(".time").textContent = `${quickest(module.call, 5, 3)
          .toFixed(0)} \u00b5s an image, in the ${builds[0]} build`;
      };
      if (done) rest();
      else later = setTimeout(rest, 300);
    };

    const ink = () => {
      const context = pad.getContext("2d");
      const color = getComputedStyle(pad).color;
      context.clearRect(0, 0, 280, 280);
      Object.assign(context, {lineWidth: 18, lineCap: "round",
        lineJoin: "round", strokeStyle: color});
      for (const stroke of strokes) {
        context.beginPath();
        context.moveTo(...stroke[0]);
        for (const point of stroke) context.lineTo(...point);
        context.stroke();
      }
      if (!pad.matches(":focus-visible")) return;
      context.beginPath();
      context.lineWidth = 2;
      context.arc(...pen, down ? 5 : 9, 0, 7);
      context.stroke();
    };
    const redraw = done => {
      ink();
      if (!strokes.length) return;
      note = "";
      pixels = raster(strokes, 280);
      show(done);
    };
    const clear = () => {
      strokes = [];
      drawing.clear();
      down = false;
      note = "";
      ink();
    };
    const forget = () => {
      clear();
      clearTimeout(later);
      pixels = null;
      paint(find(".picture"), new Float32Array(784));
      for (const row of find(".bars").children) {
        row.classList.remove("first");
        row.style.removeProperty("--share");
        row.lastChild.textContent = "";
      }
      find(".reads").textContent = "Draw a digit.";
      find(".stages").replaceChildren();
      find(".difference").textContent = "";
    };
    const say = () => {
      find(".pen").textContent = down ? "The pen is down." : "The pen is up.";
    };

    const place = event => {
      const box = pad.getBoundingClientRect();
      return [(event.clientX - box.left) * 280 / box.width,
              (event.clientY - box.top) * 280 / box.height];
    };
    // Outside the pad there is no ink; a stroke that comes back is a new one
    const draw = (finger, point) => {
      if (point.some(value => value < 0 || value > 280)) {
        drawing.delete(finger);
        return;
      }
      pen = point;
      if (drawing.has(finger)) drawing.get(finger).push(point);
      else {
        drawing.set(finger, [point]);
        strokes.push(drawing.get(finger));
      }
    };
    pad.addEventListener("pointerdown", event => {
      if (event.button) return;
      pad.setPointerCapture(event.pointerId);
      down = false;
      draw(event.pointerId, place(event));
      redraw(false);
    });
    pad.addEventListener("pointermove", event => {
      if (!pad.hasPointerCapture(event.pointerId)) return;
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length ? events : [event])
        draw(event.pointerId, place(each));
      redraw(false);
    });
    for (const end of ["pointerup", "pointercancel"])
      pad.addEventListener(end, event => {
        drawing.delete(event.pointerId);
        redraw(true);
      });
    pad.addEventListener("keydown", event => {
      const step = {ArrowLeft: [-10, 0], ArrowRight: [10, 0],
                    ArrowUp: [0, -10], ArrowDown: [0, 10]}[event.key];
      if (step) {
        pen = pen.map((value, i) =>
          Math.min(270, Math.max(10, value + step[i])));
        if (down) strokes.at(-1).push(pen);
        redraw(false);
      } else if (event.key === " ") {
        down = !down;
        if (down) strokes.push([pen]);
        say();
        redraw(true);
      } else if (event.key === "Delete" || event.key === "Backspace") {
        forget();
        say();
      } else return;
      event.preventDefault();
    });
    pad.addEventListener("focus", ink);
    pad.addEventListener("blur", ink);
    find(".clear").addEventListener("click", forget);

    for (let i = 0; i < 10; ++i)
      find(".bars").append(make("div", {}, make("span", {}, `${i}`),
        make("i"), make("span", {className: "share"})));
    for (let i = 0; i < 10; ++i) {
      const at = digitSamples.labels.lastIndexOf(i);
      const canvas = make("canvas", {width: 28, height: 28});
      const button = make("button", {type: "button"}, canvas);
      button.setAttribute("aria-label", `Test digit ${i}`);
      paint(canvas, sample(at));
      button.addEventListener("click", () => {
        clear();
        pixels = sample(at);
        show(true);
      });
      find(".samples").append(button);
    }
    form.addEventListener("input", () => {
      const batch = settings().statistics === "batch";
      for (const input of form.elements.form) input.disabled = batch;
      if (pixels) show(true);
    });
    form.addEventListener("submit", event => event.preventDefault());
    details.addEventListener("toggle", () => {
      if (!pixels) {
        if (!details.open) return;
        pixels = sample(digitSamples.labels.lastIndexOf(7));
        note = "Nothing is drawn, so here is a test digit. ";
      }
      show(true);
    });
    new MutationObserver(ink).observe(
      document.documentElement, {attributeFilter: ["data-theme"]});

    for (const part of figure.querySelectorAll("[hidden]"))
      part.hidden = false;
    Object.assign(figure, {classify, raster, build: builds[0],
      arrays: module.arrays,
      separate: (...given) => separate(network, ...given)});
    figure.dataset.live = "";
  };

  // ---- The table of times

  const noise = (length, seed) => Float32Array.from({length}, () => {
    seed = (seed * 16807) % 2147483647;
    return 2 * seed / 2147483647 - 1;
  });
  const inJavaScript = ([x, mean, variance, gamma, beta], y) => {
    for (let c = 0; c < 32; ++c) {
      const scale = gamma[c] / Math.sqrt(variance[c] + 1e-5);
      const shift = beta[c] - mean[c] * scale;
      for (let i = 784 * c; i < 784 * (c + 1); ++i)
        y[i] = x[i] * scale + shift;
    }
  };

  const startTiming = figure => {
    const [missing, line, table] = figure.children;
    const [button, progress] = line.children, builds = known();
    if (!builds.length) {
      missing.textContent = "Here the programs could be timed, but this " +
        "browser has no WebAssembly, or it is switched off.";
      return;
    }
    line.hidden = false;
    const pause = () => new Promise(done => setTimeout(done));
    const inputs = [25088, 32, 32, 32, 32].map((length, i) =>
      noise(length, i + 1).map(x => i === 2 ? Math.abs(x) : x));
    const exact = new Float64Array(25088), rounded = new Float32Array(25088);
    inJavaScript(inputs, exact);
    button.addEventListener("click", async () => {
      button.disabled = true;
      progress.textContent = "Timing, some seconds \u2026";
      table.tBodies[0].replaceChildren();
      const add = async (name, build, call, error) => {
        await pause();
        const row = table.tBodies[0].insertRow();
        row.append(make("th", {scope: "row"}, name));
        for (const text of [build, quickest(call).toFixed(1), error])
          row.insertCell().textContent = text;
      };
      const apart = result => largest(Array.from(result, (y, i) =>
        Math.abs(y - exact[i]))).toExponential(1).replace("-", "\u2212");
      table.hidden = false;
      inJavaScript(inputs, rounded);
      await add("operator, a plain loop", "JavaScript",
                () => inJavaScript(inputs, rounded), apart(rounded));
      for (const build of [...builds].reverse()) {
        const functions = await load(build);
        for (const [name, words] of [["written", "operator, as written"],
                                     ["scheduled", "operator, scheduled"]]) {
          const {arrays, call} = functions[name];
          inputs.forEach((input, i) => arrays[i].set(input));
          call();
          await add(words, build, call, apart(arrays.at(-1)));
        }
      }
      for (const build of [...builds].reverse()) {
        const {arrays, shapes, call} = (await load(build)).network;
        const network = readNetwork(), image = noise(784, 9).map(Math.abs);
        foldInto(arrays, shapes, network, "population");
        arrays[0].set(image);
        call();
        const {logits} = separate(network, image, "population");
        const error = largest(Array.from(arrays.at(-1), (y, i) =>
          Math.abs(y - logits[i])));
        await add("network, one image", build, call,
                  error.toExponential(1).replace("-", "\u2212"));
      }
      progress.textContent = "Done.";
      button.disabled = false;
    });
    figure.dataset.live = "";
  };

  const all = () => {
    document.querySelectorAll("figure.digit-pad").forEach(start);
    document.querySelectorAll("figure.digit-timing").forEach(startTiming);
  };
  if (document.readyState === "loading")
    addEventListener("DOMContentLoaded", all);
  else all();
})();
