// Learn: two mixers train side by side on drawn pictures, each in a worker of its own, one step of both at a time.
import { add, assistant, choice, className, draw, ground, t, translate } from './common.js';
import { MIXERS } from './engine.js';
import { TASKS } from './pictures.js';
import { drawMap, drawMatrix, drawPicture, scaleMap } from './views.js';

const SIDES = ['left', 'right'], SHOWN = 8; // pictures to choose from
const EVERY = 10; // steps between two looks at held-out pictures, map and matrix
const USUAL = { task: 'same', size: 32, rate: 0.003, seed: 1, steps: 0,
  left: 'Identity.Identity', right: 'Attention.Attention' };
const RATES = [0.0003, 0.001, 0.003, 0.01, 0.03];
const TRIES = { // what to try: settings
  far: { task: 'same', size: 32, left: 'Identity.Identity', right: 'Attention.Attention' },
  form: { task: 'shape', size: 16, left: 'Pooling.Pooling', right: 'SepConv.SepConv' },
  mixed: { task: 'same', size: 32, left: 'SepConv.SepConv', right: 'SepConv.Attention' },
};

function among(value, known, usual) { // what a link may ask for
  return known.find((v) => String(v) === String(value)) ?? usual;
}

function mixersOf(text, usual) {
  const found = String(text ?? '').split('.');
  return found.length > 1 && found.length < 5 && found.every((m) => MIXERS[m]) ? found : usual.split('.');
}

const whole = (value, least, usual) => (Number.isInteger(Number(value)) && value >= least ? Number(value) : usual);

export function settingsOf(asked) { // of a link, whatever stands there
  const found = { ...USUAL, ...asked };
  const [left, right] = SIDES.map((side) => mixersOf(found[side], USUAL[side]));
  while (right.length < left.length) right.push(right.at(-1)); // both sides have as many stages
  return { task: among(found.task, Object.keys(TASKS), USUAL.task), size: among(found.size, [16, 32], USUAL.size),
    rate: among(found.rate, RATES, USUAL.rate), seed: Math.min(whole(found.seed, 0, USUAL.seed), 100), left,
    right: right.slice(0, left.length), steps: Math.min(whole(found.steps, 0, 0), 5000) };
}

// --- curves ---

const WIDE = 360, HIGH = 150, LEFT = 44, TOP = 8, BELOW = 20;

export const smooth = (values, kept = 0.9) => { // a mean that forgets
  let sum = 0, weight = 0;
  return values.map((v) => {
    [sum, weight] = [kept * sum + v, kept * weight + 1];
    return sum / weight;
  });
};

class Chart {
  constructor(parent, key) {
    this.key = key;
    const figure = add(parent, 'figure', { class: 'chart' });
    add(figure, 'figcaption', { 'data-word': key });
    this.svg = draw(figure, 'svg', { viewBox: `0 0 ${WIDE} ${HIGH}`, role: 'img' });
  }

  show(lines, { steps, most, ticks, say, label }) { // lines: [{ class, points: [[step, value], …] }]
    this.svg.replaceChildren();
    this.svg.setAttribute('aria-label', label);
    const x = (step) => LEFT + step / steps * (WIDE - LEFT - 8), y = (v) => TOP + (1 - v / most) * (HIGH - TOP - BELOW);
    for (const v of ticks) {
      draw(this.svg, 'line', { x1: LEFT, x2: WIDE - 8, y1: y(v), y2: y(v), class: 'tick' });
      draw(this.svg, 'text', { x: LEFT - 6, y: y(v) + 4, 'text-anchor': 'end' }, say(v));
    }
    draw(this.svg, 'text', { x: WIDE - 8, y: HIGH - 4, 'text-anchor': 'end' }, t('step of', { n: steps }));
    for (const { kind, points } of lines) {
      const some = points.filter((_, i) => i % Math.ceil(points.length / 300) === 0 || i === points.length - 1);
      const path = some.map(([step, v]) => `${x(step).toFixed(1)},${y(Math.min(v, most)).toFixed(1)}`).join(' ');
      draw(this.svg, 'polyline', { points: path, class: kind });
    }
  }
}

// --- one side ---

class Side {
  constructor(view, name) {
    Object.assign(this, { view, name, ask: assistant() });
    this.root = add(view.cards, 'article', { class: `card ${name}`, 'data-label': name });
    const head = add(this.root, 'header');
    this.title = add(head, 'h2', { class: `key ${name}` });
    this.mixers = add(this.root, 'div', { class: 'controls' });
    this.numbers = add(this.root, 'p', { class: 'numbers' });
    this.says = add(this.root, 'p', { class: 'says' });
    this.map = this.figure('map');
    this.matrix = this.figure('matrix');
  }

