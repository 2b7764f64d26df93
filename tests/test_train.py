"""The loop, and the command as a person types it: the main job, one seed one run, all families, folders, mistakes."""
import csv
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from metaformer_edu import train
from metaformer_edu.data import Pictures, load_digits, make_loaders
from metaformer_edu.train import TrainingStopped, evaluate, fit, main, make_schedule, parse, predict, prepare
from metaformer_edu.zoo import create_model

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"seconds", "images_per_s"}  # the columns that no seed fixes
FAMILIES = ["identityformer", "randformer", "poolformerv2", "convformer", "caformer"]
SMALL = ["--img-size", "32", "-b", "64", "--model", "tiny_poolformerv2"]  # quick, for all that does not ask for accuracy


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


def summary(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def numbers(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in summary(folder)]


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
    assert {"epoch", "lr", "train_loss", "val_loss", "val_top1", "seconds", "images_per_s"} <= rows[0].keys()
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert f"last epoch ({len(rows)}): top-1 {float(rows[-1]['val_top1']):.2f} %" in out


def test_main_job_leaves_a_run(main_job):
    folder, out, err = main_job
    assert [p.name for p in folder.iterdir()] == ["runs"]
    run = only_run(folder / "runs")
    names = {"args.yaml", "summary.csv", "last.safetensors", "best.safetensors", "curves.png", "predictions.png"}
    assert {p.name for p in run.iterdir()} == names and all(n in out for n in names)
    settings = yaml.safe_load((run / "args.yaml").read_text())
    assert (settings["model"], settings["data"], settings["seed"]) == ("tiny_convformer", "digits", 0)
    for name in ("curves.png", "predictions.png"):
        picture = np.array(Image.open(run / name).convert("RGB"))
        assert min(picture.shape[:2]) >= 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50, f"{name} is empty"
    assert "100%" in err and "loss=" in err and "lr=" in err and "img/s" in err  # the bar
    assert "Warning" not in err


def test_main_job_says_how_to_load_its_weights(main_job, monkeypatch):
    folder, out, _ = main_job
    monkeypatch.chdir(folder)
    code = out[out.index("from metaformer_edu.zoo"):].replace("\n  ", "\n")
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


def test_a_second_run_leaves_the_first_alone(main_job, capsys):
    folder, _, _ = main_job
    run = only_run(folder / "runs")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    train.new_folder(folder / "runs", run.name).rmdir()  # runs/…-2, made and taken away
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    names = [train.new_folder(folder / "new", "a").name for _ in range(3)]
    assert names == ["a", "a-2", "a-3"]


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
    assert numbers(again) == numbers(two_epochs) and same(again, two_epochs)


def test_another_seed_other_numbers(two_epochs, tmp_path):
    main([*SMALL, "--epochs", "2", "--drop-path", "0.2", "--seed", "1", "--output", str(tmp_path)])
    other = only_run(tmp_path)
    assert other.name.endswith("seed1")
    assert not same(other, two_epochs)
    assert all(a["val_loss"] != b["val_loss"] for a, b in zip(numbers(other), numbers(two_epochs)))


# --- every family ---

@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family, tmp_path):
    main(["--model", f"tiny_{family}", "--img-size", "32", "--epochs", "2", "--output", str(tmp_path)])
    rows = summary(only_run(tmp_path))
    assert float(rows[-1]["val_top1"]) > 50  # chance is 10
    assert float(rows[-1]["val_loss"]) < math.log(10) / 2


# --- the loop ---

@pytest.fixture
def few():
    digits = load_digits(32)[0]
    return Pictures([digits.images[i] for i in range(48)], digits.transform)


