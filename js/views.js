// Pictures of numbers: a map over a picture, a row of a matrix over it, a matrix.
const VIRIDIS = ['#440154', '#482878', '#3e4a89', '#31688e', '#26828e', '#1f9e89', '#35b779', '#6ece58', '#b5de2b', '#fde725'];
const BLUE = [33, 102, 172], ORANGE = [224, 112, 0]; // below and above nothing: told apart by all kinds of eyes

const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const STEPS = VIRIDIS.map(parts);

export function viridis(v) { // 0 to 1 → red, green, blue
  const at = Math.min(Math.max(v, 0), 1) * (STEPS.length - 1), i = Math.min(Math.floor(at), STEPS.length - 2);
  return STEPS[i].map((c, k) => c + (at - i) * (STEPS[i + 1][k] - c));
}

export function resize(values, [h, w], [H, W]) { // between the centres, as OpenCV does it
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

function paint(canvas, [H, W], color) { // color(i) → red, green, blue
  if (canvas.width !== W || canvas.height !== H) [canvas.width, canvas.height] = [W, H];
  const c = canvas.getContext('2d'), image = c.createImageData(W, H);
  for (let i = 0; i < H * W; i++) {
    const [r, g, b] = color(i);
    image.data.set([r, g, b, 255], 4 * i);
  }
  c.putImageData(image, 0, 0);
  return c;
}

const grey = (pixels, i) => 0.299 * pixels[4 * i] + 0.587 * pixels[4 * i + 1] + 0.114 * pixels[4 * i + 2];

export function drawPicture(canvas, pixels, size) {
  paint(canvas, size, (i) => [pixels[4 * i], pixels[4 * i + 1], pixels[4 * i + 2]]);
}

export function drawMap(canvas, pixels, size, heat) { // heat as from `scaleMap`: the more, the less picture
  paint(canvas, size, (i) => {
    const t = 0.75 * heat[i], g = (1 - t) * grey(pixels, i);
    return viridis(heat[i]).map((v) => g + t * v);
  });
}

const signedColor = (v, most, ground) => { // orange above nothing, blue below
  const t = most ? Math.abs(v) / most : 0, tint = v < 0 ? BLUE : ORANGE;
  return ground.map((g, k) => g + t * (tint[k] - g));
};

const strongest = (values) => values.reduce((most, v) => Math.max(most, Math.abs(v)), 0);

export function drawRow(canvas, pixels, [H, W], row, [h, w], token, tokens) { // whom a token of a grid (tokens) hears
  const most = strongest(row), c = paint(canvas, [H, W], (i) => {
    const y = Math.floor(Math.floor(i / W) * h / H), x = Math.floor((i % W) * w / W);
    const g = grey(pixels, i);
    return signedColor(row[y * w + x], most, [g, g, g]);
  });
  const [p, q] = [H / tokens[0], W / tokens[1]];
  for (const [color, width] of [['#000', H / 42], ['#fff', H / 84]]) {
    Object.assign(c, { strokeStyle: color, lineWidth: width });
    c.strokeRect(token[1] * q, token[0] * p, q, p);
  }
}

export function drawMatrix(canvas, values, n, ground, marked = null) { // ground: colour of 0
  const most = strongest(values);
  const c = paint(canvas, [n, n], (i) => {
    const color = signedColor(values[i], most, ground);
    return marked === null || Math.floor(i / n) === marked ? color : color.map((v, k) => v + 0.55 * (ground[k] - v));
  });
  return c;
}
