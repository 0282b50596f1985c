"""OHQ: divergence of the output when one layer is masked."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpsearch.core.decision import Decision
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Perturbation, Probe
from mpsearch.estimation.relative_error import cells_from_scores
from mpsearch.metrics.statistics import Mean, kl_divergence


@dataclass(frozen=True)
class MaskedKL(OneAtATime):
    """Divergence of the output with a layer's weights set to zero, times relative quantization error (OHQ, 2309.01945, section 3.3).

        sensitivity(l, o) = mean KL(p || p_with W_l = 0) x ||Q(W_l) - W_l||^2 / ||W_l||^2   [relative]

    A mask gives one number a layer, for one forward pass a layer whatever the number of precisions; the bit axis
    comes from the error of the quantizer (the paper's own weighting could not be checked). Precisions that quantize
    activations add the relative error of the inputs.

    >>> import math, torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    >>> table = mps.profile(model, [torch.ones(1, 1)], MaskedKL(), mps.precisions("w4"), quantizer=lambda w, p: w * 1.5)
    >>> p = 1 / (1 + math.exp(-1))               # masked, both classes have 1/2; the error is 0.5^2
    >>> round(0.25 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), 6) == round(table.sensitivity.item(), 6)
    True
    """

    unit: ClassVar[str] = "relative"
    scores_caches: ClassVar[bool] = False

    def probes_per_unit(self, precisions: int) -> int:
        """One, with the weights set to zero, whatever the number of precisions."""
        return 1

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward passes over the data, at most: one of them measures the inputs where these are quantized."""
        return Passes(super().cost(batches, decisions, precisions).forward + 1, 0)

    def probes(self, context: Context) -> list[Probe]:
        """Each decision with its weights set to zero."""
        return [
            Probe(u, "masked", functools.partial(_without_weights, context, decision))
            for u, decision in enumerate(context.decisions)
        ]

    def by_rows(self, context: Context) -> bool:
        """True."""
        return True

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) divergence of each prediction."""
        return kl_divergence(reference.logits, output.logits)

    def finish(self, context: Context, means: Mapping[tuple[int, str], Mean]) -> Estimate:
        """The divergence without a decision times the relative squared error of each precision."""
        masked = [means[u, "masked"] for u in range(len(context.decisions))]
        return cells_from_scores(
            context, np.array([mean.value for mean in masked]), np.array([mean.se for mean in masked])
        )


def _without_weights(context: Context, decision: Decision) -> Perturbation:
    parameters = context.parameters(decision)
    return Perturbation({parameter: functools.partial(torch.zeros_like, parameter) for parameter in parameters}, {})
