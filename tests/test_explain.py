"""CAM explanations: each method by its formula, on ours and on timm's models; a model is left as it was found; what
is drawn."""
import contextlib
import gc
import os
import subprocess
import sys
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import pytorch_grad_cam
import timm
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from PIL import Image
from pytorch_grad_cam import ablation_cam, score_cam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.data import create_transform, resolve_model_data_config
from timm.models import metaformer, resnet
from torch import nn

from metaformer_edu.data.transforms import imagenet_transforms, seeded_rng
from metaformer_edu.interpret.cam import (
    METHODS, cam_grid, class_title, draw_map, explain, find_stage, frozen_eval, imagenet_classes, map_title,
    overlay, stage_modules, to_batch)
from metaformer_edu.models.registry import FAMILIES, create_model
from shaken import ours, shaken

pytestmark = pytest.mark.usefixtures("one_thread")


def timms(name, **kwargs):
    return shaken(timm.create_model, model_name=name, **{"num_classes": 10, **kwargs})


DEIT = dict(img_size=64, depth=8, embed_dim=48, num_heads=3)
SWIN = dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
MAKE = {
    **{family: lambda family=family: ours(family) for family in FAMILIES},
    "resnet": lambda: shaken(resnet.ResNet, block=resnet.BasicBlock, layers=(1, 1, 1, 1), channels=(16, 24, 32, 48),
                             num_classes=10),
    "convnext": lambda: timms("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)),
    "swin": lambda: timms("swin_tiny_patch4_window7_224", **SWIN),
    "deit": lambda: timms("deit_tiny_patch16_224", **DEIT),
    "deit distilled": lambda: timms("deit_tiny_distilled_patch16_224", **DEIT),
    "deit averaged": lambda: timms("deit_tiny_patch16_224", **DEIT, global_pool="avg"),
    "timm's caformer": lambda: shaken(
        metaformer.MetaFormer, num_classes=10, depths=(1, 1, 2, 1), dims=(32, 32, 64, 64), use_mlp_head=True,
        token_mixers=[metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2),
}
PATHS = {"resnet": "layer{0}", "swin": "layers.{1}", "deit": "blocks.{2}.norm1", "deit distilled": "blocks.{2}.norm1",
         "deit averaged": "blocks.{2}"}
BY_GRADIENT = ["gradcam", "gradcam++", "hirescam", "layercam", "xgradcam", "elementwise"]


@cache
def model_of(name):
    return MAKE[name]()


@cache
def exact(name):
    "The model in float64, so that the order of a sum does not matter."
    return MAKE[name]().double()


def images(n=2, h=64, w=None, seed=0):
    return torch.randn(n, 3, h, w or h, generator=torch.Generator().manual_seed(seed))


def end_of(name, model, stage):
    "The module at the end of a stage, by its path."
    return model.get_submodule(PATHS.get(name, "stages.{1}").format(stage, stage - 1, 2 * stage - 1))


def second(name, x, grid):
    "What a stage puts out, with its channels second."
    if "deit" in name:
        return x[:, -grid[0] * grid[1]:].transpose(1, 2).reshape(len(x), -1, *grid)
    return x.permute(0, 3, 1, 2) if name in FAMILIES or name == "swin" else x


def inside(name, model, x, labels, stage):
    "Activations and gradients (B, C, h, w) at the end of a stage, by autograd."
    x, kept, side = x.to(next(model.parameters()).dtype), [], 16 if "deit" in name else 2 ** (stage + 1)
    handle = end_of(name, model, stage).register_forward_hook(lambda module, inputs, out: kept.append(out))
    with torch.enable_grad():
        logits = model(x)
    handle.remove()
    out, = kept
    grad, = torch.autograd.grad(logits[range(len(x)), labels].sum(), out)
    grid = [-(-s // side) for s in x.shape[-2:]]
    return [second(name, v, grid).detach().double() for v in (out, grad)]


def stretched(x):
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low + 1e-12)


def finished(cam, size):
    "From the sum over channels to a map: nothing below 0, enlarged, from 0 to 1."
    return stretched(F.interpolate(stretched(cam.clamp(min=0))[:, None], size, mode="bilinear")[:, 0]).float()


def weights_plus_plus(a, g):
    alpha = g**2 / (2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6)
    return (torch.where(g != 0, alpha, 0) * g.clamp(min=0)).sum((2, 3))


FORMULAS = {
    "gradcam": lambda a, g: (g.mean((2, 3), keepdim=True) * a).sum(1),
    "gradcam++": lambda a, g: (weights_plus_plus(a, g)[..., None, None] * a).sum(1),
    "hirescam": lambda a, g: (g * a).sum(1),
    "layercam": lambda a, g: (g.clamp(min=0) * a).sum(1),
    "xgradcam": lambda a, g: ((g * a / (a.sum((2, 3), keepdim=True) + 1e-7)).sum((2, 3), keepdim=True) * a).sum(1),
    "elementwise": lambda a, g: (g * a).clamp(min=0).sum(1),
}


def close(a, b, atol=5e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- the maps ---

@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MAKE)
def test_grad_cam_is_its_formula_at_every_stage(name, stage):
    model, x, labels = exact(name), images(), [3, 7]
    found = explain(model, x, labels, stage)
    expected = finished(FORMULAS["gradcam"](*inside(name, model, x, labels, stage)), (64, 64))
    close(found.maps, expected)
    assert found.maps.dtype == torch.float32 and found.targets == labels and expected.max() > 0.9
    logits = model(x.double()).detach().float()
    close(found.logits, logits, 1e-5)
    close(found.probabilities, logits.softmax(1), 1e-5)


@pytest.mark.parametrize("method", BY_GRADIENT)
# no norm of each token follows there
@pytest.mark.parametrize("name, stage", [("caformer", 4), ("swin", 3), ("deit", 2)])
def test_methods_of_gradients_are_their_formulas(name, stage, method):
    model, x, labels = exact(name), images(), [0, 9]
    expected = finished(FORMULAS[method](*inside(name, model, x, labels, stage)), (64, 64))
    close(explain(model, x, labels, stage, method).maps, expected)


@pytest.mark.parametrize("name", ["resnet", "convformer", "swin"])
@pytest.mark.parametrize("stage", [2, 4])
def test_the_sign_of_eigengradcam_agrees_with_grad_cam(name, stage):
    model, x, labels = exact(name), images(), [0, 9]
    a, g = (v.double() for v in inside(name, model, x, labels, stage))
    products = (a * g).flatten(2)
    products = products - products.mean(2, keepdim=True)
    compass = (g.mean((2, 3), keepdim=True) * a).sum(1).flatten(1)
    first = torch.linalg.svd(products.transpose(1, 2), full_matrices=False)
    raw = first.U[..., 0] * first.S[:, :1]
    raw = raw * ((raw * (compass - compass.mean(1, keepdim=True))).sum(1, keepdim=True)).sign()
    close(explain(model, x, labels, stage, "eigengradcam").maps, finished(raw.view(a.shape[0], *a.shape[2:]), (64, 64)))



@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"eigencam", "eigengradcam", "ablationcam"}))
@pytest.mark.parametrize("name", ["resnet", "identityformer"])
def test_the_maps_are_those_of_grad_cam(name, method):
    kind = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "hirescam": "HiResCAM", "layercam": "LayerCAM",
            "xgradcam": "XGradCAM",
            "elementwise": "GradCAMElementWise", "scorecam": "ScoreCAM", "random": "RandomCAM"}[method]
    model, x, labels = exact(name), images(), [4, 5]
    with frozen_eval(model):
        for p in model.parameters():
            p.requires_grad_(True)
        last = end_of(name, model, 4)
        cam = getattr(pytorch_grad_cam, kind)(model, [last], reshape_transform=lambda v: second(name, v, None))
        with seeded_rng(0, 0, 0):
            expected = torch.from_numpy(cam(x.double(), [ClassifierOutputTarget(label) for label in labels]))
        cam.activations_and_grads.release()
    with seeded_rng(0, 0, 0):
        close(explain(model, x, labels, 4, method).maps, expected)
    for p in model.parameters():
        p.grad = None


