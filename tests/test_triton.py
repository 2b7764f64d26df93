"""The Triton kernels: what they compute (tests/triton_interpreted.py), what the compiler makes of them for cards that
are not here, and who chooses."""
import subprocess
import sys

import pytest
import torch

from metaformer_edu.models import kernels, triton_star
from metaformer_edu.models.kernels import kernel_choice, star_relu, use_kernels
from metaformer_edu.speed import tune
from metaformer_edu.training.processes import launch

from triton_cards import machine_code, passes_in_the_interpreter, with_triton, within

pytestmark = pytest.mark.usefixtures("pytorch_again")
# kernel → registers of a thread and shared memory of a program, at most: what Triton 3.8 needs, and a tenth more
MOST = {"_star_forward": (26, 0), "_star_backward": (62, 16)}


@with_triton
def test_the_kernels_in_the_interpreter():
    passes_in_the_interpreter("triton_interpreted.py")


@with_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_registers_spills_and_shared_memory(capability, dtype):
    rows = triton_star.kernel_resources(capability, dtype)
    within(rows, MOST)


@with_triton
def test_the_machine_reads_16_bytes_at_once_rounds_and_adds_in_an_order():
    code = {name: machine_code(triton_star, name) for name in MOST}
    for text in code.values():
        assert "ld.global.v4" in text and "st.global.v4" in text and "cvt.rn.bf16" in text
        assert "atom." not in text and "red.global" not in text


def test_pytorch_computes_until_another_kernel_is_chosen_and_where_that_cannot():
    assert {*kernel_choice().values()} == {"pytorch"}
    x, s, b = torch.randn(4, 6), torch.tensor([0.9]), torch.tensor([-0.4])
    y = star_relu(x, s, b)
    use_kernels({"star_relu": "triton"})
    assert kernel_choice()["star_relu"] == "triton"
    assert kernels._triton("star_relu", x) is None and torch.equal(star_relu(x, s, b), y)  # not on a CPU
    kept = kernel_choice()
    use_kernels({})
    assert {*kernel_choice().values()} == {"pytorch"}
    use_kernels(kept)
    assert kernel_choice() == kept


@pytest.mark.parametrize("choice, says", [({"star_rely": "triton"}, "no operation 'star_rely'.*'star_relu'"),
                                          ({"star_relu": "tritom"}, "no kernel 'tritom'.*'triton'")])
def test_a_choice_that_is_not_known_says_so_and_changes_nothing(choice, says):
    with pytest.raises(ValueError, match=says):
        use_kernels(choice)
    assert {*kernel_choice().values()} == {"pytorch"}


@with_triton
def test_what_the_kernels_take(monkeypatch):
    from types import SimpleNamespace
    tensor = lambda device, dtype: SimpleNamespace(device=torch.device(device), dtype=dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert triton_star.takes(tensor("cuda:1", dtype)) and not triton_star.takes(tensor("cpu", dtype))
    assert not triton_star.takes(tensor("cuda", torch.float64))
    monkeypatch.setattr(triton_star, "triton", None)
    assert not triton_star.takes(tensor("cuda", torch.float32))


def test_without_triton_pytorch_computes():
    code = """if True:
        import sys, torch
        sys.modules['triton'] = None # an import raises ImportError
        from metaformer_edu.models.kernels import star_relu, use_kernels
        assert 'metaformer_edu.models.triton_star' not in sys.modules
        args = torch.randn(3), torch.ones(1), torch.zeros(1)
        y = star_relu(*args)
        use_kernels({'star_relu': 'triton'})
        assert torch.equal(star_relu(*args), y)
        from metaformer_edu.speed.tune import tune
        print(tune(1, device='cpu', stages=[(2, 2, 4)])['star_relu'])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "pytorch\n", done.stderr


def test_all_processes_take_the_choice_of_rank_0(tmp_path):
    script = tmp_path / "tuned.py"
    script.write_text("""import torch
from metaformer_edu.speed import tune
from metaformer_edu.training.processes import cleanup, init_distributed, rank
init_distributed(torch.device('cpu'))
def compare(operation, shapes, dtype, device):
    assert rank() == 0, 'the others have a clock of their own'
    row = dict(y=0, dx=0, ds=0, db=0)
    return [dict(kernel='pytorch', ms=2, **row), dict(kernel='triton', ms=1, **row)]
tune.compare_kernels = compare
print(tune.tune(device='cpu')['star_relu'] + ' ', end='', flush=True) # in one piece: the other prints too
def fail(*args): raise MemoryError('no memory')
tune.compare_kernels = fail
try: tune.tune(device='cpu')
except RuntimeError as error: print(str(error).split()[-1] + ' ', end='', flush=True)
cleanup()
""")
    assert sorted(launch(script, processes=2, show=False).split()) == ["memory", "memory", "triton", "triton"]


def test_one_row_that_is_wrong_is_enough():
    right = dict(ms=1, y=1e-3, dx=1e-3, ds=0, db=0)
    rows = [dict(right, kernel="pytorch", ms=9), dict(right, kernel="triton")] * 2
    assert tune._best(rows) == "triton" and tune._best(rows[:1]) == "pytorch"
    for error in ("y", "dx", "ds", "db"):
        for value in (3e-3, float("nan")):
            assert tune._best([*rows, rows[0], {**rows[1], error: value}]) == "pytorch"
