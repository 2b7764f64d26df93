"""The folder of a run: files that are whole or not there, states to go on from, what is best, tables, TensorBoard."""
import builtins
import errno
import math
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from metaformer_edu.core.files import read_log, write_atomically
from metaformer_edu.training import run_folder
from metaformer_edu.training.callbacks import TensorBoard
from metaformer_edu.training.run_folder import (
    RunFolder, _SAME_RESULT, _SPEED_COLUMNS, _newest_run, _newest_state, _read_settings, _read_state, _save_state,
    differences, new_folder)
from metaformer_edu.training.trainer import draw_curves

pytestmark = pytest.mark.usefixtures("one_thread")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- whole files ---

def test_a_file_is_written_whole(tmp_path):
    path, seen = tmp_path / "a.txt", []
    path.write_text("old")

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append((path.read_text(), len(names(tmp_path))))
    write_atomically(path, write)
    assert seen == [("old", 2)] and path.read_text() == "new" and names(tmp_path) == ["a.txt"]


class Asked(Exception):
    "As a signal that comes in the middle of writing."


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file data/0"), ValueError("odd"),
                                   TypeError("cannot pickle"), Asked(), KeyboardInterrupt(), MemoryError()],
                                   ids=lambda e: type(e).__name__)
def test_a_file_that_fails_leaves_nothing(error, tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("old")

    def write(file):
        file.write(b"half a fi")
        raise error
    with pytest.raises(OSError if isinstance(error, (OSError, RuntimeError)) else type(error)):
        write_atomically(path, write)
    assert names(tmp_path) == ["a.pt"] and path.read_text() == "old"


def test_a_file_that_fails_says_which_and_why(tmp_path):
    def full(file):
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed")  # as PyTorch hides it
    with pytest.raises(OSError, match="Disk quota exceeded") as caught:
        write_atomically(tmp_path / "a.pt", full)
    assert caught.value.errno == errno.EDQUOT and caught.value.filename == str(tmp_path / "a.pt")
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "no" / "folder.pt", lambda file: None)
    assert caught.value.errno == errno.ENOENT


def test_an_error_that_has_nothing_to_do_with_the_disk_does_not_blame_it(tmp_path):
    def fail(file):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")  # a RuntimeError
    with pytest.raises(Exception) as caught:
        write_atomically(tmp_path / "a.pt", fail)
    assert "disk" not in str(caught.value) and "out of memory" in str(caught.value)


# --- states ---

def test_a_state_comes_back_as_it_was(tmp_path):
    state = dict(updates=3, log=[dict(epoch=1, val_loss=0.5)], weights=torch.randn(5), sums=[[1 / 3, 0.]])
    path = _save_state(state, tmp_path, 3)
    back = _read_state(path)
    assert path.name == "state-00000003.pt" and torch.equal(back.pop("weights"), state.pop("weights")) and back == state


def test_two_states_are_kept(tmp_path):
    for n in (9, 10, 99, 100, 101):
        _save_state(dict(updates=n), tmp_path, n)
    assert names(tmp_path) == ["state-00000100.pt", "state-00000101.pt"] and _newest_state(tmp_path)["updates"] == 101


def test_the_state_that_was_just_written_is_kept_and_is_the_newest(tmp_path):
    "Whoever goes back to an earlier state, with other settings perhaps, leaves the later ones behind."
    for n in (10, 20, 30):
        _save_state(dict(updates=n, lr=1), tmp_path, n)
    for n in (25, 26):  # from 20 on
        path = _save_state(dict(updates=n, lr=2), tmp_path, n)
        assert path.exists(), "the state that was just written is gone"
    assert _newest_state(tmp_path) == dict(updates=26, lr=2)


@pytest.mark.parametrize("damage", [b"", b"not a state", None])
def test_a_damaged_state_is_named_and_left_out(damage, tmp_path, capsys):
    for n in (1, 2):
        last = _save_state(dict(updates=n, weights=torch.zeros(1000)), tmp_path, n)
    last.write_bytes(last.read_bytes()[:1500] if damage is None else damage)  # None: cut off
    assert _newest_state(tmp_path)["updates"] == 1
    said = capsys.readouterr().err
    assert said == f"Cannot go on from {last}: it is damaged or no state of a run. The one before it is tried.\n"
    (tmp_path / "state-00000001.pt").write_bytes(b"")
    assert _newest_state(tmp_path) is None and capsys.readouterr().err.count("\n") == 2


def test_no_state(tmp_path):
    assert _newest_state(tmp_path) is None and _newest_state(tmp_path / "gone") is None
    (tmp_path / "state-00000001.pt.unfinished").write_text("half")
    assert _newest_state(tmp_path) is None