@pytest.mark.parametrize("name", ["resnet", "poolformerv2", "deit"])
def test_eigen_cam_is_the_first_component_and_its_larger_side_is_positive(name):
    model, x = exact(name), images(6)
    a, _ = inside(name, model, x, [0] * 6, 3)
    rows = a.flatten(2).transpose(1, 2)
    rows = rows - rows.mean(1, keepdim=True)
    first = torch.linalg.svd(rows)[2][:, :1].transpose(1, 2)
    cam = (rows @ first).reshape(6, *a.shape[2:])
    cam = cam * torch.where(cam.amax((1, 2)) >= -cam.amin((1, 2)), 1, -1)[:, None, None]
    close(explain(model, x, stage=3, method="eigencam").maps, finished(cam, (64, 64)), 2e-3)


@pytest.mark.parametrize("name, stage",
                         [("caformer", 4), ("randformer", 2), ("resnet", 1), ("swin", 3), ("deit", 2),
                          ("deit averaged", 4),
                                         ("timm's caformer", 1)])
def test_ablation_cam_is_what_happens_without_each_channel(name, stage):
    model, x = exact(name), images(1, seed=5).double()
    logits = model(x)[0].detach()
    labels = [int(logits.argmax()), int(logits.argmin())]
    assert logits.max() > 0 > logits.min()
    a, _ = inside(name, model, x, labels[:1], stage)
    falls, channels_second = [], name in ("resnet", "timm's caformer")
    for c in range(a.shape[1]):
        def without(module, inputs, out):
            out = out.clone()
            out.select(1 if channels_second else -1, c).zero_()
            return out
        handle = end_of(name, model, stage).register_forward_hook(without)
        falls.append(logits[labels] - model(x)[0, labels].detach())
        handle.remove()
    cam = torch.einsum("cb,chw->bhw", torch.stack(falls).double(), a[0])
    close(explain(model, x, labels, stage, "ablationcam").maps, finished(cam, (64, 64)), 2e-3)


def test_score_cam_is_the_answer_to_the_image_behind_each_channel():
    model, x, label = exact("caformer"), images(1).double(), 6
    a, _ = inside("caformer", model, x, [label], 4)
    masks = F.interpolate(a, (64, 64), mode="bilinear", align_corners=True)[0]
    low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
    scores = model(x * ((masks - low) / (high - low + 1e-8))[:, None]).detach()[:, label]
    close(explain(model, x, label, 4, "scorecam").maps,
          finished(torch.einsum("c,chw->hw", scores.softmax(0).double(), a[0])[None], (64, 64)))