def model_and_optimizer(lr=1e-3, **kwargs):
    torch.manual_seed(0)
    model = create_model("tiny_convformer", img_size=32, **kwargs)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def test_evaluation_counts_images_not_batches(few):
    model, _ = model_and_optimizer()
    images, labels = zip(*[few[i] for i in range(len(few))])
    with torch.no_grad():
        logits = model.eval()(torch.stack(images))
    labels = torch.tensor([int(y) for y in labels])
    for size in (1, 7, 48):  # 7 leaves a last batch of 6
        found = evaluate(model, make_loaders(few, few, size)[1])
        assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
        hits = [y in row.topk(5).indices for row, y in zip(logits, labels)]
        assert found["top5"] == pytest.approx(100 * np.mean(hits))
    said = predict(model, make_loaders(few, few, 7)[1])
    assert said["label"].tolist() == labels.tolist() and said["guess"].tolist() == logits.argmax(1).tolist()
    torch.testing.assert_close(said["probability"], logits.softmax(1).amax(1), atol=1e-6, rtol=1e-4)


def test_top5_is_reported_only_where_it_says_something(few):
    batch = torch.zeros(2, 3, 32, 32), torch.zeros(2).long()
    assert "top5" not in evaluate(model_and_optimizer(num_classes=5)[0], [batch])
    assert "top5" in evaluate(model_and_optimizer(num_classes=6)[0], [batch])


def test_evaluation_leaves_no_dropout_on_and_training_turns_it_on_again(few):
    model, optimizer = model_and_optimizer(drop_path=0.5)
    modes = []
    model.register_forward_hook(lambda m, i, o: modes.append(m.training))
    fit(model, make_loaders(few, few, 48), optimizer, epochs=2, warmup_epochs=0, progress=False)
    assert modes == [True, False, True, False]


def test_fit_is_the_plain_loop(few):
    twin, optimizer = model_and_optimizer(lr=0.1)
    fit(twin, make_loaders(few, few, 16), optimizer, epochs=2, warmup_epochs=0, min_lr=0.1, progress=False)
    model, optimizer = model_and_optimizer(lr=0.1)
    loader, _ = make_loaders(few, few, 16)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_schedule_warms_up_and_comes_down():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, rates = make_schedule(optimizer, epochs=10, steps=4, warmup_epochs=2, min_lr=0.001), []
    for step in range(40):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    up, down = rates[:8], rates[8:]
    np.testing.assert_allclose(np.diff(up), (0.1 - 1e-6) / 8, rtol=1e-6)
    assert all(a > b for a, b in zip(down, down[1:])) and rates[0] < 1e-5
    for t in (8, 20, 39):
        assert rates[t] == pytest.approx(0.001 + 0.099 * (1 + math.cos(math.pi * t / 40)) / 2)


def test_fit_returns_its_log_and_reports_each_epoch(few):
    model, optimizer = model_and_optimizer(lr=0.1)
    rows = []
    log = fit(model, make_loaders(few, few, 16), optimizer, epochs=3, warmup_epochs=1, on_epoch=rows.append, progress=False)
    assert rows == list(log) and [r["epoch"] for r in log] == [1, 2, 3]
    assert log[0]["lr"] > log[1]["lr"] > log[2]["lr"] and "val_top1" in repr(log)


def test_smoothing_reaches_the_loss(few):
    losses = []
    for smoothing in (0, 0.9):
        model, optimizer = model_and_optimizer(lr=0.1)
        nn.init.normal_(model.head.fc2.weight)  # sure of something
        loaders = make_loaders(few, few, 48)
        log = fit(model, loaders, optimizer, epochs=1, warmup_epochs=0, smoothing=smoothing, progress=False)
        losses.append(log[0]["train_loss"])
    images, labels = next(iter(make_loaders(few, few, 48)[0]))
    model, _ = model_and_optimizer()
    nn.init.normal_(model.head.fc2.weight)
    logits = model(images)
    expected = [F.cross_entropy(logits, labels, label_smoothing=s).item() for s in (0, 0.9)]
    assert losses == pytest.approx(expected, rel=1e-4) and abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize("batch", [48, 3])
