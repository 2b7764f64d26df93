"""Experiments: the same seed gives the same run, runs go on where they were, and a wrong word is one sentence."""
import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch

from metaformer_edu.commands import experiment
from metaformer_edu.data.public import PUBLIC, PublicImages
from metaformer_edu.data.shapes import TASKS
from metaformer_edu.experiments import arms as ex, compare as co
from metaformer_edu.experiments.arms import Arm, Budget, Experiment, get_experiment, run_experiment
from metaformer_edu.experiments.compare import own_results, permutation_test, read_results
from test_public import lay_out_clothes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Budget(pictures=64, looks=2)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    "A few digits in place of thousands of pictures."
    g = torch.Generator().manual_seed(0)
    sets = [torch.utils.data.TensorDataset(torch.randn(n, 3, 64, 64, generator=g), torch.arange(n) % 2)
            for n in (64, 20)]
    monkeypatch.setattr(ex, "_load_task", lambda task, img_size=64: sets)


def two():
    return Experiment("?", [Arm("texture", name, dict(token_mixers=name)) for name in ("Identity", "Pooling")], seeds=2,
                      budget=SMALL)


def test_a_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "r.csv"
    whole = run_experiment(two(), progress=False)
    part = run_experiment(two(), 1, path, progress=False)
    assert len(part) == 2 and len(whole) == 4
    before = path.read_text()
    both = run_experiment(two(), 2, path, progress=False)
    assert path.read_text().startswith(before)
    assert both == whole
    trained = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(ex, "_train_and_measure", lambda *a, **k: trained.append(a))
    assert run_experiment(two(), 2, path, progress=False) == both and not trained
    monkey.undo()


def test_what_ended_before_a_failure_is_kept(tmp_path, monkeypatch):
    path, real = tmp_path / "r.csv", ex._train_and_measure

    def once(arm, *args, **kwargs):
        if arm.name == "Pooling":
            raise RuntimeError("cut off")
        return real(arm, *args, **kwargs)
    monkeypatch.setattr(ex, "_train_and_measure", once)
    with pytest.raises(RuntimeError, match="cut off"):
        run_experiment(two(), 1, path, progress=False)
    assert [r["name"] for r in read_results(path)] == ["Identity"]


def test_the_seed_decides_and_nothing_else():
    arm = Arm("texture", "random", dict(token_mixers="RandomMixing"))
    def learned(seed):
        model, log = ex.train_arm(arm, seed, SMALL)
        return model, [(r["train_loss"], r["val_loss"], r["val_top1"]) for r in log]
    (a, one), (b, same), (c, other) = map(learned, (3, 3, 4))
    assert one == same and one != other
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(x, y), key
    torch.rand(5)  # the dice of the caller do not count
    assert learned(3)[1] == one


def test_another_budget_is_refused(tmp_path):
    path = tmp_path / "r.csv"
    run_experiment(two(), 1, path, progress=False)
    for other in (Budget(pictures=96, looks=2), Budget(pictures=64, looks=2, lr=2e-3)):
        with pytest.raises(ValueError, match="holds runs of 64 pictures at the rate 0.001: choose another file"):
            run_experiment(dataclasses.replace(two(), budget=other), 1, path, progress=False)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="does not hold results"):
        read_results(path)


@pytest.mark.parametrize("a, b, share",
                         [([1, 2, 3], [4, 5, 6], 0.1), ([1], [2], 1), ([1, 1], [1, 1], 1),
                          ([0.1, 0.2], [0.3, 0.4], 1 / 3)])
def test_permutation_test(a, b, share):
    assert permutation_test(a, b) == pytest.approx(share)
    assert permutation_test(b, a) == pytest.approx(share)


def test_chance_of_equal_groups_is_fair():
    "Under no difference, a share of at most p comes in at most a part p of all deals."
    values = [3, 1, 4, 1.5, 9, 2.6]
    shares = [permutation_test(one, [v for v in values if v not in one]) for one in itertools.combinations(values, 3)]
    assert sum(s <= 0.2 for s in shares) / len(shares) <= 0.2


