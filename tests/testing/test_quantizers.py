"""The suite of quantizers over every registered one, and that it turns red."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from mpsearch.quantizers import GPTQ, QUANTIZERS, Around, HadamardRotation, MinMax, RoundToNearest, SmoothQuant
from mpsearch.quantizers.packing import group_of
from mpsearch.testing.quantizers import quantizer_checks

#: What each promises about its error.
PROMISES = {"rtn": "weights", "awq": "outputs"}
OTHERS = {
    "rtn-asymmetric": RoundToNearest(symmetric=False),
    "rtn-tensor": RoundToNearest(granularity="tensor"),
    "rtn-token": RoundToNearest(activation="token"),
    "min-max-symmetric": MinMax(symmetric=True),
    "hadamard-token": HadamardRotation(RoundToNearest(symmetric=False, activation="token")),
    "smoothquant-weights": SmoothQuant(alpha=0.2),
    "gptq-asymmetric": GPTQ(quantizer=RoundToNearest(symmetric=False)),
}
CASES = [
    pytest.param(check, id=f"{name}-{title}")
    for name, quantizer in {**{name: name for name in QUANTIZERS}, **OTHERS}.items()
    for title, check in quantizer_checks(
        quantizer, no_worse_than_rounding=PROMISES.get(name), idempotent=name != "min-max-symmetric"
    )
]


@pytest.mark.parametrize("check", CASES)
def test_every_quantizer_keeps_its_contract(check):
    check()


def broken(quantizer, **keywords) -> set[str]:
    names = set()
    for name, check in quantizer_checks(quantizer, **keywords):
        try:
            check()
        except AssertionError:
            names.add(name)
    return names


BYTES = "stored bytes are those of what is stored"


def test_a_plain_function_passes():
    assert broken(lambda weight, precision: RoundToNearest()(weight, precision)) == set()


def test_a_quantizer_that_lies_about_its_bytes_turns_it_red():
    @dataclass(frozen=True)
    class Packed(Around):
        quantizer: RoundToNearest = dataclasses.field(default=RoundToNearest())

        def stored_bytes(self, layer, precision):
            whole = super().stored_bytes(layer, precision)
            return whole - 4 if precision.quantizes_weight else whole

    @dataclass(frozen=True)
    class Told(Packed):
        @property
        def bytes_from(self):
            return "told"

    class Half:  # half of the codes, by an object with a part of the protocol
        def __call__(self, weight, precision):
            return HadamardRotation()(weight, precision)

        def stored_bytes(self, layer, precision):
            return layer.numel * precision.weight_bits // 16

    assert broken(Packed()) == {BYTES}
    assert broken(Told()) == {BYTES}
    assert broken(Half()) == {BYTES}


def test_bytes_are_held_against_what_is_really_packed():
    @dataclass(frozen=True)
    class WithIndices(Around):
        quantizer: RoundToNearest = dataclasses.field(default=RoundToNearest())
        counted: int = 4

        @property
        def bytes_from(self):
            return "told"

        def stored_bytes(self, layer, precision):
            indices = self.counted * (layer.numel // layer.weight_shape[0])
            return super().stored_bytes(layer, precision) + (indices if precision.quantizes_weight else 0)

    def pack(weight, precision):
        packed = RoundToNearest().codes(weight, precision).pack()
        yield packed.codes
        yield from (part for part in (packed.scales, packed.tensor_scale) if part is not None)
        yield torch.zeros(weight[0].numel(), dtype=torch.int32)
        assert group_of(precision) != 0

    assert broken(WithIndices(), pack=pack) == set()
    assert broken(WithIndices(counted=2), pack=pack) == {BYTES}


def test_what_writes_to_the_weight_or_draws_from_the_seed_turns_it_red():
    def in_place(weight, precision):
        if precision.quantizes_weight:
            weight.copy_(RoundToNearest()(weight, precision))
        return weight

    def noisy(weight, precision):
        values = RoundToNearest()(weight, precision)
        return values + 1e-3 * torch.randn_like(weight) if precision.quantizes_weight else values

    assert "the weight that came in is untouched" in broken(in_place)
    assert "the same weight gives the same values, whatever the seed" in broken(noisy)


def test_what_changes_shape_dtype_or_an_unquantized_weight_turns_it_red():
    assert broken(lambda weight, precision: RoundToNearest()(weight, precision).double()) >= {
        "shape, dtype and device are kept"
    }
    assert "w16 leaves a weight as it is" in broken(lambda weight, precision: weight.round())
    assert "more bits, less error" in broken(lambda weight, precision: weight * 0.5)


def test_what_is_worse_than_rounding_turns_it_red():
    @dataclass(frozen=True)
    class Worse(Around):
        quantizer: RoundToNearest = dataclasses.field(default=RoundToNearest())

        def __call__(self, weight, precision):
            values = self.quantizer(weight, precision)
            return values * 1.01 if precision.quantizes_weight else values

    assert "no worse than plain rounding" in broken(Worse(), no_worse_than_rounding="outputs")
