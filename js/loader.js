// The first lines of a page: the rest of the script, which stands beside them as letters, becomes a script again.
import { inflate } from './pack.js';

inflate(document.getElementById('letters').textContent).text().then((script) => {
  document.body.append(Object.assign(document.createElement('script'), { textContent: `${script}metaformer();` }));
});
