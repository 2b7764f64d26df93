"""The published figures, and the weights and images that belong to the golden logits: reference/README.md as code."""
import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from timm.models import metaformer as timm_metaformer

REFERENCE = Path(__file__).resolve().parent / "reference"
ROWS = json.loads((REFERENCE / "models.json").read_text(encoding="utf-8"))
BY_NAME = {r["name"]: r for r in ROWS}
FAMILIES = ("identityformer", "randformer", "poolformerv2", "convformer", "caformer")
SMALLEST = {f: f + ("_s18" if f in ("convformer", "caformer") else "_s12") for f in FAMILIES}


def weight(name, shape):
    "The golden tensor of that published name, float64."
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    u = torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1
    last = name.split(".")[-1]
    if name.endswith(("act.scale", "act1.scale")):
        return 0.8944 * (1 + 0.1 * u)
    if name.endswith(("act.bias", "act1.bias")):
        return -0.4472 * (1 + 0.1 * u)
    if "random_matrix" in name:
        return torch.softmax(3 * u, dim=-1)
    if last == "scale" or ("norm" in name and last == "weight"):
        return 1 + 0.1 * u
    if last == "bias":
        return 0.1 * u
    return u * (3 / u[0].numel()) ** 0.5


def fill(model):
    """Put golden weights into `model`, in its own precision. They depend on names and shapes: a name that is not the
    published one gives other logits."""
    model.load_state_dict({k: weight(k, v.shape) for k, v in model.state_dict().items()})
    return model.eval()


def images(size=224, batch=2, channels=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return (torch.rand(batch, channels, size, size, generator=g, dtype=torch.float64) * 2 - 1).to(dtype)


@functools.cache
def logits():
    "Model name -> (2, 1000)."
    with np.load(REFERENCE / "golden_logits.npz") as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def published_shapes(row):
    """State dict names and shapes of the published code for a row of models.json, written down from its architecture
    alone."""
    dims, shapes = row["dims"], {}
    for i, dim in enumerate(dims):
        before, kernel = (3, 7) if i == 0 else (dims[i - 1], 3)
        shapes[f"downsample_layers.{i}.conv.weight"] = (dim, before, kernel, kernel)
        shapes[f"downsample_layers.{i}.conv.bias"] = (dim,)
        shapes[f"downsample_layers.{i}." + ("post_norm" if i == 0
                                            else "pre_norm") + ".weight"] = (dim if i == 0 else before,)
        mixer = {
            "Identity": {},
            "Pooling": {},
            "RandomMixing": {"random_matrix": ((row["resolution"] // 2 ** (i + 2)) ** 2,) * 2},
            "SepConv": {"pwconv1.weight": (2 * dim, dim), "act1.scale": (1,), "act1.bias": (1,),
                        "dwconv.weight": (2 * dim, 1, 7, 7), "pwconv2.weight": (dim, 2 * dim)},
            "Attention": {"qkv.weight": (3 * dim, dim), "proj.weight": (dim, dim)},
        }[row["mixers"][i]]
        block = {"norm1.weight": (dim,), "norm2.weight": (dim,), **{f"token_mixer.{k}": v for k, v in mixer.items()},
                 "mlp.fc1.weight": (4 * dim, dim), "mlp.act.scale": (1,), "mlp.act.bias": (1,),
                 "mlp.fc2.weight": (dim, 4 * dim)}
        if i >= 2:
            block |= {"res_scale1.scale": (dim,), "res_scale2.scale": (dim,)}
        for j in range(row["depths"][i]):
            shapes |= {f"stages.{i}.{j}.{k}": v for k, v in block.items()}
    d, n = dims[-1], row["num_classes"]
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    if row["head"] == "Linear":
        return shapes | {"head.weight": (n, d), "head.bias": (n,)}
    return shapes | {"head.fc1.weight": (4 * d, d), "head.fc1.bias": (4 * d,), "head.norm.weight": (4 * d,),
                     "head.norm.bias": (4 * d,), "head.fc2.weight": (n, 4 * d), "head.fc2.bias": (n,)}


# timm leaves a downsampling out where the width stays the same, so these four widths differ
SMALL = dict(depths=(1, 1, 2, 1), dims=(32, 48, 64, 96), num_classes=10)


def small_timm(family):
    "timm's model of that family with the depths and widths of `SMALL`."
    t = timm_metaformer
    mixers = {"poolformerv2": t.Pooling, "convformer": t.SepConv,
              "caformer": [t.SepConv] * 2 + [t.Attention] * 2}[family]
    norms = {"poolformerv2": t.GroupNorm1NoBias, "convformer": t.LayerNorm2dNoBias,
             "caformer": [t.LayerNorm2dNoBias] * 2 + [t.LayerNormNoBias] * 2}[family]
    return t.MetaFormer(**SMALL, token_mixers=mixers, norm_layers=norms, use_mlp_head=family != "poolformerv2")
