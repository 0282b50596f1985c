"""Profiles of devices for the roofline, each with its source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mpsearch.core.formats import Number
from mpsearch.resources.arithmetic import number


class Device(Protocol):
    """What a roofline needs to know of a device.

    Attributes:
        source: where the numbers come from.
        bytes_per_s: peak bandwidth of the memory that weights and activations lie in.
        overhead_s: of one call of a layer.
    """

    @property
    def source(self) -> str: ...  # noqa: D102

    @property
    def bytes_per_s(self) -> float: ...  # noqa: D102

    @property
    def overhead_s(self) -> float: ...  # noqa: D102

    def macs_per_s(self, weight: Number, activation: Number) -> float:
        """Peak multiply-accumulates a second of a pair of operands; nan where nothing on the device holds both."""
        ...


@dataclass(frozen=True)
class Processor:
    """A device with arithmetic units of some formats: operands are widened to the fastest format that holds both.

    Attributes:
        operations: format -> peak operations a second, dense; a multiply-accumulate is two.
        bytes_per_s: peak bandwidth of its memory.
        overhead_s: of one call of a layer.
        source: of the numbers.

    int4 weights with int8 inputs run as int8, int4 with float16 as float16:

    >>> t4 = DEVICES["t4"]
    >>> t4.macs_per_s(number("4", ""), number("8", "")), t4.macs_per_s(number("4", ""), number("fp16", ""))
    (65000000000000.0, 32500000000000.0)
    """

    operations: Mapping[str, float]
    bytes_per_s: float
    overhead_s: float
    source: str

    def macs_per_s(self, weight: Number, activation: Number) -> float:
        """See `Device`."""
        rates = [
            rate
            for name, rate in self.operations.items()
            if (unit := number(name, "")).holds(weight) and unit.holds(activation)
        ]
        return max(rates) / 2 if rates else math.nan


@dataclass(frozen=True)
class Fpga:
    """A fabric of lookup tables that holds as many multiply-accumulate units of a format as fit, one result a cycle each.

    Cost of a unit, after the model of 2311.12359 (integers and minifloats of 3 to 8 bits, exact accumulation), in lookup
    tables: multiplier p_w p_a for significands of p bits (integers: b_w b_a); adder of exponents max(e_w, e_a) + 1; a shifter of
    W ceil(log2 W) / 2 that aligns the product, and an accumulator of W bits, W = 2^e_w + 2^e_a + p_w + p_a + log2 K (integers:
    b_w + b_a + log2 K, no shifter). It tells formats apart; absolute times need the synthesis of one's own unit.

    Attributes:
        luts: 6-input lookup tables.
        share: part of them that arithmetic units may fill.
        clock_hz: of the units.
        sum_length: K, products in one sum without overflow.
        bytes_per_s: peak bandwidth of its memory.
        overhead_s: of one call of a layer.
        source: of the numbers.

    >>> fpga = DEVICES["zcu102"]
    >>> fpga.luts_of(number("4", ""), number("4", "")), fpga.luts_of(number("fp4_e2m1", ""), number("fp4_e2m1", ""))
    (32.0, 77.0)
    """

    luts: int
    share: float
    clock_hz: float
    bytes_per_s: float
    overhead_s: float
    source: str
    sum_length: int = 256

    def luts_of(self, weight: Number, activation: Number) -> float:
        """Lookup tables of one multiply-accumulate unit.

        Args:
            weight: format of the weight.
            activation: format of the input.
        """
        guard = math.ceil(math.log2(self.sum_length))
        if weight.bits and activation.bits:
            return float(weight.bits * activation.bits + weight.bits + activation.bits + guard)
        width = (
            weight.significand
            + activation.significand
            + guard
            + sum(2**x.exponent if x.exponent else 0 for x in (weight, activation))
        )
        shifter = width * math.ceil(math.log2(width)) / 2
        return (
            weight.significand * activation.significand
            + max(weight.exponent, activation.exponent)
            + 1
            + shifter
            + width
        )

    def macs_per_s(self, weight: Number, activation: Number) -> float:
        """See `Device`."""
        return self.luts * self.share / self.luts_of(weight, activation) * self.clock_hz


_LAUNCH = "overhead 5 us: the usual order of a kernel launch, not from the data sheet"
#: Devices by name; `Roofline` takes one of one's own as well.
DEVICES: dict[str, Device] = {
    "t4": Processor(
        {"fp32": 8.1e12, "fp16": 65e12, "8": 130e12, "4": 260e12},
        320e9,
        5e-6,
        f"NVIDIA T4 data sheet (2019): 8.1 / 65 / 130 / 260 T, 320 GB/s; {_LAUNCH}",
    ),
    "a100": Processor(
        {"fp32": 19.5e12, "fp16": 312e12, "bf16": 312e12, "8": 624e12, "4": 1248e12},
        2039e9,
        5e-6,
        "NVIDIA A100 80 GB SXM data sheet (2021): 19.5 / 312 / 312 / 624 T dense, 2039 GB/s; int4 1248 T from the A100 "
        f"architecture whitepaper (2020); {_LAUNCH}",
    ),
    "h100": Processor(
        {
            "fp32": 66.9e12,
            "fp16": 989.4e12,
            "bf16": 989.4e12,
            "fp8_e4m3": 1978.9e12,
            "fp8_e5m2": 1978.9e12,
            "8": 1978.9e12,
        },
        3352e9,
        5e-6,
        f"NVIDIA H100 architecture whitepaper (2022), SXM5, dense; no int4 units; {_LAUNCH}",
    ),
    "phone-npu": Processor(
        {"fp16": 17.5e12, "8": 35e12},
        51.2e9,
        20e-6,
        "Apple A17 Pro (newsroom, 2023-09-12): 35 T operations a second, taken as int8, and half of them as float16; 64-bit "
        "LPDDR5-6400, 51.2 GB/s; overhead 20 us: assumed",
    ),
    "cortex-m": Processor(
        {"fp32": 168e6, "int16": 672e6},
        672e6,
        5e-6,
        "Arm Cortex-M4 technical reference manual r0p1: SMLAD two 16-bit MACs a cycle (int8 is widened to "
        "16 bits), VMUL and VADD one cycle each; STM32F407 at 168 MHz, 32 bits a cycle from memory; overhead 840 cycles: assumed",
    ),
    "zcu102": Fpga(
        luts=274_080,
        share=0.7,
        clock_hz=300e6,
        bytes_per_s=19.2e9,
        overhead_s=5e-6,
        source="AMD Zynq UltraScale+ ZU9EG (DS891): 274,080 lookup tables; 64-bit DDR4-2400, 19.2 GB/s; 70 % filled at 300 MHz and "
        "overhead 5 us: assumed",
    ),
}
