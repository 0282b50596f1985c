"""HAWQ-V2: average Hessian trace times squared quantization error."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimator import Estimate, Setting
from mpsearch.model import samples
from mpsearch.perturb import inputs
from mpsearch.relative import input_noise


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
        num_samples: probes a batch, at least 2; the standard error falls with its root.
        seed: of the probes.

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

    num_samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise EstimatorError(f"num_samples={self.num_samples}: expected 2 or more, for a standard error")

    def estimate(self, setting: Setting) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated twice, or a trace is not finite.
        """
        parameters = {p: None for unit in setting.units for p in setting.parameters(unit)}
        for parameter in setting.model.parameters():
            parameter.requires_grad_(parameter in parameters)
        activations = any(precision.quantizes_activation for precision in setting.precisions)
        order = list(parameters)
        layers = [layer for unit in setting.units for layer in unit.layers] if activations else []
        weight_trace, weight_var = np.zeros(len(order)), np.zeros(len(order))
        input_trace, input_var = np.zeros(len(layers)), np.zeros(len(layers))
        input_numel = np.zeros(len(layers))
        total = sum(samples(batch) for batch in setting.batches)
        generator = torch.Generator().manual_seed(self.seed)
        for number, batch in enumerate(setting.progress(setting.batches, len(setting.batches), "Hessian trace")):
            seen: list[list[Tensor]] = [[] for _ in layers]
            modules = {setting.module(layer): _recorder(seen[i]) for i, layer in enumerate(layers)}
            share = samples(batch) / total
            with (
                torch.enable_grad(),
                inputs(modules),
                torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            ):
                loss = setting.mean_loss(batch)
                points = [*order, *(x for xs in seen for x in xs)]
                weight_draws, input_draws = self._draws(loss, points, len(order), [len(xs) for xs in seen], generator)
            setting.passes.add(len(setting.batches), forward=1, backward=1 + 2 * self.num_samples)
            for trace, var, draws in (
                (weight_trace, weight_var, weight_draws),
                (input_trace, input_var, input_draws),
            ):
                if not np.isfinite(draws).all():
                    raise EstimatorError(f"a Hessian trace is not finite in batch {number}")
                if draws.shape[1]:
                    trace += share * draws.mean(axis=0)
                    var += share**2 * draws.var(axis=0, ddof=1) / self.num_samples
            input_numel += [share * sum(x.numel() for x in xs) / samples(batch) for xs in seen]
        traces = {p: (weight_trace[i] / p.numel(), math.sqrt(weight_var[i]) / p.numel()) for i, p in enumerate(order)}
        sensitivity, variance = self._weights(setting, traces)
        if activations:
            noises = input_noise(setting)
            row = 0
            for u, unit in enumerate(setting.units):
                for layer in unit.layers:
                    if input_numel[row]:
                        factor = 0.5 * noises[layer.name].noise / input_numel[row]
                        sensitivity[u] += factor * input_trace[row]
                        variance[u] += factor**2 * input_var[row]
                    row += 1
        return Estimate(sensitivity, np.sqrt(variance), "nats")

    def _draws(
        self, loss: Tensor, points: list[Tensor], weights: int, counts: list[int], generator: torch.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """z_l^T (H z)_l for each probe, of weights and of layer inputs."""
        try:
            gradients = torch.autograd.grad(loss, points, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
        draws = np.zeros((self.num_samples, len(points)))
        used = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        for probe in range(self.num_samples if used else 0):
            signs = [_rademacher(points[i], generator) for i in used]
            pairs = zip(used, signs, strict=True)
            dot = torch.stack([(gradients[i].double() * z).sum().cpu() for i, z in pairs]).sum()
            try:
                products = torch.autograd.grad(
                    dot,
                    [points[i] for i in used],
                    retain_graph=probe + 1 < self.num_samples,
                    allow_unused=True,
                )
            except RuntimeError as error:
                raise EstimatorError(f"the model cannot be differentiated twice: {error}") from None
            for i, z, product in zip(used, signs, products, strict=True):
                if product is not None:
                    draws[probe, i] = float((product.double() * z).sum())
        ends = weights + np.cumsum([0, *counts])
        spans = [draws[:, a:b].sum(axis=1) for a, b in itertools.pairwise(ends)]
        return draws[:, :weights], np.array(spans).T.reshape(self.num_samples, len(counts))

    def _weights(
        self, setting: Setting, traces: dict[nn.Parameter, tuple[float, float]]
    ) -> tuple[np.ndarray, np.ndarray]:
        sensitivity = np.zeros((len(setting.units), len(setting.precisions)))
        variance = np.zeros_like(sensitivity)
        for u, p in setting.cells():
            for parameter, layer in setting.parameters(setting.units[u]).items():
                squared = float(setting.perturbation(layer, setting.precisions[p]).double().square().sum())
                mean, se = traces[parameter]
                sensitivity[u, p] += 0.5 * mean * squared
                variance[u, p] += (0.5 * se * squared) ** 2
        return sensitivity, variance


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)  # on the CPU: same on every device
    return (2 * signs.to(like.device) - 1).double()


def _recorder(seen: list[Tensor]):  # type: ignore[no-untyped-def]
    def record(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        seen.append(x)
        return x

    return record
