"""Swap: what is replaced, what stays, and the table's numbers against independent computations."""
import copy
import io

import matplotlib
import pytest
import timm
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metaformer_edu.interpret import swap as lesson
from metaformer_edu.interpret.cam import explain
from metaformer_edu.interpret.swap import Nothing, swap_grid, swap_mixer, swap_table
from metaformer_edu.models.mixers import Identity, MIXERS, Pooling
from metaformer_edu.models.registry import FAMILIES, create_model

matplotlib.use("Agg")
pytestmark = pytest.mark.usefixtures("one_thread")
grid = lesson.cam_grid


def build(family="convformer", **options):
    "A tiny model with all parameters shaken: a scale of 1 or a bias of 0 would hide a mistake."
    torch.manual_seed(0)
    model = create_model(f"tiny_{family}", num_classes=4, **{"img_size": 64, **options})
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def mixers(model, stage):
    return [block.token_mixer for block in model.stages[stage - 1]]


def others(model, stages):
    "The state outside of the mixers of these stages."
    return {k: v for k, v in model.state_dict().items()
            if not any(k.startswith(f"stages.{s - 1}.") and ".token_mixer." in k for s in stages)}


def by_hand(model, x, branch):
    "A forward pass written out; `branch(stage, block, normed)` is what the mixer's branch adds."
    x = x.permute(0, 2, 3, 1)
    for s, (down, stage) in enumerate(zip(model.downsample_layers, model.stages), 1):
        x = down.post_norm(down.conv(down.pre_norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        for block in stage:
            added = branch(s, block, block.norm1(x))
            x = block.res_scale1(x) + (0 if added is None else added)
            x = block.res_scale2(x) + block.mlp(block.norm2(x))
    return model.head(model.norm(x.mean((1, 2))))


# --- the copy ---

@pytest.mark.parametrize("mixer", ["Identity", "SepConv", None])
def test_the_original_is_untouched(mixer, images):
    model = build("caformer")
    model.stages[1].train()
    model.stages[2][0].token_mixer.qkv.weight.grad = torch.ones_like(model.stages[2][0].token_mixer.qkv.weight)
    seen = []
    handle = model.stages[2].register_forward_hook(lambda *_: seen.append(1))
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    modules, hooks, notes = list(model.modules()), len(model.stages[2]._forward_hooks), model.notes
    swapped = swap_mixer(model, [2, 3], mixer)
    for p in swapped.parameters():
        p.data += 1
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert len(model.stages[2]._forward_hooks) == hooks and not seen and model.notes == notes
    assert model.stages[2][0].token_mixer.qkv.weight.grad.min() == 1
    handle.remove()


def test_the_copy_shares_no_memory():
    model = build("randformer")
    places = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not places & {t.untyped_storage().data_ptr() for t in swap_mixer(model, [1, 3]).state_dict().values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_in_the_place_of_identity_is_exact(family, images):
    model = build(family)
    assert type(swap_mixer(model, 1)) is type(model)
    for stage in (1, 2, 3, 4):
        same = torch.equal(swap_mixer(model, stage)(images), model(images))
        assert same == all(isinstance(m, Identity) for m in mixers(model, stage)), stage


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 2.0, (2,), [1, 4], range(2, 5), {3, 4}, torch.arange(1, 3).numpy()],
                         ids=str)
def test_only_these_stages_change(stages, images):
    model = build("caformer")
    wanted = [int(stages)] if isinstance(stages, (int, float)) else [int(s) for s in stages]
    swapped = swap_mixer(model, stages, "Pooling")
    for s in (1, 2, 3, 4):
        kinds = {type(m) for m in mixers(swapped, s)}
        assert kinds == ({Pooling} if s in wanted else {type(mixers(model, s)[0])})
    kept = others(model, wanted)
    assert kept.keys() == swapped.state_dict().keys() and all(
        torch.equal(v, swapped.state_dict()[k]) for k, v in kept.items()
    )
    pool = Pooling()
    expected = by_hand(model, images, lambda s, block, x: pool(x) if s in wanted else block.token_mixer(x))
    torch.testing.assert_close(swapped(images), expected)


def test_no_stage_is_a_plain_copy(images):
    model = build()
    swapped = swap_mixer(model, [])
    assert torch.equal(swapped(images), model(images)) and swapped.notes == model.notes


# --- identity and nothing ---

@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["convformer", "randformer"])
def test_identity_adds_the_norm_and_nothing_adds_nothing(family, stage, images):
    model = build(family)
    for mixer, added in (("Identity", lambda x: x), (None, lambda x: None), (Nothing, lambda x: None)):
        expected = by_hand(model, images, lambda s, block, x: added(x) if s == stage else block.token_mixer(x))
        torch.testing.assert_close(swap_mixer(model, stage, mixer)(images), expected)


