"""What no decision touches: parameters that stay at full width, by name and share of all weights."""

import bisect
import fnmatch
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from mpsearch.core.printing import undecided_text
from mpsearch.errors import warn
from mpsearch.models.modules.one_memory import memory_of, span_of
from mpsearch.models.modules.weights import storage_of

#: A plan that leaves matrices of this share unnamed is told.
_UNNAMED = 0.1
#: Names in a table's origin.
_KEPT = 20


def undecided(
    model: nn.Module, weights: Iterable[Tensor], exclude: Collection[str] = (), told: Iterable[Tensor] = ()
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
    names = set(exclude)
    patterns = [name for name in names if any(sign in name for sign in "*?[")]
    seen = set[object]()
    total = vectors = excluded = untold = 0
    matrices: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        place = storage_of(parameter)
        if not parameter.numel() or place in seen:
            continue
        seen.add(place)
        total += parameter.numel()
        if parameter in decided:
            continue
        owners = (name, name.rpartition(".")[0])  # a pattern names modules, or the parameter itself
        if not names.isdisjoint(owners) or any(fnmatch.fnmatchcase(own, p) for p in patterns for own in owners):
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


def tell_unnamed(model: nn.Module, weights: Iterable[Tensor], number: int) -> None:
    """Warn where a plan leaves a tenth of the weights and more in matrices that it does not name."""
    facts = undecided(model, weights)
    if facts["share"] - facts["vectors"] >= _UNNAMED:
        warn(f"the plan names {number} layer{'s' * (number > 1)}: {undecided_text(facts)}")


class _Memory:
    """Where tensors lie: of each memory the parts that are taken, in order, those that touch as one."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans: dict[int, list[tuple[int, int]]] = {}
        for tensor in tensors:
            spans.setdefault(memory_of(tensor), []).append(span_of(tensor))
        self._parts = {memory: _joined(taken) for memory, taken in spans.items()}

    def __contains__(self, tensor: Tensor) -> bool:
        start, end = span_of(tensor)
        starts, ends = self._parts.get(memory_of(tensor), ((), ()))
        place = bisect.bisect_right(starts, start) - 1
        return place >= 0 and end <= ends[place]


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and ends of what spans cover together."""
    starts, ends = list[int](), list[int]()
    for start, end in sorted(spans):
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends
