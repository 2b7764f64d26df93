"""Maps from the middle of a model are those of the whole; a cache runs a model once an image; the explorer of maps."""
import datetime
import io
import random
import re

import ipywidgets as W
import numpy as np
import pytest
import timm
import torch
import yaml
from matplotlib.colors import to_hex
from PIL import Image
from torch import nn

from metaformer_edu.core.errors import DataError, WeightsError
from metaformer_edu.core.figures import INK, SERIES
from metaformer_edu.data.photographs import load_photographs
from metaformer_edu.data.transforms import seeded_rng
from metaformer_edu.interpret.cam import METHODS, explain, imagenet_classes, to_batch
from metaformer_edu.models.metaformer import MetaFormer
from metaformer_edu.models.registry import FAMILIES, create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.widgets.base import Explorer, to_svg
from metaformer_edu.widgets.cam_explorer import (
    CAM_TRIES, ExplanationCache, GUESS, cam_controls, can_reuse_tokens, class_options, default_stage, draw_cam,
    explore_cam, map_correlation, open_models, peak_position, resume_from_stage, stage_tokens, view_cam)
from metaformer_edu.widgets import sources
from metaformer_edu.widgets.sources import ImagePicker, example_images
from shaken import ours, shaken

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = 120  # seconds, after which something hangs
CUT = [method for method in METHODS if method != "scorecam"]
NAMES = ["zebra", "Ant", "bee", "cat"]


def three_stages(**kwargs):
    return shaken(MetaFormer, depths=(1, 1, 1), dims=(8, 16, 16), res_scale_init_values=None,
                  **{"num_classes": 4, "img_size": 64, **kwargs})


TIMM = {
    "convnext": lambda **kw: shaken(timm.create_model, model_name="convnext_atto", pretrained=False,
                                    depths=(1, 1, 2, 1), dims=(16, 24, 32, 48), **kw),
    "deit": lambda **kw: shaken(timm.create_model, model_name="deit_tiny_patch16_224", pretrained=False, img_size=64,
                                depth=8, embed_dim=48, num_heads=3, **kw),
}


def photo(seed=0, size=(64, 64)):
    pixels = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).resize(size, Image.BICUBIC)


def same(a, b):
    return (
        torch.equal(a.maps, b.maps)
        and torch.equal(a.logits, b.logits)
        and torch.equal(a.pictures, b.pictures)
        and a.targets == b.targets
    )


# --- a model that begins in the middle ---

@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tail_is_the_whole_model_to_the_last_bit(family, stage):
    model, x = ours(family), to_batch(photo(), ours(family))
    tail = resume_from_stage(model, stage, stage_tokens(model, x)[stage - 1])
    with torch.no_grad():
        assert torch.equal(tail(x), model(x))
        torch.testing.assert_close(tail(torch.randn(2, 3, 64, 64)), model(x).expand(2, -1))  # whatever comes in
    seen = []
    for method in CUT:
        for target in (None, 7):
            found = []
            for m in (tail, model):
                with seeded_rng(0, 0, 0):
                    found.append(explain(m, x, target, stage, method))
            assert same(*found), (method, target)
            seen.append(found[0].maps.max().item())
    assert sum(top > 0.5 for top in seen) > len(seen) / 2  # so that there is something to compare


@pytest.mark.parametrize("stage", [1, 4])
def test_a_tail_is_the_whole_model_for_any_size_and_for_three_stages(stage):
    for model, size in ((ours("caformer", img_size=(64, 96)), (96, 64)), (three_stages(), (64, 64))):
        if stage <= len(model.stages):
            x = to_batch(photo(1, size), model)
            tail = resume_from_stage(model, stage, stage_tokens(model, x)[stage - 1])
            assert same(explain(tail, x, 3, stage), explain(model, x, 3, stage)) and tuple(x.shape[-2:]) == size[::-1]


