"""The layer that makes a model's output: hidden states are kept in place of logits, which are made from them a few rows at a time."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpsearch.errors import EstimatorError, warn
from mpsearch.models.running import Batch, first_tensor, inputs_of, logits_of, output_of
from mpsearch.models.streaming.offloading import at_rest, resident

#: Logits of a batch up to so many bytes are made at once, as the model makes them.
WHOLE_BYTES = 64 * 2**20


def too_large(logits_bytes: float) -> bool:
    """True for logits that are not made at once."""
    return logits_bytes > WHOLE_BYTES


@dataclass(frozen=True, eq=False)
class Head:
    """A linear map from hidden states to the output that counts, with the weights of one run.

    Attributes:
        weight: (C, H).
        bias: (C,) or None.
        after: what rows pass through.

    >>> head = Head(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    >>> head(torch.tensor([[3.0, 5.0]])), head.width
    (tensor([[ 3., 10.,  8.]]), 3)
    """

    weight: Tensor
    bias: Tensor | None = None
    after: Callable[[Tensor], Tensor] | None = None

    @property
    def width(self) -> int:
        """C, numbers of a row that it makes."""
        return len(self.weight)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., C) rows of (..., H) hidden states."""
        rows = F.linear(hidden, self.weight, self.bias)
        return rows if self.after is None else self.after(rows)

    def pulled_back(self, gradient: Tensor) -> Tensor:
        """(..., H) gradient of hidden states from the (..., C) gradient of the rows that the linear map makes.

        >>> Head(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).pulled_back(torch.tensor([[3.0, 5.0]]))
        tensor([[ 3., 10.]])
        """
        return gradient @ self.weight

    def then(self, function: Callable[[Tensor], Tensor]) -> "Head":
        """The same with its rows passed through a function."""
        return replace(self, after=function)


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """The linear layer whose output is what counts of the model's, with nothing behind it.

    Attributes:
        module: that is called.
    """

    module: nn.Linear

    def head(self) -> Head:
        """The layer with the weights that it has now, a plan's where one is in the model; they are held as long as it is."""
        with resident(self.module):
            bias = self.module.bias
            return Head(self.module.weight.detach(), None if bias is None else bias.detach())

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """The model without the layer: its input, behind the quantizer of inputs and other hooks, is handed on as its output."""
        attributes = vars(self.module)
        own = attributes.get("forward")
        attributes["forward"] = _handed_on
        try:
            with at_rest(self.module):
                yield
        finally:
            del attributes["forward"]
            if own is not None:
                attributes["forward"] = own


def _handed_on(input: Tensor) -> Tensor:
    """The forward of a layer that is left out, with the names of its arguments."""
    return input


def output_layer(model: nn.Module, batches: Sequence[Batch], output: Any, example: Batch) -> OutputLayer | None:
    """The layer to leave out, where it makes more than `WHOLE_BYTES` of logits of a batch; where it cannot be, that is told.

    It is looked for in one run, and a run without it has to give what the model gives. None where all batches are small, and where
    anything follows the layer, such as the soft cap of Gemma's logits.

    Args:
        model: inside `mpsearch.models.running.preserved`.
        batches: that will be run.
        output: what the model returns for `example`.
        example: some samples.

    >>> net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2**20))
    >>> batch = torch.ones(32, 4)                                # 128 MiB of logits
    >>> output_layer(net, [batch], net(batch[:1]), batch[:1]).module is net[1]
    True
    """
    logits = logits_of(output)
    size = logits.numel() * logits.element_size() / max(first_tensor(inputs_of(example)).numel(), 1)
    largest = math.ceil(size * max(first_tensor(inputs_of(batch)).numel() for batch in batches))
    if not too_large(largest):
        return None
    found = _found(model, example)
    if found is None:
        warn(
            f"the output of the model is not that of a linear layer alone, so the logits of a whole batch are held: {largest:,} bytes for "
            "the largest one, and as much again for each model that is compared; smaller batches take less"
        )
    return found


def _found(model: nn.Module, batch: Batch) -> OutputLayer | None:
    last: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, _args: Any, y: Any) -> None:
        if isinstance(module, nn.Linear) and isinstance(y, Tensor):
            last[:] = [(module, y)]

    handles = [
        module.register_forward_hook(note, prepend=True)  # before hooks of others change it
        for module in model.modules()
        if type(module).forward is nn.Linear.forward and isinstance(module._parameters.get("weight"), nn.Parameter)
    ]
    try:
        with torch.no_grad():
            logits = logits_of(output_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    if not last or not _same(last[0][1], logits):
        return None
    layer = OutputLayer(last[0][0])
    try:
        with torch.no_grad(), layer.left_out():
            hidden = logits_of(output_of(model, batch))
            made = layer.head()(hidden)
    except (EstimatorError, RuntimeError):  # of what else reads the logits
        return None
    agrees = made.shape == logits.shape and made.dtype == logits.dtype and torch.allclose(made, logits, 1e-4, 1e-6)
    return layer if agrees else None


def _same(y: Tensor, logits: Tensor) -> bool:
    return (y.data_ptr(), y.shape, y.stride()) == (logits.data_ptr(), logits.shape, logits.stride())
