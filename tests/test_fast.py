"""fast: equal answers, honest reports, and a sentence for what cannot be."""
import copy
import threading
import types

import pytest
import torch
from torch import nn

from metaformer_edu.models.kernels import kernel_choice
from metaformer_edu.models.mixers import Attention
from metaformer_edu.models.registry import create_model
from metaformer_edu.speed import fast as module
from metaformer_edu.speed.export import distance
from metaformer_edu.speed.fast import (
    STEPS, Candidate, Fast, ProductAttention, as_products, compiled, fast, halved, in_tf32, with_triton)

EAGER = ["compiled", "folded and compiled"]


def model_and_images(family="caformer", batch=4, **kwargs):
    torch.manual_seed(0)
    model = create_model(f"tiny_{family}", **kwargs)
    return model, torch.randn(batch, model.in_chans, 64, 64)


@pytest.fixture(autouse=True)
def decisions(tmp_path, monkeypatch):
    "A place for decisions that no other test knows."
    monkeypatch.setenv("METAFORMER_CACHE", str(tmp_path))
    return tmp_path / "fast"


@pytest.fixture
def always_quicker(monkeypatch):
    "Every new candidate is timed as quicker than the one before."
    monkeypatch.setattr(module, "clock",
                        lambda *fs, rounds=1, device="cpu": [[f() is None or 1.0 / (i + 1)] for i, f in enumerate(fs)])


