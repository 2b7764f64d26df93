"""Measures the explanations of trained runs on shapes: `python tools/trust.py runs/* >
metaformer_edu/logs/trust.csv`.

For every method and stage: the pointing game (over all held-out images, over those that the model answers right,
and with a margin) and
the share of the map inside the mask. The stage of a method is chosen on other images; there the map is also
compared with that of another
class and with that of a model whose weights are shuffled.
"""
import argparse
import sys
from pathlib import Path

import torch

from metaformer_edu.core.basics import seed_everything
from metaformer_edu.core.files import as_csv, read_log
from metaformer_edu.data.datasets import load_data
from metaformer_edu.interpret.cam import METHODS, explain
from metaformer_edu.interpret.faithfulness import (
    area, deletion, insertion, pointing, random_maps, rank_correlation, share_inside, shuffled_copy)
from metaformer_edu.models.registry import create_model
from metaformer_edu.training.run_folder import as_csv, read_about

COLUMNS = ["model", "seed", "top1", "method", "stage", "chosen", "pointing", "right", "near", "inside", "other",
           "shuffled", "deletion", "insertion"]


def some(pictures, n):
    "(images, masks, labels) of the first n pictures, as they are shown in a test."
    images, labels = zip(*(pictures[i] for i in range(n)))
    return torch.stack(images), torch.stack([pictures.images.mask(i) for i in range(n)]), list(labels)


def hits(maps, masks):
    """The pointing game, with the masks as they are and with a margin of a token of stage 1: the evidence for a
    shape is its outline."""
    near = torch.nn.functional.max_pool2d(masks[:, None].float(), 9, 1, 4)[:, 0] > 0
    return dict(pointing=percent(pointing(maps, masks)), near=percent(pointing(maps, near)))


def percent(values):
    return round(100 * values.double().mean().item(), 1)


def measure(run, n, few):
    "One row for every method and stage, and one for maps that know nothing."
    about = read_about(run)
    size, settings, classes = about["img_size"], about["settings"], len(about["class_names"])
    train, val, _ = load_data(settings["data"], size, augment=False)
    model = create_model(settings["model"], checkpoint=run / "last.safetensors", num_classes=classes,
                         img_size=size).eval()
    (trial, trial_masks, trial_labels), (images, masks, labels) = some(train, n), some(val, n)
    start = dict(model=settings["model"], seed=settings["seed"], top1=round(read_log(run)[-1]["val_top1"], 2))
    blind = random_maps(n, (size, size), seed=settings["seed"])
    yield dict(start, method="knows nothing", **hits(blind, masks), inside=percent(share_inside(blind, masks)))
    shuffled = shuffled_copy(model)
    for method in METHODS:
        seed_everything(0)
        trials = {s: percent(pointing(explain(model, trial, trial_labels, s, method).maps, trial_masks))
                  for s in (1, 2, 3, 4)}
        best = max(trials, key=trials.get)
        for stage in trials:
            shown = explain(model, images, labels, stage, method)
            right = shown.logits.argmax(1) == torch.tensor(labels)
            row = dict(start, method=method, stage=stage, chosen=int(stage == best), **hits(shown.maps, masks),
                       right=percent(pointing(shown.maps, masks)[right]),
                       inside=percent(share_inside(shown.maps, masks)))
            if stage == best:
                shown = explain(model, images[:few], labels[:few], stage, method)
                others = [(label + 1) % classes for label in shown.targets]
                row.update(other=round(rank_correlation(shown.maps, explain(model, shown.images, others, stage, method).maps).mean().item(), 3),
                           shuffled=round(rank_correlation(shown.maps, explain(shuffled, shown.images, shown.targets, stage, method).maps).mean().item(), 3),
                           deletion=round(area(deletion(model, shown)).mean().item(), 3),
                           insertion=round(area(insertion(model, shown)).mean().item(), 3))
            yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of metaformer-train on shapes")
    parser.add_argument("-n", type=int, default=100, help="images for the pointing game (default %(default)s)")
    parser.add_argument("--few", type=int, default=20, help="of them for the other measures (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for run in args.runs:
        rows += measure(run, args.n, args.few)
        print(run, file=sys.stderr, flush=True)
    print(as_csv(rows, COLUMNS), end="")


if __name__ == "__main__":
    main()
