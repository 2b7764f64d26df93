"""metaformer-bench: turns and ratios by fake clocks, activations by hand, files and pictures, and what goes wrong."""
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import metaformer_edu
from metaformer_edu.commands import benchmark as command
from metaformer_edu.commands.benchmark import main, parse, read_bench
from metaformer_edu.core.files import kept_file
from metaformer_edu.models.registry import MODELS, get_row
from metaformer_edu.speed import benchmark, roofline
from metaformer_edu.speed.benchmark import (
    Contender, _as_row, _calibrate, _check_answer, _make_contenders, _matched_models, _most_images_per_s,
    _open_loader, _peak_memory, _peak_of_process, _seconds_per_call, _three_digits, _timm_name, _write_photos,
    bench_fast, bench_loader, bench_model, bench_table, draw_bench, speedups, stored_activations,
    take_turns)
from metaformer_edu.speed.epochs import bench_epochs
from metaformer_edu.speed.roofline import machine_info

SMALL = ["--img-size", "32", "-b", "2", "--rounds", "2", "--threads", "1", "--device", "cpu"]
TINY = dict(batch_size=2, img_size=32)
pytestmark = pytest.mark.usefixtures("one_thread", "here")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def quick(monkeypatch):
    "No turn lasts, and ceilings are known: for tests of all but the times."
    monkeypatch.setattr(benchmark, "_TURN_SECONDS", 0)
    monkeypatch.setattr(roofline, "ceilings", lambda device, dtype: type("C", (), dict(flops=1e11)))


class FakeClock:
    "time.perf_counter, moved by hand."
    now = 0.

    def perf_counter(self): return self.now

    def job(self, *seconds):
        left = list(seconds)

        def call(): self.now += left.pop(0) if len(left) > 1 else left[0]
        return call


