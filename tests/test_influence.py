"""Influence: closed forms against the Jacobian, the Jacobian against nudges, fields against counted windows."""
import matplotlib
import matplotlib.colors
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaformer_edu.interpret import influence as lesson
from metaformer_edu.interpret.influence import (
    CLOSED_FORMS, attention_weights, closed_form, influence, mixer_at, mixing_matrix, show_heads, show_mixing,
    value_influence)
from metaformer_edu.interpret.receptive_field import Field, UpToStage, receptive_field, show_fields
from metaformer_edu.models.block import Downsampling, MetaFormerBlock, Stage
from metaformer_edu.models.layers import LayerNormGeneral, LayerNormWithoutBias
from metaformer_edu.models.metaformer import MetaFormer
from metaformer_edu.models.mixers import Attention, Identity, Pooling, RandomMixing, SepConv
from metaformer_edu.models.registry import FAMILIES, create_model

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = [(4, 4), (3, 7), (6, 2), (1, 5)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b.to(a.dtype), atol=tolerance, rtol=0)


def by_nudges(f, x, step=1e-6):
    "‖∂y_i/∂x_j‖ / √C' from central differences, one channel of one token at a time: nothing of autograd."
    columns = []
    with torch.no_grad():
        for j in range(x.numel()):
            up, down = x.clone(), x.clone()
            up.view(-1)[j] += step
            down.view(-1)[j] -= step
            columns.append(((f(up) - f(down)) / (2 * step)).flatten(1, 2)[0])
    J = torch.stack(columns).view(x[0, ..., 0].numel(), x.shape[-1], *columns[0].shape)  # (j, c, i, c')
    return (J.square().sum((1, 3)) / J.shape[-1]).sqrt().T


def by_autograd(f, x):
    J = torch.autograd.functional.jacobian(f, x)
    (h, w, c), n = J.shape[1:4], x.shape[-1]
    return J.reshape(h * w, c, -1, n).square().sum((1, 3)).div(c).sqrt()


def attention(dim=12, scale=3., **options):
    mixer = Attention(dim, **options).double()
    mixer.qkv.weight.data *= scale  # weights far from even
    return mixer


class Squeeze(nn.Module):
    "Other channels come out than went in."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) * x.mean((1, 2), keepdim=True).sum(-1, keepdim=True))


# --- the Jacobian ---

@pytest.mark.parametrize("module",
                         [SepConv(6, bias=True, kernel_size=3), attention(6, head_dim=4, num_heads=2, qkv_bias=True),
                                    Squeeze(),
                          MetaFormerBlock(6, Pooling, norm_layer=LayerNormGeneral, res_scale_init_value=1.)],
                         ids=["SepConv", "Attention", "Squeeze", "Block"])
def test_influence_is_what_nudges_do(module):
    module, x = module.double(), double(1, 3, 4, 6)
    found = influence(module, x)
    same(found, by_nudges(module, x), 1e-7)
    same(found, by_autograd(module, x))


def test_row_is_who_hears_and_column_who_is_heard():
    class Left(nn.Module):  # every token becomes its left neighbour
        def forward(self, x): return torch.roll(x, 1, dims=2)
    found = influence(Left(), double(1, 2, 3, 2))
    assert found[1, 0] == 1 and found[0, 1] == 0 and found[5, 4] == 1


def test_scale_is_that_of_a_random_nudge():
    "Nudge all channels of token j by about ε: the channels of token i move by about ε · influence[i, j]."
    mixer, x, n = SepConv(32, kernel_size=3).double(), double(1, 3, 3, 32), 400
    nudge = torch.zeros(n, 3, 3, 32, dtype=torch.float64)
    nudge[:, 1, 2] = double(n, 32) * 1e-6
    moved = ((mixer(x + nudge) - mixer(x)) / 1e-6)[:, 1, 1].square().mean().sqrt()
    assert abs(moved / influence(mixer, x)[4, 5] - 1) < 0.05


def test_a_module_that_changes_the_grid():
    down = Downsampling(3, 5, 3, 2, 1).double()
    x = double(1, 6, 9, 3)
    found = influence(down, x)
    assert found.shape == (15, 54)
    same(found, by_autograd(down, x))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(chunk):
    mixer, x = SepConv(6).double(), double(1, 3, 3, 6)
    same(influence(mixer, x, chunk=chunk), influence(mixer, x))
    same(influence(mixer, x, probes=5, chunk=chunk), influence(mixer, x, probes=5))


