"""The loop: an update by hand, sums, averages, limits, numbers that are none, schedules, and going on from any
update."""
import copy
import itertools
import math
import sys
from contextlib import nullcontext
from fnmatch import fnmatch
from functools import partial
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

import exercises
from metaformer_edu.core.cli import SCHEDULE_NAMES
from metaformer_edu.data.datasets import load_digits
from metaformer_edu.data.loaders import make_loaders
from metaformer_edu.data.transforms import ImageDataset, seeded_rng
from metaformer_edu.models.kernels import kernel_choice, use_kernels
from metaformer_edu.models.registry import create_model
from metaformer_edu.training.callbacks import (
    AverageWeights, BadSteps, Callback, ClipGradients, EarlyStopping, Interrupted, MixUp, ProgressBar, Recorder,
    ScheduleLR, Signals, Timer, TensorBoard, TrainingStopped)
from metaformer_edu.training.evaluate import evaluate
from metaformer_edu.training.optimizers import Lamb
from metaformer_edu.training.processes import EvalSampler, TrainSampler
from metaformer_edu.training.setup import machine_as_found
from metaformer_edu.training.trainer import Trainer, draw_curves, find_lr, fit, make_optimizer, make_schedule

OLD = Path(__file__).parent / "reference/state-0.1.0.pt"
pytestmark = pytest.mark.usefixtures("one_thread")
SPEED = {"seconds", "images_per_s", "waiting"}  # the columns that no seed fixes


class On(Callback):
    "A callback from functions: On(after_update=f) calls f(trainer) after each update."
    def __init__(self, **events):
        assert events.keys() <= vars(Callback).keys(), events
        vars(self).update(events)


class Net(nn.Module):
    "A small network with all that is random."
    num_classes = 4

    def __init__(self, drop_path=0.):
        super().__init__()
        self.stem, self.norm, self.block, self.head = (
            nn.Linear(192, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = self.norm(self.stem(x.flatten(1)))
        return self.head(x + self.drop_path(self.block(x).relu()))


def net(drop_path=0.):
    torch.manual_seed(0)
    return Net(drop_path)


def pictures(n=24):
    dots = torch.Generator().manual_seed(0)
    images = [(torch.randn(3, 8, 8, generator=dots), i % 4) for i in range(n)]
    return ImageDataset(images, lambda x: x + 0.1 * torch.randn_like(x), seed=3)  # disturbed, as digits are


def shards(batch=4, accum=1, n=24):
    "Loaders as the command makes them."
    data = pictures(n)
    return make_loaders(data, data, batch, samplers=(TrainSampler(n, batch, accum, 5), EvalSampler(n, batch)))


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, foreach=False),
    "fused adamw": lambda m: create_optimizer_v2(m, "adamw", lr=0.01, weight_decay=0.1, fused=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "lamb": lambda m: create_optimizer_v2(m, "lamb", lr=0.01, weight_decay=0.1),
    "our lamb": lambda m: Lamb(create_optimizer_v2(m, "lamb", lr=0.01, weight_decay=0.1).param_groups, 0.01),
}
each_optimizer = pytest.mark.parametrize("opt", OPTIMIZERS)


def trainer(model=None, opt="adamw", loaders=None, epochs=2, **kwargs):
    model = model or net()
    options = dict(progress=False, log_interval=1) | kwargs
    return Trainer(model, loaders or shards(accum=options.get("accum", 1)), OPTIMIZERS[opt](model), epochs=epochs,
                   **options)


def same(a, b, equal=torch.equal):
    "Equal to the last bit, whatever it is made of; nan is nan. Or tensors that are equal in another sense."
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and equal(
            a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], equal) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, equal) for x, y in zip(a, b))
    return a == b or a != a and b != b


def decided(state):
    "A state without what the clock decides."
    return state | dict(log=[{k: v for k, v in row.items() if k not in SPEED} for row in state["log"]])


def close(a, b, rtol):
    for x, y in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)
    return True


# --- an update ---

