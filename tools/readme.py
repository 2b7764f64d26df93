"""Makes README.md from nbs/index.ipynb with nbconvert alone, and copies code, outputs and tables into README.zh-CN.md:
`python tools/readme.py`, or `--check` to only compare."""
import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

import nbcells
import translation
from nbcells import directives, split

ROOT = Path(__file__).resolve().parent.parent
HEADER = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, not this file. -->\n\n"
MODELS = """<!-- Made from {name} by tools/readme.py: edit the notebook, not this file. -->

# Models

All published models, counted by [{name}]({name}): parameters and MACs are those of our models for one image of that
size (frozen parameters after the plus); accuracy is top-1 on ImageNet-1K as published by the paper's authors, whose
weights load unchanged. Beside them stand five `tiny_*` variants for laptops and Colab, which are ours.

"""
HEADER_ZH = ("<!-- Prose by hand; code, outputs and tables by tools/readme.py. An `en` line names the English section "
             "and the prose that is translated. -->")
FENCED = re.compile(r"(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$)", re.M | re.S)
INLINE = translation.CODE
# the target of a markdown link or picture, or of an html attribute
TARGET = re.compile(r"""(?P<before>\]\(<?|\b(?:src|href|srcset)\s*=\s*["'])(?P<path>[^)\s"'>]+)""")
ELSEWHERE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|[/#]")


class ReadmeError(Exception):
    "Something in index.ipynb that a README cannot show."


def outside(pattern, text, change):
    "`text` with `change` applied to what the pattern does not match."
    parts, at = [], 0
    for match in pattern.finditer(text):
        parts += [change(text[at:match.start()]), match[0]]
        at = match.end()
    return "".join(parts + [change(text[at:])])


def in_prose(text, change):
    "`text` with `change` applied to what is neither in a fenced block nor code in a sentence."
    return outside(FENCED, text, lambda o: outside(INLINE, o, change))


def from_root(text):
    "`text` with links and pictures relative to nbs/ made relative to the repository root."
    def one(match):
        path = match["path"]
        if path.startswith(("data:image", "attachment:")):
            raise ReadmeError(
                "nbs/index.ipynb embeds a picture: README pictures are files in nbs/images, referenced by name."
            )
        if ELSEWHERE.match(path):
            return match[0]
        moved = posixpath.normpath(posixpath.join("nbs", path))
        if not (ROOT / re.split("[#?]", moved)[0]).exists():
            raise ReadmeError(f"nbs/index.ipynb points to {path}, but there is no {moved}.")
        return match["before"] + moved

    return in_prose(text, lambda o: TARGET.sub(one, o))


def prepare(cell):
    "Strip a code cell's directives and do what they say; None drops the cell."
    found = directives(cell)
    if "hide" in found or found.get("include") == "false":
        return None
    cell.source = "\n".join([o for o in split(cell)[0] if o.lstrip().startswith("%%")] + split(cell)[1]).strip("\n")
    if found.get("output") == "false":
        cell.outputs = []
    if not cell.source and not cell.outputs:
        return None
    if found.get("echo") == "false":
        cell.metadata["transient"] = {"remove_source": True}
    for output in cell.outputs:
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            raise ReadmeError(
                f"A code cell of nbs/index.ipynb outputs a picture (it starts with {cell.source.splitlines()[:1]}): "
                "README pictures are files in nbs/images."
            )
        for kind in ("text/markdown", "text/html"):
            if kind in data:
                data[kind] = from_root(data[kind])
    return cell


def make():
    "The text of README.md."
    if not (ROOT / "nbs/index.ipynb").exists():
        raise ReadmeError("There is no nbs/index.ipynb to make README.md from.")
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean strips it, and the fences want it
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = from_root(cell.source)
        elif cell.cell_type == "code":
            cell = prepare(cell)
        else:
            continue  # raw cells are front matter
        cells += [cell] if cell else []
    nb.cells = cells
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = outside(FENCED, body, lambda text: re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", text))
    return HEADER + body.strip() + "\n"


def models_page():
    "The text of nbs/models/README.md: the table of all models, as a notebook there stores it."
    for path in nbcells.visible(ROOT / "nbs/models", "*.ipynb"):
        for cell in nbcells.read(path)["cells"]:
            for output in cell.get("outputs", []):
                text = "".join(output.get("data", {}).get("text/markdown", ""))
                if text.startswith("| model "):
                    return MODELS.format(name=path.name) + text.strip() + "\n"
    raise ReadmeError("No notebook in nbs/models stores the table of the models.")


def read_chinese():
    "The text of README.zh-CN.md; empty if there is none."
    return translation.CHINESE.read_text(encoding="utf-8") if translation.CHINESE.exists() else ""


def make_chinese(text, translated=False):
    "The text of README.zh-CN.md with what is copied from `text`, of README.md, made new."
    english = translation.read(text)
    chinese = translation.refresh(english, translation.read(read_chinese()))
    return translation.write(translation.stamp(english, chinese) if translated else chinese, HEADER_ZH)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true",
                        help="change nothing; exit 1 if README.md or README.zh-CN.md is stale")
    parser.add_argument("--translated", action="store_true",
                        help="say that the prose of README.zh-CN.md is that of README.md as it is now")
    args = parser.parse_args()
    readme, chinese, table = ROOT / "README.md", translation.CHINESE, ROOT / "nbs/models/README.md"
    try:
        models = models_page()
        if not args.check:
            table.write_text(models, encoding="utf-8")
        text = make()
    except ReadmeError as error:
        sys.exit(str(error))
    if not args.check:
        readme.write_text(text, encoding="utf-8")
        chinese.write_text(make_chinese(text, args.translated), encoding="utf-8")
    elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb makes: run python tools/readme.py.")
    elif table.read_text(encoding="utf-8") != models:
        sys.exit("nbs/models/README.md is not what the notebook stores: run python tools/readme.py.")
    found = translation.problems(text, read_chinese())
    if args.check and found:
        sys.exit("\n".join(found))
    print(*found, sep="\n", end="\n" if found else "")
    for row in translation.untranslated(translation.read(read_chinese())):
        print(f"Still in English in {chinese.name}: {row[:100]}")


if __name__ == "__main__":
    main()