def test_chunk_bounds_the_batch():
    sizes = []
    class Watch(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x * 2
    influence(Watch(), double(1, 2, 2, 10), chunk=4)
    assert max(sizes) == 4


def test_probes_are_unbiased_in_the_square():
    "The mean of 400 one-probe estimates lies within 5 standard errors of the exact square, in every entry."
    mixer, x = SepConv(6, kernel_size=3).double(), double(1, 2, 3, 6)
    exact = influence(mixer, x).square()
    draws = torch.stack([influence(mixer, x, probes=1, seed=s).square() for s in range(400)])
    error = (draws.mean(0) - exact).abs()
    assert (error <= 5 * draws.std(0) / 400**0.5 + 1e-12).all()
    same(influence(mixer, x, probes=4000, chunk=4000).square(), exact, 0.1 * exact.max().item())


def test_probes_differ_from_token_to_token():
    "Identity on equal tokens: with the same signs for all tokens, two rows of a mixing mixer would err alike."
    mixer = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    diagonal = influence(mixer, double(1, 3, 3, 6), probes=1).diag()
    assert diagonal.std() > 1e-3


def test_probes_are_repeatable_and_leave_the_dice():
    mixer, x = SepConv(6), torch.randn(3, 3, 6)
    before = torch.get_rng_state()
    first = influence(mixer, x, probes=2)
    assert torch.equal(first, influence(mixer, x, probes=2))
    assert not torch.equal(first, influence(mixer, x, probes=2, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_zero_is_zero():
    class Zeros(nn.Module):
        def forward(self, x): return torch.zeros_like(x)
    class Bias(nn.Module):  # a gradient for the parameter, none for the tokens
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.ones(2))
        def forward(self, x): return self.b.expand_as(x)
    for module in (Zeros(), Bias()):
        assert torch.equal(influence(module, torch.randn(2, 2, 2)), torch.zeros(4, 4))
        assert receptive_field(module, torch.randn(2, 2, 2)).map.sum() == 0


def test_a_mixer_may_work_in_place():
    class InPlace(nn.Module):
        def forward(self, x): return x.mul_(3)
    x = double(2, 2, 2)
    kept = x.clone()
    same(influence(InPlace(), x), 3 * torch.eye(4))
    assert torch.equal(x, kept)


def test_checkpointed_stage():
    stage, x = Stage(4, 2, Pooling).double(), double(3, 3, 4)
    plain = influence(stage, x)
    stage.grad_checkpointing = True
    same(influence(stage, x), plain)


def test_tokens_follow_the_parameters():
    mixer = SepConv(4, kernel_size=3).double()
    assert influence(mixer, torch.randn(2, 2, 4)).dtype == torch.float64


# --- no trace ---

class Fails(nn.Module):
    def forward(self, x): raise RuntimeError("on purpose")


MEASURES = [lambda m, x: influence(m, x), lambda m, x: influence(m, x, probes=2), lambda m, x: receptive_field(m, x)]


@pytest.mark.parametrize("measure", MEASURES, ids=["exact", "probes", "field"])
@pytest.mark.parametrize("fails", [False, True])
def test_module_is_left_as_found(measure, fails):
    stage = Stage(4, 2, SepConv, [0.5, 0.5])
    stage.train()
    stage[0].eval()
    stage[1].mlp.train()
    stage[1].norm1.weight.requires_grad_(False)
    if fails: stage.add_module("2", Fails())
    kept = stage[0].mlp.fc1.weight.grad = torch.ones_like(stage[0].mlp.fc1.weight)
    modes = [m.training for m in stage.modules()]
    wants = [p.requires_grad for p in stage.parameters()]
    values = [p.clone() for p in stage.parameters()]
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"): measure(stage, torch.randn(3, 3, 4))
    else:
        result = measure(stage, torch.randn(3, 3, 4))
        result = result.map if isinstance(result, Field) else result
        assert not result.requires_grad and result.grad_fn is None
    assert [m.training for m in stage.modules()] == modes
    assert [p.requires_grad for p in stage.parameters()] == wants
    assert all(torch.equal(p, v) for p, v in zip(stage.parameters(), values))
    grads = [p.grad for p in stage.parameters() if p.grad is not None]
    assert len(grads) == 1 and grads[0] is kept and torch.equal(kept, torch.ones_like(kept))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stage.modules())


def test_evaluation_mode_while_measuring():
    block = MetaFormerBlock(4, Identity, drop_path=0.9).double().train()
    x = double(2, 2, 4)
    same(influence(block, x), by_autograd(block.eval(), x[None]))


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(caller):
    torch.manual_seed(1)
    mixer, x = attention(6, head_dim=3).double(), double(3, 3, 6)
    for p in mixer.parameters(): p.requires_grad_(False)
    expected = influence(mixer, x), receptive_field(mixer, x).map, closed_form(mixer, x)
    with caller():
        found = influence(mixer, x), receptive_field(mixer, x).map, closed_form(mixer, x)
        assert torch.is_grad_enabled() is False
        for a, b in zip(found, expected): same(a, b)
        here = x * 1  # under inference_mode, an inference tensor
        same(influence(mixer, here), expected[0])


def test_a_module_made_in_inference_mode():
    with torch.inference_mode():
        stage, x = Stage(4, 1, SepConv), torch.randn(3, 3, 4)
    with torch.inference_mode():
        inside = influence(stage, x)
    again = Stage(4, 1, SepConv)
    again.load_state_dict(stage.state_dict())
    same(inside, influence(again, x.clone()), 1e-6)
    same(influence(stage, x), inside, 1e-6)
    model = MetaFormer(depths=(1, 1), dims=(4, 8), res_scale_init_values=None, num_classes=2)
    with torch.inference_mode():
        assert receptive_field(model, torch.randn(3, 32, 32)).map.sum() > 0.99


# --- closed forms ---

@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_pooling_in_closed_form(grid, size):
    mixer, x = Pooling(pool_size=size), double(1, *grid, 3)
    P = closed_form(mixer, x)
    same(P.abs(), influence(mixer, x))
    same((P @ x.flatten(1, 2)).view_as(x), mixer(x))  # the signs too


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_identity_and_random_in_closed_form(grid):
    x, n = double(1, *grid, 3), grid[0] * grid[1]
    for mixer in (Identity(), nn.Identity(), RandomMixing(num_tokens=n).double()):
        same(closed_form(mixer, x), influence(mixer, x))
    mixer = RandomMixing(num_tokens=n).double()
    mixer.random_matrix.data -= 0.5  # a sign is kept
    same((closed_form(mixer, x) @ x.flatten(1, 2)).view_as(x), mixer(x))
    closed_form(mixer, x).zero_()
    assert mixer.random_matrix.abs().sum() > 0, "the caller got a copy"


OPTIONS = [dict(head_dim=6), dict(head_dim=4), dict(head_dim=12), dict(head_dim=5, num_heads=3),
           dict(head_dim=5, num_heads=2, qkv_bias=True),
           dict(head_dim=6, qkv_bias=True, proj_bias=True), dict(head_dim=32),
           dict(head_dim=6, attn_drop=0.5, proj_drop=0.5)]


class Frozen(nn.Module):
    "Attention with given weights, written with loops over heads."
    def __init__(self, mixer, A):
        super().__init__()
        self.mixer, self.A = mixer, A

    def forward(self, x):
        m, (B, H, W, C) = self.mixer, x.shape
        d, inner, y = m.head_dim, m.num_heads * m.head_dim, 0
        for h in range(m.num_heads):
            rows = slice(2 * inner + h * d, 2 * inner + (h + 1) * d)
            v = F.linear(x.view(B, H * W, C), m.qkv.weight[rows], None if m.qkv.bias is None else m.qkv.bias[rows])
            y = y + self.A[h] @ v @ m.proj.weight[:, h * d:(h + 1) * d].T
        return (y if m.proj.bias is None else y + m.proj.bias).view(B, H, W, C)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)], ids=str)
