"""Fold: every fold alone and all together against the model as it is, in float64 to 1e-10; what is not known stays."""
import copy
from collections import Counter
from functools import partial

import pytest
import torch
from shaken import ours
from timm.layers import DropPath
from torch import nn
from torch.nn.utils import prune

from metaformer_edu.interpret.cam import explain
from metaformer_edu.models.block import Downsampling, MetaFormerBlock
from metaformer_edu.models.layers import LayerNormGeneral, LayerNormWithoutBias, Mlp, MlpHead, Scale, StarReLU
from metaformer_edu.models.mixers import Attention, Identity, Pooling, RandomMixing, SepConv
from metaformer_edu.models.registry import FAMILIES
from metaformer_edu.speed.folding import (
    _BareNorm, _FoldedBlock, _PoolingBlock, _ShiftedSquare, _add_branch, _border_map, _fold_norm_into,
    _fold_scale_into, _fold_star_into_depthwise, _fold_star_into_linear, _one_over_sigma, fold, folds)

pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = [(5, 7), (1, 1), (8, 8), (2, 9)]


def shaken(module):
    "Every parameter off its start, in float64; running modes as built for inference."
    torch.manual_seed(0)
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    return module.double().eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found, wanted):
    error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype and error < 1e-10, f"{error:.1e} away"


def block_of(mixer=SepConv, dim=8, norm=LayerNormWithoutBias, **options):
    return shaken(MetaFormerBlock(dim, mixer, norm_layer=norm, **options))


def folds_to(module, x, **counts):
    "The folded copy computes the same, and says that it did this and no more."
    folded = fold(module)
    same(folded(x), module(x))
    assert folds(folded) == counts
    return folded


# --- each fold alone ---

@pytest.mark.parametrize("bias", [False, True])
def test_star_goes_into_a_linear_layer(bias):
    act, linear, x = shaken(StarReLU(0.9, -0.4)), shaken(nn.Linear(6, 4, bias=bias)), tokens(2, 5, 7, 6)
    wanted = linear(act(x))
    left = _fold_star_into_linear(act, linear)
    same(linear(left(x)), wanted)
    same(left(x), x.relu() ** 2)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_star_goes_into_a_depthwise_convolution_and_is_right_at_the_border(kernel, bias):
    mixer = shaken(SepConv(6, kernel_size=kernel, bias=bias))
    folded = copy.deepcopy(mixer)
    folded.act1 = _fold_star_into_depthwise(folded.act1, folded.dwconv)
    for grid in GRIDS:
        x = tokens(1, *grid, 6)
        same(folded(x), mixer(x))


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_map_is_what_the_shift_becomes(kernel):
    mixer = shaken(SepConv(6, kernel_size=kernel))
    square = copy.deepcopy(mixer)
    _fold_star_into_depthwise(square.act1, square.dwconv)
    square.act1 = _ShiftedSquare()
    for grid in GRIDS:
        x = tokens(2, *grid, 6)
        same(square(x) + mixer.pwconv2(mixer.act1.bias * _border_map(mixer.dwconv, *grid)), mixer(x))


@pytest.mark.parametrize("norm", [LayerNormWithoutBias, LayerNormGeneral, partial(nn.LayerNorm, eps=1e-3)])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_goes_into_a_linear_layer(norm, bias):
    norm, linear, x = shaken(norm(6)), shaken(nn.Linear(6, 4, bias=bias)), 0.1 * tokens(2, 5, 7, 6) + 2
    wanted = linear(norm(x))
    bare = _fold_norm_into(norm, linear)
    same(linear(bare(x)), wanted)
    assert not list(bare.parameters()) and not bare.state_dict()


@pytest.mark.parametrize("norm", [LayerNormWithoutBias, LayerNormGeneral])
def test_norm_goes_into_the_convolution_of_a_downsampling(norm):
    folds_to(shaken(Downsampling(6, 8, 3, 2, 1, pre_norm=norm)), tokens(2, 5, 7, 6), norm=1)


@pytest.mark.parametrize("part", [nn.Linear(6, 6), nn.Linear(6, 6, bias=False), LayerNormGeneral(6), nn.LayerNorm(6)],
                         ids=repr)
