"""Hearing: what is sent to the page against the mixing matrix, places, words, and the explorer without a browser."""
import base64
import io
import json
import re
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from metaformer_edu.core.basics import sample_photo
from metaformer_edu.interpret.influence import grouped, influence, mixer_at, mixing_matrix
from metaformer_edu.interpret.swap import swap_mixer
from metaformer_edu.models.metaformer import MetaFormer
from metaformer_edu.models.mixers import Attention, Identity, MIXERS, Pooling, RandomMixing, SepConv
from metaformer_edu.models.registry import FAMILIES, create_model
from metaformer_edu.widgets import mixing_explorer as lesson
from metaformer_edu.widgets.mixing_explorer import (
    MixingModels, Panel, draw_mixing, explore_mixing, format_number, influence_colors, make_panel, mixer_inputs,
    panel_text, quantize, row_and_column, save_mixing_page, untrained_mixer)
from metaformer_edu.widgets.sources import example_images, to_pil

pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = [(4, 4), (3, 5), (1, 6), (9, 8)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(family="caformer", **options):
    return create_model(f"tiny_{family}", **{**dict(num_classes=5, img_size=64), **options}).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def photo():
    return to_pil(sample_photo("flower", 64))


def matrices(panel):
    "The panel's whole matrix, once by rows and once by columns."
    found = [row_and_column(panel, token).reshape(2, -1) for token in np.ndindex(*panel.grid)]
    return np.stack([row for row, _ in found]), np.stack([column for _, column in found]).T


# --- numbers ---

def test_packing_keeps_what_counts():
    values = torch.randn(50, 49, dtype=torch.float64) * 10**torch.linspace(-9, 0, 49, dtype=torch.float64)
    values[3] = 0
    numbers, step = quantize(values)
    assert numbers.dtype == np.dtype("<i2") and abs(numbers).max() == 32767
    assert np.array_equal(numbers == 0, values.numpy() == 0) and np.array_equal(
        np.sign(numbers), np.sign(values.numpy())
    )
    np.testing.assert_allclose(numbers * step, values, atol=step, rtol=0)


def test_packing_nothing_and_nonsense():
    numbers, step = quantize(torch.zeros(4, 1))
    assert not numbers.any() and step > 0
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(torch.tensor([1, wrong]))


class Cross(nn.Module):
    "One's own: every token hears its row and its column."
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x): return self.proj(x.mean(1, keepdim=True) + x.mean(2, keepdim=True))


@pytest.mark.parametrize("h, w", GRIDS)
@pytest.mark.parametrize("make", [Identity, nn.Identity, Pooling, lambda c: Pooling(pool_size=5), SepConv,
                                  lambda c: SepConv(c, kernel_size=3, bias=True),
                                  Attention, lambda c: None, Cross])
def test_a_panel_holds_the_mixing_matrix(make, h, w):
    x, mixer = torch.randn(1, h, w, 6), make(6) or RandomMixing(num_tokens=h * w)
    panel = make_panel(mixer, x)
    known = (
        influence(mixer, x)
        if isinstance(mixer, SepConv)
        else influence(mixer, x, lesson.PROBES)
        if isinstance(mixer, Cross)
        else mixing_matrix(mixer, x)
    )
    rows, columns = matrices(panel)
    np.testing.assert_allclose(rows, known.detach(), atol=panel.step + 1e-6, rtol=0)
    assert np.array_equal(rows, columns)
    assert panel.tokens == panel.grid == (h, w) and panel.title == panel.label == type(mixer).__name__ and not panel.why


def test_signs_are_shown_where_there_are_some():
    x = torch.randn(1, 3, 3, 6)
    signed = {type(m).__name__: make_panel(m, x).signed
              for m in (Identity(), RandomMixing(num_tokens=9), Pooling(), SepConv(6), Attention(6), Cross(6))}
    assert signed == dict(Identity=True, RandomMixing=True, Pooling=True, SepConv=False, Attention=False, Cross=False)


def test_many_tokens_become_groups():
    x, mixer = torch.randn(1, 33, 36, 8), RandomMixing(num_tokens=33 * 36)
    panel = make_panel(mixer, x, "mine", "a note")
    assert (panel.group, panel.tokens, panel.grid, panel.note) == (2, (33, 36), (17, 18), "a note, 2×2 tokens each")
    known = grouped(mixer.random_matrix.data, 33, 36)[0]
    rows, columns = matrices(panel)
    np.testing.assert_allclose(rows, known, atol=panel.step)
    assert np.array_equal(rows, columns) and panel.at((32, 35), (33, 36)) == (16, 17)
    assert "rows 0 to 1" in lesson.token_name(panel, 0) and "row 32, columns 34 to 35" == lesson.token_name(
        panel, 17 * 18 - 1
    )


