"""check_mixer: one broken mixer for each sentence, and none of the sentences for what is right."""
import copy
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaformer_edu.interpret.swap import Nothing
from metaformer_edu.models.check_mixer import check_mixer
from metaformer_edu.models.metaformer import MetaFormer
from metaformer_edu.models.mixers import Attention, MIXERS, Pooling, RandomMixing, SepConv

pytestmark = pytest.mark.usefixtures("one_thread")


def mixer(forward, make=lambda self, dim: None):
    "A mixer class of these two functions."
    class Mixer(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dim = dim
            make(self, dim)

        def forward(self, x):
            return forward(self, x)
    return Mixer


def set_to(**made):
    "For `mixer`: set attributes, each a function of the channels."
    def make(self, dim):
        for name, value in made.items():
            setattr(self, name, value(dim))
    return make


def wrong(mixer, **options):
    return [row["wrong"] for row in check_mixer(mixer, **options)]


linear = set_to(proj=lambda dim: nn.Linear(dim, dim))


# --- what is right passes ---

class Square(nn.Module):
    "Asks for the number of tokens and needs a square."
    def __init__(self, dim, num_tokens=196):
        super().__init__()
        self.side = math.isqrt(num_tokens)
        assert self.side**2 == num_tokens
        self.place = nn.Parameter(torch.zeros(self.side, self.side, dim))

    def forward(self, x):
        return x + self.place


class Published(nn.Module):
    "Reads the channels from **kwargs, as the published mixers do."
    def __init__(self, pool_size=3, **kwargs):
        super().__init__()
        self.proj = nn.Linear(kwargs["dim"], kwargs["dim"])

    def forward(self, x):
        return self.proj(x)


class Filter(nn.Module):
    "A complex weight, a buffer that is fixed, and the real part of the answer."
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dtype=torch.cfloat))
        self.register_buffer("loudness", torch.tensor(0.5))

    def forward(self, x):
        return self.loudness * torch.fft.ifft2(torch.fft.fft2(x, dim=(1, 2)) * self.weight, dim=(1, 2)).real


def in_place(self, x):
    x *= 2
    return x


GOOD = {
    **MIXERS, "name": "SepConv", "nn.Identity": nn.Identity, "square": Square, "published": Published,
    "complex": Filter,
    "partial": partial(Pooling, pool_size=5), "function": lambda dim: SepConv(dim, kernel_size=3),
    "partial that settles the tokens": partial(RandomMixing, num_tokens=60),
    "prime": partial(RandomMixing, num_tokens=13),
    "function that asks for tokens": lambda dim, num_tokens: RandomMixing(dim, num_tokens),
    "dropout": partial(Attention, attn_drop=0.5, proj_drop=0.5),
    "starts at zero":
        mixer(lambda self, x: self.scale * self.proj(x),
              set_to(proj=lambda dim: nn.Linear(dim, dim), scale=lambda dim: nn.Parameter(torch.zeros(dim)))),
    "stays positive":
        mixer(lambda self, x: x / self.spread.sqrt(),
              set_to(spread=lambda dim: nn.Parameter(torch.full((dim,), 0.01)))),
    "batch norm":
        mixer(lambda self, x: self.norm(x.flatten(0, 2)).view_as(x), set_to(norm=lambda dim: nn.BatchNorm1d(dim))),
    "in place": mixer(in_place),
    "names a part twice":
        mixer(lambda self, x: self.parts[0](x),
              lambda self, dim: linear(self, dim) or set_to(parts=lambda dim: [self.proj])(self, dim)),
    "keeps what it saw": mixer(lambda self, x: setattr(self, "seen", x.detach()) or x),
}


@pytest.mark.parametrize("made", GOOD.values(), ids=GOOD)
def test_good_mixers_pass(made):
    rows = check_mixer(made)
    assert [row["wrong"] for row in rows] == ["", "", ""] and [row[""] for row in rows] == ["✓"] * 3
    assert all(row["question"][-1] == "." for row in rows)


def test_what_passes_runs_in_a_model():
    for made in (Square, Published, Filter):
        model = MetaFormer(token_mixers=made, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3, img_size=64)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)


# --- what is wrong is named ---

def lazy(self, x):
    if not hasattr(self, "late"):
        self.late = nn.Parameter(torch.ones(x.shape[-1], dtype=x.dtype, device=x.device))
    return x * self.late


def counted(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return x / self.calls


def spoilt(self, x):
    y = x.exp()
    y += 1
    return y


def hidden(self, dim):
    self.register_buffer("table", torch.rand(dim), persistent=False)


class Inner(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.table = torch.ones(dim)

    def forward(self, x):
        return x @ torch.diag(self.table)


FIRST = {
    "channels first":
        (mixer(lambda self, x: x.permute(0, 3, 1, 2)),
         r"\(3, 8, 8, 32\) .* come back as \(3, 32, 8, 8\): .* the channels last"),
    "turned": (mixer(lambda self, x: x.transpose(1, 2)),
               r"\(3, 5, 9, 32\) .* come back as \(3, 9, 5, 32\): .* as many rows and columns"),
    "no padding": (mixer(lambda self, x: x[:, 1:]), r"come back as \(3, 7, 8, 32\)"),
    "tuple": (mixer(lambda self, x: (x, None)), "come back as a tuple: return one tensor."),
    "nothing": (mixer(lambda self, x: None), "come back as a NoneType: return one tensor."),
    "complex": (mixer(lambda self, x: torch.fft.fft2(x, dim=(1, 2))),
                "come back as torch.complex64: return the real part, y.real."),
    "type": (mixer(lambda self, x: x.float()),
             "float64 on cpu come back as torch.float32 on cpu: make tensors with dtype=x.dtype"),
    "type of a constant":
        (mixer(lambda self, x: x @ torch.eye(x.shape[-1], device=x.device)),
         "float64 on cpu raise RuntimeError: .*dtype"),
    "device": (mixer(lambda self, x: x + torch.ones(x.shape[-1], dtype=x.dtype)),
               "on meta raise RuntimeError: .*device cpu.* make them with device=x.device"),
    "item": (mixer(lambda self, x: x / (1 + x.abs().max().item())), r"on meta raise .*do without .item\(\) and NumPy"),
    "plain tensor":
        (mixer(lambda self, x: x * self.table, set_to(table=lambda dim: torch.ones(dim))),
         r"It keeps table where .*register_buffer"),
    "plain tensor within": (mixer(lambda self, x: self.inner(x), set_to(inner=Inner)), "It keeps inner.table where"),
    "list of layers":
        (mixer(lambda self, x: self.layers[0](x), set_to(layers=lambda dim: [nn.Linear(dim, dim)])),
         "It keeps layers where .* nn.ModuleList"),
    "one width": (mixer(lambda self, x: self.proj(x), set_to(proj=lambda dim: nn.Linear(32, 32))),
                  r"\(3, 8, 8, 64\) .* raise RuntimeError: .* its own number of channels"),
    "one grid": (mixer(lambda self, x: x + self.place, set_to(place=lambda dim: nn.Parameter(torch.zeros(8, 8, dim)))),
                 r"\(3, 5, 9, 32\) .* let it ask for `num_tokens`"),
    "settled out of sight":
        (lambda dim: RandomMixing(dim, num_tokens=64),
         r"\(3, 5, 9, 32\) .* raise ValueError: RandomMixing has a fixed matrix for 64 tokens .* `num_tokens`"),
    "NaN of a blank picture":
        (mixer(lambda self, x: x / x.norm(dim=-1, keepdim=True)), "come back with NaN or infinity: find the division"),
    "option without a default":
        (lambda dim, kernel: Pooling(dim, kernel),
         "Called with the channels, 32, it raises TypeError: .*kernel.* give all else a default"),
    "silent error":
        (mixer(lambda self, x: 1 / 0 if False else next(iter(()))),
         "raise StopIteration: no reason given. A mixer takes"),
    "a function": (lambda dim: torch.relu, "it gives <built-in method relu .*: give a class of nn.Module"),
    "the same twice":
        (lambda dim, kept=Pooling(): kept, "Called twice, it gives the same mixer twice: make a new one in each call."),
}
SECOND = {
    "mean over images":
        (mixer(lambda self, x: x.mean((0, 1, 2), keepdim=True).expand_as(x)),
         "in a batch than alone: .* mix over axes 1 and 2"),
    "transform over images": (mixer(lambda self, x: torch.fft.fftn(x, norm="ortho").real), "in a batch than alone"),
    "neighbouring image": (mixer(lambda self, x: x.roll(1, 0)), "in a batch than alone"),
    "batch norm that never rests":
        (mixer(lambda self, x: F.batch_norm(x.permute(0, 3, 1, 2), None, None, training=True).permute(0, 2, 3, 1)),
         "in a batch than alone"),
    "behind a zero":
        (mixer(lambda self, x: self.scale * x.mean(0, keepdim=True).expand_as(x),
               set_to(scale=lambda dim: nn.Parameter(torch.zeros(1)))), "in a batch than alone"),
    "a batch of one": (mixer(lambda self, x: x.squeeze()), r"\(1, 8, 8, 32\) .* come back as \(8, 8, 32\)"),
    "dropout always": (mixer(lambda self, x: F.dropout(x)), r"another answer the second time: .*nn.Dropout"),
    "dice always": (mixer(lambda self, x: x[:, torch.randperm(x.shape[1])]), "another answer the second time"),
    "memory": (mixer(counted), "another answer the second time: .* keep nothing from call to call"),
}
THIRD = {
    "removed": (Nothing, "No gradient reaches the tokens: the answer does not depend on it"),
    "detached": (mixer(lambda self, x: self.proj(x.detach()), linear), "No gradient reaches the tokens"),
    "detached weight":
        (mixer(lambda self, x: x @ self.proj.weight.detach().T, linear), "No gradient reaches proj.weight: .*detach"),
    "never used": (mixer(lambda self, x: x, linear), "No gradient reaches proj.weight: .* use it, or take it out"),
    "times zero":
        (mixer(lambda self, x: x + 0 * self.proj(x), linear), "No gradient reaches proj.weight: .* a product with 0"),
    "half is right": (mixer(lambda self, x: x @ self.proj.weight, linear), "No gradient reaches proj.bias"),
    "root of 0": (mixer(lambda self, x: x.square().sqrt()),
                  "The gradient of the tokens is NaN or infinite: find the .* root .* of 0"),
    "size of a blank token":
        (mixer(lambda self, x: x / (x.square().mean(-1, keepdim=True).sqrt() + 1)),
         "The gradient of the tokens is NaN or infinite"),
    "in place": (mixer(spoilt), r"The backward pass raises RuntimeError: .*inplace operation.* Do not change in place"),
    "dice not stored": (mixer(lambda self, x: x * self.table, hidden), r"gives other answers: .* persistent buffer"),
    "made in forward":
        (mixer(lazy),
         r"does not take the state dict and raises RuntimeError: .* Make all parameters and buffers in __init__."),
}


@pytest.mark.parametrize("made, sentence", FIRST.values(), ids=FIRST)
def test_first_question(made, sentence):
    rows = check_mixer(made)
    assert [row[""] for row in rows] == ["✗", "○", "○"]
    assert {row["wrong"] for row in rows[1:]} == {"Not asked before the first is right."}
    says(rows[0]["wrong"], sentence)


@pytest.mark.parametrize("made, sentence", SECOND.values(), ids=SECOND)
def test_second_question(made, sentence):
    first, second, _ = wrong(made)
    assert not first
    says(second, sentence)


@pytest.mark.parametrize("made, sentence", THIRD.values(), ids=THIRD)
def test_third_question(made, sentence):
    first, second, third = wrong(made)
    assert not first and not second
    says(third, sentence)


def says(found, sentence):
    assert re.search(sentence, found), found
    assert found[-1] == "." and "\n" not in found and found[0].isupper()


def test_questions_two_and_three_are_independent():
    _, second, third = wrong(mixer(lambda self, x: x.detach().mean(0, keepdim=True).expand_as(x)))
    assert "in a batch" in second and "No gradient" in third


# --- what cannot be asked ---

def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="Give the class Pooling, not one mixer of it"):
        check_mixer(Pooling())
    with pytest.raises(ValueError, match="There is no token mixer 'Poling'. Did you mean 'Pooling'"):
        check_mixer("Poling")


# --- nothing is left behind ---

def test_dice_and_modes_stay_and_a_shared_part_is_not_touched():
    shared = nn.Linear(32, 32)
    before = copy.deepcopy(shared.state_dict())

    def make(dim):
        made = mixer(lambda self, x: self.proj(x))(dim)
        made.proj = shared
        return made

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.no_grad():
        assert wrong(make, dims=(32,)) == ["", "", ""]
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(v, before[k]) for k, v in shared.state_dict().items()) and shared.weight.grad is None
    assert shared.weight.dtype == torch.float32 and shared.weight.device.type == "cpu" and shared.training


@pytest.mark.parametrize("name", MIXERS)
def test_the_answer_is_the_same_in_inference_mode(name):
    with torch.inference_mode():
        assert wrong(name) == ["", "", ""]


def test_channels_and_grids_can_be_given():
    trained = Attention(48)
    again = lambda dim: copy.deepcopy(trained)
    assert "(3, 8, 8, 32)" in wrong(again)[0]
    assert wrong(again, dims=(48,), grids=[(4, 6)]) == ["", "", ""]
    assert wrong(lambda dim: RandomMixing(dim, 24), grids=[(4, 6)]) == ["", "", ""]
