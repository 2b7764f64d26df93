"""explore_training: what is opened and drawn, that each control changes the picture and the words, what there is to
try, what goes wrong."""
import math

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from metaformer_edu.core.files import as_csv
from metaformer_edu.interpret.snapshots import as_bytes, read_snapshots
from metaformer_edu.widgets.training_explorer import (
    METRICS, correct_answers, count_forgotten, draw_progress, epoch_facts, explore_training, first_perfect_epoch,
    largest_gap_epoch, map_overlays, open_runs, path_name, run_styles, strip_pictures, view_progress)

CLASSES = ["disc", "ring", "square"]


def log_of(epochs, top1=50., **more):
    return [dict(epoch=e, lr=1e-3 / e if e > 1 else 1e-4, train_loss=2 / e, val_loss=1.8 / e, val_top1=top1 + e,
                 bad_steps=0, **more) for e in range(1, epochs + 1)]


def make_run(folder, epochs=4, top1=50., right=(0, 2, 1, 4), shots=True, n=4, names=CLASSES, **more):
    "A folder as metaformer-train leaves it; of `n` pictures, so many are right after each epoch."
    (folder / "snapshots").mkdir(parents=True)
    log = log_of(epochs, top1, **more)
    (folder / "summary.csv").write_text(as_csv(log, list(log[0])))
    (folder / "args.yaml").write_text(yaml.safe_dump(dict(settings=dict(model="tiny_caformer"), class_names=names)))
    labels = torch.arange(n) % 3
    if shots:
        rng = np.random.default_rng(0)
        (folder / "snapshots/pictures.safetensors").write_bytes(
            as_bytes(
                pictures=torch.from_numpy(rng.integers(256, size=(n, 16, 16, 3), dtype=np.uint8)),
                labels=labels,
                index=torch.arange(n),
            )
        )
        for epoch in range(1, epochs + 1):
            guess = torch.where(torch.arange(n) < right[(epoch - 1) % len(right)], labels, (labels + 1) % 3)
            probabilities = torch.full((n, 3), 0.1).scatter(1, guess[:, None], 0.8)
            (folder / f"snapshots/epoch-{epoch:04}.safetensors").write_bytes(
                as_bytes(
                    probabilities=probabilities.half(),
                    maps=torch.from_numpy(rng.integers(256, size=(n, 4, 4), dtype=np.uint8)),
                )
            )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "first", ema_loss=0.5, ema_top1=60.)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "second", epochs=7, top1=30., right=(1, 3))


def change(explorer, **values):
    "Set controls; (whether the picture is another, whether the words are)."
    before = explorer.value, explorer.words
    for name, value in values.items():
        explorer[name].value = value
    assert explorer.wait()
    return explorer.value != before[0], explorer.words != before[1]


# --- opening ---

def test_a_run_is_opened(run):
    name, = opened = open_runs(run)
    assert (
        name == "first"
        and opened[name].log == log_of(4, ema_loss=0.5, ema_top1=60.0)
        and opened[name].class_names == CLASSES
    )
    assert opened[name].shots.epochs == [1, 2, 3, 4] and opened[name].missing == ""


@pytest.mark.parametrize("how", ["text", "list", "names", "csv", "log", "logs", "dict of logs"])
def test_ways_to_name_runs(how, run, other):
    log = log_of(3)
    given = dict(text=str(run), list=[run, str(other)], names={"a": run, "b": log, 3: other / "summary.csv"},
                 csv=run / "summary.csv", log=log, logs=[log, log], **{"dict of logs": {"x": log}})[how]
    expected = dict(text=["first"], list=["first", "second"], names=["a", "b", "3"], csv=["first"], log=["run"],
                    logs=["run", "run (2)"], **{"dict of logs": ["x"]})[how]
    opened = open_runs(given)
    assert list(opened) == expected
    assert [o.shots is not None for o in opened.values()] == dict(
        text=[True], list=[True, True], names=[True, False, False]
    ).get(how, [False] * len(opened))


def test_runs_of_one_name(run, tmp_path):
    again = make_run(tmp_path / "first"), make_run(tmp_path / "x" / "first")
    assert list(open_runs([run, *again])) == ["first", "first (2)", "first (3)"]


def test_a_name_in_a_relative_path(run, monkeypatch):
    monkeypatch.chdir(run)
    assert path_name(".") == path_name("summary.csv") == "first"


