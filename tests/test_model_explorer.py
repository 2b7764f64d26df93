"""Anatomy: counted exactly, seen exactly, legal values only, and nothing drawn over anything else."""
import itertools

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from metaformer_edu.core.basics import count_macs, count_params
from metaformer_edu.models.layers import LayerNormWithoutBias
from metaformer_edu.models.metaformer import grid_sizes
from metaformer_edu.models.mixers import MIXERS
from metaformer_edu.models.registry import FAMILIES, MODELS, create_model, get_row
from metaformer_edu.widgets.base import Shown, dropdown
from metaformer_edu.widgets.model_explorer import (
    Anatomy, MODEL_TRIES, PART_KINDS, RESOLUTIONS, anatomy, anatomy_text, count_mixer, count_rest, draw_anatomy,
    explore_model, follow_family, model_name, own_mixers, receptive_rows, signed_change, sizes_of, swap_costs,
    swap_words, view_model, window_steps)

SWAPS = [("SepConv", "RandomMixing", "Pooling", "Identity"), ("Attention",) * 4, ("RandomMixing",) * 4, "Pooling",
         ("Identity", "Attention", "SepConv", "RandomMixing")]


def sums(a):
    return a.total("params"), a.total("frozen"), a.total("macs")


# --- counted exactly ---

@pytest.mark.parametrize("name", MODELS)
def test_parts_sum_to_the_published_model(name):
    row = get_row(name)
    assert sums(anatomy(name)) == (*row.params, row.macs)


@pytest.mark.parametrize("mixers", SWAPS, ids=str)
@pytest.mark.parametrize("name, px",
                         [("caformer_s18", 224), ("identityformer_s12", 384), ("randformer_s12", 64),
                          ("convformer_s18_in21k", 160), ("tiny_poolformerv2", 75)])
def test_parts_sum_to_the_swapped_model(name, px, mixers):
    with torch.device("meta"):
        model = create_model(name, img_size=px, token_mixers=mixers)
    assert sums(anatomy(name, px, mixers)) == (*count_params(model), count_macs(model, (1, 3, px, px)))


def test_each_part_is_what_its_modules_cost():
    a, name = anatomy("caformer_s36", 224), "caformer_s36"
    with torch.device("meta"):
        model = create_model(name)
    for s, (down, stage) in enumerate(zip(model.downsample_layers, model.stages), 1):
        assert a.total("params", s, PART_KINDS[0]) == count_params(down)[0]
        assert a.total("params", s, PART_KINDS[1]) == sum(count_params(block.token_mixer)[0] for block in stage)
        assert a.total("params", s, PART_KINDS[2]) == sum(count_params(block.mlp)[0] for block in stage)
        assert a.weights(s) == count_params(down)[0] + count_params(stage)[0]
    assert (
        a.total("params", 5, PART_KINDS[4]) == count_params(model.head)[0]
        and a.weights(5) == count_params(model.head)[0] + count_params(model.norm)[0]
    )


def test_only_random_mixing_is_frozen_and_pooling_is_free():
    a = anatomy("caformer_s18", 224, ("Pooling", "RandomMixing", "Identity", "SepConv"))
    assert (
        a.total("frozen") == a.total("frozen", 2, "token mixers") == 3 * 784**2
        and a.total("params", 2, "token mixers") == 0
    )
    assert [a.total("macs", s, "token mixers") for s in (1, 3)] == [0, 0] and a.total(
        "macs", None, "norms and scales"
    ) == 0


def test_counting_does_not_repeat_itself():
    anatomy("caformer_b36", 384, "SepConv")
    before = count_mixer.cache_info().misses, count_rest.cache_info().misses
    for mixers in itertools.product(("SepConv",), repeat=4):
        anatomy("caformer_b36", 384, mixers)
    assert (count_mixer.cache_info().misses, count_rest.cache_info().misses) == before
    anatomy("caformer_b36", 384, ("SepConv", "SepConv", "Pooling", "SepConv"))
    assert count_rest.cache_info().misses == before[1] and count_mixer.cache_info().misses <= before[0] + 1


# --- seen exactly ---

