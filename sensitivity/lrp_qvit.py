"""LRP-QViT and Mix-QViT: bits by relevance."""

from dataclasses import dataclass, field

import numpy as np

from mpsearch.core.precision import Precision
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import Floats, relative_error
from mpsearch.sensitivity.kl_divergence import KLDivergence
from mpsearch.sensitivity.lrp import LRP, unit_relevance

#: Bits of what is left alone.
FULL_BITS = 16


@dataclass(frozen=True)
class LRPQViT:
    """More bits to layers with more relevance (LRP-QViT, 2401.11243).

    The part of a layer in the relevance of all, over the calibration data, times the part of its bits that a precision takes
    away:

        Omega(l) = score(l) / sum of the scores of all decisions,    score as in `LRP`
        sensitivity(l, o) = Omega(l) x (32 - weight bits - input bits) / 32, and 0 where nothing changes   [relative]

    with 16 bits for what is left alone. The cheapest plan within a budget is then the one with the most bits weighted by
    relevance, max sum Omega(l) bits(l): a reading of the paper's assignment from its abstract ("mixed-precision bit allocations to
    different layers based on their importance"); its clipped channel-wise quantizer is no part of it. A baseline: a
    bit is taken to be worth the same at 2 as at 8, and the quantizer is not asked. `LRP` asks it, and is better.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.81, 0.52 among plans of equal size; its own plans do 10.14 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        lrp: rules and score.

    The scores of the example of `LRP` are 5 and 1, so Omega is 5/6 and 1/6; 12 of 32 bits are taken away:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(2 * torch.eye(2)), model[1].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> table = mps.profile(model, [torch.tensor([[1.0, 2.0]])], LRPQViT(), mps.precisions("w4 w16"),
    ...                     quantizer=lambda weight, precision: 1.5 * weight)
    >>> table.sensitivity.round(4)    # 5/6 x 12/32, 1/6 x 12/32
    array([[0.3125, 0.    ],
           [0.0625, 0.    ]])
    """

    lrp: LRP = field(default_factory=LRP)

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """The passes that `LRP` takes, with the same settings."""
        return self.lrp.cost(batches, decisions, precisions)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: as `LRP`.
        """
        share, share_se = _shares(self.lrp, context)
        taken = (relative_error(context) > 0) * np.array([_taken(precision) for precision in context.precisions])
        return Estimate(share[:, None] * taken, share_se[:, None] * taken, "relative")


@dataclass(frozen=True)
class MixQViT:
    """Relevance times measured sensitivity (Mix-QViT, 2501.06357).

        sensitivity(l, o) = Omega(l) x D(l, o)   [relative]

    with Omega as in `LRPQViT` and D the damage with layer l at o and all else left alone. The paper measures the performance that is lost
    ("layer importance" and "quantization sensitivity" of its abstract); here D is the divergence of `KLDivergence`, which
    needs no labels. A baseline: D alone is the damage, in nats, and includes that the layer matters; the product counts it twice.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.89, 0.71 among plans of equal size; its own plans do 1.51 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        lrp: rules and score.

    Omega of the only layer is 1, which leaves the divergence, ln((1 + e) / 2) - 1/2:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [1.0]]))
    >>> shift = lambda weight, precision: weight + torch.tensor([[1.0], [0.0]])
    >>> mps.profile(model, [torch.ones(1, 1)], MixQViT(), mps.precisions("w4 w16"), quantizer=shift).sensitivity.round(4)
    array([[0.1201, 0.    ]])
    """

    lrp: LRP = field(default_factory=LRP)

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Those of `KLDivergence`, and one forward and one backward pass for the relevance."""
        measured = KLDivergence().cost(batches, decisions, precisions)
        return Passes(measured.forward + 1, measured.backward + 1)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: as `LRP` and `KLDivergence`.
        """
        share, share_se = _shares(self.lrp, context)
        measured = KLDivergence().estimate(context)
        se = None
        if measured.sensitivity_se is not None:
            se = np.hypot(share[:, None] * measured.sensitivity_se, share_se[:, None] * measured.sensitivity)
        return Estimate(share[:, None] * measured.sensitivity, se, "relative")


def _shares(lrp: LRP, context: Context) -> tuple[Floats, Floats]:
    """(D,) parts of the decisions in the score of all, and their standard errors for a given total."""
    score, se = unit_relevance(lrp, context)
    total = score.sum() if score.any() else 1.0
    return score / total, se / total


def _taken(precision: Precision) -> float:
    """Part of the bits of weight and input that a precision takes away."""
    bits = min(precision.weight_bits, FULL_BITS) + min(precision.activation_bits, FULL_BITS)
    return 1 - bits / (2 * FULL_BITS)
