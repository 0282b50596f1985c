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
from mpsearch.resources.resource import Resource, ResourceCapabilities, capabilities_of, example_for


@dataclass(frozen=True)
class Total:
    """The sum of resources: weights and cache in one memory, `{"memory_bytes": Total((MemoryBytes(), KVCacheBytes(context=8192)))}`.

    Attributes:
        parts: resource functions, each a sum over the layers.

    >>> from mpsearch import precisions
    >>> from mpsearch.resources import BitOps
    >>> total = Total((BitOps(), BitOps()))(nn.Identity(), [Layer("fc", "linear", (8, 4), macs=32)], precisions("w4"))
    >>> total.usage.tolist(), total.reference
    ([[4096.0]], 16384.0)
    """

    parts: tuple[Callable[..., Any], ...]

    @property
    def capabilities(self) -> ResourceCapabilities:
        """What all of its parts are; the reference is the sum of theirs."""
        parts = [capabilities_of(part) for part in self.parts]
        return ResourceCapabilities(
            unit=" + ".join(dict.fromkeys(part.unit for part in parts)),
            example=True,
            monotone=all(part.monotone for part in parts),
            measured=any(part.measured for part in parts),
            on_meta=all(part.on_meta for part in parts),
            reference="unknown" if any(part.reference == "unknown" for part in parts) else "plan",
        )

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
        summands = []
        for part in self.parts:
            resource = part(model, layers, precisions, **example_for(part, example))
            if not isinstance(resource, Resource) or resource.is_peak:
                raise TableError(f"{part!r} is no sum over the layers, so it cannot be added up")
            summands.append(resource)
        return Resource(
            np.sum([resource.usage for resource in summands], axis=0),
            float(sum(resource.fixed for resource in summands)),
            float(sum(resource.reference for resource in summands)),
        )