def test_layer_scale_goes_into_what_comes_before_it(part):
    part, scale, x = shaken(copy.deepcopy(part)), shaken(Scale(6)), tokens(2, 5, 7, 6)
    wanted = scale(part(x))
    assert type(_fold_scale_into(scale, part)) is nn.Identity
    same(part(x), wanted)


def test_residual_scale_and_sum_are_one_step():
    x, branch, scale = tokens(2, 5, 7, 6), tokens(2, 5, 7, 6, seed=2), shaken(Scale(6))
    same(_add_branch(x, branch, scale), scale(x) + branch)
    same(_add_branch(x, branch, nn.Identity()), x + branch)


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("scales", [{}, {"res_scale_init_value": 1.}, {"layer_scale_init_value": 0.1},
                                    {"res_scale_init_value": 0., "layer_scale_init_value": 0.1}], ids=str)
def test_pooling_moves_a_token_towards_its_neighbourhood(size, scales):
    block = block_of(partial(Pooling, pool_size=size), norm=partial(LayerNormGeneral, eps=1e-3), **scales)
    for grid in GRIDS[:1] + GRIDS[2:]:
        for x in (tokens(1, *grid, 8), 0.03 * tokens(3, *grid, 8) + 5):
            same(fold(block)(x), block(x))
    assert type(fold(block)) is _PoolingBlock and isinstance(fold(block), MetaFormerBlock)


def test_sigma_of_an_image():
    x = tokens(3, 5, 7, 4) * torch.tensor([1., 2., 3.]).view(3, 1, 1, 1)
    same(_one_over_sigma(x, 0.1), (x.flatten(1).var(1, correction=0) + 0.1).rsqrt().view(3, 1, 1, 1))


# --- all folds, all families ---

OPTIONS = [{}, {"mlps": partial(Mlp, bias=True)}, {"layer_scale_init_values": 0.3}, {"res_scale_init_values": None},
           {"layer_scale_init_values": 0.3, "res_scale_init_values": 0.7, "mlps": partial(Mlp, bias=True, drop=0.3)},
           {"num_classes": 0}, {"mlp_head": True, "head_dropout": 0.5}, {"mlp_head": False, "head_dropout": 0.5},
           {"global_pool": ""}, {"in_chans": 1, "drop_path": 0.5}, {"img_size": (64, 96)}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_computes_the_same(family, options):
    model = ours(family, **options).double()
    x = tokens(1, model.in_chans, *((64, 64) if isinstance(model.img_size, int) else model.img_size))
    with torch.no_grad():
        folded = fold(model)
        same(folded(x), model(x))
        same(folded.forward_features(x), model.forward_features(x))
        if "global_pool" not in options:
            same(folded.forward_head(folded.forward_features(x), pre_logits=True),
                 model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "randformer"])
def test_other_sizes_than_built_for(family):
    model, x = ours(family).double(), tokens(3, 3, 72, 104)
    with torch.no_grad():
        same(fold(model)(x), model(x))


def test_a_pruned_model():
    model, x = ours("caformer").double(), tokens(1, 3, 64, 64)
    model.prune_intermediate_layers(2)
    with torch.no_grad():
        same(fold(model).forward_features(x), model.forward_features(x))


COUNTS = {"identityformer": {"norm": 8, "StarReLU": 5, "ResScale": 6},
          "randformer": {"norm": 8, "StarReLU": 5, "ResScale": 6},
          "poolformerv2": {"norm": 8, "StarReLU": 5, "ResScale": 6, "Pooling": 5},
          "convformer": {"norm": 14, "StarReLU": 10, "ResScale": 6},
          "caformer": {"norm": 14, "StarReLU": 7, "ResScale": 6}}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_it_did_and_leaves_the_original_alone(family):
    model = ours(family).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold(model)
    assert folds(folded) == COUNTS[family] and folds(model) == {}
    assert folds(fold(folded)) == COUNTS[family], "nothing is left for a second time"
    assert all(m.training for m in model.modules()) and all(
        p.requires_grad for n, p in model.named_parameters() if "random" not in n
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in folded.modules()) and not any(p.requires_grad for p in folded.parameters())
    own = {t.data_ptr() for t in model.parameters()}
    assert not own & {t.data_ptr() for t in [*folded.parameters(), *folded.buffers()]}