def gradient_fields(model, px):
    "Rows and columns of pixels with a gradient, for the middle token of each stage."
    found = []
    for stage, (n, _) in enumerate(grid_sizes(px)):
        x = torch.randn(1, 3, px, px, dtype=torch.float64, requires_grad=True)
        y = model.forward_intermediates(x, [stage], intermediates_only=True)[0][0, :, n // 2, n // 2]
        (y * torch.randn(len(y))).sum().backward()
        seen = x.grad[0].abs().sum(0) > 0
        rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
        assert seen.sum() == len(rows) * len(columns), "a field is a full rectangle"
        found.append((rows.min().item(), rows.max().item()))
        assert found[-1] == (columns.min().item(), columns.max().item())
    return tuple(found)


@pytest.mark.parametrize("mixers",
                         [*MIXERS, ("Identity", "Identity", "RandomMixing", "Identity"),
                          ("SepConv", "Pooling", "Identity", "Attention"),
                          ("Pooling", "Identity", "SepConv", "Identity")], ids=str)
@pytest.mark.parametrize("px", [64, 96, 75])
def test_the_field_is_where_the_gradient_is(mixers, px, one_thread):
    torch.manual_seed(0)
    quiet = create_model("tiny_convformer", img_size=px, token_mixers=mixers, norm_layers=LayerNormWithoutBias,
                         dims=(8, 8, 16, 32)).double()
    assert anatomy("tiny_convformer", px, mixers).fields == gradient_fields(quiet, px)


def test_the_family_norms_mix_all_faintly_and_the_words_say_so(one_thread):
    model = create_model("tiny_identityformer", img_size=64).double()
    assert gradient_fields(model, 64)[0] == (0, 63) and anatomy("tiny_identityformer", 64).sides[0] == 7
    for family in FAMILIES:
        faintly = family in ("identityformer", "randformer", "poolformerv2")
        assert ("mix all tokens faintly" in anatomy_text(anatomy(f"tiny_{family}"))) == faintly


def test_fields_of_the_textbook():
    assert anatomy("identityformer_m48", 384).sides == [7, 15, 31, 63]
    assert anatomy("convformer_s18", 384).sides == [7 + 24 * 3, 7 + 24 * 3 + 8 + 48 * 3, 384, 384]
    assert anatomy("poolformerv2_s12", 384).sides == [7 + 8 * 2, 23 + 8 + 16 * 2, 63 + 16 + 32 * 6, 384]
    assert anatomy("randformer_s12").sides == [7, 15, 224, 224] and anatomy("tiny_caformer", 32).sides[-1] == 32


def test_look_back_clips_at_each_layer():
    assert (
        receptive_rows([], 3) == (3, 3)
        and receptive_rows([(3, 1, 1, 5)], 0) == (0, 1)
        and receptive_rows([(3, 1, 1, 5)] * 9, 2) == (0, 4)
    )
    assert receptive_rows([(7, 4, 2, 64), (3, 2, 1, 16)], 4) == (26, 40)
    assert window_steps(torch.nn.Linear(2, 2), 9) == [] and window_steps(torch.nn.Conv2d(1, 1, 5, 2, 1), 9) == [
        (5, 2, 1, 9)
    ]


# --- legal values only ---

@pytest.mark.parametrize("args, said", [
    (("caformer_s12",), "Did you mean 'caformer_s18'"), ((None,), "There is no model"),
    (("caformer_s18", 31), "32 to 1024, not 31"), (("caformer_s18", 1025), "not 1025"),
    (("caformer_s18", 224.0), "not 224.0"), (("caformer_s18", True), "not True"),
    (("caformer_s18", (224, 224)), "side of the image"),
    (("caformer_s18", 224, "Atention"), "Did you mean 'Attention'"),
    (("caformer_s18", 224, ("Pooling", "Identity")), "2 entries for 4 stages"),
    (("caformer_s18", 224, ("Pooling", "Identity", None, "SepConv")), "There is no token mixer None"),
    (("caformer_s18", 224, MIXERS["SepConv"]), "There is no token mixer")])
def test_what_there_is_not_is_said(args, said):
    with pytest.raises(ValueError, match=r"^[A-Zit].*[.?]$") as error:
        anatomy(*args)
    assert said in str(error.value)


@pytest.mark.parametrize("args, said",
                         [(("caformer_s12",), "Did you mean 'caformer_s18'"), (("caformer_s18", 100), "not 100"),
                          (("caformer_s18", "224"), "not '224'"), (("caformer_s18", 32), "64, 96")])
def test_explorer_refuses_what_there_is_not(args, said):
    with pytest.raises(ValueError) as error:
        explore_model(*args)
    assert said in str(error.value)


def test_view_refuses_a_size_of_another_family():
    with pytest.raises(ValueError, match="There is no model 'randformer_s18'"):
        view_model("randformer", "s18", 224, *own_mixers("randformer"))


def test_every_legal_choice_is_a_model():
    for family in FAMILIES:
        assert sizes_of(family)[-1] == "tiny" and len(sizes_of(family)) == (
            6 if family in ("identityformer", "randformer", "poolformerv2") else 5
        )
        for size in sizes_of(family):
            assert get_row(model_name(family, size)).family == family
    assert (
        RESOLUTIONS[0] == 64
        and RESOLUTIONS[-1] == 384
        and {b - a for a, b in zip(RESOLUTIONS, RESOLUTIONS[1:])} == {32}
    )


# --- words ---

def test_signed_and_change_and_swaps():
    own, a = anatomy("caformer_s18", 224), anatomy("caformer_s18", 224,
                                                   ("SepConv", "RandomMixing", "Attention", "Identity"))
    assert (
        signed_change(1_234_567, "MACs") == "+1.2M MACs"
        and signed_change(-5, "parameters") == "−5 parameters"
        and signed_change(0, "MACs") == "no change in MACs"
    )
    assert (
        swap_words(a, own) == "RandomMixing for SepConv in stage 2, Identity for Attention in stage 4"
        and swap_words(own, own) == ""
    )
    assert (
        swap_costs(own, own) == "no change in parameters, no change in MACs"
        and swap_costs(a, own) == "−1.5M parameters, −109.1M MACs"
    )


def test_words_hold_what_the_picture_shows():
    own, a = anatomy("poolformerv2_s12", 384), anatomy("poolformerv2_s12", 384,
                                                       ("Pooling", "Pooling", "RandomMixing", "Pooling"))
    words = anatomy_text(a, own)
    for text in ("poolformerv2_s12 at 384 px", "frozen", "MACs", "Stage 1: 2 × Pooling on 96×96×64",
                 "a token in the middle sees 23 of 384 px", "sees all 384 px (was 271 px)",
                 "RandomMixing for Pooling in stage 3: +2.0M parameters", "head: 514.0k parameters",
                 "The token mixers take"):
        assert text in words, text
    assert "was" not in anatomy_text(own) and "frozen" not in anatomy_text(own)


# --- the explorer ---

@pytest.fixture
def explorer():
    e = explore_model()
    yield e
    assert e.wait()


def test_it_opens_computed(explorer):
    assert (
        explorer.value.startswith("<svg")
        and explorer.words == anatomy_text(anatomy("caformer_s18", 224))
        and explorer.done == [False] * 3
        and not explorer.busy
    )
    assert explorer.values() == dict(family="caformer", size="s18", img_size=224, stage1="SepConv", stage2="SepConv",
                                     stage3="Attention", stage4="Attention")
    assert all(control.description for control in explorer.controls.values())


@pytest.mark.parametrize("control, value, said",
                         [("family", "convformer", "convformer_s18"), ("size", "b36", "caformer_b36"),
                          ("size", "tiny", "tiny_caformer"), ("img_size", 64, "at 64 px"),
                                                  ("stage1", "Pooling", "Pooling for SepConv in stage 1"),
                          ("stage2", "Identity", "in stage 2"),
                          ("stage3", "SepConv", "SepConv for Attention in stage 3"),
                                                  ("stage4", "RandomMixing", "RandomMixing for Attention in stage 4")])
def test_every_control_changes_picture_and_words(explorer, control, value, said):
    before = explorer.value
    explorer[control].value = value
    assert explorer.wait() and explorer.value != before and said in explorer.words
    assert explorer.words == view_model(**explorer.values()).words


def test_another_family_brings_its_sizes_and_its_mixers(explorer):
    for family in ["convformer", "identityformer", "randformer", "caformer", "poolformerv2", "caformer"]:
        explorer["size"].value, explorer["stage1"].value = "m36", "Attention"
        explorer["family"].value = family
        assert explorer["size"].value == "m36" and list(explorer["size"].options) == sizes_of(family)
        assert tuple(explorer[f"stage{i}"].value for i in (1, 2, 3, 4)) == own_mixers(family)
        assert explorer.wait() and explorer.words == anatomy_text(anatomy(f"{family}_m36", 224))


def test_a_size_that_the_family_lacks_becomes_its_first(explorer):
    explorer["size"].value = "b36"
    explorer["family"].value = "identityformer"
    assert explorer["size"].value == "s12"
    explorer["family"].value = "caformer"
    assert explorer["size"].value == "s18"
    explorer["size"].value = "tiny"
    explorer["family"].value = "randformer"
    assert explorer["size"].value == "tiny" and explorer.wait() and explorer.words.startswith("tiny_randformer")


def test_no_illegal_pair_is_ever_seen_and_no_half_swap(explorer):
    "Everybody who listens after the explorer's own rule sees legal values only, and mixers as a whole."
    seen = []
    for control in explorer.controls.values():
        control.observe(lambda change: seen.append(explorer.values()), "value")
    for family, size in [("randformer", "s24"), ("caformer", "b36"), ("poolformerv2", "m48"), ("convformer", "m36"),
                         ("identityformer", "s12")] * 2:
        explorer["family"].value = family
        explorer["size"].value = size
    assert len(seen) > 20
    for v in seen:
        assert model_name(v["family"], v["size"]) in MODELS and (
            v["stage1"],
            v["stage2"],
            v["stage3"],
            v["stage4"],
        ) == own_mixers(v["family"])


def test_the_newest_change_wins(explorer):
    for family in list(FAMILIES) * 4:
        explorer["family"].value = family
        for px in (64, 384, 96):
            explorer["img_size"].value = px
    assert explorer.wait() and explorer.words.startswith("caformer_s18 at 96 px")


def test_follow_leaves_equal_sizes_alone():
    size, stages = dropdown("size", sizes_of("caformer")), [dropdown(f"stage {i}", list(MIXERS)) for i in (1, 2, 3, 4)]
    size.value, told = "m36", []
    size.observe(told.append, "value")
    follow_family("convformer", size, stages)
    assert not told and [s.value for s in stages] == ["SepConv"] * 4
    follow_family("randformer", size, stages)
    assert size.value == "m36" and [s.value for s in stages] == list(own_mixers("randformer"))


@pytest.mark.parametrize("name, expected",
                         [("randformer_m48", "m48"), ("tiny_identityformer", "tiny"),
                          ("caformer_b36_384_in21ft1k", "b36"), ("convformer_m36_in21k", "m36")])
def test_it_opens_with_any_model(name, expected):
    e = explore_model(name, 96)
    assert e["size"].value == expected and e["family"].value == get_row(name).family and "at 96 px" in e.words
    assert e.figure(img_size=128).axes and "at 96 px" in e.words


def test_tries_are_ticked_when_done_and_not_before(explorer):
    explorer["stage3"].value = "SepConv"
    explorer["stage1"].value = "Attention"
    assert explorer.wait() and explorer.done == [False] * 3
    explorer["stage1"].value = "RandomMixing"
    assert explorer.wait() and explorer.done == [True, False, False]
    explorer["stage1"].value, explorer["stage3"].value = "SepConv", "RandomMixing"
    assert explorer.wait() and explorer.done == [True, True, False]
    explorer["stage3"].value = "Identity"
    assert explorer.wait() and explorer.done == [True, True, True]


@pytest.mark.parametrize("which, values, expected", [
    (0, ("caformer", "s18", 64, None), True), (0, ("caformer", "s18", 96, None), False),
    (0, ("caformer", "s18", 224, ("Attention",) * 4), False),
    (0, ("randformer", "s12", 224, ("RandomMixing",) * 4), True),
    (1, ("caformer", "s18", 224, ("SepConv", "SepConv", "Pooling", "Pooling")), False),
    (1, ("caformer", "s18", 224, ("Pooling", "SepConv", "Attention", "Attention")), False),
    (1, ("convformer", "s18", 224, ("SepConv", "SepConv", "Identity", "SepConv")), False),
    (1, ("caformer", "b36", 384, ("SepConv", "SepConv", "Pooling", "Attention")), True),
    (2, ("identityformer", "s12", 224, None), False),
    (2, ("caformer", "s18", 224, ("SepConv", "SepConv", "Attention", "Identity")), False),
    (2, ("poolformerv2", "s12", 224, ("Pooling", "Pooling", "Pooling", "Identity")), True)])
def test_what_counts_as_done(which, values, expected):
    family, size, px, mixers = values
    chosen = dict(family=family, size=size, img_size=px,
                  **{f"stage{i}": m for i, m in enumerate(mixers or own_mixers(family), 1)})
    assert bool(MODEL_TRIES[which][1](chosen, view_model(**chosen).facts)) == expected


# --- the picture ---

def boxes(fig):
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer()))
            for t in fig.findobj(lambda o: hasattr(o, "get_text")) if t.get_text()]


