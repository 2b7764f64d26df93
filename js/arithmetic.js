// What one number of one token is made of: products and sums of what the engine has told, beside what it has found.
const largest = (values) => values.reduce((most, v, k) => (Math.abs(v) > Math.abs(values[most]) ? k : most), 0);
const times = (a, b) => Array.from(a, (v, k) => v * b[k]);
const total = (values) => values.reduce((sum, v) => sum + v, 0);

const spread = (values) => { // mean and standard deviation
  const mean = total(values) / values.length;
  return [mean, Math.sqrt(total(Array.from(values, (v) => (v - mean) ** 2)) / values.length)];
};

export function say(v, digits = Math.abs(v) < 0.1 ? 3 : Math.abs(v) < 10 ? 2 : 1) { // small ones by their first digits
  if (!v) return '0';
  const text = Math.abs(v) < 10 ** (1 - digits) ? v.toPrecision(digits - 1) : v.toFixed(digits);
  return text.replace('-', '−');
}
export function short(v) { // for a cell
  return Math.abs(v) < 5e-4 ? '0' : (Math.abs(v) < 0.1 ? v.toFixed(3).replace('-', '−') : say(v)).replace(/\b0\./, '.');
}

const signed = (v) => (v < 0 ? `(${say(v)})` : say(v));

function lines(n) { // so that n numbers are a picture
  let w = n > 64 ? 32 : 16;
  while (n % w) w -= 1;
  return [n / w, w];
}

function product(key, left, right, { shape = lines(left.length), plus = 0, root = 1, names, ...more }) { // a step
  const terms = times(left, right), order = [...terms.keys()].filter((k) => terms[k]);
  order.sort((a, b) => Math.abs(terms[b]) - Math.abs(terms[a]));
  const some = order.slice(0, 3).map((k) => `${signed(left[k])} · ${signed(right[k])}`).join(' + ') || '0';
  const rest = order.length > 3 ? ` + … (${order.length - 3})` : '';
  const formula = (root > 1 ? `(${some}${rest}) ÷ √${root}` : some + rest) + (plus ? ` + ${signed(plus)}` : '');
  const [a, b] = names ?? ['number', 'weight'], grids = [[a, left], [b, right], ['products', terms]];
  return { key, shape, grids, formula, result: total(terms) / Math.sqrt(root) + plus, ...more };
}

export class Numbers { // what the engine tells of a block, for token i of (h, w)
  constructor({ seen, weights }, i, view) {
    Object.assign(this, { seen, weights, i, view, c: view.number, grid: seen.x[0].slice(1, 3) });
  }

  get few() { return this.grid[0] * this.grid[1] <= 64; } // tokens, so that each number can be written

  token(name, i = this.i) {
    const [shape, values] = this.seen[name], C = shape.at(-1);
    return values.subarray(i * C, (i + 1) * C);
  }

  channel(name, c = this.c) { // number c of all tokens
    const [shape, values] = this.seen[name], C = shape.at(-1);
    return Float32Array.from({ length: values.length / C }, (_, j) => values[j * C + c]);
  }

  head(name, h, i) { // row i of a head's matrix: queries, keys, scores, weights
    const [[, , n], values] = this.seen[name], d = this.seen[name][0][3];
    return values.subarray((h * n + i) * d, (h * n + i + 1) * d);
  }

  row(name, m) { // of a matrix of weights
    const [[n], values] = this.weights[name], d = values.length / n;
    return values.subarray(m * d, (m + 1) * d);
  }

  most() { return largest(this.token('mixer')); } // the number of which the mixer makes most

  one(name, c, without = 1) { return this.weights[name]?.[1][c] ?? without; }

  chosen(name, by) { // a hidden number: the reader's, or the one that most of number c is made of
    return this.view.hidden ?? largest(times(this.token(name), this.row(by, this.c)));
  }

  window(name, c, r) { // number c of the tokens around this one, and where there are some
    const [h, w] = this.grid, [row, column] = [Math.floor(this.i / w), this.i % w], k = 2 * r + 1;
    const places = Array.from({ length: k * k }, (_, o) => [row + Math.floor(o / k) - r, column + o % k - r]);
    const there = places.map(([y, x]) => Number(y >= 0 && y < h && x >= 0 && x < w)), all = this.channel(name, c);
    return [places.map(([y, x], o) => (there[o] ? all[y * w + x] : 0)), there];
  }

  linear(name, from, to, m) {
    return product('linear', this.token(from), this.row(`${name}.weight`, m), {
      plus: this.one(`${name}.bias`, m, 0), known: this.token(to)[m], values: { n: m + 1 } });
  }

  back(name, from, to, m) { // from the hidden numbers, of which m is looked at
    const step = this.linear(name, from, to, this.c);
    return { ...step, key: 'back', values: { n: this.c + 1, m: m + 1 }, pick: 'hidden', picked: m };
  }

