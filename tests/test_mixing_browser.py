"""mixing.js alone in Chromium: in the page that `save_mixing_page` writes, and beside a kernel that answers when the
test says so."""
import base64
import json

import numpy as np
import pytest
import torch

from browser import browser, listen
from metaformer_edu.core.basics import sample_photo
from metaformer_edu.models.registry import FAMILIES, create_model
from metaformer_edu.widgets.base import STATIC
from metaformer_edu.widgets.mixing_explorer import MixingModels, row_and_column, save_mixing_page
from metaformer_edu.widgets.sources import to_pil

BOARD, MAPS = ".edu-panels", "canvas[data-map]"


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def heard():
    "Five tiny models, and a photograph."
    torch.manual_seed(0)
    models = {family: create_model(f"tiny_{family}", num_classes=5, img_size=128).eval() for family in FAMILIES}
    return MixingModels(models, to_pil(sample_photo("flower", 128)))


@pytest.fixture(scope="module")
def path(heard, tmp_path_factory):
    models = dict(heard.models)
    return save_mixing_page(tmp_path_factory.mktemp("page") / "page.html", models, to_pil(sample_photo("flower", 128)))


@pytest.fixture
def opened(chromium, path):
    "Opens the page offline; afterwards it must have complained about nothing and asked nobody."
    contexts, said = [], []

    def open_page(width=1280, file=path, **options):
        context = chromium.new_context(viewport=dict(width=width, height=1000), offline=True, **options)
        page = context.new_page()
        contexts.append(context)
        said.append(listen(page))
        page.on("request", lambda r: said[-1].append(r.url) if r.url != file.as_uri() else None)
        page.goto(file.as_uri())
        page.wait_for_selector(MAPS)
        return page
    yield open_page
    for context in contexts:
        context.close()
    assert not any(said), said


def flush(page):
    page.evaluate("document.getElementById('page').__mixing.flush()")


def pixels(page):
    flush(page)
    return page.evaluate(f"[...document.querySelectorAll('{MAPS}')].map(c => c.toDataURL())")


def token(page):
    return page.evaluate("document.getElementById('page').__mixing.state.token")


def words(page):
    flush(page)
    return page.evaluate("document.getElementById('page').__mixing.words()")


def values(page, panel, which):
    flush(page)
    return np.array(page.evaluate(f"document.getElementById('page').__mixing.values({panel}, '{which}')"))


def hover(page, row, column, grid=8, canvas=0):
    node = page.locator(MAPS).nth(canvas)
    node.scroll_into_view_if_needed()
    box = node.bounding_box()
    page.mouse.move(box["x"] + (column + 0.5) / grid * box["width"], box["y"] + (row + 0.5) / grid * box["height"])
    page.wait_for_function(f"() => String(document.getElementById('page').__mixing.state.token) === '{row},{column}'")


def done(page):
    flush(page)
    return page.locator("li.edu-done").all_inner_texts()


# --- pointing ---

def test_hovering_changes_every_panel(opened):
    page = opened()
    hover(page, 2, 2)
    before = pixels(page)
    hover(page, 6, 5, canvas=3)
    assert all(a != b for a, b in zip(before, pixels(page))) and len(before) == 10


