"""Random generators that are told apart by a few numbers: the seed of an estimator, the batch, the draw."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

_WORD = 2**64 - 1
_FIRST, _SECOND, _FIFTH = 11400714785074694791, 14029467366897019727, 2870177450012600261


def seed_of(*numbers: int) -> int:
    """A seed, 0 to 2^63 - 1, from a few whole numbers: the mixing step of xxHash64 over their 64-bit words.

    Written out rather than taken from numpy's `SeedSequence` or Python's `hash` of a tuple, so that the draws of a seed are the
    same on every platform and in every version, and those that tables of earlier runs were made with: for numbers from 0 to
    2^61 - 2 this is the hash of their tuple in CPython 3.8 to 3.13 on 64 bits, modulo 2^63.

    Args:
        numbers: of any sign; taken modulo 2^64.

    >>> seed_of(0, 1) == hash((0, 1)) % 2**63, seed_of(0, 1) != seed_of(1, 0)
    (True, True)
    """
    mixed = _FIFTH
    for number in numbers:
        mixed = (mixed + (number & _WORD) * _SECOND) & _WORD
        mixed = (mixed << 31 | mixed >> 33) & _WORD
        mixed = mixed * _FIRST & _WORD
    return (mixed + (len(numbers) ^ _FIFTH ^ 3527539)) % 2**63


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU, so that draws are the same on every device, seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(*numbers))


@dataclass(eq=False)
class Draw:
    """The random numbers of one draw over the predictions of one batch, handed out row after row: pieces get what the whole gets.

    Attributes:
        seed: of the estimator.
        batch: its number.
        number: of the draw.

    >>> whole, pieces = Draw(0, 3, 1), Draw(0, 3, 1)
    >>> parts = [pieces.signs(pieces.own, size, 4) for size in (2, 3)]
    >>> bool((whole.signs(whole.own, 5, 4) == torch.cat(parts)).all())
    True
    """

    seed: int
    batch: int
    number: int
    _sample: int = field(default=-1, init=False)  # of the last row
    _rows: int = field(default=0, init=False)  # of it, so far

    @functools.cached_property
    def own(self) -> torch.Generator:
        """Numbers of this draw alone."""
        return seeded_generator(self.seed, self.number, self.batch)

    @functools.cached_property
    def common(self) -> torch.Generator:
        """Numbers that all draws of the seed have in common."""
        return seeded_generator(self.seed, self.batch, 0)

    @staticmethod
    def signs(generator: torch.Generator, rows: int, width: int) -> Tensor:
        """(rows, width) of 1 and -1, int8 on the CPU."""
        return torch.randint(0, 2, (rows, width), generator=generator, dtype=torch.int8).mul_(2).sub_(1)

    def places(self, index: Tensor) -> Tensor:
        """(n,) number of each of the next rows among those of its sample, from the (n,) samples of all of them, in order."""
        index = index.cpu()
        if not len(index):
            return index
        places = torch.arange(len(index)) - torch.searchsorted(index, index)  # the first row of the same sample
        begun = self._rows if int(index[0]) == self._sample else 0
        places += begun * (index == index[0])
        self._sample, self._rows = int(index[-1]), int(places[-1]) + 1
        return places