def test_nothing_is_zeros_like_its_input():
    x = torch.full((1, 2, 3, 4), float("inf"), dtype=torch.bfloat16)
    y = Nothing(4)(x)
    assert y.shape == x.shape and y.dtype == x.dtype and not y.any() and not list(Nothing().parameters())


# --- any mixer ---

@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_in_every_stage(name, images):
    model = build("poolformerv2", img_size=(64, 96))
    wide = torch.cat([images, images[..., :32]], -1)
    for stage in (1, 2, 3, 4):
        swapped = swap_mixer(model, stage, name)
        assert {type(m) for m in mixers(swapped, stage)} == {MIXERS[name]}
        assert swapped(wide).isfinite().all()


def test_random_matrices_fit_the_grid_and_differ():
    swapped = swap_mixer(build(img_size=(64, 96)), [1, 2, 3, 4], "RandomMixing")
    assert [len(mixers(swapped, s)[0].random_matrix) for s in (1, 2, 3, 4)] == [384, 96, 24, 6]
    first, second = mixers(swapped, 3)
    assert not torch.equal(first.random_matrix, second.random_matrix) and not first.random_matrix.requires_grad


def test_every_block_gets_its_own_with_the_channels():
    made = []

    class Mine(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.proj = nn.Linear(dim, dim)
            made.append(dim)

        def forward(self, x):
            return self.proj(x)

    swapped = swap_mixer(build(), [2, 3], Mine)
    assert made == [32, 64, 64] and mixers(swapped, 3)[0] is not mixers(swapped, 3)[1]


def test_weights_are_as_the_class_makes_them_so_a_trained_mixer_can_be_transplanted(images):
    model = build()
    back = swap_mixer(swap_mixer(model, 1), 1, lambda dim: copy.deepcopy(mixers(model, 1)[0]))
    assert torch.equal(back(images), model(images))
    assert not torch.equal(swap_mixer(model, 1, "SepConv")(images), model(images))


def test_nn_identity_and_partials_go_in(images):
    import functools
    model = build()
    assert torch.equal(swap_mixer(model, 3, nn.Identity)(images), swap_mixer(model, 3)(images))
    wide = swap_mixer(model, 3, functools.partial(Pooling, pool_size=5))
    assert mixers(wide, 3)[1].pool.kernel_size == 5


# --- what is kept ---

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mixer", ["Attention", "RandomMixing", "SepConv", None])
def test_dtype_and_device(dtype, mixer, images):
    swapped = swap_mixer(build().to(dtype), 3, mixer)
    assert {t.dtype for t in swapped.state_dict().values()} == {dtype}
    assert swapped(images.to(dtype)).dtype == dtype
    assert all(t.is_meta for t in swap_mixer(build().to("meta"), 3, mixer).state_dict().values())


def test_mode_is_kept_also_within():
    model = build("caformer").train()
    model.stages[2][1].eval()
    swapped = swap_mixer(model, [2, 3], "Attention")
    first, second = mixers(swapped, 3)
    assert (
        swapped.training and all(m.training for m in first.modules()) and not any(m.training for m in second.modules())
    )
    assert not any(m.training for m in swap_mixer(build(), 3, "Attention").modules())


def test_frozen_parameters_stay_frozen():
    model = build("randformer").requires_grad_(False)
    model.head.weight.requires_grad = True
    swapped = swap_mixer(model, 3, "SepConv")
    assert {k for k, p in swapped.named_parameters() if p.requires_grad and ".token_mixer." not in k} == {"head.weight"}
    assert all(p.requires_grad for m in mixers(swapped, 3) for p in m.parameters())  # those are new
    assert not any(p.requires_grad for m in mixers(swapped, 4) for p in m.parameters())


def test_the_card_no_longer_promises():
    model = build()
    model.notes = "published weights: ImageNet-1K, top-1 83.0 %"
    notes = swap_mixer(model, [1, 3]).notes
    assert "83" not in notes and "1, 3" in notes and "top-1 83.0 %" in model.notes


def test_compiled_and_wrapped_models_are_taken(images):
    model = build()
    expected = swap_mixer(model, 3)(images)
    wrapper = nn.Module()
    wrapper.module = model
    for wrapped in (torch.compile(model, backend="eager"), wrapper):
        swapped = swap_mixer(wrapped, 3)
        assert type(swapped) is type(model) and torch.equal(swapped(images), expected)


def test_it_can_be_trained_and_stored(images):
    swapped = swap_mixer(build(), 3, "Attention").train()
    swapped(images).sum().backward()
    assert all(p.grad is not None for m in mixers(swapped, 3) for p in m.parameters())
    torch.save(swapped.state_dict(), file := io.BytesIO())
    again = swap_mixer(build(), 3, "Attention")
    file.seek(0)
    again.load_state_dict(torch.load(file))
    assert torch.equal(again(images), swapped.eval()(images))


# --- what cannot be done ---

@pytest.mark.parametrize("stage", [0, 5, -1, 2.5, "3", [1, 7], None, "one"])
def test_no_such_stage(stage):
    with pytest.raises(ValueError, match=r"^There is no stage .*: this MetaFormer has stages 1 to 4\.$"):
        swap_mixer(build(), stage)


@pytest.mark.parametrize("name", ["resnet18", "caformer_s18", "deit_tiny_patch16_224"])
def test_models_of_others_are_refused(name):
    other = timm.create_model(name)
    for function in (lambda: swap_mixer(other, 3), lambda: swap_table(other, []), lambda: swap_grid(other, [])):
        with pytest.raises(
            ValueError,
            match=rf"^{type(other).__name__} is not a MetaFormer of this library: build one with create_model",
        ):
            function()
    with pytest.raises(ValueError, match="^Linear is not a MetaFormer"):
        swap_mixer(nn.Linear(2, 2), 1)


def test_wrong_mixers():
    with pytest.raises(ValueError, match="There is no token mixer 'Poling'. Did you mean 'Pooling'"):
        swap_mixer(build(), 3, "Poling")
    with pytest.raises(ValueError, match="Give the class Pooling, not one mixer of it: each block gets its own."):
        swap_mixer(build(), 3, Pooling())


# --- table and picture ---

@pytest.fixture(scope="module")
def data():
    dice = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 3, 64, 64, generator=dice), torch.randint(0, 4, (40,), generator=dice)
    return x, y, DataLoader(TensorDataset(x, y), 16)


