"""The page that `save_page` writes, in Chromium, opened from a disk without a network: its numbers are PyTorch's."""
import base64
import filecmp
import json
import re
import shutil
import subprocess
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save

from browser import CHROMIUM, PATIENCE, ROOT, WEBGPU, browser, listen
from metaformer_edu.core.basics import sample_photo
from metaformer_edu.core.errors import WeightsError
from metaformer_edu.data.datasets import load_digits
from metaformer_edu.data.shapes import TASKS, Thing, render
from metaformer_edu.interpret.cam import explain
from metaformer_edu.interpret.influence import channel_directions, influence, mixer_at, mixing_matrix, squared_norms
from metaformer_edu.models.layers import LayerNormGeneral, Mlp, SquaredReLU
from metaformer_edu.models.mixers import SepConv
from metaformer_edu.models.metaformer import MetaFormer
from metaformer_edu.models.registry import FAMILIES, create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.train import main as train
from metaformer_edu.training.run_folder import read_about
from metaformer_edu.widgets.base import STATIC
from metaformer_edu.widgets import page as module
from metaformer_edu.widgets.page import SavePage, page_state, save_page
from metaformer_edu.widgets.sources import example_digits, example_models, example_runs, load_run, to_pil

NAMES = ["disc", "ring", "square", "triangle", "cross"]
WIDE = (64, 96)  # a picture whose grids of tokens are not square
families = pytest.mark.parametrize("family", FAMILIES)


def perturbed(model):
    "A model whose every parameter is away from where it starts, in numbers that float16 has."
    for p in model.eval().parameters():
        p.data = (p.data + 0.1 * torch.randn_like(p) * p.requires_grad).half().float()
    return model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {family: perturbed(create_model(f"tiny_{family}", num_classes=5, img_size=WIDE)) for family in FAMILIES}