PICTURES = [("tiny_caformer", 64, None), ("tiny_randformer", 384, ("RandomMixing",) * 4), ("caformer_s18", 224, None),
            ("caformer_b36", 384, ("SepConv", "RandomMixing", "RandomMixing", "Identity")),
            ("convformer_b36", 384, ("Identity",) * 4),
            ("randformer_m48", 384, ("RandomMixing", "Attention", "SepConv", "Pooling")),
            ("poolformerv2_m48", 352, ("RandomMixing",) * 4),
            ("identityformer_s12", 64, ("SepConv", "Pooling", "Attention", "RandomMixing")),
            ("convformer_s18_in21k", 384, ("Pooling",) * 4)]


@pytest.mark.parametrize("name, px, mixers", PICTURES, ids=[p[0] for p in PICTURES])
def test_no_text_lies_over_another_or_leaves_the_picture(name, px, mixers):
    own, a = anatomy(name, px), anatomy(name, px, mixers)
    fig = draw_anatomy(a, own if mixers else None)
    found = boxes(fig)
    assert len(found) > 35
    for (one, a_box), (other, b_box) in itertools.combinations(found, 2):
        assert not a_box.overlaps(b_box), f"{one!r} lies over {other!r}"
    for text, box in found:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1, (
            f"{text!r} leaves the picture"
        )


