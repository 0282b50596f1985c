"""A search makes the model ready once: calls are counted, whichever module makes them."""

import contextlib
import sys

import pytest
import torch
from torch import nn

import mpsearch as mps
import mpsearch.plan_search.searching
from mpsearch.models.running import samples


class Attention(nn.Module):
    """Has a weight that is taken apart."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def counted(monkeypatch, name, place):
    """Arguments of every call of a function, in all modules that have imported it."""
    calls = []
    real = getattr(sys.modules[place], name)

    def wrapped(*arguments, **keywords):
        calls.append(arguments)
        return real(*arguments, **keywords)

    for module in [module for key, module in sys.modules.items() if key.startswith("mpsearch")]:
        if vars(module).get(name) is real:
            monkeypatch.setattr(module, name, wrapped)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {"max_passes": 20.0},
        {"max_passes": 60.0},
        {"goal": mps.LeastResource("memory_bytes", tolerance=0.5), "max_passes": 20.0},
        {"goal": mps.WholeFront(), "max_passes": 25.0},
    ],
)
def test_a_search_hashes_twice_takes_apart_once_and_calibrates_ranges_once(monkeypatch, options):
    torch.manual_seed(0)
    model, batches = Attention(), [torch.randn(16, 4, 8) for _ in range(8)]
    hashes = counted(monkeypatch, "state_fingerprint", "mpsearch.models.running")
    apart = counted(monkeypatch, "decomposed", "mpsearch.models.running")
    ranges = counted(monkeypatch, "input_ranges", "mpsearch.quantizers.fake_quantization")
    options = {"goal": mps.WithinBudget(mps.Budget(average_bits=5)), **options}
    with contextlib.suppress(mps.InfeasibleError):
        mps.search(
            model, batches, options.pop("goal"), mps.precisions("w4a8 w8a8"), progress=False, metric="mse", **options
        )
    assert len(hashes) <= 2
    assert len(apart) == 1
    ((_, data, _),) = ranges
    assert sum(map(samples, data)) == 45  # the score part
