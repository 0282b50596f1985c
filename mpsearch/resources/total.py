"""Several resources under one limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import TableError
from mpsearch.models.running import Batch
from mpsearch.resources.resource import Resource, example_for


@dataclass(frozen=True)
class Total:
    """The sum of resources: weights and cache in one memory, `{"memory_bytes": Total((MemoryBytes(), KVCacheBytes(context=8192)))}`.

    Attributes:
        parts: resource functions, each a sum over the layers.

    >>> from mpsearch import precisions
    >>> from mpsearch.resources import BitOps
    >>> found = Total((BitOps(), BitOps()))(nn.Identity(), [Layer("fc", "linear", (8, 4), macs=32)], precisions("w4"))
    >>> found.usage.tolist(), found.reference
    ([[4096.0]], 16384.0)
    """

    parts: tuple[Callable[..., Any], ...]

    def __call__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        precisions: Sequence[Precision],
        *,
        example: Batch | None = None,
    ) -> Resource:
        """Add up; see `Resource`.

        Raises:
            TableError: for a part that is a peak, or no `Resource`.
        """
        found = []
        for part in self.parts:
            one = part(model, layers, precisions, **example_for(part, example))
            if not isinstance(one, Resource) or one.is_peak:
                raise TableError(f"{part!r} is no sum over the layers, so it cannot be added up")
            found.append(one)
        return Resource(
            np.sum([one.usage for one in found], axis=0),
            float(sum(one.fixed for one in found)),
            float(sum(one.reference for one in found)),
        )
