"""The depthwise convolution's other kernels: what Triton's compute (tests/triton_depthwise_interpreted.py), what the
compiler makes of them for cards that are not here, and the weight's gradient with the channels first."""
import subprocess
import sys

import pytest
import torch

from metaformer_edu.models import kernels, triton_depthwise, triton_star
from metaformer_edu.models.kernels import kernel_choice, star_depthwise, use_kernels

from triton_cards import machine_code, passes_in_the_interpreter, with_triton, within

pytestmark = pytest.mark.usefixtures("pytorch_again")
# kernel → registers of a thread and shared memory of a program, at most: what Triton 3.8 needs, and a tenth more
MOST = {"_depthwise_slide": (211, 0), "_depthwise_weight": (136, 1024)}


@with_triton
def test_the_kernels_in_the_interpreter():
    passes_in_the_interpreter("triton_depthwise_interpreted.py")


@with_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_registers_spills_and_shared_memory(capability, dtype):
    rows = triton_star.kernel_resources(capability, dtype, triton_depthwise)
    within(rows, MOST)


@with_triton
def test_the_machine_reads_16_bytes_at_once_and_adds_in_an_order():
    code = {name: machine_code(triton_depthwise, name) for name in MOST}
    for text in code.values():
        loads = text.count("ld.global")
        assert loads and text.count("ld.global.v4") == loads and "atom." not in text and "red.global" not in text
    assert "st.global.v4" in code["_depthwise_slide"] and "cvt.rn.bf16" in code["_depthwise_slide"]


def test_pytorch_computes_by_itself():
    assert kernel_choice()["depthwise"] == "pytorch"
    for choice in ("pytorch", "channels_first", "triton"):
        use_kernels({"depthwise": choice})
        assert kernel_choice()["depthwise"] == choice
    assert kernels._triton("depthwise", torch.randn(3)) is None  # not on a CPU


def test_without_triton_pytorch_computes():
    code = """if True:
        import sys, torch
        sys.modules['triton'] = None # an import raises ImportError
        from metaformer_edu.models.kernels import star_depthwise, use_kernels
        args = torch.randn(1, 4, 4, 3), torch.ones(1), torch.zeros(1), torch.randn(3, 1, 3, 3), None, (1, 1)
        y = star_depthwise(*args)
        use_kernels({'depthwise': 'triton'})
        print(torch.equal(star_depthwise(*args), y))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


# --- the weight's gradient with the channels first ---

def arguments(window=3, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 5, 6, 8), torch.tensor([0.9]), torch.tensor([-0.4]), torch.randn(8, 1, window, window)]
    tensors.append(torch.randn(8) if bias else None)
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def gradients(args, padding):
    y = star_depthwise(*args, padding)
    wanted = [t for t in args if t is not None and t.requires_grad]
    return y, *torch.autograd.grad(y.sin().sum(), wanted)


@pytest.fixture
def calls(monkeypatch):
    "Of each call of PyTorch's gradient: which it was asked for, and whether the channels stood first."
    found, original = [], kernels._convolution_grads

    def noted(g, y, weight, padding, needs):
        found.append((tuple(needs), g.is_contiguous() and y.is_contiguous()))
        return original(g, y, weight, padding, needs)

    monkeypatch.setattr(kernels, "_convolution_grads", noted)
    monkeypatch.setattr(kernels, "_ONEDNN", False)  # with it, a CPU has a way of its own
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window, padding", [(3, (1, 1)), (7, (3, 3)), (5, (0, 1)), (4, (2, 2))])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_channels_first_is_the_same_gradient(calls, window, padding, bias, dtype, error):
    args = arguments(window, bias, dtype)
    plain = gradients(args, padding)
    assert calls == [((True, True, bias), False)]
    use_kernels({"depthwise": "channels_first"})
    for a, b in zip(gradients(args, padding), plain):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert (a - b).norm() <= error * b.norm()
    assert calls[1:] == [((True, False, bias), False), ((False, True, False), True)]


@pytest.mark.parametrize("frozen, asked", [([3], [((True, False, True), False)]),
                                           ([0, 1, 2, 4], [((False, True, False), True)]),
                                           ([0, 1, 2, 3], [((False, False, True), False)])])
def test_channels_first_computes_what_is_needed(calls, frozen, asked):
    use_kernels({"depthwise": "channels_first"})
    args = [t.requires_grad_(i not in frozen) for i, t in enumerate(arguments())]
    found = gradients(args, (1, 1))
    assert len(found) == 6 - len(frozen) and calls == asked


def test_channels_first_of_an_empty_batch():
    use_kernels({"depthwise": "channels_first"})
    args = arguments()
    args[0] = torch.randn(0, 5, 6, 8, requires_grad=True)
    y, dx, *others = gradients(args, (1, 1))
    assert y.shape == dx.shape == args[0].shape and not any(t.any() for t in others)


def test_channels_first_leaves_second_derivatives_as_they_are(calls):
    use_kernels({"depthwise": "channels_first"})
    args = arguments(dtype=torch.float64)
    args[0] = torch.randn(1, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    f = lambda *args: star_depthwise(*args, (1, 1))
    assert torch.autograd.gradcheck(f, args, fast_mode=True)
    calls.clear()
    assert torch.autograd.gradgradcheck(f, args, fast_mode=True) and not any(first for _, first in calls)
