"""LSTM, GRU and plain recurrence by single products: what `torch._VF.lstm` and its like do in one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: `product(weight, x)`: x (..., in) times a weight (out, in).
Times = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Weights:
    """Of one layer in one direction; None for what it has not."""

    inputs: Tensor
    states: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Tensor | None = None


def cell(kind: str, times: Times, args: Sequence[Any]) -> Any:
    """One step: `torch.lstm_cell`, `gru_cell`, `rnn_tanh_cell` or `rnn_relu_cell`, with their arguments.

    >>> module, x, h = torch.nn.GRUCell(3, 4), torch.ones(2, 3), torch.ones(2, 4)
    >>> args = (x, h, module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    >>> bool(torch.allclose(cell("gru_cell", lambda w, x: x @ w.T, args), module(x, h)))
    True
    """
    x, state, *rest = args
    weights = _Weights(*rest)
    h, c = state if kind == "lstm_cell" else (state, None)
    h, c = _step(kind.removesuffix("_cell"), times, weights, _plus(times(weights.inputs, x), weights.input_bias), h, c)
    return h if c is None else (h, c)


def sequence(kind: str, times: Times, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """All steps, layers and directions: `torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu`, with their arguments; packed sequences too.

    Args:
        kind: of them.
        times: the product of a weight and its input, that of all steps at once, that of the state step by step.
        args: of the function, by position.
    """
    if isinstance(args[3], list | tuple):  # packed: rows of all steps behind each other
        data, sizes, states, tensors, biased, layers, _, _, both = args
        steps, batch_first = sizes.tolist(), False
    else:
        data, states, tensors, biased, layers, _, _, both, batch_first = args
        steps = [data.shape[0 if batch_first else 1]] * data.shape[1 if batch_first else 0]
    packed = isinstance(args[3], list | tuple)
    hidden, cells = (states[0], states[1]) if kind == "lstm" else (states, None)
    per = len(tensors) // (layers * (2 if both else 1))
    x, last_h, last_c = data, list[Tensor](), list[Tensor]()
    for number in range(layers * (2 if both else 1)):
        backward = both and number % 2
        if not backward:
            layer_input, outputs = x, []
        own = tensors[number * per : (number + 1) * per]
        biases = own[2:4] if biased else (None, None)
        weights = _Weights(own[0], own[1], biases[0], biases[1], own[-1] if per % 2 else None)
        inner = _plus(times(weights.inputs, layer_input), weights.input_bias)
        parts = list(inner.split(steps)) if packed else list(inner.unbind(1 if batch_first else 0))
        h, c = hidden[number], None if cells is None else cells[number]
        hidden_states = []
        order = range(len(parts))
        for step in reversed(order) if backward else order:
            size = len(parts[step])
            new, new_c = _step(kind, times, weights, parts[step], h[:size], None if c is None else c[:size])
            hidden_states.append(new)
            h = torch.cat([new, h[size:]])
            c = None if c is None or new_c is None else torch.cat([new_c, c[size:]])
        if backward:
            hidden_states.reverse()
        outputs.append(torch.cat(hidden_states) if packed else torch.stack(hidden_states, 1 if batch_first else 0))
        last_h.append(h)
        if c is not None:
            last_c.append(c)
        if backward or not both:
            x = torch.cat(outputs, -1)
    ends = (torch.stack(last_h),) if kind != "lstm" else (torch.stack(last_h), torch.stack(last_c))
    return (x, *ends)


def _step(
    kind: str, times: Times, weights: _Weights, product: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    state = _plus(times(weights.states, h), weights.state_bias)
    if kind == "lstm":
        assert c is not None
        i, f, g, o = (product + state).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h if weights.projection is None else times(weights.projection, h), c
    if kind == "gru":
        (reset, update, new), (by_reset, by_update, by_new) = product.chunk(3, -1), state.chunk(3, -1)
        z = (update + by_update).sigmoid()
        n = (new + (reset + by_reset).sigmoid() * by_new).tanh()
        return (1 - z) * n + z * h, None
    return ((product + state).tanh() if kind == "rnn_tanh" else (product + state).relu()), None


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