def test_attention_with_fixed_weights(options, grid):
    mixer, x = attention(**options), double(1, *grid, 12)
    if mixer.qkv.bias is not None: mixer.qkv.bias.data = double(*mixer.qkv.bias.shape)
    A = attention_weights(mixer, x)
    n = grid[0] * grid[1]
    assert A.shape == (mixer.num_heads, n, n)
    same(A.sum(-1), torch.ones(mixer.num_heads, n))
    frozen = Frozen(mixer, A)
    same(frozen(x), mixer.eval()(x))  # so A is what the mixer uses
    same(influence(frozen, x), value_influence(mixer.train(), x))
    same(closed_form(mixer, x), value_influence(mixer, x))


def test_weights_are_not_the_influence():
    mixer, x = attention(head_dim=6), double(3, 3, 12)
    fixed, whole = value_influence(mixer, x), influence(mixer, x)
    assert (whole - fixed).abs().max() > 0.1 * whole.max()
    mixer.qkv.weight.data[:24] = 0  # no queries, no keys: the weights are even whatever the tokens are
    same(value_influence(mixer, x), influence(mixer, x))


def test_heads_that_cancel():
    mixer, x = attention(4, head_dim=4, num_heads=2), double(2, 2, 4)
    mixer.qkv.weight.data[4:8] = mixer.qkv.weight.data[:4]  # twice the same head …
    mixer.qkv.weight.data[12:16] = mixer.qkv.weight.data[8:12]
    mixer.qkv.weight.data[20:24] = mixer.qkv.weight.data[16:20]
    mixer.proj.weight.data[:, 4:] = -mixer.proj.weight.data[:, :4]  # … with opposite signs
    same(value_influence(mixer, x), torch.zeros(4, 4), 1e-7)


