"""`latency_s` by the roofline against a loop by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.quantizers.formats.casts import CASTS
from mpsearch.quantizers.formats.minifloats import enumerate_minifloat, round_minifloat
from mpsearch.resources import DEVICES, Fpga, Processor, Roofline
from mpsearch.resources.arithmetic import number

OPTIONS = mps.precisions("w4 w4a4 w8a8 wfp8_e4m3afp8_e4m3 wbf16abf16 w16")


class Net(nn.Module):
    """A convolution, and a linear layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 8, 3), nn.Linear(36, 36)

    def forward(self, x):
        return self.fc(self.fc(self.conv(x).flatten(2)))


def times(device, model=None, options=OPTIONS):
    net, x = model or Net(), torch.randn(3, 2, 8, 8)
    return Roofline(device)(net, mps.layers(net, x), options, example=x)


def test_by_hand():
    """Without arithmetic for bytes or for operations to hide behind, both bounds show."""
    device = Processor({"fp32": 2e6, "8": 8e6, "4": 16e6}, bytes_per_s=1e4, overhead_s=0.25, source="by hand")
    found = times(device)
    conv, fc = 8 * 36 * 18, 8 * 36 * 36  # MACs of one sample and call
    rows = []
    for macs, calls, weights, outputs, into, out in ((conv, 1, 144, 8, 128, 288), (fc, 2, 36 * 36, 36, 288, 288)):
        row = []
        for rate, weight_bits, bits, scales in (
            (1e6, 4, 32, 4 * outputs),  # w4: widened to float32
            (8e6, 4, 4, 4 * outputs),
            (4e6, 8, 8, 4 * outputs),
            (1e6, 8, 8, 4 * outputs),  # no fp8 here: float32
            (1e6, 16, 16, 0),
            (1e6, 32, 32, 0),
        ):
            moved = weights * weight_bits / 8 + scales + 3 * into * bits / 8 + 3 * out * 4
            row.append(calls * (max(3 * macs / rate, moved / 1e4) + 0.25) / 3)
        rows.append(row)
    assert np.allclose(found.usage, rows, rtol=1e-12)
    assert found.reference == pytest.approx(rows[0][-1] + rows[1][-1])
    assert found.fixed == 0


def test_the_longer_of_the_two_counts():
    slow_memory = Processor({"fp32": 1e30}, 1e3, 0.0, "")
    slow_units = Processor({"fp32": 1e3}, 1e30, 0.0, "")
    assert times(slow_memory, options=mps.precisions("w4 w16")).usage[0, 0] < times(slow_memory).usage[0, -1]
    same = times(slow_units, options=mps.precisions("w4 w16")).usage
    assert (same[:, 0] == same[:, 1]).all()  # fewer bits, no faster


def test_what_nothing_holds_is_not_allowed():
    integers = Processor({"8": 1e9}, 1e9, 0.0, "integers alone")
    found = times(integers)
    assert np.isnan(found.usage).tolist() == [[True, False, False, True, True, True]] * 2
    assert math.isnan(found.reference)


def test_an_embedding_reads_its_rows_and_multiplies_nothing():
    net, ids = nn.Sequential(nn.Embedding(1000, 8)), torch.tensor([[1, 2, 3], [4, 5, 6]])
    integers = Processor({"8": 1.0}, 100.0, 0.0, "")
    found = Roofline(integers)(net, mps.layers(net, ids), mps.precisions("w16 w4"), example=ids)
    written, looked_up = 6 * 8 * 4, 6 * 8
    read = (1000 * 8 / 2 + 1000 * 4) * looked_up / 8000  # codes and scales of six rows
    assert found.usage[0].tolist() == pytest.approx([(written + looked_up * 4 + 24) / 200, (written + read + 24) / 200])


def test_half_precision_models_run_in_half_precision():
    net = Net().to(torch.bfloat16)
    x = torch.randn(3, 2, 8, 8, dtype=torch.bfloat16)
    device = Processor({"fp32": 1e3, "bf16": 1e6}, 1e30, 0.0, "")
    found = Roofline(device)(net, mps.layers(net, x), mps.precisions("w16"), example=x)
    assert found.usage[0, 0] == pytest.approx(8 * 36 * 18 / 5e5)


def test_profiles_have_sources_and_tell_formats_apart():
    eight, four, half = number("8", ""), number("4", ""), number("fp16", "")
    for name, device in DEVICES.items():
        assert len(device.source) > 40, name
        assert device.macs_per_s(eight, eight) > 0
        assert device.macs_per_s(half, half) <= device.macs_per_s(eight, eight)
    assert DEVICES["t4"].macs_per_s(four, four) == 2 * DEVICES["t4"].macs_per_s(eight, eight)
    assert DEVICES["h100"].macs_per_s(four, four) == DEVICES["h100"].macs_per_s(eight, eight)  # no int4 units
    assert DEVICES["a100"].macs_per_s(number("fp8_e4m3", ""), number("fp8_e4m3", "")) == 156e12  # as float16


NAMES = ["3", "8", "12", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "bf16", "fp16", "fp32"]


def values_of(name):
    if name.isdecimal():
        return torch.arange(-(2 ** (int(name) - 1)) + 1, 2 ** (int(name) - 1)).double()
    if name in CASTS:
        return torch.arange(1, 2**13).double() * torch.finfo(CASTS[name]).eps / 4
    return torch.tensor(enumerate_minifloat(name), dtype=torch.float64)


def writes(name, x):
    """Whether a format has a code for every one of some numbers."""
    if name.isdecimal():
        return bool((x == x.round()).all() and x.abs().max() < 2 ** (int(name) - 1))
    if name in CASTS:
        return torch.equal(x.to(CASTS[name]).double(), x)
    return torch.equal(round_minifloat(x, name), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_what_a_format_holds_it_writes(name, other):
    if number(name, "").holds(number(other, "")) and (other not in CASTS or name == other or name in CASTS):
        assert writes(name, values_of(other) if name != other else values_of(other)[:4])
    elif other not in CASTS and not name.isdecimal():
        assert not writes(name, values_of(other))


def test_lookup_tables():
    """By hand: int8 x int8; fp4 x fp4 has 2-bit significands and exponents, 4 + 3 + shifter and accumulator of 20 bits."""
    fpga = DEVICES["zcu102"]
    assert isinstance(fpga, Fpga)
    assert fpga.luts_of(number("8", ""), number("8", "")) == 64 + 16 + 8
    width = 4 + 4 + 2 + 2 + 8
    assert fpga.luts_of(number("fp4_e2m1", ""), number("fp4_e2m1", "")) == 4 + 3 + width * 5 / 2 + width
    for bits, names in ((4, ["fp4_e2m1"]), (6, ["fp6_e2m3", "fp6_e3m2"]), (8, ["fp8_e4m3", "fp8_e5m2"])):
        integer = number(str(bits), "")
        for name in names:  # integers are cheaper, as the study finds
            assert fpga.luts_of(integer, integer) < fpga.luts_of(number(name, ""), number(name, ""))
    rate = fpga.macs_per_s(number("8", ""), number("8", ""))
    assert rate == pytest.approx(274080 * 0.7 / 88 * 300e6)


def test_an_unknown_device_is_refused():
    with pytest.raises(mps.TableError, match="unknown device profile 'a10'; did you mean 'a100'"):
        Roofline("a10")
