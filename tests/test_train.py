"""The command as a person types it: the main job, one seed one run, all families, folders, going on, mistakes."""
import ast
import csv
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from metaformer_edu import validate
from metaformer_edu.data.datasets import load_digits
from metaformer_edu.data.loaders import make_loaders
from metaformer_edu.models.registry import create_model
from metaformer_edu.train import main, run
from metaformer_edu.training import run_folder, trainer
from metaformer_edu.training.callbacks import Callback, EarlyStopping, Interrupted
from metaformer_edu.training.evaluate import evaluate
from metaformer_edu.training.run_folder import _SPEED_COLUMNS, new_folder
from metaformer_edu.training.settings import parse
from metaformer_edu.training.setup import build, machine_as_found, open_run

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ["identityformer", "randformer", "poolformerv2", "convformer", "caformer"]
# quick, for all that does not ask for accuracy
SMALL = ["--img-size", "32", "-b", "64", "--model", "tiny_poolformerv2"]


pytestmark = pytest.mark.usefixtures("one_thread")


def start(folder, *args, **kwargs):
    "The command in a process of its own, as in an empty folder of a user."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "metaformer_edu.train", *args], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def command(folder, *args):
    process = start(folder, *args)
    out, err = process.communicate()
    return process.returncode, out, err


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def summary(folder):
    return table(folder / "summary.csv")


def only_run(output):
    found = list(output.iterdir())
    assert len(found) == 1, found
    return found[0]


# --- the main job ---

@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a user's folder")
    status, out, err = command(folder)
    assert status == 0, err
    return folder, out, err


def test_main_job_reads_digits(main_job):
    folder, out, _ = main_job
    rows = summary(folder / "runs" / "tiny_convformer-digits-seed0")
    assert float(rows[-1]["val_top1"]) >= 98.5
    assert [int(r["epoch"]) for r in rows] == list(range(1, len(rows) + 1))
    assert all(math.isfinite(float(v)) for r in rows for v in r.values())
    assert {"epoch", "lr", "train_loss", "val_loss", "val_top1",
        "bad_steps"} <= rows[0].keys() and not set(_SPEED_COLUMNS) & rows[0].keys()
    assert {r["bad_steps"] for r in rows} == {"0"}
    speed = table(folder / "runs" / "tiny_convformer-digits-seed0" / "speed.csv")
    assert list(
    speed[0]) == [
        "epoch",
        "seconds",
        "images_per_s",
        "waiting"] and [
            r["epoch"] for r in speed] == [
                r["epoch"] for r in rows]
    assert all(float(r["images_per_s"]) > 0 and 0 <= float(r["waiting"]) < 1 for r in speed)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert f"last epoch ({len(rows)}): top-1 {float(rows[-1]['val_top1']):.2f} %" in out


def test_main_job_leaves_a_run(main_job):
    folder, out, err = main_job
    assert [p.name for p in folder.iterdir()] == ["runs"]
    run = only_run(folder / "runs")
    names = {
    "args.yaml",
    "summary.csv",
    "speed.csv",
    "last.safetensors",
    "best.safetensors",
    "curves.png",
    "predictions.png",
    "mistakes.png",
    "explained.png",
    "snapshots"}
    states = {p.name for p in run.glob("state-*.pt")}
    assert (
        {p.name for p in run.iterdir()} == names | states and all(n in out for n in names | states) and len(states) == 2
    )
    about = yaml.safe_load((run / "args.yaml").read_text())
    settings = about["settings"]
    assert about["command"] == "metaformer-train" and about["versions"]["torch"] == torch.__version__
    assert (settings["model"], settings["data"], settings["seed"]) == ("tiny_convformer", "digits", 0)
    assert about["img_size"] == 64 and about["class_names"] == [str(i) for i in range(10)]
    for name in ("curves.png", "predictions.png", "mistakes.png", "explained.png"):
        picture = np.array(Image.open(run / name).convert("RGB"))
        assert min(picture.shape[:2]) >= 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50, f"{name} is empty"
    assert "100%" in err and all(word in err for word in ("loss=", "lr=", "img/s", "waiting="))  # the bar
    assert "Warning" not in err


