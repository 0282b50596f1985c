"""What a multiplier sees of a number format: exponent and significand."""

import functools
import re
from dataclasses import dataclass

from mpsearch.core.precision import format_bits
from mpsearch.quantizers import ggml
from mpsearch.quantizers.formats import block_size, element_of

_FLOATS = {"float64": (11, 53), "float32": (8, 24), "bfloat16": (8, 8), "float16": (5, 11)}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "nf4": "float16"}
_MINIFLOAT = re.compile(r"fp\d_e(\d)m(\d)")


@dataclass(frozen=True)
class Number:
    """A number format before scaling.

    Attributes:
        bits: of an integer, sign included; 0 for a floating-point format.
        exponent: bits of the exponent; 0 for an integer.
        significand: bits of the significand without sign, hidden one included.
    """

    bits: int
    exponent: int
    significand: int

    def holds(self, other: "Number") -> bool:
        """True where every value of another format is one of this.

        >>> number("8", "float32").holds(number("4", "float32")), number("fp8_e4m3", "float32").holds(number("5", "float32"))
        (True, True)
        >>> number("8", "float32").holds(number("fp4_e2m1", "float32")), number("bf16", "float32").holds(number("fp16", ""))
        (False, False)
        """
        if self.bits:
            return 0 < other.bits <= self.bits
        return other.exponent <= self.exponent and other.significand <= self.significand


@functools.cache
def number(name: str, dtype: str) -> Number:
    """What a multiplier sees of a format: of a block format its element, of a GGUF type its integer codes; NF4 is looked up as float16.

    Args:
        name: a number format; `16` is left alone.
        dtype: in which the unquantized tensor is stored.

    >>> number("4", "float32"), number("16", "bfloat16"), number("mxfp4", "float32")
    (Number(bits=4, exponent=0, significand=3), Number(bits=0, exponent=8, significand=8), Number(bits=0, exponent=2, significand=2))
    """
    name = element_of(name) or name
    kind = dtype if name == "16" else _ALIASES.get(name, name)
    if kind in _FLOATS:
        return Number(0, *_FLOATS[kind])
    match = _MINIFLOAT.fullmatch(kind)
    if match is not None:
        return Number(0, int(match[1]), int(match[2]) + 1)
    bits = format_bits(kind)
    return Number(bits, 0, max(1, bits - 1))


def stored_bits(name: str, dtype: str) -> float:
    """Bits of an element of an activation in a format, scales of blocks included.

    >>> stored_bits("8", "float32"), stored_bits("16", "float32"), stored_bits("mxfp4", "float32")
    (8.0, 32.0, 4.25)
    """
    if name == "16":
        return {"float64": 64.0, "float32": 32.0}.get(dtype, 16.0)
    if name in ggml.TYPES:
        return 8.0 * ggml.TYPES[name].nbytes / ggml.TYPES[name].size
    size = block_size(name)
    return format_bits(name) + (0.0 if size is None else (32 if name == "nf4" else 8) / size)
