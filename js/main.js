// The page: Play and Learn, one at a time. The part of the address behind # says which, and what it shows.
import { add, t, tongue, translate } from './common.js';
import { Learn } from './learn_view.js';
import { Play } from './play.js';
import { Tour } from './tour.js';
import { work } from './worker.js';

class App {
  constructor(root, state) {
    const nav = add(root, 'nav', { class: 'views' });
    const hash = { play: () => '', inside: () => this.views.play.inside.hash(), learn: () => this.views.learn.hash() };
    this.buttons = Object.keys(hash).map((name) => {
      const button = add(nav, 'button', { type: 'button', 'data-word': name, 'data-view': name });
      button.addEventListener('click', () => { location.hash = hash[name](); });
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
    this.views = { play: new Play(sections.play, state), learn: new Learn(sections.learn) };
    this.tour = new Tour(root, this);
    addEventListener('hashchange', () => this.show());
    this.show();
  }

  asked() { // the view, and its settings
    const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
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
    document.documentElement.lang = tongue.now === 'zh' ? 'zh-CN' : 'en';
    translate(this.nav);
    for (const part of [...Object.values(this.views), this.tour]) part.showWords();
    document.title = this.view.title.textContent;
  }
}

if (typeof document === 'undefined') work();
else {
  const state = JSON.parse(document.getElementById('state').textContent);
  globalThis.__app = new App(document.getElementById('page'), state);
  globalThis.__page = globalThis.__app.views.play;
}
