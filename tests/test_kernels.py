"""star_relu, star_linear and star_depthwise against their plain twins: values, gradients, what is kept, and who
looks into them."""
import copy
import itertools
import platform
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaformer_edu.models import kernels, layers
from metaformer_edu.models.kernels import DepthwiseConv, Linear, star_depthwise, star_formula, star_linear, star_relu
from metaformer_edu.models.layers import LayerNormGeneral, Mlp, StarReLU, set_norm_without_copy
from metaformer_edu.models.mixers import RandomMixing, SepConv
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
        nn.init.constant_(m.scale, 0.7 + 0.1 * i)
        nn.init.constant_(m.bias, -0.5 + 0.1 * i)
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
    args = [t.double().requires_grad_(f)
            for t, f in zip((torch.randn(3, 4), torch.tensor([0.9]), torch.tensor([-0.4])), flags)]
    if any(flags):
        assert torch.autograd.gradcheck(star_relu, args) and torch.autograd.gradgradcheck(star_relu, args)
    else:
        assert not star_relu(*args).requires_grad


def fused(layer):
    "StarReLU and the layer as one operation, on tensors in place of the layer's own."
    if isinstance(layer, nn.Conv2d):
        return lambda x, s, b, weight, bias=None: star_depthwise(x, s, b, weight, bias, layer.padding)
    return star_linear


def twin(layer):
    "The same from PyTorch's own functions."
    def f(x, s, b, weight, bias=None):
        y = star_formula(x, s, b)
        if not isinstance(layer, nn.Conv2d):
            return F.linear(y, weight, bias)
        return F.conv2d(y.permute(0, 3, 1, 2), weight, bias, padding=layer.padding,
                        groups=layer.groups).permute(0, 2, 3, 1)
    return f


LAYERS = [Linear(4, 3), Linear(4, 3, bias=False), DepthwiseConv(4, 3, 1), DepthwiseConv(4, 5, 0, bias=True)]
each_layer = pytest.mark.parametrize("layer", LAYERS,
                                     ids=["linear", "linear without bias", "depthwise", "depthwise with bias"])


def arguments(layer, dtype=torch.float64):
    tensors = (torch.randn(2, 5, 6, 4), torch.tensor([0.9]), torch.tensor([-0.4]), *layer.parameters())
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


@each_layer
def test_gradients_through_the_layer_after_it(layer):
    f, args = fused(layer), arguments(layer)
    torch.testing.assert_close(f(*args), twin(layer)(*args))
    assert torch.autograd.gradcheck(f, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, args, check_fwd_over_rev=True)


@each_layer
def test_gradients_of_whatever_wants_one_and_no_other(layer):
    f, args = fused(layer), arguments(layer)
    truth = torch.autograd.grad(twin(layer)(*args).sin().sum(), args)
    for wanted in range(1, 2 ** len(args)):
        chosen = [a.detach().requires_grad_(bool(wanted >> i & 1)) for i, a in enumerate(args)]
        f(*chosen).sin().sum().backward()
        for a, t in zip(chosen, truth):
            assert a.grad is None if not a.requires_grad else torch.allclose(a.grad, t, rtol=1e-8)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    "The names of what PyTorch computes, and the numbers of float32 elements that come out of conversions."
    def __init__(self):
        super().__init__()
        self.names, self.float32 = [], [0]

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.names.append(f.overloadpacket.__name__)
        if torch.is_tensor(out) and out.dtype == torch.float32 and any(torch.is_tensor(a) and a.dtype != out.dtype
                                                                       for a in args):
            self.float32.append(out.numel())
        return out


