"""HIGGS: damage per relative squared error of a layer, from Gaussian noise."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Perturbation, Probe
from mpsearch.estimation.relative_error import relative_error
from mpsearch.metrics.seeds import seeded_generator
from mpsearch.metrics.statistics import Mean, kl_divergence, wide


@dataclass(frozen=True)
class LinearityCoefficients(OneAtATime):
    """Slope of the damage over the relative squared error of one layer (HIGGS, 2411.17525, section 4 and appendix).

        W_l + t ||W_l|| / sqrt(n_l) x Gaussian noise  ->  damage(t);  alpha_l = sum t^2 damage / sum t^4
        sensitivity(l, o) = alpha_l x ||Q(W_l) - W_l||^2 / ||W_l||^2   [nats]

    The damage is the KL to the unquantized output. Regression through the origin over J levels with t^2 evenly spaced
    up to `greatest`; on a quadratic damage, alpha = 1/2 tr(H_l) ||W_l||^2 / n_l up to the scatter of the draws. One
    forward pass a level and layer whatever the number of precisions. Gaussian noise has no preferred direction and
    quantization error has: the theorem holds after a random rotation of the weights. Inputs that are quantized count
    as weights with the same relative error. The standard error is that of the regression, whose scatter grows with
    the level (HC3; MacKinnon and White 1985): it covers draws of noise and misfit, not samples.

    Attributes:
        levels: J >= 2.
        greatest: of t, the largest relative error, above 0.
        seed: of the noise.

    256 inputs, each with two weights of 1 to its own two logits: p = 1/2, the Hessian of a prediction has 1/4 at its two
    weights, so tr(H) = 1/2, ||W||^2 / n = 1 and alpha = 1/4; weights that triple have the relative squared error 4:

    >>> import mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 2, bias=False))
    >>> _ = torch.nn.init.ones_(model[0].weight)
    >>> triple = lambda weight, precision: 3 * weight
    >>> table = mps.profile(model, [torch.eye(256)], LinearityCoefficients(), mps.precisions("w4"), quantizer=triple)
    >>> table.sensitivity.round(1)    # 1/4 x 4, up to the scatter of the draws
    array([[1.]])
    """

    unit: ClassVar[str] = "nats"
    scores_caches: ClassVar[bool] = False

    levels: int = 15
    greatest: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise EstimatorError(f"levels={self.levels}: expected 2 or more")
        if not 0 < self.greatest < math.inf:
            raise EstimatorError(f"greatest={self.greatest}: expected a finite number above 0")

    def probes_per_unit(self, precisions: int) -> int:
        """One for each level of noise, whatever the number of precisions."""
        return self.levels

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward passes over the data, at most: one of them measures the inputs where these are quantized."""
        return Passes(super().cost(batches, decisions, precisions).forward + 1, 0)

    def _squared(self) -> list[float]:
        return [self.greatest**2 * (j + 1) / self.levels for j in range(self.levels)]

    def probes(self, context: Context) -> list[Probe]:
        """Each decision at each level of noise."""
        return [
            Probe(u, self._name(j), functools.partial(self._noise, context, u, j))
            for u in range(len(context.decisions))
            for j in range(self.levels)
        ]

    def _name(self, j: int) -> str:
        return f"noise {j + 1} of {self.levels} to {self.greatest!r}, seed {self.seed}"

    def _noise(self, context: Context, u: int, j: int) -> Perturbation:
        parameters = context.parameters(context.decisions[u])
        return Perturbation(
            {parameter: functools.partial(self._noisy, parameter, u, j, k) for k, parameter in enumerate(parameters)},
            {},
        )

    def _noisy(self, parameter: torch.nn.Parameter, u: int, j: int, k: int) -> Tensor:
        """The k-th weight of decision u with noise of level j."""
        weight = wide(parameter.detach())
        draw = torch.randn(parameter.shape, generator=seeded_generator(self.seed, u, j, k), dtype=torch.float32)
        scale = self._squared()[j] ** 0.5 * float(weight.norm()) / weight.numel() ** 0.5
        noisy: Tensor = weight + scale * draw.to(weight)
        return noisy.to(parameter.dtype)

    def by_rows(self, context: Context) -> bool:
        """True."""
        return True

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) divergence of each prediction."""
        return kl_divergence(reference.logits, output.logits)

    def finish(self, context: Context, means: Mapping[tuple[int, str], Mean]) -> Estimate:
        """The slope of each decision times the relative squared error of each precision."""
        x = np.array(self._squared())
        y = np.array(
            [[means[u, self._name(j)].value for j in range(self.levels)] for u in range(len(context.decisions))]
        )
        alpha = y @ x / (x @ x)
        residual = (y - alpha[:, None] * x) / (1 - x * x / (x @ x))
        se = np.sqrt(((x * residual) ** 2).sum(axis=1)) / (x @ x)
        error = relative_error(context)
        names = [decision.name for decision in context.decisions]
        return Estimate(
            alpha[:, None] * error,
            se[:, None] * error,
            "nats",
            {"alpha": dict(zip(names, alpha.tolist(), strict=True))},
        )
