"""Explorers without a browser: the numbers of StarReLU, drawings and their SVG, newest first, controls, images,
bundled runs."""
import base64
import datetime
import io
import json
import re
import shutil
import sys
import threading
import xml.etree.ElementTree as ET

import IPython.display
import ipywidgets as W
import matplotlib as mpl
import nbformat
import numpy as np
import pytest
import torch
import yaml
from matplotlib.colors import to_rgb
from PIL import Image

import run
from metaformer_edu.core.errors import DataError, WeightsError
from metaformer_edu.core.figures import FAINT, INK, PALE, SERIES
from metaformer_edu.core.files import read_log
from metaformer_edu.data.datasets import load_shapes
from metaformer_edu.models.layers import StarReLU
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.widgets import base, sources
from metaformer_edu.widgets.activation_explorer import (
    OTHER_ACTIVATIONS, draw_activation, explore_activation, moments, reaches_goal, view_activation)
from metaformer_edu.widgets.base import (
    DRAW_LOCK, Drawing, Explorer, Latest, PAGE_COLORS, Shown, dropdown, new_figure, slider, to_svg)
from metaformer_edu.widgets.sources import (
    ImagePicker, example_images, example_models, example_runs, load_run, named_images, to_pil, uploaded_files)

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = 120  # seconds, after which something hangs
FAMILIES = ["identityformer", "randformer", "poolformerv2", "convformer", "caformer"]
SHAPES = ["disc", "ring", "square", "triangle", "cross"]


# --- the numbers of StarReLU, and their picture ---

def normal(f, sigma):
    "(mean, variance) by Gauss and Hermite, for what is smooth."
    x, w = np.polynomial.hermite_e.hermegauss(60)
    y = f(torch.from_numpy(sigma * x)).numpy()
    mean = (w * y).sum() / w.sum()
    return mean, (w * (y - mean) ** 2).sum() / w.sum()


CLOSED = {
    "identity": (lambda x: x, lambda s: (0, s**2)),
    "line": (lambda x: 3 * x - 2, lambda s: (-2, 9 * s**2)),
    "constant": (lambda x: 0 * x + 7, lambda s: (7, 0)),
    "square": (lambda x: x**2, lambda s: (s**2, 2 * s**4)),
    "abs": (torch.abs, lambda s: (s * (2 / np.pi) ** 0.5, s**2 * (1 - 2 / np.pi))),
    "relu": (torch.relu, lambda s: (s / (2 * np.pi) ** 0.5, s**2 * (0.5 - 0.5 / np.pi))),
    "squared relu": (OTHER_ACTIVATIONS["squared ReLU"], lambda s: (s**2 / 2, 1.25 * s**4)),
    "exp": (torch.exp, lambda s: (np.exp(s**2 / 2), np.exp(2 * s**2) - np.exp(s**2))),
    "gelu": (OTHER_ACTIVATIONS["GELU"],
             lambda s: (s**2 / (2 * np.pi * (1 + s**2)) ** 0.5, normal(OTHER_ACTIVATIONS["GELU"], s)[1])),
}


@pytest.mark.parametrize("sigma", [0.5, 1., 2.])
@pytest.mark.parametrize("name", CLOSED)
def test_moments_are_the_closed_forms(name, sigma):
    f, formula = CLOSED[name]
    found = moments(f, sigma)
    assert all(type(v) is float for v in found)
    np.testing.assert_allclose(found, formula(sigma), rtol=2e-5, atol=1e-9)


def test_moments_of_a_module_take_no_gradients():
    f = StarReLU(0.5, -0.25).double()
    np.testing.assert_allclose(moments(f), (0, 0.25 * 1.25), rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad and p.grad is None for p in f.parameters())


def contrast(a, b):
    def light(color):
        return np.dot([0.2126, 0.7152, 0.0722],
                      [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)])
    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("color", SERIES)
def test_colours_of_data_are_legible_on_white_and_on_black(color):
    assert min(contrast(color, "white"), contrast(color, "black")) >= 3
    assert len(set(SERIES)) == len(SERIES) and color not in (INK, FAINT, PALE)


def test_text_is_legible_on_white():
    assert contrast(INK, "white") >= 7 and contrast(FAINT, "white") >= 4.5


def mark(ax, color):
    "Where the mark of a colour is."
    line, = [line for line in ax.lines if line.get_color() == color]
    return float(line.get_xdata()[0]), float(line.get_ydata()[0])


@pytest.mark.parametrize("s, b, sigma, place", [
    (1., 0., 1., (0.5, 1.25)), (0.8944272, -0.4472136, 1., (0, 1)), (1., -1., 1., (-0.5, 1.25)),
    (2., -1., 0.5, (-0.75, 4 * 1.25 / 16)), (0., -1., 1., (-0.8, 0)), (2., 1., 2., (1.6, 2.4)),
    (2., -1., 2., (1.6, 2.4))])
def test_the_mark_of_starrelu_is_at_its_moments_or_at_the_edge(s, b, sigma, place):
    left, right = draw_activation(s, b, sigma).axes
    np.testing.assert_allclose(mark(right, SERIES[0]), place, atol=1e-4)
    assert right.get_xlim() == (-0.8, 1.6) and right.get_ylim()[1] >= 2.4
    assert [t.get_text() for t in right.texts] == [*OTHER_ACTIVATIONS] and [
        t.get_text() for t in left.get_legend().get_texts()
    ] == [*OTHER_ACTIVATIONS, "StarReLU"]


def test_the_curves_are_the_functions():
    left, _ = draw_activation(0.5, -0.8, 1.3).axes
    curves = {line.get_label(): line for line in left.lines}
    assert list(curves) == [*OTHER_ACTIVATIONS, "StarReLU"] and len({line.get_color() for line in left.lines}) == 4
    for name, f in {**OTHER_ACTIVATIONS, "StarReLU": lambda x: 0.5 * torch.relu(x) ** 2 - 0.8}.items():
        x = torch.tensor(np.asarray(curves[name].get_xdata()))
        np.testing.assert_allclose(np.asarray(curves[name].get_ydata()), f(x), atol=1e-6)


def test_names_at_the_marks_do_not_leave_the_picture():
    for s, b in ((2, 1), (2, -1), (0, -1), (0, 1)):
        fig = draw_activation(s, b, 2.)
        fig.canvas.draw()
        for text in fig.axes[1].texts:
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= fig.bbox.x1, (s, b, text)


