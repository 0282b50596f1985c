"""Pieces of rows: what is summed row by row is computed a few rows at a time, so that no copy of all logits is made."""

from collections.abc import Callable

import torch
from torch import Tensor

#: About so many numbers of a piece, 4 MiB in float64; small enough for a processor's cache, too.
_NUMBERS = 2**19
#: Rows of a piece at least.
_LEAST = 16


def piece_sizes(rows: int, width: int, numbers: int = _NUMBERS, least: int = _LEAST) -> list[int]:
    """Rows of each piece of a matrix (rows, width); never a single row but where there is no other.

    A sum over one row alone may be split over threads, and so be rounded otherwise than among others.

    Args:
        rows: of the matrix.
        width: of the matrix.
        numbers: of a piece, about.
        least: rows of a piece.

    >>> piece_sizes(33, 10**6), piece_sizes(40, 2**15), piece_sizes(5, 10)
    ([16, 17], [16, 16, 8], [5])
    """
    step = max(least, numbers // max(width, 1))
    sizes = [step] * (rows // step)
    rest = rows % step
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest or not sizes:
        sizes.append(rest)
    return sizes


def by_pieces(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    """A function of rows, applied to a few of them at a time: the same numbers, in less memory.

    Where gradients are to flow through it, all rows are taken at once: the graph keeps them anyway.

    Args:
        function: (n, C) rows of each matrix -> (n, ...), each row from its own alone.
        *matrices: (N, C) each, or (N,).

    >>> by_pieces(lambda rows: rows.sum(1), torch.ones(100, 2**16)).shape
    torch.Size([100])
    """
    if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in matrices):
        return function(*matrices)
    width = max(matrix[0].numel() if len(matrix) else 1 for matrix in matrices)
    sizes = piece_sizes(len(matrices[0]), width)
    if len(sizes) == 1:
        return function(*matrices)
    return torch.cat([function(*parts) for parts in zip(*(matrix.split(sizes) for matrix in matrices), strict=True)])


def all_finite(rows: Tensor) -> bool:
    """True where no number is nan or infinite."""
    if rows.ndim < 2:
        return bool(torch.isfinite(rows).all())
    return bool(by_pieces(lambda part: torch.isfinite(part).flatten(1).all(1), rows.detach()).all())