def state_of(model):
    "All that an explanation could leave behind."
    modules = [(name, id(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks),
                list(m._modules)) for name, m in model.named_modules()]
    return modules, [
        (name, id(p), p._version, p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    ]


def unchanged(before, after):
    return before[0] == after[0] and all(
        a[:4] == b[:4] and (a[4] is b[4] or torch.equal(a[4], b[4])) for a, b in zip(before[1], after[1], strict=True)
    )


def test_a_tail_shares_the_weights_and_leaves_the_model():
    model = ours("caformer")
    x = to_batch(photo(), model)
    before, keys, answer, tokens = state_of(model), list(model.state_dict()), model(x), stage_tokens(model, x)
    for stage in (1, 2, 3, 4):
        tail = resume_from_stage(model, stage, tokens[stage - 1])
        own = dict(model.named_parameters())
        assert type(tail) is type(model) and all(p is own[name] for name, p in tail.named_parameters())
        assert {name for name, _ in tail.named_parameters()} == {
            name
            for name in own
            if re.match(r"norm|head", name)
            or re.match(r"(stages|downsample_layers)\.(\d)", name)
            and int(name.split(".")[1]) >= stage
        }
        assert (
            len(tail.stages) == len(tail.downsample_layers) == 4 and tail.stages[stage - 1].tokens is tokens[stage - 1]
        )
    assert unchanged(before, state_of(model)) and list(model.state_dict()) == keys and torch.equal(model(x), answer)
    with torch.no_grad():
        model.head.fc2.bias += 1
        torch.testing.assert_close(tail(x), answer + 1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [lambda: ours("caformer", drop_path=0.3), lambda: ours("randformer"),
                                  TIMM["convnext"]])
def test_a_cache_leaves_the_model_as_it_was(make, training):
    model = make().train(training)
    first, second = list(model.parameters())[:2]
    first.grad = torch.ones_like(first)
    second.requires_grad_(False)
    model.stages[0].train(not training)
    handle = model.stages[2].register_forward_hook(lambda *_: None)
    before, cache = state_of(model), ExplanationCache(model)
    for method in ("gradcam", "eigencam", "ablationcam", "scorecam"):
        cache.explain(photo(), 1, 4, method)
    for wrong in (dict(target=10_000), dict(stage=5), dict(method="magic")):
        with pytest.raises(ValueError):
            cache.explain(photo(), **wrong)
    assert unchanged(before, state_of(model))
    with torch.inference_mode():
        assert cache.explain(photo(3), 1).maps.isfinite().all()
    assert unchanged(before, state_of(model))
    handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_what_the_stages_put_out(family):
    model, found = ours(family, drop_path=0.5), []
    hooks = [stage.register_forward_hook(lambda module, inputs, out: found.append(out)) for stage in model.stages]
    x = to_batch(photo(), model)
    model(x)
    for hook in hooks:
        hook.remove()
    tokens = stage_tokens(model.train(), x)
    assert (
        model.training
        and len(tokens) == 4
        and all(torch.equal(a, b) and not a.requires_grad for a, b in zip(tokens, found))
    )


def test_what_can_begin_later():
    assert [method for method in METHODS if can_reuse_tokens(ours(), method)] == CUT
    theirs = TIMM["convnext"]()
    assert (
        not any(can_reuse_tokens(theirs, method) for method in METHODS)
        and stage_tokens(theirs, torch.zeros(1, 3, 64, 64)) is None
    )


# --- a cache ---

def counted(model):
    "Runs of the stem, in images."
    runs = []
    model.get_submodule("downsample_layers.0" if isinstance(model, MetaFormer)
                        else "stem").register_forward_hook(lambda m, inputs, out: runs.append(len(out)))
    return runs


def test_a_cache_runs_the_model_once_for_an_image():
    model = ours("caformer")
    runs, cache, image = counted(model), ExplanationCache(model), photo()
    for target in (None, 0, 7):
        for stage in (4, 1, 3):
            for method in ("gradcam", "layercam", "ablationcam", "eigencam"):
                cache.explain(image, target, stage, method)
    assert runs == [1]
    cache.explain(photo(1))  # two images that look the same
    cache.explain(photo(1))
    assert runs == [1, 1, 1]
    cache.explain(image, 5)
    assert len(runs) == 3
    cache.explain(image, 5, method="scorecam")
    assert sum(runs) > 3 + 64
    asked = len(runs)
    cache.explain(image, 5, method="scorecam")
    cache.explain(image, 0, 3, "layercam")
    assert len(runs) == asked


def test_maps_are_kept_each_for_its_question():
    cache, image = ExplanationCache(ours("convformer")), photo()
    questions = [(target, stage, method) for target in (None, 0, 9) for stage in (2, 4)
                 for method in ("gradcam", "eigencam", "random")]
    found = {q: cache.explain(image, *q) for q in questions}
    assert all(cache.explain(image, *q) is shown for q, shown in found.items()) and len(
        {id(shown) for shown in found.values()}
    ) == len(questions)
    assert not torch.equal(found[0, 4, "gradcam"].maps, found[9, 4, "gradcam"].maps) and found[
        0, 4, "gradcam"
    ].targets == [0]
    assert not torch.equal(found[0, 4, "gradcam"].maps, found[0, 2, "gradcam"].maps)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_explains_as_explain_does(family):
    model, image = ours(family), photo(5, (90, 70))
    cache = ExplanationCache(model)
    for target, stage, method in ((None, 4, "gradcam"), (3, 1, "layercam"), (3, 2, "scorecam"),
                                  (np.int64(2), 3, "eigencam"), (0, 4, "ablationcam")):
        assert same(cache.explain(image, target, stage, method), explain(model, image, target, stage, method))
    assert cache.stages == 4 and cache.classes == 10 and default_stage(cache) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cache_of_a_model_of_another_precision(dtype):
    model, image = ours("poolformerv2").to(dtype), photo()
    found, expected = ExplanationCache(model).explain(image, 3, 3), explain(model, image, 3, 3)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(found.maps, expected.maps, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
    assert found.maps.dtype == torch.float32 and tuple(found.pictures.shape) == (1, 64, 64, 3)


def test_the_image_seen_longest_ago_is_forgotten():
    model = ours("identityformer")
    runs, cache, (a, b, c) = counted(model), ExplanationCache(model, most=2), map(photo, range(3))
    for image, expected in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (c, 3), (b, 4), (c, 4), (a, 5)):
        cache.explain(image)
        assert len(runs) == expected and len(cache.images) <= 2
    assert list(cache.images) == [id(c), id(a)]


def test_eight_images_are_kept():
    model = ours("identityformer")
    runs, cache, images = counted(model), ExplanationCache(model), [photo(i) for i in range(9)]
    for image in images[:8] * 2:
        cache.explain(image)
    assert len(runs) == 8
    cache.explain(images[8])
    cache.explain(images[1])
    assert len(runs) == 9 and len(cache.images) == 8
    cache.explain(images[0])
    assert len(runs) == 10


@pytest.mark.parametrize("most", [1, 8])
def test_an_image_that_is_gone_is_not_taken_for_another(most):
    "Python gives the id of what is gone to what comes next."
    model = ours("identityformer")
    cache, seen = ExplanationCache(model, most=most), set()
    for seed in range(12):
        image = photo(seed)
        seen.add(id(image))
        with torch.no_grad():
            expected = model(to_batch(image, model))
        torch.testing.assert_close(cache.explain(image).logits, expected)
        assert all(key == id(kept["image"]) for key, kept in cache.images.items())
        del image
    assert len(seen) >= min(most, 12)


def test_a_failed_question_leaves_the_cache_usable():
    model = ours("caformer")
    runs, cache, image = counted(model), ExplanationCache(model), photo()
    for wrong, says in ((dict(target=10), "There is no class 10"), (dict(target=-1), "There is no class -1"),
                        (dict(stage=0), "There is no stage 0"),
                        (dict(stage=5), "stages 1 to 4"), (dict(method="gradcan"), "Did you mean 'gradcam'"),
                        (dict(target="cat"), "given by its number")):
        with pytest.raises(ValueError, match=says):
            cache.explain(image, **wrong)
    asked = len(runs)
    assert same(cache.explain(image, 2), explain(ours("caformer"), image, 2)) and len(runs) == asked


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm_are_explained_and_their_maps_kept(name):
    model, image = TIMM[name](num_classes=10), photo(0, (80, 70))
    cache = ExplanationCache(model)
    assert cache.stages == 4 and cache.classes == 10 and default_stage(cache) == 4
    for question in ((None, 4, "gradcam"), (3, 2, "layercam"), (3, 2, "eigencam")):
        found = cache.explain(image, *question)
        assert same(found, explain(model, image, *question)) and cache.explain(image, *question) is found
    assert cache.entry(image)["tokens"] is None
    with pytest.raises(ValueError, match="There is no stage 5"):
        cache.explain(image, stage=5)


@pytest.mark.parametrize("make", [
    lambda: ours("convformer", num_classes=0), lambda: TIMM["convnext"](num_classes=0),
    lambda: ours("convformer", num_classes=1),
    lambda: timm.create_model("convnext_atto", features_only=True, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
    lambda: timm.create_model("edu_tiny_caformer", features_only=True)])
def test_what_gives_features_is_refused(make):
    with pytest.raises(ValueError, match="An explanation needs a classifier"):
        ExplanationCache(make())


@pytest.mark.parametrize("model", [nn.Linear(3, 3), 5, None, [ours()]])
def test_what_is_no_model_with_stages_is_refused(model):
    with pytest.raises(ValueError, match="does not say where its stages end"):
        ExplanationCache(model)


def test_a_wrapped_model_is_unwrapped():
    model = ours("identityformer")
    assert ExplanationCache(nn.DataParallel(model)).model is model


@pytest.mark.parametrize("size, stage",
                         [(32, 2), (64, 3), (127, 3), (128, 4), (224, 4), ((64, 256), 3), (16, 1), (8, 1)])
def test_the_good_stage_has_a_few_tokens(size, stage):
    assert default_stage(ExplanationCache(create_model("tiny_identityformer", img_size=size))) == stage


@pytest.mark.parametrize("size", [128, 224])
def test_the_good_stage_is_a_stage_of_the_model(size):
    cache = ExplanationCache(three_stages(img_size=size))
    assert default_stage(cache) == cache.stages == 3
    assert explore_cam(cache.model, photo())["stage"].value == 3


# --- what is drawn and said ---

def spot(row, column, size=9):
    heat = torch.zeros(size, size)
    heat[row, column] = 1
    return heat


@pytest.mark.parametrize("row, column, where", [
    (0, 0, "at the top left"), (0, 4, "at the top centre"), (2, 8, "at the top right"), (3, 0, "at the middle left"),
    (4, 4, "in the middle"),
    (3, 3, "in the middle"), (5, 5, "in the middle"), (5, 6, "at the middle right"), (6, 2, "at the bottom left"),
    (8, 3, "at the bottom centre"), (8, 8, "at the bottom right")])
def test_the_place_of_the_greatest_value(row, column, where):
    assert (
        peak_position(spot(row, column))
        == peak_position(spot(row, column) * 0.01)
        == peak_position(0.2 + spot(row, column))
        == where
    )


def test_places_of_maps_of_other_shapes():
    assert peak_position(torch.zeros(9, 9)) == "nowhere" and peak_position(torch.ones(9, 9)) == "at the top left"
    heat = torch.zeros(4, 100)
    heat[3, 99] = 1
    assert peak_position(heat) == "at the bottom right" and peak_position(heat.T) == "at the bottom right"
    assert peak_position(torch.ones(1, 1)) == "at the top left" and peak_position(spot(1, 1, 2)) == "in the middle"
    for size in (2, 3, 7, 64, 224):
        assert peak_position(spot(size - 1, 0, size)).endswith("left") and peak_position(
            spot(0, size - 1, size)
        ).startswith("at the top")


def test_the_likeness_is_the_correlation():
    a, b = (torch.rand(7, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    expected = np.corrcoef(a.flatten(), b.flatten())[0, 1]
    assert (
        abs(map_correlation(a, b) - expected) < 1e-6
        and abs(map_correlation(b, a) - expected) < 1e-6
        and type(map_correlation(a, b)) is float
    )
    assert abs(map_correlation(a, 3 * a + 1) - 1) < 1e-6 and abs(map_correlation(a, 1 - a) + 1) < 1e-6
    assert map_correlation(a, torch.ones(7, 5)) == map_correlation(torch.zeros(7, 5), a) == 0


def test_without_contrast_there_is_nothing_to_compare():
    "Two maps in which nothing speaks for a class do not show that a method ignores classes."
    assert map_correlation(torch.zeros(4, 4),
                           torch.zeros(4, 4)) == map_correlation(torch.ones(4, 4), torch.ones(4, 4)) == 0


def test_words_and_facts():
    model, image = ours("caformer", num_classes=4), photo()
    cache = ExplanationCache(model)
    probabilities = explain(model, image).probabilities[0]
    guess = int(probabilities.argmax())
    other = (guess + 1) % 4
    shown = view_cam(cache, "mine", image, GUESS, 3, "gradcam", 0.5, NAMES)
    where = peak_position(explain(model, image, guess, 3).maps[0])
    said = f"{NAMES[guess]} ({probabilities[guess]:.0%})"
    assert (
        shown.words == f"mine says {said}. gradcam at stage 3: most of what speaks for {said} is {where}; drawn at 50%."
    )
    assert (
        shown.facts == dict(guess=guess, label=guess, likeness=pytest.approx(1, abs=1e-5))
        and view_cam(cache, "mine", image, guess, 3, "gradcam", 0.5, NAMES).words == shown.words
    )
    shown = view_cam(cache, "mine", image, other, 2, "layercam", 0.5, NAMES)
    maps = explain(model, image, [other, guess], 2, "layercam").maps
    likeness = map_correlation(*maps)
    assert shown.figure.axes[0].get_title() == "mine, layercam, stage 2"
    assert shown.facts == dict(guess=guess, label=other, likeness=pytest.approx(likeness, abs=1e-4))
    assert shown.words == (
        f"mine says {said}. layercam at stage 2: most of what speaks for {NAMES[other]} ({probabilities[other]:.0%}) "
        f"is {peak_position(maps[0])}; drawn at 50%."
        f" The likeness to the map of its guess is {likeness:.2f}."
    )


def test_words_without_names():
    n = 10
    words = view_cam(ExplanationCache(ours("convformer")), "m", photo(), 3, 4, "gradcam", 1.).words
    assert re.search(r"speaks for class 3 \(\d+%\) is ", words), words
    model = ours("identityformer", num_classes=1000)
    n, words = imagenet_classes(1000)[3], view_cam(ExplanationCache(model), "m", photo(), 3, 4, "gradcam", 1.).words
    assert f"speaks for {n} (" in words


def texts(fig):
    return [t.get_text() for t in fig.axes[2].texts]


@pytest.mark.parametrize("target", [0, 1, 2, 3])
def test_the_drawing(target):
    model, image = ours("caformer", num_classes=4), photo(2, (90, 60))
    shown = explain(model, image, target)
    fig = draw_cam(shown, 0.5, NAMES)
    left, middle, right = fig.axes
    np.testing.assert_array_equal(left.images[0].get_array(), shown.pictures[0])
    assert middle.get_title() == f"speaks for {NAMES[target]}" and left.get_title() == "the image as the model gets it"
    order = shown.probabilities[0].argsort(descending=True).tolist()
    assert texts(fig) == [f"{shown.probabilities[0, i]:4.0%}  {NAMES[i]}" for i in order]
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], shown.probabilities[0][order], rtol=1e-6)
    # an outline, for those who see no colours
    assert [bar.get_linewidth() > 0 for bar in right.patches] == [i == target for i in order]
    assert [to_hex(bar.get_facecolor()) for bar in right.patches] == [
        SERIES[0] if i == target else SERIES[5] for i in order
    ]
    assert {to_hex(bar.get_edgecolor()) for bar in right.patches} == {INK} and {
        bar.get_facecolor()[3] for bar in right.patches
    } == {0.5}
    assert draw_cam(shown, 0.5, NAMES, "$mine").axes[0].get_title() == "$mine"
    assert {t.get_color() for t in right.texts} == {INK}


def test_the_strength_of_the_map():
    shown = explain(ours("caformer"), photo(), 2, 3)
    none, some, full = (draw_cam(shown, s).axes[1].images[0].get_array() for s in (0., 0.5, 1.))
    grey = np.asarray(shown.pictures[0]) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(none, grey[..., None].repeat(3, 2), atol=1e-6)
    np.testing.assert_allclose(some, (none + full) / 2, atol=1e-6)
    assert abs(full - none).max() > 0.2
    row, column = divmod(int(shown.maps[0].argmax()), 64)
    np.testing.assert_allclose(full[row, column], [0.993248, 0.906157, 0.143936], atol=0.02)  # viridis' end


@pytest.mark.parametrize("n, shown", [(2, 2), (4, 4), (5, 5), (12, 5)])
def test_at_most_five_classes_are_drawn(n, shown):
    model = ours("identityformer", num_classes=n)
    fig = draw_cam(explain(model, photo()))
    assert len(texts(fig)) == len(fig.axes[2].patches) == shown
    assert all(re.fullmatch(r" *\d+%  class \d+", t) for t in texts(fig))


def test_names_with_dollars_are_drawn_as_they_are():
    names = ["$5 and $6", r"$\nonsense{$", "<b>&", "a_b^c"]
    fig = draw_cam(explain(ours("identityformer", num_classes=4), photo(), 1), 0.5, names)
    svg = to_svg(fig)
    assert (
        "$5 and $6" in svg
        and r"$\nonsense{$" in svg
        and "&lt;b&gt;&amp;" in svg
        and fig.axes[1].get_title() == rf"speaks for {names[1]}"
    )


def test_the_drawing_has_no_colour_of_its_own_but_those_of_data():
    svg = re.sub(r'"data:[^"]*"', "", to_svg(draw_cam(explain(ours("identityformer"), photo()))))
    assert INK not in svg and "#ffffff" not in svg and set(re.findall("#[0-9a-f]{6}", svg)) <= {SERIES[0], SERIES[5]}


# --- controls ---

def test_classes_to_choose_from():
    assert class_options(3) == [("its guess", GUESS), ("class 0", 0), ("class 1", 1), ("class 2", 2)]
    assert [label for _, label in class_options(12)] == [GUESS, *range(12)]
    assert class_options(4, NAMES) == [("its guess", GUESS), ("Ant", 1), ("bee", 2), ("cat", 3), ("zebra", 0)]
    assert class_options(3, ["bee", "Cat", "ant"])[1:] == [("ant", 2), ("bee", 0), ("Cat", 1)]
    assert GUESS not in range(100_000)


def test_the_classes_of_imagenet_are_in_the_order_of_their_names():
    first, *rest = class_options(1000)
    assert first == ("its guess", GUESS) and sorted(label for _, label in rest) == list(range(1000))
    assert all(name == imagenet_classes(1000)[label] for name, label in rest)
    assert [name.lower() for name, _ in rest] == sorted(name.lower() for name, _ in rest)


def test_of_very_many_classes_there_are_some():
    first, *rest = class_options(21841)
    assert first == ("its guess", GUESS) and len(rest) >= 1000 and len({label for _, label in rest}) == len(rest)
    assert all(name == imagenet_classes(21841)[label] for name, label in rest)


def test_many_classes_without_names_are_in_order():
    assert [label for _, label in class_options(1500)][:12] == [GUESS, *range(11)]


def controls_of(**models):
    return cam_controls({name: (ExplanationCache(m), names) for name, (m, names) in models.items()},
                        ImagePicker({"a": photo()}))


def test_the_controls_of_maps():
    controls = controls_of(one=(ours("caformer"), None))
    assert list(controls) == ["model", "image", "target", "stage", "method", "strength"] and all(
        c.description for k, c in controls.items() if k != "image"
    )
    assert (
        list(controls["stage"].options) == [1, 2, 3, 4]
        and controls["stage"].value == 3
        and controls["target"].value == GUESS
    )
    assert (
        list(controls["method"].options) == list(METHODS)
        and controls["method"].value == "gradcam"
        and list(controls["model"].options) == ["one"]
    )
    assert list(controls["target"].options) == class_options(10)
    assert (controls["strength"].min, controls["strength"].max, controls["strength"].value) == (0, 1, 0.75)
    assert all(isinstance(c, W.Widget) for c in controls.values())


def test_classes_and_stages_follow_the_model():
    controls = controls_of(ten=(ours("caformer"), None), four=(ours("convformer", num_classes=4), NAMES),
                           named=(ours("convformer", num_classes=4), NAMES[::-1]),
                           three=(three_stages(), NAMES))
    controls["target"].value, controls["stage"].value = 9, 4
    controls["model"].value = "four"
    assert (
        list(controls["target"].options) == class_options(4, NAMES)
        and controls["target"].value == GUESS
        and controls["stage"].value == 4
    )
    controls["target"].value = 2
    controls["model"].value = "three"  # the same classes, fewer stages
    assert (
        list(controls["stage"].options) == [1, 2, 3] and controls["target"].value == 2 and controls["stage"].value == 3
    )
    controls["model"].value = "named"  # as many classes, with other names
    assert (
        list(controls["target"].options) == class_options(4, NAMES[::-1])
        and controls["target"].value == GUESS
        and list(controls["stage"].options) == [1, 2, 3, 4]
    )
    controls["model"].value = "ten"
    assert list(controls["target"].options) == class_options(10)


# --- the explorer ---

@pytest.fixture
def folder(tmp_path):
    "A run of four classes as metaformer-train leaves it."
    path = tmp_path / "my run"
    path.mkdir()
    save_weights(ours("poolformerv2", num_classes=4), path / "best.safetensors")
    (path / "args.yaml").write_text(yaml.safe_dump(dict(settings=dict(model="tiny_poolformerv2"), img_size=64,
                                                        class_names=NAMES)))
    return path


def test_models_may_be_given_in_many_ways(folder):
    model = ours("identityformer", num_classes=4)

    def opened(*args):
        return {name: (cache.model, names) for name, (cache, names) in open_models(*args).items()}
    assert opened(model) == {"MetaFormer": (model, None)} and opened(model, NAMES) == {"MetaFormer": (model, NAMES)}
    assert opened({"a": model, 3: model}, range(4)) == {name: (model, ["0", "1", "2", "3"]) for name in ("a", "3")}
    assert opened(nn.DataParallel(model)) == {"MetaFormer": (model, None)}
    for path in (folder, str(folder), f"{folder}/"):
        (name, (found, names)), = opened(path, ["not", "these"]).items()
        assert name == "my run" and names == NAMES and found.num_classes == 4 and not found.training
    found = opened({"theirs": model, "run": folder}, "abcd")
    assert found["theirs"] == (model, list("abcd")) and found["run"][1] == NAMES
    (network, (_, names)), *runs = open_models(None).items()
    assert network == "EfficientNet-Lite0" and names is None
    assert [family for family, _ in runs] == list(FAMILIES) and all(len(names) == 5 for _, (_, names) in runs)


@pytest.mark.parametrize("kwargs, error, says", [
    (dict(model={}), ValueError, "Give at least one model"),
    (dict(model=5), ValueError, "int does not say where its stages end"),
    (dict(model="nowhere"), ValueError, "nowhere is no folder of a run"),
    (dict(model={"a": "nowhere"}), ValueError, "nowhere is no folder of a run"),
    (dict(model=nn.Linear(2, 2)), ValueError, "Linear does not say"),
    (dict(model=ours("identityformer", num_classes=0)), ValueError, "needs a classifier"),
    (dict(images=[]), ValueError, "Give images as"), (dict(images=5), ValueError, "Give images as"),
    (dict(images=torch.zeros(1, 5, 5)), ValueError, "An image is"),
    (dict(images="nothing.png"), DataError, "nothing.png")])
def test_what_cannot_be_explored_is_refused_in_a_sentence(kwargs, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says) as caught:
        explore_cam(**{"model": ours("identityformer"), "images": photo(), **kwargs})
    assert "\n" not in str(caught.value)


def test_a_run_without_weights_cannot_be_explored(folder):
    (folder / "best.safetensors").unlink()
    with pytest.raises(WeightsError, match="There is no weight file"):
        explore_cam(folder, photo())


@pytest.mark.parametrize("names", [["a", "b"], list("abcdefghijk")])
def test_names_that_do_not_fit_are_refused(names):
    with pytest.raises(ValueError, match=f"{len(names)}.* 10") as caught:
        explore_cam({"mine": ours("identityformer")}, photo(), names)
    assert "mine" in str(caught.value)


def test_a_wrapped_model_may_have_names():
    assert list(explore_cam(nn.DataParallel(ours("identityformer", num_classes=4)), photo(),
                            NAMES)["target"].options) == class_options(4, NAMES)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), 5])
