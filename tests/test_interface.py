"""The model as timm and PyTorch know models: timm's interface and registry, tools that take a model apart, inputs of
all kinds."""
import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import timm
import timm.data
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import golden
import loopback
from metaformer_edu.models import registry
from metaformer_edu.models.block import MetaFormerBlock, Stage
from metaformer_edu.models.card import draw_stages
from metaformer_edu.models.layers import Mlp, StarReLU
from metaformer_edu.models.metaformer import MetaFormer, drop_path_rates, grid_sizes
from metaformer_edu.models.mixers import Attention, Pooling, RandomMixing
from metaformer_edu.models.registry import MODELS, create_model, list_models
from metaformer_edu.models.weights import save_weights

TINY = [f"tiny_{f}" for f in golden.FAMILIES]
each_tiny = pytest.mark.parametrize("name", TINY)
each_head = pytest.mark.parametrize("name", ["tiny_poolformerv2", "tiny_caformer"])  # a linear and an MLP head
DIMS, BLOCKS = MODELS["tiny_caformer"].dims, sum(MODELS["tiny_caformer"].depths)
WIDTH = DIMS[-1]
X = golden.images(64, dtype=torch.float32)


def model_of(name, **kwargs):
    return golden.fill(create_model(name, **kwargs))


# --- forward, in parts ---

@each_tiny
@torch.inference_mode()
def test_forward_is_features_then_head(name):
    model = model_of(name)
    tokens = model.forward_features(X)
    assert tokens.shape == (2, 2, 2, WIDTH)
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, model.head_hidden_size) == (2, model.num_features) == (2, WIDTH)
    torch.testing.assert_close(features,
                               F.layer_norm(tokens.mean((1, 2)), (WIDTH,), model.norm.weight, model.norm.bias, 1e-6))
    assert torch.equal(model.get_classifier()(features), model(X)) and torch.equal(model.forward_head(tokens), model(X))
    assert model(X).shape == (2, 10) and model.num_classes == 10


@each_head
def test_reset_classifier(name):
    model, before = model_of(name).double(), copy.deepcopy(create_model(name)).double()
    before.load_state_dict(model.state_dict())
    model.reset_classifier(7)
    assert (
        model.num_classes == 7
        and model(X.double()).shape == (2, 7)
        and type(model.get_classifier()) is type(before.get_classifier())
    )
    assert {p.dtype for p in model.parameters()} == {torch.float64} and not any(m.training for m in model.modules())
    # a new classifier, and everything else as it was
    assert torch.equal(model.forward_features(X.double()), before.forward_features(X.double()))
    assert all(p.requires_grad for p in model.head.parameters()) and 0.01 < next(model.head.parameters()).std() < 0.03
    model.train().reset_classifier(3)
    assert all(m.training for m in model.head.modules())


@each_head
def test_reset_classifier_to_none_and_back(name):
    model = model_of(name)
    features = model.forward_head(model.forward_features(X), pre_logits=True)
    model.reset_classifier(0)
    assert (
        isinstance(model.get_classifier(), nn.Identity) and model.num_classes == 0 and torch.equal(model(X), features)
    )
    model.reset_classifier(5)
    assert model(X).shape == (2, 5) and model.num_features == model.head_hidden_size == WIDTH


@each_head
def test_reset_classifier_keeps_the_dropout(name):
    model = create_model(name, head_dropout=0.5)
    model.reset_classifier(3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p] == [0.5]


@each_head
def test_global_pool(name):
    model = model_of(name)
    model.reset_classifier(10, "")  # one answer a token
    assert model.global_pool == "" and model(X).shape == (2, 2, 2, 10)
    assert model.forward_head(model.forward_features(X), pre_logits=True).shape == (2, 2, 2, WIDTH)
    model.reset_classifier(10)  # None leaves it
    assert model.global_pool == "" and model(X).shape == (2, 2, 2, 10)
    model.reset_classifier(10, "avg")
    assert model(X).shape == (2, 10)
    assert create_model(name, global_pool="")(X).shape == (2, 2, 2, 10)
    for pool in ("max", "average", False):
        with pytest.raises(ValueError, match="global_pool is 'avg' or ''"):
            model.reset_classifier(10, pool)
    assert model(X).shape == (2, 10)  # a refused call changes nothing
    with pytest.raises(ValueError, match="'max'"):
        create_model(name, global_pool="max")


