"""Snapshots of a run: which pictures, what is kept of them, that nothing else changes, and what is said of damaged
files."""
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

from metaformer_edu.core.errors import DataError
from metaformer_edu.data.datasets import load_digits, load_shapes
from metaformer_edu.data.folders import load_folder
from metaformer_edu.data.transforms import ImageDataset
from metaformer_edu.interpret import snapshots
from metaformer_edu.interpret.cam import explain
from metaformer_edu.interpret.snapshots import choose_examples, in_turns, read_snapshots, take_snapshot
from metaformer_edu.models.registry import create_model
from metaformer_edu.train import main

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["--model", "tiny_poolformerv2", "--img-size", "32", "-b", "64", "--epochs", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three classes; 4 images of each to learn, 5 held out."
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "colours"
    for part, n in (("train", 4), ("val", 5)):
        for name in "abc":
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(256, size=(40, 48, 3),
                                             dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    "Snapshots of two epochs, of an untrained model on eight shapes; (folder, model, examples)."
    where, (_, held_out, _) = tmp_path_factory.mktemp("run"), load_shapes("shape", 64)
    torch.manual_seed(0)
    model, examples = create_model("tiny_caformer", num_classes=5, img_size=64).train(), choose_examples(held_out, 8)
    torch.nn.init.normal_(model.head.fc2.weight)
    for epoch in (1, 2):
        take_snapshot(model, examples, where, epoch)
    return where, model, examples


def bytes_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in Path(folder).rglob("*") if p.is_file() and p.suffix in (".csv", ".safetensors")
            and p.name != "speed.csv"}


# --- which pictures ---

@pytest.mark.parametrize("open_, n, expected",
                         [(load_digits, 8, 8), (load_digits, 30, 30), (lambda size: load_shapes("shape", size), 8, 8),
                          (lambda size: load_shapes("same", size), 3, 3)])
def test_pictures_are_spread_over_the_classes_and_always_the_same(open_, n, expected):
    _, held_out, info = open_(32)
    images, labels, index = choose_examples(held_out, n)
    counts = labels.bincount(minlength=len(info.class_names))
    assert len(images) == len(labels) == len(index) == expected and images.shape[1:] == (3, 32, 32)
    assert counts.max() - counts.min() <= 1 and index.tolist() == sorted(set(index.tolist()))
    assert all(torch.equal(held_out[i][0], image) and held_out[i][1] == label
               for i, image, label in zip(index.tolist(), images, labels))
    again = choose_examples(open_(32)[1], n)
    assert all(map(torch.equal, (images, labels, index), again))


def test_of_many_classes_some_at_even_distances():
    labels = torch.arange(100).repeat(3)
    first = in_turns(TensorDataset(labels, labels), 5)[:5]
    assert labels[first].tolist() == [0, 25, 50, 74, 99] and max(first) < 100


def test_more_pictures_than_there_are(folder):
    _, held_out, _ = load_folder(folder, 32)
    assert choose_examples(held_out, 99)[2].tolist() == list(range(15))


def test_a_picture_that_cannot_be_read_makes_room(folder, monkeypatch, capsys):
    read = snapshots.ImageDataset.__getitem__
    monkeypatch.setattr(snapshots.ImageDataset, "__getitem__",
                        lambda self, i: read(self, i) if i not in (0, 5, 6) else (_ for _ in ()).throw(DataError("no")))
    for unreadable in ("stop", "skip"):
        _, held_out, _ = load_folder(folder, 32, unreadable=unreadable)
        assert choose_examples(held_out, 3)[2].tolist() == [1, 10, 11]
        assert held_out.skipped is None or not held_out.skipped.any()  # the run counts them by itself
    assert capsys.readouterr().err == ""


def test_none_can_be_read():
    class Broken(TensorDataset):
        def __getitem__(self, i):
            raise DataError("no")
    with pytest.raises(DataError, match="None of the pictures"):
        choose_examples(ImageDataset(Broken(torch.zeros(9), torch.zeros(9)), lambda x: x), 4)


# --- what is kept ---

def test_what_is_kept_is_what_the_model_answers_and_where_it_looks(shots):
    where, model, examples = shots
    found, shown = read_snapshots(where), explain(model, examples[0], stage=3)
    assert found.epochs == [1, 2] and found.labels.tolist() == examples[1].tolist()
    assert found.pictures.shape == (8, 64, 64, 3) and found.pictures.dtype == torch.uint8
    assert (found.pictures / 255 - shown.pictures).abs().max() < 0.5 / 255 + 1e-6
    assert (
        found.probabilities.dtype == torch.float32 and (found.probabilities[0] - shown.probabilities).abs().max() < 1e-3
    )
    large = torch.nn.functional.interpolate(found.maps[0][:, None] / 255, 64, mode="bilinear")[:, 0]
    # peaks get lower
    assert (
        found.maps.shape == (2, 8, 16, 16)
        and (large - shown.maps).abs().mean() < 0.02
        and (large - shown.maps).abs().max() < 0.25
    )
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size, pictures, maps",
                         [(32, 32, 16), (128, 128, 16), (160, 128, 20), (256, 128, 32), (288, 128, 32)])
