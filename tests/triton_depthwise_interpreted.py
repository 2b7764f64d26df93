"""What the Triton kernels of the depthwise convolution compute, in Triton's interpreter.
tests/test_triton_depthwise.py runs this file in a process of its own."""
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from metaformer_edu.models import triton_depthwise
from metaformer_edu.models.block import MetaFormerBlock
from metaformer_edu.models.kernels import star_depthwise, star_formula, use_kernels
from metaformer_edu.models.mixers import SepConv
from metaformer_edu.models.triton_depthwise import depthwise_backward, depthwise_forward

# the interpreter cuts bfloat16 off, where a GPU rounds
ROUNDING = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# (B, H, W, C), side of the window: a single number, one tile, four tiles, images that tiles cut
CASES = [((1, 1, 1, 1), 3), ((2, 7, 7, 8), 7), ((3, 5, 9, 33), 3), ((2, 2, 33, 5), 5)]
S, B = torch.tensor([0.9]), torch.tensor([-0.4])
each_dtype = pytest.mark.parametrize("dtype", ROUNDING, ids=str)
ALL = True, True, True


@pytest.fixture(autouse=True)
def seeded_and_pytorch_again():
    torch.manual_seed(0)
    use_kernels({})
    yield
    use_kernels({})


def twin(x, weight, bias):
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return y.permute(0, 2, 3, 1)


def exact(g, *args):
    "Value and gradients in float64."
    args = [t.detach().double().requires_grad_() for t in args]
    y = twin(*args)
    return y.detach(), *torch.autograd.grad(y, args, g.double())


def both(g, x, weight, bias):
    return depthwise_forward(x, weight, bias), *depthwise_backward(g, x, weight, ALL)


def agree(g, *args):
    "Each sum of float32 is wrong by at most a millionth of the sum of its terms' sizes; a result is rounded once."
    found = both(g, *args)
    sizes = exact(g.abs(), *(t.abs() for t in args))
    dtypes = g.dtype, g.dtype, torch.float32, torch.float32
    for a, b, size, dtype in zip(found, exact(g, *args), sizes, dtypes):
        assert a.dtype == dtype and a.shape == b.shape and a.is_contiguous()
        assert ((a.double() - b).abs() <= 1e-6 * size + ROUNDING[dtype] * b.abs()).all()


def random(shape, side, dtype=torch.float32):
    C = shape[-1]
    sizes = shape, shape, (C, 1, side, side), (C,)
    return [torch.randn(size).to(dtype) for size in sizes]  # g, x, weight, bias


@pytest.mark.parametrize("shape, side", CASES, ids=str)
def test_values_and_gradients(shape, side):
    agree(*random(shape, side))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_in_16_bits(dtype):
    agree(*random((2, 7, 5, 33), 3, dtype))
    agree(*random((1, 3, 9, 6), 7, dtype))


def test_a_window_of_one_and_a_window_larger_than_the_image():
    agree(*random((2, 3, 4, 5), 1))
    agree(*random((1, 2, 3, 2), 5))


def test_more_tokens_than_a_chunk_has_and_the_same_sums_each_time(monkeypatch):
    monkeypatch.setattr(triton_depthwise, "_STEPS", 2)
    tensors = random((2, 7, 11, 3), 3)
    assert 2 * triton_depthwise._SUM_TOKENS * 2 < 2 * 7 * 11  # three chunks
    agree(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(both(*tensors), both(*tensors)))


@each_dtype
def test_an_empty_batch(dtype):
    g, x, weight, bias = random((0, 5, 4, 6), 7, dtype)
    y, dx, dw, dbias = both(g, x, weight, bias)
    assert y.shape == dx.shape == x.shape and y.dtype == dx.dtype == dtype
    assert dw.shape == weight.shape and not dw.any() and dbias.shape == (6,) and not dbias.any()


