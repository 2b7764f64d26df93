// Pictures of numbers: a map over a picture, a row of a matrix over it, a matrix.
const VIRIDIS = ['#440154', '#482878', '#3e4a89', '#31688e', '#26828e', '#1f9e89', '#35b779', '#6ece58', '#b5de2b', '#fde725'];
const BLUE = [33, 102, 172], ORANGE = [224, 112, 0]; // below and above nothing: told apart by all kinds of eyes
const STEPS = VIRIDIS.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

const viridis = Array.from({ length: 256 }, (_, v) => { // red, green, blue of v / 255
  const at = v / 255 * (STEPS.length - 1), i = Math.min(Math.floor(at), STEPS.length - 2);
  return STEPS[i].map((c, k) => c + (at - i) * (STEPS[i + 1][k] - c));
});

function resize(values, [h, w], [H, W]) { // between the centres, as OpenCV does it
  const found = new Float32Array(H * W);
  const near = (i, n, N) => {
    const at = Math.min(Math.max((i + 0.5) * n / N - 0.5, 0), n - 1), low = Math.floor(at);
    return [low, Math.min(low + 1, n - 1), at - low];
  };
  const columns = Array.from({ length: W }, (_, x) => near(x, w, W));
  for (let y = 0; y < H; y++) {
    const [a, b, t] = near(y, h, H);
    columns.forEach(([l, r, s], x) => {
      const top = values[a * w + l] * (1 - s) + values[a * w + r] * s;
      found[y * W + x] = top * (1 - t) + (values[b * w + l] * (1 - s) + values[b * w + r] * s) * t;
    });
  }
  return found;
}

function spread(values) { // from the least to the greatest, 0 to 1
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b)) - low;
  return values.map((v) => (v - low) / (high + 1e-7));
}

export const scaleMap = (cam, grid, size) => spread(resize(spread(cam), grid, size)); // what `explain` makes of it

function paint(canvas, [H, W], color, base, strength) { // red, green, blue of pixel i: base(i), and over it color(i)
  if (canvas.width !== W || canvas.height !== H) [canvas.width, canvas.height] = [W, H];
  const c = canvas.getContext('2d'), image = c.createImageData(W, H), { data } = image;
  for (let i = 0; i < H * W; i++) {
    const t = strength(i), over = color(i), under = base(i);
    for (let k = 0; k < 3; k++) data[4 * i + k] = under[k] + t * (over[k] - under[k]);
    data[4 * i + 3] = 255;
  }
  c.putImageData(image, 0, 0);
  return c;
}

function greyOf(pixels) { // RGBA → i → the same grey three times
  const one = [0, 0, 0];
  return (i) => one.fill(0.299 * pixels[4 * i] + 0.587 * pixels[4 * i + 1] + 0.114 * pixels[4 * i + 2]);
}

export function drawPicture(canvas, pixels, size) {
  const color = (i) => pixels.subarray(4 * i, 4 * i + 3);
  paint(canvas, size, color, color, () => 1);
}

export function drawMap(canvas, pixels, size, heat) { // heat as from `scaleMap`: the more, the less picture
  paint(canvas, size, (i) => viridis[Math.round(255 * heat[i])], greyOf(pixels), (i) => 0.75 * heat[i]);
}

const strongest = (values) => values.reduce((most, v) => Math.max(most, Math.abs(v)), 0) || 1;
const tint = (v) => (v < 0 ? BLUE : ORANGE);

function frame(c, box, width) {
  for (const [color, lineWidth] of [['#000', width], ['#fff', width / 2]]) {
    Object.assign(c, { strokeStyle: color, lineWidth });
    c.strokeRect(...box);
  }
}

export function drawToken(canvas, pixels, size, token, [h, w]) { // a picture, one token of its grid framed
  drawPicture(canvas, pixels, size);
  const [p, q] = [size[0] / h, size[1] / w];
  frame(canvas.getContext('2d'), [token[1] * q, token[0] * p, q, p], size[0] / 42);
}

export function drawRow(canvas, pixels, [H, W], row, [h, w], token, tokens) { // whom a token of a grid (tokens) hears
  const most = strongest(row), at = (i) => Math.floor(Math.floor(i / W) * h / H) * w + Math.floor((i % W) * w / W);
  const c = paint(canvas, [H, W], (i) => tint(row[at(i)]), greyOf(pixels), (i) => Math.abs(row[at(i)]) / most);
  const [p, q] = [H / tokens[0], W / tokens[1]];
  frame(c, [token[1] * q, token[0] * p, q, p], H / 42);
}

export function drawNumbers(canvas, values, size, ground, token = null) { // (h, w), a place of it framed
  const most = strongest(values), small = token ? document.createElement('canvas') : canvas;
  paint(small, size, (i) => tint(values[i]), () => ground, (i) => Math.abs(values[i]) / most);
  if (!token) return;
  const p = Math.max(Math.floor(160 / size[1]), 3), c = canvas.getContext('2d'); // larger, for the frame
  [canvas.width, canvas.height] = [size[1] * p, size[0] * p];
  c.imageSmoothingEnabled = false;
  c.drawImage(small, 0, 0, canvas.width, canvas.height);
  frame(c, [token[1] * p, token[0] * p, p, p], p / 4);
}

export const cellColor = (v, most) => `rgb(${tint(v).join(' ')} / ${(0.5 * Math.min(Math.abs(v) / most, 1)).toFixed(3)})`;

export function drawMatrix(canvas, values, n, ground, marked = null) { // ground: colour of 0; a row stands out
  const most = strongest(values), faint = (i) => (marked === null || Math.floor(i / n) === marked ? 1 : 0.45);
  paint(canvas, [n, n], (i) => tint(values[i]), () => ground, (i) => faint(i) * Math.abs(values[i]) / most);
}
