"""Windows: the formula for SepConv against the Jacobian, and what is kept as it was."""
import numpy as np
import pytest
import torch
from torch import nn

from metaformer_edu.interpret import influence as lesson
from metaformer_edu.interpret.influence import (
    WINDOWS, closed_form, grouped, influence, pooling_windows, sepconv_windows, show_windows, window_weights,
    windows_of)
from metaformer_edu.models.layers import StarReLU
from metaformer_edu.models.mixers import Attention, Identity, Pooling, SepConv

pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = [(4, 4), (3, 7), (6, 2), (1, 5), (1, 1)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("h, w", GRIDS)
@pytest.mark.parametrize("options", [
    {}, dict(kernel_size=3, bias=True), dict(kernel_size=1), dict(kernel_size=9, expansion_ratio=1),
    dict(expansion_ratio=1.5, bias=True),
    dict(act1_layer=nn.GELU), dict(act1_layer=nn.Identity), dict(act2_layer=nn.Tanh),
    dict(act2_layer=StarReLU, bias=True),
    dict(act1_layer=lambda: nn.ReLU(inplace=True), act2_layer=lambda: nn.ReLU(inplace=True))], ids=range(10))
def test_sepconv_is_the_jacobian(options, h, w):
    mixer, x = SepConv(5, **options).double(), double(1, h, w, 5)
    torch.testing.assert_close(window_weights(sepconv_windows(mixer, x), h, w), influence(mixer, x), atol=1e-10, rtol=0)


def test_in_single_precision():
    mixer, x = SepConv(32), torch.randn(1, 5, 6, 32)
    torch.testing.assert_close(window_weights(sepconv_windows(mixer, x), 5, 6), influence(mixer, x), atol=1e-5,
                               rtol=1e-4)


@pytest.mark.parametrize("h, w", GRIDS)
@pytest.mark.parametrize("mixer", [Identity(), nn.Identity(), Pooling(), Pooling(pool_size=1), Pooling(pool_size=5)],
                         ids=str)
def test_the_others_are_the_closed_form(mixer, h, w):
    x = double(1, h, w, 3)
    torch.testing.assert_close(window_weights(windows_of(mixer, x), h, w), closed_form(mixer, x), atol=1e-12, rtol=0)


def test_nothing_beyond_the_border():
    for mixer in (SepConv(4), Pooling(pool_size=7)):
        found = windows_of(mixer, torch.randn(3, 5, 4)).view(3, 5, 7, 7)
        assert (
            not found[0, :, :3].any()
            and not found[:, 0, :, :3].any()
            and not found[-1, :, 4:].any()
            and not found[:, -1, :, 4:].any()
        )
        assert found[1, 2].count_nonzero() == 3 * 5


def test_a_silent_convolution_hears_nothing():
    mixer = SepConv(4, act1_layer=nn.ReLU, bias=True)
    nn.init.constant_(mixer.pwconv1.bias, -100)
    assert not sepconv_windows(mixer, torch.randn(4, 4, 4)).any()


def test_one_grid_with_or_without_batch():
    mixer, x = SepConv(4), torch.randn(1, 3, 4, 4)
    assert torch.equal(sepconv_windows(mixer, x), sepconv_windows(mixer, x[0]))
    with pytest.raises(ValueError, match="one grid"):
        sepconv_windows(mixer, torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("options",
                         [dict(kernel_size=4), dict(kernel_size=3, padding=0), dict(kernel_size=3, padding=2)], ids=str)
def test_a_window_that_changes_the_grid_is_refused(options):
    with pytest.raises(ValueError, match="changes the grid"):
        sepconv_windows(SepConv(4, **options), torch.randn(5, 5, 4))


def test_who_has_no_windows_is_told():
    class Louder(SepConv):
        def forward(self, x): return 2 * super().forward(x)
    for mixer in (Attention(32), Louder(32)):
        with pytest.raises(ValueError, match="has no windows"):
            windows_of(mixer, torch.randn(3, 3, 32))


def test_a_new_entry_is_found(monkeypatch):
    class Twice(nn.Module):
        def forward(self, x): return 2 * x
    monkeypatch.setitem(WINDOWS, Twice, lambda mixer, x: x.new_full((x.shape[1] * x.shape[2], 1), 2))
    assert torch.equal(window_weights(windows_of(Twice(), torch.randn(2, 3, 4)), 2, 3), 2 * torch.eye(6))


def test_the_mixer_is_left_as_it_was():
    mixer, x = SepConv(4, act1_layer=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5))).train(), torch.randn(1, 3, 3, 4)
    before, dice = x.clone(), torch.get_rng_state()
    for p in mixer.parameters():
        p.grad = torch.ones_like(p)
    first = sepconv_windows(mixer, x)
    assert mixer.act1[1].training and all((p.grad == 1).all() and p.requires_grad for p in mixer.parameters())
    assert torch.equal(x, before) and torch.equal(dice, torch.get_rng_state()) and not first.requires_grad


def test_inside_other_modes():
    mixer, x = SepConv(4), torch.randn(1, 3, 3, 4)
    outside = sepconv_windows(mixer, x)
    with torch.no_grad():
        assert torch.equal(sepconv_windows(mixer, x), outside)
    with torch.inference_mode():
        assert torch.equal(sepconv_windows(mixer, x.clone()), outside)
        made_there = SepConv(4)
        made_there.load_state_dict(mixer.state_dict())
    assert made_there.pwconv1.weight.is_inference()
    torch.testing.assert_close(sepconv_windows(made_there, x), outside)


def naive_groups(matrix, h, w, side):
    rows, columns = -(-h // side), -(-w // side)
    group = [[j for j in range(h * w) if (j // w // side, j % w // side) == (r, c)] for r in range(rows)
             for c in range(columns)]
    return torch.stack([torch.stack([matrix[np.ix_(a, b)].mean() for b in group]) for a in group])


@pytest.mark.parametrize("h, w, most, side",
                         [(6, 6, 9, 2), (5, 7, 12, 2), (5, 7, 11, 4), (1, 9, 3, 4), (4, 4, 16, 1), (3, 3, 1, 4)])
def test_groups_are_means_over_pairs(h, w, most, side, monkeypatch):
    monkeypatch.setattr(lesson, "MAX_GROUPS", most)
    matrix = double(h * w, h * w)
    found, got = grouped(matrix, h, w)
    assert got == side
    torch.testing.assert_close(found, naive_groups(matrix, h, w, side) if side > 1 else matrix)


def test_small_grids_are_not_grouped():
    assert grouped(torch.zeros(1024, 1024), 32, 32)[1] == 1 and grouped(torch.zeros(1056, 1056), 32, 33)[1] == 2


def test_the_figure_shows_both():
    fig = show_windows(pooling_windows(Pooling(), torch.zeros(1, 4, 6, 1)), 4, 6, torch.rand(3, 32, 48))
    # a scale each
    assert [ax.get_title() for ax in fig.axes[:2]] == ["each token hears", "the mean window"] and len(fig.axes) == 4
