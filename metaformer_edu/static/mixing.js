// Who hears whom: a token under the pointer, its row and its column of every mixer's matrix over the picture.
// Numbers come as int16 steps, for each panel either a k×k window a token (window = k) or all pairs (window = 0).

// From faint to strong: positive, negative (RdBu, safe for colour-blind eyes), and strength without a sign.
const COLOURS = {
  positive: [[253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31]],
  negative: [[209, 229, 240], [146, 197, 222], [67, 147, 195], [33, 102, 172], [5, 48, 97]],
  strength: [[226, 226, 239], [182, 182, 216], [134, 131, 189], [97, 64, 155], [63, 0, 125]],
};
const STEPS = 32767;

const add = (parent, tag, attributes = {}, text = '') => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return parent.appendChild(node);
};

// Strength 0 to 1 in 256 steps → RGBA. The picture shines through; what is faint is pale, and only 0 is nothing.
const RAMPS = Object.fromEntries(Object.entries(COLOURS).map(([kind, stops]) => [kind, Uint32Array.from({ length: 256 }, (_, i) => {
  const t = i / 255, left = Math.min(3, Math.floor(4 * t)), share = 4 * t - left;
  const mixed = stops[left].map((c, k) => Math.round(c + share * (stops[left + 1][k] - c)));
  return i && new Uint32Array(Uint8Array.from([...mixed, Math.round(255 * (0.5 + 0.4 * t))]).buffer)[0];
})]));

function color(panel, value, limit) {
  const i = value === 0 ? 0 : Math.max(1, Math.min(255, Math.round(255 * Math.abs(value) / limit)));
  return RAMPS[panel.signed ? value < 0 ? 'negative' : 'positive' : 'strength'][i];
}

// --- numbers ---

function unpack(place, data) {
  const bytes = data instanceof DataView ? data : new DataView(data.buffer ?? data, data.byteOffset ?? 0, data.byteLength);
  const copy = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength); // int16 wants an even address
  let start = 0;
  return place.panels.map((panel) => {
    const numbers = new Int16Array(copy, 2 * start, panel.count);
    start += panel.count;
    const [rows, columns] = panel.grid;
    return { ...panel, numbers, hears: new Float64Array(rows * columns), heard: new Float64Array(rows * columns) };
  });
}

// the token of the place's grid as a token, or group of tokens, of the panel
const within = (panel, grid, token) => token.map((t, i) => Math.floor(Math.floor((t + 0.5) * panel.tokens[i] / grid[i]) / panel.group));

function fill(panel, [row, column]) {
  const { numbers, step, window: k, hears, heard, grid: [rows, columns] } = panel;
  const at = row * columns + column, n = rows * columns;
  if (!k) {
    for (let j = 0; j < n; j++) {
      hears[j] = numbers[at * n + j] * step;
      heard[j] = numbers[j * n + at] * step;
    }
    return;
  }
  hears.fill(0), heard.fill(0);
  const reach = (k - 1) / 2;
  for (let a = 0; a < k; a++) {
    for (let b = 0; b < k; b++) {
      const down = a - reach, right = b - reach, o = a * k + b;
      if (row + down >= 0 && row + down < rows && column + right >= 0 && column + right < columns) {
        hears[at + down * columns + right] = numbers[at * k * k + o] * step;
      }
      if (row - down >= 0 && row - down < rows && column - right >= 0 && column - right < columns) {
        const i = at - down * columns - right;
        heard[i] = numbers[i * k * k + o] * step;
      }
    }
  }
}

function sum(values) {
  let count = 0, best = 0;
  for (let j = 0; j < values.length; j++) {
    if (values[j] !== 0) count++;
    if (Math.abs(values[j]) > Math.abs(values[best])) best = j;
  }
  return { count, best, value: values[best] };
}

// who is loudest: the strengths of each column of the matrix, added up
function loudness(panel) {
  const { numbers, window: k, grid: [rows, columns] } = panel, n = rows * columns, total = new Float64Array(n);
  if (!k) for (let i = 0; i < n * n; i++) total[i % n] += Math.abs(numbers[i]);
  return total;
}

