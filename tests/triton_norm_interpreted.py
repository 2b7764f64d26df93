"""What the Triton kernels of residual and norm compute, in Triton's interpreter. tests/test_triton_norm.py runs this
file in a process of its own, because Triton asks for the interpreter when it is imported."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaformer_edu.models import triton_norm
from metaformer_edu.models.block import MetaFormerBlock, Stage
from metaformer_edu.models.kernels import use_kernels
from metaformer_edu.models.layers import LayerNormGeneral, LayerNormWithoutBias, Scale
from metaformer_edu.models.mixers import SepConv
from metaformer_edu.models.registry import create_model
from metaformer_edu.models.triton_norm import norm_backward, norm_formula, norm_forward, residual_norm

EPS, F32, F16, BF16 = 1e-6, torch.float32, torch.float16, torch.bfloat16
ROUNDING = {F32: 2**-20, F16: 2**-10, BF16: 2**-7}  # the interpreter cuts bfloat16 off, where a GPU rounds
SHAPES = [(1,), (7,), (3, 5, 7), (5, 1), (2, 3, 5, 40), (37, 64), (3, 320), (1, 1024), (130, 9)]
# of x, y, r, s and w: each alone, all but one, and none
WANTED = [tuple(i == j for i in range(5)) for j in range(5)] + [tuple(i != j for i in range(5)) for j in range(6)] + [
    (False,) * 5]
KINDS = [(F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (F16, F32)]  # of x and y


@pytest.fixture(autouse=True)
def triton_computes():
    torch.manual_seed(0)
    use_kernels({"norm": "triton"})
    yield
    use_kernels({})


@pytest.fixture
def calls(monkeypatch):
    "The kernels that were called, by name."
    names = []
    for name in ("norm_forward", "norm_backward"):
        f = getattr(triton_norm, name)
        monkeypatch.setattr(triton_norm, name, lambda *a, f=f: names.append(f.__name__) or f(*a))
    return names


def inputs(shape, x=F32, y=F32, r=True, s=True):
    "x, y, r, s and w, and gradients of z and n."
    vector = lambda: 1 + 0.3 * torch.randn(shape[-1:])
    x, y = torch.randn(shape).to(x), torch.randn(shape).to(y)
    z = torch.promote_types(x.dtype, y.dtype)
    gradients = torch.randn(shape).to(z), torch.randn(shape)
    return x, y, vector() if r else None, vector() if s else None, vector(), *gradients


def exact(x, y, r, s, w, dz, dn, z):
    "z in float64; n and all gradients in float64 from the z that was found."
    wide = lambda t: None if t is None else t.double()
    x, y, r, s, w, dz, dn, z = map(wide, (x, y, r, s, w, dz, dn, z))
    truth = norm_formula(x, y, r, s, w, EPS)[0]
    z, w = z.requires_grad_(), w.requires_grad_()
    n = F.layer_norm(z, w.shape, w, None, EPS)
    g, dw = torch.autograd.grad(n, (z, w), dn)
    g, total = g + dz, lambda t: t.reshape(-1, t.shape[-1]).sum(0)
    return truth, n.detach(), g if r is None else g * r, g if s is None else g * s, total(g * x), total(g * y), dw


def agree(x, y, r, s, w, dz, dn, needs=(True,) * 5):
    needs = (*needs[:2], needs[2] and r is not None, needs[3] and s is not None, needs[4])
    z, n = norm_forward(x, y, r, s, w, EPS, (dz.dtype, dn.dtype))
    grads = norm_backward(dz, dn, z, x, y, r, s, w, EPS, needs, (x.dtype, y.dtype))
    assert tuple(g is not None for g in grads) == needs
    truth = exact(x, y, r, s, w, dz, dn, z)
    for found, true, like in zip((z, n, *grads[:2]), truth, (dz, dn, x, y)):
        if found is not None:
            assert found.dtype == like.dtype and found.shape == like.shape and found.is_contiguous()
            torch.testing.assert_close(found.double(), true, rtol=ROUNDING[found.dtype], atol=1e-5)
    for found, true in zip(grads[2:], truth[4:]):
        if found is not None:
            assert found.dtype == w.dtype and found.shape == w.shape
            torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-4)
    return z, n, *grads


@pytest.mark.parametrize("shape, kinds", [*((shape, (F32, F16)) for shape in SHAPES),
                                          *(((3, 5, 7), kinds) for kinds in KINDS)], ids=str)
def test_values_and_gradients(shape, kinds):
    agree(*inputs(shape, *kinds))


@pytest.mark.parametrize("r, s", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("kinds", [(F32, F32), (F32, F16)], ids=str)
def test_without_a_scale(r, s, kinds):
    _, _, dx, dy, *_ = agree(*inputs((3, 5, 24), *kinds, r=r, s=s))
    assert (dx is dy) == (not r and not s and kinds == (F32, F32))


@pytest.mark.parametrize("programs", [1, 2])
def test_a_program_goes_through_several_tiles_and_the_sums_repeat_bit_for_bit(programs, monkeypatch):
    monkeypatch.setattr(triton_norm, "_PROGRAMS", programs)
    args = inputs((35, 50))  # 3 tiles of 16 rows, the last with 3
    first, second = agree(*args), agree(*args)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("needs", WANTED, ids=str)
def test_what_is_not_needed_is_not_given(needs):
    agree(*inputs((2, 3, 10)), needs)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(0, 8), (0, 4, 4, 8)], ids=str)
def test_an_empty_batch(shape, dtype):
    found = agree(*inputs(shape, dtype, dtype))
    assert all(t.shape == shape for t in found[:4]) and not any(t.any() for t in found[4:])


LAYOUTS = {
    "channels first": lambda t: t.permute(0, 3, 1, 2),
    "every other": lambda t: t[:, ::2],
    "every other channel": lambda t: t[..., ::2],
    "from the middle": lambda t: t[1:, 1:, :, 1:],
    "expanded": lambda t: t[:, :1].expand(-1, 6, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_with_gaps_and_in_another_order(layout):
    view = LAYOUTS[layout]
    x, y, dz, dn = (view(torch.randn(3, 6, 5, 8)) for _ in range(4))
    r, s, w = (torch.randn(2 * x.shape[-1])[::2] for _ in range(3))
    kept = [t.clone() for t in (x, y, dz, dn)]
    agree(x, y, r, s, w, dz, dn)
    assert all(torch.equal(a, b) for a, b in zip((x, y, dz, dn), kept))


def test_what_is_no_number_stays_in_its_token():
    x, y, r, s, w, *_ = inputs((6, 20))
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    z, n = norm_forward(x, y, r, s, w, EPS, (F32, F32))
    truth = norm_formula(x, y, r, s, w, EPS)
    torch.testing.assert_close((z, n), truth, equal_nan=True)
    assert n[[1, 4]].isnan().all() and n[[0, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_tokens_far_from_zero_and_tokens_without_variance(offset):
    x, y = torch.randn(4, 64) + offset, torch.zeros(4, 64)
    x[0] = offset
    _, n = norm_forward(x, y, None, None, torch.ones(64), EPS, (F32, F32))
    torch.testing.assert_close(n.double(), F.layer_norm(x.double(), (64,), eps=EPS), atol=1e-4, rtol=1e-4)
    assert not n[0].any()


# --- the operation ---

def operation(x, y, r, s, w):
    z, n = residual_norm(x, y, w, EPS, r, s)
    return z.sin() + n.cos()


def twin(x, y, r, s, w):
    z, n = norm_formula(x, y, r, s, w, EPS)
    return z.sin() + n.cos()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def leaves(*args):
    return [None if t is None else t.detach().clone().requires_grad_() for t in args]


@pytest.mark.parametrize("r, s", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_the_operation_is_its_twin_in_values_gradients_and_precisions(kinds, r, s, calls):
    args = leaves(*inputs((2, 3, 12), *kinds, r, s)[:5])
    wanted = [t for t in args if t is not None]
    results = []
    for f in (residual_norm, lambda x, y, w, eps, r, s: norm_formula(x, y, r, s, w, eps)):
        x, y, r, s, w = args
        z, n = f(x, y, w, EPS, r, s)
        results.append((z, n, *torch.autograd.grad(z.float().sin().sum() + n.float().cos().sum(), wanted)))
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        slack = 8 * max(torch.finfo(t.dtype).eps for t in args[:2])
        torch.testing.assert_close(a, b, rtol=0.01 + slack, atol=0.01 + 4 * slack if slack > 1e-4 else 1e-4)
    assert calls == ["norm_forward", "norm_backward"]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_gradients_of_whatever_wants_one_and_no_other(wanted):
    tensors = inputs((2, 3, 12))[:5]
    truth = torch.autograd.grad(twin(*(same := leaves(*tensors))).sum(), same)
    args = [t.detach().clone().requires_grad_(wants) for t, wants in zip(tensors, wanted)]
    out = operation(*args)
    assert out.requires_grad == any(wanted)
    if out.requires_grad:
        out.sum().backward()
    for a, t, wants in zip(args, truth, wanted):
        assert torch.allclose(a.grad, t, atol=1e-4) if wants else a.grad is None


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone_may_be_used(which):
    tensors = inputs((2, 3, 12))[:5]
    args, same = leaves(*tensors), leaves(*tensors)
    x, y, r, s, w = args
    found = torch.autograd.grad(residual_norm(x, y, w, EPS, r, s)[which].sin().sum(), args, allow_unused=True)
    x, y, r, s, w = same
    truth = torch.autograd.grad(norm_formula(x, y, r, s, w, EPS)[which].sin().sum(), same, allow_unused=True)
    for a, b in zip(found, truth):
        close(a, torch.zeros_like(a) if b is None else b)


def test_derivatives_of_all_kinds():
    args = inputs((2, 3, 12))[:5]
    tangents = tuple(torch.randn_like(t) for t in args)
    grads = lambda f: torch.func.grad(lambda *a: f(*a).sum(), argnums=tuple(range(5)))
    transforms = {
        "forward": lambda f: torch.func.jvp(f, args, tangents),
        "reverse": lambda f: grads(f)(*args),
        "an image at a time": lambda f: torch.func.vmap(grads(f), (0, 0, None, None, None))(*args),
        "twice": lambda f: torch.func.hessian(lambda w: f(*args[:4], w).sum())(args[4]),
        "reverse twice": lambda f: torch.func.jacrev(lambda r: grads(f)(*args[:2], r, *args[3:])[0].sum())(args[2]),
    }
    for transform in transforms.values():
        for a, b in zip(transform(operation), transform(twin)):
            close(a, b)


def test_second_derivatives_and_batches_of_gradients(calls):
    def twice(f):
        args = leaves(*inputs((2, 3, 12))[:5])
        grads = torch.autograd.grad(f(*args).sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), args)

    def batched(f):
        args = leaves(*inputs((2, 3, 12))[:5])
        return torch.autograd.grad(f(*args), args, torch.arange(72.).view(3, 2, 3, 4)[..., :1].expand(3, 2, 3, 12),
                                   is_grads_batched=True)

    for way in (twice, batched):
        torch.manual_seed(1)
        found = way(operation)
        torch.manual_seed(1)
        for a, b in zip(found, way(twin)):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-3)
    assert calls == ["norm_forward", "norm_backward", "norm_forward"]  # the second derivative comes back through z


def test_what_the_kernel_cannot_do_is_left_to_the_twin(calls):
    x, y, r, s, w, *_ = inputs((2, 3, 12))
    for a, b in ((x.double(), y), (x, y.double()), (x, y[:1])):
        weight = w.to(torch.promote_types(a.dtype, b.dtype))
        found, truth = residual_norm(a, b, weight, EPS), norm_formula(a, b, None, None, weight, EPS)
        assert all(torch.equal(f, t) for f, t in zip(found, truth))
    wide = torch.randn(1, 1025)
    assert not triton_norm.takes(wide) and triton_norm.takes(wide[:, :1024]) and not triton_norm.takes(wide[0, 0])
    residual_norm(wide, wide, torch.ones(1025), EPS)
    residual_norm(x.to("meta"), y.to("meta"), w.to("meta"), EPS)
    assert not calls


def test_training_keeps_z_and_x_only_for_the_gradient_of_its_scale():
    def kept(r, s):
        seen = {}
        x, y, r, s, w = leaves(*inputs((40, 64), r=r, s=s)[:5])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
            residual_norm(x, y, w, EPS, r, s)
        return sum(t.numel() == 40 * 64 for t in seen.values())

    assert [kept(r, s) for r, s in ((False, False), (True, False), (True, True))] == [1, 2, 3]


# --- in the block and the model ---

def run(model, x, dtype=F32):
    model.zero_grad()
    torch.manual_seed(3)  # for drop path
    with torch.autocast("cpu", dtype, enabled=dtype != F32):
        y = model(x)
    y.float().square().sum().backward()
    return y.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def against_pytorch(model, x, share, dtype=F32, same=False):
    found = run(model, x, dtype)
    use_kernels({})
    plain = run(model, x, dtype)
    use_kernels({"norm": "triton"})
    for a, b in zip(found, plain):
        assert a.shape == b.shape and (a - b).norm() <= share * b.norm() and (torch.equal(a, b) or not same)


def block(**options):
    block = MetaFormerBlock(8, SepConv, **options)
    for p in block.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return block


X = torch.randn(2, 4, 4, 8)


@pytest.mark.parametrize("options", [{}, dict(res_scale_init_value=1.0), dict(layer_scale_init_value=0.5),
                                     dict(res_scale_init_value=1.0, layer_scale_init_value=0.5, drop_path=0.5)],
                         ids=["bare", "ResScale", "LayerScale", "all"])
@pytest.mark.parametrize("dtype, share", [(F32, 1e-5), (BF16, 0.05)])
def test_a_block_trains_alike(options, dtype, share, calls):
    against_pytorch(block(**options), X, share, dtype)
    assert calls == ["norm_forward", "norm_backward"]


@pytest.mark.parametrize("family, dtype, share", [("convformer", F32, 1e-4), ("convformer", BF16, 0.1),
                                                  ("caformer", F32, 1e-4), ("poolformerv2", F32, 0)])
def test_a_model_trains_alike(family, dtype, share, calls):
    "PoolFormerV2 has LayerNormGeneral, which stays as it is."
    model = create_model(f"tiny_{family}").train()
    joins = sum(model.depths) if share else 0
    against_pytorch(model, torch.randn(1, 3, 64, 64), share, dtype, same=not joins)
    assert calls == ["norm_forward"] * joins + ["norm_backward"] * joins


def test_checkpointing_computes_the_same():
    stage = Stage(8, 2, SepConv, res_scale_init_value=1.0)
    plain = run(stage, X)
    stage.grad_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(run(stage, X), plain))


class DoubledNorm(LayerNormWithoutBias):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledScale(Scale):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", [
    dict(norm2=LayerNormGeneral(8)), dict(norm2=DoubledNorm(8)), dict(norm2=nn.LayerNorm(8)), dict(norm2=nn.Identity()),
    dict(res_scale1=DoubledScale(8)), dict(layer_scale1=nn.Tanh()),
    dict(norm2=nn.utils.parametrizations.weight_norm(LayerNormWithoutBias(8)))], ids=str)
def test_another_layer_in_its_place_is_not_passed_over(change, calls):
    part = block()
    for name, new in change.items():
        setattr(part, name, new)
    against_pytorch(part, X, 0, same=True)
    assert not calls


@pytest.mark.parametrize("name", ["norm2", "res_scale1", "layer_scale1"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_hook_sees_the_call(name, register, calls):
    part, seen = block(res_scale_init_value=1.0, layer_scale_init_value=1.0), []
    handle = getattr(getattr(part, name), register)(lambda *args: seen.append(args[0]))
    run(part, X)
    assert len(seen) == 1 and not calls
    handle.remove()
    run(part, X)
    assert len(seen) == 1 and len(calls) == 2


def test_a_hook_on_what_is_not_joined_and_a_hook_on_everything(calls):
    part, seen = block(), []
    for name in ("norm1", "token_mixer", "drop_path1", "mlp", "res_scale2"):
        getattr(part, name).register_forward_hook(lambda *args: seen.append(1))
    run(part, X)
    assert len(seen) == 5 and len(calls) == 2
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(type(m)))
    try:
        run(part, X)
    finally:
        handle.remove()
    assert LayerNormWithoutBias in seen and len(calls) == 2


WAYS = {
    "script": lambda part: torch.jit.script(part),
    "trace": lambda part: torch.jit.trace(part, X, check_trace=False),
    "fx": torch.fx.symbolic_trace,
    "export": lambda part: torch.export.export(part, (X,)).module(),
    "compile": lambda part: torch.compile(part, backend="eager"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_tracers_and_compilers_see_the_block_as_it_was(way, calls):
    part = block(res_scale_init_value=1.0).eval()
    found = WAYS[way](part)(X)
    assert not calls
    use_kernels({})
    torch.testing.assert_close(found, part(X))


def test_a_copy_joins_too(calls):
    part = block()
    y = part(X)
    assert torch.equal(copy.deepcopy(part)(X), y) and calls == ["norm_forward"] * 2


def test_an_empty_batch_passes_through_a_block(calls):
    x = X[:0].clone().requires_grad_()
    part = block(res_scale_init_value=1.0)
    part(x).sum().backward()
    assert x.grad.shape == x.shape and not part.norm2.weight.grad.any() and len(calls) == 2
