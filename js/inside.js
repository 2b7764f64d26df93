// Inside: a model, its stages, blocks and parts, down to the arithmetic of one number of one token, beside Play's board.
import { Numbers, say, short } from './arithmetic.js';
import { add, className, draw, ground, t, tokensOf, translate } from './common.js';
import { cellColor, drawNumbers, drawPicture, drawToken } from './views.js';

const PARTS = { norm1: 'norm', mixer: 'mixer', sum1: 'sum', norm2: 'norm', mlp: 'mlp', out: 'sum' }; // of a block

const USUAL = { stage: null, block: null, part: null, token: null, number: null };

export class Inside {
  constructor(play, root) {
    Object.assign(this, { play, root, card: null, ...USUAL, hidden: null, other: null, what: null, steps: [] });
    this.path = add(root, 'div', { class: 'tools', role: 'group', 'data-label': 'path' });
    this.head = add(root, 'h2', { tabindex: -1 });
    this.text = add(root, 'p', { class: 'hint' });
    this.flow = add(root, 'div', { class: 'flow' });
    this.where = add(root, 'div', { class: 'where' });
    const canvas = this.picker = add(this.where, 'canvas', { role: 'img', 'data-label': 'pick', 'data-key': 'pick' });
    const react = (token) => { if (token) this.set({ token, other: null }); };
    tokensOf(canvas, () => ({ grid: this.grid, token: this.place }), react, false);
    this.fields = add(this.where, 'div', { class: 'fields' });
    this.detail = add(root, 'div', { class: 'detail' });
  }

  get at() { return `${this.stage} ${this.block}`; } // what the engine is asked about

  get key() { return `${this.play.generation} ${this.at}`; }

  get grid() { return this.card?.grids?.[this.stage] ?? [1, 1]; }

  get place() { // of the token
    const { grid } = this, token = this.token ?? grid.map((n) => Math.floor(n / 2));
    return token.map((v, k) => Math.min(v, grid[k] - 1));
  }

  get found() { // what was told of this place
    const { told, card, at } = this;
    return told?.card === card && told.at === at && told.fresh === card.fresh ? told : null;
  }

  hash(change = {}) { // a link that shows the same
    const { card, stage, block, part, token, number } = { ...this, ...change }, one = (v) => v !== null && v + 1;
    const { model } = card ?? this.play.pointed, all = { view: 'inside', task: this.play.task.name, model: model.name,
      stage: one(stage), block: one(block), part, token: token?.map(one).join('.'), number: one(number) };
    return String(new URLSearchParams(Object.entries(all).filter(([, v]) => v)));
  }

  enter(card, change = {}) { this.play.address.go(this.hash({ card, ...USUAL, ...change })); }

  take(asked) { // what a link says, whatever stands there; null: closed
    const { play } = this;
    const whole = (v, most = 9999) => (Number.isInteger(Number(v)) && v > 0 && v <= most ? v - 1 : null);
    if (!asked) return Object.assign(this, { card: null });
    const task = play.state.tasks.find(({ name }) => name === asked.task);
    if (task && task !== play.task) play.open(task);
    const card = play.list.find(({ model }) => model.name === asked.model) ?? play.pointed;
    const stage = whole(asked.stage, 4), block = stage === null ? null : whole(asked.block);
    const part = block === null || !PARTS[asked.part] ? null : asked.part;
    const token = (asked.token ?? '').split('.').map((v) => whole(v));
    const known = token.length === 2 && !token.includes(null);
    const same = part === this.part && card === this.card && this.at === `${stage} ${block}`;
    if (!same) Object.assign(this, { hidden: null, other: null, what: null, moved: true });
    if (part) play.tick('inside');
    play.pointed = card;
    return Object.assign(this, { card, stage, block, part, number: whole(asked.number), token: known ? token : null });
  }

  follow() { // to another task: the same model, if there is one
    if (!this.card) return;
    this.card = this.play.list.find(({ model }) => model.name === this.card.model.name) ?? this.play.list[0];
    this.play.address.write(this.hash());
  }

  set(change) {
    Object.assign(this, change);
    this.play.address.write(this.hash());
    this.show();
  }

