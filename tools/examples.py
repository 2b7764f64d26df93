"""Makes the bundled example runs from finished ones: `python tools/examples.py runs/tiny_*-shapes-shape-seed0`."""
import argparse
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch.nn.functional as F

from metaformer_edu.interpret.snapshots import read_snapshots, read_tensors
from metaformer_edu.models.registry import get_row
from metaformer_edu.models.weights import read_weights
from metaformer_edu.training.run_folder import read_about

OUT = Path(__file__).resolve().parent.parent / "metaformer_edu" / "examples"
SIDE = 96  # pixels of a picture
MOST = 4_000_000  # bytes of all examples


def write(path, tensors, **metadata):
    path.write_bytes(safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata or None))


def bundle(run, out):
    "The small version of a run, in the folder of its family; ValueError if it is no finished run with snapshots."
    if not (about := read_about(run)):
        raise ValueError(f"{run} is no folder of a run that metaformer-train wrote.")
    epochs = read_snapshots(run).epochs
    if epochs != list(range(1, about["settings"]["total_epochs"] + 1)):
        raise ValueError(f"{run} is not finished, or has no snapshot of some epochs: it has {epochs}.")
    folder = out / get_row(about["settings"]["model"]).family
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "snapshots", folder / "snapshots")
    pictures = read_tensors(run / "snapshots/pictures.safetensors")
    small = F.interpolate(pictures["pictures"].permute(0, 3, 1, 2).float(), (SIDE, SIDE), mode="area")
    write(folder / "snapshots/pictures.safetensors", {**pictures, "pictures": small.permute(0, 2, 3, 1).round().byte()})
    for name in ("args.yaml", "summary.csv"):
        shutil.copy(run / name, folder)
    write(folder / "best.safetensors",
          {k: v.half() if v.is_floating_point() else v for k, v in read_weights(run / "best.safetensors").items()},
          format="pt")
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of metaformer-train")
    parser.add_argument("--out", type=Path, default=OUT, help="where the examples go (default: into the package)")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            folder = bundle(run, args.out)
            print(f"{folder}: {sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()):,} bytes")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    total = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{total:,} bytes in all")
    if total > MOST:
        sys.exit(f"{parser.prog}: {total:,} bytes are too many: {MOST:,} is the most.")


if __name__ == "__main__":
    main()
