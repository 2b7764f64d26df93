"""Measures of maps: each against a case whose answer is known, and against an independent computation."""
import copy

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirst, ROADMostRelevantFirst
from torch import nn

from metaformer_edu.interpret.cam import explain
from metaformer_edu.interpret.faithfulness import (
    area, deletion, insertion, parts_from_top, perturbation_curve, pointing, random_maps, randomisation,
    rank_correlation, rank_pixels, road, share_inside, shuffled_copy)
from metaformer_edu.models.registry import create_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Corner(nn.Module):
    "Says class 1 as surely as the upper left quarter is bright; class 0 otherwise."
    feature_info = [dict(module="conv", num_chs=3, reduction=4), dict(module="pool", num_chs=3, reduction=8)]

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.scale = nn.Identity(), nn.Identity(), nn.Parameter(torch.tensor(4.))

    def forward(self, x):
        x = self.pool(self.conv(x))
        h, w = (side // 2 for side in x.shape[-2:])
        return torch.stack([torch.zeros(len(x)), self.scale * x[:, :, :h, :w].mean((1, 2, 3))], 1)


def shown(maps, images, targets):
    logits = torch.zeros(len(images), 2)
    from metaformer_edu.interpret.cam import Explanation
    return Explanation(maps, images, logits, targets, images.permute(0, 2, 3, 1))


@pytest.fixture
def corner():
    "A map of the evidence, one of all the rest, and the image."
    on = torch.zeros(1, 16, 16)
    on[:, :8, :8] = 1
    return on, 1 - on, torch.ones(1, 3, 16, 16)


# --- against masks ---

def test_pointing_counts_the_share_of_equal_greatest_values():
    maps, masks = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:, :2] = True
    maps[0, 0, 0], maps[1, 3, 3] = 1, 1
    maps[2, 1, 1] = maps[2, 2, 2] = maps[2, 3, 0] = maps[2, 0, 3] = 0.5
    assert pointing(maps, masks).tolist() == [1, 0, 0.5]


def test_an_empty_map_points_nowhere_and_has_no_share():
    empty, mask = torch.zeros(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    assert pointing(empty, mask) == 0 and share_inside(empty, mask) == 0


def test_share_inside_is_a_quotient_of_sums():
    maps, masks = torch.rand(5, 7, 9), torch.rand(5, 7, 9) > 0.6
    for found, m, k in zip(share_inside(maps, masks), maps, masks):
        assert found.item() == pytest.approx(m[k].sum().item() / m.sum().item(), abs=1e-6)


def test_random_maps_know_nothing_and_repeat():
    maps = random_maps(400, (24, 36), cells=6)
    assert maps.shape == (400, 24, 36) and 0 <= maps.min() and maps.max() <= 1
    assert torch.equal(maps, random_maps(400, (24, 36), cells=6)) and not torch.equal(
        maps, random_maps(400, (24, 36), cells=6, seed=1)
    )
    left = torch.zeros(400, 24, 36, dtype=torch.bool)
    left[..., :18] = True
    assert abs(share_inside(maps, left).mean() - 0.5) < 0.02 and abs(pointing(maps, left).mean() - 0.5) < 0.1


def test_random_maps_leave_the_callers_dice_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    random_maps(2, (8, 8))
    rank_pixels(torch.zeros(1, 4, 4))
    assert torch.equal(torch.rand(1), expected)


# --- order of the pixels ---

def test_ranks_keep_the_order_and_have_no_ties():
    maps = torch.randint(0, 4, (3, 6, 5)).float()
    found = rank_pixels(maps)
    for m, r in zip(maps.flatten(1), found.flatten(1)):
        assert sorted((29 * r).round().int().tolist()) == list(range(30)) and r.min() == 0 and r.max() == 1
        order = r.argsort()
        assert (m[order].diff() >= 0).all()


def test_equal_pixels_come_in_an_order_that_has_nothing_to_do_with_their_place():
    places = rank_pixels(torch.zeros(1, 40, 40)).flatten()
    assert abs(np.corrcoef(places, np.arange(1600))[0, 1]) < 0.1
    assert torch.equal(places, rank_pixels(torch.zeros(1, 40, 40)).flatten()) and not torch.equal(
        places, rank_pixels(torch.zeros(1, 40, 40), seed=1).flatten()
    )


# --- asking the model ---

def test_deletion_falls_early_for_the_true_map_and_late_for_its_opposite(corner):
    on, off, images = corner
    true, false = (deletion(Corner(), shown(m, images, [1]), steps=8)[0] for m in (on, off))
    start, end = torch.tensor(4.).sigmoid(), 0.5
    # the first quarter of the pixels is the evidence
    assert true[0] == pytest.approx(start) and true[-1] == end and true[2] == end
    assert false[-3] == pytest.approx(start) and false[-1] == end
    assert area(true[None]) < area(false[None]) - 0.2


def test_insertion_rises_early_for_the_true_map(corner):
    on, off, images = corner
    images = images.clone()
    images[..., 8:] = images[..., 8:, :] = -1
    true, false = (insertion(Corner(), shown(m, images, [1]), steps=8)[0] for m in (on, off))
    assert (
        true[2] == pytest.approx(true[-1])
        and true[-1] == pytest.approx(torch.tensor(4.0).sigmoid())
        and false[2] < true[2] - 0.01
    )
    assert area(true[None]) > area(false[None])


def test_the_curve_exchanges_exactly_the_pixels_that_its_step_says():
    counts = []

    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            counts.append(x[:, 0].flatten(1).sum(1).tolist())
            return torch.zeros(len(x), 2)
    curve = perturbation_curve(Count(), torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.rand(2, 8, 8), [0, 1],
                               steps=4)
    assert counts == [[n, n] for n in (0, 16, 32, 48, 64)] and curve.shape == (2, 5) and (curve == 0.5).all()


def test_area_is_that_of_trapezoids():
    assert (
        area(torch.tensor([[0.0, 1], [1, 1]])).tolist() == [0.5, 1]
        and area(torch.tensor([[0.0, 0.5, 1, 0.5, 0]])).item() == 0.5
    )


def test_road_prefers_the_true_map_and_equals_grad_cams_own_where_nothing_is_tied(corner):
    on, off, images = corner
    images = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    images[..., :8, :8] += 0.5
    model = Corner()
    true, false = (road(model, shown(m, images, [1])).item() for m in (on, off))
    assert true > false + 0.05
    maps, targets = rank_pixels(on), [lambda logits: logits.softmax(-1)[1]]
    torch.manual_seed(0)
    least = np.mean([ROADLeastRelevantFirst(p)(images, maps.numpy(), targets, model) for p in (20, 40, 60, 80)])
    most = np.mean([ROADMostRelevantFirst(p)(images, maps.numpy(), targets, model) for p in (20, 40, 60, 80)])
    assert true == pytest.approx((least - most) / 2, abs=1e-6)


@pytest.mark.parametrize("measure", [deletion, insertion, road])
def test_a_measure_leaves_model_and_dice_as_they_were(measure, corner):
    model = create_model("tiny_poolformerv2", num_classes=2, img_size=32, drop_path=0.5).train()
    x = torch.randn(2, 3, 32, 32)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = measure(model, shown(torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0)), x, [0, 1]))
    assert torch.equal(torch.rand(1), expected)
    second = measure(model, shown(torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0)), x, [0, 1]))
    assert torch.equal(first, second) and model.training  # drop path was off
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, (p for p in model.parameters() if p.grad is not None)))