def test_random_maps_follow_the_dice():
    def drawn(seed):
        with seeded_rng(seed, 0, 0):
            return explain(model_of("convformer"), images(), method="random").maps
    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("method", METHODS)
def test_none_is_the_guess_by_every_method(method):
    model, x = model_of("caformer"), images(seed=1)
    guess = model(x).argmax(1).tolist()
    with seeded_rng(0, 0, 0):
        free = explain(model, x, None, 4, method)
    with seeded_rng(0, 0, 0):
        asked = explain(model, x, guess, 4, method)
    assert free.targets == asked.targets == guess and torch.equal(free.logits, asked.logits)
    close(free.maps, asked.maps, 1e-5)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"random"}))
@pytest.mark.parametrize("name", ["convformer", "deit"])
def test_a_batch_is_explained_as_its_images_are_one_by_one(name, method):
    model, x, labels = exact(name), images(3), [2, 9, 2]
    together = explain(model, x, labels, 4, method)
    alone = [explain(model, image, label, 4, method) for image, label in zip(x, labels)]
    close(together.maps, torch.cat([one.maps for one in alone]), 2e-3)
    close(together.logits, torch.cat([one.logits for one in alone]), 1e-4)
    assert together.targets == labels and torch.equal(together.images, x)


def test_a_batch_goes_through_the_model_once_and_stops_before_the_stage():
    model, runs = ours(), []
    model.norm.register_forward_hook(lambda module, inputs, out: runs.append(len(out)))
    model.stages[2].register_forward_hook(lambda module, inputs, out: runs.append(out.requires_grad))
    explain(model, images(5), 1, 4)
    assert runs == [False, 5]  # nothing is stored of the earlier stages


@pytest.mark.parametrize("h, w", [(64, 96), (96, 64), (128, 128), (50, 77), (32, 200)])
@pytest.mark.parametrize("name", ["identityformer", "poolformerv2", "caformer", "resnet", "convnext"])
def test_any_height_and_width(name, h, w):
    # at 128 pixels the first stage has 32 channels and 32 by 32 tokens
    model, x = exact(name), images(2, h, w)
    kept = inside(name, model, x, [1, 2], 1)
    close(explain(model, x, [1, 2], 1).maps, finished(FORMULAS["gradcam"](*kept), (h, w)))
    assert explain(model, x, method="hirescam").maps.shape == (2, h, w)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["convformer", "caformer", "resnet", "convnext", "swin", "deit averaged",
                                  "timm's caformer"])
def test_channels_are_second_as_the_model_itself_says(name, stage):
    model, kept = exact(name), []
    if name in ("convnext", "timm's caformer") and tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 20):
        pytest.skip("an older timm numbers its intermediates otherwise, or has none")
    x = images(1, 64 if name in ("swin", "deit averaged") else 128).double()
    end = find_stage(model, stage)
    handle = end.module.register_forward_hook(lambda module, inputs, out: kept.append(out))
    model(x)
    handle.remove()
    which = [2 * stage - 1] if name == "deit averaged" else [stage if name == "resnet" else stage - 1]
    expected, = model.forward_intermediates(x, indices=which, intermediates_only=True)
    close(end.maps(kept[0], x.shape[-2:]), expected.float(), 1e-5)


def test_tokens_of_an_image_that_is_not_square():
    model = timms("deit_tiny_patch16_224", **{**DEIT, "img_size": (32, 96)})
    x = images(2, 32, 96)
    out = model.blocks[3].norm1(model.forward_intermediates(x, indices=[2], intermediates_only=True,
                                                            return_prefix_tokens=False)[0]
                                .flatten(2).transpose(1, 2)).detach()
    end = find_stage(model, 2)
    close(end.maps(torch.cat([out[:, :1], out], 1), (32, 96)), out.transpose(1, 2).reshape(2, 48, 2, 6), 1e-6)
    model = model.double()
    close(explain(model, x, [3, 4], 2).maps,
          finished(FORMULAS["gradcam"](*inside("deit", model, x, [3, 4], 2)), (32, 96)))


def test_stages_are_found_by_what_a_model_says_of_itself():
    assert stage_modules(model_of("convformer")) == [(f"stages.{i}", 4 * 2**i) for i in range(4)]
    assert stage_modules(model_of("resnet")) == [(f"layer{i}", 2 ** (i + 1)) for i in (1, 2, 3, 4)]
    assert stage_modules(model_of("swin")) == [(f"layers.{i}", 4 * 2**i) for i in range(4)]
    assert stage_modules(model_of("deit")) == [(f"blocks.{i}.norm1", 16) for i in (1, 3, 5, 7)]
    assert stage_modules(model_of("deit averaged")) == [(f"blocks.{i}", 16) for i in (1, 3, 5, 7)]
    assert [p for _, p in stage_modules(timm.create_model("efficientnet_b0"))] == [4, 8, 16, 32]
    assert stage_modules(create_model("tiny_caformer", depths=(1, 1, 1), dims=(8, 8, 16), token_mixers="Identity",
                                      norm_layers=nn.LayerNorm,
                                      res_scale_init_values=None))[-1] == ("stages.2", 16)