def same_rank(a, b):
    return spearmanr(a.flatten(), b.flatten()).statistic


def test_the_table_is_what_one_would_compute_alone(data):
    x, y, loader = data
    model = build().train()
    rows = swap_table(model, loader, mixers=("Identity", None, "Pooling"), maps=5, at=2)
    assert [(r["stage"], r["was"], r["now"]) for r in rows] == [("none", "", "")] + [
        (s, "SepConv", now) for s in (1, 2, 3, 4) for now in ("Identity", "Nothing", "Pooling")]
    assert model.training
    made = {"Identity": lambda x: x, "Nothing": lambda x: None, "Pooling": Pooling()}
    guess = model.eval()(x[:5]).argmax(1)
    trained = explain(model, x[:5], guess, stage=2).maps
    kept = [i for i in range(5) if trained[i].max() > 0]
    assert len(kept) > 2
    for r in rows:
        with torch.no_grad():
            logits = by_hand(model, x,
                             lambda s, block, t: made[r["now"]](t) if s == r["stage"] else block.token_mixer(t))
        p, n, z = (logits.argmax(1) == y).double().mean().item(), 40, 1.96
        half = z * (p * (1 - p) / n + z**2 / (4 * n**2))**0.5
        low, high = (p + z**2 / (2 * n) - half) / (1 + z**2 / n), (p + z**2 / (2 * n) + half) / (1 + z**2 / n)
        assert (r["top1"], r["low"], r["high"]) == tuple(round(100 * v, 1) for v in (p, low, high))
        other = (
            model
            if r["stage"] == "none"
            else swap_mixer(model, r["stage"], None if r["now"] == "Nothing" else r["now"])
        )
        maps = explain(other, x[:5], guess, stage=2).maps
        found = [same_rank(trained[i], maps[i]) if maps[i].max() > 0 else 0. for i in kept]
        assert r["likeness"] == pytest.approx(sum(found) / len(found), abs=0.0051)
    assert rows[0]["likeness"] == 1 and len({r["likeness"] for r in rows}) > 5


