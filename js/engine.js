// MetaFormer in the browser, on jax-js: the lessons' parts by the lessons' names, in the lessons' order.
//
// A part is a function of its weights `w`, which have the published names, and of its input. Tokens are (B, H, W, C),
// images (B, 3, H, W). jax-js frees an array when it has been used as often as it was asked for: `x.ref` is x, to be
// used once more. Weights are used for ever, so they are always asked for by `.ref`.
import { numpy as np, nn, jit } from '@jax-js/jax';

export const FAMILIES = {
  identityformer: { token_mixers: ['Identity', 'Identity', 'Identity', 'Identity'], norm: 'LayerNormGeneral' },
  randformer: { token_mixers: ['Identity', 'Identity', 'RandomMixing', 'RandomMixing'], norm: 'LayerNormGeneral' },
  poolformerv2: { token_mixers: ['Pooling', 'Pooling', 'Pooling', 'Pooling'], norm: 'LayerNormGeneral' },
  convformer: { token_mixers: ['SepConv', 'SepConv', 'SepConv', 'SepConv'], norm: 'LayerNormWithoutBias' },
  caformer: { token_mixers: ['SepConv', 'SepConv', 'Attention', 'Attention'], norm: 'LayerNormWithoutBias' },
};

// While `watch` runs f, it keeps what the parts on the way give, by names: what f gives is `out`.
let seen = null;

const show = (name, x) => {
  if (seen) seen[name] = x.ref;
  return x;
};

export function watch(f) {
  seen = {};
  try {
    return { out: f(), ...seen };
  } finally {
    seen = null;
  }
}

// --- layers ---

export function StarReLU(w, x) { // s · relu(x)² + b
  const r = nn.relu(x);
  return r.ref.mul(r).mul(w.scale.ref).add(w.bias.ref);
}

export function SquaredReLU(x) {
  const r = nn.relu(x);
  return r.ref.mul(r);
}

function normalise(x, axes, eps) { // to mean 0 and variance 1 over the axes
  const centred = x.ref.sub(x.mean(axes, { keepdims: true }));
  const variance = np.square(centred.ref).mean(axes, { keepdims: true });
  return centred.div(np.sqrt(variance.add(eps)));
}

// each token over its channels, or all tokens of an image together
export const LayerNormWithoutBias = (w, x) => normalise(x, [-1], 1e-6).mul(w.weight.ref);
export const LayerNormGeneral = (w, x) => normalise(x, [1, 2, 3], 1e-6).mul(w.weight.ref);
export const LayerNorm = (w, x, eps) => normalise(x, [-1], eps).mul(w.weight.ref).add(w.bias.ref);
export const NORMS = { LayerNormWithoutBias, LayerNormGeneral };

export function Linear(w, x) { // (…, in) → (…, out)
  const y = np.matmul(x, w.weight.ref.transpose());
  return w.bias ? y.add(w.bias.ref) : y;
}

// x in memory as it is, and so its gradient: jax-js joins operations, and what is joined into a product or a sum of many
// terms is computed again for each of them. What is padded is not joined; one more row, taken away again, is enough.
let one = null; // an array: a product with the number 1 would be left out

function stored(x) {
  one ??= np.array([1]);
  const rest = x.shape.slice(1).map(() => [0, 0]);
  return np.pad(x.mul(one.ref), [[0, 1], ...rest]).slice([0, x.shape[0]]);
}

const pad = (x, top, left, bottom = top, right = left) => np.pad(x, [[0, 0], [top, bottom], [left, right], [0, 0]]);

const shifted = (x, i, h, j, w) => x.ref.slice([], [i, i + h], [j, j + w]);

