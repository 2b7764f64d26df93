"""Training features: LoRA, frozen stages, layer-wise decay, BCE, growing images, distillation, repeated pictures."""
import copy
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.models import group_parameters
from torch import nn

from metaformer_edu.core.basics import count_params, seed_everything
from metaformer_edu.data.datasets import load_data
from metaformer_edu.data.loaders import EpochSampler, make_loaders
from metaformer_edu.models.layers import Mlp
from metaformer_edu.models.metaformer import MetaFormer
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.train import main, run
from metaformer_edu.training import run_folder, setup, trainer
from metaformer_edu.training.callbacks import Callback, Distill, EarlyStopping, GrowImages, MixUp
from metaformer_edu.training.finetune import LoRALinear, add_lora, freeze_stages, merge_lora
from metaformer_edu.training.processes import TrainSampler
from metaformer_edu.training.settings import parse
from metaformer_edu.training.setup import open_run
from metaformer_edu.training.trainer import make_optimizer, make_schedule

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ["identityformer", "randformer", "poolformerv2", "convformer", "caformer"]
QUICK = "--model tiny_caformer --img-size 32 -b 8 -j 0 --epochs 2 --snapshots 0 --mixup 0 --cutmix 0 --aa none".split()


def tiny(family="caformer", **kwargs):
    seed_everything(0)
    return create_model(f"tiny_{family}", **dict(num_classes=3, img_size=32) | kwargs)


def shaken(model):
    "As if it had learned: no parameter as it was made."
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    "Two classes of 16 pictures, and 4 held-out ones of each."
    folder, rng = tmp_path_factory.mktemp("data") / "stripes", np.random.default_rng(0)
    for part, n in (("train", 16), ("val", 4)):
        for step, name in enumerate(("broad", "fine"), 1):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(128, size=(40, 48, 3), dtype=np.uint8)
                pixels[::5 - 2 * step] += 127
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    "They take longer than these trainings."
    for name in ("draw_curves", "show_predictions", "show_mistakes"):
        monkeypatch.setattr(run_folder, name, lambda *args: SimpleNamespace(savefig=lambda *args, **kwargs: None))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(shaken(tiny(num_classes=2)), tmp_path_factory.mktemp("weights") / "w.safetensors")


def refused(capsys, *args):
    "The sentence with which the command refuses, with status 2."
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, args)))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("metaformer-train: ") and said.count("\n") == 1, said
    return said


class Cut(Callback):
    "Ends a training after the third of four updates, when its state has been written."
    order = 98

    def after_update(self, trainer):
        if trainer.updates == 3:
            raise KeyboardInterrupt


def whole_and_resumed(stripes, tmp_path, *flags):
    "The same run twice: the second is cut off after three updates of eight, and goes on. Asserts that they are equal."
    args = [str(stripes), *QUICK, *map(str, flags), "--recovery-interval", "3", "--output"]
    whole = run(parse([*args, str(tmp_path / "whole")]))
    with pytest.raises(KeyboardInterrupt):
        run(parse([*args, str(tmp_path / "cut")]), [Cut()])
    again = run(parse([*args, str(tmp_path / "cut"), "--resume", "auto"]))
    assert again.path.parent.name == "cut" and len(list(again.path.parent.iterdir())) == 1
    for name in ("last.safetensors", "best.safetensors", "summary.csv"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    return whole


# --- LoRA ---

@pytest.mark.parametrize("family", FAMILIES)
def test_lora_starts_as_the_model_and_merges_into_a_plain_one(family):
    model = shaken(tiny(family)).eval()
    names, x = list(model.state_dict()), torch.randn(4, 3, 32, 32)
    lora = add_lora(copy.deepcopy(model), 3, alpha=6).eval()
    before = lora.state_dict()
    assert torch.equal(lora(x), model(x))
    wide = [m for m in lora.modules() if isinstance(m, LoRALinear)]
    assert wide and {m.scale for m in wide} == {2} and all(m.down.shape[0] == m.up.shape[1] == 3 for m in wide)
    answers, frozen = shaken(lora)(x), [n for n, p in lora.named_parameters() if not p.requires_grad]
    assert not torch.equal(answers, model(x)) and all(torch.equal(before[n], model.state_dict()[n]) for n in frozen)
    merged = merge_lora(lora)
    assert merged is lora and list(merged.state_dict()) == names
    kinds = lambda m: [type(o) for o in m.modules()]
    assert kinds(merged) == kinds(model) and not any(isinstance(m, LoRALinear) for m in merged.modules())
    plain = tiny(family).eval()
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain(x), answers) and torch.equal(merged(x), answers)