@pytest.fixture
def clock(monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(benchmark, "time", fake)
    return fake


def called(capsys, *args):
    "Run the command; (status, stdout, lines of stderr)."
    status = 0
    try:
        main(list(map(str, args)))
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err, said.err
    return status, said.out, said.err.splitlines()


def refused(capsys, *args):
    "The one sentence with which the command refuses."
    status, out, err = called(capsys, *args)
    assert (
        status == 2 and not out and len(err) == 1 and err[0].startswith("metaformer-bench: ") and not os.listdir(".")
    ), (status, out, err)
    return err[0]


def row(side, seconds, mode="eager", dtype="float32", model="m", what="inference", images=10, **facts):
    return _as_row(Contender(side, mode, dtype, None, images, seconds=seconds), what=what, model=model, **facts)


# --- turns ---

def test_each_round_runs_each_once_and_starts_with_another_one():
    order = []
    found = [Contender(name, "", "", lambda name=name: order.append(name), 1) for name in "abc"]
    take_turns(found, rounds=4)
    assert "".join(order) == "abcbcacababc" and all(len(c.seconds) == 4 for c in found)


def test_seconds_are_those_of_one_call(clock):
    c = Contender("ours", "", "", clock.job(0.01), 1)
    _calibrate(c)
    assert c.calls == 10 and c.facts["first_call"] == pytest.approx(0.01)
    take_turns([c], rounds=3)
    assert c.seconds == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("seconds, calls", [(5., 1), (0.1, 1), (0.05, 2), (0.00001, 1000)])
def test_what_is_short_runs_several_times_in_a_turn(clock, seconds, calls):
    c = Contender("ours", "", "", clock.job(seconds), 1)
    _calibrate(c)
    assert c.calls == calls


def test_the_first_call_may_compile(clock):
    c = Contender("ours", "", "", clock.job(30., 0.2), 1)
    _calibrate(c)
    assert c.facts["first_call"] == 30 and c.calls == 1 and not c.seconds


def test_only_whole_rounds_are_kept():
    calls = []

    def second():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
    found = [Contender("timm", "", "", lambda: None, 1), Contender("ours", "", "", second, 1)]
    with pytest.raises(KeyboardInterrupt):
        take_turns(found, rounds=5)
    assert [len(c.seconds) for c in found] == [2, 2]


def test_nobody_takes_turns():
    take_turns([], 3)
    assert bench_model("tiny_caformer", sides=["timm"],
                       **TINY) == bench_model("tiny_caformer", "training", sides=["fast"], **TINY) == []


def test_a_bar_moves_with_every_turn():
    class Bar:
        n = 0

        def update(self): self.n += 1

        def __bool__(self): return False  # as an empty tqdm's
    bar = Bar()
    take_turns([Contender(s, "", "", lambda: None, 1) for s in "ab"], 3, bar=bar)
    assert bar.n == 6


# --- rows and ratios ---

def test_a_row_has_the_median_and_the_quartiles_of_images_a_second():
    r = row("ours", [1., 2., 4., 5., 10.], images=20, extra=7)
    assert (r["images_per_s"], r["low"], r["high"], r["extra"], r["seconds"]) == (5, 4, 10, 7, [1, 2, 4, 5, 10])
    assert r["contender"] == "ours eager float32"


def test_a_ratio_is_the_median_of_those_of_the_rounds():
    rows = [row("timm", [2., 30., 3., 2.]), row("ours", [1., 10., 1., 2.])]
    found, = speedups(rows)
    assert (found["ratio"], found["low"], found["high"]) == (2.5, 1.75, 3)
    assert (found["contender"], found["against"], found["best"]) == ("ours eager float32", "timm eager float32", False)


def test_a_round_that_is_slow_for_all_changes_no_ratio():
    rows = [row("timm", [3., 4., 5.]), row("ours", [2., 3., 3.])]
    slow = [row("timm", [3., 40., 5.]), row("ours", [2., 30., 3.])]
    assert speedups(rows) == speedups(slow)


def test_like_is_compared_with_like_fast_and_the_best_with_the_best():
    rows = [row("timm", [4.]), row("ours", [2.]), row("timm", [3.], dtype="bfloat16"),
            row("ours", [3.], dtype="bfloat16"),
            row("timm", [1.], mode="compiled"), row("fast", [0.5], mode="", dtype=""), row("ours", [9.], model="other"),
            row("ours", [1.], what="training")]
    found = {(r["contender"], r["against"], r["best"]): r["ratio"] for r in speedups(rows)}
    assert found == {("ours eager float32", "timm eager float32", False): 2,
                     ("ours eager bfloat16", "timm eager bfloat16", False): 1,
                     ("fast", "timm compiled float32", False): 2, ("fast", "timm compiled float32", True): 2}


def test_ours_alone_is_compared_with_nothing():
    assert speedups([row("ours", [1.])]) == [] and speedups([row("timm", [1.])]) == [] and speedups([]) == []


def test_loaders_of_different_lengths_are_compared_by_images():
    rows = [row("timm", [1.], "0 workers", "", images=20, what="loader"),
            row("ours", [1.], "0 workers", "", images=30, what="loader")]
    assert speedups(rows)[0]["ratio"] == 1.5


def test_the_ceiling_is_that_of_the_precision():
    call = type("Call", (), dict(model=nn.Linear(2, 2).bfloat16()))
    peaks = dict(float32=6e9, bfloat16=12e9)
    assert _most_images_per_s(Contender("ours", "eager", "float32", call, 1), 10**9, "inference", peaks) == 3
    assert _most_images_per_s(Contender("ours", "eager", "bfloat16", call, 1), 10**9, "inference", peaks) == 6
    assert _most_images_per_s(Contender("ours", "eager", "float32", call, 1), 10**9, "training", peaks) == 1
    assert _most_images_per_s(Contender("fast", "", "", call, 1), 10**9, "inference", peaks) == 6  # as its weights are
    assert _most_images_per_s(Contender("ours", "eager", "float32", call, 1), 10**9, "inference", {}) is None


def test_the_table_says_what_there_is():
    found = bench_table(dict(rows=[row("timm", [1.]),
                                   row("ours", [0.5], ceiling=40., stored=2.5e6, peak=None, difference=0.)]))
    assert found[1] == {"": "m, inference", "contender": "ours eager float32", "images/s": "20 (20 to 20)",
                        "times timm": "2.00 (2.00 to 2.00)",
                        "of ceiling": "50%", "kept an image": "2.5 MB", "differs": "0e+00"}
    assert found[0]["times timm"] is None and "peak" not in found[0] and bench_table(dict(rows=[])) == []


@pytest.mark.parametrize("value, text", [(13.72, "13.7"), (0.1234, "0.123"), (1825.4, "1,825"), (100, "100")])
def test_a_rate_has_three_digits(value, text):
    assert _three_digits(value) == text


# --- models ---

def test_timm_has_three_of_the_families():
    there = {row.family for row in MODELS.values() if _timm_name(row.name)}
    assert there == {"poolformerv2", "convformer", "caformer"}
    assert _timm_name("caformer_s18_384_in21ft1k") == "caformer_s18"
    assert not _timm_name("tiny_caformer")


def test_twins_are_the_same_function():
    models, x = _matched_models("poolformerv2_s12", 32), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        a, b = (m.double().eval()(x) for m in models.values())
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_twins_where_timm_has_none():
    assert list(_matched_models("tiny_randformer", 32)) == ["ours"]


@pytest.mark.parametrize("what", ["inference", "training"])
def test_contenders_agree(what):
    found = _make_contenders("poolformerv2_s12", what, **TINY)
    assert [c.name for c in found] == [
        "timm eager float32",
        "ours eager float32",
        "timm eager bfloat16",
        "ours eager bfloat16",
    ]
    gaps = [_check_answer(c, c.call()) for c in found]
    assert max(gaps[:2]) < 1e-4 and max(gaps[2:]) < 0.1
    weights = {c.name: next(c.call.model.parameters()).dtype for c in found}
    assert weights["ours eager bfloat16"] == (torch.bfloat16 if what == "inference" else torch.float32)


def test_each_contender_trains_weights_of_its_own():
    found = _make_contenders("tiny_convformer", "training", **TINY)
    before = [p.clone() for p in found[1].call.model.parameters()]
    loss = [found[0].call() for _ in range(3)]
    assert loss[2] < loss[0] and all(torch.equal(a, b) for a, b in zip(before, found[1].call.model.parameters()))
    assert all(p.grad is None for p in found[0].call.model.parameters())


def test_a_wrong_answer_has_no_time():
    c = Contender("ours", "eager", "float32", lambda: torch.tensor([1., 3.]), 1, right=torch.tensor([1., 2.]))
    with pytest.raises(RuntimeError, match="ours eager float32 is 50.0% from the right one"):
        _calibrate(c)
    c.call = lambda: torch.tensor([1., float("nan")])
    with pytest.raises(RuntimeError, match="nan"):
        _calibrate(c)


def test_bench_model_gives_a_row_each(quick):
    rows = bench_model("tiny_caformer", "training", rounds=2, peaks=dict(float32=1e11), dtypes=["float32"], **TINY)
    assert len(rows) == 1 and len(rows[0]["seconds"]) == 2 and rows[0]["stored"] > 0 and rows[0]["peak"] is None
    macs = 1e11 / 6 / rows[0]["ceiling"]
    assert macs == pytest.approx(benchmark.count_macs(get_row("tiny_caformer").build(img_size=32), (1, 3, 32, 32)))


# --- memory ---

@pytest.mark.parametrize("batch", [1, 4, 64])
def test_activations_of_an_mlp_by_hand(batch):
    mlp = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5), nn.Sigmoid())
    # x, the ReLU's output once, the sigmoid's output
    assert stored_activations(mlp, torch.randn(batch, 10)) == 4 * (10 + 20 + 5)


