// What the views share: words in two languages, elements, and a worker that is asked by promises.
import words from './words.json';

export { words };

export const tongue = { now: navigator.language?.startsWith('zh') ? 'zh' : 'en' };

export const t = (key, values = {}) =>
  (words[tongue.now][key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name]);
export const className = (name) => (tongue.now === 'zh' && words.classes[name]) || name;

export function add(parent, tag, attributes = {}, text = '') {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return parent.appendChild(node);
}

export function draw(parent, tag, attributes, text = '') { // in an svg
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return parent.appendChild(node);
}

export function choice(parent, key, options, react) { // a list with a name
  const label = add(parent, 'label');
  add(label, 'span', { 'data-word': key });
  const select = add(label, 'select');
  for (const [value, word] of options) add(select, 'option', { value, ...(word && { 'data-word': word }) }, value);
  select.addEventListener('change', () => react(select.value));
  return select;
}

// A canvas that shows h × w tokens: a pointer or the arrow keys choose one. now() → { grid, token }, react(token | null)
export function tokensOf(canvas, now, react, hover = true) {
  const within = (v, n) => Math.min(Math.max(v, 0), n - 1);
  const at = (e) => {
    const box = canvas.getBoundingClientRect(), [h, w] = now().grid;
    const [row, column] = [(e.clientY - box.top) / box.height * h, (e.clientX - box.left) / box.width * w].map(Math.floor);
    return [within(row, h), within(column, w)];
  };
  canvas.tabIndex = 0;
  canvas.addEventListener('pointermove', (e) => { if (hover || e.buttons) react(at(e)); });
  canvas.addEventListener('pointerdown', (e) => react(at(e)));
  canvas.addEventListener('keydown', (e) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    if (e.key === 'Escape') react(null);
    if (!step) return;
    e.preventDefault();
    const { grid: [h, w], token } = now(), [r, c] = token ?? [Math.floor(h / 2), Math.floor(w / 2)];
    react([within(r + step[0], h), within(c + step[1], w)]);
  });
}

export function translate(root) { // what says by an attribute which word it is
  for (const node of root.querySelectorAll('[data-word]')) node.textContent = t(node.dataset.word);
  for (const node of root.querySelectorAll('[data-label]')) node.setAttribute('aria-label', t(node.dataset.label));
  for (const node of root.querySelectorAll('[data-class]')) {
    const name = className(node.dataset.class);
    Object.assign(node, { title: name, ariaLabel: name });
  }
  for (const node of root.querySelectorAll('[data-colour]')) {
    const name = tongue.now === 'zh' ? words.colours[node.dataset.colour][1] : node.dataset.colour;
    Object.assign(node, { title: name, ariaLabel: name });
  }
}

export function ground(node) { // behind numbers: as page.css has it around this element
  const { colorScheme } = getComputedStyle(node);
  const { matches } = matchMedia('(prefers-color-scheme: dark)');
  return (colorScheme === 'light dark' ? matches : colorScheme === 'dark') ? [30, 32, 36] : [255, 255, 255];
}

export function assistant() { // this script again, beside the page: the build makes one function of it, `metaformer`
  const waiting = new Map(), text = new Blob([`(${metaformer})()`], { type: 'text/javascript' });
  const address = URL.createObjectURL(text), worker = new Worker(address);
  let over = null; // why it answers no more
  worker.addEventListener('message', () => URL.revokeObjectURL(address), { once: true });
  worker.onmessage = ({ data: { id, value, error } }) => {
    const [resolve, reject] = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Error(error)); else resolve(value);
  };
  const end = (why) => {
    over = new Error(why);
    worker.terminate();
    URL.revokeObjectURL(address);
    for (const [, reject] of waiting.values()) reject(over);
    waiting.clear();
  };
  worker.onerror = ({ message }) => end(message || 'the worker ended');
  const ask = (action, request = {}) => new Promise((resolve, reject) => {
    if (over) throw over;
    waiting.set(waiting.id = (waiting.id ?? 0) + 1, [resolve, reject]);
    worker.postMessage({ id: waiting.id, action, request });
  });
  return Object.assign(ask, { end });
}
