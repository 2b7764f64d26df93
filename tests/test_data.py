"""What the networks see: digits, image folders, and pictures that are a function of (seed, epoch, index)."""
import pickle
import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import datasets
from timm.data import IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import DataLoader, TensorDataset

from metaformer_edu.core.errors import DataError
from metaformer_edu.data import folders, transforms
from metaformer_edu.data.datasets import SOURCES, load_data, load_digits, load_shapes, load_val
from metaformer_edu.data.folders import _SkipUnreadable, load_folder
from metaformer_edu.data.loaders import EpochSampler, PrefetchLoader, make_loaders, show_batch, show_predictions
from metaformer_edu.data.shapes import TASKS, draw_example
from metaformer_edu.data.transforms import DataInfo, ImageDataset, imagenet_transforms, seeded_rng
from metaformer_edu.models.weights import imagenet_labels
from metaformer_edu.training.settings import Settings
from metaformer_edu.training.setup import _open_data


pytestmark = pytest.mark.usefixtures("one_thread")


def first(pictures, n):
    "The same pictures, of the first n images alone."
    return ImageDataset([pictures.images[i] for i in range(n)], pictures.transform, pictures.seed)


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
    return ImageDataset([(photo(), i) for i in range(6)], imagenet_transforms(48)[0])


def test_a_picture_does_not_depend_on_what_came_before(pictures):
    keys = [(e, i) for e in range(2) for i in range(6)]
    there = {k: pictures[k][0] for k in keys}
    torch.rand(7)
    random.random()
    np.random.rand(3)
    back = {k: pictures[k][0] for k in reversed(keys)}
    for k in keys:
        assert torch.equal(there[k], back[k]), k
    assert len({t.numpy().tobytes() for t in there.values()}) == len(keys)  # and no two are alike
    other = ImageDataset(pictures.images, pictures.transform, seed=1)
    assert not any(torch.equal(other[k][0], there[k]) for k in keys)


def test_the_dice_are_put_back(pictures):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = draw()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    pictures[4, 2]
    assert draw() == expected


def test_the_dice_are_put_back_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError), seeded_rng(0, 0, 0):
        torch.rand(3)
        raise ZeroDivisionError
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
    list(train)
    list(val)
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


