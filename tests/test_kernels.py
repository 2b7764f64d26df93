"""star_relu and the layers after it against their plain twins: values, gradients, what is kept, and who looks into them."""
import copy
import itertools
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaformer_edu.models.kernels import DepthwiseConv, Linear, channels_first, recipe_of, star_formula, star_relu
from metaformer_edu.models.layers import Mlp, StarReLU
from metaformer_edu.models.mixers import SepConv
from metaformer_edu.models.registry import create_model


class PlainStar(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.scale, self.bias = nn.Parameter(act.scale.detach().clone()), nn.Parameter(act.bias.detach().clone())

    def forward(self, x):
        return self.scale * F.relu(x) ** 2 + self.bias


def plain(model):
    "The same model from PyTorch's own layers."
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is StarReLU:
                setattr(module, name, PlainStar(child))
            elif type(child) is Linear:
                child.__class__ = nn.Linear
            elif type(child) is DepthwiseConv:
                child.__class__ = nn.Conv2d
    return model


def shaken_stars(model):
    for i, m in enumerate(m for m in model.modules() if isinstance(m, StarReLU)):
        nn.init.constant_(m.scale, 0.7 + 0.1 * i), nn.init.constant_(m.bias, -0.5 + 0.1 * i)
    return model


def run(model, x, dtype=None):
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    y.double().square().sum().backward()
    return y.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def close_in_norm(a, b, share):
    assert (a - b).norm() <= share * b.norm() + 1e-12, ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", ["identityformer", "randformer", "poolformerv2", "convformer", "caformer"])
@pytest.mark.parametrize("dtype, share", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("batch", [2, 16])  # PyTorch computes small batches on one thread without oneDNN
def test_models_equal_models_of_plain_layers(family, dtype, share, batch):
    torch.manual_seed(0)
    model = shaken_stars(create_model(f"tiny_{family}")).to(dtype).train()
    x = torch.randn(batch, 3, 64, 64, dtype=dtype)
    (y, grads), (y2, grads2) = run(model, x), run(plain(model), x)
    close_in_norm(y, y2, share)
    assert grads.keys() == grads2.keys()
    for name in grads:
        close_in_norm(grads[name], grads2[name], share)


@pytest.mark.parametrize("family", ["poolformerv2", "convformer", "caformer"])
def test_autocast_trains_with_gradients_near_those_of_float32(family):
    torch.manual_seed(0)
    model, x = shaken_stars(create_model(f"tiny_{family}")), torch.randn(4, 3, 64, 64)
    (y, grads), (y2, grads2) = run(model, x, torch.bfloat16), run(model, x)
    (y3, grads3) = run(plain(model), x, torch.bfloat16)
    close_in_norm(y, y2, 0.05)
    flat, flat2, flat3 = (torch.cat([g.flatten() for g in some.values()]) for some in (grads, grads2, grads3))
    assert (flat - flat2).norm() <= 1.3 * (flat3 - flat2).norm() <= 0.05 * flat2.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (7,), (2, 3, 5, 4)])
@pytest.mark.parametrize("training", [False, True])
def test_star_relu_equals_the_formula_in_every_dtype(dtype, shape, training):
    x = torch.randn(shape, dtype=dtype, requires_grad=training)
    s, b = torch.tensor([0.9]), torch.tensor([-0.4])
    if dtype == torch.float64:
        s, b = s.double(), b.double()
    y = star_relu(x, s, b)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype and y.shape == x.shape
    torch.testing.assert_close(y, star_formula(x, s, b), atol=2 * eps, rtol=2 * eps)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_star_relu_of_what_is_no_ordinary_number(value):
    x, s, b = torch.tensor([value, 1.0]), torch.tensor([0.5]), torch.tensor([0.25])
    torch.testing.assert_close(star_relu(x, s, b), star_formula(x, s, b), equal_nan=True)


def test_no_infinity_on_the_way_in_float16():
    x, s, b = torch.tensor([260.0]).half(), torch.tensor([0.89]), torch.zeros(1)
    assert (x * x).isinf() and star_relu(x, s, b).isfinite() and star_formula(x, s, b).isfinite()


@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=3)))
def test_gradients_of_whatever_wants_one(flags):
    args = [t.double().requires_grad_(f) for t, f in zip((torch.randn(3, 4), torch.tensor([0.9]), torch.tensor([-0.4])), flags)]
    if any(flags):
        assert torch.autograd.gradcheck(star_relu, args) and torch.autograd.gradgradcheck(star_relu, args)
    else:
        assert not star_relu(*args).requires_grad


@pytest.mark.parametrize("layer", [Linear(4, 3), Linear(4, 3, bias=False), DepthwiseConv(4, 3, 1), DepthwiseConv(4, 5, 0, bias=True)])
def test_gradients_through_the_layer_after_it(layer):
    layer = copy.deepcopy(layer).double()
    names = [n for n, _ in layer.named_parameters()]

    def f(x, s, b, *weights):
        y = star_relu(x, s, b)
        return torch.func.functional_call(layer, dict(zip(names, weights)), (channels_first(y) if isinstance(layer, nn.Conv2d) else y,))

    args = [t.detach().double().requires_grad_() for t in (torch.randn(2, 5, 6, 4), torch.tensor([0.9]), torch.tensor([-0.4]), *layer.parameters())]
    assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)


def kept(f, *args):
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f(*args)
    return sum(sizes.values())


