"""The table of models against the published one, its cards, and what creating a model can do."""
import dataclasses
import re
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import golden
from metaformer_edu.core.basics import count_macs, count_params
from metaformer_edu.core.files import Table, human
from metaformer_edu.models import registry
from metaformer_edu.models.block import MetaFormerBlock
from metaformer_edu.models.layers import LayerNormGeneral, MlpHead
from metaformer_edu.models.metaformer import MetaFormer
from metaformer_edu.models.mixers import Attention, Identity, MIXERS, Pooling, RandomMixing, SepConv, get_mixer
from metaformer_edu.models.registry import MODELS, ModelSpec, create_model, list_models, model_table

each_row = pytest.mark.parametrize("row", golden.ROWS, ids=[r["name"] for r in golden.ROWS])
TINY = [f"tiny_{f}" for f in golden.FAMILIES]
WIDTH = MODELS[TINY[0]].dims[-1]
each_tiny = pytest.mark.parametrize("name", TINY)


# --- the table ---

def test_the_55_published_names_and_no_other():
    names = list_models(pretrained=True)
    assert len(names) == len(set(names)) == 55
    assert set(names) == golden.BY_NAME.keys()


def test_tiny_variants_stand_beside_and_say_so():
    assert set(list_models()) - set(list_models(pretrained=True)) == set(TINY)
    assert list_models("tiny_*") == TINY and not list_models("tiny_*", pretrained=True)
    for name in TINY:
        row = MODELS[name]
        assert row.url is None and row.top1 is None and "not of the paper" in row.facts
        assert sum(row.params) < 2_000_000 and row.resolution <= 64  # for a CPU


@pytest.mark.parametrize("pattern, count",
                         [("caformer*", 20), ("convformer*", 20), ("*former_s12", 2), ("*_s12", 3), ("*_in21k", 8),
                                            ("*_384", 8), ("randformer_m48", 1), ("caformer", 0), ("", 0)])
def test_list_models_filters_by_shell_pattern(pattern, count):
    names = list_models(pattern)
    assert len(names) == count and all(re.fullmatch(pattern.replace("*", ".*"), n) for n in names)


