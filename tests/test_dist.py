"""Who gets which images, and starting processes: what several do together is what one does alone."""
import os
import re
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch import nn

from metaformer_edu import train, validate
from metaformer_edu.core.cli import error_sentence
from metaformer_edu.core.errors import DataError
from metaformer_edu.data.loaders import EpochSampler
from metaformer_edu.training import processes, setup
from metaformer_edu.training.processes import (
    EvalSampler, TrainSampler, all_gather_objects, any_rank, gather, init_distributed, launch, no_sync, open_device,
    wrap_ddp)
from metaformer_edu.training.settings import Settings, cpu_cores, parse


def parts_of(n, batch, accum, parts, epoch=3, start=0):
    "The keys of each part, as a list of updates."
    found = []
    for part in range(parts):
        shard = TrainSampler(n, batch, accum, seed=5, part=part, parts=parts)
        shard.set_epoch(epoch, start)
        keys = list(shard)
        assert len(keys) == len(shard)
        found.append([keys[i:i + batch * accum] for i in range(0, len(keys), batch * accum)])
    return found


# --- training: every update is the same set of images ---

@pytest.mark.parametrize("n, batch, accum, parts", [(48, 4, 1, 2), (50, 4, 2, 2), (1347, 8, 1, 4), (1347, 4, 4, 2),
                                                    (97, 1, 3, 5), (32, 8, 2, 2), (33, 2, 1, 8)])
def test_an_update_is_the_same_images_however_many_share_it(n, batch, accum, parts):
    size = batch * accum * parts
    alone, = parts_of(n, size, 1, 1)
    shared = parts_of(n, batch, accum, parts)
    assert len(alone) == n // size and {len(p) for p in shared} == {len(alone)}
    for step, update in enumerate(alone):
        assert [key for part in shared for key in part[step]] == update  # in order: the micro-batches are the same, too
    keys = [key for update in alone for key in update]
    assert len(set(keys)) == len(keys) == n // size * size
    order = EpochSampler(n, 5)
    order.set_epoch(3)
    assert keys == list(order)[:len(keys)]


@pytest.mark.parametrize("start", [0, 1, 5, 20, 21])
def test_a_start_leaves_out_just_what_is_done(start):
    whole, rest = parts_of(1347, 16, 2, 2), parts_of(1347, 16, 2, 2, start=start)
    assert [part[start:] for part in whole] == rest


def test_the_next_epoch_is_whole_and_other():
    shard = TrainSampler(100, 10, part=0, parts=2)
    shard.set_epoch(0, 3)
    first = list(shard)
    shard.set_epoch(1)
    assert len(first) == 20 and len(list(shard)) == len(shard) == 50 and {epoch for epoch, _ in shard} == {1}
    other = TrainSampler(100, 10, seed=1, part=0, parts=2)
    other.set_epoch(1)
    assert [i for _, i in shard] != [i for _, i in other]


@pytest.mark.parametrize("batch, accum, parts", [(11, 1, 1), (6, 2, 1), (6, 1, 2), (2, 3, 2)])
def test_an_update_larger_than_the_data(batch, accum, parts):
    with pytest.raises(DataError, match=f"batch of {batch * accum * parts} is larger .* 10 images"):
        TrainSampler(10, batch, accum, part=0, parts=parts)
    TrainSampler(12, batch, accum, part=0, parts=parts)


# --- validation: every image once, in the batches of one process ---

@pytest.mark.parametrize("n, batch, parts", [(450, 32, 2), (450, 32, 3), (450, 256, 4), (5, 2, 3), (7, 7, 2),
                                             (1, 1, 3), (12, 4, 3)])
def test_every_held_out_image_once(n, batch, parts):
    shards = [EvalSampler(n, batch, part, parts) for part in range(parts)]
    keys = [list(s) for s in shards]
    assert sorted(sum(keys, [])) == list(range(n)) and [len(s) for s in shards] == [len(k) for k in keys]
    batches = [k[i:i + batch] for k in keys for i in range(0, len(k), batch)]
    # so the last bit is the same
    assert sorted(batches) == [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]


def rows(*index):
    return dict(index=torch.tensor(index), label=torch.tensor(index) * 10) if index else {}


@pytest.mark.parametrize("parts", [[rows(0, 1, 4), rows(2, 3)], [rows(2, 3), rows(0, 1, 4), {}],
                                   [{}, rows(0, 1, 2, 3, 4)]])
