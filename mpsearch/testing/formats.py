"""A contract suite for number formats, as named checks."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mpsearch.core.formats import number_format
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.formats import FORMATS, Format, Grid, format_named
from mpsearch.quantizers.formats.format import StoredScales
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest

#: Rows that share a scale each; a multiple of every block.
_ROWS, _COLUMNS = 8, 512


def format_checks(form: str | Format) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a number format promises, as named checks that raise `AssertionError` with what they found.

    Values are held against a search over all codes, bytes against what is really packed.

    Args:
        form: a format, or the name of one in `FORMATS`; of one that is not there what the rest of the package does with it is not checked.

    Yields:
        A name, and a function of no arguments.

    >>> for name, check in format_checks("nf4"):
    ...     check()
    """
    form = format_named(form) if isinstance(form, str) else form
    yield "the facts agree with each other", lambda: _facts(form)
    for symmetric in (True, False) if form.facts.family == "integer" else (True,):
        grid = form.grid(symmetric)
        if grid is not None:
            yield from _grid_checks(grid, "" if symmetric else " (with a zero-point)")
    yield "values and codes are those of one table", lambda: _round_trip(form)
    yield "every weight goes to the nearest value under its scale", lambda: _nearest(form)
    yield "values are finite, for weights of any usual size and for zeros", lambda: _finite(form)
    yield "quantizing again changes nothing", lambda: _again(form)
    yield "a power of two goes through", lambda: _power_of_two(form)
    yield "the error falls with the bits", lambda: _error_falls(form)
    yield "what shares no scale has no influence", lambda: _blocks_alone(form)
    yield "inputs are rounded as weights are", lambda: _inputs(form)
    if FORMATS.get(form.name) is form:
        yield "the name is in the grammar of precisions", lambda: _grammar(form)
        yield "the packed bytes are those that are counted", lambda: _bytes(form)


