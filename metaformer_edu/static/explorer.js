// The picture of an explorer, the sentence that says it in words, and what to try.
function label(root) {
  // ipywidgets gives the handle of a slider no name, and tells its step instead of the number beside it; version 7 has no role either
  for (const handle of root.querySelectorAll('.noUi-handle, .ui-slider-handle')) {
    const box = handle.closest('.widget-hslider, .jupyter-widget-hslider');
    const shown = box?.querySelector('.widget-readout')?.textContent;
    const facts = { role: 'slider', 'aria-label': box?.querySelector('.widget-label')?.textContent, 'aria-valuetext': shown };
    if (!handle.classList.contains('noUi-handle')) facts['aria-valuenow'] = parseFloat(shown);
    for (const [key, value] of Object.entries(facts)) if (value && handle.getAttribute(key) !== String(value)) handle.setAttribute(key, value);
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
  const tries = add('ul', { 'aria-label': 'Try this', 'aria-live': 'polite' });

  const draw = () => {
    drawing.innerHTML = model.get('value');
    drawing.firstElementChild?.setAttribute('aria-label', model.get('words'));
  };
  const say = () => {
    drawing.classList.toggle('edu-old', model.get('busy'));
    el.setAttribute('aria-busy', model.get('busy'));
    const text = model.get('busy') ? 'working …' : model.get('words');
    if (words.textContent !== text) words.textContent = text;
  };
  const tick = () => tries.replaceChildren(...model.get('tries').map(([text, done]) => {
    const item = document.createElement('li');
    item.textContent = text;
    item.className = done ? 'edu-done' : '';
    if (done) item.append(Object.assign(document.createElement('b'), { textContent: ' Done.' }));
    return item;
  }));
  for (const [names, react] of [[['value'], draw], [['words', 'busy'], say], [['tries'], tick]]) {
    for (const name of names) model.on(`change:${name}`, react);
    react();
  }

  const root = () => el.closest('.edu-explorer') ?? el;
  const watch = new MutationObserver(() => label(root()));
  const start = requestAnimationFrame(() => { label(root()); watch.observe(root(), { childList: true, characterData: true, subtree: true, attributes: true, attributeFilter: ['aria-valuetext'] }); });
  return () => { cancelAnimationFrame(start); watch.disconnect(); };
}

export default { render };