  next() { // what Play has to do for this view
    const { card } = this, g = this.play.generation;
    if (card.fresh.look !== g) return ['look', card];
    if (this.block >= card.depths[this.stage]) Object.assign(this, { block: null, part: null }); // of a link
    return this.found?.key === this.key ? null : ['inside', card];
  }

  async ask(card) {
    const { key, at, stage, block, play } = this, { fresh } = card, about = { name: card.key, stage };
    const maps = (stages) => Promise.all(stages.map((s) => play.ask('strengths', { ...about, stage: s })));
    let told;
    if (stage === null) told = { maps: (await maps([0, 1, 2, 3])).map((found) => found.at(-1)) };
    else if (block === null) [told] = (await maps([stage])).map((found) => ({ maps: found }));
    else {
      const known = this.found?.weights ?? await play.ask('weights', { ...about, block });
      told = { weights: known, seen: await play.ask('inside', { ...about, block }) };
    }
    if (fresh !== card.fresh || card !== this.card || at !== this.at) return;
    this.told = { ...told, card, at, fresh, key };
    this.show();
  }

  show() {
    const { root, card, play, found } = this, { activeElement } = root.getRootNode();
    const before = root.contains(activeElement) && activeElement.dataset.key;
    root.hidden = !card;
    play.right.classList.toggle('opened', Boolean(card));
    if (!card) return;
    translate(root);
    for (const node of [this.path, this.flow, this.fields, this.detail]) node.replaceChildren();
    this.steps = [];
    this.showPath();
    this.where.hidden = !this.part || !found;
    root.setAttribute('aria-busy', String(!found));
    if (found?.seen) this.showBlock(new Numbers(found, this.place[0] * this.grid[1] + this.place[1], this));
    else if (found) this.showMaps(found.maps);
    const again = before && root.querySelector(`[data-key="${before}"]`);
    if (again) again.focus({ preventScroll: true });
    else if (before || this.moved) this.head.focus({ preventScroll: true });
    const { top } = this.path.getBoundingClientRect();
    if (this.moved && !again && (top < 0 || top > innerHeight / 2)) this.path.scrollIntoView();
    this.moved = false;
  }

  showPath() { // where we are, and the way back
    const { play, card, stage, block, part, token, number } = this;
    const places = [['play', t('play'), () => play.address.go('')], ['model', card.name, () => this.enter(card)]];
    if (stage !== null) places.push(['stage', t('stage n', { n: stage + 1 }), () => this.enter(card, { stage })]);
    const toBlock = () => this.enter(card, { stage, block, token, number });
    if (block !== null) places.push(['block', t('block n', { n: block + 1 }), toBlock]);
    if (part) places.push(['part', this.called(part), () => {}]);
    for (const [key, text, go] of places) {
      const button = add(this.path, 'button', { type: 'button', 'data-key': `path ${key}` }, text);
      button.addEventListener('click', go);
    }
    this.path.lastChild.setAttribute('aria-current', 'page');
    const kind = part ? PARTS[part] : places.at(-1)[0];
    this.head.textContent = places.at(-1)[1];
    this.text.textContent = t(`level ${kind === 'mixer' ? card.mixers[stage] : kind}`);
  }

  called(part) { return part === 'mixer' ? this.card.mixers[this.stage] : t(`part ${part}`); }

  tile(key, name, note, act) { // of the overview: a button, where there is something inside
    const tile = add(this.flow, act ? 'button' : 'div', { class: 'tile', 'data-key': key });
    if (act) tile.type = 'button';
    if (act) tile.addEventListener('click', act);
    const canvas = add(tile, 'canvas', { 'aria-hidden': 'true', width: 8, height: 8 });
    add(tile, 'b', {}, name.replace(/\B[A-Z]/g, '\u00ad$&')); // may be broken there
    add(tile, 'span', { class: 'note' }, note);
    return { tile, canvas };
  }

