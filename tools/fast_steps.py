"""What metaformer_edu.speed.fast.fast does to three models on this machine: kept for lesson speed/fast, which draws
it.

    python tools/fast_steps.py [--models caformer_s18 …] [--batch-size 16] [--img-size 224] [--threads 2]
    [--output metaformer_edu/logs/fast_cpu.json]
"""
import argparse
import json
from datetime import date
from pathlib import Path

import torch

import metaformer_edu
from metaformer_edu.commands.benchmark import machine_facts
from metaformer_edu.models.registry import create_model
from metaformer_edu.speed.fast import fast


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["caformer_s18", "convformer_s18", "poolformerv2_s12"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(metaformer_edu.__file__).parent / "logs" / "fast_cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    runs = {}
    for name in args.models:
        quick = fast(create_model(name), torch.randn(args.batch_size, 3, args.img_size, args.img_size),
                     rounds=args.rounds)
        print(name, quick.report, sep="\n", flush=True)
        runs[name] = {"steps": quick.steps}
    kept = {**machine_facts(torch.device("cpu")), "date": date.today().isoformat(), "threads": args.threads,
            "batch_size": args.batch_size,
            "img_size": args.img_size, "rounds": args.rounds, "runs": runs}
    Path(args.output).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
