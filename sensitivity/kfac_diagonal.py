"""CASA: input second moments times output-gradient second moments times squared perturbations."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpsearch.core.layer import Layer
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.one_pass import Accumulator
from mpsearch.estimation.gradients.targets import TokenWeights
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.streaming.offloading import resident

#: Groups of samples for the jackknife.
_GROUPS = 8


@dataclass(frozen=True)
class KFACDiagonal(GradientEstimator):
    """Quadratic form of the diagonals of the Kronecker factors of the Fisher information (CASA, 2026; KFAC, 1503.05671).

        a_j = E[x_j^2],   b_i = E[(dT/dy_i)^2],   D = Q_o(W) - W
        sensitivity(l, o) = 1/2 sum_ij b_i a_j D_ij^2  (+ 1/2 sum_ij b_i E[(Q_o(x)_j - x_j)^2] W_ij^2 where inputs are quantized)   [nats]

    T is that of `FisherProjection`: <u, logits> with random u for the loss `kl`, else the loss. Exact in expectation
    where x and dT/dy are independent and the entries of D are independent of mean 0. Convolutions take patches for x
    and sums over places for b (KFC, 1602.01407), as if gradients at different places were uncorrelated, which
    may double the score of early convolutions; embeddings take token frequencies. One forward and `draws` backward
    passes, whatever the number of precisions. Statistics of single samples or tokens need none of the memory of
    per-sample gradients. The standard error is the jackknife over 8 groups of samples.

    Attributes:
        draws: of u for each prediction.
        seed: of the draws.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Logits (0, w x) at w = 0: p = 1/2, the variance of u is 1/4 for either logit:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [0.1]])
    >>> table = mps.profile(model, [torch.full((64, 1), 2.0)], KFACDiagonal(64), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(3)      # 1/2 1/4 2^2 0.1^2
    array([[0.005]])
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"factors"})

    draws: int = 1
    seed: int = 0
    token_weights: TokenWeights | None = None

    def accumulator(self, context: Context) -> Accumulator:
        """Sums of second moments of inputs and gradients, in groups of samples for the jackknife."""
        return _FactorSums(context, self.gradient_target(context).draws)


@dataclass(eq=False)
class _FactorSums:
    """Sums over samples, in groups: of each call of each weight the inputs, gradients and input errors."""

    context: Context
    draws: int
    seen: int = 0
    samples: Tensor = field(default_factory=lambda: torch.zeros(_GROUPS, dtype=torch.float64))
    predictions: Tensor = field(default_factory=lambda: torch.zeros(_GROUPS, dtype=torch.float64))
    #: "<weight> <call>" -> whether that call takes the weight as (inputs, outputs)
    inputs_first: dict[str, bool] = field(default_factory=dict)
    #: "<weight> <call> <inputs | gradients | noise p>" -> (groups, ...)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, gradients: Gradients) -> None:
        count = len(gradients.counts)
        group = (torch.arange(count) + self.seen) % _GROUPS
        if gradients.draw == 0:
            self.samples += torch.bincount(group, minlength=_GROUPS)
            self.predictions.index_add_(0, group, gradients.counts.cpu().double())
        for w, calls in enumerate(gradients.factors):
            for c, call in enumerate(calls):
                parts = {"gradients": call.gradients / self.draws}
                if gradients.draw == 0:
                    parts |= {"inputs": call.inputs, **{f"noise {p}": noise for p, noise in call.noises.items()}}
                self.inputs_first[f"{w} {c}"] = call.inputs_first
                for name, values in parts.items():
                    self._sum(f"{w} {c} {name}", values, group)
        if gradients.draw + 1 == self.draws:
            self.seen += count

    def _sum(self, name: str, values: Tensor, group: Tensor) -> None:
        if len(values) < len(group):  # one output for the whole batch
            values = values / _GROUPS if name.endswith("gradients") else values * len(group) / _GROUPS
            values, group = values.expand(_GROUPS, *values.shape[1:]), torch.arange(_GROUPS)
        total = self.sums.setdefault(name, values.new_zeros(_GROUPS, *values.shape[1:]))
        total.index_add_(0, group.to(values.device), values)

    def state(self) -> Any:
        return {
            "seen": self.seen,
            "samples": self.samples,
            "predictions": self.predictions,
            "inputs_first": self.inputs_first,
            "sums": self.sums,
        }

    def restore(self, state: Any) -> None:
        self.seen, self.samples, self.predictions = state["seen"], state["samples"], state["predictions"]
        self.inputs_first, self.sums = state["inputs_first"], state["sums"]

    def finish(self) -> Estimate:
        context = self.context
        column = {
            p: i
            for i, p in enumerate({p: None for decision in context.decisions for p in context.parameters(decision)})
        }
        value = np.zeros((len(context.decisions), len(context.precisions)))
        se = np.zeros_like(value)
        groups = int((self.samples > 0).sum())
        for u, decision in enumerate(context.decisions):
            cells = torch.zeros(len(context.precisions), _GROUPS + 1, dtype=torch.float64)
            for parameter, layer in context.parameters(decision).items():
                with resident(context.module(layer)):
                    cells += self._weight(column[parameter], layer)
            value[u] = cells[:, 0].numpy()
            left_out = cells[:, 1:][:, self.samples > 0]
            spread = (
                (left_out - left_out.mean(1, keepdim=True)).square().sum(1) if groups > 1 else cells[:, 0] * math.nan
            )
            se[u] = (spread * (groups - 1) / max(groups, 1)).sqrt().numpy()
        return Estimate(value, se, context.unit)

    def _weight(self, w: int, layer: Layer) -> Tensor:
        """(P, 1 + groups) damage from all samples, and with each group left out."""
        context = self.context
        weight = weight_of(context.module(layer)).detach()
        damages = torch.zeros(len(context.precisions), _GROUPS + 1, dtype=torch.float64)
        call = 0
        while f"{w} {call} inputs" in self.sums:
            transposed = self.inputs_first[f"{w} {call}"]
            inputs = self._without(f"{w} {call} inputs", self.samples)
            gradients = self._without(f"{w} {call} gradients", self.predictions)
            for p, precision in enumerate(context.precisions):
                if precision.quantizes_weight:
                    damages[p] += _form(context.perturbation(layer, precision), transposed, inputs, gradients)
                if f"{w} {call} noise {p}" in self.sums:
                    noise = self._without(f"{w} {call} noise {p}", self.samples)
                    damages[p] += _form(weight, transposed, noise, gradients)
            call += 1
        return damages

    def _without(self, name: str, counts: Tensor) -> Tensor:
        """(1 + groups, ...) mean over all, and with each group left out."""
        sums = self.sums[name]
        rest = torch.cat([sums.sum(0, keepdim=True), sums.sum(0, keepdim=True) - sums])
        number = torch.cat([counts.sum()[None], counts.sum() - counts]).to(rest)
        number = torch.where(number > 0, number, torch.ones_like(number))
        return rest / number.reshape(-1, *[1] * (rest.ndim - 1))


def _form(matrix: Tensor, inputs_first: bool, inputs: Tensor, gradients: Tensor) -> Tensor:
    """(K,) 1/2 sum b_i a_j M_ij^2 for K sets of a (K, G, I) and b (K, O)."""
    squared = wide(matrix).square()
    if inputs_first:
        squared = squared.T
    groups = inputs.shape[1]
    squared = squared.reshape(groups, gradients.shape[1] // groups, -1)
    rows = torch.einsum("kgi,goi->kgo", inputs, squared)
    return 0.5 * (rows.flatten(1) * gradients).sum(1).cpu().double()