  showMaps(maps) { // of a model's stages, or of a stage's blocks
    const { card, stage, play } = this, { grids, mixers } = card, tokens = grids.map(([h, w]) => t('tokens', { h, w }));
    const map = (values, s, ...words) => drawNumbers(this.tile(...words).canvas, values, grids[s], ground(this.root));
    if (stage === null) {
      drawPicture(this.tile('picture', t('picture'), '').canvas, card.pixels, play.task.img_size);
      maps.forEach((values, s) => map(values, s, `stage ${s}`, t('stage n', { n: s + 1 }), `${mixers[s]}, ${tokens[s]}`,
        () => this.enter(card, { stage: s })));
      const percent = Math.round(100 * card.probabilities[card.answer]);
      this.tile('answer', t('answer'), `${className(card.task.class_names[card.answer])}: ${percent} %`).canvas.remove();
    } else {
      map(maps[0], stage, 'start', t('start'), tokens[stage]);
      maps.slice(1).forEach((values, block) => map(values, stage, `block ${block}`, t('block n', { n: block + 1 }),
        mixers[stage], () => this.enter(card, { stage, block })));
    }
  }

  showBlock(numbers) {
    const { card, stage, block, token, play } = this, C = numbers.seen.x[0][3];
    const c = Math.min(this.number ?? numbers.most(), C - 1), [row, column] = this.place;
    numbers.c = this.number = c;
    for (const part of ['x', ...Object.keys(PARTS)]) {
      const act = part !== 'x' && (() => this.enter(card, { stage, block, part, token, number: c }));
      const { tile, canvas } = this.tile(part, this.called(part), say(numbers.token(part)[c]), act);
      if (act) tile.setAttribute('aria-pressed', String(part === this.part));
      drawNumbers(canvas, numbers.channel(part), numbers.grid, ground(canvas), this.place);
    }
    if (!this.part) return;
    drawToken(this.picker, card.pixels, play.task.img_size, this.place, numbers.grid);
    const at = `${t('field row')} ${row + 1}, ${t('field column')} ${column + 1}`;
    this.picker.setAttribute('aria-label', `${at}. ${t('pick')}`);
    this.steps = numbers.steps(this.part);
    this.field('row', row, numbers.grid[0], (v) => this.set({ token: [v, column], other: null }));
    this.field('column', column, numbers.grid[1], (v) => this.set({ token: [row, v], other: null }));
    this.field('number', c, C, (number) => this.set({ number, hidden: null, other: null }));
    for (const pick of ['hidden', 'other']) {
      const step = this.steps.find((one) => one.pick === pick);
      if (step) this.field(pick, step.picked, step.grids[0][1].length, (v) => this.choose(pick, v));
    }
    this.steps.forEach((step, n) => this.showStep(step, n + 1));
  }

  choose(pick, k) { // a hidden number, or a token that is heard: for another number there is another one
    this.set(pick === 'hidden' ? { hidden: k, other: null } : { [pick]: k });
  }

  field(key, value, most, react) { // a number from 1 on
    const label = add(this.fields, 'label');
    add(label, 'span', {}, t(`field ${key}`));
    const input = add(label, 'input', { type: 'number', min: 1, max: most, value: value + 1, 'data-key': key });
    const take = () => react(Math.min(Math.max(Math.round(input.value) || 1, 1), most) - 1);
    input.addEventListener('change', take);
    input.addEventListener('keydown', (e) => { // in JupyterLab, Enter is no change
      if (e.key !== 'Enter') return;
      e.preventDefault();
      take();
    });
  }

  showStep(step, n) {
    const root = add(this.detail, 'section', { class: 'step', 'data-step': step.key });
    const text = t(`step ${step.key}`, { count: step.grids?.[0][1].length, ...step.values });
    add(root, 'p', {}, this.steps.length > 1 ? `${n}. ${text}` : text);
    if (step.grids) {
      const row = add(root, 'div', { class: 'grids' }), signs = step.grids.length === 3 ? ['', '× ', '= '] : ['', ''];
      step.grids.forEach(([name, values], k) => this.showGrid(row, signs[k] + t(`grid ${name}`), values, step));
    }
    if (step.curve) this.showCurve(root, step.curve);
    const line = add(root, 'p', { class: 'numbers' }, `${step.formula} = `);
    const has = t('network has', { value: say(step.known, 4) });
    const right = Math.abs(step.result - step.known) < 1e-4 * Math.max(1, Math.abs(step.known));
    add(line, 'b', {}, say(step.result, 4));
    add(line, 'span', { class: 'note' }, ` ${has}${right ? '\u00a0✓' : ''}`);
  }

