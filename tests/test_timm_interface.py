"""What timm asks of its models, asked of the five families: names, features, torch.fx, TorchScript; and its words."""
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import get_channel_dim, get_spatial_dim
from timm.models import FeatureGraphNet, FeatureInfo, get_notrace_functions, get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import golden
from metaformer_edu.models.registry import MODELS, create_model
from metaformer_edu.models.weights import save_weights

NAMES = [f"edu_tiny_{f}" for f in golden.FAMILIES]
each = pytest.mark.parametrize("name", NAMES)
X = golden.images(64, dtype=torch.float32)
TRACER = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(),
              param_shapes_constant=True)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:The TorchScript type system")


def model_of(name, **kwargs):
    return golden.fill(timm.create_model(name, **kwargs))


@each
@torch.inference_mode()
def test_the_attributes_say_what_comes_out(name):
    model = model_of(name)
    cfg, (h, w), channel = model.pretrained_cfg, get_spatial_dim(model.output_fmt), get_channel_dim(model.output_fmt)
    assert model.output_fmt == "NHWC" and model.default_cfg is cfg
    assert min(model.num_classes, model.num_features, model.head_hidden_size) > 0
    tokens = model.forward_features(X)
    assert (tokens.shape[h], tokens.shape[w]) == tuple(cfg["pool_size"])
    assert tokens.shape[channel] == model.num_features
    before = model.forward_head(tokens, pre_logits=True)
    assert before.shape == (len(X), model.head_hidden_size)
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= model.state_dict().keys()
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(X), before)
    model.reset_classifier(0, "")
    unpooled = [model(X), timm.create_model(name, num_classes=0, global_pool="").eval()(X)]
    assert all((y.shape[h], y.shape[w]) == tuple(cfg["pool_size"]) and y.ndim == 4 for y in unpooled)


@each
def test_every_parameter_gets_a_gradient_but_the_frozen_matrix(name):
    model = timm.create_model(name, num_classes=42).train()
    y = model(X)
    y.mean().backward()
    assert y.shape == (len(X), 42) and y.isfinite().all()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.endswith("random_matrix") for n in without) and bool(without) == (name == "edu_tiny_randformer")


