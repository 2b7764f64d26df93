"""Every notebook runs top to bottom in a kernel of its own, of this very interpreter; the files stay as they are.
In the same kernel, each of its exercises is then answered wrongly, and at last as on nbs/solutions.ipynb."""
import nbformat
import pytest

import course
import nbcells
import run
from exercises import NBS, answered, exercises, read, reason, solutions, verdicts
from shorter import SHORTER
from warm import SUPPORTED, warm_python
from wrong_answers import WRONG

NOTEBOOKS = nbcells.visible(NBS, "*.ipynb")
SOLVED = solutions()
COLD = "TRITON_INTERPRET"  # a lesson that sets it begins without PyTorch, which imports Triton


def name(path):
    return path.relative_to(NBS).with_suffix("").as_posix()


# chapters that teach: not the machine room, and no stories
TEACHING = {c.notebook for c in course.read() if not c.machine_room and not c.notebook.startswith("tutorials/")}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)


def answers(found, lesson):
    "[(number, answer, what the check must say)], wrong ones before right ones; None: right."
    return [(n, answer, says) for n in found
            for answer, says in [*WRONG.get(lesson, {}).get(n, {}).items(), (SOLVED.get(lesson, {}).get(n), None)]
            if answer]


def mistakes(cells, tried, tries):
    """What the checks said and should not have said: in the lesson's own cells, and in those behind them, where it
    was answered."""
    found, tried = exercises(cells), iter(tried)
    for n, stubs in found.items():
        if verdicts(stubs) != [("○", "Not answered yet.")]:
            yield f"Exercise {n}, as it stands, should be 'Not answered yet'; it says {verdicts(stubs)}."
    for n, answer, says in tries:
        said = verdicts([next(tried) for _ in found[n]])
        mark, words = said[0] if len(said) == 1 else ("", said)
        if says is None and mark != "✓":
            yield f"Exercise {n} refuses its solution:\n{answer}\n{mark} {words}"
        elif says is not None and mark != "✗":
            yield f"Exercise {n} accepts a wrong answer:\n{answer}\n{mark} {words}"
        elif says is not None and (not reason(words) or says not in reason(words)):
            yield f"Exercise {n} should say what is wrong, {says!r}:\n{answer}\n{mark} {words}"


@pytest.fixture(scope="module")
def warm_launcher():
    if not SUPPORTED:
        yield run.ThisInterpreter.launcher
    else:
        with warm_python() as launcher:
            yield launcher


@each_notebook
def test_notebook_runs(path, warm_launcher, monkeypatch):
    nb = nbformat.read(path, as_version=4)
    if run.never_runs(nb):
        pytest.skip("skip_exec in its front matter")
    if not any(cell.cell_type == "code" and COLD in cell.source for cell in nb.cells):
        monkeypatch.setattr(run.ThisInterpreter, "launcher", warm_launcher)
    found, n = exercises(nb.cells), len(nb.cells)
    tries = answers(found, name(path))
    failure = None
    try:
        cells = run.execute(path, instead=SHORTER.get(name(path)),
                            then=[o for number, answer, _ in tries for o in answered(found[number], answer)]).cells
        failure = "\n\n".join(mistakes(cells[:n], cells[n:], tries))
    except run.NotebookFailed as error:
        failure = str(error)
    if failure:  # outside the except block: the report is the notebook's traceback alone
        pytest.fail(failure, pytrace=False)


@each_notebook
def test_exercises_are_solved(path):
    found, lesson = exercises(read(path)), name(path)
    assert found or lesson not in TEACHING, f"{path.name} has no exercises."
    assert found.keys() == SOLVED.get(lesson, {}).keys(), \
        f"{lesson} has the exercises {sorted(found)}, and nbs/solutions.ipynb solves {sorted(SOLVED.get(lesson, {}))}."
    few = [n for n in found if len(WRONG.get(lesson, {}).get(n, {})) < 2]
    assert not few, f"{lesson}: two wrong answers to each exercise belong into tests/wrong_answers.py; fewer for {few}."
    assert WRONG.get(lesson, {}).keys() <= found.keys(), f"tests/wrong_answers.py answers what {lesson} does not ask."


def cells_of(*said):
    stream = lambda text: [nbformat.v4.new_output("stream", text=text)]
    return [nbformat.v4.new_code_cell("answer = ...\ncheck(answer, int)", outputs=stream(text)) for text in said]


@pytest.mark.parametrize("asked, said, complaint", [
    ("○ Not answered yet.\n", ("✗ Not yet. it is less. Hint: count.\n", "✓ Right.\n"), None),
    ("✓ Right.\n", ("✗ Not yet. it is less.\n", "✓ Right.\n"), "as it stands"),
    ("○ Not answered yet.\n", ("✓ Right.\n", "✓ Right.\n"), "accepts a wrong answer:\nanswer = 3"),
    ("○ Not answered yet.\n", ("✗ Not yet. Hint: is it less?\n", "✓ Right.\n"), "should say what is wrong"),
    ("○ Not answered yet.\n", ("✗ Not yet. it is less.\n", "✗ Not yet. it is less.\n"),
     "refuses its solution:\nanswer = 2"),
    ("○ Not answered yet.\n", ("✗ Not yet. it is less.\n", "nothing\n"), "refuses its solution"),
])
def test_mistakes_are_seen(asked, said, complaint):
    lesson = [nbformat.v4.new_markdown_cell("## Exercises\n\n**1. Change.** How many?"), *cells_of(asked)]
    tries = [(1, "answer = 3", "less"), (1, "answer = 2", None)]
    assert answered(lesson[1:], "answer = 3") == ["answer = 3\ncheck(answer, int)"]
    found = list(mistakes(lesson, cells_of(*said), tries))
    assert not found if complaint is None else len(found) == 1 and complaint in found[0]


def test_solutions_are_of_exercises():
    orphans = sorted({*SOLVED, *WRONG, *SHORTER} - {name(p) for p in NOTEBOOKS})
    assert not orphans, f"Solutions, wrong answers or shorter cells for notebooks that are not there: {orphans}."
