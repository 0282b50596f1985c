"""Mixup: means of two samples, more data of the same kind for a damage that needs no labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.models.data.batches import Batch, inputs_of, leaves, mapped, samples


def mixup(batches: Sequence[Batch], seed: int, draws: int = 1) -> list[Batch]:
    """Every sample averaged with another one of its batch, as often as partners are drawn.

    x'_i = (x_i + x_j) / 2: mixup with a share of one half (Zhang et al., ICLR 2018, 1710.09412), samples of the vicinity of the data
    (Chapelle et al., NIPS 2000). The unquantized model is less sure of them than of the data, above all of data that it was trained on;
    so plans that do little damage to few sure samples by luck are told apart from those that do little damage at large.

    Args:
        batches: whatever the model takes; labels are left out.
        seed: of the draws of partners.
        draws: of partners.

    Returns:
        batches, without those of one sample; none where samples cannot be averaged: inputs that are not floating point (tokens,
        masks).

    >>> mixup([torch.tensor([[0.0], [1.0]])], seed=0)
    [tensor([[0.5000],
            [0.5000]])]
    >>> mixup([torch.tensor([[3, 7], [1, 2]])], seed=0)
    []
    """
    generator = np.random.default_rng(seed)
    several = [batch for batch in batches if samples(batch) > 1]
    if not all(_averages(inputs_of(batch), samples(batch)) for batch in several):
        return []
    mixtures: list[Batch] = []
    for batch in several * draws:
        count = samples(batch)
        order = generator.permutation(count)
        partner = np.empty(count, np.int64)
        partner[order] = np.roll(order, 1)
        between = _between(inputs_of(batch), torch.from_numpy(partner), count)
        mixtures.append(between if isinstance(batch, Mapping | Tensor) else (between, None))
    return mixtures


def _averages(inputs: Any, count: int) -> bool:
    """True where everything that belongs to samples is floating point."""
    return all(
        isinstance(leaf, Tensor) and (leaf.is_floating_point() or not _of_samples(leaf, count))
        for leaf in leaves(inputs)
    )


def _of_samples(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count


def _between(inputs: Any, partner: Tensor, count: int) -> Any:
    def mean(leaf: Any) -> Any:
        return (leaf + leaf[partner.to(leaf.device)]) / 2 if _of_samples(leaf, count) else leaf

    return mapped(inputs, mean)