@each_row
def test_row_is_the_published_one(row, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    ours, published = MODELS[row["name"]], row["published"] or {}
    data = {(None, "imagenet1k"): "in1k", ("imagenet21k", "imagenet1k"): "in21k_ft_in1k",
            ("imagenet21k", "imagenet21k"): "in21k"}
    assert ours.name == row["name"] and row["architecture"].startswith(ours.family)
    assert ours.resolution == row["resolution"] and ours.num_classes == row["num_classes"]
    assert ours.data == data[row["pretrained_on"], row["trained_on"]]
    assert ours.top1 == published.get("top1")
    assert ours.url == row["checkpoint"]
    model = ours.meta()
    # of the model that is built, not of the row alone
    assert list(model.depths) == row["depths"] == [len(s) for s in model.stages] and list(model.dims) == row["dims"]
    assert [{type(b.token_mixer).__name__ for b in s} for s in model.stages] == [{m} for m in row["mixers"]]
    assert {
        type(n).__name__ for b in model.modules() if isinstance(b, MetaFormerBlock) for n in (b.norm1, b.norm2)
    } == {row["norm"]}
    assert isinstance(model.head, nn.Linear) == (row["head"] == "Linear")
    assert model.img_size == row["resolution"] and model.num_classes == row["num_classes"]


@each_row
def test_parameters_are_exact_and_macs_within_half_a_percent(row):
    ours = MODELS[row["name"]]
    assert ours.params == (row["trainable_params"], row["frozen_params"])
    assert ours.macs == pytest.approx(row["macs"], rel=0.005)


def test_rows_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["caformer_s18"].top1 = 99.


@pytest.mark.parametrize("mirror, start",
                         [("http://mirror.test", "http://mirror.test/sail/"),
                          ("http://mirror.test/", "http://mirror.test/sail/"),
                                           ("", "https://huggingface.co/sail/")])
def test_hf_endpoint_names_a_mirror(mirror, start, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", mirror)
    assert MODELS["caformer_s18"].url.startswith(start)


@each_tiny
def test_counting_neither_needs_nor_changes_weights(name):
    model = create_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert count_macs(model, (1, 3, 64, 64)) == MODELS[name].macs and count_params(model) == MODELS[name].params
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- cards ---

def shown(thing):
    "What a notebook shows when a cell ends in `thing`: HTML and text."
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    data, _ = formatter.format(thing)
    return [re.sub("<[^>]*>", " ", data["text/html"]), data["text/plain"]]


def assert_card_is_right(thing, name, model, top1, classes, size):
    mixers = {type(s[0].token_mixer).__name__ for s in model.stages}
    for text in shown(thing):
        assert name in text and f"{classes} classes" in text and f"{size}×{size}" in text
        for i, stage in enumerate(model.stages):
            assert re.search(
                rf"stage {i + 1}\s.*?\s{model.dims[i]}\s+{len(stage)}\s+{type(stage[0].token_mixer).__name__}\s", text
            ), f"stage {i + 1}"
        assert all(m in text for m in mixers)
        # the last row is the whole model
        last = text[text.rindex("all"):]
        assert (
            human(sum(count_params(model))) in last
            and human(count_macs(model, (1, model.in_chans, size, size))) in last
        )
        facts = text[:text.index("classes")]
        assert (
            re.search(rf"published .*top-1 {top1} %", facts) if top1 else ("top-1" not in facts and "None" not in facts)
        )


@pytest.mark.parametrize("name", ["identityformer_s12", "randformer_s12", "convformer_m36_384_in21ft1k", "caformer_s18",
                                  "caformer_b36_in21k", *TINY])
def test_card_of_a_row_and_of_its_model(name):
    row, model = MODELS[name], MODELS[name].meta()
    for thing in (row, model):
        assert_card_is_right(thing, name, model, row.top1, row.num_classes, row.resolution)


def test_card_of_a_model_with_other_classes_channels_and_size():
    model = create_model("tiny_randformer", num_classes=7, in_chans=1, img_size=96)
    assert_card_is_right(model, "tiny_randformer", model, None, 7, 96)
    without = create_model("tiny_caformer", num_classes=0)
    assert_card_is_right(without, "tiny_caformer", without, None, 0, 64)


def test_card_of_a_reset_classifier():
    model = create_model("tiny_caformer")
    model.reset_classifier(123)
    assert_card_is_right(model, "tiny_caformer", model, None, 123, 64)


@pytest.mark.parametrize("classes", [1000, 10])
def test_card_of_a_model_that_timm_made(classes):
    with torch.device("meta"):
        model = timm.create_model("edu_caformer_s18", num_classes=classes)
    assert_card_is_right(model, "caformer_s18", model, 83.6, classes, 224)


@pytest.mark.parametrize("make", [partial(create_model, "caformer_s18"),
                                  partial(timm.create_model, "edu_caformer_s18")], ids=["ours", "timm"])
def test_card_does_not_claim_published_accuracy_for_another_architecture(make):
    with torch.device("meta"):
        model = make(token_mixers="Pooling")
    for text in shown(model):
        assert "Pooling" in text and "83.6" not in text


def test_card_of_your_own_model():
    model = MetaFormer(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32),
                       token_mixers=("Pooling", "SepConv", "Identity", "Attention"), num_classes=5)
    assert_card_is_right(model, "MetaFormer", model, None, 5, 224)


def test_repr_stays_the_list_of_modules():
    assert "SepConv" in repr(create_model("tiny_caformer")) and "\n" in repr(create_model("tiny_caformer"))


# --- the table for readers ---

def test_model_table_holds_all_published_models(monkeypatch):
    monkeypatch.setattr(ModelSpec, "macs", 0)  # counted above; 15 seconds
    table = model_table()
    assert isinstance(table, Table) and {r["model"] for r in table} == golden.BY_NAME.keys()
    rows = {r["model"]: r for r in table}
    for name, row in golden.BY_NAME.items():
        assert rows[name]["pixels"] == row["resolution"] and rows[name]["top-1 %"] == (row["published"] or {}).get(
            "top1"
        )
        assert rows[name]["parameters"].split(" + ")[0] == human(row["trainable_params"])
        assert ("+" in rows[name]["parameters"]) == bool(row["frozen_params"])
    assert len({r["weights trained on"] for r in table}) == 3
    assert "None" not in repr(table) and len(table.markdown().splitlines()) == 57


def test_model_table_of_some():
    table = model_table(["caformer_s18_384", "tiny_caformer"])
    assert [r["model"] for r in table] == ["caformer_s18_384", "tiny_caformer"]
    assert [r["MACs"] for r in table] == ["13.4G", human(MODELS["tiny_caformer"].macs)]
    assert model_table([]) == []


def test_model_table_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'caformer_s18'"):
        model_table(["caformer_s81"])


# --- names ---

@pytest.mark.parametrize("typed, nearest", [
    ("caformer_s81", "caformer_s18"), ("caformers18", "caformer_s18"), ("caformer-s18", "caformer_s18"),
    ("CAFormer_S18", "caformer_s18"),
    ("CAFORMER_S18", "caformer_s18"), ("conformer_s18", "convformer_s18"),
    ("convformer_b36_384_in21kft1k", "convformer_b36_384_in21ft1k"),
    ("poolformer_s12", "poolformerv2_s12"), ("identityfomer_m48", "identityformer_m48"),
    ("randformer_s_12", "randformer_s12"),
    ("edu_caformer_s18", "caformer_s18"), ("tiny_cafomer", "tiny_caformer")])
def test_misspelt_name_gets_the_nearest(typed, nearest):
    with pytest.raises(ValueError, match=f"Did you mean '{nearest}'") as error:
        create_model(typed)
    assert repr(typed) in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("typed", ["", "?", "resnet50"])
def test_hopeless_name_gets_examples(typed):
    with pytest.raises(ValueError, match="former"):
        create_model(typed)


# --- every argument of create_model has an effect ---

@each_tiny
def test_num_classes(name):
    x = torch.rand(2, 3, 64, 64)
    assert create_model(name)(x).shape == (2, 10)
    assert create_model(name, num_classes=7)(x).shape == (2, 7)
    assert create_model(name, num_classes=0)(x).shape == (2, WIDTH)


@each_tiny
@pytest.mark.parametrize("channels", [1, 4])
def test_in_chans(name, channels):
    model = create_model(name, in_chans=channels)
    assert model(torch.rand(2, channels, 64, 64)).shape == (2, 10)
    with pytest.raises(ValueError, match=rf"\(B, {channels}, H, W\) and got \(2, 3, 64, 64\)"):
        model(torch.rand(2, 3, 64, 64))


@each_tiny
def test_drop_path_grows_linearly_to_the_last_block(name):
    model = create_model(name, drop_path=0.4, depths=(1, 1, 2, 1))
    rates = [[getattr(d, "drop_prob", 0.) for d in (b.drop_path1, b.drop_path2)] for s in model.stages for b in s]
    assert rates == [[pytest.approx(r)] * 2 for r in (0., 0.1, 0.2, 0.3, 0.4)]
    x = torch.rand(8, 3, 64, 64)
    torch.manual_seed(0)
    first, second = model.train()(x), model(x)
    assert not torch.equal(first, second) and torch.equal(model.eval()(x), model(x))


@each_tiny
def test_head_dropout_acts_once_and_in_training_only(name):
    model = create_model(name, head_dropout=0.5)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p] == [0.5]
    tokens = torch.rand(4, 2, 2, WIDTH)
    model.train()
    assert not torch.equal(model.forward_head(tokens), model.forward_head(tokens))
    assert torch.equal(model.forward_features(torch.ones(1, 3, 64, 64)),
                       model.forward_features(torch.ones(1, 3, 64, 64)))
    model.eval()
    assert torch.equal(model.forward_head(tokens), model.forward_head(tokens))