@pytest.fixture(scope="module")
def picture():
    return torch.randn(3, *WIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def opened(chromium):
    "Opens pages offline; at the end they must have complained about nothing and asked nobody."
    said = []

    def open_page(path, where=""):
        page = chromium.new_context(offline=True).new_page()
        page.set_default_timeout(PATIENCE)
        said.append(listen(page))
        own = (path.as_uri(), "blob:", "data:")
        page.on("request", lambda r: None if r.url.startswith(own) else said[-1].append(r.url))
        page.goto(path.as_uri() + where)
        return page
    yield open_page
    assert not any(said), said


@pytest.fixture(scope="module")
def page(opened, models, picture, tmp_path_factory):
    "A page of the five models that have seen the picture."
    path = save_page({name: (m, NAMES) for name, m in models.items()}, tmp_path_factory.mktemp("page") / "page.html")
    found = opened(path)
    settled(found)
    for name in models:
        ask(found, "look", name=f"pictures {name}", image=picture)
    return found


def settled(page):
    page.wait_for_function("() => globalThis.__page?.device && !__page.running")
    assert not page.evaluate("__page.failed"), page.inner_text(".status")


def ask(page, action, **request):
    "What the page's worker answers, as an array."
    if torch.is_tensor(image := request.get("image")):
        pixels = base64.b64encode(image.numpy().astype("<f4").tobytes()).decode()
        request.update(image=pixels, shape=list(image.shape))
    ask_for = """async ([action, request]) => {
        const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        if (request.image) request.image = new Float32Array(bytes(request.image).buffer);
        if (request.bytes) request.weights = bytes(request.bytes);
        const value = await __page.ask(action, request);
        return action === 'look' ? Array.from(value.logits) : value?.buffer ? Array.from(value) : value }"""
    return np.array(page.evaluate(ask_for, [action, request]))


def near(found, known, tolerance):
    known = known.detach().flatten().numpy() if torch.is_tensor(known) else known
    np.testing.assert_allclose(found, known, rtol=tolerance, atol=tolerance)


# --- the engine is PyTorch's model ---

@families
def test_logits(page, models, picture, family):
    with torch.no_grad():
        near(ask(page, "look", name=f"pictures {family}", image=picture), models[family](picture[None]), 1e-4)


@families
def test_gradcam(page, models, picture, family):
    for stage in (2, 4):
        known = explain(models[family], picture, target=2, stage=stage).maps[0]
        cam = ask(page, "gradcam", name=f"pictures {family}", stage=stage - 1, label=2).tolist()
        grid = models[family].grids[stage - 1]
        found = page.evaluate("([cam, grid, size]) => Array.from(__page.scaleMap(new Float32Array(cam), grid, size))",
                              [cam, grid, WIDE])
        assert known.any()
        near(found, known, 1e-3)


@families
@pytest.mark.parametrize("stage", [2, 3])
def test_who_hears_whom(page, models, picture, family, stage):
    known = mixing_matrix(*mixer_at(models[family], picture, stage), chunk=64)
    near(ask(page, "matrix", name=f"pictures {family}", stage=stage - 1), known, 1e-3)


@families
def test_influence_by_gradients(page, models, picture, family):
    mixer, x = mixer_at(models[family], picture, 3, 2)
    found = ask(page, "hears", name=f"pictures {family}", stage=2, block=1, token=[1, 4])
    near(found, influence(mixer, x)[1 * 6 + 4], 1e-3)


@pytest.mark.parametrize("family, stage", [("caformer", 3), ("randformer", 4), ("poolformerv2", 2)])
def test_influence_through_the_whole_network(page, models, picture, family, stage):
    model = models[family]

    def to_stage(x):
        for down, blocks in zip(model.downsample_layers[:stage], model.stages):
            x = blocks(down(x))
        return x
    x = picture.permute(1, 2, 0)[None]
    known = squared_norms(to_stage, x, (1, 2), channel_directions(torch.zeros(model.dims[stage - 1]))).sqrt()
    found = ask(page, "hears", name=f"pictures {family}", stage=stage - 1, token=[1, 2], whole=True)
    near(found, known, 1e-3)


def test_webgpu_computes_the_same(chromium, tmp_path):
    "Four mixers in one small model, as a software adapter compiles for long."
    torch.manual_seed(0)
    mixers = ["SepConv", "Pooling", "RandomMixing", "Attention"]
    model = perturbed(MetaFormer(num_classes=5, depths=(1,) * 4, dims=(32,) * 4, token_mixers=mixers, img_size=WIDE))
    path = save_page({"mixed": (model, NAMES)}, tmp_path / "page.html")
    with chromium.browser_type.launch(executable_path=CHROMIUM, args=WEBGPU) as other:
        page = other.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(path.as_uri())
        page.wait_for_function("() => globalThis.__page && !__page.running && (__page.device || __page.failed)")
        device, *found = page.evaluate(
            "[__page.device, ...[__page.image, __page.list[0].logits, __page.list[0].cam].map((x) => Array.from(x))]")
    if device != "webgpu":
        pytest.skip("This Chromium has no WebGPU.")
    image = torch.tensor(found[0]).view(3, *WIDE)
    with torch.no_grad():
        near(found[1], model(image[None]), 1e-4)
    near(found[2], explain(model, image, stage=3).maps[0], 1e-3)


def test_files_of_our_own_are_read(page, models, picture, tmp_path):
    "float32 as `save_weights` writes it, and a type that the engine does not have."
    path = save_weights(models["caformer"], tmp_path / "caformer.safetensors")
    ask(page, "open", name="caformer", bytes=base64.b64encode(path.read_bytes()).decode())
    with torch.no_grad():
        near(ask(page, "look", name="caformer", image=picture), models["caformer"](picture[None]), 1e-4)
    other = base64.b64encode(save({"a": torch.zeros(2, dtype=torch.bfloat16)})).decode()
    with pytest.raises(Exception, match="a is BF16; the engine reads F32, F16 and I8"):
        ask(page, "open", name="other", bytes=other)


def test_the_bundle_is_what_npm_builds(tmp_path):
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("npm is not installed.")
    ignore = shutil.ignore_patterns("node_modules")
    shutil.copytree(ROOT / "js", tmp_path / "js", ignore=ignore)
    (tmp_path / "metaformer_edu/static").mkdir(parents=True)
    for command in ("ci --ignore-scripts --prefer-offline --no-audit --no-fund", "run build"):
        done = subprocess.run([npm, *command.split()], cwd=tmp_path / "js", capture_output=True, text=True, timeout=300)
        if done.returncode and command.startswith("ci") and ("network" in done.stderr or "ENOTFOUND" in done.stderr):
            pytest.skip("npm has no network.")
        assert not done.returncode, done.stderr
    for name in ("page.js", "loader.js"):
        assert filecmp.cmp(tmp_path / "metaformer_edu/static" / name, STATIC / name, shallow=False), (
            f"metaformer_edu/static/{name} is not what js/ builds: run `npm ci && npm run build` there.")


@families
def test_weights_of_eight_bits(page, models, picture, family):
    "The browser and `compare` compute the same with them, and it is near to what the model says."
    model = models[family]
    weights = module.as_int8(model)
    found = module.read_back(module.pack(weights))
    for name, value in model.state_dict().items():
        step = value.flatten(1).abs().amax(1) / 127 if value.ndim > 1 else value.abs() * 2**-10
        off = (found[name] - value).flatten(1).abs().amax(1) if value.ndim > 1 else (found[name] - value).abs()
        assert (off <= 0.502 * step + 1e-7).all(), name
    config = module.describe(model)
    with torch.no_grad():
        known = module._Engine(found, config).forward(picture[None])
        assert 0 < (known - model(picture[None])).abs().max() < 0.1 * model(picture[None]).abs().max()
    page.evaluate("([name, weights, config]) => __page.ask('open', { name, weights, config })",
                  [f"eight {family}", module.pack(weights), config])
    near(ask(page, "look", name=f"eight {family}", image=picture), known, 1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "The page of all that comes along, as the site has it."
    return save_page(None, tmp_path_factory.mktemp("shapes") / "play.html", weights="int8")


@pytest.fixture(scope="module")
def shapes_page(opened, tmp_path_factory):
    found = opened(save_page(example_runs(), tmp_path_factory.mktemp("shapes") / "play.html"))
    settled(found)
    return found


# --- Play ---

@pytest.fixture(scope="module")
def play(shapes_page):
    "The page of the five runs that come along, and one step at a time."
    def wait():
        settled(shapes_page)
        return shapes_page
    return wait


def state(page, of):
    "A field of every card, by the model's key."
    return page.evaluate("(of) => Object.fromEntries(__page.list.map((c) => [c.model.name, "
                         "c[of]?.buffer ? Array.from(c[of]) : c[of]]))", of)


def seen(page):
    "What the models have been shown."
    size = (3, 128, 128)
    return torch.tensor(page.evaluate("Array.from(__page.image)")).view(size)


def matches_pytorch(page, tolerance=1e-4):
    image, models = seen(page), example_models()
    for family, logits in state(page, "logits").items():
        with torch.no_grad():
            near(logits, models[family](image[None]), tolerance)


def test_five_models_answer_to_what_is_drawn(play):
    page = play()
    first = state(page, "logits")
    board = page.locator(".board")
    box = board.bounding_box()
    for tool in ("drag a shape", "draw", "rub out"):
        page.get_by_role("button", name=tool).click()
        before = page.evaluate("__page.generation")
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 120, box["y"] + 90)
        page.mouse.up()
        assert page.evaluate("__page.generation") > before
        play()
        matches_pytorch(page)
    page.get_by_role("button", name="empty").click()
    play()
    assert all(np.ptp(channel) < 1e-6 for channel in seen(page).flatten(1).numpy())
    for _ in range(4):
        page.get_by_role("button", name="undo").click()
    play()
    for family, logits in state(page, "logits").items():
        near(logits, np.array(first[family]), 1e-5)


def test_the_board_by_keyboard(play):
    page = play()
    page.get_by_role("button", name="triangle", exact=True).first.click()
    page.get_by_role("button", name="drag a shape").click()
    page.locator(".board").focus()
    before = page.evaluate("__page.board.thing?.at")
    for key in ("ArrowRight", "ArrowDown", " ", "ArrowRight"):
        page.keyboard.press(key)
    after = page.evaluate("__page.board.thing.at")
    assert after != before
    play()
    matches_pytorch(page)


def test_a_click_on_a_class_asks_where_it_is_looked_for(play):
    page = play()
    page.locator(".card").nth(3).get_by_role("button", name="cross").click()
    play()
    assert set(state(page, "label").values()) == {NAMES.index("cross")}
    cams = state(page, "cam")
    for family in ("identityformer", "caformer"):
        known = explain(example_models()[family], seen(page), NAMES.index("cross"), stage=3).maps[0]
        near(cams[family], known, 1e-3)
    page.locator(".card").nth(0).get_by_role("button", name="cross").click()
    play()
    assert set(state(page, "label").values()) == {None}


def test_a_token_says_whom_it_hears(play):
    page = play()
    canvas = page.locator(".map canvas").nth(2)
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    row, column = page.evaluate("__page.token")
    i, who = row * 8 + column, state(page, "who")
    for family, found in state(page, "row").items():
        assert found["values"] == who[family][64 * i:64 * (i + 1)]
    near(who["caformer"], mixing_matrix(*mixer_at(example_models()["caformer"], seen(page), 3)), 1e-3)
    assert "itself alone" in page.locator(".map figcaption").first.inner_text()
    page.keyboard.press("Escape")
    assert page.evaluate("__page.token") is None


def test_another_mixer_changes_answer_and_matrix(play):
    page = play()
    page.get_by_label("mixer of stage 3").nth(4).select_option("Identity")
    page.wait_for_function("() => __page.list[4].mixers[2] === 'Identity' && !__page.running")
    n = len(state(page, "who")["caformer"])
    assert np.array_equal(state(page, "who")["caformer"], np.eye(round(n**0.5)).ravel())
    assert "untrained" in page.locator(".card .note").nth(4).inner_text()
    train = page.get_by_role("link", name="Train it").get_attribute("href")
    assert train.startswith("#view=learn&") and "left=Attention.Attention&right=Identity.Identity" in train
    page.get_by_role("button", name="take the trained one back").click()
    page.wait_for_function("() => __page.list[4].who && !__page.running")
    matches_pytorch(page)


def test_a_mixer_chosen_at_once_after_another_was_taken_back(play):
    page, model = play(), deepcopy(example_models()["caformer"])
    for block in model.stages[2]:
        block.token_mixer = torch.nn.Identity()
    page.evaluate("() => { __page.restore(__page.list[4]); __page.swap(__page.list[4], 'Identity') }")
    page.wait_for_function("() => __page.list[4].mixers[2] === 'Identity' && __page.list[4].fresh.look")
    play()
    with torch.no_grad():
        near(state(page, "logits")["caformer"], model(seen(page)[None]), 1e-4)


def test_a_mixer_taken_back_while_an_answer_is_on_its_way(play):
    page = play()
    page.evaluate("__page.swap(__page.list[4], 'Identity')")
    play()
    page.evaluate("""async () => {
        const { ask } = __page, card = __page.list[4];
        __page.pointed = card;
        await new Promise((asked) => {
            __page.ask = (action, ...rest) => { if (action === 'look') asked(); return ask(action, ...rest) };
            __page.board.show() });
        __page.ask = ask;
        __page.restore(card) }""")
    play()
    assert state(page, "mixers")["caformer"][2] == "Attention"
    matches_pytorch(page)


def test_a_camera_is_asked_when_a_reader_wants_it(play):
    page = play()
    page.get_by_role("button", name="camera").click()
    page.wait_for_function("() => !__page.filming.disabled")
    assert "The browser gives no camera" in page.inner_text(".status")
    page.context.grant_permissions(["camera"])
    before = page.evaluate("__page.generation")
    page.get_by_role("button", name="camera").click()
    page.wait_for_function("(before) => __page.film && __page.generation > before + 1", arg=before)
    page.get_by_role("button", name="keep this picture").click()
    play()
    matches_pytorch(page, 1e-3)  # the fake camera's frames vary, and some of them round to 2e-4
    page.get_by_role("button", name="undo").click()


def test_the_tour_moves_the_page_and_leaves_it_as_it_was(play):
    page = play()
    page.get_by_role("button", name="Tour", exact=True).click()
    marked, moved = [], []
    while page.locator(".tour").get_by_role("button", name="next").count():
        page.wait_for_function("() => !__app.tour.doing || __app.tour.doing.then(() => true)")
        marked.append(page.evaluate("[...document.querySelectorAll('.spot')].map((o) => o.classList[0]).join(' ')"))
        moved.append(page.evaluate("[__page.board.thing.at, __page.stage, __page.token, __page.list[0].label, "
                                   "__page.list[4].mixers[2]]"))
        page.locator(".tour").get_by_role("button", name="next").click()
        page.wait_for_function("(n) => __app.tour.at === n", arg=len(marked))
    assert len(marked) == 10 and all(marked) and marked[-1] == "inside"
    usual = [[64, 64], 2, None, None, "Attention"]
    changes = [{}, {}, {0: [0.28 * 128] * 2}, {}, {3: 4}, {2: [4, 4]}, {2: [4, 4]}, {1: 1}, {4: "Identity"}, {}]
    assert moved == [[change.get(i, v) for i, v in enumerate(usual)] for change in changes]
    page.wait_for_function("() => __app.view.going")  # the last step trains
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Play").click()
    play()
    assert not page.locator(".tour").is_visible() and not page.locator(".spot").count()
    assert page.evaluate("[__page.list[4].mixers[2], __page.stage, __page.token]") == ["Attention", 2, None]
    matches_pytorch(page)


# --- Inside ---

PARTS = ["norm1", "mixer", "sum1", "norm2", "mlp", "out"]


def way(model, image, stage, block):
    "What PyTorch computes on the way through a block, by the names that the engine gives; one row a token."
    found, of = {}, model.stages[stage - 1][block - 1]
    keep = lambda name: lambda module, given, gives: found.update({name: gives, f"into {name}": given[0]})
    hooks = [part.register_forward_hook(keep(name.split(".")[-1])) for name, part in of.named_modules()]
    with torch.no_grad():
        model(image[None])
    for hook in hooks:
        hook.remove()
    found.update(mixer=found["token_mixer"], out=found[""], x=found["into "], sum1=found["into norm2"])
    if "dwconv" in found:
        found["dwconv"] = found["dwconv"].permute(0, 2, 3, 1)
    if "qkv" in found:
        heads = of.token_mixer.num_heads
        q, k, v = found["qkv"].flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1]**-0.5
        found.update(q=q, k=k, v=v, scores=scores, weights=scores.softmax(-1), heads=found["into proj"])
    return found


