// Weights: read from safetensors files, or new ones for a mixer that is untrained; and where to compute.
import { numpy as np, nn, init, defaultDevice } from '@jax-js/jax';

// --- a new mixer, untrained ---

export function generator(seed) { // random numbers from 0 to 1, the same for a seed (mulberry32)
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export function normal(random, shape, std = 0.02) { // truncated at two deviations, as the lessons' weights start
  const one = () => {
    for (;;) {
      const z = Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
      if (Math.abs(z) < 2) return z * std;
    }
  };
  return { weight: np.array(Float32Array.from({ length: shape.reduce((a, b) => a * b) }, one)).reshape(shape) };
}

export function newMixer(name, dim, tokens, seed, head_dim = 32, std = () => 0.02) { // as `MIXERS` want them
  const random = generator(seed), inner = Math.max(Math.floor(dim / head_dim), 1) * head_dim;
  const one = (...shape) => normal(random, shape, std(shape));
  if (name === 'SepConv') {
    return { pwconv1: one(2 * dim, dim), act1: { scale: np.ones([1]), bias: np.zeros([1]) },
      dwconv: one(2 * dim, 1, 7, 7), pwconv2: one(dim, 2 * dim) };
  }
  if (name === 'Attention') return { qkv: one(3 * inner, dim), proj: one(dim, inner) };
  if (name !== 'RandomMixing') return {};
  const uniform = np.array(Float32Array.from({ length: tokens ** 2 }, random)).reshape([tokens, tokens]);
  return { random_matrix: nn.softmax(uniform, -1) };
}

// --- weights: safetensors with the published names, float32, float16 or int8 ---

function toFloat32(half) { // of a 16-bit number
  const exponent = (half >> 10) & 31, fraction = half & 1023, sign = half & 0x8000 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}

const TYPES = {
  F32: (buffer) => new Float32Array(buffer),
  F16: (buffer) => Float32Array.from(new Uint16Array(buffer), toFloat32),
  I8: (buffer) => Float32Array.from(new Int8Array(buffer)), // times NAME:step, one for each output channel
};

export function readSafetensors(bytes) { // Uint8Array → { name: [shape, Float32Array] }
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true)), start = 8 + length;
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const found = Object.fromEntries(Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
    if (!TYPES[dtype]) throw new Error(`${name} is ${dtype}; the engine reads F32, F16 and I8.`);
    return [name, [shape, TYPES[dtype](bytes.slice(start + from, start + to).buffer)]];
  }));
  for (const key of Object.keys(found).filter((one) => one.endsWith(':step'))) {
    const [[channels], steps] = found[key], [, values] = found[key.slice(0, -5)], each = values.length / channels;
    values.forEach((v, i) => { values[i] = v * steps[Math.floor(i / each)]; });
    delete found[key];
  }
  return found;
}

export function nest(named) { // 'stages.0.1.mlp.fc1.weight' → w.stages[0][1].mlp.fc1.weight
  const tree = {};
  for (const [name, value] of Object.entries(named)) {
    const path = name.split('.'), last = path.pop();
    path.reduce((node, key) => (node[key] ??= {}), tree)[last] = value;
  }
  const lists = (node) => Object.assign([], node);
  tree.downsample_layers = lists(tree.downsample_layers);
  tree.stages = lists(tree.stages).map(lists);
  for (const block of tree.stages.flat()) block.token_mixer ??= {}; // one without weights has no names
  return tree;
}

export function flat(tree, before = '') { // and back
  return Object.assign({}, ...Object.entries(tree).map(([key, value]) => (
    value instanceof np.Array ? { [before + key]: value } : flat(value, `${before}${key}.`))));
}

export function readWeights(bytes) {
  return nest(Object.fromEntries(Object.entries(readSafetensors(bytes)).map(([name, [shape, values]]) =>
    [name, np.array(values).reshape(shape)])));
}

export async function start(preferred = ['webgpu', 'wasm']) { // the first of these that there is
  const found = await init(...preferred.filter((d) => d !== 'webgpu' || globalThis.navigator?.gpu));
  return defaultDevice(preferred.find((d) => found.includes(d)));
}