@pytest.mark.parametrize("name, pixels",
                         [("deit_tiny_patch16_224", 224), ("swin_tiny_patch4_window7_224", 224), ("caformer_s18", 96),
                                          ("resnet50", 96), ("convnext_tiny", 96)])
def test_the_well_known_models_as_they_are(name, pixels):
    shown = explain(timm.create_model(name), images(1, pixels), 281)
    assert (
        shown.maps.shape == (1, pixels, pixels)
        and (shown.maps.amax() > 0.99 or not shown.maps.any())
        and shown.logits.shape == (1, 1000)
    )


# --- what goes in ---

TARGETS = {"one for all": 3, "list": [3, 3], "tuple": (3, 3), "array": np.array([3, 3]), "tensor": torch.tensor([3, 3]),
           "number of NumPy": np.int64(3), "tensor of one": torch.tensor(3),
           "small integers": torch.tensor([3, 3], dtype=torch.uint8)}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_may_be_written_in_many_ways(kind):
    model, x = model_of("convformer"), images()
    shown = explain(model, x, TARGETS[kind])
    assert shown.targets == [3, 3] and all(type(t) is int for t in shown.targets)
    assert torch.equal(shown.maps, explain(model, x, 3).maps)


@pytest.mark.parametrize("method", ["gradcam", "scorecam", "ablationcam"])
def test_several_targets_of_one_image(method):
    model, x = model_of("poolformerv2"), images(1)
    shown = explain(model, x[0], [0, 5, None], 3, method)
    guess = int(model(x).argmax())
    assert (
        shown.targets == [0, 5, guess] and shown.images.shape == (3, 3, 64, 64) and torch.equal(shown.images[2], x[0])
    )
    for i, label in enumerate([0, 5, guess]):
        close(shown.maps[i:i + 1], explain(model, x, label, 3, method).maps, 1e-4)


def test_a_list_of_tensors_is_a_batch_and_the_input_is_not_touched():
    model, x = model_of("convformer"), images().requires_grad_()
    before = x.detach().clone()
    together = explain(model, x, 1)
    assert torch.equal(explain(model, list(x.detach()), 1).maps, together.maps)
    close(explain(model, x[0], 1).maps, together.maps[:1])
    assert x.grad is None and x.requires_grad and torch.equal(x, before)
    assert not together.images.requires_grad and not together.pictures.requires_grad
    together.images.zero_()
    assert torch.equal(x, before)
    strided = images(2, 128)[..., ::2, ::2].to(memory_format=torch.channels_last)
    close(explain(model, strided, 1).maps, explain(model, strided.contiguous(), 1).maps, 1e-4)


@pytest.mark.parametrize("name", ["convformer", "resnet", "swin", "deit"])
def test_a_pil_image_goes_through_the_models_own_transform(name):
    rng = np.random.default_rng(0)
    model, photos = model_of(name), [Image.fromarray(rng.integers(0, 256, (90 - 9 * i, 120, 3), dtype=np.uint8))
                                     for i in range(2)]
    own = {} if name == "resnet" else dict(input_size=(3, 64, 64))  # the others were built for 64 pixels
    transform = (
        imagenet_transforms(64)[1]
        if name in FAMILIES
        else create_transform(**{**resolve_model_data_config(model), **own})
    )
    shown = explain(model, photos, 1)
    expected = torch.stack([transform(p) for p in photos])
    close(shown.images, expected, 1e-6)
    assert torch.equal(shown.maps, explain(model, expected, 1).maps)
    grey = photos[0].convert("L")
    close(explain(model, grey, 1).images[0], transform(grey.convert("RGB")), 1e-6)


def test_a_pil_image_fits_a_model_that_is_not_square():
    model = ours("caformer", img_size=(64, 96))
    assert explain(model, Image.new("RGB", (300, 100)), 1).maps.shape == (1, 64, 96)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels_are_drawn_in_grey(channels):
    model, x = ours(in_chans=channels), torch.randn(2, channels, 64, 64)
    shown = explain(model, x, 1)
    assert shown.pictures.shape == (2, 64, 64, 3) and shown.pictures.min() == 0 and shown.pictures.max() == 1
    assert torch.equal(shown.pictures[..., 0], shown.pictures[..., 2]) and shown.show().axes
    close(shown.pictures[0, ..., 0], stretched(x.mean(1))[0], 1e-5)


@pytest.mark.parametrize("name", ["convformer", "resnet"])
def test_pictures_are_the_images_before_their_normalisation(name):
    model, picture = model_of(name), torch.rand(1, 64, 64, 3)
    mean, std = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    shown = explain(model, ((picture - mean) / std).permute(0, 3, 1, 2), 1)
    close(shown.pictures, picture, 1e-5)


