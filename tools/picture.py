"""Draws the README's picture, nbs/images/mixers.png: `python tools/picture.py`."""
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from metaformer_edu.core.basics import seed_everything
from metaformer_edu.core.figures import set_style, show_matrix
from metaformer_edu.interpret.influence import influence
from metaformer_edu.models.mixers import MIXERS
from metaformer_edu.models.registry import MODELS

OUT = Path(__file__).resolve().parent.parent / "nbs/images/mixers.png"
FAMILIES = {"identityformer": "Identity", "randformer": "RandomMixing", "poolformerv2": "Pooling",
            "convformer": "SepConv", "caformer": "Attention"}
COLOURS = ["#332288", "#cc6677", "#117733", "#997700", "#4477aa"]  # told apart by the colour-blind, and by marker


def matrix_of(name, tokens):
    "Which output token of the grid changes with which input token: (64, 64)."
    mixer = MIXERS[name](tokens.shape[-1], **({"num_tokens": 64} if name == "RandomMixing" else {}))
    return influence(mixer, tokens)


def main():
    seed_everything(0)
    set_style()
    tokens = torch.randn(1, 8, 8, 16)
    fig = plt.figure(figsize=(9.5, 5.8), layout="constrained")
    grid = fig.add_gridspec(2, 5, height_ratios=[1, 1.7])
    for i, (mixer, colour) in enumerate(zip(FAMILIES.values(), COLOURS)):
        ax = fig.add_subplot(grid[0, i])
        show_matrix(matrix_of(mixer, tokens), "", ax, fmt="")
        ax.set_title(mixer, color=colour, fontweight="bold")
    ax = fig.add_subplot(grid[1, :])
    for family, colour, marker in zip(FAMILIES, COLOURS, "osD^v"):
        rows = [m for m in MODELS.values() if m.family == family and m.data == "in1k" and m.resolution == 224]
        ax.plot([m.macs / 1e9 for m in rows], [m.top1 for m in rows], marker=marker, color=colour)
        last = rows[-1]
        ax.annotate(f"{family}, {last.top1} %", (last.macs / 1e9, last.top1), xytext=(8, -4),
                    textcoords="offset points", color=colour)
    ax.set(xlabel="GMACs for one image", ylabel="ImageNet-1K top-1, %", xlim=(0, 28), ylim=(74, 86.5))
    ax.grid(alpha=0.25)
    OUT.parent.mkdir(exist_ok=True)
    fig.savefig(OUT, dpi=110)
    print(OUT)


if __name__ == "__main__":
    main()