# --- models that have learned nothing ---

@pytest.mark.parametrize("name", ["tiny_convformer", "tiny_caformer", "tiny_randformer"])
def test_the_parts_of_our_models_are_head_and_stages_from_the_top(name):
    model = create_model(name)
    parts = parts_from_top(model)
    assert list(parts) == ["head", "stage 4", "stage 3", "stage 2", "stage 1"]
    assert sum(p.numel() for ps in parts.values() for p in ps) == sum(p.numel() for p in model.parameters())
    assert {id(p) for p in parts["stage 3"]} == {
        id(p) for m in (model.stages[2], model.downsample_layers[2]) for p in m.parameters()
    }
    assert {id(p) for p in parts["head"]} == {id(p) for m in (model.norm, model.head) for p in m.parameters()}


@pytest.mark.parametrize("name, first, last, n",
                         [("resnet18", "head", "stem", 6), ("convnext_atto", "head", "stem", 6),
                          ("deit_tiny_patch16_224", "head", "stem", 14)])
def test_the_parts_of_timms_models(name, first, last, n):
    model = timm.create_model(name, num_classes=3)
    parts = parts_from_top(model)
    assert (list(parts)[0], list(parts)[-1], len(parts)) == (first, last, n)
    assert sum(len(ps) for ps in parts.values()) == len(list(model.parameters()))


def test_shuffling_keeps_the_values_and_the_original():
    model = create_model("tiny_randformer", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    other = shuffled_copy(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    moved = 0
    for k, v in other.state_dict().items():
        assert torch.equal(v.flatten().sort().values, before[k].flatten().sort().values), k
        moved += not torch.equal(v, before[k])
    assert moved > 15 and torch.equal(shuffled_copy(model).head.weight, other.head.weight)
    assert not torch.equal(shuffled_copy(model, seed=1).head.weight, other.head.weight)


def test_randomisation_goes_from_the_top_and_ends_with_everything():
    model = create_model("tiny_convformer", num_classes=3, img_size=64)
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    rows = randomisation(model, x, [0, 1], stage=2)
    assert [r["shuffled"] for r in rows] == ["nothing", "head", "+ stage 4", "+ stage 3", "+ stage 2", "+ stage 1"]
    assert (
        rows[0]["correlation"] == 1
        and all(-1 <= r["correlation"] <= 1 for r in rows)
        and abs(rows[-1]["correlation"]) < 0.9
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_map_of_the_activations_alone_does_not_mind_a_shuffled_head():
    model = create_model("tiny_convformer", num_classes=3, img_size=64)
    rows = randomisation(model, torch.randn(2, 3, 64, 64), 0, stage=2, method="eigencam")
    # stages 3 and 4 lie behind the map
    assert [r["correlation"] for r in rows[:4]] == [1, 1, 1, 1] and rows[-1]["correlation"] < 1


def test_likeness_is_spearmans():
    a = torch.rand(1, 6, 6)
    assert rank_correlation(a, a.exp()).item() == pytest.approx(1) and rank_correlation(a, -a).item() == pytest.approx(
        -1
    )
    b = torch.rand(1, 6, 6)
    expected = np.corrcoef(a.flatten().argsort().argsort(), b.flatten().argsort().argsort())[0, 1]
    assert rank_correlation(a, b).item() == pytest.approx(expected)
    assert rank_correlation(torch.ones(1, 6, 6), a).item() == 0 == rank_correlation(a, torch.zeros(1, 6, 6)).item()


def test_the_measures_take_what_explain_gives():
    model = create_model("tiny_caformer", num_classes=3, img_size=64)
    found = explain(model, torch.randn(2, 3, 64, 64), stage=2)
    assert deletion(model, found, steps=4).shape == insertion(model, found, steps=4).shape == (2, 5) and road(
        model, found, (50,)
    ).shape == (2,)
    assert deletion(model, found,
                    steps=4)[:, 0].tolist() == pytest.approx([found.probabilities[i, t].item()
                                                              for i, t in enumerate(found.targets)], abs=1e-5)
