"""metaformer-doctor: findings on machines that are not at hand, steps that hang, break and lie, and the report."""
import json
import re
import signal
import subprocess
import sys
import time
import types
import warnings

import pytest
import torch

from metaformer_edu.commands import checkup, doctor, gpu_checks, gpu_proof
from metaformer_edu.commands.checkup import CHECKS, Skipped, finding, try_part
from metaformer_edu.commands.doctor import _run_process, main, parse
from metaformer_edu.commands.gpu_proof import STEPS, prove
from metaformer_edu.core.files import kept_file
from metaformer_edu.models.kernels import kernel_choice, star_formula, star_relu
from metaformer_edu.speed import gpu_report
from metaformer_edu.speed.gpu_report import draw_report, kept_reports, report_page

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def ended(argv):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, argv)))
    return end.value.code


# --- what is here ---

def test_numbers_that_json_does_not_know_are_text():
    found = finding("x", "works", "y", a=float("nan"), b=[float("inf"), 1 / 3], c=7)
    assert json.loads(json.dumps(found, allow_nan=False)) == dict(what="x", state="works", said="y", a="nan",
                                                                  b=["inf", 0.3333], c=7)


@pytest.mark.parametrize("here, todo", [
    ({}, ""), ({"grad-cam": None}, "grad-cam>=1.5.4"), ({"torch": "2.5.1+cu121"}, "torch>=2.6"),
    ({"torch": "2.11.0+cu128"}, "")])
def test_versions(monkeypatch, here, todo):
    real = checkup._version_of
    monkeypatch.setattr(checkup, "_version_of", lambda name: here.get(name, real(name)))
    monkeypatch.setattr(checkup, "_needed", lambda: {"torch": "2.6", "grad-cam": "1.5.4"})
    found = checkup._versions()
    assert found["state"] == ("broken" if todo else "works") and todo in found.get("todo", "")


def test_what_is_needed_is_what_pip_wrote_down(monkeypatch):
    lines = ["torch>=2.6", "grad-cam>=1.5.4", 'onnx>=1.17; extra == "onnx"']
    monkeypatch.setattr(checkup.metadata, "requires", lambda name: lines)
    assert checkup._needed() == {"torch": "2.6", "grad-cam": "1.5.4"}

    def not_installed(name): raise checkup.metadata.PackageNotFoundError
    monkeypatch.setattr(checkup.metadata, "requires", not_installed)
    assert checkup._needed() == {} and checkup._versions()["state"] == "works"


def card(monkeypatch, **facts):
    "A machine with cards, as far as questions go."
    about = types.SimpleNamespace(**{**dict(name="H100", major=9, minor=0, total_memory=80 * 2**30), **facts})
    for name, value in dict(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda i: about,
                            get_arch_list=lambda: ["sm_80", "sm_90"]).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(checkup, "_ask_driver", lambda: ["H100, 570.1, 81559 MiB"])


def test_a_card_that_pytorch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checkup, "_ask_driver", lambda: ["H100, 570.1, 81559 MiB"])
    found = checkup._gpus()
    assert found["state"] == "broken" and "pytorch.org" in found["todo"]
    monkeypatch.setattr(checkup, "_ask_driver", lambda: [])
    assert checkup._gpus()["state"] == "noted"


@pytest.mark.parametrize("facts, state", [({}, "works"), (dict(major=8, minor=6), "works"),
                                          (dict(major=12, minor=0), "broken"), (dict(major=7, minor=5), "broken")])
def test_cards(monkeypatch, facts, state):
    card(monkeypatch, **facts)
    found = checkup._gpus()
    assert found["state"] == state and "570.1" in found["said"] and "80 GiB" in found["said"]


def test_code_that_is_compiled_for_what_is_new():
    gpu = types.SimpleNamespace(major=12, minor=0)
    assert checkup._has_code_for(gpu, ["sm_90", "compute_90"]) and not checkup._has_code_for(gpu, ["sm_90", "sm_90a"])