def test_what_lora_trains():
    model = add_lora(tiny(), 2)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith((".up", ".down")) or n.startswith(("head.", "norm.")) for n in learns)
    linear = [n for n, m in tiny().stages.named_modules() if isinstance(m, nn.Linear)]
    assert len([n for n in learns if n.endswith(".up")]) == len(linear) == 20
    added = sum(2 * (m.weight.shape[0] + m.weight.shape[1]) for m in model.modules() if isinstance(m, LoRALinear))
    outside = sum(p.numel() for part in (model.head, model.norm) for p in part.parameters())
    assert count_params(model)[0] == added + outside
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="rank is 1 or more, not 0"):
        add_lora(tiny(), 0)


def test_lora_in_training_is_the_merged_layer():
    layer = shaken(LoRALinear(nn.Linear(6, 4).requires_grad_(False), 2, 3.)).train()
    x = torch.randn(5, 7, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.merged(), layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.merged().dtype == torch.float32


def test_other_layers_of_ones_own_are_merged_as_what_they_were():
    model = MetaFormer(depths=(1, 1), dims=(8, 16), num_classes=2, img_size=16, mlps=lambda dim: Mlp(dim, bias=True),
                       token_mixers=lambda dim: nn.Linear(dim, dim), res_scale_init_values=None)
    x = torch.randn(1, 3, 16, 16)
    answers = shaken(add_lora(copy.deepcopy(model).double(), 1))
    merged = merge_lora(copy.deepcopy(answers))
    assert type(merged.stages[0][0].token_mixer) is nn.Linear and merged.stages[0][0].mlp.fc1.bias is not None
    torch.testing.assert_close(merged(x.double()), answers(x.double()))


def test_a_run_with_lora_leaves_plain_weights_and_goes_on(stripes, weights, tmp_path, capsys):
    found = whole_and_resumed(stripes, tmp_path, "--initial-checkpoint", weights, "--lora-rank", 2, "--model-ema",
                              "--model-ema-decay", 0.5)
    learns, frozen = count_params(found.trainer.model)
    assert f"({learns + frozen:,} parameters, of which {learns:,} learn)" in capsys.readouterr().out
    start, end = load_file(weights), load_file(found.path / "last.safetensors")
    assert start.keys() == end.keys()
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    linear = {f"stages.{n}.weight" for n, m in tiny().stages.named_modules() if isinstance(m, nn.Linear)}
    assert moved == linear | {n for n in start if n.startswith(("norm.", "head."))}
    model = create_model("tiny_caformer", checkpoint=found.path / "last.safetensors", num_classes=2, img_size=32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), found.trainer.eval_model.eval()(x))
    assert same(found.model.state_dict(), model.state_dict())


# --- freezing, and layer-wise decay ---

def test_frozen_stages_do_not_move(stripes, weights, tmp_path):
    args = [str(stripes), *QUICK, "--initial-checkpoint", str(weights), "--freeze-stages", "2", "--weight-decay", "0.3"]
    found = run(parse([*args, "--epochs", "1", "--output", str(tmp_path)]))
    start, end = load_file(weights), found.model.state_dict()
    moved = {n for n in start if not torch.equal(start[n], end[n])}
    first = ("downsample_layers.0", "downsample_layers.1", "stages.0", "stages.1")
    assert moved == {n for n in start if not n.startswith(first)}
    for n in (-1, 5):
        with pytest.raises(ValueError, match=f"There are 4 stages, and {n} were to freeze"):
            freeze_stages(tiny(), n)


