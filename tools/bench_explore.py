"""Times the explorers on this machine: `python tools/bench_explore.py` (caformer_s18 at 224 px, random weights).

How long an import takes, what of it is PyTorch's and timm's; how long each explorer takes to open; and for each control the median and the
worst time from a change to the finished picture. Then the pointer of the mixing explorer, inside Chromium.
"""
import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def imports(what):
    "Seconds of an import in a process of its own, median of three."
    code = f"import time; t = time.perf_counter(); import {what}; print(time.perf_counter() - t)"
    return statistics.median(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout) for _ in range(3))


def other_value(control, dice):
    "Another value that the control can have, and how to set it."
    import ipywidgets as W
    if hasattr(control, "names"):  # an ImagePicker
        return other_value(control.names, dice)
    if isinstance(control, W.SelectMultiple):
        values = tuple(sorted(dice.sample(range(len(control.options)), dice.randint(1, len(control.options)))))
        return lambda: setattr(control, "index", values)
    if hasattr(control, "options"):
        i = dice.choice([i for i in range(len(control.options)) if i != control.index] or [0])
        return lambda: setattr(control, "index", i)
    steps = round((control.max - control.min) / control.step)
    return lambda: setattr(control, "value", control.min + dice.randint(0, steps) * control.step)


def times(explorer, control, n, dice):
    "Seconds from a change to the finished picture; changes that change nothing are left out."
    found = []
    while len(found) < n:
        change, before = other_value(control, dice), explorer.values()
        start = time.perf_counter()
        change()
        explorer.wait()
        if explorer.values() != before:
            found.append(time.perf_counter() - start)
        elif hasattr(control, "options") and len(control.options) < 2:
            return []
    return found


def pointer(explorer_page, moves):
    "Milliseconds that the page needs for a move: handling and drawing, as it measures itself."
    from playwright.sync_api import sync_playwright

    from browser import CHROMIUM, FLAGS
    with sync_playwright() as started:
        page = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS).new_page(viewport=dict(width=1280, height=1000))
        page.goto(explorer_page.as_uri())
        box, found = page.locator("canvas").first.bounding_box(), []
        dice = random.Random(0)
        for _ in range(moves):
            page.mouse.move(box["x"] + dice.random() * box["width"], box["y"] + dice.random() * box["height"])
            page.wait_for_timeout(30)
            found.append(float(page.locator("[data-move-last]").first.get_attribute("data-move-last")))
        return found


def line(name, values, unit=1000):
    print(f"{name:34} median {unit * statistics.median(values):7.1f} ms   worst {unit * max(values):7.1f} ms   ({len(values)} changes)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20, help="changes of each control (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch (default %(default)s)")
    args = parser.parse_args()
    for what in ("torch", "timm", "metaformer_edu", "metaformer_edu.commands.explore"):
        print(f"import {what:27} {imports(what):5.2f} s", flush=True)
    import torch

    from metaformer_edu import explore_activation, explore_cam, explore_mixing, explore_model, explore_training
    from metaformer_edu.widgets.mixing_explorer import save_mixing_page
    from metaformer_edu.models.registry import create_model
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = create_model("caformer_s18").eval()
    print(f"create_model('caformer_s18')       {time.perf_counter() - start:5.2f} s")
    opening = {"model": lambda: explore_model("caformer_s18"), "cam": lambda: explore_cam(model), "activation": explore_activation, "training": explore_training}
    dice = random.Random(0)
    for name, build in opening.items():
        start = time.perf_counter()
        explorer = build()
        print(f"open explore_{name:21} {time.perf_counter() - start:5.2f} s", flush=True)
        for control in explorer.controls:
            if found := times(explorer, explorer[control], args.n, dice):
                line(f"  {name}: {control}", found)
    start = time.perf_counter()
    explorer = explore_mixing(model)
    print(f"open explore_mixing                {time.perf_counter() - start:5.2f} s")
    for round_ in ("first time", "again"):
        for stage in (1, 2, 4, 3):
            start = time.perf_counter()
            explorer.stage = stage
            explorer.wait()
            print(f"  mixing: stage {stage}, {round_:17} {1000 * (time.perf_counter() - start):7.1f} ms", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_mixing_page(page := Path(folder) / "page.html", model)
        line("  mixing: pointer, in the page", pointer(page, 100), unit=1)


if __name__ == "__main__":
    main()
