"""AutoRound: change of the loss read from gradients at the quantized model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.checkpoints.keys import DeltaLossKey
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import differentiable_weights
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.statistics import wide
from mpsearch.models.running import Batch, samples
from mpsearch.models.streaming.offloading import replaced
from mpsearch.quantizers.fake_quantization import input_quantizer, inputs


@dataclass(frozen=True)
class DeltaLoss:
    """First-order change of the loss at the fully quantized model, element by element (AutoRound AutoScheme, 2309.05516).

        sensitivity(l, o) = mean over batches of sum |dT/dW_q (W_q - W)| + sum |dT/dx_q (x_q - x)|   [relative]

    The gradient is taken with every decision at precision o, rounding passed through unchanged; T is the metric, by
    default the KL to the unquantized model (whose gradient is not 0 there), or the loss. Absolute values before the sum make it an upper
    bound of the first-order change: large layers score too high, and columns of the table come from different
    networks. For each precision and batch one forward and one backward pass, and for the KL a second forward: the
    cost grows with the number of precisions. All quantized weights of one precision are held at once. The standard
    error is over batches.

    Logits (0, w x) at w_q = 0 from w = 1 with x = 1: p = 1/(1 + e) and 1/2, dT/dz = 1/2 - e/(1 + e):

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0], [1.0]]))
    >>> table = mps.profile(model, [torch.ones(1, 1)], DeltaLoss(), mps.precisions("w4"), quantizer=lambda w, p: 0 * w)
    >>> table.sensitivity.round(4), round(math.e / (1 + math.e) - 0.5, 4)
    (array([[0.2311]]), 0.2311)
    """

    takes_all_weights: ClassVar[bool] = True

    scores_caches: ClassVar[bool] = True

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated, or a gradient is not finite.
        """
        differentiable_weights(context)
        total = sum(samples(batch) for batch in context.batches)
        count = len(context.batches)
        share = np.array([samples(batch) / total for batch in context.batches])
        draws = np.zeros((count, len(context.decisions), len(context.precisions)))
        bar = context.progress(None, count * len(context.precisions), "Delta loss")
        with bar:
            for p, precision in enumerate(context.precisions):
                changed = context.quantized_weights(context.decisions, precision)
                differences = {parameter: (new - parameter.detach()) for parameter, new in changed.items()}
                for number, batch in enumerate(context.batches):
                    key = DeltaLossKey(str(precision), number)
                    stored = context.checkpoint.get(key)
                    if stored is None and (precision.quantizes_weight or precision.quantizes_activation):
                        stored = self._batch(context, p, changed, differences, batch, number)
                        context.checkpoint.put(key, stored)
                    if stored is not None:
                        draws[number, :, p] = stored
                    bar.update(1)
        mean = np.tensordot(share, draws, 1)
        spread = np.tensordot(share**2, (draws - mean) ** 2, 1)
        se = np.sqrt(spread * count / (count - 1)) if count > 1 else np.full_like(mean, math.nan)
        return Estimate(mean, se, "relative")

    def _batch(
        self,
        context: Context,
        p: int,
        changed: Mapping[nn.Parameter, Tensor],
        differences: Mapping[nn.Parameter, Tensor],
        batch: Batch,
        number: int,
    ) -> list[float]:
        total = len(context.batches)
        reference = None
        metric = context.loss
        if isinstance(metric, Comparison):
            with torch.no_grad():
                reference = context.run(batch).rows
            context.passes.add(total, forward=1)

        changes: list[tuple[int, Tensor, Tensor]] = []  # decision, tensor at the quantized point, what rounding changed

        def rounded(u: int, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def quantize(x: Tensor) -> Tensor:
                change = (function(x.detach()) - x).detach()
                y = x + change
                changes.append((u, y if y.requires_grad else y.requires_grad_(), change))
                return y

            return quantize

        precision = context.precisions[p]
        hooks: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        for u, decision in enumerate(context.decisions):
            for layer in decision.layers:
                module = context.module(layer)
                function = input_quantizer(module, layer.name, precision, context.quantizer, context.ranges)
                if function is not None:
                    hooks[module] = rounded(u, function)
            changes += [(u, w, differences[w]) for w in context.parameters(decision) if w in differences]
        with torch.enable_grad(), replaced(changed), inputs(hooks):
            if reference is None:
                loss = context.mean_loss(batch)
            else:
                assert isinstance(metric, Comparison)
                run = context.run(batch)
                loss = metric.mean(reference, run.rows, run.index, run.samples)
            taken = tuple(changes)  # a backward pass that calls layers again adds others
            points = [point for _, point, _ in taken]
            try:
                gradients = torch.autograd.grad(loss, points, allow_unused=True) if points else ()
            except RuntimeError as error:
                raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
        context.passes.add(total, forward=1, backward=1)
        score = [0.0] * len(context.decisions)
        for (u, _, change), g in zip(taken, gradients, strict=True):
            score[u] += 0.0 if g is None else float((wide(g) * wide(change)).abs().sum())
        for decision, value in zip(context.decisions, score, strict=True):
            if not math.isfinite(value):
                raise EstimatorError(
                    f"sensitivity of layer {decision.name!r} at {precision} is {value}, expected a finite number "
                    f"({self!r}, batch {number})"
                )
        return score

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most: the second forward is for the KL."""
        return Passes(2 * precisions, precisions)