def test_views_count_as_their_memory_and_weights_do_not_count():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))

        def forward(self, x):
            a, b = (x * self.w).chunk(2, -1)
            return a * b
    assert stored_activations(Halves(), torch.randn(3, 8, dtype=torch.float64)) == 8 * (8 + 8)


def test_activations_are_counted_where_gradients_are_off_too():
    with torch.no_grad():
        assert stored_activations(nn.Linear(3, 2), torch.randn(5, 3)) == 12


def test_ours_keeps_less_than_timm():
    models, x = _matched_models("poolformerv2_s12", 32), torch.randn(2, 3, 32, 32)
    kept = {side: stored_activations(m.train(), x) for side, m in models.items()}
    assert kept["ours"] < 0.75 * kept["timm"]


def test_peak_memory_of_a_cpu_is_asked_of_a_child():
    c, = _make_contenders("tiny_identityformer", sides=["ours"], dtypes=["float32"], batch_size=1, img_size=32)
    assert _peak_memory(c, "cpu") is None
    if os.path.exists("/proc/self/status"):
        peak = _peak_of_process(c, dict(name="tiny_identityformer", what="inference", batch_size=1, img_size=32,
                                     device="cpu"))
        assert 1e8 < peak < 1e10


def test_a_child_that_fails_is_quoted(monkeypatch):
    monkeypatch.setattr(benchmark.Path, "exists", lambda path: True)
    monkeypatch.setattr(benchmark.subprocess, "run",
                        lambda *_, **__: type("Done", (),
                                              dict(returncode=1, stderr="Traceback\nMemoryError: too much\n")))
    with pytest.raises(RuntimeError, match="The process for ours eager float32 failed: MemoryError: too much"):
        _peak_of_process(Contender("ours", "eager", "float32", None, 1), {})


