"""Roofline: what is counted against formulas by hand, the clock, and the drawing. Nothing is said about time itself."""
import itertools

import pytest
import torch
from torch import nn

from metaformer_edu.core.basics import count_macs
from metaformer_edu.models.block import MetaFormerBlock
from metaformer_edu.models.layers import LayerNormGeneral, SquaredReLU
from metaformer_edu.models.mixers import Attention, Identity, MIXERS, Pooling, RandomMixing, SepConv
from metaformer_edu.speed import roofline as lesson
from metaformer_edu.speed.roofline import (
    BlockPart, Ceilings, _bytes_spanned, _record_calls, ceilings, clock, draw_roofline, profile_block,
    roofline_table, spread)

pytestmark = pytest.mark.usefixtures("one_thread")
B, H, W, C = 2, 4, 6, 32
N, VALUES = B * H * W, B * H * W * C  # tokens, numbers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def block(mixer, **options):
    mixers = {"RandomMixing": lambda dim: RandomMixing(dim, num_tokens=H * W)}
    return MetaFormerBlock(C, mixers.get(getattr(mixer, "__name__", ""), mixer), **options)


def counted(mixer, dtype=torch.float32, **options):
    "name -> (FLOPs, numbers moved)."
    rows = profile_block(block(mixer, **options).to(dtype), torch.randn(B, H, W, C, dtype=dtype), rounds=1)
    assert all(p.seconds > 0 for p in rows)
    return {p.name: (p.flops, p.bytes / dtype.itemsize) for p in rows}


def linear(a, b):
    return 2 * N * a * b, N * (a + b) + a * b


NORM, SUM = (6 * VALUES, 2 * VALUES + C), (VALUES, 3 * VALUES)
MLP = {"norm2": NORM, "mlp.fc1": linear(C, 4 * C), "mlp.act": (16 * VALUES, 8 * VALUES + 2),
       "mlp.fc2": linear(4 * C, C), "residual2": SUM}
