"""ZeroQ: divergence of the output when one layer is quantized."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimator import Estimate, Setting
from mpsearch.measure import Mean, kl_divergence
from mpsearch.model import Batch, call, predictions, samples
from mpsearch.perturb import quantized

#: Reference logits kept at once; more batches than fit are done in turns, each quantizing every cell anew.
REFERENCE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class KLDivergence:
    """Measured divergence of the output with one unit quantized and all else left alone (ZeroQ, 2001.00281, equation 2).

        sensitivity(l, o) = mean over predictions of KL(p_unquantized || p_with l at o)   [nats]

    A prediction is a sample, or a token of a language model. No labels, no gradients; one forward pass a cell, none
    for a cell whose weights already lie on the grid: there the value is 0 exactly. The standard error is over samples.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0], [0.0]]))
    >>> shift = lambda weight, precision: weight + torch.tensor([[1.0], [0.0]])   # logits (1, 0)
    >>> table = mps.profile(model, [torch.ones(1, 1)], KLDivergence(), mps.precisions("w4 w16"), quantizer=shift)
    >>> table.sensitivity.round(4)    # ln((1 + e) / 2) - 1/2
    array([[0.1201, 0.    ]])
    """

    def estimate(self, setting: Setting) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the output of the model is not finite.
        """
        means = {cell: Mean() for cell in setting.cells()}
        bar = setting.progress(None, len(means) * len(setting.batches), "KL divergence")
        with torch.no_grad(), bar:
            for turn in _turns(setting):
                for (u, p), mean in means.items():
                    self._cell(setting, u, p, turn, mean)
                    bar.update(len(turn))
        shape = (len(setting.units), len(setting.precisions))
        value = np.array([mean.value for mean in means.values()]).reshape(shape)
        se = np.array([mean.se for mean in means.values()]).reshape(shape)
        return Estimate(value, se, "nats")

    def _cell(
        self, setting: Setting, u: int, p: int, turn: list[tuple[int, Batch, Tensor, Tensor]], mean: Mean
    ) -> None:
        unit, precision = setting.units[u], setting.precisions[p]
        chosen = {layer.name: precision for layer in unit.layers}
        with quantized(setting.model, chosen, setting.quantizer, setting.ranges) as changed:
            for number, batch, reference, index in turn:
                if changed:
                    logits, _, _ = predictions(setting.model, call(setting.model, batch), batch)
                    setting.passes.add(len(setting.batches), forward=1)
                    divergence = kl_divergence(reference, logits)
                else:
                    divergence = torch.zeros(len(index))
                if not torch.isfinite(divergence).all():
                    bad = float(divergence[~torch.isfinite(divergence)][0])
                    raise EstimatorError(
                        f"sensitivity of layer {unit.name!r} at {precision} is {bad}, expected a finite number "
                        f"(kl-divergence, batch {number})"
                    )
                mean.add(divergence, index, samples(batch))


def _turns(setting: Setting) -> Iterator[list[tuple[int, Batch, Tensor, Tensor]]]:
    """Batches with their number, reference logits and sample index, as many at once as `REFERENCE_BYTES` holds."""
    turn: list[tuple[int, Batch, Tensor, Tensor]] = []
    held = 0
    for number, batch in enumerate(setting.batches):
        reference, _, index = predictions(setting.model, call(setting.model, batch), batch)
        setting.passes.add(len(setting.batches), forward=1)
        turn.append((number, batch, reference, index))
        held += reference.numel() * reference.element_size()
        if held >= REFERENCE_BYTES:
            yield turn
            turn, held = [], 0
    if turn:
        yield turn
