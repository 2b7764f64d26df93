"""What people meet first: `import metaformer_edu` and its names, timm's door, and the wheel, away from the checkout."""
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import metaformer_edu

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "timm", "matplotlib", "sklearn", "pytorch_grad_cam", "ipywidgets", "anywidget", "numpy")


def loaded(code, *names):
    "Which of the modules `names` are loaded once `code` has run in a fresh Python."
    code = f"{code}\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import metaformer_edu", *HEAVY) == []


def test_listing_and_building_models_draws_and_explains_nothing():
    few = ("matplotlib", "sklearn", "pytorch_grad_cam", "ipywidgets", "anywidget")
    assert loaded("import metaformer_edu\nmetaformer_edu.list_models()", *few) == []
    assert loaded("import metaformer_edu\nmetaformer_edu.create_model('tiny_convformer')", *few) == []


@pytest.mark.parametrize("name", metaformer_edu.__all__)
def test_each_name_opens_says_what_it_is_and_is_no_module(name):
    found = getattr(metaformer_edu, name)
    assert isinstance(found, dict) or found.__doc__
    assert f"`{name}" in metaformer_edu.__doc__, f"The package's docstring has no line for {name}."
    assert not (ROOT / "metaformer_edu" / name).exists() and not (ROOT / "metaformer_edu" / f"{name}.py").exists()
    assert name in dir(metaformer_edu)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'create_modell'"):
        getattr(metaformer_edu, "create_modell")


def test_timm_knows_our_models_in_either_order():
    ask = "print(timm.create_model('edu_caformer_s18', num_classes=3).num_classes)"
    for first in ("import timm, metaformer_edu", "import metaformer_edu, timm\nimport metaformer_edu.models.registry"):
        done = subprocess.run([sys.executable, "-c", f"{first}\n{ask}"], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.split() == ["3"], done.stderr


# --- the wheel ---

@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    "A folder away from the checkout, in whose environment the wheel is installed, beside this Python's packages."
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    copy = folder / "source"
    shutil.copytree(ROOT / "metaformer_edu", copy / "metaformer_edu", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, copy], check=True,
                   capture_output=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", *folder.glob("*.whl")], check=True,
                   capture_output=True)
    return folder


def test_the_wheel_trains_and_opens_the_explorer(elsewhere, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(elsewhere / "site"))
    monkeypatch.chdir(elsewhere)
    where = subprocess.run([sys.executable, "-c", "import metaformer_edu; print(metaformer_edu.__file__)"],
                           capture_output=True, text=True)
    assert Path(where.stdout.strip()).parent == elsewhere / "site/metaformer_edu"
    assert (elsewhere / "site/metaformer_edu/py.typed").exists()
    done = subprocess.run([sys.executable, "-m", "metaformer_edu.train", "--epochs", "1", "--warmup-epochs", "0"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "best epoch (1)" in done.stdout, done.stderr
    assert (elsewhere / "runs/tiny_convformer-digits-seed0/explained.png").exists()
    command = [sys.executable, "-m", "metaformer_edu.commands.explore", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            url = running.stdout.readline().strip()
            page = urllib.request.urlopen(url, timeout=120).read().decode()
        finally:
            running.terminate()
    assert url.startswith("http://127.0.0.1:") and "voila" in page.lower()