def test_the_steps_are_gone():
    "A fold that is skipped everywhere would compute the same as well."
    folded = fold(ours("caformer", layer_scale_init_values=0.1))
    kinds = Counter(type(m) for m in folded.modules())
    assert not kinds[StarReLU] and not kinds[LayerNormGeneral]
    assert kinds[LayerNormWithoutBias] == 1, "the stem's norm makes the residual"
    for stage in folded.stages:
        for block in stage:
            assert type(block.norm1) is type(block.norm2) is _BareNorm
            assert type(block.layer_scale1) is type(block.layer_scale2) is nn.Identity
    assert all(type(block) is _FoldedBlock for stage in folded.stages[2:] for block in stage)


# --- what is not known stays ---

class Doubling(SepConv):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnStar(StarReLU):
    def forward(self, x):
        return super().forward(x) + x


class OwnScale(Scale):
    def forward(self, x):
        return x + self.scale


class OwnPooling(Pooling):
    def forward(self, x):
        return self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def with_parts(block, **parts):
    for name, part in parts.items():
        owner, _, last = name.replace("__", ".").rpartition(".")
        setattr(block.get_submodule(owner), last, part)
    return shaken(block)


UNKNOWN = {  # a block, and the folds that remain
    "a mixer of one's own": (lambda: block_of(Doubling), {"norm": 1, "StarReLU": 1}),
    "a mixer that is no module of ours":
               (lambda: block_of(lambda dim: nn.Linear(dim, dim)), {"norm": 1, "StarReLU": 1}),
    "an activation of one's own": (lambda: block_of(Identity, mlp=partial(Mlp, act_layer=OwnStar)), {"norm": 1}),
    "GELU": (lambda: block_of(partial(SepConv, act1_layer=nn.GELU), mlp=partial(Mlp, act_layer=nn.GELU)), {"norm": 2}),
    "a second activation in SepConv":
               (lambda: block_of(partial(SepConv, act2_layer=nn.Tanh)), {"norm": 2, "StarReLU": 2}),
    "an MLP of one's own": (lambda: block_of(Attention, mlp=nn.LayerNorm), {"norm": 1}),
    "PyTorch's norm": (lambda: block_of(Attention, norm=nn.LayerNorm), {"norm": 2, "StarReLU": 1}),
    "a norm without weight":
               (lambda: block_of(Attention, norm=partial(nn.LayerNorm, elementwise_affine=False)), {"StarReLU": 1}),
    "no norm": (lambda: block_of(SepConv, norm=nn.Identity), {"StarReLU": 2}),
    "pooling behind a norm of tokens": (lambda: block_of(Pooling), {"norm": 1, "StarReLU": 1}),
    "a pooling of one's own": (lambda: block_of(OwnPooling, norm=LayerNormGeneral), {"norm": 1, "StarReLU": 1}),
    "pooling that counts the padding": (lambda: with_parts(block_of(Pooling, norm=LayerNormGeneral),
                                                           token_mixer__pool=nn.AvgPool2d(3, 1, 1)),
                                        {"norm": 1, "StarReLU": 1}),
    "pooling with another divisor":
               (lambda: with_parts(block_of(Pooling, norm=LayerNormGeneral), token_mixer__pool=nn.AvgPool2d(
        3, 1, 1, count_include_pad=False, divisor_override=2)), {"norm": 1, "StarReLU": 1}),
    "a scale of one's own": (lambda: with_parts(block_of(Pooling, norm=LayerNormGeneral), layer_scale1=OwnScale(8),
                                                res_scale1=OwnScale(8), res_scale2=OwnScale(8),
                                                layer_scale2=OwnScale(8)),
                             {"norm": 1, "StarReLU": 1}),
    "a branch scale of one's own beside pooling":
               (lambda: with_parts(block_of(Pooling, norm=LayerNormGeneral), layer_scale1=OwnScale(8)),
                                                   {"norm": 1, "StarReLU": 1}),
    "something in the place of drop path beside pooling": (lambda: with_parts(block_of(Pooling, norm=LayerNormGeneral),
                                                                              drop_path1=nn.Tanh()),
                                                           {"norm": 1, "StarReLU": 1}),
    "a residual scale of one's own beside pooling":
               (lambda: with_parts(block_of(Pooling, norm=LayerNormGeneral, res_scale_init_value=1.),
                                                                        res_scale1=OwnScale(8)),
                {"norm": 1, "StarReLU": 1, "ResScale": 1}),
    "something in the place of dropout":
               (lambda: with_parts(block_of(SepConv, layer_scale_init_value=0.5), mlp__drop=nn.Tanh(),
                                                             drop_path1=nn.Tanh()), {"norm": 2, "StarReLU": 1}),
    "drop path": (lambda: block_of(Attention, drop_path=0.5, layer_scale_init_value=0.5),
                  {"norm": 2, "StarReLU": 1, "LayerScale": 2}),
    "random mixing": (lambda: block_of(partial(RandomMixing, num_tokens=35), norm=LayerNormGeneral,
                                       layer_scale_init_value=0.5),
                      {"norm": 1, "StarReLU": 1, "LayerScale": 2}),
    "biases everywhere":
               (lambda: block_of(partial(SepConv, bias=True), mlp=partial(Mlp, bias=True), layer_scale_init_value=0.5),
                          {"norm": 2, "StarReLU": 2, "LayerScale": 2}),
    "attention with biases":
               (lambda: block_of(partial(Attention, head_dim=4, qkv_bias=True, proj_bias=True),
                                 layer_scale_init_value=0.5),
                              {"norm": 2, "StarReLU": 1, "LayerScale": 2}),
    "a frozen StarReLU":
               (lambda: block_of(mlp=partial(Mlp, act_layer=partial(StarReLU, 0.9, -0.4, False, False))),
                {"norm": 2, "StarReLU": 2}),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_only_what_is_known_is_folded(case):
    make, counts = UNKNOWN[case]
    folds_to(make(), tokens(2, 5, 7, 8), **counts)


def test_a_scale_of_zero_stays():
    block = block_of(SepConv)
    for act in (block.token_mixer.act1, block.mlp.act):
        act.scale.data.zero_()
    folded = folds_to(block, tokens(2, 5, 7, 8), norm=2)
    assert type(folded.token_mixer.act1) is StarReLU


def test_a_norm_with_a_bias_stays_before_a_padded_convolution():
    folds_to(shaken(Downsampling(6, 8, 3, 2, 1, pre_norm=nn.LayerNorm)), tokens(2, 5, 7, 6))


def test_hooks_and_what_lives_in_hooks_stay():
    block, x = block_of(SepConv), tokens(2, 5, 7, 8)
    with torch.no_grad():  # or there could be no copy
        prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)  # its hook would write the old weight back
        prune.l1_unstructured(block.token_mixer.dwconv, "weight", 0.5)
    block.token_mixer.pwconv2.register_forward_hook(lambda module, inputs, out: 2 * out)
    with torch.no_grad():
        folds_to(block, x, norm=1, StarReLU=1)