@pytest.mark.parametrize("same", [True, False])
def test_a_process_reads_the_state_only_if_all_see_the_same_file(same, tmp_path, monkeypatch):
    path = _save_state(dict(updates=1, of="file"), tmp_path, 1)
    digest = run_folder._digest(path) if same else "of another file"
    asked = []
    monkeypatch.setattr(run_folder, "any_rank", lambda flag: asked.append(flag) or flag)
    monkeypatch.setattr(run_folder, "broadcast_object", lambda mine: dict(updates=1, of="rank 0"))
    assert run_folder._shared_state(None, path, digest)["of"] == ("file" if same else "rank 0")
    assert asked == [not same] and run_folder._digest(tmp_path / "gone") == ""


def test_what_is_no_state(tmp_path):
    torch.save(dict(weight=torch.zeros(1)), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth: it holds weights, perhaps, but no state of a run"):
        _read_state(tmp_path / "weights.pth")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state of a run"):
        _read_state(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError):
        _read_state(tmp_path / "gone.pt")


class Trap:
    def __reduce__(self):
        return builtins.print, ("this ran",)


def test_a_state_runs_no_code(tmp_path, capsys):
    torch.save(dict(updates=1, trap=Trap()), tmp_path / "state-00000001.pt")
    with pytest.raises(ValueError, match="damaged or no state"):
        _read_state(tmp_path / "state-00000001.pt")
    assert "this ran" not in capsys.readouterr().out


# --- folders and settings ---

def test_new_folders_count_on(tmp_path):
    assert [new_folder(tmp_path / "new", "a").name for _ in range(3)] == ["a", "a-2", "a-3"]
    assert new_folder(str(tmp_path / "new"), "b").name == "b"


def test_a_folder_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_folder("~/runs", "a") == tmp_path / "runs" / "a"


def test_differences_that_matter():
    a = dict(lr=0.002, scale=[0.08, 1.], workers=2, output="x", model_ema=False)
    assert differences(a, dict(a)) == [] and differences(a, a | {k: "other" for k in _SAME_RESULT}) == []
    assert differences(a, a | dict(lr=0.004, model_ema=True)) == ["lr 0.002 → 0.004", "model_ema False → True"]
    assert differences(a, a | dict(new=1)) == ["new None → 1"] and differences(a | dict(old=1), a) == ["old 1 → None"]
    assert differences(a, a | dict(bce_loss=False, kd_temperature=4.)) == []  # younger than the run, at their defaults
    assert differences(a, a | dict(bce_loss=True)) == ["bce_loss False → True"]


def test_settings_come_back(tmp_path):
    settings = dict(model="tiny_convformer", data="données", lr=1e-6, scale=[0.08, 1.], ratio=[3 / 4, 4 / 3],
                    opt_betas=None, sched="None",
                    aa="none", model_ema=True, epochs=30, experiment="no", threads=None, min_lr=1e-5)
    RunFolder(tmp_path, settings).write_args(["metaformer-train", "--experiment", "two words", "--lr", "1e-6"])
    assert _read_settings(tmp_path) == settings and differences(_read_settings(tmp_path), settings) == []
    about = yaml.safe_load((tmp_path / "args.yaml").read_text(encoding="utf-8"))
    assert about["command"] == "metaformer-train --experiment 'two words' --lr 1e-6"
    assert about["versions"]["torch"] == torch.__version__ and {
    "python", "timm", "metaformer_edu"} <= about["versions"].keys()


@pytest.mark.parametrize("text", [None, "", "[1, 2]", "a: [", "\x00"])
def test_settings_that_cannot_be_read_are_empty(text, tmp_path):
    if text is not None:
        (tmp_path / "args.yaml").write_text(text)
    assert _read_settings(tmp_path) == {}
    assert _newest_run(tmp_path.parent, tmp_path.name, dict(lr=1)) is None


def test_the_newest_run_with_the_same_settings(tmp_path):
    settings = dict(lr=1, workers=0)
    assert _newest_run(tmp_path, "a", settings) is None
    for lr in (1, 2, 1, 2):
        RunFolder(new_folder(tmp_path, "a"), dict(lr=lr, workers=5)).write_args([])
    new_folder(tmp_path, "a")  # without settings
    assert _newest_run(tmp_path, "a", settings).name == "a-3" and _newest_run(tmp_path, "a", dict(lr=2)).name == "a-4"
    assert _newest_run(tmp_path, "a", dict(lr=3)) is None and _newest_run(tmp_path, "b", settings) is None


# --- what is kept ---

def row(epoch, **kwargs):
    return dict(epoch=epoch, lr=0.1, train_loss=1., val_loss=1., val_top1=50.,
                seconds=1., images_per_s=9., waiting=0.1, bad_steps=0) | kwargs


BEST = {  # settings, metric -> (column, its values, the best epoch)
    "top1": ({}, "val_top1", [80., 95., 95., 90.], 2), "loss": ({}, "val_loss", [1., 0.5, 0.5, 0.7], 2),
    "average top1": (dict(model_ema=True), "ema_top1", [80., 70., 85., 85.], 3),
    "average loss": (dict(model_ema=True), "ema_loss", [3., 2., 1., 1.], 3),
}


@pytest.mark.parametrize("what", BEST)
def test_the_best_is_the_first_of_the_best(what, tmp_path):
    settings, column, values, best = BEST[what]
    metric = column.partition("_")[2]
    others = {k: 60. + e for e, k in enumerate(("val_top1", "val_loss", "ema_top1", "ema_loss"))}
    log = [row(e, **others | {column: v}) for e, v in enumerate(values, 1)]
    run, model = RunFolder(tmp_path, settings, metric), nn.Linear(1, 1)
    for r in log:
        nn.init.constant_(model.weight, r["epoch"])
        run.save_epoch(r, model)
    assert run.best["epoch"] == best and run.last["epoch"] == 4 and run.column == column
    assert [load_file(tmp_path / f"{n}.safetensors")["weight"].item() for n in ("best", "last")] == [best, 4]
    assert names(tmp_path) == ["best.safetensors", "last.safetensors"]
    again = RunFolder(tmp_path, settings, metric)
    again.restore(log)
    assert (again.best, again.last) == (run.best, run.last)
    again.save_epoch(row(5, **others | {column: values[best - 1]}), model)  # as good, and later
    assert again.best["epoch"] == best


@pytest.mark.parametrize("before", [True, False])
def test_an_average_that_comes_or_goes_in_the_middle(before, tmp_path):
    "A run may go on with other settings: with --model-ema, or without."
    averaged = dict(ema_top1=70., ema_loss=1.)
    log = [row(1, **averaged if before else {}), row(2, **averaged if before else {})]
    run = RunFolder(tmp_path, dict(model_ema=not before))
    run.restore(log)
    log.append(row(3, **{} if before else averaged))
    run.save_epoch(log[-1], nn.Linear(1, 1))
    run.write_log(log)
    assert len(read_log(tmp_path)) == 3 and draw_curves(read_log(tmp_path))


def test_the_seed_decides_one_table_and_the_machine_the_other(tmp_path):
    log = [row(1), row(2, val_top1=60.25, bad_steps=3, train_loss=math.nan)]
    RunFolder(tmp_path, {}).write_log(log)
    assert (tmp_path / "summary.csv").read_text() == ("epoch,lr,train_loss,val_loss,val_top1,bad_steps\n"
                                                      "1,0.1,1.0,1.0,50.0,0\n"
                                                      "2,0.1,nan,1.0,60.25,3\n")
    assert (tmp_path / "speed.csv").read_text() == "epoch,seconds,images_per_s,waiting\n1,1.0,9.0,0.1\n2,1.0,9.0,0.1\n"
    assert names(tmp_path) == ["speed.csv", "summary.csv"]
    back = read_log(tmp_path)
    assert back[0] == {k: v for k, v in log[0].items() if k not in _SPEED_COLUMNS} and isinstance(back[0]["epoch"], int)
    assert read_log(tmp_path / "summary.csv")[1]["val_top1"] == 60.25 and math.isnan(back[1]["train_loss"])


def test_what_a_run_leaves(tmp_path):
    run = RunFolder(tmp_path, {})
    assert run.contents() == f"{tmp_path} holds only settings."
    _save_state(dict(updates=1), tmp_path, 1)
    assert run.contents() == f"{tmp_path} holds only settings; the same command with --resume auto goes on."
    run.restore([row(1), row(2)])
    assert (
        run.contents() == f"{tmp_path} holds last.safetensors of epoch 2; the same command with --resume auto goes on."
    )


# --- TensorBoard ---

def test_tensorboard_gets_what_the_table_gets(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    class Trained:
        log = []
    board = TensorBoard(tmp_path)
    for r in (row(1), row(2, val_top1=75.)):
        Trained.log.append(r)
        board.after_epoch(Trained)
    board.after_fit(Trained)  # what is written is not written again
    board.cleanup(Trained)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/top1")] == [(1, 50.), (2, 75.)]
    assert {"lr", "train/loss", "val/loss", "val/top1"} <= set(events.Tags()["scalars"])


def test_without_tensorboard_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    RunFolder(tmp_path, {}).write_log([row(1)])
    board = TensorBoard(tmp_path)
    board.cleanup(None)
    with pytest.raises(ImportError):  # only where there is something to write
        board.after_epoch(type("Trained", (), dict(log=[row(1)])))
