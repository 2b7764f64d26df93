"""Real processes and real signals: killed and resumed, stopped, shared, restarted, and out of disk, it is one run.

The processes are forked by a server that has imported the package once, which saves seconds each; torchrun is
tested, too.
"""
import contextlib
import multiprocessing
import os
import pickle
import pkgutil
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import TCPStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as on Linux and macOS")
SMALL = ["--device", "cpu", "--model", "tiny_poolformerv2", "--img-size", "32", "--threads", "1"]
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["metaformer_edu.train", "metaformer_edu.training.setup",
                             "metaformer_edu.interpret.snapshots"])
AGENT = dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="0")
FINAL = ["last.safetensors", "best.safetensors", "summary.csv"]
SPEED = {"seconds", "images_per_s", "waiting"}


# --- starting processes, and what happens to them on their way ---

class At:
    "At the n-th call of a function, and before it, do something to the process."
    def __init__(self, where, n, action, *args, rank="0"):
        self.where, self.n, self.action, self.args, self.rank = where, n, action, args, rank

    def __call__(self):
        if os.environ.get("RANK", "0") != self.rank:
            return
        real, calls = pkgutil.resolve_name(self.where), count(1)
        owner, _, name = self.where.replace(":", ".").rpartition(".")

        def wrapped(*args, **kwargs):
            if next(calls) == self.n:
                self.action(*self.args)
            return real(*args, **kwargs)
        setattr(pkgutil.resolve_name(owner), name, wrapped)


def kill(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def kill_slowly(*numbers):
    for number in numbers:
        kill(number)
        time.sleep(1.1)


def keep_killing(number):
    "Another process sends the signal at once, and again every 5 ms until this one has gone."
    me = os.getpid()
    if os.fork() == 0:
        while os.getppid() == me:
            os.kill(me, number)
            time.sleep(0.005)
        os._exit(0)
    time.sleep(0.1)


def kill_group(number):
    os.killpg(os.getpgrp(), number)


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_disk(pattern, name):
    "The file `name` in the folder will land on a device that is full."
    folder, = Path.cwd().glob(pattern)
    (folder / name).symlink_to("/dev/full")


def job(folder, args, env, changes):
    os.setsid()  # a process group of its own, as a shell's or Slurm's
    # the loader's workers are children of this process, as from a shell
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update({"TQDM_DISABLE": "1", **env})
    sys.argv = ["metaformer-train", *args]
    torch.set_num_threads(1)
    import metaformer_edu.training.run_folder as runs
    import metaformer_edu.interpret.snapshots as snapshots
    import metaformer_edu.train as command
    import matplotlib.pyplot as plt
    small = lambda *_: plt.figure(figsize=(1, 1))  # other tests look at pictures
    runs.draw_curves = runs.show_predictions = snapshots.sheet_of_run = small
    for change in changes:
        change()
    command.main(list(args))


@pytest.fixture(scope="module", autouse=True)
def server():
    with pytest.MonkeyPatch.context() as patch:  # what the server of forks sees
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def train(folder, *args, changes=(), processes=None):
    "Run the command in `folder`/work; (status or statuses, output, errors)."
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    for name in ("out", "err"):
        (folder / name).write_text("")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet; torchrun holds it, too
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(processes), **AGENT)
    envs = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)] if processes else [{}]
    started = [FORK.Process(target=job, args=(work, args, env, changes)) for env in envs]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(100)
        assert all(p.exitcode is not None for p in started), f"it hangs: {(folder / 'err').read_text()}"
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):  # workers may outlive a process that was killed
                os.killpg(process.pid, signal.SIGKILL)
    status = [p.exitcode for p in started]
    return status if processes else status[0], (folder / "out").read_text(), (folder / "err").read_text()


def ok(folder, *args, **kwargs):
    "As `train`, without mistake; the folder of the run."
    status, _, err = train(folder, *args, **kwargs)
    assert not np.any(status) and "Traceback" not in err, err
    return only_run(folder)


def only_run(folder):
    run, = (folder / "work" / "runs").iterdir()
    return run


# --- what is compared ---

def last_state(run):
    return torch.load(sorted(run.glob("state-*.pt"))[-1], weights_only=True)


