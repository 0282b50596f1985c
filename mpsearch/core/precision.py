"""A precision: one option of a layer, written `w<format>[a<format>][g<size>]`."""

import functools
import re
from dataclasses import dataclass

from mpsearch.core.formats import NUMBER_FORMATS, PATTERNS, number_format
from mpsearch.core.settings import check_kind
from mpsearch.errors import PlanError

_FORMAT = "|".join([*PATTERNS, *sorted(NUMBER_FORMATS, key=len, reverse=True)])
_GRAMMAR = re.compile(rf"w(?P<w>{_FORMAT})(?:a(?P<a>{_FORMAT}))?(?:g(?P<g>\d+))?")


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
            number_format(name)
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
        return number_format(self.weight).bits

    @property
    def activation_bits(self) -> int:
        """Nominal bits of an input element."""
        return number_format(self.activation).bits

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
    options = tuple(Precision.parse(part) for part in re.split(r"[\s,]+", text.strip()) if part)
    if not options:
        raise PlanError("an empty list of precisions; write one such as 'w2 w4 w8'")
    for place, precision in enumerate(options):
        if precision in options[:place]:
            raise PlanError(f"precision {precision} occurs twice in {text!r}")
    return options
