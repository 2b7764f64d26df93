"""What the networks see: digits, image folders, and pictures that are a function of (seed, epoch, index)."""
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import datasets
from torch.utils.data import TensorDataset

from metaformer_edu import data
from metaformer_edu.data import (DataError, EpochSampler, Pictures, imagenet_transforms, load_data, load_digits, load_folder,
                                 make_loaders)


pytestmark = pytest.mark.usefixtures("one_thread")


def first(pictures, n):
    "The same pictures, of the first n images alone."
    return Pictures([pictures.images[i] for i in range(n)], pictures.transform, pictures.seed)


# --- digits ---

def test_digits_are_sklearns_enlarged_and_normalised():
    _, held_out, info = load_digits(32)
    source = datasets.load_digits()
    where = {tuple(x): i for i, x in enumerate((source.data / 16).astype(np.float32))}
    for i in (0, 100, 449):
        image, label = held_out[i]
        k = where[tuple(held_out.images[i][0].flatten().tolist())]
        assert label == source.target[k]
        small = torch.tensor(source.images[k], dtype=torch.float32)[None, None] / 16
        expected = F.interpolate(small, size=32, mode="bilinear")[0]
        torch.testing.assert_close(info.picture(image), expected.expand(3, -1, -1), atol=1e-5, rtol=0)
    assert info.class_names == list("0123456789") and (info.img_size, info.in_chans) == (32, 3)


def test_split_is_stratified_disjoint_and_fixed():
    train, held_out, _ = load_digits()
    labels = datasets.load_digits().target
    assert (len(train), len(held_out)) == (1347, 450)
    counts = np.bincount([int(y) for _, y in held_out.images])
    assert np.abs(counts - np.bincount(labels) / 4).max() < 1
    rows = lambda d: [tuple(x.flatten().tolist()) for x, _ in d.images]
    assert not set(rows(train)) & set(rows(held_out))
    other = load_digits(img_size=32, seed=99)
    assert rows(other[0]) == rows(train) and rows(other[1]) == rows(held_out)


def test_pictures_and_normalisation_invert_each_other():
    train, held_out, info = load_digits()
    for pictures in (train, held_out):
        x = info.picture(pictures[5][0])
        assert x.min() >= 0 and x.max() <= 1 and x.max() > 0.8
        torch.testing.assert_close(x[0], x[2], atol=1e-6, rtol=0)  # grey


def test_held_out_digits_never_change_and_training_digits_do():
    train, held_out, _ = load_digits(32)
    assert torch.equal(held_out[0, 3][0], held_out[9, 3][0])
    assert not torch.equal(train[0, 3][0], train[1, 3][0])


# --- a function of (seed, epoch, index) ---

def photo(size=80):
    return Image.fromarray(datasets.load_sample_image("china.jpg")).resize((size, size))


@pytest.fixture(params=["digits", "imagenet"])
def pictures(request):
    if request.param == "digits":
        return first(load_digits(32)[0], 6)
    return Pictures([(photo(), i) for i in range(6)], imagenet_transforms(48)[0])


def test_a_picture_does_not_depend_on_what_came_before(pictures):
    keys = [(e, i) for e in range(2) for i in range(6)]
    there = {k: pictures[k][0] for k in keys}
    torch.rand(7), random.random(), np.random.rand(3)
    back = {k: pictures[k][0] for k in reversed(keys)}
    for k in keys:
        assert torch.equal(there[k], back[k]), k
    assert len({t.numpy().tobytes() for t in there.values()}) == len(keys)  # and no two are alike
    other = Pictures(pictures.images, pictures.transform, seed=1)
    assert not any(torch.equal(other[k][0], there[k]) for k in keys)


def test_the_dice_are_put_back(pictures):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    pictures[4, 2]
    assert draw() == expected


def test_the_dice_are_put_back_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError), data.dice(0, 0, 0):
        torch.rand(3), 1 / 0
    assert torch.equal(torch.rand(1), expected)


