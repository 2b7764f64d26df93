"""README.zh-CN.md: the same commands, parts, pictures, links and headings as README.md, and prose of the same date."""
import re

import pytest

import translation

ENGLISH, CHINESE = (path.read_text(encoding="utf-8") for path in (translation.ENGLISH, translation.CHINESE))


def fenced(text):
    return re.findall(r"^```.*?^```$", text, re.M | re.S)


def parts(text):
    "Of each part of the package: its name, the code in its line and where it leads."
    lines = re.findall(r"^- \*\*(\w+)\*\*(.*)$", text, re.M)
    return [(name, re.findall(r"`[^`]+`", said), re.findall(r"\]\(([^)]*)\)", said)) for name, said in lines]


def badges(text):
    return re.findall(r"\[!\[[^\]]*\]\(([^)]*)\)\]\(([^)]*)\)", text)


def checked(text):
    "Of each thing that is checked: its numbers, in any order, as a Chinese sentence has another."
    section = re.split(r"^## ", text, flags=re.M)[-2]
    return [sorted(re.findall(r"\d[\w-]*", item)) for item in re.findall(r"^- (.*)$", section, re.M)]


@pytest.mark.parametrize("part, least", [(fenced, 6), (parts, 8), (badges, 3), (checked, 5)],
                         ids=["commands", "parts", "badges", "checked"])
def test_the_same_in_both(part, least):
    assert len(part(ENGLISH)) >= least and part(CHINESE) == part(ENGLISH)


def test_the_same_pictures_and_headings():
    def pictures(text):
        return re.findall(r"^!\[.*\]\((.*)\)$", text, re.M)

    def levels(text):
        return re.findall(r"^(#+) ", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    assert pictures(CHINESE) == pictures(ENGLISH) != [] and levels(CHINESE) == levels(ENGLISH)


def test_each_leads_to_the_other():
    assert "(README.zh-CN.md)" in ENGLISH and "(README.md)" in CHINESE


def test_nothing_is_missing_or_older_than_the_english():
    found = translation.problems(ENGLISH, CHINESE)
    assert not found, "\n".join(found)


# --- the tool notices, on a small pair ---

EN = """# Name

[中文](README.zh-CN.md)

## Start

It trains on 1,797 digits and writes into `runs/`, see [here](here.md):

```bash
train
```

| lesson | run |
|---|---|
| [One](1.md) | [go](go/1) |

| model | top-1 |
|---|---|
| small | 74.6 |

## Cite

The paper.
"""
ZH = """# Name

<!-- en: Name · {} -->

[English](README.md) · 中文

## 开始

<!-- en: Start · {} -->

用 1,797 个数字训练，写入 `runs/`，见[这里](here.md)：

```bash
train
```

| 课程 | 运行 |
|---|---|
| [一](1.md) | [go](go/1) |

| 模型 | top-1 |
|---|---|
| small | 74.6 |

## 引用

<!-- en: Cite · {} -->

论文。
""".format(*(s.hash for s in translation.read(EN)))


def refreshed(english):
    return translation.write(translation.refresh(translation.read(english), translation.read(ZH)), "").lstrip()


def test_a_faithful_pair_has_no_problems_and_stays():
    assert not translation.problems(EN, ZH) and refreshed(EN) == ZH


@pytest.mark.parametrize(
    "old, new, says",
    [
        (
            "## Cite",
            "```bash\nnew\n```\n\n## Cite",
            "section '开始' (in English 'Start') has 1 paragraph, 1 code block, 2 tables; README.md has 1 paragraph, 2 "
            "code blocks",
        ),
        (
            "The paper.",
            "The paper.\n\nAnd more.",
            "section '引用' (in English 'Cite') has 1 paragraph; README.md has 2 paragraphs",
        ),
        (
            "## Cite",
            "## Tutorials\n\nFour stories.\n\n## Cite",
            "lacks the section 'Tutorials' (1 paragraph), after 'Start'",
        ),
        ("1,797", "1,798", "numbers that are in English and not here: ['1,798']"),
        ("It trains", "It is trained", "(in English 'Start') has changed in English since it was translated"),
        (
            "\ntrain\n",
            "\ntrain now\n",
            "the code that begins with '```bash' is not that of README.md: run python tools/readme.py",
        ),
        ("74.6", "74.7", "the table that begins with '| model | top-1 |' is not that of README.md"),
        ("`runs/`", "`run/`", "other code in a sentence than in English: missing ['`run/`'], too many ['`runs/`']"),
        (
            "(here.md)",
            "(there.md)",
            "other links or pictures than in English: missing ['there.md'], too many ['here.md']",
        ),
        ("## Cite", "## Citation", "of which README.md has no 'Cite' any more"),
    ],
    ids=["code", "paragraph", "section", "number", "wording", "command", "table", "inline code", "link", "heading"],
)
def test_what_is_stale_is_said(old, new, says):
    assert EN.count(old) == 1 and says in "\n".join(translation.problems(EN.replace(old, new), ZH))


def test_what_is_copied_comes_by_itself():
    english = EN.replace("74.6", "74.7").replace("\ntrain\n", "\ntrain now\n")
    assert translation.problems(english, ZH) and not translation.problems(english, refreshed(english))


def test_a_new_row_with_links_comes_in_english_and_is_named():
    english = EN.replace("(go/1) |", "(go/1) |\n| [Two](2.md) | [go](go/2) |")
    chinese = refreshed(english)
    assert not translation.problems(english, chinese) and "[一](1.md)" in chinese
    assert translation.untranslated(translation.read(chinese)) == ["| [Two](2.md) | [go](go/2) |"]


def test_a_new_section_is_put_in_and_waits_for_its_chinese():
    english = EN.replace("## Cite", "## Tutorials\n\nFour stories.\n\n```bash\nnew\n```\n\n## Cite")
    chinese = refreshed(english)
    assert chinese.index("## 开始") < chinese.index("## Tutorials") < chinese.index("## 引用")
    found = "\n".join(translation.problems(english, chinese))
    assert "'Tutorials') is still to be translated" in found and "has no Chinese in it" in found
    sections = translation.read(chinese.replace("Four stories.", "四个故事。"))
    assert not translation.problems(english, translation.write(translation.stamp(translation.read(english), sections),
                                                               ""))