def test_a_gradient_that_nobody_needs_is_not_computed():
    def products(**frozen):
        x, s, b, weight = torch.randn(6, 4), torch.tensor([0.9]), torch.tensor([-0.4]), torch.randn(3, 4)
        args = [t.double().requires_grad_(n not in frozen) for n, t in dict(x=x, s=s, b=b, weight=weight).items()]
        y = star_linear(*args).sum()
        with Calls() as calls:
            y.backward()
        return (
            calls.names.count("mm"),
            calls.names.count("addcmul"),
            calls.names.count("dot"),
            calls.names.count("relu"),
        )
    assert products() == (2, 1, 1, 2)
    assert products(weight=True) == (1, 0, 1, 1)  # y is not computed again
    assert products(s=True, b=True) == (2, 1, 0, 2)
    assert products(x=True, s=True, b=True) == (1, 1, 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("f", [star_relu, star_linear], ids=["star_relu", "star_linear"])
def test_in_16_bits_no_float32_copy_of_a_whole_tensor(f, dtype):
    x = torch.randn(3 * 2**18, dtype=dtype).view(-1, 256).requires_grad_()
    s, b = nn.Parameter(torch.tensor([0.9])), nn.Parameter(torch.tensor([-0.4]))
    weight = [torch.randn(8, 256, dtype=dtype).requires_grad_()] if f is star_linear else []
    with Calls() as calls:
        f(x, s, b, *weight).sum().backward()
    assert 0 < max(calls.float32) <= 2**18 < x.numel() and s.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", [False, True], ids=["star_relu", "star_linear"])
def test_in_16_bits_the_gradients_of_scale_and_bias_are_summed_in_float32(pair, dtype):
    """4,099 ones: neither format has that number, nor is 3 times it one; a sum in 16 bits, or rounded to them, is
    another."""
    s, b = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.tensor([0.25]))
    x = torch.ones(4099, 1, dtype=dtype).requires_grad_()
    y = star_linear(x, s, b, torch.ones(3, 1, dtype=dtype)) if pair else star_relu(x, s, b)
    y.backward(torch.ones_like(y))
    assert b.grad.item() == s.grad.item() == 4099 * (3 if pair else 1)


@pytest.mark.parametrize("pair", [False, True], ids=["star_relu", "star_linear"])
def test_the_gradient_of_the_scale_of_more_numbers_than_cublas_counts(pair, monkeypatch):
    "cuBLAS takes 2**31 - 1 numbers at most; here it takes 100."
    dot, sizes = torch.dot, []

    def picky(a, b):
        sizes.append(len(a))
        assert len(a) <= 100, "dot only supports n, incx, incy with the bound INT_MAX"
        return dot(a, b)

    monkeypatch.setattr(kernels, "_DOT_MOST", 100)
    monkeypatch.setattr(torch, "dot", picky)
    x, s, b = torch.randn(13, 5, 7).double(), nn.Parameter(torch.tensor([0.9]).double()), torch.tensor([-0.4]).double()
    weight = [torch.randn(3, 7).double()] if pair else []
    f, g = (star_linear, lambda x, s, b, w: F.linear(star_formula(x, s, b), w)) if pair else (star_relu, star_formula)
    found, truth = (torch.autograd.grad(h(x, s, b, *weight).sin().sum(), s) for h in (f, g))
    torch.testing.assert_close(found, truth)
    assert sizes == [100] * 4 + [55]


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice differentiable"])
def test_who_wants_the_bias_alone_reads_the_gradient_alone(twice):
    x, s, b = torch.randn(4, 6), torch.tensor([0.9]), nn.Parameter(torch.tensor([-0.4]))
    y = star_relu(x, s, b).sum()
    with Calls() as calls:
        torch.autograd.grad(y, b, create_graph=twice)
    assert not {"relu", "mul", "mul_", "dot"} & {*calls.names}
    x, b = x.requires_grad_(), b.detach()
    y = star_relu(x, s, b).sum()
    with Calls() as calls:
        torch.autograd.grad(y, x, create_graph=twice)
    assert not {"sum", "dot"} & {*calls.names}


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
    """Input and hidden tensor of an Mlp; input, hidden tensor and what comes out of the depthwise convolution of a
    SepConv."""
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
        (_, grads), (_, grads2) = run(model, x, dtype), run(plain(model), x)
        flat, flat2 = (torch.cat([g.flatten() for g in some.values()]) for some in (grads, grads2))
        close_in_norm(flat, flat2, 0.05 if dtype else 1e-4)