def test_gather_puts_all_in_order(parts, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: len(parts))
    monkeypatch.setattr(processes.dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), parts))
    found = gather(parts[0])
    assert found["index"].tolist() == [0, 1, 2, 3, 4] and found["label"].tolist() == [0, 10, 20, 30, 40]


def test_alone_nothing_is_asked_of_others():
    assert gather(rows(1, 0))["label"].tolist() == [0, 10]
    assert all_gather_objects("me") == ["me"] and any_rank(True) and not any_rank(False)
    model = nn.Linear(1, 1)
    assert wrap_ddp(model) is model
    with no_sync(model, last=False):
        model(torch.ones(1)).sum().backward()
    assert model.bias.grad is not None


# --- devices ---

@pytest.mark.parametrize("name", ["toaster", "cuda:97", "meta", "cpu:x", "mps:9"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"no device '{name}' on this machine: try --device (cpu|cuda|mps)"):
        open_device(name)


def test_devices_that_are_there(monkeypatch):
    assert open_device("cpu") == torch.device("cpu") and open_device().type in ("cpu", "cuda", "mps")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "96")
    with pytest.raises(ValueError, match="no device 'cuda:96'"):  # each process asks for its own
        open_device("cuda")


def launched(monkeypatch, **env):
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", **env).items():
        monkeypatch.setenv(name, value)


def test_a_gpu_is_the_current_one_before_anything_is_put_there(monkeypatch):
    did = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: did.append(f"set {device}"))
    monkeypatch.setattr(torch, "zeros", lambda n, device: did.append(f"zeros {device}") or torch.empty(0).to("meta"))
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 1), raising=False)
    assert open_device("cuda:1") == torch.device("cuda:1") and did == ["set cuda:1", "zeros cuda:1"]
    did.clear()
    launched(monkeypatch)
    assert open_device("cuda") == torch.device("cuda:1") and did == ["set cuda:1", "zeros cuda:1"]  # its own


@pytest.mark.parametrize("before", [None, 0])
def test_the_current_gpu_is_as_before_if_there_was_one(before, monkeypatch):
    did = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: before is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: before)
    monkeypatch.setattr(torch.cuda, "set_device", did.append)
    with setup.machine_as_found():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert did == ([] if before is None else [before])