def test_images_without_a_map_do_not_count(monkeypatch, data):
    x, y, loader = data

    class Shown:
        def __init__(self, maps):
            self.maps, self.images, self.targets = maps, x[:3], [0, 0, 0]

    ramp = torch.arange(64.).view(8, 8)
    trained = Shown(torch.stack([ramp, torch.zeros(8, 8), ramp]))
    monkeypatch.setattr(lesson, "explain", lambda *_: Shown(torch.stack([ramp, ramp, torch.zeros(8, 8)])))
    assert lesson.swap_row(build(), loader, trained, 3)["likeness"] == 0.5  # one alike, one left out, one lost
    monkeypatch.setattr(lesson, "explain", lambda *_: trained)
    assert lesson.swap_row(build(), loader, trained, 3)["likeness"] == 1


def test_an_unchanged_model_has_an_unchanged_row(data):
    rows = swap_table(build("identityformer"), data[2], maps=4)
    numbers = [[r[k] for k in ("top1", "low", "high", "likeness")] for r in rows]
    assert all(n == numbers[0] for n, r in zip(numbers, rows) if r["now"] != "Nothing") and numbers[0][-1] == 1


def test_the_grid_draws_every_stage(data, monkeypatch):
    x, model, asked = data[0][:2], build("caformer"), []
    guesses = model(x).argmax(1).tolist()
    monkeypatch.setattr(lesson, "cam_grid",
                        lambda *args, **kwargs: asked.append((args, kwargs)) or grid(*args, **kwargs))
    figure = swap_grid(model, x, mixer=None, at=2, class_names=list("abcd"))
    (images, models, targets, at), options = asked[0]
    assert at == 2 and targets == guesses and options == {"class_names": list("abcd")} and torch.equal(images, x)
    assert (
        list(models) == ["as trained", *(f"stage {s}: Nothing" for s in (1, 2, 3, 4))] and models["as trained"] is model
    )
    for s, swapped in enumerate(list(models.values())[1:], 1):
        assert torch.equal(swapped(x), swap_mixer(model, s, None)(x))
    share, first = model(x).softmax(-1)[0, guesses[0]], [ax.get_title() for ax in figure.axes][1]
    assert all(part in first for part in ("as trained", "abcd"[guesses[0]], f"{share:.0%}"))
    assert "stage 4: Identity" in "".join(ax.get_title() for ax in swap_grid(model, x).axes)