@pytest.mark.parametrize("bad, words",
                         [("gone", "There is no log of a run in gone: give a folder"), ([], "Give at least one run"),
                          ({}, "Give at least one run"), (3, "Give folders of runs or logs, not a value of type int"),
                          ([3], "The run 'run' is of type int"), ({"x": 7}, "The run 'x' is of type int"),
                                        ({"x": []}, "The log of 'x' has no epoch"),
                          ({"x": [1, 2]}, "The log of 'x' has no epoch"),
                          ([{"loss": 1}], "The log of 'run' has no epoch"),
                          ({"x": [dict(epoch="one")]}, "has no epoch")])
def test_what_is_no_run(bad, words):
    with pytest.raises(ValueError, match=words) as caught:
        explore_training(bad)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_log(tmp_path):
    (tmp_path / "summary.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="There is no log of a run in"):
        open_runs(tmp_path)
    (tmp_path / "summary.csv").write_text("")
    with pytest.raises(ValueError, match="has no epoch: a run writes its summary.csv after the first"):
        open_runs(tmp_path)


# --- the picture ---

def texts(figure):
    return [t.get_text() for ax in figure.axes for t in ax.texts] + [t.get_text() for t in figure.texts]


def test_what_is_drawn(run, other):
    opened = open_runs([run, other])
    logs, one = {name: o.log for name, o in opened.items()}, opened["first"]
    figure = draw_progress(logs, "loss", 2, one.shots, one.class_names, "first, $2$")
    curves, strip = figure.axes
    assert isinstance(figure, Figure) and not hasattr(figure, "_pyplot")
    lines = {(line.get_linestyle(), line.get_color(), line.get_marker()): line
             for line in curves.lines if len(line.get_xdata()) > 2}
    how = run_styles(logs)
    assert set(lines) == {(dashes, *how[name]) for name, some in (("first", "--:"), ("second", "--"))
                          for dashes in {"--", "-", *some.replace("-", "")}}
    assert lines[("-", *how["second"])].get_ydata() == pytest.approx([1.8 / e for e in range(1, 8)])
    assert [line.get_xdata() for line in curves.lines if list(line.get_xdata()) == [2, 2]]  # where the epoch is
    said = texts(figure)
    assert {"first", "second", "0.900", "validation, epoch 2", "first, $2$"} <= set(said)
    assert (
        [t for t in said if "%" in t] == ["80% ✓", "80% ✓", "80% ✗", "80% ✗"]
        and said.count("is square") == 1
        and said.count("is disc") == 1
    )
    dashed = [p.get_linestyle() not in ("-", "solid") for p in strip.patches]
    assert dashed == [False, False, True, True] and len(strip.images) == 2  # a row under their maps, and one in colour


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(metric, run):
    log = open_runs(run)["first"].log
    curves, = draw_progress({"first": log}, metric).axes
    columns = [[row[k] for row in log] for k in METRICS[metric][1]]
    assert [list(line.get_ydata()) for line in curves.lines if len(line.get_xdata()) == 4] == columns
    assert curves.get_ylabel() == METRICS[metric][0] and curves.get_ylim()[0] == 0


def test_maps_are_laid_over_their_pictures(run):
    shots = read_snapshots(run)
    shots.maps[1, 0], shots.maps[1, 1] = 0, 255
    grey, coloured, *_ = map_overlays(strip_pictures(shots), shots.maps[1])
    expected = shots.pictures[0].double() / 255 @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.double)
    assert np.abs(grey - expected.numpy()[..., None]).max() < 1e-6 and np.ptp(grey, axis=-1).max() < 1e-6
    assert (coloured[..., 0] > coloured[..., 2]).all()  # viridis is yellow at its end


@pytest.mark.parametrize("side, drawn",
                         [((16, 16), (16, 16)), ((80, 80), (80, 80)), ((160, 160), (80, 80)), ((160, 100), (80, 50)),
                          ((400, 2), (80, 1))])
def test_pictures_are_no_larger_than_they_are_drawn(side, drawn, run):
    shots = read_snapshots(run)
    shots.pictures = torch.from_numpy(np.random.default_rng(0).integers(256, size=(4, *side, 3), dtype=np.uint8))
    small, all_ = strip_pictures(shots), shots.pictures / 255
    assert small.shape == (4, *drawn, 3) and torch.allclose(small.mean((1, 2)), all_.mean((1, 2)), atol=1e-5)
    assert side != drawn or torch.equal(small, all_)


