"""Resources: what a cell of the table costs, each a file."""

from collections.abc import Callable
from typing import Any

from mpsearch.resources.bitops import BitOps as BitOps
from mpsearch.resources.memory import MemoryBytes as MemoryBytes
from mpsearch.resources.resource import Resource as Resource

#: Name of the column -> `make(quantizer)`, which returns `resource(model, layers, precisions) -> Resource`.
RESOURCES: dict[str, Callable[[Any], Callable[..., Resource]]] = {
    "memory_bytes": MemoryBytes,
    "bitops": lambda _quantizer: BitOps(),
}
