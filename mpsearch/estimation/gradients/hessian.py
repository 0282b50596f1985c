"""Gradients of weights, for the proxies that are built from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.estimator import Context
from mpsearch.metrics.comparisons import Comparison, Loss
from mpsearch.metrics.statistics import log_softmax, wide
from mpsearch.models.data.batches import mapped
from mpsearch.models.running import Batch, inputs_of, samples


def differentiated(context: Context) -> list[nn.Parameter]:
    """The distinct weights of all units, in order; of all parameters only these require a gradient from here on."""
    weights = {p: None for decision in context.decisions for p in context.parameters(decision)}
    for parameter in context.model.parameters():
        parameter.requires_grad_(parameter in weights)
    return list(weights)


def supervised_loss(context: Context, batch: Batch, generator: torch.Generator) -> Tensor:
    """A loss with a gradient: the context's, or in place of a comparison, whose gradient at the model itself is 0, that with targets.

    Targets are the data's where the batch has them, else drawn from the model's own predictions.

    Args:
        context: tells the loss.
        batch: one batch; one forward pass.
        generator: of the draws, on the CPU.

    Returns:
        A scalar in the graph, the mean over predictions.

    Raises:
        EstimatorError: where it is no finite scalar.
    """
    metric = context.loss
    if not isinstance(metric, Comparison):
        return context.mean_loss(batch)
    found = context.run(batch)
    if not torch.isfinite(found.rows.detach()).all():
        raise EstimatorError("the output of the model is not finite")
    with_targets = Loss(metric.kind)
    targets = with_targets.targets(context.model, batch, found)
    if targets is not None:
        loss = with_targets.values(found.rows, targets).mean()
    elif metric.kind == "classes":
        log_p = log_softmax(found.rows)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
        loss = torch.nn.functional.nll_loss(log_p, drawn[:, 0].to(log_p.device))
    else:
        seed = int(torch.randint(2**31, (), generator=generator))
        loss = metric.drawn(found.rows, found.index, found.samples, (seed, 0), 0) / len(found.rows)
    if not torch.isfinite(loss.detach()):
        raise EstimatorError(f"the loss is {float(loss.detach())}, expected a finite number")
    return loss


def gradient(loss: Tensor, points: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients of a scalar, zeros at points that it does not depend on.

    Raises:
        EstimatorError: where it cannot be differentiated.
    """
    try:
        found = torch.autograd.grad(loss, points, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
    return [torch.zeros_like(x) if g is None else g for x, g in zip(points, found, strict=True)]


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of a tensor's shape, in the widest float of its device."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)  # on the CPU: same on every device
    return wide(2 * signs.to(like.device) - 1)


def hessian_products(
    slopes: Sequence[Tensor], weights: Sequence[nn.Parameter], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Hessian-vector products in the widest float, from gradients with their graph; the graph is kept.

    Raises:
        EstimatorError: where the model cannot be differentiated twice.
    """
    parts = [(wide(g) * v).sum().cpu() for g, v in zip(slopes, vectors, strict=True) if g.requires_grad]
    if not parts:
        return [torch.zeros_like(v) for v in vectors]
    try:
        found = torch.autograd.grad(torch.stack(parts).sum(), weights, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise EstimatorError(f"the model cannot be differentiated twice: {error}") from None
    return [torch.zeros_like(v) if h is None else wide(h) for v, h in zip(vectors, found, strict=True)]


def mean_gradient(context: Context, weights: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    """Gradient of the mean of `supervised_loss` over all samples, float32 or wider; one forward and one backward pass.

    Raises:
        EstimatorError: where the loss cannot be differentiated, or the gradient is not finite.
    """
    total = sum(samples(batch) for batch in context.batches)
    generator = torch.Generator().manual_seed(seed)
    found = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    for number, batch in enumerate(context.progress(context.batches, len(context.batches), "gradient")):
        with torch.enable_grad():
            parts = gradient(supervised_loss(context, batch, generator), weights)
        for whole, part in zip(found, parts, strict=True):
            if not torch.isfinite(part).all():
                raise EstimatorError(f"a gradient is not finite in batch {number}")
            whole.add_(part.to(whole.dtype), alpha=samples(batch) / total)
        context.passes.add(len(context.batches), forward=1, backward=1)
    return found


def ones_like_sample(batch: Batch, dtype: torch.dtype | None = None) -> Batch:
    """The first sample of a batch with every floating-point input set to 1; token numbers stay.

    Args:
        batch: any batch.
        dtype: of the ones; the input's own where None.

    >>> ones_like_sample((torch.zeros(4, 2), torch.zeros(4)))
    (tensor([[1., 1.]]), None)
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        first = leaf[:1] if leaf.ndim else leaf
        return torch.ones_like(first, dtype=dtype) if leaf.is_floating_point() else first

    inputs = mapped(inputs_of(batch), one)
    return inputs if isinstance(inputs, Mapping) else (inputs, None)