def test_mixing_matrix_takes_the_formula_or_the_jacobian():
    x = double(3, 4, 6)
    same(mixing_matrix(Pooling(), x), closed_form(Pooling(), x))
    conv = SepConv(6).double()
    same(mixing_matrix(conv, x), influence(conv, x))
    same(mixing_matrix(conv, x, probes=3), influence(conv, x, probes=3))


def test_a_subclass_is_known_by_its_forward():
    class Named(Pooling):
        def __init__(self, dim=None): super().__init__(dim, 5)
    class Other(Pooling):
        def forward(self, x): return 2 * super().forward(x)
    x = double(3, 4, 6)
    same(closed_form(Named(), x).abs(), influence(Named(), x))
    with pytest.raises(ValueError, match="no matrix for Other: use influence"): closed_form(Other(), x)
    same(mixing_matrix(Other(), x), 2 * closed_form(Pooling(), x).abs())
    patched = Pooling()
    patched.forward = lambda x: x
    same(mixing_matrix(patched, x), torch.eye(12))

    class Sharper(Attention):
        def forward(self, x): return super().forward(2 * x)
    with pytest.raises(ValueError, match="use influence"): attention_weights(Sharper(6), x)


def test_a_reader_adds_a_form(monkeypatch):
    class Double(nn.Module):
        def forward(self, x): return 2 * x
    monkeypatch.setitem(CLOSED_FORMS, Double, lambda mixer, x: 2 * torch.eye(x.shape[1] * x.shape[2], dtype=x.dtype))
    x = double(2, 3, 6)
    same(closed_form(Double(), x), influence(Double(), x))


# --- receptive fields ---

class Conv(nn.Module):
    def __init__(self, size, dim=3):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, size, padding=size // 2)

    def forward(self, x): return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("grid,token", [((11, 11), None), ((9, 15), None), ((15, 9), (4, 6))])
