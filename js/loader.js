// The first lines of a page: the rest of the script, which stands beside them as letters, becomes a script again.
import { inflate } from './pack.js';

inflate(document.getElementById('letters').textContent).text().then((script) => {
  const node = Object.assign(document.createElement('script'), { id: 'script', textContent: script });
  document.body.append(node);
});
