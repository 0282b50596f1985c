"""In-context damage along the path to the fully quantized model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.checkpoints.keys import PathKey
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import require_gradients
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.statistics import log_softmax
from mpsearch.models.running import Batch
from mpsearch.models.streaming.offloading import replaced
from mpsearch.quantizers.fake_quantization import input_quantizer, inputs

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PathShapley:
    """Aumann-Shapley share of each decision in the damage of the fully quantized model (path attribution; coverage model, 2607.12266).

        W_i(t) = W_i + t (Q_o(W_i) - W_i),  x_i(t) = x_i + t (Q_o(x_i) - x_i)     for all decisions i at once
        phi(i, o) = integral over t in [0, 1] of <dF/dW_i, Q_o(W_i) - W_i> + <dF/dx_i, Q_o(x_i) - x_i>,   F(t) = KL(p || p(t))

    The shares of a precision add up to the damage F(1) of quantizing everything to it, so a decision is scored among the
    errors of all others, not alone. Gauss-Legendre nodes integrate: three are within 0.1 % on smooth paths. Rounding
    errors of inputs are held fixed while differentiating, so there the sum is approximate.

    With `coverage` the shares become costs of the model F(S) = c (1 - exp(-sum of b_i)), in which damage saturates at
    the ceiling c, the KL to the uniform prediction or 1.2 times the largest measured damage: phi_i = c a_i integral
    of prod_{j != i} (1 - t a_j) dt is solved for a by fixed point, b = -log(1 - a), and c b is the score. Those sums
    rank plans; the damage they predict is c (1 - exp(-sum / c)). Without it, the shares themselves are the table. F is the metric of
    the run, by default the KL; of others no prediction bounds c.

    For each precision and batch `nodes` forward and backward passes and one forward more, and one forward for the
    reference. All quantized weights of one precision are held at once. Shares below 0 (errors that help among others)
    count as 0, and the origin tells how many. The standard error is over batches.

    Attributes:
        nodes: of the quadrature, at least 1.
        coverage: give coverage costs [relative]; else the shares [nats].

    One decision alone carries all the damage, KL((1/2, 1/2) || softmax(0, 1)):

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [1.0]])
    >>> table = mps.profile(model, [torch.ones(1, 1)], PathShapley(coverage=False), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(4)
    array([[0.1201]])
    """

    takes_all_weights: ClassVar[bool] = True

    scores_caches: ClassVar[bool] = True
    nodes: int = 3
    coverage: bool = True

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise EstimatorError(f"nodes={self.nodes}: expected 1 or more")

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated, a share is not finite, or the loss is not the
                KL.
        """
        metric = context.loss
        if not isinstance(metric, Comparison):
            raise EstimatorError(
                "PathShapley follows a metric that compares with the unquantized model; leave out the loss"
            )
        count, options = len(context.batches), len(context.precisions)
        shares = np.zeros((count, len(context.decisions), options))
        ends = np.zeros((count, options))
        ceilings = np.zeros(count)
        references: list[Tensor] = []
        weights_of = np.zeros(count)
        with torch.no_grad():
            for number, batch in enumerate(context.batches):
                run = context.run(batch)
                context.passes.add(count, forward=1)
                if metric.kind == "classes":  # of others no bound is known
                    log_p = log_softmax(run.rows)
                    ceilings[number] = float((log_p.exp() * log_p).sum(-1).mean()) + math.log(log_p.shape[-1])
                weights_of[number] = float(metric.terms(run.rows, run.rows, run.index, run.samples)[1].sum())
                references.append(run.rows)
        weight = weights_of / weights_of.sum()
        bar = context.progress(None, count * options, "Path")
        with bar:
            for p, precision in enumerate(context.precisions):
                targets = context.quantized_weights(context.decisions, precision)
                require_gradients(context.model, targets)
                for number, batch in enumerate(context.batches):
                    key = PathKey(self.nodes, str(precision), number)
                    stored = context.checkpoint.get(key)
                    if stored is None and (precision.quantizes_weight or precision.quantizes_activation):
                        stored = self._batch(context, p, targets, batch, references[number], number)
                        context.checkpoint.put(key, stored)
                    if stored is not None:
                        *shares[number, :, p], ends[number, p] = stored
                    bar.update(1)
        mean = np.tensordot(weight, shares, 1)
        spread = np.tensordot(weight**2, (shares - mean) ** 2, 1)
        se = np.sqrt(spread * count / (count - 1)) if count > 1 else np.full_like(mean, math.nan)
        end = weight @ ends
        facts = {
            "damage": {str(precision): float(value) for precision, value in zip(context.precisions, end, strict=True)},
            "negative_shares": int((mean < 0).sum()),
        }
        mean = np.maximum(mean, 0.0)
        if not self.coverage:
            return Estimate(mean, se, context.unit, facts)
        ceiling = float(max(weight @ ceilings, 1.2 * end.max()))
        costs = (
            np.stack([ceiling * coverage_costs(mean[:, p] / ceiling) for p in range(options)], axis=1)
            if ceiling
            else mean
        )
        factor = np.divide(costs, mean, out=np.ones_like(mean), where=mean > 0)
        return Estimate(costs, se * factor, "relative", {**facts, "ceiling": ceiling})

    def _batch(
        self,
        context: Context,
        p: int,
        targets: Mapping[nn.Parameter, Tensor],
        batch: Batch,
        reference: Tensor,
        number: int,
    ) -> list[float]:
        """The share of each decision, then the damage at the end."""
        score = [0.0] * len(context.decisions)
        total = len(context.batches)
        nodes, node_weights = np.polynomial.legendre.leggauss(self.nodes)
        starts = {parameter: parameter.data for parameter in targets}
        leaves: list[Tensor] = []  # inputs that nothing before them moves

        def hooks(t: float, share: float) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
            functions: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
            for u, decision in enumerate(context.decisions):
                for layer in decision.layers:
                    module, precision = context.module(layer), context.precisions[p]
                    function = input_quantizer(module, layer.name, precision, context.quantizer, context.ranges)
                    if function is not None:
                        functions[module] = moved(u, function, t, share)
            return functions

        def moved(u: int, function: Callable[[Tensor], Tensor], t: float, share: float) -> Callable[[Tensor], Tensor]:
            def move(x: Tensor) -> Tensor:
                change = (function(x) - x).detach()
                y = x + t * change
                if share:
                    if not y.requires_grad:
                        leaves.append(y.requires_grad_())

                    def add(g: Tensor) -> None:
                        score[u] += share * float((g.double() * change.double()).sum())

                    y.register_hook(add)
                return y

            return move

        def damage() -> Tensor:
            assert isinstance(context.loss, Comparison)
            run = context.run(batch)
            return context.loss.mean(reference, run.rows, run.index, run.samples)

        for node, node_weight in zip((nodes + 1) / 2, node_weights / 2, strict=True):
            at = {parameter: torch.lerp(starts[parameter], new, float(node)) for parameter, new in targets.items()}
            leaves.clear()
            with torch.enable_grad(), replaced(at), inputs(hooks(float(node), float(node_weight))):
                try:
                    loss = damage()
                    points = [*targets, *leaves]
                    gradients = torch.autograd.grad(loss, points, allow_unused=True)
                except RuntimeError as error:
                    raise EstimatorError(f"the model cannot be differentiated: {error}") from None
            context.passes.add(total, forward=1, backward=1)
            slope = dict(zip(points, gradients, strict=True))
            for u, decision in enumerate(context.decisions):
                for parameter in context.parameters(decision):
                    g = slope.get(parameter)
                    if g is not None and parameter in targets:
                        change = targets[parameter].double() - starts[parameter].double()
                        score[u] += float(node_weight) * float((g.double() * change).sum())
        with torch.no_grad(), replaced(targets), inputs(hooks(1.0, 0.0)):
            end = float(damage())
        context.passes.add(total, forward=1)
        for u, value in enumerate(score):
            if not math.isfinite(value):
                raise EstimatorError(
                    f"sensitivity of layer {context.decisions[u].name!r} at {context.precisions[p]} is {value}, expected a finite "
                    f"number ({self!r}, batch {number})"
                )
        return [*score, end]

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most."""
        return Passes(1 + precisions * (self.nodes + 1), precisions * self.nodes)


def coverage_costs(shares: Floats) -> Floats:
    """Costs b >= 0 of decisions whose shares of a damage 1 - exp(-sum b) are given.

    Solves phi_i = a_i integral over t in [0, 1] of prod_{j != i} (1 - t a_j) dt for a by fixed point; b = -log(1 -
    a).

    Args:
        shares: (D,) phi >= 0, of sum below 1.

    >>> coverage_costs(np.array([0.5])).round(6)     # alone: a = phi
    array([0.693147])
    >>> b = coverage_costs(np.array([0.2, 0.3])); bool(abs(1 - np.exp(-b.sum()) - 0.5) < 1e-9)
    True
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(64)
    t, w = (nodes + 1) / 2, node_weights / 2
    a = np.minimum(shares, 1 - 1e-12)
    for _ in range(1000):
        logs = np.log1p(-t[:, None] * a)  # (T, D)
        others = np.exp(logs.sum(axis=1, keepdims=True) - logs)
        new = np.minimum(shares / (w @ others), 1 - 1e-12)
        if np.abs(new - a).max(initial=0.0) < 1e-14:
            break
        a = new
    return np.asarray(-np.log1p(-a))
