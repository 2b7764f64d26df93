"""The house rules. Nothing here runs a lesson: the notebooks and modules are parsed, the tools run on a copy."""
import ast
import configparser
import graphlib
import io
import itertools
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import nbcells

MODULE_LINES = 250           # lines of code in a module, without blanks, comments and docstrings
NOTEBOOK_BYTES = 500_000     # one notebook
MEAN_NOTEBOOK_BYTES = 300_000
MEDIAN_CELL_LINES = 5        # code cells of a lesson or tutorial, apart from exported ones, which have their own limit, and exercises
MARKDOWN_SHARE = (0.30, 0.50)  # of its cells
EXPORTED_CELL_LINES = 30
LONG_CELLS_ALLOWED = {}      # {("models/mixers", "cell id"): "why this cell has to be long"}
FORWARD = {("train", "sheet"): "a training ends with a sheet of explanations"}  # imports of a later lesson, inside a function
FLAGS_READ_ELSEWHERE = {}    # {"dest": "who reads it, if not metaformer_edu"}
GUARD_WITHIN = 3             # the Colab guard stands in one of the first code cells
NEVER_IMPORTED = {"nbdev", "fastcore", "execnb", "ghapi"}
NOT_AT_IMPORT_TIME = {"IPython", "ipykernel", "google", "matplotlib_inline"}  # absent outside notebooks
# what nbdev 2 and tools/readme.py act on; quarto's layout directives do nothing here
DIRECTIVES = {"default_exp", "export", "exporti", "exports", "hide", "filter_stream", "eval", "echo", "output", "include"}

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "metaformer_edu"
NOTEBOOKS = nbcells.visible(NBS, "*.ipynb")
LESSONS = [p for p in NOTEBOOKS if p.parent == NBS and re.match(r"\d\d[a-z]?_", p.name)]
STORIES = [p for p in NOTEBOOKS if p.parent != NBS]
NUMBER = {p.stem.partition("_")[2]: p.stem.partition("_")[0] for p in LESSONS}  # module name -> number, as '08' or '08a'
MODULES = sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
config = configparser.ConfigParser()
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]
FLAGS = set(SETTINGS.get("tst_flags", "notest").split())


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=[p.stem for p in paths])


def code_cells(path):
    return [c for c in nbcells.read(path)["cells"] if c["cell_type"] == "code"]


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path, cell):
    return f"{path.relative_to(ROOT)}, cell {cell.get('id')}"


# --- nothing stale, nothing uncleaned ---