# --- features ---

@each_tiny
@torch.inference_mode()
def test_feature_info_is_true(name):
    model, x = model_of(name, img_size=128), golden.images(128, dtype=torch.float32)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert [i["reduction"] for i in model.feature_info] == [4, 8, 16, 32]
    for info, f in zip(model.feature_info, features):
        assert f.shape == (2, info["num_chs"], 128 // info["reduction"], 128 // info["reduction"])
        assert model.get_submodule(info["module"]) is model.stages[int(info["module"][-1])]


@pytest.mark.parametrize("indices, taken",
                         [(None, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), (4, [0, 1, 2, 3]), ([0], [0]), ([1, 3], [1, 3]),
                                            ((0, -1), [0, 3]), ([-2], [2])])
@torch.inference_mode()
def test_indices_of_forward_intermediates(indices, taken):
    model = model_of("tiny_caformer")
    final, every = model.forward_intermediates(X)
    got, some = model.forward_intermediates(X, indices=indices)
    assert torch.equal(got, final) and torch.equal(final, model.forward_features(X))
    assert len(some) == len(taken) and all(torch.equal(f, every[i]) for f, i in zip(some, taken))
    only = model.forward_intermediates(X, indices=indices, intermediates_only=True)
    assert isinstance(only, list) and all(torch.equal(a, b) for a, b in zip(only, some))


@pytest.mark.parametrize("indices", [0, 5, [4], [-5]])
def test_indices_out_of_range(indices):
    with pytest.raises((AssertionError, ValueError, IndexError)):
        create_model("tiny_caformer").forward_intermediates(X, indices=indices)


@torch.inference_mode()
def test_norm_is_for_the_last_stage():
    model = model_of("tiny_caformer")
    final, plain = model.forward_intermediates(X)
    normed_final, normed = model.forward_intermediates(X, norm=True)
    assert all(torch.equal(a, b) for a, b in zip(normed[:3], plain[:3])) and torch.equal(normed_final, final)
    torch.testing.assert_close(normed[3].permute(0, 2, 3, 1), model.norm(plain[3].permute(0, 2, 3, 1)))
    assert not torch.equal(normed[3], plain[3])


@torch.inference_mode()
def test_formats_of_forward_intermediates():
    model = model_of("tiny_caformer")
    nchw = model.forward_intermediates(X, intermediates_only=True)
    nhwc = model.forward_intermediates(X, intermediates_only=True, output_fmt="NHWC")
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(nchw, nhwc)) and nhwc[0].shape == (
        2,
        16,
        16,
        DIMS[0],
    )
    with pytest.raises(ValueError, match="'NCHW' or 'NHWC', not 'NLC'"):
        model.forward_intermediates(X, output_fmt="NLC")


@pytest.mark.parametrize("stop_early", [False, True])
@torch.inference_mode()
def test_stop_early_runs_no_more_than_asked(stop_early):
    model, ran = model_of("tiny_caformer"), []
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda *args, i=i: ran.append(i))
    final, features = model.forward_intermediates(X, indices=[0, 1], stop_early=stop_early)
    assert ran == ([0, 1] if stop_early else [0, 1, 2, 3]) and len(features) == 2
    assert final.shape == ((2, 8, 8, DIMS[1]) if stop_early else (2, 2, 2, WIDTH))


