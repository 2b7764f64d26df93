"""The five bundled runs: complete, small, and as good in 16 bits as they were; and the command that makes them."""
import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metaformer_edu.core.files import read_log
from metaformer_edu.data.datasets import load_shapes
from metaformer_edu.experiments import kept_runs
from metaformer_edu.experiments.kept_runs import main
from metaformer_edu.interpret.cam import METHODS
from metaformer_edu.interpret.snapshots import read_snapshots
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.weights import save_weights
from metaformer_edu.training.run_folder import read_about
from metaformer_edu.widgets.sources import example_runs

ROOT = Path(__file__).resolve().parent.parent
RUNS = example_runs()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def held_out():
    _, pictures, info = load_shapes("shape", 128)
    images, labels = zip(*(pictures[i] for i in range(len(pictures))))
    return torch.stack(images), torch.tensor(labels), info.class_names


def test_there_is_one_a_family_and_they_are_small():
    folder = ROOT / "metaformer_edu/examples"
    assert {p.name for p in folder.iterdir()} == RUNS.keys()
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 4_000_000


@pytest.mark.parametrize("family", RUNS)
def test_an_example_is_as_good_as_its_run(family, held_out):
    images, labels, names = held_out
    path, about = RUNS[family] / "best.safetensors", read_about(RUNS[family])
    assert {v.dtype for v in load_file(path).values()} == {torch.float16}
    model = create_model(f"tiny_{family}", checkpoint=path, num_classes=5, img_size=128).eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(100)])
    best = max(row["val_top1"] for row in read_log(RUNS[family]))
    assert abs(100 * (logits.argmax(1) == labels).double().mean() - best) <= 0.5
    assert (about["img_size"], about["class_names"], about["settings"]["model"]) == (128, names, f"tiny_{family}")


@pytest.mark.parametrize("family", RUNS)
def test_an_example_has_all_its_snapshots(family, held_out):
    shots, log = read_snapshots(RUNS[family]), read_log(RUNS[family])
    assert shots.epochs == [row["epoch"]
                            for row in log] == list(range(1, read_about(RUNS[family])["settings"]["total_epochs"] + 1))
    assert shots.pictures.shape == (8, 96, 96, 3) and shots.labels.tolist() == held_out[1][:8].tolist()
    assert shots.probabilities.sum(-1).sub(1).abs().max() < 2e-3 and len(shots.probabilities.unique(dim=0)) == len(log)


# --- experiments.kept_runs ---

def make(*args):
    done = subprocess.run([sys.executable, "-m", "metaformer_edu.experiments.kept_runs", *map(str, args)],
                          capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": "/"})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def copy(folder, family="caformer", **changes):
    "A run as it was before it became an example."
    (folder / "snapshots").mkdir(parents=True)
    for path in RUNS[family].rglob("*.*"):
        (folder / path.relative_to(RUNS[family])).write_bytes(path.read_bytes())
    model = create_model(f"tiny_{family}", checkpoint=RUNS[family] / "best.safetensors", num_classes=5, img_size=128)
    save_weights(model, folder / "best.safetensors")
    return folder


def test_the_command_makes_an_example(tmp_path):
    run = copy(tmp_path / "run")
    status, out, err = make("examples", run, "--out", tmp_path / "out")
    assert (status, err) == (0, "") and "bytes in all" in out
    made = tmp_path / "out/caformer"
    assert sorted(p.relative_to(made)
                  for p in made.rglob("*.*")) == sorted(p.relative_to(RUNS["caformer"])
                                                        for p in RUNS["caformer"].rglob("*.*"))
    a, b = (load_file(f / "best.safetensors") for f in (made, RUNS["caformer"]))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_makes_no_example(tmp_path):
    status, _, err = make("examples", tmp_path, "--out", tmp_path / "out")
    assert status and "is no folder of a run that metaformer-train wrote" in err
    run = copy(tmp_path / "run")
    last = max((run / "snapshots").glob("epoch-*"))
    last.unlink()
    status, _, err = make("examples", run, "--out", tmp_path / "out")
    assert status and "is not finished, or has no snapshot of some epochs" in err and not (tmp_path / "out").exists()


def test_a_kept_log_says_how_it_was_made(capsys):
    main(["logs", str(RUNS["caformer"]), str(RUNS["convformer"])])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    log, about = read_log(RUNS["caformer"]), read_about(RUNS["caformer"])
    assert len(rows) == len(log) + len(read_log(RUNS["convformer"]))
    assert list(rows[0])[:3] == ["command", "seed", "torch"]
    assert rows[0]["command"] == about["command"] and rows[0]["torch"] == about["versions"]["torch"]
    assert [float(r["val_top1"]) for r in rows[:len(log)]] == pytest.approx([r["val_top1"] for r in log])


def test_explanations_of_a_run_are_measured(tmp_path, capsys, monkeypatch):
    few = {name: METHODS[name] for name in ("gradcam", "eigencam")}  # all methods take more than a minute
    monkeypatch.setattr(kept_runs, "METHODS", few)
    run = copy(tmp_path / "run")
    (run / "last.safetensors").write_bytes((run / "best.safetensors").read_bytes())
    main(["faithfulness", str(run), "-n", "10", "--few", "2"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["method"], r["stage"]) for r in rows] == [
        ("blind map", ""), *((m, str(s)) for m in few for s in (1, 2, 3, 4))]
    assert list(rows[0]) == list(read_log(ROOT / "metaformer_edu/logs/trust.csv")[0])
    for method in few:
        chosen, = (r for r in rows if r["method"] == method and r["chosen"] == "1")
        assert all(-1 <= float(chosen[k]) <= 1 for k in ("other", "shuffled", "deletion", "insertion"))
    assert all(0 <= float(r[k]) <= 100 for r in rows for k in ("pointing", "near", "inside"))