def test_pictures_follow_the_models_own_mean():
    model = timms("resnet18", pretrained_cfg_overlay=dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    close(explain(model, 2 * torch.ones(1, 3, 64, 64) - 1.5, 1).pictures, torch.full((1, 64, 64, 3), 0.75), 1e-6)


BAD = {
    "stage 0": (dict(stage=0), "no stage 0: this MetaFormer has stages 1 to 4"),
    "stage 5": (dict(stage=5), "no stage 5: this MetaFormer has stages 1 to 4"),
    "stage -1": (dict(stage=-1), "no stage -1"),
    "misspelt method": (dict(method="grad-cam"), "no method 'grad-cam'. Did you mean 'gradcam'"),
    "no method": (dict(method=None), "no method None"),
    "class 10 of ten": (dict(target=10), "no class 10: the model has 10, counted from 0"),
    "a class below 0": (dict(target=-1), "no class -1"),
    "one bad class of two": (dict(target=[1, 99]), "no class 99"),
    "three targets": (dict(target=[1, 2, 3]), "3 targets for 2 images"),
    "no target": (dict(target=[]), "0 targets for 2 images"),
    "no image": (dict(image=[]), "PIL images, or tensors"),
    "empty batch": (dict(image=torch.zeros(0, 3, 64, 64)), r"\(0, 3, 64, 64\)"),
    "matrix": (dict(image=torch.zeros(64, 64)), r"\(64, 64\)"),
    "video": (dict(image=torch.zeros(1, 2, 3, 64, 64)), r"\(1, 2, 3, 64, 64\)"),
    "array": (dict(image=np.zeros((64, 64, 3))), "PIL images, or tensors"),
    "path": (dict(image="cat.jpg"), "PIL images, or tensors"),
    "two sizes": (dict(image=[torch.zeros(3, 64, 64), torch.zeros(3, 32, 32)]), "of one size"),
    "four channels": (dict(image=torch.zeros(1, 4, 64, 64)), r"\(B, 3, H, W\)"),
    "not finite": (dict(image=torch.full((1, 3, 64, 64), float("nan"))), "NaN or infinity"),
}


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "ablationcam"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_sentence(what, method):
    change, words = BAD[what]
    with pytest.raises(ValueError, match=words) as caught:
        explain(model_of("convformer"), **{"image": images(), "method": method, **change})
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"


@pytest.mark.parametrize("target", ["cat", 1.5, [[1], [2]], torch.tensor([[1], [2]]), {1}])
def test_what_is_no_class_is_one_sentence(target):
    with pytest.raises(ValueError) as caught:
        explain(model_of("convformer"), images(), target)
    assert "class" in str(caught.value) and "invalid literal" not in str(caught.value)


NO_CLASSIFIER = {
    "no classes": lambda: ours(num_classes=0), "one class": lambda: ours(num_classes=1),
    "no pooling": lambda: ours(global_pool=""),
    "timm's, no classes": lambda: timms("resnet18", num_classes=0),
    "timm's, no pooling": lambda: timms("resnet18", num_classes=0, global_pool=""),
    "features": lambda: timm.create_model("resnet18", features_only=True),
}


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "scorecam"])
@pytest.mark.parametrize("what", NO_CLASSIFIER)
def test_without_a_classifier_there_is_nothing_to_explain(what, method):
    with pytest.raises(ValueError, match="needs a classifier"):
        explain(NO_CLASSIFIER[what](), images(), method=method)


@pytest.mark.parametrize("model", [nn.Identity(), nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 3))])
def test_a_model_that_does_not_name_its_stages(model):
    with pytest.raises(ValueError, match="does not say where its stages end"):
        explain(model, images())


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_that_is_not_finite(method):
    model = ours("identityformer")
    with torch.no_grad():
        model.head.bias[3] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        explain(model, images(1), 2, method=method)


def test_randformer_is_bound_to_its_size():
    with pytest.raises(ValueError):
        explain(model_of("randformer"), images(1, 96))


# --- where nothing speaks for the class ---

@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"eigencam", "scorecam"}))
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_map_is_zero_where_nothing_speaks_for_the_class(method):
    model = ours("identityformer")
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    shown = explain(model, images(1), 4, method=method)
    if method != "random":
        assert not shown.maps.any() and map_title(shown, 0).replace(":", "") == "class 4 10%\nnothing speaks for it"
    assert shown.maps.isfinite().all() and shown.show().axes


# --- the model is left as it was ---

def everything(model):
    "All of a model that could be changed, to be compared."
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
             "_forward_hooks_with_kwargs", "_state_dict_hooks")
    return (
        {n: (id(m), m.training, {h: list(getattr(m, h)) for h in hooks}) for n, m in model.named_modules()},
        {
            n: (
                id(p),
                p.requires_grad,
                id(p.grad),
                p._version,
                None if p.grad is None else p.grad.clone(),
                p._backward_hooks,
            )
            for n, p in model.named_parameters()
        },
        {n: b.clone() for n, b in model.named_buffers()},
    )


def check_untouched(model, before):
    (modules, params, buffers), (modules_before, params_before, buffers_before) = everything(model), before
    assert modules == modules_before and list(modules) == list(modules_before)
    for name, (*facts, grad, hooks) in params.items():
        *facts_before, grad_before, hooks_before = params_before[name]
        assert facts == facts_before and hooks == hooks_before, name
        assert (grad is None) == (grad_before is None) and (grad is None or torch.equal(grad, grad_before)), name
    assert all(torch.equal(b, buffers_before[n]) for n, b in buffers.items())


