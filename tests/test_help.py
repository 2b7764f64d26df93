"""--help of each command answers at once, without PyTorch; the names that it prints are those of the tables."""
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from metaformer_edu.core import cli
from metaformer_edu.training import settings

ROOT = Path(__file__).resolve().parent.parent
INI = ConfigParser()
INI.read(ROOT / "settings.ini")
COMMANDS = dict(line.split("=") for line in INI["DEFAULT"]["console_scripts"].split())
HEAVY = {"torch", "torchvision", "timm", "matplotlib", "numpy", "sklearn", "PIL", "ipywidgets", "pytorch_grad_cam"}
CODE = """
import sys
from {module} import main
try: main({argv})
except SystemExit as stop: print('status', stop.code)
print('loaded', *sorted({heavy} & sys.modules.keys()))
"""


def loaded(module, argv):
    "What a command says, and which of the heavy packages it has loaded then."
    code = CODE.format(module=module, argv=argv, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not done.stderr or "Traceback" not in done.stderr, done.stderr
    *said, last = done.stdout.splitlines()
    return said, last.split()[1:]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command):
    module, _, name = COMMANDS[command].partition(":")
    assert name == "main"
    said, heavy = loaded(module, ["--help"])
    assert said[0].startswith(f"usage: {command}") and said[-1] == "status 0" and len(said) > 10
    assert not heavy


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_loads_nothing_heavy(command):
    said, heavy = loaded(COMMANDS[command].partition(":")[0], ["--no-such-flag"])
    assert said == ["status 2"] and not heavy


def test_heavy_packages_would_be_seen():
    said, heavy = loaded("metaformer_edu.commands.benchmark", ["--device", "cuda:77"])  # which has to ask PyTorch
    assert said == ["status 2"] and "torch" in heavy


def test_settings_in_python_load_nothing_heavy():
    code = ("import sys\nfrom metaformer_edu.training.settings import Settings\n"
            f"Settings('digits', model='tiny_caformer', opt='lamb')\nprint(*sorted({HEAVY} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "\n"


def test_the_names_are_those_of_the_tables():
    from metaformer_edu.data.datasets import SOURCES
    from metaformer_edu.experiments.arms import EXPERIMENTS
    from metaformer_edu.interpret.cam import METHODS
    from metaformer_edu.commands.experiment import parse
    assert cli.SOURCE_NAMES == list(SOURCES) and cli.METHOD_NAMES == list(METHODS)
    assert cli.EXPERIMENT_NAMES == list(EXPERIMENTS)
    assert parse(["mixers"]).lr is None  # the experiment's own


def test_optimizers_that_are_taken_unasked_are_timms():
    from timm.optim import list_optimizers
    assert set(settings._COMMON_OPTIMIZERS) <= set(list_optimizers())
