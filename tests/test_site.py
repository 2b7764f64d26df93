"""The site: its parts on small notebooks, one build of all of it with warnings as errors, and that in a browser."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser, listen

import course
import docments
import website

ROOT = Path(__file__).resolve().parent.parent


def code(source, *outputs, id="c1"):
    return {"cell_type": "code", "id": id, "metadata": {}, "source": source, "outputs": list(outputs)}


def shown(**data):
    return {"output_type": "display_data", "metadata": {}, "data": {k.replace("_", "/"): v for k, v in data.items()}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder of notebooks in the place of nbs/, each a chapter of its course; gives a function that writes one."
    website.module_of.cache_clear()
    monkeypatch.setattr(website, "ROOT", tmp_path)
    monkeypatch.setattr(website, "NBS", tmp_path / "nbs")

    def write(name, *cells):
        path = tmp_path / "nbs" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [o if isinstance(o, dict) else {"cell_type": "markdown", "id": "m", "metadata": {}, "source": o}
                 for o in cells]
        path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        if name != "index":
            with open(tmp_path / "nbs/course.yml", "a") as file:
                file.write(f"- part: {name}\n  chapters: [{{notebook: {name}, minutes: 3}}]\n")
        return path
    return write


# --- notebooks ---

def cells(*args, **kwargs):
    return website.code_cell(code(*args, **kwargs), website.NBS / "x.ipynb")


def test_hidden_cells_and_the_guard_are_absent_and_directives_are_no_text():
    guard = "import sys\nif 'google.colab' in sys.modules:\n    %pip install -q git+https://github.com/a/b"
    assert (
        cells("#| hide\nx = 1") == cells("#| default_exp mixers") == cells(guard) == cells("#| include: false\nx") == []
    )
    assert cells(guard + "\nprint(1)")[0]["source"].endswith("print(1)")  # it does something else as well
    label, made = cells("#| export\ndef f(): pass", id="abc")
    assert (
        made["source"] == "def f(): pass"
        and made["metadata"]["tags"] == ["exported"]
        and label["source"].startswith("(cell-abc)=\n")
    )
    assert cells("#| eval: false\nf()")[0]["source"] == "f()"
    assert cells("#| output: false\nf()", shown(text_plain="1"))[0]["outputs"] == []


def test_echo_false_leaves_the_output_alone():
    made, = cells("#| echo: false\nf()", shown(text_html="<b>1</b>"))
    assert made["metadata"]["tags"] == ["remove-input"] and made["outputs"]
    assert cells("#| echo: false\nf()") == []
    made, = cells("#| echo: false\nf()", shown(text_markdown="| a |", text_plain="Markdown"))
    assert made["cell_type"] == "markdown" and made["source"].splitlines() == [
        ":::::{container} printed", "", "| a |", ":::::"]


def test_a_live_widget_leaves_its_picture_and_the_picture_gets_words():
    view = "application/vnd.jupyter.widget-view+json"
    both, alone = shown(image_png="00", text_plain="A token hears\nitself."), shown()
    both["data"][view] = alone["data"][view] = {"model_id": "x"}
    made, = cells("explore()", both, alone)
    assert [list(o["data"]) for o in made["outputs"]] == [["image/png", "text/plain"]]
    assert made["metadata"]["mystnb"]["image"]["alt"] == "A token hears itself."
    assert cells("plot()", shown(image_png="00", text_plain="<Figure>"))[0]["metadata"]["mystnb"]["image"][
        "alt"
    ] == website.alternative(both | {"data": {}})


def test_links_stay_on_the_site_or_go_to_github(folder, tmp_path):
    path = folder("models/mixers", "# A")
    (tmp_path / "CONTRIBUTING.md").touch()
    badge = "[![Open in Colab](https://example.org/badge.svg)](https://example.org/a)"
    text = f"[a](mixers.ipynb#x) [b](../../CONTRIBUTING.md) `[c](gone.md)` {badge}"
    assert (
        website.relinked(text, path)
        == f"[a](mixers.ipynb#x) [b]({website.GITHUB}/CONTRIBUTING.md) `[c](gone.md)` [Open in "
           f"Colab](https://example.org/a)"
    )
    assert website.relinked(f"{badge} {badge} [c](https://c.org)", path) == (
        "[Open in Colab](https://example.org/a) · [Open in Colab](https://example.org/a) [c](https://c.org)")
    with pytest.raises(website.SiteError,
                       match=r"nbs/models/mixers.ipynb points to gone.ipynb, but there is no nbs/models/gone.ipynb"):
        website.relinked("[a](gone.ipynb)", path)


# --- reading order ---

def test_minutes_count_what_is_read(folder):
    path = folder("core/basics", "# 00 · Core: how do we look?\n\n" + "word " * 394,
                  code("#| export\n\n" + "x = 1\n" * 20), code("#| hide\n" + "x\n" * 999))
    lesson = website.Lesson(path)
    assert (lesson.words, lesson.lines, lesson.reading_time) == (400, 20, 3)
    assert lesson.short == "00 · Core"
    with pytest.raises(website.SiteError, match="nbs/core/b.ipynb has no title"):
        website.Lesson(folder("core/b", "text"))


def test_a_chapter_appears_with_what_it_needs(folder):
    folder("index", "# I")
    folder("tutorials/five_minutes", "# Five minutes")
    folder("core/basics", "# Core: a?", code("#| default_exp core.basics"),
           code("from metaformer_edu.models.mixers import shown_in_an_example"))  # of later: nothing to read before
    folder("models/layers", "# Layers: b?", code("#| default_exp models.layers"),
           code("from metaformer_edu.core.basics import x"))
    folder("models/mixers", "# Mixers: c?", code("#| default_exp models.mixers"),
           code("from metaformer_edu.models.layers import y"))
    folder("tutorials/new", "# Something new", code("import metaformer_edu.models.mixers"))
    folder("tutorials/.ipynb_checkpoints/old", "# Old")
    (website.NBS / "course.yml").write_text(re.sub("- part: tutorials/..pynb.*\n.*\n", "",
                                                   (website.NBS / "course.yml").read_text()))
    lessons = [website.Lesson(c.path) for c in website.chapters()]
    assert [o.page.removesuffix(".ipynb") for o in lessons] == [
        "tutorials/five_minutes",
        "core/basics",
        "models/layers",
        "models/mixers",
        "tutorials/new",
    ]
    assert [c.number for c in website.chapters()] == ["", "1.1", "2.1", "3.1", ""]
    assert [[p.path.stem for p in website.needs(o, lessons)] for o in lessons] == [
        [],
        [],
        ["basics"],
        ["layers"],
        ["mixers"],
    ]
    page, trees = website.reading_order(), website.toctrees(website.notebooks())
    assert all(f"]({o.page})" in page and o.page.removesuffix(".ipynb") in trees for o in lessons) and "Old" not in page
    assert trees.index("models/mixers") < trees.index("tutorials/new") < trees.index("explorer")


def test_numbers_and_the_way_on_follow_the_course(folder):
    path = folder(
        "core/a",
        "# 9.9 · A: what?",
        "See [lesson 7.7](../models/b.ipynb#x) and [3.3 · Old](../models/b.ipynb).\n\nNext: [gone](gone.ipynb)",
    )
    folder("models/b", "# B: why?", "The end.")
    written = [c["source"] for c in json.loads(course.written(path, course.read(website.NBS)))["cells"]]
    assert "".join(written[0]) == "# 1.1 · A: what?"
    assert (
        "".join(written[1])
        == "See [lesson 2.1](../models/b.ipynb#x) and [2.1 · B](../models/b.ipynb).\n\nNext: [2.1 · B: "
           "why?](../models/b.ipynb)"
    )
    assert course.hours(61) == "1 h 1 min" and course.hours(60) == "1 h" and course.hours(9) == "9 min"


def test_the_way_on_keeps_to_the_quick_path_and_past_the_machine_room(folder):
    for name in "abcd":
        folder(f"core/{name}", f"# {name.upper()}: what?")
    (website.NBS / "course.yml").write_text("""