def test_sizes(size, pictures, maps, tmp_path):
    model = create_model("tiny_identityformer", num_classes=3, img_size=size)
    take_snapshot(model, (torch.randn(2, 3, size, size), torch.tensor([0, 1]), torch.tensor([4, 5])), tmp_path, 1)
    found = read_snapshots(tmp_path)
    assert found.pictures.shape[1:3] == (pictures, pictures) and found.maps.shape[2:] == (maps, maps)


def test_bfloat16_and_few_at_once(shots, tmp_path):
    where, model, examples = shots
    take_snapshot(model, examples, tmp_path, 1, most=3)
    assert (read_snapshots(tmp_path).probabilities - read_snapshots(where).probabilities[:1]).abs().max() < 2e-3
    take_snapshot(model, examples, tmp_path, 1, torch.bfloat16)
    assert 0 < (read_snapshots(tmp_path).probabilities - read_snapshots(where).probabilities[:1]).abs().max() < 0.1


def test_later_epochs_of_a_run_that_was_left_go(shots, tmp_path):
    _, model, examples = shots
    for epoch in (1, 2, 3, 2):
        take_snapshot(model, examples, tmp_path, epoch)
    assert read_snapshots(tmp_path).epochs == [1, 2]
    pictures = tmp_path / "snapshots/pictures.safetensors"
    before = pictures.stat().st_mtime_ns
    take_snapshot(model, examples, tmp_path, 3)
    assert read_snapshots(tmp_path).epochs == [1, 2, 3] and pictures.stat().st_mtime_ns == before  # written once
    take_snapshot(model, [x[:5] for x in examples], tmp_path, 4)  # other pictures
    found = read_snapshots(tmp_path)
    assert found.epochs == [4] and len(found.pictures) == 5


# --- nothing else changes ---