@torch.inference_mode()
def test_prune_intermediate_layers():
    model = model_of("tiny_caformer")
    every = model.forward_intermediates(X, intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert (
        len(model.stages) == len(model.downsample_layers) == 3
        and model.num_features == DIMS[2]
        and model.num_classes == 0
    )
    assert all(torch.equal(a, every[i])
               for a, i in zip(model.forward_intermediates(X, [0, 2], intermediates_only=True), [0, 2]))
    assert torch.equal(model(X), every[2].permute(0, 2, 3, 1))  # what is left still runs
    assert model.prune_intermediate_layers([1]) == [1] and len(model.feature_info) == 2


@torch.inference_mode()
def test_pruning_nothing_keeps_norm_and_head_on_request():
    model = model_of("tiny_caformer")
    logits = model(X)
    assert model.prune_intermediate_layers(1, prune_norm=False, prune_head=False) == [3] and torch.equal(
        model(X), logits
    )
    model.prune_intermediate_layers(1, prune_norm=True)
    assert torch.equal(model(X), model.forward_features(X))


def test_a_cut_model_loses_its_head_in_any_case():
    model = create_model("tiny_convformer")
    model.prune_intermediate_layers([1], prune_head=False)
    assert model.num_classes == 0 and model(X).shape[-1] == model.dims[1]


# --- for trainers ---

@each_tiny
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    model = golden.fill(create_model(name, drop_path=0.3, head_dropout=0.3)).train()
    runs, got = [], {}
    for block in model.modules():
        if isinstance(block, MetaFormerBlock):
            block.register_forward_pre_hook(lambda *args: runs.append(1))
    for enable in (False, True, False):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        runs.clear()
        torch.manual_seed(0)
        loss = F.cross_entropy(model(X), torch.tensor([3, 7]))
        loss.backward()
        new = [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
        for a, b in zip(got.setdefault("grads", new), new):
            torch.testing.assert_close(a, b)
        assert len(runs) == (2 * BLOCKS if enable else BLOCKS)  # each block runs again in the backward pass
    model.set_grad_checkpointing()  # on without an argument, as in timm
    runs.clear()
    model.eval()
    with torch.no_grad():
        model(X)
    assert len(runs) == BLOCKS


@each_tiny
def test_no_weight_decay_is_what_timms_optimizers_leave_alone(name):
    model = create_model(name)
    skip = model.no_weight_decay()
    assert skip == {n for n, p in model.named_parameters() if p.ndim < 2 or "random_matrix" in n}
    names = {id(p): n for n, p in model.named_parameters()}
    groups = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05).param_groups
    by_decay = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert by_decay == {0.: skip - frozen, 0.05: set(names.values()) - skip}
    assert bool(frozen) == (name == "tiny_randformer")


def test_pretrained_cfg_is_what_timm_asks_for():
    for name in ("caformer_s18_384_in21ft1k", "randformer_s12", "caformer_s18_in21k", "tiny_caformer"):
        row, model = MODELS[name], MODELS[name].meta()
        data, cfg = timm.data.resolve_model_data_config(model), model.pretrained_cfg
        assert (
            data["input_size"] == (3, row.resolution, row.resolution)
            and data["crop_pct"] == 1.0
            and data["interpolation"] == "bicubic"
        )
        assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)
        assert cfg is model.default_cfg and cfg["num_classes"] == row.num_classes and cfg["url"] == (row.url or "")
        assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear) and isinstance(
            model.get_submodule(cfg["first_conv"]), nn.Conv2d
        )
        transform = timm.data.create_transform(**data, is_training=False)
        assert transform(Image.new("RGB", (500, 400))).shape == data["input_size"]


# --- timm's registry ---

def test_all_60_are_registered():
    assert set(timm.list_models("edu_*")) == {f"edu_{n}" for n in MODELS} and len(MODELS) == 60
    assert set(timm.list_models("edu_*", pretrained=True)) == {f"edu_{n}" for n in list_models(pretrained=True)}


def test_registering_again_is_harmless(recwarn):
    registry._register_with_timm()
    assert len(timm.list_models("edu_*")) == 60 and not recwarn.list


def test_timms_own_models_stay_timms():
    for name in ("caformer_s18", "convformer_b36", "poolformerv2_s12"):
        assert timm.models.model_entrypoint(name).__module__ == "timm.models.metaformer"


def test_star_import_brings_what_the_lesson_exports_and_no_more():
    names = {}
    exec("from metaformer_edu.models.registry import *", names)
    names.pop("__builtins__")
    assert (
        names["create_model"] is create_model
        and {"list_models", "model_table", "MODELS"} <= names.keys()
    )
    assert names.keys() == set(registry.__all__) and not any(n.startswith(("edu_", "_")) for n in names)
    foreign = [n for n, v in names.items()
               if getattr(v, "__module__", "metaformer_edu.models.registry") != "metaformer_edu.models.registry"]
    assert not foreign, foreign