@pytest.mark.parametrize("sigma", [0.5, 1., 1.7])
def test_words_and_facts_of_starrelu(sigma):
    shown = view_activation(1.2, -0.3, sigma)
    mean, variance = 1.2 * sigma**2 / 2 - 0.3, 1.2**2 * 1.25 * sigma**4
    np.testing.assert_allclose([shown.facts["mean"], shown.facts["variance"]], [mean, variance], rtol=1e-5, atol=1e-6)
    # the answer is not given away
    assert f"= {mean:.3f};" in shown.words and shown.words.endswith(f"= {variance:.3f}.")
    best = 0.8944272 / sigma**2
    shown = view_activation(best, 0.01 - best * sigma**2 / 2, sigma)
    s, b = (float(v.replace("−", "-"))
            for v in re.search(r"exactly at s\s=\s(\S+) and b\s=\s(\S+)\.$", shown.words).groups())
    facts = view_activation(s, b, sigma).facts
    assert abs(facts["mean"]) < 5e-4 and abs(facts["variance"] - 1) < 5e-4


@pytest.mark.parametrize("mean, variance, expected",
                         [(0, 1, True), (0.019, 1.059, True), (-0.019, 0.941, True), (0.021, 1, False),
                          (-0.021, 1, False), (0, 1.061, False), (0, 0.939, False)])
def test_near_is_mean_0_and_variance_1(mean, variance, expected):
    assert reaches_goal(mean, variance) is expected


# --- figures ---

@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_a_new_figure_has_axes_of_the_house(shape):
    fig, axs = new_figure(4, 3, *shape, sharex=True)
    assert type(fig) is Drawing and np.shape(axs) == np.shape(mpl.figure.Figure().subplots(*shape))
    assert tuple(fig.get_size_inches()) == (4, 3) and fig.dpi == 72 and len(fig.axes) == shape[0] * shape[1]
    for ax in np.atleast_1d(axs).flat:
        assert (
            not ax.spines["top"].get_visible()
            and not ax.spines["right"].get_visible()
            and ax.spines["left"].get_visible()
        )
        assert ax.title.get_color() == ax.xaxis.label.get_color() == ax.yaxis.label.get_color() == INK
        assert ax.spines["left"].get_edgecolor()[:3] == to_rgb(FAINT)


def test_new_figures_are_unknown_to_pyplot():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    draw_activation()
    new_figure(2, 2)
    assert plt.get_fignums() == before


def photograph(side=400, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind, make",
                         [("png", lambda ax: ax.plot([1, 2])), ("jpeg", lambda ax: ax.imshow(photograph()))])
def test_a_drawing_shows_itself_as_png_or_as_a_much_smaller_jpeg(kind, make, monkeypatch):
    fig, ax = new_figure(5, 4)
    make(ax)
    (found, data), = fig.picture().items()
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert found == f"image/{kind}" and image.format == kind.upper() and image.size == (400, 320)
        assert min(image.convert("RGB").getpixel((0, 0))) > 250
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **kwargs: shown.append((data, kwargs)))
    fig._ipython_display_()
    (bundle, kwargs), = shown
    assert kwargs == dict(raw=True) and bundle == {found: data, "text/plain": repr(fig)}


def test_a_large_png_stays_where_a_jpeg_would_not_be_much_smaller(monkeypatch):
    fig, _ = new_figure(2, 2)
    sizes = {"png": 100_000, "jpeg": 60_000}
    monkeypatch.setattr(Drawing, "savefig", lambda self, file, format, **_: file.write(bytes(sizes[format])) and None)
    assert list(fig.picture()) == ["image/png"]
    sizes["jpeg"] = 30_000
    assert list(fig.picture()) == ["image/jpeg"]
    sizes.update(png=50_000, jpeg=10)
    assert list(fig.picture()) == ["image/png"]


# --- SVG ---

def rich():
    "A figure with all that a drawing is made of."
    fig, (a, b) = new_figure(6, 3, ncols=2)
    a.plot([0, 1, 2], [1, 3, 2], "o--", color=INK, label="ünïcode ≤ 5 × σ²")
    a.fill_between([0, 1, 2], [0, 1, 0], color=PALE)
    a.scatter([0, 1], [2, 2], c=[FAINT, SERIES[1]])
    a.bar([0, 1], [1, 2], color=SERIES[2], hatch="//", edgecolor=INK)
    a.grid(color=PALE)
    a.legend(labelcolor=INK)
    a.set_title("$x^2$ costs \\$5")
    a.set_xlabel("50 % of <b> & \"c\"")
    b.imshow(np.eye(8))
    b.set_title("<script>alert(1)</script>")
    b.text(1, 1, "a--b $ c", parse_math=False, color=INK)
    b.pcolormesh(np.eye(3))
    b.set_ylabel("Ж ∑")
    return fig


def ids(svg):
    return re.findall(r'\bid="([^"]*)"', svg)


def referred(svg):
    return set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))


def test_svg_is_one_well_formed_picture_of_the_page():
    svg = to_svg(rich())
    tree = ET.fromstring(svg)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg" and svg.startswith("<svg ")
    assert tree.attrib == dict(role="img", viewBox="0 0 432 216") and svg.count('role="img"') == 1
    tags = {node.tag.rpartition("}")[2] for node in tree.iter()}
    assert not tags & {"style", "metadata", "script"} and {"text", "path", "image", "use"} <= tags
    assert "<?xml" not in svg and "DOCTYPE" not in svg and "<style" not in svg and "<metadata" not in svg


def test_svg_takes_the_colours_of_the_page():
    svg = to_svg(rich())
    assert not re.search("|".join(PAGE_COLORS), svg, re.I)
    assert all(color in svg for color in PAGE_COLORS.values()) and SERIES[1] in svg and SERIES[2] in svg
    plain = to_svg(draw_activation(0.7, -0.2, 1.4))
    assert set(re.findall(r"#[0-9a-f]{6}\b", plain)) == set(SERIES[:4]) and "#fff" not in plain


def test_the_background_of_svg_is_transparent():
    fig, _ = new_figure(2, 2)
    first = ET.fromstring(to_svg(fig)).find(".//{*}path")
    assert "fill: none" in first.get("style") or first.get("style", "") == "fill: none"
    assert "#ffffff" not in to_svg(fig)


