"""predict and evaluate on a model whose answers are known."""
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metaformer_edu.validate import evaluate, predict


class Echo(nn.Module):
    "Answers with its input; in training mode with noise."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x + (torch.randn_like(x) if self.training else 0)


def loader(logits, labels, batch_size):
    return DataLoader(TensorDataset(logits, labels), batch_size=batch_size)


@pytest.fixture
def answers():
    torch.manual_seed(0)
    return torch.randn(23, 7), torch.randint(7, (23,))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 22, 23])
def test_batches_do_not_matter(answers, batch_size):
    logits, labels = answers
    metrics = evaluate(Echo(), loader(logits, labels, batch_size))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert metrics["top1"] == pytest.approx(100 * (ranks == 0).double().mean().item(), abs=1e-12)
    assert metrics["top5"] == pytest.approx(100 * (ranks < 5).double().mean().item(), abs=1e-12)
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)


@pytest.mark.parametrize("mode", [True, False])
def test_mode_is_left_as_it_was(answers, mode):
    model = Echo().train(mode)
    said = predict(model, loader(*answers, 5))
    assert model.training is mode and torch.equal(said["guess"], answers[0].argmax(1))  # no noise: evaluation mode
    assert not said["loss"].requires_grad


def test_top5_is_there_even_if_all_are_right_and_absent_for_few_classes():
    labels = torch.arange(6)
    assert evaluate(Echo(), loader(torch.eye(6), labels, 4))["top5"] == 100
    assert "top5" not in evaluate(Echo(), loader(torch.eye(5), labels[:5], 4))