LAYOUTS = {
    "channels first": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "columns before rows": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda t: t.repeat(1, 1, 1, 2)[..., ::2],
    "from the middle": lambda t: F.pad(t, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "expanded": lambda t: t[:1, :, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("g_layout", ["as x", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_with_gaps_and_in_another_order(layout, g_layout):
    g, x, weight, bias = random((2, 4, 5, 6), 3)
    x = LAYOUTS[layout](x)
    g = LAYOUTS[layout](g) if g_layout == "as x" else g
    assert not x.is_contiguous()
    kept = x.clone(), g.clone()
    agree(g, x, weight.flip(2).transpose(2, 3), bias)
    assert torch.equal(x, kept[0]) and torch.equal(g, kept[1])


def test_a_number_that_is_none_stays_in_its_window():
    g, x, weight, _ = random((2, 9, 9, 3), 3)
    x[0, 4, 4, 1] = torch.nan
    y = depthwise_forward(x, weight).isnan()
    assert y[0, 3:6, 3:6, 1].all() and y.sum() == 9
    dw = depthwise_backward(g, x, weight, (False, True, False))[1]
    assert dw[1].isnan().all() and dw[[0, 2]].isfinite().all()


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_what_is_not_needed_is_not_given(needs):
    tensors = random((1, 3, 4, 5), 3)
    found = depthwise_backward(*tensors[:3], needs)
    assert tuple(t is not None for t in found) == needs
    for a, b in zip(found, exact(*tensors)[1:]):
        if a is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# --- star_depthwise ---

def passes(args, padding=(1, 1)):
    y = star_depthwise(*args, padding)
    return y, *torch.autograd.grad(y.sin().sum(), [t for t in args if t is not None])


def arguments(side=3, dtype=torch.float32, bias=True):
    _, x, weight, offset = random((2, 5, 6, 8), side, dtype)
    args = [x, S.to(dtype), B.to(dtype), weight, offset if bias else None]
    return [None if t is None else t.detach().clone().requires_grad_() for t in args]


@pytest.fixture
def calls(monkeypatch):
    names = []
    for kernel in ("depthwise_forward", "depthwise_backward"):
        original = getattr(triton_depthwise, kernel)
        monkeypatch.setattr(triton_depthwise, kernel, lambda *a, f=original: names.append(f.__name__) or f(*a))
    return names


@pytest.mark.parametrize("bias", [True, False])
def test_the_kernels_compute_where_they_were_chosen(calls, bias):
    args = arguments(bias=bias)
    plain = passes(args)
    assert not calls
    use_kernels({"depthwise": "triton"})
    for a, b in zip(passes(args), plain):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert calls == ["depthwise_forward", "depthwise_backward"]
    with torch.no_grad():
        star_depthwise(*args, (1, 1))
    assert calls[2:] == ["depthwise_forward"]


def test_both_operations_by_triton(calls):
    args = arguments()
    plain = passes(args)
    use_kernels({"depthwise": "triton", "star_relu": "triton"})
    for a, b in zip(passes(args), plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_what_is_frozen_gets_no_gradient(calls):
    use_kernels({"depthwise": "triton"})
    args = [t.requires_grad_(i != 3) for i, t in enumerate(arguments())]
    star_depthwise(*args, (1, 1)).sum().backward()
    assert args[3].grad is None and all(t.grad is not None for t in (*args[:3], args[4])) and len(calls) == 2


@pytest.mark.parametrize("window, padding", [((3, 3), (0, 0)), ((4, 4), (2, 2)), ((3, 5), (1, 2)), ((3, 3), (1, 0))])
def test_other_windows_are_left_to_pytorch(calls, window, padding):
    args = arguments()
    args[3] = torch.randn(8, 1, *window, requires_grad=True)
    plain = passes(args, padding)
    use_kernels({"depthwise": "triton"})
    assert all(torch.equal(a, b) for a, b in zip(passes(args, padding), plain)) and not calls


def test_float64_and_second_derivatives_are_left_to_pytorch(calls):
    use_kernels({"depthwise": "triton"})
    f = lambda *args: star_depthwise(*args, (1, 1))
    args = [t[:1, :3, :3] if t.ndim == 4 and len(t) == 2 else t for t in arguments(dtype=torch.float64)]
    args = [t.detach().requires_grad_() for t in args]
    assert torch.autograd.gradcheck(f, args, fast_mode=True) and torch.autograd.gradgradcheck(f, args, fast_mode=True)
    assert not calls
    args = arguments()
    slope, = torch.autograd.grad(f(*args).sin().sum(), args[0], create_graph=True)
    second = torch.autograd.grad(slope.square().sum(), args)
    use_kernels({})
    slope, = torch.autograd.grad(f(*args).sin().sum(), args[0], create_graph=True)
    assert calls == ["depthwise_forward", "depthwise_backward"]  # of y; its gradient's gradient is PyTorch's
    for a, b in zip(second, torch.autograd.grad(slope.square().sum(), args)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_functorch_exporters_and_scripts_see_pytorch(calls):
    args = [t.detach() for t in arguments()]
    f = lambda *args: star_depthwise(*args, (1, 1))
    changes = tuple(map(torch.randn_like, args))
    ways = {
        "jvp": lambda: torch.func.jvp(f, tuple(args), changes)[1],
        "grad": lambda: torch.func.grad(lambda x: f(x, *args[1:]).sin().sum())(args[0]),
        "vmap": lambda: torch.func.vmap(f, (0, *4 * [None]))(args[0][:, None], *args[1:]),
        "script": lambda: torch.jit.script(star_depthwise)(*args, [1, 1]),
    }
    plain = {name: way() for name, way in ways.items()}
    use_kernels({"depthwise": "triton"})
    for name, way in ways.items():
        torch.testing.assert_close(way(), plain[name], rtol=1e-4, atol=1e-4)
    assert calls.count("depthwise_backward") == 0
    calls.clear()
    exported = torch.export.export(SepConv(4, kernel_size=3).eval(), (torch.randn(1, 4, 4, 4),))
    assert "conv2d" in exported.graph_module.code and not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_as_it_does_for_a_convolution(calls, dtype):
    args = arguments()
    use_kernels({"depthwise": "triton"})
    with torch.autocast("cpu", dtype):
        y = star_depthwise(*args, (1, 1))
    y.float().sum().backward()
    assert y.dtype == dtype and len(calls) == 2 and all(t.grad.dtype == torch.float32 for t in args)
    truth = star_depthwise(*(t.detach().double() for t in args), (1, 1))
    torch.testing.assert_close(y.double(), truth, rtol=0.05, atol=0.05)


def test_a_block_trains_alike(calls):
    block, x = MetaFormerBlock(8, partial(SepConv, kernel_size=3)), torch.randn(2, 4, 4, 8)

    def gradients():
        block.zero_grad()
        block(x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in block.parameters()])

    plain = gradients()
    use_kernels({"depthwise": "triton"})
    found = gradients()
    assert calls == ["depthwise_forward", "depthwise_backward"]
    assert not torch.equal(found, plain) and (found - plain).norm() <= 1e-5 * plain.norm()
    assert torch.equal(gradients(), found)


def test_the_formula_in_float64():
    "The whole operation in float32 is as near to its formula as the plain one is."
    args = arguments(side=5)
    wide = [t.detach().double().requires_grad_() for t in args]
    y = twin(star_formula(*wide[:3]), *wide[3:])
    truth = y, *torch.autograd.grad(y.sin().sum(), wide)
    use_kernels({"depthwise": "triton"})
    for a, b in zip(passes(args, (2, 2)), truth):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()
