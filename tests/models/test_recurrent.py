"""LSTM, GRU and plain recurrence by single products, against those of torch."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mpsearch.models.modules.recurrent import cell, sequence


class BySteps(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return sequence(name, lambda weight, x: x @ weight.T, args)
        if name.endswith("_cell"):
            return cell(name, lambda weight, x: x @ weight.T, args)
        return func(*args, **(kwargs or {}))


def agree(module, x):
    with torch.no_grad():
        expected = module(x)
        with BySteps():
            found = module(x)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert not isinstance(one, Tensor) or torch.allclose(one, other, atol=1e-6)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("settings", [{}, {"proj_size": 2}, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_sequences(cls, settings):
    if ("proj_size" in settings and cls is not nn.LSTM) or ("nonlinearity" in settings and cls is not nn.RNN):
        pytest.skip("no such setting")
    torch.manual_seed(0)
    for layers, both, first, bias in itertools.product((1, 2), (False, True), (False, True), (True, False)):
        module = cls(3, 4, layers, bidirectional=both, batch_first=first, bias=bias, **settings).eval()
        for x in (torch.randn(5, 6, 3), torch.randn(5, 3), pack_sequence([torch.randn(n, 3) for n in (4, 2, 2, 1)])):
            agree(module, x)


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(cls):
    torch.manual_seed(0)
    agree(cls(3, 4), torch.randn(2, 3))
    agree(cls(3, 4, bias=False), torch.randn(3))