def in_use(name):
    """A model in the middle of a training: some parts frozen, some in eval mode, gradients here and there, hooks of
    the user."""
    model = MAKE[name]().train()
    children = list(model.children())
    children[0].eval()
    children[-1].train()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i) if i % 3 == 0 else None
        p.requires_grad_(i % 2 == 0)
    model.calls = []
    end_of(name, model, 2).register_forward_hook(lambda *args: model.calls.append("forward") and None)
    return model


@pytest.mark.parametrize("stage", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_modes_gradients_and_hooks_are_left_as_found(method, stage):
    model = in_use("caformer")
    before = everything(model)
    explain(model, images(), [1, 2], stage, method)
    check_untouched(model, before)


@pytest.mark.parametrize("name", ["resnet", "swin", "deit", "convnext"])
@pytest.mark.parametrize("method", ["gradcam", "ablationcam"])
def test_timms_models_are_left_as_found(name, method):
    model = in_use(name)
    before = everything(model)
    found = explain(model, images(), [1, 2], 2, method)
    check_untouched(model, before)
    assert model.calls
    close(found.maps, explain(model_of(name), images(), [1, 2], 2, method).maps, 1e-4)  # in eval mode it says the same


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method, nth",
                         [("gradcam", 1), ("eigencam", 1),
                          *((m, n) for m in ("scorecam", "ablationcam") for n in (1, 2, 3))])
def test_the_model_is_left_as_found_after_an_error(method, nth, error):
    model, runs = in_use("caformer"), []
    def stop(*_):
        runs.append(1)
        if len(runs) == nth:
            raise error("in the middle")
    model.norm.register_forward_hook(stop)
    before = everything(model)
    with pytest.raises(error, match="in the middle"):
        explain(model, images(), 1, 3, method)
    check_untouched(model, before)
    assert ablation_cam.tqdm.__name__ == score_cam.tqdm.__name__ == "tqdm"  # the bars are back


@pytest.mark.parametrize("change",
                         [dict(target=10), dict(target=[1, 99]), dict(stage=9), dict(method="x"),
                          dict(target=[1, 2, 3])])
@pytest.mark.parametrize("method", ["gradcam", "ablationcam", "scorecam", "eigencam"])
def test_the_model_is_left_as_found_after_a_wrong_wish(method, change):
    model = in_use("convformer")
    before = everything(model)
    with pytest.raises(ValueError):
        explain(model, **{"image": images(), "method": method, **change})
    check_untouched(model, before)


def test_frozen_parameters_keep_their_gradients():
    model = ours()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.requires_grad_(False)
    before = everything(model)
    explain(model, images(), 1)
    check_untouched(model, before)


def test_the_state_of_the_dice_is_left_as_found():
    model = ours("caformer", drop_path=0.5, head_dropout=0.5).train()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    explain(model, images(), 1)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_dropout_does_not_count_in_train_mode():
    quiet, loud = ours("caformer"), ours("caformer", drop_path=0.9, head_dropout=0.9).train()
    loud.load_state_dict(quiet.state_dict())
    assert torch.equal(explain(quiet, images(), 2).maps, explain(loud, images(), 2).maps) and loud.training


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", ["gradcam", "ablationcam", "eigencam"])
def test_frozen_models_and_callers_without_gradients(within, method):
    expected = explain(model_of("convformer"), images(), [1, 2], 3, method).maps
    model = ours().requires_grad_(False)
    with within():
        shown = explain(model, images(), [1, 2], 3, method)
        assert torch.is_grad_enabled() is (within is torch.enable_grad) and torch.is_inference_mode_enabled() is (
            within is torch.inference_mode
        )
        close(shown.maps, expected, 1e-6)
        assert shown.show().axes
    assert not any(p.requires_grad for p in model.parameters())
    for values in (shown.maps, shown.logits, shown.images, shown.pictures):
        assert not values.requires_grad and values.device.type == "cpu"


def test_images_made_in_inference_mode():
    with torch.inference_mode():
        x = images() + 0
    assert x.is_inference()
    close(explain(model_of("caformer"), x, 1).maps, explain(model_of("caformer"), images(), 1).maps, 0)


def test_between_forward_and_backward_of_the_caller():
    def step(look):
        model, x = ours("caformer").train(), images()
        loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
        if look:
            for method in ("gradcam", "ablationcam"):
                explain(model, images(seed=3), stage=2, method=method)
        loss.backward()
        return [p.grad for p in model.parameters()]
    plain, looked = step(False), step(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, looked))


def test_gradients_go_on_adding_up():
    model = ours()
    model(images()).sum().backward()
    grads = [p.grad for p in model.parameters()]
    before = [g.clone() for g in grads]
    explain(model, images(seed=4), 3)
    model(images()).sum().backward()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
    for g, b in zip(grads, before):
        torch.testing.assert_close(g, 2 * b)


def test_the_running_statistics_of_a_resnet_stay():
    model = timms("resnet18").train()
    before = everything(model)
    explain(model, images(), 1)
    check_untouched(model, before)


