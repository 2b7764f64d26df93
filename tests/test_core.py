"""The tools of lesson core/basics: hooks that are released, counts that are right, tables and pictures that leave
nothing open."""
import random
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import golden
from metaformer_edu.core.basics import (
    Capture, check, count_macs, count_params, get_device, macs_by_module, patch, sample_photo, seed_everything,
    trace_shapes)
from metaformer_edu.core.errors import did_you_mean
from metaformer_edu.core.figures import set_style, show_images, show_matrix, to_array
from metaformer_edu.core.files import Table, human
from metaformer_edu.models.registry import create_model

X = golden.images(64, dtype=torch.float32)


@pytest.fixture(autouse=True)
def no_open_figures():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- hooks ---

@torch.inference_mode()
def test_capture_keeps_what_submodules_put_out():
    model = golden.fill(create_model("tiny_caformer"))
    with Capture(model, "stages.1", "stages.3", "head") as seen:
        logits = model(X)
    features = model.forward_intermediates(X, [1, 3], output_fmt="NHWC", intermediates_only=True)
    assert list(seen) == ["stages.1", "stages.3", "head"] and torch.equal(seen["head"], logits)
    assert torch.equal(seen["stages.1"], features[0]) and torch.equal(seen["stages.3"], features[1])


def test_capture_releases_its_hooks():
    model = create_model("tiny_caformer")
    capture = Capture(model, "stages.0", "stages.1")
    assert hooks(model) == 0  # before the block nothing is watched
    for _ in range(2):
        with capture:
            assert hooks(model) == 2
        assert hooks(model) == 0
    model(X)
    assert not capture
    with pytest.raises(ZeroDivisionError), capture:
        raise ZeroDivisionError
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="Expected images"), Capture(model, "stages.0"):
        model(X[0])
    assert hooks(model) == 0


def test_capture_leaves_other_hooks_alone():
    model = create_model("tiny_caformer")
    mine = model.stages[0].register_forward_hook(lambda *args: None)
    with Capture(model, "stages.0"):
        pass
    assert hooks(model) == 1
    mine.remove()


def test_captures_can_be_nested():
    model = create_model("tiny_caformer").eval()
    with Capture(model, "stages.0") as outer:
        with Capture(model, "stages.0") as inner:
            model(X)
        first = outer["stages.0"]
        model(X.flip(0))
    second = model.forward_intermediates(X.flip(0), [0], output_fmt="NHWC")[1][0]
    assert torch.equal(inner["stages.0"], first) and torch.equal(outer["stages.0"], second)
    assert hooks(model) == 0


def test_capture_works_on_frozen_models_and_passes_gradients():
    model = create_model("tiny_caformer").requires_grad_(False)
    with Capture(model, "stages.2") as seen:
        model(X)
    assert not seen["stages.2"].requires_grad
    x = X.clone().requires_grad_()
    with Capture(model, "stages.2") as seen:
        model(x)
    seen["stages.2"].sum().backward()
    assert x.grad.any()


def test_capture_of_an_unknown_name_gives_the_nearest():
    model = create_model("tiny_caformer")
    with pytest.raises(ValueError, match="no submodule 'stage.2'.*'stages.2'"):
        Capture(model, "stages.1", "stage.2")
    assert hooks(model) == 0


def test_trace_shapes():
    model = create_model("tiny_caformer")
    table = trace_shapes(model, X)
    assert [r["module"] for r in table] == ["norm", "head"] and table[-1]["output"] == "2×10"
    names = [r["module"] for r in trace_shapes(model, X, depth=2)]
    assert [n for n in names if re.fullmatch(r"stages\.\d", n)] == [f"stages.{i}" for i in range(4)]
    assert names.index("downsample_layers.1") > names.index("stages.0")  # in the order in which they run
    with pytest.raises(ValueError):
        trace_shapes(model, X[0])
    assert hooks(model) == 0
    for p in model.parameters():
        assert p.grad is None
    assert trace_shapes(nn.Sequential(nn.LSTM(3, 4)), torch.rand(2, 3))[0]["output"] == "tuple"