@pytest.mark.parametrize("family, stage, block", [("caformer", 3, 2), ("convformer", 2, 1), ("randformer", 3, 1),
                                                  ("poolformerv2", 4, 1)])
def test_the_way_through_a_block_is_pytorchs(page, models, picture, family, stage, block):
    request = dict(name=f"pictures {family}", stage=stage - 1, block=block - 1)
    found = page.evaluate("""async (request) => Object.entries(await __page.ask('inside', request)).map(
        ([name, [shape, values]]) => [name, shape, Array.from(values)])""", request)
    known = way(models[family], picture, stage, block)
    assert {"x", "mixer", "sum1", "fc1", "act", "out"} <= {name for name, *_ in found}
    for name, shape, values in found:
        assert shape == list(known[name].shape), name
        near(np.array(values), known[name], 1e-4)


def opened_part(page, **place):
    "Inside at a place, once its numbers are there: what each step says, and what the engine has."
    page.evaluate("(place) => { location.hash = new URLSearchParams({ view: 'inside', ...place }) }", place)
    page.wait_for_function("(part) => __page.inside.part === part && __page.inside.found && !__page.running",
                           arg=place.get("part"))
    settled(page)
    return page.evaluate("__page.inside.steps.map(({ key, result, known }) => ({ key, result, known }))")


