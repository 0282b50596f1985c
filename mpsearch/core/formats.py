"""Number formats by name: bits, blocks, scales and what a multiplier sees of them, as plain data.

A format is one entry of `NUMBER_FORMATS`. The grammar of precisions, the counting of bytes, the hardware tables and the tensors of
`mpsearch.quantizers.formats` all read it there, so that a new list of 16 values is one line here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mpsearch.errors import PlanError

#: What the values of a format are, and with that which program of `quantizers.formats` handles them.
Family = Literal["integer", "minifloat", "codebook", "cast", "shared scale", "gguf block"]
#: Where a scale lives: in the weight's own dtype, a byte of exponent, a byte of E4M3 under one float32 a tensor, inside a GGUF block;
#: "" = there is none.
ScaleKind = Literal["", "weight dtype", "e8m0", "fp8_e4m3", "inside"]


@dataclass(frozen=True)
class Number:
    """A number as a multiplier sees it, before scaling.

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

        >>> Number(8, 0, 7).holds(Number(4, 0, 3)), Number(0, 4, 4).holds(Number(0, 2, 2)), Number(8, 0, 7).holds(Number(0, 2, 2))
        (True, True, False)
        """
        if self.bits:
            return 0 < other.bits <= self.bits
        return other.exponent <= self.exponent and other.significand <= self.significand


#: The floating-point dtypes of tensors.
FLOATS = {
    "float64": Number(0, 11, 53),
    "float32": Number(0, 8, 24),
    "bfloat16": Number(0, 8, 8),
    "float16": Number(0, 5, 11),
}


@dataclass(frozen=True)
class NumberFormat:
    """What can be told of a number format without a tensor.

    Attributes:
        name: as it is written in a precision.
        family: what its values are.
        bits: nominal bits of an element, scales not counted.
        number: an element as a multiplier sees it.
        scale: where scales live.
        block: elements that share a scale by definition or custom; None = a row, or the group of the precision.
        fixed_block: the format defines the size of its blocks, so that a precision cannot give another.
        block_bytes: of a whole block with its scales, where these lie inside.
        element: the format of an element of a block whose scale is a byte.
        values: of a codebook, from the code 0 up.

    >>> number_format("nvfp4").element, number_format("mxfp4").scale_bytes(dtype_bytes=2), number_format("4").scale_bytes(dtype_bytes=2)
    ('fp4_e2m1', 1, 2)
    """

    name: str
    family: Family
    bits: int
    number: Number
    scale: ScaleKind = "weight dtype"
    block: int | None = None
    fixed_block: bool = False
    block_bytes: int | None = None
    element: str | None = None
    values: tuple[float, ...] = ()

    @property
    def parametric(self) -> bool:
        """True where the name holds numbers, as `fp8_e4m3` does."""
        return self.name.isdecimal() or any(re.fullmatch(pattern, self.name) for pattern in PATTERNS)

    def scale_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one scale beside the codes; 0 where there is none.

        Args:
            dtype_bytes: of a number in the dtype of the weight.
        """
        return {"": 0, "inside": 0, "weight dtype": dtype_bytes, "e8m0": 1, "fp8_e4m3": 1}[self.scale]

    @property
    def tensor_scale_bytes(self) -> int:
        """Bytes of the second scale, one a tensor: the float32 of NVFP4."""
        return 4 if self.scale == "fp8_e4m3" else 0

    @property
    def input_bits(self) -> float:
        """Bits of an element of an input, the scales of its blocks included; those in the weight's dtype are float32 here.

        >>> number_format("8").input_bits, number_format("mxfp4").input_bits, number_format("q8_0").input_bits
        (8.0, 4.25, 8.5)
        """
        if self.block is None:
            return float(self.bits)
        if self.block_bytes is not None:
            return 8.0 * self.block_bytes / self.block
        return self.bits + 8.0 * self.scale_bytes(4) / self.block


#: What names that hold numbers look like; any other name is written out.
PATTERNS = (r"\d+", r"fp\d_e\d+m\d+", r"bfp\d+")


def _integers(low: int, high: int) -> Iterator[NumberFormat]:
    """Of b bits, in two's complement, or from 0 with a zero-point."""
    for bits in range(low, high + 1):
        yield NumberFormat(str(bits), "integer", bits, Number(bits, 0, max(1, bits - 1)))


def _minifloats(low: int, high: int) -> Iterator[NumberFormat]:
    """Every split of n bits in a sign, e >= 1 bits of exponent and m of mantissa."""
    for bits in range(low, high + 1):
        for e in range(1, bits):
            m = bits - 1 - e
            yield NumberFormat(f"fp{bits}_e{e}m{m}", "minifloat", bits, Number(0, e, m + 1))


