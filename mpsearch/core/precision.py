"""A precision: one option of a layer, written `w<format>[a<format>][g<size>]`."""

import functools
import re
from dataclasses import dataclass

from mpsearch.core.settings import check_kind
from mpsearch.errors import PlanError

#: Named formats and their nominal bits an element; `int16` has a name since `16` means left alone. `fp<n>_e<e>m<m>` is any split
#: with 1 + e + m = n, `bfp<n>` block floating point with n bits an element; the last rows are the types of GGUF files.
NAMED_BITS = {
    "bf16": 16,
    "fp16": 16,
    "fp32": 32,
    "int16": 16,
    "mxfp4": 4,
    "mxfp6_e2m3": 6,
    "mxfp6_e3m2": 6,
    "mxfp8": 8,
    "mxfp8_e5m2": 8,
    "mxint8": 8,
    "nvfp4": 4,
    "nf4": 4,
    "q4_0": 4,
    "q4_1": 4,
    "q5_0": 5,
    "q5_1": 5,
    "q8_0": 8,
    "q2_k": 2,
    "q3_k": 3,
    "q4_k": 4,
    "q5_k": 5,
    "q6_k": 6,
    "iq4_nl": 4,
    "iq4_xs": 4,
    "tq1_0": 2,
    "tq2_0": 2,
}
_MINIFLOAT = re.compile(r"fp(\d)_e(\d)m(\d)")
_SHARED_EXPONENT = re.compile(r"bfp(\d+)")
_FORMAT = r"\d+|fp\d_e\d+m\d+|bfp\d+|" + "|".join(sorted(NAMED_BITS, key=len, reverse=True))
_GRAMMAR = re.compile(rf"w(?P<w>{_FORMAT})(?:a(?P<a>{_FORMAT}))?(?:g(?P<g>\d+))?")


def format_bits(name: str) -> int:
    """Nominal bits of one element of a format.

    Raises:
        PlanError: for a format that is neither an integer of 1 to 16 bits nor a known name.

    >>> format_bits("4"), format_bits("fp8_e4m3"), format_bits("bf16")
    (4, 8, 16)
    """
    if name.isdecimal():
        digits = name.lstrip("0")[:20]  # Python reads 4,300 at most
        if digits and 1 <= int(digits) <= 16:
            return int(digits)
        raise PlanError(f"an integer format of {digits or 0} bits, expected 1 to 16")
    if name in NAMED_BITS:
        return NAMED_BITS[name]
    match = _MINIFLOAT.fullmatch(name)
    if match:
        bits, exponent, mantissa = map(int, match.groups())
        if 3 <= bits <= 8 and 1 + exponent + mantissa == bits and exponent >= 1:
            return bits
    match = _SHARED_EXPONENT.fullmatch(name)
    if match and 2 <= int(match[1]) <= 16:
        return int(match[1])
    raise PlanError(
        f"unknown number format {name!r}; known: integers 1 to 16, fp3..fp8 as fp<n>_e<e>m<m> with "
        f"1 + e + m = n, bfp2..bfp16, {', '.join(sorted(NAMED_BITS))}"
    )


@dataclass(frozen=True, slots=True)
class Precision:
    """Weight format, activation format and group size of a layer, written `w<format>[a<format>][g<size>]`.

    A format is an integer number of bits or a name (`fp8_e4m3`, `mxfp4`, `nvfp4`, `bf16`, ...); bits are nominal, scales not counted.

    Attributes:
        weight: number format of the weight; `"16"` = not quantized.
        activation: number format of the layer's input; `"16"` = left alone.
        group_size: consecutive input weights that share a scale; None = one scale an output channel.

    >>> Precision.parse("w4a8g128")
    Precision(weight='4', activation='8', group_size=128)
    >>> str(Precision("fp8_e4m3", "fp8_e4m3")), Precision.parse("w4").activation_bits
    ('wfp8_e4m3afp8_e4m3', 16)
    """

    weight: str
    activation: str = "16"
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name in (self.weight, self.activation):
            check_kind(name, str, "the name of a number format, '4' or 'fp8_e4m3'", PlanError)
            format_bits(name)
        if self.group_size is not None:
            check_kind(self.group_size, int, "a group size, a whole number or None", PlanError)
            if self.group_size < 1:
                raise PlanError(f"a group size of {self.group_size}, expected 1 or more")

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """Read one precision.

        Raises:
            PlanError: where the text does not follow the grammar.
        """
        check_kind(text, str, "a precision as text, 'w4'", PlanError)
        return _parse(text)

    @property
    def weight_bits(self) -> int:
        """Nominal bits of a weight."""
        return format_bits(self.weight)

    @property
    def activation_bits(self) -> int:
        """Nominal bits of an input element."""
        return format_bits(self.activation)

    @property
    def quantizes_weight(self) -> bool:
        """False where the weight is left alone."""
        return self.weight != "16"

    @property
    def quantizes_activation(self) -> bool:
        """False where the input is left alone."""
        return self.activation != "16"

    def __str__(self) -> str:
        activation = f"a{self.activation}" if self.quantizes_activation else ""
        group = f"g{self.group_size}" if self.group_size is not None else ""
        return f"w{self.weight}{activation}{group}"


@functools.lru_cache(maxsize=4096)  # tables repeat a handful of precisions on every line
def _parse(text: str) -> Precision:
    match = _GRAMMAR.fullmatch(text.strip())
    if match is None or len(text) > 100:
        raise PlanError(
            f"{text[:100]!r} is no precision; expected w<format>[a<format>][g<size>], such as w4, w4a8, w4g128 or w8a8"
        )
    group = match["g"]
    return Precision(match["w"], match["a"] or "16", int(group) if group else None)


def precisions(text: str) -> tuple[Precision, ...]:
    """Read a list of precisions, each as in `Precision`, separated by blanks or commas.

    Raises:
        PlanError: for an empty list, a malformed precision, or one that occurs twice.

    >>> [str(p) for p in precisions("w2 w4a8, w16")]
    ['w2', 'w4a8', 'w16']
    """
    check_kind(text, str, "a list of precisions as text, 'w2 w4 w8'", PlanError)
    found = tuple(Precision.parse(part) for part in re.split(r"[\s,]+", text.strip()) if part)
    if not found:
        raise PlanError("an empty list of precisions; write one such as 'w2 w4 w8'")
    for place, precision in enumerate(found):
        if precision in found[:place]:
            raise PlanError(f"precision {precision} occurs twice in {text!r}")
    return found
