"""The verdict on every side of its thresholds."""

import math

import pytest

from mpsearch.plan_search.verdict import CLEAR, tolerance_verdict, verdict


@pytest.mark.parametrize(
    ("difference", "se", "wins", "words"),
    [
        (0.21, 0.1, True, "mixed precision wins by 0.21 ± 0.1 nats over uniform w3"),
        (0.2, 0.1, None, "no measurable difference from uniform w3"),
        (-0.2, 0.1, None, "-0.2 ± 0.1 nats"),
        (-0.21, 0.1, False, "uniform is better: w3 by 0.21 ± 0.1 nats; it is returned"),
        (0.0, 0.0, None, "no measurable difference"),
        (1e-9, 0.0, True, "mixed precision wins"),
        (5.0, math.nan, None, "no measurable difference"),
    ],
)
def test_differences_count_from_two_standard_errors(difference, se, wins, words):
    assert CLEAR == 2.0
    found = verdict("nats", "w3", difference, se, chosen=False)
    assert found.wins is wins
    assert words in found.text


def test_uniform_chosen_and_none_that_fits():
    assert verdict("nats", "w3", 0.0, 0.0, chosen=True).wins is False
    found = verdict("nats", None, math.nan, math.nan, chosen=False)
    assert (found.wins, "no uniform precision fits" in found.text) == (True, True)


@pytest.mark.parametrize(
    ("use", "uniform", "chosen", "wins", "words"),
    [
        (750.0, "w4", False, True, "takes 25.0 % less memory than uniform w4"),
        (1000.0, "w4", True, False, "uniform w4 is the cheapest plan found"),
        (1000.0, "w4", False, None, "mixed precision takes as much memory as uniform w4"),
        (1000.0, None, False, True, "no uniform precision stays within the tolerance"),
    ],
)
def test_the_cheapest_plan_within_a_tolerance(use, uniform, chosen, wins, words):
    found = tolerance_verdict("memory_bytes", use, uniform, 1000.0, 0.1, 0.08, 0.02, "nats", chosen=chosen)
    assert found.wins is wins
    assert words in found.text
    assert "more than the tolerance" not in found.text


@pytest.mark.parametrize(("damage", "over"), [(0.14, False), (0.15, True)])
def test_a_plan_over_the_tolerance_on_other_data_is_said(damage, over):
    found = tolerance_verdict("memory_bytes", 1.0, "w4", 2.0, 0.1, damage, 0.02, "nats", chosen=False)
    assert ("more than the tolerance; give more data" in found.text) is over