# --- counts ---

def test_count_params():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False).requires_grad_(False))
    assert count_params(model) == (20, 10) and count_params(nn.Identity()) == (0, 0)
    tied = nn.Sequential(model[0], model[0])
    assert count_params(tied) == (20, 0)


@pytest.mark.parametrize("n, text", [
    (0, "0"), (7, "7"), (999, "999"), (1000, "1.0k"), (1234, "1.2k"), (999_949, "999.9k"), (999_950, "1.0M"),
    (26_341_656, "26.3M"),
    (999_999_999, "1.0G"), (4_106_941_440, "4.1G"), (2.5e12, "2.5T"), (2e15, "2000.0T"), (-1500, "-1.5k")])
def test_human(n, text):
    assert human(n) == text


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)

    def forward(self, x):
        q = self.linear(x)
        y = nn.functional.scaled_dot_product_attention(q[None], q[None], q[None])
        return self.conv(y.reshape(1, 4, 2, -1)), y @ q.T


def test_macs_are_those_of_the_formulas():
    # (16, 8): a linear layer, attention (q kᵀ and its product with v), a grouped strided convolution, a matrix product
    macs = macs_by_module(Both(), (16, 8))
    conv = 6 * 2 * 9 * 1 * 8
    assert macs["linear"] == 16 * 8 * 8 and macs["conv"] == conv
    assert macs[""] == 16 * 8 * 8 + 2 * 16 * 16 * 8 + conv + 16 * 16 * 8 == count_macs(Both(), (16, 8))


def test_macs_scale_with_the_batch_and_add_up():
    model = create_model("tiny_caformer")
    macs = macs_by_module(model, (1, 3, 64, 64))
    assert count_macs(model, (3, 3, 64, 64)) == 3 * macs[""]
    parts = [k for k in macs if re.fullmatch(r"(stages|downsample_layers)\.\d|head", k)]
    assert len(parts) == 9 and sum(macs[k] for k in parts) == macs[""]
    # any precision, any mode, frozen or not: counts are shapes
    assert count_macs(model.double().eval().requires_grad_(False), (1, 3, 64, 64)) == macs[""]


# --- seeds and devices ---

def test_seeds():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()
    seed_everything(3)
    first = draw()
    second = draw()
    seed_everything(3)
    assert draw() == first != second
    seed_everything(4)
    assert draw() != first
    seed_everything()
    zero = draw()
    seed_everything(0)
    assert draw() == zero


def test_device_exists():
    assert torch.zeros(1, device=get_device()).item() == 0
    assert get_device().type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available()
                                 else "cpu")


# --- sentences ---

@pytest.mark.parametrize("name, choices, end", [
    ("poling", ["Pooling", "SepConv"], "Did you mean 'Pooling'?"),
    ("POOLING", ["Pooling", "SepConv"], "Did you mean 'Pooling'?"),
    ("x", [], "There are none."), ("zzz", ["a", "b"], "Did you mean 'a', 'b'?"),
    (None, ["None_"], "Did you mean 'None_'?"),
    (3, {31: 0}, "Did you mean '31'?")])
def test_did_you_mean(name, choices, end):
    text = did_you_mean(name, choices, "thing")
    assert text == f"There is no thing {name!r}. {end}"


def test_did_you_mean_names_a_few_of_many_the_nearest_first():
    names = [f"model_{i}" for i in range(100)]
    assert did_you_mean("model_42x", iter(names)).startswith("There is no name 'model_42x'. Did you mean 'model_42', ")
    assert did_you_mean("model_42x", names).count("'model_") == 4  # the one typed, and three
    assert did_you_mean("qqqqqqqq", names).count("'model_") == 6


# --- tables ---

TABLE = Table([dict(name="a", n=1, x=None), dict(name="long name", n=None, x=2.5)])


def test_table_as_text():
    assert repr(TABLE) == "name       n  x\na          1\nlong name     2.5"