def test_many_pictures_and_many_runs(tmp_path):
    run = make_run(tmp_path / "many", n=30)
    logs = {f"run {i}": log_of(3) for i in range(12)}
    figure = draw_progress(logs, "top-1", 2, read_snapshots(run), CLASSES)
    assert len(figure.axes[1].images) == 2 * 3 and len(figure.axes[1].patches) == 24 and "and 4 more" in texts(figure)
    assert "and 4 more" in view_progress(open_runs(logs), run_styles(logs), "loss", list(logs), "run 0", 1).words


@pytest.mark.parametrize("arguments, words",
                         [(dict(logs={}), "Choose at least one run"), (dict(metric="lost"), "no curve 'lost'.*'loss'")])
def test_what_cannot_be_drawn(arguments, words):
    with pytest.raises(ValueError, match=words):
        draw_progress(**{"logs": {"a": log_of(2)}, **arguments})


def test_an_epoch_without_snapshot_has_curves_alone(run):
    shots = read_snapshots(run)
    shots.epochs = [1, 2, 3, 9]
    assert len(draw_progress({"a": log_of(4)}, epoch=4, snapshots=shots).axes) == 1
    opened = open_runs(run)
    opened["first"].shots.epochs = [1, 2, 3, 9]
    assert "first: there is no snapshot of epoch 4." in view_progress(opened, run_styles(opened), "loss", ["first"],
                                                                      "first", 4).words


# --- the explorer ---

def test_it_opens_computed(run, other):
    explorer = explore_training([run, other])
    assert explorer.value.startswith("<svg") and "second" in explorer.words and explorer["run"].value == "second"
    assert (explorer["epoch"].min, explorer["epoch"].max) == (1, 7) and list(explorer["runs"].value) == [
        "first",
        "second",
    ]
    assert all(control.description for control in explorer.controls.values())


def test_each_control_changes_picture_and_words(run, other):
    explorer = explore_training([run, other])
    for name, value in dict(metric="rate", epoch=5, runs=("first",), run="first").items():
        assert change(explorer, **{name: value}) == (True, True), name
    assert change(explorer, metric="loss", epoch=2) == (True, True)
    assert (
        explorer.words
        == "After epoch 2, validation loss: first 0.900. first answers 2 of 4 pictures right; wrong: square taken for "
           "disc, disc taken for ring."
    )


def test_the_slider_follows_the_run(run, other):
    explorer = explore_training([run, other])
    change(explorer, epoch=7)
    change(explorer, run="first")
    assert (explorer["epoch"].value, explorer["epoch"].min, explorer["epoch"].max) == (
        4,
        1,
        4,
    ) and "After epoch 4" in explorer.words
    change(explorer, run="second")
    assert explorer["epoch"].max == 7


def test_runs_of_epochs_that_do_not_meet(run):
    later = [{**row, "epoch": row["epoch"] + 20} for row in log_of(3)]
    explorer = explore_training({"early": run, "late": later})
    for name, ends in (("late", (21, 23)), ("early", (1, 4)), ("late", (21, 23))):
        change(explorer, run=name)
        assert (explorer["epoch"].min, explorer["epoch"].max) == ends and ends[0] <= explorer["epoch"].value <= ends[1]
        assert f"{name} none" not in explorer.words
    assert largest_gap_epoch([o.log for o in open_runs({"early": run, "late": later}).values()]) is None


def test_no_run_chosen_keeps_the_picture(run):
    explorer = explore_training(run)
    assert change(explorer, runs=()) == (False, True) and explorer.words.startswith("Choose at least one run")
    assert change(explorer, runs=("first",))[1]


def test_runs_without_snapshots(tmp_path, run):
    bare = make_run(tmp_path / "bare", shots=False)
    explorer = explore_training([bare, run])
    assert explorer["run"].value == "first"
    change(explorer, run="bare")
    assert (
        "bare: There are no snapshots in" in explorer.words
        and "--snapshots 8" in explorer.words
        and len(explorer.figure().axes) == 1
    )
    (run_ := make_run(tmp_path / "torn") / "snapshots/epoch-0002.safetensors").write_bytes(b"torn")
    assert "Cannot read" in explore_training(run_.parent.parent).words
    assert "it is a log alone, without pictures." in explore_training(bare / "summary.csv").words


def test_a_run_of_one_epoch(tmp_path):
    explorer = explore_training(make_run(tmp_path / "short", epochs=1))
    assert (
        explorer["epoch"].min == explorer["epoch"].max == 1 and "After epoch 1, top-1: short 51.0 %." in explorer.words
    )
    assert change(explorer, metric="rate")[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "", "text"])