// --- words; `words` in widgets/mixing_explorer says the same ---

const number = (v) => (v === 0 || Math.abs(v) >= 0.001 ? v.toFixed(3) : v.toExponential(1));

function where(panel, j) {
  const columns = panel.grid[1], spans = [Math.floor(j / columns), j % columns].map((first, i) => {
    const from = first * panel.group, to = Math.min(from + panel.group, panel.tokens[i]) - 1;
    return from === to ? `${['row', 'column'][i]} ${from}` : `${['rows', 'columns'][i]} ${from} to ${to}`;
  });
  return spans.join(', ');
}

function sentence(panel) {
  if (panel.why) return `${panel.label}: ${panel.why}`;
  const { hearing: { count, best, value }, hearers, at } = panel;
  const unit = (n) => `${n} ${panel.group > 1 ? 'group' : 'token'}${n === 1 ? '' : 's'}`;
  if (!count) return `${panel.label} hears nobody and is heard by ${unit(hearers.count)}.`;
  const most = best === at ? 'itself' : where(panel, best);
  return `${panel.label} hears ${unit(count)}, most of all ${most} (${number(value)}), and is heard by ${unit(hearers.count)}.`;
}

// --- what to try ---

const of = (state, ...kinds) => state.panels.filter((p) => !p.why && kinds.includes(p.mixer));
const TRIES = [
  { kinds: ['Pooling'], text: 'Put the token into a corner: whom does Pooling hear now, and how strongly?',
    test: (s) => s.token.every((t, i) => t === 0 || t === s.grid[i] - 1) && of(s, 'Pooling').length },
  { kinds: ['Attention'], text: 'Find a token that Attention lets hear itself most.',
    test: (s) => of(s, 'Attention').some((p) => p.hears.length > 1 && p.hearing.best === p.at) },
  { kinds: ['Attention'], text: 'Find one of the loudest tokens of Attention: most of the lower picture lights up.',
    test: (s) => of(s, 'Attention').some((p) => {
      const total = p.loudness ??= loudness(p);
      return total.filter((t) => t > total[p.at]).length < Math.max(1, total.length / 20);
    }) },
  { kinds: ['SepConv'], text: 'Find a stage, and a token in it, where SepConv hears every token.',
    test: (s) => of(s, 'SepConv').some((p) => p.hears.length > 1 && p.hearing.count === p.hears.length) },
  { kinds: [], text: 'Look at every stage.', test: (s) => s.stages.every((stage) => s.seen.has(stage)) },
];

// --- the page ---

