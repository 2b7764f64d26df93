"""Reads nbs/course.yml, the reading order, and writes what follows from it: `python tools/course.py`, or `--check`
to only compare.

Chapter numbers in titles and in links to chapters, the link on at the foot of each, and nbs/README.md, the list
of all."""
import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import yaml

import nbcells

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
COLAB = "https://colab.research.google.com"
BADGE = f"{COLAB}/assets/colab-badge.svg"
COPY = f"{COLAB}/github/metaformer-edu/metaformer_edu/blob/main/nbs"
NUMBER = r"\d+\.\d+"
TITLE = re.compile(rf"^# (?:{NUMBER} · )?(?P<title>.+)$", re.M)
LINK = re.compile(
    rf"\[(?P<before>(?:[Ll]essons? )?){NUMBER}(?P<name> · [^\]]*)?\]\((?P<path>[^)\s#]+\.ipynb)(?P<anchor>#[^)]*)?\)"
)
SECTION = re.compile(rf"^## {NUMBER} · .*$", re.M)  # of the solutions, above a link to their chapter
NEXT = re.compile(r"\n*^Next: \[.*\]\(.*\)$\s*\Z", re.M)
HOURS = "About {} for reading alone; exercises come on top."


@dataclass
class Chapter:
    "An entry of the course."
    notebook: str               # path in nbs/, without .ipynb
    minutes: int                # for reading alone
    part: str
    path: Path
    number: str = ""            # such as '3.2'; tutorials have none
    was: str = ""               # the number until 0.1.0
    quick: bool = False         # on the quick path
    machine_room: bool = False  # a learner may skip it

    @cached_property
    def heading(self):
        "The title without its number: 'Mixers: how can tokens talk?'."
        return TITLE.search(nbcells.read(self.path)["cells"][0]["source"])["title"]

    @property
    def title(self):
        return f"{self.number} · {self.heading}" if self.number else self.heading

    @property
    def short(self):
        "The title before the question: '1.3 · Mixers'."
        return self.title.partition(": ")[0]


def read(folder=NBS):
    "All chapters of course.yml in that folder in reading order, numbered."
    chapters, parts = [], 0
    for part in yaml.safe_load((folder / "course.yml").read_text(encoding="utf-8")):
        number = 0
        for entry in part["chapters"]:
            chapter = Chapter(part=part["part"], path=folder / f"{entry['notebook']}.ipynb", **entry)
            if not chapter.notebook.startswith("tutorials/"):
                parts += number == 0
                number += 1
                chapter.number = f"{parts}.{number}"
            chapters.append(chapter)
    return chapters


def to(target, folder):
    "The link from a folder below nbs/ to a notebook."
    return Path(os.path.relpath(target, folder)).as_posix()


def renumbered(text, folder, chapters):
    "Markdown with the numbers in its links to chapters made right."
    by_path = {c.path: c for c in chapters}

    def one(match):
        chapter = by_path.get(Path(os.path.normpath(folder / match["path"])))
        if not chapter or not chapter.number:
            return match[0]
        name = f" · {chapter.short.partition(' · ')[2]}" if match["name"] else ""
        return f"[{match['before']}{chapter.number}{name}]({match['path']}{match['anchor'] or ''})"

    if (link := LINK.search(text)) and (chapter := by_path.get(Path(os.path.normpath(folder / link["path"])))):
        text = SECTION.sub(f"## {chapter.short}", text)
    return LINK.sub(one, text)


def written(path, chapters):
    "The notebook at `path` as the course wants it."
    nb = nbformat.read(path, as_version=4)
    texts = [c for c in nb.cells if c.cell_type == "markdown"]
    for cell in texts:
        cell.source = renumbered(cell.source, path.parent, chapters)
    place = next((i for i, c in enumerate(chapters) if c.path == path), None)
    if place is not None:
        chapter, later = chapters[place], chapters[place + 1:place + 2]
        texts[0].source = TITLE.sub(lambda m: f"# {chapter.title}", texts[0].source, count=1)
        foot = f"\n\nNext: [{later[0].title}]({to(later[0].path, path.parent)})" if later else ""
        texts[-1].source = NEXT.sub("", texts[-1].source) + foot
    return nbformat.writes(nb) + "\n"


def hours(minutes):
    h, m = divmod(minutes, 60)
    return " ".join([f"{h} h"] * bool(h) + [f"{m} min"] * bool(m))


def overview(chapters):
    "nbs/README.md: every chapter, with its minutes and a way to run it."
    quick = [c for c in chapters if c.quick]
    lines = [
        "<!-- Made from course.yml by tools/course.py: edit that file, not this one. -->",
        "",
        "# The course",
        "",
        HOURS.format(hours(sum(c.minutes for c in chapters))),
        f"The **quick path** (★) takes about {hours(sum(c.minutes for c in quick))}: "
        + ", ".join(f"[{c.short.partition(' · ')[2] or c.short}]({c.notebook}.ipynb)" for c in quick)
        + ".",
        "*Machine room* (⚙) marks chapters on plumbing, which a learner may skip. Words are explained in the "
        "[glossary](glossary.md), "
        "exercises have [solutions](solutions.ipynb), and [models](models/README.md) lists all published models.",
    ]
    for part in dict.fromkeys(c.part for c in chapters):
        lines += ["", f"## {part}", "", "| chapter | min | run it |", "| --- | --- | --- |"]
        for c in (c for c in chapters if c.part == part):
            mark = " ★" * c.quick + " ⚙" * c.machine_room
            lines.append(
                f"| [{c.title}]({c.notebook}.ipynb){mark} | {c.minutes} | [![Open in "
                f"Colab]({BADGE})]({COPY}/{c.notebook}.ipynb) |"
            )
    return "\n".join(lines) + "\n"


def files():
    "{path: what should stand in it}."
    chapters = read()
    made = {p: written(p, chapters) for p in nbcells.visible(NBS, "*.ipynb")}
    glossary = NBS / "glossary.md"
    made[glossary] = renumbered(glossary.read_text(encoding="utf-8"), NBS, chapters)
    made[NBS / "README.md"] = overview(chapters)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is stale")
    args = parser.parse_args()
    made = files()
    stale = [p for p, text in made.items() if not p.exists() or not same(p, text)]
    if args.check and stale:
        sys.exit(
            f"Not as nbs/course.yml says: {', '.join(p.relative_to(ROOT).as_posix() for p in stale)}. Run python "
            f"tools/course.py."
        )
    for path in stale:
        path.write_text(made[path], encoding="utf-8")


def same(path, text):
    old = path.read_text(encoding="utf-8")
    return json.loads(old) == json.loads(text) if path.suffix == ".ipynb" else old == text


if __name__ == "__main__":
    main()
