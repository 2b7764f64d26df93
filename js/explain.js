// Where a model looks, and who hears whom: as interpret/cam.py and interpret/influence.py say it.
import { numpy as np, nn, grad } from '@jax-js/jax';
import { Downsampling, Linear, MetaFormerBlock, NORMS, attentionWeights, queriesKeysValues, watch } from './engine.js';

// Grad-CAM at the end of a stage, before it is scaled. tokens (1, h, w, C), label (classes,) one-hot → (h, w)
export function gradcam(model, tokens, label, stage) {
  return model.compiled(`gradcam ${stage}`, (x, chosen) => {
    const logit = (t) => {
      const later = model.stages(t, stage + 1), last = later.pop() ?? t;
      later.forEach((y) => y.dispose());
      return model.head(last).mul(chosen).sum();
    };
    const weights = grad(logit)(x.ref).mean([1, 2], { keepdims: true });
    return nn.relu(weights.mul(x).sum(-1)).slice(0);
  })(tokens, label);
}

function before(model, x, stage, i) { // what a block gets: from the tokens before its stage, or from the pixels
  x = Downsampling(model.w.downsample_layers[stage], x, stage);
  for (let b = 0; b < i; b++) x = MetaFormerBlock(model.w.stages[stage][b], x, model.block(stage, b)[1]);
  return x;
}

// What its mixer gets, behind the norm
export function mixerInput(model, tokens, stage, i = 0) {
  return model.compiled(`input ${stage} ${i}`, (x) =>
    NORMS[model.norm](model.w.stages[stage][i].norm1, before(model, x, stage, i)))(tokens);
}

// Every number on the way through a block, by names: x is what it gets, out what it gives
export function inside(model, tokens, stage, i) {
  return model.compiled(`inside ${stage} ${i}`, (t) => {
    const x = before(model, t, stage, i), [w, options] = model.block(stage, i);
    return { x: x.ref, ...watch(() => MetaFormerBlock(w, x, options)) };
  })(tokens);
}

const strength = (x) => np.sqrt(np.square(x).mean(-1)).slice(0); // of each token: the root of its numbers' mean square

// The strength of all tokens, (h, w): as a stage begins, and behind each of its blocks
export function strengths(model, tokens, stage) {
  return model.compiled(`strengths ${stage}`, (t) => {
    let x = before(model, t, stage, 0);
    const found = [strength(x.ref)];
    for (const i of model.w.stages[stage].keys()) {
      x = MetaFormerBlock(model.w.stages[stage][i], x, model.block(stage, i)[1]);
      found.push(strength(x.ref));
    }
    x.dispose();
    return found;
  })(tokens);
}

// How much one token of f(x) changes with each token of x, as `squared_norms` of interpret/influence.py has it: one copy
// of x for each direction. f: (B, H, W, C) → (B, H', W', C'); token: one-hot (H', W'); directions (k, C') → (H, W)
export function influence(f, x, token, directions) {
  const [k, channels] = directions.shape, [h, w] = token.shape;
  const along = token.reshape([1, h, w, 1]).mul(directions.reshape([k, 1, 1, channels]));
  const gradients = grad((copies) => f(copies).mul(along).sum())(np.tile(x, [k, 1, 1, 1]));
  return np.sqrt(np.square(gradients).sum(-1).mean(0));
}

// --- who hears whom: the matrix (H·W, H·W) of each mixer ---

const pairs = (f, h, w) => { // f(row distance, column distance) for all pairs of tokens
  const values = new Float32Array((h * w) ** 2), n = h * w;
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) values[i * n + j] = f(Math.floor(j / w) - Math.floor(i / w), (j % w) - (i % w));
  }
  return np.array(values).reshape([n, n]);
};

function separableWindows(w, x) { // norms of W₂ diag(K_o · slope_j) W₁ for each place o of the window → the matrix
  const [, h, wd] = x.shape, kernel = w.dwconv.weight, k = kernel.shape[2], n = h * wd, mid = kernel.shape[0];
  const slope = nn.relu(Linear(w.pwconv1, x)).mul(w.act1.scale.ref).mul(2).reshape([n, mid]);
  const gram = np.matmul(w.pwconv2.weight.ref.transpose(), w.pwconv2.weight.ref)
    .mul(np.matmul(w.pwconv1.weight.ref, w.pwconv1.weight.ref.transpose()));
  const v = kernel.ref.reshape([mid, k * k]).transpose().reshape([k * k, 1, mid]).mul(slope); // place o, heard token j
  const strength = np.sqrt(nn.relu(np.matmul(v.ref, gram).mul(v).sum(-1)).div(w.pwconv2.weight.shape[0])); // (k·k, n)
  return { strength, k };
}

export const MATRICES = {
  Identity: (w, x) => { x.dispose(); return np.eye(x.shape[1] * x.shape[2]); },
  RandomMixing: (w, x) => { x.dispose(); return w.random_matrix.ref; },
  Pooling: (w, x) => {
    const [, h, wd] = x.shape, near = pairs((a, b) => Number(Math.abs(a) < 2 && Math.abs(b) < 2), h, wd);
    x.dispose();
    return near.ref.div(near.sum(1, { keepdims: true })).sub(np.eye(h * wd));
  },
  SepConv: (w, x) => { // strength (k·k, n): of the place of j in the window of i
    const [, h, wd] = x.shape, { strength, k } = separableWindows(w, x), r = (k - 1) / 2, n = h * wd;
    const place = pairs((a, b) => (Math.abs(a) > r || Math.abs(b) > r ? k * k : (a + r) * k + b + r), h, wd);
    const padded = np.pad(strength, [[0, 1], [0, 0]]); // a row of zeros for what is not in the window
    return padded.slice(place.astype(np.int32), np.tile(np.arange(n).astype(np.int32).reshape([1, n]), [n, 1]));
  },
  Attention: (w, x, { head_dim = 32 } = {}) => { // the weights A held fixed: the norm of Σ A[i, j] W_o W_v over the heads
    const [q, k, v] = queriesKeysValues(w, x, head_dim), A = attentionWeights(q, k, head_dim).slice(0);
    v.dispose();
    const heads = A.shape[0], [dim, inner] = w.proj.weight.shape;
    const values = w.qkv.weight.ref.reshape([3, heads, head_dim, -1]).slice(2);
    const out = w.proj.weight.ref.reshape([dim, heads, head_dim]).transpose([1, 0, 2]);
    const paths = np.matmul(out, values).reshape([heads, -1]);
    const gram = np.matmul(paths.ref, paths.transpose());
    const n = A.shape[1], flat = A.reshape([heads, n * n]);
    const squares = np.matmul(gram, flat.ref).mul(flat).sum(0);
    return np.sqrt(nn.relu(squares).div(dim)).reshape([n, n]);
  },
};