# --- loaders ---

def test_photos_are_jpeg_files_of_two_classes(tmp_path):
    from PIL import Image
    _write_photos(tmp_path, 6)
    files = sorted(tmp_path.glob("train/*/*"))
    assert len(files) == 6 and len({f.read_bytes() for f in files}) == 6
    for f in files:
        with Image.open(f) as image:
            assert image.format == "JPEG" and image.size == (500, 375)


@pytest.mark.parametrize("workers", [0, 1])
def test_both_loaders_give_the_same_batches(tmp_path, workers):
    _write_photos(tmp_path, 6)
    for side in ("ours", "timm", "fast"):
        batches = list(_open_loader(side, str(tmp_path), workers, 32, 4))
        assert [(x.shape, x.dtype, x.device.type, y.shape) for x, y in batches] == [
            ((4, 3, 32, 32), torch.float32, "cpu", (4,))
        ]


def test_bench_loader(quick):
    rows = bench_loader((0, 1), images=4, batch_size=2, img_size=32, rounds=2, sides=("timm", "ours", "fast"))
    names = ["timm 0 workers", "ours 0 workers", "fast 0 workers", "timm 1 worker", "ours 1 worker", "fast 1 worker"]
    for transforms in ("resized crops", "published transforms"):
        here = [r for r in rows if r["model"] == transforms]
        assert [r["contender"] for r in here] == names
        assert [(r["contender"], r["against"]) for r in speedups(here)] == [
            (f"{side} {n}", f"timm {n}") for n in ("0 workers", "1 worker") for side in ("ours", "fast")]
    assert all(r["images"] == 4 and r["per_core"] == r["images_per_s"] and len(r["seconds"]) == 2 for r in rows)


# --- epochs, and what fast does ---