@pytest.mark.parametrize("name", ["convformer", "resnet", "deit"])
def test_a_model_that_computes_again_instead_of_storing(name):
    model = MAKE[name]()
    plain = explain(model, images(), 1, 2).maps
    model.set_grad_checkpointing()
    close(explain(model.train(), images(), 1, 2).maps, plain, 1e-5)
    loss = model(images()).sum()
    explain(model, images(), 1, 2)
    loss.backward()


@pytest.mark.parametrize("name", ["convformer", "resnet", "deit"])
@pytest.mark.parametrize("fails", [False, True])
def test_checkpointing_is_off_inside_and_given_back(name, fails):
    model = MAKE[name]()
    model.set_grad_checkpointing()
    def switches():
        return {n: m.grad_checkpointing for n, m in model.named_modules() if hasattr(m, "grad_checkpointing")}
    before = switches()
    assert any(before.values())
    with contextlib.suppress(ZeroDivisionError), frozen_eval(model):
        assert not any(switches().values())
        if fails:
            raise ZeroDivisionError
    assert switches() == before
    explain(model, images(), 1, 2)
    assert switches() == before


@pytest.mark.parametrize("name", ["caformer", "resnet"])
def test_low_precision(name):
    label = int(model_of(name)(images(1)).argmax())
    exact = explain(model_of(name), images(1), label, 3)
    rounded = explain(MAKE[name]().bfloat16(), images(1), label, 3)
    with torch.autocast("cpu", torch.bfloat16):
        auto = explain(model_of(name), images(1), label, 3)
    double = explain(MAKE[name]().double(), images(1).double(), label, 3)
    close(double.maps, exact.maps, 1e-3)
    for shown in (rounded, auto):
        assert (
            shown.maps.dtype == shown.logits.dtype == torch.float32
            and shown.maps.isfinite().all()
            and shown.show().axes
        )
        assert np.corrcoef(shown.maps.flatten(), exact.maps.flatten())[0, 1] > 0.9


class Wrapped(nn.Module):
    def __init__(self, model, name):
        super().__init__()
        setattr(self, name, model)
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: Wrapped(m, "module"), lambda m: Wrapped(m, "_orig_mod"),
                                  torch.compile,
                                  lambda m: Wrapped(Wrapped(m, "_orig_mod"), "module"),
                                  lambda m: Wrapped(Wrapped(m, "module"), "_orig_mod")])
