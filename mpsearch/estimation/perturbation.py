"""One perturbation at a time: each decision perturbed with all else left alone, and the output compared."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate, Members
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.probes import Output, Perturbation, Probe, ProbeKey
from mpsearch.estimation.replayed_probes import replayed
from mpsearch.estimation.streamed_probes import streamed
from mpsearch.metrics.statistics import Mean
from mpsearch.quantizers.fake_quantization import input_quantizers


class OneAtATime:
    """An estimator that measures; subclasses say what is put in (`probes`), what is read (`damage`), and what follows (`finish`).

    Attributes:
        unit: of the table, `nats` or `relative`.
        needs_labels: True where `damage` reads them.
        scores_caches: True where the probes perturb a cache of keys or values.
        scores_members: `runs` where decisions may overlap, each of them taking its runs: layers of a tie are scored alone too.
    """

    unit: ClassVar[str] = "relative"
    needs_labels: ClassVar[bool] = False
    scores_caches: ClassVar[bool] = True
    scores_members: ClassVar[Members] = "no"

    @staticmethod
    def together(context: Context, estimators: Sequence[Any]) -> list[Estimate]:
        """Score for several estimators of this kind, running each probe once."""
        return one_at_a_time(context, estimators)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the output of the model is not finite, or labels that are needed are missing.
        """
        return one_at_a_time(context, [self])[0]

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most: re-runs skip what a perturbation cannot change.

        A model whose calls depend on the data shows it at the end of a turn of batches, which is then taken again.
        """
        return Passes(1 + (1 + 1 / batches) + decisions * self.probes_per_unit(precisions), 0)

    def probes_per_unit(self, precisions: int) -> int:
        """Number of perturbations of each decision."""
        return precisions

    def probes(self, context: Context) -> list[Probe]:
        """By default each decision at each precision."""
        return [
            Probe(u, str(context.precisions[p]), functools.partial(_cell, context, u, p)) for u, p in context.cells()
        ]

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) damage of each prediction, or one number for the batch; larger = worse, 0 for equal outputs."""
        raise NotImplementedError

    def by_rows(self, context: Context) -> bool:
        """True where damage and weight of a prediction come from its own row alone, so that rows can be taken a few at a time."""
        return False

    def weights(self, context: Context, reference: Output) -> Tensor | None:
        """(N,) what each prediction weighs in the mean; None: alike."""
        return None

    def finish(self, context: Context, means: Mapping[ProbeKey, Mean]) -> Estimate:
        """By default the mean damage of each cell."""
        names = [str(precision) for precision in context.precisions]
        value = np.array([[means[u, name].value for name in names] for u in range(len(context.decisions))])
        se = np.array([[means[u, name].se for name in names] for u in range(len(context.decisions))])
        return Estimate(value, se, self.unit)


def one_at_a_time(context: Context, estimators: Sequence[OneAtATime]) -> list[Estimate]:
    """Run every probe of every estimator once, sharing runs, and re-run only what a probe can change.

    A decision at depth d costs the part of a forward pass behind d (`mpsearch.estimation.replayed_probes`); a probe that changes nothing
    is 0. A model whose weights lie elsewhere is run block by block (`mpsearch.estimation.streamed_probes`).

    Observers of the context are shown every output beside the unquantized one. Results of each probe and turn go to the checkpoint as
    they are finished, and what an observer was shown is written down there, so that it is shown what it has not seen.
    """
    for estimator in estimators:
        if estimator.needs_labels and not context.has_labels():
            raise EstimatorError(f"{estimator!r} needs labels; give batches (inputs, targets)")
    probes: dict[ProbeKey, Probe] = {}
    readers: dict[ProbeKey, list[OneAtATime]] = {}
    for estimator in dict.fromkeys(estimators):  # an estimator given twice runs once
        for probe in estimator.probes(context):
            probes.setdefault((probe.decision, probe.name), probe)
            readers.setdefault((probe.decision, probe.name), []).append(estimator)
    with torch.no_grad(), context.progress(None, len(probes) * len(context.batches), "One at a time") as bar:
        means = (replayed if context.blocks is None else streamed)(context, probes, readers, bar)
    return [
        estimator.finish(context, {key: means[estimator, key] for key in probes if (estimator, key) in means})
        for estimator in estimators
    ]


def _cell(context: Context, u: int, p: int) -> Perturbation:
    decision, precision = context.decisions[u], context.precisions[p]
    parameters = context.parameters(decision) if precision.quantizes_weight else {}
    return Perturbation(
        {parameter: functools.partial(context.quantized, layer, precision) for parameter, layer in parameters.items()},
        input_quantizers(
            context.model,
            dict.fromkeys([layer.name for layer in decision.layers], precision),
            context.quantizer,
            context.ranges,
        ),
    )
