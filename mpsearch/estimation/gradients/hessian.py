"""Gradients of weights, products of the Hessian with vectors, and what is made of these: the largest eigenvalue."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.seeds import Draw
from mpsearch.metrics.statistics import log_softmax, wide
from mpsearch.metrics.targets import Loss
from mpsearch.models.data.batches import mapped
from mpsearch.models.running import Batch, inputs_of, samples

#: The weights of some blocks of a Hessian, or one vector a weight, by number of the block.
Blocks = Mapping[int, Sequence[Tensor]]


def require_gradients(model: nn.Module, weights: Collection[nn.Parameter]) -> None:
    """Let these parameters of a model require a gradient, and no others."""
    chosen = set(weights)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in chosen)


def differentiable_weights(context: Context) -> list[nn.Parameter]:
    """The distinct weights of all decisions, in order; of all parameters only these require a gradient from here on."""
    weights = list({p: None for decision in context.decisions for p in context.parameters(decision)})
    require_gradients(context.model, weights)
    return weights


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
    run = context.run(batch)
    if not torch.isfinite(run.rows.detach()).all():
        raise EstimatorError("the output of the model is not finite")
    with_targets = Loss(metric.kind)
    targets = with_targets.targets(context.model, batch, run)
    if targets is not None:
        loss = with_targets.values(run.rows, targets).mean()
    elif metric.kind == "classes":
        log_p = log_softmax(run.rows)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
        loss = torch.nn.functional.nll_loss(log_p, drawn[:, 0].to(log_p.device))
    else:
        seed = int(torch.randint(2**31, (), generator=generator))
        loss = metric.drawn(run.rows, run.index, run.samples, Draw(seed, 0, 0)) / len(run.rows)
    if not torch.isfinite(loss.detach()):
        raise EstimatorError(f"the loss is {float(loss.detach())}, expected a finite number")
    return loss


def gradient(loss: Tensor, points: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients of a scalar, zeros at points that it does not depend on.

    Raises:
        EstimatorError: where it cannot be differentiated.
    """
    try:
        gradients = torch.autograd.grad(loss, points, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
    return [torch.zeros_like(x) if g is None else g for x, g in zip(points, gradients, strict=True)]


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of a tensor's shape, in the widest float of its device."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)  # on the CPU: same on every device
    return wide(2 * signs.to(like.device) - 1)


def hessian_products(gradients: Sequence[Tensor], points: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """H v = d<g, v> / dw: products of the Hessian with a vector, by one backward pass through the gradients (Pearlmutter 1994).

    Own code, since estimators need products of many blocks and of inputs from one forward pass, in the widest float and with
    zeros where a point has no curvature; `tests/estimation/test_curvature_oracle.py` compares it with curvlinops.

    Args:
        gradients: of the loss at each point, with their graph, which is kept.
        points: weights, or inputs of layers.
        vectors: of the shapes of the points.

    Returns:
        One product a point, in the widest float of its device.

    Raises:
        EstimatorError: where the model cannot be differentiated twice.

    The Hessian of 3/2 w1^2 + 1/2 w2^2 is diagonal, with 3 and 1:

    >>> w = torch.ones(2, requires_grad=True)
    >>> (g,) = torch.autograd.grad((torch.tensor([1.5, 0.5]) * w**2).sum(), w, create_graph=True)
    >>> hessian_products([g], [w], [torch.tensor([1.0, 2.0])])
    [tensor([3., 2.], dtype=torch.float64)]
    """
    parts = [(wide(g) * v).sum().cpu() for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not parts:
        return [wide(torch.zeros_like(v)) for v in vectors]
    try:
        products = torch.autograd.grad(torch.stack(parts).sum(), points, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise EstimatorError(f"the model cannot be differentiated twice: {error}") from None
    return [wide(torch.zeros_like(v)) if h is None else wide(h) for v, h in zip(vectors, products, strict=True)]


def top_eigenvalues(
    product: Callable[[Blocks], Blocks],
    starts: Sequence[Sequence[Tensor]],
    steps: Iterable[int],
    tolerance: float = 0.0,
) -> list[float]:
    """Eigenvalue of the largest absolute value of each block of a symmetric matrix, with its sign, by power iteration.

        v <- H v / |H v|,   lambda = <v, H v>     with |v| = 1

    Own code: a block is a few tensors that stay on their device, and blocks settle one by one, which scipy's `eigsh` on a
    flattened block does not do.

    Args:
        product: the blocks that have not settled, by number, with their directions -> H v of each.
        starts: the first direction of each block, of any length above 0.
        steps: one iteration each, at most.
        tolerance: a block has settled once its eigenvalue changes by less than this share of itself; 0: only where H v = 0.

    >>> matrix = torch.diag(torch.tensor([1.0, -3.0]))
    >>> values = top_eigenvalues(lambda blocks: {b: [matrix @ v] for b, (v,) in blocks.items()}, [[torch.ones(2)]], range(50))
    >>> [round(value, 6) for value in values]
    [-3.0]
    """
    directions: Blocks = dict(enumerate(starts))
    values = dict.fromkeys(directions, 0.0)
    lengths = {b: _length(vectors) for b, vectors in directions.items()}
    for _ in steps:
        directions = {
            b: [(v / lengths[b]).to(start) for v, start in zip(vectors, starts[b], strict=True)]
            for b, vectors in directions.items()
        }
        products = product(directions)
        following: dict[int, Sequence[Tensor]] = {}
        for b, vectors in directions.items():
            value = sum(float((wide(v) * p).sum()) for v, p in zip(vectors, products[b], strict=True))
            lengths[b] = _length(products[b])
            settled = bool(tolerance) and abs(value - values[b]) <= tolerance * (abs(value) + 1e-12)
            values[b] = value
            if lengths[b] and not settled:
                following[b] = products[b]
        directions = following
        if not directions:
            break
    return list(values.values())


def _length(vectors: Sequence[Tensor]) -> float:
    """Euclidean norm of a few tensors as one vector."""
    return math.hypot(*(float(v.norm()) for v in vectors))


def mean_gradient(context: Context, weights: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    """Gradient of the mean of `supervised_loss` over all samples, float32 or wider; one forward and one backward pass.

    Raises:
        EstimatorError: where the loss cannot be differentiated, or the gradient is not finite.
    """
    total = sum(samples(batch) for batch in context.batches)
    generator = torch.Generator().manual_seed(seed)
    means = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    for number, batch in enumerate(context.progress(context.batches, len(context.batches), "gradient")):
        with torch.enable_grad():
            parts = gradient(supervised_loss(context, batch, generator), weights)
        for whole, part in zip(means, parts, strict=True):
            if not torch.isfinite(part).all():
                raise EstimatorError(f"a gradient is not finite in batch {number}")
            whole.add_(part.to(whole.dtype), alpha=samples(batch) / total)
        context.passes.add(len(context.batches), forward=1, backward=1)
    return means


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