# --- who may stand for whom ---

class Seen(Exception):
    pass


def seen(*args):
    raise Seen


class LoRA(nn.Module):
    "A frozen linear layer and a small one beside it, as adapters have it."
    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.down, self.up = (
            base.requires_grad_(False),
            nn.Linear(base.in_features, rank),
            nn.Linear(rank, base.out_features),
        )

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


X4 = torch.randn(2, 3, 5, 8)


@pytest.fixture
def fused_calls(monkeypatch):
    "Counts what the layers call."
    calls = []
    for module, name in (("layers", "star_linear"), ("mixers", "star_depthwise")):
        f = getattr(kernels, name)
        monkeypatch.setattr(f"metaformer_edu.models.{module}.{name}",
                            lambda *a, f=f, name=name: calls.append(name) or f(*a))
    return calls


def step_by_step(part, x):
    if isinstance(part, Mlp):
        return part.drop(part.fc2(part.drop(part.act(part.fc1(x)))))
    y = part.dwconv(part.act1(part.pwconv1(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return part.pwconv2(part.act2(y))


def test_the_fused_path_is_taken_and_the_switch_turns_it_off(fused_calls):
    for part in (Mlp(8), SepConv(8), Mlp(8, drop=0.5).eval(), Mlp(8, bias=True)):
        before = len(fused_calls)
        torch.testing.assert_close(part(X4), step_by_step(part, X4), atol=1e-5, rtol=1e-4)
        assert len(fused_calls) == before + 1
        try:
            kernels.set_fused_star(False)
            assert not kernels.use_fused_star()
            torch.testing.assert_close(part(X4), step_by_step(part, X4), atol=1e-5, rtol=1e-4)
            assert len(fused_calls) == before + 1
        finally:
            kernels.set_fused_star(True)
    assert fused_calls == ["star_linear", "star_depthwise", "star_linear", "star_linear"] and kernels.use_fused_star()


@pytest.mark.parametrize("replace",
                         [lambda fc: nn.Linear(32, 8, bias=False), lambda fc: Doubled(32, 8), LoRA,
                          lambda fc: nn.Identity(),
                                     lambda fc: nn.Sequential(fc, nn.Tanh()),
                          lambda fc: nn.utils.parametrizations.weight_norm(fc)],
                         ids=["PyTorch's", "a subclass", "LoRA", "identity", "sequence", "weight norm"])
def test_another_layer_in_its_place_is_not_passed_over(replace, fused_calls):
    mlp = Mlp(8)
    mlp.fc2 = replace(mlp.fc2)
    ran = mlp.fc2.forward
    y = mlp(X4)
    torch.testing.assert_close(y, ran(star_relu(mlp.fc1(X4), mlp.act.scale, mlp.act.bias)))
    y.sum().backward()
    assert not fused_calls and all(p.grad is not None for p in mlp.parameters() if p.requires_grad)


def test_another_convolution_or_activation_is_not_passed_over(fused_calls):
    for change in (dict(dwconv=nn.Conv2d(16, 16, 3, padding=1)), dict(act1=nn.GELU()),
                   dict(act1=PlainStar(StarReLU()))):
        part = SepConv(8)
        for name, new in change.items():
            setattr(part, name, new)
        torch.testing.assert_close(part(X4), step_by_step(part, X4))
    part = SepConv(8)
    part.dwconv.stride = (2, 2)
    assert part(X4).shape == (2, 2, 3, 8)
    part = SepConv(8)
    part.dwconv.padding_mode = "circular"
    part.dwconv._reversed_padding_repeated_twice = [3, 3, 3, 3]
    torch.testing.assert_close(part(torch.randn(1, 9, 9, 8)).shape, torch.Size([1, 9, 9, 8]))
    assert not fused_calls


@pytest.mark.parametrize("name", ["act", "fc2"])
@pytest.mark.parametrize("register",
                         ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                                      "register_full_backward_pre_hook"])
def test_a_hook_sees_the_call(name, register, fused_calls):
    mlp, calls = Mlp(8), []
    handle = getattr(getattr(mlp, name), register)(lambda *args: calls.append(args[0]))
    mlp(X4.clone().requires_grad_()).sum().backward()
    assert calls == [getattr(mlp, name)] and not fused_calls
    handle.remove()
    mlp(X4)
    assert len(calls) == 1 and fused_calls == ["star_linear"]


def test_a_hook_for_all_modules_and_a_forward_of_its_own_are_seen(fused_calls):
    mlp, calls = Mlp(8), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: calls.append(m))
    mlp(X4)
    handle.remove()
    assert mlp.fc2 in calls and mlp.act in calls
    mlp.fc2.forward = seen
    with pytest.raises(Seen):
        mlp(X4)
    assert not fused_calls


def test_a_dropout_at_work_is_not_passed_over(fused_calls):
    mlp = Mlp(8, drop=0.5).train()
    torch.manual_seed(0)
    y = mlp(X4)
    torch.manual_seed(0)
    torch.testing.assert_close(y, step_by_step(mlp, X4))
    assert not fused_calls and (y == 0).any()
    mlp.drop = nn.AlphaDropout(0.5).eval()  # one that we do not know
    mlp(X4)
    assert not fused_calls


def test_the_activations_of_a_model_can_be_captured():
    from metaformer_edu.core.basics import Capture
    model, x = create_model("tiny_convformer").eval(), torch.randn(1, 3, 64, 64)
    names = [n for n, m in model.named_modules() if isinstance(m, (StarReLU, Linear, DepthwiseConv))]
    with Capture(model, *names) as found:
        y = model(x)
    assert list(found) == names or set(found) == set(names)
    torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)


