"""How the tests read exercises: those of a lesson, the page of solutions, and what a check said."""
import ast
import re
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
SOLUTIONS = NBS / "solutions.ipynb"
HEADING = re.compile(r"^## Exercises$", re.M)
NUMBER = re.compile(r"^\*\*(\d+)(?:\.| ·)", re.M)  # '**1. Change.**' or '**1 · Change.**'
LINK = re.compile(r"\]\(([\w/]+)\.ipynb\)")
VERDICT = re.compile(r"^([✓✗○]) (.*)$", re.M)


def read(path):
    return nbformat.read(path, as_version=4).cells


def exercises(cells):
    "{number: its code cells} of what stands under `## Exercises`; {} if there are none."
    found, number, inside = {}, None, False
    for cell in cells:
        if cell.cell_type == "markdown":
            if HEADING.search(cell.source):
                inside = True
            elif re.search(r"^##? ", cell.source, re.M):
                inside = False
            number = int(([number] + NUMBER.findall(cell.source))[-1] or 0) if inside else None
        elif cell.cell_type == "code" and number:
            found.setdefault(number, []).append(cell)
    return found


def solutions(path=SOLUTIONS):
    "{notebook: {number: code}} of the page; a notebook is named by its path in nbs/, without .ipynb."
    found, lesson, number = {}, None, None
    for cell in read(path):
        if cell.cell_type == "markdown":
            if re.match(r"## ", cell.source):
                lesson, number = LINK.search(cell.source)[1], None
                found[lesson] = {}
            elif match := NUMBER.match(cell.source):
                number = int(match[1])
        elif cell.cell_type == "code":
            assert lesson and number and number not in found[lesson], f"A solution without its number: {cell.source}"
            found[lesson][number] = cell.source
    return found


def is_stub(node):
    "Is it `answer = ...`, or a function or class that raises NotImplementedError?"
    if isinstance(node, ast.Assign):
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        return any(isinstance(v, ast.Constant) and v.value is ... for v in values)
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and any(
        isinstance(o, ast.Raise) and getattr(o.exc, "id", "") == "NotImplementedError" for o in ast.walk(node))


def answered(cells, answer):
    "The sources of an exercise's cells with `answer` in the place of the one stub."
    sources, done = [], 0
    for cell in cells:
        lines = cell.source.splitlines()
        for node in ast.parse(cell.source).body:
            if is_stub(node):
                lines[node.lineno - 1:node.end_lineno] = [answer.strip("\n")]
                done += 1
                break
        sources.append("\n".join(lines))
    assert done == 1, f"An exercise has one stub, in one cell; this one has {done}:\n{cells[0].source}"
    return sources


def verdicts(cells):
    "[(mark, words)] that the checks printed."
    said = "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream" and o.name == "stdout")
    return VERDICT.findall(said)


def reason(words):
    "What is wrong, without the hint: '' if nothing but 'Not yet.' was said."
    return re.sub(r" ?Hint: .*", "", words.removeprefix("Not yet.")).strip()
