"The page of all explorers: its command without a browser, and the explorers in JupyterLab and Voilà by a real one."
import base64
import io
import subprocess
import sys
import urllib.error
import urllib.request

import nbformat
import pytest
from PIL import Image

from browser import (
    ALL_DRAWN, PATIENCE, ROOT, browser, changes, environment, explore, jupyterlab, listen, move_everything)
from metaformer_edu.commands import explore as app
from metaformer_edu.core.basics import sample_photo
from metaformer_edu.widgets.sources import example_runs, to_pil

NAMES = list(app.SECTIONS)
CONTROLS = dict(model={"family", "size", "resolution, px", "stage 1", "stage 2", "stage 3", "stage 4"},
                cam={"model", "image", "class", "stage", "method", "strength"},
                activation={"s", "b", "σ of the input"}, training={"curves", "curves of", "pictures of", "after epoch"},
                mixing={"image", "stage"})


# --- the command, without a browser ---

def refused(capsys, *args):
    "The sentence with which the command, in this process, ends with status 2."
    with pytest.raises(SystemExit) as stop:
        app.main(["--no-browser", *map(str, args)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in err and out == ""
    return err


@pytest.mark.parametrize("args, sentence", [
    (["nowhere"], "nowhere"), (["--port", "99999"], "65535"), (["--images", "none.png"], "none.png"),
    (["--theme", "blue"], "blue"), (["--prot", "1"], "--port")])
def test_bad_input_is_one_sentence(args, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, *args)
    assert sentence in said and len(said.strip().splitlines()) == 1


def test_a_process_ends_with_the_sentence_alone(tmp_path):
    command = [sys.executable, "-m", "metaformer_edu.commands.explore", "--no-browser", "--port", "99999"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
                          env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 2 and "65535" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_a_taken_port_is_said(capsys):
    import socket
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "port" in refused(capsys, "--port", taken.getsockname()[1])


def test_without_voila_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        app.main(["--no-browser"])
    assert stop.value.code == 2 and "metaformer_edu[app]" in capsys.readouterr().err


def test_flags_outrank_files_and_keep_to_this_machine():
    flags = app.voila_flags(1234, "secret", "dark")
    assert "--Voila.ip=127.0.0.1" in flags and "--Voila.token=secret" in flags and "--Voila.open_browser=False" in flags


def test_the_notebook_is_one_cell_for_this_python(tmp_path):
    path = app.write_app(tmp_path, [tmp_path / "a'b"], [])
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert len(nb.cells) == 1
    compile(nb.cells[0].source, "cell", "exec")
    assert sys.executable in (tmp_path / "kernels/metaformer_edu/kernel.json").read_text()


def test_page_has_all_explorers_of_runs_and_images(tmp_path):
    runs = list(example_runs().values())[3:]
    to_pil(sample_photo("flower", 96)).save(photo := tmp_path / "mine.png")
    boxes = app.page(runs, [photo]).children[1:]
    assert len(boxes) == len(NAMES)
    cam = boxes[NAMES.index("cam")].children[1]
    assert [o for o in cam["model"].options] == ["convformer", "caformer"] and cam["image"].name == "mine.png"


# --- in a browser ---

CELLS = dict(model="explore_model('tiny_caformer', 64)", mixing="explore_mixing()", cam="explore_cam()",
             activation="explore_activation()", training="explore_training()")


def notebook(folder, cells):
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    cells = ["import sys\nsys.path.insert(0, %r)\nfrom metaformer_edu import *" % str(ROOT), *cells]
    nbformat.write(nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(o) for o in cells]),
                   folder / "explore.ipynb")


def run_all(page, n):
    "Run the notebook; again if the kernel was not listening yet, which no element of the page says for sure."
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
    page.get_by_text("| Idle").wait_for(timeout=PATIENCE)
    which_kernel = page.locator(".jp-Dialog .jp-mod-accept")  # asked if it was not there yet
    for _ in range(20):
        if which_kernel.count():
            which_kernel.first.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_timeout(2000)
        if page.evaluate("/[0-9*]/.test(document.querySelector('.jp-InputPrompt').textContent)"):
            break
    page.wait_for_function(ALL_DRAWN, arg=n, timeout=PATIENCE)


def test_in_jupyterlab(tmp_path):
    notebook(tmp_path, [*[CELLS[o] for o in NAMES], "explore_page(%r)" % str(example_runs()["identityformer"])])
    with browser() as chromium, jupyterlab(tmp_path) as address:
        page = chromium.new_page(viewport=dict(width=1280, height=1000))
        said = listen(page)
        page.goto(address("explore.ipynb"))
        run_all(page, len(NAMES))
        for name, root in zip(NAMES, page.locator(".edu-explorer").all()):
            root.scroll_into_view_if_needed()
            moved = move_everything(page, root)
            assert CONTROLS[name] <= set(moved), f"{name}: only {moved} could be moved."
        play = "document.querySelector('.edu-page').__app.views.play"
        page.wait_for_function(f"() => {play}.device && !{play}.running", timeout=PATIENCE)
        assert not page.evaluate(f"{play}.failed") and page.locator(".edu-page .percent").first.inner_text() != ""
        assert not page.locator(".edu-instead").is_visible()
        page.keyboard.press("Control+s")
        page.wait_for_function("!document.querySelector('.jp-mod-dirty')", timeout=PATIENCE)
        images = page.locator(".jp-RenderedImage img:visible")
        assert images.count() == 0, "The picture for other readers is seen beside the living widget."
        assert said == []
        for kernel in page.request.get(address("").replace("/lab/tree/", "/api/kernels")).json():
            page.request.delete(address("").replace("/lab/tree/", f"/api/kernels/{kernel['id']}"))
        page.reload()
        images.first.wait_for(timeout=PATIENCE)
        assert images.count() == len(NAMES), "A reader without a kernel misses a picture."
        assert page.locator(".edu-instead").is_visible(), "A reader without a kernel is not told of the page."
    outputs = [o for cell in nbformat.read(tmp_path / "explore.ipynb", as_version=4).cells
               for o in cell.get("outputs", [])]
    kept = [data for o in outputs for kind, data in o.get("data", {}).items() if kind.startswith("image/")]
    assert len(kept) == len(NAMES)
    for data in kept:
        Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_a_reader_without_a_kernel_sees_the_pictures(tmp_path):
    "The lesson as it lies in the repository, opened by somebody who runs nothing."
    (tmp_path / "lesson.ipynb").write_bytes((ROOT / "nbs/widgets/base.ipynb").read_bytes())
    with browser() as chromium, jupyterlab(tmp_path) as address:
        page = chromium.new_page()
        page.goto(address("lesson.ipynb"))
        page.wait_for_selector(".jp-OutputArea-output img", timeout=PATIENCE)
        assert page.locator(".jp-OutputArea-output img").first.evaluate("o => o.naturalWidth") > 300
        assert page.get_by_text("Error displaying widget").count() == 0


def test_voila_answers_only_with_the_token(tmp_path):
    pytest.importorskip("voila")
    with explore(tmp_path) as url:
        bare = url.split("?")[0]
        for path in ("", "api/kernels", "metaformer_edu.ipynb"):
            opened = urllib.request.urlopen(bare + path, timeout=60)
            assert "/login" in opened.url and b"edu-" not in opened.read(), path
        kernel = "api/kernels/00000000-0000-0000-0000-000000000000/channels"
        for asked in (urllib.request.Request(f"{bare}api/kernels", b"{}", method="POST"), f"{bare}{kernel}",
                      f"{bare}voila/files/metaformer_edu.ipynb"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(asked, timeout=60)
            assert refused.value.code == 403
        assert "/login" not in urllib.request.urlopen(url, timeout=60).url


@pytest.mark.parametrize("width, theme", [(1280, "light"), (700, "dark")])
def test_in_voila(tmp_path, width, theme):
    pytest.importorskip("voila")
    to_pil(sample_photo("flower", 96)).save(photo := tmp_path / "mine <b>.png")
    with browser() as chromium, explore(tmp_path, "--theme", theme) as url:
        page = chromium.new_page(viewport=dict(width=width, height=1000))
        said = listen(page)
        page.goto(url, timeout=PATIENCE)
        page.wait_for_function(ALL_DRAWN, arg=len(NAMES), timeout=PATIENCE)
        assert page.locator(".jp-InputArea").count() == 0, "There is code on the page."
        assert page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll('.edu-explorer')]"
            ".every(o => o.scrollWidth <= o.clientWidth + 1)"
        ), "Something is wider than the page."
        ink = page.locator(".edu-words, .edu-picture p").first.evaluate("o => getComputedStyle(o).color")
        assert (sum(map(int, ink[ink.index("(") + 1:-1].split(",")[:3])) > 382) == (theme == "dark")
        explorers = dict(zip(NAMES, page.locator(".edu-explorer").all()))
        for name, root in explorers.items() if width == 1280 else [("activation", explorers["activation"])]:
            assert CONTROLS[name] <= set(move_everything(page, root)), name
        cam = explorers["cam"]
        with page.expect_file_chooser() as chooser:
            cam.get_by_role("button", name="your own").click()
        changes(cam, lambda: chooser.value.set_files(photo), "An upload")
        assert cam.get_by_text("Give it an image of your own. Done.").count() == 1
        assert said == []