def test_wrappers_are_looked_through(wrap):
    model = model_of("convformer")
    assert torch.equal(explain(wrap(model), images(), 1).maps, explain(model, images(), 1).maps)


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "ablationcam"])
def test_memory_does_not_grow(method):
    model, x = ours("identityformer", img_size=32), images(1, 32)
    def after(n):
        for i in range(n):
            explain(model, x, i % 10, 4, method)
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), sys.getallocatedblocks()
    n = 20 if method == "ablationcam" else 60
    tensors, blocks = after(n // 2)
    more_tensors, more_blocks = after(n)
    # what one call made and kept would be several blocks
    assert more_tensors <= tensors and more_blocks - blocks < 2 * n
    assert not any(m._forward_hooks for m in model.modules())


def test_no_bar_is_shown_and_the_bars_are_back(capfd):
    for method in ("scorecam", "ablationcam"):
        explain(model_of("identityformer"), images(), 1, method=method)
    assert capfd.readouterr() == ("", "")
    assert ablation_cam.tqdm.__name__ == score_cam.tqdm.__name__ == "tqdm"


def test_methods_are_known_without_grad_cam():
    code = """if True:
        import sys
        from metaformer_edu.interpret import cam, faithfulness
        assert list(cam.METHODS) == ["gradcam", "gradcam++", "hirescam", "layercam", "xgradcam", "elementwise",
                                     "eigengradcam", "eigencam", "scorecam", "ablationcam", "random"]
        assert not {"pytorch_grad_cam", "sklearn", "cv2"} & sys.modules.keys()"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- names and pictures ---

def test_names_of_classes():
    assert (
        imagenet_classes(1000)[0] == "tench"
        and imagenet_classes(1000)[281] == "tabby"
        and len(imagenet_classes(21841)) == 21841
    )
    assert imagenet_classes(10) is None
    assert (
        class_title(281, 1000) == "tabby" and class_title(3, 10) == "class 3" and class_title(1, 10, ["a", "b"]) == "b"
    )
    assert class_title(2, 10, ["a", "b"]) == "class 2" and class_title(0, 10, ["x" * 40]) == "x" * 22
    assert len(imagenet_classes(1000)) == 1000


def test_a_headline_names_class_and_probability():
    shown = explain(model_of("convformer"), images(), [2, None])
    for i in range(2):
        assert (
            map_title(shown, i).split("\n")[0].replace(":", "")
            == f"class {shown.targets[i]} {shown.probabilities[i, shown.targets[i]]:.0%}"
        )
    assert map_title(shown, 0, "abcdefghij").replace(":", "").startswith("c ")


def test_the_blend_of_picture_and_map():
    picture, heat = np.zeros((2, 2, 3)), np.array([[0, 1], [0.5, 0]])
    picture[0, 0], picture[1, 1] = (1, 0, 0), (0, 1, 0)
    mixed = overlay(torch.tensor(picture), torch.tensor(heat))
    assert (
        mixed.shape == (2, 2, 3)
        and mixed[0, 0] == pytest.approx([0.299] * 3)
        and mixed[1, 1] == pytest.approx([0.587] * 3)
    )
    assert mixed[0, 1] == pytest.approx(0.75 * np.array(plt.get_cmap("viridis")(1.0)[:3]))
    assert mixed[1, 0] == pytest.approx(0.375 * np.array(plt.get_cmap("viridis")(0.5)[:3]), abs=0.01)


def test_a_map_has_a_line_at_half_and_an_outline_of_the_evidence():
    heat, mask = torch.zeros(8, 8), torch.zeros(8, 8)
    heat[2:5, 2:5], mask[5:7, 5:7] = 1, 1
    fig, ax = plt.subplots()
    draw_map(ax, torch.zeros(8, 8, 3), heat, "title", mask)
    half, outline = ax.collections
    assert ax.get_title() == "title" and list(half.levels) == list(outline.levels) == [0.5] and not len(ax.get_xticks())
    assert to_rgb(half.get_edgecolor()) == (0, 0, 0) and to_rgb(outline.get_edgecolor()) == (1, 1, 1)
    plt.close(fig)
    fig, ax = plt.subplots()
    draw_map(ax, torch.zeros(8, 8, 3), torch.zeros(8, 8))
    assert not ax.collections and not ax.get_title()
    plt.close(fig)


def panels(fig):
    return [ax for ax in fig.axes if ax.images]


@pytest.mark.parametrize("n, columns", [(1, 1), (2, 2), (3, 3), (4, 3), (7, 3)])
def test_an_explanation_shows_each_image_with_its_map(n, columns):
    shown = explain(model_of("convformer"), images(n), 3)
    before = plt.get_fignums()
    fig = shown.show(list("abcdefghij"))
    drawn = panels(fig)
    assert len(drawn) == 2 * n and plt.get_fignums() == before and len(fig.axes) == 2 * columns * -(-n // columns) + 1
    for i in range(n):
        assert np.array_equal(drawn[2 * i].images[0].get_array(), shown.pictures[i])
        assert np.allclose(drawn[2 * i + 1].images[0].get_array(), overlay(shown.pictures[i], shown.maps[i]))
        assert drawn[2 * i + 1].get_title() == map_title(shown, i, list("abcdefghij"))
    assert [t.get_text() for t in fig.axes[-1].get_yticklabels()] == ["least", "half", "most"]
    masked = shown.show(masks=torch.ones(n, 64, 64).triu())
    assert sum(len(ax.collections) for ax in panels(masked)) == n + sum(len(ax.collections) for ax in drawn)


def test_a_notebook_draws_an_explanation_by_itself():
    shown = explain(model_of("convformer"), images(2), [3, 4])
    assert shown._repr_png_().startswith(b"\x89PNG") and repr(shown) == "Explanation of 2 maps, classes [3, 4]"


def test_the_figure_of_the_paper():
    models = {"first": model_of("convformer"), "second": model_of("resnet"), "third": model_of("deit")}
    fig = cam_grid(images(2), models, target=[3, 4], stage=3, method="hirescam",
                   class_names=[f"n{i}" for i in range(10)])
    drawn = panels(fig)
    assert len(drawn) == 2 * 4 and len(fig.axes) == 9
    for column, (name, model) in enumerate(models.items(), 1):
        shown = explain(model, images(2), [3, 4], 3, "hirescam")
        for row in range(2):
            ax = drawn[4 * row + column]
            assert np.allclose(ax.images[0].get_array(), overlay(shown.pictures[row], shown.maps[row]), atol=1e-3)
            assert ax.get_title() == f"{name}\n" * (row == 0) + map_title(shown, row, [f"n{i}" for i in range(10)])
    assert np.allclose(drawn[0].images[0].get_array(), shown.pictures[0])


def test_the_figure_of_the_paper_from_a_list_of_models_and_photographs():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8))
    fig = cam_grid([photo, photo], [model_of("convformer"), ours("caformer", img_size=96)])
    titles = [ax.get_title().split("\n")[0] for ax in panels(fig)]
    assert len(titles) == 6 and titles[1] == "tiny_convformer" and titles[2] == "tiny_caformer"
    assert [ax.images[0].get_array().shape[0] for ax in panels(fig)[1:3]] == [64, 96]


def test_two_models_of_one_kind_are_two_columns():
    assert len(panels(cam_grid(images(1), [ours(), ours(num_classes=5)]))) == 3


def test_a_figure_of_no_model_is_one_sentence():
    for none in ([], {}):
        with pytest.raises(ValueError):
            cam_grid(images(1), none)


def test_a_dollar_in_a_name_is_a_dollar():
    names = ["$x_$ y"] * 10
    shown = explain(model_of("convformer"), images(1), 1)
    for fig in (shown.show(names), cam_grid(images(1), {"$y_$": model_of("convformer")}, class_names=names)):
        fig.savefig(os.devnull, format="png")


def test_one_image_or_several():
    model = model_of("convformer")
    assert to_batch(torch.zeros(3, 8, 8), model).shape == (1, 3, 8, 8) and to_batch(
        (torch.zeros(3, 8, 8),) * 2, model
    ).shape == (2, 3, 8, 8)
    assert to_batch(Image.new("RGB", (99, 70)), model).shape == (1, 3, 64, 64)
