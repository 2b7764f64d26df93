"""Times our Grad-CAM and grad-cam's own, in turns and on the same images: `python tools/bench_explain.py`."""
import argparse
import statistics
import time

import numpy as np
import torch
from pytorch_grad_cam import GradCAM

from metaformer_edu.interpret.cam import explain, find_stage
from metaformer_edu.models.registry import create_model


class Stored:
    "Bytes that autograd keeps for the backward pass while a block runs."
    def __enter__(self):
        self.bytes, seen = 0, set()

        def pack(x):
            if x.data_ptr() not in seen:
                seen.add(x.data_ptr())
                self.bytes += x.numel() * x.element_size()
            return x
        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="caformer_s18", help="of the zoo (default %(default)s)")
    parser.add_argument("-b", "--batch-size", type=int, default=4)
    parser.add_argument("--stage", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = create_model(args.model).eval()
    images = torch.randn(args.batch_size, 3, model.img_size, model.img_size)
    labels = [1] * args.batch_size

    def ours():
        return explain(model, images, labels, args.stage).maps.numpy()

    def theirs():
        end = find_stage(model, args.stage)
        with GradCAM(model, [end.module], lambda x: end.maps(x, images.shape[-2:])) as cam:
            return cam(images, [lambda logits: logits[1]] * len(images))
    np.testing.assert_allclose(ours(), theirs(), atol=1e-4)
    stored = []
    for function in (ours, theirs):
        with Stored() as kept:
            function()
        stored.append(kept.bytes)
    times = {ours: [], theirs: []}
    for n in range(args.rounds):
        for function in (ours, theirs) if n % 2 else (theirs, ours):
            start = time.perf_counter()
            function()
            times[function].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(times[ours], times[theirs])]
    for name, function in (("ours", ours), ("grad-cam", theirs)):
        print(
            f"{name:9} {statistics.median(times[function]):.2f} s ({min(times[function]):.2f} to "
            f"{max(times[function]):.2f}) for {args.batch_size} images"
        )
    print(
        f"grad-cam / ours: time {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), kept for the "
        f"backward pass {stored[1] / max(stored[0], 1):.1f}"
        f" ({stored[0] / 2**20:.1f} and {stored[1] / 2**20:.1f} MiB), {args.model}, stage {args.stage}, torch "
        f"{torch.__version__}, {args.threads} thread(s)"
    )


if __name__ == "__main__":
    main()
