"""Data sets by timm's names: torchvision's and Hugging Face's from small files; shards, read like folders."""
import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from metaformer_edu.core.errors import DataError
from metaformer_edu.data import datasets
from metaformer_edu.data import shards as shards_module
from metaformer_edu.data.datasets import load_data, load_val
from metaformer_edu.data.folders import load_folder
from metaformer_edu.data.loaders import make_loaders
from metaformer_edu.data.public import PUBLIC, PublicImages, timm_prefix
from metaformer_edu.data.shards import ShardImages, find_shards
from metaformer_edu.train import main
from metaformer_edu.training.processes import EvalSampler, TrainSampler
from metaformer_edu.training.run_folder import differences
from metaformer_edu.training.settings import Settings
from metaformer_edu.validate import main as validate
from test_public import lay_out_clothes

SHORT = ["--model", "tiny_identityformer", "--img-size", "32", "-b", "8", "-j", "0", "--threads", "1", "--device",
         "cpu", "--snapshots", "2"]


def picture(number, label, kind="PNG"):
    "A file of a picture: its brightness tells its class, its noise its number."
    noise = np.random.default_rng(number).integers(0, 40, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise + np.uint8(70 * label)).save(file, kind)
    return file.getvalue()


def pack(path, files):
    "A tar file of (name, bytes)."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def samples(numbers, kind="PNG"):
    "Files of a shard: the picture of each number, and the number of its class."
    for i in numbers:
        yield f"p/{i:03}.{'png' if kind == 'PNG' else 'jpg'}", picture(i, i % 3, kind)
        yield f"p/{i:03}.cls", b"%d" % (i % 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFORMER_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def shards(tmp_path):
    "24 pictures to learn from in three shards, and 11 held-out ones in two."
    for i, numbers in enumerate(np.split(np.arange(24), [10, 13])):
        pack(tmp_path / "shop" / f"clothes-train-{i:02}.tar", samples(numbers))
    for i, numbers in enumerate((range(30, 37), range(37, 41))):
        pack(tmp_path / "shop" / f"clothes-validation-{i:02}.tar", samples(numbers))
    return tmp_path / "shop"


@pytest.fixture
def folder(tmp_path):
    "The same pictures in folders."
    for part, numbers in (("train", range(24)), ("val", range(30, 41))):
        for i in numbers:
            path = tmp_path / "loose" / part / str(i % 3) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i, i % 3))
    return tmp_path / "loose"


# --- names ---

@pytest.mark.parametrize("name, prefix", [("torch/qmnist", "torch"), ("HFDS/a/b", "hfds"), ("wds/", "wds"),
                                          ("torch", ""), ("./wds/x", ""), ("photos/wds", ""), (Path("a/b"), "")])
def test_a_prefix_makes_a_name(name, prefix):
    assert timm_prefix(name) == prefix


@pytest.mark.parametrize("name, says", [
    ("torch/cifar11", "no data set 'torch/cifar11'. Did you mean 'torch/cifar10'"),
    ("tfds/mnist", "comes as a stream, .* use torch/…, hfds/… or wds/…"), ("hfids/x", "comes as a stream"),
    ("wds/nowhere", "There is no folder nowhere"), ("wds/a{0..1}.tar", "no shards .* of the part train")])
