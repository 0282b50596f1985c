"""What no decision touches: parameters that stay at full width, by name and share of all weights."""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mpsearch.core.printing import undecided_text
from mpsearch.errors import warn

#: A plan that leaves matrices of this share unnamed is told.
_UNNAMED = 0.1
#: Names in a table's origin.
_KEPT = 20


def undecided(
    model: nn.Module, weights: Iterable[Tensor], exclude: Sequence[str] = (), told: Iterable[Tensor] = ()
) -> dict[str, Any]:
    """What of a model's parameters is not decided on.

    Args:
        model: as the search looks at it (`mpsearch.models.running.preserved`).
        weights: that are decided on; what lies in their memory is decided too.
        exclude: names or patterns of what the user left out.
        told: weights that the user has heard of by another warning.

    Returns:
        Shares of all weights, as JSON values: `share` of all that is undecided; `parameters`, the largest matrices by name;
        `others`, further matrices; `vectors` (norms and biases); `excluded`; `untold`, of the matrices that nobody has told.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 2, 2))
    >>> undecided(model, [model[0].weight])["parameters"]      # 8 of 18
    {'1.weight': 0.4444444444444444}
    """
    decided, heard = _Memory(weights), _Memory(told)
    seen: set[tuple[int, int]] = set()
    total = vectors = excluded = untold = 0
    matrices: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        place = (parameter.data_ptr(), parameter.numel())
        if not parameter.numel() or place in seen:
            continue
        seen.add(place)
        total += parameter.numel()
        if parameter in decided:
            continue
        if any(_matches(name, pattern) for pattern in exclude):
            excluded += parameter.numel()
        elif parameter.ndim < 2:
            vectors += parameter.numel()
        else:
            matrices[name] = parameter.numel()
            untold += parameter.numel() if parameter not in heard else 0
    largest = sorted(matrices.items(), key=lambda item: -item[1])
    total = max(total, 1)
    return {
        "share": (sum(matrices.values()) + vectors + excluded) / total,
        "parameters": {name: numel / total for name, numel in largest[:_KEPT]},
        "others": {"number": len(largest[_KEPT:]), "share": sum(numel for _, numel in largest[_KEPT:]) / total},
        "vectors": vectors / total,
        "excluded": excluded / total,
        "untold": untold / total,
    }


def _matches(name: str, pattern: str) -> bool:
    """A pattern names modules, or the parameter itself."""
    return any(fnmatch.fnmatchcase(part, pattern) for part in (name, name.rpartition(".")[0]))


def tell_unnamed(model: nn.Module, weights: Iterable[Tensor], number: int) -> None:
    """Warn where a plan leaves a tenth of the weights and more in matrices that it does not name."""
    facts = undecided(model, weights)
    if facts["share"] - facts["vectors"] >= _UNNAMED:
        warn(f"the plan names {number} layer{'s' * (number > 1)}: {undecided_text(facts)}")


class _Memory:
    """Where tensors lie."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._spans: dict[int, list[tuple[int, int]]] = {}
        for tensor in tensors:
            self._spans.setdefault(tensor.untyped_storage().data_ptr(), []).append(_span(tensor))

    def __contains__(self, tensor: Tensor) -> bool:
        start, end = _span(tensor)
        inside = [
            span for span in self._spans.get(tensor.untyped_storage().data_ptr(), ()) if _meet(span, (start, end))
        ]
        covered = sum(min(last, end) - max(first, start) for first, last in set(inside))
        return covered >= end - start


def _span(tensor: Tensor) -> tuple[int, int]:
    """First element and one behind the last, in the storage."""
    first = int(tensor.storage_offset())
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + reach + 1


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