def test_no_dice_and_no_weight_change(shots, tmp_path):
    _, model, examples = shots
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    plain = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    choose_examples(load_digits(32)[1], 4)
    take_snapshot(model, examples, tmp_path, 1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == plain
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("more", [[], ["--model-ema", "--model-ema-decay", "0.5", "--drop-path", "0.2", "--mixup",
                                       "0.5", "--head-dropout", "0.1"]], ids=["plain", "all that is random"])
def test_a_run_with_and_one_without_are_the_same(more, tmp_path):
    with_, without = tmp_path / "with", tmp_path / "without"
    main([*TINY, *more, "--output", str(with_)])
    main([*TINY, *more, "--output", str(without), "--snapshots", "0"])
    a, b = (bytes_in(next(o.iterdir())) for o in (with_, without))
    kept = {name for name in a if name.startswith("snapshots")}
    assert {Path(name).name for name in kept} == {
        "pictures.safetensors",
        "epoch-0001.safetensors",
        "epoch-0002.safetensors",
    }
    assert {k: v for k, v in a.items() if k not in kept} == b
    if more:  # the evaluated model is the average
        run = next(with_.iterdir())
        model = create_model("tiny_poolformerv2", checkpoint=run / "last.safetensors", num_classes=10, img_size=32)
        examples = choose_examples(load_digits(32)[1], 8)
        assert (read_snapshots(run).probabilities[-1]
                - explain(model, examples[0], stage=2).probabilities).abs().max() < 1e-3


# --- what goes wrong ---

@pytest.mark.parametrize("error", [DataError("Cannot read the image x.png: gone."),
                                   ValueError("The model answers with NaN or infinity."),
                                   RuntimeError("CUDA out of memory. Tried\nmuch")])
def test_a_run_does_not_stop_for_a_snapshot(error, monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise error
    monkeypatch.setattr(snapshots, "choose_examples" if isinstance(error, DataError) else "take_snapshot", fail)
    main([*TINY, "--epochs", "1", "--output", str(tmp_path)])
    said = [line for line in capsys.readouterr().err.splitlines() if "snapshot" in line]
    assert (
        len(said) == 1
        and said[0].startswith("metaformer-train: There is no snapshot of epoch 1. ")
        and str(error).split("\n")[0].rstrip(".") in said[0]
    )


def test_one_picture_that_cannot_be_read_in_a_run(folder, tmp_path, capsys):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    (data / "val/a/0.png").write_text("no image")
    main([str(data), "--model", "tiny_poolformerv2", "--img-size", "32", "-b", "4", "-j", "0", "--epochs", "1",
          "--output", str(tmp_path / "out"), "--skip-unreadable", "--snapshots", "3"])
    said = capsys.readouterr()
    assert (
        "1 images could not be read and were left out." in said.out
        and said.err.count("It is left out.") == 1
        and "snapshot of" not in said.err
    )
    assert load_file(next((tmp_path / "out").iterdir()) / "snapshots/pictures.safetensors")["index"].tolist() == [
        1,
        5,
        10,
    ]


def spoil(folder, what):
    epoch, pictures = folder / "snapshots/epoch-0002.safetensors", folder / "snapshots/pictures.safetensors"
    tensors = load_file(epoch)
    if what == "no pictures":
        pictures.unlink()
    elif what == "half a file":
        epoch.write_bytes(epoch.read_bytes()[:-5])
    elif what == "an empty file":
        epoch.write_bytes(b"")
    elif what == "a folder":
        epoch.unlink()
        epoch.mkdir()
    elif what == "fewer answers":
        save_file({k: v[:3].clone() for k, v in tensors.items()}, epoch)
    elif what == "no maps":
        save_file({"probabilities": tensors["probabilities"]}, epoch)
    elif what == "other pictures":
        save_file({k: v[:3].clone() for k, v in load_file(pictures).items()}, pictures)
    elif what == "no such class":
        save_file({**load_file(pictures), "labels": torch.full((8,), 99)}, pictures)


@pytest.mark.parametrize("what, words",
                         [("no pictures", "There is no file .*pictures.safetensors"),
                          ("half a file", "Cannot read .*epoch-0002.* damaged"),
                          ("an empty file", "Cannot read .*epoch-0002.* damaged"),
    ("a folder", "Cannot read"), ("fewer answers", "do not fit together"), ("no maps", "do not fit together"),
                          ("other pictures", "do not fit together"), ("no such class", "do not fit together")])
def test_damaged_files_are_named(what, words, shots, tmp_path):
    shutil.copytree(shots[0] / "snapshots", tmp_path / "snapshots")
    spoil(tmp_path, what)
    with pytest.raises(ValueError, match=words) as caught:
        read_snapshots(tmp_path)
    assert "--snapshots 8" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("there", [False, True])
def test_no_snapshots(there, tmp_path):
    if there:
        (tmp_path / "snapshots").mkdir()
    with pytest.raises(ValueError, match="There are no snapshots in .*: train with --snapshots 8."):
        read_snapshots(tmp_path)
