"""HAWQ-V2: average Hessian trace times squared quantization error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.checkpoints.keys import TraceKey
from mpsearch.core.layer import Layer
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import differentiable_weights, gradient, hessian_products, rademacher
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import input_noise
from mpsearch.metrics.seeds import seeded_generator
from mpsearch.metrics.statistics import wide
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.running import Batch, samples
from mpsearch.quantizers.fake_quantization import inputs


@dataclass(frozen=True)
class HessianTrace:
    """Average Hessian trace of a layer times the squared error of quantizing it (HAWQ-V2, 1911.03852, section 3).

    For a weight W of n elements with perturbation D = Q(W) - W, and a layer input a with d = Q(a) - a,

        sensitivity = 1/2 tr(H_W) / n ||D||^2  +  1/2 tr(H_a) / n_a  mean over samples of ||d||^2   [nats],

    the second-order Taylor term for errors without preferred direction; HAWQ-V2 drops the factor 1/2. Traces come
    from Hutchinson's estimator with Rademacher probes z: tr(H_l) = E[z_l^T (H z)_l]. One probe covers all weights and
    inputs at once; the terms between layers vanish in expectation (methods: E[z_l^T H_lk z_k] = 0). The cost does not
    depend on the number of layers or precisions: per batch 1 forward, 1 backward and `num_samples` double backward
    passes.

    Attributes:
        num_samples: Hessian-vector products a batch (and layer, for hutch++); the standard error falls with its root.
        seed: of the probes.
        method: `hutchinson`, or `hutch++` (Meyer et al., 2010.09649): a third of the products finds the range in which a
            block's large eigenvalues lie, a third takes the trace there exactly, a third estimates the rest. Its error
            falls with num_samples rather than its root, where few eigenvalues dominate, but each layer needs products of its own.
            Inputs are probed by Hutchinson in either case.

    For the loss 1/2 (w1^2 + 3 w2^2) the Hessian is diagonal and every probe gives the trace 4 exactly:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 0.75)
    >>> loss = lambda model, batch: 0.5 * (torch.tensor([[1.0, 3.0]]) * model[0].weight ** 2).sum() + 0 * model(batch).sum()
    >>> table = mps.profile(model, [torch.ones(1, 2)], HessianTrace(2), mps.precisions("w4"), loss=loss,
    ...                     quantizer=lambda weight, precision: weight + 0.5)
    >>> table.sensitivity    # 1/2 * 4 / 2 * (0.5^2 + 0.5^2)
    array([[0.5]])
    """

    takes_all_weights: ClassVar[bool] = True

    num_samples: int = 32
    seed: int = 0
    method: Literal["hutchinson", "hutch++"] = "hutchinson"

    def __post_init__(self) -> None:
        least = 2 if self.method == "hutchinson" else 6
        if self.num_samples < least:
            raise EstimatorError(
                f"num_samples={self.num_samples}: expected {least} or more for {self.method}, for a standard error"
            )

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated twice, or a trace is not finite.
        """
        weights = differentiable_weights(context)
        activations = any(precision.quantizes_activation for precision in context.precisions)
        layers = [layer for decision in context.decisions for layer in decision.layers] if activations else []
        total = sum(samples(batch) for batch in context.batches)
        mean, variance = np.zeros(len(weights) + len(layers)), np.zeros(len(weights) + len(layers))
        for number, batch in enumerate(context.progress(context.batches, len(context.batches), "Hessian trace")):
            key = TraceKey(digest(described(self)), number)
            traces = context.checkpoint.get(key)
            if traces is None:
                traces = self._batch(context, weights, layers, batch, number)
                context.checkpoint.put(key, traces)
            share = samples(batch) / total
            mean += share * np.array(traces[0])
            variance += share**2 * np.array(traces[1])
        return self._cells(context, weights, layers, mean, variance)

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most; a decision counts one weight, a double backward pass two backward passes."""
        products = self.num_samples * (decisions + 1 if self.method == "hutch++" else 1)
        return Passes(2, 1 + 2 * products)

    def _batch(
        self, context: Context, weights: list[nn.Parameter], layers: list[Layer], batch: Batch, number: int
    ) -> tuple[list[float], list[float]]:
        """Mean trace of each weight, then of each layer's input, and their variances."""
        generator = seeded_generator(self.seed, number)
        seen: list[list[Tensor]] = [[] for _ in layers]
        modules = {context.module(layer): _recorder(seen[i]) for i, layer in enumerate(layers)}
        with (
            torch.enable_grad(),
            inputs(modules),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            loss = context.mean_loss(batch)
            blocks = [[w] for w in weights] + seen
            points = [point for block in blocks for point in block]
            gradients = gradient(loss, points, create_graph=True)
            curved = [(point, g) for point, g in zip(points, gradients, strict=True) if g.requires_grad]
            context.passes.add(len(context.batches), forward=1, backward=1)
            own = {id(w) for w in weights}
            if self.method == "hutchinson":
                values = self._hutchinson(context, blocks, curved, generator)
            else:
                first = [self._hutch_plus_plus(context, w, curved, generator) for w in weights]
                rest = [pair for pair in curved if id(pair[0]) not in own]
                values = first + self._hutchinson(context, seen, rest, generator)
        if not np.isfinite(values).all():
            raise EstimatorError(f"a Hessian trace is not finite in batch {number}")
        means, variances = [float(m) for m, _ in values], [float(v) for _, v in values]
        return means, variances

    def _hutchinson(
        self,
        context: Context,
        blocks: Sequence[Sequence[Tensor]],
        curved: Sequence[tuple[Tensor, Tensor]],
        generator: torch.Generator,
    ) -> list[tuple[float, float]]:
        """Trace of each block and its variance: z_l^T (H z)_l of probes over all blocks at once."""
        draws = np.zeros((self.num_samples, len(blocks)))
        block_of = {id(point): b for b, block in enumerate(blocks) for point in block}
        for probe in range(self.num_samples if curved else 0):
            signs = [rademacher(point, generator) for point, _ in curved]
            products = _products(curved, signs)
            context.passes.add(len(context.batches), backward=2)
            for (point, _), z, product in zip(curved, signs, products, strict=True):
                draws[probe, block_of[id(point)]] += float((product * z).sum())
        variances = draws.var(axis=0, ddof=1) / self.num_samples
        return list(zip(draws.mean(axis=0), variances, strict=True))

    def _hutch_plus_plus(
        self,
        context: Context,
        weight: nn.Parameter,
        curved: Sequence[tuple[Tensor, Tensor]],
        generator: torch.Generator,
    ) -> tuple[float, float]:
        """Trace of one block and its variance: exact on a sketch of its range, Hutchinson on the rest."""
        pair = [(point, slope) for point, slope in curved if point is weight]
        if not pair:
            return 0.0, 0.0
        third = min(self.num_samples // 3, weight.numel())

        def product(columns: Tensor) -> Tensor:
            """H times the columns of (n, k)."""
            products = []
            for column in columns.T:
                (product,) = _products(pair, [column.reshape(weight.shape)])
                context.passes.add(len(context.batches), backward=2)
                products.append(product.flatten())
            return torch.stack(products, 1)

        def signs() -> Tensor:
            return torch.stack([rademacher(weight, generator).flatten() for _ in range(third)], 1)

        basis, _ = torch.linalg.qr(product(signs()))
        exact = float((basis * product(basis)).sum())
        probes = signs()
        probes = probes - basis @ (basis.T @ probes)
        draws = (probes * product(probes)).sum(0)
        rest = float(draws.mean())
        return exact + rest, float(draws.var(correction=1)) / third if third > 1 else 0.0

    def _cells(
        self, context: Context, weights: list[nn.Parameter], layers: list[Layer], mean: np.ndarray, variance: np.ndarray
    ) -> Estimate:
        place = {parameter: i for i, parameter in enumerate(weights)}
        row = {layer.name: len(weights) + i for i, layer in enumerate(layers)}
        noises = input_noise(context) if layers else {}
        sensitivity = np.zeros((len(context.decisions), len(context.precisions)))
        squares = np.zeros_like(sensitivity)
        for u, decision in enumerate(context.decisions):
            terms = []
            for parameter, layer in context.parameters(decision).items():
                errors = [wide(context.perturbation(layer, p)).square().sum() for p in context.precisions]
                terms.append((place[parameter], np.array([float(e) for e in errors]) / parameter.numel()))
            for layer in decision.layers:
                if layer.name in row and noises[layer.name].numel:
                    terms.append((row[layer.name], noises[layer.name].noise / noises[layer.name].numel))
            for index, power in terms:
                sensitivity[u] += 0.5 * power * mean[index]
                squares[u] += (0.5 * power) ** 2 * variance[index]
        return Estimate(sensitivity, np.sqrt(squares), context.unit)


def _products(curved: Sequence[tuple[Tensor, Tensor]], directions: Sequence[Tensor]) -> list[Tensor]:
    return hessian_products([g for _, g in curved], [point for point, _ in curved], directions)


def _recorder(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def record(x: Tensor) -> Tensor:
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # through this layer alone
        seen.append(x)
        return x

    return record
