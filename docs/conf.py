"""Sphinx reads this when `python tools/website.py` calls it on the pages that it made from the notebooks."""
import configparser
import functools
import html
import pathlib
import re

from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import text_to_path
from sphinx import addnodes
from sphinx.search.en import SearchEnglish
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode

settings = configparser.ConfigParser()
settings.read(pathlib.Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
extensions = ["myst_nb"]
html_theme, html_title = "furo", project
html_static_path, html_css_files, html_js_files = ["_static"], ["site.css"], ["site.js"]
templates_path = ["_templates"]
locale_dirs, gettext_compact, gettext_location = ["locale"], False, False  # website.py copies docs/locale to the pages
html_favicon = "_static/icon.svg"
html_copy_source = html_show_copyright = smartquotes = False
html_theme_options = {"footer_icons": [], "source_repository": ""}
pygments_dark_style = "github-dark"
python_maximum_signature_line_length = 88
add_module_names = False
modindex_common_prefix = [f"{settings['lib_name']}."]

nb_execution_mode = "off"      # the notebooks store their outputs
nb_ipywidgets_js = {}          # no widget is alive here, and its scripts would come from another host
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
myst_update_mathjax = False
html_math_renderer = "drawn"   # when the site is made: pages need no script and no fonts for it

log = logging.getLogger(__name__)

TEX = [  # what lessons write, and Matplotlib's TeX says otherwise
    (r"\\[bB]igg?l?(?=\s*[(\[])", r"\\left"),
    (r"\\[bB]igg?r?(?=\s*[)\]])", r"\\right"),
    (r"\\tfrac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
    (r"\\tfrac", r"\\frac"),
    (r"\\underbrace\{([^{}]*)\}_\{?([^{}]*)\}?", r"\\underset{\2}{\1}"),
    (r"\\math(\w\w)\s+(\w)", r"\\math\1{\2}"),
    (r"\s+", " "),
]
FONT = FontProperties(size=100, math_fontfamily="cm")


@functools.cache
def drawn(tex, block):
    "A formula as SVG, in the colour and size of the text around it; ValueError for TeX that Matplotlib does not know."
    said = re.sub(r"\\frac", r"\\dfrac", tex) if block else tex
    for old, new in TEX:
        said = re.sub(old, new, said)
    said = f"${said.strip()}$"
    width, height, below = text_to_path.get_text_width_height_descent(said, FONT, ismath=True)
    steps = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}  # Matplotlib's codes of a path
    path = Path(*text_to_path.get_text_path(FONT, said, ismath=True))
    d = ""
    for points, code in path.iter_segments(simplify=False):
        numbers = points if code < 79 else []
        d += steps[code] + " ".join(f"{-v if i % 2 else v:.4g}" for i, v in enumerate(numbers))  # y goes down in SVG
    size = f"width:{width / 100:.3f}em;height:{height / 100:.3f}em;vertical-align:{-below / 100:.3f}em"
    box = f"0 {below - height:.1f} {width:.1f} {height:.1f}"
    return (f'<svg class="formula" role="img" aria-label="{html.escape(tex)}" viewBox="{box}" style="{size}">'
            f'<path d="{d}"/></svg>')


def formula(block):
    def visit(self, node):
        try:
            svg = drawn(node.astext(), block)
        except ValueError as error:
            why = str(error).splitlines()[-1]
            log.warning("A formula that Matplotlib cannot draw: %s (%s)", node.astext(), why, location=node)
        else:
            self.body.append(f'<div class="math">{svg}</div>' if block else svg)
        raise nodes.SkipNode
    return visit, None


class LinkNames(SphinxPostTransform):
    """A public name in code type leads to its entry in the reference; an everyday word only where its own module is
    the subject."""
    default_priority = 5
    NAME = re.compile(r"([A-Za-z]\w*(?:\.[a-z]\w*)?)(?:\(.*\))?")

    def subject(self, modules):
        "The module that this page is about: 'api/models.mixers' and 'models/mixers' are about models.mixers."
        name = self.env.docname.removeprefix("api/").replace("/", ".")
        found = [f"{settings['lib_name']}.{o}" for o in (name, name.removeprefix("commands."))]
        return next((o for o in found if o in modules), None)

    def run(self, **kwargs):
        here, domain = self.env.docname, self.env.domaindata["py"]
        module, known = self.subject(domain["modules"]), {}
        for name, entry in domain["objects"].items():
            if entry.objtype in ("class", "function", "method", "data"):
                owner = max((o for o in domain["modules"] if name.startswith(o + ".")), key=len)
                known.setdefault(name[len(owner) + 1:], []).append((owner, name, entry))
        for literal in list(self.document.findall(nodes.literal)):
            found = self.NAME.fullmatch(literal.astext())
            if not found or isinstance(literal.parent, (nodes.reference, nodes.title)) or literal.get("classes"):
                continue
            choice = known.get(found[1], [])
            own = [o for o in choice if o[0] == module]
            telling = "_" in found[1] or re.search("[a-z][A-Z]", found[1]) or "." in found[1]
            if own or (len(choice) == 1 and telling):
                _, name, entry = (own or choice)[0]
                if entry.docname != here:
                    link = make_refnode(self.app.builder, here, entry.docname, entry.node_id, literal.deepcopy(), name)
                    literal.replace_self(link)


class Row(SphinxRole):
    "A name in a table that the search leads to: {published-model}`caformer_s18`."
    KINDS = {"published-model": "published model", "published-recipe": "published recipe"}

    def run(self):
        node = nodes.literal(self.text, self.text, ids=[nodes.make_id(self.text)])
        self.env.domains.standard_domain.note_object(self.name, self.text, node["ids"][0], location=node)
        return [node], []


class Chinese(SearchEnglish):
    "Words as in English, and Chinese by every two characters that stand side by side, as it has no spaces."
    lang = "zh"  # language_name stays English: it names the stemmer
    HAN = "[\u4e00-\u9fff]"
    js_splitter_code = """
var splitQuery = (query) => (query.match(/[\u4e00-\u9fff]+|[[\\p{Letter}\\p{Number}_]--[\u4e00-\u9fff]]+/gv) ?? [])
  .flatMap((o) => /^[\u4e00-\u9fff]{3,}$/.test(o) ? [...o].slice(1).map((c, i) => o[i] + c) : [o]);
"""

    def split(self, text):
        runs = [run for word in super().split(text) for run in re.findall(f"{self.HAN}+|[^\u4e00-\u9fff]+", word)]
        return [o for run in runs
                for o in ([run[i:i + 2] for i in range(max(1, len(run) - 1))] if re.match(self.HAN, run) else [run])]


class Fixed(SphinxTransform):
    """What website.py writes of itself (containers of these classes) is no text to translate: its few words are here,
    and titles in it come from the pages that it leads to. Nor is what a cell printed."""
    default_priority = 15  # before Sphinx looks for translations
    CLASSES = {"about-lesson", "exported", "cards", "made", "printed"}
    WORDS = [(r"About (\d+) minutes", r"约 \1 分钟"), ("machine room: a learner may skip it", "机房：学习时可以跳过"),
             ("run it in Colab", "在 Colab 中运行"), ("what it exports", "它导出的内容"), ("notebook", "笔记本"),
             ("in the package", "在包中"),
             ("Next: ", "下一章："), ("On the quick path: ", "快速路线的下一章："),
             ("Past the machine room: ", "跳过机房："),
             (r"(\d+) chapters in about (\d+) hours: ", r"共 \1 章，约 \2 小时："),
             (" of reading, counted in words and lines of code, and ", "的阅读，按词数和代码行数计，外加 "),
             (r"(\d+) exercises at (\d+) minutes each, which is a guess\.", r"\1 道练习，估计每道 \2 分钟。"),
             ("Reading: ", "阅读：约 "), (r", or (.*) without the machine room \(⚙\)", r"；跳过机房（⚙）约 \1"),
             (r"\.? ?★: on the quick path\.", "。★：在快速路线上。"), (r"(\d+) h(?![a-z])", r"\1 小时"),
             (r"(\d+) min(?![a-z])", r"\1 分钟"), (r"(小时|分钟)\.$", r"\1。"),
             (r"^(chapter|read)$", "章"), ("^minutes$", "分钟"), ("^needs$", "需要"), ("^nothing$", "无"),
             ("^model$", "模型"), ("^pixels$", "像素"), ("^parameters$", "参数"),
             ("^weights trained on$", "权重训练于"),
             ("^recipe$", "配方"), ("^epochs$", "轮数"), ("^optimizer$", "优化器"), ("^rate$", "学习率"),
             ("^images a step$", "每步图像数")]

    def apply(self, **kwargs):
        for box in self.document.findall(nodes.container):
            if not self.CLASSES & set(box["classes"]):
                continue
            for node in box.findall(lambda o: isinstance(o, nodes.TextElement) and not isinstance(o, nodes.Inline)):
                node["translatable"] = False
            if self.config.language == "zh_CN" and "printed" not in box["classes"]:
                for text in list(box.findall(nodes.Text)):
                    if not isinstance(text.parent, nodes.literal):
                        said = text.astext()
                        for english, chinese in self.WORDS:
                            said = re.sub(english, chinese, said)
                        text.parent.replace(text, nodes.Text(said))
        for node in self.document.findall(nodes.math_block):
            node["translatable"] = False
        for image in self.document.findall(nodes.image):  # its words are in the paragraph that holds it, or printed
            image["said"] = image.attributes.pop("alt", "")


class Spoken(SphinxTransform):
    "After Sphinx has translated and before it counts: pictures get their words back; what is no text does not count."
    default_priority = 24

    def apply(self, **kwargs):
        for tree in self.document.findall(addnodes.toctree):
            tree.attributes.pop("translated", None)
        for image in self.document.findall(nodes.image):
            image.attributes.pop("translated", None)
            said = image.attributes.pop("said", "")
            if said and not self.config.without_alt:
                image["alt"] = said


def languages(app, pagename, templatename, context, doctree):
    "For the template: this page in the other language, and how many of its texts are not translated (-1: all)."
    context["chinese"] = app.config.language == "zh_CN"
    there = "../" if context["chinese"] else "zh/"
    context["other_language"] = f"{context['content_root']}{there}{pagename}.html".removeprefix("./")
    done = doctree.get("translation_progress", {}) if doctree else {}
    context["untranslated"] = done["total"] - done["translated"] if done.get("translated") else -1


def setup(app):
    app.add_html_math_renderer("drawn", formula(False), formula(True))
    app.add_post_transform(LinkNames)
    app.add_transform(Fixed)
    app.add_transform(Spoken)
    app.add_config_value("without_alt", False, "env")  # tools/chinese.py: a paragraph has it already
    app.add_search_language(Chinese)
    for kind, name in Row.KINDS.items():
        app.add_object_type(kind, kind + "-link", objname=name)
        app.add_role(kind, Row())
    app.connect("html-page-context", languages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
