"""The flags: as published, with their defaults; recipes and what overrides them; each flag arrives where it should."""
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import golden
from metaformer_edu.core.cli import GONE
from metaformer_edu.interpret.snapshots import SaveSnapshots
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.train import main
from metaformer_edu.training import settings, setup
from metaformer_edu.training.callbacks import Distill, EarlyStopping, GrowImages, TensorBoard
from metaformer_edu.training.run_folder import SaveEpoch, SaveStates
from metaformer_edu.training.settings import (
    DEFAULTS, GONE_HERE, SMALL, cpu_cores, list_recipes, parse, read_recipe, recipe_table)
from metaformer_edu.training.trainer import Trainer
from metaformer_edu.widgets.page import SavePage

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = {f"{r['model']}_{r['kind']}": r for r in json.loads(
    (golden.REFERENCE / "recipes.json").read_text(encoding="utf-8"))}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def refused(capsys, *args, run=parse):
    "The sentence with which a command line is refused with status 2."
    with pytest.raises(SystemExit) as caught:
        run(list(args))
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.startswith("metaformer-train: ") and text.count("\n") == 1, text
    return text


def words(text):
    return text.split()


# --- as published ---

def test_the_published_training_command(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = parse(words("/path/to/imagenet --model convformer_s18 --opt adamw --lr 4e-3 --warmup-epochs 20 "
                       "-b 128 --grad-accum-steps 4 --drop-path 0.2 --head-dropout 0.0"))
    assert (args.global_batch, args.lr, args.warmup_epochs) == (4096, 4e-3, 20) and "warning" not in args
    assert (
    args.data,
    args.model,
    args.opt,
    args.drop_path,
    args.head_dropout) == (
        "/path/to/imagenet",
        "convformer_s18",
        "adamw",
        0.2,
         0)
    assert (args.epochs, args.total_epochs, args.sched, args.img_size, args.resume) == (300, 310, "cosine", 224, None)


def test_the_published_fine_tuning_command(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = parse(
        words(
            "/path/to/imagenet --model convformer_s18 --img-size 384 --epochs 30 --opt lamb --lr 1e-4 "
            "--sched None -b 32 --grad-accum-steps 4 --initial-checkpoint /path/to/w.pth --mixup 0 --cutmix 0 "
            "--model-ema --model-ema-decay 0.9999 --drop-path 0.3 --head-dropout 0.4"
        )
    )
    assert (args.img_size, args.epochs, args.total_epochs, args.warmup_epochs, args.opt) == (384, 30, 30, 0, "lamb")
    assert (args.lr, args.sched, args.global_batch) == (1e-4, "None", 1024) and "warning" not in args
    assert (args.initial_checkpoint, args.mixup, args.cutmix) == ("/path/to/w.pth", 0, 0)
    assert (args.model_ema, args.model_ema_decay, args.drop_path, args.head_dropout) == (True, 0.9999, 0.3, 0.4)


@pytest.mark.parametrize("flags, expected", [
    ("--amp", dict(amp=True, amp_dtype="bfloat16")), ("--resume there",
     dict(resume="there")), ("--clip-grad 5", dict(clip_grad=5)),
    ("--smoothing 0.2", dict(smoothing=0.2)), ("--aa rand-m7", dict(aa="rand-m7")), ("--reprob 0.1", dict(reprob=0.1)),
    ("--channels-last", dict(channels_last=True)), ("-j 0", dict(workers=0)), ("--workers 1", dict(workers=1)),
    ("--seed 7", dict(seed=7)), ("--output here", dict(output="here")), ("--num-classes 9", dict(num_classes=9)),
    ("--log-interval 9", dict(log_interval=9)), ("--grad-checkpointing", dict(grad_checkpointing=True)),
    ("--batch-size 64 -vb 32", dict(batch_size=64, validation_batch_size=32)
     ), ("--opt-betas 0.9 0.99", dict(opt_betas=[0.9, 0.99])),
    ("--clip-mode agc", dict(clip_mode="agc")), ("--momentum 0.8", dict(momentum=0.8)), ("--no-aug", dict(no_aug=True)),
    ("--scale 0.5 1 --ratio 0.9 1.1", dict(scale=[0.5, 1], ratio=[0.9, 1.1])), ("--crop-pct 0.9", dict(crop_pct=0.9)),
    ("--torchcompile", dict(torchcompile="inductor")), ("--torchcompile eager", dict(torchcompile="eager")),
    ("--cutmix-minmax 0.2 0.8", dict(cutmix_minmax=[0.2, 0.8])), ("--mixup-off-epoch 9", dict(mixup_off_epoch=9)),
    ("--experiment mine --eval-metric loss", dict(experiment="mine", eval_metric="loss")),
    ("--pretrained", dict(pretrained=True)),
    ("--recovery-interval 9 --remode const --recount 2", dict(recovery_interval=9, remode="const", recount=2)),
    ("--sched-on-updates", dict(sched_on_updates=True)), ("--model-ema-force-cpu", dict(model_ema_force_cpu=True)),
])
def test_flags_are_read_as_published(flags, expected):
    args = vars(parse(["some/folder", *words(flags)]))
    assert {k: args[k] for k in expected} == expected


def test_defaults_are_the_published_ones():
    published = dict(batch_size=128, epochs=300, warmup_epochs=5, cooldown_epochs=10, warmup_lr=1e-6, min_lr=1e-5,
                     opt="adamw",
                     weight_decay=0.05, smoothing=0.1, aa="rand-m9-mstd0.5-inc1", reprob=0.25, remode="pixel",
                     recount=1,
                     mixup=0.8,
                     cutmix=1., cutmix_minmax=None, mixup_prob=1., mixup_switch_prob=0.5, mixup_mode="batch",
                     mixup_off_epoch=0,
                     scale=[0.08, 1.], ratio=[3 / 4, 4 / 3], hflip=0.5, vflip=0., color_jitter=0.4, momentum=0.9,
                     clip_mode="norm",
                     clip_grad=None, opt_eps=None, opt_betas=None, model_ema=False, model_ema_decay=0.9998, seed=42,
                     log_interval=50,
                     recovery_interval=0, drop_path=0., head_dropout=0., train_interpolation="random",
                     eval_metric="top1",
                     grad_accum_steps=1, sched="cosine", sched_on_updates=False, amp=False, channels_last=False,
                     no_aug=False,
                     validation_batch_size=None, pretrained=False, resume=None, workers=min(8, cpu_cores()))
    args = vars(parse(["some/folder", "--model", "convformer_s18"]))
    assert {k: args[k] for k in published} == published
    assert args["lr"] == pytest.approx(4e-3 / 32) and args["global_batch"] == 128  # the paper's rate for 4096


def test_defaults_for_the_small_sets():
    for data in ("digits", "shapes", "shapes-same"):
        args = vars(parse([data]))
        expected = {**SMALL, "workers": 0, "lr": 2e-3 if data == "digits" else 1e-3}
        assert {k: args[k] for k in expected} == expected
    assert parse([]).data == "digits" and parse(["some/folder"]).seed == 42
    assert parse(["some/folder", "--seed", "0", "-j", "0"]).workers == 0  # zero is a choice, not an absence
    assert parse(["--epochs", "1"]).warmup_epochs == 0 and parse(["--epochs",
                 "4", "--warmup-epochs", "3"]).warmup_epochs == 3
    assert parse(["--no-sched-on-updates"]).sched_on_updates is False


def test_every_default_belongs_to_a_flag(parser):
    flags = {a.dest for a in parser._actions} - {"help"}
    assert flags == DEFAULTS.keys() and SMALL.keys() < DEFAULTS.keys()


# --- recipes ---

@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("world", [1, 2, 8])
def test_a_recipe_is_the_published_run_on_any_machine(name, world, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    row = PUBLISHED[name]
    for batch in (128, 256):
        args = parse(["some/folder", "--recipe", name, "-b", str(batch)])
        most = max(row["global_batch"], batch * world)
        assert args.batch_size * args.grad_accum_steps * world == args.global_batch == most
        assert args.lr == pytest.approx(row["lr"] * most / row["global_batch"]) and "warning" not in args
    assert parse(["some/folder", "--recipe", name]).batch_size == 128
    same = ("model", "opt", "epochs", "warmup_epochs", "drop_path", "head_dropout", "mixup", "cutmix", "img_size")
    assert {k: vars(args)[k] for k in same} == {k: row[k] for k in same}


def test_flags_override_a_recipe():
    name = "caformer_s18_train"
    args = parse(
    words(f"some/folder --recipe {name} --opt adamw --epochs 100 --drop-path 0.4 --mixup 0 "
              "--img-size 160 --model caformer_s36"))
    assert (args.opt, args.epochs, args.drop_path, args.mixup, args.img_size) == ("adamw", 100, 0.4, 0, 160)
    assert (args.model, args.cutmix, args.global_batch) == ("caformer_s36", 1, 4096)
    assert parse(["some/folder", "--recipe", name, "--lr", "0.001"]).lr == 0.001
    chosen = parse(words(f"some/folder --recipe {name} -b 64 --grad-accum-steps 2"))
    assert chosen.global_batch == 128 and chosen.lr == pytest.approx(0.008 / 32)


def test_a_fine_tuning_recipe_is_what_the_paper_did():
    args = parse(["some/folder", "--recipe", "caformer_s18_384_finetune"])
    assert (args.epochs, args.total_epochs, args.sched, args.warmup_epochs) == (30, 30, "None", 0)
    assert (args.model, args.initial_checkpoint, args.img_size) == ("caformer_s18_384", "caformer_s18", 384)
    assert (args.model_ema, args.model_ema_decay, args.lr, args.global_batch) == (True, 0.9999, 1e-4, 1024)


def test_weights_that_are_asked_for_replace_the_recipes(capsys):
    recipe = ["some/folder", "--recipe", "caformer_s18_384_finetune"]
    assert parse([*recipe, "--initial-checkpoint", "mine.pth"]).initial_checkpoint == "mine.pth"
    try:
        args = parse([*recipe, "--pretrained"])
    except SystemExit:
        assert "two sets of weights" in capsys.readouterr().err
    else:
        assert args.initial_checkpoint is None, "--pretrained does nothing"


def test_the_rate_of_a_model_is_known_without_naming_its_recipe():
    for model, opt, lr, batch in (("caformer_s18", "lamb", 8e-3, 4096), ("caformer_s18_384", "lamb", 1e-4, 1024),
                                  ("tiny_caformer", "adamw", 4e-3, 4096)):
        args = parse(["some/folder", "--model", model, "--opt", opt])
        assert args.lr == pytest.approx(lr * 128 / batch)
    assert parse(["-b", "64"]).lr == pytest.approx(4e-3)


def test_a_rate_far_above_the_usual_is_warned_of(capsys, tmp_path):
    recipe = ["some/folder", "--recipe", "convformer_s18_train"]
    assert "warning" not in parse([*recipe, "--lr", "0.039"])
    assert "20 times the usual one, which is 0.004 for 4,096 images" in parse([*recipe, "--lr", "0.08"]).warning
    assert "times the usual" in parse(["--lr", "0.1"]).warning and "warning" not in parse(["--lr", "0.019"])


def test_recipes_are_listed():
    ours = "caformer_s18_in21ft1k_finetune"
    assert list_recipes() == sorted([*PUBLISHED, ours]) and list_recipes(
        "caformer*_384_*") == [n for n in sorted(PUBLISHED) if re.match("caformer.*_384_", n)]
    table = recipe_table()
    rates = {n: r["lr"] for n, r in PUBLISHED.items()} | {ours: 1e-4}
    assert len(table) == 32 and {r["recipe"]: r["rate"] for r in table} == rates
    with pytest.raises(ValueError, match="no recipe 'caformer_s18'.*caformer_s18_train"):
        read_recipe("caformer_s18")


# --- what is refused ---

REFUSED = {
    "two sets of weights": ("--pretrained --initial-checkpoint a.pth", "two sets of weights: choose one"),
    "a last rate above the highest": ("--lr 1e-6 --min-lr 1e-5", "--min-lr 1e-05 is more than --lr 1e-06"),
    "more warm-up than epochs": ("--epochs 3 --warmup-epochs 4", "4 epochs of warm-up do not fit into 3"),
    "blending an odd batch": ("some/folder -b 7", "mixup and cutmix blend pairs: --batch-size 7 must be even"),
    "another optimizer": ("--opt adamwx", "no optimizer 'adamwx'.*'adamw'"),
    "another recipe": ("--recipe caformer_s18_trian", "no recipe 'caformer_s18_trian'.*'caformer_s18_train'"),
    "another schedule": ("--sched none", "--sched"),
    "an alpha below zero": ("--mixup -1", "--mixup"),
    "a chance above one": ("--hflip 1.5", "--hflip: 1.5 is not from 0 to 1"),
    "a limit of zero": ("--clip-grad 0", "--clip-grad"),
    "a threshold without its loss": ("--bce-target-thresh 0.2", "--bce-target-thresh does nothing without --bce-loss"),
    "a temperature of no teacher": ("--kd-temperature 2", "--kd-temperature does nothing without --kd-model-name"),
    "a weight that leaves nothing": ("--kd-model-name x --task-loss-weight 2", "needs --distill-loss-weight"),
    "a warm-up of no average": ("--model-ema-warmup", "--model-ema-warmup does nothing without --model-ema"),
    "images that shrink": ("--img-size 64 --grow-from 96", "Images of 64 pixels cannot grow from --grow-from 96"),
    "crops of digits": ("--crop-pct 0.9", "--crop-pct changes nothing for digits, whose transforms are its own"),
    **{f"--{flag} for digits": (f"--{flag} {value}", f"--{flag} changes nothing for digits") for flag, value in {
        "aa": "none", "scale": "0.5 1", "ratio": "1 1", "hflip": "0", "vflip": "0.5", "color-jitter": "0.1",
        "reprob": "0",
        "remode": "const", "recount": "2", "train-interpolation": "bicubic"}.items()},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what, capsys):
    flags, pattern = REFUSED[what]
    assert re.search(pattern, refused(capsys, *words(flags)))


@pytest.mark.parametrize("flag", sorted({**GONE, **GONE_HERE}))
@pytest.mark.parametrize("value", [[], ["7"]])
def test_flags_of_other_scripts_are_explained(flag, value, capsys):
    text = refused(capsys, "some/folder", flag, *value)
    assert f"{flag} of the published script has no place here: " in text and {**GONE, **GONE_HERE}[flag] in text


def test_the_nearest_flag_is_named(capsys):
    for wrong, right in {"--droppath": "--drop-path",
        "--grad-acum-steps": "--grad-accum-steps", "--model_ema": "--model-ema"}.items():
        assert f"'{right}'" in refused(capsys, wrong, "1")
    assert "'--batch-size'" in refused(capsys, "--batchsize=3") and "--epoch" in refused(capsys, "--epoch", "3")
    assert "unrecognized arguments: more" in refused(capsys, "digits", "more")


# --- help ---

@pytest.fixture
def parser(monkeypatch):
    "The parser of the command."
    caught = []

    def keep(self, argv=None):
        caught.append(self)
        sys.exit()
    with monkeypatch.context() as patch:
        patch.setattr(settings.Parser, "parse_args", keep)
        with pytest.raises(SystemExit):
            parse([])
    return caught[0]


def test_help(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, out.splitlines())) <= 98
    assert all(a.help for a in parser._actions)
    flat = " ".join(out.split()).replace("- ", "-")  # lines end at hyphens
    for text in ("DATA", "--model", "--epochs N", "--batch-size", "--lr", "--output",
                 "(default 300; 10 for digits and shapes)",
                 "(default 0.75 1.33", "(default rand-m9-mstd0.5-inc1)",
                 "torchrun --nproc-per-node 8 -m metaformer_edu.train"):
        assert text in flat, text
    assert "None)" not in flat and "SUPPRESS" not in flat and "==" not in flat


def test_help_says_each_default(parser):
    said = {a.dest: parser._get_formatter()._expand_help(a) for a in parser._actions}
    for dest, value in DEFAULTS.items():
        if isinstance(value, (int, float, str)) and value is not False:
            assert "default" in said[dest], dest
        if dest in SMALL and SMALL[dest] is not None:
            assert "digits" in said[dest], dest


# --- each flag arrives ---

@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    "Two classes of 12 pictures, and 4 held-out ones of each."
    folder, rng = tmp_path_factory.mktemp("data") / "stripes", np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 4)):
        for name in ("broad", "fine"):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(256, size=(40, 48, 3),
                                             dtype=np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "As metaformer-train leaves it: the folder of a run on the stripes."
    folder = tmp_path_factory.mktemp("teacher")
    save_weights(create_model("tiny_poolformerv2", num_classes=2, img_size=32), folder / "best.safetensors")
    (folder / "args.yaml").write_text(
        "{settings: {model: tiny_poolformerv2}, class_names: [broad, fine], img_size: 32}")
    return folder


class Enough(BaseException):
    "Training would begin."


def built(monkeypatch, argv):
    "All that the command has made when training would begin, or its last words."
    def stop(self):
        self.threads = torch.get_num_threads()  # the command gives them back
        raise Enough(self)
    monkeypatch.setattr(Trainer, "fit", stop)
    with pytest.raises((Enough, SystemExit)) as caught:
        main(list(map(str, argv)))
    return caught.value.args[0] if caught.type is Enough else None


def inside(thing, depth=6):
    "An object as plain data: its type and what it holds."
    if isinstance(thing, (str, int, float, bool, type(None), torch.dtype)):
        return thing
    if isinstance(thing, (list, tuple)):
        return [inside(x, depth) for x in thing]
    if isinstance(thing, dict):
        return {str(k): inside(v, depth) for k, v in thing.items()}
    if isinstance(thing, torch.Tensor):
        return thing.tolist()
    if depth and hasattr(thing, "__dict__") and not callable(getattr(thing, "__name__", None)):
        return [type(thing).__name__, {k: inside(v, depth - 1) for k, v in vars(thing).items()}]
    return getattr(thing, "__name__", type(thing).__name__)


def callback(t, kind):
    "The trainer's callback of that class, or None."
    return next((c for c in t.callbacks if isinstance(c, kind)), None)


def courses(t):
    "The rates of a run: at the start of each epoch and in its middle."
    found = []
    for epoch in range(t.epochs):
        for step in range(t.steps):
            if t.schedule:
                t.schedule.step(epoch)
                t.schedule.step_update(epoch * t.steps + step)
            found.append(t.rate)
    return found


def fingerprint(t):
    """What a run is made of. The settings themselves are left out: they are what the flags should change by more
    than name."""
    folder, loaders, model = callback(t, SaveEpoch).folder, t.loaders, t.model
    weight = next(p for p in model.parameters() if p.ndim == 4)
    return dict(
        rates=courses(t), epochs=t.epochs, steps=t.steps, accum=t.accum, amp=t.amp, seed=t.seed, off=t.mixup_off_epoch,
        loss=inside(t.loss_fn), clip=(t.clip_grad, t.clip_mode), backend=t.backend, net=type(t.net).__name__,
        interval=t.log_interval,
        max_bad=t.max_bad, mixup=inside(t.mixup), ema=t.ema and (t.ema.decay, t.ema.use_warmup, str(t.ema.device)),
        more=[inside(c) for c in t.callbacks if isinstance(c, (GrowImages, EarlyStopping))],
        teachers=[(c.teacher.pretrained_cfg["architecture"], c.task, c.distill, c.temperature) for c in t.callbacks
                  if isinstance(c, Distill)],
        optimizer=(type(t.optimizer).__name__, inside(t.optimizer.defaults),
                   [(g["weight_decay"], g.get("lr_scale")) for g in t.optimizer.param_groups]),
        learns=[name for name, p in model.named_parameters() if p.requires_grad],
        model=(repr(model), model.num_classes, model.img_size,
               sum(p.double().sum().item() for p in model.parameters())),
        checkpointing=[m.grad_checkpointing for m in model.modules() if hasattr(m, "grad_checkpointing")],
        layout=weight.is_contiguous(memory_format=torch.channels_last), threads=t.threads,
        loaders=[(x.batch_size, x.num_workers, len(x.dataset)) for x in loaders],
        data=[(type(x.dataset.images).__name__, x.dataset.seed, inside(x.dataset.transform)) for x in loaders],
        samplers=[inside(x.sampler) for x in loaders], folder=str(folder.path), key=folder.column,
        writer=type(callback(t, TensorBoard)).__name__,
        every=callback(t, SaveStates).every, snapshots=inside(callback(t, SaveSnapshots)),
        page=bool(callback(t, SavePage)))


EFFECTS = {  # dest: (flags, flags without which they could do nothing)
    "data": ("digits", ""), "recipe": ("--recipe caformer_s18_384_finetune --initial-checkpoint {gone}", ""),
    "model": ("--model tiny_caformer", ""), "pretrained": ("--pretrained", ""),
    "initial_checkpoint": ("--initial-checkpoint {gone}", ""),
    "resume": ("--resume {gone}", ""), "num_classes": ("--num-classes 7", ""), "img_size": ("--img-size 48", ""),
    "data_dir": ("--data-dir {gone}", ""), "mean": ("--mean 0.1 0.2 0.3", ""), "std": ("--std 0.1 0.2 0.3", ""),
    "crop_pct": ("--crop-pct 0.5", ""), "drop_path": ("--drop-path 0.3", ""),
           "head_dropout": ("--head-dropout 0.3", ""),
    "grad_checkpointing": ("--grad-checkpointing", ""), "torchcompile": ("--torchcompile eager", ""),
    "lora_rank": ("--lora-rank 3", "--initial-checkpoint {weights}"),
    "freeze_stages": ("--freeze-stages 2", "--initial-checkpoint {weights}"),
    "layer_decay": ("--layer-decay 0.5", ""),
    "epochs": ("--epochs 9", ""),
    "batch_size": ("-b 6", ""), "validation_batch_size": ("-vb 3", ""),
           "grad_accum_steps": ("--grad-accum-steps 2", ""),
    "opt": ("--opt lamb", ""), "opt_eps": ("--opt-eps 1e-7", ""), "opt_betas": ("--opt-betas 0.8 0.9", ""),
    "momentum": ("--momentum 0.5", "--opt sgd"), "weight_decay": ("--weight-decay 0.3", ""),
    "clip_grad": ("--clip-grad 2", ""),
    "clip_mode": ("--clip-mode value", "--clip-grad 2"), "sched": ("--sched tanh", ""),
    "sched_on_updates": ("--sched-on-updates", ""),
    "lr": ("--lr 0.003", ""), "warmup_lr": ("--warmup-lr 1e-5", ""), "min_lr": ("--min-lr 1e-6", ""),
    "warmup_epochs": ("--warmup-epochs 3", ""), "cooldown_epochs": ("--cooldown-epochs 3", ""),
    "model_ema": ("--model-ema", ""),
    "model_ema_decay": ("--model-ema-decay 0.5", "--model-ema"),
    "model_ema_force_cpu": ("--model-ema-force-cpu", "--model-ema"),
    "no_aug": ("--no-aug", ""), "scale": ("--scale 0.5 1", ""), "ratio": ("--ratio 0.9 1.1", ""),
    "hflip": ("--hflip 0.1", ""),
    "vflip": ("--vflip 0.1", ""), "color_jitter": ("--color-jitter 0.1", "--aa none"), "aa": ("--aa rand-m3", ""),
    "reprob": ("--reprob 0.1", ""), "remode": ("--remode const", ""), "recount": ("--recount 3", ""),
    "train_interpolation": ("--train-interpolation bilinear", ""), "decoder": ("--decoder torchvision", ""),
    "mixup": ("--mixup 0.3", ""),
    "cutmix": ("--cutmix 0.3", ""),
    "cutmix_minmax": ("--cutmix-minmax 0.2 0.8", ""), "mixup_prob": ("--mixup-prob 0.3", ""),
    "mixup_switch_prob": ("--mixup-switch-prob 0.3", ""), "mixup_mode": ("--mixup-mode elem", ""),
    "mixup_off_epoch": ("--mixup-off-epoch 2", ""), "smoothing": ("--smoothing 0.3", ""), "seed": ("--seed 3", ""),
    "output": ("--output {elsewhere}", ""), "experiment": ("--experiment mine", ""),
    "eval_metric": ("--eval-metric loss", ""),
    "log_interval": ("--log-interval 3", ""), "recovery_interval": ("--recovery-interval 3", ""),
    "max_bad_steps": ("--max-bad-steps 3", ""),
    "page": ("--page", ""),
    "tensorboard": ("--tensorboard", ""), "device": ("--device cuda:97", ""), "workers": ("-j 1", ""),
    "threads": ("--threads 2", ""),
    "amp": ("--amp", ""), "amp_dtype": ("--amp-dtype float16", "--amp"), "channels_last": ("--channels-last", ""),
    "skip_unreadable": ("--skip-unreadable", ""), "snapshots": ("--snapshots 3", ""),
    "aug_repeats": ("--aug-repeats 2", ""), "bce_loss": ("--bce-loss", ""),
    "bce_target_thresh": ("--bce-target-thresh 0.2", "--bce-loss"),
    "grow_from": ("--grow-from 32", "--img-size 64"), "patience": ("--patience 3", ""),
    "model_ema_warmup": ("--model-ema-warmup", "--model-ema"),
    "kd_model_name": ("--kd-model-name {teacher}", ""),
    "kd_temperature": ("--kd-temperature 2", "--kd-model-name {teacher}"),
    "distill_loss_weight": ("--distill-loss-weight 0.5", "--kd-model-name {teacher}"),
    "task_loss_weight": ("--task-loss-weight 0.5", "--kd-model-name {teacher}"),
}


def test_every_flag_is_looked_after(parser):
    assert {a.dest for a in parser._actions} - {"help"} == EFFECTS.keys()


@pytest.mark.parametrize("dest", EFFECTS)
def test_a_flag_does_something(dest, stripes, teacher, tmp_path, monkeypatch, capsys):
    kept = Path(settings.__file__).parents[1] / "examples/convformer/best.safetensors"
    places = dict(gone=tmp_path / "gone", elsewhere=tmp_path / "there", weights=kept, teacher=teacher)
    flags, needed = (words(f.format(**places)) for f in EFFECTS[dest])
    base = ["--model", "tiny_convformer", "--img-size", "32", "-b", "4", "-j", "0", "--epochs", "8", "--warmup-epochs",
            "1",
            *([] if dest == "recipe" else ["--lr", "0.004"]), *needed]
    found = []
    for more in ([], flags):
        output = [] if dest == "output" and more else ["--output", str(tmp_path / "out")]
        first = ["digits"] if dest == "data" and more else [stripes]
        t = built(monkeypatch, [*first, *base, *output, *([] if dest == "data" else more)])
        found.append(capsys.readouterr().err if t is None else fingerprint(t))
        torch.set_num_threads(1)
        if t is not None:
            made = callback(t, SaveEpoch).folder.path
            for path in made.iterdir():  # so that the second run has the same name
                path.unlink()
            made.rmdir()
    assert isinstance(found[0], dict), found[0]
    assert found[0] != found[1], f"{flags} does nothing"
    if isinstance(found[1], str):
        refused = {"recipe", "initial_checkpoint", "pretrained", "resume", "device", "tensorboard", "data_dir"}
        assert dest in refused, found[1]


def test_the_fingerprint_is_the_same_for_the_same_flags(stripes, tmp_path, monkeypatch):
    base = [stripes, "--model", "tiny_convformer", "--img-size", "32", "-b", "4", "-j", "0", "--experiment", "x",
            "--output"]
    a, b = (fingerprint(built(monkeypatch, [*base, tmp_path / name])) for name in "ab")
    assert {k for k in a if a[k] != b[k]} == {"folder"}


# --- and as it should ---

@pytest.fixture
def make(stripes, tmp_path, monkeypatch):
    return lambda flags: built(monkeypatch, [stripes, *words("--model tiny_convformer --img-size 32 -b 4 -j 0"),
                                             *words(flags),
                                             "--output", tmp_path / "out"])


def test_flags_of_the_optimizer(make):
    t = make(
        "--opt adamw --opt-eps 1e-7 --opt-betas 0.8 0.99 --weight-decay 0.3 --lr 0.002 --clip-grad 3 --clip-mode agc"
    )
    assert isinstance(t.optimizer, torch.optim.AdamW) and (t.clip_grad, t.clip_mode) == (3, "agc")
    for group in t.optimizer.param_groups:
        assert (group["eps"], tuple(group["betas"]), group["initial_lr"]) == (1e-7, (0.8, 0.99), 0.002)
    decay = {id(p): g["weight_decay"] for g in t.optimizer.param_groups for p in g["params"]}
    assert {decay[id(p)] for p in t.model.parameters() if p.ndim < 2} == {0}
    assert {decay[id(p)] for p in t.model.parameters() if p.ndim >= 2} == {0.3}
    t = make("--opt sgd --momentum 0.5")
    assert isinstance(t.optimizer, torch.optim.SGD) and t.optimizer.defaults["momentum"] == 0.5
    assert type(make("--opt lamb").optimizer).__name__ == "Lamb"


def test_flags_of_the_precision_and_the_average(make):
    assert make("").amp is make("--amp-dtype float16").amp is None and make("").ema is None
    assert make("--amp").amp == torch.bfloat16 and make("--amp --amp-dtype float16").amp == torch.float16
    ema = make("--model-ema").ema
    assert ema.decay == 0.9998 and make("--model-ema --model-ema-decay 0.9").ema.decay == 0.9
    assert callback(make("--model-ema"), SaveEpoch).folder.column == "ema_top1"
    assert callback(make("--model-ema --eval-metric loss"), SaveEpoch).folder.column == "ema_loss"


def test_flags_of_blending(make):
    mixup = make(
        "--mixup 0.3 --cutmix 0.6 --mixup-prob 0.7 --mixup-switch-prob 0.2 "
        "--mixup-mode pair --smoothing 0.2 --num-classes 5").mixup
    assert (
    mixup.mixup_alpha,
    mixup.cutmix_alpha,
    mixup.mix_prob,
    mixup.switch_prob,
    mixup.mode) == (
        0.3,
        0.6,
        0.7,
        0.2,
         "pair")
    assert (mixup.label_smoothing, mixup.num_classes) == (0.2, 5)
    assert make("--mixup 0 --cutmix 0").mixup is None and make(
        "--mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8").mixup.cutmix_minmax == [0.2, 0.8]
    t = make("--smoothing 0.2 --mixup-off-epoch 3")
    assert t.loss_fn.label_smoothing == 0.2 and t.mixup_off_epoch == 3


def steps_of(transform):
    return {type(step).__name__: step for step in transform.transforms}


def test_flags_of_the_images(make):
    t = make("--scale 0.5 0.9 --ratio 0.8 1.2 --hflip 0.1 --vflip 0.2 --aa rand-m5-n3 --reprob 0.3 "
             "--remode const --recount 2 "
             "--train-interpolation bicubic --crop-pct 0.8")
    found = steps_of(t.loaders[0].dataset.transform)
    crop, erase = found["RandomResizedCropAndInterpolation"], found["RandomErasing"]
    assert (
    tuple(
        crop.scale), tuple(
            crop.ratio), tuple(
                crop.size)) == (
                    (0.5, 0.9), (0.8, 1.2), (32, 32)) and "bicubic" in repr(crop)
    assert (found["RandomHorizontalFlip"].p, found["RandomVerticalFlip"].p) == (0.1, 0.2)
    assert found["RandAugment"].num_layers == 3 and {op.magnitude for op in found["RandAugment"].ops} == {5}
    assert (erase.probability, erase.mode, erase.max_count) == (0.3, "const", 2)
    assert "Resize(size=40" in repr(t.loaders[1].dataset.transform)  # 32 / 0.8
    for none in ("none", "None"):
        found = steps_of(make(f"--aa {none} --color-jitter 0.3 --reprob 0").loaders[0].dataset.transform)
        assert "RandAugment" not in found and "RandomErasing" not in found
        assert found["ColorJitter"].brightness == pytest.approx(
            (0.7, 1.3))
    assert "ColorJitter" not in steps_of(make("").loaders[0].dataset.transform)  # --aa stands in for it, as published
    plain = steps_of(make("--no-aug").loaders[0].dataset.transform)
    assert not {"RandAugment", "RandomErasing", "RandomHorizontalFlip",
                "RandomResizedCropAndInterpolation"} & plain.keys()


def test_published_transforms_are_the_default(make):
    found = steps_of(make("").loaders[0].dataset.transform)
    crop, erase = found["RandomResizedCropAndInterpolation"], found["RandomErasing"]
    assert tuple(crop.scale) == (0.08, 1) and tuple(crop.ratio) == (3 / 4, 4 / 3) and len(crop.interpolation) == 2
    assert found["RandomHorizontalFlip"].p == 0.5 and "RandomVerticalFlip" not in found
    assert found["RandAugment"].num_layers == 2 and {op.magnitude for op in found["RandAugment"].ops} == {9}
    assert {op.magnitude_std for op in found["RandAugment"].ops} == {
        0.5} and (erase.probability, erase.mode) == (0.25, "pixel")
    test = make("").loaders[1].dataset.transform
    assert isinstance(test.transforms[0], transforms.Resize) and "size=32" in repr(test) and "bicubic" in repr(test)


def test_flags_of_the_run(make):
    t = make("-b 6 -vb 5 -j 1 --seed 5 --log-interval 7 --recovery-interval 3 "
             "--max-bad-steps 4 --grad-accum-steps 2 --channels-last")
    train_loader, val_loader = t.loaders
    assert (train_loader.batch_size, val_loader.batch_size, train_loader.num_workers,
            val_loader.num_workers) == (6, 5, 1, 1)
    assert (train_loader.sampler.seed, train_loader.dataset.seed, t.seed) == (5, 5, 5)
    assert (t.accum, t.steps, t.log_interval, t.max_bad, callback(t, SaveStates).every) == (2, 2, 7, 4, 3)
    assert sorted(val_loader.sampler) == list(range(8)) and val_loader.sampler.batch_size == 5
    assert any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
               for p in t.model.parameters() if p.ndim == 4)