def test_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = []
    for seed in (0, 1):
        sampler = EpochSampler(50, seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            keys = list(sampler)
            assert keys == list(sampler) and {e for e, _ in keys} == {epoch}
            assert sorted(i for _, i in keys) == list(range(50))
            orders.append(tuple(i for _, i in keys))
    assert len(set(orders)) == 4 and len(sampler) == 50


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(pictures, workers):
    alone, helped = (make_loaders(pictures, pictures, 2, workers=n, seed=5) for n in (0, workers))
    for epoch in (0, 1):  # the workers live on from epoch to epoch and must hear of it
        for loader in (alone[0], helped[0]):
            loader.sampler.set_epoch(epoch)
        batches = [list(a) for a in zip(alone[0], helped[0])]
        assert len(batches) == 3
        for a, b in batches:
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert [y.tolist() for _, y in alone[1]] == [y.tolist() for _, y in helped[1]]


def test_loaders_leave_the_models_dice_alone(pictures):
    train, val = make_loaders(pictures, pictures, 2)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(train), list(val)
    assert torch.equal(torch.rand(1), expected)


def test_training_drops_a_last_batch_that_is_not_full_and_validation_keeps_it():
    train, held_out, _ = load_digits(16)
    few = first(train, 10)
    loaders = make_loaders(few, few, 4)
    assert [len(y) for _, y in loaders[0]] == [4, 4]
    assert [len(y) for _, y in loaders[1]] == [4, 4, 2]


def test_a_batch_larger_than_the_data():
    few = first(load_digits(16)[0], 10)
    assert len(make_loaders(few, few, 10)[0]) == 1
    with pytest.raises(DataError, match="batch of 11 .* 10 images"):
        make_loaders(few, few, 11)


def test_pictures_travel_to_workers_that_are_not_forked():
    train, _, info = load_digits(16)
    again, same = pickle.loads(pickle.dumps((first(train, 3), info)))
    assert torch.equal(again[1, 2][0], train[1, 2][0]) and same == info
    learn, test = imagenet_transforms(32)
    pickle.loads(pickle.dumps((learn, test)))


# --- ImageNet's transforms ---

def test_test_transform_by_hand():
    wide = Image.fromarray(datasets.load_sample_image("china.jpg"))  # 640×427
    small = wide.resize((int(64 * 640 / 427), 64), Image.Resampling.BICUBIC)
    left = round((small.width - 64) / 2)
    expected = torch.from_numpy(np.array(small.crop((left, 0, left + 64, 64)))).permute(2, 0, 1) / 255
    x = load_digits(16)[2].picture(imagenet_transforms(64)[1](wide))
    assert x.shape == (3, 64, 64) and (x - expected).abs().mean() < 0.02


def test_training_transform_is_the_published_recipe():
    steps = {type(s).__name__: s for s in imagenet_transforms(64)[0].transforms}
    assert steps["RandomResizedCropAndInterpolation"].scale == (0.08, 1)
    assert len(steps["RandomResizedCropAndInterpolation"].interpolation) == 2  # random
    assert (steps["RandomErasing"].probability, steps["RandomErasing"].mode) == (0.25, "pixel")
    assert steps["RandomHorizontalFlip"].p == 0.5
    assert {(round(o.magnitude), o.magnitude_std) for o in steps["RandAugment"].ops} == {(9, 0.5)}


def test_training_transform_can_be_changed_and_a_misspelt_change_is_an_error():
    names = {type(s).__name__ for s in imagenet_transforms(64, auto_augment=None, re_prob=0)[0].transforms}
    assert not names & {"RandAugment", "RandomErasing"}
    with pytest.raises(TypeError, match="reprob"):
        imagenet_transforms(64, reprob=0)


# --- folders ---

def write(path, color=(200, 30, 30), mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    for part in ("train", "val"):
        for k, name in enumerate(("ant", "bee")):
            for i in range(3):
                write(tmp_path / "insects" / part / name / f"{i}.png", (250 * k, 10, 10))
    return tmp_path / "insects"


def test_folder(root):
    train, val, info = load_folder(root, 32)
    assert (info.name, info.class_names, info.img_size, len(train), len(val)) == ("insects", ["ant", "bee"], 32, 6, 6)
    assert [val[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    red = info.picture(val[5][0])[0]
    assert val[0][0].shape == (3, 32, 32) and abs(red.mean() - 250 / 255) < 0.01


def test_folder_named_validation_and_hidden_folders(root):
    (root / "val").rename(root / "validation")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert load_folder(str(root), 32)[2].class_names == ["ant", "bee"]


KINDS = [("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("LA", "png"), ("RGB", "webp")]


@pytest.mark.parametrize("mode,suffix", KINDS)
def test_images_of_every_kind_become_rgb(root, mode, suffix):
    write(root / "val" / "ant" / f"0.{suffix}", mode=mode)
    _, val, _ = load_folder(root, 32)
    assert all(val[i][0].shape == (3, 32, 32) for i in range(len(val)))


def remove_tree(path):
    for p in sorted(path.rglob("*"), reverse=True):
        p.rmdir() if p.is_dir() else p.unlink()
    path.rmdir()


def rename(a, b):
    return lambda root: (root / a).rename(root / b)


def drop(*folders):
    return lambda root: [remove_tree(root / f) for f in folders]


MISTAKES = {
    "no folder": (lambda root: root.rename(root.parent / "elsewhere"), "There is no folder .*insects"),
    "a file": (lambda root: (remove_tree(root), root.write_text("")), "There is no folder .*insects"),
    "no train": (rename("train", "training"), "has no folder train/"),
    "no val": (rename("val", "test"), "has no folder val/"),
    "no classes": (drop("train/ant", "train/bee"), "train needs two or more folders.* has 0"),
    "one class": (drop("train/bee", "val/bee"), "needs two or more folders.* has 1"),
    "class only in train": (lambda root: write(root / "train" / "wasp" / "0.png"), "only train/ has wasp"),
    "class only in val": (lambda root: write(root / "val" / "wasp" / "0.png"), "only val/ has wasp"),
    "misspelt class": (rename("val/bee", "val/bees"), "only train/ has bee"),
    "empty class": (lambda root: [p.unlink() for p in (root / "val" / "bee").iterdir()], "val.*bee"),
    "no image among the files": (lambda root: [p.rename(p.with_suffix(".txt")) for p in (root / "train" / "bee").iterdir()],
                                 "train.*bee"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_get_a_sentence(root, what):
    spoil, pattern = MISTAKES[what]
    load_folder(root, 32)
    spoil(root)
    with pytest.raises(DataError, match=pattern) as caught:
        load_folder(root, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"not an image", b"", "half"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(root, content, workers):
    path = root / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:60] if content == "half" else content)
    train, val, _ = load_folder(root, 32)
    loader, _ = make_loaders(train, val, 2, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    text = str(caught.value)
    assert text.startswith(f"Cannot read the image {path}: ") and "\n" not in text and "Traceback" not in text


# --- one door, and pictures ---

def test_load_data(root, monkeypatch, tmp_path):
    assert load_data()[2].name == "digits" and load_data()[2].img_size == 64
    assert load_data("digits", 32, seed=3)[0].seed == 3
    assert load_data(root)[2].img_size == 224 and load_data(str(root), 32)[2].img_size == 32
    monkeypatch.chdir(root.parent)
    root.rename(root.parent / "digits")
    assert load_data("./digits", 32)[2].class_names == ["ant", "bee"]  # a folder of that name is still to be had


def titles(fig):
    return [ax.get_title() for ax in fig.axes if ax.images]


def test_show_batch():
    train, held_out, info = load_digits(16)
    fig = data.show_batch(next(iter(make_loaders(train, held_out, 16)[1])), info, n=3)
    assert titles(fig) == [str(int(held_out[i][1])) for i in range(3)]


def test_show_predictions_has_every_mistake_first():
    images, info = TensorDataset(torch.zeros(6, 3, 4, 4), torch.zeros(6)), data.DataInfo("x", list("abc"), 4)
    said = dict(label=torch.tensor([0, 1, 2, 0, 1, 2]), guess=torch.tensor([0, 2, 2, 0, 0, 2]),
                probability=torch.tensor([0.9, 0.5, 0.6, 0.7, 0.8, 0.4]))
    fig = data.show_predictions(said, images, info, n=4, ncols=2)
    assert titles(fig) == ["a (80%)\nis b", "c (50%)\nis b", "c (40%)", "c (60%)"]
    assert fig.get_suptitle().startswith("Wrong answers: 2 of 6 images (red), then")
    red = [ax.title.get_color() != "black" for ax in fig.axes]
    assert red == [True, True, False, False]
    assert data.show_predictions(said, images, info, n=1).get_suptitle().startswith("1 of 2 wrong answers in 6")
    beyond = dict(said, guess=torch.tensor([0, 7, 2, 0, 0, 2]))  # a model may know more classes than the data
    assert "class 7 (50%)\nis b" in titles(data.show_predictions(beyond, images, info))
    right = dict(said, guess=said["label"])
    assert data.show_predictions(right, images, info).get_suptitle().startswith("No wrong answer in 6 images")