def test_what_is_no_model_is_refused_also_with_names(model):
    with pytest.raises(ValueError, match="does not say where its stages end|classes"):
        explore_cam(model, photo(), NAMES)


@pytest.mark.parametrize("names", [range(10), np.array(list("abcdefghij")), dict(enumerate("abcdefghij")).values()])
def test_names_may_be_anything_that_can_be_listed(names):
    assert dict(explore_cam(ours("identityformer"), photo(), names)["target"].options)[str(list(names)[3])] == 3


@pytest.fixture
def explorer():
    e = explore_cam({"ten": ours("caformer"), "four": ours("convformer", num_classes=4), "three": three_stages()},
                    {"first": photo(0), "second": photo(1)})
    yield e
    assert e.wait(LONG)


def test_the_explorer_opens_computed(explorer):
    e = explorer
    guess = explain(ours("caformer"), photo(0)).targets[0]
    assert (
        isinstance(e, Explorer)
        and e.words.startswith(f"ten says class {guess} (")
        and e.value.startswith("<svg")
        and e.done == [False] * 3
    )
    assert e.values() == dict(model="ten", image=e["image"].images["first"], target=GUESS, stage=3, method="gradcam",
                              strength=0.75)
    assert e.shown.facts == dict(guess=guess, label=guess, likeness=pytest.approx(1, abs=1e-5), own=False)
    assert [sentence for sentence, _ in e.picture.tries] == [sentence for sentence, _ in CAM_TRIES]


