"""Reads nbs/course.yml, the reading order, and writes what follows from it: `python tools/course.py`, or `--check`
to only compare.

Chapter numbers in titles and in links to chapters, the link on at the foot of each, nbs/README.md, the list of all,
and in nbs/parts/ the chapters and the picture with which each part opens."""
import argparse
import base64
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
TABLE = re.compile(r"(?<=<!-- chapters: made by tools/course.py -->\n).*?(?=<!-- end -->)", re.S)
HOURS = "About {} for reading alone; exercises come on top."
EXERCISES, EXERCISE_MINUTES = 3, 8  # of a chapter; for one of them, an estimate


@dataclass
class Part:
    "A part of the course, and the page with which it opens."
    name: str
    page: Path          # nbs/parts/model.md
    cell: str = ""      # 'models/mixers#c463194f': the notebook and the cell that drew its picture

    def picture(self, folder):
        "(the picture's path, its bytes), from the notebook's outputs."
        notebook, cell = self.cell.split("#")
        found = next(c for c in nbcells.read(folder / f"{notebook}.ipynb")["cells"] if c["id"] == cell)
        data = next(d for o in found["outputs"] if (d := o.get("data", {})).keys() & {"image/png", "image/jpeg"})
        kind = "jpeg" if "image/jpeg" in data else "png"
        return self.page.with_suffix(f".{kind}"), base64.b64decode("".join(data[f"image/{kind}"]))


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


def parts(folder=NBS):
    "The parts of course.yml in that folder which have a page."
    entries = yaml.safe_load((folder / "course.yml").read_text(encoding="utf-8"))
    return [Part(o["part"], folder / f"parts/{o['page']}.md", o["picture"]) for o in entries if "page" in o]


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
        texts[0].source = TITLE.sub(lambda m: f"# {chapters[place].title}", texts[0].source, count=1)
        texts[-1].source = NEXT.sub("", texts[-1].source) + way_on(chapters[place], chapters[place + 1:])
    return nbformat.writes(nb) + "\n"


def way_on(chapter, later):
    "The line at a chapter's foot: the next one, and the next on the quick path or past the machine room."
    if not later:
        return ""
    ways = {"Next": later[0]}
    if chapter.quick:
        ways["On the quick path"] = next((c for c in later if c.quick), later[0])
    elif later[0].machine_room and not chapter.machine_room:
        ways["Past the machine room"] = next((c for c in later if not c.machine_room), later[0])
    links = [f"{way}: [{c.title}]({to(c.path, chapter.path.parent)})"
             for way, c in ways.items() if way == "Next" or c is not later[0]]
    return "\n\n" + " · ".join(links)


def hours(minutes):
    h, m = divmod(minutes, 60)
    return " ".join([f"{h} h"] * bool(h) + [f"{m} min"] * bool(m))


def quick_hours(chapters):
    "How long the quick path takes: '3 h 33 min of reading, and … for its 33 exercises, at 8 minutes each …'."
    quick = [c for c in chapters if c.quick]
    exercises = EXERCISES * len(quick)
    reading, both = sum(c.minutes for c in quick), sum(c.minutes for c in quick) + EXERCISE_MINUTES * exercises
    return (
        f"{len(quick)} chapters in about {round(both / 60)} hours: {hours(reading)} of reading, counted in words and "
        f"lines of code, and {exercises} exercises at {EXERCISE_MINUTES} minutes each, which is a guess"
    )


def chapter_table(part, chapters):
    "What stands between the marks of a part's page."
    found = [c for c in chapters if c.part == part.name]
    lines = ["", "| chapter | minutes |", "| --- | --- |"]
    lines += [f"| [{c.title}]({to(c.path, part.page.parent)}){mark(c)} | {c.minutes} |" for c in found]
    said = f"Reading: {hours(sum(c.minutes for c in found))}"
    if any(c.machine_room for c in found):
        said += f", or {hours(sum(c.minutes for c in found if not c.machine_room))} without the machine room (⚙)"
    lines += ["", f"{said}. ★: on the quick path." if any(c.quick for c in found) else f"{said}.", ""]
    return "\n".join(lines) + "\n"


def mark(chapter):
    return " ★" * chapter.quick + " ⚙" * chapter.machine_room


def overview(chapters):
    "nbs/README.md: every chapter, with its minutes and a way to run it."
    quick = [c for c in chapters if c.quick]
    pages = {p.name: to(p.page, NBS) for p in parts()}
    lines = [
        "<!-- Made from course.yml by tools/course.py: edit that file, not this one. -->",
        "",
        "# The course",
        "",
        HOURS.format(hours(sum(c.minutes for c in chapters))),
        f"The **quick path** (★) leads from a token to a mixer of your own, trained, explained and compared. It has "
        f"{quick_hours(chapters)}. It is "
        + ", ".join(f"[{c.short.partition(' · ')[2] or c.short}]({c.notebook}.ipynb)" for c in quick)
        + ".",
        "*Machine room* (⚙) marks chapters on plumbing, which a learner may skip. Words are explained in the "
        "[glossary](glossary.md), "
        "exercises have [solutions](solutions.ipynb), and [models](models/README.md) lists all published models.",
    ]
    for part in dict.fromkeys(c.part for c in chapters):
        lines += ["", f"## [{part}]({pages[part]})", "", "| chapter | min | run it |", "| --- | --- | --- |"]
        for c in (c for c in chapters if c.part == part):
            lines.append(
                f"| [{c.title}]({c.notebook}.ipynb){mark(c)} | {c.minutes} | [![Open in "
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
    for part in parts():
        table = chapter_table(part, chapters)
        made[part.page] = TABLE.sub(lambda m: table, part.page.read_text(encoding="utf-8"))
        made |= [part.picture(NBS)]
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
        path.write_bytes(made[path] if isinstance(made[path], bytes) else made[path].encode())


def same(path, text):
    if isinstance(text, bytes):
        return path.read_bytes() == text
    old = path.read_text(encoding="utf-8")
    return json.loads(old) == json.loads(text) if path.suffix == ".ipynb" else old == text


if __name__ == "__main__":
    main()