def test_a_loss_that_is_no_number_stops(few, batch):
    model, optimizer = model_and_optimizer()
    with torch.no_grad():
        model.head.fc2.bias[3] = math.nan
    with pytest.raises(TrainingStopped, match="loss is nan in epoch 1 .*try"):
        fit(model, make_loaders(few, few, batch), optimizer, progress=False)


def test_vectors_do_not_decay(tmp_path):
    model, _, optimizer, _ = prepare(parse(["--weight-decay", "0.3", "--lr", "0.004", *SMALL]))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[id(p)] for p in model.parameters() if p.requires_grad and p.ndim < 2} == {0}
    assert {decay[id(p)] for p in model.parameters() if p.requires_grad and p.ndim >= 2} == {0.3}
    assert {g["lr"] for g in optimizer.param_groups} == {0.004}


# --- flags ---

def test_defaults_depend_on_the_data():
    digits, folder = parse([]), parse(["some/folder"])
    assert (digits.epochs, digits.seed, digits.workers) != (folder.epochs, folder.seed, folder.workers)
    assert (folder.epochs, folder.batch_size, folder.warmup_epochs, folder.seed) == (300, 128, 5, 42)  # as published
    assert folder.workers == min(8, os.cpu_count())
    assert parse(["--epochs", "1"]).warmup_epochs == 0
    assert parse(["--epochs", "4", "--warmup-epochs", "3"]).warmup_epochs == 3
    assert parse(["some/folder", "--seed", "0", "-j", "0"]).seed == 0  # zero is a choice, not an absence


def test_flags_reach_the_model():
    flags = "--drop-path 0.3 --head-dropout 0.4 --num-classes 12 --opt sgd --seed 5 -j 1".split()
    model, loaders, optimizer, info = prepare(parse(SMALL + flags))
    assert model.stages[3][0].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.head.head_dropout.p == 0.4 and model.num_classes == 12 and model.img_size == info.img_size == 32
    assert isinstance(optimizer, torch.optim.SGD)
    assert (loaders[0].batch_size, loaders[0].num_workers, loaders[0].sampler.seed, loaders[0].dataset.seed) == (64, 1, 5, 5)


def test_fine_tuning_starts_from_the_weights(two_epochs):
    path = str(two_epochs / "last.safetensors")
    model, loaders, _, _ = prepare(parse([*SMALL, "--initial-checkpoint", path]))
    assert evaluate(model, loaders[1])["top1"] == pytest.approx(float(summary(two_epochs)[-1]["val_top1"]), abs=1e-3)


def test_help():
    status, out, err = command(ROOT, "--help")
    assert status == 0 and not err
    for text in ("DATA", "--model", "--epochs", "--batch-size", "--lr", "--output", "default 10 for digits, 300"):
        assert text in " ".join(out.split()), text
    assert max(map(len, out.splitlines())) < 100


# --- a folder of images ---

@pytest.fixture
def shapes(tmp_path):
    "Two classes that flips, crops and colours leave apart: fine and broad stripes."
    rng = np.random.default_rng(0)
    for part, n in (("train", 24), ("val", 8)):
        for name, width in (("broad", 16), ("fine", 2)):
            for i in range(n):
                rows = (np.arange(64) + rng.integers(64)) // width % 2
                picture = np.broadcast_to(rows[:, None, None] * rng.integers(100, 256, 3), (64, 64, 3))
                path = tmp_path / "stripes" / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(path)
    return tmp_path / "stripes"


def test_a_folder_of_images(shapes, tmp_path, capsys):
    main([str(shapes), "--model", "tiny_caformer", "--epochs", "2", "-b", "16", "-j0", "--output", str(tmp_path / "out")])
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
    "rate below the last rate": (["--lr", "1e-6"], "--min-lr 1e-05 is more than --lr 1e-06"),
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
        main([str(shapes), "--model", "tiny_poolformerv2", "-b", "16", "-j", workers, "--output", str(tmp_path / "out")])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 2
    assert last.startswith(f"metaformer-train: Cannot read the image {path}: ") and "holds only settings" in last