@each_optimizer
def test_an_update_is_five_lines(opt):
    by_hand = net()
    optimizer, loader = OPTIMIZERS[opt](by_hand), shards()[0]
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = F.cross_entropy(by_hand(images), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    found = trainer(opt=opt)
    log = found.fit()
    assert same(by_hand.state_dict(), found.model.state_dict())
    assert same(optimizer.state_dict()["state"], found.optimizer.state_dict()["state"])
    assert [r["epoch"] for r in log] == [1, 2] and [r["bad_steps"] for r in log] == [0, 0] and found.updates == 12


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
@pytest.mark.parametrize("accum", [2, 4])
def test_batches_of_an_update_add_up(opt, accum):
    whole, split = trainer(opt=opt, loaders=shards(8)), trainer(opt=opt, loaders=shards(8 // accum, accum), accum=accum)
    a, b = whole.fit(), split.fit()
    # where AdamW divides noise by noise, it is larger
    assert close(whole.model, split.model, 1e-6 if opt == "sgd" else 1e-5)
    assert whole.updates == split.updates == 6 and a[-1]["train_loss"] == pytest.approx(b[-1]["train_loss"], rel=1e-5)
    assert whole.loaders[0].batch_size == accum * split.loaders[0].batch_size


def test_what_is_left_over_is_no_update():
    data = pictures()
    found = trainer(loaders=make_loaders(data, data, 5), accum=2, epochs=3)  # 4 batches of 5; 4 images are left over
    found.fit()
    assert (found.steps, found.updates) == (2, 6)


def test_smoothing_is_the_loss_functions():
    whole = trainer(loss_fn=nn.CrossEntropyLoss(label_smoothing=0.9), epochs=1, loaders=shards(24))
    loader = shards(24)[0]
    loader.sampler.set_epoch(0)
    images, labels = next(iter(loader))
    expected = F.cross_entropy(net()(images), labels, label_smoothing=0.9).item()
    assert whole.fit()[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


# --- random numbers ---

def seen(**kwargs):
    "All that the network is shown in training, and what it should have said."
    shown, model = [], net()
    found = trainer(model, **kwargs)
    model.register_forward_hook(lambda m, i, o: shown.append(i[0].clone()) if m.training else None)
    targets = []
    for callback in found.callbacks:
        if isinstance(callback, MixUp):
            callback.loss_fn.register_forward_hook(lambda module, args, out: targets.append(args[1].clone()))
    found.fit()
    return shown, targets


def blend(**kwargs):
    return Mixup(**dict(mixup_alpha=0.8, cutmix_alpha=1., prob=1.,
                 switch_prob=0.5, label_smoothing=0.1, num_classes=4) | kwargs)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_is_a_function_of_seed_update_and_batch(mode):
    shown, targets = seen(mixup=blend(mode=mode), seed=7, accum=2, epochs=2)
    torch.rand(9)  # what happened before must not matter
    np.random.rand(9)
    again = seen(mixup=blend(mode=mode), seed=7, accum=2, epochs=2)
    assert same(shown, again[0]) and same(targets, again[1]) and len(shown) == 12
    loader, mixup = shards(accum=2)[0], blend(mode=mode)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for n, (images, labels) in enumerate(loader):
            with seeded_rng(7 + 2**32, epoch * 3 + n // 2, n % 2):
                images, labels = mixup(images, labels)
            assert same(images, shown[epoch * 6 + n]) and same(labels, targets[epoch * 6 + n])
    assert not same(shown, seen(mixup=blend(mode=mode), seed=8, accum=2)[0])  # another seed, other blends


def test_mixup_ends_where_it_should():
    plain, _ = seen(epochs=3)
    mixed, targets = seen(mixup=blend(), mixup_off_epoch=2, epochs=3)
    assert [same(a, b) for a, b in zip(plain, mixed)] == [False] * 12 + [True] * 6
    assert all(set(t.flatten().tolist()) <= set(torch.tensor(
        [0.025, 0.925]).tolist()) for t in targets[12:])  # smooth, unblended


def test_random_numbers_of_drop_path_follow_the_seed_alone():
    runs = [trainer(net(0.5), seed=seed) for seed in (1, 1, 2)]
    for run in runs:
        run.fit()
        torch.rand(5)
    a, b, c = (run.model.state_dict() for run in runs)
    assert same(a, b) and not same(a, c)


def test_training_leaves_the_generators_of_others_alone():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    found = trainer(net(0.5), mixup=blend())
    torch.manual_seed(4)
    found.fit()
    assert torch.equal(torch.rand(3), expected)


# --- averages and limits ---

def test_the_average_is_measured_in_the_same_pass():
    "Each held-out image is read once, and both models answer as they do alone."
    model, loaders, read, modes = net(), shards(), [], []

    def keep(image):
        read.append(image)
        return image
    loaders[1].dataset.transform = keep
    found = trainer(model, loaders=loaders, ema=ModelEmaV3(model, 0.9), epochs=1,
                    callbacks=[On(after_evaluate=lambda t: modes.append((t.model.training, t.ema.module.training)))])
    found.loaders = (shards()[0], loaders[1])
    row = found.fit()[0]
    assert len(read) == 24 and modes == [(True, False)]  # as they were before
    for name, one in (("val", model), ("ema", found.ema.module)):
        alone = evaluate(one, loaders[1])
        assert {key: row[f"{name}_{key}"] for key in alone} == {k: float(f"{v:.6g}") for k, v in alone.items()}
    assert row["ema_loss"] != row["val_loss"]


def test_the_average_is_the_one_by_hand():
    model, kept = net(), {}
    average = copy.deepcopy(model.state_dict())

    def follow(t):
        for key, value in t.model.state_dict().items():
            average[key] = 0.9 * average[key] + 0.1 * value
    found = trainer(model, ema=ModelEmaV3(model, 0.9),
                    callbacks=[On(after_update=follow, after_epoch=lambda t: kept.update(t.log[-1]))])
    log = found.fit()
    for key, value in found.ema.module.state_dict().items():
        torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-6)
    assert not same(found.ema.module.state_dict(), model.state_dict())
    assert {"ema_loss", "ema_top1"} <= log[0].keys() and log[-1]["ema_loss"] != log[-1]["val_loss"] and kept == log[-1]
    plain = trainer()
    plain.fit()
    assert same(plain.model.state_dict(), model.state_dict())  # it only watches


def gradients(found):
    "The gradients as the optimizer gets them."
    got, step = [], found.optimizer.step
    found.optimizer.step = lambda *a, **k: (got.append([p.grad.clone() for p in found.weights]), step(*a, **k))[1]
    found.fit()
    return got


def test_gradients_are_limited():
    norm = lambda grads: math.sqrt(sum(g.pow(2).sum().item() for g in grads))
    free = gradients(trainer(opt="sgd", epochs=1))
    assert norm(free[0]) > 0.2
    for got in gradients(trainer(opt="sgd", epochs=1, clip_grad=0.01)):
        assert norm(got) == pytest.approx(0.01, rel=1e-3)
    first = gradients(trainer(opt="sgd", epochs=1, clip_grad=0.01))[0]
    for a, b in zip(first, free[0]):
        torch.testing.assert_close(a, b * 0.01 / norm(free[0]), rtol=1e-3, atol=1e-7)
    for got in gradients(trainer(opt="sgd", epochs=1, clip_grad=0.001, clip_mode="value")):
        assert max(g.abs().max().item() for g in got) == pytest.approx(0.001)
    small = gradients(trainer(opt="sgd", epochs=1, clip_grad=0.01, clip_mode="agc"))
    rows = lambda t: t.reshape(len(t), -1).norm(dim=1) if t.ndim > 1 else t.norm()
    for got, weight in zip(small[0][:-2], net().parameters()):
        assert (rows(got) <= 0.01 * rows(weight.detach()).clamp(min=1e-3) * 1.01).all()
    assert same(small[0][-2:], free[0][-2:])  # the last layer is left alone, as in timm's script
    assert same(gradients(trainer(opt="sgd", epochs=1, clip_grad=1e6)), free)


# --- numbers that are none ---

def poison(model, *updates, value=math.nan):
    "Make one number in the gradients of these updates infinite or none."
    passes = iter(range(10**6))
    hook = lambda grad: grad.index_fill(0, torch.tensor([0]), value) if next(passes) in updates else grad
    model.head.bias.register_hook(hook)
    return model


@each_optimizer
@pytest.mark.parametrize("bad", [[2], [0], [0, 1, 5], [4, 6, 7]], ids=str)
def test_a_bad_gradient_changes_nothing(opt, bad):
    before, found = {}, []

    def look(t):
        now = copy.deepcopy((t.model.state_dict(), t.optimizer.state_dict()["state"]))
        if t.updates - 1 in bad and before:
            assert same(now[0], before["now"][0])
            if before["now"][1]:  # before the first good update there is nothing to compare with
                assert same(now[1], before["now"][1])
        before["now"] = now
        found.append(now)
    run = trainer(poison(net(), *bad, value=math.nan if 4 in bad else math.inf), opt, callbacks=[On(after_update=look)])
    start = copy.deepcopy(run.model.state_dict())
    log = run.fit()
    assert same(found[0][0], start) == (0 in bad)
    assert [r["bad_steps"] for r in log] == [sum(b < 6 for b in bad), sum(b >= 6 for b in bad)]
    assert all(math.isfinite(r["train_loss"]) for r in log) and not same(found[-1][0], start)

    by_hand = net()  # the good updates alone
    optimizer, loader = OPTIMIZERS[opt](by_hand), shards()[0]
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for n, (images, labels) in enumerate(loader):
            if epoch * 6 + n in bad:
                continue
            optimizer.zero_grad()
            F.cross_entropy(by_hand(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
    assert same(by_hand.state_dict(), run.model.state_dict())


def test_a_bad_gradient_in_one_of_several_batches_ends_the_update():
    run = trainer(poison(net(), 3), accum=2, epochs=1)  # the second batch of the second update
    assert run.fit()[0]["bad_steps"] == 1 and run.updates == 3


@pytest.mark.parametrize("clip", [dict(clip_grad=1.), dict(clip_grad=1., clip_mode="value"),
                         dict(clip_grad=0.1, clip_mode="agc")], ids=str)
def test_a_limit_does_not_let_bad_gradients_through(clip):
    run = trainer(poison(net(), 1, 2), epochs=1, **clip)
    assert run.fit()[0]["bad_steps"] == 2
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.parametrize("first, epochs", [(1, 1), (4, 2)])  # the second row of bad updates goes on over an epoch's end
def test_too_many_bad_updates_in_a_row_stop(first, epochs):
    run = trainer(poison(net(), *range(first, first + 4)), epochs=2, max_bad=4)
    sentence = fr"not a number for 4 updates in a row, in epoch {epochs} at .* rate of 0.01: try .*--clip-grad"
    with pytest.raises(TrainingStopped, match=sentence):
        run.fit()
    assert run.updates == first + 4
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_bad_updates_that_are_not_in_a_row_do_not_stop():
    run = trainer(poison(net(), 0, 1, 2, 4, 5, 6, 8, 9, 10), max_bad=4)
    assert [r["bad_steps"] for r in run.fit()] == [5, 4]


def test_a_row_of_bad_updates_between_two_looks_stops_too():
    run = trainer(poison(net(), 0, 1, 2), max_bad=3, log_interval=6, epochs=1)
    with pytest.raises(TrainingStopped, match="3 updates in a row"):
        run.fit()


class Odd(nn.Module):
    "A loss that is no number in some calls, with a gradient that is one."
    def __init__(self, *calls, value=math.nan):
        super().__init__()
        self.calls, self.value, self.n = calls, value, 0

    def forward(self, logits, labels):
        self.n += 1
        loss = F.cross_entropy(logits, labels)
        return loss + self.value if self.n - 1 in self.calls else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_is_counted(value):
    run = trainer(loss_fn=Odd(2, 8, 9, value=value))
    log = run.fit()
    assert [r["bad_steps"] for r in log] == [1, 2] and all(math.isfinite(r["train_loss"]) for r in log)
    with pytest.raises(TrainingStopped, match="2 updates in a row"):
        trainer(loss_fn=Odd(2, 8, 9, value=value), max_bad=2).fit()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_loss_changes_nothing(value):
    "As a bad gradient: logits far apart have an infinite loss and a finite gradient."
    weights = [copy.deepcopy(net().state_dict())]
    look = On(after_update=lambda t: weights.append(copy.deepcopy(t.model.state_dict())))
    trainer(loss_fn=Odd(2, value=value), callbacks=[look], epochs=1).fit()
    assert [same(a, b) for a, b in zip(weights, weights[1:])] == [False, False, True, False, False, False]


def test_an_epoch_of_nothing_but_bad_updates_says_so():
    log = trainer(poison(net(), *range(6)), max_bad=7).fit()
    assert math.isnan(log[0]["train_loss"]) and log[0]["bad_steps"] == 6 and math.isfinite(log[1]["train_loss"])


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_low_precision_is_near_and_finite(amp):
    full, low = trainer(opt="sgd"), trainer(opt="sgd", amp=amp)
    dtypes = set()
    low.model.head.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    a, b = full.fit(), low.fit()
    assert dtypes == {amp or torch.float32}  # in training and in the measurement
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in low.model.parameters())
    skipped = b[0]["bad_steps"]
    assert skipped <= (4 if amp == torch.float16 else 0) and b[1]["bad_steps"] == 0
    if not skipped:
        assert b[-1]["train_loss"] == pytest.approx(a[-1]["train_loss"], rel=0.03)
        assert (b[-1]["val_loss"] == a[-1]["val_loss"]) == (amp is None)


def test_the_scale_of_float16_goes_on():
    run = trainer(opt="sgd", amp=torch.float16, epochs=1)
    run.scaler._init_scale = 1e30  # every gradient overflows
    state = []
    run.add(On(after_update=lambda t: state.append(t.state()) if t.updates == 2 else None))
    log = run.fit()
    assert log[0]["bad_steps"] == 6 and run.scaler.get_scale() == pytest.approx(1e30 / 2**6)
    other = trainer(opt="sgd", amp=torch.float16, epochs=1)
    other.load(state[0])
    other.fit()
    assert other.scaler.get_scale() == run.scaler.get_scale()
    wide = trainer(amp=torch.bfloat16, epochs=1)
    wide.fit()
    assert wide.scaler.get_scale() == 1


# --- the rate ---

def rates(epochs=10, steps=4, total=None, **kwargs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, found = make_schedule(optimizer, epochs, steps, **kwargs), []
    for epoch in range(total or epochs):
        for step in range(steps):
            if schedule:
                schedule.step(epoch)
                schedule.step_update(epoch * steps + step)
            found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedule_warms_up_and_comes_down():
    found = rates(warmup_epochs=2, min_lr=0.001)
    up, down = found[:8], found[8:]
    np.testing.assert_allclose(np.diff(up), (0.1 - 1e-6) / 8, rtol=1e-6)
    assert all(a > b for a, b in zip(down, down[1:])) and found[0] < 1e-5
    for t in (8, 20, 39):
        assert found[t] == pytest.approx(0.001 + 0.099 * (1 + math.cos(math.pi * t / 40)) / 2)


def test_schedule_by_epochs_is_the_published_one():
    found = rates(warmup_epochs=2, min_lr=0.001, warmup_lr=0.002, on_updates=False)
    assert [len(set(found[i:i + 4])) for i in range(0, 40, 4)] == [1] * 10
    expected = [0.002, 0.051] + [0.001 + 0.099 * (1 + math.cos(math.pi * e / 10)) / 2 for e in range(2, 10)]
    assert found[::4] == pytest.approx(expected)


@pytest.mark.parametrize("sched", [s for s in SCHEDULE_NAMES if s != "None"])
@pytest.mark.parametrize("on_updates", [True, False])
def test_cooling_down_stays_at_the_last_rate(sched, on_updates):
    found = rates(5, total=8, sched=sched, min_lr=0.001, on_updates=on_updates)
    assert found[20:] == pytest.approx([0.001] * 12) and found[0] == pytest.approx(0.1) and min(found[:16]) > 0.001


def test_an_unknown_schedule_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match="no schedule 'cosin'. Did you mean 'cosine'"):
        rates(sched="cosin")


def test_no_schedule_is_a_constant_rate():
    assert rates(sched="None", warmup_epochs=3, min_lr=0.01) == [0.1] * 40


def test_the_loop_follows_its_schedule():
    model, found = net(), []
    optimizer = OPTIMIZERS["sgd"](model)
    schedule = make_schedule(optimizer, 2, 6, 1, 0.001)
    run = Trainer(model, shards(), optimizer, schedule, epochs=3, progress=False,
                  callbacks=[On(after_update=lambda t: found.append(t.rate))])
    log = run.fit()
    assert found == rates(2, 6, 3, warmup_epochs=1, min_lr=0.001)
    assert [r["lr"] for r in log] == [float(f"{found[i]:.6g}") for i in (5, 11, 17)]


# --- the real model ---

@pytest.fixture(scope="module")
def few():
    digits = load_digits(32)[0]
    return ImageDataset([digits.images[i] for i in range(16)], digits.transform)


def real(few, prepare=lambda model: None, **kwargs):
    torch.manual_seed(0)
    model = create_model("tiny_convformer", img_size=32, drop_path=0.3)
    prepare(model)
    log = fit(model, make_loaders(few, few, 8), OPTIMIZERS["sgd"](model), 1, 0, progress=False, **kwargs)
    return model, {k: v for k, v in log[-1].items() if k not in SPEED}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_run_is_the_same_run(few, backend):
    try:
        model, row = real(few, backend=backend)
    finally:
        torch.compiler.reset()
    plain, expected = real(few)
    assert close(model, plain, 1e-6) and row == pytest.approx(expected, rel=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_forgetting_inside_stages_changes_nothing(few):
    model, _ = real(few, lambda m: m.set_grad_checkpointing(True))
    assert close(model, real(few)[0], 1e-6)


# --- no question to the device ---

ASK_IN_THEIR_STEP = ["*adamp", "*sgdp", "kron*", "novograd*"]  # of timm's optimizers; the scaler asks for most others
NOT_HERE = ["bnb*", "fused*", "adahessian"]  # from packages for CUDA; of second order, which draws random numbers


def matches(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


def asked(function):
    "Whether it asks tensors on the device 'meta', which have no numbers, for one."
    try:
        function()
    except RuntimeError as error:
        assert "cannot be called on meta tensors" in str(error)
        return True
    return False


def two_steps(make, step=lambda optimizer: optimizer.step()):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 5)).to("meta")
    optimizer = make(model)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        step(optimizer)


def scaled_step(optimizer):
    "As in an update of the trainer."
    scaler = torch.amp.GradScaler("meta", init_scale=1.)
    scaler.scale(torch.zeros((), device="meta"))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update(1.)


@pytest.fixture
def fused_on_meta(monkeypatch):
    "The kernel of fused Adam accepts the device; only a check before it does not."
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused", lambda p: None)


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
def test_which_optimizers_ask_the_device_in_their_step():
    names = [name for name in list_optimizers() if not matches(name, NOT_HERE)]
    with torch.compiler.set_stance("force_eager"):  # Kron would compile
        ask = [name for name in names if asked(lambda: two_steps(lambda model: make_optimizer(model, name)))]
    assert ask == [name for name in names if matches(name, ASK_IN_THEIR_STEP)] and len(names) > 80


def test_with_the_scaler_only_ours_and_fused_ones_do_not_ask(fused_on_meta):
    made = {name: partial(make_optimizer, name=name) for name in ("lamb", "lambc", "sgd")}
    fused = {name: partial(create_optimizer_v2, opt=name, fused=True) for name in ("adam", "adamw")}
    ask = [name for name, make in (made | fused).items() if asked(lambda: two_steps(make, scaled_step))]
    assert ask == ["lambc", "sgd"]


def on_meta(opt, **kwargs):
    "A trainer with all that happens in an update, where nothing has a number."
    model = create_model("tiny_caformer", img_size=32, num_classes=4)
    average = ModelEmaV3(model, 0.9)
    average.module.to("meta")
    optimizer = OPTIMIZERS[opt](model.to("meta"))
    run = Trainer(model, shards(accum=2), optimizer, make_schedule(optimizer, 3, 3, 1), 3, accum=2, mixup=blend(),
                  clip_grad=1., ema=average, progress=False, **kwargs)
    run.scaler = torch.amp.GradScaler("meta", init_scale=1.)
    return run


@pytest.mark.parametrize("opt, amp", [("fused adamw", None), ("our lamb", torch.float16), ("lamb", None)])
def test_an_update_asks_the_device_for_nothing(opt, amp, fused_on_meta, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which does not know the device
    run = on_meta(opt, amp=amp)
    batches = iter([(torch.zeros(4, 3, 32, 32), torch.arange(4))] * 4)

    def updates():
        for _ in range(2):
            run.call("before_update")
            run.update(itertools.islice(batches, 2))
            run.step += 1
            run.call("after_update")
    assert asked(updates) == (opt == "lamb")
    if opt != "lamb":  # the count of bad updates is read at an interval, and only then
        run.step = run.log_interval
        assert asked(lambda: run.call("after_update"))


# --- LAMB that leaves a bad update out by itself ---

def matrix_and_vectors():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def lamb_run(kinds, bad=(), scale=1., unscale=True, state=None, frozen=False):
    "An update with each of these optimizers in turn, which hand on the state; some updates are bad."
    model, noise = matrix_and_vectors(), torch.Generator().manual_seed(1)
    model[0].requires_grad_(not frozen)
    weights = [p for p in model.parameters() if p.requires_grad]
    made = {kind: OPTIMIZERS[kind](model) for kind in dict.fromkeys(kinds)}
    for n, kind in enumerate(kinds):
        if n and kinds[n - 1] != kind:
            made[kind].load_state_dict(copy.deepcopy(made[kinds[n - 1]].state_dict()))
        optimizer, scaler = made[kind], torch.amp.GradScaler("cpu", init_scale=scale)
        for p in weights:
            p.grad = scale * torch.randn(p.shape, generator=noise)
        if n in bad:
            weights[-1].grad[0] = math.nan if n % 2 else math.inf
        scaler.scale(torch.zeros(()))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        optimizer.zero_grad()
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("bad", [[], [3], [0, 1, 5], [6, 7]], ids=str)
@pytest.mark.parametrize("options", [{}, dict(frozen=True), dict(scale=1024.), dict(scale=1024., unscale=False)],
                         ids=str)
def test_lamb_is_timms_to_the_last_bit(bad, options):
    timms, ours = (lamb_run([kind] * 8, bad, **options) for kind in ("lamb", "our lamb"))
    assert same(ours, timms) and not same(ours[0], matrix_and_vectors().state_dict())
    assert [group["step"].item() for group in ours[1]["param_groups"]] == [8 - len(bad)] * 2


def test_lamb_goes_on_from_timms_state_and_back():
    turns = ["lamb"] * 3 + ["our lamb"] * 3 + ["lamb"] * 2
    assert same(lamb_run(turns, [2, 4]), lamb_run(["lamb"] * 8, [2, 4]))


def test_lamb_moves_a_weight_of_zeros():
    "Its trust ratio is 1, as where there is no gradient."
    found = {}
    for kind in ("lamb", "our lamb"):
        model = matrix_and_vectors()
        nn.init.zeros_(model[0].weight)
        optimizer = OPTIMIZERS[kind](model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[2].weight.grad.zero_()
        optimizer.step()
        found[kind] = model.state_dict()
    assert same(found["our lamb"], found["lamb"]) and found["lamb"]["0.weight"].abs().min() > 0


def test_make_optimizer_takes_what_asks_a_gpu_nothing(monkeypatch):
    settings = dict(lr=0.02, weight_decay=0.3, eps=1e-5, betas=(0.8, 0.9))
    here, there = make_optimizer(net(), "lamb", **settings), make_optimizer(net().to("meta"), "LAMB", **settings)
    assert type(here) is timm.optim.Lamb and type(there) is Lamb  # on a CPU no bit changes
    plain = [{key: value for key, value in group.items() if key != "params"} for group in here.param_groups]
    assert same(plain, [{key: group[key] for key in plain[0]} for group in there.param_groups])
    assert make_optimizer(net(), "adamw").defaults["fused"] and "fused" not in make_optimizer(net(), "lion").defaults
    monkeypatch.setattr("metaformer_edu.training.trainer.create_optimizer_v2", lambda *args, **kwargs: kwargs)
    gpu = types.SimpleNamespace(parameters=lambda: iter([types.SimpleNamespace(device=torch.device("cuda:1"))]))
    assert make_optimizer(gpu, "AdamW")["fused"] and "fused" not in make_optimizer(gpu, "sgd")


# --- going on ---

def full(**kwargs):
    "All that has a memory: drop path, mixup, an average, AdamW, a schedule."
    model = net(0.3)
    optimizer = OPTIMIZERS["fused adamw"](model)
    schedule = make_schedule(optimizer, 3, 3, 1)
    options = dict(
    accum=2,
    ema=ModelEmaV3(
        model,
        0.9),
        mixup=blend(),
        mixup_off_epoch=2,
        clip_grad=1.,
        seed=11,
         progress=False)
    return Trainer(model, shards(accum=2), optimizer, schedule, 3, **options | kwargs)


@pytest.fixture(scope="module")
def whole():
    "A run of 9 updates of two batches, three of them bad ones, with its state after each update and at the end."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fixture of a module comes before `one_thread`
    states, run = [], full()
    poison(run.model, 4, 6, 7)
    states.append(copy.deepcopy(run.state()))
    run.add(On(after_update=lambda t: states.append(copy.deepcopy(t.state()))))
    run.fit()
    torch.set_num_threads(threads)
    return states, decided(copy.deepcopy(run.state()))


@pytest.mark.parametrize("update", range(10))
def test_a_run_goes_on_from_every_update(whole, update, tmp_path):
    states, end = whole
    assert states[update]["updates"] == update
    torch.save(states[update], tmp_path / "state.pt")
    run = full()
    poison(run.model, *(n - 2 * update for n in (4, 6, 7)))
    with torch.no_grad():  # what was there before must not matter
        for p in (*run.model.parameters(), *run.ema.module.parameters()):
            p.normal_()
    torch.rand(update + 1)
    run.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run.updates == update
    assert same(decided(run.state()), decided(states[update]))
    run.fit()
    assert same(decided(run.state()), end)
    assert [r["bad_steps"] for r in run.log] == [1, 1, 0] and len(run.log) == 3


def test_bad_updates_in_a_row_are_remembered():
    run, states = trainer(poison(net(), 3, 4), max_bad=4), []
    run.add(On(after_update=lambda t: states.append(copy.deepcopy(t.state())) if t.updates == 5 else None))
    run.fit()
    other = trainer(poison(net(), 0, 1), max_bad=4)
    other.load(states[0])
    with pytest.raises(TrainingStopped, match="4 updates in a row, in epoch 2"):
        other.fit()


def test_loading_forgets_what_was_before(whole):
    states, end = whole
    run = full()
    poison(run.model, 0)
    run.add(On(after_update=lambda t: (_ for _ in ()).throw(StopIteration) if t.updates == 2 else None))
    with pytest.raises((StopIteration, RuntimeError)):
        run.fit()
    run.load(states[5])
    assert same(decided(run.state()), decided(states[5]))


def test_sums_are_not_rounded_on_the_way(whole):
    state = copy.deepcopy(whole[0][4])
    state["sums"] = [[1 / 3, 1.]]  # kept in double precision
    run = full()
    run.load(state)
    assert run.state()["sums"] == [[1 / 3, 1.]]


def test_a_run_goes_on_with_the_kernels_it_had(whole):
    with machine_as_found():
        use_kernels({"star_relu": "triton"})
        state = full().state()
        full().load(whole[0][4])
        assert {*kernel_choice().values()} == {"pytorch"}
        full().load(state)
        assert kernel_choice()["star_relu"] == "triton"
    assert {*kernel_choice().values()} == {"pytorch"}


def test_a_state_of_another_model_is_refused(whole):
    state = copy.deepcopy(whole[0][4])
    for change in ("missing", "shape", "optimizer"):
        wrong = copy.deepcopy(state)
        if change == "missing":
            del wrong["state_dict"]["head.bias"]
        elif change == "shape":
            wrong["state_dict"]["head.bias"] = torch.zeros(7)
        else:
            wrong["optimizer"]["param_groups"][0]["params"] = []
        with pytest.raises(ValueError, match="another model or optimizer"):
            full().load(wrong)


def test_a_state_that_cuts_the_epoch_in_another_way_is_refused(whole):
    run = full(accum=1)  # six updates in an epoch
    with pytest.raises(ValueError, match="middle of an epoch of 3 updates, and here are 6"):
        run.load(whole[0][4])


def test_the_end_of_an_epoch_is_not_its_middle(whole):
    """The message of the refusal says: resume from a state at the end of an epoch. The states that a run leaves are
    these."""
    run = full(accum=1)
    run.load(whole[0][3])
    assert run.epoch + run.step // run.steps == 1
    log = run.fit()
    assert len(log) == 3 and run.updates == 18
    assert log[0]["train_loss"] == whole[1]["log"][0]["train_loss"]


def test_an_average_that_is_new_starts_with_the_weights(whole):
    state = {k: v for k, v in whole[0][4].items() if k != "state_dict_ema"}
    run = full()
    run.load(state)
    assert same(run.ema.module.state_dict(), state["state_dict"])


@pytest.mark.parametrize("schedule", [True, False])
def test_settings_of_the_optimizer_are_those_of_the_new_command(whole, schedule):
    "A run that goes on says which settings are others: then they must be."
    def make(lr, decay):
        model = net(0.3)
        optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=decay)
        return Trainer(model, shards(accum=2), optimizer, make_schedule(
            optimizer, 3, 3) if schedule else None, 3, accum=2, progress=False)
    first, states = make(0.01, 0.1), []
    first.add(On(after_update=lambda t: states.append(copy.deepcopy(t.state()))))
    first.fit()
    other, rates = make(0.001, 0.3), []
    other.load(states[2])
    other.add(On(after_update=lambda t: rates.append(t.rate)))
    other.fit()
    assert max(rates) <= 0.001
    assert {g["weight_decay"] for g in other.optimizer.param_groups} == {0, 0.3}


# --- fit ---

def test_fit_is_the_plain_loop(few):
    def twin():
        torch.manual_seed(0)
        model = create_model("tiny_convformer", img_size=32)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = twin()
    fit(model, make_loaders(few, few, 8), optimizer, epochs=2, warmup_epochs=0, min_lr=0.1, progress=False)
    by_hand, optimizer = twin()
    loader, _ = make_loaders(few, few, 8)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(by_hand(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
    assert same(model.state_dict(), by_hand.state_dict())


def test_fit_returns_its_log_and_reports_each_epoch():
    model, rows, data = net(), [], pictures()
    log = fit(model, make_loaders(data, data, 4), OPTIMIZERS["sgd"](model), 3, 1, progress=False,
              callbacks=[On(after_epoch=lambda t: rows.append(t.log[-1]))])
    assert rows == list(log) and [r["epoch"] for r in log] == [1, 2, 3]
    assert log[0]["lr"] > log[1]["lr"] > log[2]["lr"] and "val_top1" in repr(log)
    assert all(0 <= r["waiting"] <= 1 and r["images_per_s"] > 0 for r in log)


def test_smoothing_reaches_the_loss():
    losses, data = [], pictures()
    for smoothing in (0, 0.9):
        model = net()
        nn.init.normal_(model.head.weight)  # sure of something
        log = fit(model, make_loaders(data, data, 24), OPTIMIZERS["sgd"](model), 1, 0, smoothing=smoothing,
                  progress=False)
        losses.append(log[0]["train_loss"])
    images, labels = next(iter(make_loaders(data, data, 24)[0]))
    model = net()
    nn.init.normal_(model.head.weight)
    expected = [F.cross_entropy(model(images), labels, label_smoothing=s).item() for s in (0, 0.9)]
    assert losses == pytest.approx(expected, rel=1e-4) and abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize("batch", [24, 3])
def test_weights_that_are_no_number_stop(batch):
    model, data = net(), pictures()
    with torch.no_grad():
        model.head.bias[3] = math.nan
    with pytest.raises(TrainingStopped, match="loss (is nan in|or its gradient was not a number .* in) epoch 1 .*try"):
        fit(model, make_loaders(data, data, batch), OPTIMIZERS["sgd"](model), max_bad=4, progress=False)


def test_evaluation_leaves_no_dropout_on_and_training_turns_it_on_again():
    model, modes, data = net(0.5), [], pictures()
    model.register_forward_hook(lambda m, i, o: modes.append(m.training))
    fit(model, make_loaders(data, data, 24), OPTIMIZERS["sgd"](model), epochs=2, warmup_epochs=0, progress=False)
    assert modes == [True, False, True, False]


def test_the_bar(capsys):
    model, data = net(), pictures()
    fit(model, make_loaders(data, data, 4), OPTIMIZERS["sgd"](model), 1, 0, progress=True)
    said = capsys.readouterr().err
    assert "24/24" in said and all(word in said for word in ("epoch 1/1", "loss=", "lr=", "waiting=", "img/s"))


# --- callbacks ---

class Patient(Callback):
    "Has a memory and uses random numbers."
    def __init__(self):
        self.seen = 0

    def before_batch(self, trainer):
        trainer.images = trainer.images + 0.01 * torch.randn_like(trainer.images)

    def after_update(self, trainer):
        self.seen += 1

    def state_dict(self):
        return dict(seen=self.seen)

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_callbacks_are_called_in_their_order():
    told = []
    tell = lambda event, order: lambda trainer: told.append((event, order))
    listeners = [On(**{event: tell(event, order) for event in EVENTS}) for order in (90, 5, 70)]
    for listener, order in zip(listeners, (90, 5, 70)):
        listener.order = order
    run = trainer(epochs=1, loaders=shards(8), callbacks=listeners)
    run.fit()
    update = ["before_update", "before_batch", "after_backward", "after_update"]
    expected = ["before_fit", "before_epoch", *update * 3, "before_evaluate", "after_evaluate", "after_epoch",
                "after_fit", "cleanup"]
    assert told == [(event, order) for event in expected for order in (5, 70, 90)]
    assert [c.order for c in run.callbacks] == sorted(c.order for c in run.callbacks)


EVENTS = [name for name in vars(Callback) if name.startswith(("before_", "after_")) or name == "cleanup"]


def test_cleanup_comes_after_an_error_too():
    told = []

    def fail(t):
        raise RuntimeError("no more")
    run = trainer(callbacks=[On(after_update=fail, cleanup=lambda t: told.append(t.step),
                                after_fit=lambda t: told.append("done"))])
    with pytest.raises(RuntimeError, match="no more"):
        run.fit()
    assert told == [1]


def test_every_argument_of_the_trainer_has_its_callback():
    kinds = lambda t: {type(c) for c in t.callbacks}
    assert kinds(trainer()) == {Timer, Recorder, BadSteps}
    assert kinds(full(progress=True)) == {Timer, Recorder, BadSteps, ScheduleLR, MixUp, ClipGradients, AverageWeights,
                                          ProgressBar}


@pytest.mark.parametrize("update", [0, 1, 4, 6, 9])
def test_any_set_of_callbacks_goes_on_bit_for_bit(update):
    more = lambda: [Patient(), EarlyStopping("val_loss", patience=9), Patient()]
    states, run = [], full(callbacks=more())
    states.append(copy.deepcopy(run.state()))
    run.add(On(after_update=lambda t: states.append(copy.deepcopy(t.state()))))
    run.fit()
    assert states[4]["callbacks"].keys() == {"Patient", "Patient (2)", "EarlyStopping"}
    again = full(callbacks=more())
    again.load(states[update])
    again.fit()
    assert same(decided(again.state()), decided(run.state())) and again.state()["callbacks"]["Patient"] == dict(seen=9)


def test_a_state_of_0_1_0_goes_on_as_it_did():
    """Made with the code before there were callbacks: after update 4 of `full`, with bad updates 4, 6 and 7; and its
    end."""
    kept = torch.load(OLD, weights_only=True)
    run = full()
    assert run.state().keys() == kept["state"].keys()  # so a state of today is read by 0.1.0, too
    run.load(kept["state"])
    assert run.updates == 4 and run.step == 1
    run.fit()
    near = partial(torch.allclose, rtol=1e-5, atol=1e-7)  # the file was made on another processor
    assert same(decided(run.state()), kept["end"], near)


@pytest.mark.parametrize("losses, patience, column, epochs",
                         [([5, 4, 4, 4, 3], 2, "val_loss", 4), ([1, 2, 3, 2, 1], 1, "val_top1", 4),
                          ([3, 2, 1, 0, -1], 1, "val_loss", None), ([1, math.nan, math.nan], 2, "val_loss", 3)])
def test_early_stopping(losses, patience, column, epochs):
    class Trained:
        log, stop = [], False
    stopping = EarlyStopping(column, patience)
    for value in losses:
        Trained.log.append({column: value})
        stopping.after_epoch(Trained)
        if Trained.stop:
            break
        again = EarlyStopping(column, patience)  # it goes on from its state at any epoch
        again.load_state_dict(stopping.state_dict())
        stopping = again
    assert (len(Trained.log) if Trained.stop else None) == epochs


def test_a_training_that_was_stopped_early_stays_stopped():
    run = trainer(epochs=9, callbacks=[EarlyStopping("lr", patience=2)])  # the rate is constant: never better
    assert len(run.fit()) == 3 and run.state()["stop"] and "stop" not in trainer().state()
    again = trainer(epochs=9, callbacks=[EarlyStopping("lr", patience=2)])
    again.load(run.state())
    assert len(again.fit()) == 3 and same(again.model.state_dict(), run.model.state_dict())


def test_one_process_that_stops_early_stops_all(monkeypatch):
    from metaformer_edu.training import callbacks
    monkeypatch.setattr(callbacks, "any_rank", lambda flag: True)  # another one has had enough
    assert len(trainer(epochs=9, callbacks=[EarlyStopping(patience=9)]).fit()) == 1


def test_tensorboard_gets_the_log_of_a_training(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = trainer(callbacks=[TensorBoard(tmp_path)]).fit()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("val/loss")
    assert [(e.step, e.value) for e in found] == [(r["epoch"], pytest.approx(r["val_loss"])) for r in log]


def cell(lesson, start):
    "The code of the one cell of a lesson that begins so."
    found, = [c.source for c in exercises.read(exercises.NBS / f"{lesson}.ipynb") if c.source.startswith(start)]
    return found


def test_the_lessons_logger_for_weights_and_biases(monkeypatch):
    class Run:
        logged, finished = [], 0

        def log(self, row, step):
            self.logged.append((step, row))

        def finish(self):
            Run.finished += 1
    asked = []
    stub = types.SimpleNamespace(init=lambda **options: asked.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", stub)
    names = dict(Callback=Callback, rank=lambda: 0)
    exec(cell("training/trainer", "class WandB"), names)
    log = trainer(callbacks=[names["WandB"](project="digits", name="one")]).fit()
    assert asked == [dict(project="digits", name="one")] and Run.logged == list(enumerate(log, 1)) and Run.finished == 1
    names["rank"] = lambda: 1  # the other processes say nothing
    trainer(callbacks=[names["WandB"](project="digits")]).fit()
    assert len(asked) == 1 and Run.finished == 1


# --- which rate? ---

def everything(run):
    "All that a training depends on: its state, its gradients, its loader, and the generators of the machine."
    loader = run.loaders[0]
    return copy.deepcopy([run.state(), [p.grad for p in run.weights], run.optimizer.state_dict(), run.epoch, run.step,
                          run.stop,
                          id(run.criterion), sorted(vars(run)), run.net.training, vars(loader.sampler),
                          loader.generator.get_state(), torch.get_rng_state()])


@each_optimizer
@pytest.mark.parametrize("after", [0, 4, 6])
def test_find_lr_and_then_fit_is_fit(opt, after):
    def make():
        model = net(0.3)
        optimizer = OPTIMIZERS[opt](model)
        return Trainer(model, shards(accum=2), optimizer, make_schedule(optimizer, 3, 3, 1), 3, accum=2, mixup=blend(),
                       clip_grad=1.,
                       ema=ModelEmaV3(model, 0.9), seed=11, progress=False, callbacks=[Patient()])
    asked, plain = make(), make()
    for run in (asked, plain):
        if after:
            stop = On(after_update=lambda t: setattr(t, "interrupt", RuntimeError("now")) if t.updates == after
                      else None)
            run.add(stop)
            with pytest.raises(RuntimeError, match="now"):
                run.fit()
            run.callbacks.remove(stop)
    before = everything(asked)
    curve = find_lr(asked, updates=7)
    assert same(everything(asked), before)
    assert len(curve.rates) == len(curve.losses) > 3
    asked.fit()
    plain.fit()
    assert same(decided(asked.state()), decided(plain.state()))


def test_find_lr_leaves_a_shuffled_loader_and_its_workers_alone():
    def make():
        model, data = net(), torch.utils.data.TensorDataset(torch.randn(24, 3, 8, 8,
                                                                        generator=torch.Generator().manual_seed(1)),
                                                            torch.arange(24) % 4)
        loader = torch.utils.data.DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=True,
                                             generator=torch.Generator().manual_seed(2))
        return trainer(model, loaders=(loader, shards()[1]))
    asked, plain = make(), make()
    find_lr(asked, updates=8)
    for run in (asked, plain):
        run.fit()
        run.close()
    assert same(decided(asked.state()), decided(plain.state()))


def test_find_lr_finds_a_rate_that_learns_and_stops_where_it_breaks():
    curve = find_lr(trainer(opt="sgd"), lowest=1e-4, highest=1e4, updates=60)
    assert len(curve.rates) < 60 and curve.losses[-1] > min(curve.losses) and 1e-3 < curve.steepest < 100
    assert curve.rates == sorted(curve.rates) and curve.rates[0] == pytest.approx(1e-4)
    ax, = curve.draw().axes
    assert list(ax.lines[0].get_ydata()) == curve.losses and ax.get_xscale() == "log"


def test_find_lr_survives_rates_at_which_all_is_infinite():
    run = trainer(poison(net(), 3, 4), opt="sgd")
    before = copy.deepcopy(run.model.state_dict())
    assert all(map(math.isfinite, find_lr(run, lowest=1., highest=1e30, updates=30).losses))
    assert same(run.model.state_dict(), before)


# --- pictures ---

def test_curves_show_what_the_log_says():
    log = [dict(epoch=e, train_loss=2 / e, val_loss=1 / e, val_top1=90 + e) for e in (1, 2, 3)]
    left, right = draw_curves({"mine": log}).axes
    curves = [list(line.get_ydata()) for line in left.lines]
    assert [2 / e for e in (1, 2, 3)] in curves and [1 / e for e in (1, 2, 3)] in curves
    assert list(right.lines[0].get_ydata()) == [91, 92, 93]
    assert "mine 93.00 %" in [t.get_text() for t in right.get_legend().get_texts()]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in (left, right))
    assert len(draw_curves(log).axes[1].lines) == 1 and len(draw_curves({"a": log, "b": log}).axes[1].lines) == 2


def test_curves_show_the_average_too():
    log = [dict(epoch=e, train_loss=2 / e, val_loss=1 / e, val_top1=90 + e, ema_top1=80 + e, ema_loss=1.)
           for e in (1, 2, 3)]
    right = draw_curves({"mine": log}).axes[1]
    assert [list(line.get_ydata()) for line in right.lines] == [[91, 92, 93], [81, 82, 83]]
    assert "mine average 83.00 %" in [t.get_text() for t in right.get_legend().get_texts()]


def test_a_signal_that_cannot_be_raised_makes_no_noise():
    "As within a fork: Python would print 'Exception ignored in'. It has been noted all the same."
    heard, before = [], sys.unraisablehook
    sys.unraisablehook = heard.append
    try:
        signals = Signals()
        signals.before_fit(None)
        for error in (Interrupted(15), ValueError("other")):
            sys.unraisablehook(types.SimpleNamespace(exc_value=error))
        signals.cleanup(None)
        assert [str(lost.exc_value) for lost in heard] == ["other"] and sys.unraisablehook == heard.append  # as before
    finally:
        sys.unraisablehook = before
