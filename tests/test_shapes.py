"""Drawn pictures whose evidence is known: repeatable, balanced, without a short cut, and with a mask that tells the
truth."""
import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from metaformer_edu.data import shapes
from metaformer_edu.data.shapes import (
    SHAPES, Shapes, TASKS, TEXTURES, Thing, arrange, draw_example, render, show_shapes)

pytestmark = pytest.mark.usefixtures("one_thread")
each_task = pytest.mark.parametrize("task", TASKS)
APART = [t for t in TASKS if TASKS[t].distance]
each_apart = pytest.mark.parametrize("task", APART)
each_size = pytest.mark.parametrize("size", [32, 64, 96, 224])


def test_the_tasks():
    assert list(TASKS) == ["texture", "shape", "same", "order"] and APART == ["same", "order"]
    assert [len(t.class_names) for t in TASKS.values()] == [5, 5, 2, 2]


# --- a function of the arguments alone ---

DIGEST = """
import hashlib
import itertools
from metaformer_edu.data.shapes import TASKS, draw_example
h = hashlib.sha256()
for task in TASKS:
    for part in ("train", "val"):
        for i in (0, 1, 17):
            image, mask, label = draw_example(task, i, part, 48)
            h.update(image.tobytes() + mask.tobytes() + bytes([label]))
print(h.hexdigest())
"""


def test_another_process_draws_the_same_bytes():
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True,
                           env=env).stdout.strip()
    scope = {}
    np.random.seed(5)
    torch.manual_seed(5)
    exec(DIGEST.replace("print(", "digest = ("), scope)
    assert there == scope["digest"]


@each_task
def test_no_two_pictures_are_alike(task):
    seen = {hashlib.sha1(draw_example(task, i, part, 32)[0].tobytes()).digest() for part in ("train", "val")
            for i in range(300)}
    laid = {str(arrange(task, i, part)) for part in ("train", "val") for i in range(300)}
    assert len(seen) == len(laid) == 600


@each_task
def test_classes_are_balanced(task):
    for part, n in (("train", 2000), ("val", 500)):
        labels = [arrange(task, i, part)[1] for i in range(n)]
        counts = np.bincount(labels)
        assert len(counts) == len(TASKS[task].class_names) and counts.min() == counts.max()


# --- the label is what it says ---

def test_labels_of_texture_and_shape():
    for i in range(50):
        things, label = arrange("texture", i)
        assert [t.texture for t in things if t.evidence] == [TASKS["texture"].class_names[label]]
        assert sum(t.texture is not None for t in things) == 1 and len(things) == 3
        things, label = arrange("shape", i)
        largest = max(things, key=lambda t: t.radius)
        assert largest.evidence and largest.shape == TASKS["shape"].class_names[label]
        assert all(t.radius < largest.radius / 4 for t in things if t is not largest)


def hue(color):
    return min(shapes.SHAPE_COLORS, key=lambda name: np.abs(np.subtract(shapes.SHAPE_COLORS[name], color)).sum())


def test_labels_of_same():
    for i in range(200):
        things, label = arrange("same", i)
        one, other = (hue(t.color) for t in things if t.evidence)
        assert TASKS["same"].class_names[label] == ("same" if one == other else "different")


def test_labels_of_order_as_the_clock_goes():
    for i in range(200):
        things, label = arrange("order", i)
        at = {hue(t.color): np.array([t.x, t.y]) for t in things if t.evidence}
        centre = sum(at.values()) / 3
        # from 12 o'clock, clockwise
        hour = {name: np.arctan2((p - centre)[0], -(p - centre)[1]) for name, p in at.items()}
        turn = (hour["yellow"] - hour["red"]) % (2 * np.pi)
        assert TASKS["order"].class_names[label] == ("clockwise" if turn < np.pi else "anticlockwise")
        assert set(at) == {"red", "yellow", "blue"}


# --- no short cut ---

def score(model, x, y):
    half = len(y) // 2
    return model.fit(x[:half], y[:half]).score(x[half:], y[half:])


@each_task
def test_mean_colour_says_nothing(task):
    drawn = [draw_example(task, i, img_size=32) for i in range(2000)]
    x = np.array([image.reshape(-1, 3).mean(0) / 255 for image, _, _ in drawn])
    y = np.array([label for *_, label in drawn])
    chance = 1 / len(TASKS[task].class_names)
    assert abs(score(LogisticRegression(C=1e4, max_iter=2000), x, y) - chance) < 0.07
    # how much evidence there is (for `same` a forest may learn colours from the mean: it compares them)
    area = np.array([[mask.mean()] for _, mask, _ in drawn]) * 100
    if task != "shape":  # there, what a mask looks like is the label itself
        assert abs(score(LogisticRegression(max_iter=2000), area, y) - chance) < 0.07