@pytest.mark.parametrize("family, stage, mixer", [
    ("identityformer", 3, ["identity"]), ("randformer", 3, ["random"]), ("poolformerv2", 3, ["pool"]),
    ("convformer", 3, ["linear", "star", "window", "back"]), ("caformer", 3, ["score", "softmax", "values", "back"])])
def test_what_is_multiplied_and_added_is_what_the_network_has(play, family, stage, mixer):
    "At a corner, where windows end, and at one hidden number and heard token."
    page, place = play(), dict(model=family, stage=stage, block=1, token="1.8", number=5)
    for part in PARTS:
        steps = opened_part(page, **place, part=part)
        assert part != "mixer" or [step["key"] for step in steps] == mixer
        for step, said in zip(steps, page.locator(".step .numbers").all_inner_texts(), strict=True):
            assert abs(step["result"] - step["known"]) < 1e-4 * max(1, abs(step["known"])), (part, step)
            result, has = (re.search(f"{of} (−?[\\d.]+)", said)[1].replace("−", "-") for of in ("=", "has"))
            near(float(result), step["result"], 1e-2)
            assert abs(float(result) - float(has)) < 2e-4 and said.endswith("✓")
    steps = opened_part(page, **place, part="mixer")
    hidden = page.evaluate("__page.inside.steps.at(-1).picked ?? null")
    known = way(example_models()[family], seen(page), stage, 1)
    near(steps[-1]["result"], known["mixer"][0, 0, 7, 4], 1e-4)
    if family == "convformer":
        near(steps[2]["result"], known["dwconv"][0, 0, 7, hidden], 1e-4)
    if family == "caformer":
        other, head = page.evaluate("__page.inside.steps[1].picked"), hidden // 32
        assert known["weights"][0, head, 7].argmax() == other
        near(steps[0]["result"], known["scores"][0, head, 7, other], 1e-4)
        near(steps[1]["result"], known["weights"][0, head, 7, other], 1e-4)
        near(steps[2]["result"], known["heads"][0, 0, 7, hidden], 1e-4)
    for width in (360, 768, 1280):
        page.set_viewport_size(dict(width=width, height=800))
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_model_is_opened_by_clicks_and_keys(play):
    page = play()
    page.get_by_role("button", name="Play", exact=True).first.click()
    inside, at = page.locator(".inside"), "[__page.inside.stage, __page.inside.block, __page.inside.part]"
    assert not inside.is_visible()
    page.get_by_role("button", name="ConvFormer", exact=True).click()
    for name, now in (("stage 2", [1, None, None]), ("block 1", [1, 0, None]), ("Sep", [1, 0, "mixer"])):
        inside.locator(".tile").filter(has_text=name).click()
        play()
        assert page.evaluate(at) == now and not page.locator(".card").first.is_visible()
    page.locator(".where canvas").focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("__page.inside.place") == [7, 8] and "token=8.9" in page.url
    results = lambda: page.evaluate("__page.inside.steps.map((step) => step.result)")
    before = results()
    inside.get_by_label("hidden number").fill("3")
    inside.get_by_label("hidden number").press("Enter")
    assert page.evaluate("__page.inside.steps.at(-1).picked") == 2
    assert results()[-1] == before[-1] and results()[2] != before[2]
    slider = inside.get_by_role("slider").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert "instead of" in inside.locator(".curve p").inner_text()
    assert results()[-1] == before[-1]  # the network stays as it is
    page.evaluate("__page.reshape({ kind: 'cross' })")
    play()
    page.wait_for_function("(before) => __page.inside.steps.at(-1).result !== before", arg=before[-1])
    page.go_back()
    play()
    assert page.evaluate(at) == [1, 0, None]
    page.get_by_role("button", name="Play", exact=True).first.click()
    play()
    assert not inside.is_visible() and page.locator(".card").first.is_visible()
    matches_pytorch(page)