  showGrid(parent, name, values, { shape: [h, w], exact, pick, picked }) {
    const figure = add(parent, 'figure'), most = Math.max(...Array.from(values, Math.abs)) || 1;
    add(figure, 'figcaption', {}, name);
    if (exact) {
      const table = add(figure, 'table', { class: pick ? 'cells pick' : 'cells', 'aria-label': name });
      for (let y = 0; y < h; y++) {
        const row = add(table, 'tr');
        for (let x = 0; x < w; x++) {
          const k = y * w + x, style = `background:${cellColor(values[k], most)}`;
          const cell = add(row, 'td', { style, class: k === picked ? 'picked' : '' }, short(values[k]));
          if (pick) cell.addEventListener('click', () => this.choose(pick, k));
        }
      }
    } else {
      const canvas = add(figure, 'canvas', { role: 'img', 'aria-label': name, class: pick ? 'pick' : '' });
      drawNumbers(canvas, values, [h, w], ground(canvas), pick ? [Math.floor(picked / w), picked % w] : null);
      const at = (e) => [e.offsetY / canvas.clientHeight * h, e.offsetX / canvas.clientWidth * w].map(Math.floor);
      if (pick) canvas.addEventListener('click', (e) => this.choose(pick, at(e)[0] * w + at(e)[1]));
    }
  }

  showCurve(root, { x, s, b, m }) { // of StarReLU; the sliders ask what would be, and change nothing
    const most = Math.max(2, ...Array.from(x, Math.abs)), box = add(root, 'div', { class: 'curve' });
    const svg = draw(box, 'svg', { viewBox: '0 0 320 180', role: 'img' });
    const sliders = add(box, 'div', { class: 'fields' });
    const star = (v, now) => now.s * Math.max(v, 0) ** 2 + now.b, own = { s, b };
    const steps = Array.from({ length: 61 }, (_, k) => (k / 30 - 1) * most); // along the curve
    const result = document.createElement('p'), names = {};
    const paint = () => {
      const now = this.what ?? own, ends = [own, now].flatMap((one) => [star(-most, one), star(most, one)]);
      const low = Math.min(0, ...ends), high = Math.max(0.1, ...ends);
      const X = (v) => 160 + v / most * 150, Y = (v) => 170 - (v - low) / (high - low) * 160;
      const points = (one) => steps.map((v) => `${X(v).toFixed(1)},${Y(star(v, one)).toFixed(1)}`).join(' ');
      svg.replaceChildren();
      draw(svg, 'line', { x1: 10, x2: 310, y1: Y(0), y2: Y(0), class: 'tick' });
      draw(svg, 'line', { x1: X(0), x2: X(0), y1: 10, y2: 170, class: 'tick' });
      draw(svg, 'polyline', { points: points(own) });
      if (this.what) draw(svg, 'polyline', { points: points(now), class: 'right' });
      Array.from(x, (v) => draw(svg, 'circle', { cx: X(v), cy: Y(star(v, now)), r: 2 }));
      draw(svg, 'circle', { cx: X(x[m]), cy: Y(star(x[m], now)), r: 6, class: 'chosen' });
      for (const key of ['s', 'b']) names[key].textContent = `${key} = ${say(now[key], 2)}`;
      svg.setAttribute('aria-label', t('curve', { s: say(now.s), b: say(now.b) }));
      const [value, before] = [now, own].map((one) => say(star(x[m], one), 4));
      result.textContent = t(this.what ? 'what if' : 'curve help', { s: say(now.s), b: say(now.b), value, before });
    };
    for (const key of ['s', 'b']) {
      const label = add(sliders, 'label');
      names[key] = add(label, 'span');
      const range = { type: 'range', min: -3, max: 3, step: 0.01, 'data-key': `slider ${key}` };
      const input = add(label, 'input', { ...range, value: (this.what ?? own)[key] });
      input.addEventListener('input', () => {
        this.what = { ...own, ...this.what, [key]: Number(input.value) };
        paint();
      });
    }
    const back = add(sliders, 'button', { type: 'button', 'data-key': 'slider back' }, t('as it is'));
    back.addEventListener('click', () => this.set({ what: null }));
    sliders.append(result);
    result.setAttribute('aria-live', 'polite');
    paint();
  }
}