@pytest.mark.parametrize("part, widths", [(lambda: Mlp(8), 1 + 4), (lambda: SepConv(8), 1 + 2 + 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hidden_tensor_is_kept_once(part, widths, dtype):
    "Input and hidden tensor of an Mlp; input, hidden tensor and what comes out of the depthwise convolution of a SepConv."
    part, x = part().to(dtype), torch.randn(2, 16, 16, 8, dtype=dtype, requires_grad=True)
    weights = sum(p.nbytes for p in part.parameters())
    assert widths * x.nbytes <= kept(part, x) <= widths * x.nbytes + weights
    assert kept(plain(part), x) >= (widths + 2) * x.nbytes


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 3, 5, 8), (2, 1, 3, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_an_mlp_trains_on_tokens_of_any_shape(shape, dtype, bias):
    mlp, x = Mlp(8, bias=bias).to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    twin = plain(mlp)
    wanted = [x, *mlp.parameters()], [x, *(dict(twin.named_parameters())[n] for n, _ in mlp.named_parameters())]
    for a, b in zip(*(torch.autograd.grad(m(x).square().sum(), w) for m, w in zip((mlp, twin), wanted))):
        torch.testing.assert_close(a, b, atol=1e-4 if dtype == torch.float32 else 1e-10, rtol=1e-4)


def test_autocast_without_convolutions(monkeypatch):
    monkeypatch.setattr("metaformer_edu.models.kernels._ONEDNN", False)
    torch.manual_seed(0)
    model, x = shaken_stars(create_model("tiny_convformer")), torch.randn(4, 3, 64, 64)
    for dtype in (None, torch.bfloat16):
        (y, grads), (y2, grads2) = run(model, x, dtype), run(plain(model), x)
        flat, flat2 = (torch.cat([g.flatten() for g in some.values()]) for some in (grads, grads2))
        close_in_norm(flat, flat2, 0.05 if dtype else 1e-4)


def test_a_recipe_does_not_outlive_a_change():
    s, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    y = star_relu(torch.randn(1, 2, 2, 3), s, b)
    assert recipe_of(y) and recipe_of(channels_first(y))
    y.mul_(2)
    assert recipe_of(y) is None and recipe_of(channels_first(y)) is None
    assert recipe_of(torch.ones(3)) is None
    with torch.no_grad():
        assert recipe_of(star_relu(torch.randn(3), s, b)) is None


def test_a_changed_activation_is_not_computed_again_from_its_recipe():
    mlp = Mlp(4).double()
    mlp.act.register_forward_hook(lambda m, i, y: y.mul_(3))
    twin = plain(mlp)
    twin.act.register_forward_hook(lambda m, i, y: y * 3)
    x = torch.randn(1, 3, 3, 4).double()
    for a, b in zip(torch.autograd.grad(mlp(x).square().sum(), mlp.parameters()),
                    torch.autograd.grad(twin(x).square().sum(), [twin.fc1.weight, twin.act.scale, twin.act.bias, twin.fc2.weight])):
        torch.testing.assert_close(a, b)


def test_checkpointing_frees_what_a_recipe_holds():
    model, x = create_model("tiny_convformer"), torch.randn(2, 3, 64, 64)
    before = kept(model, x)
    model.set_grad_checkpointing()
    assert kept(model, x) < before / 2
    y, grads = run(model, x)
    model.set_grad_checkpointing(False)
    y2, grads2 = run(model, x)
    assert torch.equal(y, y2) and all(torch.equal(grads[n], grads2[n]) for n in grads)


def test_torch_func_sees_the_formula():
    s, b, x = torch.tensor([0.9]), torch.tensor([-0.4]), torch.randn(3, 4)
    f = lambda x, s, b: star_relu(x, s, b).sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(0, None, None))(x, s, b)
    torch.testing.assert_close(per_sample, F.relu(x).square().sum(1, keepdim=True))
    value, tangent = torch.func.jvp(lambda s: star_relu(x, s, b), (s,), (torch.ones(1),))
    torch.testing.assert_close(tangent, F.relu(x).square())


def test_a_traced_model_knows_nothing_of_kernels():
    mlp, x = Mlp(4), torch.randn(1, 3, 3, 4)
    traced = torch.jit.trace(mlp, x)
    nn.init.constant_(mlp.act.scale, 2.0)  # a number read while tracing would be a constant
    torch.testing.assert_close(traced(x), mlp(x))
    program = torch.export.export(mlp.eval(), (x,))
    nn.init.constant_(program.state_dict["act.scale"], 3.0), nn.init.constant_(mlp.act.scale, 3.0)
    torch.testing.assert_close(program.module()(x), mlp(x))


def test_nothing_is_copied_for_a_layout():
    x = torch.randn(2, 8, 8, 16)
    for layer in (Linear(16, 32), SepConv(16), Mlp(16)):
        with torch.no_grad():
            assert layer(x).is_contiguous()
    calls = []

    class Copies(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f, types, args=(), kwargs=None):
            calls.append(getattr(f, "__name__", str(f)))
            return f(*args, **(kwargs or {}))

    with Copies():
        create_model("tiny_caformer")(torch.randn(1, 3, 64, 64))
    assert not {"contiguous", "clone", "copy_"} & set(calls)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory by other rules")
def test_kept_memory_is_not_asked_for_again():
    code = """if True:
        import resource, sys, torch
        from metaformer_edu.models.kernels import keep_memory
        if "keep" in sys.argv: keep_memory()
        def step(): return [torch.ones(2**21) for _ in range(4)]
        def pages(): step(); return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(-pages() + [pages() for _ in range(10)][-1])"""
    lazy, kept = (int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout) for how in ("", "keep"))
    assert kept < lazy / 4, (lazy, kept)


def test_the_gradient_of_a_depthwise_weight_lies_as_the_weight_does():
    "DistributedDataParallel warns otherwise."
    mixer = SepConv(8)
    mixer(torch.randn(2, 9, 9, 8)).sum().backward()
    assert mixer.dwconv.weight.grad.stride() == mixer.dwconv.weight.stride()