  figure(kind) {
    const figure = add(this.root, 'figure', { class: kind });
    const canvas = add(figure, 'canvas', { role: 'img', width: 8, height: 8, 'data-label': kind });
    return { canvas, caption: add(figure, 'figcaption') };
  }

  get chosen() { return this.view.settings[this.name]; }

  get short() { return [...new Set(this.chosen)].join(', '); }

  async learn() { // anew
    const { task, size, rate, seed } = this.view.settings;
    Object.assign(this, { losses: [], accuracies: [], times: [], seen: null });
    const digits = task === 'digit' ? this.view.digits : null;
    return this.ask('learn', { task, size, rate, seed, mixers: this.chosen, digits });
  }

  async step() {
    const began = performance.now();
    this.losses.push(await this.ask('step'));
    this.times.push(performance.now() - began);
  }

  async measure(t) {
    if (this.accuracies.at(-1)?.[0] !== t) this.accuracies.push([t, await this.ask('accuracy')]);
    await this.regard();
  }

  async regard() {
    const { example, stage } = this.view;
    this.seen = { ...await this.ask('regard', { example, stage }), example, stage };
  }

  get pace() { // ms a step: the median of the last
    const last = this.times.slice(-15).sort((a, b) => a - b);
    return Math.round(last[Math.floor(last.length / 2)]);
  }

  buildMixers() {
    this.mixers.replaceChildren();
    this.chosen.forEach((mixer, s) => {
      const label = add(this.mixers, 'label'), options = Object.keys(MIXERS);
      add(label, 'span', {}, t('mixer of', { stage: s + 1 }));
      const select = add(label, 'select');
      for (const name of options) add(select, 'option', { value: name }, name);
      select.value = mixer;
      select.addEventListener('change', () => {
        const mixers = this.chosen.map((m, i) => (i === s ? select.value : m));
        this.view.change({ [this.name]: mixers.join('.') });
      });
    });
  }

  show() {
    const { seen, view } = this, loss = smooth(this.losses ?? []).at(-1), right = this.accuracies?.at(-1)?.[1];
    this.title.textContent = this.short;
    this.numbers.textContent = loss === undefined ? t('not yet') : t('numbers', {
      loss: loss.toFixed(3), right: right === undefined ? '…' : Math.round(100 * right), ms: this.pace });
    if (!seen || !view.held) return;
    const names = TASKS[view.settings.task].class_names, { size } = view.settings, most = Math.max(...seen.logits);
    const e = [...seen.logits].map((v) => Math.exp(v - most)), answer = seen.logits.indexOf(most);
    const percent = Math.round(100 * e[answer] / e.reduce((a, b) => a + b));
    const says = answer === seen.label ? 'says right' : 'says wrong', n = Math.round(Math.sqrt(seen.matrix.length));
    this.says.textContent = t(says, { class: className(names[answer]), percent });
    const pixels = view.picture(seen.example), grid = Math.round(Math.sqrt(n));
    const some = seen.cam.some((v) => v > 0), label = { name: this.short, class: className(names[seen.label]) };
    if (some) drawMap(this.map.canvas, pixels, [size, size], scaleMap(seen.cam, [grid, grid], [size, size]));
    else drawPicture(this.map.canvas, pixels, [size, size]);
    this.map.caption.textContent = t(some ? 'map of' : 'nothing', label);
    drawMatrix(this.matrix.canvas, seen.matrix, n, ground(this.root));
    this.matrix.caption.textContent = t('matrix of', { mixer: this.chosen[seen.stage] });
    this.map.canvas.setAttribute('aria-label', this.map.caption.textContent);
    this.matrix.canvas.setAttribute('aria-label', `${this.matrix.caption.textContent}. ${t('matrix help')}`);
    this.matrix.canvas.title = t('matrix help');
  }
}

// --- the view ---

export class Learn {
  constructor(root, address, digits) { // digits as state has them
    Object.assign(this, { root, address, digits, settings: settingsOf({}), example: 0, stage: 0, t: 0, wanted: 0 });
    this.title = add(add(root, 'div', { class: 'top' }), 'h1', { 'data-word': 'learn title' });
    add(root, 'p', { class: 'lead', 'data-word': 'learn lead' });
    const main = add(root, 'div', { class: 'main' });
    this.side = add(main, 'section', { class: 'side learning' });
    this.right = add(main, 'section', { class: 'models' });
    this.buildControls();
    this.status = add(this.right, 'p', { class: 'status', role: 'status', 'aria-live': 'polite' });
    const charts = add(this.right, 'div', { class: 'charts' });
    this.loss = new Chart(charts, 'loss');
    this.accuracy = new Chart(charts, 'accuracy');
    this.cards = add(this.right, 'div', { class: 'cards two' });
  }

