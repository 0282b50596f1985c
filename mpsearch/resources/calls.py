"""What really goes through each layer: the calls of one run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError, TableError
from mpsearch.models.modules.weights import layer_of
from mpsearch.models.running import Batch, call, first_tensor, preserved
from mpsearch.quantizers.packing import ScaleLayout, packed_bytes
from mpsearch.resources.arithmetic import stored_bits


@dataclass(frozen=True)
class CallSizes:
    """What one call of a layer moves: the sizes of its input and output.

    Attributes:
        shape: of its input.
        dtype: of its input.
        outputs: elements of its output.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    outputs: int

    @property
    def inputs(self) -> int:
        """Elements of its input."""
        return torch.Size(self.shape).numel()


def calls_of(model: nn.Module, names: Iterable[str], example: Batch) -> dict[str, list[CallSizes]]:
    """Run the example once and note every call of some modules; the model comes back as it was.

    Raises:
        TableError: without an example.

    >>> calls_of(nn.Sequential(nn.Linear(3, 2)), ["0"], torch.ones(5, 3))["0"]
    [CallSizes(shape=(5, 3), dtype=torch.float32, outputs=10)]
    """
    if example is None:
        raise TableError("this resource runs the model: give it example=, one batch")
    calls: dict[str, list[CallSizes]] = {name: [] for name in names}

    def watch(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def see(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            x = first_tensor(args if args else keywords)
            y = output if isinstance(output, Tensor) else first_tensor(output)
            calls[name].append(CallSizes(tuple(x.shape), x.dtype, y.numel()))

        return see

    with preserved(model, example), torch.no_grad():  # which takes the hooks out
        for name in calls:
            layer_of(model, name).register_forward_hook(watch(name), with_kwargs=True)
        call(model, example)
    return calls


def bytes_moved(layer: Layer, sizes: CallSizes, precision: Precision, quantizer: ScaleLayout) -> float:
    """Bytes that a call moves: the packed weight, or the rows of an embedding that are looked up, once; input and output once.

    Keys and values are written to the cache once and read once. nan where the format cannot hold rows of this length: not allowed.

    >>> sizes = CallSizes((2,), torch.int64, 2 * 4)
    >>> bytes_moved(Layer("e", "embedding", (100, 4)), sizes, Precision("16"), None)   # 2 rows of 16; 2 inputs and 8 outputs of 4
    72.0
    """
    try:
        if layer.is_cache:
            rows = sizes.inputs // sizes.shape[-1]
            return 2.0 * packed_bytes(sizes.inputs, rows, layer.dtype_bytes, precision, quantizer)
        whole = packed_bytes(layer.numel, layer.weight_shape[0], layer.dtype_bytes, precision, quantizer)
    except EstimatorError:
        return math.nan
    share = min(1.0, sizes.outputs / layer.numel) if layer.kind == "embedding" else 1.0
    inputs = sizes.inputs * stored_bits(precision.activation, layer.dtype) / 8
    return whole * share + inputs + sizes.outputs * layer.dtype_bytes