def test_bench_epochs():
    rows = bench_epochs(img_size=32, batch_size=16, images=60, rounds=2)
    assert [(r["side"], r["what"], r["images"], len(r["seconds"])) for r in rows] == [
        ("timm", "epoch", 48, 2), ("ours", "epoch", 48, 2)]  # of about 50 images three whole batches
    assert len(speedups(rows)) == 1 and speedups(rows)[0]["ratio"] > 0


def test_bench_fast_says_where_and_what():
    steps = ["compiled", "folded and compiled", "bfloat16", "channels last"]
    found = bench_fast(["tiny_caformer"], batch_size=2, img_size=64, rounds=1, without=steps)
    assert found.keys() == json.loads(open(kept_file("fast_cpu.json")).read()).keys()
    assert found["threads"] == 1 and found["img_size"] == 64
    assert [s["step"] for s in found["runs"]["tiny_caformer"]["steps"]][:2] == ["as it is", "folded"]


# --- explanations ---

def test_explanations_are_timed_beside_those_of_grad_cam(capsys):
    from metaformer_edu.commands.bench_explorers import main
    main("--what explanations --model tiny_caformer -b 2 --rounds 2 --threads 1".split())
    theirs, ours, ratio = capsys.readouterr().out.splitlines()
    kept = [float(line.split()[-4]) for line in (theirs, ours)]
    assert theirs.startswith("grad-cam") and ours.startswith("ours") and ratio.startswith("grad-cam / ours: ")
    assert kept[1] < kept[0] / 3  # ours needs gradients of the last stage alone


# --- the command ---

def test_the_command_writes_what_it_measured(capsys, quick):
    status, out, err = called(capsys, "poolformerv2_s12", "tiny_randformer", "--what", "inference", "training", *SMALL)
    assert status == 0 and sorted(os.listdir(".")) == ["bench.json", "bench.png"]
    assert err == ["metaformer-bench: timm has no tiny_randformer: only ours is measured."]
    found = json.loads(open("bench.json").read())
    assert found["command"].startswith("metaformer-bench poolformerv2_s12 tiny_randformer --what") and found[
        "notes"
    ] == [err[0][18:]]
    assert {"name", "device", "cpu", "cores", "threads", "system", "python", "torch", "timm",
            "metaformer_edu"} == set(found["machine"])
    assert (
        found["machine"]["threads"] == 1
        and found["machine"]["device"] == "cpu"
        and found["date"][:2] == "20"
        and found["ceilings"] == dict(float32=1e11, bfloat16=1e11)
    )
    assert len(found["rows"]) == 2 * 4 + 2 * 2
    for r in found["rows"]:
        assert (
            len(r["seconds"]) == 2
            and min(r["seconds"]) > 0
            and r["images"] == 2
            and r["low"] <= r["images_per_s"] <= r["high"]
        )
        assert (
            r["difference"] < 0.2
            and r["ceiling"] > 0
            and r["first_call"] > 0
            and r["img_size"] == 32
            and (r["what"] != "training" or r["stored"] > 0)
        )
    assert [{k: r[k] for k in found["ratios"][0]} for r in speedups(found["rows"])] == found["ratios"] and len(
        found["ratios"]
    ) == 2 * (2 + 1)
    assert (
        "times timm" in out
        and out.count("the best of ours") == 2
        and out.splitlines()[-1] == "bench.json and bench.png"
    )
    assert read_bench("bench.json") == found


def test_results_are_not_overwritten_unless_named(capsys, quick):
    tiny = ["tiny_identityformer", *SMALL, "--dtype", "float32"]
    for _ in range(2):
        assert called(capsys, *tiny)[0] == 0
    assert sorted(os.listdir(".")) == ["bench-2.json", "bench-2.png", "bench.json", "bench.png"]
    assert called(capsys, *tiny, "--output", "bench.json", "--picture", "other.svg")[0] == 0
    assert "<svg" in open("other.svg").read() and len(os.listdir(".")) == 5