@each_tiny
def test_timm_builds_the_same_model(name):
    ours, theirs = model_of(name), golden.fill(timm.create_model(f"edu_{name}"))
    assert (
        type(theirs) is MetaFormer
        and torch.equal(ours(X), theirs(X))
        and theirs.pretrained_cfg["architecture"] == f"edu_{name}"
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_all_60_build_on_the_meta_device(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(f"edu_{name}")
    assert {p.device.type for m in (ours, theirs) for p in m.state_dict().values()} == {"meta"}
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.num_classes == theirs.num_classes == MODELS[name].num_classes


def test_a_model_from_the_meta_device_can_be_filled():
    with torch.device("meta"):
        model = create_model("tiny_randformer")
    model.reset_classifier(10)
    assert model.head.weight.is_meta
    model.to_empty(device="cpu")
    assert torch.equal(golden.fill(model)(X), model_of("tiny_randformer")(X))


@each_tiny
def test_timms_arguments(name):
    model = timm.create_model(f"edu_{name}", num_classes=7, in_chans=1, drop_path_rate=0.4, depths=(1, 1, 2, 1))
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 7)
    assert [getattr(b.drop_path2, "drop_prob", 0.0) for s in model.stages for b in s] == pytest.approx(
        [0.0, 0.1, 0.2, 0.3, 0.4]
    )
    assert timm.create_model(f"edu_{name}", num_classes=0)(X).shape == (2, WIDTH)
    assert timm.create_model(f"edu_{name}", global_pool="")(X).shape == (2, 2, 2, 10)


@each_tiny
def test_drop_rate_of_timm_takes_effect_once(name):
    # timm applies it twice for ConvFormer and CAFormer and never for PoolFormerV2
    model = timm.create_model(f"edu_{name}", drop_rate=0.5)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p] == [0.5]
    # the last layer as an identity shows its input: half of the features are zero, not three quarters and not none
    last = model.get_submodule(model.pretrained_cfg["classifier"])
    wide = timm.create_model(f"edu_{name}", drop_rate=0.5, num_classes=last.in_features).train()
    last = wide.get_submodule(wide.pretrained_cfg["classifier"])
    last.weight.data, last.bias.data = torch.eye(last.in_features), torch.zeros(last.in_features)
    zeros = (wide.forward_head(torch.randn(64, 1, 1, WIDTH)) == 0).float().mean()
    assert 0.45 < zeros < 0.55


def test_img_size_of_timm_is_randformers():
    model = timm.create_model("edu_tiny_randformer", img_size=96)
    assert [len(s[0].token_mixer.random_matrix) for s in model.stages[2:]] == [36, 9] and model(
        torch.rand(1, 3, 96, 96)
    ).shape == (1, 10)
    assert timm.create_model("edu_tiny_randformer", img_size=(96, 64))(torch.rand(1, 3, 96, 64)).shape == (1, 10)
    assert timm.create_model("edu_tiny_randformer")(X).shape == (2, 10)


def test_misspelt_argument_of_timm_is_an_error():
    with pytest.raises(TypeError, match="drop_paths"):
        timm.create_model("edu_tiny_caformer", drop_paths=0.1)