def test_a_command_that_fails_in_a_group_ends_at_once_also_if_nobody_reads(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("""import os, sys, torch.distributed as dist
from metaformer_edu.training.processes import process_group
dist.destroy_process_group = lambda: os._exit(9)
with process_group():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    sys.stdout.write('lost')
    os.close(1)
    sys.exit('text')
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_launch_that_is_given_up_ends(tmp_path, monkeypatch):
    script = tmp_path / "sleeps.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)")

    def give_up(*args, **kwargs):
        raise TimeoutError
    monkeypatch.setattr("builtins.print", give_up)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        processes.launch(script, processes=1)
    assert time.monotonic() - start < 20


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    launched(monkeypatch)
    with pytest.raises(ValueError, match="cuda:0 is one GPU, and 2 processes are here: say --device cuda"):
        open_device("cuda:0")
    with pytest.raises(ValueError, match="no device 'cuda:1' on this machine: try --device cpu"):
        open_device("cuda")


@pytest.mark.parametrize("main", [train.main, validate.main])
@pytest.mark.parametrize("device, said", [("cuda", "no device 'cuda:1'"), ("toaster", "")])
def test_a_process_says_that_its_own_device_is_not_there(device, said, main, monkeypatch, capsys):
    launched(monkeypatch)
    with pytest.raises(SystemExit):
        main(["digits", "--device", device, "--threads", "1"])
    err = capsys.readouterr().err
    assert said in err and bool(said) == bool(err)  # a name that is wrong for all is said by the first


@pytest.mark.parametrize("build", [lambda: setup.build(parse(["digits", "--device", "cpu"])),
                                   lambda: validate.open_all(validate.parse(["digits", "--device", "cpu"]))],
                         ids=["train", "validate"])
def test_both_commands_compute_alike_on_a_gpu(build, monkeypatch):
    "TF32 and cuDNN's choice of algorithms: before anything is computed."
    class Enough(Exception):
        pass

    def stop(device):
        raise Enough
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    opened = torch.device("cuda", 0)
    for module in (setup, processes):
        monkeypatch.setattr(module, "open_device", lambda name: opened)
        monkeypatch.setattr(module, "init_distributed", stop)
    try:
        with pytest.raises(Enough):
            build()
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
        torch.set_float32_matmul_precision("highest")
        opened = torch.device("cpu")
        with pytest.raises(Enough):
            build()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


ALONE = dict(store=torch.distributed.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("device, backend, minutes", [("cuda:1", "cpu:gloo,cuda:nccl", 10), ("cpu", "gloo", None)])
def test_gpus_wait_ten_minutes_for_a_process_that_is_lost(device, backend, minutes, monkeypatch):
    seen = {}
    launched(monkeypatch)
    monkeypatch.setattr(processes, "_fresh_store", lambda: ALONE)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda **how: seen.update(how))
    init_distributed(torch.device(device))
    assert seen == dict(backend=backend, **ALONE, **(dict(timeout=timedelta(minutes=minutes)) if minutes else {}))


def test_processes_that_do_not_meet_say_where(monkeypatch, capfd):
    launched(monkeypatch)
    monkeypatch.setenv("MASTER_ADDR", "first-machine")
    monkeypatch.setenv("MASTER_PORT", "29500")
    said = "has not met the others at first-machine:29500. If machines have several network cards, name .*IFNAME"

    def refuse():
        raise torch.distributed.DistNetworkError("Connection refused (gloo)")
    monkeypatch.setattr(processes, "_fresh_store", refuse)
    with pytest.raises(RuntimeError, match=said) as stop:
        init_distributed(torch.device("cpu"))
    assert re.search(said, error_sentence(stop.value)) and not capfd.readouterr().err
    monkeypatch.setattr(processes, "_PATIENCE", 0.05)
    for seconds, lines in ((0.5, 1), (0, 0)):
        monkeypatch.setattr(processes, "_fresh_store", lambda: time.sleep(seconds) or ALONE)
        monkeypatch.setattr(processes.dist, "init_process_group", lambda **how: None)
        init_distributed(torch.device("cpu"))
        time.sleep(0.1)
        assert len(re.findall(said, err := capfd.readouterr().err)) == err.count("\n") == lines


def test_nobody_leaves_while_others_still_connect():
    store, order = torch.distributed.HashStore(), []

    def quick():
        processes._all_connected(store, 1, 2)
        order.append("left")
    thread = threading.Thread(target=quick)
    thread.start()
    time.sleep(0.2)
    order.append("connected")
    processes._all_connected(store, 0, 2)
    thread.join()
    assert order == ["connected", "left"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone tells a process its cores")
@pytest.mark.parametrize("local, cores", [(None, 16), ("8", 2), ("32", 1)])
def test_processes_share_the_cores_of_the_job(local, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert cpu_cores() == cores
    assert Settings("some/folder", model="convformer_s18").workers == min(8, cores)
    assert validate.parse(["some/folder"]).workers == min(4, cores)


# --- launching ---

def test_launch_gives_what_the_processes_print(tmp_path, capfd):
    script = tmp_path / "hello.py"
    script.write_text(
        "import os, sys; os.write(1, f'{os.environ[\"RANK\"]} of {os.environ[\"WORLD_SIZE\"]} {sys.argv[1]} "
        "{os.getppid()}\\n'.encode())"
    )
    out = launch(script, "it's", processes=2)
    said = [line.rsplit(" ", 1) for line in out.splitlines() if " of 2" in line]
    assert sorted(text for text, _ in said) == ["0 of 2 it's", "1 of 2 it's"]
    assert str(os.getpid()) not in [parent for _, parent in said]  # torchrun is between: this process is not forked
    assert all(text in capfd.readouterr().out for text in (out,))


def test_launch_tells_the_last_words(tmp_path, capfd):
    script = tmp_path / "fails.py"
    script.write_text("import sys; sys.exit('all is lost')")
    with pytest.raises(RuntimeError, match="ended with status 1: (.|\n)*all is lost"):
        launch(script, processes=1, show=False)
    assert capfd.readouterr().out == ""


def test_launch_never_forks_this_process(monkeypatch, tmp_path):
    def fork():
        raise AssertionError("a notebook's kernel must not be forked")
    monkeypatch.setattr(os, "fork", fork)
    seen = []
    real = processes.subprocess.Popen
    monkeypatch.setattr(processes.subprocess, "Popen", lambda command, **kwargs: seen.append(command) or real(
        [sys.executable, "-c", "print('done')"], **kwargs))
    assert launch("-m", "some.module", "-b", 8, processes=3) == "done\n"
    assert seen[0][:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert seen[0][3:] == ["--standalone", "--nproc-per-node=3", "-m", "some.module", "-b", "8"]