def test_the_module_can_be_run(tmp_path):
    done = subprocess.run([sys.executable, "-m", "metaformer_edu.commands.benchmark", "--what", "loader", "--images",
                           "4", "-j", "0", *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_bench(tmp_path / "bench.json")["rows"]
    assert [r["contender"] for r in rows] == 2 * ["timm 0 workers", "ours 0 workers"]  # crops alone, and as published
    assert "ours 0 workers" in done.stdout and not done.stderr


def test_ctrl_c_keeps_what_is_measured(capsys, quick, monkeypatch):
    n, take = [], _seconds_per_call

    def stopped(c, device):
        n.append(c)
        if len(n) == 11:  # the warm-up took two, so this is the second of the fifth round
            raise KeyboardInterrupt
        return take(c, device)
    monkeypatch.setattr(benchmark, "_seconds_per_call", stopped)
    status, _, err = called(capsys, "poolformerv2_s12", *SMALL, "--rounds", "9", "--dtype", "float32")
    assert status == 130 and err == ["metaformer-bench: Stopped by you. bench.json holds what was measured."]
    assert [len(r["seconds"]) for r in read_bench("bench.json")["rows"]] == [4, 4] and os.path.exists("bench.png")


def test_ctrl_c_before_anything_is_measured(capsys, quick, monkeypatch):
    def stopped(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(benchmark, "bench_model", stopped)
    status, _, err = called(capsys, "tiny_caformer", *SMALL)
    assert (
        status == 130 and err[-1] == "metaformer-bench: Stopped by you. Nothing was measured." and not os.listdir(".")
    )


def test_what_fails_later_keeps_what_was_measured_before(capsys, quick, monkeypatch):
    def full(*_, **__): raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(benchmark, "bench_loader", full)
    status, _, err = called(capsys, "tiny_identityformer", "--what", "inference", "loader", *SMALL)
    assert (
        status == 1
        and "--batch-size" in err[-1]
        and err[-1].endswith("bench.json holds what was measured.")
        and len(read_bench("bench.json")["rows"]) == 2
    )


def test_what_is_not_typed():
    args = parse([])
    assert (args.models, args.what, args.rounds, args.batch_size,
            args.img_size) == (["caformer_s18"], ["inference"], 9, 16, None)
    args = parse(["--quick", "--rounds", "5", "tiny_caformer", "tiny_caformer"])
    assert (args.models, args.what, args.rounds, args.img_size) == (["tiny_caformer"],
                                                                    ["inference", "training", "loader"], 5, 64)
    assert args.images == 8 * args.batch_size


# --- what goes wrong ---

@pytest.mark.parametrize("typed, sentence", [
    (["caformer_s81"], "There is no model 'caformer_s81'. Did you mean 'caformer_s18'"),
    (["--output", "bench.txt"], "bench.txt must end in .json."),
    (["--picture", "bench.jpeg"], "bench.jpeg must end in .png or .svg."),
    (["--output", "no/bench.json"], "There is no folder no: make it, or choose another for bench.json."),
    (["--picture", "no/bench.png"], "There is no folder no: make it, or choose another for bench.png."),
    (["--device", "cuda:77"], "There is no device 'cuda:77' on this machine"),
    (["--dtype", "float16"], "invalid choice: 'float16'"),
    (["--what", "sleeping"], "invalid choice: 'sleeping'"),
    (["--rounds", "0"], "0 is not 1 or more"),
    (["--img-size", "16"], "16 is not 32 or more"),
    (["--round", "3"], "Did you mean '--rounds'"),
    (["--images", "3"], "--images 3 is less than a batch of 16."),
    (["tiny_caformer", "--sides", "timm"], "timm has no tiny_caformer: say --sides ours."),
    (["--what", "training", "--sides", "fast"], "fast is not for training"),
    (["--what", "training", "--sides", "openvino"], "openvino does not train"),
    (["--what", "loader", "--sides", "onnx"], "onnx does not train, nor load images"),
])
def test_refused_in_a_sentence(capsys, typed, sentence):
    assert sentence in refused(capsys, *typed)


def test_nothing_can_be_measured(capsys, quick):
    sentence = "metaformer-bench: timm and fast can do none of this: say --sides ours. Nothing was measured."
    status, out, err = called(capsys, "tiny_caformer", "--sides", "timm", "fast", "--what", "training", *SMALL)
    assert status == 2 and not out.strip() and err[-1] == sentence and not os.listdir(".")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(capsys):
    assert "There is no device 'cuda' on this machine: try --device cpu." in refused(capsys, "--device", "cuda")


def test_no_bfloat16(capsys, quick, monkeypatch):
    monkeypatch.setattr(command, "_has_bfloat16", lambda device: False)
    assert "cpu does not compute in bfloat16: say --dtype float32." in refused(
        capsys, "tiny_caformer", *SMALL, "--dtype", "bfloat16"
    )
    status, _, err = called(capsys, "tiny_caformer", "--sides", "ours", *SMALL)
    assert status == 0 and err == ["metaformer-bench: cpu does not compute in bfloat16: only float32 is measured."]
    assert [r["dtype"] for r in read_bench("bench.json")["rows"]] == ["float32"]


def test_no_compiler(capsys, quick, monkeypatch):
    def broken(*_, **__): raise ValueError("No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", broken)
    status, _, err = called(capsys, "tiny_caformer", "--sides", "ours", "--compile", *SMALL, "--dtype", "float32")
    assert (
        status == 0 and len(err) == 1 and "needs a C++ compiler such as g++: only eager models are measured." in err[0]
    )
    assert [r["mode"] for r in read_bench("bench.json")["rows"]] == ["eager"]


def test_the_device_can_do_what_it_can():
    assert command._has_bfloat16(torch.device("cpu")) and not command._has_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [], "machine": {}}',
                                  '{"rows": [{}], "machine": {}, "ceilings": {}}',
                                  '{"rows": [3], "machine": {}, "ceilings": {}}', "\x00\xff"])
