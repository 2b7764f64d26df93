"""Many ranks on one machine, over gloo: a training that one rank's signal stops, and that goes on.

    python tests/many_ranks.py 16

prints what each part cost in memory, and that all ranks hold the same weights. test_many_gpus.py does it with few."""
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed import TCPStore

TRAINING = ["digits", "--model", "tiny_convformer", "--img-size", "32", "--epochs", "1", "--threads", "1",
            "--device", "cpu", "--snapshots", "0", "--model-ema", "--resume", "auto"]
PRELOADED = ["metaformer_edu.train", "metaformer_edu.training.setup", "metaformer_edu.interpret.snapshots",
             "sklearn.datasets", "torch._dynamo"]


def fingerprint(model):
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.detach().cpu().numpy().tobytes())
    return weights.hexdigest()


def work(folder, args, env, stop_at):
    "One rank: train, say what came of it in a file of its own. Rank 1 gets a signal at the update `stop_at`."
    os.environ.update({"TQDM_DISABLE": "1", **env})
    os.chdir(folder)
    os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    from metaformer_edu.train import _open
    from metaformer_edu.interpret.snapshots import ContactSheet
    from metaformer_edu.training.callbacks import Callback, Interrupted
    from metaformer_edu.training.run_folder import PrintResult, SavePictures
    from metaformer_edu.training.settings import parse
    from metaformer_edu.training.setup import machine_as_found

    class Stop(Callback):
        def after_update(self, trainer):
            if trainer.updates == stop_at and env["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    with machine_as_found():
        job = _open(parse(args), [Stop()])
        pictures = ContactSheet, SavePictures, PrintResult
        job.trainer.callbacks = [c for c in job.trainer.callbacks if not isinstance(c, pictures)]
        first = job.trainer.updates
        with suppress(Interrupted):
            job.fit()
    said = dict(rank=int(env["RANK"]), first=first, updates=job.trainer.updates, weights=fingerprint(job.trainer.model),
                ema=fingerprint(job.trainer.ema))
    Path(f"rank-{env['RANK']}.json").write_text(json.dumps(said))


def proportional(pids):
    "Bytes in memory of all these processes; what several share counts once."
    found = 0
    for pid in pids:
        with suppress(OSError):  # it has gone
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found


def train(folder, args, ranks, stop_at=None, how="spawn", patience=1800):
    """What each rank said, the most bytes that all had at once, and the seconds. how: 'spawn' gives each rank imports
    of its own, as torchrun does; 'forkserver' is quicker."""
    context = multiprocessing.get_context(how)
    if how == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's part
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(ranks),
                  TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    envs = [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    started = [context.Process(target=work, args=(folder, args, env, stop_at), daemon=True) for env in envs]
    start, most = time.monotonic(), 0
    for process in started:
        process.start()
    try:
        while any(p.is_alive() for p in started) and time.monotonic() < start + patience:
            most = max(most, proportional([p.pid for p in started]))
            time.sleep(0.5)
        assert [p.exitcode for p in started] == [0] * ranks, [p.exitcode for p in started]
    finally:
        for process in started:
            process.kill()
    said = [json.loads((Path(folder) / f"rank-{r}.json").read_text()) for r in range(ranks)]
    return said, most, time.monotonic() - start


def main(ranks):
    args = [*TRAINING, "--batch-size", str(1347 // 8 // ranks)]  # eight updates of 1347 digits
    print(f"{ranks} ranks over gloo on {os.cpu_count()} cores: {' '.join(args)}")
    with tempfile.TemporaryDirectory() as folder:
        for stop_at, name in ((3, "stopped"), (None, "resumed")):
            said, most, seconds = train(folder, args, ranks, stop_at)
            same = {(s["first"], s["updates"], s["weights"], s["ema"]) for s in said}
            assert len(same) == 1, f"the ranks differ: {said}"
            first, updates, weights, _ = same.pop()
            print(f"{name}: updates {first} to {updates}, weights {weights[:12]} in all; at most {most / 1e9:.2f} GB "
                  f"({most / 1e6 / ranks:.0f} MB a rank), {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
