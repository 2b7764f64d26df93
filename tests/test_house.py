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

import course
import nbcells
import website

MODULE_LINES = 400           # lines of code in a module, without blanks, comments and docstrings
WIDTH = 120                  # columns, in the package and in the notebooks' code
# a part and those that it may import from
IMPORTS_FROM = {"core": set(), "models": {"core"}, "data": {"models", "core"}, "training": {"data", "models", "core"}}
IMPORTS_FROM["interpret"] = IMPORTS_FROM["speed"] = {"training", *IMPORTS_FROM["training"]}
IMPORTS_FROM["widgets"] = IMPORTS_FROM["experiments"] = {"interpret", *IMPORTS_FROM["interpret"]}
# train and validate stand at the root, for what people type
IMPORTS_FROM["commands"] = {*IMPORTS_FROM, "train", "validate"}
AT_ROOT = {"train", "validate"}
NOTEBOOK_BYTES = 500_000     # one notebook
MEAN_NOTEBOOK_BYTES = 300_000
# code cells of a lesson or tutorial, apart from exported ones, which have their own limit, and exercises
MEDIAN_CELL_LINES = 5
MARKDOWN_SHARE = (0.30, 0.50)  # of its cells
FLAGS_READ_ELSEWHERE = {}    # {"dest": "who reads it, if not metaformer_edu"}
GUARD_WITHIN = 3             # the Colab guard stands in one of the first code cells
PART_WORDS = 200             # of the page with which a part opens, without its chapters
NEVER_IMPORTED = {"nbdev", "fastcore", "execnb", "ghapi"}
NOT_AT_IMPORT_TIME = {"IPython", "ipykernel", "google", "matplotlib_inline"}  # absent outside notebooks
# what nbdev 2 and tools/readme.py act on; quarto's layout directives do nothing here
DIRECTIVES = {"default_exp", "export", "exporti", "exports", "hide", "filter_stream", "eval", "echo", "output",
              "include"}

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "metaformer_edu"
NOTEBOOKS = nbcells.visible(NBS, "*.ipynb")
CHAPTERS = course.read()
STORIES = [p for p in NOTEBOOKS if p.parent.name == "tutorials"]
LESSONS = [c.path for c in CHAPTERS if c.path not in STORIES]
MODULES = sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
config = configparser.ConfigParser()
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]
FLAGS = set(SETTINGS.get("tst_flags", "notest").split())


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=[p.relative_to(ROOT).with_suffix("").as_posix() for p in paths])


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
    hidden = shutil.ignore_patterns(".*", "__pycache__", "runs")
    shutil.copytree(NBS, tmp_path / "nbs", ignore=hidden)
    shutil.copytree(LIB, tmp_path / "metaformer_edu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    return tmp_path


def run(copy, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, f"{code!r} failed:\n{done.stderr}"


def differing(a, b, pattern):
    names = {p.relative_to(o) for o in (a, b)
             for p in o.rglob(pattern) if not any(q[0] == "." for q in p.relative_to(o).parts)}
    return sorted(str(n) for n in names
                  if not (a / n).exists() or not (b / n).exists() or (a / n).read_bytes() != (b / n).read_bytes())


def test_there_are_lessons():
    assert LESSONS, "nbs/course.yml names no lessons."


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


def test_the_course_is_written_into_the_notebooks():
    done = subprocess.run([sys.executable, ROOT / "tools/course.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- parts ---

def written_by(path):
    "The modules that a notebook says it writes."
    found = [nbcells.directives(c) for c in code_cells(path)]
    elsewhere = [d[k] for d in found for k in ("export", "exporti", "exports") if d.get(k)]
    assert not elsewhere, f"{path.name} exports into other modules: {elsewhere}."
    return [d["default_exp"] for d in found if "default_exp" in d]


@each(LESSONS)
def test_notebook_writes_its_one_module_at_the_same_place(path):
    own = path.relative_to(NBS).with_suffix("").as_posix().replace("/", ".")
    own = own.removeprefix("commands.") if own.removeprefix("commands.") in AT_ROOT else own
    assert written_by(path) == [own], (
        f"{path.name} must say `#| default_exp {own}` exactly once; it says {written_by(path)}."
    )


def test_every_module_has_its_notebook():
    written = {LIB / f"{name.replace('.', '/')}.py" for p in LESSONS for name in written_by(p)}
    orphans = sorted(p.relative_to(LIB).as_posix() for p in {*MODULES} ^ written)
    assert not orphans, f"Modules without a chapter in nbs/course.yml, or chapters without a module: {orphans}."


def test_the_course_names_every_notebook_that_teaches():
    missing = [p.relative_to(NBS).as_posix()
               for p in NOTEBOOKS if p not in [c.path for c in CHAPTERS] and p.stem not in ("index", "solutions")]
    assert not missing, f"nbs/course.yml does not name {missing}."
    old = [c.was for c in CHAPTERS if c.was]
    assert len(old) == len(set(old)) and len({c.path for c in CHAPTERS}) == len(CHAPTERS), (
        "nbs/course.yml names a chapter twice."
    )


def test_each_part_opens_with_one_short_page():
    names = list(dict.fromkeys(c.part for c in CHAPTERS))
    assert [p.name for p in course.parts()] == names, "each part of nbs/course.yml needs a page and a picture."
    assert {p.page for p in course.parts()} == set((NBS / "parts").glob("*.md"))
    for part in course.parts():
        text = part.page.read_text(encoding="utf-8")
        own = course.TABLE.sub("", text)
        assert own != text, f"{part.page.name} has no place for its chapters: two comments, see another part's page."
        assert own.startswith(f"# {part.name}\n"), f"{part.page.name} must begin with '# {part.name}'."
        words = len(own.split())
        assert words <= PART_WORDS, f"{part.page.name} has {words} words; {PART_WORDS} are the most."
        pictures = re.findall(r"!\[(.+)\]\((.+)\)", own)
        assert [name for _, name in pictures] == [part.picture(NBS)[0].name], (
            f"{part.page.name} must show one picture with words for those who cannot see it: the cell that {part.cell} "
            f"names."
        )


def test_minutes_are_those_that_reading_takes():
    counted = {c.notebook: website.Lesson(c.path).reading_time for c in CHAPTERS}
    wrong = {c.notebook: (c.minutes, counted[c.notebook])
             for c in CHAPTERS if abs(c.minutes - counted[c.notebook]) > max(2, 0.2 * c.minutes)}
    assert not wrong, f"nbs/course.yml says these minutes, and reading takes those: {wrong}."


def test_stories_export_nothing():
    wrong = [where(p, c) for p in STORIES
             for c in code_cells(p) if nbcells.directives(c).keys() & {"default_exp", "export", "exporti", "exports"}]
    assert not wrong, f"Tutorials export nothing; these do: {wrong}."


def imported(node, path=LIB / "__init__.py"):
    "The absolute module names that an import statement in the file at `path` names, relative ones resolved."
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    folder = path.parents[node.level - 1].relative_to(ROOT).as_posix().replace("/", ".") if node.level else None
    base = ".".join(filter(None, [folder, node.module]))
    inner = [f"{base}.{a.name}" for a in node.names]
    return inner if (ROOT / base.replace(".", "/")).is_dir() else [base]


def imports(path):
    return [(node.lineno, name) for node in ast.walk(tree(path)) if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in imported(node, path)]


def inside(path):
    "(line, dotted name without the package) of imports from the package."
    names = {name_of(p) for p in MODULES}
    return [(n, o) for n, name in imports(path) if (o := name.removeprefix(f"{LIB.name}.")) in names]


def name_of(path):
    return path.relative_to(LIB).with_suffix("").as_posix().replace("/", ".")


@each(MODULES)
def test_imports_run_down_the_table_of_parts(path):
    part = name_of(path).partition(".")[0]
    allowed = {part, *IMPORTS_FROM.get(part, IMPORTS_FROM["commands"] | {"commands"})}
    wrong = [f"line {n}: {name}" for n, name in inside(path) if name.partition(".")[0] not in allowed]
    assert not wrong, f"{name_of(path)} may import from {sorted(allowed)} alone: {wrong}."


def test_imports_close_no_circle():
    # CycleError
    graphlib.TopologicalSorter({name_of(p): {name for _, name in inside(p)} - {name_of(p)} for p in MODULES}).prepare()


@each([LIB / "__init__.py", *MODULES])
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


@each([LIB / "__init__.py", *MODULES])
def test_package_imports_without_a_notebook(path):
    nodes = list(at_import_time(tree(path)))
    wrong = [f"line {o.lineno}: {name}" for o in nodes if isinstance(o, (ast.Import, ast.ImportFrom))
             for name in imported(o, path) if name.split(".")[0] in NOT_AT_IMPORT_TIME]
    wrong += [f"line {o.lineno}: get_ipython" for o in nodes if isinstance(o, ast.Name) and o.id == "get_ipython"]
    assert not wrong, f"{path.name} needs a notebook to be imported; move this into the function that uses it: {wrong}."


# --- sizes ---

def docstrings(module):
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef,
                             ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
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


@each(MODULES)
def test_module_says_what_it_is(path):
    assert ast.get_docstring(tree(path)), (
        f"{name_of(path)} has no docstring: write it as `> …` under the title of its notebook."
    )


@each(MODULES)
def test_one_statement_a_line(path):
    wrong = [o.lineno for o in ast.walk(tree(path)) if isinstance(o, ast.Expr)
             and isinstance(o.value, (ast.Tuple, ast.BoolOp))]
    assert not wrong, f"{name_of(path)}: tuples, or `and` and `or`, as statements in lines {wrong}."


@each(NOTEBOOKS)
def test_lines_are_narrow(path):
    wide = [f"{where(path, c)}: {line[:60]}…" for c in code_cells(path)
            for line in c["source"].splitlines() if len(line) > WIDTH]
    assert not wide, f"More than {WIDTH} columns: {wide}."


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", LIB, ROOT / "tools", ROOT / "tests"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each(NOTEBOOKS)
def test_notebook_is_light(path):
    size = path.stat().st_size
    assert size <= NOTEBOOK_BYTES, f"{path.name} has {size:,} bytes; {NOTEBOOK_BYTES:,} is the most."


def test_notebooks_are_light_on_average():
    mean = statistics.mean(p.stat().st_size for p in NOTEBOOKS)
    assert mean <= MEAN_NOTEBOOK_BYTES, (
        f"Notebooks have {mean:,.0f} bytes on average; {MEAN_NOTEBOOK_BYTES:,} is the most."
    )


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


@each([c.path for c in CHAPTERS if not c.machine_room])
def test_a_picture_is_stored(path):
    kinds = {k for c in code_cells(path) for o in c["outputs"] for k in o.get("data", {})}
    assert any(k.startswith("image/")
               for k in kinds), f"{path.name} stores no picture: run it in place before committing."


# --- how a lesson reads ---

@each(LESSONS + STORIES)
def test_cells_are_short(path):
    cells = list(itertools.takewhile(lambda c: "## Exercises" not in c["source"], nbcells.read(path)["cells"]))
    lengths = [n for c in cells if c["cell_type"] == "code" and (n := len(nbcells.code(c)))
               and "export" not in nbcells.directives(c)]
    median = statistics.median(lengths)
    assert median <= MEDIAN_CELL_LINES, (
        f"{path.name}: the median code cell has {median:g} lines; {MEDIAN_CELL_LINES} is the most."
    )


@each(LESSONS + STORIES)
def test_prose_and_code_are_balanced(path):
    kinds = [c["cell_type"] for c in nbcells.read(path)["cells"] if c["cell_type"] != "raw"]
    share, (low, high) = kinds.count("markdown") / len(kinds), MARKDOWN_SHARE
    assert low <= share <= high, (
        f"{path.name}: {share:.0%} of the cells are markdown; {low:.0%} to {high:.0%} is the range."
    )


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
    assert "google.colab" in first, (
        f"{path.name}: no Colab install guard (google.colab) in its first {GUARD_WITHIN} code cells."
    )


# --- no flag that does nothing ---

@each(NOTEBOOKS)
def test_directives_do_something(path):
    unknown = [f"{where(path, c)}: {k}" for c in code_cells(path)
               for k in nbcells.directives(c).keys() - DIRECTIVES - FLAGS]
    assert not unknown, f"Directives that nothing here reads: {unknown}."
    late = [f"{where(path, c)}: {o}" for c in code_cells(path) for o in nbcells.late_directives(c)]
    assert not late, f"nbdev ignores directives below the first code line: {late}."


def string(node):
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def arguments(module):
    """(line, dest) of every field that is a `setting`, and of every add_argument call, also through a short name for
    it; dest None if it is computed, unless there are fields of which it is made."""
    settings = [(o.lineno, o.target.id) for o in ast.walk(module) if isinstance(o, ast.AnnAssign)
                and isinstance(o.value, ast.Call) and getattr(o.value.func, "id", "") == "setting"]
    yield from settings
    short = {t.id for o in ast.walk(module) if isinstance(o, ast.Assign)
             and getattr(o.value, "attr", "") == "add_argument"
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
            if not settings:
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
    assert not computed, (
        f"{path.name}: argument names must be written out, so that this test can see them: lines {computed}."
    )
    idle = [f"{dest} (line {n})" for n, dest in found if dest not in read]
    assert not idle, f"{path.name}: arguments that nothing reads: {idle}."


def test_commands_exist():
    for entry in SETTINGS["console_scripts"].split():
        command, module, function = re.fullmatch(rf"([\w-]+)={LIB.name}\.([\w.]+):(\w+)", entry).groups()
        path = LIB / f"{module.replace('.', '/')}.py"
        assert path.exists() and any(isinstance(o, ast.FunctionDef) and o.name == function for o in tree(path).body), \
            f"settings.ini promises {command}, but {LIB.name}.{module} has no function {function}."


# --- requirements ---

def test_runtime_requirements_are_lower_bounds():
    wrong = [r for r in SETTINGS["requirements"].split() if not re.fullmatch(r"[\w-]+(\[[\w,-]+\])?>=[\w.]+", r)]
    assert not wrong, f"Run-time requirements are `name>=version`, so that nothing in Colab is moved: {wrong}."


def test_nbdev_is_pinned_for_development_only():
    names = lambda key: {re.match(r"[\w-]+", r)[0]: r for r in SETTINGS[key].split()}
    runtime, dev = names("requirements"), names("dev_requirements")
    assert not NEVER_IMPORTED & runtime.keys(), "nbdev and what it needs belong to dev_requirements only."
    assert dev.get("nbdev", "").startswith("nbdev=="), (
        "nbdev must be pinned in dev_requirements: later releases do not read settings.ini."
    )
    loose = [n for n in ("execnb", "fastcore", "ghapi") if "<" not in dev.get(n, "")]
    assert not loose, f"The pinned nbdev breaks without an upper bound on: {loose}."
