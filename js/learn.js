// Training: pictures, loss, gradient, AdamW, as training/loop.py has them. Weights are { published name: array } here.
import { numpy as np, nn, jit, valueAndGrad } from '@jax-js/jax';
import { MetaFormer } from './engine.js';
import { gradcam, mixerInput, MATRICES } from './explain.js';
import { HELD, TASKS, drawExample } from './pictures.js';
import { flat, generator, nest, newMixer, normal } from './weights.js';

export const DIMS = [32, 64, 96, 128]; // channels of the stages; each has one block
export const BATCH = 16;
const HELD_OUT = 64;

const fanIn = (shape) => shape.slice(1).reduce((a, b) => a * b) ** -0.5; // 0.02 is for wide models

export function newModel(mixers, classes, size, seed) { // the same weights for a seed, but for the mixers
  const random = generator(seed), zeros = (n) => np.zeros([n]), ones = (n) => ({ weight: np.ones([n]) });
  const star = () => ({ scale: np.ones([1]), bias: np.zeros([1]) });
  const matrix = (...shape) => normal(random, shape, fanIn(shape));
  const biased = (n, ...shape) => ({ ...matrix(n, ...shape), bias: zeros(n) });
  const dims = DIMS.slice(0, mixers.length), tokens = (s) => Math.ceil(size / 2 ** (s + 2)) ** 2;
  const block = (dim, s) => ({ norm1: ones(dim), token_mixer: newMixer(mixers[s], dim, tokens(s), seed + s + 1, 32, fanIn),
    norm2: ones(dim), mlp: { fc1: matrix(4 * dim, dim), act: star(), fc2: matrix(dim, 4 * dim) } });
  return flat({
    downsample_layers: dims.map((dim, s) => (s
      ? { pre_norm: ones(dims[s - 1]), conv: biased(dim, dims[s - 1], 3, 3) }
      : { conv: biased(dim, 3, 7, 7), post_norm: ones(dim) })),
    stages: dims.map((dim, s) => [block(dim, s)]),
    norm: { ...ones(dims.at(-1)), bias: zeros(dims.at(-1)) },
    head: biased(classes, dims.at(-1)),
  });
}

class Plain extends MetaFormer { // within a function that is compiled as a whole
  compiled(name, f) { return f; }
}

export function crossEntropy(logits, labels) { // labels (B, classes), one-hot
  return nn.logSoftmax(logits, -1).mul(labels).sum(-1).mean().neg();
}

// One step for the weights w by their gradients g, with the means m of g and v of g². Matrices decay, vectors do not.
// rate is the learning rate over 1 - 0.9^t, and correction 1 - 0.999^t, at step t = 1, 2, …
export function AdamW(w, g, m, v, { rate, correction, decay }) {
  const next = { w: {}, m: {}, v: {} };
  for (const name of Object.keys(m)) {
    next.m[name] = m[name].mul(0.9).add(g[name].ref.mul(0.1));
    next.v[name] = v[name].mul(0.999).add(np.square(g[name]).mul(0.001));
    const change = next.m[name].ref.div(np.sqrt(next.v[name].ref.div(correction.ref)).add(1e-8)).mul(rate.ref);
    const kept = w[name].shape.length > 1 ? w[name].mul(decay.ref) : w[name];
    next.w[name] = kept.sub(change);
  }
  return next;
}

const pixels = (image) => image.map((v) => (v - 0.5) * 4); // as the models get them, -2 to 2
const onehot = (labels, n) => np.array(Float32Array.from({ length: labels.length * n },
  (_, i) => Number(labels[Math.floor(i / n)] === i % n))).reshape([labels.length, n]);

function drawBatch({ task, size }, seeds) { // pictures (B, size, size, 3) and labels
  const found = seeds.map((seed) => drawExample(task, size, seed)), one = 3 * size * size;
  const images = new Float32Array(one * found.length);
  found.forEach(({ image }, i) => images.set(pixels(image), i * one));
  return { images, labels: found.map(({ label }) => label), drawn: found.map(({ image, ...drawn }) => drawn) };
}

const range = (n, from = 0) => Array.from({ length: n }, (_, i) => from + i);

