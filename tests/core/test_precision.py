import pytest

from mpsearch import PlanError, Precision, precisions
from mpsearch.core.formats import number_format


@pytest.mark.parametrize(
    ("text", "weight", "activation", "group"),
    [
        ("w4", "4", "16", None),
        ("w4a8", "4", "8", None),
        ("w4g128", "4", "16", 128),
        ("w8a8", "8", "8", None),
        ("wfp8_e4m3afp8_e4m3", "fp8_e4m3", "fp8_e4m3", None),
        ("wmxfp4amxfp8", "mxfp4", "mxfp8", None),
        ("w3a16g128", "3", "16", 128),
        ("w16", "16", "16", None),
        ("wnvfp4a4g16", "nvfp4", "4", 16),
    ],
)
def test_the_grammar(text, weight, activation, group):
    precision = Precision.parse(text)
    assert (precision.weight, precision.activation, precision.group_size) == (weight, activation, group)
    assert Precision.parse(str(precision)) == precision


@pytest.mark.parametrize(
    "text", ["", "4", "w", "w0", "w17", "wint4", "w4a", "w4g0", "w4a8g", "a8", "w4 a8", "wfp8_e4m4", "W4"]
)
def test_what_is_no_precision_is_refused_in_one_line(text):
    with pytest.raises(PlanError) as caught:
        Precision.parse(text)
    assert "\n" not in str(caught.value)


def test_lists():
    assert [str(p) for p in precisions("w2, w4  w8a8")] == ["w2", "w4", "w8a8"]
    with pytest.raises(PlanError, match="occurs twice"):
        precisions("w2 w4 w2")
    with pytest.raises(PlanError, match="empty"):
        precisions(" ")


def test_nominal_bits():
    named = {"mxfp4": 4, "nvfp4": 4, "fp6_e2m3": 6, "fp8_e5m2": 8, "bf16": 16, "3": 3}
    assert {name: number_format(name).bits for name in named} == named
