import math

import numpy as np
import pytest

from mpsearch import Budget, BudgetError, CostTable, Layer, Peak, TableError, precisions


def table(**more):
    layers = (Layer("a", weight_shape=(10,)), Layer("b", weight_shape=(30,)))
    usage = {"memory_bytes": [[10, 20], [30, 60]], "latency_s": [[1e-3, 2e-3], [2e-3, 1e-3]]}
    return CostTable(layers, precisions("w4 w8"), np.ones((2, 2)), usage=usage, **more)


@pytest.mark.parametrize(
    ("resource", "value", "expected"),
    [
        ("memory_bytes", "1.2MB", 1.2e6),
        ("memory_bytes", "512KiB", 524288.0),
        ("memory_bytes", "1 GiB", 2.0**30),
        ("memory_bytes", 7, 7.0),
        ("latency_s", "3ms", 3e-3),
        ("latency_s", "250us", 2.5e-4),
        ("average_bits", "4.5", 4.5),
    ],
)
def test_amounts(resource, value, expected):
    assert Budget(**{resource: value}).limits(table())[resource] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("resource", "value", "words"),
    [
        ("memory_bytes", "-1MB", "0 or more"),
        ("memory_bytes", "lots", "expected an amount"),
        ("memory_bytes", "3ms", "expected an amount"),
        ("memory_bytes", "", "expected an amount"),
        ("memory_bytes", float("nan"), "finite"),
        ("memory_bytes", float("inf"), "finite"),
        ("memory_bytes", True, "bool"),
        ("average_bits", -1, "0 or more"),
    ],
)
def test_bad_amounts_are_refused_at_once(resource, value, words):
    with pytest.raises(BudgetError, match=words):
        Budget(**{resource: value})


def test_an_unknown_resource_is_answered_with_the_nearest():
    with pytest.raises(BudgetError, match="did you mean 'memory_bytes'"):
        Budget(memory_byte=1).limits(table())


def test_a_percentage_is_of_the_unquantized_model_or_of_the_largest_use():
    known = table(reference_usage={"memory_bytes": 1000}, fixed_usage={"memory_bytes": 5})
    assert Budget(memory_bytes="25%").limits(known) == {"memory_bytes": 250.0}
    unknown = table(fixed_usage={"memory_bytes": 5})
    assert Budget(memory_bytes="10%").limits(unknown) == {"memory_bytes": pytest.approx(8.5)}
    with pytest.raises(BudgetError, match="percentage"):
        Budget(average_bits="25%").limits(unknown)


def test_a_percentage_of_a_peak():
    peak = Peak(np.array([[[1.0, 2.0], [0.0, 0.0]], [[1.0, 4.0], [1.0, 2.0]]]), [10.0, 0.0])
    assert Budget(peak_bytes="50%").limits(table(peaks={"peak_bytes": peak})) == {"peak_bytes": 6.0}


def test_the_command_line_form():
    assert dict(Budget.parse(["memory_bytes=1MB", "bitops = 25%"])) == {
        "memory_bytes": "1MB",
        "bitops": "25%",
    }
    for text in ("memory_bytes", "=3", "memory_bytes="):
        with pytest.raises(BudgetError):
            Budget.parse([text])
    with pytest.raises(BudgetError, match="twice"):
        Budget.parse(["bitops=1", "bitops=2"])


def test_numbers_of_numpy():
    budget = Budget(average_bits=np.int64(4), memory_bytes=np.float32(1.5))
    assert repr(budget) == "Budget(average_bits=4.0, memory_bytes=1.5)"
    with pytest.raises(BudgetError, match="expected an upper limit"):
        Budget(average_bits=[4])


def test_lower_limits():
    budget = Budget(average_bits=(np.float64(3.5), 4), memory_bytes=["20%", None])
    assert repr(budget) == "Budget(average_bits=(3.5, 4), memory_bytes=('20%', None))"
    assert Budget(**budget) == budget == Budget(**dict(budget))
    known = table(reference_usage={"memory_bytes": 1000})
    assert budget.bounds(known) == {"average_bits": (3.5, 4.0), "memory_bytes": (200.0, math.inf)}
    assert budget.limits(known) == {"average_bits": (3.5, 4.0), "memory_bytes": (200.0, None)}
    assert dict(Budget.parse(["average_bits = 3.98..4.02"])) == {"average_bits": ("3.98", "4.02")}
    for pair in ((4, 3), (None, None), (1, 2, 3), (-1, 2), (1, math.inf)):
        with pytest.raises(BudgetError):
            Budget(average_bits=pair)
    peak = Peak(np.ones((1, 2, 2)), [0.0])
    with pytest.raises(BudgetError, match="no lower limit"):
        Budget(peak_bytes=(1, 2)).limits(table(peaks={"peak_bytes": peak}))


def test_effective_bits_need_memory_bytes():
    bare = table()
    del bare.usage["memory_bytes"]
    with pytest.raises(TableError, match="effective_bits"):
        Budget(effective_bits=4).limits(bare)