def test_a_part_with_two_owners_stays():
    mlp = Mlp(8)
    blocks = shaken(nn.Sequential(*[MetaFormerBlock(8, Identity, lambda dim: mlp) for _ in range(2)]))
    blocks[1].norm2.weight.data += 1
    folds_to(blocks, tokens(2, 5, 7, 8))


def test_a_shared_weight_is_not_changed_for_the_other():
    block = block_of(Identity, mlp=partial(Mlp, mlp_ratio=1))
    block.mlp.fc2.weight = block.mlp.fc1.weight
    folds_to(block, tokens(2, 5, 7, 8), norm=1, StarReLU=1)


def test_head_of_ones_own():
    model, x = ours("caformer").double(), tokens(1, 3, 64, 64)
    model.head.head_dropout = nn.Tanh()
    with torch.no_grad():
        same(fold(model)(x), model(x))
    assert type(fold(model).head.norm) is nn.LayerNorm


# --- precision ---

@pytest.mark.parametrize("family", ["poolformerv2", "convformer"])
@pytest.mark.parametrize("dtype, few", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"])
def test_low_precision_moves_no_further_than_before(family, dtype, few):
    model, x = ours(family).double(), tokens(8, 3, 64, 64)
    far = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    with torch.no_grad():
        truth, low = model(x), copy.deepcopy(model).to(dtype)
        before, after = far(low(x.to(dtype)), truth), far(fold(low)(x.to(dtype)), truth)
    assert fold(low)(x.to(dtype)).dtype == dtype and after < few and after < 4 * before


def test_a_large_mean_spoils_sigma_no_more_than_the_norm():
    block, x = block_of(Pooling, norm=LayerNormGeneral), tokens(2, 14, 14, 8) + 100
    low, wanted = copy.deepcopy(block).float(), block(x)
    far = lambda found: (found.double() - wanted).abs().max().item()
    assert far(fold(low)(x.float())) < 2 * far(low(x.float()))


def test_products_are_rounded_once():
    act, linear = StarReLU(0.1, 0.3).requires_grad_(False), nn.Linear(64, 8, bias=False).requires_grad_(False)
    wanted = (
        (act.scale.double() * linear.weight.double()).float(),
        (act.bias.double() * linear.weight.double().sum(1)).float(),
    )
    _fold_star_into_linear(act, linear)
    assert torch.equal(linear.weight, wanted[0]) and torch.equal(linear.bias, wanted[1])


def test_autocast():
    for family in ("poolformerv2", "caformer"):
        model, x = ours(family), tokens(2, 3, 64, 64).float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found, wanted = fold(model)(x), model(x)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())