@pytest.mark.parametrize("name", ["tiny_identityformer", "tiny_caformer"])
def test_other_arguments_go_to_the_model(name):
    model = create_model(name, depths=(2, 1, 1, 3), dims=(8, 16, 24, 32), token_mixers=partial(Pooling, pool_size=5),
                         norm_layers=LayerNormGeneral,
                         mlp_head=True, layer_scale_init_values=1e-5, res_scale_init_values=None, global_pool="")
    blocks = [b for s in model.stages for b in s]
    assert [len(s) for s in model.stages] == [2, 1, 1, 3] and {b.token_mixer.pool.kernel_size for b in blocks} == {5}
    assert {type(b.norm1) for b in blocks} == {LayerNormGeneral} and type(model.head).__name__ == "MlpHead"
    assert all((b.layer_scale2.scale == 1e-5).all() and isinstance(b.res_scale1, nn.Identity) for b in blocks)
    assert model(torch.rand(1, 3, 64, 96)).shape == (1, 2, 3, 10)


def test_img_size_is_the_size_of_random_mixing():
    model = create_model("tiny_randformer", img_size=(96, 64))
    assert [len(s[0].token_mixer.random_matrix) for s in model.stages[2:]] == [6 * 4, 3 * 2]
    assert model(torch.rand(1, 3, 96, 64)).shape == (1, 10)


