"""Makes the site from the notebooks: `python tools/website.py` writes docs/_build/html, which needs no server and no
other host.

The pages that Sphinx reads are made in a temporary folder; any warning of Sphinx is an error, and every link in
the HTML is followed."""
import argparse
import configparser
import copy
import functools
import json
import os
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import course
import docments
import nbcells
from readme import ELSEWHERE, FENCED, INLINE, TARGET, in_prose, outside

ROOT = Path(__file__).resolve().parent.parent
NBS, DOCS = ROOT / "nbs", ROOT / "docs"
config = configparser.ConfigParser()
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]
LIB = ROOT / SETTINGS["lib_path"]
GITHUB = f"https://github.com/{SETTINGS['user']}/{SETTINGS['repo']}/blob/{SETTINGS['branch']}"
COLAB = GITHUB.replace("https://github.com", "https://colab.research.google.com/github")

WORDS, LINES = 200, 20  # read in a minute
COLUMNS = 120  # that code may have; what is printed in longer lines is wrapped
MADE = {"README.md": "reading_order.md", "models/README.md": "models.md"}  # lists for GitHub -> the site's own pages
PICTURES = {".png", ".jpg", ".jpeg", ".svg", ".gif"}
IMPORT = re.compile(rf"^\s*(?:from|import) +{SETTINGS['lib_name']}\.([\w.]+)", re.M)


class SiteError(Exception):
    "What is wrong with a page, in a sentence."


# --- notebooks ---

def notebooks():
    "index, then the course in its order, then the rest, by name."
    order = [c.path for c in chapters()]
    return sorted(nbcells.visible(NBS, "*.ipynb"),
                  key=lambda p: (p.stem != "index", order.index(p) if p in order else len(order), p))


def chapters():
    "The course as nbs/course.yml has it."
    return course.read(NBS)


def badges_apart(text):
    "With a point between badges in a row, which are words on the site."
    return re.sub(r"(\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)) +(?=\[!\[)", r"\1 · ", text)


def relinked(text, path):
    """Markdown of the notebook or file at `path`, with links to what is no page of the site led to GitHub, and
    badges of other hosts as words."""
    def one(match):
        target = match["path"]
        if ELSEWHERE.match(target):
            return match[0]
        at = Path(os.path.normpath(path.parent / unquote(re.split("[#?]", target)[0])))
        if not at.exists():
            raise SiteError(
                f"{path.relative_to(ROOT)} points to {target}, but there is no {os.path.relpath(at, ROOT)}."
            )
        if page := MADE.get(at.relative_to(NBS).as_posix() if NBS in at.parents else None):
            return match["before"] + os.path.relpath(NBS / page, path.parent)
        on_site = NBS in at.parents and at.suffix in {".ipynb", ".md", *PICTURES}
        return match[0] if on_site else f"{match['before']}{GITHUB}/{at.relative_to(ROOT).as_posix()}"

    text = outside(FENCED, text, lambda o: re.sub(r"!\[([^\]]*)\]\(https?://[^)]*\)", r"\1", badges_apart(o)))
    return in_prose(text, lambda o: TARGET.sub(one, o))


def stepwise(text):
    """A text that goes from its title straight to headings of the third level, as GitHub shows a glossary best, with
    headings of the second."""
    return (
        text
        if re.search(r"^## ", text, re.M)
        else outside(FENCED, text, lambda o: re.sub(r"^###(?=#* )", "##", o, flags=re.M))
    )