def test_a_changed_activation_is_not_computed_again_from_its_recipe():
    mlp = Mlp(4).double()
    mlp.act.register_forward_hook(lambda m, i, y: y.mul_(3))
    twin = plain(mlp)
    twin.act.register_forward_hook(lambda m, i, y: y * 3)
    x = torch.randn(1, 3, 3, 4).double()
    for a, b in zip(torch.autograd.grad(mlp(x).square().sum(), mlp.parameters()),
                    torch.autograd.grad(twin(x).square().sum(),
                                        [twin.fc1.weight, twin.act.scale, twin.act.bias, twin.fc2.weight])):
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


def per_sample(f, loss):
    return torch.func.vmap(torch.func.grad(lambda *a: loss(f(*a)), argnums=tuple(range(5))),
                           in_dims=(0, None, None, None, None))


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3]], ids=["linear", "depthwise"])
def test_torch_func(layer):
    f, plain_f = fused(layer), twin(layer)
    args = [a.detach() for a in arguments(layer)]
    loss = lambda *a, f: f(*a).sin().sum()  # noqa: E731
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)  # noqa: E731
    many = torch.stack([args[0], args[0] - 1, 2 * args[0]])
    for how in (lambda f: torch.func.jacrev(f, argnums=(0, 1, 2, 3, 4))(*args),
                lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2, 3, 4))(*args),
                lambda f: torch.func.hessian(partial(loss, f=f), argnums=(1, 2, 3))(*args),
                lambda f: per_sample(f, lambda y: y.sin().sum())(many, *args[1:]),
                lambda f: torch.func.vmap(f, in_dims=(None, 0, 0, None,
                                                      None))(args[0], args[1] * torch.ones(3, 1),
                                                             args[2] + torch.ones(3, 1), *args[3:]),
                lambda f: torch.func.vmap(f, in_dims=(0, None, None, 0,
                                                      0))(many, *args[1:3],
                                                          *(torch.stack([a, -a, 2 * a]) for a in args[3:])),
                lambda f: torch.func.jvp(f, tuple(args), tuple(torch.ones_like(a) for a in args))):
        close(how(f), how(plain_f))