@pytest.mark.parametrize("flags", ["--lora-rank 2", "--freeze-stages 1"])
def test_random_weights_are_not_frozen(flags, stripes, capsys, tmp_path):
    said = refused(capsys, stripes, *QUICK, *flags.split(), "--output", tmp_path / "out")
    assert flags.split()[0] in said and "--initial-checkpoint PATH" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_numbered_from_the_image_to_the_answer(family):
    model = tiny(family)
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    assert layer.keys() == dict(model.named_parameters()).keys()
    expected = {"downsample_layers.0": 0, "stages.0.0": 1, "downsample_layers.1": 2, "stages.1.0": 2, "stages.2.0": 3,
                "downsample_layers.2": 3, "stages.2.1": 4, "downsample_layers.3": 5, "stages.3.0": 5, "norm": 6,
                "head": 6}
    for name, number in layer.items():
        assert number == next(n for start, n in expected.items() if name.startswith(f"{start}."))
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert {coarse[n] for n in layer if n.startswith(("stages.2.", "downsample_layers.2."))} == {3}
    assert max(coarse.values()) == 5


@pytest.mark.parametrize("sched", ["cosine", "None"])
@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb"])
def test_rates_fall_towards_the_image(opt, sched):
    model = tiny()
    optimizer = make_optimizer(model, opt, 1e-2, layer_decay=0.5)
    schedule = make_schedule(optimizer, 4, 5, sched=sched, min_lr=0.)
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    for done, share in ((0, 1), (10, 0.5)):
        if schedule:
            schedule.step_update(done)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for name, p in model.named_parameters():
            expected = 1e-2 * 0.5 ** (6 - layer[name]) * (share if schedule else 1)
            assert rates[id(p)] == pytest.approx(expected), name
    plain = make_optimizer(tiny(), opt, 1e-2)
    assert not any("lr_scale" in g or "initial_lr" in g for g in plain.param_groups)


def test_a_run_with_layer_decay_goes_on_and_takes_a_new_one(stripes, tmp_path):
    found = whole_and_resumed(stripes, tmp_path, "--layer-decay", 0.5)
    scales = lambda t: {round(g["lr_scale"], 9) for g in t.optimizer.param_groups}
    assert scales(found.trainer) == {0.5**n for n in range(7)}
    more = run(parse([str(stripes), *QUICK, "--layer-decay", "0.25", "--epochs", "3", "--resume", str(found.path)]))
    assert scales(more.trainer) == {round(0.25**n, 9) for n in range(7)}


# --- binary cross-entropy ---

@pytest.mark.parametrize("mixup", ["0", "0.8"])
def test_the_loss_is_timms_also_of_blended_images(mixup, stripes, tmp_path):
    flags = ["--bce-loss", "--bce-target-thresh", "0.3", "--smoothing", "0.2", "--mixup", mixup, "--epochs", "1"]
    seen = []

    class Look(Callback):
        def before_batch(self, t):
            seen.append((t.criterion, t.labels))
    run(parse([str(stripes), *QUICK, *flags, "--output", str(tmp_path)]), [Look()])
    loss, labels = seen[0]
    assert isinstance(loss, BinaryCrossEntropy) and labels.ndim == (2 if mixup != "0" else 1)
    logits = torch.randn(8, 2)
    targets = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, 2) * 0.8 + 0.1
    expected = nn.functional.binary_cross_entropy_with_logits(logits, (targets > 0.3).float())
    torch.testing.assert_close(loss(logits, labels), expected)


def test_the_published_loss_is_cross_entropy(stripes, tmp_path):
    t = open_run(parse([str(stripes), *QUICK, "--mixup", "0.8", "--output", str(tmp_path)])).trainer
    assert type(t.loss_fn) is nn.CrossEntropyLoss
    assert [type(c.loss_fn) for c in t.callbacks if isinstance(c, MixUp)] == [SoftTargetCrossEntropy]


# --- images that grow ---

