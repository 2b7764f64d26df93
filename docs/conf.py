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
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

settings = configparser.ConfigParser()
settings.read(pathlib.Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
extensions = ["myst_nb"]
html_theme, html_title = "furo", project
html_static_path, html_css_files, html_js_files = ["_static"], ["site.css"], ["site.js"]
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


def setup(app):
    app.add_html_math_renderer("drawn", formula(False), formula(True))
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