  buildControls() {
    const buttons = add(this.side, 'div', { class: 'tools', role: 'group', 'data-label': 'training' });
    const button = (key, react) => {
      const found = add(buttons, 'button', { type: 'button', 'data-word': key });
      found.addEventListener('click', react);
      return found;
    };
    this.start = button('train', () => { if (this.going) this.pause(); else this.train(Infinity); });
    this.start.className = 'go';
    button('one step', () => this.train(this.t + 1));
    button('reset', () => this.change({}));
    const list = add(this.side, 'div', { class: 'settings' });
    const set = (key) => (value) => this.change({ [key]: value });
    this.lists = {
      task: choice(list, 'task', Object.keys(TASKS).map((name) => [name, `task ${name}`]), set('task')),
      size: choice(list, 'pixels', [['16'], ['32']], set('size')),
      stages: choice(list, 'stages', [['2'], ['3'], ['4']], (n) => this.change(this.deep(n))),
      rate: choice(list, 'rate', RATES.map((v) => [String(v)]), set('rate')),
      seed: choice(list, 'seed', [0, 1, 2, 3, 4, 5].map((v) => [String(v)]), set('seed')),
    };
    this.asks = add(this.side, 'p', { class: 'hint' });
    this.examples = add(this.side, 'div', { class: 'examples', role: 'group', 'data-label': 'held out' });
    for (let i = 0; i < SHOWN; i++) {
      const one = add(this.examples, 'button', { type: 'button' });
      add(one, 'canvas', { 'aria-hidden': 'true', width: 8, height: 8 });
      one.addEventListener('click', () => this.regard({ example: i }));
    }
    const stage = add(this.side, 'div', { class: 'settings of' });
    const stages = [1, 2, 3, 4].map((s) => [String(s)]);
    this.stages = choice(stage, 'map stage', stages, (s) => this.regard({ stage: s - 1 }));
    const tries = add(this.side, 'div', { class: 'tries' });
    add(tries, 'h2', { 'data-word': 'try' });
    const items = add(tries, 'ul');
    for (const [name, settings] of Object.entries(TRIES)) {
      const item = add(items, 'li');
      add(item, 'button', { type: 'button', class: 'plain', 'data-word': `try ${name}` })
        .addEventListener('click', () => { this.change({ ...settings, rate: USUAL.rate, seed: USUAL.seed }); });
    }
    add(this.side, 'p', { class: 'note', 'data-word': this.address.word });
  }

  deep(n) { // the mixers of n stages: as they are, and the last one again
    const one = (mixers) => Array.from({ length: n }, (_, s) => mixers[s] ?? mixers.at(-1)).join('.');
    return Object.fromEntries(SIDES.map((side) => [side, one(this.settings[side])]));
  }

  hash() { // a link that shows the same run
    const { left, right, ...rest } = this.settings;
    const all = { view: 'learn', ...rest, left: left.join('.'), right: right.join('.'), steps: this.t };
    return String(new URLSearchParams(all));
  }

  write() { // without a further entry in the history
    if (!this.root.hidden && this.address.now !== this.hash()) this.address.write(this.hash());
  }

  take(asked) { // what a link says; nothing happens if it is this run
    const wanted = settingsOf(asked), { steps } = wanted;
    const key = ({ task, size, rate, seed, left, right }) => String([task, size, rate, seed, left, right]);
    const same = this.sides && key(wanted) === key(this.settings);
    if (same && steps === this.t) return;
    this.begin(wanted);
    this.wanted = steps;
    this.showStart();
  }

  change(some) { // settings by hand: a new run, which waits
    const { left, right, ...rest } = this.settings;
    this.begin(settingsOf({ ...rest, left: left.join('.'), right: right.join('.'), ...some }));
    this.write();
    this.run();
  }

  begin(settings) {
    Object.assign(this, { settings, t: 0, wanted: 0, fresh: false, held: null });
    this.example = 0;
    this.stage = Math.min(this.stage, settings.left.length - 1);
    this.showWords();
  }

  get going() { return this.t < this.wanted; }

  train(wanted) {
    this.wanted = wanted;
    this.showStart();
    this.run();
  }

  pause() {
    this.wanted = this.t;
    this.showStart();
  }

  regard(what) { // another picture, or another stage
    Object.assign(this, what, { looked: false });
    this.showExamples();
    this.run();
  }

  async run() { // until there is nothing to do
    if (this.running || this.root.hidden) return;
    this.running = true;
    this.failed = false;
    try {
      for (let job = this.next(); job && !this.root.hidden; job = this.next()) await job.call(this);
      if (this.fresh && !this.root.hidden) this.finish();
    } catch (error) {
      this.failed = true;
      this.wanted = this.t;
      this.say('failed', { error: error.message });
    }
    this.running = false;
    this.showStart();
  }

  next() {
    if (!this.fresh) return this.renew;
    if (!this.looked) return this.look;
    return this.going ? this.step : this.measured === this.t ? null : this.measure;
  }

