// The figure of the page "Training in the page": it reads the controls, trains
// the three networks of training.js and draws them. What the reader sets stands
// in the address, after #, so that it can be shared.
(() => {
const STEPS = 300, EVERY = 20;

const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const logarithm = v => Math.log10(Math.max(v, 1e-99));

// Points of a line; NaN ends it
const line = points => points.map(p => Number.isNaN(p[1]) ? null : p);

// What the activation functions receive: boxes, the first layer on top
const histograms = ({tape}) => {
  const boxes = [], depth = tape.length - 1;
  tape.slice(0, -1).forEach(({Z}, i) => {
    const counts = Array(24).fill(0), low = 1 - (i + 1) / depth;
    for (const z of Z)
      if (Number.isFinite(z))
        counts[Math.floor(4 * Math.min(Math.max(z, -3), 2.9)) + 12]++;
    counts.forEach((count, j) => {
      if (count) boxes.push([j / 4 - 3, low, (j + 1) / 4 - 3,
        low + 0.85 * count / Math.max(...counts) / depth]);
    });
  });
  return boxes;
};

// What is shown of three networks: numbers, texts, lists of points
training.state = (trainers, shares, step, note = "") => {
  const state = {step, note};
  trainers.forEach((trainer, n) => {
    const {losses, finite, gradients} = trainer, share = shares[n];
    state[`loss${n}`] = finite ? mean(losses.slice(-20)) : "overflow";
    state[`share${n}`] = finite ? share.at(-1)[1] : "–";
    state[`losses${n}`] = line(losses.map((_, k) => [k, logarithm(
      mean(losses.slice(Math.max(0, k - 4), k + 1)))]).filter(
      ([k]) => k % 5 === 0));
    state[`shares${n}`] = share;
    state[`inputs${n}`] = histograms(trainer);
    state[`sizes${n}`] = line(gradients.W.map((g, i) => [i + 1, logarithm(
      Math.sqrt(g.reduce((sum, v) => sum + v * v, 0)))]));
  });
  return state;
};

const figure = document.querySelector('figure[data-explorer="Training"]');
if (!figure) return;
// Numbers and lines as in the other figures of the book
const {rounded, outline} = globalThis.bookDrawing;
const form = figure.querySelector("form");
const status = figure.querySelector("[role=status]");
const all = selector => figure.querySelectorAll(selector);
const runs = figure.querySelector('[data-do="run"]');
const fields = [...form.elements].filter(field => field.name);
const words = field => JSON.parse(field.dataset.words ?? "[]");
const valueOf = field => field.type === "radio" ? field.value
  : words(field)[field.value - field.min] ?? field.value;

// Name -> text of all settings, as they stand
const texts = () => Object.fromEntries(fields.filter(
  field => field.type !== "radio" || field.checked).map(
  field => [field.name, valueOf(field)]));
const first = texts();

const settings = () => Object.fromEntries(Object.entries(texts()).map(
  ([name, text]) => [name, name === "activation" ? text : +text]));

// Move a control to where it says `text`; false if there is no such place
const put = (name, text) => fields.some(field => {
  if (field.name !== name) return false;
  if (field.type === "radio") {
    if (field.value === text) field.checked = true;
    return field.value === text;
  }
  const place = words(field).length ? words(field).indexOf(text)
    : /^\d+$/.test(text) ? +text - field.min : -1;
  if (place < 0 || place > field.max - field.min) return false;
  field.value = place + +field.min;
  return true;
});

let digits, trainers = null, shares, step = 0, target = STEPS, note = "";
let running = false;

const restart = () => {
  digits ??= training.readDigits(smallDigits);
  trainers = training.KINDS.map(
    kind => new training.Trainer(digits, kind, settings()));
  shares = trainers.map(trainer => [[0, trainer.accuracy()]]);
};

const advance = () => {
  step++;
  trainers.forEach((trainer, n) => {
    trainer.advance();
    if (step % EVERY === 0) shares[n].push([step, trainer.accuracy()]);
  });
};

const label = () => {
  for (const field of fields.filter(field => field.type === "range")) {
    field.setAttribute("aria-valuetext", valueOf(field));
    form.querySelector(`[data-of="${field.name}"]`).textContent =
      valueOf(field);
  }
  runs.textContent = running ? "Pause" : "Run";
  // A screen reader hears where a training ends, not each step of it
  status.setAttribute("aria-live", running ? "off" : "polite");
};

const draw = () => {
  const state = training.state(trainers, shares, step, note);
  label();
  for (const place of all("[data-number]"))
    place.textContent = rounded(state[place.dataset.number],
                                place.dataset.digits);
  for (const path of all("[data-path]"))
    path.setAttribute("d", outline(path.dataset.kind,
      state[path.dataset.path], JSON.parse(path.parentNode.dataset.panel)));
};

// A few steps for each picture, so that one can watch
const frame = () => {
  const until = performance.now() + 12;
  if (!trainers) restart();
  for (let n = 0; n < 3 && step < target && performance.now() < until; n++)
    advance();
  running = step < target;
  if (running) requestAnimationFrame(frame);
  draw();
};

// Train to step `to`, from where it stands or from the start
const train = (to, anew = !trainers || step >= STEPS) => {
  if (anew) [trainers, step] = [null, 0];
  target = to;
  if (!running) requestAnimationFrame(frame);
  running = true;
  label();
};

// Settings other than the first, and the step, go into the address
const remember = () => {
  const told = Object.entries(texts()).filter(
    ([name, text]) => text !== first[name]);
  history.replaceState(null, "", "#" + new URLSearchParams(
    [...told, ["steps", target]]));
};

// Settings of an address; false if it is another one, say of a section
const apply = address => {
  const told = [...new URLSearchParams(address.replace(/^#/, ""))];
  if (!told.some(([name]) => name === "steps" || Object.hasOwn(first, name)))
    return false;
  for (const [name, text] of Object.entries(first)) put(name, text);
  let to = STEPS;
  const wrong = told.filter(([name, text]) => {
    if (name !== "steps") return !put(name, text);
    if (!/^\d+$/.test(text) || +text > STEPS) return true;
    to = +text;
    return false;
  });
  note = wrong.length ? " The address asks for what the figure has not, which "
    + `is left out: ${wrong.map(pair => pair.join("=")).join(", ")}.` : "";
  train(to, true);
  return true;
};

const actions = {
  run: () => running ? train(step, false) : train(STEPS),
  step: () => {
    if (!trainers || step >= STEPS) [trainers, step] = [null, 0];
    train(step + 1, false);
  },
  reset: () => train(0, true),
};
form.addEventListener("click", event => {
  const action = actions[event.target.dataset.do];
  if (!action) return;
  action();
  remember();
});
form.addEventListener("input", () => {
  note = "";
  train(target, true);
  remember();
});
form.addEventListener("reset", () => setTimeout(() => {
  note = "";
  train(STEPS, true);
  remember();
}));
form.addEventListener("submit", event => event.preventDefault());

// Elsewhere on the page a button sets what its sentence speaks of
for (const place of document.querySelectorAll("[data-try]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Show it in the figure";
  button.addEventListener("click", () => {
    apply(place.dataset.try);
    remember();
    figure.scrollIntoView();
    runs.focus({preventScroll: true});
  });
  place.append(button);
}

// An address that its reader empties asks for the first settings
addEventListener("hashchange", () => apply(
  location.hash || `steps=${STEPS}`));
figure.dataset.live = "";
apply(location.hash);
})();
