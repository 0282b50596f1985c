import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpsearch import BudgetError
from mpsearch.core import amounts

RESOURCES = ("memory_bytes", "latency_s", "energy_j", "average_bits", "bitops")
values = st.floats(1e-12, 1e18) | st.just(0.0)


@given(st.sampled_from(RESOURCES), values, st.integers(3, 12))
def test_what_is_printed_is_read_back(resource: str, value: float, digits: int) -> None:
    read = amounts.parse(resource, amounts.text(resource, value, digits))
    lost = 0.005001 if resource == "average_bits" else 0.500001 * 10.0 ** (1 - digits) * value
    assert abs(read - value) <= lost


@given(st.sampled_from(RESOURCES), values)
def test_a_tick_is_read_back(resource: str, value: float) -> None:
    read = amounts.parse(resource, amounts.tick(resource, value))
    assert read == pytest.approx(value, rel=1e-5, abs=0.005001 if resource == "average_bits" else 0)


@given(st.integers(0, 13), st.floats(0.999, 1.001))
def test_the_unit_fits_the_number_as_it_is_rounded(power: int, factor: float) -> None:
    number, unit = amounts.text("memory_bytes", max(1.0, factor * 10.0**power)).split()
    assert 1 <= float(number) < 1000, f"{number} {unit}"


@pytest.mark.parametrize(
    ("resource", "text", "expected"),
    [
        ("memory_bytes", "1.5MB", 1.5e6),
        ("memory_bytes", "1 KB", 1e3),
        ("memory_bytes", "2PiB", 2.0**51),
        ("latency_s", "3 µs", 3e-6),
        ("energy_j", "2uJ", 2e-6),
        ("average_bits", "4 bits", 4.0),
        ("effective_bits", "1 bit", 1.0),
        ("bitops", "1.5G", 1.5e9),
        ("bitops", "-.5e1", None),
        ("memory_bytes", "4 bits", None),
        ("latency_s", "1B", None),
        ("sensitivity", "-3", -3.0),
    ],
)
def test_units(resource: str, text: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(BudgetError, match=resource):
            amounts.parse(resource, text)
    else:
        assert amounts.parse(resource, text) == pytest.approx(expected, rel=1e-15)


def test_a_percentage_needs_a_whole() -> None:
    assert amounts.parse("memory_bytes", "25%", 1000.0) == 250.0
    with pytest.raises(BudgetError, match="a percentage has no meaning here"):
        amounts.parse("memory_bytes", "25%")


@pytest.mark.parametrize("resource", RESOURCES)
def test_what_is_not_finite_has_no_unit(resource: str) -> None:
    assert {amounts.text(resource, value) for value in (math.nan, math.inf, -math.inf)} == {"-"}
