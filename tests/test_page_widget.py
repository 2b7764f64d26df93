"""The page in a cell: `PageWidget` as anywidget would mount it, in Chromium without a kernel, and explorers that hand
over to it."""
import base64
import json

import ipywidgets as W
import numpy as np
import pytest
import torch
from PIL import Image

from browser import PATIENCE, browser, listen
from metaformer_edu import explore_cam, explore_mixing, explore_page
from metaformer_edu.models.registry import create_model
from metaformer_edu.widgets import page as module
from metaformer_edu.widgets.page import Handover, PageWidget, as_float16
from metaformer_edu.widgets.sources import example_images, example_models, example_runs

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = example_runs()["identityformer"]

NOTEBOOK = """<!DOCTYPE html><html><head><style>
body { color: rgb(20, 20, 20); } body.dark { color: rgb(230, 230, 230); background: black; }
button { background: rgb(255, 0, 0); } h1 { font-size: 77px; } .card { display: none; }
</style></head><body><h1 class="top">Mine</h1><div id="cell"></div></body></html>"""

MOUNT = """async ([esm, state, weights, view]) => {
    const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const message = bytes(weights.join('')), heard = [];
    let at = 0;
    state.tasks[0].models.forEach((m) => { // views of one message, as Jupyter has them
        m.weights = new DataView(message.buffer, at, m.bytes);
        at += m.bytes });
    const values = { state, view };
    const model = { get: (name) => values[name], set: (name, value) => { values[name] = value; model.tell() },
        on: (event, f) => heard.push(f), off: (event, f) => heard.splice(heard.indexOf(f), 1), save_changes() {},
        tell: () => heard.forEach((f) => f()) };
    Object.assign(globalThis, { values, model, heard });
    const address = URL.createObjectURL(new Blob([esm], { type: 'text/javascript' }));
    const { default: widget } = await import(address);
    URL.revokeObjectURL(address);
    globalThis.cell = document.getElementById('cell');
    cell.remove(); // JupyterLab may put the cell there after it is filled
    globalThis.close_cell = widget.render({ model, el: cell });
    document.body.append(cell);
    globalThis.app = cell.firstChild.__app }"""


@pytest.fixture(scope="module")
def widget():
    return explore_page(RUN)


@pytest.fixture(scope="module")
def opened(widget):
    with browser() as chromium:
        page = chromium.new_context(offline=True).new_page()
        page.set_default_timeout(PATIENCE)
        said = listen(page)
        page.set_content(NOTEBOOK)
        state = json.loads(json.dumps(widget.state, default=len))
        weights = [model["weights"] for model in widget.state["tasks"][0]["models"]]
        for model, data in zip(state["tasks"][0]["models"], weights):
            model["bytes"] = len(data)
        page.evaluate(MOUNT, [widget._esm, state, [base64.b64encode(b"".join(weights)).decode()], ""])
        quiet(page)
        yield page
        assert said == []


def quiet(page, true="true"):
    page.wait_for_function(f"() => app.views.play.device && !app.views.play.running && {true}")
    assert not page.evaluate("app.views.play.failed"), page.locator(".status").first.inner_text()


def test_its_models_are_pytorchs(opened):
    image, logits = opened.evaluate("[app.views.play.image, app.views.play.list[0].logits].map((x) => Array.from(x))")
    with torch.no_grad():
        known = example_models()["identityformer"](torch.tensor(image).view(1, 3, 128, 128))[0]
    np.testing.assert_allclose(logits, known, rtol=1e-4, atol=1e-4)


def test_no_style_leaves_it_or_comes_in(opened):
    "The page has .top, .card and button too."
    own = opened.evaluate("[getComputedStyle(document.querySelector('h1')).fontSize, "
                          "getComputedStyle(document.querySelector('h1')).display]")
    assert own == ["77px", "block"]
    assert opened.locator("#cell .card").first.is_visible()
    red = "(o) => getComputedStyle(o).backgroundColor"
    assert all(o.evaluate(red) != "rgb(255, 0, 0)" for o in opened.locator("#cell button").all())


def test_it_is_as_light_or_dark_as_the_notebook(opened):
    ground = "getComputedStyle(cell.firstChild).backgroundColor"
    matrix = "app.views.play.list[0].matrix.canvas.toDataURL()"
    before = opened.evaluate(f"[{ground}, {matrix}]")
    opened.evaluate("document.body.classList.add('dark')")
    opened.wait_for_function(f"(before) => {matrix} !== before", arg=before[1])
    assert before[0] == "rgb(255, 255, 255)" and opened.evaluate(ground) == "rgb(21, 23, 27)"
    opened.evaluate("document.body.classList.remove('dark')")
    opened.wait_for_function(f"(before) => {matrix} === before", arg=before[1])


