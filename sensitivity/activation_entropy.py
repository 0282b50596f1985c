"""QuantMCU: entropy that a feature map loses, against computation saved."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.decision import Decision
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.weights import layer_of
from mpsearch.models.observing import Observer, observed
from mpsearch.models.running import call

#: Bits of the reference: QuantMCU starts from 8-bit feature maps.
REFERENCE_BITS = 8


@dataclass(frozen=True)
class ActivationEntropy:
    """Value-driven quantization score of feature maps (VDQS and VDPC of QuantMCU, 2401.13714).

        sensitivity(l, p) = r (H_l(8) - H_l(b)) / sum_k H_k(8) - (1 - r) (8 - b) macs_l / (8 sum_k macs_k)    [relative]

    r is `accuracy_weight`. H_l(b) is the Shannon entropy in bits of the layer's input (its output, where the input is
    token numbers), quantized to 2^b equal steps over its calibrated range. b is the number of activation bits of p, or
    of weight bits where p leaves inputs alone: the paper's layers have one number. From 8 bits on the score is 0. The
    second term is the share of BitOps saved, for use without a budget of BitOps; it is off by default, since a budget
    counts them better. The sensitivity is the paper's score with the sign turned round; its normalizers, weight and
    tail are not checked against the authors' code.

    Outlier class: patches of a map that hold a value further from the mean than `tail` standard deviations of a
    Gaussian fit; the paper keeps what follows them at 8 bits. Their share of the map is reported in the table's origin
    as `outlier_patches`, and in a layer where it exceeds `outlier_share` fewer than 8 bits are not allowed (nan), as
    far as a precision of 8 bits or more is among the options. A baseline: entropy measures the tensor, is bounded by b
    and says nothing of the loss. Two forward passes, whatever the precisions.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.79, 0.37 among plans of equal size; its own plans do 13.64 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        accuracy_weight: of the entropy against the computation, above 0 to 1.
        patches: along each axis of a map; tokens count as one axis.
        tail: standard deviations beyond which a value is an outlier.
        outlier_share: of the patches, at most, in a layer that may go below 8 bits; 1 forces none.

    Inputs 0, 1, 2, 3 have 2 bits of entropy, and 1 bit in two steps:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    >>> data = [torch.tensor([[0.0], [1.0], [2.0], [3.0]])]
    >>> mps.profile(model, data, ActivationEntropy(), mps.precisions("w1 w2 w8"), quantizer=lambda w, p: w + 1).sensitivity
    array([[0.5, 0. , 0. ]])
    """

    accuracy_weight: float = 1.0
    patches: int = 4
    tail: float = 4.0
    outlier_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.accuracy_weight <= 1:
            raise EstimatorError(f"accuracy_weight={self.accuracy_weight}: expected more than 0, at most 1")
        if self.patches < 1:
            raise EstimatorError(f"patches={self.patches}: expected 1 or more")
        if not self.tail > 0:
            raise EstimatorError(f"tail={self.tail}: expected more than 0 standard deviations")
        if not 0 <= self.outlier_share <= 1:
            raise EstimatorError(f"outlier_share={self.outlier_share}: expected 0 to 1")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Two forward passes: the first tells the range of codes and the mean, the second counts."""
        return Passes(forward=2)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where a feature map is not finite.
        """
        layers = {layer.name: layer for decision in context.decisions for layer in decision.layers}
        maps = {name: _FeatureMap(layer) for name, layer in layers.items()}
        with context.progress(None, 2 * len(context.batches), "activation entropy") as bar:
            _look(context, {name: feature_map.measure for name, feature_map in maps.items()}, bar.update)
            for feature_map in maps.values():
                feature_map.check()
            _look(
                context,
                {name: feature_map.counter(self.patches, self.tail) for name, feature_map in maps.items()},
                bar.update,
            )
        bits = np.array([[_bits(context, decision, p) for p in context.precisions] for decision in context.decisions])
        entropy_total = sum(feature_map.entropy(REFERENCE_BITS) for feature_map in maps.values()) or 1.0
        macs_total = sum(layer.macs for layer in layers.values()) or 1
        shares = {name: feature_map.outliers / max(feature_map.patches, 1) for name, feature_map in maps.items()}
        sensitivity = np.zeros((len(context.decisions), len(context.precisions)))
        for u, p in context.cells():
            for layer in context.decisions[u].layers:
                feature_map = maps[layer.name]
                lost = (feature_map.entropy(REFERENCE_BITS) - feature_map.entropy(bits[u, p])) / entropy_total
                saved = (REFERENCE_BITS - bits[u, p]) * layer.macs / (REFERENCE_BITS * macs_total)
                sensitivity[u, p] += self.accuracy_weight * lost - (1 - self.accuracy_weight) * saved
        for u, decision in enumerate(context.decisions):
            forced = any(shares[layer.name] > self.outlier_share for layer in decision.layers)
            if forced and bits[u].max() == REFERENCE_BITS:
                sensitivity[u, bits[u] < REFERENCE_BITS] = np.nan
        return Estimate(sensitivity, None, "relative", {"outlier_patches": shares})


@dataclass
class _FeatureMap:
    """Running statistics of the map that a layer works on."""

    layer: Layer
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    histogram: Tensor = field(default_factory=lambda: torch.zeros(2**REFERENCE_BITS, dtype=torch.long))
    patches: int = 0
    outliers: int = 0

    def measure(self, x: Tensor, output: Tensor) -> None:
        """First pass: range and moments."""
        x = self._map(x, output)
        if x.numel():
            self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
            self.count += x.numel()
            self.sums = [self.sums[0] + float(wide(x).sum()), self.sums[1] + float(wide(x).square().sum())]

    def check(self) -> None:
        """Refuse what is not finite."""
        if self.count and not math.isfinite(self.sums[1]):
            raise EstimatorError(
                f"the feature map of layer {self.layer.name!r} ranges from {self.low} to {self.high}, expected finite numbers"
            )

    def counter(self, patches: int, tail: float) -> Observer:
        """Second pass: histogram of 2^8 steps, and patches with outliers."""
        mean = self.sums[0] / max(self.count, 1)
        limit = tail * math.sqrt(max(self.sums[1] / max(self.count, 1) - mean**2, 0.0))
        step = (self.high - self.low) / 2**REFERENCE_BITS

        def see(x: Tensor, output: Tensor) -> None:
            x = self._map(x, output)
            if step > 0:
                codes = ((wide(x) - self.low) / step).long().clamp(0, 2**REFERENCE_BITS - 1)
                self.histogram += torch.bincount(codes.reshape(-1), minlength=2**REFERENCE_BITS).cpu()
                far = _patches((x.float() - mean).abs().amax(1 if self._channels_first else -1), patches)
                self.patches += far.numel()
                self.outliers += int((far > limit).sum())

        return see

    def entropy(self, bits: int) -> float:
        """Shannon entropy in bits of the map in 2^bits steps: neighbours of the finest histogram merged."""
        counts = self.histogram.reshape(1 << int(bits), -1).sum(1).double()
        share = counts[counts > 0] / max(float(counts.sum()), 1.0)
        return max(0.0, float(-(share * share.log2()).sum()))

    @property
    def _channels_first(self) -> bool:
        return self.layer.kind.startswith("conv")

    def _map(self, x: Tensor, output: Tensor) -> Tensor:
        return (x if x.is_floating_point() else output).detach()


def _bits(context: Context, decision: Decision, precision: Precision) -> int:
    """Bits of the map, at most those of the reference, which also stands for weights that already lie on the grid."""
    if precision.quantizes_activation:
        return min(precision.activation_bits, REFERENCE_BITS)
    if not any(context.perturbation(layer, precision).any() for layer in context.parameters(decision).values()):
        return REFERENCE_BITS
    return min(precision.weight_bits, REFERENCE_BITS)


def _look(context: Context, observers: dict[str, Observer], advance: Callable[[], object]) -> None:
    """One forward pass over the data, in which each function sees the input and output of its layer."""
    modules: dict[nn.Module, Observer] = {layer_of(context.model, name): see for name, see in observers.items()}
    with torch.no_grad(), observed(modules):
        for batch in context.batches:
            call(context.model, batch)
            context.passes.add(len(context.batches), forward=1)
            advance()


def _patches(x: Tensor, patches: int) -> Tensor:
    """Largest value of each patch of (samples, *places)."""
    x = x.flatten(3) if x.ndim > 4 else x
    places = x.ndim - 1
    if not places:
        return x
    pool = (nn.functional.adaptive_max_pool1d, nn.functional.adaptive_max_pool2d, nn.functional.adaptive_max_pool3d)
    size = [min(patches, n) for n in x.shape[1:]]
    pooled: Tensor = pool[places - 1](x[:, None], size if places > 1 else size[0])
    return pooled