def test_field_of_a_convolution_is_its_window(size, grid, token):
    field = receptive_field(Conv(size), torch.randn(2, *grid, 3), token=token)
    row, column = token or (grid[0] // 2, grid[1] // 2)
    assert field.centre == (row, column) and field.map.shape == grid
    window = torch.zeros(grid, dtype=bool)
    r = size // 2
    window[max(row - r, 0):row + r + 1, max(column - r, 0):column + r + 1] = True
    assert torch.equal(field.map > 0, window)
    assert field.side(1) == size and abs(field.map.sum() - 1) < 1e-5 and abs(field.share(size) - 1) < 1e-5


def test_field_is_a_row_of_the_influence():
    stage, xs = Stage(6, 2, SepConv).double(), double(3, 4, 5, 6)
    rows = [influence(stage, x)[2 * 5 + 1].view(4, 5) for x in xs]
    same(receptive_field(stage, xs, token=(2, 1)).map, sum(r / r.sum() for r in rows) / 3)


def test_field_by_probes_is_near():
    stage, xs = Stage(16, 1, SepConv), torch.randn(2, 7, 7, 16)
    exact, near = receptive_field(stage, xs).map, receptive_field(stage, xs, probes=200).map
    assert (exact - near).abs().sum() < 0.1
    assert not torch.equal(receptive_field(stage, xs, probes=1).map, receptive_field(stage, xs, probes=1, seed=1).map)


def test_identity_with_a_norm_for_each_token_hears_one_token():
    stage = Stage(8, 3, Identity, norm_layer=LayerNormWithoutBias)
    field = receptive_field(stage, torch.randn(2, 6, 7, 8))
    assert (field.map > 0).sum() == 1 and field.side(1) == 1 and field.map[3, 3] > 0.999
    whisper = receptive_field(Stage(8, 3, Identity, norm_layer=LayerNormGeneral), torch.randn(2, 6, 7, 8))
    assert (whisper.map > 0).all() and whisper.map[3, 3] > 0.5


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 64)])
def test_field_of_a_whole_model_is_counted(size):
    model = create_model("tiny_identityformer", norm_layers=LayerNormWithoutBias)
    x = torch.randn(1, 3, *size)
    for stage, side in ((1, 7), (2, 15), (3, 31)):
        field = receptive_field(model, x, stage)
        assert field.map.shape == size and field.side(1) == side, "the window lies around the centre"
        assert (field.map > 0).sum() == side**2


def test_field_of_a_chosen_token_of_a_model():
    model = create_model("tiny_identityformer", norm_layers=LayerNormWithoutBias)
    field = receptive_field(model, torch.randn(3, 64, 64), stage=2, token=(2, 5))
    assert field.centre == (17, 41) and field.side(1) == 15
    assert receptive_field(model, torch.randn(3, 64, 64)).centre == (33, 33), "None is the last stage"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = create_model(f"tiny_{family}").train()
    field = receptive_field(model, torch.randn(1, 3, 64, 64), stage=3, probes=4)
    assert field.map.isfinite().all() and abs(field.map.sum() - 1) < 1e-4 and all(m.training for m in model.modules())


def test_up_to_stage_stops_there():
    model = create_model("tiny_convformer").eval()
    x = torch.randn(1, 3, 64, 64)
    for stage in (1, 2, 3, 4):
        expected = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)[stage - 1]
        same(UpToStage(model, stage)(x.permute(0, 2, 3, 1)), expected, 1e-6)
    model.stages[3] = Fails()
    assert receptive_field(model, x, stage=3, probes=1).map.sum() > 0


def test_sides_and_shares():
    m = torch.zeros(9, 9)
    m[4, 4], m[4, 6], m[0, 4] = 0.5, 0.3, 0.2
    field = Field(m, (4, 4))
    assert [field.side(s) for s in (0.1, 0.49, 0.51, 0.79, 0.81, 1)] == [1, 1, 5, 5, 9, 9]
    torch.testing.assert_close([field.share(s) for s in (1, 3, 5, 7, 9, 99)], [0.5, 0.5, 0.8, 0.8, 1.0, 1.0], atol=1e-6,
                               rtol=0)
    assert Field(torch.ones(64, 64) / 4096, (32, 32)).side() == 47  # 45² is just less than half of 64²
    assert Field(torch.ones(8, 4) / 32, (4, 2)).side(1) == 8, "never more than the input"
    assert Field(torch.ones(8, 4) / 32, (7, 0)).side(1) == 8
    for wrong in (0, 1.5, -1):
        with pytest.raises(ValueError, match="share is more than 0 and at most 1"): field.side(wrong)


def test_images_count_alike():
    class Loud(nn.Module):  # a slope that depends on the image, and another neighbour
        def forward(self, x):
            return torch.where(x.mean((1, 2, 3), keepdim=True) > 0, 1000 * torch.roll(x, 1, 1), torch.roll(x, 1, 2))
    x = torch.ones(2, 5, 5, 2)
    x[1] = -1
    field = receptive_field(Loud(), x)
    assert field.map[1, 2] == field.map[2, 1] == 0.5


