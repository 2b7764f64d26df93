"""Takes a picture of each explorer on the page of metaformer-explore: `python tools/screenshots.py --out shots`.

The two of the README: `python tools/screenshots.py mixing cam --out nbs/images`.
"""
import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import ALL_DRAWN, CHROMIUM, FLAGS, PATIENCE, changes, explore  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from metaformer_edu.commands.explore import SECTIONS  # noqa: E402


def prepare(name, page, root):
    "Show more than how the page opens: a token under the pointer, and a model that has learned its task well."
    if name == "mixing":
        box = root.locator("canvas").first.bounding_box()
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.45 * box["height"])
    if name == "cam":
        for chosen, option in zip(root.locator("select").all(), ("convformer", "cross")):
            changes(root, lambda: chosen.select_option(option), option)


def take(names, out, theme, width):
    out.mkdir(parents=True, exist_ok=True)
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, sync_playwright() as started,
          explore(Path(folder), "--theme", theme) as url):
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page(viewport=dict(width=width, height=2400))
        page.goto(url)
        page.wait_for_function(ALL_DRAWN, arg=len(SECTIONS), timeout=PATIENCE)
        roots = dict(zip(SECTIONS, page.locator(".edu-explorer").all()))
        for name in names:
            roots[name].scroll_into_view_if_needed()
            prepare(name, page, roots[name])
            page.wait_for_timeout(1000)
            roots[name].screenshot(path=out / f"explore_{name}{'_dark' if theme == 'dark' else ''}.png")
            print(out / f"explore_{name}{'_dark' if theme == 'dark' else ''}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels (default %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SECTIONS):
        parser.error(f"There is no explorer {', '.join(sorted(unknown))}: they are {', '.join(SECTIONS)}.")
    if not CHROMIUM:
        parser.error("No Chromium is installed (Debian: apt-get install chromium).")
    take(args.names or SECTIONS, args.out, args.theme, args.width)


if __name__ == "__main__":
    main()
