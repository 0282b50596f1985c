"""Data in three parts: to score layers, to select among plans, and to report on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.models.data.batches import Arranged, Batch, first_tensor, inputs_of, leaves, like, rebuilt, samples

#: A run of more tokens, with an output for each of many classes, is not spent on looking at a model.
MOST_TOKENS = 2048
#: Fewest samples of a part: with fewer a standard error means nothing.
LEAST = 4


def split(batches: Sequence[Batch], shares: Mapping[str, float], seed: int) -> dict[str, list[Batch]]:
    """Deal the samples of every batch out to parts at random, each part getting its share of every batch.

    Args:
        batches: whatever the model takes; tensors, arrays and lists of plain values whose length is the number of
            samples are dealt out, all else goes to every part.
        shares: part -> share of the samples; they add up to 1.
        seed: of the draw.

    Returns:
        part -> batches, in the order of the data, the samples of one batch staying together.

    Raises:
        EstimatorError: where a part would have fewer than `LEAST` samples.

    >>> parts = split([torch.arange(16)], {"a": 0.25, "b": 0.75}, seed=0)
    >>> [len(part) for part in (parts["a"][0], parts["b"][0])], sorted(torch.cat([*parts["a"], *parts["b"]]).tolist())[-1]
    ([4, 12], 15)
    """
    generator = np.random.default_rng(seed)
    parts: dict[str, list[Batch]] = {name: [] for name in shares}
    fractions = np.array(list(shares.values()))
    dealt = np.zeros(len(shares))
    for batch in batches:
        count = samples(batch)
        places = np.zeros(count, np.int64)
        for place in range(count):
            places[place] = np.argmax(fractions * (dealt.sum() + 1) - dealt)
            dealt[places[place]] += 1
        places = generator.permutation(places)
        for number, name in enumerate(shares):
            chosen = np.flatnonzero(places == number)
            if len(chosen):
                parts[name].append(_selected(batch, torch.from_numpy(chosen), count))
    check_sizes({name: int(size) for name, size in zip(shares, dealt, strict=True)})
    return parts


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse parts that are too small.

    Raises:
        EstimatorError: with the numbers.
    """
    if min(sizes.values()) < LEAST:
        parts = ", ".join(f"{size} to {name}" for name, size in sizes.items())
        raise EstimatorError(
            f"{sum(sizes.values())} samples are too few: {parts}; each part needs at least {LEAST}, give more data"
        )


def cut(batches: Sequence[Batch], pieces: int) -> list[Batch]:
    """The same samples in at least so many batches, as far as there are samples; no batch grows.

    >>> [len(batch) for batch in cut([torch.arange(10)], 4)]
    [3, 3, 3, 1]
    """
    largest = max(1, -(-sum(map(samples, batches)) // pieces))
    smaller: list[Batch] = []
    for batch in batches:
        count = samples(batch)
        if count <= largest:
            smaller.append(batch)
            continue
        smaller += [
            _selected(batch, torch.arange(first, min(first + largest, count)), count)
            for first in range(0, count, largest)
        ]
    return smaller


def first_samples(batch: Batch, count: int) -> Batch:
    """The first samples of a batch.

    >>> first_samples((torch.arange(10), torch.arange(10)), 2)
    (tensor([0, 1]), tensor([0, 1]))
    """
    return _selected(batch, torch.arange(min(count, samples(batch))), samples(batch))


def few_tokens(batch: Batch, count: int | None = None) -> Batch:
    """The first samples of a batch, of text no more than hold `MOST_TOKENS` together, and one at least: enough to look at a model.

    Args:
        batch: token numbers, (samples, tokens), or any other data.
        count: of samples at most; None: all of them.

    >>> [len(few_tokens(torch.ones(16, 1000, dtype=kind), 8)) for kind in (torch.int64, torch.float32)]
    [2, 8]
    """
    most = samples(batch) if count is None else min(count, samples(batch))
    first = first_tensor(inputs_of(batch))
    if first.ndim == 2 and not first.is_floating_point() and first.shape[1]:
        most = min(most, max(1, MOST_TOKENS // first.shape[1]))
    return batch if most == samples(batch) else first_samples(batch, most)


def _selected(value: Any, chosen: Tensor, count: int) -> Any:
    if isinstance(value, Arranged):
        return replace(value, original=_selected(value.original, chosen, count))
    if isinstance(value, Tensor):
        return value[chosen.to(value.device)] if value.ndim and len(value) == count else value
    if isinstance(value, np.ndarray):
        return value[chosen.numpy()] if value.ndim and len(value) == count else value
    if isinstance(value, list | tuple) and len(value) == count and not any(map(_holds_tensor, value)):
        return like(value, [value[i] for i in chosen.tolist()])  # labels that are plain numbers
    return rebuilt(value, lambda part: _selected(part, chosen, count))


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor | np.ndarray) for leaf in leaves(value))
