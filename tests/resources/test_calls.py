"""What goes through each layer."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.resources.calls import calls_of


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Conv1d(3, 2, 2)

    def forward(self, x):
        return self.head(self.inner(input=self.inner(x)))


def test_each_call_with_its_shape():
    found = calls_of(Twice(), ["inner", "head"], torch.ones(5, 3, 4))
    assert [(one.shape, one.inputs, one.outputs) for one in found["inner"]] == [((5, 3, 4), 60, 60)] * 2
    assert [(one.shape, one.outputs) for one in found["head"]] == [((5, 3, 4), 5 * 2 * 3)]


def test_the_model_is_left_without_hooks():
    model = Twice().train()
    calls_of(model, ["inner"], torch.ones(1, 3, 4))
    assert not model.inner._forward_hooks
    assert model.training


def test_without_an_example():
    with pytest.raises(mps.TableError, match="give it example="):
        calls_of(Twice(), ["inner"], None)