def test_no_result_is_called_so(text):
    open("a.json", "w", encoding="latin-1").write(text)
    with pytest.raises(ValueError, match=r"^a\.json is no result of metaformer-bench\.$"):
        read_bench("a.json")


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match="There is no file .*bench_of_nobody.json"):
        read_bench("bench_of_nobody")


# --- the picture ---

def texts(fig):
    "All visible texts and where they are, in pixels."
    from matplotlib.text import Text
    fig.draw_without_rendering()
    # never drawn
    beyond = {tick.label1 for ax in fig.axes
              for tick in ax.xaxis.get_major_ticks() if not ax.get_xlim()[0] <= tick.get_loc() <= ax.get_xlim()[1]}
    shown = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]
    return [(t.get_text(), t.get_window_extent()) for t in shown if t.axes is None or t.axes.axison]


def overlapping(fig):
    found = texts(fig)
    inside = fig.bbox
    out = [a for a, box in found if box.x0 < inside.x0 - 1 or box.x1 > inside.x1 + 1 or box.y0 < inside.y0 - 1
           or box.y1 > inside.y1 + 1]
    return out + [(a, b) for i, (a, x) in enumerate(found) for b, y in found[:i] if x.overlaps(y)]


def many(models=3, whats=("inference", "training")):
    "Results as of a long run, with everything."
    rows, n = [], 0
    for model in ["caformer_s18_384_in21ft1k", "convformer_s18", "poolformerv2_s12"][:models]:
        for what in whats:
            for dtype in ("float32", "bfloat16"):
                for mode in ("eager", "compiled"):
                    for side in ("timm", "ours"):
                        n += 1
                        rows.append(row(side, [1 / n, 1.2 / n, 1.1 / n], mode, dtype, model, what, images=100,
                                        ceiling=140. * n))
            if what == "inference":
                rows.append(row("fast", [0.01, 0.012, 0.011], "", "", model, what, images=100, ceiling=17000.))
    rows += [row(side, [1., 1.1, 1.3], f"{n} workers", "", "JPEG files", "loader", per_core=9.) for n in (0, 16)
             for side in ("timm", "ours")]
    return dict(rows=rows, machine=machine_info(torch.device("cpu")), ceilings={})


