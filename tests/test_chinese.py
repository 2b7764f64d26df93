"""The site's Chinese: nothing stale on the pages that have it, and the tool notices what is, on a small page."""
import pytest
from babel.messages.catalog import Catalog

import chinese
import website

STAYS_ENGLISH = set()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")


def test_the_pages_that_have_chinese_are_whole_and_of_the_english_as_it_is():
    missing = {name for name in chinese.pages() if not (chinese.LOCALE / f"{name}.po").exists()}
    assert missing == STAYS_ENGLISH
    found = chinese.problems(chinese.pages())
    assert not found, "\n".join(found)


ONE, TWO = "See [1.2 · A](../models/a.ipynb) and `f(x)`, 3 times.", "1.4 · Mixers: how do they talk?"


def catalog(**texts):
    made = Catalog(locale="zh_CN")
    for english, said in texts.items():
        made.add(english, said)
    return made


@pytest.mark.parametrize("said, says", [
    ("见 [1.2 · A](../models/a.ipynb) 和 `f(x)`，3 次。", None),
    ("", "is still to be translated"),
    ("见 [1.2 · A](../models/b.ipynb) 和 `f(x)`，3 次。", "has other links, pictures, code or formulas"),
    ("见 [1.2 · A](../models/a.ipynb) 和 `f(y)`，3 次。", "has other links, pictures, code or formulas"),
    ("见 [1.2 · A](../models/a.ipynb) 和 `f(x)`，三次。", "has numbers that are not in the Chinese: ['3']"),
    ("**见。**[1.2 · A](../models/a.ipynb) 和 `f(x)`，3 次。**", "has marks in its Chinese that mark nothing"),
    ("See [1.2 · A](../models/a.ipynb) and `f(x)`, 3 times!", "has no Chinese in it"),
], ids=["whole", "empty", "link", "code", "number", "mark", "English"])
def test_what_is_wrong_with_a_text_is_said(said, says):
    found = chinese.in_page("a", catalog(**{ONE: said}), [ONE])
    assert [says in o for o in found] == ([True] if says else [])


def test_new_and_gone_texts_are_said():
    found = chinese.in_page("a", catalog(**{"Old one": "旧的", ONE: ""}), [ONE, TWO])
    assert found[:2] == [f"a: {TWO!r} is new.", "a: 'Old one' is no longer on the page."]


def test_numbers_of_chapters_follow_the_course_and_a_changed_sentence_is_fuzzy():
    chapter = type("Chapter", (), {"path": website.NBS / "models/a.ipynb", "number": "5.6", "short": "5.6 · A"})
    old = catalog(**{ONE: "见[第 1.2 课](../models/a.ipynb)和 `f(x)`，3 次。", TWO: "1.4 · 混合器：它们怎样交谈？",
                     "A sentence of some length.": "一句有些长的话。"})
    template = catalog(**{ONE.replace("1.2", "5.6"): "", TWO.replace("1.4", "2.1"): "",
                          "A sentence of some great length.": "", "`code` 12": ""})
    template.msgids = [m.id for m in template if m.id]
    new = {m.id: m for m in chinese.updated(old, template, website.NBS / "core/b.ipynb", [chapter]) if m.id}
    assert list(new) == template.msgids
    assert new[template.msgids[0]].string == "见[第 5.6 课](../models/a.ipynb)和 `f(x)`，3 次。"
    assert new[template.msgids[1]].string == "2.1 · 混合器：它们怎样交谈？"
    assert new["A sentence of some great length."].fuzzy and new["`code` 12"].string == "`code` 12"
    assert not any(m.fuzzy for m in new.values() if m.id != "A sentence of some great length.")