def test_attention_says_what_is_held_fixed():
    assert make_panel(Attention(6), torch.randn(3, 3, 6)).note == "weights held fixed"


@pytest.mark.parametrize("mixer, x, why", [
    (Attention(4), torch.zeros(1, 65, 64, 4), "4,160 tokens"), (Cross(4), torch.zeros(1, 17, 16, 4), "272 tokens"),
    (SepConv(4, kernel_size=4), torch.zeros(1, 5, 5, 4), "changes the grid"),
    (nn.Sequential(nn.Linear(4, 4), nn.AvgPool2d((2, 1))), torch.zeros(1, 4, 4, 4), "changes the grid"),
    (RandomMixing(num_tokens=9), torch.zeros(1, 4, 4, 4), "fixed matrix"), (Pooling(), torch.zeros(1, 4, 4, 4), "")],
                         ids=lambda o: type(o).__name__)
def test_a_panel_says_why_it_is_empty(mixer, x, why):
    panel = make_panel(mixer, x)
    assert why in panel.why and bool(why) == bool(panel.why)
    if why:
        assert why in panel_text(panel, (0, 0)) and not panel.numbers.size


def test_a_broken_mixer_says_so():
    mixer = SepConv(4)
    mixer.pwconv1.weight.data[0] = float("nan")
    assert "NaN" in make_panel(mixer, torch.randn(4, 4, 4)).why


def test_tokens_of_one_grid_in_another():
    panel = Panel("a", "a", "a", tokens=(8, 8), group=2)
    assert [panel.at(t, (4, 4)) for t in ((0, 0), (3, 3), (1, 2))] == [(0, 0), (3, 3), (1, 2)]
    assert Panel("a", "a", "a", tokens=(4, 4)).at((7, 6), (8, 8)) == (3, 3)


# --- words ---

def test_words():
    assert panel_text(make_panel(Identity(), torch.zeros(2, 2, 1)),
                      (0, 1)) == "Identity hears 1 token, most of all itself (1.000), and is heard by 1 token."
    pooling = make_panel(Pooling(), torch.zeros(4, 4, 1), "mine")
    assert (
        panel_text(pooling, (0, 0))
        == "mine (Pooling) hears 4 tokens, most of all itself (-0.750), and is heard by 4 tokens."
    )

    class Left(nn.Module):
        def forward(self, x): return torch.cat([0 * x[:, :, :1], x[:, :, :-1]], 2)
    left = make_panel(Left(), torch.randn(2, 2, 1))
    assert panel_text(left, (1, 0)) == "Left hears nobody and is heard by 1 token."
    assert "most of all row 1, column 0 (1.000), and is heard by 0 tokens" in panel_text(left, (1, 1))


def test_numbers_in_words():
    assert [format_number(v) for v in (0, 1, -0.8888, 0.001, 0.00012, -3.14e-12)] == [
        "0.000",
        "1.000",
        "-0.889",
        "0.001",
        "1.2e-4",
        "-3.1e-12",
    ]


# --- places ---

def test_tokens_are_those_of_mixer_at(model):
    x = torch.randn(1, 3, 64, 64)
    found = mixer_inputs(model, x)
    assert list(found) == [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1)]
    for place, tokens in found.items():
        assert torch.equal(tokens, mixer_at(model, x, *place)[1])


def test_one_model_and_four_new_mixers(model, photo):
    heard = MixingModels(model, photo)
    for place, own in (((1, 1), "SepConv"), ((3, 2), "Attention")):
        panels = heard[place].panels
        assert [p.title for p in panels] == list(MIXERS)
        assert {p.title: p.note.split(",")[0] for p in panels} == {name: "this model's own" if name == own else "new"
                                                                   for name in MIXERS}
        mixer, x = mixer_at(model, lesson.to_batch(photo, model), *place)
        np.testing.assert_allclose(matrices(panels[list(MIXERS).index(own)])[0],
                                   influence(mixer, x) if own == "SepConv" else mixing_matrix(mixer, x), atol=1e-6)
    assert heard[1, 1] is heard[1, 1]


def test_one_mixer_of_ones_own_stands_beside_all_five(photo):
    panels = MixingModels(swap_mixer(tiny("identityformer"), 3, Cross), photo)[3, 1].panels
    assert [p.title for p in panels] == ["Cross", *MIXERS] and panels[
        0
    ].note == "this model's own, estimated with 8 probes"