def test_torch_func_of_star_relu():
    s, b, x = torch.tensor([0.9]), torch.tensor([-0.4]), torch.randn(3, 4)
    f = lambda x, s, b: star_relu(x, s, b).sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(f, argnums=1), in_dims=(0, None, None))(x, s, b)
    torch.testing.assert_close(per_sample, F.relu(x).square().sum(1, keepdim=True))
    value, tangent = torch.func.jvp(lambda s: star_relu(x, s, b), (s,), (torch.ones(1),))
    torch.testing.assert_close(tangent, F.relu(x).square())
    with torch.autograd.forward_ad.dual_level():
        y = star_relu(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), s, b)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, 2 * s * F.relu(x))


def test_a_whole_model_under_torch_func():
    model = shaken_stars(create_model("tiny_convformer")).double().eval()
    params, x = {k: p.detach() for k, p in model.named_parameters()}, torch.randn(3, 3, 64, 64, dtype=torch.float64)
    def loss(params, x): return torch.func.functional_call(model, params, x[None]).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for i in range(3):
        model.zero_grad()
        model(x[i:i + 1]).square().sum().backward()
        for k, p in model.named_parameters():
            torch.testing.assert_close(each[k][i], p.grad, rtol=1e-8, atol=1e-10)
    _, moved = torch.func.jvp(partial(loss, params), (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(moved, torch.func.grad(loss, argnums=1)(params, x[0]).sum())


@pytest.mark.parametrize("part", [Mlp(8), SepConv(8)], ids=["Mlp", "SepConv"])
def test_for_torch_fx_the_pair_is_one_step_forward_and_backward(part):
    graph = torch.fx.symbolic_trace(part)
    called = [n.target.__name__
              for n in graph.graph.nodes if n.op == "call_function" and n.target.__module__ == kernels.__name__]
    assert called == (["_linear", "star_linear"] if isinstance(part, Mlp) else ["_linear", "star_depthwise", "_linear"])
    x, weights = torch.randn(2, 9, 9, 8, requires_grad=True), sum(p.nbytes for p in part.parameters())
    assert torch.equal(graph(x), part(x)) and kept(graph, x) == kept(part, x) <= 5 * x.nbytes + weights
    for a, b in zip(*(torch.autograd.grad(m(x).sin().sum(), [x, *m.parameters()]) for m in (graph, part))):
        assert torch.equal(a, b)
    torch.testing.assert_close(torch.jit.script(graph)(x), part(x))


@pytest.mark.parametrize("how", ["compile", "export", "trace"])
def test_compilers_and_exporters_see_linear_layers_and_the_formula(how):
    model, x = create_model("tiny_convformer").eval().requires_grad_(False), torch.randn(2, 3, 64, 64)
    linears = sum(type(m) is Linear for m in model.modules()) + 2  # and the head's
    if how == "trace":
        kinds = [n.kind() for n in torch.jit.trace(model, x, check_trace=False).inlined_graph.nodes()]
        linear, convs = kinds.count("aten::linear"), kinds.count("aten::_convolution")
    elif how == "export":
        names = [str(n.target) for n in torch.export.export(model, (x,)).graph.nodes]
        linear, convs = names.count("aten.linear.default"), names.count("aten.conv2d.default")
        assert not [n for n in names if "addcmul" in n]
    else:
        graphs = []
        torch.compile(model, fullgraph=True, backend=lambda g, example: graphs.append(g) or g.forward)(x)
        torch.compiler.reset()
        targets = [n.target for n in graphs[0].graph.nodes]
        linear, convs = targets.count(torch._C._nn.linear), targets.count(torch.conv2d)
    depthwise = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert (linear, convs) == (linears, depthwise)


def test_a_traced_model_knows_nothing_of_kernels():
    mlp, x = Mlp(4), torch.randn(1, 3, 3, 4)
    traced = torch.jit.trace(mlp, x)
    nn.init.constant_(mlp.act.scale, 2.0)  # a number read while tracing would be a constant
    torch.testing.assert_close(traced(x), mlp(x))
    program = torch.export.export(mlp.eval(), (x,))
    nn.init.constant_(program.state_dict["act.scale"], 3.0)
    nn.init.constant_(mlp.act.scale, 3.0)
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
    """glibc may keep some memory by itself, if by chance a small thing lies behind it. So the tensors grow: each is
    larger than any before, for which glibc alone takes new pages; then tensors of one size, as in training."""
    code = """if True:
        import resource, sys, torch
        from metaformer_edu.models.kernels import keep_memory
        if "keep" in sys.argv: keep_memory()
        def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def step(): return [torch.ones(2**21) for _ in range(4)]
        start = pages()
        for quarter in range(60, 120): torch.ones(quarter * 2**16)
        growing = pages() - start
        for _ in range(10): step()
        start = pages()
        for _ in range(10): step()
        print(growing, pages() - start)"""
    lazy, kept = (list(map(int, subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True,
                                               check=True).stdout.split())) for how in ("", "keep"))
    assert kept[0] < lazy[0] / 4 and kept[1] < 2**11, (lazy, kept)  # 2**11: one of forty tensors


def test_the_gradient_of_a_depthwise_weight_lies_as_the_weight_does():
    "DistributedDataParallel warns otherwise."
    mixer = SepConv(8)
    mixer(torch.randn(2, 9, 9, 8)).sum().backward()
    assert mixer.dwconv.weight.grad.stride() == mixer.dwconv.weight.stride()


def test_random_mixing_under_autocast_converts_its_matrix_once_and_not_for_each_image():
    mixer, x = RandomMixing(num_tokens=16), torch.randn(5, 4, 4, 8)
    converted = []

    class Conversions(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if f.overloadpacket.__name__ == "_to_copy":
                converted.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    with torch.autocast("cpu", torch.bfloat16):
        with Conversions():
            y = mixer(x)
        assert mixer.double()(x.double()).dtype == torch.float64  # which autocast leaves alone
    assert sorted(converted) == [16 * 16, x.numel()]
    truth = (mixer.random_matrix.bfloat16().double() @ x.bfloat16().double().flatten(1, 2)).view_as(x)
    torch.testing.assert_close(y.double(), truth, atol=2e-2, rtol=1e-2)
    graph = torch.fx.symbolic_trace(mixer)
    assert torch.equal(graph(x.double()), mixer(x.double()))
    torch.testing.assert_close(torch.jit.script(graph)(x.double()), mixer(x.double()))


@pytest.fixture
def as_on_a_gpu():
    set_norm_without_copy(True)
    yield
    set_norm_without_copy(None)


def norm_and_grads(norm, x):
    x = x.detach().requires_grad_()
    y = norm(x)
    return y, *torch.autograd.grad(y.double().sin().sum(), [x, norm.weight])


@pytest.mark.parametrize("dtype, share", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(2, 5, 7, 6), (1, 1, 1, 6), (3, 14, 14, 6), (0, 4, 4, 6)])
def test_the_norm_over_images_as_on_a_gpu_equals_group_norm(dtype, share, shape, as_on_a_gpu):
    norm, x = LayerNormGeneral(6), 3 * torch.randn(shape) + 2
    nn.init.uniform_(norm.weight, 0.5, 2)
    with Calls() as calls:
        found = norm_and_grads(norm.to(dtype), x.to(dtype))
    assert "native_layer_norm" in calls.names and "native_group_norm" not in calls.names
    assert not {"clone", "copy_", "contiguous"} & {*calls.names}
    set_norm_without_copy(False)
    for a, b in zip(found, norm_and_grads(norm.double(), x.to(dtype).double())):
        assert a.dtype == dtype and a.shape == b.shape
        close_in_norm(a.double(), b, share)


def test_the_norm_copies_nothing_on_a_gpu_and_a_cpu_keeps_its_bits():
    tokens = lambda device, packed=True: SimpleNamespace(device=torch.device(device), is_contiguous=lambda: packed)
    copies = layers._group_norm_copies
    assert copies(tokens("cuda")) and copies(tokens("cuda:1")) and not copies(tokens("cpu"))
    assert not copies(tokens("cuda", packed=False))  # group_norm is at home there, and layer_norm would copy
    norm, x = LayerNormGeneral(6), torch.randn(2, 5, 7, 6)
    assert torch.equal(norm(x), F.group_norm(x.permute(0, 3, 1, 2), 1, norm.weight, None, 1e-6).permute(0, 2, 3, 1))


@pytest.mark.parametrize("norm", ["LayerNormGeneral", "BareNorm"])
def test_the_norm_as_on_a_gpu_can_be_traced_and_scripted(norm, as_on_a_gpu):
    from metaformer_edu.speed.folding import _BareNorm
    part = (LayerNormGeneral(6) if norm == "LayerNormGeneral" else _BareNorm(6, 3, 1e-6)).double()
    x = torch.randn(1, 3, 3, 6).double()
    graph = torch.fx.symbolic_trace(part)
    assert torch.equal(graph(x), part(x))
    torch.testing.assert_close(torch.jit.script(graph)(x), part(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_depthwise_weights_have_their_strides(layout):
    "Also that of their one channel, which no address depends on: DistributedDataParallel compares all."
    model = create_model("tiny_convformer", img_size=32).to(memory_format=layout)
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] == 1]
    grads = torch.autograd.grad(model(torch.randn(2, 3, 32, 32)).sum(), weights)
    assert weights and [g.stride() for g in grads] == [w.stride() for w in weights]


def test_a_jacobian_goes_through_the_weights_gradient():
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    scale, bias = (torch.full((1,), value, dtype=torch.float64) for value in (0.9, -0.4))
    found = torch.func.jacrev(lambda w: star_depthwise(x, scale, bias, w, None, [1, 1]))(weight)
    twin = torch.func.jacrev(lambda w: kernels._layer(kernels.star_formula(x, scale, bias), w, None, [1, 1]))(weight)
    torch.testing.assert_close(found, twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, side, padding", [((3, 8, 9, 7), 7, 3), ((1, 5, 4, 6), 3, 1), ((4, 6, 1, 1), 7, 3),
                                                  ((2, 4, 8, 8), 5, 0), ((2, 3, 5, 9), 3, 2)])