@each_task
def test_paint_and_place_say_nothing(task):
    "Everything in the list of things but shape, texture and the other parts."
    laid = [arrange(task, i) for i in range(3000)]
    first = [[t for t in things if t.evidence][0] for things, _ in laid]
    x = np.array([[t.x, t.y, t.radius, t.angle, *t.color, len(things)] for t, (things, _) in zip(first, laid)])
    chance = 1 / len(TASKS[task].class_names)
    assert abs(score(RandomForestClassifier(50, min_samples_leaf=5, random_state=0), x, [y for _, y in laid])
               - chance) < 0.05


@each_apart
def test_one_part_alone_says_nothing_and_all_together_say_all(task):
    laid = [arrange(task, i) for i in range(2000)]
    y = np.array([label for _, label in laid])
    parts = np.array([[[t.x, t.y, *t.color] for t in things if t.evidence] for things, _ in laid])
    forest = RandomForestClassifier(50, min_samples_leaf=5, random_state=0)
    for k in range(parts.shape[1]):
        assert abs(score(forest, parts[:, k], y) - 0.5) < 0.06
    if task == "same":
        both = (parts[:, 0, 2:] - parts[:, 1, 2:]) ** 2
    else:
        a, b = parts[:, 1, :2] - parts[:, 0, :2], parts[:, 2, :2] - parts[:, 0, :2]
        both = 100 * (a[:, :1] * b[:, 1:] - a[:, 1:] * b[:, :1])
    assert score(LogisticRegression(C=1e3, max_iter=2000), both, y) > 0.99


@each_apart
def test_a_crop_around_one_part_says_nothing(task):
    x, y = [], []
    for i in range(1600):
        things, label = arrange(task, i)
        x.append(render([things[0]], 32)[0].ravel() / 255)
        y.append(label)
    assert abs(score(LogisticRegression(C=0.01, max_iter=500), np.array(x), y) - 0.5) < 0.06


def test_shapes_have_one_area_and_textures_no_mean():
    grid = (np.arange(1600) + 0.5) / 400 - 2
    x, y = grid[None], grid[:, None]
    for name, f in SHAPES.items():
        assert abs((f(x, y) < 0).sum() / 400**2 - np.pi) < 0.01, name
        for rows in np.gradient(f(x + 0 * y, y + 0 * x), 1 / 400):
            assert np.abs(rows).max() < 1.01, name  # a distance: never steeper than one
    wide = np.arange(0, 100, 0.1)
    for name, f in TEXTURES.items():
        waves = f(*np.meshgrid(wide, wide))
        assert abs(np.clip(2 * waves, -1, 1).mean()) < 0.01 and np.clip(2 * waves, -1, 1).std() > 0.5, name


# --- the mask ---

@each_task
@each_size
def test_the_mask_holds_the_evidence_and_nothing_else(task, size):
    for i in range(6):
        things, label = arrange(task, i)
        evidence = [t for t in things if t.evidence]
        image, mask = render(things, size)
        assert (
            image.shape == (size, size, 3)
            and image.dtype == np.uint8
            and mask.shape == (size, size)
            and mask.dtype == bool
        )
        alone, same_mask = render(evidence, size)
        rest, none = render([t for t in things if not t.evidence], size)
        assert (same_mask == mask).all() and not none.any()
        assert (alone[~mask] == 38).all()  # outside, the plain background: no pixel of the evidence
        # and nobody else paints inside
        assert (alone[mask] == image[mask]).all() and (rest[~mask] == image[~mask]).all()
        assert 0.03 < mask.mean() < 0.25 and abs(mask.mean() - sum(np.pi * t.radius**2 for t in evidence)) < 6 / size


@each_task
@each_size
def test_everything_of_the_evidence_is_in_the_picture(task, size):
    for i in range(30):
        things, _ = arrange(task, i)
        mask = render(things, size)[1]
        assert abs(mask.sum()
                   - render([replace(t, x=t.x / 2 + 0.25, y=t.y / 2 + 0.25, radius=t.radius / 2) for t in things],
                                       2 * size)[1].sum()) <= 4  # nothing is cut off by the edge
        image, drawn, _ = draw_example(task, i, img_size=size)
        assert (drawn == mask).all() and image.shape == (size, size, 3)


@each_task
def test_sizes_agree(task):
    for i in range(5):
        small, large = (render(arrange(task, i)[0], s)[0] / 255 for s in (32, 256))
        assert np.abs(large.reshape(32, 8, 32, 8, 3).mean((1, 3)) - small).mean() < 0.012


# --- the distance ---

