"nbs/glossary.md: terms in order, each with a lesson in which it occurs."
import re
from functools import cache
from pathlib import Path

import course
import nbcells

NBS = Path(__file__).resolve().parent.parent / "nbs"
TEXT = (NBS / "glossary.md").read_text(encoding="utf-8")
ENTRIES = {term: text.strip()
           for term, _, text in (part.partition("\n") for part in re.split(r"^### ", TEXT, flags=re.M)[1:])}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]*)(?:#([^)]*))?\)")
LESSON = re.compile(r" Lesson \[([^\]]+)\]\(([\w/]+\.ipynb)\)\.$")  # an entry ends with it
CHAPTERS = {f"{c.notebook}.ipynb": c for c in course.read(NBS)}
WORDS = 75


def anchor(heading):
    "The anchor that GitHub and MyST give a heading."
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def words_of(lesson):
    return " ".join(cell["source"] for cell in nbcells.read(NBS / lesson)["cells"]).lower()


def test_terms_are_in_alphabetical_order_each_once():
    terms = re.findall(r"^### (.*)$", TEXT, re.M)
    assert len(terms) >= 60
    wrong = [f"{b!r} after {a!r}" for a, b in zip(terms, terms[1:]) if a.lower() >= b.lower()]
    assert not wrong, f"Not in order, or twice: {', '.join(wrong)}."


def test_links_lead_somewhere():
    anchors = {anchor(term) for term in ENTRIES}
    wrong = [f"{term}: {path or '#' + at}" for term, text in ENTRIES.items() for _, path, at in LINK.findall(text)
             if not ((NBS / path).is_file() if path else at in anchors)]
    assert not wrong, f"Links to nowhere: {', '.join(wrong)}."


def test_each_entry_ends_with_its_lesson_which_has_the_words():
    wrong = [term for term, text in ENTRIES.items() if not LESSON.search(text)]
    assert not wrong, f"These do not end with 'Lesson [N.N · Name](part/name.ipynb).': {', '.join(wrong)}."
    for term, text in ENTRIES.items():
        title, lesson = LESSON.search(text).groups()
        if lesson not in CHAPTERS:
            wrong.append(f"{term}: {lesson} is no chapter of nbs/course.yml")
            continue
        if title != CHAPTERS[lesson].short:
            wrong.append(f"{term}: {lesson} is {CHAPTERS[lesson].short!r} and not {title!r}")
        missing = [word for word in re.findall(r"[\w'-]+", term.lower()) if word not in words_of(lesson)]
        if missing:
            wrong.append(f"{term}: {lesson} does not say {', '.join(missing)}")
    assert not wrong, "; ".join(wrong)


def test_entries_are_short():
    lengths = {term: len(LESSON.sub("", text).split()) for term, text in ENTRIES.items()}
    wrong = {term: n for term, n in lengths.items() if not 3 <= n <= WORDS}
    assert not wrong, f"{WORDS} words are the most: {wrong}."
