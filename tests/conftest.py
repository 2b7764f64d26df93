import os

if "PYTEST_XDIST_WORKER" in os.environ:  # they share the cores, and their processes inherit this
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_itemcollected(item):  # before xdist reads the marks
    "The tests of a file stay in one process, where they share what is made once; notebooks share nothing."
    if item.path.name != "test_notebooks.py":
        item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture
def pytorch_again():
    "PyTorch's kernels compute before and after a test that chooses others."
    from metaformer_edu.models.kernels import use_kernels
    use_kernels({})
    yield
    use_kernels({})


@pytest.fixture
def one_thread():
    "For tests on tiny tensors: beside another busy process, two threads wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
