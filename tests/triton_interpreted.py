"""What the Triton kernels compute, in Triton's interpreter. tests/test_triton.py runs this file in a process of its
own, because Triton asks for the interpreter when it is imported."""
import itertools

import pytest
import torch

from metaformer_edu.models import kernels, triton_star
from metaformer_edu.models.block import MetaFormerBlock
from metaformer_edu.models.kernels import (
    kernel_choice, star_depthwise, star_formula, star_linear, star_relu, use_kernels)
from metaformer_edu.models.mixers import SepConv
from metaformer_edu.speed import tune
from metaformer_edu.training import processes

# the interpreter cuts bfloat16 off, where a GPU rounds
ROUNDING = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPES = [(1,), (7,), (3, 5, 7, 11), (16384,), (16384 + 513,)]
S, B = torch.tensor([0.9]), torch.tensor([-0.4])
each_dtype = pytest.mark.parametrize("dtype", ROUNDING)
pytestmark = pytest.mark.usefixtures("pytorch_again")


def exact(x, g, s=S, b=B):
    "Values and gradients of the formula in float64."
    args = [t.detach().double().requires_grad_() for t in (x, s, b)]
    y = star_formula(*args)
    return y.detach(), *torch.autograd.grad(y, args, g.double())


def agree(x, g, found):
    y, dx, ds, db = exact(x, g)
    for a, b in zip(found, (y, dx)):
        assert a.dtype == x.dtype and a.shape == x.shape
        torch.testing.assert_close(a.double(), b, rtol=ROUNDING[x.dtype], atol=1e-6)
    sizes = (g.double().abs() * x.double().relu() ** 2).sum(), g.double().abs().sum()
    for a, b, size in zip(found[2:], (ds, db), sizes):
        assert a.dtype == torch.float32 and a.shape == (1,) and (a.double() - b).abs() <= 1e-6 * size


def both(x, g):
    return triton_star.star_forward(x, S, B), *triton_star.star_backward(g, x, S, (True, True, True))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    agree(x, g, both(x, g))


@each_dtype
@pytest.mark.parametrize("shape", [(0,), (0, 4, 4, 8)], ids=str)
def test_an_empty_batch(shape, dtype):
    x = torch.randn(shape).to(dtype)
    y, dx, ds, db = both(x, x)
    assert y.shape == dx.shape == x.shape and ds.item() == db.item() == 0


LAYOUTS = {
    "channels first": lambda t: t.permute(0, 3, 1, 2),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every other": lambda t: t[:, ::2],
    "from the middle": lambda t: t[1:, 1:],
    "expanded": lambda t: t[:, :1].expand(-1, 6, -1, -1),
    "one number": lambda t: t[:1, :1, :1, :1].expand(2, 3, 4, 5),
    "of length one": lambda t: t[:, :, :1].transpose(1, 2),
}


@pytest.mark.parametrize("g_layout", ["as x", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_with_gaps_and_in_another_order(layout, g_layout):
    x = LAYOUTS[layout](torch.randn(3, 6, 5, 8))
    g = LAYOUTS[layout](torch.randn(3, 6, 5, 8)) if g_layout == "as x" else torch.randn(x.shape)
    kept = x.clone(), g.clone()
    agree(x, g, both(x, g))
    assert torch.equal(x, kept[0]) and torch.equal(g, kept[1])
    assert triton_star.star_forward(x, S, B).stride() == torch.empty_like(x).stride()


def test_what_is_no_ordinary_number():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 260.0])
    torch.testing.assert_close(triton_star.star_forward(x, S, B), star_formula(x, S, B), equal_nan=True)
    assert triton_star.star_forward(torch.tensor([260.0]).half(), S, B).isfinite()
    dx = triton_star.star_backward(torch.ones(5), x, S, (True, False, False))[0]
    torch.testing.assert_close(dx, 2 * S * x.relu(), equal_nan=True)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_what_is_not_needed_is_not_given(needs):
    x, g = torch.randn(3, 700), torch.randn(3, 700)
    found = triton_star.star_backward(g, x, S, needs)
    assert tuple(t is not None for t in found) == needs
    for a, b in zip(found, exact(x, g)[1:]):
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_only_a_gradient_that_is_ours_is_written_over():
    x, g = torch.randn(3, 700), torch.randn(3, 700)
    kept = g.clone()
    dx = triton_star.star_backward(g, x, S, (True, True, True))[0]
    assert torch.equal(g, kept) and dx.data_ptr() != g.data_ptr()
    triton_star.star_backward(g, x, S, (False, True, True), ours=True)
    assert torch.equal(g, kept)
    again = triton_star.star_backward(g, x, S, (True, True, True), ours=True)[0]
    assert torch.equal(again, dx) and again.data_ptr() == g.data_ptr()