@each_tiny
@pytest.mark.parametrize("indices", [None, (0, 1, 2, 3), (1,), (0, 2), (-1,), (1, -1), 2], ids=str)
@torch.inference_mode()
def test_features_only(name, indices):
    kwargs = {} if indices is None else dict(out_indices=indices)
    torch.manual_seed(0)
    extractor = timm.create_model(f"edu_{name}", features_only=True, **kwargs).eval()
    taken = [i % 4 for i in ([2, 3] if indices == 2 else indices or range(4))]
    features = extractor(X)
    assert [tuple(f.shape) for f in features] == [(2, DIMS[i], 16 // 2**i, 16 // 2**i) for i in taken]
    assert extractor.feature_info.channels() == [DIMS[i] for i in taken] and extractor.feature_info.reduction() == [
        4 * 2**i for i in taken
    ]
    # no weights without use: what comes after the last feature is gone
    assert len(extractor.model.stages) == max(taken) + 1 and not list(extractor.model.head.parameters())
    whole = create_model(name).eval()
    whole.load_state_dict(extractor.model.state_dict(), strict=False)
    assert all(torch.equal(f, w)
               for f, w in zip(features, whole.forward_intermediates(X, taken, intermediates_only=True)))


def test_features_can_be_trained():
    extractor = timm.create_model("edu_tiny_caformer", features_only=True, in_chans=1, out_indices=(1, 2))
    sum(f.square().mean() for f in extractor(X[:, :1])).backward()
    assert all(p.grad is not None for p in extractor.parameters())


def test_checkpoint_path_of_timm(tmp_path):
    model, path = model_of("tiny_caformer"), tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    assert torch.equal(timm.create_model("edu_tiny_caformer", checkpoint_path=str(path)).eval()(X), model(X))
    save_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(timm.create_model("edu_tiny_caformer",
                                         checkpoint_path=str(tmp_path / "w.safetensors")).eval()(X), model(X))


@pytest.fixture
def published(monkeypatch, tmp_path):
    "timm's overlay that names a loopback server with a file of golden weights, and that model."
    loopback.use_cache(monkeypatch, tmp_path / "torch")
    model, file = model_of("tiny_caformer"), io.BytesIO()
    torch.save(model.state_dict(), file)
    with loopback.serve() as site:
        site.files["/edu.pth"] = file.getvalue()
        yield dict(url=site / "edu.pth"), model, site


def test_pretrained_of_timm(published):
    overlay, model, site = published
    for _ in range(2):
        theirs = timm.create_model("edu_tiny_caformer", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert torch.equal(theirs(X), model(X))
    assert site.requests == ["/edu.pth"]


def test_pretrained_of_timm_with_another_head_and_stem(published):
    overlay, model, _ = published
    theirs = timm.create_model("edu_tiny_caformer", pretrained=True, num_classes=3,
                               pretrained_cfg_overlay=overlay).eval()
    assert theirs(X).shape == (2, 3) and torch.equal(theirs.forward_features(X), model.forward_features(X))
    assert torch.equal(theirs.head.fc1.weight, model.head.fc1.weight)
    grey = timm.create_model("edu_tiny_caformer", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(grey(X[:, :1]), model(X[:, :1].expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)


def test_pretrained_of_timm_takes_timms_names(published):
    overlay, _, site = published
    theirs, file = golden.small_timm("convformer").eval(), io.BytesIO()
    torch.save(theirs.state_dict(), file)
    site.files["/timm.pth"] = file.getvalue()
    ours = timm.create_model("edu_tiny_convformer", pretrained=True, pretrained_cfg_overlay=dict(url=site / "timm.pth"),
                             **golden.SMALL).eval()
    torch.testing.assert_close(ours.forward_features(X).permute(0, 3, 1, 2), theirs.forward_features(X), rtol=1e-4,
                               atol=1e-4)


def test_pretrained_features_of_timm(published):
    overlay, model, _ = published
    extractor = timm.create_model("edu_tiny_caformer", pretrained=True, features_only=True, out_indices=(0, 2),
                                  pretrained_cfg_overlay=overlay).eval()
    expected = model.forward_intermediates(X, [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(extractor(X), expected))


def test_our_pretrained_cfg_is_one_that_timm_takes():
    cfg = create_model("tiny_caformer").pretrained_cfg
    assert timm.create_model("edu_tiny_caformer", pretrained_cfg=cfg)(X).shape == (2, 10)


def test_hf_endpoint_counts_for_timm_too():
    # read when the package is imported: in a process of its own
    code = "import timm, metaformer_edu.models.registry; print(timm.get_pretrained_cfg('edu_caformer_s18').url)"
    env = {**os.environ, "HF_ENDPOINT": "http://mirror.test", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "http://mirror.test/sail/dl/resolve/main/caformer/caformer_s18.pth", done.stderr


# --- a model travels ---

@each_tiny
def test_copies_give_the_same_numbers(name):
    model = model_of(name, drop_path=0.1)
    logits = model(X)
    file = io.BytesIO()
    torch.save(model, file)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
              torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    for twin in copies:
        assert torch.equal(twin(X), logits) and twin.pretrained_cfg == model.pretrained_cfg
        assert [k for k, p in twin.named_parameters() if not p.requires_grad] == [
            k for k, p in model.named_parameters() if not p.requires_grad
        ]
        twin.reset_classifier(3)
        assert twin(X).shape == (2, 3)
        with torch.no_grad():
            next(twin.parameters()).zero_()
    assert torch.equal(model(X), logits)


@each_tiny
def test_export_with_any_batch_size(name):
    model = model_of(name)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    exported, x = program.module(), torch.cat([X, X.flip(0), X])[:5]
    torch.testing.assert_close(exported(x), model(x))
    torch.testing.assert_close(exported(x[:2]), model(x[:2]))


@each_tiny
@pytest.mark.filterwarnings("ignore")  # deprecated, and it warns of every shape that it takes as constant
def test_trace(name):
    model = model_of(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, X, check_trace=False)
    torch.testing.assert_close(traced(X.flip(0)), model(X.flip(0)))


@each_tiny
def test_compile_captures_one_graph(name):
    # fullgraph: nothing falls back to Python; forward and backward
    model = model_of(name, drop_path=0.)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(X)
    expected.sum().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    logits = compiled(X)
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    for k, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[k], rtol=1e-3, atol=1e-4, msg=lambda m, k=k: f"{k}: {m}")
    torch.compiler.reset()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")),
                    reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_compile_with_inductor():
    # two stages have every part of CAFormer; compiling is what takes the time
    model = golden.fill(MetaFormer(depths=(1, 1), dims=(16, 32), token_mixers=("SepConv", "Attention"),
                                   res_scale_init_values=(None, 1.),
                                   mlp_head=True, num_classes=10))
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_compiled_with_gradient_checkpointing():
    model = model_of("tiny_caformer").train()
    model.set_grad_checkpointing()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    torch.compiler.reset()


# --- inputs of all kinds ---

ANY_SIZE = [n for n in TINY if n != "tiny_randformer"]


@pytest.mark.parametrize("name", ANY_SIZE)
@pytest.mark.parametrize("size", [(64, 96), (65, 63), (97, 33), (33, 200), (7, 7), (31, 3)])
@torch.inference_mode()
def test_any_image_size(name, size):
    model, x = model_of(name), torch.rand(1, 3, *size)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(f.shape[2:]) for f in features] == grid_sizes(size)
    assert model(x).shape == (1, 10) and model(x).isfinite().all()


@pytest.mark.parametrize("size", [(65, 63), (97, 33), 50, (40, 100)])
@torch.inference_mode()
def test_randformer_at_a_size_it_is_built_for(size):
    x = torch.rand(1, 3, *((size, size) if isinstance(size, int) else size))
    assert create_model("tiny_randformer", img_size=size)(x).shape == (1, 10)


def test_randformer_takes_any_image_of_the_same_grid():
    assert create_model("tiny_randformer")(torch.rand(1, 3, 63, 64)).shape == (1, 10)


@each_tiny
@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (2, 4, 64, 64), (3, 64, 64), (64, 64), (2, 64, 64, 3),
                                   (1, 2, 3, 64, 64)], ids=str)
def test_wrong_shapes_say_what_is_expected(name, shape):
    model = create_model(name)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError) as error:
            call(torch.rand(shape))
        assert "(B, 3, H, W)" in str(error.value) and str(shape) in str(error.value)


@each_tiny
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precisions(name, dtype):
    model, x = model_of(name).to(dtype).train(), X.to(dtype)
    logits = model(x)
    assert logits.dtype == dtype and logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@each_tiny
@torch.inference_mode()
def test_memory_format_and_batch_do_not_matter(name):
    model = model_of(name)
    torch.testing.assert_close(model(X.contiguous(memory_format=torch.channels_last)), model(X))
    torch.testing.assert_close(model(X)[:1], model(X[:1]))
    assert model(X[:0]).shape == (0, 10)


@each_tiny
def test_every_trainable_weight_gets_a_gradient(name):
    model = model_of(name)
    model(X).square().sum().backward()
    dead = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not dead and all(p.grad is None for p in model.parameters() if not p.requires_grad)


# --- building ---

@pytest.mark.parametrize("wrong", [
    dict(depths=(1, 1)), dict(depths=(1,) * 5), dict(depths=(1,) * 4, dims=(8, 16, 24)),
    dict(depths=(1,) * 4, dims=(8, 16, 24, 32, 40)),
    dict(token_mixers=("Pooling",) * 3), dict(token_mixers=["Pooling"] * 5), dict(norm_layers=(nn.LayerNorm,)),
    dict(mlps=[Mlp] * 2),
    dict(layer_scale_init_values=(1e-5,) * 3), dict(res_scale_init_values=(1.,) * 5)], ids=str)
def test_wrong_lengths_are_errors(wrong):
    with pytest.raises(ValueError, match="stage"):
        MetaFormer(**wrong)


def test_model_of_three_stages():
    model = MetaFormer(depths=(1, 2, 1), dims=(8, 16, 24), token_mixers="Pooling", res_scale_init_values=None,
                       num_classes=5)
    assert model(X).shape == (2, 5) and [i["reduction"] for i in model.feature_info] == [4, 8, 16]
    assert len(model._repr_mimebundle_()["text/plain"].splitlines()) == 7


def test_stage_is_a_sequence_of_blocks():
    stage = Stage(8, 3)
    assert len(stage) == 3 and [type(b) for b in stage[:2]] == [MetaFormerBlock] * 2 and stage[1] is stage[:2][1]
    with pytest.raises(ValueError, match="3"):
        Stage(8, 3, drop_paths=[0.1])


def test_drop_path_rates():
    assert drop_path_rates(0.3, (1, 1, 2)) == [[0.], [pytest.approx(0.1)], [pytest.approx(0.2), pytest.approx(0.3)]]
    assert drop_path_rates(0.3, (1,)) == [[0.]] and drop_path_rates(0., (2, 1)) == [[0., 0.], [0.]]


def test_residual_scales_stand_in_the_last_two_stages():
    model = create_model("tiny_caformer")
    assert [hasattr(s[0].res_scale1, "scale") for s in model.stages] == [False, False, True, True]
    assert all(isinstance(s[0].layer_scale1, nn.Identity) for s in model.stages)


# --- your own mixer ---

class Shift(nn.Module):
    "A mixer in under ten lines: every token takes its left neighbour's place."
    def __init__(self, dim):
        super().__init__()

    def forward(self, x):
        return x.roll(1, dims=2)


class WithOptions(nn.Module):
    "Its first argument has another name, and there are more."
    def __init__(self, channels, scale=2., **kwargs):
        super().__init__()
        self.linear, self.scale = nn.Linear(channels, channels), scale

    def forward(self, x):
        return self.linear(x) * self.scale


OWN = {"a class": Shift, "a class with options": WithOptions, "a partial": partial(WithOptions, scale=3.),
       "a lambda": lambda dim: nn.Identity(),
       "a lambda with another name": lambda c: nn.Linear(c, c), "torch's": nn.Identity,
       "torch's linear": lambda d: nn.Linear(d, d, bias=False)}


@pytest.mark.parametrize("mixer", OWN.values(), ids=list(OWN))
def test_own_mixer_drops_in(mixer):
    for mixers in (mixer, ("Pooling", mixer, "SepConv", mixer)):
        model = MetaFormer(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), token_mixers=mixers, num_classes=3)
        model(X).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    made = mixer(16)
    assert type(model.stages[1][0].token_mixer) is type(made) and type(model.stages[0][0].token_mixer) is Pooling
    if isinstance(made, WithOptions):
        assert model.stages[1][0].token_mixer.scale == made.scale and made.linear.in_features == 16
    assert type(made).__name__ in model._repr_mimebundle_()["text/plain"]


def test_own_mixer_with_num_tokens_gets_them():
    class Mine(RandomMixing):
        pass
    model = MetaFormer(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), token_mixers=Mine, img_size=64, num_classes=3)
    assert [len(s[0].token_mixer.random_matrix) for s in model.stages] == [256, 64, 16, 4] and model(X).shape == (2, 3)
    mixers = ("Identity", "Identity", "Identity", partial(Mine, num_tokens=4))
    fixed = MetaFormer(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), token_mixers=mixers, img_size=999)
    assert len(fixed.stages[3][0].token_mixer.random_matrix) == 4