@each
@torch.inference_mode()
def test_features_are_as_the_info_says(name):
    info = FeatureInfo(model_of(name).feature_info, (0, 1, 2, 3))
    for how in ({}, dict(feature_cls="getter")):
        extractor = timm.create_model(name, features_only=True, **how)
        for f, channels, reduction in zip(extractor.eval()(X), info.channels(), info.reduction(), strict=True):
            assert f.shape == (len(X), channels, 64 // reduction, 64 // reduction)


def traced(model, nodes=None):
    nodes = nodes or [get_graph_node_names(model, tracer_kwargs=TRACER)[1][-1]]
    return create_feature_extractor(model, return_nodes=nodes, tracer_kwargs=TRACER)


@each
def test_torch_fx_forward(name):
    model = model_of(name)
    for graph in (torch.fx.symbolic_trace(model), lambda x: next(iter(traced(model)(x).values()))):
        assert torch.equal(graph(X), model(X)) and torch.equal(graph(X[:1]), model(X[:1]))


@each
def test_torch_fx_backward(name):
    model = model_of(name, num_classes=42).train()
    graph = traced(model)
    y = next(iter(graph(X).values()))
    y.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(X).square().mean().backward()
    assert y.shape == (len(X), 42)
    for n, p in model.named_parameters():
        frozen = grads[n] is None and p.grad is None and "random_matrix" in n
        assert frozen or torch.allclose(grads[n], p.grad, rtol=1e-4, atol=1e-6), n


@each
@torch.inference_mode()
def test_torchvision_and_timm_take_features_out_of_the_graph(name):
    model = model_of(name)
    expected = model.forward_intermediates(X, output_fmt="NHWC", intermediates_only=True)
    found = traced(model, {f"stages.{i}": str(i) for i in range(4)})(X)
    assert all(torch.equal(found[str(i)], e) for i, e in enumerate(expected))
    extractor = FeatureGraphNet(model, out_indices=(0, 1, 2, 3))
    assert all(torch.equal(f, e) for f, e in zip(extractor(X), expected, strict=True))
    built = timm.create_model(name, features_only=True, feature_cfg=dict(feature_cls="fx")).eval()
    assert type(built) is FeatureGraphNet and [f.shape for f in built(X)] == [e.shape for e in expected]


@each
def test_a_graph_still_says_what_is_wrong_with_its_input(name):
    graph = torch.fx.symbolic_trace(model_of(name))
    with pytest.raises(ValueError, match=r"Expected images of shape \(B, 3, H, W\)"):
        graph(X[:, :1])
    if name == "edu_tiny_randformer":
        with pytest.raises(ValueError, match="RandomMixing has a fixed matrix for 16 tokens and got 3×3"):
            graph(F.interpolate(X, 48))


@each
def test_torchscript_as_timms_own(name):
    model = model_of(name)
    for scripted in (torch.jit.script(model), torch.jit.script(torch.fx.symbolic_trace(model))):
        torch.testing.assert_close(scripted(X), model(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scripted.train()(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_traced_head_keeps_float32_under_autocast(dtype):
    model = model_of("edu_tiny_convformer")
    graph = torch.fx.symbolic_trace(model)
    with torch.autocast("cpu", dtype):
        y = graph(X)
        assert torch.equal(y, model(X)) and y.dtype == torch.float32
        assert model.head(1000 * torch.randn(2, model.num_features)).isfinite().all()


# --- timm's words for our arguments ---

def test_create_model_knows_timms_words(tmp_path):
    path = save_weights(create_model("tiny_caformer"), tmp_path / "w.safetensors")
    ours = create_model("tiny_caformer", checkpoint=path, drop_path=0.4, head_dropout=0.3)
    theirs = create_model("tiny_caformer", checkpoint_path=path, drop_path_rate=0.4, drop_rate=0.3)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    rates = [[getattr(b.drop_path2, "drop_prob", 0.) for s in m.stages for b in s] for m in (ours, theirs)]
    assert rates[0] == rates[1] and rates[0][-1] == 0.4
    assert theirs.head.head_dropout.p == ours.head.head_dropout.p == 0.3
    assert [m.p for m in theirs.modules() if isinstance(m, nn.Dropout) and m.p] == [0.3]
    assert create_model("tiny_caformer", checkpoint_path="").num_classes == 10  # timm's default


@pytest.mark.parametrize("two", [
    dict(checkpoint="a.pth", checkpoint_path="b.pth"), dict(drop_path=0.1, drop_path_rate=0.1),
    dict(head_dropout=0., drop_rate=0.1)], ids=lambda o: next(iter(o)))
def test_one_thing_said_twice_is_an_error(two):
    with pytest.raises(ValueError, match=f"{' and '.join(two)} are two names of one argument"):
        create_model("tiny_caformer", **two)


def test_the_table_loads_no_plots():
    code = ("import sys, metaformer_edu.models.registry as zoo; print(len(zoo.list_models()), "
            "*(name in sys.modules for name in ('sklearn', 'pytorch_grad_cam')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["60", "False", "False"]


def test_weights_know_where_the_published_ones_are():
    from metaformer_edu.models.weights import published_url
    assert {n for n in MODELS if published_url(n)} == {n for n, m in MODELS.items() if m.data != "none"}
    assert all(published_url(n).endswith(f"/{MODELS[n].family}/{n}.pth") for n in MODELS if MODELS[n].url)
    wrong = "caformer_s12", "poolformerv2_s12_384", "caformer_s81", "caformer_s18_", "xcaformer_s18", ""
    assert not any(published_url(name) for name in wrong)