def passes(f, args):
    y = f(*args)
    return y, *torch.autograd.grad(y.sin().sum(), args)


OPERATIONS = {
    "star_relu": (star_relu, []),
    "star_linear": (star_linear, [(3, 8), (3,)]),
    "star_depthwise": (lambda *args: star_depthwise(*args, None, (1, 1)), [(8, 1, 3, 3)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operations_compute_by_the_kernel_that_was_chosen(name, monkeypatch):
    f, shapes = OPERATIONS[name]
    args = [t.detach().clone().requires_grad_() for t in (torch.randn(2, 5, 6, 8), S, B, *map(torch.randn, shapes))]
    plain, calls = passes(f, args), []
    for kernel in ("star_forward", "star_backward"):
        original = getattr(triton_star, kernel)
        monkeypatch.setattr(triton_star, kernel, lambda *a, f=original: calls.append(f.__name__) or f(*a))
    assert not calls
    use_kernels({"star_relu": "triton"})
    for a, b in zip(passes(f, args), plain):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = len(shapes) > 0  # a layer behind it computes y once more, for the gradient of its weight
    assert calls == ["star_forward"] * (1 + again) + ["star_backward"]
    with torch.no_grad():
        f(*args)
    assert calls[-1] == "star_forward"


def test_what_the_kernel_cannot_do_is_left_to_pytorch():
    use_kernels({"star_relu": "triton"})
    args = [t.double().requires_grad_() for t in (torch.randn(3, 4), S, B)]
    assert torch.autograd.gradcheck(star_relu, args) and torch.autograd.gradgradcheck(star_relu, args)
    x = torch.randn(3, 4, requires_grad=True)
    slope, = torch.autograd.grad(star_relu(x, S, B).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), x)[0], 2 * S * (x > 0))
    for i, t in enumerate(args):
        args[i] = t.detach().float().requires_grad_(i > 0)
    assert torch.autograd.grad(star_relu(*args).sum(), args[2])[0].item() == 12


@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_block_trains_alike(dtype, share):
    torch.manual_seed(0)
    block, x = MetaFormerBlock(8, SepConv), torch.randn(2, 4, 4, 8)

    def gradients():
        block.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = block(x)
        y.float().square().sum().backward()
        return torch.cat([p.grad.flatten() for p in block.parameters()])

    plain = gradients()
    use_kernels({"star_relu": "triton"})
    found = gradients()
    assert not torch.equal(found, plain) and (found - plain).norm() <= share * plain.norm()
    assert torch.equal(gradients(), found)


def test_tune_compares_both_and_leaves_what_was_chosen(monkeypatch):
    rows = tune.compare_kernels("star_relu", [(2, 3, 4, 5), (0, 3)], torch.float16, "cpu", rounds=1)
    assert [r["kernel"] for r in rows] == ["pytorch", "triton"] * 2 and {*kernel_choice().values()} == {"pytorch"}
    assert all(0 < r["ms"] and max(r["y"], r["dx"]) < 1e-3 and max(r["ds"], r["db"]) < 1e-6 for r in rows)
    assert not all(r["y"] for r in rows) and any(r["y"] for r in rows)  # of no numbers none is wrong


def clock_of(pytorch, triton):
    return lambda *runs, rounds, device: [[pytorch] * rounds, [triton] * rounds]


@pytest.mark.parametrize("seconds, wrong, best", [((1, 2), False, "pytorch"), ((2, 1), False, "triton"),
                                                  ((2, 1), True, "pytorch"), ((1, 1), False, "pytorch")])
def test_tune_takes_the_quickest_that_is_right(seconds, wrong, best, monkeypatch):
    monkeypatch.setattr(tune, "clock", clock_of(*seconds))
    if wrong:
        backward = triton_star.star_backward
        monkeypatch.setattr(triton_star, "star_backward",
                            lambda *a: tuple(None if t is None else 1.01 * t for t in backward(*a)))
    choice = tune.tune(2, torch.float32, "cpu", stages=[(3, 3, 4)])
    assert choice == kernel_choice() and choice["star_relu"] == best


def test_a_failed_comparison_leaves_what_was_chosen(monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(triton_star, "star_backward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        tune.tune(2, torch.float32, "cpu", stages=[(3, 3, 4)])
    assert {*kernel_choice().values()} == {"pytorch"}


def test_alone_nothing_is_broadcast():
    assert processes.world_size() == 1 and kernels._triton("star_relu", torch.randn(3)) is None
