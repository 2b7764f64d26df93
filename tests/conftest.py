import pytest
import torch


@pytest.fixture
def one_thread():
    "For tests on tiny tensors: beside another busy process, two threads wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
