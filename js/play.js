// Play: models answer side by side about what is on the board, and show where they look and who hears whom.
import { Board, SHAPES } from './board.js';
import { drawMap, drawMatrix, drawPicture, drawRow, scaleMap } from './views.js';
import { MIXERS } from './engine.js';
import { Inside } from './inside.js';
import { add, assistant, choice, className, ground, t, tokensOf, translate, words } from './common.js';

// --- one model ---

class Card {
  constructor(page, model, task) {
    Object.assign(this, { page, task, name: words.names[model.name] ?? model.name, key: `${task.name} ${model.name}`, model });
    Object.assign(this, { mixers: [...model.config.token_mixers], label: null, fresh: {}, row: null, compiled: {} });
    this.root = add(page.cards, 'article', { class: 'card', 'aria-label': this.name });
    const head = add(this.root, 'header');
    const open = add(add(head, 'h2'), 'button', { type: 'button', class: 'plain' }, this.name);
    open.addEventListener('click', () => page.inside.enter(this));
    this.kind = add(head, 'p', { class: 'kind' });
    this.bars = add(this.root, 'div', { class: 'bars', role: 'group' });
    const longest = Math.max(...task.class_names.map((name) => name.length)); // digits leave more room for the bars
    this.bars.style.setProperty('--name', `${Math.min(0.5 * longest + 0.3, 5)}em`);
    this.buttons = task.class_names.map((name, i) => this.bar(name, i));
    this.map = this.figure('map');
    this.matrix = this.figure('matrix');
    this.foot = add(this.root, 'div', { class: 'swap' });
    this.select = add(add(this.foot, 'label'), 'select');
    this.swapLabel = this.foot.firstChild.insertBefore(document.createElement('span'), this.select);
    for (const mixer of Object.keys(MIXERS)) add(this.select, 'option', { value: mixer }, mixer);
    this.select.addEventListener('change', () => page.swap(this, this.select.value));
    this.note = add(this.foot, 'p', { class: 'note' });
    this.train = add(this.foot, 'a', { hidden: '' }); // in Learn: the trained mixer's kind against the new one's
    this.back = add(this.foot, 'button', { type: 'button', hidden: '' });
    this.back.addEventListener('click', () => page.restore(this));
    this.root.addEventListener('pointerenter', () => { page.pointed = this; });
    this.root.addEventListener('focusin', () => { page.pointed = this; });
    this.listen();
  }

  bar(name, i) {
    const button = add(this.bars, 'button', { type: 'button', 'aria-pressed': 'false' });
    const parts = ['name', 'track', 'percent'].map((part) => add(button, 'span', { class: part }));
    add(parts[1], 'i');
    button.addEventListener('click', () => this.page.explain(this.label === i ? null : i));
    return button;
  }

  figure(kind) {
    const figure = add(this.root, 'figure', { class: kind });
    const canvas = add(figure, 'canvas', { role: 'img', width: 8, height: 8, 'data-label': kind });
    return { canvas, caption: add(figure, 'figcaption') };
  }

  listen() { // to a pointer or the keys on the map: a token
    const { canvas } = this.map, { page } = this;
    const react = (token) => { if (this.logits) page.hear(token); };
    tokensOf(canvas, () => ({ grid: this.grid(), token: page.token }), react);
    canvas.addEventListener('pointerleave', (e) => { if (e.pointerType === 'mouse') page.hear(null); });
    canvas.addEventListener('blur', () => page.hear(null));
  }

  grid() { return this.grids?.[this.page.stage] ?? [1, 1]; }

  get answer() { return this.logits ? this.logits.indexOf(Math.max(...this.logits)) : null; }

  get chosen() { return this.label ?? this.answer; }

  get probabilities() {
    const most = Math.max(...this.logits), e = this.logits.map((v) => Math.exp(v - most));
    const sum = e.reduce((a, b) => a + b);
    return [...e].map((v) => v / sum);
  }

