// Pictures with a label: shapes, patterns and tasks as data/shapes.py draws them, with random numbers of our own; digits.
import { inflate } from './pack.js';
import { generator } from './weights.js';

const { abs, cos, hypot, max, min, sin, PI } = Math;

export const DISTANCES = { // name → distance from the edge, negative inside; each has the area of the disc of radius 1
  disc: (x, y) => hypot(x, y) - 1,
  ring: (x, y) => abs(hypot(x, y) - 1) - 0.25,
  square: (x, y) => max(abs(x), abs(y)) - 0.886,
  triangle: (x, y) => max(y, abs(x) * 0.866 - y / 2) - 0.777,
  cross: (x, y) => max(max(abs(x), abs(y)) - 1.189, min(abs(x), abs(y)) - 0.396),
};
const WAVE = 4.5; // of a pattern, in radians per radius
export const TEXTURES = { // name → lighter or darker than the colour
  horizontal: (x, y) => sin(WAVE * y),
  vertical: (x) => sin(WAVE * x),
  rising: (x, y) => sin(WAVE * (x + y) / 2 ** 0.5),
  falling: (x, y) => sin(WAVE * (x - y) / 2 ** 0.5),
  checks: (x, y) => sin(WAVE * x) * sin(WAVE * y),
};
const COLORS = { red: [0.85, 0.2, 0.2], yellow: [0.95, 0.8, 0.2], blue: [0.2, 0.4, 0.9], green: [0.2, 0.7, 0.35],
  purple: [0.6, 0.35, 0.8], orange: [0.95, 0.5, 0.15] };

const clip = (v, low = 0, high = 1) => min(max(v, low), high);

export function render(things, size, ground = 0.15) { // → (size, size, 3), 0 to 1; a thing as `Thing` of data/shapes.py
  const image = new Float32Array(3 * size * size).fill(ground);
  for (const { x, y, radius, shape, color, angle = 0, texture = null, phase = [0, 0] } of things) {
    const [c, s] = [cos(angle), sin(angle)], reach = 1.7 * radius;
    const [[left, right], [top, bottom]] = [x, y].map((v) => [v - reach, v + reach].map((edge) => Math.floor(edge * size)));
    for (let row = max(0, top); row <= min(size - 1, bottom); row++) {
      for (let column = max(0, left); column <= min(size - 1, right); column++) {
        const [u, v] = [((column + 0.5) / size - x) / radius, ((row + 0.5) / size - y) / radius], i = row * size + column;
        const [p, q] = [c * u + s * v, c * v - s * u], cover = clip(0.5 - DISTANCES[shape](p, q) * radius * size);
        const wave = texture ? 0.35 * clip(2 * TEXTURES[texture](p + phase[0], q + phase[1]), -1) : 0;
        for (let k = 0; k < 3; k++) image[3 * i + k] += cover * (color[k] + wave - image[3 * i + k]);
      }
    }
  }
  return image.map((v) => clip(v));
}

// --- the tasks: (random, label) → things ---

const between = (random, low, high) => low + (high - low) * random();
const choose = (random, names) => names[Math.floor(names.length * random())];

