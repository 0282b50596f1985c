"""A layer, and the decision that it belongs to."""

import math
import numbers
from dataclasses import dataclass

from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_kind
from mpsearch.errors import TableError

#: Bytes of one element of the types in which weights are stored.
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantizable module. Layers of one group are one decision, any other layer is a decision of its own.

    Attributes:
        name: as in `model.named_modules()`.
        kind: `linear`, `conv1d`, `conv2d`, `conv3d`, `conv_transpose2d`, `embedding`, `matmul`, `kv_cache`, ...
        weight_shape: output channels first, as a quantizer sees it; empty where unknown.
        macs: multiply-accumulates for one sample.
        group: layers with the same non-empty group share one precision.
        dtype: type in which the unquantized weight is stored.
        target: name of the tool that will carry the plan out; what it cannot express is not allowed. Empty: any.
        allowed: the options of this layer alone; empty: all that a run is given.

    >>> Layer("conv1", "conv2d", (16, 3, 3, 3), macs=442368).numel
    432
    """

    name: str
    kind: str = ""
    weight_shape: tuple[int, ...] = ()
    macs: int = 0
    group: str = ""
    dtype: str = "float32"
    target: str = ""
    allowed: tuple[Precision, ...] = ()

    def __post_init__(self) -> None:
        for text in (self.name, self.kind, self.group, self.dtype, self.target):
            check_kind(text, str, "names of a layer, its kind, group, dtype and target as text", TableError)
        check_kind(self.weight_shape, tuple, f"the shape of layer {self.name!r} as a tuple", TableError)
        for number in (*self.weight_shape, self.macs):
            check_kind(number, numbers.Integral, f"sides and MACs of layer {self.name!r} as whole numbers", TableError)
        if not self.name:
            raise TableError("a layer without a name")
        for text in (self.name, self.group):
            if "\0" in text or (not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text)):
                raise TableError(f"the name {text!r} holds a zero character or half of one, which no file keeps")
        if any(side < 0 for side in self.weight_shape) or self.macs < 0:
            raise TableError(
                f"layer {self.name!r} has the shape {self.weight_shape} and {self.macs} MACs, expected 0 or more"
            )
        if self.dtype not in DTYPE_BYTES:
            raise TableError(f"layer {self.name!r} is stored as {self.dtype}, expected one of {', '.join(DTYPE_BYTES)}")

    @property
    def numel(self) -> int:
        """Number of weights; 0 where the shape is unknown."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    @property
    def decision(self) -> tuple[str, str]:
        """The decision that it belongs to: equal for two layers where they share one precision.

        A group may be called like a layer that stands alone, so the kind of name is part of the answer.

        >>> Layer("q", group="qkv").decision, Layer("qkv").decision
        (('group', 'qkv'), ('layer', 'qkv'))
        """
        return ("group", self.group) if self.group else ("layer", self.name)

    @property
    def is_cache(self) -> bool:
        """True for keys or values of attention: a decision without a weight."""
        return self.kind == "kv_cache"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one unquantized weight."""
        return DTYPE_BYTES[self.dtype]
