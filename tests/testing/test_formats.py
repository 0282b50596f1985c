"""The suite of number formats over every registered one, and that it turns red."""

import dataclasses

import pytest
import torch

from mpsearch.core.formats import FLOATS, NumberFormat
from mpsearch.quantizers.formats import FORMATS, Format
from mpsearch.quantizers.formats.scaled import ScaledFormat
from mpsearch.testing.formats import format_checks

CASES = [pytest.param(check, id=f"{form}-{name}") for form in FORMATS for name, check in format_checks(form)]


@pytest.mark.parametrize("check", CASES)
def test_every_format_keeps_its_contract(check):
    check()


def broken(form: Format) -> set[str]:
    names = set()
    for name, check in format_checks(form):
        try:
            check()
        except AssertionError:
            names.add(name)
    return names


def sixteen(*values: float) -> ScaledFormat:
    return ScaledFormat(NumberFormat("pot4", "codebook", 4, FLOATS["float16"], block=64, values=values))


POWERS = (
    -1.0,
    -0.5,
    -0.25,
    -0.125,
    -0.0625,
    -0.03125,
    -0.015625,
    0.0,
    0.015625,
    0.03125,
    0.0625,
    0.125,
    0.25,
    0.5,
    0.75,
    1.0,
)


def test_a_sound_codebook_of_ones_own_passes():
    assert broken(sixteen(*POWERS)) == set()


def test_misplaced_values_of_a_codebook_turn_it_red():
    values = list(POWERS)
    values[3], values[11] = 3.0, 7.0
    names = broken(sixteen(*values))
    assert "values are finite, unique and sorted" in names
    assert "rounding takes the nearest of all values" in names


def test_values_that_occur_twice_turn_it_red():
    assert "values are finite, unique and sorted" in broken(sixteen(*POWERS[:-1], POWERS[-2]))


def test_a_wrong_number_for_hardware_turns_it_red():
    facts = FORMATS["mxfp4"].facts
    wrong = dataclasses.replace(FORMATS["mxfp4"], facts=dataclasses.replace(facts, number=FLOATS["float16"]))
    assert broken(wrong) >= {"the facts agree with each other"}


def test_rounding_down_turns_it_red():
    class Down(ScaledFormat):
        def round_rows(self, rows, out, fit, symmetric, largest):
            stored = super().round_rows(rows, out, fit, symmetric, largest)
            out.copy_((rows / stored.scales).floor() * stored.scales)
            return stored

    assert "every weight goes to the nearest value under its scale" in broken(Down(FORMATS["4"].facts))
    assert torch.isfinite(FORMATS["4"].grid().values()).all()
