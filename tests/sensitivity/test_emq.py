"""EMQ's proxy against its formula, element by element."""

import math

import numpy as np
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.emq import EMQ


def scores(model, batches):
    table = mps.profile(model, batches, EMQ(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w)
    return table.sensitivity[:, 0]


def test_element_by_element():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    found = scores(model, [torch.randn(5, 2, 3, 3).double()])
    model(torch.ones(1, 2, 3, 3).double()).sum().backward()
    for row, layer in enumerate((model[0], model[3])):
        w = layer.weight.detach().flatten(1).numpy()
        g = layer.weight.grad.flatten(1).numpy()
        total = 0.0
        for j in range(w.shape[1]):
            logs = [math.log(abs(value)) if value else 0.0 for value in g[:, j]]
            for i in range(len(w)):
                share = math.exp(logs[i]) / sum(math.exp(value) for value in logs)
                total += share * math.sqrt(max(w[i, j], 0.0))
        np.testing.assert_allclose(found[row], total / w.size)


def test_data_do_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    first, second = scores(model, [torch.randn(4, 3)]), scores(model, [torch.randn(2, 3)])
    np.testing.assert_array_equal(first, second)


def test_a_gradient_of_zero_counts_as_one():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0], [-1.0]]))  # the second channel is off: gradients 1 and 0
    np.testing.assert_allclose(scores(model, [torch.zeros(1, 1)]), [(0.5 * 2 + 0.5 * 0) / 2])
