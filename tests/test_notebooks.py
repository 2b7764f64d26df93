"""Every notebook runs top to bottom in a fresh kernel of this very interpreter; the files stay as they are."""
from pathlib import Path

import nbformat
import pytest

import run

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(NBS).parts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.relative_to(NBS).with_suffix("").as_posix() for p in NOTEBOOKS])
def test_notebook_runs(path):
    if run.never_runs(nbformat.read(path, as_version=4)):
        pytest.skip("skip_exec in its front matter")
    failure = None
    try:
        run.execute(path)
    except run.NotebookFailed as error:
        failure = str(error)
    if failure:  # outside the except block: the report is the notebook's traceback alone
        pytest.fail(failure, pytrace=False)