def _block_floats(low: int, high: int) -> Iterator[NumberFormat]:
    """Integers of b bits under a shared power of two."""
    for bits in range(low, high + 1):
        element = "int16" if bits == 16 else str(bits)
        number = Number(bits, 0, bits - 1)
        yield NumberFormat(f"bfp{bits}", "shared scale", bits, number, "e8m0", block=16, element=element)


def _cast(name: str, dtype: str) -> NumberFormat:
    """Through a dtype of torch and back, without a scale."""
    return NumberFormat(name, "cast", {"float32": 32}.get(dtype, 16), FLOATS[dtype], "")


def _codebook(name: str, block: int, values: tuple[float, ...], seen_as: str = "float16") -> NumberFormat:
    """Numbers that are looked up and multiplied as a dtype; the scale is the largest weight of a block."""
    bits = (len(values) - 1).bit_length()
    return NumberFormat(name, "codebook", bits, FLOATS[seen_as], block=block, values=values)


def _shared(name: str, block: int, element: str, scale: ScaleKind) -> NumberFormat:
    """Elements under a scale of one byte, blocks of a fixed size."""
    inner = _ELEMENTS[element]
    return NumberFormat(name, "shared scale", inner.bits, inner.number, scale, block, True, element=element)


def _gguf(name: str, bits: int, block: int, block_bytes: int) -> NumberFormat:
    """A block type of GGUF files; sizes as in ggml-common.h. A multiplier sees its integer codes."""
    number = Number(bits, 0, bits - 1)
    return NumberFormat(name, "gguf block", bits, number, "inside", block, True, block_bytes)


_ELEMENTS = {entry.name: entry for entry in (*_integers(1, 15), *_minifloats(3, 8))}
#: Every number format by name. `int16` has a name since `16` means left alone; `fp<n>_e<e>m<m>` is any split with 1 + e + m = n, `bfp<n>`
#: block floating point with n bits an element; the last rows are the types of GGUF files.
NUMBER_FORMATS: dict[str, NumberFormat] = {
    entry.name: entry
    for entry in (
        *_ELEMENTS.values(),
        *_block_floats(2, 16),
        replace(*_integers(16, 16), name="int16"),
        _cast("bf16", "bfloat16"),
        _cast("fp16", "float16"),
        _cast("fp32", "float32"),
        _shared("mxfp4", 32, "fp4_e2m1", "e8m0"),
        _shared("mxfp6_e2m3", 32, "fp6_e2m3", "e8m0"),
        _shared("mxfp6_e3m2", 32, "fp6_e3m2", "e8m0"),
        _shared("mxfp8", 32, "fp8_e4m3", "e8m0"),
        _shared("mxfp8_e5m2", 32, "fp8_e5m2", "e8m0"),
        _shared("mxint8", 32, "8", "e8m0"),
        _shared("nvfp4", 16, "fp4_e2m1", "fp8_e4m3"),
        # QLoRA, 2305.14314, appendix E
        _codebook(
            "nf4", 64,
            (
                -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
            ),
        ),
        _gguf("q4_0", 4, 32, 18),
        _gguf("q4_1", 4, 32, 20),
        _gguf("q5_0", 5, 32, 22),
        _gguf("q5_1", 5, 32, 24),
        _gguf("q8_0", 8, 32, 34),
        _gguf("q2_k", 2, 256, 84),
        _gguf("q3_k", 3, 256, 110),
        _gguf("q4_k", 4, 256, 144),
        _gguf("q5_k", 5, 256, 176),
        _gguf("q6_k", 6, 256, 210),
        _gguf("iq4_nl", 4, 32, 18),
        _gguf("iq4_xs", 4, 256, 136),
        _gguf("tq1_0", 2, 256, 54),
        _gguf("tq2_0", 2, 256, 66),
    )
}  # fmt: skip


def number_format(name: str) -> NumberFormat:
    """The format of a name; `16`, which leaves a tensor alone, counts as `int16`.

    Raises:
        PlanError: for a format that is neither an integer of 1 to 16 bits nor a known name.

    >>> number_format("4").bits, number_format("fp8_e4m3").bits, number_format("bf16").number
    (4, 8, Number(bits=0, exponent=8, significand=8))
    """
    entry = NUMBER_FORMATS.get(name)
    if entry is not None:
        return entry
    if name.isdecimal():
        digits = name.lstrip("0")[:20]  # Python reads 4,300 at most
        if digits and 1 <= int(digits) <= 16:
            return NUMBER_FORMATS["int16" if int(digits) == 16 else str(int(digits))]
        raise PlanError(f"an integer format of {digits or 0} bits, expected 1 to 16")
    raise PlanError(
        f"unknown number format {name!r}; known: integers 1 to 16, fp3..fp8 as fp<n>_e<e>m<m> with "
        f"1 + e + m = n, bfp2..bfp16, {', '.join(sorted(n for n, f in NUMBER_FORMATS.items() if not f.parametric))}"
    )
