"""Resources: what a cell of the table costs, each a file.

A resource is a class of frozen settings that is called with (model, layers, precisions), and with `example` where it declares so; its
`capabilities` say what it counts. `mpsearch.testing.resource_checks` runs over everything that `RESOURCES` names.
"""

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
from mpsearch.resources.resource import DeclaredResource as DeclaredResource
from mpsearch.resources.resource import Resource as Resource
from mpsearch.resources.resource import ResourceCapabilities as ResourceCapabilities
from mpsearch.resources.roofline import Roofline as Roofline
from mpsearch.resources.total import Total as Total

#: Name -> class, as in `--resources latency_s=roofline:device=t4`; `capabilities.column` is the column that it fills when that is named.
RESOURCES: dict[str, type[DeclaredResource]] = {
    "memory-bytes": MemoryBytes,
    "bitops": BitOps,
    "measured-latency": MeasuredLatency,
    "latency-table": LatencyTable,
    "roofline": Roofline,
    "activation-bytes": ActivationBytes,
    "kv-cache-bytes": KVCacheBytes,
    "energy": Energy,
}
