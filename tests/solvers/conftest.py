"""Instances with known optima, and the plainer programs that solvers are held against."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parent.parent / "data"


def _knapsacks():
    for name in (
        "budget_below_min",
        "bytes_1e12",
        "control_24x4",
        "nan_inf_costs",
        "negative_sens",
        "three_budgets_7x4",
        "ties_all_equal",
        "tiny_costs_1e-9",
        "zero_rows",
    ):
        case = json.loads((DATA / "solver" / f"{name}.json").read_text())
        sensitivity = np.array(case["c"], float)
        sensitivity[~np.isfinite(sensitivity)] = np.nan
        yield name, sensitivity, np.array(case["W"], float), np.array(case["B"], float), case["optimal"]


def _hawq():
    case = json.loads((DATA / "hawq_resnet18.json").read_text())
    inputs = {key: np.array(value) for key, value in case["inputs"].items() if key != "layers"}
    trace, macs, params = (inputs[key].astype(float) for key in ("hessian_trace_normalized", "macs", "params"))
    sensitivity = np.stack([trace * inputs["delta_w_sq_4bit"], trace * inputs["delta_w_sq_8bit"]], axis=1)
    usage = {
        "modelsize": np.stack([4 * params, 8 * params], axis=1),
        "bops": np.stack([16 * macs, 64 * macs], axis=1),
        "latency": np.round(1e8 * np.stack([inputs["latency_ms_int4"], inputs["latency_ms_int8"]], axis=1)),
    }
    head = np.arange(len(params))
    head[inputs["tied_pairs"][:, 1]] = inputs["tied_pairs"][:, 0]
    tie = (np.unique(head)[:, None] == head).astype(float)  # sums the rows that share one precision
    for name, answer in case["optimum"].items():
        limits = np.array([answer["limit"]])
        use = tie @ usage[name.split("_")[0]]
        yield f"hawq_{name}", tie @ sensitivity, use[None], limits, answer["optimal_sensitivity"]


@pytest.fixture(scope="session")
def known_optima():
    """(name, sensitivity, usage, limits, optimum or None where infeasible)."""
    return [*_knapsacks(), *_hawq()]


@pytest.fixture(scope="session")
def ordinary():
    """Maker of tables as networks have them: damage falls, use rises with bits; lognormal sizes."""

    def make(rows, columns, resources=1, *, seed=0, fraction=0.35):
        rng = np.random.default_rng(seed)
        sizes = np.ceil(rng.lognormal(2.5, 1.0, (resources, rows, 1)))
        usage = sizes * np.linspace(2, 9, columns).round()
        sensitivity = np.sort(rng.lognormal(0, 1.5, (rows, columns)), axis=1)[:, ::-1] * 1e-4
        least, most = usage.min(axis=2).sum(axis=1), usage.max(axis=2).sum(axis=1)
        return sensitivity.copy(), usage, np.floor(least + fraction * (most - least))

    return make


@pytest.fixture(scope="session")
def enumerated():
    """Every plan within the limits as (value, options), best first, by a plain loop."""

    def enumerate_plans(sensitivity, usage, limits, interactions=None):
        found = []
        for options in itertools.product(*(np.flatnonzero(~np.isnan(row)).tolist() for row in sensitivity)):
            cells = list(enumerate(options))
            if all(math.fsum(use[c] for c in cells) <= limit for use, limit in zip(usage, limits, strict=True)):
                value = math.fsum(sensitivity[c] for c in cells)
                if interactions is not None:
                    for a, b, extra in zip(
                        interactions.first.tolist(), interactions.second.tolist(), interactions.value, strict=True
                    ):
                        value += extra * (tuple(a) in cells and tuple(b) in cells)
                found.append((value, options))
        return sorted(found)

    return enumerate_plans


@pytest.fixture(scope="session")
def optimum_by_table():
    """Least damage within one whole-number budget: the recursion over used units, a dictionary a row."""

    def solve(sensitivity, usage, limit):
        states = {0: 0.0}
        for row, use in zip(sensitivity.tolist(), usage.astype(int).tolist(), strict=True):
            following = {}
            for (used, damage), option in itertools.product(states.items(), range(len(row))):
                total = used + use[option]
                if total <= limit:
                    following[total] = min(following.get(total, math.inf), damage + row[option])
            states = following
        return min(states.values(), default=None)

    return solve
