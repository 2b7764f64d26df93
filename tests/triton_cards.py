"""What the tests of all Triton kernels share: where Triton is, its interpreter, and figures of the machine code."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaformer_edu.models import triton_star

with_triton = pytest.mark.skipif(triton_star.triton is None, reason="Triton comes with PyTorch's builds for NVIDIA")


def passes_in_the_interpreter(file):
    "Run a file of tests in Triton's interpreter, which has to be chosen before Triton is imported."
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider",
                           Path(__file__).parent / file], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def within(rows, most):
    "As from `kernel_resources`; most: kernel → registers of a thread and shared memory of a program. Nothing spills."
    assert {r["kernel"] for r in rows} == {*most}
    for row in rows:
        registers, shared = most[row["kernel"]]
        assert 0 < row["registers"] <= registers and row["shared"] <= shared and row["spilled"] == 0, row


def machine_code(module, name, capability=90, dtype="bf16"):
    "A kernel of a module with `_SIGNATURES`, as PTX."
    given = triton_star._in_precision(module._SIGNATURES[name], dtype)
    return triton_star._compiled(getattr(module, name), given, capability).asm["ptx"]