  star(name, from, to, m) {
    const x = this.token(from), s = this.one(`${name}.scale`, 0), b = this.one(`${name}.bias`, 0, 0);
    const r = Math.max(x[m], 0), formula = `${signed(s)} · ${say(r)}² + ${signed(b)}`;
    const known = this.token(to)[m], values = { n: m + 1 };
    return { key: 'star', curve: { x, s, b, m }, formula, result: s * r * r + b, known, values };
  }

  norm(name, from) {
    const { c } = this, each = this.view.card.model.config.norm === 'LayerNormWithoutBias'; // else all tokens together
    const of = (part) => spread(each ? this.token(part) : this.seen[part][1]);
    const [mean, deviation] = of(from), after = of(name);
    const x = this.token(from), y = this.token(name), w = this.one(`${name}.weight`, c);
    return [{ key: each ? 'norm token' : 'norm all', shape: lines(x.length), grids: [['before', x], ['after', y]],
      values: { n: c + 1, mean: say(mean), spread: say(deviation), mean2: say(after[0]), spread2: say(after[1]) },
      formula: `(${say(x[c])} − ${signed(mean)}) ÷ ${say(deviation)} · ${signed(w)}`,
      result: (x[c] - mean) / Math.sqrt(deviation ** 2 + 1e-6) * w, known: y[c] }];
  }

  sum(name, [before, branch], which) {
    const { c } = this, scales = ['res', 'layer'].map((of) => this.one(`${of}_scale${which}.scale`, c));
    return [product(scales[0] === 1 ? 'sum' : 'sum scaled', [this.token(before)[c], this.token(branch)[c]], scales, {
      names: ['token and branch', 'scale'], exact: true, known: this.token(name)[c], values: { n: c + 1 } })];
  }

  mlp() {
    const m = this.chosen('act', 'mlp.fc2.weight');
    return [this.linear('mlp.fc1', 'norm2', 'fc1', m), this.star('mlp.act', 'fc1', 'act', m),
      this.back('mlp.fc2', 'act', 'mlp', m)];
  }

  get mixed() { return { known: this.token('mixer')[this.c], values: { n: this.c + 1 } }; }

  Identity() {
    const x = this.token('norm1')[this.c];
    return [{ key: 'identity', formula: say(x), result: x, ...this.mixed }];
  }

  RandomMixing() {
    return [product('random', this.channel('norm1'), this.row('token_mixer.random_matrix', this.i), {
      shape: this.grid, exact: this.few, ...this.mixed })];
  }

  Pooling() {
    const [near, there] = this.window('norm1', this.c, 1), n = total(there), plus = -this.token('norm1')[this.c];
    return [product('pool', near, there.map((yes) => yes / n), {
      shape: [3, 3], exact: true, plus, ...this.mixed, values: { n: this.c + 1, count: n } })];
  }

  SepConv() {
    const m = this.chosen('dwconv', 'token_mixer.pwconv2.weight'), kernel = this.row('token_mixer.dwconv.weight', m);
    const k = Math.sqrt(kernel.length), near = this.window('act1', m, (k - 1) / 2)[0], known = this.token('dwconv')[m];
    return [
      this.linear('token_mixer.pwconv1', 'norm1', 'pwconv1', m),
      this.star('token_mixer.act1', 'pwconv1', 'act1', m),
      product('window', near, kernel, { shape: [k, k], exact: true, known, values: { n: m + 1, k } }),
      this.back('token_mixer.pwconv2', 'dwconv', 'mixer', m)];
  }

  Attention() {
    const { i, grid } = this, m = this.chosen('heads', 'token_mixer.proj.weight');
    const d = this.seen.q[0][3], h = Math.floor(m / d); // numbers of a head, and which one it is
    const scores = this.head('scores', h, i), weights = this.head('weights', h, i);
    const j = this.view.other ?? largest(weights), place = { row: Math.floor(j / grid[1]) + 1, column: j % grid[1] + 1 };
    const powers = Array.from(scores, Math.exp), sum = total(powers), known = this.token('heads')[m];
    const heard = Float32Array.from(weights, (_, k) => this.head('v', h, k)[m % d]);
    const pick = { shape: grid, exact: this.few, pick: 'other', picked: j };
    return [
      product('score', this.head('q', h, i), this.head('k', h, j), {
        root: d, names: ['query', 'key'], known: scores[j], values: { head: h + 1, ...place } }),
      { key: 'softmax', grids: [['scores', scores], ['row', weights]], formula: `e^${signed(scores[j])} ÷ ${say(sum)}`,
        result: powers[j] / sum, known: weights[j], values: { ...place, count: weights.length }, ...pick },
      product('values', weights, heard, { names: ['row', 'value'], known, values: { n: m % d + 1, m: m + 1 }, ...pick }),
      this.back('token_mixer.proj', 'heads', 'mixer', m)];
  }

  steps(part) {
    if (part === 'mixer') return this[this.view.card.mixers[this.view.stage]]();
    if (part === 'mlp') return this.mlp();
    if (part === 'sum1') return this.sum(part, ['x', 'mixer'], 1);
    if (part === 'out') return this.sum(part, ['sum1', 'mlp'], 2);
    return this.norm(part, part === 'norm1' ? 'x' : 'sum1');
  }
}