# --- inside a model ---

def test_mixer_at_catches_its_tokens():
    model, image = create_model("tiny_caformer", drop_path=0.9).train(), torch.randn(3, 64, 96)
    mixer, x = mixer_at(model, image, stage=3, block=2)
    assert mixer is model.stages[2][1].token_mixer and x.shape == (1, 4, 6, 64) and not x.requires_grad
    before = model.eval().stages[2][0](model.downsample_layers[2](model.forward_intermediates(
        image[None], [1], output_fmt="NHWC", intermediates_only=True)[0]))
    same(x, model.stages[2][1].norm1(before), 1e-5)
    assert not any(m._forward_hooks for m in model.modules())
    model.train()
    mixer_at(model, image[None], 1)
    assert all(m.training for m in model.modules())


def test_heads_draw_the_weights():
    model, image = create_model("tiny_caformer"), torch.randn(3, 96, 64)
    mixer, x = mixer_at(model, image, 3, 1)
    fig = show_heads(model, image, token=(5, 1))
    assert len(fig.axes) == mixer.num_heads == 2
    A = attention_weights(mixer, x).view(2, 6, 4, 6, 4)[:, 5, 1]
    for ax, head in zip(fig.axes, A):
        same(torch.as_tensor(ax.images[1].get_array()), head - 1 / 24, 1e-6)
        assert ax.patches[0].get_xy() == (0.5, 4.5), "token (5, 1) is marked"
        assert ax.get_title().endswith(f"{head.min():.1%} to {head.max():.1%}")
    assert all(m.training for m in model.modules()) == model.training


def test_more_heads_than_fit_in_a_row():
    model = MetaFormer(depths=(1, 1, 1), dims=(8, 16, 224), token_mixers=("Identity", "Identity", "Attention"),
                       num_classes=2,
                       res_scale_init_values=None)
    assert sum(bool(ax.images) for ax in show_heads(model, torch.randn(1, 3, 32, 32)).axes) == 7


# --- pictures ---

def test_picture_of_matrices():
    x, image = torch.randn(3, 5, 6), torch.rand(3, 30, 50)
    given = torch.arange(225.).view(15, 15)
    fig = show_mixing({"Pooling": Pooling(), "SepConv": SepConv(6), "given": given}, x, image, token=(1, 3))
    assert len(fig.axes) == 6
    matrices, maps = fig.axes[:3], fig.axes[3:]
    assert [ax.get_title() for ax in matrices] == ["Pooling", "SepConv", "given"]
    for top, below in zip(matrices, maps):
        matrix, drawn = torch.as_tensor(top.images[0].get_array()), torch.as_tensor(below.images[1].get_array())
        assert torch.equal(drawn, matrix[8].view(3, 5))
        assert below.patches[0].get_xy() == (2.5, 0.5) and list(top.lines[0].get_ydata()) == [8]
    same(torch.as_tensor(matrices[0].images[0].get_array()), closed_form(Pooling(), x), 1e-6)
    assert "(1, 3)" in maps[0].get_ylabel()
    assert show_mixing({"one": Identity()}, x[None], image), "the central token"


def test_map_of_nothing_and_of_both_signs():
    ax = matplotlib.figure.Figure().subplots()
    lesson.draw_row(ax, torch.rand(3, 8, 8), torch.zeros(2, 2), (0, 0))
    assert ax.images[1].get_alpha().max() == 0
    ax = matplotlib.figure.Figure().subplots()
    lesson.draw_row(ax, torch.rand(1, 8, 8), torch.tensor([[1., -2.], [0., 0.5]]), (0, 0))
    assert ax.images[1].get_clim() == (-2, 2) and ax.images[1].get_alpha()[0, 1] == ax.images[1].get_alpha().max()


