"""Relative error of a layer's own output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.statistics import Mean, wide
from mpsearch.models.running import call, samples


@dataclass(frozen=True)
class LayerOutputError:
    """Squared error of a layer's own output over its size, on unquantized inputs (as in ExLlamaV2 and GPTQ, 2210.17323).

        sensitivity(l, o) = sum over samples ||y_l at o - y_l||^2 / sum over samples ||y_l||^2   [relative]

    Sees which input channels matter, not what the error does behind the layer. Of a group, the members' errors and
    sizes add up over the members before dividing. One forward pass in all; each layer is run again alone at each
    precision. The standard error is over samples, the sizes taken as known.

    >>> import mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0]]))
    >>> add = lambda weight, precision: weight + torch.tensor([[0.0, 1.0]])
    >>> batch = torch.tensor([[2.0, 0.0], [0.0, 2.0]])        # outputs 2, 2 become 2, 4
    >>> mps.profile(model, [batch], LayerOutputError(), mps.precisions("w4"), quantizer=add).sensitivity   # (0 + 4) / (4 + 4)
    array([[0.5]])
    """

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`."""
        count = len(context.precisions)
        layers = [layer for decision in context.decisions for layer in decision.layers]
        noise = [[Mean() for _ in range(count)] for _ in context.decisions]
        power = [Mean() for _ in context.decisions]
        squares: dict[str, Tensor] = {}
        size = 0

        def watch(layer: Layer) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], y: Tensor) -> None:
                errors = [wide(context.local_output(layer, p, args, keywords)) - wide(y) for p in context.precisions]
                squares[layer.name] = squares.get(layer.name, torch.zeros(())) + torch.stack(
                    [_by_sample(z, size) for z in (wide(y), *errors)]
                )

            return see

        handles = []
        try:
            for layer in layers:
                handles.append(
                    context.module(layer).register_forward_hook(watch(layer), prepend=True, with_kwargs=True)
                )
            with torch.no_grad():
                for batch in context.progress(context.batches, len(context.batches), "Layer output error"):
                    size = samples(batch)
                    squares.clear()
                    call(context.model, batch)
                    context.passes.add(len(context.batches), forward=1)
                    for u, decision in enumerate(context.decisions):
                        errors_of_layers = [squares[layer.name] for layer in decision.layers if layer.name in squares]
                        if errors_of_layers:
                            own, *errors = torch.stack(errors_of_layers).sum(0)
                            for mean, square in zip([power[u], *noise[u]], [own, *errors], strict=True):
                                mean.add(square, torch.arange(size), size)
        finally:
            for handle in handles:
                handle.remove()
        sizes = np.array([mean.value for mean in power])  # nan where no batch reached a decision
        scale = np.divide(1.0, sizes, out=np.zeros_like(sizes), where=sizes > 0)[:, None]
        value, se = (
            np.array([[getattr(mean, name) if mean.samples else 0.0 for mean in row] for row in noise])
            for name in ("value", "se")
        )
        return Estimate(value * scale, se * scale, "relative")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """One forward pass, in which every layer is run again at each precision."""
        return Passes(1.0, 0.0)


def _by_sample(x: Tensor, size: int) -> Tensor:
    """(size,) squared size of each sample's part; samples lie along the first dimension."""
    x = x.square()
    return x.reshape(size, -1).sum(1) if x.numel() % size == 0 else x.sum().expand(size) / size
