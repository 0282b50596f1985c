"""Pairwise interactions as dense blocks, one for each pair of rows that interact."""

from typing import TYPE_CHECKING

import numpy as np

from mpsearch.solvers.feasibility import Floats

if TYPE_CHECKING:
    from mpsearch.core.table import Interactions


def pair_blocks(interactions: "Interactions | None", columns: int) -> dict[tuple[int, int], Floats]:
    """`{(i, k): (P, P) values of row i's option by row k's}` with i < k; empty without interactions.

    >>> from mpsearch.core.table import Interactions
    >>> pair_blocks(Interactions([[1, 0]], [[0, 1]], [0.5]), 2)
    {(0, 1): array([[0. , 0. ],
           [0.5, 0. ]])}
    """
    blocks: dict[tuple[int, int], Floats] = {}
    if interactions is None:
        return blocks
    for (i, p), (k, q), value in zip(
        interactions.first.tolist(), interactions.second.tolist(), interactions.value.tolist(), strict=True
    ):
        (i, p), (k, q) = sorted([(i, p), (k, q)])
        blocks.setdefault((i, k), np.zeros((columns, columns)))[p, q] += value
    return blocks