def test_picture_of_fields():
    x = torch.randn(1, 9, 12, 3)
    fields = {f"conv {s}": receptive_field(Conv(s), x, token=(4, 7)) for s in (3, 5)}
    fig = show_fields(fields, share=1)
    *axes, bar = fig.axes
    assert [ax.get_title() for ax in axes] == [
        "conv 3\n100% in 3×3",
        "conv 5\n100% in 5×5",
    ] and "largest" in bar.get_ylabel()
    box = axes[1].patches[0]
    assert box.get_xy() == (4.5, 1.5) and box.get_width() == box.get_height() == 5
    assert isinstance(axes[0].images[0].norm, matplotlib.colors.LogNorm) and axes[0].images[0].get_array().max() == 1
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim() == (1e-4, 1)
    rows = show_fields({"before": fields, "after": fields})
    assert [ax.get_ylabel() for ax in rows.axes[:4:2]] == ["before", "after"]


# --- errors ---

@pytest.mark.parametrize("call,words", [
    (lambda: influence(Pooling(), torch.randn(2, 3, 3, 4)), r"one grid of tokens.*\(2, 3, 3, 4\)"),
    (lambda: influence(Pooling(), torch.randn(3, 3)), r"one grid of tokens.*\(3, 3\)"),
    (lambda: influence(Pooling(), torch.ones(3, 3, 4, dtype=torch.long)), "floating point.*int64"),
    (lambda: influence(nn.Flatten(), torch.randn(3, 3, 4)), r"for \(1, 3, 3, 4\) it gives \(1, 36\)"),
    (lambda: influence(nn.MaxPool2d(1, return_indices=True), torch.randn(3, 3, 4)), "it gives tuple"),
    (lambda: influence(Pooling(), torch.randn(3, 3, 4), probes=0), "1 or more, not 0"),
    (lambda: closed_form(SepConv(4), torch.randn(3, 3, 4)), r"no matrix for SepConv: use influence\(mixer, x\)"),
    (lambda: closed_form(Pooling(), torch.randn(3, 3)), "one grid of tokens"),
    (lambda: closed_form(RandomMixing(num_tokens=16), torch.randn(3, 3, 4)), "16 tokens and got 3×3 = 9"),
    (lambda: attention_weights(Pooling(), torch.randn(3, 3, 4)),
     "Pooling does not compute as Attention does: use influence"),
    (lambda: receptive_field(Pooling(), torch.randn(3, 3, 4), token=(3, 0)), r"no token \(3, 0\) in a grid of 3×3"),
    (lambda: receptive_field(Pooling(), torch.randn(3, 3, 4), token=(0, -1)), "columns 0 to 2"),
    (lambda: receptive_field(Pooling(), torch.randn(3, 3, 4), stage=2), "stage is for a whole model"),
    (lambda: receptive_field(create_model("tiny_convformer"), torch.randn(1, 3, 64, 64), stage=5),
     "stages 1 to 4, not 5"),
    (lambda: receptive_field(create_model("tiny_convformer"), torch.randn(1, 3, 64, 64), stage=0),
     "stages 1 to 4, not 0"),
    (lambda: receptive_field(create_model("tiny_convformer"), torch.randn(64, 64, 3)),
     r"Expected images of shape \(B, 3, H, W\)"),
    (lambda: receptive_field(create_model("tiny_randformer"), torch.randn(3, 96, 96)),
     "RandomMixing has a fixed matrix"),
    (lambda: show_heads(create_model("tiny_caformer"), torch.randn(3, 64, 64), stage=1),
     "Stage 1 of this model mixes with SepConv and has no attention weights: choose a stage with Attention"),
    (lambda: show_heads(create_model("tiny_caformer"), torch.randn(3, 64, 64), block=3),
     "Stage 3 has the blocks 1 to 2, not 3"),
    (lambda: show_heads(create_model("tiny_caformer"), torch.randn(3, 64, 64), block=0), "blocks 1 to 2, not 0"),
    (lambda: show_heads(create_model("tiny_caformer"), torch.randn(3, 64, 64), token=(4, 4)), "grid of 4×4"),
    (lambda: mixer_at(create_model("tiny_caformer"), torch.randn(2, 3, 64, 64), 3), "one image and got 2"),
    (lambda: show_mixing({"a": Identity()}, torch.randn(3, 3, 4), torch.rand(3, 9, 9), token=(9, 9)),
     r"no token \(9, 9\)"),
])
def test_errors_are_one_clear_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error: call()
    assert "\n" not in str(error.value)