@pytest.mark.parametrize("stage, grid", [(1, 32), (3, 8), (4, 4)])
def test_what_is_drawn_and_said_is_what_python_computes(opened, heard, stage, grid):
    page = opened()
    page.get_by_label("stage").select_option(str(stage))
    place = heard[stage, 1]
    for row, column in ((0, 0), (grid - 1, 1), (grid // 2, grid // 2)):
        hover(page, row, column, grid)
        for i, panel in enumerate(place.panels):
            for known, which in zip(row_and_column(panel, (row, column)), ("hears", "heard")):
                np.testing.assert_array_equal(values(page, i, which), known.ravel())
        assert words(page) == place.words((row, column))


def test_an_empty_panel_says_why(opened, tmp_path):
    own = ("RandomMixing", "Identity", "Identity", "Identity")
    models = dict(small=create_model("tiny_identityformer", num_classes=0),
                  large=create_model("tiny_randformer", img_size=290, token_mixers=own, num_classes=0))
    image = to_pil(sample_photo("flower", 290))
    file = save_mixing_page(tmp_path / "page.html", models, image, [(1, 1)])
    place, page = MixingModels(models, image)[1, 1], opened(file=file)
    assert "5,184 tokens are too many" in words(page) == place.words((8, 8))
    assert page.locator(MAPS).count() == 2 and page.locator(".edu-panel").count() == 2


def test_a_coarse_panel_beside_fine_ones(opened, tmp_path):
    model = create_model("tiny_convformer", img_size=(132, 148), num_classes=0).eval()
    image = torch.rand(3, 132, 148)
    file = save_mixing_page(tmp_path / "page.html", model, image, [(1, 1)])
    place, page = MixingModels(model, image)[1, 1], opened(file=file)
    assert place.grid == (33, 37) and [p.group for p in place.panels] == [1, 2, 1, 1, 2]
    page.locator(BOARD).focus()
    page.keyboard.press("Control+End")
    assert words(page) == place.words((32, 36)) and "group" in words(page)
    np.testing.assert_array_equal(values(page, 4, "heard"), row_and_column(place.panels[4], (16, 18))[1].ravel())


def test_a_tap(opened):
    page = opened(width=700, has_touch=True)
    box = page.locator(MAPS).nth(1).bounding_box()
    page.touchscreen.tap(box["x"] + 3, box["y"] + 3)
    page.wait_for_function("() => String(document.getElementById('page').__mixing.state.token) === '0,0'")
    assert words(page).startswith("Token row 0, column 0 of 8×8.")


def test_keys(opened):
    page = opened()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.edu-panels')")
    assert page.locator(BOARD).evaluate("o => getComputedStyle(o).outlineStyle") == "solid"
    found, before = [token(page)], pixels(page)
    for key in ("ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight", "Home", "End", "ArrowRight", "Control+Home",
                "ArrowUp", "Control+End"):
        page.keyboard.press(key)
        found.append(token(page))
    assert found == [[4, 4], [3, 4], [3, 3], [4, 3], [4, 4], [4, 0], [4, 7], [4, 7], [0, 0], [0, 0], [7, 7]]
    assert all(a != b for a, b in zip(before, pixels(page)))
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"
    hover(page, 1, 1)
    assert page.get_by_role("status").get_attribute("aria-live") == "off"


def test_other_keys_are_left_alone(opened):
    page = opened()
    page.locator(BOARD).focus()
    page.evaluate(
        "window.taken = []; document.addEventListener('keydown', e => taken.push([e.key, e.defaultPrevented]))"
    )
    for key in ("a", "Escape", "ArrowUp"):
        page.keyboard.press(key)
    assert page.evaluate("taken") == [["a", False], ["Escape", False]]


# --- choosing ---

def test_stages_and_blocks(opened, heard):
    page = opened()
    hover(page, 7, 1)
    before = pixels(page)
    page.get_by_label("block").select_option("2")
    assert page.locator("#page").get_attribute("data-place") == "3,2" and pixels(page) != before
    page.get_by_label("stage").select_option("4")
    assert page.locator("#page").get_attribute("data-place") == "4,1" and token(page) == [3, 0]
    assert page.get_by_label("block").is_disabled()
    assert words(page) == heard[4, 1].words((3, 0))


def test_one_scale_for_all(opened):
    page = opened()
    hover(page, 4, 4)
    before, ends = pixels(page), page.locator(".edu-ends").all_inner_texts()
    page.get_by_label("one scale for all").check()
    after = pixels(page)
    assert [a == b for a, b in zip(before, after)] == [i < 2 for i in range(10)]  # Identity's 1 is the strongest
    assert len(set(e.split()[-1] for e in page.locator(".edu-ends").all_inner_texts())) == 1
    page.get_by_label("one scale for all").uncheck()
    assert pixels(page) == before and page.locator(".edu-ends").all_inner_texts() == ends


def test_what_is_found_is_ticked(opened):
    page = opened()
    assert not done(page) and page.locator("li").count() == 5
    hover(page, 0, 7)
    assert any("corner" in text and "Done" in text for text in done(page))
    for stage in "124":
        page.get_by_label("stage").select_option(stage)
        flush(page)
    assert any("every stage" in text for text in done(page)) and any(
        "SepConv hears every" in text for text in done(page)
    )


def test_a_token_that_attention_lets_hear_itself_most(opened, heard):
    page, panel = opened(), heard[3, 1].panels[4]
    itself = [t for t in np.ndindex(8, 8) if abs(row_and_column(panel, t)[0]).argmax() == 8 * t[0] + t[1]]
    assert 0 < len(itself) < 32 and (4, 4) not in itself
    other = next(t for t in np.ndindex(8, 8) if t not in itself)
    hover(page, *other)
    assert not any("hear itself most" in text for text in done(page))
    hover(page, *itself[0])
    assert any("hear itself most" in text and "Done" in text for text in done(page))


# --- looks ---

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 700, 380])
def test_nothing_runs_out_of_the_page(opened, width, scheme):
    page = opened(width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [node.bounding_box() for node in page.locator(MAPS).all()]
    assert all(b["x"] >= 0 and b["x"] + b["width"] <= width and b["width"] > 90 for b in boxes)
    assert len({round(b["x"]) for b in boxes}) == {1280: 5, 700: 3, 380: 2}[width]


def luminance(color):
    parts = np.array([float(c) for c in color[color.index("(") + 1:-1].replace("/", " ").replace(",", " ").split()
                      if c[0].isdigit()][:3])
    linear = np.array(parts) / (1 if color.startswith("color(") else 255)
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055)**2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(opened, scheme):
    page = opened(color_scheme=scheme)
    canvas, *inks = page.evaluate("""[getComputedStyle(document.body).backgroundColor,
        ...['.edu-title', '.edu-note', '.edu-caption', '.edu-words', 'select', 'li', 'label']
        .map(o => getComputedStyle(document.querySelector(o)).color)]""")
    for ink in inks:
        light, dark = sorted((luminance(ink), luminance(canvas)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, (ink, canvas)


def test_everything_has_a_name(opened):
    page = opened()
    tree = page.locator("#page").aria_snapshot()
    for name in ('combobox "stage"', 'combobox "block"', 'checkbox "one scale for all"', 'application "Who hears whom',
                 'list "Try this"', "status"):
        assert name in tree, f"{name} is not in\n{tree}"


def test_a_move_is_timed(opened):
    page = opened()
    for i in range(8):
        hover(page, i, i)
        flush(page)
    page.wait_for_function("() => document.getElementById('page').dataset.moves >= 4")
    assert float(page.locator("#page").get_attribute("data-move-median")) >= 0


# --- beside a kernel ---

HARNESS = """<body><div id="page"></div><script type="module">%(script)s
const state = %(state)s, heard = {};
window.sent = [];
const bytes = (text) => {
  const b = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), odd = new Uint8Array(b.length + 1);
  odd.set(b, 1);
  return new DataView(odd.buffer, 1);
};
const tell = (name) => { for (const f of heard['change:' + name] ?? []) f(); };
window.model = {
  get: (name) => state[name],
  set(name, value) {
    if (JSON.stringify(state[name]) === JSON.stringify(value)) return;
    state[name] = value;
    tell(name);
  },
  on: (event, f) => (heard[event] ??= []).push(f),
  off: (event, f) => { heard[event] = heard[event].filter((g) => g !== f); },
  save_changes() {
    const { ask, stage, block, token } = state;
    sent.push(structuredClone({ ask, stage, block, token }));
  },
};
window.answer = (new_state) => { // as a message from the kernel: all values, then all events
  const changed = Object.keys(new_state);
  Object.assign(state, new_state);
  for (const name of ['data', 'picture']) if (new_state[name]) state[name] = bytes(new_state[name]);
  changed.forEach(tell);
};
for (const name of ['data', 'picture']) state[name] = bytes(state[name]);
window.close_page = mixing.render({ model, el: document.getElementById('page') });
</script>"""


@pytest.fixture
def beside(chromium, heard):
    "The page beside a kernel, and a function that makes the kernel answer."
    script = (STATIC / "mixing.js").read_text(encoding="utf-8").replace("export default", "const mixing =")
    text = lambda data: base64.b64encode(data).decode()
    place = lambda stage, block, ask=0: dict(place=dict(heard[stage, block].spec(), ask=ask, nth=ask),
                                             data=text(heard[stage, block].data()))
    state = dict(place(3, 1), choices=heard.places, stage=3, block=1, token=[4, 4], size=heard.picture.shape,
                 picture=text(heard.picture.tobytes()),
                 done=[], ask=[], busy=False, fault="")
    page = chromium.new_page()
    said = listen(page)
    page.set_content(HARNESS % dict(script=script, state=json.dumps(state)))
    page.wait_for_function("() => window.close_page")

    def answer(stage=None, block=None, ask=0, **more):
        page.evaluate("state => answer(state)", {**(place(stage, block, ask) if stage else {}), **more})
    yield page, answer
    page.close()
    assert not said, said


def test_the_kernel_hears_of_the_token_once_it_rests(beside):
    page, _ = beside
    for i in range(6):
        hover(page, i, 2)
    page.wait_for_function("() => sent.length && sent.at(-1).token[0] === 5")
    assert page.evaluate("sent.length") < 6


def test_it_says_that_it_is_working_and_asks_for_the_last(beside, heard):
    page, answer = beside
    page.get_by_label("stage").select_option("1")
    page.get_by_text("working …").wait_for()
    assert page.locator(BOARD).get_attribute("aria-busy") == "true"
    page.get_by_label("stage").select_option("4")
    assert page.evaluate("sent.at(-1).ask") == [4, 1, 2]
    answer(1, 1, 1, token=[16, 16])  # the first answer comes, and is not the last
    assert page.locator(BOARD).get_attribute("aria-busy") == "true"
    answer(4, 1, 2, token=[2, 2])
    page.wait_for_function("() => document.querySelector('.edu-panels').getAttribute('aria-busy') === 'false'")
    assert words(page) == heard[4, 1].words((2, 2))


def test_a_quick_answer_shows_no_working(beside, heard):
    page, answer = beside
    known = heard[2, 1].words((8, 8))  # computed before it is asked for, so that the answer is quick
    page.evaluate("""const node = document.querySelector('.edu-words');
        window.shown = [];
        new MutationObserver(() => shown.push(document.querySelector('.edu-words').textContent))
        .observe(node, { childList: true, characterData: true, subtree: true })""")
    page.get_by_label("stage").select_option("2")
    answer(2, 1, 1, token=[8, 8])
    page.wait_for_timeout(700)
    assert not any("working" in text for text in page.evaluate("shown")) and words(page) == known


def test_a_fault_is_said_and_the_picture_stays(beside):
    page, answer = beside
    before = pixels(page)
    page.get_by_label("stage").select_option("2")
    answer(fault="This image is too small.")
    page.get_by_text("This image is too small.").wait_for()
    assert pixels(page) == before and page.locator(BOARD).get_attribute("aria-busy") == "false"


def test_python_moves_the_token_and_the_image(beside, heard):
    page, answer = beside
    answer(token=[0, 7])
    assert words(page) == heard[3, 1].words((0, 7))
    before = pixels(page)
    answer(picture=base64.b64encode(bytes(range(256)) * 64).decode(), size=[128, 128])
    assert pixels(page) != before
    answer(busy=True)
    page.get_by_text("working …").wait_for()
    answer(busy=False)
    assert words(page) == heard[3, 1].words((0, 7))


def test_a_closed_page_listens_no_more(beside):
    page, answer = beside
    page.evaluate("close_page()")
    before = token(page)
    answer(token=[1, 1])
    assert token(page) == before
