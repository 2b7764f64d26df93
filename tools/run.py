"""Runs notebooks top to bottom in fresh kernels of this interpreter and stores the outputs: `python tools/run.py
nbs/core/basics.ipynb`."""
import argparse
import configparser
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

from nbcells import directives

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 900  # seconds: it ends a cell that hangs; a busy machine is no failure

settings = configparser.ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
SKIP_FLAGS = set(settings["DEFAULT"].get("tst_flags", "notest").split())  # nbdev's own default


class NotebookFailed(Exception):
    "Says which notebook, which cell, its source and what happened."


def front_matter(nb):
    "nbdev's front matter: a raw yaml cell, or the `- key: value` lines under the title."
    found = {}
    for cell in nb.cells:
        if cell.cell_type == "raw" and (match := re.search(r"^---\s*(.*?\S+.*?)---\s*$", cell.source.strip(), re.S)):
            found.update(yaml.safe_load(match[1]))
        elif cell.cell_type == "markdown" and "title" not in found and re.search(r"^#\s+\S", cell.source, re.M):
            found["title"] = True
            found.update(yaml.safe_load("\n".join(re.findall(r"^-\s+(\S.*:.*\S)\s*$", cell.source, re.M))) or {})
    return found


def never_runs(nb):
    return str(front_matter(nb).get("skip_exec", False)).lower() in ("1", "true", "yes", "y", "t", "on")


def skipped(cell):
    "nbdev's reasons to leave a cell alone; Jupyter knows only the tag skip-execution."
    found = directives(cell)
    return found.get("eval", "").lower() == "false" or SKIP_FLAGS & found.keys()


def errors(outputs):
    texts = ["\n".join(o["traceback"]) or f"{o['ename']}: {o['evalue']}"
             for o in outputs if o["output_type"] == "error"]
    return [re.sub(r"\x1b\[[0-9;]*m", "", o) for o in texts]


class ThisInterpreter(AsyncKernelManager):
    "Starts kernels of the running interpreter: what is registered as python3 may be another."
    launcher = [sys.executable, "-m", "ipykernel_launcher"]

    @property
    def kernel_spec(self):
        argv = [*self.launcher, "-f", "{connection_file}", "--log-level=40"]
        return KernelSpec(argv=argv, display_name="here", language="python")


def execute(path, then=(), instead=None):
    """The notebook at `path` with fresh outputs, and behind it cells with the sources `then`; the file is only read.
    `instead` is what it says in the place of a text that stands in one cell: {text: text}. Raises NotebookFailed."""
    path = Path(path).resolve()
    nb = nbformat.read(path, as_version=4)
    for text, other in (instead or {}).items():
        cells = [c for c in nb.cells if c.cell_type == "code" and text in c.source]
        if len(cells) != 1:
            raise NotebookFailed(f"{path.name}: {text!r} should stand in one cell, and stands in {len(cells)}.")
        cells[0].source = cells[0].source.replace(text, other)
    nb.cells += [nbformat.v4.new_code_cell(source) for source in then]
    kept = nb.metadata.copy()
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        if skipped(cell):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "run.py", "skip-execution"]
        else:
            cell.outputs = []

    def fail(cell, what):
        n = nb.cells.index(cell)
        raise NotebookFailed(f"{path.name}, cell {n} ({cell.get('id')}):\n\n{cell.source}\n\n{what}") from None

    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # pictures inline, as in Jupyter
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))  # this checkout's package
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env["IPYTHONDIR"] = folder  # no one's start-up files
        started = []
        client = NotebookClient(nb, kernel_manager_class=ThisInterpreter, timeout=CELL_TIMEOUT, record_timing=False,
                                resources={"metadata": {"path": str(path.parent)}},
                                on_cell_start=lambda cell, cell_index: started.append(cell))
        try:
            client.execute(env=env)
        except (CellControlSignal, DeadKernelError) as error:
            said = errors(started[-1].get("outputs", [])) if isinstance(error, CellExecutionError) else []
            fail(started[-1], "\n".join(said) or str(error))

    for cell in (c for c in nb.cells if c.cell_type == "code"):
        tags = cell.metadata.get("tags", [])
        if "raises-exception" in tags and "skip-execution" not in tags and not errors(cell.outputs):
            fail(cell, "The cell is tagged raises-exception and raised nothing.")
        if "run.py" in tags:
            cell.metadata["tags"] = tags[:tags.index("run.py")]
            if not cell.metadata["tags"]:
                del cell.metadata["tags"]
    # a callback of `interact` fails inside its Output widget, where no cell notices
    for text in (o for state in client.widget_state.values() for o in errors(state.get("outputs", []))):
        raise NotebookFailed(f"{path.name}: a widget's callback failed:\n\n{text}")
    # a live widget is of one kernel; the picture beside it stays
    for cell in (c for c in nb.cells if c.cell_type == "code"):
        live = "application/vnd.jupyter.widget-view+json"
        cell.outputs = [o for o in cell.outputs if live not in o.get("data", {})
                        or any(kind.startswith("image/") for kind in o.data)]
        for output in cell.outputs:
            output.get("data", {}).pop(live, None)
    kept.pop("widgets", None)  # widget state is large and differs every time
    nb.metadata = kept
    return nb


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        try:
            nb = execute(path)
        except NotebookFailed as error:
            sys.exit(str(error))
        nbformat.write(nb, path)
        print(path)


if __name__ == "__main__":
    main()