@pytest.mark.parametrize("first, last, epochs, sizes", [
    (64, 160, 4, [64, 96, 128, 160]), (32, 64, 5, [32, 32, 64, 64, 64]), (32, 100, 3, [32, 64, 100]),
    (50, 100, 3, [64, 64, 100]), (32, 224, 1, [224]), (32, 40, 4, [32, 32, 32, 40])])
def test_sizes_grow_linearly_by_strides(first, last, epochs, sizes):
    grow = GrowImages(first, last, epochs)
    assert [grow.size(epoch) for epoch in range(epochs)] == sizes
    assert grow.size(epochs) == grow.size(epochs + 7) == last  # while it cools down


def test_a_run_whose_images_grow_goes_on(stripes, tmp_path):
    seen = []

    class Look(Callback):
        def before_batch(self, t):
            seen.append((t.epoch, *t.images.shape[-2:]))
    flags = ["--img-size", "64", "--grow-from", "32"]
    job = run(parse([str(stripes), *QUICK, *flags, "--output", str(tmp_path / "a")]), [Look()])
    assert seen == [(e, s, s) for e, s in ((0, 32), (1, 64)) for _ in range(4)]
    assert job.trainer.loaders[1].dataset[0][0].shape == (3, 64, 64)
    whole_and_resumed(stripes, tmp_path, *flags)


def test_small_images_are_the_large_ones_shrunk():
    grow, images = GrowImages(32, 64, 2), torch.rand(2, 3, 64, 64)
    trainer = SimpleNamespace(epoch=0, images=images)
    grow.before_batch(trainer)
    expected = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    assert torch.equal(trainer.images, expected)
    trainer.epoch, trainer.images = 1, images
    grow.before_batch(trainer)
    assert trainer.images is images


def test_a_model_of_one_size_cannot_grow(stripes, capsys, tmp_path):
    said = refused(capsys, stripes, *QUICK, "--model", "tiny_randformer", "--img-size", "64", "--grow-from", "32",
                   "--output", tmp_path / "out")
    assert "tiny_randformer is bound to one size" in said and not (tmp_path / "out").exists()


# --- patience, and the warm-up of the average ---

def test_patience_stops_a_run(stripes, tmp_path, monkeypatch):
    row = dict(val_loss=1., val_top1=50., ema_top1=40., ema_loss=1.)
    monkeypatch.setattr(trainer, "_evaluate_each", lambda *_: dict(row))
    for flags, column in (([], "val_top1"), (["--model-ema", "--eval-metric", "loss"], "ema_loss")):
        job = run(parse([str(stripes), *QUICK, "--epochs", "6", "--patience", "2", *flags, "--output", str(tmp_path)]))
        assert len(job.log) == 3
        assert [c.column for c in job.trainer.callbacks if isinstance(c, EarlyStopping)] == [column]


def test_the_average_warms_up_as_timms(stripes, tmp_path):
    flags, weights, averages = ["--model-ema", "--model-ema-decay", "0.9", "--model-ema-warmup"], [], []

    class Look(Callback):
        def after_update(self, t):
            weights.append([p.detach().clone() for p in t.model.parameters()])
            averages.append([p.detach().clone() for p in t.ema.module.parameters()])
    run(parse([str(stripes), *QUICK, *flags, "--output", str(tmp_path / "a")]), [Look()])
    decays = [min(0.9, 1 - (1 + max(n - 1, 0)) ** (-2 / 3)) for n in range(1, 9)]
    assert decays[0] == 0 and decays[-1] < 0.9
    average = weights[0]
    for decay, now, found in zip(decays, weights, averages):
        average = [decay * a + (1 - decay) * w for a, w in zip(average, now)]
        torch.testing.assert_close(found, average)
    whole_and_resumed(stripes, tmp_path, *flags)


# --- distillation ---

def by_hand(student, teacher, images, labels, task, distill, temperature):
    said, known = ((x / temperature).softmax(-1) for x in (student(images), teacher(images)))
    apart = (known * (known / said).log()).sum(-1).mean() * temperature**2
    return task * nn.functional.cross_entropy(student(images), labels) + distill * apart


