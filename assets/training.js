// A small dense network and its training, with and without batch
// normalization. The page "Training in the page" has the same in NumPy, and a
// test compares the two at each step. A matrix is a Float64Array, by rows.
const training = (() => {
const KINDS = ["without", "with", "noisy"];
const PIXELS = 64, WIDTH = 32, CLASSES = 10, TRAINED = 1000, EPS = 1e-5;

// Number `index` of sequence `stream`: at least 0, less than 1
const uniform = (stream, index) => {
  let k = index + Math.imul(stream, 0x9e3779b9) | 0;
  for (const [shift, factor] of [
      [16, 0x85ebca6b], [13, 0xc2b2ae35], [16, 1]])
    k = Math.imul(k ^ k >>> shift, factor);
  return (k >>> 0) / 2 ** 32;
};

// From text: a digit is a line, the label and then the pixels, 0 to g = 16
const readDigits = text => {
  const lines = text.trim().split("\n"), labels = new Uint8Array(lines.length);
  const images = new Float64Array(lines.length * PIXELS);
  lines.forEach((line, n) => {
    labels[n] = parseInt(line[0], 36);
    for (let j = 0; j < PIXELS; j++)
      images[n * PIXELS + j] = parseInt(line[j + 1], 36);
  });
  for (let j = 0; j < PIXELS; j++) {
    let sum = 0;
    for (let n = 0; n < TRAINED; n++) sum += images[n * PIXELS + j];
    for (let n = 0; n < lines.length; n++)
      images[n * PIXELS + j] = (images[n * PIXELS + j] - sum / TRAINED) / 8;
  }
  const cut = TRAINED * PIXELS;
  return {images: images.slice(0, cut), labels: labels.slice(0, TRAINED),
    testImages: images.slice(cut), testLabels: labels.slice(TRAINED)};
};

// A (m x k) times B (k x n); At: A is stored as k x m, Bt: B as n x k
const product = (A, B, m, k, n, {At = false, Bt = false} = {}) => {
  const C = new Float64Array(m * n), [ai, ap] = At ? [1, m] : [k, 1];
  const [bp, bj] = Bt ? [1, k] : [n, 1];
  for (let i = 0; i < m; i++)
    for (let p = 0; p < k; p++) {
      const a = A[i * ai + p * ap];
      for (let j = 0; j < n; j++) C[i * n + j] += a * B[p * bp + j * bj];
    }
  return C;
};

const columnSums = (A, n) => {
  const sums = new Float64Array(n);
  for (let i = 0; i < A.length; i++) sums[i % n] += A[i];
  return sums;
};

const addRow = (A, row) => A.map((a, i) => a + row[i % row.length]);

// Mean and biased variance of each column, in two passes
const moments = (A, n) => {
  const m = A.length / n, mean = columnSums(A, n).map(sum => sum / m);
  return [mean, columnSums(A.map((a, i) => (a - mean[i % n]) ** 2), n)
    .map(sum => sum / m)];
};

const normalize = (A, [mean, variance]) => {
  const n = mean.length, inverse = variance.map(v => 1 / Math.sqrt(v + EPS));
  return [A.map((a, i) => (a - mean[i % n]) * inverse[i % n]), inverse];
};

const activations = {
  relu: z => z > 0 || z !== z ? z : 0,  // NaN stays NaN
  tanh: Math.tanh,
  sigmoid: z => 1 / (1 + Math.exp(-z)),
};

// The derivatives, where the value is h
const slopes = {
  relu: h => h > 0 ? 1 : 0,
  tanh: h => 1 - h * h,
  sigmoid: h => h * (1 - h),
};

const sizes = depth => [PIXELS, ...Array(depth).fill(WIDTH), CLASSES];

const firstWeights = (depth, scale, draw) => {
  const s = sizes(depth), W = [];
  for (let i = 0; i <= depth; i++) {
    const bound = (i < depth ? scale : 1) * Math.sqrt(6 / s[i]);
    W.push(Float64Array.from({length: s[i] * s[i + 1]}, (_, j) =>
      bound * (2 * uniform(100 * draw + 10 + i, j) - 1)));
  }
  return {W, gamma: W.slice(1).map(() => new Float64Array(WIDTH).fill(1)),
    beta: s.slice(1).map(n => new Float64Array(n))};
};

// Logits of m images, and what the way back needs of each layer
const forward = (net, X, m, kind, activation, noise) => {
  const depth = net.gamma.length, s = sizes(depth), tape = [];
  let H = X;
  for (let i = 0; i < depth; i++) {
    const gamma = net.gamma[i], layer = {H};
    let Z = product(H, net.W[i], m, s[i], WIDTH);
    if (kind !== "without") {
      [layer.Xhat, layer.inverse] = normalize(Z, moments(Z, WIDTH));
      Z = layer.Xhat.map((x, j) => gamma[j % WIDTH] * x);
    }
    Z = addRow(Z, net.beta[i]);
    if (noise)
      Z = Z.map((z, j) => noise[i].factor[j % WIDTH] * z
        + noise[i].shift[j % WIDTH]);
    tape.push({...layer, Z});
    H = Z.map(activations[activation]);
  }
  tape.push({H});
  const logits = product(H, net.W[depth], m, WIDTH, CLASSES);
  return [addRow(logits, net.beta[depth]), tape];
};

// The way back through one batch normalization
const backwardNorm = (dY, {Xhat, inverse}, gamma) => {
  const m = dY.length / WIDTH, dbeta = columnSums(dY, WIDTH);
  const dgamma = columnSums(dY.map((d, j) => d * Xhat[j]), WIDTH);
  const dX = dY.map((d, j) => {
    const c = j % WIDTH;
    return gamma[c] * inverse[c]
      * (d - dbeta[c] / m - Xhat[j] * (dgamma[c] / m));
  });
  return [dX, dgamma, dbeta];
};

// Mean cross entropy of m images, and its gradients in the form of `net`
const backward = (net, logits, tape, labels, activation, noise) => {
  const m = labels.length, depth = net.gamma.length, s = sizes(depth);
  let loss = 0, dZ = new Float64Array(logits.length);
  for (let i = 0; i < m; i++) {
    const row = logits.subarray(i * CLASSES, (i + 1) * CLASSES);
    const top = row.map(z => z - Math.max(...row)), powers = top.map(Math.exp);
    const total = powers.reduce((a, b) => a + b);
    loss += Math.log(total) - top[labels[i]];
    for (let j = 0; j < CLASSES; j++)
      dZ[i * CLASSES + j] = (powers[j] / total - (j === labels[i])) / m;
  }
  const found = {W: [], gamma: [], beta: []};
  for (let i = depth; i >= 0; i--) {
    const {H, Xhat} = tape[i], n = s[i + 1];
    let dgamma = new Float64Array(WIDTH), dbeta = columnSums(dZ, n);
    if (Xhat) [dZ, dgamma, dbeta] = backwardNorm(dZ, tape[i], net.gamma[i]);
    found.W[i] = product(H, dZ, s[i], m, n, {At: true});
    found.beta[i] = dbeta;
    if (i < depth) found.gamma[i] = dgamma;
    if (i > 0)
      dZ = product(dZ, net.W[i], m, n, WIDTH, {Bt: true}).map((d, j) =>
        d * slopes[activation](H[j])
        * (noise ? noise[i - 1].factor[j % WIDTH] : 1));
  }
  return [loss / m, found];
};

// One of the three networks, in training
class Trainer {
  constructor(digits, kind, settings) {
    Object.assign(this, {digits, kind, settings, step: 0, losses: []});
    this.net = firstWeights(settings.depth, settings.scale, settings.draw);
    this.look();
  }

  // Forward and backward with the next batch
  look() {
    const {batch, activation, draw} = this.settings, {digits} = this;
    const X = new Float64Array(batch * PIXELS), labels = new Uint8Array(batch);
    for (let i = 0; i < batch; i++) {
      const n = Math.floor(TRAINED
        * uniform(100 * draw + 1, this.step * batch + i));
      X.set(digits.images.subarray(n * PIXELS, (n + 1) * PIXELS), i * PIXELS);
      labels[i] = digits.labels[n];
    }
    const noise = this.kind === "noisy" &&
      this.net.gamma.map((_, layer) => this.noise(layer));
    const [logits, tape] = forward(this.net, X, batch, this.kind, activation,
                                   noise);
    const [loss, gradients] = backward(this.net, logits, tape, labels,
                                       activation, noise);
    Object.assign(this, {tape, gradients});
    this.losses.push(loss);
  }

  // Factors and shifts for the channels of a layer at this step
  noise(layer) {
    const {noise, draw} = this.settings;
    const u = Float64Array.from({length: 2 * WIDTH}, (_, j) => uniform(
      100 * draw + 2, 2 * WIDTH * (64 * this.step + layer) + j));
    return {factor: u.subarray(0, WIDTH).map(v => 1 + noise / 2 * v),
      shift: u.subarray(WIDTH).map(v => noise * (2 * v - 1))};
  }

  get finite() {
    return Number.isFinite(this.losses.at(-1));
  }

  // One step of gradient descent; none after an overflow
  advance() {
    if (!this.finite) return;
    for (const [name, gradients] of Object.entries(this.gradients))
      this.net[name] = this.net[name].map((p, i) =>
        p.map((v, j) => v - this.settings.rate * gradients[i][j]));
    this.step++;
    this.look();
  }

  // Share of the test digits named rightly, without noise; the layer takes
  // mean and variance of all training images
  accuracy() {
    const {net, kind, digits, settings: {depth, activation}} = this;
    const s = sizes(depth), tested = digits.testLabels.length;
    let H = digits.images, T = digits.testImages;
    for (let i = 0; i < depth; i++) {
      const A = product(H, net.W[i], TRAINED, s[i], WIDTH);
      const layer = moments(A, WIDTH), after = Z => {
        if (kind !== "without")
          Z = normalize(Z, layer)[0].map((x, j) => net.gamma[i][j % WIDTH] * x);
        return addRow(Z, net.beta[i]).map(activations[activation]);
      };
      T = after(product(T, net.W[i], tested, s[i], WIDTH));
      H = after(A);
    }
    const logits = addRow(product(T, net.W[depth], tested, WIDTH, CLASSES),
                          net.beta[depth]);
    let right = 0;
    for (let n = 0; n < tested; n++) {
      const row = [...logits.subarray(n * CLASSES, (n + 1) * CLASSES)];
      const best = row.findIndex(Number.isNaN);
      right += (best < 0 ? row.indexOf(Math.max(...row)) : best)
        === digits.testLabels[n];
    }
    return right / tested;
  }
}

return {KINDS, Trainer, readDigits, uniform};
})();