def test_every_control_changes_the_picture(explorer):
    e, seen = explorer, {explorer.value}
    for name, value in dict(strength=0.2, stage=2, method="layercam", target=(e.shown.facts["guess"] + 1) % 10,
                            model="four").items():
        e[name].value = value
        assert e.wait(LONG) and e.value not in seen, name
        seen.add(e.value)
    words = e.words
    e["image"].names.value = "second"
    assert e.wait(LONG) and e.value not in seen and e.words != words
    assert e["model"].value == "four" and e["target"].value == GUESS and e["stage"].value == 2


def test_what_is_said_is_what_explain_finds(explorer):
    e = explorer
    e["target"].value, e["stage"].value, e["method"].value, e["image"].names.value = 7, 4, "layercam", "second"
    assert e.wait(LONG)
    image = e["image"].value
    expected = explain(ours("caformer"), image, 7, 4, "layercam")
    assert (
        f"layercam at stage 4: most of what speaks for class 7 ({expected.probabilities[0, 7]:.0%}) is "
        f"{peak_position(expected.maps[0])};"
        in e.words
    )
    np.testing.assert_array_equal(e.figure(strength=1.).axes[0].images[0].get_array(), expected.pictures[0])
    fig = e.figure(target=2)
    assert fig.axes[1].get_title() == "speaks for class 2" and e["target"].value == 7