def test_table_as_html():
    text = Table([{"<b>": "1 < 2 & 3"}])._repr_html_()
    assert (
        "<th" in text
        and "&lt;b&gt;" in text
        and "1 &lt; 2 &amp; 3" in text
        and text.startswith("<table>")
        and text.endswith("</table>")
    )
    text = TABLE._repr_html_()
    assert text.count("<tr>") == 3 and text.count("<td") == 6 and text.count("<th") == 3 and "None" not in text


def test_table_as_markdown():
    assert TABLE.markdown() == "| name | n | x |\n| --- | --- | --- |\n| a | 1 |  |\n| long name |  | 2.5 |"
    assert Table([{"a": "x|y"}]).markdown().splitlines()[2] == r"| x\|y |"


def test_empty_table():
    assert repr(Table()) == "" and "<td" not in Table()._repr_html_() and isinstance(Table().markdown(), str)


def test_table_is_a_list():
    assert len(TABLE) == 2 and TABLE[0]["name"] == "a" and Table(r for r in TABLE) == TABLE
    # a missing cell is empty, a zero is not
    assert "name" in repr(Table([dict(name="a"), dict()])) and "0" in repr(Table([dict(n=0)]))


# --- pictures ---

def pictures(fig):
    return [np.asarray(a.images[0].get_array()) for a in fig.axes if a.images]


def test_show_images():
    images = [torch.rand(3, 8, 6), torch.rand(8, 6, 3), torch.rand(1, 8, 6), torch.rand(8, 6), np.random.rand(8, 6, 3),
              torch.rand(8, 6, dtype=torch.bfloat16), torch.rand(3, 8, 6, requires_grad=True)]
    fig = show_images(images, ["one", "two"], ncols=3)
    assert [p.shape for p in pictures(fig)] == [(8, 6, 3), (8, 6, 3), (8, 6), (8, 6), (8, 6, 3), (8, 6), (8, 6, 3)]
    assert len(fig.axes) == 9 and [a.get_title() for a in fig.axes[:3]] == ["one", "two", ""]
    np.testing.assert_allclose(pictures(fig)[0], images[0].permute(1, 2, 0))
    fig.canvas.draw()


def test_show_images_of_a_batch():
    assert (
        len(pictures(show_images(torch.rand(2, 3, 8, 8)))) == 2 and len(show_images(torch.rand(2, 3, 8, 8)).axes) == 2
    )