def test_text_stays_text():
    texts = [" ".join("".join(node.itertext()).split())
             for node in ET.fromstring(to_svg(rich())).iter("{http://www.w3.org/2000/svg}text")]
    for text in ("ünïcode ≤ 5 × σ²", "50 % of <b> & \"c\"", "<script>alert(1)</script>", "a--b $ c", "Ж ∑"):
        assert text in texts, texts
    assert any("x" in text and "2" in text and "costs" in text.replace(" ", "") for text in texts), texts


def test_what_is_referred_to_is_there_once_and_is_another_in_another_drawing():
    one, two = to_svg(rich(), "one"), to_svg(rich(), "two")
    for svg in (one, two):
        assert referred(svg) and referred(svg) <= set(ids(svg)) and len(set(ids(svg))) == len(ids(svg))
    assert not set(ids(one)) & set(ids(two))


def test_explorers_of_one_page_do_not_share_ids():
    one, two = explore_activation(), explore_activation()
    assert referred(one.value) and not set(ids(one.value)) & set(ids(two.value))


def test_equal_figures_give_equal_text():
    assert to_svg(draw_activation(0.5)) == to_svg(draw_activation(0.5)) != to_svg(draw_activation(0.6))
    e = explore_activation()
    before = e.value
    for s in (0.5, 1.):
        e["s"].value = s
        assert e.wait(LONG)
    assert e.value == before


def test_the_numbers_of_artists_are_gone():
    assert not {"figure_1", "axes_1", "axes_2", "patch_1", "text_1", "line2d_1", "legend_1"} & set(ids(to_svg(rich())))


def test_a_photograph_is_in_the_svg():
    fig, ax = new_figure(3, 3)
    ax.imshow(photograph(64), interpolation="nearest")
    data, = re.findall(r'href="data:image/png;base64,\s*([^"]+)"', to_svg(fig))
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size[0] >= 64 and np.asarray(image)[..., :3].std() > 40


@pytest.mark.parametrize("before", ["path", "none"])
def test_svg_leaves_the_settings_and_the_figure_also_after_an_error(before, monkeypatch):
    with mpl.rc_context({"svg.fonttype": before}):
        settings = dict(mpl.rcParams)
        fig = rich()
        size, face = tuple(fig.get_size_inches()), fig.get_facecolor()
        to_svg(fig)
        assert dict(mpl.rcParams) == settings and (tuple(fig.get_size_inches()), fig.get_facecolor(), fig.dpi) == (
            size,
            face,
            72,
        )
        fig.axes[0].set_xlabel("$\\nonsense{$")
        with pytest.raises(ValueError):
            to_svg(fig)
        assert dict(mpl.rcParams) == settings


def test_svg_is_the_same_whatever_the_settings_are():
    fig, expected = draw_activation(), to_svg(draw_activation())
    with mpl.rc_context({"savefig.facecolor": "red", "savefig.transparent": True, "svg.fonttype": "path",
                         "savefig.dpi": 30, "figure.dpi": 200, "svg.hashsalt": "mine"}):
        assert to_svg(fig) == expected


# --- the newest request ---

def test_latest_does_the_first_and_the_newest_and_nothing_in_between():
    done, started, go = [], threading.Event(), threading.Event()

    def do(request):
        started.set()
        assert go.wait(LONG)
        done.append(request)
    latest = Latest(do)
    latest(0)
    assert started.wait(LONG)
    for i in range(1, 50):
        latest(i)
    assert not latest.wait(0.01)
    go.set()
    assert latest.wait(LONG) is True and done == [0, 49]
    latest(50)
    assert latest.wait(LONG) and done == [0, 49, 50]


def test_latest_works_elsewhere_and_its_thread_ends():
    where, before = [], threading.active_count()
    latest = Latest(lambda request: where.append(threading.current_thread()))
    for i in range(3):
        latest(i)
        assert latest.wait(LONG)
    for thread in where:
        assert thread is not threading.current_thread()
        thread.join(LONG)
    assert threading.active_count() <= before


def test_there_is_nothing_to_wait_for_before_the_first_request():
    assert Latest(print).wait(0) is True


def test_a_request_may_be_none_and_may_be_asked_twice():
    done = []
    latest = Latest(done.append)
    for request in (None, 0, None, ()):
        latest(request)
        assert latest.wait(LONG)
    assert done == [None, 0, None, ()]


def test_what_is_done_may_ask_again():
    done = []

    def do(request):
        done.append(request)
        if request < 5:
            latest(-1)
            latest(request + 1)
    latest = Latest(do)
    latest(0)
    assert latest.wait(LONG) and done == [0, 1, 2, 3, 4, 5]


def test_many_threads_ask_one_works_and_the_last_request_is_done():
    active, most, done = [], [], []

    def do(request):
        active.append(request)
        most.append(len(active))
        done.append(request)
        active.remove(request)
    latest = Latest(do)

    def ask(k):
        for i in range(200):
            latest((k, i))
    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(LONG)
    latest("last")
    assert latest.wait(LONG) and done[-1] == "last" and max(most) == 1 and len(set(done)) == len(done)
    for k in range(8):
        assert (own := [i for name, i in (d for d in done if d != "last") if name == k]) == sorted(own)


def test_many_may_wait():
    go, said = threading.Event(), []
    latest = Latest(lambda request: go.wait(LONG))
    latest(1)
    threads = [threading.Thread(target=lambda: said.append(latest.wait(10**6)), daemon=True) for _ in range(5)]
    for t in threads:
        t.start()
    assert not latest.wait(0.05)
    go.set()
    for t in threads:
        t.join(LONG)
    assert said == [True] * 5


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_an_exception_is_reported_and_does_not_end_the_work(kind, monkeypatch):
    done, reported = [], []
    monkeypatch.setattr(threading, "excepthook",
                        lambda args: reported.append((args.exc_type, str(args.exc_value), args.thread)))

    def do(request):
        if request == "bad":
            raise kind("what went wrong")
        done.append(request)
    latest = Latest(do)
    latest("bad")
    assert latest.wait(LONG)
    latest("good")
    assert latest.wait(LONG) and done == ["good"]
    (found, text, thread), = reported
    assert found is kind and text == "what went wrong" and thread is not threading.current_thread()