@each_apart
def test_the_distance_is_kept(task):
    for d in (None, TASKS[task].nearest, 0.45, TASKS[task].farthest):
        for i in range(50):
            things, label = arrange(task, i, distance=d)
            parts = np.array([(t.x, t.y) for t in things if t.evidence])
            apart = np.linalg.norm(parts - np.roll(parts, 1, 0), axis=1)
            np.testing.assert_allclose(apart, d or TASKS[task].distance, atol=1e-9)
            r = things[0].radius
            assert parts.min() > r and parts.max() < 1 - r and label == arrange(task, i)[1] and apart.min() > 2 * r
            assert [t.color for t in things if t.evidence] == [t.color for t in arrange(task, i)[0] if t.evidence]
    # by default, no window of 31 pixels of 64 shows two whole discs
    assert 64 * (TASKS[task].distance + 2 * r) > 31 + 10


def test_mistakes_get_a_sentence():
    for call in (draw_example, arrange):
        with pytest.raises(ValueError, match="There is no task 'shapes'. Did you mean 'shape'"):
            call("shapes", 0)
        with pytest.raises(ValueError, match="There is no part 'vall'. Did you mean 'val'"):
            call("same", 0, "vall")
        with pytest.raises(ValueError, match="'texture' is in one place: it takes no distance"):
            call("texture", 0, distance=0.5)
        with pytest.raises(ValueError, match="'same' stand 0.35 to 0.64 sides apart, not 0.9"):
            call("same", 0, distance=0.9)
    with pytest.raises(ValueError, match="no task 'sam'"):
        Shapes("sam")  # at once, not with the first picture
    with pytest.raises(ValueError, match="no part"):
        Shapes("same", "test")
    with pytest.raises(ValueError, match="no distance"):
        Shapes("shape", distance=0.4)


# --- the data set and the picture ---

@each_task
def test_the_data_set_is_what_is_drawn(task):
    pictures = Shapes(task, "val", 7, 32)
    assert (
        len(pictures) == 7
        and len(list(itertools.islice(pictures, 20))) == 7
        and pictures.class_names == TASKS[task].class_names
    )
    for i in (0, 6, -1):
        image, mask, label = draw_example(task, i % 7, "val", 32)
        x, y = pictures[i]
        assert x.dtype == torch.float32 and 0 <= x.min() < x.max() <= 1 and y == label and isinstance(y, int)
        assert torch.equal((x * 255).round().byte(), torch.from_numpy(image).permute(2, 0, 1))
        assert pictures.mask(i).dtype == torch.bool and torch.equal(pictures.mask(i), torch.from_numpy(mask))
    for use in (pictures.__getitem__, pictures.mask):
        with pytest.raises(IndexError):
            use(7)


def test_colours_textures_and_angles_are_painted():
    plain, _ = render([Thing(0.5, 0.5, 0.3, "square", (1, 0, 0))], 64)
    assert plain[32, 32].tolist() == [255, 0, 0] and plain[0, 0].tolist() == [38] * 3
    striped, _ = render([Thing(0.5, 0.5, 0.3, "square", (0.5, 0.5, 0.5), texture="horizontal")], 64)
    assert np.ptp(striped[32, 24:40]) == 0 and np.ptp(striped[24:40, 32]) > 100
    rising, _ = render([Thing(0.5, 0.5, 0.3, "square", (0.5, 0.5, 0.5), texture="rising")], 64)
    # equal along x + y: from lower left to upper right
    assert (rising[30:34, 30:34, 0] == rising[30:34, 30:34, 0].T).all()
    assert np.ptp(np.diagonal(rising[20:44, 20:44, 0][:, ::-1]).astype(int)) < 10
    square = Thing(0.5, 0.5, 0.3, "square", (1, 0, 0))
    turned, _ = render([replace(square, angle=np.pi / 2)], 64)
    assert (np.abs(turned.astype(int) - plain) <= 1).all()
    turned, _ = render([replace(square, angle=np.pi / 4)], 64)
    assert turned[32, 10].tolist() == [255, 0, 0] and plain[32, 10].tolist() == [38] * 3


def test_show_shapes():
    fig = show_shapes()
    assert [a.get_title() for a in fig.axes[:5]] == list(TEXTURES) and len(fig.axes) == 20
    assert [a.get_ylabel() for a in fig.axes[::5]] == list(TASKS)
    fig = show_shapes("order", n=2, img_size=32, distance=0.4, outline=False)
    assert len(fig.axes) == 2 and not fig.axes[0].collections and fig.axes[0].images[0].get_array().shape == (32, 32, 3)
    assert (fig.axes[1].images[0].get_array() == draw_example("order", 1, img_size=32, distance=0.4)[0]).all()
