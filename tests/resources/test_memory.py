"""`memory_bytes` of a plan against the bytes of the really packed tensors plus everything left alone."""

import itertools

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.modules import canonical
from mpsearch.problem import usage_of
from mpsearch.quantize import RoundToNearest
from mpsearch.resources import MemoryBytes


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3, groups=1)
        self.norm = nn.BatchNorm1d(5)
        self.up = nn.ConvTranspose1d(5, 3, 2)
        self.mid = nn.Linear(3, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.left = nn.Linear(11, 2)

    def forward(self, ids):
        x = self.norm(self.conv(self.embed(ids).transpose(1, 2)))
        return self.left(self.head(self.mid(self.up(x).transpose(1, 2))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "quantizer", [RoundToNearest(), RoundToNearest(symmetric=False), RoundToNearest(granularity="tensor")]
)
def test_every_plan_to_the_byte(dtype, quantizer):
    model = Model().to(dtype).eval()
    batch = torch.tensor([[1, 2, 3, 4, 5]])
    layers = mps.layers(model, batch, exclude=["left"])
    options = mps.precisions("w3 w8g4 w16")
    found = MemoryBytes(quantizer)(model, layers, options)
    table = mps.CostTable(
        layers, options, found.usage * 0, usage={"memory_bytes": found.usage}, fixed_usage={"memory_bytes": found.fixed}
    )
    stored = sum(
        t.numel() * t.element_size() for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    )
    assert found.reference == stored
    names = [layer.name for layer in layers]
    assert names == ["embed", "conv", "up", "mid", "head"]
    for columns in itertools.product(range(3), repeat=5):
        if columns[0] != columns[4]:
            continue  # one tensor has one precision
        packed, decided = 0, 0
        for name, column in zip(names[:4], columns[:4], strict=True):  # the head's weight is the embedding's
            weight = canonical(model.get_submodule(name)).detach()
            decided += weight.numel() * weight.element_size()
            if options[column].quantizes_weight:
                packed += quantizer.codes(weight, options[column]).pack().nbytes
            else:
                packed += weight.numel() * weight.element_size()
        assert usage_of(table, torch.tensor(columns).numpy())["memory_bytes"] == packed + stored - decided


def test_the_profile_counts_with_its_quantizer():
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    tables = [
        mps.profile(model, [torch.ones(1, 4)], mps.sensitivity.KLDivergence(), mps.precisions("w4"), quantizer=q)
        for q in (RoundToNearest(), RoundToNearest(symmetric=False), lambda weight, precision: weight)
    ]
    assert [table.usage["memory_bytes"][0, 0] for table in tables] == [16 + 32, 16 + 32 + 4, 16 + 32]