# --- explorers ---

def number_view(n):
    "A view with every way to fail."
    if n == 13:
        raise ValueError("13 brings bad luck. Take another.")
    if n == 14:
        raise KeyError("fourteen")
    fig, ax = new_figure(2, 1)
    ax.text(0, 0, f"number {n}" if n != 15 else r"$\nonsense{$", color=INK)
    return Shown(fig, f"This is {n}.", dict(n=n))


def integer(value=1):
    return W.IntSlider(value, min=0, max=20, description="n")


def numbers(view=number_view, tries=()):
    return Explorer(view, dict(n=integer()), "Numbers", tries)


def test_an_explorer_opens_computed():
    before = threading.active_count()
    e = numbers()
    assert threading.active_count() == before
    assert ">number 1</text>" in e.value and e.words == "This is 1." and e.busy is False and e.done == []
    assert (e.picture.value, e.picture.words, e.picture.busy, e.picture.tries) == (e.value, e.words, False, [])
    title, row, picture = e.children
    assert (
        title.value == "<b>Numbers</b>" and row.children == (e["n"],) and picture is e.picture and isinstance(e, W.VBox)
    )
    assert "edu-explorer" in e._dom_classes and "edu-controls" in row._dom_classes and e.wait(0)


def test_each_change_is_shown():
    e = numbers()
    for n in (2, 9, 0):
        e["n"].value = n
        assert e.wait(LONG) and f">number {n}</text>" in e.value and e.words == f"This is {n}."
        assert e.picture.value == e.value and e.picture.words == e.words and e.values() == dict(n=n)


@pytest.mark.parametrize("name, value", [("s", 0.4), ("b", -0.3), ("sigma", 1.5)])
def test_each_control_of_starrelu_changes_picture_and_words(name, value):
    e = explore_activation()
    value_before, words = e.value, e.words
    assert e["s"].value == 1 and e["b"].value == 0 and e["sigma"].value == 1
    e[name].value = value
    assert e.wait(LONG) and e.value != value_before and e.words != words
    assert e.words == view_activation(**e.values()).words


def test_the_tries_of_starrelu():
    e = explore_activation()
    assert e.done == [False] * 3 and [done for _, done in e.picture.tries] == e.done
    for values, done in ((dict(b=-0.5), [True, False, False]), (dict(s=0.89), [True, False, False]),
                         (dict(b=-0.45), [True, True, False]),
                         (dict(sigma=1.2), [True, True, False]), (dict(s=0.62), [True, True, True]),
                         (dict(s=0), [True, True, True])):
        for name, value in values.items():
            e[name].value = value
        assert e.wait(LONG) and e.done == done, (values, e.words)
        assert [list(pair) for pair in e.picture.tries] == [[s, d] for (s, _), d in zip(e.picture.tries, done)]
    assert all(isinstance(s, str) and s for s, _ in e.picture.tries)


def test_b_alone_means_that_s_is_as_it_was():
    e = explore_activation()
    e["s"].value = 0.5
    e["b"].value = -0.25
    assert e.wait(LONG) and abs(e.shown.facts["mean"]) < 1e-5 and e.done == [False] * 3


def test_a_value_error_is_a_sentence_and_the_picture_stays():
    e = numbers(tries=[("Find 13.", lambda values, facts: values["n"] == 13)])
    e["n"].value = 5
    assert e.wait(LONG)
    good = e.value
    e["n"].value = 13
    assert e.wait(LONG) and e.words == e.picture.words == "13 brings bad luck. Take another." and e.value == good
    assert e.busy is False and e.done == [False] and e.shown.words == "This is 5."
    e["n"].value = 5
    assert e.wait(LONG) and e.words == "This is 5." and ">number 5</text>" in e.value


def test_another_exception_is_said_and_the_picture_stays():
    e = numbers()
    good = e.value
    e["n"].value = 14
    assert e.wait(LONG) and e.value == good and e.busy is False
    assert (
        e.words.startswith("This could not be shown: KeyError") and "fourteen" in e.words and "Traceback" not in e.words
    )
    e["n"].value = 2
    assert e.wait(LONG) and e.words == "This is 2."


def test_an_explorer_that_cannot_open_says_why():
    with pytest.raises(ValueError, match="13 brings bad luck"):
        Explorer(number_view, dict(n=integer(13)))
    numbers()["n"].value = 3  # and the next one opens


def test_a_figure_that_cannot_be_drawn_leaves_the_last_good_one(monkeypatch):
    e = numbers()
    good = e.value
    e["n"].value = 15  # a label that is no formula
    assert e.wait(LONG) and e.value == good and e.shown.words == "This is 1."
    monkeypatch.setattr(IPython.display, "display", lambda *args, **kwargs: None)
    e._ipython_display_()


def test_changes_during_an_answer_are_answered_by_the_newest():
    asked, started, go = [], threading.Event(), threading.Event()

    def view(n):
        asked.append(n)
        if n == 2:
            started.set()
            assert go.wait(LONG)
        return number_view(n)
    e = numbers(view)
    e["n"].value = 2
    assert started.wait(LONG)
    for n in range(3, 13):
        e["n"].value = n
    go.set()
    assert e.wait(LONG) and asked == [1, 2, 12] and e.words == "This is 12."


def test_each_answer_is_of_the_values_that_were_asked():
    "A request holds the values of its moment, not those of the moment when its turn comes."
    seen, started, go = [], threading.Event(), threading.Event()

    def view(a, b):
        if a == 2:
            started.set()
            assert go.wait(LONG)
        seen.append((a, b))
        return number_view(a)
    e = Explorer(view, dict(a=integer(1), b=integer(1)),
                 tries=[("", lambda values, facts: seen.append(values) is not None)])
    e["a"].value = 2
    assert started.wait(LONG)
    e["b"].value = 7
    go.set()
    assert e.wait(LONG)
    assert seen == [(1, 1), dict(a=1, b=1), (2, 1), dict(a=2, b=1), (2, 7), dict(a=2, b=7)]
    seen.clear()
    with DRAW_LOCK:  # the worker has the request, and waits
        e["b"].value = 8
        while e.latest.waiting:
            go.wait(0.001)
        e["b"].value = 9
    assert e.wait(LONG) and seen[::2] == [(2, 8), (2, 9)]