def test_a_folder_that_is_not_there_gets_the_names_of_the_data_sets(root):
    for load in (load_data, load_val):
        with pytest.raises(DataError,
                           match=f"^There is no folder {root}x: give a folder, or one of digits, shapes, shapes-"):
            load(f"{root}x", 32)


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
    "no folder": (lambda root: root.rename(root.parent / "elsewhere"), "^There is no folder .*insects.$"),
    "a file": (lambda root: (remove_tree(root), root.write_text("")),
               "Cannot read the folder .*insects: Not a directory"),
    "images without class folders":
        (lambda root: (drop("train/ant", "train/bee")(root), write(root / "train" / "0.png")),
                                     "train needs two or more folders.* has 0, and 1 images"),
    "no train": (rename("train", "training"), "has no folder train/"),
    "no val": (rename("val", "test"), "has no folder val/"),
    "no classes": (drop("train/ant", "train/bee"), "train needs two or more folders.* has 0"),
    "one class": (drop("train/bee", "val/bee"), "needs two or more folders.* has 1"),
    "class only in train": (lambda root: write(root / "train" / "wasp" / "0.png"), "only train/ has wasp"),
    "class only in val": (lambda root: write(root / "val" / "wasp" / "0.png"), "only val/ has wasp"),
    "misspelt class": (rename("val/bee", "val/bees"), "only train/ has bee"),
    "empty class": (lambda root: [p.unlink() for p in (root / "val" / "bee").iterdir()], "val.*bee"),
    "no image among the files":
        (lambda root: [p.rename(p.with_suffix(".txt")) for p in (root / "train" / "bee").iterdir()],
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


# --- images that cannot be read, by choice ---

def spoil(root, *names):
    for name in names:
        (root / name).write_bytes(b"not an image")


def epoch(loader, number=0):
    loader.sampler.set_epoch(number)
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_image_stands_in(root, workers, capfd):
    whole = load_folder(root, 32)[0]
    spoil(root, "train/ant/1.png", "train/ant/2.png", "train/bee/2.png")
    train, val, _ = load_folder(root, 32, unreadable="skip")
    loader, _ = make_loaders(train, val, 2, workers=workers)
    for number in (0, 1):
        seen = {}
        for (_, i), (x, y) in zip(loader.sampler, zip(*(torch.cat(t) for t in zip(*epoch(loader, number))))):
            seen[i] = x, int(y)
        assert {i: y for i, (_, y) in seen.items()} == {0: 0, 1: 1, 2: 1, 3: 1, 4: 1, 5: 0}  # 5 wraps around to 0
        for i, source in {0: 0, 1: 3, 2: 3, 3: 3, 4: 4, 5: 0}.items():  # the dice are those of the place in the list
            with seeded_rng(0, number, i):
                assert torch.equal(seen[i][0], whole.transform(whole.images[source][0]))
    assert train.skipped.tolist() == [False, True, True, False, False, True]
    sentences = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Cannot read")]
    if workers == 0:  # workers may write to the stderr of an earlier test, where the server that forks them was started
        assert [line.split("train/")[1][:9] for line in sorted(sentences)] == ["ant/1.png", "ant/2.png", "bee/2.png"]


@pytest.mark.parametrize("context", [None, "spawn", "forkserver"])
def test_in_validation_it_is_left_out(root, context, capfd):
    spoil(root, "val/ant/0.png", "val/bee/1.png")
    val, _ = load_val(root, 32, unreadable="skip")
    options = dict(num_workers=2, multiprocessing_context=context, persistent_workers=True) if context else {}
    loader = torch.utils.data.DataLoader(val, 2, **options)
    for _ in range(2):
        images, labels = map(torch.cat, zip(*loader))
        assert labels.tolist() == [-1, 0, 0, 1, -1, 1] and images.shape == (6, 3, 32, 32)
    assert val.skipped.tolist() == [True, False, False, False, True, False] and val.skipped.is_shared()
    text = capfd.readouterr().err
    if context != "forkserver":  # its server was started by an earlier test, with that test's stderr
        assert (
            text.count(f"Cannot read the image {root / 'val/ant/0.png'}: ") == 1 and text.count(" It is left out.") == 2
        )
    assert show_batch((images, labels), load_val(root, 32)[1], 1).axes[0].get_title() == "unreadable"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", [0, 1])
def test_nothing_to_read_is_an_error_and_no_endless_loop(root, part, workers):
    spoil(root, *(f"{p}/{c}/{i}.png" for p in ("train", "val") for c in ("ant", "bee") for i in range(3)))
    loader = make_loaders(*load_folder(root, 32, unreadable="skip")[:2], 2, workers=workers)[part]
    with pytest.raises(DataError, match="^None of the 6 images can be read.$"):
        list(loader)


def test_stop_keeps_no_marks_and_an_unknown_choice_is_an_error(root):
    assert load_folder(root, 32)[0].skipped is None and load_digits(16)[0].skipped is None
    with pytest.raises(ValueError, match="'skp'. Did you mean 'skip'"):
        load_folder(root, 32, unreadable="skp")
    with pytest.raises(ValueError, match="'nxt'. Did you mean 'next'"):
        _SkipUnreadable([], "nxt")


class Many:
    "A long list whose last image alone can be read."
    def __len__(self):
        return 1_300_000

    def __getitem__(self, i):
        if i < len(self) - 1:
            raise DataError("no")
        return torch.zeros(1), 5


def test_marks_stay_cheap_for_a_million_images():
    pictures = ImageDataset(_SkipUnreadable(Many(), "next"), torch.abs)
    assert len(pickle.dumps(pictures)) < 2_000_000
    assert pictures[1_299_997][1] == 5 and pictures.skipped.sum() == 2


# --- bytes from the workers, numbers on the device ---

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder of four JPEG files of each of two photographs, for training and for tests."
    root = tmp_path_factory.mktemp("photos")
    for i in range(16):
        name = ("china", "flower")[i % 2]
        path = root / ("train", "val")[i // 8] / name / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = Image.fromarray(datasets.load_sample_image(f"{name}.jpg"))
        whole.crop((10 * i, 5 * i, 10 * i + 200, 5 * i + 150)).save(path)
    return root


ENDS = [dict(), dict(re_prob=1., re_mode="rand", re_count=3), dict(re_prob=1., re_mode="const"), dict(re_prob=0.),
        dict(re_prob=1., decoder="torchvision"), dict(auto_augment=None, decoder="torchvision"),
        dict(auto_augment=None, color_jitter=0.4),
        dict(auto_augment=None, train_crop_mode="rkrc", decoder="torchvision")]


@pytest.mark.parametrize("changes", ENDS)
def test_a_loader_gives_what_the_transforms_give(photos, changes):
    train, val, _ = load_folder(photos, 48, seed=3, **changes)
    for images, loader in zip((train, val), make_loaders(train, val, 4)):
        if images is train:
            loader.sampler.set_epoch(2)
        keys, found = list(loader.sampler), list(loader)
        expected = [images[key] for key in keys]
        x, y = (torch.cat(t) for t in zip(*found))
        assert torch.equal(x, torch.stack([image for image, _ in expected]))
        assert y.tolist() == [label for _, label in expected] and all(t.is_contiguous() for t, _ in found)


def test_they_are_timms_bit_for_bit(photos):
    train, _, _ = load_folder(photos, 48)
    timms = create_transform(48, is_training=True, scale=(0.08, 1), auto_augment="rand-m9-mstd0.5-inc1",
                             color_jitter=None, interpolation="random", re_prob=0.25, re_mode="pixel")
    loader, _ = make_loaders(train, train, 8)
    for n in range(2):
        loader.sampler.set_epoch(n)
        (images, _), keys = next(iter(loader)), list(loader.sampler)
        for image, (epoch_, index) in zip(images, keys):
            with Image.open(train.images.samples[index][0]) as file, seeded_rng(0, epoch_, index):
                assert torch.equal(image, timms(file.convert("RGB")))


def test_workers_hand_over_bytes(photos):
    train, val, _ = load_folder(photos, 64)
    for loader, n in zip(make_loaders(train, val, 4, workers=1), (2, 2)):
        handed = list(DataLoader.__iter__(loader))
        assert len(handed) == n
        for (pixels, places, values), labels in handed:
            assert pixels.shape == (4, 3, 64, 64) and pixels.dtype == torch.uint8 and labels.shape == (4,)
            assert values.numel() == sum(3 * h * w for *_, h, w in places.tolist())
    digits = make_loaders(*load_digits(16)[:2], 4)[0]
    assert next(DataLoader.__iter__(digits))[0].dtype == torch.float32  # what is no photograph travels as it is


def test_a_data_set_that_draws_otherwise_is_left_alone(photos):
    class Constant(ImageDataset):
        def __getitem__(self, key):
            return torch.zeros(3, 8, 8), 7

    train, _, _ = load_folder(photos, 48)
    mine = Constant(train.images, train.transform)
    assert [x.abs().sum().item() for x, _ in make_loaders(mine, mine, 4)[0]] == [0, 0]


def test_images_of_one_channel():
    grey = Image.fromarray(datasets.load_sample_image("china.jpg")).resize((40, 30)).convert("L")
    data = ImageDataset([(grey, 0)], imagenet_transforms(32, mean=[0.4], std=[0.2])[1])
    (x, _), = make_loaders(data, data, 1)[1]
    assert x.shape == (1, 1, 32, 32) and torch.equal(x[0], data[0][0])


class Streams:
    "What `PrefetchLoader` says to torch.cuda, in order."
    def __init__(self, monkeypatch):
        self.said, self.inside = [], None
        self.main = self.named("main")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.said.append("new") or self.named("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.main)
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    def named(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.said.append(f"{name} waits for {other.name}"))

    @contextmanager
    def within(self, stream):
        self.inside = stream.name
        yield
        self.inside = None


def test_a_gpu_gets_its_batches_ahead_on_a_stream_of_its_own(monkeypatch):
    data = load_digits(16)[0]
    assert PrefetchLoader(data, 2, device="cuda").pin_memory and not PrefetchLoader(data, 2).pin_memory
    streams, loader = Streams(monkeypatch), PrefetchLoader(data, 2)
    monkeypatch.setattr(loader, "_finish", lambda batch: streams.said.append(f"{batch} {streams.inside}") or batch)
    for _ in range(2):  # the stream is made once
        for batch in loader._ahead(iter("abc")):
            streams.said.append(f"train {batch}")
    epoch_ = ["side waits for main", "a side", "main waits for side",
              "side waits for main", "b side", "train a", "main waits for side",
              "side waits for main", "c side", "train b", "main waits for side", "train c"]
    assert streams.said == ["new", *epoch_, *epoch_]
    assert list(loader._ahead(iter(()))) == []


def test_copies_to_a_gpu_need_not_wait():
    class Asked:
        def to(self, device, non_blocking=False):
            return device.type, non_blocking

    loader = PrefetchLoader(load_digits(16)[0], 2, device="cuda")
    assert loader._finish((Asked(), Asked())) == (("cuda", True), ("cuda", True))


def test_to_finish_a_batch_asks_the_device_for_nothing(photos):
    train, _, _ = load_folder(photos, 48, re_prob=1.)
    (x, y), *_ = make_loaders(train, train, 4, device="meta")[0]  # where .item() is an error
    assert (x.shape, x.device.type, y.device.type) == ((4, 3, 48, 48), "meta", "meta")


# --- the quick decoder ---

def test_the_quick_decoder_is_near(photos):
    plain = dict(auto_augment=None, re_prob=0.)
    slow, quick = (load_folder(photos, 64, decoder=d, **plain) for d in ("pillow", "torchvision"))
    std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
    for a, b in zip(slow[:2], quick[:2]):
        gaps = torch.stack([255 * std * (a[i][0] - b[i][0]).abs() for i in range(8)])  # the same crops, or it is large
        assert 0 < gaps.mean() < 0.3
    val, _ = load_val(photos, 64, decoder="torchvision")
    assert torch.equal(val[3][0], quick[1][3][0])


@pytest.mark.parametrize("mode,suffix", KINDS + [("L", "jpg")])
def test_the_quick_decoder_reads_what_the_other_reads(root, mode, suffix):
    write(root / "val" / "ant" / f"0.{suffix}", mode=mode)
    (root / "val" / "ant" / "1.png").rename(root / "val" / "ant" / "1.jpg")  # it is not what its name says
    slow, quick = (load_val(root, 32, decoder=d)[0] for d in ("pillow", "torchvision"))
    for i in range(len(slow)):
        assert (slow[i][0] - quick[i][0]).abs().max() < 0.1, slow.images.samples[i]


def test_the_quick_decoder_names_what_it_cannot_read(photos, tmp_path):
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            write(tmp_path / "cut" / part / name / "0.png")
    cut = tmp_path / "cut/val/ant/1.jpg"
    cut.write_bytes((photos / "val/china/8.jpg").read_bytes()[:3000])
    val, _ = load_val(tmp_path / "cut", 32, decoder="torchvision")
    with pytest.raises(DataError, match=f"^Cannot read the image {cut}: image file is truncated"):
        val[1]
    val, _ = load_val(tmp_path / "cut", 32, decoder="torchvision", unreadable="skip")
    assert next(iter(make_loaders(val, val, 3)[1]))[1].tolist() == [0, -1, 1]


def test_rectangles_without_an_area_are_written_too(root):
    train = load_folder(root, 32, re_prob=1., re_count=60)[0]
    images = next(iter(make_loaders(train, train, 4)[1]))[0]
    assert torch.equal(images, torch.stack([train[i][0] for i in range(4)]))


def test_the_decoder_is_chosen_by_name(photos):
    with pytest.raises(ValueError, match="'torchvison'. Did you mean 'torchvision'"):
        load_folder(photos, decoder="torchvison")
    with pytest.raises(DataError, match="digits takes no option 'decoder'"):
        load_data("digits", decoder="torchvision")
    for data, said in (("digits", "--decoder changes nothing for digits"), ("cifar10", "--decoder is for folders")):
        with pytest.raises(ValueError, match=said):
            Settings(data, decoder="torchvision")
    train, val, _ = _open_data(Settings(str(photos), decoder="torchvision", img_size=32))
    assert train.images.loader is val.images.loader is folders._DECODERS["torchvision"]


# --- a part to validate on ---

def test_load_val_finds_the_part(root):
    val, info = load_val(root)
    assert (len(val), info.name, info.class_names, info.img_size) == (6, "insects", ["ant", "bee"], 224)
    assert torch.equal(val[3][0], load_folder(root)[1][3][0])
    (root / "val" / "bee" / "2.png").unlink()
    remove_tree(root / "train")  # not needed
    assert len(load_val(root, 32)[0]) == len(load_val(str(root), 32,
                                                      "validation")[0]) == len(load_val(root / "val", 32)[0]) == 5
    (root / "val").rename(root / "validation")
    assert len(load_val(root, 32)[0]) == len(load_val(root, 32, "val")[0]) == 5
    (root / "validation").rename(root / "test2")
    assert len(load_val(root, 32, "test2")[0]) == 5


def test_validation_wins_if_it_is_asked_for(root):
    write(root / "validation" / "ant" / "0.png")
    write(root / "validation" / "bee" / "0.png")
    assert [len(load_val(root, 32, s)[0]) for s in (None, "val", "validation", "train")] == [6, 6, 2, 6]


SPLIT_MISTAKES = {
    "no folder": (lambda r: r.rename(r.parent / "elsewhere"), {}, "There is no folder .*insects: give"),
    "a file": (lambda r: (remove_tree(r), r.write_text("")), {}, "Cannot read the folder .*insects: Not a directory"),
    "no such split": (lambda r: None, dict(split="test"), "has no folder test/. It has train, val.$"),
    "no such split, nothing there":
        (drop("train", "val"), dict(split="test"), "has no folder test/. It has no folder.$"),
    "no val": (rename("val", "test"), {}, "has no folder val/. Choose one that it has as the split: test, train.$"),
    "other names":
        (lambda r: (rename("val", "b")(r), rename("train", "a")(r)), {}, "no folder val/. Choose .*: a, b.$"),
    "one class": (drop("val/bee"), {}, "val needs two or more folders.* has 1, and 0 images.$"),
    "loose images":
        (lambda r: (drop("val/ant", "val/bee")(r), write(r / "val" / "0.png"), write(r / "val" / "1.png")), {},
                     "has 0, and 2 images.$"),
    "loose images, no split":
        (lambda r: (drop("train", "val")(r), write(r / "0.png")), {}, "insects needs .* 1 images"),
    "empty": (drop("train", "val"), {}, "insects needs two or more folders.* has 0, and 0 images.$"),
    "empty class": (lambda r: [p.unlink() for p in (r / "val" / "bee").iterdir()], {}, "val.*bee"),
    "an option it does not take":
        (lambda r: None, dict(augment=False), "no option 'augment'. It takes crop_pct, decoder, interp"),
}


@pytest.mark.parametrize("what", SPLIT_MISTAKES)
def test_mistakes_with_a_split_get_a_sentence(root, what):
    change, options, pattern = SPLIT_MISTAKES[what]
    load_val(root, 32)
    change(root)
    with pytest.raises(DataError, match=pattern) as caught:
        load_val(root, 32, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "val", "val/bee"])
def test_a_folder_that_may_not_be_read(root, place, monkeypatch):
    real = folders.os.scandir

    def scandir(folder="."):  # tests may run as root, for whom every folder is open
        if str(folder) == str(root / place):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)
    monkeypatch.setattr(folders.os, "scandir", scandir)
    for load in (load_val, load_folder):
        with pytest.raises(DataError, match=f"^Cannot read the folder {root / place}: Permission denied.$"):
            load(root, 32)


def test_a_file_that_may_not_be_read(root, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(folders.Image, "open", forbidden)
    with pytest.raises(DataError, match="^Cannot read the image .*0.png: Permission denied.$"):
        load_val(root, 32)[0][0]


def test_the_test_transform_can_be_changed(root):
    wide = Image.fromarray(datasets.load_sample_image("china.jpg"))
    for name in "ant", "bee":
        wide.save(root / "val" / name / "0.png")
    info, shown = load_val(root, 64)[1], {}
    for crop in (1.0, 0.5):
        shown[crop] = info.picture(load_val(root, 64, crop_pct=crop)[0][0][0])
    middle = F.interpolate(shown[1.0][None, :, 16:48, 16:48], size=64, mode="bicubic")[0]
    assert (shown[0.5] - middle).abs().mean() < 0.05 < (shown[0.5] - shown[1.0]).abs().mean()
    assert not torch.equal(load_val(root, 64, interpolation="bilinear")[0][0][0], load_val(root, 64)[0][0][0])
    train, val, _ = load_folder(root, 64, crop_pct=0.5, interpolation="bilinear", train_interpolation="bicubic",
                                hflip=0.)
    assert torch.equal(val[0][0], load_val(root, 64, crop_pct=0.5, interpolation="bilinear")[0][0][0])
    crop = train.transform.transforms[0]
    assert type(crop).__name__ == "RandomResizedCropAndInterpolation" and len(set(np.ravel(crop.interpolation))) == 1


def test_wordnet_ids_become_imagenets_labels(root):
    from timm.data import ImageNetInfo
    names = ImageNetInfo().label_names()
    assert imagenet_labels(names) == list(range(1000))
    assert imagenet_labels(["n15075141", "n01440764"]) == [999, 0]
    assert imagenet_labels(["n01440764", "tench"]) is None and imagenet_labels(["ant", "bee"]) is None
    (root / "val" / "ant").rename(root / "val" / "n01443537")
    remove_tree(root / "val" / "bee")  # one class will do, for its label is known
    pictures, info = load_val(root, 32)
    assert imagenet_labels(info.class_names) == [1] and len(pictures) == 3


# --- loaders for other samplers ---

def test_samplers_and_sizes_of_the_loaders(pictures):
    keys, some = [(3, 1), (3, 4), (3, 0)], [5, 2, 2]
    train, val = make_loaders(pictures, pictures, 1, val_batch_size=2, samplers=(keys, some))
    assert [len(y) for _, y in train] == [1, 1, 1] and [len(y) for _, y in val] == [2, 1]
    for (x, _), key in zip(train, keys):
        assert torch.equal(x[0], pictures[key][0])
    assert torch.equal(torch.cat([y for _, y in val]), torch.tensor([pictures[i][1] for i in some]))
    assert len(make_loaders(pictures, pictures, 7, samplers=(keys, None))[0]) == 0  # the caller's to check
    assert [len(y) for _, y in make_loaders(pictures, pictures, 4)[1]] == [4, 2]


# --- shapes ---

@pytest.mark.parametrize("task", TASKS)
def test_shapes_behind_the_door(task):
    train, held_out, info = load_data(f"shapes-{task}", 32)
    assert (len(train), len(held_out), info.name) == (2000, 500, f"shapes-{task}")
    assert info.class_names == TASKS[task].class_names and info.img_size == 32
    for i in (0, 3, 499):
        image, _, label = draw_example(task, i, "val", 32)
        x, y = held_out[5, i]
        torch.testing.assert_close(info.picture(x), torch.from_numpy(image).permute(2, 0, 1) / 255, atol=1e-5, rtol=0)
        assert y == label
    assert not torch.equal(train[0, 3][0], train[1, 3][0])
    other = load_data(f"shapes-{task}", 32, seed=1)
    assert not torch.equal(train[0, 3][0], other[0][0, 3][0]) and torch.equal(held_out[3][0], other[1][3][0])


def test_the_default_task_has_the_most_classes():
    assert load_data("shapes")[2].name == "shapes-shape" and load_data("shapes", task="same")[2].name == "shapes-same"
    assert len(load_data("shapes")[2].class_names) == max(len(t.class_names) for t in TASKS.values())
    assert set(SOURCES) == {"digits", "shapes", *(f"shapes-{t}" for t in TASKS)}


def test_plain_pictures_for_training():
    for load in (load_digits, load_shapes):
        train, held_out, info = load(32, augment=False) if load is load_digits else load(img_size=32, augment=False)
        assert torch.equal(train[0, 3][0], train[7, 3][0]) and train.transform is held_out.transform


def test_load_val_of_a_source():
    held_out, info = load_val("shapes-order")
    assert (len(held_out), info.name, info.img_size) == (500, "shapes-order", 64)
    train, _ = load_val("digits", 16, split="train")
    assert len(train) == 1347 and torch.equal(train[0, 1][0], train[1, 1][0])
    assert len(load_val("digits", 16, split="validation")[0]) == 450
    with pytest.raises(DataError, match="digits has no split 'test': it has train and val"):
        load_val("digits", split="test")


@pytest.mark.parametrize("source,option,takes", [
    ("digits", "crop_pct", "augment"), ("shapes-same", "task", "augment, distance"),
    ("digits", "unreadable", "augment"),
    ("folder", "augment", "auto_augment, .*unreadable")])
def test_an_option_that_a_source_does_not_take(root, source, option, takes):
    where = root if source == "folder" else source
    with pytest.raises(DataError, match=f"{where} takes no option '{option}'. It takes {takes}"):
        load_data(where, 32, **{option: 1})
    with pytest.raises(DataError, match=f"takes no option '{option}'"):
        load_val(where, 32, **{option: 1})


def test_options_reach_the_source(root):
    names = {type(s).__name__ for s in load_data(root, 32, auto_augment=None, re_prob=0)[0].transform.transforms}
    assert not names & {"RandAugment", "RandomErasing"}
    near, far = (load_data("shapes-same", 32, distance=d)[1] for d in (None, 0.4))
    assert not torch.equal(near[0][0], far[0][0])


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
    fig = show_batch(next(iter(make_loaders(train, held_out, 16)[1])), info, n=3)
    assert titles(fig) == [str(int(held_out[i][1])) for i in range(3)]


def test_show_predictions_has_every_mistake_first():
    images, info = TensorDataset(torch.zeros(6, 3, 4, 4), torch.zeros(6)), DataInfo("x", list("abc"), 4)
    said = dict(label=torch.tensor([0, 1, 2, 0, 1, 2]), guess=torch.tensor([0, 2, 2, 0, 0, 2]),
                probability=torch.tensor([0.9, 0.5, 0.6, 0.7, 0.8, 0.4]))
    fig = show_predictions(said, images, info, n=4, ncols=2)
    assert titles(fig) == ["a (80%)\nis b", "c (50%)\nis b", "c (40%)", "c (60%)"]
    assert fig.get_suptitle().startswith("Wrong answers: 2 of 6 images (red), then")
    red = [ax.title.get_color() != "black" for ax in fig.axes]
    assert red == [True, True, False, False]
    assert show_predictions(said, images, info, n=1).get_suptitle().startswith("1 of 2 wrong answers in 6")
    beyond = dict(said, guess=torch.tensor([0, 7, 2, 0, 0, 2]))  # a model may know more classes than the data
    assert "class 7 (50%)\nis b" in titles(show_predictions(beyond, images, info))
    right = dict(said, guess=said["label"])
    assert show_predictions(right, images, info).get_suptitle().startswith("No wrong answer in 6 images")


def test_the_strongest_posterize_is_black():
    "timm asks for 0 bits at its highest level; newer Pillow refuses, in about one image of 500."
    image = Image.fromarray(datasets.load_sample_image("china.jpg")).resize((40, 40))
    assert transforms._posterize(image, 0).getextrema() == ((0, 0),) * 3
    learn, _ = imagenet_transforms(32)
    op = next(o for step in learn.transforms for o in getattr(step, "ops", []) if o.aug_fn is transforms._posterize)
    op.prob = 1
    for magnitude in range(11):
        op.magnitude, op.magnitude_std = magnitude, 0
        op(image)