def published_pooling():
    class Pooling(nn.Module):  # sail-sg/metaformer: token_mixer(dim=dim, drop=drop)
        def __init__(self, pool_size=3, **kwargs):
            super().__init__()
            self.pool = nn.AvgPool2d(pool_size, stride=1, padding=pool_size // 2, count_include_pad=False)

        def forward(self, x):
            y = x.permute(0, 3, 1, 2)
            return self.pool(y).permute(0, 2, 3, 1) - x
    return Pooling


def published_random_mixing():
    class RandomMixing(nn.Module):
        def __init__(self, num_tokens=196, **kwargs):
            super().__init__()
            self.random_matrix = nn.Parameter(torch.softmax(torch.rand(num_tokens, num_tokens), dim=-1),
                                              requires_grad=False)

        def forward(self, x):
            B, H, W, C = x.shape
            return torch.einsum("mn,bnc->bmc", self.random_matrix, x.reshape(B, H * W, C)).reshape(B, H, W, C)
    return RandomMixing


def published_sepconv():
    class SepConv(nn.Module):
        def __init__(self, dim, expansion_ratio=2, act1_layer=StarReLU, act2_layer=nn.Identity, bias=False,
                     kernel_size=7, padding=3, **kwargs):
            super().__init__()
            mid = int(expansion_ratio * dim)
            self.pwconv1, self.act1 = nn.Linear(dim, mid, bias=bias), act1_layer()
            self.dwconv = nn.Conv2d(mid, mid, kernel_size=kernel_size, padding=padding, groups=mid, bias=bias)
            self.act2, self.pwconv2 = act2_layer(), nn.Linear(mid, dim, bias=bias)

        def forward(self, x):
            x = self.act1(self.pwconv1(x)).permute(0, 3, 1, 2)
            return self.pwconv2(self.act2(self.dwconv(x).permute(0, 2, 3, 1)))
    return SepConv


def published_attention():
    class Attention(nn.Module):
        def __init__(self, dim, head_dim=32, num_heads=None, qkv_bias=False, attn_drop=0., proj_drop=0.,
                     proj_bias=False, **kwargs):
            super().__init__()
            self.head_dim, self.scale, self.num_heads = head_dim, head_dim ** -0.5, dim // head_dim
            self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim, bias=proj_bias)

        def forward(self, x):
            B, H, W, C = x.shape
            q, k, v = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            x = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v
            return self.proj(x.transpose(1, 2).reshape(B, H, W, C))
    return Attention