MIX = {
    Identity: {},
    RandomMixing: {"token_mixer": (2 * VALUES * H * W, 2 * VALUES + (H * W)**2)},
    Pooling: {"token_mixer.pool": (9 * VALUES, 2 * VALUES), "token_mixer.sub": SUM},
    SepConv: {"token_mixer.pwconv1": linear(C, 2 * C), "token_mixer.act1": (8 * VALUES, 4 * VALUES + 2),
              "token_mixer.dwconv": (2 * 49 * 2 * VALUES, 4 * VALUES + 49 * 2 * C),
              "token_mixer.pwconv2": linear(2 * C, C)},
    Attention: {"token_mixer.qkv": linear(C, 3 * C), "token_mixer.attention": (4 * VALUES * H * W, 4 * VALUES),
                "token_mixer.proj": linear(C, C)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mixer", MIX, ids=lambda m: m.__name__)
def test_counts_by_hand(mixer, dtype):
    assert set(MIX) == set(MIXERS.values())
    expected = {"norm1": NORM, **MIX[mixer], "residual1": SUM, **MLP}
    found = counted(mixer, dtype)
    assert found == expected and list(found) == list(expected)  # in the order in which they run


@pytest.mark.parametrize("mixer", MIX, ids=lambda m: m.__name__)
def test_products_are_the_multiply_accumulates_of_the_block(mixer):
    b = block(mixer)
    rows = profile_block(b, torch.randn(B, H, W, C), rounds=1)
    assert sum(p.flops for p in rows if p.products) == 2 * count_macs(b, (B, H, W, C))
    assert {p.name.rpartition(".")[2] for p in rows if not p.products} <= {
        "norm1",
        "norm2",
        "act",
        "act1",
        "pool",
        "sub",
        "residual1",
        "residual2",
    }


def test_scales_are_parts_and_dropped_paths_are_not():
    found = counted(Identity, res_scale_init_value=1., layer_scale_init_value=0.1, drop_path=0.5)
    scale = VALUES, 2 * VALUES + C
    assert [n for n in found if "scale" in n] == ["res_scale1", "layer_scale1", "res_scale2", "layer_scale2"]
    assert all(found[n] == scale for n in found if "scale" in n)


def test_biases_are_moved():
    def biased(dim):
        return SepConv(dim, bias=True, kernel_size=3)
    found = counted(biased)
    assert found["token_mixer.dwconv"] == (2 * 9 * 2 * VALUES, 4 * VALUES + 9 * 2 * C + 2 * C)


def test_other_layers():
    found = counted(lambda dim: SepConv(dim, act2_layer=nn.GELU, act1_layer=SquaredReLU), norm_layer=LayerNormGeneral)
    assert found["norm1"] == NORM and found["token_mixer.act2"] == (2 * VALUES, 4 * VALUES)
    assert found["token_mixer.act1"] == (4 * VALUES, 4 * VALUES)


def test_in_place_reads_and_writes():
    found = counted(lambda dim: SepConv(dim, act1_layer=lambda: nn.ReLU(inplace=True)))
    assert found["token_mixer.act1"] == (2 * VALUES, 4 * VALUES)


class Cross(nn.Module):
    "Every token hears its row and its column; of two sums outside any innermost module."
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(x.mean(1, keepdim=True) + x.mean(2, keepdim=True))


def test_a_mixer_of_ones_own():
    found = counted(Cross)
    assert list(found)[1:5] == ["token_mixer.mean1", "token_mixer.mean2", "token_mixer.add", "token_mixer.proj"]
    assert found["token_mixer.mean1"] == (B * W * C, VALUES + B * W * C)
    assert found["token_mixer.add"] == (VALUES, VALUES + B * (H + W) * C)


def test_a_module_alone():
    rows = profile_block(nn.Linear(C, C, bias=False), torch.randn(B, H, W, C), rounds=1)
    assert [(p.name, p.flops, p.bytes) for p in rows] == [("Linear", 2 * N * C * C, 4 * (2 * VALUES + C * C))]
    assert profile_block(Identity(), torch.randn(B, H, W, C)) == []


def test_the_block_is_left_as_it_was():
    b = block(SepConv, drop_path=0.5)
    b.mlp.eval()
    b.norm1.weight.grad = torch.ones(C)
    modes, x = [m.training for m in b.modules()], torch.randn(B, H, W, C, requires_grad=True)
    state = {k: v.clone() for k, v in b.state_dict().items()}
    profile_block(b, x, rounds=1)
    assert (
        [m.training for m in b.modules()] == modes
        and x.grad is None
        and torch.equal(b.norm1.weight.grad, torch.ones(C))
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in b.modules())
    assert all(torch.equal(v, state[k]) for k, v in b.state_dict().items())
    with pytest.raises(ValueError):
        profile_block(b, x[..., :5])
    assert [m.training for m in b.modules()] == modes and not any(
        m._forward_hooks or m._forward_pre_hooks for m in b.modules()
    )


def test_steps_can_be_done_again():
    b, x = block(Attention).eval(), torch.randn(B, H, W, C)
    with torch.no_grad():
        for step in _record_calls(b, x):
            again = step.run()
            torch.testing.assert_close(again[0] if isinstance(again, tuple) else again, step.written[0])
        torch.testing.assert_close(step.written[0], b(x))


@pytest.mark.parametrize("module, x, says", [
    (3, torch.randn(1, 4, 4, C), "such as MetaFormerBlock"),
    (Identity, torch.randn(1, 4, 4, C), "such as MetaFormerBlock"),
    (nn.Linear(C, 7), torch.randn(1, 4, 4, C), "(1, 4, 4, 7)"), (nn.LSTM(C, C), torch.randn(1, 4, 4, C), "LSTM"),
    (block(SepConv), torch.randn(4, 4, C), "(4, 4, 32)"), (block(SepConv), [1.], "list"),
    (block(SepConv), torch.empty(0, 4, 4, C), "(0, 4, 4, 32)"),
    (block(SepConv), torch.randn(1, 4, 4, C + 1), "(1, 4, 4, 33)"),
    (block(SepConv), torch.ones(1, 4, 4, C, dtype=torch.long), "int64"),
    (block(SepConv), torch.ones(1, 4, 4, C, dtype=torch.float64), "float64"),
    (block(RandomMixing), torch.randn(1, 5, 5, C), "24 tokens")])
def test_wrong_input_is_one_sentence(module, x, says):
    with pytest.raises(ValueError) as error:
        profile_block(module, x)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert error.value.__context__ is None or error.value.__suppress_context__


def test_memory_is_counted_once():
    a, b = torch.zeros(10, 10), torch.zeros(3)
    assert _bytes_spanned([]) == 0 and _bytes_spanned([a, b]) == 412
    assert _bytes_spanned([a, a.T, a[:5], a[:1].expand(50, 10)]) == _bytes_spanned(list(a)) == 400
    assert _bytes_spanned([a[2:4], a[2:4]]) == 80


def test_clock_goes_round():
    order = []
    times = clock(lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c"), rounds=2)
    assert (
        "".join(order) == "abc" * 3 and [len(t) for t in times] == [2, 2, 2] and all(s >= 0 for t in times for s in t)
    )
    assert clock() == [] and clock(lambda: None, rounds=1, device=torch.device("cpu"))[0][0] >= 0


def test_clock_waits_for_the_device(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: said.append("wait"))
    ticks = itertools.count()  # a second from look to look: a call is long enough
    monkeypatch.setattr(lesson.time, "perf_counter", lambda: said.append("look") or next(ticks))
    clock(lambda: said.append("run"), rounds=1, device="cuda:0")
    assert said[-5:] == ["wait", "look", "run", "wait", "look"]


def test_clock_repeats_what_is_short_on_a_gpu(monkeypatch):
    now, said = 0., []

    def job(name, seconds):
        def run():
            nonlocal now
            now += seconds
            said.append(name)
        return run

    def wait(*_):
        nonlocal now
        now += 20e-6
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(lesson.time, "perf_counter", lambda: now)
    short, long = clock(job("s", 4e-6), job("l", 5e-3), rounds=3, device="cuda")
    # to warm up, to count, and three rounds of as many as fill a millisecond by what one call with its wait took
    assert said.count("s") == 2 + 3 * 42 and said.count("l") == 2 + 3
    assert short == pytest.approx([4e-6 + 20e-6 / 42] * 3) and long == pytest.approx([5.02e-3] * 3)  # not 24 µs
    said.clear()
    clock(job("s", 5e-6), rounds=3, device="cpu")
    assert len(said) == 4


@pytest.mark.parametrize("products, tf32", [("highest", False), ("high", True), ("medium", True)])
def test_products_and_convolutions_have_one_precision(monkeypatch, products, tf32):
    seen, before = [], (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision(products)
    try:
        with lesson._one_precision("cuda"):
            seen.append(torch.backends.cudnn.allow_tf32)
        with lesson._one_precision("cpu"):
            seen.append(torch.backends.cudnn.allow_tf32)
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert seen == [tf32, before[1]] and torch.backends.cudnn.allow_tf32 == before[1]


def test_ceilings_and_parts_are_measured_in_one_precision(monkeypatch):
    asked = []
    real = lesson._one_precision
    monkeypatch.setattr(lesson, "_one_precision", lambda where: asked.append(torch.device(where).type) or real(where))
    ceilings(rounds=1)
    profile_block(block(SepConv), torch.randn(B, H, W, C), rounds=1)
    assert asked == ["cpu", "cpu"]


def test_clock_says_what_is_wrong():
    with pytest.raises(ValueError, match="1 or more, not 0"):
        clock(lambda: None, rounds=0)


def test_spread():
    assert spread([3., 1., 2.]) == (2., 1.5, 2.5) and spread([7]) == (7., 7., 7.)


def test_ceilings(monkeypatch):
    asked = []
    def quick(*functions, rounds, device):
        asked.append((len(functions), rounds, device))
        return [[2., 1.]] * len(functions)
    monkeypatch.setattr(lesson, "clock", quick)
    top = ceilings(dtype=torch.bfloat16)
    assert top.flops == 2 * 1024**3 and top.bandwidth == 2**24 and top.ridge == top.flops / top.bandwidth
    assert (
        (top.device, top.dtype) == ("cpu", torch.bfloat16)
        and asked[0][2] == "cpu"
        and [n for n, *_ in asked] == [2, 2, 16]
    )


def test_ceilings_of_this_machine():
    top = ceilings(rounds=1)
    assert isinstance(top.flops, float) and isinstance(top.bandwidth, float) and top.flops > 1e6 and top.bandwidth > 1e6


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "float32", None])
def test_ceilings_are_of_floating_point(dtype):
    with pytest.raises(ValueError, match="floating-point type such as torch.bfloat16, not"):
        ceilings(dtype=dtype)


TOP = Ceilings(1e11, 2e10, "cpu", torch.float32)


def test_the_roof():
    memory, arithmetic = BlockPart("a", 100, 200, False, 1.), BlockPart("b", 1000, 100, True, 1.)
    assert TOP.ridge == 5 and [TOP.limit(p) for p in (memory, arithmetic)] == ["memory", "arithmetic"]
    assert (
        TOP.least(memory) == pytest.approx(1e-8)
        and TOP.least(arithmetic) == pytest.approx(1e-8)
        and arithmetic.intensity == 10
    )


def test_table():
    row, = roofline_table([BlockPart("mlp.act", 4e6, 8_000_000, False, 0.001)], TOP)
    assert row == {"part": "mlp.act", "FLOP": "4.0M", "bytes": "8.0M", "FLOP/byte": "0.5", "ms": "1.00",
                   "least": "0.40", "limit": "memory"}


def boxes(ax):
    return {t.get_text(): t.get_window_extent() for t in ax.texts if t.get_text()}


def no_overlap(fig):
    fig.draw_without_rendering()
    found = boxes(fig.axes[0])
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        assert not one.overlaps(other), f"{a} lies on {b}"
    assert all(fig.bbox.contains(*corner) for box in found.values() for corner in box.corners())
    return found


@pytest.mark.parametrize("scale", [None, 1.])
@pytest.mark.parametrize("mixer", MIX, ids=lambda m: m.__name__)
def test_every_part_has_its_name_and_none_lies_on_another(mixer, scale):
    rows = profile_block(block(mixer, res_scale_init_value=scale), torch.randn(B, H, W, C), rounds=1)
    fig = draw_roofline(rows, TOP, "a block")
    found, names = no_overlap(fig), [p.name.rpartition(".")[2] for p in rows]
    assert set(names) < set(found) and len(fig.axes[0].collections) == len(rows)
    assert [t.get_text() for t in fig.axes[1].get_yticklabels()] == names
    bars = fig.axes[1].patches
    assert [b.get_width() for b in bars[::2]] == pytest.approx([1e3 * p.seconds for p in rows])
    assert [b.get_width() for b in bars[1::2]] == pytest.approx([1e3 * TOP.least(p) for p in rows])


def test_parts_that_lie_on_each_other():
    rows = [BlockPart(f"part{i}", 1e6, 10**6, False, 1e-4) for i in range(14)]
    assert len(no_overlap(draw_roofline(rows, TOP))) == 14 + 3


def test_names_that_would_be_the_same_stay_long():
    rows = [BlockPart("a.fc", 1e6, 10**6, True, 1e-4), BlockPart("b.fc", 1e7, 10**6, True, 1e-3)]
    assert {"a.fc", "b.fc"} < set(no_overlap(draw_roofline(rows, TOP)))


def test_areas_are_shares_of_the_time():
    rows = [BlockPart("a", 1e6, 10**6, False, 1e-4), BlockPart("b", 1e8, 10**6, True, 3e-4)]
    small, large = (c.get_sizes()[0] - 30 for c in draw_roofline(rows, TOP).axes[0].collections)
    assert large == pytest.approx(3 * small)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no part to draw"):
        draw_roofline([], TOP)