def test_few_cores_for_each_card(monkeypatch):
    card(monkeypatch)
    monkeypatch.setattr(checkup, "_job_cores", lambda: 4)
    found = checkup._cores()
    assert (found["cores"], found["ranks"]) == (4, 2) and "--workers 2" in found["todo"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "todo" not in checkup._cores()


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=64 << 20, total=64 << 20))
    assert "--shm-size" in checkup._shared_memory()["todo"]
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=64 << 30, total=64 << 30))
    assert "todo" not in checkup._shared_memory()


# --- what works ---

@pytest.mark.parametrize("name", ["core", "models", "kernels", "data", "interpret", "widgets", "experiments"])
def test_parts_work(name):
    found = try_part(name, CPU)
    assert found["state"] == "works", found


def hangs(device, folder): time.sleep(20)


def lacks(device, folder): raise Skipped("no such package")


def breaks(device, folder): raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error")


@pytest.mark.parametrize("check, state, says", [(hangs, "broken", "had not ended"), (lacks, "skipped", "no such"),
                                                (breaks, "broken", "Bus error")])
def test_parts_that_do_not(monkeypatch, check, state, says):
    monkeypatch.setitem(CHECKS, "data", check)
    monkeypatch.setattr(checkup, "_CHECK_SECONDS", 0.2)
    found = try_part("data", CPU)
    assert found["state"] == state and says in found["said"] and found["seconds"] < 5
    assert ("--shm-size" in found.get("todo", "")) == (state == "broken")
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0  # the alarm is off


@pytest.mark.parametrize("states, status", [(["works", "skipped", "noted"], 0), (["works", "broken"], 1)])
def test_exit_status_without_a_flag(monkeypatch, capsys, states, status):
    monkeypatch.setattr(checkup, "look_around", lambda device: [finding("versions", "works", "all", "do this")])
    monkeypatch.setattr(checkup, "CHECKS", dict(enumerate(states)))
    monkeypatch.setattr(checkup, "try_part", lambda name, device: finding(f"part {name}", states[name], "said"))
    assert ended(["--device", "cpu"]) == status
    said = capsys.readouterr().out
    assert "versions: do this" in said and ("broken: part 1" in said) == (status == 1)


# --- bad input ---

@pytest.mark.parametrize("argv, says", [
    (["--only", "speed"], "--only belongs to --gpu."), (["--out", "x"], "--out belongs to --gpu."),
    (["--gpu", "--only", "sped"], "invalid choice"), (["--gpu", "--minutes", "0"], "0.01 or more"),
    (["--device", "cuda:77"], "no device"), (["--gpu", "--device", "nonsense"], "no device")])
