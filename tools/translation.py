"""Keeps README.zh-CN.md in step with README.md. Its prose is written by hand. Code, outputs and tables are copied by
`python tools/readme.py`, and each section says which English prose it translates: `<!-- en: NAME · HASH -->`
under its heading."""
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
STAMP = re.compile(r"<!-- en: (?P<name>.+) · (?P<hash>\w+) -->")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"(`+)(?:(?!\1).)+?\1")
NUMBER = re.compile(r"\d[\d,.]*\d|\d")
CHINESE_LETTER = re.compile(r"[\u4e00-\u9fff]")
COPIED = {"code", "output", "html"}  # the same in both; of a table all but its head and the words of its links
TO_DO = "untranslated"


@dataclass
class Block:
    "A paragraph, list item, picture, fenced code, output, table or piece of HTML."
    kind: str
    text: str


@dataclass
class Section:
    "A heading with what follows it, up to the next heading."
    heading: str
    name: str = ""  # its English heading
    stamp: str = ""
    blocks: list = field(default_factory=list)

    @property
    def title(self):
        return self.heading.lstrip("# ")

    @property
    def kinds(self):
        return [b.kind for b in self.blocks]

    @property
    def prose(self):
        return [b.text for b in self.blocks if b.kind in ("text", "item", "picture")]

    @property
    def hash(self):
        return hashlib.sha1("\n".join(self.prose).encode()).hexdigest()[:8]


def kind_of(line):
    for start, kind in (("    ", "output"), ("|", "table"), ("<", "html"), ("- ", "item"), ("![", "picture")):
        if line.startswith(start):
            return kind
    return "text"


def read(text):
    "The sections of a README."
    sections, fence, gap = [], None, True
    for line in text.splitlines():
        if fence:
            sections[-1].blocks[-1].text += "\n" + line
            fence = None if line.strip() == fence else fence
        elif match := FENCE.match(line):
            fence, gap = match[1], True
            sections[-1].blocks.append(Block("code", line))
        elif line.startswith("#"):
            sections.append(Section(line, line.lstrip("# ")))
        elif match := STAMP.fullmatch(line):
            sections[-1].name, sections[-1].stamp = match["name"], match["hash"]
        elif line.startswith("<!--"):
            continue
        elif not line.strip():
            gap = True
        else:
            kind, blocks = kind_of(line), sections[-1].blocks
            if (
                not gap
                and kind == blocks[-1].kind
                and kind != "item"
                or not gap
                and blocks[-1].kind in ("text", "item")
                and kind == "text"
            ):
                blocks[-1].text += "\n" + line
            else:
                blocks.append(Block(kind, line))
            gap = False
    return sections


def write(sections, header):
    "The text of README.zh-CN.md."
    parts = [header]
    for s in sections:
        parts += [s.heading, f"<!-- en: {s.name} · {s.stamp or TO_DO} -->"]
        for before, block in zip([None, *s.blocks], s.blocks):
            if before and before.kind == block.kind == "item":
                parts[-1] += "\n" + block.text
            else:
                parts.append(block.text)
    return "\n\n".join(parts) + "\n"


def rows(table):
    return table.splitlines()[2:]


def table_like(english, chinese):
    "The English table with the head of the Chinese one, and its words for rows that lead to the same places."
    known = {tuple(LINK.findall(row)): row for row in rows(chinese) if LINK.search(row)}
    head = chinese.splitlines()[:1] + english.splitlines()[1:2]
    return "\n".join(head + [known.get(tuple(LINK.findall(row)), row) for row in rows(english)])


def refresh(english, chinese):
    "The Chinese sections with what is copied made new; a section that is missing is put in as it is in English."
    found = {s.name: s for s in chinese}
    for before, section in zip([None, *english], english):
        if section.name not in found:
            blocks = [Block(b.kind, b.text) for b in section.blocks]
            found[section.name] = Section(section.heading, section.name, TO_DO, blocks)
            at = 1 + [s.name for s in chinese].index(before.name) if before else 0
            chinese.insert(at, found[section.name])
        mine = found[section.name]
        if mine.kinds != section.kinds:
            continue
        for own, block in zip(mine.blocks, section.blocks):
            if block.kind in COPIED:
                own.text = block.text
            elif block.kind == "table":
                own.text = table_like(block.text, own.text)
    return chinese