  async renew() { // two new models
    const { settings } = this;
    this.say('starting', { device: t('wasm') });
    if (!this.sides) {
      this.sides = SIDES.map((name) => new Side(this, name));
      const start = { devices: ['wasm'] }; // the same numbers everywhere
      await Promise.all(this.sides.map((side) => side.ask('start', start)));
    }
    this.showWords();
    const [held] = await Promise.all(this.sides.map((side) => side.learn()));
    if (settings !== this.settings) return;
    Object.assign(this, { held, fresh: true, looked: true, measured: -1, compiled: false });
    this.showExamples();
    this.say('compiling two');
    await this.measure();
  }

  async step() {
    const { settings } = this;
    if (!this.compiled) this.say('compiling gradient');
    await Promise.all(this.sides.map((side) => side.step()));
    if (settings !== this.settings) return;
    this.t += 1;
    if (!this.compiled) {
      this.compiled = true;
      for (const side of this.sides) side.times = [];
    }
    if (this.t === 1 || this.t % 50 === 0) this.say('training now', { n: this.t });
    if (this.t % EVERY === 0) await this.measure(); else this.show();
  }

  async measure() {
    const { settings, t: at } = this;
    await Promise.all(this.sides.map((side) => side.measure(at)));
    if (settings !== this.settings) return;
    this.measured = at;
    this.show();
  }

  async look() {
    const { settings } = this;
    this.looked = true;
    await Promise.all(this.sides.map((side) => side.regard()));
    if (settings === this.settings) this.show();
  }

  finish() {
    this.write();
    this.say(this.t ? 'paused' : 'ready to train', { n: this.t });
    this.show();
  }

  picture(i) { // RGBA of a held-out picture
    const { size } = this.settings, n = size * size, found = new Uint8ClampedArray(4 * n).fill(255);
    for (let p = 0; p < n; p++) {
      for (let k = 0; k < 3; k++) found[4 * p + k] = 255 * this.held.images[3 * (i * n + p) + k];
    }
    return found;
  }

  showExamples() {
    if (!this.held) return;
    const names = TASKS[this.settings.task].class_names, { size } = this.settings;
    [...this.examples.children].forEach((button, i) => {
      drawPicture(button.firstChild, this.picture(i), [size, size]);
      const name = className(names[this.held.labels[i]]);
      Object.assign(button, { title: name, ariaLabel: `${i + 1}: ${name}` });
      button.setAttribute('aria-pressed', String(i === this.example));
    });
    this.stages.value = String(this.stage + 1);
  }

  showStart() {
    this.start.textContent = t(this.going ? 'pause' : 'train');
    this.start.dataset.word = this.going ? 'pause' : 'train';
  }

  show() {
    this.showCharts();
    this.sides?.forEach((side) => side.show());
  }

  showCharts() {
    if (!this.sides) return;
    const classes = TASKS[this.settings.task].class_names.length, steps = Math.max(this.t, 50);
    const chance = Math.log(classes); // the loss of a guess
    const ends = (of) => this.sides.map((side) => `${side.short} ${of(side) ?? ''}`).join(', ');
    const losses = this.sides.map((side) => smooth(side.losses ?? []));
    this.loss.show(this.sides.map((side, i) => ({ kind: side.name, points: losses[i].map((v, s) => [s + 1, v]) })), {
      steps, most: 1.45 * chance, ticks: [0, chance / 2, chance], say: (v) => v.toFixed(2),
      label: `${t('loss')}: ${ends((side) => smooth(side.losses ?? []).at(-1)?.toFixed(3))}` });
    this.accuracy.show(this.sides.map((side) => ({ kind: side.name, points: side.accuracies ?? [] })), {
      steps, most: 1.05, ticks: [0, 1 / classes, 1], say: (v) => `${Math.round(100 * v)} %`,
      label: `${t('accuracy')}: ${ends((side) => `${Math.round(100 * (side.accuracies?.at(-1)?.[1] ?? 0))} %`)}` });
  }

  close() {
    this.pause();
    for (const side of this.sides ?? []) side.ask.end('closed');
  }

  say(key, values = {}) {
    this.said = [key, values];
    const text = t(key, values);
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  showWords() {
    translate(this.root);
    const { settings } = this;
    const now = { ...settings, stages: settings.left.length };
    for (const [key, list] of Object.entries(this.lists)) list.value = String(now[key]);
    [...this.stages.options].forEach((option, s) => { option.hidden = option.disabled = s >= settings.left.length; });
    this.asks.textContent = `${settings.task === 'digit' ? `${t('learnt digits')} ` : ''}${t('held out pictures')}`;
    if (this.said) this.say(...this.said);
    this.sides?.forEach((side) => side.buildMixers());
    this.showStart();
    this.showExamples();
    this.show();
  }
}
