"""Text for a person: aligned tables, amounts with units."""

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right.

    >>> print(table(["layer", "bits"], [["conv1", "8"], ["fc", "16"]]))
    layer  bits
    -----  ----
    conv1     8
    fc       16
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, ["-" * w for w in widths], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def amount(resource: str, value: float) -> str:
    """A quantity with its unit, by the ending of its name.

    >>> amount("memory_bytes", 1234567), amount("latency_s", 0.0123), amount("bitops", 4.2e9), amount("average_bits", 4)
    ('1.23 MB', '12.3 ms', '4.20 G', '4.00')
    """
    if not math.isfinite(value):
        return "-"
    if resource.endswith("_bytes"):
        return _scaled(value, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")])
    if resource.endswith("_s"):
        return _scaled(value, [(1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")])
    if resource.endswith("_j"):
        return _scaled(value, [(1, "J"), (1e-3, "mJ"), (1e-6, "uJ"), (1e-9, "nJ")])
    if resource.endswith("_bits"):
        return f"{value:.2f}"
    return _scaled(value, [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")])


def label(resource: str) -> str:
    """Name of a resource without its unit.

    >>> label("memory_bytes"), label("latency_s"), label("average_bits")
    ('memory', 'latency', 'average bits')
    """
    for unit in ("_bytes", "_s", "_j"):
        resource = resource.removesuffix(unit)
    return resource.replace("_", " ")


def passes(forward: float, backward: float) -> str:
    """Runs of the model over the data.

    >>> passes(14.5, 0), passes(1, 32)
    ('14.5 forward passes', '1 forward and 32 backward passes')
    """
    if not backward:
        return f"{forward:.4g} forward passes"
    return f"{forward:.4g} forward and {backward:.4g} backward passes"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    for size, unit in units:
        if abs(value) >= size:
            number = f"{value / size:.3g}" if value / size >= 100 else f"{value / size:#.3g}"
            return f"{number} {unit}".rstrip()
    return f"{value / units[-1][0]:.3g} {units[-1][1]}".rstrip()


def damage(value: float | None, se: float | None = None) -> str:
    """A damage with three digits and its standard error.

    >>> damage(0.012345, 0.0012), damage(1.5e-7), damage(None)
    ('0.0123 ± 0.0012', '1.5e-07', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.3g}"
    return text if se is None or not math.isfinite(se) else f"{text} ± {se:.2g}"


def percent(value: float | None, se: float | None = None) -> str:
    """A share in percent with its standard error.

    >>> percent(0.917, 0.0095), percent(None)
    ('91.7 ± 0.9 %', '-')
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if se is None or not math.isfinite(se) else f"{100 * value:.1f} ± {100 * se:.1f} %"


def bar(bits: float, most: float, width: int = 24) -> str:
    """A bar for a number of bits.

    >>> bar(4, 8, 8)
    '████'
    """
    return "█" * max(1, round(width * bits / most)) if bits else ""


def short(name: str, width: int = 32) -> str:
    """A layer name that fits, cut in the middle.

    >>> short("model.layers.10.self_attn.q_proj", 20)
    'model.la…attn.q_proj'
    """
    if len(name) <= width:
        return name
    head = (width - 1) * 2 // 5 + (width <= 20)
    return f"{name[:head]}…{name[-(width - 1 - head) :]}"