def test_pretrained_tiny_says_there_is_none():
    with pytest.raises(registry.WeightsError, match="tiny_caformer is a tiny variant"):
        create_model("tiny_caformer", pretrained=True)


def test_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="dropout"):
        create_model("tiny_caformer", dropout=0.1)


def test_two_models_do_not_share_a_description():
    a, b = create_model("tiny_caformer"), create_model("tiny_caformer")
    a.pretrained_cfg["num_classes"] = 3
    assert b.pretrained_cfg["num_classes"] == create_model("tiny_caformer").pretrained_cfg["num_classes"] == 10


# --- a misspelt mixer option is an error, never swallowed ---

MISSPELT = [(Identity, "dimension"), (RandomMixing, "num_token"), (Pooling, "poolsize"), (SepConv, "kernelsize"),
            (Attention, "headdim")]
each_misspelt = pytest.mark.parametrize("mixer, option", MISSPELT, ids=[m.__name__ for m, _ in MISSPELT])


def test_all_mixers_are_tried():
    assert [m for m, _ in MISSPELT] == list(MIXERS.values())


@each_misspelt
def test_misspelt_option_of_the_class(mixer, option):
    with pytest.raises(TypeError, match=option):
        mixer(64, **{option: 3})


@each_misspelt
def test_misspelt_option_in_a_partial(mixer, option):
    # ValueError where the signature is read before the class is called
    with pytest.raises((TypeError, ValueError), match=option):
        MetaFormer(token_mixers=partial(mixer, **{option: 3}), depths=(1, 1, 1, 1))
    with pytest.raises((TypeError, ValueError), match=option):
        create_model("tiny_identityformer",
                     token_mixers=("Identity", "Identity", "Identity", partial(mixer, **{option: 3})))


@pytest.mark.parametrize("name, option", list(zip(TINY, [o for _, o in MISSPELT])))
def test_misspelt_option_as_an_argument_of_create_model(name, option):
    with pytest.raises(TypeError, match=option):
        create_model(name, **{option: 3})
    with pytest.raises(TypeError, match=option):
        timm.create_model(f"edu_{name}", **{option: 3})


@pytest.mark.parametrize("typed, nearest",
                         [("Atention", "Attention"), ("sepconv", "SepConv"), ("Pool", "Pooling"),
                          ("RandMixing", "RandomMixing")])
