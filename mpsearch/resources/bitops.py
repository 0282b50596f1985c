"""Bit operations."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from mpsearch.layer import Layer
from mpsearch.precision import Precision
from mpsearch.resources.resource import Resource


@dataclass(frozen=True)
class BitOps:
    """BitOps = MACs x weight bits x activation bits, for one sample (HAWQ-V3, 2011.10680, section 3.4).

    Bits are nominal; what is left alone counts 16. Only the layers of the table are counted: norms, activation functions and
    attention products are not.

    >>> from mpsearch import precisions
    >>> found = BitOps()(nn.Identity(), [Layer("fc", "linear", (8, 4), macs=32)], precisions("w4 w4a8"))
    >>> found.usage.tolist(), found.reference
    ([[2048.0, 1024.0]], 8192.0)
    """

    def __call__(self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision]) -> Resource:
        """Count; see `Resource`."""
        macs = np.array([layer.macs for layer in layers], np.float64)
        bits = [precision.weight_bits * precision.activation_bits for precision in precisions]
        return Resource(np.outer(macs, bits), 0.0, float(macs.sum() * 256))