export class Learner {
  constructor(settings) { // { task, size, mixers, rate, seed }, and batch, decay if others than usual
    const { task, size, mixers, seed } = settings;
    this.settings = { batch: BATCH, decay: 0.05, ...settings };
    Object.assign(this, { class_names: TASKS[task].class_names, t: 0 });
    this.config = { token_mixers: mixers, norm: 'LayerNormWithoutBias' };
    this.w = newModel(mixers, this.class_names.length, size, seed);
    this.fixed = {}; // weights that do not learn
    for (const name of Object.keys(this.w).filter((key) => key.endsWith('random_matrix'))) {
      this.fixed[name] = this.w[name];
      delete this.w[name];
    }
    const none = () => Object.fromEntries(Object.entries(this.w).map(([name, x]) => [name, np.zeros(x.shape)]));
    Object.assign(this, { m: none(), v: none() });
    this.held = drawBatch(this.settings, range(HELD_OUT, HELD)); // the same for all seeds
    this.compile();
  }

  model(w) { return new Plain(nest({ ...w, ...this.fixed }), this.config); }

  compile() {
    const logits = (w, x) => { // x (B, H, W, 3)
      const model = this.model(w), tokens = model.stages(x), last = tokens.pop();
      tokens.forEach((y) => y.dispose());
      return model.head(last);
    };
    const gradient = valueAndGrad((w, x, y) => crossEntropy(logits(w, x), y));
    this.update = jit((w, m, v, x, y, by) => {
      const [loss, g] = gradient(w, x, y);
      return { loss, ...AdamW(w, g, m, v, by) };
    });
    this.logits = jit(logits);
    this.looks = {};
  }

  batch(t) { // of step t
    const { seed, batch } = this.settings;
    return drawBatch(this.settings, range(batch, (seed + 1) * 2 ** 24 + t * batch));
  }

  arrays({ images, labels }) {
    const { size } = this.settings;
    return [np.array(images).reshape([labels.length, size, size, 3]), onehot(labels, this.class_names.length)];
  }

  async step() { // → the loss before it
    const { rate, decay } = this.settings, t = this.t + 1;
    const by = { rate: rate / (1 - 0.9 ** t), correction: 1 - 0.999 ** t, decay: 1 - rate * decay };
    for (const name of Object.keys(by)) by[name] = np.array([by[name]]);
    const { loss, w, m, v } = this.update(this.w, this.m, this.v, ...this.arrays(this.batch(this.t)), by);
    Object.assign(this, { w, m, v, t });
    return (await loss.data())[0];
  }

  async accuracy() { // on held-out pictures
    const { size } = this.settings, one = 3 * size * size, n = this.class_names.length;
    let right = 0;
    for (let i = 0; i < HELD_OUT; i += BATCH) {
      const images = np.array(this.held.images.slice(i * one, (i + BATCH) * one)).reshape([BATCH, size, size, 3]);
      const logits = await this.logits(this.kept(), images).data();
      for (let j = 0; j < BATCH; j++) {
        const row = logits.slice(j * n, (j + 1) * n);
        right += row.indexOf(Math.max(...row)) === this.held.labels[i + j];
      }
    }
    return right / HELD_OUT;
  }

  kept() { // the weights, to be used once more
    return Object.fromEntries(Object.entries(this.w).map(([name, x]) => [name, x.ref]));
  }

  async look(example, stage) { // a held-out picture: answer, where a stage looks for its class, who hears whom
    const one = 3 * this.settings.size ** 2, label = this.held.labels[example];
    const images = this.held.images.slice(example * one, (example + 1) * one);
    this.looks[stage] ??= jit((w, x, y) => {
      const model = this.model(w), tokens = model.stages(x.ref), [block, options] = model.block(stage);
      const before = mixerInput(model, stage ? tokens[stage - 1].ref : x, stage);
      const matrix = MATRICES[options.token_mixer](block.token_mixer, before, options);
      const cam = gradcam(model, tokens[stage].ref, y.slice(0), stage);
      const last = tokens.pop();
      tokens.forEach((t) => t.dispose());
      return { logits: model.head(last), cam, matrix };
    });
    const found = this.looks[stage](this.kept(), ...this.arrays({ images, labels: [label] }));
    for (const name of Object.keys(found)) found[name] = new Float32Array(await found[name].data());
    return { ...found, label };
  }

  async numbers(of = 'w') { // of w, m, v or fixed: { name: [shape, values] }
    const found = {};
    for (const [name, x] of Object.entries(this[of])) found[name] = [x.shape, new Float32Array(await x.ref.data())];
    return found;
  }

  dispose() {
    for (const x of [this.w, this.m, this.v, this.fixed].flatMap(Object.values)) x.dispose();
  }
}