def shapes_of(fig, style):
    return [path.vertices for c in fig.axes[0].collections
            for path in c.get_paths() if bool(c.get_hatch()) == (style == "hatched")]


def test_stages_are_drawn_to_scale():
    solid = shapes_of(draw_anatomy(anatomy("caformer_s18", 224)), "solid")
    black = [v for v in solid if len({tuple(p) for p in v.tolist()}) == 4]
    from metaformer_edu.widgets.model_explorer import put_tokens
    shapes = []
    put_tokens(shapes, 0, 100, 40, 30)
    (front, *_), (top, *_), (right, *_) = shapes
    assert (
        {x for x, _ in front} == {0, 40}
        and {y for _, y in front} == {60, 100}
        and max(x for x, _ in right) == 40 + 18
        and min(y for _, y in top) == 42
    )
    widths = [v[:, 0].max() - v[:, 0].min() for v in black]
    for n in (56, 28, 14, 7):
        assert any(abs(w - 84 * n / 56) < 1e-6 for w in widths)


def test_frozen_parameters_are_hatched_and_swaps_outlined():
    frozen, plain = anatomy("randformer_s12"), anatomy("caformer_s18")
    texts = lambda fig: [t for t, _ in boxes(fig)]
    assert (
        shapes_of(draw_anatomy(frozen), "hatched")
        and "frozen" in texts(draw_anatomy(frozen))
        and "before" not in texts(draw_anatomy(frozen))
    )
    assert not shapes_of(draw_anatomy(plain), "hatched") and "frozen" not in texts(draw_anatomy(plain))
    fig = draw_anatomy(anatomy("caformer_s18", 224, "Pooling"), plain)
    assert {"before", "was Attention", "was SepConv",
            "Against the family's own mixers: −7.1M parameters, −1.5G MACs"} <= set(texts(fig))


def test_bars_hold_all_that_is_counted():
    a = anatomy("randformer_s24", 224)
    fig = draw_anatomy(a)
    height = lambda v: v[:, 1].max() - v[:, 1].min()
    hatched = sorted(height(v) for v in shapes_of(fig, "hatched"))[:2]  # the third, of the legend, is taller
    tallest = max(a.weights(s) for s in range(1, 6))
    expected = sorted(88 * a.total("frozen", s) / tallest for s in (3, 4))
    assert hatched == pytest.approx(expected, rel=1e-6)


def test_a_bar_without_height_stands_on_a_line():
    flat = [v for v in shapes_of(draw_anatomy(anatomy("caformer_s18", 224)), "solid")
            if v[:, 1].max() == v[:, 1].min() == 419]
    # parameters and MACs of four stages and the head
    assert len(flat) == 10 and all(v[:, 0].max() - v[:, 0].min() == 46 for v in flat)


def test_view_gives_what_tries_need():
    shown = view_model("caformer", "s18", 224, "SepConv", "SepConv", "Attention", "Identity")
    assert (
        isinstance(shown, Shown)
        and isinstance(shown.facts["now"], Anatomy)
        and shown.facts["own"].mixers == own_mixers("caformer")
    )