def test_inside_takes_links_that_ask_for_what_there_is_not(play):
    page = play()
    found = page.evaluate("""(asked) => asked.map((one) => {
        const { card, stage, block, part, token, number } = __page.inside.take({ ...one, model: 'randformer' });
        __page.inside.take(null);
        return [card.model.name, stage, block, part, token, number] })""", [
            dict(stage="5", block="1", part="mixer"), dict(stage="2", block="x", part="mixer", token="1", number="0"),
            dict(stage="2", block="1", part="wings", token="0.3", number="7")])
    assert found == [["randformer", None, None, None, None, None], ["randformer", 1, None, None, None, None],
                     ["randformer", 1, 0, None, None, 6]]


def test_it_speaks_chinese(play):
    page = play()
    page.get_by_role("button", name="中文").click()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.locator(".bars .name").first.inner_text() == "圆盘"
    page.get_by_role("button", name="English").click()
    assert page.locator(".bars .name").first.inner_text() == "disc"


def test_words_are_there_in_both_languages():
    words = json.loads((ROOT / "js/words.json").read_text(encoding="utf-8"))
    assert words["en"].keys() == words["zh"].keys()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits(play, width):
    page = play()
    page.set_viewport_size(dict(width=width, height=800))
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_of_all_that_comes_along(opened, saved):
    "Ten models under 3 MB: five for shapes, and five for digits, to whom what is drawn for them goes."
    assert saved.stat().st_size < 3_000_000
    page = opened(saved)
    settled(page)
    tasks = page.evaluate("__page.state.tasks.map((t) => [t.name, t.checked.kind, t.models.length])")
    assert tasks == [["shapes", "int8", 5], ["digits", "int8", 5]]
    assert "8 bits" in page.inner_text(".checked") and " 0 of 200 answers" in page.inner_text(".checked")
    page.get_by_role("button", name="digits", exact=True).click()
    page.get_by_role("button", name="empty").click()
    box = page.locator(".board").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.move(*at(0.5, 0.12))
    page.mouse.down()
    page.mouse.move(*at(0.5, 0.88), steps=8)
    page.mouse.up()
    settled(page)
    assert page.locator(".card:visible").count() == 5
    image = torch.tensor(page.evaluate("Array.from(__page.image)")).view(3, 64, 64)
    for card in page.evaluate("__page.list.map((c) => [c.model.name, c.model.weights, c.model.config, "
                              "Array.from(c.logits)])"):
        family, weights, config, logits = card
        with torch.no_grad():
            near(logits, module._Engine(module.read_back(weights), config).forward(image[None]), 1e-4)
            assert np.argmax(logits) == load_run(example_digits()[family])[0](image[None]).argmax() == 1
    page.locator(".card:visible select").first.select_option("Pooling")
    settled(page)
    link = page.locator(".card:visible a:visible").get_attribute("href")
    assert link.startswith("#view=learn&task=digit&") and "right=Pooling.Pooling" in link
    page.get_by_role("button", name="shapes", exact=True).click()
    settled(page)
    assert page.locator(".bars .name").first.inner_text() == "disc"
    page.context.close()