def test_values_that_are_shown_are_not_asked_again():
    asked = []

    def view(n):
        asked.append(n)
        return number_view(n)
    e = numbers(view)
    with DRAW_LOCK:  # there and back, before the worker can look
        e["n"].value = 2
        while e.latest.waiting:
            threading.Event().wait(0.001)
        e["n"].value = 5
        e["n"].value = 2
    assert e.wait(LONG) and asked == [1, 2] and e.words == "This is 2."
    e.latest(e.values())
    assert e.wait(LONG) and asked == [1, 2]
    for n, expected in ((13, [1, 2, 13]), (2, [1, 2, 13, 2])):  # after an error, the last good values are
        e["n"].value = n
        assert e.wait(LONG) and asked == expected
    assert e.words == "This is 2."


class Timer:
    "One that never rings."
    made = []

    def __init__(self, seconds, ring):
        self.seconds, self.ring, self.did = seconds, ring, []
        self.made.append(self)

    def __getattr__(self, name):
        return lambda: self.did.append(name)


@pytest.mark.parametrize("n", [5, 13, 14])
def test_a_quick_answer_is_never_busy(n, monkeypatch):
    e, seen = numbers(), []
    e.observe(lambda change: seen.append(change["new"]), "busy")
    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(Timer, "made", [])
    e["n"].value = n
    assert e.wait(LONG) and seen == [] and e.busy is False
    timer, = Timer.made
    assert timer.did == ["start", "cancel", "join"] and 0.3 <= timer.seconds <= 1
    timer.ring()
    assert e.busy is True and e.picture.busy is True


@pytest.mark.parametrize("n, words", [(5, "This is 5."), (13, "13 brings"), (14, "This could not")])
def test_a_slow_answer_is_busy_until_it_is_there(n, words):
    seen, rung = [], threading.Event()

    def view(n):
        assert n == 1 or rung.wait(LONG)
        return number_view(n)
    e = numbers(view)
    e.observe(lambda change: seen.append((change["new"], e.picture.busy, e.words)), "busy")
    e.picture.observe(lambda change: change["new"] and rung.set(), "busy")
    e["n"].value = n
    assert e.wait(LONG) and e.busy is False and e.picture.busy is False
    assert (
        [busy for busy, _, _ in seen] == [True, False] and seen[0][2] == "This is 1." and seen[1][2].startswith(words)
    )


def test_ticks_stay_and_what_is_true_from_the_start_is_no_merit():
    tries = [("Find 5.", lambda values, facts: facts["n"] == 5),
             ("Find more than 3.", lambda values, facts: values["n"] > 3),
             ("Go back to 1.", lambda values, facts: values["n"] == facts["n"] == 1)]
    e = numbers(tries=tries)
    assert e.done == [False, False, False]
    for n, done in ((2, [False, False, False]), (4, [False, True, False]), (5, [True, True, False]),
                    (0, [True, True, False]), (1, [True, True, True]), (0, [True, True, True])):
        e["n"].value = n
        assert e.wait(LONG) and e.done == done and all(type(d) is bool for d in e.done)
        assert [list(pair) for pair in e.picture.tries] == [[sentence, d] for (sentence, _), d in zip(tries, done)]


def test_an_explorer_gives_figures_of_other_values_and_stays():
    e = numbers()
    value, words = e.value, e.words
    fig = e.figure(n=8)
    assert type(fig) is Drawing and fig.axes[0].texts[0].get_text() == "number 8"
    assert e.figure().axes[0].texts[0].get_text() == "number 1"
    assert e["n"].value == 1 and (e.value, e.words) == (value, words) and e.wait(0)
    with pytest.raises(ValueError, match="bad luck"):
        e.figure(n=13)
    assert (e.value, e.words) == (value, words)
    with pytest.raises(KeyError):
        e["nonsense"]


def test_values_can_be_observed():
    e, seen = numbers(), []
    e.observe(lambda change: seen.append((change["name"], change["new"])), ["value", "words"])
    e["n"].value = 6
    assert e.wait(LONG) and seen == [("words", "This is 6."), ("value", e.value)]


def test_a_view_may_set_a_control():
    def view(n):
        if n % 2:
            e["n"].value = n + 1
        return number_view(n)
    e = numbers(lambda n: number_view(n))
    e.view = view
    e["n"].value = 7
    assert e.wait(LONG) and e["n"].value == 8 and e.words == "This is 8."


def test_explorers_draw_one_at_a_time():
    active, most = [], []

    def view(n):
        active.append(n)
        most.append(len(active))
        shown = number_view(n)
        threading.Event().wait(0.002)
        active.pop()
        return shown
    several = [numbers(view) for _ in range(3)]

    def play(e, k):
        for n in range(2, 9):
            e["n"].value = n
            e.figure(n=n + k)
    threads = [threading.Thread(target=play, args=(e, k)) for e in several for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(LONG)
    for e in several:
        e["n"].value = 0
        assert e.wait(LONG) and e.words == "This is 0." and ">number 0</text>" in e.value
    assert max(most) == 1
    with DRAW_LOCK:  # free again
        pass


def test_while_one_draws_another_waits():
    e, asked = numbers(), threading.Event()
    e.view = lambda n: asked.set() or number_view(n)
    with DRAW_LOCK:
        e["n"].value = 4
        assert not e.wait(0.05) and not asked.is_set()
        assert e.figure(n=3) is not None  # the one who draws may
        asked.clear()
    assert e.wait(LONG) and asked.is_set() and e.words == "This is 4."


def test_a_closed_explorer_does_no_harm():
    started, go = threading.Event(), threading.Event()

    def view(n):
        assert n == 1 or (started.set(), go.wait(LONG))[1]
        return number_view(n)
    e = numbers(view)
    e["n"].value = 3
    assert started.wait(LONG)
    e.close()
    e.picture.close()
    go.set()
    assert e.wait(LONG) and e.words == "This is 3." and e.busy is False
    e["n"].value = 4
    assert e.wait(LONG) and e.words == "This is 4."


@pytest.mark.parametrize("lab", [True, False])
def test_an_explorer_displays_itself_and_leaves_a_picture(monkeypatch, lab):
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **kwargs: shown.append((data, kwargs)))
    monkeypatch.setattr(base, "two_outputs", lambda: lab)
    e = numbers()
    e["n"].value = 5
    assert e.wait(LONG)
    e._ipython_display_()
    assert (
        [sorted(data) for data, _ in shown]
        == [["application/vnd.jupyter.widget-view+json", "text/plain"], ["image/png", "text/plain"]]
        if lab
        else [["application/vnd.jupyter.widget-view+json", "image/png", "text/plain"]]
    )
    data = {k: v for data, _ in shown for k, v in data.items()}
    assert data["application/vnd.jupyter.widget-view+json"] == dict(version_major=2, version_minor=0,
                                                                    model_id=e.model_id)
    assert data["text/plain"] == "This is 5." and data["image/png"] == e.shown.figure.picture()["image/png"]
    assert [kwargs for _, kwargs in shown] == [dict(raw=True), dict(raw=True, metadata=dict(needs_background="light"))][
        : len(shown)
    ]
    json.dumps(data)