def test_main_job_says_how_to_load_its_weights(main_job, monkeypatch):
    folder, out, _ = main_job
    monkeypatch.chdir(folder)
    code = out[out.index("from metaformer_edu.models.registry"):out.index(".eval()") + 7].replace("\n  ", "\n")
    names = {}
    exec(code, names)
    model = names["model"]
    assert not model.training
    run = only_run(folder / "runs")
    rows = summary(run)
    loader = make_loaders(*load_digits()[:2])[1]
    for file, row in (("last", rows[-1]), ("best", max(rows, key=lambda r: (float(r["val_top1"]), -int(r["epoch"]))))):
        model.load_state_dict(load_file(run / f"{file}.safetensors"))
        measured = evaluate(model, loader)
        assert measured["top1"] == pytest.approx(float(row["val_top1"]), abs=1e-3)
        assert measured["loss"] == pytest.approx(float(row["val_loss"]), rel=1e-4)


def test_main_job_says_how_to_measure_its_weights(main_job, monkeypatch, capsys):
    folder, out, _ = main_job
    monkeypatch.chdir(folder)
    typed = re.search(r"metaformer-validate (.*)", out)[1]
    validate.main(typed.split())
    best = re.search(r"best epoch \(\d+\): (top-1 [\d.]+)", out)[1]
    assert f"{best}" in capsys.readouterr().out and "--checkpoint runs/" in typed


def test_a_second_run_leaves_the_first_alone(main_job, capsys):
    folder, _, _ = main_job
    run = only_run(folder / "runs")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    new_folder(folder / "runs", run.name).rmdir()  # runs/…-2, made and taken away
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


# --- one seed, one run ---

@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    main([*SMALL, "--epochs", "2", "--drop-path", "0.2", "--output", str(output)])
    return only_run(output)


def same(a, b):
    a, b = (load_file(f / "last.safetensors") for f in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_same_seed_same_numbers(two_epochs, tmp_path, workers):
    torch.rand(3)  # what happened before must not matter
    main([*SMALL, "--epochs", "2", "--drop-path", "0.2", "-j", workers, "--output", str(tmp_path)])
    again = only_run(tmp_path)
    assert (again / "summary.csv").read_bytes() == (two_epochs / "summary.csv").read_bytes() and same(again, two_epochs)


def test_another_seed_other_numbers(two_epochs, tmp_path):
    main([*SMALL, "--epochs", "2", "--drop-path", "0.2", "--seed", "1", "--output", str(tmp_path)])
    other = only_run(tmp_path)
    assert other.name.endswith("seed1")
    assert not same(other, two_epochs)
    assert all(a["val_loss"] != b["val_loss"] for a, b in zip(summary(other), summary(two_epochs)))


# --- every family ---

@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family, tmp_path):
    main(["--model", f"tiny_{family}", "--img-size", "32", "--epochs", "2", "--output", str(tmp_path)])
    rows = summary(only_run(tmp_path))
    assert float(rows[-1]["val_top1"]) > 50  # chance is 10
    assert float(rows[-1]["val_loss"]) < math.log(10) / 2


# --- flags ---

def test_vectors_do_not_decay(tmp_path):
    model, _, optimizer, _ = build(parse(["--weight-decay", "0.3", "--lr", "0.004", *SMALL]))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[id(p)] for p in model.parameters() if p.requires_grad and p.ndim < 2} == {0}
    assert {decay[id(p)] for p in model.parameters() if p.requires_grad and p.ndim >= 2} == {0.3}
    assert {g["lr"] for g in optimizer.param_groups} == {0.004}


def test_flags_reach_the_model():
    flags = "--drop-path 0.3 --head-dropout 0.4 --num-classes 12 --opt sgd --seed 5 -j 1".split()
    model, loaders, optimizer, info = build(parse(SMALL + flags))
    assert model.stages[3][0].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.head.head_dropout.p == 0.4 and model.num_classes == 12 and model.img_size == info.img_size == 32
    assert isinstance(optimizer, torch.optim.SGD)
    assert (loaders[0].batch_size, loaders[0].num_workers, loaders[0].sampler.seed,
            loaders[0].dataset.seed) == (64, 1, 5, 5)


def test_fine_tuning_starts_from_the_weights(two_epochs):
    path = str(two_epochs / "last.safetensors")
    model, loaders, _, _ = build(parse([*SMALL, "--initial-checkpoint", path]))
    assert evaluate(model, loaders[1])["top1"] == pytest.approx(float(summary(two_epochs)[-1]["val_top1"]), abs=1e-3)


