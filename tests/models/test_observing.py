"""Watching layers at work."""

import pytest
import torch
from torch import nn

from mpsearch.models.observing import observed


class Scaled(nn.Module):
    def forward(self, x, mask=None, *, scale=None):
        return x * scale


def test_inputs_and_outputs_of_every_call():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    seen = []
    x = torch.randn(3, 2)
    with observed({model[0]: lambda given, output: seen.append((given, output))}):
        model(x)
        model(2 * x)
    assert [torch.equal(given, k * x) for k, (given, _) in enumerate(seen, 1)] == [True, True]
    assert torch.equal(seen[1][1], model[0](2 * x))


def test_keywords_and_token_numbers():
    seen = []
    module, embed = Scaled(), nn.Embedding(4, 2)
    tokens = torch.tensor([1, 2])
    with observed({m: lambda given, _output: seen.append(given) for m in (module, embed)}):
        module(tokens, scale=torch.tensor(2.0))
        embed(tokens)
    assert float(seen[0]) == 2.0
    assert torch.equal(seen[1], tokens)


def test_hooks_come_off():
    module = nn.Linear(1, 1)
    with pytest.raises(ZeroDivisionError), observed({module: lambda *_: 1 / 0}):
        module(torch.ones(1))
    assert not module._forward_hooks
