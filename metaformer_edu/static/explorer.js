// The picture of an explorer, the sentence that says it in words, and what to try.
function label(root) {
  // ipywidgets gives the handle of a slider no name
  for (const handle of root.querySelectorAll('.noUi-handle:not([aria-label]), .ui-slider-handle:not([aria-label])')) {
    const name = handle.closest('.widget-hslider, .jupyter-widget-hslider')?.querySelector('.widget-label')?.textContent;
    if (name) handle.setAttribute('aria-label', name);
  }
}

function render({ model, el }) {
  const add = (tag, attributes = {}) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return el.appendChild(node);
  };
  el.classList.add('edu-picture');
  const drawing = add('div', { class: 'edu-drawing' });
  const words = add('p', { role: 'status', 'aria-live': 'polite' });
  const tries = add('ul', { 'aria-label': 'Try this' });

  const draw = () => {
    drawing.innerHTML = model.get('svg');
    drawing.firstElementChild?.setAttribute('aria-label', model.get('words'));
  };
  const say = () => {
    drawing.classList.toggle('edu-old', model.get('busy'));
    el.setAttribute('aria-busy', model.get('busy'));
    words.textContent = model.get('busy') ? 'working …' : model.get('words');
  };
  const tick = () => tries.replaceChildren(...model.get('tries').map(([text, done]) => {
    const item = document.createElement('li');
    item.textContent = text;
    item.className = done ? 'edu-done' : '';
    if (done) item.append(Object.assign(document.createElement('b'), { textContent: ' Done.' }));
    return item;
  }));
  for (const [names, react] of [[['svg'], draw], [['words', 'busy'], say], [['tries'], tick]]) {
    for (const name of names) model.on(`change:${name}`, react);
    react();
  }

  const root = () => el.closest('.edu-explorer') ?? el;
  const watch = new MutationObserver(() => label(root()));
  const start = requestAnimationFrame(() => { label(root()); watch.observe(root(), { childList: true, subtree: true }); });
  return () => { cancelAnimationFrame(start); watch.disconnect(); };
}

export default { render };
