"""The same numbers as the published implementation, and as timm's where timm has the model."""
import pytest
import timm
import torch
from timm.models import metaformer as theirs_lib
from torch import nn

import golden
from metaformer_edu.models.layers import (
    LayerNormGeneral, LayerNormWithoutBias, Mlp, MlpHead, Scale, SquaredReLU, StarReLU)
from metaformer_edu.models.mixers import Attention, Identity, Pooling, RandomMixing, SepConv
from metaformer_edu.models.registry import MODELS, create_model
from metaformer_edu.models.weights import to_published

IN_TIMM = ("poolformerv2", "convformer", "caformer")
PUBLISHED_EPS = 1e-5  # of the norm in the MLP head; timm 1.0.31 has 1e-6


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# --- the published implementation ---

@pytest.fixture(scope="module", params=golden.FAMILIES)
def run(request):
    "The smallest model of a family with golden weights, and its logits: the slow part, done once a family."
    model = golden.fill(create_model(golden.SMALLEST[request.param]).double())
    with torch.inference_mode():
        return request.param, model, model(golden.images())


def test_golden_logits(run):
    family, _, logits = run
    assert gap(logits, golden.logits()[golden.SMALLEST[family]]) < 1e-10


@pytest.mark.parametrize("row", golden.ROWS, ids=[r["name"] for r in golden.ROWS])
def test_state_dict_is_the_published_one(row):
    # 55 times, not 5: published files must load into every size, and nothing may be missing or left over
    own = {k: tuple(v.shape) for k, v in MODELS[row["name"]].meta().state_dict().items()}
    assert own == golden.published_shapes(row)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_float32_is_close_to_float64(family):
    model, x = golden.fill(create_model(f"tiny_{family}").double()), golden.images(64)
    with torch.inference_mode():
        exact = model(x)
        assert gap(model.float()(x.float()).double(), exact) < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_bfloat16_autocast_is_finite_and_close(family):
    model, x = golden.fill(create_model(f"tiny_{family}")), golden.images(64, dtype=torch.float32)
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x).float()
    assert low.isfinite().all() and gap(low, exact) < 0.1 * exact.abs().max()
    assert not torch.equal(low, exact)  # autocast did something


# --- timm, whole models ---

def transplant(ours, theirs):
    "timm's model with our weights, in float64."
    theirs = theirs.double().eval()
    theirs.load_state_dict(theirs_lib.checkpoint_filter_fn(ours.state_dict(), theirs))
    return theirs


@pytest.fixture(scope="module")
def pair(run):
    family, ours, logits = run
    return ours, transplant(ours, timm.create_model(golden.SMALLEST[family])), logits


def head_norm(theirs):
    return getattr(theirs.get_classifier(), "norm", None)  # None: a linear head


@pytest.mark.parametrize("run", IN_TIMM, indirect=True)
@torch.inference_mode()
def test_timm_gives_the_same_logits_but_for_one_eps(pair):
    _, theirs, logits = pair
    tokens, norm = theirs.forward_features(golden.images()[:1]), head_norm(theirs)
    # timm may put it right some day: then there is no difference to show
    if norm is not None and norm.eps != PUBLISHED_EPS:
        assert gap(logits[:1], theirs.forward_head(tokens)) > 1e-7  # if not, the line below would prove nothing
        norm.eps = PUBLISHED_EPS
    assert gap(logits[:1], theirs.forward_head(tokens)) < 1e-10


@pytest.mark.parametrize("run", IN_TIMM, indirect=True)
@torch.inference_mode()
def test_timm_gives_the_same_features(pair):
    ours, theirs, _ = pair
    x = golden.images(96, batch=1)
    final, features = ours.forward_intermediates(x)
    their_final = theirs.stem(x)
    # older versions of timm have no forward_intermediates here
    for ours_now, stage in zip(features, theirs.stages, strict=True):
        their_final = stage(their_final)
        assert gap(ours_now, their_final) < 1e-10 * max(1, their_final.abs().max().item())
    assert torch.equal(final.permute(0, 3, 1, 2), features[-1])
    assert gap(ours.forward_head(final, pre_logits=True), theirs.forward_head(their_final, pre_logits=True)) < 1e-10