def test_a_model_that_lacks_the_class_and_the_stage(explorer):
    e = explorer
    e["target"].value, e["stage"].value = 9, 4
    assert e.wait(LONG) and "class 9" in e.words
    e["model"].value = "three"
    assert e.wait(LONG) and e["target"].value == GUESS and e["stage"].value == 3
    guess = explain(three_stages(), photo(0), None, 3).targets[0]
    assert e.words.startswith(f"three says class {guess} (") and f"at stage {e['stage'].value}:" in e.words
    e["target"].value = 3
    assert e.wait(LONG) and "class 3" in e.words
    e["model"].value = "four"
    assert (
        e.wait(LONG) and e["target"].value == 3 and e.words.startswith("four says") and "speaks for class 3" in e.words
    )
    e["model"].value = "ten"
    assert e.wait(LONG) and e["target"].value == GUESS and e.words.startswith("ten says")


def test_hasty_hands(explorer):
    e, chance = explorer, random.Random(0)
    for _ in range(60):
        name = chance.choice(["model", "target", "stage", "method", "strength"])
        options = (
            [m for m in CUT if m != "ablationcam"]
            if name == "method"
            else [0.25, 0.5, 0.75]
            if name == "strength"
            else [o[1] if isinstance(o, tuple) else o for o in e[name].options]
        )
        e[name].value = chance.choice(options)
    assert (
        e.wait(LONG)
        and e.words.startswith(f"{e['model'].value} says class")
        and f"{e['method'].value} at stage {e['stage'].value}:" in e.words
    )
    assert not e.busy