  showWords() {
    this.kind.textContent = [...new Set(this.mixers)].join(', ');
    this.swapLabel.textContent = t('mixer of', { stage: this.page.stage + 1 });
    this.select.value = this.mixers[this.page.stage];
    const now = this.mixers[this.page.stage], trained = this.model.config.token_mixers[this.page.stage];
    const changed = now !== trained, both = { left: `${trained}.${trained}`, right: `${now}.${now}` };
    this.note.textContent = changed ? t('untrained') : '';
    this.train.hidden = !changed;
    const task = this.task.drawn === 'digits' ? 'digit' : 'shape';
    this.train.textContent = t(`train it ${task}`);
    this.train.href = `#${new URLSearchParams({ view: 'learn', task, size: 32, ...both, steps: 0 })}`;
    this.back.hidden = this.mixers.every((m, s) => m === this.model.config.token_mixers[s]);
    this.back.textContent = t('back');
    this.showAnswer();
    this.showMap();
    this.showMatrix();
  }

  showAnswer() {
    const p = this.logits && this.probabilities, right = this.answer;
    this.select.disabled = !p; // a mixer can be changed in a model that has answered
    this.bars.setAttribute('aria-label', t('class'));
    this.buttons.forEach((button, i) => {
      const [name, track, percent] = button.children;
      name.textContent = className(this.task.class_names[i]);
      track.firstChild.style.width = p ? `${100 * p[i]}%` : '0';
      percent.textContent = p ? `${Math.round(100 * p[i])} %` : '';
      button.classList.toggle('most', i === right);
      button.setAttribute('aria-pressed', String(this.label === i));
    });
  }

  showMap() {
    const { page, task } = this, { canvas, caption } = this.map, pixels = this.pixels ?? page.pixels, size = task.img_size;
    if (!pixels) return;
    const values = { name: this.name, class: className(task.class_names[this.chosen] ?? '') };
    if (page.token && this.row) {
      drawRow(canvas, pixels, size, this.row.values, this.row.grid, page.token, this.grid());
      caption.textContent = this.hearing();
    } else if (this.cam) {
      drawMap(canvas, pixels, size, this.cam);
      caption.textContent = this.cam.some((v) => v > 0) ? t('map of', values) : t('nothing', values);
    } else {
      drawPicture(canvas, pixels, size);
      caption.textContent = '';
    }
    canvas.setAttribute('aria-label', `${caption.textContent}. ${t('point')}`);
  }

  hearing() { // in words
    const { values, grid: [, w], whole } = this.row, [r, c] = this.page.token;
    const most = values.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
    const n = values.reduce((count, v) => count + (Math.abs(v) > 1e-3 * most), 0), all = values.length;
    if (!most) return t('hears nobody', this);
    if (whole) return t('hears pixels', { name: this.name, n: Math.round(100 * n / all) });
    const at = values.findIndex((v) => Math.abs(v) === most), self = r * w + c;
    if (n === 1 && at === self) return t('hears itself', this);
    return t('hears many', { name: this.name, n, all, row: Math.floor(at / w) + 1, column: at % w + 1 });
  }

  showMatrix() {
    const { canvas, caption } = this.matrix, { page } = this;
    if (!this.who) return;
    const n = Math.round(Math.sqrt(this.who.length)), [, w] = this.grid();
    drawMatrix(canvas, this.who, n, ground(canvas), page.token ? page.token[0] * w + page.token[1] : null);
    caption.textContent = t('matrix of', { mixer: this.mixers[page.stage] });
    canvas.setAttribute('aria-label', `${caption.textContent}. ${t('matrix help')}`);
    canvas.title = t('matrix help');
  }
}

// --- the view ---

export class Play {
  constructor(root, state, address) {
    Object.assign(this, { root, state, address, cardsOf: {}, generation: 0, stage: state.stage ?? 2, token: null, whole: false });
    this.ask = assistant();
    this.build();
    this.open(state.tasks[0]);
  }

