"""Ties between layers that share no memory, and what each of them costs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import solve
from mpsearch.core import amounts, printing
from mpsearch.core.budget import Budget
from mpsearch.core.solution import Solution, Status
from mpsearch.core.table import Array, CostTable
from mpsearch.errors import MpsearchError

#: Ties that are priced one by one; of more, those of one kind together.
_ONE_BY_ONE = 16
#: Lines of text, and names in a line.
_LINES, _NAMES = 8, 4
_SHARED = "shared weight"


@dataclass(frozen=True)
class Tie:
    """Layers that share a precision though they share no memory, with the price of that.

    Attributes:
        layers: their names; of several groups, all of them.
        groups: how many groups: 1, or all of one kind.
        reason: why they are tied.
        price: what the tie costs, in the unit of the table or of the minimized resource; None where that is not known.
        unknown: why it is not known; empty where it is.
    """

    layers: tuple[str, ...]
    groups: int
    reason: str
    price: float | None
    unknown: str = ""


def tie_prices(table: CostTable, budget: Budget, *, minimize: str = "sensitivity") -> list[Tie]:
    """What each tie of a table costs at a budget, by the table, the dearest first.

        price(t) = min {f(plan) : plan keeps all ties} - min {f(plan) : plan keeps all ties but t},   both within the budget

    f is the sensitivity, or the minimized resource. Both minima are proven optima of `solve`; a plan that keeps a tie is one that need
    not, so no price is below 0. Prices of several ties do not add up to the price of all. One solve a tie, up to 16 groups; of more,
    groups of one kind (one reason, the same last parts of the names: all `q_proj`, `k_proj`, `v_proj`) are priced as one tie, and
    `groups` tells how many.

    A group whose layers share a weight has no price, since nothing can part it; nor has one whose layers were scored as one
    (`origin["scored_together"]`), since the table does not tell what each would do alone.

    Args:
        table: with the ties as groups of its layers, each row with the layer's own score.
        budget: limits.
        minimize: `sensitivity`, or a resource.

    Raises:
        InfeasibleError: where no plan meets the budget.
        BudgetError: where the budget does not fit the table.

    Alone, `a` takes 8 bits and `b` 2, at a damage of 1 + 0 + 2 + 0; tied, both take 4:

    >>> import mpsearch as mps
    >>> layers = [mps.Layer(name, weight_shape=(4,), group="a (one matrix in vllm)") for name in "ab"]
    >>> table = mps.CostTable(layers, mps.precisions("w2 w4 w6"), [[9, 4, 1], [2, 1, 0.5]])
    >>> [tie.price for tie in mps.tie_prices(table, mps.Budget(average_bits=4))]     # (4 + 1) - (1 + 2)
    [2.0]
    """
    groups = _ties(table)
    if not groups:
        return []
    tied = solve(table, budget, minimize=minimize)
    together = set(table.origin.get("scored_together", ()))
    kinds: dict[tuple[str, ...], list[str]] = {}
    for title, names in groups.items():
        ends = sorted({name.rpartition(".")[2] for name in names})
        alone = title in together
        key = (_reason(title, names), str(alone), *ends) if len(groups) > _ONE_BY_ONE else (title,)
        kinds.setdefault(key, []).append(title)
    ties = []
    for titles in kinds.values():
        members = tuple(name for title in titles for name in groups[title])
        price, unknown = None, "its layers were scored as one"
        if tied.status is not Status.OPTIMAL:
            unknown = "the best plan is not proven"
        elif titles[0] not in together:
            price, unknown = _price(table, set(titles), tied, budget, minimize)
        ties.append(Tie(members, len(titles), _reason(titles[0], groups[titles[0]]), price, unknown))
    return sorted(ties, key=lambda tie: -np.inf if tie.price is None else tie.price, reverse=True)


def _price(
    table: CostTable, titles: set[str], tied: Solution, budget: Budget, minimize: str
) -> tuple[float | None, str]:
    """Price, and why there is none."""
    loose = replace(table, layers=tuple(replace(x, group="") if x.group in titles else x for x in table.layers))
    try:
        free = solve(loose, budget, minimize=minimize)
    except MpsearchError as error:
        return None, str(error)
    if free.status is not Status.OPTIMAL:
        return None, "the best plan is not proven"
    values = [
        solution.sensitivity if minimize == "sensitivity" else solution.usage[minimize] for solution in (tied, free)
    ]
    return max(0.0, values[0] - values[1]), ""


def _ties(table: CostTable) -> dict[str, list[str]]:
    """Groups of two layers and more that share no memory -> their names."""
    groups: dict[str, list[str]] = {}
    for layer in table.layers:
        if layer.group:
            groups.setdefault(layer.group, []).append(layer.name)
    return {title: names for title, names in groups.items() if len(names) > 1 and _SHARED not in _reason(title, names)}


def _reason(title: str, names: Sequence[str]) -> str:
    """`q_proj (one matrix in vllm)` -> what stands in parentheses; a title of the user's own as it is."""
    head = f"{names[0]} ("
    return title[len(head) : -1] if title.startswith(head) and title.endswith(")") else title


