"""A plan as text."""

from collections import Counter
from collections.abc import Sequence

import mpsearch as mps
from mpsearch.cli.screen import Screen
from mpsearch.core import amounts, printing
from mpsearch.display.blocks import MOST, blocks


def plan_text(plan: mps.Plan, screen: Screen) -> str:
    """A line for each layer, or for each block of many, with a bar of the (mean) weight bits."""
    precisions = list(plan.values())
    greatest = max(8, *(precision.weight_bits for precision in precisions))
    if len(plan) <= MOST:
        room = min(24, screen.width // 3)
        header = ["layer", "precision", "weight bits"]
        rows: list[list[str | printing.Bar]] = [
            [name, str(precision), printing.Bar(precision.weight_bits, greatest, room)]
            for name, precision in plan.items()
        ]
    else:
        room = min(16, screen.width // 5)
        header = ["block", "layers", "precisions", "bits", "weight bits"]
        rows = []
        for block in blocks(list(plan)):
            members = precisions[block.start : block.stop]
            bits = sum(precision.weight_bits for precision in members) / len(members)
            bar = printing.Bar(bits, greatest, room)
            rows.append([block.label, str(len(members)), _counts(members, 3), f"{bits:.1f}", bar])
    whole = screen.prose(f"{len(plan)} layers: {_counts(precisions)}")
    return f"{screen.table(header, rows)}\n{whole}"


def usage_text(plan: mps.Plan, screen: Screen) -> str:
    """What the plan uses of each resource, and of each limit."""
    rows = []
    for name, value in plan.usage.items():
        limit = plan.budget.get(name)
        most = amounts.upper_limit(limit)
        share = printing.percent(value / most) if most else ""
        rows.append([name, amounts.text(name, value), "" if limit is None else amounts.limit_text(name, limit), share])
    return screen.table(["resource", "used", "budget", "share"], rows)


def _counts(precisions: Sequence[mps.Precision], most: int | None = None) -> str:
    """How many layers have which precision, the most frequent first."""
    counts = Counter(map(str, precisions)).most_common()
    text = ", ".join(f"{count} {name}" for name, count in counts[:most])
    return f"{text}, …" if most is not None and len(counts) > most else text
