"""Gradients through a head in pieces, against autograd through all of it at once."""

import itertools

import pytest
import torch

import mpsearch as mps
from mpsearch.estimation.gradients.hidden_gradients import hidden_gradients, piece_target
from mpsearch.estimation.gradients.targets import GradientTarget, Predicted
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.registry import METRICS
from mpsearch.metrics.runs import Run
from mpsearch.models.head import Head
from mpsearch.models.peak_memory import live_bytes

BY_ROWS = [name for name, metric in METRICS.items() if metric.by_rows is True and issubclass(metric, Comparison)]
INDEX = torch.tensor([0] * 9 + [1] * 4 + [3] * 37)


def made(classes=300, index=INDEX, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    size = len(index)
    head = Head(torch.randn(classes, 6, dtype=dtype), torch.randn(classes, dtype=dtype) if bias else None)
    hidden, labels = torch.randn(size, 6, dtype=dtype), torch.randint(0, classes, (size,))
    return Run(hidden, labels, index, 4, head)


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**11)


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("kind", ["given", "drawn", "gauss-newton"])
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_states_and_the_head_itself_by_autograd_of_the_whole(name, kind, bias, pieces):
    metric = METRICS[name]()
    assert isinstance(metric, Comparison)
    if kind == "given" and name != "kl":
        pytest.skip("labels are those of classes")
    run = made(bias=bias)
    assert len(list(run.parts())) > 2
    target = GradientTarget(kind, draws=3, seed=5)
    weights = [torch.zeros_like(run.head.weight) for _ in range(3)]
    seen: list[torch.Tensor] = []

    def receive(number, x, g, index):
        weights[number] += g.T @ x
        if number == 0:
            seen.append(index)

    found = hidden_gradients(run, [piece_target(metric, target, draw, 2) for draw in range(3)], receive)
    assert torch.equal(torch.cat(seen), INDEX)
    for draw in range(3):
        hidden, weight = run.held.clone().requires_grad_(), run.head.weight.clone().requires_grad_()
        logits = torch.nn.functional.linear(hidden, weight, run.head.bias)
        whole = Predicted(4, INDEX, logits, None, metric, run.labels).scalar(target, draw, 2)
        expected = torch.autograd.grad(whole, [hidden, weight])
        torch.testing.assert_close(found[draw], expected[0])
        torch.testing.assert_close(weights[draw], expected[1])
    assert kind == "given" or not torch.equal(found[0], found[1])


def test_labels_are_needed_for_a_loss_with_them():
    run = made()
    without = Run(run.held, None, run.index, 4, run.head)
    with pytest.raises(mps.EstimatorError, match="needs labels"):
        hidden_gradients(without, [piece_target(METRICS["kl"](), GradientTarget("given"), 0, 0)])


def test_memory_is_that_of_a_piece(monkeypatch):
    """Four times the rows: no more is alive at once, but for the gradients of the hidden states."""
    monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**14)
    monkeypatch.setattr("mpsearch.metrics.pieces._NUMBERS", 2**12)
    peaks = []
    for size, draws in itertools.product((128, 512), (1, 4)):
        run = made(1024, torch.arange(size) // (size // 4), dtype=torch.float32)
        targets = [piece_target(METRICS["kl"](), GradientTarget("gauss-newton"), draw, 0) for draw in range(draws)]
        with live_bytes() as live:
            hidden_gradients(run, targets)
        peaks.append(live.bytes - draws * size * 6 * 4)
    assert max(peaks) < 1.1 * min(peaks)
    assert max(peaks) < 512 * 1024 * 4 / 2