def test_the_loss_of_a_pupil_by_hand_and_as_timms():
    student, teacher = shaken(tiny()), shaken(tiny("poolformerv2"))
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    distill = Distill(teacher.train(), 0.3, 0.7, 3.)
    t = SimpleNamespace(images=images, criterion=nn.CrossEntropyLoss(), device=images.device, amp=None)
    for _ in range(2):  # the second batch must not wrap the first one's loss
        distill.before_batch(t)
        found = t.criterion(student(images), labels)
        torch.testing.assert_close(found, by_hand(student, teacher, images, labels, 0.3, 0.7, 3.))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    task = pytest.importorskip("timm.task")  # newer than the oldest timm that is supported
    theirs = task.LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=0.7,
                                        task_loss_weight=0.3, temperature=3., verbose=False)
    torch.testing.assert_close(found, theirs(images, labels)["loss"])


def test_a_teacher_sees_the_images_as_it_is_used_to():
    seen, pixels = [], torch.rand(2, 3, 64, 64)
    normal = lambda mean, std: (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    teacher = tiny("randformer", num_classes=2)
    teacher.pretrained_cfg |= dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5))
    teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mine = dict(mean=(0.1, 0.2, 0.3), std=(0.3, 0.3, 0.4))
    t = SimpleNamespace(images=normal(**mine), criterion=None, device=torch.device("cpu"), amp=None)
    Distill(teacher, **mine).before_batch(t)
    usual = normal((0.5, 0.4, 0.3), (0.2, 0.3, 0.5))
    small = nn.functional.interpolate(usual, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], small, atol=1e-5, rtol=1e-5)
    assert Distill(teacher, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.5]).change is None


@pytest.fixture(scope="module")
def timms(tmp_path_factory):
    "A network of timm's for two classes, as it is kept for its hub, with a normalisation of its own."
    folder = tmp_path_factory.mktemp("timms")
    seed_everything(0)
    model = timm.create_model("resnet10t", num_classes=2)
    model.pretrained_cfg |= dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return f"local-dir:{folder}"


def test_a_run_learns_from_a_model_of_timms_and_goes_on(stripes, timms, tmp_path):
    flags = ["--kd-model-name", timms, "--task-loss-weight", "0.25", "--mixup", "0.8"]
    found = whole_and_resumed(stripes, tmp_path, *flags)
    distill, = (c for c in found.trainer.callbacks if isinstance(c, Distill))
    assert type(distill.teacher).__name__ == "ResNet" and distill.change is not None
    assert (distill.task, distill.distill, distill.temperature) == (0.25, 0.75, 4.)
    assert isinstance(distill.inner, SoftTargetCrossEntropy)
    alone = run(parse([str(stripes), *QUICK, "--mixup", "0.8", "--output", str(tmp_path / "alone")]))
    assert alone.log[0]["train_loss"] != found.log[0]["train_loss"]


def test_a_run_learns_from_a_run(stripes, tmp_path, capsys):
    args = [str(stripes), *QUICK, "--epochs", "1"]
    other = ["--model", "tiny_convformer", "--mean", "0.1", "0.2", "0.3"]
    old = run(parse([*args, *other, "--output", str(tmp_path / "a")]))
    torch.manual_seed(0)
    save_weights(create_model("tiny_convformer", num_classes=2, img_size=32), old.path / "other.safetensors")
    for name, file in ((old.path, "best.safetensors"), (old.path / "other.safetensors", "other.safetensors")):
        new = run(parse([*args, "--kd-model-name", str(name), "--distill-loss-weight", "0.5", "--output",
                         str(tmp_path / "b")]))
        distill, = (c for c in new.trainer.callbacks if isinstance(c, Distill))
        assert (distill.task, distill.distill) == (1., 0.5)
        assert (distill.change is None) == (file == "other.safetensors")  # which says nothing of mean and deviation
        assert same(distill.teacher.state_dict(), load_file(old.path / file))