def test_only_jupyterlab_gets_them_in_turns(monkeypatch):
    monkeypatch.delenv("VSCODE_PID", raising=False)
    assert base.two_outputs() is (base.W.__version__ >= "8")
    monkeypatch.setenv("VSCODE_PID", "1")
    assert not base.two_outputs()
    monkeypatch.delenv("VSCODE_PID")
    monkeypatch.setitem(sys.modules, "google.colab", object())
    assert not base.two_outputs()


def test_controls_have_names_and_ranges():
    s, d = slider("σ of the input", 1., 0.5, 2., 0.1), dropdown("stage", [("first", 1), ("second", 2)])
    assert (s.description, s.value, s.min, s.max, s.step) == ("σ of the input", 1, 0.5, 2, 0.1)
    assert (d.description, d.value, list(d.options)) == ("stage", 1, [("first", 1), ("second", 2)])
    picker = ImagePicker({"a": Image.new("RGB", (4, 4))})
    row = base.control_row([s, d, picker])
    assert s.style.description_width == d.style.description_width == "initial" and row.children == (s, d, picker)
    assert row.layout.flex_flow == "row wrap"


def test_a_notebook_keeps_the_picture_and_no_widget(tmp_path):
    cells = ["from metaformer_edu.widgets.activation_explorer import *\nexplore_activation()", "draw_activation(0.5)",
             "e = explore_activation()\ne['s'].value = 0.5\nassert e.wait()\ne",
             "e['b'].value = 0.25\nassert e.wait()\nprint(e.words, e.busy)\ne.figure(s=0.)"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), tmp_path / "nb.ipynb")
    nb = run.execute(tmp_path / "nb.ipynb")
    first, second, third, fourth = [c.outputs for c in nb.cells]
    assert "widgets" not in nb.metadata and "widget-view" not in nbformat.writes(nb)
    for (output,), words in ((first, view_activation(1., 0., 1.).words), (third, view_activation(0.5, 0., 1.).words)):
        assert (
            output.output_type == "display_data"
            and set(output.data) == {"image/png", "text/plain"}
            and output.data["text/plain"] == words
        )
    stream, drawing = fourth
    assert stream.text == f"{view_activation(0.5, 0.25, 1.).words} False\n"
    for output in (second[0], drawing):
        assert set(output.data) == {"image/png", "text/plain"} and output.data["text/plain"].startswith("<Drawing")
    with Image.open(io.BytesIO(base64.b64decode(first[0].data["image/png"]))) as image:
        assert image.size == (736, 280)


# --- images ---

def encoded(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), format=kind, **options)
    return file.getvalue()


def flat(color, size=(6, 4), mode="RGB"):
    return Image.new(mode, size, color)


def as_in_7(**files):
    return {name: dict(metadata=dict(name=name, type="image/png", size=len(data), lastModified=1), content=data)
            for name, data in files.items()}


def as_in_8(**files):
    when = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    return tuple(dict(name=name, type="image/png", size=len(data), last_modified=when, content=memoryview(data))
                 for name, data in files.items())


def send(button, counter=[0], **files):
    "What the browser sends after a file was chosen, in the version that is installed."
    counter[0] += 1
    about = [dict(name=name, type="image/png", size=len(data)) for name, data in files.items()]
    if W.__version__.startswith("7."):
        button.set_state(dict(metadata=about, data=[memoryview(data) for data in files.values()], _counter=counter[0]))
    else:
        button.set_state(dict(value=[dict(a, last_modified=counter[0], content=memoryview(data))
                                     for a, data in zip(about, files.values())]))


@pytest.mark.parametrize("form", [as_in_7, as_in_8])
def test_what_an_upload_button_holds(form):
    found = uploaded_files(form(**{"a.png": b"one", "ü b.jpg": b"two"}))
    assert found == {"a.png": b"one", "ü b.jpg": b"two"} and all(type(v) is bytes for v in found.values())
    assert uploaded_files(form()) == {}


def picker_of(*colors):
    picker, seen = ImagePicker({color: flat(color) for color in colors}), []
    picker.observe(lambda change: seen.append((picker.name, change["new"].getpixel((0, 0)))), "value")
    return picker, seen


def test_a_picker_gives_an_image_by_its_name():
    picker, seen = picker_of("red", "blue")
    assert (
        picker.name == "red"
        and picker.value.getpixel((0, 0)) == (255, 0, 0)
        and picker.names.options == ("red", "blue")
    )
    picker.names.value = "blue"
    assert picker.name == "blue" and seen == [("blue", (0, 0, 255))] and picker.value is picker.images["blue"]
    assert isinstance(picker, W.VBox) and picker.upload.accept == "image/*"


def test_a_picker_does_not_change_the_images_it_was_given():
    images = {"red": flat("red")}
    picker = ImagePicker(images)
    send(picker.upload, **{"own.png": encoded(flat("lime"))})
    assert list(images) == ["red"] and list(picker.images) == ["red", "own.png"]


@pytest.mark.parametrize("form", [as_in_7, as_in_8])
def test_an_uploaded_image_is_shown(form):
    picker, seen = picker_of("red")
    picker.take(dict(new=form(**{"own.png": encoded(flat("lime"))})))
    assert picker.name == "own.png" == picker.names.value and picker.value.getpixel((0, 0)) == (0, 255, 0)
    assert (
        seen == [("own.png", (0, 255, 0))] and picker.names.options == ("red", "own.png") and picker.message.value == ""
    )
    picker.names.value = "red"
    picker.names.value = "own.png"
    assert [name for name, _ in seen[-2:]] == ["red", "own.png"]