# --- Learn ---

@pytest.fixture(scope="module")
def learn(opened, tmp_path_factory):
    "The page as a link opens it: two models that have trained for twelve steps."
    path = save_page(example_runs()["identityformer"], tmp_path_factory.mktemp("learn") / "page.html")
    found = opened(path, "#view=learn&size=16&left=Identity.Identity&right=Pooling.SepConv&seed=2&steps=12")
    trained(found)
    return found


def trained(page):
    page.wait_for_function("() => globalThis.__app?.view.fresh && !__app.view.running")
    assert not page.evaluate("__app.view.failed"), page.inner_text(".learning + .models .status")


def tell(page, action, over=None, **request):
    "What the worker of one side answers, arrays as NumPy's; a list of answers over a list of requests."
    found = page.evaluate("""async ([action, request, over]) => {
        const letters = (x) => Array.from(new Uint8Array(x.buffer), (c) => String.fromCharCode(c)).join('');
        const text = (x) => ({ base64: btoa(letters(x)) });
        const ask = (request) => __app.views.learn.sides[0].ask(action, request);
        const value = await (over ? Promise.all(over.map(ask)) : ask(request));
        return JSON.parse(JSON.stringify(value ?? null, (key, v) => v instanceof Float32Array ? text(v) : v)) }""",
                          [action, request, over])
    return unpacked(found)


def unpacked(found):
    if isinstance(found, list):
        return [unpacked(o) for o in found]
    if not isinstance(found, dict):
        return found
    if found.keys() == {"base64"}:
        return np.frombuffer(base64.b64decode(found["base64"]), "<f4")
    return {key: unpacked(value) for key, value in found.items()}


def parameters(page, of):
    found = tell(page, "parameters", of=of)
    return {name: torch.tensor(values).view(*shape) for name, (shape, values) in found.items()}


def losses(page):
    return page.evaluate("__app.view.sides.map((side) => side.losses)")


def test_learn_opens_where_the_link_says(learn):
    before = losses(learn)
    assert [len(side) for side in before] == [12, 12] and before[0] != before[1]
    assert "seed=2&steps=12&left=Identity.Identity&right=Pooling.SepConv" in learn.url
    link = learn.url
    learn.get_by_label("seed").select_option("3")
    trained(learn)
    learn.get_by_role("button", name="one step").click()
    learn.wait_for_function("() => __app.view.t === 1 && !__app.view.running")
    assert "seed=3&steps=1&" in learn.url and losses(learn)[0][0] != before[0][0]
    learn.get_by_role("button", name="train", exact=True).click()
    learn.wait_for_function("() => __app.view.t > 3")
    learn.get_by_role("button", name="pause").click()
    trained(learn)
    steps = learn.evaluate("__app.view.t")
    assert f"seed=3&steps={steps}&" in learn.url and len(losses(learn)[1]) == steps
    learn.get_by_role("button", name="start again").click()
    trained(learn)
    assert "seed=3&steps=0&" in learn.url and losses(learn) == [[], []]
    learn.evaluate("(link) => { location.href = link }", link)
    learn.wait_for_function("() => __app.view.t === 12")
    trained(learn)
    assert losses(learn) == before


def test_learn_shows_what_it_says(learn):
    "The curves, the map and the matrix of the picture that is chosen."
    learn.locator(".learning .examples button").nth(3).click()
    learn.get_by_label("map and matrix of stage").select_option("2")
    learn.wait_for_function("() => __app.view.sides.every((s) => s.seen.stage === 1 && s.seen.example === 3)")
    trained(learn)
    seen = learn.evaluate("__app.view.sides.map((s) => [s.seen.matrix.length, s.seen.cam.length, s.seen.label])")
    assert seen == [[16, 4, 1], [16, 4, 1]]
    chart = learn.locator(".chart svg")
    said = chart.nth(0).get_attribute("aria-label")
    assert re.fullmatch(r"loss.*: Identity \d\.\d+, Pooling, SepConv \d\.\d+", said)
    assert [len(o.get_attribute("points").split()) for o in learn.locator(".chart polyline").all()] == [12, 12, 3, 3]
    accuracy = learn.evaluate("__app.view.sides.map((s) => s.accuracies.at(-1)[1])")
    for said, right in zip(learn.locator(".numbers").all_inner_texts(), accuracy):
        assert f"{100 * right:.0f} % right" in said