def test_bad_input(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ended(argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and says in said[0] and not list(tmp_path.iterdir())


def test_no_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ended(["--gpu"]) == 2 and "--gpu --device cpu --small" in capsys.readouterr().err


def test_cards_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [doctor._check_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    for name in ("cuda:2", "cuda:x"):
        with pytest.raises(ValueError, match="cuda:0, cuda:1"):
            doctor._check_device(name)


def test_pytorch_that_cannot_be_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "metaformer_edu.training.processes", None)
    assert ended([]) == 1 and "pytorch.org" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert ended(["--gpu", "--device", "cpu", "--out", tmp_path / "taken"]) == 2
    assert ended(["--gpu", "--device", "cpu", "--out", "/proc/report"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("Cannot use" in line for line in said)


def test_not_under_torchrun(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "0")
    assert ended(["--gpu", "--device", "cpu", "--out", tmp_path]) == 2 and "torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("me, files", [(0, ["report.html", "report.json"]), (1, [])])
def test_the_first_of_several_writes(stand_in, monkeypatch, me, files):
    monkeypatch.setenv("RANK", str(me))
    assert ended(["--gpu", "--only", "processes", "--out", stand_in]) == 0
    assert sorted(path.name for path in stand_in.iterdir()) == files


# --- steps as processes ---

def python(code):
    return [sys.executable, "-c", code]


def test_a_late_process_goes_with_its_children():
    code = ("import subprocess, sys, time\nsleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
            "p = subprocess.Popen(sleep)\n"
            "print(p.pid, flush=True)\ntime.sleep(60)")
    lines, start = [], time.monotonic()
    status, _ = _run_process(python(code), 4, lines.append)
    assert status is None and time.monotonic() - start < 20
    for _ in range(50):
        try:
            state = open(f"/proc/{int(lines[0])}/stat").read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("its child is still there")


def test_sigterm_ends_the_step_too(tmp_path):
    command = [sys.executable, "-m", "metaformer_edu.commands.doctor", "--gpu", "--device", "cpu", "--small"]
    process = subprocess.Popen([*command, "--only", "parity", "--out", tmp_path / "a"], stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline().startswith("parity")
    time.sleep(1)
    process.terminate()
    assert process.wait(20) == 143
    assert not process.stdout.read().count("broken")
    assert read(tmp_path / "a")["steps"]["parity"]["state"] == "stopped"


def test_how_a_process_ended():
    assert _run_process(python("import sys; print('why', file=sys.stderr); sys.exit(3)"), 20, print) == (3, "why\n")
    status, _ = _run_process(python("import os; os.kill(os.getpid(), 9)"), 20, print)
    assert "SIGKILL" in doctor._unfinished("speed", status, 20)["said"]
    assert "20 seconds" in doctor._unfinished("speed", None, 20)["said"]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    "Steps are one short script in place of our module; the folder of the report."
    script = tmp_path / "step.py"
    script.write_text("import json, sys, time\n"
                      "print(json.dumps(dict(what='first', state='works', said='<b>&')), flush=True)\n"
                      "if 'speed' in sys.argv: sys.exit(5)\n"
                      "if 'bench' in sys.argv: time.sleep(30)\n"
                      "print('no finding')\n"
                      "print(json.dumps(dict(what='second', state='noted', said='2')), flush=True)\n")
    real = doctor._run_process
    monkeypatch.setattr(doctor, "_run_process",
                        lambda command, limit, take: real([sys.executable, str(script), *command[3:]], limit, take))
    monkeypatch.setattr(doctor, "_check_device", lambda name: name or "cuda")
    return tmp_path / "report"


def read(folder):
    return json.loads((folder / "report.json").read_text())


def test_what_was_found_before_a_step_broke_or_was_late_stays(stand_in, capsys):
    assert ended(["--gpu", "--only", "explain", "speed", "bench", "--minutes", "0.07", "--out", stand_in]) == 1
    steps = read(stand_in)["steps"]
    assert list(steps) == ["speed", "explain", "bench"]  # in their order, not as typed
    assert [f["what"] for f in steps["explain"]["findings"]] == ["first", "second"]
    assert [f["what"] for f in steps["bench"]["findings"]] == ["first", "bench"]
    assert "status 5" in steps["speed"]["findings"][-1]["said"] and steps["explain"]["state"] == "works"
    assert {steps["speed"]["state"], steps["bench"]["state"]} == {"broken"}
    assert "broken: speed, bench" in capsys.readouterr().out


def test_the_report_is_written_as_it_comes(stand_in, monkeypatch):
    seen, real = [], doctor._save

    def save(report, folder):
        real(report, folder)
        seen.append([len(step["findings"]) for step in read(folder)["steps"].values()])
    monkeypatch.setattr(doctor, "_save", save)
    assert ended(["--gpu", "--only", "machine", "--out", stand_in]) == 0
    assert seen == [[1], [2], [2]]


def test_what_was_found_before_ctrl_c_stays(stand_in, monkeypatch, capsys):
    def stopped(command, limit, take):
        take(json.dumps(finding("first", "works", "so far")))
        raise KeyboardInterrupt
    monkeypatch.setattr(doctor, "_run_process", stopped)
    assert ended(["--gpu", "--only", "machine", "parity", "--out", stand_in]) == 130
    steps = read(stand_in)["steps"]
    assert list(steps) == ["machine"] and steps["machine"]["state"] == "stopped"
    assert "so far" in (stand_in / "report.html").read_text() and "holds what was found" in capsys.readouterr().err


def test_only_repeats(stand_in, capsys):
    assert ended(["--gpu", "--only", "machine", "parity", "--out", stand_in]) == 0
    report = read(stand_in)
    report["steps"]["parity"]["findings"] = []
    report["steps"]["machine"]["mark"] = "kept"
    (stand_in / "report.json").write_text(json.dumps(report))
    assert ended(["--gpu", "--only", "parity", "--out", stand_in]) == 0
    steps = read(stand_in)["steps"]
    assert steps["machine"]["mark"] == "kept" and len(steps["parity"]["findings"]) == 2
    for argv, says in ((["--out", stand_in], "is there already"),
                       (["--only", "parity", "--small", "--out", stand_in], "another device or size"),
                       (["--only", "parity", "--device", "cuda:1", "--out", stand_in], "another device or size")):
        assert ended(["--gpu", *argv]) == 2 and says in capsys.readouterr().err
    (stand_in / "report.json").write_text("half a repo")
    assert ended(["--gpu", "--only", "parity", "--out", stand_in]) == 2


def test_the_page(stand_in, monkeypatch):
    ended(["--gpu", "--only", "machine", "speed", "--out", stand_in])
    page = (stand_in / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and "status 5" in page
    assert not re.search(r"src=|href=\"[^#]|url\(|@import", page) and "prefers-color-scheme: dark" in page
    monkeypatch.setenv("HOME", str(stand_in.parent))  # names of folders in it are nobody's business
    doctor._save({**read(stand_in), "command": f"metaformer-doctor --out {stand_in}"}, stand_in)
    assert str(stand_in) not in (stand_in / "report.json").read_text() + (stand_in / "report.html").read_text()
    assert read(stand_in)["command"] == "metaformer-doctor --out ~/report"
    assert report_page(dict(read(stand_in), steps={})).count("<h2") == 0


def test_steps_and_their_time():
    assert list(STEPS) == list(doctor._STEPS) and sum(seconds for seconds, _ in doctor._STEPS.values()) == 300
    assert parse(["--gpu"]).minutes == 5


def test_a_real_step_as_a_process_and_its_picture(tmp_path, capsys):
    assert ended(["--gpu", "--device", "cpu", "--small", "--only", "stages", "--out", tmp_path / "a"]) == 0
    report = read(tmp_path / "a")
    step = report["steps"]["stages"]
    assert len([f for f in step["findings"] if "ratio" in f]) == 20 and "stderr" not in step
    fig = draw_report(report)
    labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert labels == [f["what"] for f in step["findings"] if "ratio" in f] and fig.axes[0].get_title("left") == "stages"
    assert "cpu, tiny shapes" in fig.get_suptitle()


def test_a_panel_for_each_step_with_figures():
    what = dict(state="noted", said="")
    speed, fast = dict(what, what="a", ratio=2., low=1.5, high=3.), dict(what, what="b", ratio=0.5, low=0.4, high=0.6)
    machine = dict(what="GPUs", state="works", said="H100")
    steps = {name: dict(findings=[f]) for name, f in (("machine", machine), ("speed", speed), ("fast", fast))}
    fig = draw_report(dict(device="cuda", small=False, date="2026-01-01", steps=steps))
    assert [ax.get_title("left") for ax in fig.axes] == ["speed", "fast"] and "H100" in fig.get_suptitle()
    dots = [[line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"] for ax in fig.axes]
    assert dots == [[2.], [0.5]]
    with pytest.raises(ValueError, match="no figures"):
        draw_report(dict(device="cuda", steps={}))


def test_reports_that_came_back(monkeypatch, tmp_path):
    assert (kept_file("gpu") / "README.md").is_file()
    for report in kept_reports().values():
        assert report["device"].startswith("cuda") and not report["small"]
        assert report_page(report)
    (tmp_path / "h100.json").write_text('{"device": "cuda"}')
    monkeypatch.setattr(gpu_report, "kept_file", lambda name: tmp_path)
    assert kept_reports() == {"h100": {"device": "cuda"}}


# --- what the steps can see ---

def test_a_missing_package_skips_its_step(monkeypatch):
    def step(device, small):
        yield finding("before", "works", "so far")
        import no_such_package_here  # noqa: F401
    monkeypatch.setitem(STEPS, "explain", step)
    found = list(prove("explain", CPU, True))
    assert [f["state"] for f in found] == ["works", "skipped"] and "no_such_package_here" in found[1]["todo"]


def test_explanations_without_grad_cam(monkeypatch):
    monkeypatch.setattr(gpu_checks, "_version_of", lambda name: None)
    found = list(prove("explain", CPU, True))
    assert [f["state"] for f in found] == ["works", "works", "skipped"] and "pip install grad-cam" in found[-1]["said"]


def test_parity_is_of_answers_and_gradients(monkeypatch):
    monkeypatch.setattr(gpu_checks, "FAMILIES", ["poolformerv2"])
    found = list(prove("parity", CPU, True))
    assert len(found) == 8 and {f["state"] for f in found} == {"works"}
    real = gpu_checks._answers

    def one_wrong(model, images, weights):
        answers = real(model, images, weights)
        answers["norm.bias"] = answers["norm.bias"] * (1.01 if images.dtype == torch.float32 else 1)
        return answers
    monkeypatch.setattr(gpu_checks, "_answers", one_wrong)
    wrong = [f for f in prove("parity", CPU, True) if f["state"] == "broken"]
    assert len(wrong) == 3 and all("float32" in f["what"] and "norm.bias" in f["said"] for f in wrong)


def test_errors_see_what_is_missing_and_what_is_no_number():
    exact = {"logits": torch.ones(2), "a": torch.ones(3), "b": torch.ones(3) * 1e-9}
    assert gpu_checks._errors(exact, exact) == (0, 0, "a")
    assert gpu_checks._errors({**exact, "b": 2 * exact["b"]}, exact)[1] < 1e-3  # what cancels is forgiven
    with pytest.raises(RuntimeError, match="'b'"):
        gpu_checks._errors({k: v for k, v in exact.items() if k != "b"}, exact)
    nan = gpu_checks._errors({**exact, "a": torch.full((3,), torch.nan)}, exact)
    assert nan[2] == "a" and nan[1] != nan[1]


@pytest.mark.parametrize("errors, state", [((1e-6, 1e-6, "a"), "works"), ((1e-6, float("nan"), "a"), "broken"),
                                           ((float("nan"), 1e-6, "a"), "broken"), ((1e-6, 1., "a"), "broken")])
def test_no_number_is_not_right(monkeypatch, errors, state):
    monkeypatch.setattr(gpu_checks, "_answers", lambda *inputs: {})
    monkeypatch.setattr(gpu_checks, "_errors", lambda found, exact: errors)
    assert gpu_checks._hold_against("m", "as it is", None, torch.zeros(1), None, {})["state"] == state


@pytest.mark.parametrize("wrong", [lambda x, s, b: star_formula(x, s, 0 * b),
                                   lambda x, s, b: star_formula(x, s, b) + 0 * torch.inf,
                                   lambda x, s, b: star_formula(x, s.detach(), b) + 0 * s], ids=["b", "nan", "ds"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_wrong_kernel_is_seen(wrong, dtype):
    inputs = gpu_checks._star_inputs(3, 4, 5, 6)
    slack = gpu_checks._KERNEL_SLACK[dtype]
    ours, twin = gpu_checks._compare(star_relu, star_formula, inputs, CPU, dtype)
    assert ours <= 2 * twin + slack
    ours, twin = gpu_checks._compare(wrong, star_formula, inputs, CPU, dtype)
    assert not ours <= 2 * twin + slack


def test_triton_kernels_take_part(monkeypatch):
    chosen = []
    monkeypatch.setattr(gpu_checks.triton_star, "takes", lambda x: True)
    monkeypatch.setattr(gpu_checks, "use_kernels", chosen.append)
    monkeypatch.setattr(gpu_checks, "_KERNELS", gpu_checks._KERNELS[:1])
    found = list(prove("kernels", CPU, True))
    assert len(found) == 24 and {f["state"] for f in found} == {"works"} and "Triton" not in found[0]["what"]
    assert all("with Triton" in f["what"] for f in found[12:])
    assert chosen == [{}] * 4 + [dict.fromkeys(kernel_choice(), "triton")] * 4 + [{}]


def test_kernels_of_every_machine():
    found = list(prove("kernels", CPU, True))
    assert not [f for f in found if f["state"] == "broken"]
    assert len(found) == 49 and found[0] == dict(found[0], what="Triton", state="skipped")


@pytest.mark.parametrize("opt, waits, state", [("adamw", 0, "works"), ("adamw", 2, "broken"), ("lamb", 2, "broken"),
                                               ("sgd", 2, "noted")])
def test_hidden_waits_are_counted(monkeypatch, opt, waits, state):
    "On a CPU that passes for a card: PyTorch warns of each wait."
    modes = []
    monkeypatch.setattr(gpu_checks, "_is_card", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def debug(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature")  # as PyTorch says once
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", debug)
    from metaformer_edu.training.trainer import Trainer
    real = Trainer.update

    def update(self, batches):
        real(self, batches)
        for _ in range(waits):
            warnings.warn("called a synchronizing CUDA operation")
    monkeypatch.setattr(Trainer, "update", update)
    small = dict(model="tiny_identityformer", img_size=16, batch_size=32)
    found = gpu_checks._count_waits(opt, CPU, updates=1, **small)
    assert (found["state"], found["waits"]) == (state, waits) and modes == ["warn", "default"]
    assert ("test_doctor.py" in found["said"]) == (waits > 0)


def test_hidden_waits_are_not_seen_on_a_cpu():
    found = gpu_checks._count_waits("adamw", CPU)
    assert found["state"] == "skipped" and "CUDA" in found["said"]


@pytest.mark.parametrize("stopped_at, change, state", [(31, 0, "works"), (31, 1e-7, "broken"), (42, 0, "broken")])
def test_resume_is_bit_for_bit(monkeypatch, stopped_at, change, state, tmp_path):
    def fit(folder, device, small, callbacks=(), resume=None):
        layer = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.constant_(layer.bias, change if resume else 0)
        trainer = types.SimpleNamespace(steps=21, updates=stopped_at if callbacks else 42)
        return types.SimpleNamespace(trainer=trainer, model=layer, path=tmp_path)
    monkeypatch.setattr(gpu_checks, "_fit", fit)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    found, = gpu_checks._check_resume(CPU, True)
    assert found["state"] == state and not torch.are_deterministic_algorithms_enabled()


def test_a_run_that_is_really_stopped(monkeypatch, tmp_path):
    from metaformer_edu.training.settings import Settings
    monkeypatch.setattr(Settings, "__init__", _tiny(Settings.__init__))
    before = signal.getsignal(signal.SIGTERM)
    try:
        job = gpu_checks._fit(tmp_path, CPU, True, [gpu_checks._StopAfter(2)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert job.trainer.updates == 2 and [path.name for path in job.path.glob("state*")] == ["state-00000002.pt"]


def _tiny(init):
    def small(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "model": "tiny_identityformer", "batch_size": 256, "epochs": 1})
    return small


def test_training_that_does_not_learn(monkeypatch):
    logs = dict(float32=[97., 2.0], bfloat16=[90., 2.0], float16=[97., float("nan")])

    def train(folder, device, *flags):
        way = "float16" if "float16" in flags else "bfloat16" if "--amp" in flags else "float32"
        top1, loss = logs[way]
        return [dict(train_loss=loss, val_top1=top1, ema_top1=top1, bad_steps=0)]
    monkeypatch.setattr(gpu_checks, "_train", train)
    found = {f["what"]: f["state"] for f in gpu_checks._check_training(CPU, False)}
    assert found["training, float32"] == found["training, bfloat16"] == "works"
    assert found["training, float16"] == found["precisions agree"] == "broken"


def test_the_command_that_ends_with_an_error(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="ended with 2"):
        gpu_checks._train(tmp_path, CPU, "--opt", "lambda")
    capsys.readouterr()


def test_processes_that_disagree(monkeypatch):
    for said, state in (("gap 1e-6\n", "works"), ("gap 0.5\n", "broken"), ("", "broken")):
        monkeypatch.setattr(gpu_checks, "launch", lambda *command, **how: said)
        two, nccl = gpu_checks._check_processes(CPU, True)
        assert (two["state"], nccl["state"]) == (state, "skipped")


def test_a_process_for_each_card(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(gpu_checks, "launch",
                        lambda *command, processes, show: asked.append((processes, "--gloo" in command)) or "gap 1e-7")
    found = list(gpu_checks._check_processes(torch.device("cuda:0"), False))
    assert asked == [(2, True), (8, False)] and [f["state"] for f in found] == ["works", "works"]


@pytest.mark.parametrize("me, findings", [(0, 1), (1, 0)])
def test_processes_of_torchrun(monkeypatch, me, findings):
    monkeypatch.setenv("RANK", str(me))
    monkeypatch.setattr(gpu_checks, "_one_of_several", lambda device, gloo: (1e-7, 4, me))
    assert len(list(gpu_checks._check_processes(CPU, True))) == findings


def test_gloo_lets_several_processes_share_one_card(monkeypatch):
    did = []
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "set_device", did.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", did.append)
    monkeypatch.setattr(gpu_checks, "_gap_to_alone", lambda place: 0.)
    assert gpu_checks._one_of_several("cuda:0", gloo=True)[0] == 0 and did == [torch.device("cuda:0"), "gloo"]


def test_gradients_of_several_processes():
    assert gpu_checks._gap_to_alone(CPU) < 1e-6  # alone, a group of one


def test_figures_are_ratios_with_quartiles(monkeypatch):
    monkeypatch.setattr(gpu_proof, "_KERNELS", gpu_checks._KERNELS[:1])
    found = list(prove("stages", CPU, True))
    assert len(found) == 8 and all(0 < f["low"] <= f["ratio"] <= f["high"] for f in found)
    found = gpu_proof._measured("x", "as fast", gpu_proof._ratio(([2., 4., 8.], [1., 1., 2.])))
    assert found["said"] == "4.00 (3.00 to 4.00) times as fast" and found["ratio"] == 4


def test_speed_says_what_a_cpu_cannot_tell(monkeypatch):
    from metaformer_edu.speed import benchmark
    monkeypatch.setattr(benchmark, "_TURN_SECONDS", 0)
    found = list(prove("speed", CPU, True))
    assert [f["state"] for f in found] == ["noted", "noted", "skipped", "skipped"]
    assert "times as fast as timm" in found[0]["said"] and found[0]["low"] <= found[0]["ratio"] <= found[0]["high"]


@pytest.mark.parametrize("gap, state", [(0.01, "works"), (0.2, "broken")])
def test_fast_that_moves_the_answers(monkeypatch, gap, state):
    from metaformer_edu.speed import fast
    real = fast.fast

    def moving(model, images, **how):
        found = real(model, images, **{**how, "without": list(fast.STEPS), "rounds": 1})
        return lambda x: found(x) * (1 + gap)
    monkeypatch.setattr(fast, "fast", lambda *args, **how: Moved(moving(*args, **how)))
    assert [f["state"] for f in prove("fast", CPU, True)] == ["noted", state]


class Moved:
    steps = [{"step": "as it is", "taken": True}]

    def __init__(self, f): self.f = f

    def __call__(self, x): return self.f(x)