def test_several_models(photo):
    models = {family: tiny(family) for family in FAMILIES}
    heard = MixingModels(models, photo)
    assert [(p.title, p.mixer) for p in heard[3, 1].panels] == list(
        zip(FAMILIES, ("Identity", "RandomMixing", "Pooling", "SepConv", "Attention"))
    )
    assert [p.mixer for p in heard[1, 1].panels] == ["Identity", "Identity", "Pooling", "SepConv", "SepConv"]
    assert "caformer (Attention) hears 16 tokens" in heard[3, 1].words((0, 0))
    assert [p.title for p in MixingModels(list(models.values())[:2], photo)[1, 1].panels] == [
        "tiny_identityformer",
        "tiny_randformer",
    ]


def test_models_of_other_sizes_share_what_both_have(photo):
    small = MetaFormer(depths=(1, 2), dims=(8, 16), token_mixers="Pooling", img_size=32, num_classes=0,
                       res_scale_init_values=None).eval()
    heard = MixingModels(dict(small=small, large=tiny("convformer")), photo)
    assert heard.places == [(1, 1), (2, 1)]
    assert [p.tokens for p in heard[1, 1].panels] == [(8, 8), (16, 16)] and heard[1, 1].grid == (8, 8)
    assert "Token row 7, column 7 of 8×8." in heard[1, 1].words((7, 7))


def test_the_five_examples_open():
    heard = MixingModels()
    assert [p.mixer for p in heard[3, 1].panels] == list(MIXERS) and heard.picture.shape == (128, 128)


def test_images_of_all_kinds(model, photo, tmp_path):
    photo.save(path := tmp_path / "photo.png")
    tensor = lesson.to_batch(photo, model)[0]
    found = [MixingModels(model, image)[2, 1].data() for image in (photo, path, str(path), tensor, tensor[None])]
    assert len(set(found)) == 1
    grey = MetaFormer(in_chans=1, depths=(1,), dims=(8,), img_size=32, num_classes=0, res_scale_init_values=None)
    assert MixingModels(grey, torch.rand(1, 32, 32)).picture.shape == (32, 32)


def test_what_cannot_be_shown_is_said(model, photo, tmp_path):
    for make, why in ((lambda: MixingModels(nn.Linear(3, 3), photo), "not a MetaFormer of this library"),
                      (lambda: MixingModels({}, photo), "at least one model"),
                      (lambda: MixingModels(dict(a=model, b=nn.ReLU()), photo), "ReLU is not a MetaFormer"),
                      (lambda: MixingModels(model, torch.zeros(2, 3, 64, 64)), "one image"),
                      (lambda: MixingModels(model, photo)[5, 1], r"no \(stage, block\) \(5, 1\)"),
                      (lambda: MixingModels(3, photo), "int is not a MetaFormer"),
                      (lambda: MixingModels(model, 3), "PIL images"),
                      (lambda: explore_mixing(3), "int is not a MetaFormer"),
                      (lambda: explore_mixing(model, []), "PIL images"),
                      (lambda: explore_mixing(model, 3), "PIL images"),
                      (lambda: explore_mixing(model, tmp_path / "none.png"), "none.png"),
                      (lambda: MixingModels(model, tmp_path / "none.png"), "none.png"),
                      (lambda: MixingModels(tiny("randformer"), torch.zeros(3, 96, 96)), "fixed matrix")):
        with pytest.raises(ValueError, match=why):
            make()