def test_links_that_ask_for_what_there_is_not(learn):
    asked = dict(task="cats", size=7, left="Foo.Bar", right="Attention", seed=-3, rate="x", steps="many")
    found = learn.evaluate("""(asked) => {
        const view = __app.view;
        Object.assign(view, { begin(settings) { this.found = settings } });
        view.take(asked);
        delete view.begin;
        return view.found }""", asked)
    assert found == dict(task="same", size=32, rate=0.003, seed=1, steps=0, left=["Identity"] * 2,
                         right=["Attention"] * 2)


@pytest.mark.parametrize("mixers", [["SepConv", "Attention"], ["Pooling", "RandomMixing", "Identity"]],
                         ids=".".join)
def test_training_is_pytorchs(learn, mixers):
    "The gradients of the first step, and the losses of fifty."
    tell(learn, "learn", task="shape", size=16, mixers=mixers, rate=0.003, seed=3, batch=8)
    dims = (32, 64, 96)[:len(mixers)]
    model = MetaFormer(num_classes=5, depths=[1] * len(mixers), dims=dims, token_mixers=mixers,
                       res_scale_init_values=None, img_size=16)
    model.load_state_dict({**parameters(learn, "w"), **parameters(learn, "fixed")})
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([dict(params=[p], weight_decay=0.05 * (p.ndim > 1)) for p in named.values()], 0.003)
    for t, batch in enumerate(tell(learn, "batch", over=[dict(t=t) for t in range(50)])):
        images = torch.tensor(batch["images"]).view(8, 16, 16, 3).permute(0, 3, 1, 2)
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor(batch["labels"]))
        near(tell(learn, "step"), loss.item(), 1e-3)
        optimizer.zero_grad()
        loss.backward()
        if t == 0:
            means = parameters(learn, "m")  # a tenth of the gradients
            assert means.keys() == named.keys()
            for name, p in named.items():
                assert (10 * means[name] - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name
        optimizer.step()


def test_pictures_are_drawn_as_in_python(learn):
    for task in TASKS:
        tell(learn, "learn", task=task, size=32, mixers=["Identity", "Identity"], rate=0.003, seed=0, batch=5)
        batch = tell(learn, "batch", t=4)
        assert set(batch["labels"]) == set(range(len(TASKS[task].class_names)))
        for image, drawn in zip(batch["images"].reshape(5, 32, 32, 3), batch["drawn"]):
            things = [Thing(**{key: tuple(v) if isinstance(v, list) else v for key, v in thing.items()})
                      for thing in drawn["things"]]
            plain = SimpleNamespace(uniform=lambda *_: drawn["ground"], normal=lambda *_: 0)
            near((image / 4 + 0.5).ravel(), render(things, 32, plain)[0].ravel() / 255, 3e-3)


def test_digits_are_scikit_learns(learn):
    "Those to learn from and those held out are Python's, in 16 shades; what is learnt from is moved a little."
    held = tell(learn, "learn", task="digit", size=32, mixers=["Identity", "Pooling"], rate=0.003, seed=0, batch=50,
                digits=module._digits())
    assert held["labels"] == [i % 10 for i in range(64)]
    enlarge = lambda images: F.interpolate(images, (32, 32), mode="bilinear").flatten(1)
    near_by, sets = {}, [data.images.tensors for data in load_digits()[:2]]
    for name, (images, labels) in zip(("learnt", "held"), sets):
        near_by[name] = enlarge(images), labels
    images = torch.tensor(held["images"]).view(64, -1, 3)
    assert (images[..., :1] == images).all()
    distance = torch.cdist(images[..., 0], near_by["held"][0], p=torch.inf)
    assert distance.min(1).values.max() < 0.5 / 15 + 1e-5
    assert near_by["held"][1][distance.argmin(1)].tolist() == held["labels"]
    batch = tell(learn, "batch", t=3)
    seen = torch.tensor(batch["images"]).view(50, -1, 3)[..., 0] / 4 + 0.5
    assert batch["labels"] == [(2**24 + 150 + i) % 10 for i in range(50)] and 0 <= seen.min() and seen.max() <= 1
    distance = torch.cdist(seen, near_by["learnt"][0], p=torch.inf).min(1).values
    assert (distance > 0.1).all(), "They are not moved."
    like = near_by["learnt"][1][torch.cdist(seen, near_by["learnt"][0]).argmin(1)]
    assert (like == torch.tensor(batch["labels"])).float().mean() > 0.6


def test_a_lost_graphics_processor_is_no_loss(learn):
    "On the other view of that page, as it has one model to compile again."
    learn.get_by_role("button", name="Play").click()
    settled(learn)
    learn.evaluate("""() => {
        __page.device = 'webgpu';
        const { end } = __page.ask;
        __page.ask = Object.assign(async () => { throw new Error('lost') }, { end });
        __page.board.show() }""")
    learn.wait_for_function("() => __page.device === 'wasm' && !__page.running")
    matches_pytorch(learn)


# --- what cannot be computed there is refused ---

@pytest.mark.parametrize("change, why", [
    (dict(mlps=lambda dim: torch.nn.Linear(dim, dim)), "cannot compute Linear"),
    (dict(token_mixers="Pooling", in_chans=1), "3 channels"),
    (dict(num_classes=0), "classifiers"), (dict(global_pool=""), "classifiers"),
    (dict(mlps=partial(Mlp, act_layer=SquaredReLU)), "cannot compute Mlp with SquaredReLU"),
    (dict(token_mixers=partial(SepConv, act1_layer=SquaredReLU)), "cannot compute SepConv with SquaredReLU"),
    (dict(norm_layers=partial(LayerNormGeneral, eps=1e-3)), "a norm with an epsilon of 0.001")])
def test_other_models_are_refused(change, why, tmp_path):
    model = create_model("tiny_poolformerv2", **{"num_classes": 5, "img_size": 64, **change})
    with pytest.raises(ValueError, match=why):
        save_page({"mine": (model, NAMES[:max(model.num_classes, 0)])}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
    model = create_model("tiny_poolformerv2", num_classes=5, img_size=64)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="head.weight has weights that float16 cannot hold"):
        save_page({"mine": (model, NAMES)}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_models_that_want_other_values_do_not_share_a_board():
    models = {name: create_model("tiny_poolformerv2", num_classes=5, img_size=64) for name in "ab"}
    models["a"].pretrained_cfg["std"] = (0.1, 0.1, 0.1)
    tasks = page_state({name: (m, NAMES) for name, m in models.items()})["tasks"]
    assert [task["std"][0] for task in tasks] == [0.1, pytest.approx(0.229)]


@pytest.mark.parametrize("change", ["stride", "padding", "weights", "nan"])
def test_a_page_that_answers_otherwise_is_not_kept(change, tmp_path, monkeypatch):
    "What `describe` lets through, a file that is damaged, and a model that answers nothing."
    torch.manual_seed(0)
    model = perturbed(create_model("tiny_poolformerv2", num_classes=5, img_size=64))
    (path := tmp_path / "page.html").write_text("the page of before")
    why = "with its weights as float16 a logit would move by"
    if change == "stride":
        model.downsample_layers[0].conv.stride = (8, 8)
    if change == "padding":
        model.downsample_layers[2].conv.padding = (0, 0)
    if change == "weights":
        pack = module.pack
        monkeypatch.setattr(module, "pack", lambda data: pack(data[:-200] + bytes(200)))
        why = "its weights do not read back"
    if change == "nan":
        model.norm.bias.data[0] = float("nan")
        why = "cannot hold"
    with pytest.raises((WeightsError, ValueError), match=why):
        save_page({"mine": (model, NAMES)}, path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the page of before"]


def test_int8_that_moves_too_much_is_refused(tmp_path, capsys, monkeypatch):
    from metaformer_edu.commands.explore import main
    run = str(example_runs()["randformer"])
    monkeypatch.setitem(module._MOVES, "int8", 0.001)
    with pytest.raises(SystemExit) as ended:
        main([run, "--save", str(tmp_path / "page.html"), "--int8"])
    assert ended.value.code == 2 and "Leave int8 out, and try float16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main([run, "--int8"])
    assert ended.value.code == 2 and "--int8 belongs to --save" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no kind of weights 'int7'. Did you mean 'int8'"):
        save_page(run, tmp_path / "page.html", weights="int7")


def test_names_that_do_not_fit_are_refused(tmp_path):
    model = create_model("tiny_poolformerv2", num_classes=5, img_size=64)
    with pytest.raises(ValueError, match="5 classes, and there are 2 names"):
        save_page({"mine": (model, ["a", "b"])}, tmp_path / "page.html")
    with pytest.raises(ValueError, match="at least one run"):
        save_page({}, tmp_path / "page.html")


def test_the_command_saves_a_page(tmp_path, capsys):
    from metaformer_edu.commands.explore import main
    run = example_runs()["identityformer"]
    to_pil(sample_photo("flower", 96)).save(photo := tmp_path / "mine.png")
    main([str(run), "--images", str(photo), "--save", str(tmp_path / "page.html")])
    assert "MB. Open it in a browser" in capsys.readouterr().out
    found = re.search(r'id="state">(.*?)</script>', (tmp_path / "page.html").read_text(encoding="utf-8"), re.S)
    (task,) = json.loads(found[1])["tasks"]
    assert [m["name"] for m in task["models"]] == ["identityformer"]
    assert [e["name"] for e in task["examples"]] == ["mine.png"] and task["class_names"] == NAMES
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--save", str(tmp_path / "other.html")])
    assert ended.value.code == 2 and "is no folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "other.html").exists()


def test_a_training_ends_with_its_page(tmp_path, one_thread):
    train(["digits", "--model", "tiny_identityformer", "--img-size", "32", "--epochs", "1", "--warmup-epochs", "0",
           "-j", "0", "--page", "--output", str(tmp_path)])
    run, = tmp_path.iterdir()
    state = json.loads(re.search('id="state">(.*?)</script>', (run / "page.html").read_text(encoding="utf-8"))[1])
    task, = state["tasks"]
    assert (task["name"], task["class_names"]) == ("digits", read_about(run)["class_names"])
    assert [m["name"] for m in task["models"]] == [run.name]
    trained = module.pack(module.as_float16(create_model("tiny_identityformer", checkpoint=run / "best.safetensors",
                                                         num_classes=10, img_size=32)))
    assert task["models"][0]["weights"] == trained


def test_a_page_that_cannot_be_costs_the_run_a_warning_only(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    run = example_runs()["convformer"]
    with pytest.warns(UserWarning, match="convformer gets no page.html: The page would have"):
        SavePage(run).after_fit(None)
    assert not (run / "page.html").exists()