def upload(picker, name, image):
    image.save(file := io.BytesIO(), format="PNG")
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    picker.take(dict(new=(dict(name=name, type="image/png", size=1, last_modified=when,
                               content=memoryview(file.getvalue())),)))


def test_what_to_try_is_ticked(explorer):
    e = explorer
    other = (e.shown.facts["guess"] + 1) % 10
    e["method"].value = "eigencam"
    assert e.wait(LONG) and e.done == [False, False, False]
    e["method"].value = "gradcam"
    assert e.wait(LONG)
    e["target"].value = e.shown.facts["guess"]
    assert e.wait(LONG) and e.done == [False, False, False]
    e["target"].value = other
    assert e.wait(LONG) and e.done == [True, False, False] and "likeness" in e.words
    e["method"].value = "eigencam"
    assert e.wait(LONG) and e.done == [True, True, False] and e.words.endswith("is 1.00.")
    e["image"].names.value = "second"
    assert e.wait(LONG) and e.done == [True, True, False]
    upload(e["image"], "mine.png", photo(3, (100, 80)))
    assert e.wait(LONG) and e.done == [True, True, True] and e.shown.facts["own"] is True
    e["image"].names.value = "first"
    assert e.wait(LONG) and e.shown.facts["own"] is False and e.done == [True] * 3
    e["image"].names.value = "mine.png"
    assert e.wait(LONG) and e.shown.facts["own"] is True