@pytest.mark.parametrize("models, whats", [(3, ("inference", "training")), (1, ("inference",)), (0, ())])
def test_a_picture_has_all_labels_and_none_overlaps(models, whats):
    results = many(models, whats)
    fig = draw_bench(results)
    shown = [text for text, _ in texts(fig)]
    for r in results["rows"]:
        assert r["contender"] in shown and f"{r['model']}, {r['what']}" in shown
    for r in speedups(results["rows"]):
        assert r["best"] or any(f"{r['ratio']:.2f} × ({r['low']:.2f} to {r['high']:.2f})" in text for text in shown)
    assert not overlapping(fig)


def test_one_row_and_no_machine():
    fig = draw_bench(dict(rows=[row("ours", [1.])]))
    assert not overlapping(fig) and "m, inference" in [text for text, _ in texts(fig)]


def test_bars_are_as_long_as_the_rates():
    from matplotlib.patches import Rectangle
    fig = draw_bench(dict(rows=[row("timm", [2.]), row("ours", [1.], ceiling=30.)]))
    widths = [p.get_width() for p in fig.axes[0].patches if isinstance(p, Rectangle)]
    assert widths == [5, 30, 10]


def test_kept_runs_can_be_drawn():
    folder = os.path.join(os.path.dirname(metaformer_edu.__file__), "logs")
    kept = [name[:-5] for name in os.listdir(folder) if name.startswith("bench_") and name.endswith(".json")]
    assert kept
    for name in kept:
        found = read_bench(name)
        assert found["machine"]["torch"] and found["date"] and not overlapping(draw_bench(found))


@pytest.mark.parametrize("side, needed", [("openvino", ["openvino"]), ("onnx", ["onnxscript", "onnxruntime"])])
def test_another_runtime_takes_part(side, needed):
    for name in needed:
        pytest.importorskip(name)
    rows = bench_model("tiny_convformer", sides=["ours", side], dtypes=["float32"], batch_size=2, img_size=32, rounds=2)
    assert [r["contender"] for r in rows] == ["ours eager float32", f"{side} float32"]
    assert 0 < rows[1]["difference"] < 1e-3 and rows[1]["images_per_s"] > 0
    assert [(r["contender"], r["against"]) for r in speedups(rows)] == []  # neither is of the other's kind
    rows[0]["side"] = "fast"  # which meets the fastest that is not ours
    assert [(r["contender"], r["against"]) for r in speedups(rows)] == [("ours eager float32", f"{side} float32")]


def test_a_runtime_that_is_not_there_is_left_out(capsys, quick, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    status, _, err = called(capsys, "tiny_caformer", "--sides", "ours", "openvino", *SMALL, "--dtype", "float32")
    assert status == 0 and err == [
        "metaformer-bench: openvino is not installed: pip install 'metaformer_edu[openvino]'."]


def test_no_runtime_is_there(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "pip install 'metaformer_edu[onnx]'" in refused(capsys, "tiny_caformer", "--sides", "onnx", *SMALL)


def test_a_runtime_has_no_loader(capsys, quick):
    pytest.importorskip("openvino")
    status, _, _ = called(capsys, "tiny_caformer", "--what", "inference", "loader", "--sides", "ours", "openvino",
                          *SMALL, "--dtype", "float32", "--images", "4", "--workers", "0")
    found = [(r["what"], r["side"]) for r in read_bench("bench.json")["rows"]]
    assert status == 0 and ("inference", "openvino") in found and ("loader", "ours") in found
    assert ("loader", "openvino") not in found
