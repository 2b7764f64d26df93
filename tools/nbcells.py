"""How the tools and the tests read a notebook: as JSON, with nbdev's directives."""
import json
import re
from pathlib import Path

_directive = re.compile(r"\s*#\s*\|\s*(.*)")
_magic = re.compile(r"\s*%%\w+")


def read(path):
    "The notebook's JSON, each cell's source joined into one string."
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def visible(folder, pattern):
    "The files below a folder of that pattern, in order, that are not hidden or in a hidden folder."
    return sorted(p for p in Path(folder).rglob(pattern) if not any(o[0] in "._" for o in p.relative_to(folder).parts))


def split(cell):
    "A cell's leading directive and cell-magic lines, and the rest: nbdev heeds no directive after the first code line."
    lines = cell["source"].splitlines()
    n = next((i for i, o in enumerate(lines) if o.strip() and not _directive.match(o) and not _magic.match(o)),
             len(lines))
    return lines[:n], lines[n:]


def directives(cell):
    "A code cell's directives as {name: rest of the line}, colons dropped: `#| eval: false` is {'eval': 'false'}."
    found = {}
    for line in split(cell)[0] if cell["cell_type"] == "code" else []:
        if (match := _directive.match(line)) and (words := match[1].replace(":", " ").split()):
            found[words[0]] = " ".join(words[1:])
    return found


def code(cell):
    "A code cell's lines that are neither blank nor directives."
    return [o for o in cell["source"].splitlines() if o.strip() and not _directive.match(o)]


def late_directives(cell):
    "Directive lines below code; nbdev ignores them in silence."
    return [o.strip() for o in split(cell)[1] if _directive.match(o)]