def test_models_and_dice_are_left_as_they_were(photo):
    model = tiny().train()
    before, dice = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    heard = MixingModels(model, photo)
    for place in heard.places:
        heard[place]
    assert (
        model.training
        and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        and torch.equal(dice, torch.get_rng_state())
    )
    assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_new_mixers_are_always_the_same():
    x = torch.randn(1, 4, 4, 32)
    for name in MIXERS:
        first, second = (untrained_mixer(name, x).state_dict() for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_data_are_the_panels_in_a_row(model, photo):
    place = MixingModels(model, photo)[3, 1]
    spec, data = json.loads(json.dumps(place.spec())), np.frombuffer(place.data(), "<i2")
    assert sum(p["count"] for p in spec["panels"]) == len(data) and spec["grid"] == [4, 4]
    start = 0
    for panel, facts in zip(place.panels, spec["panels"]):
        assert np.array_equal(data[start:start + facts["count"]], panel.numbers.ravel())
        start += facts["count"]
    assert [p["negative"] for p in spec["panels"]] == [False, False, True, False, False]


# --- pictures ---

def test_paint():
    rgba = influence_colors(np.array([[0, 1, -1, 0.5]]), 1, True)
    assert (
        rgba[0, 0, 3] == 0
        and rgba[0, 1, 0] > rgba[0, 1, 2]
        and rgba[0, 2, 2] > rgba[0, 2, 0]
        and rgba[0, 1, 3] > rgba[0, 3, 3] > 0
    )
    strength = influence_colors(np.array([[0.1, 1]]), 1, False)
    assert strength[0, 0, :3].sum() > strength[0, 1, :3].sum()


def test_the_figure_belongs_to_no_pyplot_and_no_thread(model, photo):
    heard, found = MixingModels(model, photo), []
    thread = threading.Thread(target=lambda: found.append(draw_mixing(heard[3, 1], heard.picture, (1, 2))))
    thread.start()
    thread.join()
    titles = [ax.get_title().split("\n")[0] for ax in found[0].axes[:5]]
    assert titles == list(MIXERS) and not plt.get_fignums()
    with pytest.raises(ValueError, match="rows are 0 to 3"):
        draw_mixing(heard[3, 1], heard.picture, (4, 0))


def test_a_figure_with_an_empty_panel(photo):
    model = swap_mixer(tiny("identityformer", img_size=128), 1, Cross)
    heard = MixingModels(model, photo)
    assert "1,024 tokens" in heard[1, 1].panels[0].why
    draw_mixing(heard[1, 1], heard.picture)


# --- the explorer ---

@pytest.fixture
def explorer(model, photo):
    return explore_mixing(model, photo)


def test_it_opens_computed(explorer):
    page = explorer.page
    assert (explorer.stage, explorer.block, explorer.token, page.place["grid"]) == (3, 1, [2, 2], (4, 4))
    assert page.data == explorer.place.data() and len(page.picture) == 64 * 64 and not page.busy
    assert Image.open(io.BytesIO(explorer.value)).width > 500


def test_value_and_words_follow_the_token(explorer):
    value, words = explorer.value, explorer.words
    explorer.token = [0, 0]
    assert (
        explorer.value != value
        and explorer.words != words
        and explorer.words.startswith("Token row 0, column 0 of 4×4.")
    )
    with pytest.raises(ValueError, match="no token"):
        explorer.token = [0, 4]
    assert explorer.token == [0, 0]


def test_the_stage_changes_everything_but_the_place_in_the_picture(explorer):
    explorer.token = [3, 1]
    value = explorer.value
    explorer.stage = 1
    assert (
        explorer.wait() and explorer.token == [14, 6] and explorer.page.place["stage"] == 1 and explorer.value != value
    )
    assert explorer.page.data == explorer.mixing_models[1, 1].data()
    explorer.stage = 3
    explorer.wait()
    assert explorer.token == [3, 1] and explorer.value == value


def test_a_block_that_the_next_stage_has_not(explorer):
    explorer.block = 2
    explorer.wait()
    assert explorer.page.place["block"] == 2
    explorer.stage = 4
    explorer.wait()
    assert (explorer.stage, explorer.block) == (4, 1) and not explorer.page.fault


def test_what_does_not_exist_is_said_and_the_last_place_stays(explorer):
    explorer.stage = 7
    explorer.wait()
    assert "(stage, block) (7, 1)" in explorer.words and explorer.page.place["stage"] == 3 and not explorer.page.busy
    explorer.stage = 2
    explorer.wait()
    assert not explorer.page.fault and explorer.page.place["stage"] == 2


def test_the_page_gets_an_answer_to_each_last_ask(explorer):
    page = explorer.page
    page.set_state(dict(ask=[1, 1, 1], stage=1, block=1))  # as the browser sends it
    explorer.wait()
    assert (page.place["stage"], page.place["ask"]) == (1, 1)
    nth = page.place["nth"]
    page.set_state(dict(ask=[1, 1, 3]))  # to and fro while the kernel was busy
    explorer.wait()
    assert page.place["ask"] == 3 and page.place["nth"] == nth + 1


def test_only_the_last_ask_is_computed(explorer, monkeypatch):
    begun, go, asked = threading.Event(), threading.Event(), []
    whole = MixingModels.panels

    def slow(self, place):
        asked.append(place)
        begun.set()
        go.wait(10)
        return whole(self, place)
    monkeypatch.setattr(MixingModels, "panels", slow)
    explorer.stage = 1
    begun.wait(10)
    assert explorer.page.busy
    explorer.stage = 2
    explorer.stage = 4
    go.set()
    assert (
        explorer.wait() and asked == [(1, 1), (4, 1)] and explorer.page.place["stage"] == 4 and not explorer.page.busy
    )


def test_another_image(explorer):
    data, value = explorer.page.data, explorer.value
    explorer.picker.names.value = "china"
    explorer.wait()
    assert explorer.page.data != data and explorer.value != value and (explorer.stage, explorer.token) == (3, [2, 2])


def test_an_image_and_a_stage_at_once(explorer, model):
    with lesson.DRAW_LOCK:  # the worker waits
        explorer.picker.names.value = "china"
        explorer.stage = 2
    explorer.wait()
    assert explorer.page.data == MixingModels(model, example_images()["china"])[2, 1].data()


def test_several_images_to_choose_from(model, photo, tmp_path):
    small = photo.resize((32, 32))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        small.save(tmp_path / name / "x.png")
    files = [tmp_path / "a/x.png", str(tmp_path / "b/x.png")]
    others = list(example_images())
    for images, names in ((dict(mine=photo, small=small), ["mine", "small"]), ([photo, small], ["image 1", "image 2"]),
                          (files, ["x.png", "x.png (2)"]),
                          (photo, ["yours", *others]), (files[0], ["x.png", *others]), (files[1], ["x.png", *others]),
                          (None, others)):
        explorer = explore_mixing(model, images)
        assert list(explorer.picker.names.options) == names
        first = photo if images is photo or "mine" in names or "image 1" in names else explorer.picker.value
        assert explorer.page.data == MixingModels(model, first)[3, 1].data() == MixingModels(model, images)[3, 1].data()


def test_a_tensor_needs_no_picker(model):
    explorer = explore_mixing(model, torch.rand(3, 64, 64))
    assert explorer.picker is None and explorer.children[0] is explorer.page


def test_a_reader_without_a_kernel_sees_a_picture(explorer, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: shown.append(data))
    explorer._ipython_display_()
    data = {k: v for data in shown for k, v in data.items()}
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.model_id
    kind = next(k for k in data if k.startswith("image/"))
    assert base64.b64decode(data[kind]) and "Token row" in data["text/plain"]


# --- a page in a file ---

def state_of(path):
    return json.loads(re.search(r'<script type="application/json" id="state">(.*?)</script>',
                                Path(path).read_text(encoding="utf-8"), re.S)[1])


def test_a_page_holds_its_places(model, photo, tmp_path):
    path = save_mixing_page(tmp_path / "page.html", model, photo, places=[(4, 1), [1, 1]])
    state, heard = state_of(path), MixingModels(model, photo)
    assert state["choices"] == [[4, 1], [1, 1]] and state["stage"] == 4
    for place in ((4, 1), (1, 1)):
        assert base64.b64decode(state["places"]["{},{}".format(*place)]["data"]) == heard[place].data()
    assert base64.b64decode(state["picture"]) == heard.picture.tobytes()


def test_a_page_has_all_blocks_if_they_are_small(model, photo, tmp_path, monkeypatch):
    assert len(state_of(save_mixing_page(tmp_path / "a.html", model, photo))["choices"]) == 5
    monkeypatch.setattr(lesson, "ALL_BLOCKS", 1000)
    assert state_of(save_mixing_page(tmp_path / "b.html", model, photo))["choices"] == [[1, 1], [2, 1], [3, 1], [4, 1]]


def test_a_page_is_not_too_large(model, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than"):
        save_mixing_page(tmp_path / "page.html", model, photo)
    for wrong in (9, 1), 3, "3,1", (3,), None, {}:
        with pytest.raises(ValueError, match=r"no \(stage, block\)"):
            save_mixing_page(tmp_path / "page.html", model, photo, [wrong])
    for wrong in [], (), 3, "3,1":
        with pytest.raises(ValueError, match="at least one place"):
            save_mixing_page(tmp_path / "page.html", model, photo, wrong)
    assert not list(tmp_path.iterdir())


def test_a_page_asks_nobody_and_runs_no_names(photo, tmp_path):
    evil = "</script><script>alert(1)</script>{{state}}"
    text = save_mixing_page(tmp_path / "page.html", {evil: tiny("poolformerv2")}, photo, [(4, 1)],
                            title=evil).read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2 and "alert(1)</script>" not in text
    assert "default-src 'none'" in text and not re.search(r"https?://|@import|url\(|src=", text)
    assert evil in state_of(tmp_path / "page.html")["places"]["4,1"]["panels"][0]["title"]
