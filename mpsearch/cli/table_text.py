"""A cost table as text."""

from collections.abc import Mapping

import numpy as np

import mpsearch as mps
from mpsearch.cli.screen import Screen
from mpsearch.core import amounts, printing
from mpsearch.core.printing import undecided_text
from mpsearch.core.problem import attainable
from mpsearch.core.table import Array
from mpsearch.display.blocks import blocks

#: Groups that are named, and layers of each.
_GROUPS, _MEMBERS = 8, 6
_NAME, _CELL = 20, 10  # columns that a name needs, and a damage with the space before it


def table_text(table: mps.CostTable, screen: Screen) -> str:
    """Damage of every layer, or block of layers, at its precisions; what plans can cost; the groups."""
    names = [str(precision) for precision in table.precisions]
    columns = _spread(len(names), max(2, (screen.width - _NAME) // _CELL))
    runs = blocks([layer.name for layer in table.layers])
    header = f"damage [{table.unit}]" if len(runs) == len(table.layers) else f"mean damage [{table.unit}]"
    cells = [
        [
            block.label if block.stop - block.start == 1 else f"{block.label} ({block.stop - block.start})",
            *(_mean(table.sensitivity[block.start : block.stop, j]) for j in columns),
        ]
        for block in runs
    ]
    size = f"{len(table.layers)} layers x {len(names)} precisions: {' '.join(names)}"
    facts = filter(None, [undecided_text(table.origin.get("undecided", {})), printing.counted(table.origin)])
    groups: dict[str, list[str]] = {}
    for layer in table.layers:
        if layer.group:
            groups.setdefault(layer.group, []).append(layer.name)
    parts = [
        screen.table([header, *(names[j] for j in columns)], cells) + "\n" + screen.prose("\n".join([size, *facts])),
        range_text(table, screen),
        *([groups_text(groups, screen)] if groups else []),
    ]
    return "\n\n".join(parts)


def range_text(table: mps.CostTable, screen: Screen) -> str:
    """The least and the most that a plan uses of each resource, and what the unquantized model does."""
    rows = [
        [name, *(amounts.text(name, value) for value in (low, high, table.reference_usage.get(name, np.nan)))]
        for name, (low, high) in attainable(table).items()
    ]
    return screen.table(["any plan uses", "from", "to", "unquantized"], rows)


def groups_text(groups: Mapping[str, list[str]], screen: Screen) -> str:
    """Layers that share one precision."""
    lines = [
        f"group {name}: {', '.join(members[:_MEMBERS])}"
        + (f", … {len(members) - _MEMBERS} more" if len(members) > _MEMBERS else "")
        for name, members in list(groups.items())[:_GROUPS]
    ]
    if len(groups) > _GROUPS:
        lines.append(f"… {len(groups) - _GROUPS} more groups")
    return screen.prose("\n".join(lines))


def _mean(damages: Array) -> str:
    """Of the layers that may have this precision; `.` where none may."""
    allowed = damages[~np.isnan(damages)]
    return printing.damage(float(allowed.mean())) if allowed.size else "."


def _spread(count: int, most: int) -> list[int]:
    """At most so many places of a row, the first and the last among them.

    >>> _spread(3, 5), _spread(9, 3)
    ([0, 1, 2], [0, 4, 8])
    """
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]