@pytest.mark.parametrize("name", list(ex.EXPERIMENTS))
def test_arms_can_be_built_and_differ(name):
    experiment = get_experiment(name)
    seen = set()
    for arm in experiment.arms:
        model = arm.build(10)
        model(torch.zeros(1, 3, *2 * [arm.model.get("img_size", 64)]))
        seen.add((arm.task, arm.name))
    assert len(seen) == len(experiment.arms)
    small = get_experiment(name, small=True)
    cost = [len(e.arms) * e.seeds * e.budget.pictures for e in (experiment, small)]
    assert cost[1] < cost[0] / 3 and small.budget.looks == experiment.budget.looks
    kept = set(experiment.small[0])
    assert all({a.task, a.name} & kept for a in small.arms) if kept else small.arms == experiment.arms
    assert kept <= {o for a in experiment.arms for o in (a.task, a.name)}


@pytest.mark.parametrize("name", list(ex.EXPERIMENTS))
def test_kept_results_are_whole(name):
    rows, experiment = own_results(name), get_experiment(name)
    wanted = {(a.task, a.name, s) for a in experiment.arms for s in range(experiment.seeds)}
    assert {ex._row_key(r) for r in rows} == wanted and len(rows) == len(wanted)
    assert {(r["pictures"], r["lr"]) for r in rows} == {(experiment.budget.pictures, experiment.budget.lr)}
    for r in rows:
        curve = co._split_numbers(r["curve"])
        assert len(curve) == experiment.budget.looks and curve[-1] == pytest.approx(r["top1"], abs=0.01)
    assert {r["command"] for r in rows} == {f"metaformer-experiment {name}"}
    for arm in experiment.arms:  # they are of the models as they are now
        row = next(r for r in rows if ex._row_key(r)[:2] == (arm.task, arm.name))
        model = arm.build(2 if arm.task == "far" else len(TASKS[arm.task].class_names) if arm.task in TASKS else 10)
        assert ex.count_params(model) == (row["trainable"], row["frozen"])
    assert co.draw_experiment(rows, name) and co._draw_arms(rows) and co._draw_arms(rows, "way")


def test_a_network_looks_the_same_in_all_experiments():
    "And two arms of one picture do not, but for the windows of one network."
    seen = {}
    for rows in map(own_results, ex.EXPERIMENTS):
        looks = {name: look for name, look in co._looks(rows).items() if " without overlap" not in name}
        assert len(set(looks.values())) == len(looks)
        for name, look in looks.items():
            assert co._own_look(name) is None or seen.setdefault(name, look) == look, name
    assert seen["nothing"] == seen["identityformer"] != seen["convolution"] == seen["convformer"]


def test_summary_tells_the_spread():
    rows = [dict(task="t", name="n", seed=s, top1=v, curve=f"0 {v}", trainable=1500, frozen=0, macs=2e6)
            for s, v in enumerate((90, 94.5))]
    assert co.summarize_runs(rows) == [{"task": "t", "name": "n", "runs": 2, "top1": "92.2", "lowest": "90.0",
                                 "highest": "94.5", "on the way": "46.1",
                                 "learns": "1.5k", "MACs": "2.0M"}]


@pytest.mark.parametrize("args, said", [
    (["mixer"], "mixers"), (["distance", "--pictures", "320"], "take 384 or more"),
    (["mixers", "--output", "x.txt"], "must end in .csv"),
    (["mixers", "--output", "nowhere/x.csv"], "folder that is there"),
    (["mixers", "--device", "cuda:77"], "no device 'cuda:77'"), (["mixers", "--seeds", "0"], "0 is not 1 or more"),
    ([], "NAME")])
def test_bad_input_is_a_sentence(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        experiment.main(args)
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ex.EXPERIMENTS, "two", two())
    args = ["two", "--pictures", "320", "--jobs", "1", "--seeds", "1"]
    experiment.main(args)
    first = capsys.readouterr().out
    assert (tmp_path / "experiment_two.png").stat().st_size > 5000 and "Pooling" in first
    rows = read_results(tmp_path / "experiment_two.csv")
    assert {r["command"] for r in rows} == {"metaformer-experiment two --pictures 320 --jobs 1 --seeds 1"}
    monkeypatch.setattr(ex, "_train_and_measure", None)  # nothing is left to do
    experiment.main(args)
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit) as end:
        experiment.main([*args, "--lr", "0.01"])
    assert end.value.code == 2 and "holds runs of 320 pictures" in capsys.readouterr().err


