"""Every number format as an object."""

from mpsearch.core.formats import NUMBER_FORMATS, Family, number_format
from mpsearch.quantizers.formats.casts import CastFormat
from mpsearch.quantizers.formats.format import Format, Grid
from mpsearch.quantizers.formats.gguf_blocks import GgufFormat
from mpsearch.quantizers.formats.scaled import ScaledFormat
from mpsearch.quantizers.formats.shared_scales import SharedScaleFormat

#: The program of each family.
FAMILIES: dict[Family, type[Format]] = {
    "integer": ScaledFormat,
    "minifloat": ScaledFormat,
    "codebook": ScaledFormat,
    "cast": CastFormat,
    "shared scale": SharedScaleFormat,
    "gguf block": GgufFormat,
}
#: Every format by name, from the one table of `core.formats`.
FORMATS: dict[str, Format] = {name: FAMILIES[facts.family](facts) for name, facts in NUMBER_FORMATS.items()}


def format_named(name: str) -> Format:
    """The format of a name in a precision; `16`, which leaves a tensor alone, counts as `int16`.

    Raises:
        PlanError: for an unknown name.

    >>> format_named("nf4").grid().values()[[0, 7, 15]]
    tensor([-1.,  0.,  1.], dtype=torch.float64)
    """
    return FORMATS[number_format(name).name]


def grid_of(name: str, symmetric: bool) -> Grid:
    """The values of an element of a format before scaling.

    Raises:
        ValueError: for a cast or a GGUF type, whose values are not listed.

    >>> grid_of("4", True).high, grid_of("4", False).high, grid_of("fp8_e4m3", True).high, grid_of("fp4_e2m1", True).high
    (7, 15, 448.0, 6.0)
    """
    grid = format_named(name).grid(symmetric)
    if grid is None:
        raise ValueError(
            f"{name} has no grid of values, expected an integer, a minifloat, a codebook or a block format"
        )
    return grid