@pytest.mark.parametrize("name, says", [
    ("resnet10x", "There is no model 'resnet10x'.*'resnet10t'.*Nor is there a folder"),
    ("{stripes}", "is no folder of a run"),
    ("tiny_caformer", "tiny variant without published weights"), ("{shapes}", "knows other classes, such as disc"),
    ("{wide}", "knows 5 classes, and the model 2")])
def test_teachers_that_cannot_teach(name, says, stripes, tmp_path, capsys):
    wide = timm.create_model("resnet10t", num_classes=5)
    timm.models.save_for_hf(wide, tmp_path / "wide", safe_serialization=True)
    places = dict(stripes=stripes, wide=f"local-dir:{tmp_path / 'wide'}",
                  shapes=Path(run_folder.metaformer_edu.__file__).parent / "examples/caformer")
    said = refused(capsys, stripes, *QUICK, "--kd-model-name", name.format(**places), "--output", tmp_path / "out")
    assert re.search(says, said) and not (tmp_path / "out").exists()


def test_weights_that_cannot_be_fetched(stripes, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Name or service not known\nand more")
    monkeypatch.setattr(setup.timm, "create_model", fail)
    said = refused(capsys, stripes, *QUICK, "--kd-model-name", "resnet10t", "--output", tmp_path / "out")
    assert "weights of timm's resnet10t (Name or service not known.)" in said and "folder of a run" in said


# --- repeated augmentation ---

def updates_of(parts, n, batch, repeats, epoch=3, start=0):
    "The keys of each update, those of all parts in a row."
    found = []
    for part in range(parts):
        sampler = TrainSampler(n, batch // parts, seed=5, part=part, parts=parts, repeats=repeats)
        sampler.set_epoch(epoch, start)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        found.append([keys[i:i + batch // parts] for i in range(0, len(keys), batch // parts)])
    return [sum(shares, []) for shares in zip(*found)]


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_copies_are_the_same_however_many_processes_share_them(repeats):
    alone = updates_of(1, 50, 12, repeats)
    for parts in (2, 3, 4):
        assert updates_of(parts, 50, 12, repeats) == alone
    assert updates_of(2, 50, 12, repeats, start=3) == alone[3:] and len(alone) == 4
    keys = sum(alone, [])
    assert len(set(keys)) == 48 and all(epoch % 2**32 == 3 for epoch, _ in keys)
    order = EpochSampler(50, 5)
    order.set_epoch(3)
    expected = [(i, copy) for _, i in order for copy in range(repeats)][:48]
    assert [(i, epoch // 2**32) for epoch, i in keys] == expected  # as timm's, which counts in 256 images
    assert repeats > 1 or keys == list(order)[:48]


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_differ_and_are_functions_of_their_keys(workers, stripes):
    train, val, _ = load_data(stripes, 32, seed=1)

    def batches(part, parts):
        sampler = TrainSampler(32, 8 // parts, seed=1, part=part, parts=parts, repeats=2)
        return list(make_loaders(train, val, 8 // parts, workers, samplers=(sampler, None))[0])
    alone, shared = batches(0, 1), list(zip(batches(0, 2), batches(1, 2)))
    assert len(alone) == len(shared) == 4
    for (images, labels), halves in zip(alone, shared):
        assert torch.equal(images, torch.cat([i for i, _ in halves])) and torch.equal(labels[::2], labels[1::2])
        assert torch.equal(labels, torch.cat([o for _, o in halves]))
        assert all(not torch.equal(a, b) for a, b in zip(images[::2], images[1::2]))


def test_a_run_with_copies_goes_on(stripes, tmp_path):
    found = whole_and_resumed(stripes, tmp_path, "--aug-repeats", 2, "--aa", "rand-m9-mstd0.5-inc1")
    assert found.trainer.loaders[0].sampler.repeats == 2 and found.trainer.updates == 8


def test_lora_is_added_once():
    with pytest.raises(ValueError, match="has LoRA: merge_lora first"):
        add_lora(add_lora(tiny(), 2), 2)