def test_what_is_shown_is_a_trait(opened):
    "The address of the notebook stays as it is, whether Python or a click goes elsewhere."
    opened.evaluate("model.set('view', 'view=inside&stage=2&block=1&part=mixer&token=3.4')")
    quiet(opened, "app.views.play.inside.found")
    assert opened.locator("#cell .inside").is_visible()
    field = opened.locator("#cell .inside").get_by_label("number")
    field.click()
    field.press("ControlOrMeta+a")
    for key in ("7", "Enter"):
        opened.keyboard.press(key)
    assert opened.evaluate("app.views.play.inside.number") == 6 and "number=7" in opened.evaluate("values.view")
    opened.locator("#cell .inside canvas").first.focus()
    opened.locator("#cell").get_by_role("button", name="Play", exact=True).first.click()
    quiet(opened)
    assert opened.evaluate("values.view") == "" and opened.evaluate("location.hash") == ""
    opened.get_by_label("mixer of stage 3").select_option("Pooling")
    quiet(opened, "app.views.play.list[0].mixers[2] === 'Pooling'")
    opened.get_by_role("link", name="Train it").click()
    assert "right=Pooling.Pooling" in opened.evaluate("values.view")
    assert "explore_page(…, view=…)" in opened.locator(".learning").inner_text()
    opened.evaluate("model.set('view', '')")
    quiet(opened)


def test_the_tour_stands_above_the_notebook(opened):
    opened.locator("#cell").get_by_role("button", name="Tour", exact=True).click()
    box = opened.locator("#cell .tour").bounding_box()
    assert opened.evaluate("({ x, y }) => document.elementFromPoint(x + 9, y + 9) === cell.firstChild", box)
    opened.wait_for_function("() => cell.firstChild.shadowRoot.activeElement === app.tour.after")
    opened.keyboard.press("Escape")
    opened.wait_for_function("() => app.tour.root.hidden")
    assert not opened.locator("#cell .tour").is_visible()


def test_a_cell_that_goes_ends_its_workers(opened):
    "The last of these tests: after it the widget is closed."
    why = opened.evaluate("""async () => {
        close_cell();
        return app.views.play.ask('start', {}).catch((error) => error.message) }""")
    assert why == "closed" and opened.evaluate("heard.length") == 0


# --- in Python ---

def test_weights_travel_as_bytes_of_a_file(widget):
    (sent,), = [task["models"] for task in widget.state["tasks"]]
    assert sent["weights"] == as_float16(example_models()["identityformer"]) and sent["checked"]["changed"] == 0
    assert widget.view == "" and explore_page(RUN, [], view="view=learn").view == "view=learn"


def test_who_has_no_widgets_reads_a_sentence(widget, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: shown.append(data))
    widget._ipython_display_()
    live, instead = shown
    assert live["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    assert "identityformer" in instead["text/html"] and "Run this cell" in instead["text/plain"]


def test_too_many_weights_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 100_000)
    with pytest.raises(ValueError, match="take fewer or smaller models"):
        explore_page(RUN)


def handover(explorer):
    found = [child for child in explorer.children if isinstance(child, Handover)]
    return found[0] if found else None


@pytest.mark.parametrize("make", [lambda: explore_cam(RUN, example_images()), lambda: explore_mixing(
    example_models()["identityformer"], example_images())], ids=["cam", "mixing"])
def test_an_explorer_hands_over_and_takes_back(make):
    explorer = make()
    own, over = explorer.children, handover(explorer)
    picker = next(o for o in [*own, *getattr(explorer, "controls", {}).values()] if hasattr(o, "upload"))
    picker.names.value = "triangle"
    over.button.click()
    page = explorer.children[-1]
    assert isinstance(page, PageWidget) and over.message.value == "" and over.button.description == "back to Python"
    assert all(isinstance(child, (W.HTML, Handover, PageWidget)) for child in explorer.children)
    task, = page.state["tasks"]
    assert task["shown"] and [o["name"] for o in task["examples"]][0] == "triangle" and len(task["examples"]) == 8
    assert page.state["stage"] == (explorer["stage"].value if hasattr(explorer, "controls") else explorer.stage) - 1
    over.button.click()
    assert explorer.children == own and over.button.description == "answer in the browser"


def test_what_the_page_cannot_compute_stays_with_python():
    small, odd = create_model("tiny_convformer", num_classes=3), create_model("tiny_convformer", in_chans=1)
    big = create_model("convformer_s18", num_classes=3)
    assert handover(explore_cam(big, example_images()["ring"])) is None and not module._can_hand_over(odd)
    over = handover(explore_cam(dict(small=small, big=big), example_images()["ring"]))
    over.button.click()
    assert list(over.runs) == ["small"] and over.message.value == "big: only with Python."


def test_a_model_that_cannot_be_handed_over_says_why():
    explorer = explore_cam(model := create_model("tiny_poolformerv2", num_classes=2), example_images()["ring"])
    own, over = explorer.children, handover(explorer)
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    over.button.click()
    assert explorer.children == own and "float16 cannot hold" in over.message.value and not over.button.disabled


def test_pictures_are_cut_and_not_squeezed():
    wide = Image.new("RGB", (200, 100), "black")
    wide.paste("white", (75, 25, 125, 75))  # a square in the middle
    cut = np.asarray(module._cut(wide, (64, 64)))
    assert cut.shape == (64, 64, 3) and (cut[32] > 128).sum() == (cut[:, 32] > 128).sum()