def test_an_image_of_ones_own_may_have_the_name_of_a_given_one(explorer):
    upload(explorer["image"], "first", photo(3))
    assert explorer.wait(LONG) and explorer.shown.facts["own"] is True and explorer.done[2]


def test_a_model_whose_answer_is_not_finite_gives_a_sentence(explorer):
    broken = ours("identityformer")
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    e = explore_cam({"good": ours("identityformer"), "broken": broken}, photo())
    good = e.value
    e["model"].value = "broken"
    assert e.wait(LONG) and e.value == good and "NaN or infinity" in e.words
    e["model"].value = "good"
    assert e.wait(LONG) and e.words.startswith("good says")


def test_a_run_is_explored_with_its_names(folder):
    e = explore_cam(folder, photo())
    assert e.words.startswith("my run says ") and list(e["target"].options) == class_options(4, NAMES)
    e["target"].value = 0
    assert e.wait(LONG) and "speaks for zebra (" in e.words and ">speaks for zebra</text>" in e.value


def test_names_are_used_for_a_model_without_its_own():
    e = explore_cam(ours("identityformer", num_classes=4), photo(), NAMES)
    assert (
        any(name in e.words for name in NAMES)
        and list(e["target"].options) == class_options(4, NAMES)
        and e["model"].value == "MetaFormer"
    )


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm_are_explored(name):
    model = TIMM[name](num_classes=4)
    e = explore_cam(model, photo(), NAMES)
    assert e["stage"].value == 4 and e["model"].value == type(model).__name__
    before = e.value
    e["stage"].value = 2
    assert e.wait(LONG) and e.value != before and "at stage 2" in e.words


