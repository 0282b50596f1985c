"""Resources: what a cell of the table costs, each a file."""

from collections.abc import Callable
from typing import Any

from mpsearch.resources.activation import ActivationBytes as ActivationBytes
from mpsearch.resources.bitops import BitOps as BitOps
from mpsearch.resources.devices import DEVICES as DEVICES
from mpsearch.resources.devices import Fpga as Fpga
from mpsearch.resources.devices import Processor as Processor
from mpsearch.resources.energy import Energy as Energy
from mpsearch.resources.energy import OperationEnergy as OperationEnergy
from mpsearch.resources.kv_cache import KVCacheBytes as KVCacheBytes
from mpsearch.resources.latency_table import LatencyTable as LatencyTable
from mpsearch.resources.measured_latency import MeasuredLatency as MeasuredLatency
from mpsearch.resources.memory import MemoryBytes as MemoryBytes
from mpsearch.resources.resource import Resource as Resource
from mpsearch.resources.roofline import Roofline as Roofline
from mpsearch.resources.total import Total as Total

#: Name of the column -> `make(quantizer)`, which returns a function of (model, layers, precisions) and, where it has that parameter,
#: of the keyword `example`, one batch; see `columns.ResourceFunction`.
RESOURCES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "memory_bytes": MemoryBytes,
    "bitops": lambda _quantizer: BitOps(),
    "latency_s": lambda _quantizer: MeasuredLatency(),
    "activation_bytes": lambda _quantizer: ActivationBytes(),
    "kv_cache_bytes": lambda quantizer: KVCacheBytes(quantizer=quantizer),
    "energy_j": lambda quantizer: Energy(quantizer=quantizer),
}

#: Name on the command line -> class, for columns of any name: `latency_s=roofline:device=t4`.
KINDS: dict[str, type] = {
    "memory-bytes": MemoryBytes,
    "bitops": BitOps,
    "measured-latency": MeasuredLatency,
    "latency-table": LatencyTable,
    "roofline": Roofline,
    "activation-bytes": ActivationBytes,
    "kv-cache-bytes": KVCacheBytes,
    "energy": Energy,
}
