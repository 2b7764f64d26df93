"""Seconds per epoch of this project's training loop and of timm's, on the same model, images and batch, in turns.

    python tools/bench_train.py [--model tiny_convformer] [--rounds 5] [--device cpu]

timm's side is its training script put together from timm's parts: create_dataset, create_loader, its optimizer,
loss, scaler,
meters and, as there, the loss read after every step. Each epoch trains and validates. The digits are written as
PNG files, and both
sides read them with the same transforms (timm's, with the published augmentation) and workers.
"""
import argparse
import itertools
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, NativeScaler, accuracy

from metaformer_edu.training.callbacks import ProgressBar
from metaformer_edu.training.settings import parse
from metaformer_edu.training.setup import build, make_trainer


def write_digits(root, size):
    images, labels = datasets.load_digits(return_X_y=True)
    train, val = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    for part, indices in (("train", train), ("validation", val)):
        for i in indices:
            path = root / part / str(labels[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digit = Image.fromarray((images[i].reshape(8, 8) * 15.9).astype("uint8")).resize((size, size))
            digit.convert("RGB").save(path)


class Ours:
    def __init__(self, root, args):
        flags = (
            f"--model {args.model} --img-size {args.size} -b {args.batch_size} -j {args.workers} --epochs 300 --opt "
            f"adamw "
            f"--lr 1e-3 --mixup 0 --cutmix 0 --cooldown-epochs 0 --device {args.device}"
            + (" --amp" if args.amp else "")
        )
        settings = parse([str(root), *flags.split()])
        self.trainer = make_trainer(settings, *build(settings)[:3])
        self.trainer.callbacks = [c for c in self.trainer.callbacks if not isinstance(c, ProgressBar)]

    def epoch(self):
        self.trainer.train_epoch()
        self.trainer.end_epoch()


class Timms:
    def __init__(self, root, args):
        self.device, self.args = torch.device(args.device), args
        self.model = timm.create_model(f"edu_{args.model}", num_classes=10, img_size=args.size).to(self.device)
        common = dict(input_size=(3, args.size, args.size), batch_size=args.batch_size,
                      use_prefetcher=args.device != "cpu",
                      num_workers=args.workers, device=self.device, persistent_workers=args.workers > 0)
        train, val = (create_dataset("", root=root, split=s, is_training=s == "train") for s in ("train", "validation"))
        self.train = create_loader(train, is_training=True, re_prob=0.25, re_mode="pixel",
                                   auto_augment="rand-m9-mstd0.5-inc1",
                                   interpolation="random", **common)
        self.val = create_loader(val, interpolation="bicubic", crop_pct=1.0, **common)
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=1e-3, weight_decay=0.05)
        self.schedule, _ = create_scheduler_v2(self.optimizer, "cosine", 300, min_lr=1e-5, warmup_lr=1e-6,
                                               warmup_epochs=5,
                                               step_on_epochs=True, updates_per_epoch=len(self.train))
        self.loss_fn = LabelSmoothingCrossEntropy(0.1)
        self.scaler = NativeScaler(device=args.device) if args.amp and args.device != "cpu" else None
        self.number = 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.amp else nullcontext()

    def batches(self, loader):
        return loader if self.device.type != "cpu" else ((x.to(self.device), y.to(self.device)) for x, y in loader)

    def epoch(self):
        self.model.train()
        losses = AverageMeter()
        for step, (images, labels) in enumerate(self.batches(self.train)):
            with self.autocast():
                loss = self.loss_fn(self.model(images), labels)
            losses.update(loss.item(), len(images))
            self.optimizer.zero_grad()
            if self.scaler:
                self.scaler(loss, self.optimizer)
            else:
                loss.backward()
                self.optimizer.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.schedule.step_update(self.number * len(self.train) + step + 1, metric=losses.avg)
        self.validate()
        self.number += 1
        self.schedule.step(self.number)

    @torch.no_grad()
    def validate(self):
        self.model.eval()
        meters = AverageMeter(), AverageMeter(), AverageMeter()
        for images, labels in self.batches(self.val):
            with self.autocast():
                output = self.model(images)
                loss = torch.nn.functional.cross_entropy(output, labels)
            for meter, value in zip(meters, (loss, *accuracy(output, labels, topk=(1, 5)))):
                meter.update(value.item(), len(images))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_convformer")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "digits"
        write_digits(root, args.size)
        sides = {"ours": Ours(root, args), "timm": Timms(root, args)}
        times = {name: [] for name in sides}
        for round, name in itertools.product(range(args.rounds + 1), sides):
            start = time.perf_counter()
            sides[name].epoch()
            if round:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    ratios = [t / o for o, t in zip(times["ours"], times["timm"])]
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds):.2f} s an epoch ({min(seconds):.2f} to {max(seconds):.2f})")
    print(
        f"timm / ours: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {args.rounds} rounds "
        f"in turns; "
        f"{args.model}, {args.size} px, batch {args.batch_size}, {args.device}, {args.threads} thread(s), torch "
        f"{torch.__version__}, "
        f"timm {timm.__version__}"
    )


if __name__ == "__main__":
    main()