def test_flags_of_the_model(make):
    t = make("--drop-path 0.3 --head-dropout 0.4 --num-classes 12 --grad-checkpointing --torchcompile eager")
    assert t.model.stages[3][0].drop_path1.drop_prob == pytest.approx(0.3)
    assert t.model.head.head_dropout.p == 0.4 and t.model.num_classes == 12 and t.model.img_size == 32
    assert t.backend == "eager" and type(t.net).__name__ == "OptimizedModule"
    assert all(stage.grad_checkpointing for stage in t.model.stages)
    torch.compiler.reset()


def test_flags_of_the_schedule(make):
    t = make("--lr 0.004 --epochs 20 --warmup-epochs 4 --warmup-lr 1e-4 --min-lr 1e-3 --cooldown-epochs 3 -b 12")
    rates = courses(t)[::t.steps]
    assert t.epochs == len(rates) == 23 and rates[:5] == pytest.approx(
        [1e-4 + i * (0.0039 / 4) for i in range(4)] + [1e-3 + 3e-3 * (1 + math.cos(math.pi * 4 / 20)) / 2]
    )
    assert rates[20:] == pytest.approx([1e-3] * 3)
    t = make("--lr 0.004 --epochs 3 --sched None")
    assert t.schedule is None and t.epochs == 3 and t.rate == 0.004


def test_threads(make, monkeypatch):
    asked = []
    monkeypatch.setattr(setup.torch, "set_num_threads", asked.append)
    before = torch.get_num_threads()
    make("--threads 3")
    make("")
    assert asked == [3, before, before]  # and given back
