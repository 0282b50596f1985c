"""Bit operations."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.models.modules.experts import place_of
from mpsearch.models.running import Batch, call, preserved, samples, without_weights
from mpsearch.resources.resource import Resource, ResourceCapabilities


@dataclass(frozen=True)
class BitOps:
    """BitOps = MACs x weight bits x activation bits, for one sample (HAWQ-V3, 2011.10680, section 3.4).

    Bits are nominal; what is left alone counts 16. The products that read a cache of keys or values count the bits of the cache as
    weight bits, and 16 for the queries or attention weights that they meet. With an example, the products that no decision touches
    (of attention, of layers left alone) are `fixed`, at 16 x 16. Norms and activation functions do not count. A model
    without weights routes no token: each of its experts counts an equal share of them.

    >>> from mpsearch import precisions
    >>> resource = BitOps()(nn.Identity(), [Layer("fc", "linear", (8, 4), macs=32)], precisions("w4 w4a8"))
    >>> resource.usage.tolist(), resource.reference
    ([[2048.0, 1024.0]], 8192.0)
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(
        unit="bit operations",
        column="bitops",
        example=True,
        monotone=True,
        on_meta=True,
        reference="bit operations",
    )

    def __call__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        precisions: Sequence[Precision],
        *,
        example: Batch | None = None,
    ) -> Resource:
        """Count; see `Resource`."""
        macs = np.array([layer.macs for layer in layers], np.float64)
        activations = np.array([precision.activation_bits for precision in precisions], np.float64)
        facing = [np.full_like(activations, 16) if layer.is_cache else activations for layer in layers]
        decided = float(macs.sum())
        every = decided if example is None else round(count_macs(model, example) / samples(example))
        rest = max(every - decided, 0.0)
        bits = np.array([precision.weight_bits for precision in precisions], np.float64)
        shared = without_weights(model) and any(place_of(layer.name) for layer in layers)
        return Resource(
            macs[:, None] * np.array(facing) * bits,
            256 * rest,
            256 * (decided + rest),
            "each expert has an equal share of the tokens, since no weights route them" if shared else "",
        )


def count_macs(model: nn.Module, example: Batch) -> int:
    """Multiply-accumulates of all matrix products and convolutions of one run, whatever module or function makes them.

    >>> count_macs(nn.Linear(3, 2), torch.ones(5, 3))
    30
    """
    with preserved(model), torch.no_grad(), _in_the_open(), sdpa_kernel(SDPBackend.MATH), _Products() as products:
        call(model, example)
    return int(products.macs)


@contextlib.contextmanager
def _in_the_open() -> Iterator[None]:
    """Attention and recurrent layers by the products that they are made of, instead of one opaque operation."""
    fast = torch.backends.mha.get_fastpath_enabled()
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [library.enabled for library in libraries]
    torch.backends.mha.set_fastpath_enabled(False)
    for library in libraries:
        library.enabled = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for library, value in zip(libraries, enabled, strict=True):
            library.enabled = value


class _Products(TorchDispatchMode):
    """Adds up the products of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"):
            first = args[1] if name in ("addmm", "baddbmm", "addmv") else args[0]
            self.macs += result.numel() * first.shape[-1]
        elif name in ("convolution", "_convolution"):
            x, weight, transposed = args[0], args[1], args[6]
            counted: Tensor = x if transposed else result  # each of its elements meets one kernel
            self.macs += counted.numel() * (weight.numel() // weight.shape[0])
        return result