  build() {
    const { root, state } = this;
    const header = add(root, 'div', { class: 'top' });
    this.title = add(header, 'h1');
    this.tabs = document.createElement('div'); // above the board
    Object.assign(this.tabs, { className: 'tabs', role: 'group' });
    if (state.tasks.length > 1) {
      for (const task of state.tasks) {
        const ours = task.drawn || task.name === 'pictures'; // others are names of folders
        const tab = add(this.tabs, 'button', { type: 'button', 'data-task': task.name }, task.name);
        if (ours) tab.dataset.word = task.name;
        tab.addEventListener('click', () => this.open(task));
      }
    }
    this.lead = add(root, 'p', { class: 'lead' });
    const main = add(root, 'div', { class: 'main' });
    this.side = add(main, 'section', { class: 'side' });
    this.right = add(main, 'section', { class: 'models' });
    this.buildControls();
    this.status = add(this.right, 'p', { class: 'status', role: 'status', 'aria-live': 'polite' });
    this.cards = add(this.right, 'div', { class: 'cards' });
    this.checked = add(this.right, 'p', { class: 'note checked' });
    this.inside = new Inside(this, add(this.right, 'section', { class: 'inside', hidden: '' }));
  }

  buildControls() {
    const row = add(this.right, 'div', { class: 'controls' });
    this.stages = choice(row, 'stage', [1, 2, 3, 4].map((s) => [String(s)]), (s) => this.setStage(Number(s) - 1));
    choice(row, 'whom', [['one', 'one'], ['whole', 'whole']], (value) => {
      this.whole = value === 'whole';
      this.hear(this.token);
    });
    this.hint = add(this.right, 'p', { class: 'hint' });
  }

  buildBoard(task) { // anew for each task
    this.side.replaceChildren(this.tabs);
    const canvas = add(this.side, 'canvas', { class: 'board', tabindex: 0, role: 'application', 'data-label': 'board' });
    const [height, width] = task.img_size;
    this.board = new Board(canvas, { size: task.img_size, paper: task.paper, pencil: task.pencil, detail: task.detail,
      patch: Math.min(height, width) / 8 }, () => this.changed());
    this.summary = add(this.side, 'p', { class: 'summary', 'aria-hidden': 'true' }); // for phones: the cards are below
    const { board } = this, drawn = task.drawn === 'shapes', tools = add(this.side, 'div', { class: 'tools', role: 'group', 'data-label': 'tools' });
    for (const tool of drawn ? ['shape', 'draw', 'rub'] : ['draw', 'rub']) {
      const button = add(tools, 'button', { type: 'button', 'data-word': tool, 'data-tool': tool });
      button.addEventListener('click', () => this.setTool(tool));
    }
    for (const act of ['undo', 'clear']) {
      const button = add(tools, 'button', { type: 'button', 'data-word': act });
      button.addEventListener('click', () => board[act]());
    }
    if (drawn) this.buildShapes();
    const examples = add(this.side, 'div', { class: 'examples', role: 'group', 'data-label': 'examples' });
    task.examples.forEach(({ name, url }) => {
      const button = add(examples, 'button', { type: 'button', 'data-class': name });
      const image = add(button, 'img', { src: url, alt: '' });
      button.addEventListener('click', () => this.board.picture(image));
    });
    const own = add(this.side, 'div', { class: 'own' }), label = add(own, 'label');
    add(label, 'span', { 'data-word': 'own' });
    const file = add(label, 'input', { type: 'file', accept: 'image/*' });
    file.addEventListener('change', async () => {
      const [chosen] = file.files;
      file.value = ''; // so that the same one can be chosen again
      try {
        if (chosen) board.picture(await createImageBitmap(chosen));
      } catch (error) { // it is no image
        this.say('failed', { error: `${chosen.name}: ${error.message}` });
      }
    });
    this.filming = add(own, 'button', { type: 'button', 'data-word': 'camera' });
    this.filming.addEventListener('click', () => (this.film ? this.stopFilm() : this.startFilm()));
    this.tries = add(this.side, 'div', { class: 'tries' });
  }