@pytest.mark.parametrize("name, mixers", [
    ("tiny_identityformer", nn.Identity), ("tiny_poolformerv2", published_pooling()),
    ("tiny_convformer", published_sepconv()),
    ("tiny_randformer", ("Identity", "Identity", published_random_mixing(), published_random_mixing())),
    ("tiny_caformer", (published_sepconv(), published_sepconv(), published_attention(), published_attention()))])
@torch.inference_mode()
def test_mixers_of_the_published_code_drop_in(name, mixers):
    torch.testing.assert_close(model_of(name, token_mixers=mixers)(X), model_of(name)(X), rtol=1e-4, atol=1e-4)


# --- dropout ---

@pytest.mark.parametrize("mixer", [partial(Attention, attn_drop=0.5), partial(Attention, proj_drop=0.5), None],
                         ids=["attn_drop", "proj_drop", "mlp"])
def test_dropout_is_for_training_only(mixer):
    options = dict(token_mixers=mixer) if mixer else dict(mlps=partial(Mlp, drop=0.5))
    model = MetaFormer(depths=(1, 1, 1, 1), dims=(32, 32, 32, 32), num_classes=3, **options)
    assert not torch.equal(model.train()(X), model(X))
    assert torch.equal(model.eval()(X), model(X))


def test_eval_without_dropout_is_train():
    # nothing here but dropout and drop path knows the mode: no batch statistics
    for name in TINY:
        model = model_of(name)
        assert torch.equal(model.train()(X), model.eval()(X))


# --- the picture ---

@pytest.mark.parametrize("options", [{}, dict(token_mixers="Pooling", img_size=(64, 128)),
                                     dict(depths=(1, 1, 1), dims=(8, 16, 24), res_scale_init_values=None)], ids=str)
def test_draw_stages(options):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    model = MetaFormer(**{**dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), token_mixers="SepConv"), **options})
    fig = draw_stages(model)
    assert plt.get_fignums() == before and len(fig.axes) == 2 * len(model.dims)
    titles = [a.get_title() for a in fig.axes[:len(model.dims)]]
    for title, (h, w), dim, stage in zip(titles, grid_sizes(model.img_size, len(model.dims)), model.dims, model.stages):
        assert f"{h}×{w}" in title and str(dim) in title and type(stage[0].token_mixer).__name__ in title
    shares = [float(t.get_text().split("%")[0]) for a in fig.axes[len(model.dims):] for t in a.texts]
    assert len(shares) == 2 * len(model.dims) and np.isclose(sum(shares), 200, atol=5)
    fig.canvas.draw()