@pytest.mark.parametrize("family", ["identityformer", "randformer", "poolformerv2", "convformer", "caformer"])
def test_all_steps_taken_together_leave_the_answers(family, always_quicker):
    model, images = model_and_images(family)
    before = copy.deepcopy(model.state_dict())
    quick = fast(model.train(), images, without=EAGER + ["bfloat16"])
    taken = {s["step"] for s in quick.steps if s["taken"]}
    assert (
        taken >= {"folded", "channels last", "half the batch at a time", "a quarter at a time"}
        and quick.candidate.piece == 1
    )
    assert ("attention as products" in taken) == (family == "caformer")
    model.eval()
    for n in (1, 3, 4, 7):
        x = torch.randn(n, 3, 64, 64)
        assert quick(x).shape == (n, 10) and quick(x).dtype == torch.float32 and distance(quick(x), model(x)) < 1e-5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and not quick(images).requires_grad
    assert {p.data_ptr() for p in quick.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


def test_float64_stays_exact(always_quicker):
    model, images = model_and_images()
    model, images = model.double().eval(), images.double()
    quick = fast(model, images, without=EAGER)
    assert {s["step"]: s["why"] for s in quick.steps}["bfloat16"] == "it computes in float64"
    assert distance(quick(images), model(images)) < 1e-10 and quick(images).dtype == torch.float64


def test_bfloat16_moves_the_answers_and_says_so(always_quicker):
    model, images = model_and_images()
    quick = fast(model, images, without=[s for s in STEPS if s != "bfloat16"])
    row = quick.steps[1]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip(row["why"])
    assert row["taken"] and 1e-4 < row["moved"] < 0.05 and next(quick.parameters()).dtype == torch.bfloat16
    assert row["moved"] == pytest.approx(distance(quick(images), model.eval()(images)), rel=0.5)
    assert quick(images).dtype == torch.float32
    exact = fast(model, images, tolerance=1e-4, without=EAGER)
    row = next(s for s in exact.steps if s["step"] == "bfloat16")
    assert not row["taken"] and row["why"] == "the answers move by more than 0.0001"


class Precision(nn.Module):
    "Answers with its input and notes how products of float32 are computed."
    def forward(self, x):
        self.seen = torch.get_float32_matmul_precision()
        return x


def test_products_are_in_tf32_only_while_the_model_runs():
    net, x = Precision(), torch.randn(2, 3)
    Candidate(net, torch.float32, precision="high")(x)
    assert net.seen == "high" and torch.get_float32_matmul_precision() == "highest"
    Candidate(net, torch.float32)(x)
    assert net.seen == "highest"


def test_tf32_needs_a_gpu_that_has_it(monkeypatch):
    start, gpu = Candidate(Precision(), torch.float32), types.SimpleNamespace(is_cuda=True, device="cuda")
    for capability in [(8, 0), (9, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert in_tf32(start, gpu).precision == "high"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for example in (gpu, torch.randn(2, 3)):
        with pytest.raises(ValueError, match="no units"):
            in_tf32(start, example)
    with pytest.raises(ValueError, match="bfloat16"):
        in_tf32(Candidate(Precision(), torch.bfloat16), gpu)


def test_triton_kernels_are_chosen_only_while_the_model_runs(monkeypatch):
    start, x, seen = Candidate(nn.Identity(), torch.float32), torch.randn(2, 3), []
    with pytest.raises(ValueError, match="Triton computes on a GPU"):
        with_triton(start, x)
    monkeypatch.setattr(module, "usable_kernels", lambda name, x: ("pytorch", "triton"))
    start.net.register_forward_hook(lambda *_: seen.append(kernel_choice()))
    before = kernel_choice()
    assert torch.equal(with_triton(start, x)(x), x) and torch.equal(start(x), x)
    assert {*seen[0].values()} == {"triton"} and seen[1] == before == kernel_choice()


def test_a_model_with_cuda_graphs_runs_uncompiled_in_another_thread(recwarn):
    def graph(x):
        assert threading.get_ident() == here, "a CUDA graph belongs to the thread that recorded it"
        return x

    here, x, answers = threading.get_ident(), torch.randn(3, 2), []
    candidate = Candidate(nn.Identity(), torch.float32, 2, compiled=graph, thread=here)
    assert torch.equal(candidate(x), x) and not recwarn
    other = threading.Thread(target=lambda: answers.append(candidate(x)))
    other.start()
    other.join()
    assert torch.equal(answers[0], x) and "compiled in another thread" in str(recwarn[0].message)


def test_what_is_not_quicker_is_not_taken(monkeypatch):
    monkeypatch.setattr(module, "clock", lambda *fs, rounds=1, device="cpu": [[1.0]] * len(fs))
    model, images = model_and_images()
    quick = fast(model, images, without=EAGER)
    assert [s["step"] for s in quick.steps if s["taken"]] == ["as it is"] and quick.candidate.piece is None
    assert torch.equal(quick(images), model.eval()(images))
    assert all(s["why"] == "not quicker" for s in quick.steps[1:] if s["images/s"])


def test_a_wrong_answer_is_never_taken(always_quicker, monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), float("nan"))

    monkeypatch.setitem(STEPS, "folded", lambda c, x: Candidate(Wrong(), c.dtype))
    quick = fast(*model_and_images(), without=[s for s in STEPS if s != "folded"])
    assert not quick.steps[1]["taken"] and "move" in quick.steps[1]["why"]


def test_a_step_that_breaks_the_model_is_a_row(always_quicker):
    class OnlyFloat32(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return x.float() @ self.weight  # in bfloat16 the two differ

    quick = fast(OnlyFloat32(), torch.randn(4, 3), without=[s for s in STEPS if s != "bfloat16"])
    assert not quick.steps[1]["taken"] and quick.steps[1]["why"] and quick(torch.randn(4, 3)).shape == (4, 2)


def test_the_report_has_a_row_for_each_step():
    model, images = model_and_images("poolformerv2")
    quick = fast(model, images, without=EAGER, rounds=1)
    rows = quick.report
    assert [r["step"] for r in rows] == ["as it is", *[s for s in STEPS if s not in EAGER]]
    assert (
        rows[0]["times"] == "1.00"
        and next(r for r in rows if r["step"] == "attention as products")["why"] == "there is no attention in it"
    )
    assert "images/s" in repr(quick) and "<table" in quick._repr_html_() and isinstance(quick, Fast)


@pytest.mark.parametrize("arguments, sentence", [
    (dict(model=3), "wants a module"), (dict(example="photo.jpg"), "wants an example"),
    (dict(example=torch.randn(0, 3, 64, 64)), "wants an example"),
    (dict(example=torch.ones(2, 3, 64, 64, dtype=torch.uint8)), "wants an example"),
    (dict(without=["compile"]), "Did you mean 'compiled'"),
    (dict(example=torch.randn(2, 3, 64, 64, device="meta")), "move one with"),
    (dict(example=torch.randn(2, 4, 64, 64)), "Expected images of shape"),
    (dict(model=nn.Linear(3, 2), example=torch.randn(2, 5)), "The model cannot take this example: .*mat1 and mat2"),
])
def test_bad_input_of_fast(arguments, sentence):
    model, images = model_and_images()
    with pytest.raises(ValueError, match=sentence):
        fast(**{**dict(model=model, example=images), **arguments})


def test_other_modules_and_shapes_of_answers():
    quick = fast(nn.Linear(3, 2), torch.randn(8, 3), without=EAGER, rounds=1)
    assert quick(torch.randn(5, 3)).shape == (5, 2)
    model, images = model_and_images(num_classes=0, global_pool="")
    assert fast(model, images, without=EAGER, rounds=1)(images).shape == (4, 2, 2, 64)


def test_products_equal_sdpa():
    for dim, heads in ((64, None), (48, 3)):
        mixer, x = Attention(dim, num_heads=heads, qkv_bias=True).double(), torch.randn(2, 5, 7, dim).double()
        other = as_products(mixer)
        assert type(other) is ProductAttention and type(mixer) is Attention
        torch.testing.assert_close(other(x), mixer(x), atol=1e-12, rtol=1e-10)
    with pytest.raises(ValueError, match="no attention"):
        as_products(nn.Linear(1, 1))


def test_a_compiled_candidate_fills_up_what_is_missing(monkeypatch):
    seen = []

    def fake(net, **kwargs):
        def run(x):
            seen.append(len(x))
            return net(x)
        return run

    monkeypatch.setattr(torch, "compile", fake)
    model, images = model_and_images("identityformer", batch=8)
    best = halved(Candidate(model.eval(), torch.float32), images)
    new = compiled(best, images)
    for n in (1, 4, 6, 8, 9):
        x = torch.randn(n, 3, 64, 64)
        torch.testing.assert_close(new(x), model(x), atol=1e-5, rtol=1e-4)
    assert set(seen) == {4}


def test_a_compiler_that_fails_is_a_row(monkeypatch, always_quicker):
    def fails(net, **kwargs):
        def run(x):
            raise RuntimeError("Failed to find C compiler.\nmore")
        return run

    monkeypatch.setattr(torch, "compile", fails)
    quick = fast(*model_and_images(), without=[s for s in STEPS if s != "compiled"])
    assert (
        quick.steps[1]["why"] == "it cannot be compiled here: Failed to find C compiler."
        and not quick.steps[1]["taken"]
    )


def test_compiling_one_small_module_for_real():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(6, 4)
    best = Candidate(net.eval(), torch.float32)
    try:
        new = compiled(best, x)
    except ValueError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(new(x), best(x))
    torch.testing.assert_close(new(x[:5]), best(x[:5]))
    with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
        torch.testing.assert_close(new(x.clone()), best(x))


# --- the decision is kept ---

HOW = dict(without=EAGER, progress=False)


def test_the_second_call_follows_the_decision_and_times_nothing(always_quicker, decisions, monkeypatch):
    model, images = model_and_images()
    first = fast(model, images, **HOW)
    monkeypatch.setattr(module, "clock", None)
    second = fast(model, images, **HOW)
    assert len(list(decisions.iterdir())) == 1
    assert [s["taken"] for s in second.steps] == [s["taken"] for s in first.steps] and second.candidate.piece == 1
    assert second.steps[0]["why"].startswith("decided on 20") and second.steps[1:] == first.steps[1:]
    assert torch.equal(first(images), second(images))
    other, _ = model_and_images()
    nn.init.normal_(other.head.fc2.weight)  # the same architecture, other weights
    assert distance(fast(other, images, **HOW)(images), other.eval()(images)) < 0.05


@pytest.mark.parametrize("change", [dict(batch=3), dict(family="convformer"), dict(num_classes=7), dict(tolerance=1e-3),
                                    dict(threads=True), dict(again=True), dict(without=[*EAGER, "folded"])])
def test_what_is_decided_anew(change, always_quicker, decisions, monkeypatch):
    fast(*model_and_images(), **HOW)
    timed, clock = [], module.clock
    monkeypatch.setattr(module, "clock", lambda *a, **k: timed.append(a) or clock(*a, **k))
    if change.pop("threads", None):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    how = {k: change.pop(k) for k in ("tolerance", "again", "without") if k in change}
    fast(*model_and_images(**change), **{**HOW, **how})
    assert timed and len(list(decisions.iterdir())) == (1 if how.get("again") else 2)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"date": "x", "steps": [1]}', '{"date": "x", "steps": []}'])
def test_a_damaged_decision_is_said_and_made_anew(text, always_quicker, decisions):
    model, images = model_and_images()
    fast(model, images, **HOW)
    path, = decisions.iterdir()
    whole = path.read_text()
    path.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read, so fast decides anew"):
        fast(model, images, **HOW)
    assert path.read_text() == whole


def test_a_decision_that_no_longer_holds_is_made_anew(always_quicker, decisions, monkeypatch):
    model, images = model_and_images()
    fast(model, images, **HOW)
    path, = decisions.iterdir()
    kept = path.read_text()
    path.write_text(kept.replace('"folded"', '"no such step"'))
    assert fast(model, images, **HOW).steps[0]["why"] == ""
    assert path.read_text() == kept
    wrong = lambda c, example: Candidate(nn.Sequential(c.net, nn.Linear(10, 10)), c.dtype)
    monkeypatch.setitem(STEPS, "folded", wrong)  # the answers move too far: decided anew, without it
    again = fast(model, images, **HOW)
    assert not next(s for s in again.steps if s["step"] == "folded")["taken"]


def test_a_place_that_cannot_be_written_costs_a_warning_only(always_quicker, decisions):
    decisions.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="The decision cannot be kept in"):
        quick = fast(*model_and_images(), **HOW)
    assert quick.candidate.piece == 1


def test_without_time_nothing_is_tried_and_nothing_kept(decisions):
    model, images = model_and_images()
    quick = fast(model, images, budget=0, **HOW)
    assert {s["why"] for s in quick.steps[1:]} == {"no time was left"}
    assert torch.equal(quick(images), model.eval()(images))
    assert not decisions.exists()