// A convolution as one matrix product, many times as fast here: the image is cut into squares of stride × stride, which
// become the channels of one place; what the kernel covers is then m × m of these places. (B, H, W, C) → (B, h, w, O)
export function Conv2d(w, x, stride, padding) {
  const [B, H, W, C] = x.shape, [O, , k] = w.weight.shape, m = Math.ceil(k / stride), extra = m * stride - k;
  const [h, wd] = [H, W].map((n) => Math.floor((n + 2 * padding - k) / stride) + 1);
  const [rows, columns] = [h + m - 1, wd + m - 1], deep = stride * stride * C;
  x = pad(x, padding, padding, rows * stride - H - padding, columns * stride - W - padding);
  x = x.reshape([B, rows, stride, columns, stride, C]).transpose([0, 1, 3, 2, 4, 5]).reshape([B, rows, columns, deep]);
  const places = Array.from({ length: m * m }, (_, o) => shifted(x, Math.floor(o / m), h, o % m, wd));
  x.dispose();
  const kernel = np.pad(w.weight.ref, [[0, 0], [0, 0], [0, extra], [0, extra]]).reshape([O, C, m, stride, m, stride]);
  const matrix = stored(kernel.transpose([2, 4, 3, 5, 1, 0]).reshape([m * m * deep, O]));
  return np.matmul(np.concatenate(places, -1), matrix).add(w.bias.ref);
}

export function DepthwiseConv(w, x) { // each channel with its own k × k kernel: the sum of k² shifted images
  const [, H, W] = x.shape, [C, , k] = w.weight.shape, r = (k - 1) / 2;
  const padded = stored(pad(x, r, r)), kernel = stored(w.weight.ref.reshape([C, k * k]).transpose());
  const terms = Array.from({ length: k * k }, (_, o) =>
    shifted(padded, Math.floor(o / k), H, o % k, W).mul(kernel.ref.slice(o)));
  padded.dispose();
  kernel.dispose();
  return terms.reduce((sum, term) => sum.add(term));
}

export const Mlp = (w, x) => Linear(w.fc2, show('act', StarReLU(w.act, show('fc1', Linear(w.fc1, x)))));

const Scale = (w, x) => (w ? x.mul(w.scale.ref) : x); // where a model has none, there is nothing to multiply with

// --- the five token mixers ---

export const Identity = (w, x) => x;

export function RandomMixing(w, x) { // from the right: jax-js 0.1.25 turns the gradient of matmul(matrix, batch) around
  const [B, H, W, C] = x.shape, channels = x.reshape([B, H * W, C]).transpose([0, 2, 1]);
  return np.matmul(channels, w.random_matrix.ref.transpose()).transpose([0, 2, 1]).reshape([B, H, W, C]);
}

function neighbours(x) { // the sum over each token's 3×3 window
  const [, H, W] = x.shape, padded = stored(pad(x, 1, 1));
  const rows = shifted(padded, 0, H, 0, W + 2).add(shifted(padded, 1, H, 0, W + 2)).add(shifted(padded, 2, H, 0, W + 2));
  padded.dispose();
  const sum = shifted(rows, 0, H, 0, W).add(shifted(rows, 0, H, 1, W)).add(shifted(rows, 0, H, 2, W));
  rows.dispose();
  return sum;
}

export function Pooling(w, x) { // mean of the neighbours that there are, minus the token
  const [, H, W] = x.shape;
  return neighbours(x.ref).div(neighbours(np.ones([1, H, W, 1]))).sub(x);
}

export function SepConv(w, x) {
  const y = show('act1', StarReLU(w.act1, show('pwconv1', Linear(w.pwconv1, x))));
  return Linear(w.pwconv2, show('dwconv', DepthwiseConv(w.dwconv, y)));
}

export function queriesKeysValues(w, x, head_dim) { // three times (B, heads, H·W, head_dim)
  const [B, H, W] = x.shape, heads = w.qkv.weight.shape[0] / 3 / head_dim;
  const qkv = Linear(w.qkv, x).reshape([B, H * W, 3, heads, head_dim]).transpose([2, 0, 3, 1, 4]);
  const parts = [0, 1, 2].map((i) => show('qkv'[i], qkv.ref.slice(i)));
  qkv.dispose();
  return parts;
}