def test_misspelt_mixer_name(typed, nearest):
    for wrong in (lambda: get_mixer(typed), lambda: create_model("tiny_caformer", token_mixers=typed)):
        with pytest.raises(ValueError, match=f"Did you mean '{nearest}'"):
            wrong()


def test_model_spec_builds_what_it_says():
    row = ModelSpec("mine", "convformer", (1, 1, 1, 1), (8, 16, 24, 32), resolution=32, num_classes=3, data="none")
    assert row.build()(torch.rand(1, 3, 32, 32)).shape == (1, 3) and row.params == count_params(row.build())


# --- half precision: the square in the MLP head ---

MLP_HEADS = pytest.mark.parametrize("name", ["tiny_convformer", "tiny_caformer"])


def plain(head, x):
    "The head as the published code has it."
    hidden = head.act(F.linear(x, head.fc1.weight, head.fc1.bias))
    return F.linear(head.head_dropout(head.norm(hidden)), head.fc2.weight, head.fc2.bias)


@pytest.mark.parametrize("size", [300., 1e4, 1e5])  # the last is infinite as float16
def test_the_head_survives_float16_where_the_published_one_does_not(size):
    torch.manual_seed(0)
    head, x = MlpHead(512, 10), size * torch.randn(2, 512)
    x.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        logits, naive = head(x), plain(head, x)
    assert torch.equal(logits, plain(head, x)) and logits.dtype == torch.float32
    assert naive.isnan().any()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *head.parameters()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_head_takes_features_that_are_half_already(dtype):
    torch.manual_seed(0)
    head, x = MlpHead(512, 10), 300 * torch.randn(2, 512, dtype=dtype)
    with torch.autocast("cpu", dtype):
        logits = head(x)
    assert torch.equal(logits, plain(head, x.float())) and logits.isfinite().all()


@MLP_HEADS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_with_loud_features_under_autocast(name, dtype):
    model = golden.fill(create_model(name))
    with torch.no_grad():
        model.head.fc1.weight *= 1000  # as if it had grown in training
    x = golden.images(64, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        tokens = model.forward_features(x)
        features = model.forward_head(tokens, pre_logits=True)
        logits, naive = model(x), plain(model.head, features)
        assert torch.is_autocast_enabled("cpu")  # and on again after the head
    assert logits.isfinite().all() and naive.isfinite().all() == (dtype == torch.bfloat16)
    assert torch.equal(logits, plain(model.head, features.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_the_head_is_the_published_one_bit_for_bit(dtype):
    torch.manual_seed(0)
    head, x = MlpHead(64, 10, head_dropout=0.5).to(dtype), torch.randn(4, 64, dtype=dtype)
    for train in (False, True):
        head.train(train)
        torch.manual_seed(1)
        expected = plain(head, x)
        torch.manual_seed(1)
        assert torch.equal(head(x), expected) and head(x).dtype == dtype


@MLP_HEADS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_one_precision(name, dtype):
    model, x = golden.fill(create_model(name).to(dtype)), golden.images(64, dtype=dtype)
    logits = model(x)
    assert logits.dtype == dtype and logits.isfinite().all()
    torch.testing.assert_close(logits.float(), golden.fill(create_model(name))(x.float()), rtol=0.1, atol=0.2)
    with torch.autocast("cpu", torch.float16 if dtype == torch.float16 else torch.bfloat16):
        assert model(x).dtype == dtype and model(x).isfinite().all()  # autocast beside it is harmless


@MLP_HEADS
def test_the_head_under_autocast_is_compiled_and_exported(name):
    model, x = golden.fill(create_model(name)), golden.images(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        exported = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(exported, expected, rtol=1e-2, atol=1e-2)
    torch.compiler.reset()


def test_the_head_on_a_device_without_autocast():
    with torch.device("meta"):
        assert MlpHead(8, 3)(torch.empty(2, 8)).shape == (2, 3)
