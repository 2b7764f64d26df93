"""Sphinx reads this when `python tools/website.py` calls it on the pages that it made from the notebooks."""
import configparser
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

settings = configparser.ConfigParser()
settings.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, release = settings["title"], settings["author"], settings["version"]
extensions = ["myst_nb"]
html_theme, html_title = "furo", project
html_static_path, html_css_files, html_js_files = ["_static"], ["site.css"], ["site.js"]
html_favicon = "_static/icon.svg"
html_copy_source = html_show_copyright = smartquotes = False
html_theme_options = {"footer_icons": [], "source_repository": ""}
python_maximum_signature_line_length = 88
add_module_names = False
modindex_common_prefix = [f"{settings['lib_name']}."]

nb_execution_mode = "off"      # the notebooks store their outputs
nb_ipywidgets_js = {}          # no widget is alive here, and its scripts would come from another host
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
myst_update_mathjax = False
html_math_renderer = "mathml"  # browsers draw it themselves

log = logging.getLogger(__name__)
BIG = re.compile(r"\\[bB]igg?[lrm]?\s*(?=[()\[\]|])")


def mathml(block):
    def visit(self, node):
        tex = BIG.sub("", node.astext())
        try:
            markup = tex2mathml(tex, as_block=block)
        except MathError as error:
            log.warning("%s in the formula %s", error, tex, location=node)
        else:
            self.body.append(f'<div class="math">{markup}</div>' if block else markup)
        raise nodes.SkipNode
    return visit, None


class LinkNames(SphinxPostTransform):
    "A public name in code type leads to its entry in the reference; an everyday word only where its own module is the subject."
    default_priority = 5
    NAME = re.compile(r"([A-Za-z]\w*(?:\.[a-z]\w*)?)(?:\(.*\))?")

    def run(self, **kwargs):
        package, here = settings["lib_name"], self.env.docname
        module = f"{package}.{here.split('/')[-1].lstrip('0123456789').lstrip('abcdefghijklmnopqrstuvwxyz' if '_' in here else '').lstrip('_')}"
        known = {}
        for name, entry in self.env.domaindata["py"]["objects"].items():
            if entry.objtype in ("class", "function", "method", "data"):
                owner, _, short = name.removeprefix(package + ".").partition(".")
                known.setdefault(short, []).append((f"{package}.{owner}", name, entry))
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
                    inner = literal.deepcopy()
                    literal.replace_self(make_refnode(self.app.builder, here, entry.docname, entry.node_id, inner, name))


def setup(app):
    app.add_html_math_renderer("mathml", mathml(False), mathml(True))
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