def in_proportion(weights: Array, rows: NDArray[np.int64]) -> Array:
    """The part of each layer in the sum of its unit, column by column; equal parts where the sum is 0 or not known.

    Args:
        weights: (L, P), 0 or more.
        rows: (L,) unit of each layer.

    >>> in_proportion(np.array([[3.0], [1.0], [5.0], [0.0], [0.0]]), np.array([0, 0, 1, 2, 2])).ravel().tolist()
    [0.75, 0.25, 1.0, 0.5, 0.5]
    """
    totals = np.zeros((int(rows.max()) + 1, weights.shape[1]))
    np.add.at(totals, rows, weights)
    usable = np.isfinite(totals) & (totals > 0)
    equal = (1.0 / np.bincount(rows))[rows][:, None]
    return np.where(usable[rows], weights / np.where(usable, totals, 1.0)[rows], equal)


def as_json(ties: Sequence[Tie]) -> list[dict[str, Any]]:
    """As JSON values."""
    return [{**asdict(tie), "layers": list(tie.layers)} for tie in ties]


def ties_text(predicted: Mapping[str, Any]) -> str:
    """What the ties of a plan cost, a line each; empty without any.

    Args:
        predicted: of the plan: `ties` as `as_json` gives them, `unit`, `sensitivity`, `minimized`.

    >>> ties = as_json([Tie(("q", "k"), 1, "one matrix in vllm", 0.25)])
    >>> print(ties_text({"ties": ties, "unit": "nats", "sensitivity": 1.0}))
    q, k tied (one matrix in vllm): costs 0.25 nats, 25 % of the predicted damage
    """
    lines = []
    ties, minimized = predicted.get("ties", ()), predicted.get("minimized", "sensitivity")
    for tie in ties[:_LINES]:
        names = list(tie["layers"])
        shown = ", ".join(names[:_NAMES]) + (f", ... ({len(names)} layers)" if len(names) > _NAMES else "")
        many = f" in {tie['groups']} groups" if tie["groups"] > 1 else ""
        head = f"{shown} tied{many} ({tie['reason']}): "
        if tie["price"] is None:
            lines.append(f"{head}price unknown, {tie['unknown']}")
            continue
        if minimized != "sensitivity":
            lines.append(f"{head}costs {amounts.text(minimized, tie['price'])}")
            continue
        damage = predicted.get("sensitivity")
        share = f", {100 * tie['price'] / damage:.2g} % of the predicted damage" if damage and tie["price"] else ""
        lines.append(f"{head}costs {printing.damage(tie['price'])} {predicted.get('unit', '')}{share}")
    if len(ties) > _LINES:
        lines.append(f"... and {len(ties) - _LINES} further ties")
    return "\n".join(lines)