def test_processes_give_the_same_as_one(tmp_path):
    "In real processes, which draw the digits themselves."
    code = (
        "from metaformer_edu.experiments.arms import *\n"
        "import torch; torch.set_num_threads(1)\n"
        "if __name__ == '__main__':\n"
        "    e = Experiment('?', [Arm('digits', 'x', dict(token_mixers='Identity', depths=(1,), dims=(8,), "
        "res_scale_init_values=None))], seeds=2, budget=Budget(64, 1))\n"
        "    one, two = (run_experiment(e, jobs=n, progress=False) for n in (1, 2))\n"
        "    assert one == two, (one, two)\n"
    )
    (tmp_path / "both.py").write_text(code)
    done = subprocess.run([sys.executable, "both.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_the_course_of_far_adds_a_distance_a_look():
    order = ex._PictureOrder(700, 300, 12, True, 0)
    farthest = [max(order) // 100 for _ in range(12)]
    assert farthest == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6]
    plain = ex._PictureOrder(700, 300, 12, False, 0)
    first = list(plain)
    assert len(first) == len(set(first)) == len(plain) == 300 and max(first) > 600
    # more than there are: again from the beginning
    assert list(ex._PictureOrder(10, 25, 1, False, 0)).count(3) in (2, 3)


def test_clothes_are_enlarged_and_a_share_has_all_classes(tmp_path, monkeypatch):
    lay_out_clothes(tmp_path)  # 64 pictures to learn from, 20 held out
    monkeypatch.setenv("METAFORMER_DATA", str(tmp_path))
    (images, labels), (held_out, _) = (part.tensors for part in ex._load_clothes(100, 56))
    assert images.shape == (64, 3, 56, 56) and len(held_out) == 20 and torch.equal(images[:, 0], images[:, 2])
    original = PublicImages("fashion-mnist").images.data[3] / 255
    spec = PUBLIC["fashion-mnist"]
    expected = (original.mean() - spec.mean[0]) / spec.std[0]
    assert images[3].mean().item() == pytest.approx(expected.item(), abs=1e-3)
    (some, few), (again, _) = (part.tensors for part in ex._load_clothes(50, 56))
    assert few.bincount().tolist() == [3] * 10 and torch.equal(again, held_out)
    assert all(any(torch.equal(one, other) for other in images) for one in some)


def test_half_of_the_clothes_are_mirrored():
    class Trainer:
        images, device = torch.arange(4.).expand(400, 1, 1, 4), "cpu"
    torch.manual_seed(0)
    ex._Mirror().before_batch(Trainer)
    turned = (Trainer.images[:, 0, 0, 0] == 3)
    assert 150 < turned.sum() < 250
    assert torch.equal(Trainer.images[turned][0, 0, 0], torch.tensor([3., 2., 1., 0.]))


def test_networks_of_others_have_as_many_weights_as_tiny_convformer():
    arms = {arm.name: ex.count_params(arm.build(10))[0] for arm in get_experiment("clothes").arms}
    for name in ("resnet", "convnext", "vit"):
        assert abs(arms[name] / arms["convformer"] - 1) < 0.1, (name, arms)


def test_without_overlap_a_token_comes_from_its_own_square():
    for name, inside in (("identityformer", False), ("identityformer without overlap", True)):
        arm = next(arm for arm in get_experiment("patches").arms if arm.name == name)
        x, image = torch.zeros(1, 64, 64, 3), torch.zeros(1, 64, 64, 3)
        image[:, :32, :32] = 1  # the square of the first of four tokens
        for down in arm.build(10).eval().downsample_layers:
            x, image = down(x), down(image)
        changed = (x != image).any(-1)[0]
        assert changed[0, 0] and inside == (not changed[0, 1] and not changed[1, 0] and not changed[1, 1])