def markdown(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def is_guard(cell):
    "The lines that install the package in Colab, and nothing else."
    return "google.colab" in cell["source"] and all(
        re.match(r"import sys$|if 'google.colab' in sys.modules:|\s*[%!]\s*pip install", o) for o in nbcells.code(cell)
    )


def alternative(output):
    "What stands for a picture: the words beside it, if there are any."
    words = "".join(output["data"].get("text/plain", "")).strip()
    return "A picture drawn by the cell above" if not words or words[0] == "<" else " ".join(words.split())


def printed_lines(outputs):
    "The lines of text that stand below a cell, without those of tables and pictures, which are text elsewhere only."
    plain = [o["text"] if "text" in o else o["data"].get("text/plain", "")
             for o in outputs if "text" in o or o.get("data", {}).keys() == {"text/plain"}]
    return [line for text in plain for line in "".join(text).splitlines()]


def code_cell(cell, path, names=()):
    "The cells that a code cell becomes, by its directives; `names` are those that the reference has from it."
    found = nbcells.directives(cell)
    if "hide" in found or found.get("include") == "false" or is_guard(cell):
        return []
    exported = found.keys() & {"export", "exporti", "exports"}
    magics = [o for o in nbcells.split(cell)[0] if o.lstrip().startswith("%%")]
    source = "\n".join(magics + nbcells.split(cell)[1]).strip("\n")
    outputs = [] if found.get("output") == "false" else copy.deepcopy(cell["outputs"])
    for output in outputs:
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    outputs = [o for o in outputs if o.get("data") != {}]
    texts = [o for o in outputs if "text/markdown" in o.get("data", {})]
    outputs = [o for o in outputs if o not in texts]
    tags = ["remove-input"] if found.get("echo") == "false" else ["exported"] if exported else []
    tags += ["long"] if any(len(o) > COLUMNS for o in printed_lines(outputs)) else []
    made = {"cell_type": "code", "metadata": {"tags": tags}, "source": source, "outputs": outputs,
            "execution_count": None}
    pictures = [o for o in outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
    if pictures:
        made["metadata"]["mystnb"] = {"image": {"alt": alternative(pictures[0])}}
    if exported and source:
        names = [f"{{py:obj}}`{o.removeprefix(SETTINGS['lib_name'] + '.')} <{o}>`" for o in names]
        label = [
            markdown(f"(cell-{cell['id']})=\n:::{{container}} exported\n{' · '.join(['in the package', *names])}\n:::")
        ]
    else:
        label = []
    shown = [made] if source and "remove-input" not in tags or outputs else []
    printed = [f":::::{{container}} printed\n\n{relinked(''.join(o['data']['text/markdown']), path)}\n:::::"
               for o in texts]
    return label + shown + [markdown(o) for o in printed]


def cells_of(path):
    "The notebook's cells as the site shows them."
    made = []
    for cell in nbcells.read(path)["cells"]:
        if cell["cell_type"] == "markdown":
            made.append(markdown(relinked(cell["source"], path)))
        elif cell["cell_type"] == "code":
            made += code_cell(cell, path, exported_names(path).get(cell.get("id"), []))
    return made


@functools.cache
def module_of(path):
    "The module that a notebook writes, if it writes one."
    names = [found["default_exp"]
             for c in nbcells.read(path)["cells"] if "default_exp" in (found := nbcells.directives(c))]
    return LIB / f"{names[0].replace('.', '/')}.py" if names else None


def name_of(path):
    "The dotted name of a notebook's module inside the package: 'models.mixers'."
    return module_of(path).relative_to(LIB).with_suffix("").as_posix().replace("/", ".")


@functools.cache
def exported_names(path):
    "Cell id -> full names of what the reference says of it."
    found = {}
    for item in docments.public(module_of(path)) if module_of(path) else []:
        found.setdefault(item.cell, []).append(f"{SETTINGS['lib_name']}.{name_of(path)}.{item.name}")
    return found


# --- what is read, and how long it takes ---

class Lesson:
    "What the pages say of a notebook."
    def __init__(self, path):
        self.path, self.page = path, path.relative_to(NBS).as_posix()
        cells = [c for c in nbcells.read(path)["cells"] if "hide" not in nbcells.directives(c)]
        texts = [c["source"] for c in cells if c["cell_type"] == "markdown"]
        self.title = next((found[1] for t in texts if (found := re.search(r"^# +(.+)$", t, re.M))), None)
        if not self.title:
            raise SiteError(f"{path.relative_to(ROOT)} has no title.")
        self.words = sum(len(re.findall(r"\w[\w’'-]*", t)) for t in texts)
        codes = [c for c in cells if c["cell_type"] == "code" and not is_guard(c)
                 and nbcells.directives(c).get("echo") != "false"]
        self.lines = sum(len(nbcells.code(c)) for c in codes)
        self.imports = {name for c in codes for name in IMPORT.findall(c["source"])}

    @property
    def reading_time(self):
        "Minutes, counted; nbs/course.yml says them rounded."
        return max(1, round(self.words / WORDS + self.lines / LINES))

    @property
    def short(self):
        "The title before the question: '1.3 · Mixers'."
        return self.title.partition(": ")[0]


def first_sentence(text):
    return re.split(r"(?<=[.?!])\s+", text.strip())[0]


def needs(lesson, lessons):
    """The lessons, of those before it, whose code this one uses, without those that these use themselves; `lessons`
    in reading order."""
    pages = {name_of(o.path): o.page for o in lessons if module_of(o.path)}
    before, used = [], {}  # page -> all that it uses, by way of others too
    for o in lessons:
        direct = {pages[n] for n in o.imports & pages.keys()} & used.keys()
        further = set().union(*(used[page] for page in direct))
        if o is lesson:
            return [p for p in before if p.page in direct - further]
        before.append(o)
        used[o.page] = direct | further


def cell_text(text):
    return text.replace("|", r"\|").replace("\n", " ")


def table(head, rows, kind=""):
    lines = ["| " + " | ".join(cell_text(str(c)) for c in row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([f":::{{table}}\n:class: {kind}\n", *lines, ":::"] if kind else lines)


def made(text):
    "What the site writes of itself and docs/conf.py translates: titles, and a few words."
    return f":::::{{container}} made\n\n{text}\n:::::"


def reading_order():
    found = chapters()
    lessons = {c.path: Lesson(c.path) for c in found}
    needed = lambda o: ", ".join(f"[{p.short.split(' · ')[0]}]({p.page})"
                                 for p in needs(o, list(lessons.values()))) or "nothing"
    rows = {c.path: [f"[]({c.notebook}.ipynb){course.mark(c)}", c.minutes, needed(lessons[c.path])] for c in found}
    openings = {p.name: f"**[](parts/{p.page.name})**\n\n" for p in course.parts(NBS)}
    hours = course.hours(sum(c.minutes for c in found))
    parts = []
    for part in dict.fromkeys(c.part for c in found):
        mine = table(["read", "minutes", "needs"], [rows[c.path] for c in found if c.part == part])
        parts.append(made(openings.get(part, "") + mine))
    return f"""# Reading order

Every chapter, first to last, with the question that it opens with.

{made(f"Reading: {hours}.")}

The minutes are for reading alone, at {WORDS} words or {LINES} lines of code a minute.
Exercises come on top and take as long as they take.
*Needs* names the chapters before it whose code this one uses; theirs are not repeated.
★: on the quick path. ⚙: machine room, plumbing that a learner may skip.

## The quick path

From a token to a mixer of your own: trained, explained and compared.

{made(f"{course.quick_hours(found)}.")}

{made(table(["read", "minutes"], [rows[c.path][:2] for c in found if c.quick]))}

## Every chapter

""" + "\n\n".join(parts) + "\n"


# --- the reference ---

def prose(text):
    "A docstring as Markdown: only code in backticks is marked up."
    return outside(INLINE, text, lambda s: re.sub(r"([\\*_\[\]<>$|#{}~`^])", r"\\\1", s))


def as_code(text):
    "Code in backticks, also in a table."
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def source_of(module):
    "The address of a module's file."
    return f"{GITHUB}/{SETTINGS['lib_path']}/{module.replace('.', '/')}.py"


def source_links(item, module):
    "To a name's source, and to the cell of the lesson that writes it."
    lesson = f" · [in the lesson](#cell-{item.cell})" if item.cell else ""
    source = f"{source_of(module)}#L{item.lines[0]}-L{item.lines[1]}"
    return f":::{{container}} source-links\n[source]({source}){lesson}\n:::\n"


def entry(item, module, depth=0):
    "A name of the reference in Markdown."
    shown = ", ".join(p.name + (f"={p.default}" if p.default else "") for p in item.params)
    said = [p for p in item.params if p.type or p.default or p.comment]
    rows = [[as_code(p.name), as_code(p.type), as_code(p.default), prose(p.comment)] for p in said]
    if item.returns and item.kind != "property" and item.returns.type != "None":
        rows.append(["*returns*", as_code(item.returns.type), "", prose(item.returns.comment)])
    kept = [i for i in range(4) if i == 0 or any(row[i] for row in rows)]
    rows = [[row[i] for i in kept] for row in [["parameter", "type", "default", "what it is"], *rows]]
    fence = ":" * (5 - depth)
    return "\n".join(filter(None, [
        f"{fence}{{py:{item.kind}}} {item.name}"
        + (f"({shown})" if item.kind in ("function", "class", "method") else ""), "",
        prose(item.doc) + "\n" if item.doc else "",
        f"Takes and gives: {prose(item.note)}\n" if item.note else "",
        table(rows[0], rows[1:]) + "\n" if rows[1:] else "",
        *(entry(o, module, depth + 1) for o in item.members),
        source_links(item, module) if not depth else "",
        fence, ""]))


def reference(path, items):
    "The page of the module that a lesson writes."
    module, lesson = name_of(path), Lesson(path)
    names = [o for o in items if o.kind != "data"]
    constants = [o for o in items if o.kind == "data"]
    rows = [[f"{{py:obj}}`{o.name} <{SETTINGS['lib_name']}.{module}.{o.name}>`", prose(first_sentence(o.doc))]
            for o in names]
    return "\n".join(
        [
            f"# {module}\n",
            f"```{{py:module}} {SETTINGS['lib_name']}.{module}\n```\n",
            f"Lesson [{lesson.title}](../{lesson.page}) writes this module. "
            f"[Source]({source_of(module)}).\n",
            table(["name", "what it is"], rows) + "\n" if rows else "",
            "## Functions and classes\n" if names else "",
            *(entry(o, module) for o in names),
            "## Constants\n" if constants else "",
            *(constant(o, module) for o in constants),
        ]
    )


def constant(item, module):
    value = item.value if len(item.value) <= 100 else item.value[:99] + "…"
    return "\n".join([f":::::{{py:data}} {item.name}", *([f"`` {value} ``\n"] if value else [""]),
                      prose(item.doc) + "\n",
                      source_links(item, module), ":::::\n"])


def reference_index(paths):
    rows = [[f"[{name_of(p)}]({name_of(p)}.md)", f"[{Lesson(p).title}](../{Lesson(p).page})"]
            for p in paths if module_of(p)]
    entries = "\n".join(name_of(p) for p in paths if module_of(p))
    return f"""# Reference

What the package exports, module by module in the order of the course.
A comment beside a parameter in the code is its description here.
All names: {{ref}}`genindex`.

{table(['module', 'written by lesson'], rows)}

```{{toctree}}
:hidden:

{entries}
```
"""


# --- other pages ---

def named(kind, rows):
    "A table of Markdown whose first column the search leads to."
    return re.sub(r"^\| ([a-z]\w+_\w+) \|", rf"| {{{kind}}}`\1` |", rows.strip(), flags=re.M)


def sortable(rows):
    return made(f":::{{table}}\n:class: sortable\n\n{rows}\n:::")


def models_page():
    "The table in nbs/models/README.md, to be sorted."
    text = (NBS / "models/README.md").read_text(encoding="utf-8")
    found = re.search(r"^\| model .*?(?=\n\n|\Z)", text, re.M | re.S)
    if not found:
        raise SiteError("nbs/models/README.md has no table of the models: run python tools/readme.py.")
    rows = named("published-model", found[0])
    return f"""# Models

All {rows.count(chr(10)) - 1} published models. A column's head sorts by it; once more, the other way round.
The field keeps the rows that hold all your words, such as *caformer 384*.

Parameters and MACs are counted from our models, for one image of that size (frozen parameters after the plus).
Accuracy is ImageNet-1K top-1 as published by the paper's authors, whose weights load unchanged; models without it end
in ImageNet-21K's classes.

{sortable(rows)}

`create_model('caformer_s18')` builds one, and `pretrained=True` loads its weights.
Lesson {link_to("models/registry")} writes down what they are made of.
"""


def recipes_page():
    "The published recipes, to be sorted."
    from metaformer_edu.training.settings import recipe_table
    found = recipe_table()
    return f"""# Recipes

The {len(found)} published recipes: every setting with which the paper's authors trained a model, or trained one on.
`metaformer-train DATA --recipe NAME` trains by it, with any other flag over it.
Top-1 is the accuracy that they published for the model.
Lesson {link_to("training/settings")} says what the columns mean.

{sortable(named("published-recipe", found.markdown()))}
"""


def link_to(notebook):
    "A link to a chapter, by its name in nbs/course.yml."
    chapter = next(c for c in chapters() if c.notebook == notebook)
    return f"[{chapter.short}]({notebook}.ipynb)"


def explorer_page():
    return f"""# Play: ten models in your browser

Ten small models of the five families, trained on drawn shapes or on digits, compute on this page: it asks no network
and no kernel.
Draw or drag something, and see what they answer, where they look and who hears whom.
A click on a network's name goes inside, down to one number of one token; in Learn, two mixers train side by side.

```{{raw}} html
<p><a href="_static/play.html">Open it alone</a>, with more room.</p>
<iframe class="explorer" src="_static/play.html" title="Small models that answer to what you draw"
  allow="camera" loading="lazy"></iframe>
```

Lesson {link_to("widgets/page")} builds it, and `save_page(run, 'mine.html')` writes such a page of your own models.
Models that are too large for a browser fit on the page of lesson {link_to("widgets/mixing_explorer")}:
`save_mixing_page('mine.html', model, image)` keeps who hears whom for one image.
"""


OWN = {"recipes": recipes_page, "models": models_page, "reading_order": reading_order, "explorer": explorer_page}


def toctree(pages, caption=""):
    head = f":hidden:\n:caption: {caption}" if caption else ":hidden:"
    return f"```{{toctree}}\n{head}\n\n" + "\n".join(pages) + "\n```"


def toctrees(paths):
    "The order of the pages, hidden on the front page: parts, which hold their chapters, and what is no chapter."
    openings = {p.name: f"parts/{p.page.stem}" for p in course.parts(NBS)}
    course_pages = ["reading_order"]
    for chapter in chapters():
        page = openings.get(chapter.part, chapter.notebook)
        course_pages += [page] * (page not in course_pages)
    placed = {c.path for c in chapters()} | {NBS / "index.ipynb"}
    rest = [p.relative_to(NBS).with_suffix("").as_posix() for p in paths if p not in placed]
    groups = {"The course": course_pages,
              "Look things up": ["models", "recipes", "explorer", "glossary", *rest, "api/index"]}
    return "\n\n".join(toctree(pages, name) for name, pages in groups.items())


def opening_page(part):
    "The page with which a part opens, with its chapters below it in the sidebar."
    text = titled(relinked(part.page.read_text(encoding="utf-8"), part.page))
    return f"{text}\n{toctree([f'/{c.notebook}' for c in chapters() if c.part == part.name])}\n"


def about(path):
    "The line under a lesson's title."
    if path.stem == "index":
        return None
    page = path.relative_to(ROOT).as_posix()
    parts = [f"About {c.minutes} minutes" + " · machine room: a learner may skip it" * c.machine_room
             for c in chapters() if c.path == path]
    parts += [f"[run it in Colab]({COLAB}/{page})", f"[notebook]({GITHUB}/{page})"]
    parts += [f"[what it exports](/api/{name_of(path)}.md)"] if module_of(path) else []
    return f":::{{container}} about-lesson\n{' · '.join(parts)}\n:::"


def front(cells):
    "The cells of index.ipynb with the ways in put before its first heading of the second level."
    at = next(i for i, c in enumerate(cells) if re.search("^## ", c["source"], re.M))
    above, below = re.split("(?=^## )", cells[at]["source"], maxsplit=1, flags=re.M)
    cells = [*cells[:at], markdown(above), markdown(ways_in()), markdown(below), *cells[at + 1:]]
    cells[0]["source"] = re.sub(r"^English · .*\n+", "", cells[0]["source"], flags=re.M)  # every page has its own
    return cells


def ways_in():
    "Buttons, and the quick path as cards; what they say of a chapter or a part is its title."
    found = [c for c in chapters() if c.quick]
    openings = {p.name: f"[](parts/{p.page.name})" for p in course.parts(NBS)}
    cards = []
    for part in dict.fromkeys(c.part for c in found):
        mine = [c for c in found if c.part == part]
        lines = [f"- []({c.notebook}.ipynb) · {c.minutes} min" for c in mine]
        cards.append(f":::::{{container}} card\n**{openings.get(part, part)}**\n\n" + "\n".join(lines) + "\n:::::")
    return "\n\n".join([
        "::::::{container} cards buttons\n" + "\n\n".join(f"[]({name}.md)" for name in reversed(OWN)) + "\n::::::",
        "## The quick path",
        "From a token to a mixer of your own: trained, explained and compared. "
        "The minutes are for reading alone; exercises come on top.",
        "::::::{container} cards\n" + "\n\n".join(cards) + "\n::::::"])


def titled(text):
    "Markdown in which links on, and lists of chapters, say the titles of the pages that they lead to."
    bare = lambda o: re.sub(r"\[[^\]]*\](?=\()", "[]", o)
    text = course.NEXT.sub(lambda m: f"\n\n:::::{{container}} about-lesson\n{bare(m[0].strip())}\n:::::", text)
    return course.TABLE.sub(lambda m: f"\n{made(bare(m[0]))}\n", text)


def write_notebook(path, out, paths):
    cells = cells_of(path)
    if cells:
        cells[-1]["source"] = titled(cells[-1]["source"])
    if path.stem == "index":
        cells = front(cells) + [markdown(toctrees(paths))]
    elif cells and (line := about(path)):
        cells[0] = markdown(re.sub(r"^(# .+)$", lambda m: f"{m[0]}\n\n{line}", cells[0]["source"], count=1, flags=re.M))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    for i, cell in enumerate(cells):
        cell["id"] = f"c{i}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}),
                   encoding="utf-8")


def write_pages(pages, only=None):
    "All that Sphinx reads, or only what is made of some notebooks and openings of parts."
    paths = notebooks()
    for path in [p for p in paths if only is None or p in only]:
        write_notebook(path, pages / path.relative_to(NBS), paths)
    for part in [p for p in course.parts(NBS) if only is None or p.page in only]:
        write_text(pages / part.page.relative_to(NBS), opening_page(part))
    for name, page in OWN.items():
        if only is None or NBS / f"{name}.md" in only:
            write_text(pages / f"{name}.md", page())
    if only is not None:
        return
    for path in nbcells.visible(NBS, "*"):
        if path.suffix in PICTURES:
            (pages / path.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, pages / path.relative_to(NBS))
    glossary = NBS / "glossary.md"
    write_text(pages / "glossary.md", stepwise(relinked(glossary.read_text(encoding="utf-8"), glossary)))
    for path in filter(module_of, paths):
        write_text(pages / f"api/{name_of(path)}.md", reference(path, docments.public(module_of(path))))
    write_text(pages / "api/index.md", reference_index(paths))


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# --- links ---

class Links(HTMLParser):
    "A page's anchors, its links, and what it loads by itself."
    LOADED = {("img", "src"), ("script", "src"), ("iframe", "src"), ("link", "href"), ("source", "src"),
              ("source", "srcset"), ("img", "srcset"),
              ("video", "src"), ("audio", "src"), ("object", "data"), ("embed", "src"), ("use", "href"),
              ("image", "href"), ("form", "action")}

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif (tag, name) in self.LOADED and not (tag == "link" and dict(attrs).get("rel") in ("canonical",)):
                self.loaded.append(value or "")
            elif (tag, name) == ("a", "href"):
                self.links.append(value or "")
            elif name == "style":
                self.loaded += in_style(value or "")


def in_style(css):
    "What a style sheet asks for."
    return [a or b for a, b in re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", css)]


def foreign(target):
    parts = urlsplit(target)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


def broken(target):
    "What is wrong with the form of a link to elsewhere, if anything; nobody is asked whether it answers."
    parts = urlsplit(target)
    if parts.scheme == "mailto":
        return None if "@" in parts.path else "has no address"
    if parts.scheme not in ("http", "https"):
        return "has an unknown scheme"
    return (
        None
        if re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc) and not re.search(r"\s", target)
        else "is no address"
    )


def check_links(folder):
    "Sentences about links of the site in `folder` that lead nowhere, and about what would be asked of other hosts."
    folder = Path(folder).resolve()
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in folder.rglob("*.html")}
    found = []
    for page, links in pages.items():
        name = page.relative_to(folder).as_posix()
        for target in links.loaded + links.links:
            if foreign(target) or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", target):
                if target in links.loaded and not target.startswith("data:"):
                    found.append(f"{name} asks another host for {target}.")
                elif target not in links.loaded and (why := broken(target)):
                    found.append(f"{name} links to {target}, which {why}.")
                continue
            parts = urlsplit(target)
            at = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
            if folder / "zh" in at.parents and not at.exists():  # only some pages were written
                at = folder / at.relative_to(folder / "zh")
            if folder not in at.parents or not at.is_file():
                found.append(f"{name} points to {target}, but there is no such file.")
            elif parts.fragment and at in pages and unquote(parts.fragment) not in pages[at].anchors:
                found.append(f"{name} points to {target}, but there is no such place on that page.")
    for sheet in folder.rglob("*.css"):
        found += [f"{sheet.relative_to(folder).as_posix()} asks another host for {o}."
                  for o in in_style(sheet.read_text(encoding="utf-8")) if foreign(o)]
    return sorted(set(found))


# --- all of it ---

def build(out, only=None):
    """Make the site in the folder `out`, and in Chinese in zh/ there; SiteError if Sphinx warns or a link is broken.
    `only`: names of pages; in Chinese only these are written."""
    if out.exists() and any(out.iterdir()) and not (out / "objects.inv").exists():
        raise SiteError(f"{out} holds something else than a site: choose an empty folder.")
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder) / "pages"
        sys.path.insert(0, str(ROOT))  # this checkout's package, whatever is installed
        write_pages(pages)
        shutil.copytree(DOCS / "locale", pages / "locale")  # Sphinx compiles what is there
        from metaformer_edu.widgets.page import save_page
        from sphinx.cmd.build import main as sphinx
        save_page(None, f"{folder}/play.html", weights="int8")
        shutil.rmtree(out, ignore_errors=True)
        options = ["-q", "-n", "-W", "--keep-going", "-T", "-j", "auto", "-c", str(DOCS), "-b", "html"]
        some = [str(o) for name in only or [] for o in pages.glob(f"{name}.*") if o.suffix in (".ipynb", ".md")]
        for site, more, files in ((out, [], []), (out / "zh", ["-D", "language=zh_CN"], some)):
            if files:  # Sphinx wants an index of the pages that it does not write
                site.mkdir()
                shutil.copy(out / "searchindex.js", site)
            if sphinx([*options, *more, "-d", f"{folder}/{site.name}_doctrees", str(pages), str(site), *files]):
                raise SiteError("Sphinx warned, see above: the site is not finished.")
            shutil.copy(f"{folder}/play.html", site / "_static")
    if wrong := check_links(out):
        raise SiteError("\n".join(wrong))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "_build/html",
                        help="folder for the site, which is made anew (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="PAGE",
                        help="in Chinese write only these, such as index: quicker, and links to others lead nowhere")
    args = parser.parse_args()
    try:
        build(args.out.resolve(), args.only)
    except SiteError as error:
        sys.exit(str(error))
    print(args.out / "index.html")


if __name__ == "__main__":
    main()