def test_what_cannot_be_opened_is_told_in_a_sentence(name, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        load_data(name)
    with pytest.raises(SystemExit) as stop:
        main([name, *SHORT, "--output", str(tmp_path / "runs")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("wrong, says", [
    (dict(data="torch/cifar10", decoder="torchvision"), "--decoder is for folders"),
    (dict(data="torch/cifar10", skip_unreadable=True), "--skip-unreadable is for"),
    (dict(data="photos", data_dir="x"), "photos is a folder")])
def test_flags_that_would_do_nothing(wrong, says):
    with pytest.raises(ValueError, match=says):
        Settings(**wrong)
    assert Settings("wds/x", data_dir="y", decoder="torchvision").data_dir == "y"


# --- torchvision's ---

@pytest.fixture
def raw(tmp_path, monkeypatch):
    "Small files of Fashion-MNIST, as torchvision wants them."
    monkeypatch.setattr(PUBLIC["fashion-mnist"], "system", None)
    return lay_out_clothes(tmp_path / "data")


def test_torchvisions_name_opens_the_same_pictures(raw):
    train, val, info = load_data("torch/fashion_mnist", 64, data_dir=raw)
    own = PublicImages("fashion-mnist", "val", raw)
    assert (len(train), len(val), info.name, info.img_size) == (64, 20, "fashion_mnist", 64)
    assert info.class_names == own.class_names and torch.equal(val.images.targets, own.targets)
    for i in range(20):
        assert val.images[i][0].tobytes() == own[i][0].tobytes() and val.images[i][1] == own[i][1]
    assert torch.equal(train[3, 5][0], train[3, 5][0]) and not torch.equal(train[3, 5][0], train[4, 5][0])
    assert len(load_val("torch/fashion_mnist", 32, "train", data_dir=raw)[0]) == 64
    assert load_val("torch/fashion_mnist", data_dir=raw)[0][0][0].shape == (3, 224, 224)


def test_without_a_network_the_sentence_says_where(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=f"torch/cifar10 cannot be opened in {tmp_path}: Network is unreachable.$"):
        load_data("torch/cifar10", data_dir=tmp_path)


def test_torchvisions_folders(folder):
    train, val, info = load_data("torch/image_folder", 32, data_dir=folder)
    same = load_folder(folder, 32)
    assert (len(train), len(val), info.class_names) == (24, 11, ["0", "1", "2"])
    assert all(torch.equal(a[2, 7][0], b[2, 7][0]) for a, b in zip((train, val), same))
    shutil.rmtree(folder / "val" / "0")
    with pytest.raises(DataError, match="torch/image_folder have different classes"):
        load_data("torch/image_folder", 32, data_dir=folder)


# --- Hugging Face's ---

def test_the_sentence_where_the_library_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"hfds/mnist needs a package .*: pip install 'metaformer_edu\[hf\]'.$"):
        load_data("hfds/mnist")
    with pytest.raises(SystemExit) as stop:
        validate(["hfds/mnist", "--checkpoint", "x.safetensors"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_extra_is_there():
    import configparser
    config = configparser.ConfigParser()
    root = Path(__file__).parent.parent
    config.read(root / "settings.ini", encoding="utf-8")
    assert "datasets>=" in config["DEFAULT"]["hf_requirements"]
    assert '"hf"' in (root / "setup.py").read_text(encoding="utf-8")


def test_hugging_faces_pictures_are_those_of_the_folder(folder, tmp_path):
    pytest.importorskip("datasets")
    root, name = tmp_path / "kept", f"hfds/{folder}"
    train, val, info = load_data(name, 32, data_dir=root)
    same = load_folder(folder, 32)
    assert (len(train), len(val), info.class_names, info.name) == (24, 11, ["0", "1", "2"], "loose")
    labels = [label for _, label in same[0].images.samples]
    assert sorted(train.images.targets) == sorted(labels)
    for i, (file, label) in enumerate(same[1].images.samples):  # both sort the files
        assert torch.equal(val[i][0], same[1][i][0]) and val[i][1] == label
    assert len(load_val(name, 32, "train[:5]", data_dir=root)[0]) == 5 and root.is_dir()
    val.images.target_transform = [7, 8, 9].__getitem__  # as metaformer-validate has it for ImageNet's names
    assert {val[i][1] for i in range(len(val))} == {7, 8, 9}
    with pytest.raises(DataError, match="cannot be opened: Unknown split"):
        load_val(name, 32, "test", data_dir=root)


# --- shards ---

@pytest.mark.parametrize("kind, decoder", [("PNG", "pillow"), ("JPEG", "torchvision")])
def test_shards_are_a_folder_in_another_form(shards, folder, tmp_path, kind, decoder):
    if kind == "JPEG":
        for path in sorted(shards.glob("*.tar")):
            with tarfile.open(path) as tar:
                numbers = [int(m.name[2:5]) for m in tar if m.name.endswith("cls")]
            pack(path, samples(numbers, kind))
        for path in sorted(folder.glob("*/*/*.png")):
            path.with_suffix(".jpg").write_bytes(picture(int(path.stem), int(path.stem) % 3, kind))
            path.unlink()
    both = load_data(f"wds/{shards}", 32, 3, decoder=decoder), load_data(folder, 32, 3, decoder=decoder)
    assert both[0][2].class_names == both[1][2].class_names and both[0][2].name == "shop"
    for packed, loose in zip(both[0][:2], both[1][:2]):
        place = {Path(file).stem: i for i, (file, _) in enumerate(loose.images.samples)}
        assert len(packed) == len(loose)
        for i, (name, label) in enumerate(packed.images.samples):
            assert packed.images[i][1] == label == loose.images[place[Path(name).stem]][1]
            transform = packed.transform
            one, other = (d.through(transform, (0, j)) for d, j in ((packed, i), (loose, place[Path(name).stem])))
            if packed is both[0][1]:  # what is shown in a test knows no chance
                assert torch.equal(one[0], other[0])
    assert not torch.equal(both[0][0][0, 0][0], both[0][0][1, 0][0])


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 2), (3, 0), (5, 0)])
def test_every_image_is_seen_once_in_validation(shards, processes, workers):
    val, _ = load_val(f"wds/{shards}", 32)
    seen = []
    for part in range(processes):
        sampler = EvalSampler(len(val), 2, part, processes)
        _, loader = make_loaders(val, val, 2, workers, samplers=(sampler, sampler))
        seen += [image for images, _ in loader for image in images]
    alone = [val[i][0] for i in range(len(val))]
    assert len(seen) == len(alone) == 11
    assert all(sum(torch.equal(image, other) for other in seen) == 1 for image in alone)


def test_an_epoch_is_the_same_for_any_number_of_processes(shards):
    train, _, _ = load_data(f"wds/{shards}", 32)
    steps = []
    for parts in (1, 2):
        keys = [list(TrainSampler(len(train), 8 // parts, part=part, parts=parts)) for part in range(parts)]
        size = 8 // parts
        steps.append([sorted(itertools.chain(*(k[i:i + size] for k in keys))) for i in range(0, len(keys[0]), size)])
    assert steps[0] == steps[1] and len(steps[0]) == 3


def test_the_index_is_made_once_and_anew_when_a_shard_changes(shards, cache, monkeypatch):
    walked, walk = [], shards_module._walk
    monkeypatch.setattr(shards_module, "_walk", lambda path: walked.append(Path(path).name) or walk(path))
    for _ in range(2):
        load_data(f"wds/{shards}", 32)
    assert len(walked) == 5 and len(list(cache.glob("*.npy"))) == 2
    pack(shards / "clothes-train-01.tar", samples(range(10, 14)))
    assert len(load_data(f"wds/{shards}", 32)[0]) == 25 and len(walked) == 8


def test_shards_are_named_as_timm_names_them(shards, tmp_path, monkeypatch):
    names = lambda *which: [Path(path).name for path in find_shards(*which)]
    held_out = [f"clothes-validation-0{i}.tar" for i in range(2)]
    train = [f"clothes-train-0{i}.tar" for i in range(3)]
    assert names(shards) == names(shards, "validation") == names(shards, "val") == held_out
    assert names(shards, "train") == train == names(shards, "clothes-train-{00..02}.tar|24")
    assert names(f"{shards}/clothes-{{validation-00,train-02}}.tar") == [held_out[0], train[2]]
    assert len(load_val("wds/any", 32, "clothes-train-{00..01}.tar", data_dir=shards)[0]) == 13
    monkeypatch.chdir(tmp_path)
    assert len(load_val("wds/shop", 32)[0]) == len(load_val("wds/", 32, data_dir="shop")[0]) == 11
    for path in list(shards.iterdir()):  # in folders, as images are
        part = shards / ("train" if "train" in path.name else "val")
        part.mkdir(exist_ok=True)
        path.rename(part / f"{path.stem[-2:]}.tar")
    assert names(shards) == ["00.tar", "01.tar"] and len(find_shards(shards, "train")) == 3
    splits = dict(train=dict(filenames=["val/00.tar"]), odd=dict(filenames=["val/01.tar", "train/00.tar"]))
    (shards / "_info.json").write_text(json.dumps(dict(splits=splits)))
    assert names(shards, "odd") == ["01.tar", "00.tar"]
    with pytest.raises(DataError, match=r"no shards \(.tar\) of the part validation. It has train \(1\), odd \(2\).$"):
        find_shards(shards)
    for wrong in ("[]", "{", '{"splits": {"train": {}}}'):
        (shards / "_info.json").write_text(wrong)
        with pytest.raises(DataError, match="_info.json names no splits"):
            find_shards(shards)


def test_shards_without_a_part_are_held_out_ones(tmp_path):
    pack(tmp_path / "s" / "a.tar", [*samples(range(4)), ("about.txt", b"x"), ("p/._000.png", b"x")])
    assert len(load_val(f"wds/{tmp_path}/s", 32)[0]) == 4
    with pytest.raises(DataError, match="part train. It has unnamed"):
        load_data(f"wds/{tmp_path}/s", 32)
    with pytest.raises(DataError, match="part validation. It has none"):
        find_shards(tmp_path / "cache" if (tmp_path / "cache").is_dir() else tmp_path)


GOOD = dict(samples(range(2)))


@pytest.mark.parametrize("files, says", [
    ({**GOOD, "p/009.png": b"x"}, "p/009 needs an image, and a .cls file with a number .* It has png."),
    ({**GOOD, "p/009.cls": b"1"}, "p/009 needs .* has cls"),
    ({**GOOD, "p/000.jpg": b"x"}, "p/000 needs .* has png, cls, jpg"),
    ({**GOOD, "p/001.cls": b"-1"}, "p/001 needs .* a number from 0. It has png, cls"),
    ({**GOOD, "p/009.cls": b"cat"}, "Cannot read the shard .*invalid literal"),
    ({"x.txt": b"x"}, "There is no image in")])
def test_a_shard_that_is_not_whole_is_told(files, says, tmp_path, cache):
    with pytest.raises(DataError, match=says):
        ShardImages([pack(tmp_path / "a.tar", files.items())])
    assert not list(cache.glob("*.npy*"))


def test_a_shard_that_is_cut_packed_or_not_there(shards, tmp_path):
    path = shards / "clothes-train-00.tar"
    data, first = path.read_bytes(), 512
    with tarfile.open(path) as tar:
        first = tar.getmembers()[4].offset
    for cut in (100, first, first + 600, len(data) - 20000):  # also between two files
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match="Cannot read the shard .*clothes-train-00.tar"):
            load_data(f"wds/{shards}")
    path.unlink()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(shards / "clothes-train-01.tar", "x.tar")
    with pytest.raises(DataError, match="Cannot read the shard"):
        load_data(f"wds/{shards}")
    with pytest.raises(DataError, match="Cannot read the shard .*-07.tar: No such file"):
        load_val(f"wds/{shards}", split="clothes-train-07.tar")
    pack(path, [("a.png", b"x"), ("a.cls", b"0"), ("a.png", b"x")])
    with pytest.raises(DataError, match="a.png is twice"):
        load_data(f"wds/{shards}")


def test_an_image_that_cannot_be_read_is_named_or_left_out(tmp_path):
    pack(tmp_path / "s" / "a.tar", {**dict(samples(range(5))), "p/002.png": b"no picture"}.items())
    with pytest.raises(DataError, match=r"Cannot read the image .*s/a.tar/p/002.png: cannot identify image file"):
        load_val(f"wds/{tmp_path}/s", 32)[0][2]
    val, _ = load_val(f"wds/{tmp_path}/s", 32, unreadable="skip")
    assert [val[i][1] for i in range(5)] == [0, 1, -1, 0, 1] and val.skipped.sum() == 1


def test_a_run_on_shards_goes_on_exactly_and_is_measured_again(shards, tmp_path, capsys):
    from metaformer_edu.core.files import read_log
    flags = ["wds/clothes", "--data-dir", str(shards), *SHORT, "--epochs", "2", "--output", str(tmp_path / "runs"),
             "--recovery-interval", "1"]
    main([*flags, "--experiment", "whole"])
    whole, command = tmp_path / "runs" / "whole", capsys.readouterr().out.splitlines()[-1]
    before = read_log(whole / "summary.csv")
    about = yaml.safe_load((whole / "args.yaml").read_text())
    assert about["class_names"] == ["0", "1", "2"] and about["settings"]["data_dir"] == str(shards)
    _, *again = command.split()
    validate([*again, "--device", "cpu", "-j", "0"])
    best = max(float(row["val_top1"]) for row in before)
    assert f"on clothes: top-1 {best:.3f} %" in capsys.readouterr().out
    shutil.copytree(whole, tmp_path / "runs" / "again")
    state = min((tmp_path / "runs" / "again").glob("state-*.pt"))
    assert "00000005" in state.name  # in the middle of the second epoch
    main([*flags, "--resume", str(state)])
    assert (state.parent / "last.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()
    assert "goes on after update 5, in epoch 2" in capsys.readouterr().out


@pytest.mark.parametrize("data, same", [("wds/x", False), ("torch/image_folder", False), ("cifar10", True)])
def test_another_folder_of_shards_is_another_run(data, same):
    "Of a public set the folder only says where it is kept."
    found = differences(dict(data=data, data_dir="a"), dict(data=data, data_dir="b"))
    assert found == ([] if same else ["data_dir a → b"])