function render({ model, el }) {
  el.classList.add('edu-mixing');
  const choices = add(el, 'div', { class: 'edu-choices' });
  const select = (name) => {
    const id = `edu-${name}-${Math.random().toString(36).slice(2)}`, both = add(choices, 'span', { class: 'edu-choice' });
    add(both, 'label', { for: id }, name);
    return add(both, 'select', { id });
  };
  const stages = select('stage'), blocks = select('block');
  const common = add(choices, 'label'), box = add(common, 'input', { type: 'checkbox' });
  common.append('one scale for all');
  // JupyterLab would take the arrow keys for itself
  const board = add(el, 'div', { class: 'edu-panels', tabindex: 0, role: 'application', 'data-lm-suppress-shortcuts': 'true',
    'aria-roledescription': 'grid of tokens', 'aria-label': 'Who hears whom. Arrow keys choose a token; Home and End go to the ends of its row, with Control to the first and the last token.' });
  const words = add(el, 'p', { class: 'edu-words', role: 'status', 'aria-live': 'polite' });
  const list = add(el, 'ul', { 'aria-label': 'Try this' });

  const photo = document.createElement('canvas'), small = document.createElement('canvas');
  const state = { panels: [], grid: [1, 1], token: [0, 0], seen: new Set(), kinds: new Set(), stages: [] };
  const times = [], done = new Set(model.get('done') ?? []);
  let frame = 0, asked = null, slow = 0, rest = 0, calm = 0, touched = false, working = false, handled = 0;

  function fillChoices() {
    const all = model.get('choices') ?? [], options = (node, values, chosen) => {
      node.replaceChildren(...values.map((v) => new Option(v, v, false, v === chosen)));
      node.disabled = values.length < 2;
    };
    const [stage, block] = [model.get('stage'), model.get('block')];
    state.stages = [...new Set(all.map(([s]) => s))];
    options(stages, state.stages, stage);
    options(blocks, all.filter(([s]) => s === stage).map(([, b]) => b), block);
  }

  function ask(stage, block) {
    touched = true;
    saveToken();
    asked = (model.get('ask')?.[2] ?? 0) + 1;
    model.set('ask', [stage, block, asked]), model.set('stage', stage), model.set('block', block);
    model.save_changes();
    wait();
  }

  function wait() {
    clearTimeout(slow);
    const busy = asked !== null || model.get('busy');
    board.setAttribute('aria-busy', busy);
    if (busy) slow = setTimeout(() => { working = true; board.classList.add('edu-old'); words.textContent = 'working …'; }, 500);
    else working = false, board.classList.remove('edu-old'), say();
  }

  function takePicture() {
    const [height, width] = model.get('size'), bytes = model.get('picture');
    if (!height) return;
    const grey = new Uint8Array(bytes.buffer ?? bytes, bytes.byteOffset ?? 0, bytes.byteLength);
    photo.width = width, photo.height = height;
    const image = new ImageData(width, height), rgba = new Uint32Array(image.data.buffer);
    // paler than it is, so that colours are seen on it
    for (let i = 0; i < grey.length; i++) {
      const g = 110 + 0.5 * grey[i];
      rgba[i] = (255 << 24) | (g << 16) | (g << 8) | g;
    }
    photo.getContext('2d').putImageData(image, 0, 0);
    resize();
  }

  function takePlace() {
    const place = model.get('place') ?? {};
    if (!place.panels) return;
    if (place.ask >= asked) asked = null;
    state.panels = unpack(place, model.get('data'));
    state.grid = place.grid;
    state.seen.add(place.stage);
    for (const p of state.panels) if (!p.why) state.kinds.add(p.mixer);
    board.replaceChildren();
    board.style.setProperty('--panels', Math.min(6, Math.max(3, state.panels.length)));
    state.panels.forEach(build);
    el.dataset.place = `${place.stage},${place.block}`;
    fillChoices(), takeToken(), wait(), resize();
  }

  function build(panel) {
    const node = add(board, 'div', { class: 'edu-panel', role: 'group', 'aria-label': panel.label });
    add(node, 'div', { class: 'edu-title' }, panel.title);
    add(node, 'div', { class: 'edu-note' }, panel.note);
    if (panel.why) return void add(node, 'div', { class: 'edu-caption' }, panel.why);
    panel.maps = ['hears', 'heard'].map((which) => {
      const caption = add(node, 'div', { class: 'edu-caption' });
      const canvas = add(node, 'canvas', { class: 'edu-map', role: 'img', 'data-map': which,
        'aria-label': `${panel.label}: ${which === 'hears' ? 'whom the token hears' : 'who hears the token'}` });
      for (const kind of ['pointermove', 'pointerdown']) canvas.addEventListener(kind, point);
      return { which, caption, canvas, context: canvas.getContext('2d') };
    });
    panel.legend = add(node, 'canvas', { class: 'edu-legend', width: 101, height: 1, 'aria-hidden': 'true' });
    panel.ends = add(node, 'div', { class: 'edu-ends' });
  }

  // --- choosing a token ---

  function choose(token, quietly) {
    handled = performance.now();
    touched = true;
    state.token = token.map((t, i) => Math.max(0, Math.min(state.grid[i] - 1, t)));
    words.setAttribute('aria-live', quietly ? 'off' : 'polite'); // a pointer would flood a screen reader
    model.set('token', [...state.token]);
    clearTimeout(rest);
    rest = setTimeout(saveToken, 150); // the kernel need not know each step
    settle(), soon();
    el.dataset.handler = (performance.now() - handled).toFixed(3);
  }

  function saveToken() {
    clearTimeout(rest);
    if (asked === null) model.save_changes();
  }

  function point(event) {
    const area = event.currentTarget.getBoundingClientRect();
    const share = [(event.clientY - area.top) / area.height, (event.clientX - area.left) / area.width];
    const token = share.map((s, i) => Math.max(0, Math.min(state.grid[i] - 1, Math.floor(s * state.grid[i]))));
    if (event.type === 'pointerdown' || token.some((t, i) => t !== state.token[i])) choose(token, true);
  }

  function press(event) {
    const [row, column] = state.token, [rows, columns] = state.grid;
    const moves = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [event.ctrlKey ? 0 : row, 0], End: [event.ctrlKey ? rows - 1 : row, columns - 1] };
    if (!moves[event.key] || event.altKey || event.metaKey) return;
    event.preventDefault(), event.stopPropagation();
    choose(moves[event.key], false);
  }

  function takeToken() {
    const token = model.get('token');
    if (token?.length === 2) state.token = token.map((t, i) => Math.max(0, Math.min(state.grid[i] - 1, t)));
    settle(), soon();
  }

  function settle() { // to pass by is not to find
    clearTimeout(calm);
    if (touched) calm = setTimeout(tick, 200);
    else tick();
  }

  // --- drawing ---

  const density = () => Math.min(2, window.devicePixelRatio || 1); // canvas pixels for one of the page

  function resize() {
    for (const { maps } of state.panels) {
      for (const { canvas } of maps ?? []) {
        const wide = Math.round(canvas.clientWidth * density()) || 160;
        const high = Math.round(wide * (photo.height || 1) / (photo.width || 1));
        if (canvas.width !== wide || canvas.height !== high) canvas.width = wide, canvas.height = high;
        canvas.style.aspectRatio = `${photo.width || 1} / ${photo.height || 1}`;
      }
    }
    drawLegends(), soon();
  }

  const limitOf = (panel) => STEPS * (box.checked ? Math.max(...state.panels.map((p) => p.step)) : panel.step);

  function drawLegends() {
    for (const panel of state.panels) {
      if (panel.why) continue;
      const limit = limitOf(panel), low = panel.negative ? -limit : 0, context = panel.legend.getContext('2d');
      const image = new ImageData(101, 1), rgba = new Uint32Array(image.data.buffer);
      for (let i = 0; i < 101; i++) rgba[i] = color(panel, low + (limit - low) * i / 100, limit);
      small.width = 101, small.height = 1, small.getContext('2d').putImageData(image, 0, 0);
      context.fillStyle = '#c4c4c4', context.fillRect(0, 0, 101, 1), context.drawImage(small, 0, 0);
      panel.ends.replaceChildren();
      for (const end of panel.negative ? [low, 0, limit] : [0, limit]) add(panel.ends, 'span', {}, end === 0 ? '0' : number(end));
    }
  }

  function soon() { frame ||= requestAnimationFrame(draw); }

  function draw() {
    const start = performance.now();
    cancelAnimationFrame(frame), frame = 0;
    for (const panel of state.panels) {
      if (panel.why) continue;
      const token = within(panel, state.grid, state.token);
      panel.at = token[0] * panel.grid[1] + token[1];
      fill(panel, token);
      panel.hearing = sum(panel.hears), panel.hearers = sum(panel.heard);
      for (const map of panel.maps) paint(panel, map, token);
    }
    say();
    if (handled) count(performance.now() - start + Number(el.dataset.handler));
  }

  function count(time) { // of a step of the token: event and drawing, in ms
    handled = 0, times.push(time);
    if (times.length > 500) times.shift();
    const sorted = [...times].sort((a, b) => a - b);
    el.dataset.moveLast = time.toFixed(2), el.dataset.moves = times.length;
    el.dataset.moveMedian = sorted[sorted.length >> 1].toFixed(2), el.dataset.moveWorst = sorted.at(-1).toFixed(2);
  }

  function paint(panel, { which, caption, canvas, context }, [row, column]) {
    const [rows, columns] = panel.grid, values = panel[which], limit = limitOf(panel), { width, height } = canvas;
    const image = new ImageData(columns, rows), rgba = new Uint32Array(image.data.buffer);
    for (let j = 0; j < values.length; j++) rgba[j] = color(panel, values[j], limit);
    small.width = columns, small.height = rows, small.getContext('2d').putImageData(image, 0, 0);
    const high = height / panel.tokens[0] * panel.group, wide = width / panel.tokens[1] * panel.group; // of a cell
    context.imageSmoothingEnabled = true;
    context.drawImage(photo, 0, 0, width, height);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, columns * wide, rows * high);
    // around a small token with space for its neighbours
    const size = wide / density(), around = size < 4 ? 5 : size < 8 ? 3 : 1, w = around * wide, h = around * high;
    for (const [style, line] of [['#000000', 4], ['#ffdd00', 2]]) {
      context.strokeStyle = style, context.lineWidth = line;
      context.strokeRect((column + 0.5) * wide - w / 2, (row + 0.5) * high - h / 2, w, h);
    }
    const { count } = which === 'hears' ? panel.hearing : panel.hearers;
    caption.textContent = `${which === 'hears' ? 'hears' : 'is heard by'} ${count} of ${values.length}`;
  }

  function say() {
    if (working || !state.panels.length || !state.panels.some((p) => p.hearing || p.why)) return;
    const fault = model.get('fault'), [row, column] = state.token, [rows, columns] = state.grid;
    words.textContent = fault || [`Token row ${row}, column ${column} of ${rows}×${columns}.`, ...state.panels.map(sentence)].join(' ');
  }

  function tick() {
    if (frame) draw();
    const shown = TRIES.filter((t) => (t.kinds.length ? t.kinds.some((k) => state.kinds.has(k)) : state.stages.length > 1));
    for (const { text, test } of touched ? shown : []) {
      if (done.has(text) || !test(state)) continue;
      done.add(text), model.set('done', [...done]);
      if (asked === null) model.save_changes();
    }
    const now = shown.map((t) => t.text + done.has(t.text)).join();
    if (list.dataset.now === now) return;
    list.dataset.now = now, list.replaceChildren();
    for (const { text } of shown) {
      const item = add(list, 'li', { class: done.has(text) ? 'edu-done' : '' }, text);
      if (done.has(text)) add(item, 'b', {}, ' Done.');
    }
  }

  // --- start ---

  const firstBlock = (stage) => (model.get('choices') ?? []).find(([s]) => s === stage)?.[1] ?? 1;
  stages.addEventListener('change', () => ask(Number(stages.value), firstBlock(Number(stages.value))));
  blocks.addEventListener('change', () => ask(Number(stages.value), Number(blocks.value)));
  box.addEventListener('change', () => { drawLegends(), soon(); });
  board.addEventListener('keydown', press);
  const reactions = { place: takePlace, size: takePicture, picture: takePicture, token: takeToken,
    choices: fillChoices, stage: fillChoices, block: fillChoices, busy: wait, fault: () => { if (model.get('fault')) asked = null; wait(); } };
  for (const [name, react] of Object.entries(reactions)) model.on(`change:${name}`, react);
  const watch = new ResizeObserver(resize);
  watch.observe(board);
  fillChoices(), takePicture(), takePlace();
  el.__mixing = { // for tests
    state, values: (panel, which) => Array.from(state.panels[panel][which]), words: () => words.textContent, flush: () => { draw(), tick(); },
  };
  return () => {
    watch.disconnect(), cancelAnimationFrame(frame), [slow, rest, calm].forEach(clearTimeout);
    for (const [name, react] of Object.entries(reactions)) model.off(`change:${name}`, react);
  };
}

export default { render };