def test_the_last_change_wins_while_a_model_works(tmp_path):
    "Twenty keys in a row on a slow view: it says that it works, and it is asked a few times only."
    slow = (
        "import time\nfrom metaformer_edu.widgets.base import Explorer\nfrom "
        "metaformer_edu.widgets.activation_explorer import view_activation\nasked = []\n"
        "def view(**values):\n    asked.append(values['s']); time.sleep(1 if len(asked) > 1 else 0)\n    shown = "
        "view_activation(**values)\n"
        "    shown.words = f'asked {len(asked)} times, s = {values[\"s\"]:.2f}'\n    return shown\nExplorer(view, "
        "explore_activation().controls)"
    )
    notebook(tmp_path, [slow])
    with browser() as chromium, jupyterlab(tmp_path) as address:
        page = chromium.new_page()
        page.goto(address("explore.ipynb"))
        run_all(page, 1)
        root = page.locator(".edu-explorer")
        root.locator("[role=slider]").first.focus()
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        page.wait_for_selector(".edu-picture[aria-busy=true]", timeout=PATIENCE)
        assert root.get_by_text("working …").count() == 1
        page.wait_for_function("document.querySelector('.edu-picture p').textContent.includes('s = 1.20')",
                               timeout=PATIENCE)
        assert int(page.locator(".edu-picture p").inner_text().split()[1]) < 10
        assert page.locator(".edu-picture").get_attribute("aria-busy") == "false"