export const attentionWeights = (q, k, head_dim) =>
  nn.softmax(show('scores', np.matmul(q, k.transpose([0, 1, 3, 2])).mul(head_dim ** -0.5)), -1);

export function Attention(w, x, { head_dim = 32 } = {}) {
  const [B, H, W] = x.shape, [q, k, v] = queriesKeysValues(w, x, head_dim);
  const y = np.matmul(show('weights', attentionWeights(q, k, head_dim)), v);
  return Linear(w.proj, show('heads', y.transpose([0, 2, 1, 3]).reshape([B, H, W, -1])));
}

export const MIXERS = { Identity, RandomMixing, Pooling, SepConv, Attention };

// --- block and model ---

export function MetaFormerBlock(w, x, { token_mixer, norm, ...options }) {
  const y = show('mixer', MIXERS[token_mixer](w.token_mixer, show('norm1', NORMS[norm](w.norm1, x.ref)), options));
  x = show('sum1', Scale(w.res_scale1, x).add(Scale(w.layer_scale1, y)));
  const z = show('mlp', Mlp(w.mlp, show('norm2', NORMS[norm](w.norm2, x.ref))));
  return Scale(w.res_scale2, x).add(Scale(w.layer_scale2, z));
}

export function Downsampling(w, x, stage) { // the stem 7×7 with stride 4, then 3×3 with stride 2
  if (stage === 0) return LayerNormWithoutBias(w.post_norm, Conv2d(w.conv, x, 4, 2));
  return Conv2d(w.conv, LayerNormWithoutBias(w.pre_norm, x), 2, 1);
}

export function MlpHead(w, x) {
  return Linear(w.fc2, LayerNorm(w.norm, SquaredReLU(Linear(w.fc1, x)), 1e-5));
}

export class MetaFormer {
  constructor(weights, { token_mixers, norm, ...options }) { // as `readWeights` gives them, and what `FAMILIES` says
    Object.assign(this, { w: weights, token_mixers, norm, options });
    this.known = new Map(); // compiled functions
  }

  block(stage, i = 0) { // its weights and options; stages and blocks count from 0 here
    return [this.w.stages[stage][i], { token_mixer: this.token_mixers[stage], norm: this.norm, ...this.options }];
  }

  stage(s, x) { // from the tokens of the stage before, or from the image's pixels, to this one's
    x = Downsampling(this.w.downsample_layers[s], x, s);
    for (const i of this.w.stages[s].keys()) x = MetaFormerBlock(this.w.stages[s][i], x, this.block(s, i)[1]);
    return x;
  }

  head(x) { // tokens of the last stage → logits
    const y = LayerNorm(this.w.norm, x.mean([1, 2]), 1e-6);
    return this.w.head.fc1 ? MlpHead(this.w.head, y) : Linear(this.w.head, y);
  }

  stages(x, from = 0) { // tokens at the end of each stage, from a stage on
    const found = [];
    for (let s = from; s < this.w.stages.length; s++) found.push(x = this.stage(s, s > from ? x.ref : x));
    return found;
  }

  forward(image) { // (B, 3, H, W) → logits (B, classes), and the tokens at the end of each stage
    const tokens = this.stages(image.transpose([0, 2, 3, 1]));
    return { logits: this.head(tokens.at(-1).ref), tokens };
  }

  compiled(name, f) { // a function is traced and compiled once for each shape
    if (!this.known.has(name)) this.known.set(name, jit(f));
    return this.known.get(name);
  }

  uncompiled() { // all are compiled anew; what was is freed, with its hold on the weights
    for (const f of this.known.values()) f.dispose();
    this.known.clear();
  }

  look(image) { // forward, compiled
    return this.compiled('forward', (x) => this.forward(x))(image);
  }
}