def _grid_checks(grid: Grid, suffix: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Of the values before scaling."""
    yield f"values are finite, unique and sorted{suffix}", lambda: _sorted(grid)
    yield f"codes fill the bits and no more{suffix}", lambda: _code_width(grid)
    yield f"every code comes back from its value{suffix}", lambda: _codes_back(grid)
    yield f"rounding takes the nearest of all values{suffix}", lambda: _brute_force(grid)


def _normal(rows: int = _ROWS, columns: int = _COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _block(form: Format) -> int:
    return form.facts.block or _COLUMNS


def _rounded(form: Format, weight: Tensor) -> tuple[Tensor, StoredScales]:
    """(S, block) values, the scale by the largest weight where the format leaves it open."""
    rows = weight.reshape(-1, _block(form))
    out = torch.empty_like(rows)
    stored = form.round_rows(rows, out, lambda part, grid: _full_range(part, grid), True, rows.abs().max())
    return out, stored


def _full_range(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    return grid.fit(*rows.aminmax(dim=1, keepdim=True))


def _facts(form: Format) -> None:
    facts = form.facts
    number = facts.number
    assert facts.bits >= 1, f"{facts.name} has {facts.bits} bits, expected 1 or more"
    assert number.significand >= 1, f"{number} has no significand: hardware tables need the number that is multiplied"
    assert bool(number.bits) != bool(number.exponent), (
        f"{number}: expected an integer's bits or an exponent, one of both"
    )
    assert facts.block is None or facts.block >= 1, f"blocks of {facts.block}, expected 1 or more"
    assert not facts.fixed_block or facts.block, f"{facts.name} says that its blocks have a fixed size, and none"
    if facts.family == "integer":
        assert number.bits == facts.bits, f"{number} for an integer of {facts.bits} bits"
    if facts.family == "minifloat":
        width = number.exponent + number.significand
        assert width == facts.bits, f"sign, exponent and mantissa are {width} bits, expected {facts.bits}"
    if facts.family == "codebook":
        limit = 1 << facts.bits
        assert limit // 2 < len(facts.values) <= limit, f"{len(facts.values)} values for codes of {facts.bits} bits"
    if facts.family == "shared scale":
        element = number_format(facts.element or "")
        assert (element.bits, element.number) == (facts.bits, number), (
            f"bits and number {facts.bits}, {number} are not those of the element: {element.bits}, {element.number}"
        )
    if facts.block_bytes is not None and facts.block is not None:
        stored = 8 * facts.block_bytes / facts.block
        assert facts.bits - 1 < stored < facts.bits + 3, f"{stored} bits an element for codes of {facts.bits}"


def _sorted(grid: Grid) -> None:
    values = grid.values()
    assert torch.isfinite(values).all(), f"not finite: {values[~torch.isfinite(values)].tolist()}"
    half = len(values) // 2 if grid.signed_magnitude else len(values)
    rising = values[:half].diff() > 0
    assert rising.all(), f"values fall or repeat after {values[:-1][: half - 1][~rising].tolist()[:5]}"
    if grid.signed_magnitude:
        assert torch.equal(values[half:], -values[:half]), "the negative values are not those above zero, mirrored"
    if not grid.asymmetric:
        assert float(values.abs().max()) == grid.high, f"greatest size {float(values.abs().max())}, told {grid.high}"


def _code_width(grid: Grid) -> None:
    codes = grid.codes()
    assert int(codes.min()) >= 0, f"a code of {int(codes.min())}, expected 0 or more"
    need = max(1, int(codes.max()).bit_length())
    assert need == grid.bits, f"the greatest code {int(codes.max())} takes {need} bits, told {grid.bits}"


def _codes_back(grid: Grid) -> None:
    codes = grid.codes()
    back = grid.encode(grid.decode(codes, torch.float64))
    assert torch.equal(back, codes), (
        f"codes {codes[back != codes].tolist()[:5]} come back as {back[back != codes].tolist()[:5]}"
    )


def _brute_force(grid: Grid) -> None:
    """Numbers inside, between and beyond the values; of two that are equally near either one."""
    values = grid.values().sort().values
    zero = torch.tensor(math.floor((1 << grid.bits) / 3) if grid.asymmetric else 0.0, dtype=torch.float64)
    values = values - zero
    shown = values if len(values) <= 64 else values[torch.linspace(0, len(values) - 1, 64).long()]
    middles = (values[1:] + values[:-1]) / 2
    middles = middles if len(middles) <= 64 else middles[:: len(middles) // 64]
    spread = _normal(1, 300).reshape(-1) * float(values.abs().max()) / 2
    x = torch.cat([shown, middles, spread, 3 * values[[0, -1]]])
    for step in (1.0, 0.25):
        scale = torch.full_like(x, step)
        rounded = grid.round(x * step, scale, zero.expand_as(x)) / step
        gap = (x[:, None] - values).abs().amin(1)
        worse = (x - rounded).abs() > gap
        assert not worse.any(), (
            f"{x[worse].tolist()[:3]} became {rounded[worse].tolist()[:3]}, nearest is "
            f"{values[(x[worse][:3, None] - values).abs().argmin(1)].tolist()}"
        )
        assert torch.isin(rounded, values).all(), "rounding gave what is no value of the format"


def _round_trip(form: Format) -> None:
    values, stored = _rounded(form, _normal())
    if stored.blocks is not None:
        again = form.decode(stored.blocks, torch.float64)
        assert torch.equal(again.reshape(values.shape), values), "the bytes of the blocks mean other values"
        assert stored.blocks.shape[1] == form.facts.block_bytes, (
            f"a block has {stored.blocks.shape[1]} bytes, told {form.facts.block_bytes}"
        )
        return
    steps = torch.ones(len(values), 1, dtype=torch.float64)
    if stored.scales is not None:
        steps = form.steps(stored.scales, stored.tensor_scale, torch.float64)
    codes = form.encode(values / steps)
    assert int(codes.min()) >= 0, f"a code of {int(codes.min())}, expected 0 or more"
    assert int(codes.max()) < 1 << form.bits, f"a code of {int(codes.max())} in {form.bits} bits"
    back = form.decode(codes, torch.float64) * steps
    torch.testing.assert_close(
        back, values, rtol=1e-12, atol=0, msg=lambda text: f"values do not come back from their codes: {text}"
    )


def _nearest(form: Format) -> None:
    weight = _normal(seed=1).reshape(-1, _block(form))
    values, stored = _rounded(form, weight)
    grid = form.grid()
    if (
        grid is None or stored.scales is None
    ):  # casts, and blocks whose scales are inside: no more than half the widest gap off
        size = weight.abs().amax(1, keepdim=True)
        worst = float(((values - weight).abs() / size).max())
        share = 2.0 ** (1 - form.bits) * 3 if form.facts.block_bytes else 2.0**-form.facts.number.significand
        assert worst <= share, f"a weight is {worst:.3g} of its block's largest off, expected {share:.3g} at most"
        return
    steps = form.steps(stored.scales, stored.tensor_scale, torch.float64)
    levels = grid.values().sort().values
    scaled = weight / steps
    place = torch.searchsorted(levels, scaled.contiguous()).clamp(1, len(levels) - 1)
    gap = torch.minimum((scaled - levels[place]).abs(), (scaled - levels[place - 1]).abs())
    off = (scaled - values / steps).abs() - gap
    assert float(off.max()) <= 1e-9 * grid.high, (
        f"a weight is {float(off.max()):.3g} steps further off than the nearest value"
    )


def _finite(form: Format) -> None:
    for size in (1e-4, 1.0, 1e3):
        values, _ = _rounded(form, _normal() * size)
        assert torch.isfinite(values).all(), f"weights of size {size} became values that are not finite"
    if form.bits > 1:
        values, _ = _rounded(form, torch.zeros(_ROWS, _COLUMNS, dtype=torch.float64))
        assert not values.any(), f"zeros became {values.unique().tolist()[:5]}"


def _again(form: Format) -> None:
    weight = _normal(seed=2)
    once, _ = _rounded(form, weight)
    twice, _ = _rounded(form, once)
    change = float((twice - once).square().mean())
    if form.facts.block_bytes is None:
        assert change <= 1e-20, f"a second rounding changes weights by {change**0.5:.3g}"
        return
    error = float((once - weight.reshape(once.shape)).square().mean())  # scales are searched for: nearly
    assert change <= error / 4, f"a second rounding changes weights by {change**0.5:.3g}, the first by {error**0.5:.3g}"


def _power_of_two(form: Format) -> None:
    weight = _normal(seed=3)
    weight = torch.where(weight.abs() < 0.01, 0.01, weight)  # float16 has fewer bits below 6e-5
    values, _ = _rounded(form, weight)
    for factor in (8.0, 0.25):
        scaled, _ = _rounded(form, weight * factor)
        assert torch.equal(scaled, values * factor), f"{factor} times the weights are not {factor} times the values"


def _error_falls(form: Format) -> None:
    weight = _normal(seed=4)

    def error(other: Format) -> float:
        values, _ = _rounded(other, weight)
        return float((values - weight.reshape(values.shape)).square().mean())

    own, size = error(form), float(weight.square().mean())
    assert own < size or form.bits == 1, f"a mean squared error of {own:.3g}, no better than zeros: {size:.3g}"
    for other in FORMATS.values():
        a, b = form.facts, other.facts
        kin = (a.family, a.scale, a.block, a.number.exponent) == (b.family, b.scale, b.block, b.number.exponent)
        if kin and b.bits > a.bits:
            assert error(other) < own, f"{other.name} has more bits and no less error: {error(other):.3g} and {own:.3g}"


def _blocks_alone(form: Format) -> None:
    weight = _normal(seed=5)
    changed = weight.clone()
    changed[0, : _block(form)] *= 0.5  # below the largest of the tensor, which NVFP4 looks at
    weight[-1, -1] = changed[-1, -1] = 10.0
    before, _ = _rounded(form, weight)
    after, _ = _rounded(form, changed)
    assert torch.equal(before[1:], after[1:]), "another block's values changed with the first"


def _inputs(form: Format) -> None:
    x = _normal(seed=6)
    values = form.round_inputs(x, lambda rows, grid: _full_range(rows, grid))
    assert values.shape == x.shape, f"inputs of {tuple(x.shape)} became {tuple(values.shape)}"
    assert torch.isfinite(values).all(), "inputs became values that are not finite"
    if form.facts.family in ("integer", "minifloat"):  # a row under one scale, integers with a zero-point
        grid = form.grid(symmetric=False)
        assert grid is not None
        expected = grid.round(x, *_full_range(x, grid))
    else:
        expected = torch.cat([_rounded(form, part)[0].reshape(1, -1) for part in x.split(1)])
        if form.facts.tensor_scale_bytes:
            expected = _rounded(form, x)[0].reshape(x.shape)
    assert torch.equal(values, expected.to(values.dtype)), "inputs get other values than weights in the same blocks"


def _grammar(form: Format) -> None:
    name = "16" if form.name == "int16" else form.name
    for text in (f"w{form.name}", f"w{form.name}a{form.name}", f"w4a{form.name}"):
        assert str(Precision.parse(text)) == text, f"{text} is read as {Precision.parse(text)}"
    assert Precision(name).weight_bits == form.bits, (
        f"{name} counts {Precision(name).weight_bits} bits, told {form.bits}"
    )
    if form.facts.fixed_block:
        try:
            RoundToNearest()(_normal(1).float(), Precision(form.name, group_size=8))
        except EstimatorError:
            return
        raise AssertionError(f"w{form.name}g8 is accepted, though the format defines blocks of {form.facts.block}")


def _bytes(form: Format) -> None:
    for symmetric in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            weight, quantizer, precision = _normal(seed=7).to(dtype), RoundToNearest(symmetric), Precision(form.name)
            codes = quantizer.codes(weight, precision)
            packed = codes.pack()
            counted = packed_bytes(weight.numel(), len(weight), dtype.itemsize, precision, quantizer)
            assert packed.nbytes == counted, f"{packed.nbytes} bytes are packed, {counted} are counted"
            assert torch.equal(packed.unpack(tuple(weight.shape)), codes.values()), (
                "the packed bytes mean another weight"
            )
    if form.facts.block is not None:
        numel = 2**20
        size = packed_bytes(numel, 2**10, 4, Precision(form.name), RoundToNearest()) - form.facts.tensor_scale_bytes
        assert 8 * size / numel == form.facts.input_bits, (
            f"an input takes {form.facts.input_bits} bits an element, a float32 weight {8 * size / numel}"
        )
