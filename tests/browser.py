"A real Chromium for tests, JupyterLab and the page of `metaformer-explore` in it, and a hand that moves every control."
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--use-fake-device-for-media-stream"]
WEBGPU = [*FLAGS[:1], *FLAGS[2:], "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader",  # on any processor
          "--enable-features=Vulkan", "--use-vulkan=swiftshader", "--ignore-gpu-blocklist"]
PATIENCE = 60_000  # ms; a busy machine imports PyTorch for a while

OF_OTHERS = ("Unsatisfied version", "No satisfying version", "favicon")  # Voilà's own versions of JupyterLab's modules

ALL_DRAWN = """n => {
    const kinds = ['error', 'stderr'].map(kind => `[data-mime-type="application/vnd.jupyter.${kind}"]`);
    const error = document.querySelector(kinds.join(', '));
    if (error) throw new Error(error.textContent);
    return document.querySelectorAll('.edu-explorer').length == n &&
    [...document.querySelectorAll('.edu-explorer')].every(o => o.querySelector('.edu-drawing svg, canvas')) }"""


@contextmanager
def browser(flags=FLAGS):
    "Chromium, or a skipped test that says what is missing."
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[dev]'.")
    if not CHROMIUM:
        pytest.skip("No Chromium is installed (Debian: apt-get install chromium).")
    with api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


def listen(page):
    "What the page complains about, and whom it asks beside this machine; a list that grows."
    said = []
    note = lambda *text: None if any(o in str(text) for o in OF_OTHERS) else said.append(text)
    page.on("console", lambda m: note(m.type, m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: note("error", str(e)))
    page.on("response", lambda r: note(r.status, r.url) if r.status >= 400 else None)
    page.on("request",
            lambda r: note("asks", r.url) if r.url.startswith("http") and "//127.0.0.1" not in r.url else None)
    return said


def environment(folder):
    "No one's settings, this checkout's package, and one thread for each kernel."
    own = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", IPYTHONDIR=str(folder / "ipython"))
    return {**os.environ, **own,
            **{f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}}


@contextmanager
def process(argv, folder, **options):
    "A process that ends with the block."
    with subprocess.Popen(argv, env=environment(folder), cwd=folder, **options) as running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def jupyterlab(folder):
    "JupyterLab on a folder; gives a function from a notebook's name to its address."
    from metaformer_edu.commands.explore import free_port
    for name, settings in {"notebook-extension/tracker": dict(windowingMode="none"),
                           "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False)}.items():
        path = folder / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    start = f"http://127.0.0.1:{(port := free_port())}"
    flags = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=t",
             f"--ServerApp.root_dir={folder}"]
    with open(folder / "lab.log", "w") as log, process([sys.executable, "-m", "jupyterlab", *flags], folder, stdout=log,
                                                       stderr=log):
        end = time.monotonic() + PATIENCE / 1000
        while not answers(f"{start}/api?token=t"):
            assert time.monotonic() < end, (folder / "lab.log").read_text()
            time.sleep(0.2)
        yield lambda name: f"{start}/lab/tree/{name}?token=t&reset"


@contextmanager
def explore(folder, *args):
    "The page of `metaformer-explore`; gives its address."
    command = [sys.executable, "-m", "metaformer_edu.commands.explore", "--no-browser", *map(str, args)]
    with open(folder / "explore.log", "w") as log, process(command, folder, stdout=subprocess.PIPE, stderr=log,
                                                           text=True) as running:
        url = running.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), (folder / "explore.log").read_text()
        yield url


def picture(root):
    "What an explorer shows: its drawing, or the pixels of its canvases."
    return root.evaluate("""o => [...o.querySelectorAll('.edu-drawing')].map(d => d.innerHTML).join() +
        [...o.querySelectorAll('canvas')].map(c => c.toDataURL()).join()""")


def settled(root):
    "The picture once it stays: a list that another one fills is filled then too."
    before = None
    while (now := picture(root)) != before:
        before = now
        time.sleep(0.3)
    return now


def changes(root, act, what, before=None):
    "Do something, and wait until the picture is another than the settled one `before`."
    before = before or settled(root)
    act()
    end = time.monotonic() + PATIENCE / 1000
    while picture(root) == before:
        assert time.monotonic() < end, f"{what} changed nothing."
        time.sleep(0.05)


def move_everything(page, root):
    "Move each control of an explorer by mouse or key, and see the picture follow; gives their names."
    moved = []
    for select in root.locator("select").all():
        before = settled(root)
        name = select.evaluate("o => o.labels?.[0]?.textContent || o.getAttribute('aria-label') || ''").strip()
        assert name, "A list has no label."
        chosen = select.evaluate("o => o.selectedIndex")
        options = select.locator("option:enabled").count()
        if options > 1:
            other = 2 if name == "class" else 1  # the first class may be the guess, whose map is shown already
            changes(root, lambda: select.select_option(index=0 if chosen else other), name, before)
            moved.append(name)
    for handle in root.locator("[role=slider]").all():
        name = handle.get_attribute("aria-label")
        assert name, "A slider has no label."
        at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        handle.focus()
        changes(root, lambda: page.keyboard.press("ArrowLeft" if at_end else "ArrowRight"), name)
        moved.append(name)
    return moved
