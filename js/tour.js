// A walk through the page in eleven steps: each moves the live tool, says what there is to see, and marks it.
import { add, className, t, translate } from './common.js';

function plain(play) { // as the walk begins
  const { board, task } = play;
  if (task.drawn === 'shapes') {
    play.setTool('shape');
    play.reshape({ kind: 'ring', radius: 0.2 });
    board.thing = { kind: 'ring', radius: 0.2, color: board.color, at: [board.width / 2, board.height / 2] };
    board.show();
  }
  if (play.stage !== 2) play.setStage(2);
  if (play.list.some((card) => card.label !== null)) play.explain(null);
  play.hear(null);
  for (const card of play.list.filter((one) => !one.back.hidden)) play.restore(card);
}

const middle = (play) => play.list[0].grid().map((n) => Math.floor(n / 2));
const other = (card) => (card.mixers[2] === 'Identity' ? 'Pooling' : 'Identity');

const opened = ({ inside, list }) =>
  inside.hash({ card: list.at(-1), stage: 2, block: 0, part: 'mixer', token: null, number: null });

const STEPS = [ // what it is about, which places of the page it marks, what it does, and the view's address
  ['board', '.board', () => {}],
  ['answers', '.bars', () => {}],
  ['corner', '.board', ({ board }) => {
    board.thing = { ...board.thing, at: [board.width * 0.28, board.height * 0.28] };
    board.show();
  }],
  ['map', '.map', () => {}],
  ['class', '.bars', (play) => play.explain(play.task.class_names.length - 1)],
  ['token', '.map', (play) => play.hear(middle(play))],
  ['matrix', '.matrix', (play) => play.hear(middle(play))],
  ['stage', '.controls', (play) => play.setStage(1)],
  ['swap', (play) => [play.list.at(-1).root], (play) => play.swap(play.list.at(-1), other(play.list.at(-1)))],
  ['inside', '.inside', () => {}, opened],
  ['learn', '.charts', null, () => 'view=learn&steps=150'],
];

export class Tour {
  constructor(root, app) {
    Object.assign(this, { app, root: add(root, 'section', { class: 'tour', popover: 'manual', hidden: '', 'data-label': 'tour' }) });
    this.text = add(this.root, 'p', { 'aria-live': 'polite' });
    const row = add(this.root, 'div', { class: 'tools' });
    this.count = add(row, 'span', { class: 'note' });
    const button = (key, react) => {
      const found = add(row, 'button', { type: 'button', 'data-word': key });
      found.addEventListener('click', react);
      return found;
    };
    this.before = button('tour back', () => this.go(this.at - 1));
    this.after = button('tour next', () => this.go(this.at + 1));
    this.after.className = 'go';
    button('tour end', () => this.end());
    this.root.addEventListener('keydown', (e) => { if (e.key === 'Escape') this.end(); });
  }

  get steps() { // without what the page cannot do
    return STEPS.filter(([name]) => name !== 'corner' || this.app.views.play.task.drawn === 'shapes');
  }

  async start() {
    this.app.views.learn.pause();
    this.app.views.play.guided = true;
    await this.go(0);
    this.after.focus(); // it is there now
  }

  async go(at) {
    await this.doing;
    if (at >= this.steps.length) return this.end();
    const { play } = this.app.views, [, , act, where] = this.steps[at];
    this.at = at;
    this.app.address.go(where?.(play) ?? '');
    this.app.show();
    plain(play);
    if (this.root.hidden) this.show(true);
    this.showWords();
    this.mark();
    this.doing = act?.(play); // a promise, of what takes a while
    return this.doing;
  }

  show(open) { // above all else, whatever the page stands in
    this.root.hidden = !open;
    if (open) this.root.showPopover?.(); else this.root.hidePopover?.();
  }

  mark() {
    for (const node of this.app.root.querySelectorAll('.spot')) node.classList.remove('spot');
    if (this.root.hidden) return;
    const { view } = this.app, place = this.steps[this.at][1];
    const found = typeof place === 'string' ? view.root.querySelectorAll(place) : place(view);
    const nodes = [...found].filter((node) => node.offsetParent);
    nodes.forEach((node) => node.classList.add('spot'));
    const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
    nodes[0]?.scrollIntoView({ block: 'center', behavior: still ? 'auto' : 'smooth' });
  }

  async end() {
    const { play } = this.app.views;
    this.show(false);
    this.mark();
    await this.doing;
    plain(play);
    play.guided = false;
    this.app.guide.focus();
  }

  showWords() {
    translate(this.root);
    if (this.root.hidden) return;
    const { task } = this.app.views.play, name = this.steps[this.at][0];
    this.text.textContent = t(`tour ${name}`, { class: className(task.class_names.at(-1)) });
    this.count.textContent = `${this.at + 1} / ${this.steps.length}`;
    this.before.disabled = this.at === 0;
    this.after.dataset.word = this.at + 1 < this.steps.length ? 'tour next' : 'tour done';
    this.after.textContent = t(this.after.dataset.word);
  }
}
