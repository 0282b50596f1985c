"""MixDQ and ViDiT-Q: each group of layers judged by a metric of its own."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.statistics import Mean
from mpsearch.sensitivity.kl_divergence import KLDivergence


@dataclass(frozen=True)
class Part:
    """Layers that are judged together.

    Attributes:
        pattern: of layer names, as in a shell: `*.attn.*`.
        metric: a measuring estimator whose `damage` judges them.
        share: weight of this part against the others; its cells are scaled so that its mean cell is this.
    """

    pattern: str
    metric: OneAtATime
    share: float = 1.0


@dataclass(frozen=True)
class MetricDecoupled(OneAtATime):
    """Each part of the model measured by its own metric (MixDQ, 2405.17873, section 3.3; ViDiT-Q, 2406.02540).

        sensitivity(l, o) = share_g x damage_g(l, o) / mean of damage_g over the cells of part g   [relative]

    MixDQ judges layers that form the content of an image by structural similarity and all others by noise power, and
    gives each group its share of the budget. Metrics of different units cannot be added: here each part is brought to
    mean 1 and weighted by its share, so that one solve splits the budget; sweep the shares as the paper sweeps its
    budget ratio. The first pattern that fits a layer counts; the layers that none fits are refused. A group lies in
    the part of its first layer. Cost as `KLDivergence`.

    Attributes:
        parts: `Part(pattern, metric, share)`, at least one.

    >>> import torch, mpsearch as mps
    >>> from mpsearch.sensitivity import OutputMSE
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    >>> _ = [torch.nn.init.ones_(layer.weight) for layer in model]
    >>> split = MetricDecoupled((Part("0", OutputMSE(), 3.0), Part("*", OutputMSE(), 1.0)))
    >>> mps.profile(model, [torch.ones(1, 1)], split, mps.precisions("w4"), quantizer=lambda w, p: w + 1).sensitivity
    array([[3.],
           [1.]])
    """

    unit: ClassVar[str] = "relative"

    parts: tuple[Part, ...] = (Part("*", KLDivergence()),)

    def __post_init__(self) -> None:
        if not self.parts:
            raise EstimatorError("parts is empty: expected Part(pattern, metric, share), at least one")
        for part in self.parts:
            if not part.share > 0:
                raise EstimatorError(f"share={part.share} of part {part.pattern!r}: expected a number above 0")

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """True where a part's metric does."""
        return any(part.metric.needs_labels for part in self.parts)

    def _part(self, context: Context, u: int) -> Part:
        name = context.decisions[u].layers[0].name
        for part in self.parts:
            if fnmatch.fnmatchcase(name, part.pattern):
                return part
        patterns = ", ".join(repr(part.pattern) for part in self.parts)
        raise EstimatorError(f"layer {name!r} fits none of the patterns {patterns}; add Part('*', ...) for the rest")

    def probes(self, context: Context) -> list[Probe]:
        """Each decision at each precision."""
        for u in range(len(context.decisions)):
            self._part(context, u)
        return super().probes(context)

    def by_rows(self, context: Context) -> bool:
        """True where all parts are."""
        return all(part.metric.by_rows(context) for part in self.parts)

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """Judged by the part's metric."""
        return self._part(context, probe.decision).metric.damage(context, probe, reference, output)

    def finish(self, context: Context, means: Mapping[tuple[int, str], Mean]) -> Estimate:
        """Each part brought to its share."""
        plain = super().finish(context, means)
        value = plain.sensitivity.copy()
        se = np.zeros_like(value) if plain.sensitivity_se is None else plain.sensitivity_se.copy()
        facts: dict[str, Any] = {}
        for part in self.parts:
            rows = [u for u in range(len(context.decisions)) if self._part(context, u) is part]
            mean = float(np.abs(value[rows]).mean()) if rows else 0.0
            if mean > 0:
                value[rows] *= part.share / mean
                se[rows] *= part.share / mean
            facts[part.pattern] = {"metric": repr(part.metric), "units": len(rows), "mean": mean}
        return Estimate(value, se, "relative", {"parts": facts})
