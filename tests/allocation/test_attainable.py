"""The range of every resource, against an enumeration of all plans."""

import itertools
import math

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.core.problem import attainable
from mpsearch.core.table import Peak

P = 3


def table_of(groups, blocked=(), seed=0):
    """A random table with a sum and a peak over two steps."""
    generator = np.random.default_rng(seed)
    layers = tuple(mps.Layer(f"l{i}", "linear", (4, 4), 16, group) for i, group in enumerate(groups))
    sensitivity = generator.random((len(layers), P))
    for cell in blocked:
        sensitivity[cell] = np.nan
    return mps.CostTable(
        layers,
        mps.precisions("w2 w4 w8"),
        sensitivity,
        usage={"memory_bytes": generator.integers(1, 50, (len(layers), P)).astype(float)},
        fixed_usage={"memory_bytes": 7.0},
        peaks={
            "activation_bytes": Peak(generator.integers(1, 50, (2, len(layers), P)).astype(float), np.array([3.0, 1.0]))
        },
    )


def plans(table):
    """All options that are allowed, one for each group."""
    for options in itertools.product(range(P), repeat=len(table.layers)):
        rows = np.arange(len(options))
        chosen = {}
        same = all(
            chosen.setdefault(layer.group, p) == p
            for layer, p in zip(table.layers, options, strict=True)
            if layer.group
        )
        if same and table.allowed[rows, options].all():
            yield np.array(options)


@pytest.mark.parametrize("groups", [("", "", "", ""), ("a", "a", "", ""), ("a", "b", "a", "b")])
@pytest.mark.parametrize("blocked", [(), ((0, 0),), ((0, 0), (2, 1), (3, 2))])
def test_every_use_of_a_plan_is_in_the_range_and_the_ends_are_reached(groups, blocked):
    table = table_of(groups, blocked)
    rows = np.arange(len(groups))
    found = attainable(table)
    sums = [table.usage["memory_bytes"][rows, plan].sum() + 7 for plan in plans(table)]
    assert found["memory_bytes"] == (min(sums), max(sums))
    peak = table.peaks["activation_bytes"]
    steps = [
        [usage[rows, plan].sum() + fixed for usage, fixed in zip(peak.usage, peak.fixed, strict=True)]
        for plan in plans(table)
    ]
    assert found["activation_bytes"] == (max(np.min(steps, axis=0)), max(map(max, steps)))


def test_a_group_without_a_common_precision_has_no_range():
    table = table_of(("a", "a", ""), ((0, 0), (0, 1), (1, 2)))
    assert not list(plans(table))
    assert attainable(table)["memory_bytes"] == (math.inf, -math.inf)
