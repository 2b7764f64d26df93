// Inside: a model, its stages, blocks and parts, down to the arithmetic of one number of one token. The engine computes;
// here stands what it multiplies and adds, beside what it has found.
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
    tokensOf(canvas, () => ({ grid: this.grid, token: this.place }), (token) => { if (token) this.set({ token, other: null }); }, false);
    this.fields = add(this.where, 'div', { class: 'fields' });
    this.detail = add(root, 'div', { class: 'detail' });
  }

  get at() { return `${this.stage} ${this.block}`; } // what the engine is asked about

  get key() { return `${this.play.generation} ${this.at}`; }

  get grid() { return this.card?.grids?.[this.stage] ?? [1, 1]; }

  get place() { return (this.token ?? this.grid.map((n) => n / 2)).map((v, k) => Math.min(Math.floor(v), this.grid[k] - 1)); }

  get found() { return this.told?.card === this.card && this.told.at === this.at && this.told.fresh === this.card.fresh ? this.told : null; }

  hash(change = {}) { // a link that shows the same
    const { card, stage, block, part, token, number } = { ...this, ...change }, one = (v) => v !== null && v + 1;
    const all = { view: 'inside', task: this.play.task.name, model: (card ?? this.play.pointed).model.name, stage: one(stage),
      block: one(block), part: part ?? '', token: token?.map(one).join('.') ?? '', number: one(number) };
    return String(new URLSearchParams(Object.entries(all).filter(([, v]) => v)));
  }

  enter(card, change = {}) { location.hash = this.hash({ card, ...USUAL, ...change }); }

  take(asked) { // what a link says, whatever stands there; null: closed
    const { play } = this, whole = (v, most) => (Number.isInteger(Number(v)) && v > 0 && v <= most ? v - 1 : null);
    if (!asked) return Object.assign(this, { card: null });
    const task = play.state.tasks.find(({ name }) => name === asked.task);
    if (task && task !== play.task) play.open(task);
    const card = play.list.find(({ model }) => model.name === asked.model) ?? play.pointed;
    const stage = whole(asked.stage, 4), block = stage === null ? null : whole(asked.block, 99), token = asked.token?.split('.').map((v) => whole(v, 999));
    const part = block === null || !PARTS[asked.part] ? null : asked.part;
    if (part !== this.part || card !== this.card || this.at !== `${stage} ${block}`) Object.assign(this, { hidden: null, other: null, what: null, moved: true });
    if (part) play.tick('inside');
    play.pointed = card;
    return Object.assign(this, { card, stage, block, part, number: whole(asked.number, 9999),
      token: token?.length === 2 && !token.includes(null) ? token : null });
  }

  follow() { // to another task: the same model, if there is one
    if (!this.card) return;
    this.card = this.play.list.find(({ model }) => model.name === this.card.model.name) ?? this.play.list[0];
    history.replaceState(null, '', `#${this.hash()}`);
  }

  set(change) {
    Object.assign(this, change);
    history.replaceState(null, '', `#${this.hash()}`);
    this.show();
  }

  next() { // what Play has to do for this view
    const { card } = this, g = this.play.generation;
    if (card.fresh.look !== g) return ['look', card];
    if (this.block >= card.depths[this.stage]) Object.assign(this, { block: null, part: null }); // a link may ask for it
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
    const { root, card, play, found } = this, before = root.contains(document.activeElement) && document.activeElement.dataset.key;
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
    if (this.moved && !again) this.path.scrollIntoView({ block: 'nearest' });
    this.moved = false;
  }

  showPath() { // where we are, and the way back
    const { card, stage, block, part, token, number } = this, mixer = card.mixers[stage];
    const places = [['path', t('play'), () => { location.hash = ''; }], ['model', card.name, () => this.enter(card)]];
    if (stage !== null) places.push(['stage', t('stage n', { n: stage + 1 }), () => this.enter(card, { stage })]);
    if (block !== null) places.push(['block', t('block n', { n: block + 1 }), () => this.enter(card, { stage, block, token, number })]);
    if (part) places.push(['part', this.called(part), null]);
    for (const [key, text, go] of places) {
      const last = key === places.at(-1)[0], button = add(this.path, 'button', { type: 'button', 'data-key': `path ${key}`, ...(last && { 'aria-current': 'page' }) }, text);
      if (go) button.addEventListener('click', go);
    }
    this.head.textContent = places.at(-1)[1];
    const level = part ? `level ${PARTS[part] === 'mixer' ? mixer : PARTS[part]}` : `level ${block !== null ? 'block' : stage !== null ? 'stage' : 'model'}`;
    this.text.textContent = t(level, { mixer });
  }

  called(part) { return part === 'mixer' ? this.card.mixers[this.stage] : t(`part ${part}`); }

  tile(key, name, note, act) { // of the overview: a button, where there is something inside
    const tile = add(this.flow, act ? 'button' : 'div', { class: 'tile', 'data-key': key, ...(act && { type: 'button' }) });
    if (act) tile.addEventListener('click', act);
    const canvas = add(tile, 'canvas', { 'aria-hidden': 'true', width: 8, height: 8 });
    add(tile, 'b', {}, name.replace(/\B[A-Z]/g, '\u00ad$&')); // may be broken there
    add(tile, 'span', { class: 'note' }, note);
    return { tile, canvas };
  }

  showMaps(maps) { // of a model's stages, or of a stage's blocks
    const { card, stage, play } = this, tokens = ([h, w]) => t('tokens', { h, w });
    const draws = (one, values, s) => drawNumbers(one.canvas, values, card.grids[s], ground());
    if (stage === null) {
      drawPicture(this.tile('picture', t('picture'), '').canvas, card.pixels, play.task.img_size);
      maps.forEach((values, s) => draws(this.tile(`stage ${s}`, t('stage n', { n: s + 1 }), `${card.mixers[s]}, ${tokens(card.grids[s])}`,
        () => this.enter(card, { stage: s })), values, s));
      const percent = Math.round(100 * card.probabilities[card.answer]);
      this.tile('answer', t('answer'), `${className(card.task.class_names[card.answer])} ${percent} %`).canvas.remove();
    } else {
      maps.forEach((values, b) => draws(b ? this.tile(`block ${b}`, t('block n', { n: b }), card.mixers[stage],
        () => this.enter(card, { stage, block: b - 1 })) : this.tile('start', t('start'), tokens(card.grids[stage])), values, stage));
    }
  }

  showBlock(numbers) {
    const { card, stage, block, token, play } = this, C = numbers.seen.x[0][3], c = numbers.c = this.number = Math.min(this.number ?? numbers.most(), C - 1);
    for (const part of ['x', ...Object.keys(PARTS)]) {
      const act = part !== 'x' && (() => this.enter(card, { stage, block, part, token, number: this.number }));
      const { tile, canvas } = this.tile(part, this.called(part), say(numbers.token(part)[c]), act);
      if (act) tile.setAttribute('aria-pressed', String(part === this.part));
      drawNumbers(canvas, numbers.channel(part), numbers.grid, ground(), this.place);
    }
    if (!this.part) return;
    drawToken(this.picker, card.pixels, play.task.img_size, this.place, numbers.grid);
    this.steps = numbers.steps(this.part);
    const [row, column] = this.place, picks = Object.fromEntries(this.steps.filter((s) => s.pick).map((s) => [s.pick, s]));
    this.field('row', row, numbers.grid[0], (v) => this.set({ token: [v, column], other: null }));
    this.field('column', column, numbers.grid[1], (v) => this.set({ token: [row, v], other: null }));
    this.field('number', c, C, (number) => this.set({ number, hidden: null, other: null }));
    for (const [pick, step] of Object.entries(picks).sort()) this.field(pick, step.picked, step.grids[0][1].length, (v) => this.set({ [pick]: v, ...(pick === 'hidden' && { other: null }) }));
    this.steps.forEach((step, n) => this.showStep(step, n + 1));
  }

  field(key, value, most, react) { // a number from 1 on
    const label = add(this.fields, 'label');
    add(label, 'span', {}, t(`field ${key}`));
    const input = add(label, 'input', { type: 'number', min: 1, max: most, value: value + 1, 'data-key': `field ${key}` });
    input.addEventListener('change', () => react(Math.min(Math.max(Math.round(input.value) || 1, 1), most) - 1));
  }

  showStep(step, n) {
    const root = add(this.detail, 'section', { class: 'step', 'data-step': step.key });
    add(root, 'p', {}, `${this.steps.length > 1 ? `${n}. ` : ''}${t(`step ${step.key}`, { count: step.grids?.[0][1].length, ...step.values })}`);
    if (step.grids) {
      const row = add(root, 'div', { class: 'grids' }), equal = step.grids.length === 3;
      step.grids.forEach(([name, values], k) => this.showGrid(row, (equal ? ['', '× ', '= '][k] : '') + t(`grid ${name}`), values, step));
    }
    if (step.curve) this.showCurve(root, step.curve);
    const line = add(root, 'p', { class: 'numbers' }, `${step.formula} = `), right = Math.abs(step.result - step.known) < 1e-4 * Math.max(1, Math.abs(step.known));
    add(line, 'b', {}, say(step.result, 4));
    add(line, 'span', { class: 'note' }, ` ${t('network has', { value: say(step.known, 4) })}${right ? '\u00a0✓' : ''}`);
  }

  showGrid(parent, name, values, { shape: [h, w], exact, pick, picked }) {
    const figure = add(parent, 'figure'), most = Math.max(...Array.from(values, Math.abs)) || 1;
    const choose = (k) => { if (pick && k >= 0) this.set({ [pick]: k, ...(pick === 'hidden' && { other: null }) }); };
    add(figure, 'figcaption', {}, name);
    if (exact) {
      const table = add(figure, 'table', { class: pick ? 'cells pick' : 'cells', 'aria-label': name });
      for (let y = 0; y < h; y++) {
        const row = add(table, 'tr');
        for (let x = 0; x < w; x++) {
          const k = y * w + x, cell = add(row, 'td', { style: `background:${cellColor(values[k], most)}`, ...(pick && k === picked && { class: 'picked' }) }, short(values[k]));
          cell.addEventListener('click', () => choose(k));
        }
      }
    } else {
      const canvas = add(figure, 'canvas', { role: 'img', 'aria-label': name, class: pick ? 'pick' : '' });
      drawNumbers(canvas, values, [h, w], ground(), pick ? [Math.floor(picked / w), picked % w] : null);
      canvas.addEventListener('click', (e) => choose(Math.floor(e.offsetY / canvas.clientHeight * h) * w + Math.floor(e.offsetX / canvas.clientWidth * w)));
    }
  }

  showCurve(root, { x, s, b, m }) { // of StarReLU; the sliders ask what would be, and change nothing
    const most = Math.max(2, ...Array.from(x, Math.abs)), box = add(root, 'div', { class: 'curve' });
    const svg = draw(box, 'svg', { viewBox: '0 0 320 180', role: 'img' }), sliders = add(box, 'div', { class: 'fields' });
    const star = (v, now) => now.s * Math.max(v, 0) ** 2 + now.b, own = { s, b }, say4 = (v) => say(v, 4);
    const result = document.createElement('p'), names = {};
    const paint = () => {
      const now = this.what ?? own, ends = [own, now].flatMap((one) => [star(-most, one), star(most, one)]), low = Math.min(0, ...ends), high = Math.max(0.1, ...ends);
      const X = (v) => 160 + v / most * 150, Y = (v) => 170 - (v - low) / (high - low) * 160;
      const points = (one) => Array.from({ length: 61 }, (_, k) => (k / 30 - 1) * most).map((v) => `${X(v).toFixed(1)},${Y(star(v, one)).toFixed(1)}`).join(' ');
      svg.replaceChildren();
      for (const axis of [{ x1: 10, x2: 310, y1: Y(0), y2: Y(0) }, { x1: X(0), x2: X(0), y1: 10, y2: 170 }]) draw(svg, 'line', { ...axis, class: 'tick' });
      draw(svg, 'polyline', { points: points(own) });
      if (this.what) draw(svg, 'polyline', { points: points(now), class: 'right' });
      Array.from(x, (v) => draw(svg, 'circle', { cx: X(v), cy: Y(star(v, now)), r: 2 }));
      draw(svg, 'circle', { cx: X(x[m]), cy: Y(star(x[m], now)), r: 6, class: 'chosen' });
      for (const key of ['s', 'b']) names[key].textContent = `${key} = ${say(now[key], 2)}`;
      svg.setAttribute('aria-label', t('curve', { s: say(now.s), b: say(now.b) }));
      result.textContent = this.what ? t('what if', { s: say(now.s), b: say(now.b), value: say4(star(x[m], now)), before: say4(star(x[m], own)) }) : t('curve help');
    };
    for (const key of ['s', 'b']) {
      const label = add(sliders, 'label'), input = document.createElement('input');
      const name = add(label, 'span');
      names[key] = name;
      Object.assign(label.appendChild(input), { type: 'range', min: -3, max: 3, step: 0.01, value: (this.what ?? own)[key] });
      input.dataset.key = `slider ${key}`;
      input.addEventListener('input', () => { this.what = { ...own, ...this.what, [key]: Number(input.value) }; paint(); });
    }
    const back = add(sliders, 'button', { type: 'button', 'data-key': 'slider back' }, t('as it is'));
    back.addEventListener('click', () => this.set({ what: null }));
    sliders.append(result);
    result.setAttribute('aria-live', 'polite');
    paint();
  }
}
