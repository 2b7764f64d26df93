// The page: Play and Learn, one at a time, in a page of its own or in a cell of a notebook.
import { add, t, tongue, translate } from './common.js';
import { Learn } from './learn_view.js';
import { Play } from './play.js';
import { Tour } from './tour.js';
import { work } from './worker.js';

// Which view is shown, and what of it: the part of the page's address behind #
const ADDRESS = {
  word: 'link',
  get now() { return location.hash.slice(1); },
  go(view) { location.hash = view; },
  write(view) { history.replaceState(null, '', `#${view}`); }, // without a further entry in the history
  listen(react) { addEventListener('hashchange', react); },
};

class App {
  constructor(root, state, address) {
    Object.assign(this, { root, address });
    const nav = add(root, 'nav', { class: 'views' });
    const hash = { play: () => '', inside: () => this.views.play.inside.hash(), learn: () => this.views.learn.hash() };
    this.buttons = Object.keys(hash).map((name) => {
      const button = add(nav, 'button', { type: 'button', 'data-word': name, 'data-view': name });
      button.addEventListener('click', () => address.go(hash[name]()));
      return button;
    });
    this.guide = add(nav, 'button', { type: 'button', 'data-word': 'tour' });
    this.guide.addEventListener('click', () => this.tour.start());
    this.tongue = add(nav, 'button', { type: 'button', class: 'tongue', 'data-word': 'language' });
    this.tongue.addEventListener('click', () => {
      tongue.now = tongue.now === 'en' ? 'zh' : 'en';
      this.showWords();
    });
    this.nav = nav;
    const sections = Object.fromEntries(['play', 'learn'].map((name) => [name, add(root, 'div', { hidden: '' })]));
    sections[this.asked().page].hidden = false;
    this.views = { play: new Play(sections.play, state, address), learn: new Learn(sections.learn, address, state.digits) };
    this.tour = new Tour(root, this);
    address.listen(() => this.show());
    this.show();
  }

  asked() { // the view, and its settings
    const found = Object.fromEntries(new URLSearchParams(this.address.now));
    const view = ['inside', 'learn'].find((name) => name === found.view) ?? 'play';
    return { ...found, view, page: view === 'learn' ? 'learn' : 'play' }; // what is inside stands beside Play's board
  }

  show() {
    const asked = this.asked();
    for (const button of this.buttons) button.setAttribute('aria-pressed', String(button.dataset.view === asked.view));
    for (const [name, view] of Object.entries(this.views)) view.root.hidden = name !== asked.page;
    this.view = this.views[asked.page];
    if (asked.view === 'learn') this.view.take(asked);
    else this.view.inside.take(asked.view === 'inside' ? asked : null);
    this.showWords();
    this.view.run();
  }

  showWords() {
    this.root.lang = tongue.now === 'zh' ? 'zh-CN' : 'en';
    translate(this.nav);
    for (const part of [...Object.values(this.views), this.tour]) part.showWords();
    this.address.said?.(this);
  }

  close() { // the workers end
    for (const view of Object.values(this.views)) view.close();
    if (!this.tour.root.hidden) this.tour.show(false);
  }
}

function open() { // the page of a file
  const state = JSON.parse(document.getElementById('state').textContent);
  ADDRESS.said = ({ root, view }) => {
    document.documentElement.lang = root.lang;
    document.title = view.title.textContent;
  };
  globalThis.__app = new App(document.getElementById('page'), state, ADDRESS);
  globalThis.__page = globalThis.__app.views.play;
}

// --- in a notebook ---

class OwnAddress { // of a widget: its trait `view`
  constructor(model) { Object.assign(this, { model, word: 'link widget' }); }

  get now() { return this.model.get('view'); }

  write(view) {
    this.quiet = true; // who writes it knows it
    this.model.set('view', view);
    this.quiet = false;
    this.model.save_changes();
  }

  go(view) {
    this.write(view);
    this.react();
  }

  listen(react) {
    this.react = react;
    this.heard = () => { if (!this.quiet) react(); };
    this.model.on('change:view', this.heard);
  }

  end() { this.model.off('change:view', this.heard); }
}

function opened({ tasks, ...state }) { // weights arrive as bytes in a message
  const bytes = ({ buffer, byteOffset, byteLength }) => new Uint8Array(buffer, byteOffset, byteLength).slice();
  const whole = (task) => ({ ...task, models: task.models.map((m) => ({ ...m, weights: bytes(m.weights) })) });
  return { ...state, tasks: tasks.map(whole) };
}

function isDark(el) { // the notebook: light letters
  el.style.color = 'var(--colab-primary-text-color, var(--jp-content-font-color1, inherit))';
  const { color } = getComputedStyle(el.isConnected ? el : document.body); // the cell may be put there later
  const [r, g, b] = color.match(/[\d.]+/g).map(Number);
  return 0.3 * r + 0.6 * g + 0.1 * b > 127;
}

// What anywidget asks for. A shadow root keeps the page's style to itself, and the notebook's away from it.
export const widget = (style) => ({
  render({ model, el }) {
    const host = add(el, 'div', { class: 'edu-page', 'data-lm-suppress-shortcuts': 'true' }); // keys are for the page
    const shadow = host.attachShadow({ mode: 'open' }), address = new OwnAddress(model);
    add(shadow, 'style', {}, style);
    const root = add(shadow, 'div', { id: 'page' });
    host.style.colorScheme = isDark(el) ? 'dark' : 'light';
    const app = host.__app = new App(root, opened(model.get('state')), address);
    root.addEventListener('click', (e) => { // links of the page lead to its views
      const link = e.target.closest('a[href^="#"]');
      if (!link) return;
      e.preventDefault();
      address.go(link.getAttribute('href').slice(1));
    });
    const follow = () => {
      const now = isDark(el) ? 'dark' : 'light';
      if (host.style.colorScheme === now) return;
      host.style.colorScheme = now;
      app.showWords(); // which draws what has a ground
    };
    const theme = new MutationObserver(follow);
    requestAnimationFrame(follow);
    for (const node of [document.documentElement, document.body]) theme.observe(node, { attributes: true });
    return () => {
      theme.disconnect();
      address.end();
      app.close();
    };
  },
});

if (typeof document === 'undefined') work();
else if (document.getElementById('letters')) open();