def test_images_of_bytes_stay_bytes():
    # as floats 0 to 255 they would be drawn white
    image = (torch.rand(3, 8, 6) * 255).to(torch.uint8)
    shown, = pictures(show_images([image]))
    assert shown.dtype == np.uint8 and (shown == image.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize("shape, expected",
                         [((3, 8, 6), (8, 6, 3)), ((8, 6, 3), (8, 6, 3)), ((1, 8, 6), (8, 6)), ((8, 6, 1), (8, 6)),
                                             ((8, 6), (8, 6)), ((3, 3, 3), (3, 3, 3))])
def test_to_array(shape, expected):
    assert to_array(torch.rand(shape)).shape == to_array(np.random.rand(*shape)).shape == expected


def test_show_matrix():
    m = torch.tensor([[1., -2., 0.], [0.5, 0., 0.]])
    fig = show_matrix(m, "mixing")
    assert fig.axes[0].get_title() == "mixing" and [t.get_text() for t in fig.axes[0].texts] == [
        "1.0",
        "-2.0",
        "0.0",
        "0.5",
        "0.0",
        "0.0",
    ]
    image = fig.axes[0].images[0]
    assert image.norm.vmin == -2 and image.norm.vmax == 2  # zero is white
    assert not show_matrix(m, fmt="").axes[0].texts
    show_matrix(torch.zeros(2, 2)).canvas.draw()
    assert show_matrix(np.eye(2, dtype=int), fmt="d").axes[0].texts[0].get_text() == "1"


def test_show_matrix_into_an_axis():
    fig, axs = plt.subplots(1, 2)
    assert show_matrix(torch.eye(2), ax=axs[1]) is fig
    assert axs[1].images and not axs[0].images and plt.fignum_exists(fig.number)  # who made the figure closes it
    plt.close(fig)


def test_set_style_is_small_and_legible():
    with plt.rc_context():
        set_style()
        assert 72 <= plt.rcParams["figure.dpi"] <= 80 and plt.rcParams["font.size"] >= 10


@pytest.mark.parametrize("name", ["flower", "china"])
def test_sample_photo(name):
    photo = sample_photo(name, 96)
    assert (
        photo.shape == (3, 96, 96)
        and photo.dtype == torch.float32
        and 0 <= photo.min() < 0.1
        and 0.9 < photo.max() <= 1
    )
    assert photo.std() > 0.1 and not torch.equal(photo[0], photo[2]) and sample_photo(name).shape == (3, 224, 224)


def test_sample_photo_of_a_misspelt_name():
    with pytest.raises(ValueError, match="no sample photo 'flowers'. Did you mean 'flower'"):
        sample_photo("flowers")


# --- exercises ---

def raising(error):
    def test(answer):
        raise error
    return test


def asserting(answer):
    assert answer == 4, f"{answer} is not 4."


@pytest.mark.parametrize("answer, test, mark, words", [
    (4, asserting, "✓", "Right"), (4, lambda a: a == 4, "✓", "Right"),
    (4, lambda a: np.bool_(True), "✓", ""), (4, lambda a: torch.tensor(True), "✓", ""),
    (0, lambda a: a == 0, "✓", ""), (False, lambda a: None, "✓", ""), (torch.zeros(3), lambda a: len(a) == 3, "✓", ""),
    (5, asserting, "✗", "5 is not 4."), (5, lambda a: a == 4, "✗", "Not yet"), (5, lambda a: np.bool_(False), "✗", ""),
    ("x", lambda a: a + 1, "✗", "str"), (5, raising(AssertionError()), "✗", "AssertionError"),
    (5, raising(ValueError("one\ntwo")), "✗", "one"),
    (None, asserting, "○", "Not answered yet"), (..., asserting, "○", "Not answered yet"),
    (lambda: 1, raising(NotImplementedError()), "○", "Not answered yet")])
def test_check(answer, test, mark, words, capsys):
    assert check(answer, test, "think.") is None
    said = capsys.readouterr().out
    assert said.startswith(mark) and words in said and said.count("\n") == 1 and "two" not in said
    assert ("Hint: think." in said) == (mark == "✗")  # before an attempt it would give the answer away


def test_check_without_a_hint(capsys):
    check(5, asserting)
    assert "Hint" not in capsys.readouterr().out


def test_check_lets_an_interrupt_through():
    with pytest.raises(KeyboardInterrupt):
        check(1, raising(KeyboardInterrupt()))


def test_no_images_are_an_empty_figure():
    assert not any(ax.images for ax in show_images([]).axes)


# --- a class over several cells ---

def test_patch_adds_functions_and_properties():
    class Square:
        def __init__(self, side):
            self.side = side

    class Child(Square):
        pass

    @patch
    def scaled(self: Square, k=2):
        "Documented."
        return type(self)(k * self.side)

    @patch
    @property
    def area(self: Square):
        return self.side ** 2

    assert scaled is None and area is None
    assert Child(3).scaled().area == 36 and isinstance(Child(3).scaled(), Child)
    assert Square.scaled.__doc__ == "Documented." and Square.scaled.__qualname__ == f"{Square.__qualname__}.scaled"
    assert Square.area.fget.__qualname__ == f"{Square.__qualname__}.area" and Square.scaled.__module__ == __name__


def test_the_model_is_one_class_with_its_methods():
    from metaformer_edu.models import metaformer as model
    own = {n for n, f in vars(model.MetaFormer).items()
           if getattr(f, "__module__", "") == "metaformer_edu.models.metaformer" and n[0] != "_"}
    assert own >= {"forward", "forward_features", "forward_head", "forward_intermediates", "reset_classifier",
                   "set_grad_checkpointing"}
    assert model.MetaFormer.__mro__[1] is torch.nn.Module and not own & set(model.__all__)
    assert all(vars(model.MetaFormer)[n].__qualname__ == f"MetaFormer.{n}" for n in own)