@pytest.fixture
def copy(tmp_path):
    "What nbdev reads and writes, away from the working tree."
    hidden = shutil.ignore_patterns(".*", "__pycache__", "runs", "data")
    shutil.copytree(NBS, tmp_path / "nbs", ignore=hidden)
    shutil.copytree(LIB, tmp_path / "metaformer_edu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    return tmp_path


def run(copy, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, f"{code!r} failed:\n{done.stderr}"


def differing(a, b, pattern):
    names = {p.relative_to(o) for o in (a, b) for p in o.rglob(pattern) if not any(q[0] == "." for q in p.relative_to(o).parts)}
    return sorted(str(n) for n in names
                  if not (a / n).exists() or not (b / n).exists() or (a / n).read_bytes() != (b / n).read_bytes())


def test_there_are_lessons():
    assert LESSONS, f"There are no numbered notebooks in {NBS}."


def test_modules_are_what_the_notebooks_export(copy):
    for p in (copy / "metaformer_edu").rglob("*.py"):
        if p.name != "__init__.py":  # the one file with lines of its own
            p.unlink()
    run(copy, "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()")
    stale = differing(LIB, copy / "metaformer_edu", "*.py")
    assert not stale, f"Stale or without a notebook in metaformer_edu/: {', '.join(stale)}. Run nbdev_export."


def test_notebooks_are_clean(copy):
    run(copy, "from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()")
    unclean = differing(NBS, copy / "nbs", "*.ipynb")
    assert not unclean, f"Not clean in nbs/: {', '.join(unclean)}. Run nbdev_clean."


def test_readme_is_made_from_index():
    done = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- rooms ---

@each(LESSONS)
def test_notebook_writes_its_one_module(path):
    found = [nbcells.directives(c) for c in code_cells(path)]
    names = [d["default_exp"] for d in found if "default_exp" in d]
    own = path.stem.partition("_")[2]
    assert names == [own], f"{path.name} must say `#| default_exp {own}` exactly once; it says {names}."
    elsewhere = [d[k] for d in found for k in ("export", "exporti", "exports") if d.get(k)]
    assert not elsewhere, f"{path.name} exports into other modules: {elsewhere}."


def test_every_module_has_its_notebook():
    orphans = [p.name for p in MODULES if p.parent != LIB or p.stem not in NUMBER]
    assert not orphans, f"Modules that no numbered notebook writes: {orphans}."
    numbers = list(NUMBER.values())
    assert len(numbers) == len(set(numbers)) == len(LESSONS), "Two notebooks share a number or a name."


def test_only_numbered_notebooks_export():
    wrong = [where(p, c) for p in NOTEBOOKS if p not in LESSONS for c in code_cells(p)
             if nbcells.directives(c).keys() & {"default_exp", "export", "exporti", "exports"}]
    assert not wrong, f"Only numbered notebooks export; these do too: {wrong}."


def imported(node):
    "(absolute module names) that an import statement names, relative ones resolved: the package is flat."
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    base = ".".join(filter(None, [LIB.name if node.level else None, node.module]))
    return [f"{base}.{a.name}" for a in node.names] if base == LIB.name else [base]


def imports(path):
    return [(node.lineno, name) for node in ast.walk(tree(path)) if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in imported(node)]


def inside(path):
    "(line, module) of imports from the package."
    return [(n, name.split(".")[1]) for n, name in imports(path) if name.startswith(LIB.name + ".")]


@each(MODULES)
def test_imports_point_to_lower_numbers(path):
    wrong = [f"line {n}: {name}" for n, name in inside(path)
             if name in NUMBER and NUMBER[name] >= NUMBER.get(path.stem, "") and (path.stem, name) not in FORWARD]
    assert not wrong, f"{path.name} may import lower-numbered modules only: {wrong}."


def test_imports_of_later_lessons_are_used_close_no_circle_and_wait_for_their_call():
    needs = {p.stem: {name for _, name in inside(p) if name in NUMBER} for p in MODULES}
    assert all(later in needs[early] for early, later in FORWARD), f"Not needed any more: {FORWARD}."
    graphlib.TopologicalSorter(needs).prepare()  # CycleError
    for early, later in FORWARD:
        top = [a for node in tree(LIB / f"{early}.py").body if isinstance(node, (ast.Import, ast.ImportFrom)) for a in imported(node)]
        assert f"{LIB.name}.{later}" not in top, f"{early}.py imports {later} at its top: do it where it is used."


@each(sorted(LIB.glob("*.py")))
def test_package_never_imports_the_tools_it_is_made_with(path):
    wrong = [f"line {n}: {name}" for n, name in imports(path) if name.split(".")[0] in NEVER_IMPORTED]
    assert not wrong, f"{path.name} imports what users need not have: {wrong}."


@each(NOTEBOOKS)
def test_notebooks_never_import_the_tools_either(path):
    pattern = re.compile(rf"^\s*(?:from|import)\s+(?:{'|'.join(NEVER_IMPORTED)})\b", re.M)
    wrong = [where(path, c) for c in code_cells(path) if pattern.search(c["source"])]
    assert not wrong, f"Colab carries another fastcore; lessons import none of {sorted(NEVER_IMPORTED)}: {wrong}."


def at_import_time(node):
    "The nodes that run when the module is imported: everything but the bodies of functions."
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import_time(child)


@each(sorted(LIB.glob("*.py")))
def test_package_imports_without_a_notebook(path):
    nodes = list(at_import_time(tree(path)))
    wrong = [f"line {o.lineno}: {name}" for o in nodes if isinstance(o, (ast.Import, ast.ImportFrom))
             for name in imported(o) if name.split(".")[0] in NOT_AT_IMPORT_TIME]
    wrong += [f"line {o.lineno}: get_ipython" for o in nodes if isinstance(o, ast.Name) and o.id == "get_ipython"]
    assert not wrong, f"{path.name} needs a notebook to be imported; move this into the function that uses it: {wrong}."


# --- sizes ---

def docstrings(module):
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def code_lines(path):
    text, lines = path.read_text(encoding="utf-8"), set()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - set(docstrings(ast.parse(text))))


@each(MODULES)
def test_module_is_short(path):
    n = code_lines(path)
    assert n <= MODULE_LINES, f"{path.name} has {n} lines of code; {MODULE_LINES} is the most."


@each(NOTEBOOKS)
def test_notebook_is_light(path):
    size = path.stat().st_size
    assert size <= NOTEBOOK_BYTES, f"{path.name} has {size:,} bytes; {NOTEBOOK_BYTES:,} is the most."


def test_notebooks_are_light_on_average():
    mean = statistics.mean(p.stat().st_size for p in NOTEBOOKS)
    assert mean <= MEAN_NOTEBOOK_BYTES, f"Notebooks have {mean:,.0f} bytes on average; {MEAN_NOTEBOOK_BYTES:,} is the most."


# --- what a notebook stores ---

@each(NOTEBOOKS)
def test_no_widget_state(path):
    nb = nbcells.read(path)
    kinds = {k for c in nb["cells"] for o in c.get("outputs", []) for k in o.get("data", {})}
    assert "widgets" not in nb["metadata"] and "application/vnd.jupyter.widget-state+json" not in kinds, \
        f"{path.name} stores widget state: python tools/run.py drops it, nbdev_clean does not."


@each(NOTEBOOKS)
def test_no_stored_errors(path):
    wrong = [where(path, c) for c in code_cells(path) if "raises-exception" not in c["metadata"].get("tags", [])
             and any(o["output_type"] == "error" for o in c["outputs"])]
    assert not wrong, f"Stored outputs are errors, without the tag raises-exception: {wrong}."


@each(LESSONS + STORIES)
def test_a_picture_is_stored(path):
    kinds = {k for c in code_cells(path) for o in c["outputs"] for k in o.get("data", {})}
    assert any(k.startswith("image/") for k in kinds), f"{path.name} stores no picture: run it in place before committing."


# --- how a lesson reads ---

@each(LESSONS + STORIES)
def test_cells_are_short(path):
    cells = list(itertools.takewhile(lambda c: "## Exercises" not in c["source"], nbcells.read(path)["cells"]))
    lengths = [n for c in cells if c["cell_type"] == "code" and (n := len(nbcells.code(c))) and "export" not in nbcells.directives(c)]
    median = statistics.median(lengths)
    assert median <= MEDIAN_CELL_LINES, f"{path.name}: the median code cell has {median:g} lines; {MEDIAN_CELL_LINES} is the most."


@each(LESSONS + STORIES)
def test_prose_and_code_are_balanced(path):
    kinds = [c["cell_type"] for c in nbcells.read(path)["cells"] if c["cell_type"] != "raw"]
    share, (low, high) = kinds.count("markdown") / len(kinds), MARKDOWN_SHARE
    assert low <= share <= high, f"{path.name}: {share:.0%} of the cells are markdown; {low:.0%} to {high:.0%} is the range."


@each(LESSONS)
def test_exported_cells_are_short(path):
    long = [f"{c.get('id')}: {len(nbcells.code(c))}" for c in code_cells(path)
            if nbcells.directives(c).keys() & {"export", "exporti", "exports"}
            and len(nbcells.code(c)) > EXPORTED_CELL_LINES and (path.stem, c.get("id")) not in LONG_CELLS_ALLOWED]
    assert not long, f"{path.name}: exported cells longer than {EXPORTED_CELL_LINES} lines: {long}."


@each(MODULES)
def test_public_names_have_docstrings(path):
    module = tree(path)
    public = next((ast.literal_eval(o.value) for o in module.body if isinstance(o, ast.Assign)
                   and any(getattr(t, "id", "") == "__all__" for t in o.targets)), None)
    assert public is not None, f"{path.name} has no __all__: is it exported by nbdev?"
    bare = [o.name for o in module.body if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and o.name in public and not ast.get_docstring(o)]
    assert not bare, f"{path.name}: no docstring: {bare}."


@each(LESSONS + STORIES)
def test_colab_guard_comes_first(path):
    first = "\n".join(c["source"] for c in code_cells(path)[:GUARD_WITHIN])
    assert "google.colab" in first, f"{path.name}: no Colab install guard (google.colab) in its first {GUARD_WITHIN} code cells."


# --- no flag that does nothing ---

@each(NOTEBOOKS)
def test_directives_do_something(path):
    unknown = [f"{where(path, c)}: {k}" for c in code_cells(path) for k in nbcells.directives(c).keys() - DIRECTIVES - FLAGS]
    assert not unknown, f"Directives that nothing here reads: {unknown}."
    late = [f"{where(path, c)}: {o}" for c in code_cells(path) for o in nbcells.late_directives(c)]
    assert not late, f"nbdev ignores directives below the first code line: {late}."


def string(node):
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def arguments(module):
    "(line, dest) of every add_argument call, also through a short name for it; dest None if it is computed."
    short = {t.id for o in ast.walk(module) if isinstance(o, ast.Assign) and getattr(o.value, "attr", "") == "add_argument"
             for t in o.targets if isinstance(t, ast.Name)}
    for call in (o for o in ast.walk(module) if isinstance(o, ast.Call)):
        if getattr(call.func, "attr", "") != "add_argument" and getattr(call.func, "id", "") not in short:
            continue
        keywords = {k.arg: string(k.value) for k in call.keywords}
        names = [string(a) for a in call.args]
        if keywords.get("action") in ("help", "version"):
            continue
        if keywords.get("dest"):
            yield call.lineno, keywords["dest"]
        elif not names or None in names:
            yield call.lineno, None
        else:
            long = [n for n in names if n.startswith("--")] or names
            yield call.lineno, long[0].lstrip("-").replace("-", "_")


def reads(module):
    "Names read as `x.name`, `x['name']`, x.get('name'), x.pop('name') or getattr(x, 'name')."
    for o in ast.walk(module):
        if isinstance(o, ast.Attribute) and isinstance(o.ctx, ast.Load):
            yield o.attr
        elif isinstance(o, ast.Subscript) and isinstance(o.ctx, ast.Load):
            yield string(o.slice)
        elif isinstance(o, ast.Call) and o.args and getattr(o.func, "attr", "") in ("get", "pop"):
            yield string(o.args[0])
        elif isinstance(o, ast.Call) and len(o.args) > 1 and getattr(o.func, "id", "") == "getattr":
            yield string(o.args[1])


@each(MODULES)
def test_command_line_arguments_are_read(path):
    read = {name for p in MODULES for name in reads(tree(p))} | FLAGS_READ_ELSEWHERE.keys()
    found = list(arguments(tree(path)))
    computed = [n for n, dest in found if dest is None]
    assert not computed, f"{path.name}: argument names must be written out, so that this test can see them: lines {computed}."
    idle = [f"{dest} (line {n})" for n, dest in found if dest not in read]
    assert not idle, f"{path.name}: arguments that nothing reads: {idle}."


def test_commands_exist():
    for entry in SETTINGS["console_scripts"].split():
        command, module, function = re.fullmatch(rf"([\w-]+)={LIB.name}\.(\w+):(\w+)", entry).groups()
        path = LIB / f"{module}.py"
        assert path.exists() and any(isinstance(o, ast.FunctionDef) and o.name == function for o in tree(path).body), \
            f"settings.ini promises {command}, but metaformer_edu/{module}.py has no function {function}."


# --- requirements ---

def test_runtime_requirements_are_lower_bounds():
    wrong = [r for r in SETTINGS["requirements"].split() if not re.fullmatch(r"[\w-]+(\[[\w,-]+\])?>=[\w.]+", r)]
    assert not wrong, f"Run-time requirements are `name>=version`, so that nothing in Colab is moved: {wrong}."


def test_nbdev_is_pinned_for_development_only():
    names = lambda key: {re.match(r"[\w-]+", r)[0]: r for r in SETTINGS[key].split()}
    runtime, dev = names("requirements"), names("dev_requirements")
    assert not NEVER_IMPORTED & runtime.keys(), "nbdev and what it needs belong to dev_requirements only."
    assert dev.get("nbdev", "").startswith("nbdev=="), "nbdev must be pinned in dev_requirements: later releases do not read settings.ini."
    loose = [n for n in ("execnb", "fastcore", "ghapi") if "<" not in dev.get(n, "")]
    assert not loose, f"The pinned nbdev breaks without an upper bound on: {loose}."