function shuffled(random, list) {
  const found = [...list];
  for (let i = found.length - 1; i > 0; i--) {
    const j = Math.floor((i + 1) * random());
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

const nearColor = (random, name = choose(random, Object.keys(COLORS))) =>
  COLORS[name].map((v) => clip(v + between(random, -0.06, 0.06)));

function withSpecks(random, things, n) { // and up to n small ones that touch nothing and mean nothing
  const found = [...things], full = found.length + n;
  for (let i = 0; i < 8 * n; i++) {
    const [x, y] = [between(random, 0.05, 0.95), between(random, 0.05, 0.95)];
    if (found.length === full || found.some((o) => hypot(x - o.x, y - o.y) <= 1.6 * o.radius + 0.07)) continue;
    const shape = choose(random, Object.keys(DISTANCES));
    found.push({ x, y, radius: 0.035, shape, color: nearColor(random), angle: between(random, 0, 7) });
  }
  return found;
}

const disc = (random, x, y, radius, name) => ({ x, y, radius, shape: 'disc', color: nearColor(random, name) });

export const TASKS = {
  shape: { class_names: Object.keys(DISTANCES), layout(random, label) { // one large thing among small ones
    const radius = between(random, 0.21, 0.25), place = () => between(random, 1.6 * radius, 1 - 1.6 * radius);
    const [x, y, angle] = [place(), place(), between(random, -0.3, 0.3)];
    return withSpecks(random, [{ x, y, radius, shape: this.class_names[label], color: nearColor(random), angle }], 4);
  } },
  texture: { class_names: Object.keys(TEXTURES), layout(random, label) { // a patch with a pattern beside two plain ones
    return shuffled(random, [0, 1, 2, 3]).slice(1).map((cell, i) => ({
      x: (cell % 2) / 2 + 0.25 + between(random, -0.04, 0.04), y: (cell >> 1) / 2 + 0.25 + between(random, -0.04, 0.04),
      radius: 0.21, shape: 'square', color: nearColor(random).map((v) => 0.35 + 0.3 * v),
      texture: i ? null : this.class_names[label], phase: [between(random, 0, 7), between(random, 0, 7)] }));
  } },
  same: { class_names: ['same', 'different'], layout(random, label) { // two discs apart: of the same colour or not
    const angle = between(random, 0, 2 * PI), half = [cos(angle), sin(angle)].map((v) => 0.55 / 2 * v);
    const [x, y] = half.map((v) => 0.5 + between(random, -1, 1) * (0.5 - 0.18 - abs(v)));
    const [one, other] = shuffled(random, ['yellow', 'blue']);
    return [disc(random, x - half[0], y - half[1], 0.16, one),
      disc(random, x + half[0], y + half[1], 0.16, label ? other : one)];
  } },
  order: { class_names: ['clockwise', 'anticlockwise'], layout(random, label) { // clockwise red, yellow, blue, or not
    const start = Math.floor(3 * random()) * 2 * PI / 3 - PI / 2 + between(random, -0.2, 0.2), far = 0.45 / 3 ** 0.5;
    const [x, y] = [0, 0].map(() => 0.5 + between(random, -1, 1) * (0.5 - 0.14 - far));
    return ['red', 'yellow', 'blue'].map((name, i) => {
      const turned = start + i * 2 * PI / 3 * (label ? -1 : 1); // y points down, so this is clockwise
      return disc(random, x + far * cos(turned), y + far * sin(turned), 0.13, name);
    });
  } },
  digit: { class_names: [...'0123456789'] },
};

// --- handwritten digits, 8×8 pixels each ---

export const HELD = 1e6; // the first seed of held-out pictures
const LEARNT = 500; // to learn from; the others are held out
let digits = []; // digit i says i % 10; 64 values from 0 to 1

export async function readDigits(text) { // 16 shades: two in a byte, the first pixel of all digits, then the second …
  const packed = new Uint8Array(await inflate(text).arrayBuffer()), n = packed.length / 32;
  const shade = (k) => (k % 2 ? packed[k >> 1] & 15 : packed[k >> 1] >> 4) / 15;
  digits = Array.from({ length: n }, (_, i) => Float32Array.from({ length: 64 }, (_, p) => shade(p * n + i)));
}

function enlarge(digit, size, moved) { // between the centres of pixels; moved: down and right, in pixels of the digit
  const image = new Float32Array(3 * size * size);
  const near = (i, by) => {
    const at = (i + 0.5) * 8 / size - 0.5 - by, inside = at > -1 && at < 8, v = clip(at, 0, 7), low = Math.floor(v);
    return [low, min(low + 1, 7), v - low, inside];
  };
  for (let row = 0; row < size; row++) {
    const [a, b, s, visible] = near(row, moved[0]);
    for (let column = 0; column < size; column++) {
      const [l, r, t, also] = near(column, moved[1]);
      const [top, bottom] = [a, b].map((y) => digit[8 * y + l] * (1 - t) + digit[8 * y + r] * t);
      if (visible && also) image.fill(top * (1 - s) + bottom * s, 3 * (row * size + column), 3 * (row * size + column) + 3);
    }
  }
  return image;
}

function drawDigit(label, size, seed) { // one to learn from, moved a little; or, of the seeds from HELD on, held out
  const random = generator(seed), held = seed - HELD, n = digits.length - LEARNT;
  if (held >= 0 && held < n) return { image: enlarge(digits[LEARNT + held], size, [0, 0]), label };
  const digit = digits[label + 10 * Math.floor(random() * LEARNT / 10)];
  return { image: enlarge(digit, size, [between(random, -1, 1), between(random, -1, 1)]), label };
}

export function drawExample(task, size, seed) { // a picture (size, size, 3), 0 to 1, and its label: classes take turns
  const random = generator(seed), label = seed % TASKS[task].class_names.length;
  if (task === 'digit') return drawDigit(label, size, seed);
  const things = TASKS[task].layout(random, label), ground = between(random, 0.1, 0.25);
  return { image: render(things, size, ground), label, things, ground };
}