def stamp(english, chinese):
    "Say of each section that its Chinese prose is that of the English prose as it is now."
    hashes = {s.name: s.hash for s in english}
    for section in chinese:
        section.stamp = hashes.get(section.name, section.stamp)
    return chinese


def targets(texts):
    "Where links and pictures lead; the two READMEs lead to each other."
    found = Counter(t for text in texts for t in LINK.findall(CODE.sub("", text)))
    a, b = ENGLISH.name, CHINESE.name
    found[a], found[b] = found[a] + found[b], 0
    return +found


def spans(texts):
    return Counter(m[0] for text in texts for m in CODE.finditer(text))


def numbers(texts):
    return {n for text in texts for n in NUMBER.findall(LINK.sub("", CODE.sub("", text)))}


def counted(kinds):
    words = {"text": "paragraph", "item": "list item", "code": "code block"}
    return ", ".join(f"{n} {words.get(k, k)}{'s' * (n > 1)}" for k, n in Counter(kinds).items()) or "nothing"


def in_section(english, chinese):
    "What is wrong with the Chinese of one section, in sentences."
    here = f"{CHINESE.name}, section {chinese.title!r} (in English {english.name!r})"
    if chinese.kinds != english.kinds:
        return [
            f"{here} has {counted(chinese.kinds)}; {ENGLISH.name} has {counted(english.kinds)}, in this order: "
            f"{', '.join(english.kinds)}."
        ]
    found = []
    if chinese.heading.count("#") != english.heading.count("#"):
        found.append(f"{here}: its heading is of another level.")
    for own, block in zip(chinese.blocks, english.blocks):
        if (
            block.kind in COPIED
            and own.text != block.text
            or block.kind == "table"
            and own.text != table_like(block.text, own.text)
        ):
            found.append(
                f"{here}: the {block.kind} that begins with {block.text.splitlines()[0][:60]!r} is not that of "
                f"{ENGLISH.name}: run python tools/readme.py."
            )
    for what, of in (("links or pictures", targets), ("code in a sentence", spans)):
        a, b = of(english.prose), of(chinese.prose)
        if a != b:
            found.append(
                f"{here}: other {what} than in English: missing {sorted((a - b).elements())}, too many "
                f"{sorted((b - a).elements())}."
            )
    if lost := numbers(english.prose) - numbers(chinese.prose):
        found.append(f"{here}: numbers that are in English and not here: {sorted(lost)}.")
    if chinese.stamp != english.hash:
        todo = (
            "is still to be translated"
            if chinese.stamp == TO_DO
            else "has changed in English since it was translated (git diff README.md)"
        )
        found.append(f"{here} {todo}: write its Chinese, then run python tools/readme.py --translated.")
    if any(not CHINESE_LETTER.search(text) for text in (b.text for b in chinese.blocks if b.kind in ("text", "item"))):
        found.append(f"{here}: a paragraph has no Chinese in it.")
    return found


def problems(english, chinese):
    "What is wrong with README.zh-CN.md, in sentences; texts of both."
    english, chinese = read(english), read(chinese)
    theirs, ours = [s.name for s in english], [s.name for s in chinese]
    found = [
        f"{CHINESE.name} lacks the section {s.name!r} ({counted(s.kinds)}), after "
        f"{b.name if b else 'its beginning'!r}: run python tools/readme.py."
        for b, s in zip([None, *english], english)
        if s.name not in ours
    ]
    found += [f"{CHINESE.name} has the section {s.title!r}, of which {ENGLISH.name} has no {s.name!r} any more."
              for s in chinese if s.name not in theirs]
    if not found and ours != theirs:
        found.append(f"{CHINESE.name} has its sections in another order than {ENGLISH.name}: {', '.join(theirs)}.")
    known = {s.name: s for s in chinese}
    return found + [sentence for s in english if s.name in known for sentence in in_section(s, known[s.name])]


def untranslated(chinese):
    "Rows of tables with links whose words are still English."
    return [row for s in chinese for b in s.blocks if b.kind == "table" for row in rows(b.text)
            if LINK.search(row) and not CHINESE_LETTER.search(row)]
