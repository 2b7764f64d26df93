"""The Triton kernels of residual and norm: what they compute (tests/triton_norm_interpreted.py), which precisions a GPU
would give, and what the compiler makes of them for cards that are not here."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from metaformer_edu.models import triton_norm, triton_star
from metaformer_edu.models.block import MetaFormerBlock
from metaformer_edu.models.kernels import use_kernels
from metaformer_edu.models.triton_norm import norm_formula, residual_norm

from triton_cards import passes_in_the_interpreter, with_triton, within

pytestmark = pytest.mark.usefixtures("pytorch_again")
# channels, precision of x and y, is there ResScale?: the four stages of an S18 under autocast, float32, and the widest
STAGES = [(64, "fp32", "bf16", False), (128, "bf16", "bf16", False), (320, "fp32", "bf16", True),
          (512, "fp32", "bf16", True), (64, "fp32", "fp32", False), (1024, "fp32", "fp16", True)]
# kernel → registers of a thread and shared memory of a program, at most: what Triton 3.8 needs, and a tenth more
MOST = {"_norm_forward": (35, 4096), "_norm_backward": (105, 4096)}


@with_triton
def test_the_kernels_in_the_interpreter():
    passes_in_the_interpreter("triton_norm_interpreted.py")


@with_triton
@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_registers_spills_and_shared_memory(capability, stage):
    rows = triton_norm._norm_resources(capability, *stage)
    within(rows, MOST)


@with_triton
@pytest.mark.parametrize("stage", STAGES[:4], ids=str)
def test_the_machine_reads_16_bytes_at_once_and_adds_in_an_order(stage):
    for name, given in triton_norm._signatures(*stage).items():
        text = triton_star._compiled(getattr(triton_norm, name), given, 90).asm["ptx"]
        assert "ld.global.v4" in text and "st.global.v4" in text
        assert "atom." not in text and "red.global" not in text


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x, y, scaled", [(32, 16, False), (16, 16, False), (16, 16, True), (32, 16, True),
                                          (32, 32, True)])
def test_precisions_are_those_of_the_twin_on_a_gpu(x, y, scaled, dtype, autocast):
    "Tensors without numbers, which say that they are on a GPU."
    types = {32: torch.float32, 16: dtype}
    device = torch.device("cuda")
    with FakeTensorMode():
        x, y = (torch.empty(2, 8, dtype=types[bits], device=device) for bits in (x, y))
        w = torch.empty(8, device=device, dtype=torch.float32 if autocast else torch.promote_types(x.dtype, y.dtype))
        torch.set_autocast_enabled("cuda", autocast)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            z, n = norm_formula(x, y, w if scaled else None, None, w, 1e-6)
            found = triton_norm._dtypes(device, x, y, *([w] if scaled else []))
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)
    assert found == (z.dtype, n.dtype)


def test_pytorch_computes_until_the_kernel_is_chosen_and_where_it_cannot():
    x, y, w = torch.randn(2, 3, 3, 8), torch.randn(2, 3, 3, 8), torch.rand(8)
    block = MetaFormerBlock(8, res_scale_init_value=0.9)
    plain = block(x)
    use_kernels({"norm": "triton"})
    assert torch.equal(block(x), plain)  # not on a CPU
    z, n = residual_norm(x, y, w, 1e-6, w, w)
    assert torch.equal(z, x * w + y * w) and torch.equal(n, F.layer_norm(z, (8,), w, None, 1e-6))


def test_without_triton_pytorch_computes():
    code = """if True:
        import sys, torch
        sys.modules['triton'] = None # an import raises ImportError
        from metaformer_edu.models.block import MetaFormerBlock
        from metaformer_edu.models.kernels import use_kernels
        assert 'metaformer_edu.models.triton_norm' not in sys.modules
        block, x = MetaFormerBlock(8), torch.randn(2, 3, 3, 8)
        y = block(x)
        use_kernels({'norm': 'triton'})
        assert torch.equal(block(x), y)
        print(sys.modules['metaformer_edu.models.triton_norm'].takes(x))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