  async startFilm() { // the camera's pictures, as fast as the models answer; the last one stays
    this.filming.disabled = true;
    try {
      const video = document.createElement('video');
      const size = { width: 640, facingMode: 'environment' };
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: size });
      Object.assign(video, { muted: true, playsInline: true });
      await video.play();
      this.film = video;
      this.board.remember();
      this.nextFrame();
    } catch { // there is none, or the reader does not want it
      this.say('no camera');
    }
    this.filming.disabled = false;
    this.showFilming();
  }

  nextFrame() {
    if (!this.film) return;
    if (this.root.hidden) this.stopFilm();
    else if (this.list.every((card) => card.fresh.look === this.generation)) this.board.picture(this.film, false);
    requestAnimationFrame(() => this.nextFrame());
  }

  stopFilm() {
    this.film?.srcObject.getTracks().forEach((track) => track.stop());
    this.film = null;
    this.showFilming();
  }

  showFilming() {
    this.filming.dataset.word = this.film ? 'still' : 'camera';
    this.filming.textContent = t(this.filming.dataset.word);
  }

  buildShapes() {
    const { board, side } = this;
    const kinds = add(side, 'div', { class: 'tools', role: 'group', 'data-label': 'kind' });
    for (const kind of Object.keys(SHAPES)) {
      const button = add(kinds, 'button', { type: 'button', 'data-class': kind, 'data-kind': kind });
      const icon = add(button, 'canvas', { width: 36, height: 36, 'aria-hidden': 'true' }), c = icon.getContext('2d');
      c.translate(18, 18);
      c.scale(10, 10);
      c.fillStyle = '#888';
      SHAPES[kind](c);
      c.fill();
      button.addEventListener('click', () => this.reshape({ kind }));
    }
    const colors = add(side, 'div', { class: 'tools', role: 'group', 'data-label': 'colour' });
    for (const [name, [color]] of Object.entries(words.colours)) {
      const button = add(colors, 'button', { type: 'button', class: 'swatch', 'data-colour': name, style: `--c:${color}` });
      button.addEventListener('click', () => this.reshape({ color }));
    }
    const size = add(add(side, 'label', { class: 'size' }), 'input', { type: 'range', min: 0.08, max: 0.3, step: 0.01, value: 0.2 });
    add(size.parentNode, 'span', { 'data-word': 'size' });
    size.parentNode.prepend(size.nextSibling);
    size.addEventListener('input', () => this.reshape({ radius: Number(size.value) }));
    board.thing = { kind: 'ring', radius: 0.2, color: board.color, at: [board.width * 0.5, board.height * 0.5] };
  }

  reshape(change) { // the shape in hand, and the next one
    const { board } = this;
    Object.assign(board, change);
    if (board.thing) board.thing = { ...board.thing, ...change };
    this.pressed();
    board.show();
  }

  setTool(tool) {
    this.board.tool = tool;
    this.pressed();
  }

  pressed() {
    const { board } = this, now = { tool: board.tool, kind: board.kind };
    for (const [key, value] of Object.entries(now)) {
      for (const b of this.side.querySelectorAll(`[data-${key}]`)) b.setAttribute('aria-pressed', String(b.dataset[key] === value));
    }
    for (const b of this.side.querySelectorAll('[data-colour]')) {
      b.setAttribute('aria-pressed', String(words.colours[b.dataset.colour][0] === board.color));
    }
  }

  open(task) {
    if (this.film) this.stopFilm();
    this.task = task;
    this.token = null;
    this.buildBoard(task);
    for (const old of this.cards.children) old.hidden = true;
    this.cardsOf[task.name] ??= task.models.map((model) => new Card(this, model, task));
    this.list = this.cardsOf[task.name];
    this.list.forEach((card) => { card.root.hidden = false; });
    this.pointed = this.list[0];
    this.setTool(task.drawn === 'shapes' ? 'shape' : 'draw');
    this.done = new Set();
    if ((!this.board.thing || task.shown) && task.examples[0]) {
      const image = new Image();
      image.onload = () => { if (this.task === task) this.board.picture(image); };
      image.src = task.examples[0].url;
    }
    this.inside.follow();
    this.showWords();
    this.board.show();
  }

  setStage(stage) {
    this.stage = stage;
    this.token = null;
    for (const card of this.list) {
      Object.assign(card, { cam: null, who: null, row: null });
      Object.assign(card.fresh, { cam: null, who: null });
    }
    this.showWords();
    this.run();
  }

  explain(label) { // the class that all maps are about; null: each model's own answer
    for (const card of this.list) {
      card.label = label;
      card.fresh.cam = null;
      card.showAnswer();
    }
    if (label !== null) this.tick('class');
    this.run();
  }

  changed() { // the picture
    const pixels = this.board.pixels(), { mean, std, img_size: [h, w] } = this.task;
    const image = new Float32Array(3 * h * w);
    for (let i = 0; i < h * w; i++) {
      for (let k = 0; k < 3; k++) image[k * h * w + i] = (pixels[4 * i + k] / 255 - mean[k]) / std[k];
    }
    Object.assign(this, { pixels, image, generation: this.generation + 1 });
    this.run();
  }

  // what is most wanted: answers before maps before matrices, the model pointed at first
  next() {
    if (this.inside.card) return this.inside.next();
    const cards = [this.pointed, ...this.list.filter((c) => c !== this.pointed)], g = this.generation;
    const stale = (what, list = cards) => list.filter((c) => c.fresh[what] !== g)
      .sort((a, b) => (a === this.pointed ? -1 : b === this.pointed ? 1 : (a.fresh[what] ?? 0) - (b.fresh[what] ?? 0)))[0];
    const hearing = this.token && cards.find((c) => c.fresh.hears !== this.asked && c.fresh.look === g);
    const found = (what, list) => { const card = stale(what, list); return card && [what, card]; };
    return found('look', [this.pointed]) ?? found('cam', [this.pointed]) ?? found('look')
      ?? (hearing && this.whole ? ['hears', hearing] : null) ?? found('cam') ?? found('who');
  }

  async run() {
    if (this.running || this.root.hidden) return; // the other view is open
    this.running = true;
    this.failed = false;
    try {
      await this.begin();
      for (let job = this.next(); job; job = this.next()) await this.work(...job);
    } catch (error) {
      if (this.device === 'webgpu') this.withoutGraphics();
      else this.failed = error.message;
    }
    if (this.failed) this.say('failed', { error: this.failed });
    else if (!this.again) this.say(this.answered ? 'ready' : 'compiled', this.answered);
    this.running = false;
    if (this.again) {
      this.again = false;
      this.run();
    }
  }

  withoutGraphics() { // a graphics processor that does not work, or is lost: all again, on the other one
    this.ask.end('lost');
    Object.assign(this, { ask: assistant(), device: null, again: true });
    this.state.devices = ['wasm'];
    for (const card of Object.values(this.cardsOf).flat()) {
      Object.assign(card, { opened: false, fresh: {}, compiled: {}, mixers: [...card.model.config.token_mixers] });
      card.showWords();
    }
  }

  async begin() {
    if (this.device) return;
    this.say('starting', { device: t(this.state.devices[0] === 'webgpu' && navigator.gpu ? 'webgpu' : 'wasm') });
    this.device = await this.ask('start', { devices: this.state.devices });
  }

  async work(what, card) {
    const { generation, stage, pixels, image, token } = this, { fresh } = card, began = performance.now();
    const place = what + (what === 'inside' ? this.inside.at : stage);
    if (!card.compiled[place]) this.announce(what, card);
    await this.ready(card);
    if (fresh !== card.fresh || card.task !== this.task) return; // it has changed meanwhile
    const known = card.compiled[place], name = card.key;
    if (what === 'look') await this.look(card, generation, pixels, image);
    if (what === 'cam') {
      const label = card.chosen, cam = await this.ask('gradcam', { name, label, stage });
      if (fresh !== card.fresh) return;
      if (stage === this.stage && label === card.chosen) {
        card.cam = this.scaleMap(cam, card.grids[stage], card.task.img_size);
        fresh.cam = generation;
        card.showMap();
      }
    }
    if (what === 'who') {
      const who = await this.ask('matrix', { name, stage });
      if (fresh !== card.fresh) return;
      if (stage === this.stage) {
        Object.assign(card, { who });
        fresh.who = generation;
        card.showMatrix();
        if (this.token && !this.whole) this.hearOne(card);
      }
    }
    if (what === 'inside') await this.inside.ask(card);
    if (what === 'hears') {
      const asked = this.asked, values = await this.ask('hears', { name, stage, token, whole: true, probes: 4 });
      if (fresh !== card.fresh) return;
      fresh.hears = asked;
      if (asked === this.asked) {
        card.row = { values, grid: card.task.img_size, whole: true };
        card.showMap();
      }
    }
    if (fresh !== card.fresh) return;
    const ms = performance.now() - began;
    if (known && what === 'look') this.answered = { name: card.name, ms: Math.round(ms) };
    card.compiled[place] = true;
  }

  async ready(card) { // its model is open, or the worker, which keeps the order, was asked to open it
    if (card.opened) return;
    card.opened = true;
    try {
      card.depths = await this.ask('open', { name: card.key, weights: card.model.weights, config: card.model.config });
    } catch (error) {
      card.opened = false;
      throw error;
    }
  }

  async look(card, generation, pixels, image) {
    const { fresh } = card, shape = [3, ...card.task.img_size];
    const { logits, grids } = await this.ask('look', { name: card.key, image, shape });
    if (fresh !== card.fresh) return;
    Object.assign(card, { logits, grids, pixels });
    fresh.look = generation;
    card.first ??= card.answer;
    card.showAnswer();
    this.showSummary();
    if (!card.cam) card.showMap();
    if (card.answer !== card.first) this.tick(this.board.tool === 'rub' ? 'rub' : 'drag');
    if (card === this.list[0]) this.showHint();
  }

  announce(what, card) {
    const i = this.list.indexOf(card) + 1, values = { name: card.name, i, n: this.list.length };
    this.say(what === 'look' ? 'compiling' : 'explaining', values);
  }

  hear(token) { // which token is pointed at; null: none
    if (String(token) === String(this.token) && token && this.asked === `${token} ${this.whole} ${this.generation}`) return;
    Object.assign(this, { token, asked: `${token} ${this.whole} ${this.generation}` });
    for (const card of this.list) {
      card.row = null;
      if (token && !this.whole) this.hearOne(card);
      else card.showMap();
      card.showMatrix();
    }
    if (token) this.tick('hear');
    if (token && this.whole) this.run();
  }

  hearOne(card) { // a row of the matrix
    if (!card.who) return card.showMap();
    const [h, w] = card.grid(), n = h * w, i = this.token[0] * w + this.token[1];
    card.row = { values: card.who.slice(i * n, (i + 1) * n), grid: [h, w] };
    return card.showMap();
  }

  async swap(card, mixer) {
    if (!card.logits) return; // nor can a reader choose, as yet
    const { stage } = this, before = card.mixers[stage], [h, w] = card.grids[stage];
    const put = (one) => card.mixers.map((m, s) => (s === stage ? one : m));
    const done = Promise.all([this.ready(card), this.ask('swap', { name: card.key, stage, mixer, tokens: h * w })]);
    card.mixers = put(mixer); // at once: what is asked from now on is answered by the new one
    this.renew(card);
    const { fresh } = card;
    try {
      await done;
      this.tick('swap');
    } catch (error) {
      if (fresh !== card.fresh) return; // it has been taken back
      card.mixers = put(before);
      card.showWords();
      this.failed = error.message;
      this.say('failed', { error: this.failed });
    }
  }

  restore(card) {
    card.opened = false;
    card.mixers = [...card.model.config.token_mixers];
    this.renew(card);
  }

  renew(card) {
    Object.assign(card, { fresh: {}, compiled: {}, cam: null, who: null, row: null, first: null });
    card.showWords();
    this.run();
  }

  scaleMap(...args) { return scaleMap(...args); }

  close() {
    if (this.film) this.stopFilm();
    Object.assign(this, { device: null, again: false }); // so that it does not begin again
    this.ask.end('closed');
  }

  say(key, values = {}) { // a word, and what stands in it
    this.said = [key, values];
    const text = key ? t(key, values) : '';
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  tick(what) {
    if (this.guided || this.done.has(what)) return; // what the tour does is not the reader's
    this.done.add(what);
    this.showTries();
  }

  showTries() {
    this.tries.replaceChildren();
    add(this.tries, 'h2', {}, t('try'));
    const list = add(this.tries, 'ul', { 'aria-live': 'polite' });
    for (const what of ['drag', 'rub', 'class', 'hear', 'swap', 'inside']) {
      if (this.task.drawn !== 'shapes' && (what === 'drag' || what === 'rub')) continue;
      const done = this.done.has(what), item = add(list, 'li', { class: done ? 'done' : '' }, t(`try ${what}`));
      if (done) add(item, 'b', {}, ` ${t('done')}`);
    }
  }

  showSummary() { // all answers in a line
    this.summary.replaceChildren();
    for (const card of this.list.filter((c) => c.logits && (c === this.inside.card || !this.inside.card))) {
      const percent = Math.round(100 * card.probabilities[card.answer]);
      const one = add(this.summary, 'span', {}, `${card.name} `);
      add(one, 'b', {}, `${className(this.task.class_names[card.answer])}: ${percent} %`);
    }
  }

  showChecked() { // what Python found when it wrote the page
    const { models, checked: { kind, pictures, noise, halves } } = this.task;
    const most = (key) => Math.max(...models.map(({ checked }) => checked[key]));
    const number = (v) => (v < 0.001 ? v.toExponential(0) : v.toPrecision(2)), mb = (n) => (n / 1e6).toFixed(2);
    const size = { mb: mb(models.reduce((n, m) => n + m.weights.length, 0)), halves: mb(halves) };
    const changed = models.reduce((n, { checked }) => n + checked.changed, 0), all = pictures * models.length;
    const found = { move: number(most('move')), most: most('most').toFixed(1), changed, all, pictures };
    this.checked.textContent = `${t(`weights ${kind}`, size)} ${t(noise ? 'checked noise' : 'checked', found)}`;
  }

  showHint() {
    const [h, w] = this.list[0].grid();
    const side = Math.round(this.task.img_size[0] / h);
    this.hint.textContent = this.list[0].grids ? `${t('look at', { h, w, side })} ${t('point')}` : t('point');
  }

  showWords() {
    const five = this.list.length === 5 ? '' : ' one';
    this.title.textContent = this.state.title || t(`title${five}`);
    this.lead.textContent = t(this.inside.card ? 'lead inside' : `lead${five}`);
    for (const tab of this.tabs.children) {
      tab.setAttribute('aria-pressed', String(tab.dataset.task === this.task.name));
    }
    this.tabs.setAttribute('aria-label', t('task'));
    translate(this.root);
    this.stages.value = String(this.stage + 1);
    this.list.forEach((card) => card.showWords());
    this.showTries();
    this.showHint();
    this.showChecked();
    this.showSummary();
    this.inside.show();
    this.say(...(this.said ?? ['']));
  }
}
