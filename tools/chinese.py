"""Keeps the site's Chinese, docs/locale/zh_CN/LC_MESSAGES/*.po, in step with its English: `python tools/chinese.py`
brings the files up to date and leaves empty, or marks as fuzzy, what is to be translated; `--check` only says what is.

The front page and those that it leads to, the pages with which parts open and the quick path have such a file; what
has none stays in English."""
import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

import course
import translation
import website

LOCALE = website.DOCS / "locale/zh_CN/LC_MESSAGES"
HEADER = b'''msgid ""
msgstr ""
"Language: zh_CN\\n"
"Content-Type: text/plain; charset=UTF-8\\n"

'''
NUMBERED = re.compile(r"(\d+\.\d+ · )?(.*)", re.S)  # a chapter's title
LINK = re.compile(rf"(?P<before>\[[^\]\d]*){course.NUMBER}(?P<after>[^\]]*\]\((?P<path>[^)\s#]+\.ipynb)[^)]*\))")
MARKDOWN = MarkdownIt("commonmark").use(dollarmath_plugin)


def pages():
    "What is to be Chinese: name on the site -> its source."
    sources = [website.NBS / "index.ipynb", *(website.NBS / f"{name}.md" for name in website.OWN),
               *(p.page for p in course.parts(website.NBS)),
               *(c.path for c in website.chapters() if c.quick)]
    return {p.relative_to(website.NBS).with_suffix("").as_posix(): p for p in sources}


def templates(wanted):
    "Name of a page -> its messages, as Sphinx finds them in the pages of the site."
    from sphinx.cmd.build import main as sphinx
    with tempfile.TemporaryDirectory() as folder:
        website.write_pages(Path(folder) / "pages", wanted.values())
        options = ["-Q", "-b", "gettext", "-D", "without_alt=1", "-c", str(website.DOCS)]
        if sphinx([*options, f"{folder}/pages", f"{folder}/pot"]):
            raise website.SiteError("Sphinx finds no messages in the pages: build the site to see why.")
        found = {name: read_po(open(f"{folder}/pot/{name}.pot", "rb")) for name in wanted}
    for catalog in found.values():
        catalog.msgids = [m.id for m in catalog if m.id]
    return found


def read(path):
    "The file at `path`; an empty one if there is none."
    return read_po(open(path, "rb"), locale="zh_CN") if path.exists() else Catalog(locale="zh_CN")


def wordless(text):
    "Is there nothing to translate: only code, formulas, numbers, and names such as ConvFormer or metaformer_edu?"
    said = "".join(o.content for o in tokens(text) if o.type in ("text", "image"))
    return not re.search(r"[A-Za-z]{2,}", re.sub(r"\w*(?:[a-z][A-Z]|[A-Z]{2}[a-z]|_)\w*", "", said))


def tokens(text):
    "The inline tokens of a message."
    return [o for block in MARKDOWN.parse(text) for o in block.children or []]


def kept(text):
    "What a translation has to keep: links, pictures, code and formulas."
    return sorted((o.type, str(o.attrs.get("href") or o.attrs.get("src") or o.content)) for o in tokens(text)
                  if o.type in ("link_open", "image", "code_inline", "math_inline"))


def renumbered(text, folder, chapters):
    "Chinese with the numbers in its links to chapters made right."
    numbers = {c.path: c.number for c in chapters if c.number}

    def one(match):
        number = numbers.get(Path(os.path.normpath(folder / match["path"])))
        return f"{match['before']}{number}{match['after']}" if number else match[0]

    return LINK.sub(one, text)


def updated(catalog, template, source, chapters):
    "The catalog with the messages of the template; numbers of chapters follow the course by themselves."
    new = Catalog(locale="zh_CN", fuzzy=False)
    for message in catalog:
        if message.id:
            one = course.renumbered(message.id, source.parent, chapters)
            new.add(one, renumbered(message.string, source.parent, chapters), flags=message.flags)
    plain = {NUMBERED.fullmatch(m.id)[2]: m for m in new if m.id}
    for text in template.msgids:
        number, rest = NUMBERED.fullmatch(text).groups()
        if number and text not in new and rest in plain:
            new.add(text, number + NUMBERED.fullmatch(plain[rest].string)[2], flags=plain[rest].flags)
    new.update(template)
    new.obsolete.clear()
    for message in new:
        if message.id and not message.string and wordless(message.id):
            message.string = message.id
    return new


def write(catalog, path):
    "Without dates and places, which would only make diffs."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(HEADER)
        write_po(file, catalog, width=0, omit_header=True)


def in_page(name, catalog, msgids):
    "What is wrong with the Chinese of a page, in sentences."
    found, short = [], lambda text: repr(text[:60] + "…" * (len(text) > 60))
    has = {m.id: m for m in catalog if m.id}
    found += [f"{name}: {short(o)} is new." for o in msgids if o not in has]
    found += [f"{name}: {short(o)} is no longer on the page." for o in has if o not in msgids]
    for text, message in has.items():
        said = message.string
        if not said or message.fuzzy:
            found.append(f"{name}: {short(text)} is still to be translated" + " anew" * message.fuzzy + ".")
        elif kept(text) != kept(said):
            found.append(f"{name}: {short(text)} has other links, pictures, code or formulas in Chinese: "
                         f"{sorted(set(kept(text)) ^ set(kept(said)))}.")
        elif lost := translation.numbers([text]) - translation.numbers([said]):
            found.append(f"{name}: {short(text)} has numbers that are not in the Chinese: {sorted(lost)}.")
        elif stray := [o.content for o in tokens(said) if o.type == "text" and re.search(r"[*`$]", o.content)]:
            found.append(f"{name}: {short(text)} has marks in its Chinese that mark nothing: {stray}.")
        elif not wordless(text) and not translation.CHINESE_LETTER.search(said):
            found.append(f"{name}: {short(text)} has no Chinese in it.")
    return found


def problems(wanted):
    "What is wrong with the Chinese of pages, in sentences."
    found = [f"docs/locale has {p.relative_to(LOCALE)}, of which the course has no page."
             for p in sorted(LOCALE.rglob("*.po")) if p.stem != "sphinx"
             and p.relative_to(LOCALE).with_suffix("").as_posix() not in pages()]
    wanted = {name: o for name, o in wanted.items() if (LOCALE / f"{name}.po").exists()}
    for name, template in templates(wanted).items():
        found += in_page(name, read(LOCALE / f"{name}.po"), template.msgids)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is stale")
    parser.add_argument("--begin", nargs="+", metavar="PAGE", default=[], choices=pages(),
                        help="make files for these pages, such as models/mixers, which have none")
    args = parser.parse_args()
    wanted = {name: o for name, o in pages().items() if name in args.begin or (LOCALE / f"{name}.po").exists()}
    if not args.check:
        for name, template in templates(wanted).items():
            path = LOCALE / f"{name}.po"
            write(updated(read(path), template, wanted[name], website.chapters()), path)
    found = problems(wanted)
    print(*found, sep="\n", end="\n" if found else "")
    if args.check and found:
        sys.exit("Run python tools/chinese.py, and translate what it leaves empty or fuzzy.")


if __name__ == "__main__":
    main()