def test_a_rate_that_is_far_too_high(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([*SMALL, "--lr", "1e12", "--warmup-epochs", "0", "--epochs", "3", "--output", str(tmp_path)])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 1 and re.search(r"The loss is (nan|inf) in epoch 1 .*try a tenth of the rate", last)


def test_weights_that_break_in_the_last_update(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda model, loader: dict(loss=float("nan"), top1=10.))
    with pytest.raises(SystemExit) as caught:
        main([*SMALL, "--epochs", "1", "--output", str(tmp_path)])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 1 and "The loss is nan in epoch 1" in last and not list(only_run(tmp_path).glob("*.safetensors"))


@pytest.mark.parametrize("message, hint", [("CUDA out of memory. Tried to allocate 2 GiB", "Try a smaller --batch-size"),
                                           ("DataLoader worker (pid 7) exited unexpectedly", "exited unexpectedly.")])
def test_an_error_of_pytorch_is_one_sentence(message, hint, capsys, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError(message + "\nand much more")
    monkeypatch.setattr(train, "train_epoch", fail)
    with pytest.raises(SystemExit) as caught:
        main([*SMALL, "--output", str(tmp_path)])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 1 and message in last and hint in last and "and much more" not in last


def test_a_disk_that_is_full_at_the_second_epoch(capsys, tmp_path, monkeypatch):
    real, calls = train.save_weights, []

    def save(model, path):
        calls.append(path)
        if len(calls) > 2:  # last and best of the first epoch
            Path(path).write_bytes(b"half a fi")
            raise OSError(28, "No space left on device", str(path))
        return real(model, path)
    monkeypatch.setattr(train, "save_weights", save)
    with pytest.raises(SystemExit) as caught:
        main([*SMALL, "--epochs", "2", "--output", str(tmp_path)])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert caught.value.code == 1 and "No space left on device" in last and "weights of epoch 1" in last
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
    last = err.strip().split("\n")[-1]
    epoch = int(re.search(r"Stopped by you\. .* holds the weights of epoch (\d+)\.", last)[1])
    run = only_run(tmp_path / "runs")
    assert len(summary(run)) == epoch
    model = create_model("tiny_poolformerv2", checkpoint=run / "last.safetensors", img_size=32)
    measured = evaluate(model, make_loaders(*load_digits(32)[:2])[1])
    assert measured["top1"] == pytest.approx(float(summary(run)[-1]["val_top1"]), abs=1e-3)


def test_the_best_is_the_first_of_the_best(tmp_path, monkeypatch):
    saved = {}
    keeper = train.Keeper(tmp_path, nn.Linear(1, 1), 4)
    for epoch, top1 in enumerate((80.0, 95.0, 95.0, 90.0), 1):
        monkeypatch.setattr(train, "save_whole", lambda model, path: saved.update({path.name: epoch}))
        keeper(dict(epoch=epoch, train_loss=1.0, val_loss=1.0, val_top1=top1))
    assert saved == {"last.safetensors": 4, "best.safetensors": 2} and keeper.best["epoch"] == 2
    assert [r["val_top1"] for r in summary(tmp_path)] == ["80.0", "95.0", "95.0", "90.0"]


# --- pictures ---

def test_curves_show_what_the_log_says():
    log = [dict(epoch=e, train_loss=2 / e, val_loss=1 / e, val_top1=90 + e) for e in (1, 2, 3)]
    left, right = train.draw_curves({"mine": log}).axes
    curves = [list(line.get_ydata()) for line in left.lines]
    assert [2 / e for e in (1, 2, 3)] in curves and [1 / e for e in (1, 2, 3)] in curves
    assert list(right.lines[0].get_ydata()) == [91, 92, 93]
    assert "mine 93.00 %" in [t.get_text() for t in right.get_legend().get_texts()]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in (left, right))
    assert len(train.draw_curves(log).axes[1].lines) == 1 and len(train.draw_curves({"a": log, "b": log}).axes[1].lines) == 2
