// What the page asks for, computed beside it, so that the page never waits: models by name, one request at a time.
import { numpy as np } from '@jax-js/jax';
import { FAMILIES, MetaFormer, MIXERS } from './engine.js';
import { MATRICES, gradcam, influence, inside, mixerInput, strengths } from './explain.js';
import { Learner } from './learn.js';
import { readDigits } from './pictures.js';
import { flat, newMixer, readWeights, start } from './weights.js';
import { unpack } from './pack.js';

const models = {}; // name → { model, seen: what it thinks of the last picture }

let learner = null; // the model that trains here

const numbers = async (x) => new Float32Array(await x.data());

const told = async (tree) => // { name: [shape, numbers] }
  Object.fromEntries(await Promise.all(Object.entries(flat(tree)).map(
    async ([key, x]) => [key, [x.shape, await numbers(x)]])));

const free = (tree) => Object.values(flat(tree)).forEach((x) => x.dispose());

function forget(found) {
  if (found.seen) free(found.seen);
  found.seen = null;
}

const tokensBefore = ({ seen }, stage) => // pixels before the first stage
  (stage ? seen.tokens[stage - 1].ref : seen.image.ref.transpose([0, 2, 3, 1]));

function signs(k, channels, seed) { // random weightings of a token's channels
  const next = () => { seed = (Math.imul(seed, 1664525) + 1013904223) | 0; return seed < 0 ? -1 : 1; };
  return np.array(Float32Array.from({ length: k * channels }, next)).reshape([k, channels]).mul(channels ** -0.5);
}

function path(found, stage, block, whole) { // a function of tokens, its input, and a name for what is compiled
  const { model } = found;
  if (whole) {
    const f = (t) => { // from the pixels to the end of the stage
      for (let s = 0; s <= stage; s++) t = model.stage(s, t);
      return t;
    };
    return [f, tokensBefore(found, 0), `whole ${stage}`];
  }
  const [w, options] = model.block(stage, block);
  const f = (t) => MIXERS[options.token_mixer](w.token_mixer, t, options);
  return [f, mixerInput(model, tokensBefore(found, stage), stage, block), `mixer ${stage} ${block}`];
}

const actions = {
  async start({ devices }) { return start(devices); },

  async open({ name, weights, config }) { // weights: bytes of a safetensors file, or as `pack` of widgets/page.py writes
    const bytes = typeof weights === 'string' ? await unpack(weights) : weights;
    const model = new MetaFormer(readWeights(bytes), config ?? FAMILIES[name]), old = models[name];
    models[name] = { model };
    if (old) {
      forget(old);
      old.model.uncompiled();
      free(old.model.w);
    }
    return models[name].model.w.stages.map((blocks) => blocks.length);
  },

  async look({ name, image, shape }) { // a normalised picture (3, H, W) → logits, and the grid of each stage
    const found = models[name];
    forget(found);
    const x = np.array(image).reshape([1, ...shape]);
    found.seen = { image: x.ref, ...found.model.look(x) };
    return { logits: await numbers(found.seen.logits.ref), grids: found.seen.tokens.map((t) => t.shape.slice(1, 3)) };
  },

  async gradcam({ name, label, stage }) { // (h, w) at the end of the stage, as it is before it is scaled
    const { model, seen } = models[name];
    const onehot = Float32Array.from({ length: seen.logits.shape[1] }, (_, i) => Number(i === label));
    return numbers(gradcam(model, seen.tokens[stage].ref, np.array(onehot), stage));
  },

  async matrix({ name, stage, block = 0 }) { // who hears whom in a mixer, (n, n)
    const found = models[name], { model } = found, [w, options] = model.block(stage, block);
    const f = model.compiled(`matrix ${stage} ${block}`, (t) => MATRICES[options.token_mixer](w.token_mixer, t, options));
    return numbers(f(mixerInput(model, tokensBefore(found, stage), stage, block)));
  },

  async hears({ name, stage, block = 0, token, whole = false, probes = null }) { // by gradients, for one token
    const found = models[name], [f, x, what] = path(found, stage, block, whole);
    const [h, w] = found.seen.tokens[stage].shape.slice(1, 3), channels = found.seen.tokens[stage].shape[3];
    const all = probes ? signs(probes, channels, 1) : np.eye(channels), size = Math.min(8, all.shape[0]);
    const place = Float32Array.from({ length: h * w }, (_, i) => Number(i === token[0] * w + token[1]));
    const row = found.model.compiled(`hears ${what} ${size}`, (t, p, d) => influence(f, t, p, d));
    let sum = null;
    for (let i = 0; i < all.shape[0]; i += size) { // few at a time, for the memory
      const part = await numbers(row(x.ref, np.array(place).reshape([h, w]), all.ref.slice([i, i + size])));
      sum = sum ? sum.map((v, j) => v + part[j] ** 2) : part.map((v) => v ** 2);
    }
    const parts = all.shape[0] / size;
    all.dispose();
    x.dispose();
    return sum.map((v) => Math.sqrt(v / parts));
  },

  async inside({ name, stage, block }) { // all that a block computes
    const found = models[name];
    return told(inside(found.model, tokensBefore(found, stage), stage, block));
  },

  async weights({ name, stage, block }) { // by which it does
    const w = flat(models[name].model.block(stage, block)[0]);
    return told(Object.fromEntries(Object.entries(w).map(([key, x]) => [key, x.ref])));
  },

  async strengths({ name, stage }) { // a map for where a stage begins, and for each of its blocks
    const found = models[name];
    return Promise.all(strengths(found.model, tokensBefore(found, stage), stage).map(numbers));
  },

  async swap({ name, stage, mixer, tokens, seed = 0 }) { // every block of a stage gets a new, untrained mixer
    const { model } = models[name], blocks = model.w.stages[stage], [dim] = blocks[0].norm1.weight.shape;
    const mixers = blocks.map(() => newMixer(mixer, dim, tokens, seed++));
    model.uncompiled();
    blocks.forEach((block, i) => {
      free(block.token_mixer);
      block.token_mixer = mixers[i];
    });
    model.token_mixers = model.token_mixers.map((m, s) => (s === stage ? mixer : m));
    return model.token_mixers;
  },

  async learn({ digits, ...settings }) { // a new model; what is answered are the held-out pictures, 0 to 1, and their labels
    if (digits) await readDigits(digits);
    learner?.dispose();
    learner = new Learner(settings);
    return { ...learner.held, images: learner.held.images.map((v) => v / 4 + 0.5) };
  },
  async step() { return learner.step(); },
  async accuracy() { return learner.accuracy(); },
  async regard({ example, stage }) { return learner.look(example, stage); },
  async batch({ t }) { return learner.batch(t); },
  async parameters({ of }) { return learner.numbers(of); },
};

export function work() {
  let last = Promise.resolve();
  self.onmessage = ({ data: { id, action, request } }) => {
    last = last.then(() => actions[action](request)).then(
      (value) => self.postMessage({ id, value }),
      (error) => self.postMessage({ id, error: `${action}: ${error.message}` }));
  };
}