def test_help():
    status, out, err = command(ROOT, "--help")
    assert status == 0 and not err
    for text in ("DATA", "--model", "--epochs", "--batch-size", "--lr", "--output", "default 300; 10 for digits"):
        assert text in " ".join(out.split()), text
    assert max(map(len, out.splitlines())) <= 98


# --- a folder of images ---

@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    "Two classes that flips, crops and colours leave apart: fine and broad stripes."
    folder, rng = tmp_path_factory.mktemp("data") / "stripes", np.random.default_rng(0)
    for part, n in (("train", 24), ("val", 8)):
        for name, width in (("broad", 16), ("fine", 2)):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                rows = (np.arange(64) + rng.integers(64)) // width % 2
                picture = np.broadcast_to(rows[:, None, None] * rng.integers(100, 256, 3), (64, 64, 3))
                Image.fromarray(picture.astype(np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def shapes(stripes, tmp_path):
    "A copy that may be spoilt."
    return Path(shutil.copytree(stripes, tmp_path / "stripes"))


def test_a_folder_of_images(shapes, tmp_path, capsys):
    main([str(shapes), "--model", "tiny_caformer", "--epochs", "2", "-b", "16", "-j0", "--output",
          str(tmp_path / "out")])
    run = only_run(tmp_path / "out")
    assert run.name == "tiny_caformer-stripes-seed42"
    rows = summary(run)
    assert len(rows) == 2 and "val_top5" not in rows[0] and 0 < float(rows[-1]["val_loss"]) < 2
    out = capsys.readouterr().out
    assert "48 images to learn, 16 held out" in out and "num_classes=2, img_size=64" in out
    assert {"curves.png", "predictions.png", "best.safetensors"} <= {p.name for p in run.iterdir()}


# --- what can go wrong ---

def refused(capsys, *args):
    "Run the command in this process and give the sentence with which it ends with status 2."
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    text = capsys.readouterr().err
    assert caught.value.code == 2, text
    assert text.startswith("metaformer-train: ") and text.count("\n") == 1 and "Traceback" not in text, text
    return text


BAD = {
    "misspelt model": (["--model", "tiny_convfromer"], "no model 'tiny_convfromer'.*'tiny_convformer'"),
    "missing folder": (["no/such/folder"], "no folder no/such/folder"),
    "zero epochs": (["--epochs", "0"], "--epochs: 0 is not 1 or more"),
    "negative epochs": (["--epochs", "-3"], "--epochs"),
    "epochs in words": (["--epochs", "ten"], "--epochs: invalid whole number value: 'ten'"),
    "half an epoch": (["--epochs", "0.5"], "--epochs"),
    "batch of nothing": (["-b", "0"], "--batch-size"),
    "batch larger than the data": (["-b", "1348"], "batch of 1348 is larger .* 1347 images"),
    "rate of zero": (["--lr", "0"], "--lr"),
    "rate that is no number": (["--lr", "nan"], "--lr"),
    "rate below the last rate": (["--lr", "1e-6", "--min-lr", "1e-5"], "--min-lr 1e-05 is more than --lr 1e-06"),
    "device that computes nothing": (["--device", "meta"], "no device 'meta'"),
    "infinite rate": (["--min-lr", "-inf"], "--min-lr"),
    "dropping all paths": (["--drop-path", "1"], "--drop-path: 1 is not from 0 to 0.99"),
    "smoothing beyond one": (["--smoothing", "1.5"], "--smoothing"),
    "negative decay": (["--weight-decay", "-0.1"], "--weight-decay"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "tiny image": (["--img-size", "4"], "--img-size"),
    "warm-up without end": (["--epochs", "3", "--warmup-epochs", "4"], "4 epochs of warm-up do not fit into 3"),
    "unknown optimizer": (["--opt", "adamwx"], "no optimizer 'adamwx'.*'adamw'"),
    "optimizer that needs more": (["--opt", "fusedadam"], "."),
    "unknown flag": (["--epohcs", "3"], "unrecognized arguments: --epohcs"),
    "half a flag": (["--epoch", "3"], "unrecognized arguments: --epoch"),
    "device that is not there": (["--device", "cuda:97"], "no device 'cuda:97'"),
    "device that is none": (["--device", "toaster"], "no device 'toaster'"),
    "too few classes": (["--num-classes", "9"], "10 classes, more than 9"),
    "missing weights": (["--initial-checkpoint", "gone.safetensors"], "no weight file gone.safetensors"),
    "no published weights": (["--pretrained"], "tiny_convformer .*without published weights.*--initial-checkpoint"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, capsys, tmp_path, monkeypatch):
    args, pattern = BAD[what]
    monkeypatch.chdir(tmp_path)
    assert re.search(pattern, refused(capsys, *args))
    assert list(tmp_path.iterdir()) == []  # nothing left behind


def test_bad_input_in_a_process_of_its_own(tmp_path):
    status, out, err = command(tmp_path, "--model", "caformer_s81")
    assert (status, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.count("\n") == 1 and "caformer_s18" in err


def test_weights_of_another_model(two_epochs, capsys, tmp_path):
    path = str(two_epochs / "last.safetensors")
    text = refused(capsys, "--model", "tiny_convformer", "--initial-checkpoint", path, "--output", str(tmp_path))
    assert "do not fit" in text and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_output_that_cannot_be_written(below, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(capsys, *SMALL, "--output", str(tmp_path / "file" / below))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write everywhere")
def test_output_without_permission(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused(capsys, *SMALL, "--output", str(tmp_path / "runs"))


def test_output_behind_a_dangling_link(capsys, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    assert "File exists" in refused(capsys, *SMALL, "--output", str(tmp_path / "runs"))


def test_folder_that_is_wrong(shapes, capsys, tmp_path):
    (shapes / "val" / "fine").rename(shapes / "val" / "finer")
    text = refused(capsys, str(shapes), "--output", str(tmp_path / "out"))
    assert "only train/ has fine" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_image(shapes, capsys, tmp_path, workers):
    path = shapes / "train" / "fine" / "5.png"
    path.write_text("not an image")
    with pytest.raises(SystemExit) as caught:
        main([str(shapes), "--model", "tiny_poolformerv2", "-b", "16", "-j", workers, "--output",
              str(tmp_path / "out")])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 2
    assert last.startswith(f"metaformer-train: Cannot read the image {path}: ") and "holds only settings" in last


def last_words(capsys, status, *args):
    "Run the command in this process; the sentence with which it stops."
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, args)))
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == status and said.startswith("metaformer-train: "), said
    return said


def test_a_rate_that_is_far_too_high(capsys, tmp_path):
    said = last_words(capsys, 1, *SMALL, "--lr", "1e12", "--warmup-epochs", "0", "--epochs", "3", "--output", tmp_path)
    assert re.search(
        r"The loss (is (nan|inf)|or its gradient was not a number for 10 updates in a row,) .*in epoch 1 .*try a tenth "
        r"of the rate",
        said,
    )
    assert "only settings" in said or "of epoch" in said


def test_a_rate_above_the_usual_is_warned_of(capsys, tmp_path):
    main([*SMALL, "--model", "tiny_identityformer", "--lr", "0.1", "--epochs", "1", "--output", str(tmp_path)])
    said = capsys.readouterr().err
    assert "metaformer-train: The rate 0.1 is 25 times the usual one, which is 0.004 for 64 images" in said


def test_bad_steps_are_said(capsys, tmp_path, monkeypatch):
    calls, plain = [], trainer.Trainer.batch_loss

    def loss(self, *args):
        calls.append(1)
        return plain(self, *args) * (math.nan if len(calls) in (3, 5) else 1)
    monkeypatch.setattr(trainer.Trainer, "batch_loss", loss)
    main([*SMALL, "--epochs", "1", "--output", str(tmp_path)])
    assert "2 bad steps" in capsys.readouterr().out and summary(only_run(tmp_path))[0]["bad_steps"] == "2"


def test_weights_that_break_in_the_last_update(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_evaluate_each", lambda *_: dict(val_loss=float("nan"), val_top1=10.))
    said = last_words(capsys, 1, *SMALL, "--epochs", "1", "--output", tmp_path)
    assert "The validation loss is nan in epoch 1" in said and not list(only_run(tmp_path).glob("*.safetensors"))


@pytest.mark.parametrize("message, hint",
                         [("CUDA out of memory. Tried to allocate 2 GiB", "Try a smaller --batch-size"),
                                           ("DataLoader worker (pid 7) exited unexpectedly", "exited unexpectedly.")])
def test_an_error_of_pytorch_is_one_sentence(message, hint, capsys, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(message + "\nand much more")
    monkeypatch.setattr(trainer.Trainer, "train_epoch", fail)
    said = last_words(capsys, 1, *SMALL, "--output", tmp_path)
    assert message in said and hint in said and "and much more" not in said


@pytest.mark.parametrize("what", ["save_weights", "_save_state"])
def test_a_disk_that_is_full_at_the_second_epoch(what, capsys, tmp_path, monkeypatch):
    real, calls = getattr(run_folder, what), []

    def save(thing, path, *args):
        calls.append(path)
        if len(calls) > (2 if what == "save_weights" else 1):  # last and best, or the state, of the first epoch
            raise OSError(28, "No space left on device", str(path))
        return real(thing, path, *args)
    monkeypatch.setattr(run_folder, what, save)
    said = last_words(capsys, 1, *SMALL, "--epochs", "2", "--output", tmp_path)
    assert "No space left on device" in said
    assert "holds last.safetensors of epoch 1; the same command with --resume auto goes on" in said
    run = only_run(tmp_path)
    for name in ("last", "best"):  # whole, and loadable
        create_model("tiny_poolformerv2", checkpoint=run / f"{name}.safetensors", img_size=32)


@pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")
def test_ctrl_c(tmp_path):
    process = start(tmp_path, *SMALL, "--epochs", "50", start_new_session=True)
    for line in process.stdout:
        if line.startswith("epoch   1/50"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    said = err.strip().split("\n")[-1]
    pattern = (r"metaformer-train: Stopped by SIGINT\. .* holds last.safetensors of epoch (\d+); "
               r"the same command with --resume auto goes on\.")
    epoch = int(re.fullmatch(pattern, said)[1])
    run = only_run(tmp_path / "runs")
    assert len(summary(run)) == epoch and list(run.glob("state-*.pt")) and not list(run.glob("*.unfinished"))
    model = create_model("tiny_poolformerv2", checkpoint=run / "last.safetensors", img_size=32)
    measured = evaluate(model, make_loaders(*load_digits(32)[:2])[1])
    assert measured["top1"] == pytest.approx(float(summary(run)[-1]["val_top1"]), abs=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_between_two_updates(number, stripes, finished, capsys, tmp_path, monkeypatch):
    plain = trainer.Trainer.update

    def update(self, batches):
        plain(self, batches)
        if self.updates == 3:  # in the middle of the fourth
            os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "update", update)
        said = last_words(capsys, 128 + number, stripes, *GO, "--output", tmp_path)
    assert (
        f"Stopped by {number.name}. " in said and "only settings; the same command with --resume auto goes on." in said
    )
    after = signal.signal(number, before)
    assert after == (signal.SIG_IGN if number == signal.SIGTERM else before)  # what comes until it has gone is the same
    run = only_run(tmp_path)
    assert [p.name for p in run.glob("state-*.pt")] == ["state-00000004.pt"]
    go(run)
    assert same(run, finished) and (run / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()


def test_a_command_without_tensorboard(capsys, tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install tensorboard" in refused(capsys, *SMALL, "--tensorboard", "--output", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))


def test_a_command_with_tensorboard(stripes, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    main([str(stripes), *GO, "--tensorboard", "--output", str(tmp_path)])
    run = only_run(tmp_path)
    found = [(e.step, e.value) for e in EventAccumulator(str(run)).Reload().Scalars("val/top1")]
    assert found == [(int(r["epoch"]), pytest.approx(float(r["val_top1"]))) for r in summary(run)]


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_skipping_unreadable_images(data, shapes, capsys, tmp_path):
    "Digits cannot be unreadable; the flag may do nothing there, or be refused, but not break at the end of a run."
    (shapes / "train" / "fine" / "5.png").write_text("not an image")
    (shapes / "val" / "fine" / "2.png").write_text("nor is this")
    args = [*SMALL, "--model", "tiny_identityformer", "--epochs", "1", "-j",
        "0", "--output", str(tmp_path / "out"), "--skip-unreadable", "-b", "16"]
    if data == "digits":
        try:
            main(args)
        except SystemExit as error:
            assert error.code == 2
        return
    main([str(shapes), *args])
    assert "2 images could not be read and were left out." in capsys.readouterr().out


def test_what_was_typed_is_written_down(two_epochs):
    assert yaml.safe_load((two_epochs / "args.yaml").read_text()
                          )["command"].startswith("metaformer-train --img-size 32 -b 64 ")


# --- going on ---

GO = ("--model tiny_identityformer --img-size 32 -b 8 -j 0 --epochs 2 --warmup-epochs 1 "
      "--mixup 0 --cutmix 0 --lr 1e-3").split()


@pytest.fixture(scope="module")
def finished(stripes, tmp_path_factory):
    threads, output = torch.get_num_threads(), tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)  # a fixture of a module comes before `one_thread`
    main([str(stripes), *GO, "--output", str(output)])
    torch.set_num_threads(threads)
    return only_run(output)


@pytest.fixture
def ended(finished, tmp_path):
    "A copy of a finished run of two epochs, alone in its folder."
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


@pytest.fixture
def half(ended):
    "The same, as if it had been killed in the second epoch."
    for path in ended.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("args.yaml", "state-00000006.pt"):
            path.unlink()
    return ended


def files(run):
    return {str(p.relative_to(run)): p.read_bytes()
            for p in run.rglob("*") if p.is_file() and p.suffix not in (".yaml", ".png")}


def go(run, *args, resume="auto"):
    main([run_folder._read_settings(run)["data"], *GO, "--output", str(run.parent), "--resume", str(resume), *args])


def test_auto_without_a_run_begins_one(finished, tmp_path, capsys):
    main([run_folder._read_settings(finished)["data"], *GO, "--output", str(tmp_path / "new"), "--resume", "auto"])
    run = only_run(tmp_path / "new")
    assert run.name == finished.name and same(run, finished) and "goes on" not in capsys.readouterr().out


def test_auto_goes_on_with_the_newest_of_the_same_settings(finished, half, capsys):
    other = Path(shutil.copytree(half, half.with_name(half.name + "-2")))
    text = (other / "args.yaml").read_text()
    (other / "args.yaml").write_text(text.replace("weight_decay: 0.05", "weight_decay: 0.1"))
    before = files(other)
    go(half, "--log-interval", "3", "-b", "4", "--grad-accum-steps", "2")  # which leave the result as it is
    said = capsys.readouterr()
    assert "goes on after update 6, in epoch 1 of 2" in said.out and "other settings" not in said.err
    assert files(other) == before and sorted(p.name for p in half.parent.iterdir()) == [half.name, other.name]
    assert {p.name for p in half.iterdir()} >= {p.name for p in finished.iterdir()}


def test_a_run_that_goes_on_is_the_whole_run(finished, half):
    go(half)
    assert same(half, finished) and (half / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()
    assert (half / "best.safetensors").read_bytes() == (finished / "best.safetensors").read_bytes()


def test_auto_with_other_settings_begins_a_run(ended):
    before = files(ended)
    go(ended, "--weight-decay", "0.1")
    assert files(ended) == before
    assert sorted(p.name for p in ended.parent.iterdir()) == [ended.name, f"{ended.name}-2"]


@pytest.mark.parametrize("how", ["auto", "folder", "state"])
def test_a_finished_run_says_its_result_again(how, ended, capsys):
    before = files(ended)
    go(ended, resume=dict(auto="auto", folder=ended, state=ended / "state-00000012.pt")[how])
    out = capsys.readouterr().out
    row = summary(ended)[-1]
    assert f"last epoch (2): top-1 {float(row['val_top1']):.2f} %" in out
    assert "goes on after update 12, in epoch 2 of 2" in out
    assert files(ended) == before


def test_a_run_that_was_killed_while_it_finished(ended, finished):
    "Between its last state and its table there is a moment."
    rows = (ended / "summary.csv").read_text().splitlines(keepends=True)
    (ended / "summary.csv").write_text("".join(rows[:-1]))
    go(ended)
    assert (ended / "summary.csv").read_bytes() == (finished / "summary.csv").read_bytes()


def test_going_on_in_a_damaged_folder(half, finished, capsys):
    (half / "state-00000009.pt").write_bytes(b"half a fi")
    go(half)
    assert "state-00000009.pt: it is damaged" in capsys.readouterr().err and same(half, finished)


@pytest.mark.parametrize("how", ["folder", "state"])
def test_other_settings_are_named_and_hold(how, half, capsys):
    go(half, "--weight-decay", "0.2", "--epochs", "3", resume=half if how == "folder" else half / "state-00000006.pt")
    said = capsys.readouterr().err
    line = next(x for x in said.splitlines() if "goes on with other settings" in x)
    assert "weight_decay 0.05 → 0.2" in line and "epochs 2 → 3" in line and "resume" not in line
    assert (
        len(summary(half)) == 3 and yaml.safe_load((half / "args.yaml").read_text())["settings"]["weight_decay"] == 0.2
    )
    state = torch.load(half / "state-00000018.pt", weights_only=True)
    assert {g["weight_decay"] for g in state["optimizer"]["param_groups"]} == {0, 0.2}


def test_a_finished_run_can_be_made_longer(ended, capsys):
    go(ended, "--epochs", "3", resume=ended)
    assert "epochs 2 → 3" in capsys.readouterr().err and len(summary(ended)) == 3


@pytest.mark.parametrize("more", [True, False])
def test_an_average_that_is_new_or_left_out(more, tmp_path, ended):
    if not more:
        data = run_folder._read_settings(ended)["data"]
        shutil.rmtree(ended)
        main([data, *GO, "--output", str(ended.parent), "--model-ema"])
    go(ended, "--epochs", "3", *["--model-ema"] * more, resume=ended)
    assert len(summary(ended)) == 3


def test_a_state_alone_in_a_folder(finished, tmp_path, capsys):
    (tmp_path / "alone").mkdir()
    path = shutil.copy(finished / "state-00000006.pt", tmp_path / "alone")
    main([run_folder._read_settings(finished)["data"], *GO, "--resume", path])
    assert "None →" not in capsys.readouterr().err  # nothing is known of its settings
    assert same(tmp_path / "alone", finished)


def test_what_cannot_go_on(ended, stripes, capsys, tmp_path):
    before, command = files(ended), [str(stripes), *GO, "--output", str(tmp_path / "out"), "--resume"]
    gone, weights = tmp_path / "gone", ended / "last.safetensors"
    (tmp_path / "empty").mkdir()
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "w.pth")
    assert f"Cannot use {gone}: No such file" in refused(capsys, *command, str(gone))
    assert re.search(f"{weights}: it .*no state of a run", refused(capsys, *command, str(weights)))
    assert "holds no state to go on from" in refused(capsys, *command, str(tmp_path / "empty"))
    assert "holds weights, perhaps, but no state" in refused(capsys, *command, str(tmp_path / "w.pth"))
    assert not (tmp_path / "out").exists() and files(ended) == before


def declined(capsys, run, *args):
    with pytest.raises(SystemExit) as caught:
        go(run, *args, resume=run)
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 2 and said.startswith("metaformer-train: "), said
    return said


def test_a_state_of_another_model(ended, capsys):
    before, about = files(ended), (ended / "args.yaml").read_bytes()
    assert "The state is of another model or optimizer." in declined(capsys, ended, "--model", "tiny_convformer")
    assert files(ended) == before and (ended / "args.yaml").read_bytes() == about


@pytest.mark.parametrize("opt", ["sgd", "lamb"])
def test_a_state_of_another_optimizer(opt, ended, capsys):
    "It has as many parameters, and another memory."
    assert "The state is of another model or optimizer." in declined(capsys, ended, "--opt", opt, "--epochs", "3")


def test_a_state_from_an_epoch_that_was_cut_in_another_way(half, capsys):
    state = torch.load(half / "state-00000006.pt", weights_only=True)
    torch.save(state | dict(step=5, updates=5), half / "state-00000005.pt")
    (half / "state-00000006.pt").unlink()
    assert "middle of an epoch of 6 updates, and here are 3" in declined(capsys, half, "-b", "16")


def test_the_next_epoch_may_be_cut_in_another_way(half):
    "As that message says; this is the only kind of state that a run leaves at the end of an epoch."
    go(half, "-b", "16", resume=half)
    assert [r["epoch"] for r in summary(half)] == ["1", "2"] and (half / "state-00000006.pt").exists()


# --- in a notebook ---

def machine():
    "What a training must leave as it was."
    return [torch.get_num_threads(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.distributed.is_initialized(),
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), dict(matplotlib.rcParams)]


def in_thread(job):
    found = []
    thread = threading.Thread(target=lambda: found.append(job()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("how", [lambda job: job(), in_thread], ids=["main thread", "another thread"])
def test_run_does_what_the_command_does(how, two_epochs, tmp_path):
    settings = parse([*SMALL, "--epochs", "2", "--drop-path", "0.2", "--threads", "1", "--output", str(tmp_path)])
    torch.set_num_threads(2)
    before = machine()
    found = how(lambda: run(settings))
    assert machine() == before
    assert found.path == only_run(tmp_path) and same(found.path, two_epochs)
    assert (found.path / "summary.csv").read_bytes() == (two_epochs / "summary.csv").read_bytes()
    assert {p.name for p in found.path.iterdir()} == {p.name for p in two_epochs.iterdir()}
    assert [r["val_top1"] for r in found.log] == [float(r["val_top1"]) for r in summary(two_epochs)]
    assert all(torch.equal(v, load_file(two_epochs / "last.safetensors")[k])
               for k, v in found.model.state_dict().items())
    right = (found.predictions["guess"] == found.predictions["label"]).double().mean().item()
    assert 100 * right == pytest.approx(found.log[-1]["val_top1"], abs=1e-3)


def test_run_takes_callbacks_and_goes_on_with_them(tmp_path):
    flags = [*SMALL, "--epochs", "9", "--snapshots", "0", "--sched", "None", "--lr", "0.002", "--output", str(tmp_path)]
    found = run(parse(flags), callbacks=[EarlyStopping("lr", patience=2)])  # which never becomes better
    assert len(found.log) == 3 and len(summary(found.path)) == 3
    again = run(parse([*flags, "--resume", "auto"]), callbacks=[EarlyStopping("lr", patience=2)])
    assert again.path == found.path and len(again.log) == 3  # it is finished


def test_run_raises_what_is_wrong_and_leaves_all_as_it_was(tmp_path):
    before = machine()
    with pytest.raises(ValueError, match="10 classes, more than 9"):
        run(parse([*SMALL, "--num-classes", "9", "--threads", "2", "--output", str(tmp_path / "out")]))
    assert machine() == before and not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_notebook_that_is_interrupted(number, tmp_path, stripes):
    "The stop button of a notebook sends SIGINT: a state is saved, and the error is a KeyboardInterrupt."
    class Stop(Callback):
        def after_update(self, trainer):
            if trainer.updates == 4:
                os.kill(os.getpid(), number)
    before = machine()
    with pytest.raises(KeyboardInterrupt):
        run(parse([str(stripes), *GO, "--output", str(tmp_path)]), callbacks=[Stop()])
    assert machine() == before and [p.name for p in only_run(tmp_path).glob("state-*.pt")] == ["state-00000004.pt"]
    found = run(parse([str(stripes), *GO, "--output", str(tmp_path), "--resume", "auto"]))
    assert len(found.log) == 2 and found.path == only_run(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")
def test_a_run_that_is_fitted_by_hand_leaves_the_signals_as_they_were(tmp_path, stripes):
    class Stop(Callback):
        def after_update(self, trainer):
            os.kill(os.getpid(), signal.SIGTERM)
    before = machine()
    with machine_as_found():
        job = open_run(parse([str(stripes), *GO, "--output", str(tmp_path)]), callbacks=[Stop()])
        with pytest.raises(Interrupted):
            job.fit()
    assert machine() == before


class Lost(Callback):
    "A signal while the model is measured, whose exception does not come out."
    def after_evaluate(self, trainer):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pass


class Another(Lost):
    "One whose exception comes out as another one."
    def after_evaluate(self, trainer):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos 64 vs 0") from None


class LostAtTheEnd(Lost):
    after_fit, after_evaluate = Lost.after_evaluate, Callback.after_evaluate


@pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")
@pytest.mark.parametrize("callback", [Lost, Another, LostAtTheEnd])
def test_a_signal_is_not_lost_with_its_exception(callback, tmp_path, stripes):
    with pytest.raises(Interrupted) as stop:
        run(parse([str(stripes), *GO, "--output", str(tmp_path)]), callbacks=[callback()])
    assert stop.value.args == (signal.SIGTERM,)
    newest = max(p.name for p in only_run(tmp_path).glob("state-*.pt"))
    assert newest == ("state-00000012.pt" if callback is LostAtTheEnd else "state-00000006.pt")


def test_run_leaves_a_process_group_that_it_did_not_make(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        run(parse([*SMALL, "--epochs", "1", "--snapshots", "0", "--output", str(tmp_path)]))
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_the_modules_top_imports_nothing_heavy():
    tree = ast.parse((ROOT / "metaformer_edu/train.py").read_text())
    top = [o for o in tree.body if isinstance(o, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(o) for o in top] == ["import os, signal, sys"]