def test_an_upload_through_the_button_itself():
    picker, seen = picker_of("red", "blue")
    picker.names.value = "blue"
    send(picker.upload, **{"own.png": encoded(flat("lime"))})
    # not the first of the list in between
    assert picker.name == "own.png" and seen == [("blue", (0, 0, 255)), ("own.png", (0, 255, 0))]
    send(picker.upload, **{"own.png": encoded(flat("yellow"))})  # the same name again, another picture
    assert (
        picker.name == "own.png"
        and seen[-1] == ("own.png", (255, 255, 0))
        and picker.names.options == ("red", "blue", "own.png")
    )
    picker.names.value = "red"
    send(picker.upload, **{"own.png": encoded(flat("black"))})  # and again while another is shown
    assert picker.name == "own.png" == picker.names.value and picker.value.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(flat("red"))[:40],
                                  b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_a_file_that_is_no_image_is_a_sentence_and_the_image_stays(data):
    picker, seen = picker_of("red")
    send(picker.upload, **{"<script>alert(1)</script> & co.png": data})
    assert picker.message.value == "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co.png cannot be read as an image."
    assert picker.name == "red" and not seen and list(picker.images) == ["red"] == list(picker.names.options)
    send(picker.upload, **{"own.png": encoded(flat("lime"))})
    assert picker.message.value == "" and picker.name == "own.png"


def deep(values=(0, 20_000, 40_000, 65_535)):
    return Image.fromarray(np.array([values], dtype=np.uint16))