# --- what is built on it ---

@pytest.mark.parametrize("mixer, norm", [(Pooling, LayerNormGeneral), (SepConv, LayerNormWithoutBias)])
@pytest.mark.parametrize("res_scale", [None, 1.])
def test_can_be_traced_whole(mixer, norm, res_scale):
    block, x = block_of(mixer, norm=norm, res_scale_init_value=res_scale), tokens(2, 5, 7, 8)
    traced = torch.compile(fold(block), backend="eager", fullgraph=True)
    with torch.no_grad():
        same(traced(x), block(x))


def test_torch_export():
    block, x = block_of(Pooling, norm=LayerNormGeneral, res_scale_init_value=1.), tokens(2, 5, 7, 8)
    with torch.no_grad():
        same(torch.export.export(fold(block), (x,)).module()(x), block(x))


def test_what_is_compiled_is_unwrapped():
    model = ours("caformer")
    assert folds(fold(torch.compile(model))) == COUNTS["caformer"]


def test_gradients_pass_through_and_grad_cam_shows_the_same():
    block, x = block_of(SepConv), tokens(2, 5, 7, 8).requires_grad_()
    found, = torch.autograd.grad(fold(block)(x).square().sum(), x)
    wanted, = torch.autograd.grad(block(x).square().sum(), x)
    same(found, wanted)
    for family in ("poolformerv2", "caformer"):
        model, images = ours(family), tokens(2, 3, 64, 64).float()
        torch.testing.assert_close(explain(fold(model), images).maps, explain(model, images).maps, rtol=1e-3, atol=1e-3)


def test_the_square_leaves_its_input_alone():
    x = tokens(2, 5, 7, 8)
    kept = x.clone()
    for act in (_ShiftedSquare(), _ShiftedSquare(torch.ones(1, dtype=torch.float64))):
        found = act(x)
        assert torch.equal(x, kept)
        same(torch.func.vmap(act)(x), found)
        same(torch.func.jvp(act, (x,), (x,))[1], 2 * x.relu() ** 2)


def test_the_norm_inside_the_head():
    folds_to(shaken(MlpHead(8, 5, head_dropout=0.5)), tokens(3, 8), norm=1)
    assert isinstance(fold(MlpHead(8, 5)).norm, _BareNorm)


def test_drop_path_of_timm_is_known():
    block = block_of(SepConv, drop_path=0.3)
    assert type(block.drop_path1) is DropPath
    folds_to(block, tokens(2, 5, 7, 8), norm=2, StarReLU=2)