def test_images_are_taken_by_their_names(tmp_path):
    photo(0).save(tmp_path / "cat.png")
    model = ours("identityformer")
    assert list(explore_cam(model, tmp_path / "cat.png")["image"].images) == ["cat.png"]
    assert list(explore_cam(model, [photo(), torch.rand(3, 20, 20)])["image"].images) == ["image 1", "image 2"]
    assert set(explore_cam(model)["image"].images) == set(example_images())


def test_it_opens_without_arguments():
    e = explore_cam()
    assert list(e["model"].options) == ["EfficientNet-Lite0", *FAMILIES] and e["stage"].value == 4
    assert set(e["image"].images) == {*load_photographs(), *example_images()} - {"china"}  # which is the pagoda
    assert e.wait(LONG) and e.words.startswith("EfficientNet-Lite0 says tiger cat")
    for family in FAMILIES:
        e["model"].value = family
        assert e.wait(LONG) and e.words.startswith(f"{family} says ")
    assert [name for name, _ in e["target"].options] == ["its guess", "cross", "disc", "ring", "square", "triangle"]


def test_it_opens_without_the_packages_of_the_photographs(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    sources.photograph_examples.cache_clear()
    e = explore_cam()
    assert list(e["model"].options) == list(FAMILIES) and set(e["image"].images) == set(example_images())
    sources.photograph_examples.cache_clear()


def test_a_photograph_is_shown_to_a_model_that_has_never_seen_one():
    e = explore_cam()
    e["image"].names.value = "pagoda"
    assert e.wait(LONG) and e.value.startswith("<svg") and not e.done[2]