def turned():
    image = Image.new("RGB", (6, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    return encoded(image, "JPEG", exif=exif, quality=95)


LOOKS = {
    "transparent": (encoded(flat((0, 0, 0, 0), mode="RGBA")), (6, 4), (255, 255, 255)),
    "half": (encoded(flat((0, 0, 0, 51), mode="RGBA")), (6, 4), (204, 204, 204)),
    "grey": (encoded(flat(77, mode="L")), (6, 4), (77, 77, 77)),
    "palette": (encoded(flat("blue").convert("P")), (6, 4), (0, 0, 255)),
    "16 bit": (encoded(deep()), (4, 1), (0, 0, 0)),
    "exif": (turned(), (4, 6), (254, 0, 0)),
    "cmyk": (encoded(flat("white").convert("CMYK"), "JPEG"), (6, 4), (255, 255, 255)),
    "gif": (encoded(flat("blue"), "GIF"), (6, 4), (0, 0, 255)),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_uploaded_images_are_as_they_are_meant_to_be_seen(kind):
    data, size, color = LOOKS[kind]
    picker, _ = picker_of("red")
    send(picker.upload, own=data)
    assert picker.name == "own" and picker.value.mode == "RGB" and picker.value.size == size
    np.testing.assert_allclose(picker.value.getpixel((0, 0)), color, atol=3)
    if kind == "16 bit":
        np.testing.assert_allclose(np.asarray(picker.value)[0, :, 0], [0, 78, 156, 255], atol=1)


def test_images_as_files_tensors_and_pil(tmp_path):
    flat("blue").save(tmp_path / "one.png")
    (tmp_path / "two.jpg").write_bytes(turned())
    found = named_images([flat("red"), tmp_path / "one.png", str(tmp_path / "two.jpg"), torch.full((3, 5, 7), 0.5)])
    assert list(found) == ["image 1", "one.png", "two.jpg", "image 4"] and {x.mode for x in found.values()} == {"RGB"}
    assert (
        found["two.jpg"].size == (4, 6)
        and found["image 4"].size == (7, 5)
        and found["image 4"].getpixel((0, 0)) == (128,) * 3
    )
    assert found["one.png"].getpixel((0, 0)) == (0, 0, 255)
    assert list(named_images(tmp_path / "one.png")) == ["one.png"] and list(named_images(flat("red"))) == ["image 1"]
    assert list(named_images({"mine": flat("red"), 3: torch.zeros(3, 2, 2)})) == ["mine", "3"]
    assert list(named_images((flat("red"), flat("red")))) == ["image 1", "image 2"]


@pytest.mark.parametrize("images", [[], {}, None, 5, [flat("red"), 5], np.zeros((4, 4, 3)), {"a": None}])
def test_what_is_no_image_is_refused(images):
    with pytest.raises(ValueError, match="Give images as PIL images, files, or tensors"):
        named_images(images)


@pytest.mark.parametrize("name", ["nothing.png", "broken.png", "."])
def test_files_that_cannot_be_read_are_named(name, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
        named_images(tmp_path / name)


def test_two_files_of_one_name_stay_two(tmp_path):
    for folder, color in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        flat(color).save(tmp_path / folder / "x.png")
    found = named_images([tmp_path / "a/x.png", tmp_path / "b/x.png"])
    assert list(found) == ["x.png", "x.png (2)"]
    assert [x.getpixel((0, 0)) for x in found.values()] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("kind", ["transparent", "half", "16 bit", "exif"])
def test_a_pil_image_and_a_file_are_seen_alike(kind, tmp_path):
    data, size, color = LOOKS[kind]
    (tmp_path / "file").write_bytes(data)
    with Image.open(tmp_path / "file") as image:
        found = named_images([image, tmp_path / "file"])
    assert list(found) == ["image 1", "file"]
    for image in found.values():
        assert image.size == size and image.mode == "RGB"
        np.testing.assert_allclose(np.asarray(image)[0, -1], 255 if kind == "16 bit" else color, atol=3)
        assert kind != "16 bit" or abs(image.getpixel((1, 0))[0] - 78) <= 1


def test_a_tensor_as_an_image_and_back():
    pixels = torch.from_numpy(photograph(16)).permute(2, 0, 1)
    assert torch.equal(torch.from_numpy(np.array(to_pil(pixels / 255))).permute(2, 0, 1), pixels)
    assert torch.equal(torch.from_numpy(np.array(to_pil(pixels.double() / 255))).permute(2, 0, 1), pixels)
    edge = to_pil(torch.tensor([-1., 2., float("nan"), 0.4999 / 255])[None, None].expand(3, 1, 4))
    assert np.asarray(edge)[0, :, 0].tolist() == [0, 255, 0, 0]
    assert to_pil(torch.zeros(3, 2, 5).requires_grad_()).size == (5, 2)
    assert to_pil(torch.full((3, 2, 2), 0.25, dtype=torch.bfloat16)).getpixel((0, 0)) == (64, 64, 64)


@pytest.mark.parametrize("x", [torch.zeros(1, 4, 4), torch.zeros(4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(4, 4, 3),
                               torch.zeros(3, 4, 4).byte()])
def test_a_tensor_that_is_no_image_is_refused(x):
    with pytest.raises(ValueError, match=re.escape(f"this is {tuple(x.shape)} of {x.dtype}.")):
        to_pil(x)


def test_the_example_images():
    images = example_images()
    assert list(images) == ["china", "flower", *SHAPES, "digit"]
    assert all(isinstance(x, Image.Image) and x.mode == "RGB" and min(x.size) >= 128 for x in images.values())
    assert all(np.asarray(x).std() > 5 for x in images.values()) and len({x.tobytes() for x in images.values()}) == 8
    assert example_images() is images  # made once


def test_each_example_shape_is_the_first_held_out_picture_of_its_class():
    _, val, about = load_shapes("shape", 128)
    labels = [about.class_names[val[i][1]] for i in range(60)]
    for name in SHAPES:
        assert example_images()[name].tobytes() == to_pil(about.picture(val[labels.index(name)][0])).tobytes()


# --- runs ---

def test_the_examples_come_along():
    runs = example_runs()
    assert list(runs) == FAMILIES
    for folder in runs.values():
        for name in ("args.yaml", "summary.csv", "best.safetensors", "snapshots/pictures.safetensors"):
            assert (folder / name).is_file(), folder / name


def test_the_example_models_answer():
    models = example_models()
    assert list(models) == FAMILIES and example_models() is models
    for name, model in models.items():
        assert (
            not model.training
            and model.num_classes == 5
            and model.img_size == 128
            and model.pretrained_cfg["architecture"] == f"tiny_{name}"
        )
        assert {p.dtype for p in model.parameters()} == {torch.float32} and all(
            p.isfinite().all() for p in model.parameters()
        )


@pytest.fixture(scope="module")
def held_out():
    _, val, _ = load_shapes("shape", 128)
    pairs = [val[i] for i in range(0, 500, 3)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_model_is_as_good_as_its_table_says(family, held_out):
    images, labels = held_out
    with torch.no_grad():
        logits = torch.cat([example_models()[family](x) for x in images.split(50)])
    found, said = (logits.argmax(1)
                   == labels).float().mean().item(), max(row["val_top1"]
                                                         for row in read_log(example_runs()[family])) / 100
    assert abs(found - said) < 4 * (said * (1 - said) / len(labels)) ** 0.5 + 0.01


@pytest.fixture
def folder(tmp_path):
    "A run of three classes as metaformer-train leaves it."
    model = create_model("tiny_caformer", num_classes=3, img_size=64)
    (tmp_path / "run").mkdir()
    save_weights(model, tmp_path / "run" / "best.safetensors")
    about = dict(command="metaformer-train", settings=dict(model="tiny_caformer"), img_size=64,
                 class_names=["ant", "bee", 3])
    (tmp_path / "run" / "args.yaml").write_text(yaml.safe_dump(about))
    return tmp_path / "run"


def rewrite(folder, **changes):
    about = yaml.safe_load((folder / "args.yaml").read_text())
    about.update(changes)
    (folder / "args.yaml").write_text(yaml.safe_dump({k: v for k, v in about.items() if v != "gone"}))


@pytest.mark.parametrize("kind", [str, lambda p: p])
def test_a_run_is_opened(folder, kind, monkeypatch):
    model, names = load_run(kind(folder))
    assert names == ["ant", "bee", "3"] and not model.training and model.num_classes == 3 and model.img_size == 64
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    saved = sources.create_model("tiny_caformer", checkpoint=folder / "best.safetensors", num_classes=3,
                                 img_size=64).state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert load_run("~/run")[1] == names


def one_sentence(error):
    text = str(error)
    return text and "\n" not in text and text.endswith(".") and "Traceback" not in text


@pytest.mark.parametrize("damage",
                         ["no folder", "empty", "a file", "no yaml", "not whole", "other yaml", "no size", "no names"])
def test_what_is_no_run_is_refused_in_a_sentence(damage, folder):
    {"no folder": lambda: shutil.rmtree(folder), "empty": lambda: [p.unlink() for p in folder.iterdir()],
     "a file": lambda: (shutil.rmtree(folder), folder.write_text("hello")),
     "no yaml": lambda: (folder / "args.yaml").write_bytes(b"\xff\xfe\x00:["),
     "not whole": lambda: (folder / "args.yaml").write_text("settings: {model: tiny_caformer"),
     "other yaml": lambda: (folder / "args.yaml").write_text("- 1\n- 2\n"),
     "no size": lambda: rewrite(folder, img_size="gone"),
     "no names": lambda: rewrite(folder, class_names="gone")}[damage]()
    with pytest.raises(ValueError,
                       match=re.escape(f"{folder} is no folder of a run that metaformer-train wrote.")) as caught:
        load_run(folder)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("damage, error, says", [
    (lambda f: (f / "best.safetensors").unlink(), WeightsError, "There is no weight file"),
    (lambda f: (f / "best.safetensors").write_bytes(b"1234"), WeightsError, "it is damaged or no weight file"),
    (lambda f: rewrite(f, settings=dict(model="tiny_poolformerv2")), WeightsError, "do not fit the model"),
    (lambda f: rewrite(f, settings=dict(model="tiny_camelformer")), ValueError, "There is no model 'tiny_camelformer'"),
])
def test_a_run_without_its_model_says_what_is_wrong(damage, error, says, folder):
    damage(folder)
    with pytest.raises(error, match=says):
        load_run(folder)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes",
                         [dict(settings=dict(lr=1)), dict(settings=dict(model=["a"])), dict(class_names=None),
                          dict(class_names="abc"),
                                     dict(img_size=None), dict(img_size="big"), dict(class_names=["ant", "bee"])])
def test_a_run_with_damaged_settings_is_refused_in_a_sentence(changes, folder):
    rewrite(folder, **changes)
    with pytest.raises((ValueError, WeightsError)) as caught:
        load_run(folder)
    assert one_sentence(caught.value) and str(folder) in str(caught.value)