def test_what_is_no_number_leaves_a_gap(value):
    log = log_of(4)
    log[1].update(val_loss=value, train_loss=value, val_top1=value, lr=value)
    for metric in METRICS:
        explorer = explore_training({"a": log})
        change(explorer, metric=metric, epoch=2)
        assert "a none" in explorer.words and "could not" not in explorer.words
        lines = [line for line in explorer.figure().axes[0].lines if len(line.get_xdata()) == 4]
        assert lines and all(np.isnan(line.get_ydata()).tolist() == [False, True, False, False] for line in lines)


def test_nothing_but_gaps():
    explorer = explore_training({"a": [dict(epoch=1, val_loss=math.nan), dict(epoch=2)]})
    for metric in METRICS:
        change(explorer, metric=metric)
        assert "a none" in explorer.words and "could not" not in explorer.words


def test_names_with_special_characters(tmp_path):
    names = ["_hidden", "$x^2$", "<b>&amp;", "läuft (2)", "a" * 60, "\\frac{", "50 %"]
    run = make_run(tmp_path / "$run_<1>$", names=["$a_b", "<i>", "&"])
    explorer = explore_training({**{name: log_of(2) for name in names}, "pictures": run})
    assert "&lt;b&gt;&amp;amp;" in explorer.value and "$x^2$" in explorer.value and "_hidden" in explorer.value
    for name in names:
        change(explorer, run=name, runs=(name,))
        assert name in explorer.words and "could not" not in explorer.words
    change(explorer, run="pictures", epoch=1)
    assert "$a_b" in explorer.value and "&lt;i&gt;" in explorer.value


# --- what there is to try ---

def test_facts(run):
    one = open_runs(run)["first"]
    assert correct_answers(one.shots).sum(1).tolist() == [0, 2, 1, 4]
    assert first_perfect_epoch(one) == 4 and [count_forgotten(one, e) for e in range(1, 5)] == [0, 0, 1, 0]
    assert largest_gap_epoch([log_of(4, 50), [dict(row, val_top1=0) for row in log_of(9)]]) == 4


def test_tries_are_ticked(run, other):
    explorer = explore_training([run, other])
    sentences = [sentence for sentence, _ in explorer.picture.tries]
    assert (
        sentences[0] == "Find the first epoch after which first answers all 4 pictures right."
        and len(sentences) == 3
        and explorer.done == [False] * 3
    )
    change(explorer, run="first", epoch=2)
    assert explorer.done == [False] * 3
    change(explorer, epoch=3)
    assert explorer.done == [False, True, False]
    change(explorer, epoch=4)
    assert explorer.done == [True, True, False]
    change(explorer, metric="top-1", epoch=1)
    assert explorer.done == [True, True, True]  # 20 points in every epoch: the first


def test_it_opens_where_nothing_is_ticked(tmp_path):
    explorer = explore_training()
    assert explorer["epoch"].value == 5 and explorer["run"].value == "caformer" and explorer.done == [False] * 3
    forgetful = make_run(tmp_path / "forgetful", epochs=6, right=(3, 2, 1, 2, 1, 0))
    # of six, only 1 and 4 forget nothing; 1 is where two runs are farthest apart
    explorer = explore_training([make_run(tmp_path / "plain", right=(0, 1, 2, 3)), forgetful])
    assert explorer["epoch"].value == 4 and explorer["run"].value == "forgetful" and not any(explorer.done)
    # right from the first epoch on
    assert explore_training(make_run(tmp_path / "never", epochs=2, right=(4,)))["epoch"].value == 2


def test_it_opens_also_where_every_epoch_is_an_answer(tmp_path):
    assert explore_training(make_run(tmp_path / "one", epochs=1, right=(4,)))["epoch"].value == 1
    assert explore_training({"a": [dict(epoch=1), dict(epoch=10**9)]})["epoch"].value == 1


def test_facts_of_an_epoch(run, other):
    opened = open_runs([run, other])
    assert epoch_facts(opened, ["first", "second"], "first", 3) == dict(first=4, forgotten=1, apart=1, highest=2)
    assert epoch_facts(opened, ["first"], "second", 1) == dict(first=None, forgotten=0, apart=None, highest=2)


def test_only_what_can_be_found_is_asked_for():
    explorer = explore_training({"a": log_of(3)})
    assert [sentence for sentence, _ in explorer.picture.tries] == [
        "Draw the rate, and find the epoch in which it is highest."
    ]
    change(explorer, epoch=2)
    assert explorer.done == [False]  # the rate is highest here, but it is not drawn
    change(explorer, epoch=3)
    change(explorer, metric="rate")
    assert explorer.done == [False]
    change(explorer, epoch=2)
    assert explorer.done == [True]