def test_a_depthwise_weights_gradient_on_a_cpu_is_pytorchs(shape, side, padding, dtype):
    y, weight = torch.randn(shape), torch.randn(shape[1], 1, side, side)
    out = nn.functional.conv2d(y, weight, padding=padding, groups=shape[1])
    g, y = torch.randn_like(out).to(dtype), y.to(dtype)
    exact = kernels._convolution_grads(g.double(), y.double(), weight.double(), [padding] * 2, (False, True, False))[1]
    for layout in (torch.contiguous_format, torch.channels_last):
        g, y = (t.contiguous(memory_format=layout) for t in (g, y))
        assert kernels._depthwise_weight_grad(g) is kernels._weight_grad_on_cpu
        found = kernels._weight_grad_on_cpu(g, y, weight.to(dtype), [padding] * 2)
        assert found.shape == weight.shape and found.dtype == dtype
        assert (found - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * exact.abs().max()


def test_without_onednn_the_weights_gradient_is_pytorchs_own():
    with torch.backends.mkldnn.flags(enabled=False):
        assert kernels._depthwise_weight_grad(torch.zeros(1)) is None
    assert kernels._depthwise_weight_grad(torch.zeros(1, dtype=torch.float64)) is None


def test_a_batch_of_no_images_has_a_gradient_of_zeros():
    mixer = SepConv(8)
    mixer(torch.randn(0, 9, 9, 8)).sum().backward()
    assert not mixer.dwconv.weight.grad.any()
