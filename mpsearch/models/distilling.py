"""Calibration data made from the model alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch.core.settings import checked_number
from mpsearch.errors import EstimatorError
from mpsearch.models.running import call, check_values, device_of, preserved

#: ZeroQ's settings: Adam's first step, and the least after plateaus of 100 iterations.
LEARNING_RATE, LEAST_LEARNING_RATE, PATIENCE = 0.5, 1e-4, 100
#: Added to variances before the root.
_EPSILON = 1e-6

_BatchNorm = nn.modules.batchnorm._BatchNorm


def distill_data(
    model: nn.Module,
    shape: Sequence[int],
    *,
    num_samples: int = 128,
    batch_size: int = 64,
    iterations: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> list[Tensor]:
    """Make calibration data from a model alone, to profile without any of its own.

    With batch norm, as in ZeroQ (2001.00281): standard normal noise is changed by Adam until the inputs
    of each batch norm have the mean and standard deviation that it remembers from training, and the data itself mean 0
    and standard deviation 1:

        loss = sum over batch norms, and the data, of ||mean - mean_r||^2 + ||sigma - sigma_r||^2

    Statistics run over samples and places, one for each channel. ZeroQ's code compares the statistics of single
    samples with those of the training set; the paper's batch statistics are compared here.

    Without batch norm nothing is remembered, so nothing is matched: a model that begins with an embedding gets tokens
    drawn uniformly from the vocabulary, any other standard normal noise. These are weaker: measured KL on random
    tokens covers all of the vocabulary and none of its syntax.

    Args:
        model: any module; it comes back bit for bit as it went in.
        shape: of one sample: `(3, 32, 32)`, or `(128,)` tokens.
        num_samples: in all.
        batch_size: matched together; statistics of few samples cannot be matched well.
        iterations: a batch.
        seed: of noise and tokens.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        Batches without labels, on the model's device: floats in the model's dtype, or int64 tokens.

    Raises:
        EstimatorError: for settings below 1, a model that does not take such samples, or a loss that is not finite.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> _ = model[0].running_mean.fill_(0.5)    # asked for a mean of 0 and of 0.5, the data settles half way
    >>> round(float(distill_data(model, (1,), num_samples=64, progress=False)[0].mean()), 2)
    0.25
    """
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("iterations", iterations)):
        checked_number(value, name, int, 1, EstimatorError)
    checked_number(seed, "seed", int, 0, EstimatorError)
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    sizes = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    vocabulary = None if norms else _vocabulary(model)
    if vocabulary is not None:
        return [torch.randint(vocabulary, (size, *shape), generator=generator).to(device) for size in sizes]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    noise = [torch.randn(size, *shape, generator=generator).to(device) for size in sizes]
    if norms:
        bar = tqdm(total=iterations * len(noise), desc="distill data", disable=None if progress else True, leave=False)
        check_values(model)
        with preserved(model), bar:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            noise = [_matched(model, norms, x, dtype, iterations, bar.update) for x in noise]
    return [x.to(dtype) for x in noise]


def statistics_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Squared distance of the statistics in front of each batch norm, and of the data, from those that are wanted; a scalar in the graph.

    Args:
        model: in evaluation mode.
        x: (samples, channels, ...) data.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    return _loss(model, norms, x, dtype)


def _matched(
    model: nn.Module,
    norms: Sequence[_BatchNorm],
    x: Tensor,
    dtype: torch.dtype,
    iterations: int,
    advance: Callable[[], object],
) -> Tensor:
    """Data whose statistics match."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=LEAST_LEARNING_RATE, patience=PATIENCE)
    for iteration in range(iterations):
        with torch.enable_grad():
            loss = _loss(model, norms, x, dtype)
            value = float(loss.detach())
            if value != value or value in (float("inf"), float("-inf")):
                raise EstimatorError(f"the loss of the distilled data is {value} after {iteration} iterations")
            x.grad = torch.autograd.grad(loss, x)[0]
        optimizer.step()
        scheduler.step(value)
        advance()
    return x.detach()


def _loss(model: nn.Module, norms: Sequence[_BatchNorm], x: Tensor, dtype: torch.dtype) -> Tensor:
    with _norm_inputs(norms) as seen:
        call(model, x.to(dtype))
    mean, deviation = _statistics(x)
    loss = mean.square().sum() + (deviation - 1).square().sum()
    for norm, batch_input in seen:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, deviation = _statistics(batch_input)
        loss = loss + (mean - norm.running_mean.float()).square().sum()
        loss = loss + (deviation - (norm.running_var.float() + _EPSILON).sqrt()).square().sum()
    return loss


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over samples and places."""
    rows = x.float().movedim(1, 0).flatten(1) if x.ndim > 1 else x.float()[None]
    return rows.mean(1), (rows.var(1, unbiased=rows.shape[1] > 1) + _EPSILON).sqrt()


@contextmanager
def _norm_inputs(norms: Sequence[_BatchNorm]) -> Iterator[list[tuple[_BatchNorm, Tensor]]]:
    seen: list[tuple[_BatchNorm, Tensor]] = []
    handles = [norm.register_forward_pre_hook(lambda module, args: seen.append((module, args[0]))) for norm in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _vocabulary(model: nn.Module) -> int | None:
    """Tokens of the first embedding; None where a layer with other inputs comes before it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            return None
    return None