- part: All
  chapters:
  - {notebook: core/a, minutes: 1, quick: true}
  - {notebook: core/b, minutes: 1}
  - {notebook: core/c, minutes: 1, machine_room: true}
  - {notebook: core/d, minutes: 1, quick: true}
""")
    a, b, c, d = course.read(website.NBS)
    last = "[1.4 · D: what?](d.ipynb)"
    assert course.way_on(a, [b, c, d]) == f"\n\nNext: [1.2 · B: what?](b.ipynb) · On the quick path: {last}"
    assert course.way_on(b, [c, d]) == f"\n\nNext: [1.3 · C: what?](c.ipynb) · Past the machine room: {last}"
    assert course.way_on(c, [d]) == f"\n\nNext: {last}" and course.way_on(d, []) == ""
    assert course.quick_hours([a, b, c, d]).startswith("2 chapters in about 1 hours: 2 min of reading")


# --- the reference ---

SOURCE = '''
__all__ = ['SIZE', 'f', 'g', 'A', 'grow', 'h']

# %% ../nbs/00_x.ipynb #aaa
SIZE = 3 # of what

# %% ../nbs/00_x.ipynb #bbb
def f(x, # what goes in
      a:int=1, b:float=.5, # of the curve
      *, y:dict=None, # | or nothing
     )->tuple: # (mean, variance)
    "Does `x_y` and *that*."

def g(x)->str: # in → out
    "G."
def _private(): "P."
def undocumented(): pass
def h(a, b=2, c=3)->int: # b: the second
    "H."

# %% ../nbs/00_x.ipynb #ccc
@dataclass
class A:
    "An A."
    n:int # how many
    m:int=0
    def one(self)->int: # the first
        "One."
    def bare(self): pass
    @property
    def two(self): "Two."

def grow(self:A, by:int=1): # in steps
    "Grow."
A.grow = grow
'''


def test_comments_beside_parameters_are_read(tmp_path):
    (tmp_path / "x.py").write_text(SOURCE)
    size, f, g, h, a = docments.public(tmp_path / "x.py")
    assert (size.name, size.kind, size.doc, size.value, size.cell) == ("SIZE", "data", "of what", "3", "aaa")
    assert [(p.name, p.type, p.default, p.comment) for p in f.params] == [
        ("x", "", "", "what goes in"),
        ("a", "int", "1", "of the curve"),
        ("b", "float", "0.5", "of the curve"),
        ("y", "dict", "None", "| or nothing"),
    ]
    assert (f.returns.type, f.returns.comment, f.note, f.lines,
            f.cell) == ("tuple", "(mean, variance)", "", (8, 12), "bbb")
    assert (g.note, g.returns.comment, g.params[0].comment) == ("in → out", "", "")  # it may be about either
    assert [p.comment for p in h.params] == ["", "the second", ""] and not h.note
    assert [(p.name, p.comment) for p in a.params] == [("n", "how many"), ("m", "")] and a.cell == "ccc"
    assert [(m.name, m.kind) for m in a.members] == [("one", "method"), ("two", "property"), ("grow", "method")]
    assert a.members[0].returns.comment == "the first" and [(p.name, p.comment) for p in a.members[2].params] == [
        ("by", "in steps")
    ]


def test_the_table_says_what_the_comments_say(tmp_path):
    (tmp_path / "x.py").write_text(SOURCE)
    text = website.entry(docments.public(tmp_path / "x.py")[1], "x")
    assert ":::::{py:function} f(x, a=1, b=0.5, y=None)" in text and r"Does `x_y` and \*that\*." in text
    assert "| `a` | `int` | `1` | of the curve |" in text and "| *returns* | `tuple` |  | (mean, variance) |" in text
    assert r"| `y` | `dict` | `None` | \\| or nothing |" in text and "/x.py#L8-L12)" in text and "(#cell-bbb)" in text


def test_comments_are_what_fastcore_reads():
    "Of definitions with a parameter a line: what stands on one line is read by people, and by fastcore as of the last."
    from fastcore.docments import docments as read
    seen = 0
    for path in website.notebooks():
        module = website.module_of(path)
        lines = module.read_text(encoding="utf-8").splitlines() if module else []
        for item in docments.public(module) if module else []:
            if item.kind != "function" or item.note:
                continue
            source = "\n".join(lines[item.lines[0] - 1:item.lines[1]])
            theirs = read(source, returns=False, args_kwargs=True)
            ours = {p.name.strip("*"): p.comment or None for p in item.params}
            seen += len(ours)
            differ = {n: (ours[n], theirs[n])
                      for n in ours if theirs.get(n) and theirs[n] != ours[n] and n + ": " not in theirs[n]}
            assert not differ, f"{module.name}, {item.name}: {differ}"
    assert seen > 300


# --- links ---

def test_broken_links_and_other_hosts_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.html").write_text('<p id="here">x</p><a href="../a.html">a</a>')
    (tmp_path / "s.css").write_text(
        '@import "https://a.org/x.css"; p { background: url(data:x), url("s.png"); src: url(//a.org/f.woff) }'
    )
    good = ('<a href="sub/b.html#here"></a><a href="#top" id="top"></a><a href="https://a.org/x"></a><a '
            'href="mailto:a@b.org"></a><img src="data:x">')
    bad = ['<a href="gone.html"></a>', '<a href="sub/b.html#gone"></a>', '<a href="../up.html"></a>',
           '<a href="https://a b/"></a>', '<a href="ftp:x"></a>',
           '<img src="https://a.org/x.svg">', '<script src="//a.org/x.js"></script>',
           '<p style="background: url(https://a.org/y)"></p>']
    (tmp_path / "a.html").write_text(good)
    assert website.check_links(tmp_path) == ["s.css asks another host for //a.org/f.woff.",
                                             "s.css asks another host for https://a.org/x.css."]
    (tmp_path / "s.css").unlink()
    for one in bad:
        (tmp_path / "a.html").write_text(good + one)
        assert len(website.check_links(tmp_path)) == 1, one


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(website.SiteError, match="choose an empty folder"):
        website.build(tmp_path)
    assert (tmp_path / "mine.txt").exists()


# --- all of it ---

CHINESE, FALLBACK = ["index", "parts/model", "models/mixers"], "models/layers"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, in Chinese only some pages: Sphinx without a warning, and no link that leads nowhere."
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, ROOT / "tools/website.py", "--out", out, "--only", *CHINESE, FALLBACK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def text(page):
    return page.read_text(encoding="utf-8")


def test_every_notebook_is_a_page_without_its_machinery(site):
    for path in website.notebooks():
        html = text(site / path.relative_to(website.NBS).with_suffix(".html"))
        assert "%pip install -q git" not in re.sub("<[^>]+>", "", html), path.name
        assert "#| " not in re.sub("<[^>]+>", "", html), path.name
    assert text(site / "models/layers.html").count('class="formula"') > 5


def test_every_public_name_has_its_entry(site):
    for path in filter(website.module_of, website.notebooks()):
        name, items = website.name_of(path), docments.public(website.module_of(path))
        anchors = website.Links(text(site / f"api/{name}.html")).anchors
        names = [o.name for o in items] + [f"{o.name}.{m.name}" for o in items for m in o.members]
        missing = [n for n in names if f"metaformer_edu.{name}.{n}" not in anchors]
        assert not missing, f"{name}: {missing}"


def test_the_models_are_all_there_also_without_scripts(site):
    from metaformer_edu import list_models
    rows = re.findall(r"<tr.*?</tr>", text(site / "models.html"), re.S)
    assert [name for name in list_models(pretrained=True) if not any(f">{name}<" in o for o in rows)] == []


def test_the_search_leads_to_the_row_of_each_model_and_recipe(site):
    from metaformer_edu import list_models
    from metaformer_edu.training.settings import list_recipes
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", text(site / "searchindex.js"), re.S)[1])
    found = {name: (index["docnames"][page], anchor) for page, _, _, anchor, name in index["objects"][""]}
    for page, names in (("models", list_models(pretrained=True)), ("recipes", list_recipes())):
        anchors = website.Links(text(site / f"{page}.html")).anchors
        assert [n for n in names if n not in found or found[n][0] != page or found[n][1] not in anchors] == []


def test_the_front_page_leads_into_the_quick_path(site):
    html = text(site / "index.html")
    cards = html[html.index('class="cards '):html.index('id="start"')]
    for chapter in website.chapters():
        assert (f'href="{chapter.notebook}.html"' in cards) == chapter.quick
        assert not chapter.quick or f"· {chapter.minutes} min" in cards
    assert 'href="explorer.html"' in cards


def test_the_other_language_is_one_link_away_and_what_is_not_translated_says_so(site):
    for name in [*CHINESE, FALLBACK]:
        english, chinese = text(site / f"{name}.html"), text(site / f"zh/{name}.html")
        up = "../" * name.count("/")
        assert f'href="{up}zh/{name}.html" lang="zh-CN"' in english
        assert f'href="../{up}{name}.html" lang="en"' in chinese
        assert "fallback" not in english and ('class="fallback"' in chinese) == (name == FALLBACK), name
        assert 'lang="zh-CN"' in re.search("<html[^>]*>", chinese)[0]


def test_in_a_browser(site):
    "Opened as files: nothing is asked of others, the table sorts and filters, the explorer draws, the search finds."
    with browser() as chromium:
        page = chromium.new_page()
        said = listen(page)
        address = lambda name: (site / name).as_uri()
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else said.append(r.url))
        for name in ("index.html", "widgets/mixing_explorer.html", "reading_order.html", "api/index.html",
                     "genindex.html"):
            page.goto(address(name))
        page.goto(address("models.html"))
        column = lambda i: page.locator(f"table.sortable tbody tr:visible td:nth-child({i})").all_inner_texts()
        heads = page.locator("table.sortable th button")
        names = column(1)
        for i in range(heads.count()):
            for direction in ("ascending", "descending"):
                heads.nth(i).focus()
                page.keyboard.press("Enter")
                assert page.locator("table.sortable th").nth(i).get_attribute("aria-sort") == direction
                values = [o for o in column(i + 1) if o]
                if i in (1, 5):  # pixels, accuracy
                    assert [float(v) for v in values] == sorted(map(float, values), reverse=direction == "descending")
                if i == 2:
                    assert values[0 if direction == "ascending" else -1].startswith("11.9M")
            assert sorted(column(1)) == sorted(names)
        page.get_by_label("Show only rows with").fill("caformer 384")
        assert 0 < len(column(1)) < 20 and all("caformer" in o and "384" in o for o in column(1))
        assert page.get_by_role("status").inner_text() == f"{len(column(1))} of {len(names)}"
        page.goto(address("explorer.html"))
        answered = "() => window.__page?.list.every((card) => card.logits)"
        page.locator("iframe").element_handle().content_frame().wait_for_function(answered)
        page.get_by_role("link", name="Open it alone").click()
        page.wait_for_function(answered)
        page.goto(address("search.html") + "?q=pooling")
        page.locator("#search-results li a").first.wait_for()
        assert "Pooling" in page.locator("#search-results").inner_text()
        page.goto(address("search.html") + "?q=caformer_s18_train")
        page.locator("#search-results li a").first.click()
        assert page.url.endswith("recipes.html#caformer-s18-train")
        for name in ("index.html", "zh/index.html"):
            for width in (360, 1280):
                page.set_viewport_size({"width": width, "height": 800})
                page.goto(address(name))
                assert page.evaluate("document.documentElement.scrollWidth") == width
        page.get_by_role("link", name="English").click()
        assert page.url == address("index.html")
        page.goto(address("zh/search.html") + "?q=词元混合器")
        page.locator("#search-results li a").first.wait_for()
        assert page.locator("#search-results li a[href^='models/mixers.html']").count()
        assert not said