def assert_equal(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() - SPEED == b.keys() - SPEED, where
        for key in a.keys() - SPEED:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, where


def assert_same_run(run, whole):
    snapshots = [f"snapshots/{name}.safetensors" for name in ("pictures", "epoch-0001", "epoch-0002")]
    for name in FINAL + snapshots:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert_equal(last_state(run), last_state(whole))
    inside = lambda folder: sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert inside(run) == inside(whole)  # nothing half done is left


def distance(a, b):
    "Between two sets of weights, relative to their size."
    square = lambda s: sum(v.double().square().sum() for v in s.values())
    assert a.keys() == b.keys()
    return (square({k: a[k] - b[k] for k in a}) / square(b)).sqrt().item()


def assert_close_runs(run, whole, bound=1e-5):
    a, b = last_state(run), last_state(whole)
    assert len(a["log"]) == len(b["log"]) and a["updates"] == b["updates"]
    for key in ("state_dict", "state_dict_ema"):
        assert (key in a) == (key in b) and (key not in a or distance(a[key], b[key]) < bound), key
    for x, y in zip(a["log"], b["log"]):
        assert {k: x[k] for k in x.keys() - SPEED} == pytest.approx({k: y[k] for k in y.keys() - SPEED}, rel=2e-5)


# --- a small folder of images, and the run that nothing disturbs ---

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Four classes; 96 images to learn and 28 held out, in batches of 8: twelve updates and four batches."
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "colours"
    for part, n in (("train", 24), ("val", 7)):
        for label in range(4):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(n):
                base = np.array([60 + 40 * label, 200 - 30 * label, 128])
                Image.fromarray(rng.normal(base, 50,
                                           (32, 32, 3)).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def args(pictures):
    "All that is random is on: RandAugment, erasing, mixup, cutmix, drop path; and an average of the weights."
    return [pictures, *SMALL, "-b", "8", "-j", "0", "--epochs", "2", "--lr", "7e-5", "--drop-path", "0.2",
            "--model-ema", "--model-ema-decay", "0.9", "--recovery-interval", "5"]


@pytest.fixture(scope="module")
def whole(args, tmp_path_factory):
    return ok(tmp_path_factory.mktemp("whole"), *args)


@pytest.fixture(scope="module")
def whole_in_two(args, tmp_path_factory):
    return ok(tmp_path_factory.mktemp("two"), *args, "-b", "4", processes=2)


# --- SIGKILL ---

UPDATE, EVALUATE = "metaformer_edu.training.trainer:Trainer.update", "metaformer_edu.training.evaluate:answers"
SAVE, TABLE = (
    "metaformer_edu.training.run_folder:save_weights",
    "metaformer_edu.training.run_folder:RunFolder.write_log",
)
FINISH = "metaformer_edu.training.run_folder:SavePictures.after_fit"
SNAPSHOT, TENSORS = "metaformer_edu.interpret.snapshots:take_snapshot", "metaformer_edu.interpret.snapshots:as_bytes"
POINTS = {  # states are written after updates 5, 10, 12, 17, 22 and 24; fsync and replace first serve args.yaml
    "before the first state": (UPDATE, 3),
    "in the middle of the first epoch": (UPDATE, 9),
    "in the middle of the second epoch": (UPDATE, 20),
    "in the first update of the second epoch": (UPDATE, 13),
    "while a state is written": ("os:fsync", 3),
    "while the state of an epoch is written": ("os:fsync", 4),
    "while evaluating": (EVALUATE, 3),
    "while evaluating the average": (EVALUATE, 6),
    "before the weights": (SAVE, 1),
    "while weights are written": ("os:replace", 5),
    "between last and best": (SAVE, 2),
    "between weights and table": (TABLE, 1),
    "after the last state, before the table": (TABLE, 2),
    "before the first snapshot": (SNAPSHOT, 1),
    "between pictures and snapshot": (TENSORS, 2),
    "while a snapshot is written": ("os:replace", 10),
    "before the snapshot of the last epoch": (SNAPSHOT, 2),
    "after the last epoch": (FINISH, 1),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed(point, args, whole, tmp_path):
    assert train(tmp_path, *args, changes=[At(*POINTS[point], kill, signal.SIGKILL)])[0] == -signal.SIGKILL
    run = only_run(tmp_path)
    if "state" in point and "written" in point:
        assert list(run.glob("state-*.unfinished"))  # it was killed there
    ok(tmp_path, *args, "--resume", "auto")
    assert_same_run(run, whole)


def test_killed_and_resumed_again_and_again(args, whole, tmp_path):
    args = [*args, "--recovery-interval", "1", "--resume", "auto", "-j", "1"]
    for n in (4, 8, 3):
        assert train(tmp_path, *args, changes=[At(UPDATE, n, kill, signal.SIGKILL)])[0] == -signal.SIGKILL
    run = ok(tmp_path, *args)
    assert [r["epoch"] for r in last_state(run)["log"]] == [1, 2]
    assert {p.name for p in whole.iterdir()} - {p.name for p in run.iterdir()} == {"state-00000022.pt"}  # here it is 23
    (run / "state-00000023.pt").rename(run / "state-00000022.pt")
    assert_same_run(run, whole)


def test_a_finished_run_is_not_done_again(args, whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path / "work" / "runs")
    before = {name: (whole / name).stat().st_size for name in FINAL}
    run = ok(tmp_path, *args, "--resume", "auto", changes=[At(UPDATE, 1, kill, signal.SIGKILL)])
    assert before == {name: (run / name).stat().st_size for name in FINAL}
    assert_same_run(run, whole)


def test_a_damaged_state_is_named_and_the_one_before_is_used(args, whole, tmp_path):
    train(tmp_path, *args, changes=[At(UPDATE, 15, kill, signal.SIGKILL)])
    run = only_run(tmp_path)
    newest = run / "state-00000012.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    status, out, err = train(tmp_path, *args, "--resume", "auto")
    assert status == 0 and str(newest.name) in err and "damaged" in err and err.count("\n") == 1
    assert "goes on after update 10" in out
    assert_same_run(run, whole)


def test_a_run_goes_on_in_another_number_of_processes(args, tmp_path):
    in_one, in_two = [*args, "-b", "4", "--grad-accum-steps", "2"], [*args, "-b", "4"]  # the same blends
    whole = ok(tmp_path / "whole", *in_one)
    train(tmp_path / "there", *in_one, changes=[At(UPDATE, 20, kill, signal.SIGKILL)])
    assert_close_runs(ok(tmp_path / "there", *in_two, "--resume", "auto", processes=2), whole)
    train(tmp_path / "back", *in_two, changes=[At(UPDATE, 20, kill, signal.SIGKILL, rank=r) for r in "01"], processes=2)
    assert_close_runs(ok(tmp_path / "back", *in_one, "--resume", "auto"), whole)


@pytest.fixture(scope="module")
def killed_in_two(args, tmp_path_factory):
    "Two processes that were killed in the second epoch."
    folder = tmp_path_factory.mktemp("killed")
    train(folder, *args, "-b", "4", changes=[At(UPDATE, 20, kill, signal.SIGKILL, rank=r) for r in "01"], processes=2)
    return folder


def measure_messages():
    "The first process says how large the largest object was that it handed to the others."
    sizes = []

    def measured(real):
        def call(objects, *args, **kwargs):
            sizes.append(len(pickle.dumps(args or objects)))
            return real(objects, *args, **kwargs)
        return call
    for name in ("all_gather_object", "broadcast_object_list"):
        setattr(torch.distributed, name, measured(getattr(torch.distributed, name)))
    At("metaformer_edu.training.setup:Run.fit", 1, lambda: print("largest message", max(sizes)))()


def elsewhere():
    "The second process works in another folder, where it cannot see the run; on another machine it may be so."
    if os.environ["RANK"] == "1":
        os.chdir("/")


@pytest.mark.parametrize("change", [None, elsewhere], ids=["same disk", "another folder"])
def test_two_processes_go_on_and_send_the_state_only_if_they_must(change, args, killed_in_two, whole_in_two, tmp_path):
    shutil.copytree(killed_in_two / "work", tmp_path / "work")
    state = sorted(only_run(tmp_path).glob("state-*.pt"))[-1].stat().st_size
    changes = [measure_messages, *([change] if change else [])]
    status, out, err = train(tmp_path, *args, "-b", "4", "--resume", "auto", changes=changes, processes=2)
    assert status == [0, 0] and not err, err
    sent = int(re.search(r"largest message (\d+)", out)[1])
    assert sent > state / 2 if change else sent < state / 10, (sent, state)
    assert_same_run(only_run(tmp_path), whole_in_two)


# --- SIGTERM and SIGINT ---

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where, n, state", [(UPDATE, 8, 8), (EVALUATE, 3, 12), (TABLE, 1, 12), (FINISH, 1, 24)])
def test_asked_to_stop(number, where, n, state, args, whole, tmp_path):
    status, _, err = train(tmp_path, *args, changes=[At(where, n, kill, number)])
    run = only_run(tmp_path)
    assert status == 128 + number and err.count("\n") == 1, err
    assert f"Stopped by {number.name}" in err and "--resume auto" in err
    assert last_state(run)["updates"] == state and not list(run.glob("*.unfinished")) + list(run.glob("*.tmp"))
    ok(tmp_path, *args, "--resume", "auto")
    assert_same_run(run, whole)


@pytest.mark.parametrize("number, where, n, state", [(signal.SIGTERM, UPDATE, 8, 8), (signal.SIGINT, UPDATE, 8, 8),
                                                     (signal.SIGTERM, EVALUATE, 3, 12)])
def test_asked_to_stop_together_with_the_loaders_workers(number, where, n, state, args, whole, tmp_path):
    # as Slurm and Ctrl-C do
    status, _, err = train(tmp_path, *args, "-j", "1", changes=[At(where, n, kill_group, number)])
    run = only_run(tmp_path)
    assert status == 128 + number and err.count("\n") == 1 and "Stopped by" in err, err
    assert last_state(run)["updates"] == state
    ok(tmp_path, *args, "--resume", "auto")
    assert_same_run(run, whole)


def test_a_signal_while_an_image_is_read_is_no_fault_of_the_image(args, tmp_path):
    stop = At("PIL.Image:open", 100, kill, signal.SIGTERM)  # the fourth held-out one
    status, _, err = train(tmp_path, *args, "--skip-unreadable", changes=[stop])
    assert status == 143 and "Cannot read" not in err, err


@pytest.mark.parametrize("write, n", [("torch:save", 7), ("metaformer_edu.training.run_folder:as_csv", 3)],
                         ids=["the last state for the second time", "summary.csv"])
def test_a_signal_while_a_file_is_written_leaves_no_half_of_it(write, n, args, whole, tmp_path):
    status, _, err = train(tmp_path, *args, changes=[At(write, n, kill, signal.SIGTERM)])
    run = only_run(tmp_path)
    assert status == 143 and not list(run.glob("*.unfinished")), err
    ok(tmp_path, *args, "--resume", "auto")
    assert_same_run(run, whole)


def test_a_signal_while_the_state_of_an_epoch_is_written_does_not_wait_for_the_evaluation(args, tmp_path):
    status, _, err = train(tmp_path, *args, changes=[At("os:fsync", 4, kill, signal.SIGTERM)])
    assert status == 143 and last_state(only_run(tmp_path))["updates"] == 12, err


def test_ctrl_c_that_a_launcher_passes_on_is_one(args, tmp_path):
    status, _, err = train(tmp_path, *args, changes=[At(UPDATE, 8, kill, signal.SIGINT, signal.SIGINT)])
    assert status == 130 and err.count("\n") == 1 and last_state(only_run(tmp_path))["updates"] == 8, err


def test_asked_twice_it_stops_at_once(args, whole, tmp_path):
    status, _, err = train(tmp_path, *args, changes=[At(UPDATE, 8, kill_slowly, signal.SIGINT, signal.SIGINT)])
    run = only_run(tmp_path)
    assert status == 130 and err.count("\n") == 1 and last_state(run)["updates"] == 5, err
    ok(tmp_path, *args, "--resume", "auto")
    assert_same_run(run, whole)


@pytest.mark.parametrize("where, n, state", [
    ("metaformer_edu.training.setup:build", 1, None), (UPDATE, 8, 8), ("torch:save", 2, 11), (EVALUATE, 3, 12),
    ("metaformer_edu.train:_say_stopped", 1, 8)])
def test_sigterm_again_and_again_is_one(where, n, state, args, tmp_path):
    "Until the process has gone: while it starts, saves, measures, says good-bye and ends."
    changes = [At(where, n, keep_killing, signal.SIGTERM)]
    if "say" in where:
        changes.append(At(UPDATE, 8, kill, signal.SIGTERM))
    status, _, err = train(tmp_path, *args, changes=changes)
    assert status == 143 and err.count("\n") == 1 and "Stopped by SIGTERM" in err, (status, err)
    if state:
        assert last_state(only_run(tmp_path))["updates"] == state


def test_sigterm_again_and_again_to_both(args, tmp_path):
    changes = [At(UPDATE, 8, keep_killing, signal.SIGTERM, rank=r) for r in "01"]
    status, _, err = train(tmp_path, *args, "-b", "4", changes=changes, processes=2)
    assert status == [143, 143] and err.count("\n") == 1 and last_state(only_run(tmp_path))["updates"] == 8, err


def leaving_takes_for_ever():
    torch.distributed.destroy_process_group = lambda *_: time.sleep(1000)


def break_down():
    raise RuntimeError("The second process broke down")


@pytest.mark.parametrize("where", [UPDATE, EVALUATE])
def test_one_that_fails_lets_the_other_go(where, args, tmp_path):
    changes = [leaving_takes_for_ever, At(where, 3, break_down, rank="1")]
    status, _, err = train(tmp_path, *args, "-b", "4", "--epochs", "1", changes=changes, processes=2)
    assert status == [1, 1] and "The second process broke down." in err and "Lost another process" in err, err


def test_one_of_two_is_asked_to_stop(args, whole_in_two, tmp_path):
    args = [*args, "-b", "4"]
    status, _, err = train(tmp_path, *args, changes=[At(UPDATE, 8, kill, signal.SIGTERM, rank="1")], processes=2)
    run = only_run(tmp_path)
    assert status == [143, 143] and err.count("\n") == 1 and last_state(run)["updates"] == 8, err
    ok(tmp_path, *args, "--resume", "auto", processes=2)
    assert_same_run(run, whole_in_two)


# --- one run, however it is shared ---

DIGITS = ["digits", *SMALL, "--epochs", "1", "--model-ema", "--model-ema-decay", "0.9"]
SHARES = [(32, 1, 1), (8, 4, 1), (8, 2, 2), (8, 1, 4), (16, 1, 2)]  # images at once, helpings, processes


def share(folder, batch, accum, processes, *more):
    return ok(folder / f"{batch} {accum} {processes}", *DIGITS, "-b", str(batch), "--grad-accum-steps", str(accum),
              *more,
              processes=processes if processes > 1 else None)


def test_one_two_and_four_processes_and_any_helpings(tmp_path):
    first, *others = [share(tmp_path, *how) for how in SHARES]
    for other in others:
        assert_close_runs(other, first)
    assert last_state(first)["log"][0]["val_top1"] > 60  # it has learned something


def test_the_same_helpings_are_blended_and_dropped_alike(tmp_path):
    first, *others = [share(tmp_path, *how, "--mixup", "0.8", "--cutmix", "1", "--drop-path", "0.2", "--head-dropout",
                            "0.2")
                      for how in SHARES if how[0] == 8]
    for other in others:
        assert_close_runs(other, first)


def count_reductions():
    from metaformer_edu.training import trainer
    from metaformer_edu.training import run_folder
    real, seen = trainer.wrap_ddp, []

    def wrap(model):
        found = real(model)
        found.register_comm_hook(None, lambda state, bucket: seen.append(1) or allreduce_hook(state, bucket))
        return found
    trainer.wrap_ddp = wrap
    run_folder.SavePictures.after_fit = lambda self, trainer: print("reductions", len(seen), "updates", trainer.updates)
    run_folder.PrintResult.after_fit = lambda self, trainer: None


def test_gradients_are_reduced_once_in_an_update(args, tmp_path):
    ratio = {}
    for accum in (1, 3):
        status, out, err = train(tmp_path / str(accum), *args, "-b", "2", "--grad-accum-steps", str(accum), "--epochs",
                                 "1",
                                 changes=[count_reductions], processes=2)
        assert status == [0, 0], err
        _, seen, _, updates = next(line for line in out.splitlines() if line.startswith("reductions")).split()
        assert int(updates) == 96 // (2 * 2 * accum)
        ratio[accum] = int(seen) / int(updates)
    assert ratio[1] == ratio[3] < 4, ratio  # a few buckets


# --- torchrun ---

def torchrun(folder, *args, **env):
    command = [sys.executable, "-m", "torch.distributed.run", *args]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **env}
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_torchrun_restarts_a_killed_process(args, whole_in_two, tmp_path):
    script = tmp_path / "killed_once.py"
    script.write_text("import os, signal\nfrom test_processes import At, UPDATE, kill\n"
                      "from metaformer_edu.train import main\nfirst = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
                      "if first: At(UPDATE, 18, kill, signal.SIGKILL, rank='1')()\nmain()\n")
    how = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = torchrun(tmp_path / "work", *how, str(script), *args, "-b", "4")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "goes on after update 17, in epoch 2 of 2" in out
    assert_same_run(only_run(tmp_path), whole_in_two)


def test_two_nodes(args, whole_in_two, tmp_path):
    how = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "7",
           "--rdzv-endpoint", f"127.0.0.1:{port()}", "-m", "metaformer_edu.train"]
    nodes = [torchrun(tmp_path / "work", *how, *args, "-b", "4") for _ in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert_same_run(only_run(tmp_path), whole_in_two)


@pytest.mark.parametrize("bad, words", [(["--lr", "nan"], "--lr"), (["no/folder"], "no folder no/folder"),
                                        (["digits", "-b", "674"], "A batch of 1348 is larger"),
                                        (["--resume", "gone"], "gone"),
                                        (["--initial-checkpoint", "gone.pth"], "no weight file gone.pth")])
def test_several_processes_say_once_what_is_wrong(bad, words, tmp_path):
    status, out, err = train(tmp_path, *SMALL, *bad, processes=2)
    assert status[0] == 2 and status[1] != 0 and out == "" and err.count("\n") == 1 and words in err, (status, err)
    assert list((tmp_path / "work").iterdir()) == []


# --- a full disk, and a folder that is locked ---

DISK = {
    "the first state": ([At(UPDATE, 1, limit, 500_000)], "state-00000005.pt", None),
    "a later state": ([At(UPDATE, 8, limit, 500_000)], "state-00000010.pt", 5),
    "the weights": ([At(SAVE, 1, limit, 500_000)], "last.safetensors", 12),
    "the weights of the second epoch":
        ([At("metaformer_edu.training.run_folder:RunFolder.save_epoch", 2, limit, 500_000)], "last.safetensors", 24),
    "a snapshot": ([At(SNAPSHOT, 1, limit, 1_000)], "snapshots/pictures.safetensors", 12),
    "the table": ([At(TABLE, 2, full_disk, "runs/*", "summary.csv.unfinished")], "summary.csv", 24),
}


@pytest.mark.parametrize("what", DISK)
def test_a_full_disk(what, args, whole, tmp_path):
    changes, name, state = DISK[what]
    status, _, err = train(tmp_path, *args, changes=changes)
    run = only_run(tmp_path)
    assert status == 1 and err.count("\n") == 1 and f"{run.name}/{name}: " in err, err
    assert not list(run.glob("*.unfinished")) + list(run.glob("*.tmp"))
    assert (last_state(run)["updates"] if state else list(run.glob("state-*"))) == (state or [])
    ok(tmp_path, *args, "--resume", "auto")  # there is room again
    assert_same_run(run, whole)


def become_nobody():
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def test_an_output_folder_without_permission(tmp_path):
    locked = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        locked.chmod(0o555)
        # some imports are late, and root's to read
        late = At("metaformer_edu.training.setup:open_folder", 1, become_nobody)
        status, out, err = train(tmp_path, *SMALL, "--output", str(locked / "runs"), changes=[late])
        assert (status, out, err) == (2, "", f"metaformer-train: Cannot use {locked / 'runs'}: Permission denied.\n")
        assert list(locked.iterdir()) == []
    finally:
        locked.chmod(0o755)
        locked.rmdir()