@pytest.mark.parametrize("family", IN_TIMM)
def test_timm_gives_the_same_gradients(family):
    ours = golden.fill(create_model(f"tiny_{family}", **golden.SMALL).double())
    theirs = transplant(ours, golden.small_timm(family))
    if head_norm(theirs) is not None:
        head_norm(theirs).eps = PUBLISHED_EPS
    for model in (ours, theirs):
        model.train()
        nn.functional.cross_entropy(model(golden.images(64)), torch.tensor([3, 7])).backward()
    # renamed and with 1×1 convolutions as matrices, timm's gradients have our names and shapes
    expected = to_published({k: p.grad for k, p in theirs.named_parameters()})
    found = {k: p.grad for k, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for k in found:
        torch.testing.assert_close(found[k], expected[k], rtol=1e-8, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")


# --- timm, part by part: x is (B, H, W, C) here, (B, C, H, W) there ---

DIM = 64


def with_weights_of(ours, theirs):
    ours, theirs = golden.fill(ours.double()), theirs.double().eval()
    own = theirs.state_dict()
    theirs.load_state_dict({k: v.view(own[k].shape) for k, v in ours.state_dict().items()})
    return ours, theirs


def tokens(h=9, w=6, dim=DIM):
    return golden.images(dim).flatten()[:h * w * dim].reshape(1, h, w, dim)


MIXERS = [
    ("pooling", Pooling(DIM), theirs_lib.Pooling()),
    ("pooling, pool_size 5", Pooling(DIM, pool_size=5), theirs_lib.Pooling(pool_size=5)),
    ("sepconv", SepConv(DIM), theirs_lib.SepConv(DIM)),
    ("sepconv, all options", SepConv(DIM, 3, act1_layer=SquaredReLU, act2_layer=nn.GELU, bias=True, kernel_size=5),
     theirs_lib.SepConv(DIM, 3, act1_layer=theirs_lib.SquaredReLU, act2_layer=nn.GELU, bias=True, kernel_size=5,
                        padding=2)),
    ("sepconv, own padding", SepConv(DIM, kernel_size=3, padding=0), theirs_lib.SepConv(DIM, kernel_size=3, padding=0)),
    ("norm over all tokens", LayerNormGeneral(DIM), theirs_lib.GroupNorm1NoBias(DIM)),
    ("norm of each token", LayerNormWithoutBias(DIM), theirs_lib.LayerNorm2dNoBias(DIM)),
    ("scale", Scale(DIM), theirs_lib.Scale(DIM)),
    ("starrelu", StarReLU(), theirs_lib.StarReLU()),
    ("mlp", Mlp(DIM), theirs_lib.Mlp(DIM, 4 * DIM, act_layer=theirs_lib.StarReLU, bias=False, use_conv=True)),
]


@pytest.mark.parametrize("ours, theirs", [c[1:] for c in MIXERS], ids=[c[0] for c in MIXERS])
@torch.inference_mode()
def test_part_equals_its_twin_in_timm(ours, theirs):
    ours, theirs = with_weights_of(ours, theirs)
    x = tokens()
    y = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert gap(ours(x), y) < 1e-12 * max(1, y.abs().max().item())


@pytest.mark.parametrize("options",
                         [{}, dict(head_dim=16), dict(num_heads=4, head_dim=16), dict(qkv_bias=True, proj_bias=True)],
                         ids=str)
@torch.inference_mode()
def test_attention_equals_its_twin_in_timm(options):
    ours, theirs = with_weights_of(Attention(DIM, **options), theirs_lib.Attention(DIM, **options))
    x = tokens()
    assert gap(ours(x).flatten(1, 2), theirs(x.flatten(1, 2))) < 1e-12


@torch.inference_mode()
def test_mlp_head_equals_its_twin_in_timm_with_the_published_eps():
    ours, theirs = with_weights_of(MlpHead(DIM, 10), theirs_lib.MlpHead(DIM, 10))
    theirs.norm.eps = PUBLISHED_EPS
    x = tokens().reshape(-1, DIM)
    assert gap(ours(x), theirs(x)) < 1e-12


@pytest.mark.parametrize("dim, heads", [(48, 1), (16, 1), (100, 3)])
def test_attention_takes_any_width(dim, heads):
    # timm's Attention(48) fails in its last reshape
    mixer = Attention(dim)
    assert mixer.num_heads == heads and mixer(torch.rand(1, 3, 4, dim)).shape == (1, 3, 4, dim)


@torch.inference_mode()
def test_random_mixing_equals_the_published_formula():
    # published code: torch.einsum('mn, bnc -> bmc', random_matrix, tokens); timm has no RandFormer
    mixer, x = golden.fill(RandomMixing(DIM, num_tokens=54).double()), tokens()
    y = torch.einsum("mn,bnc->bmc", mixer.random_matrix, x.reshape(1, 54, DIM)).reshape(x.shape)
    assert gap(mixer(x), y) < 1e-12


def test_random_matrix_is_frozen_and_its_rows_are_means():
    m = RandomMixing(num_tokens=49).random_matrix
    assert not m.requires_grad and m.shape == (49, 49) and (m > 0).all()
    torch.testing.assert_close(m.sum(-1), torch.ones(49))
    assert m.std(0).min() > 0  # random, not the mean of all tokens


def test_identity_gives_back_what_it_gets():
    x = tokens()
    assert Identity(DIM)(x) is x


def test_fresh_weights_are_as_published():
    # truncated normal of std 0.02 for linear and convolutional weights, biases 0, scales 1
    model = create_model("tiny_caformer")
    for k, p in model.named_parameters():
        if k.endswith(("act.bias", "act1.bias")) or k.endswith(".bias"):
            assert (p == 0).all(), k
        elif p.ndim == 1:
            assert (p == 1).all(), k
        else:
            assert abs(p.mean()) < 0.004 and (p.numel() < 2000 or 0.018 < p.std() < 0.022), k
