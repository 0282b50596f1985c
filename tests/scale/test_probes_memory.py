"""Memory of one perturbation at a time: flat in layers, precisions and batches."""

import pytest
import torch
from torch import Tensor, nn

import mpsearch as mps
from mpsearch.core.precision import Precision
from mpsearch.estimation import replayed_probes
from mpsearch.models.peak_memory import live_bytes
from mpsearch.models.replay import Resumption, record
from mpsearch.sensitivity import KLDivergence

WIDTH, ROWS = 32, 24


class Block(nn.Module):
    """A residual block, whose inner outputs nobody reads later."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack(blocks: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks)), nn.Linear(WIDTH, 8)).eval()


def rounded(weight: Tensor, precision: Precision) -> Tensor:
    """To a grid of sixteenths, with one copy and nothing else."""
    return weight.clone().mul_(16).round_().div_(16)


def peak(blocks: int = 4, precisions: str = "w2 w4", batches: int = 3) -> int:
    """Most bytes that tensors hold while every cell is measured."""
    data = [(x, torch.arange(ROWS) % 8) for x in torch.randn(batches, ROWS, WIDTH).unbind()]
    with mps.Calibration(stack(blocks), data, mps.precisions(precisions), quantizer=rounded) as calibration:
        context = calibration.context()
        with live_bytes() as live:
            KLDivergence().estimate(context)
    return live.bytes


@pytest.mark.filterwarnings("ignore:memory_bytes are those of")
def test_peak_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch a turn: the weight, its rounded copy, what one run needs, and the reference, however much there is to do."""
    monkeypatch.setattr(replayed_probes, "TURN_BYTES", 0)
    monkeypatch.setattr("mpsearch.quantizers.rounded_weights.ROOM_BYTES", 0)
    usual = peak()
    assert 0 < usual < 2 * 4 * 2 * WIDTH * WIDTH + 6 * 4 * ROWS * 2 * WIDTH
    assert peak(blocks=8) == usual
    assert peak(precisions="w2 w3 w4 w5 w6") == usual
    assert peak(batches=6) == usual


def test_the_recording_takes_what_a_run_takes() -> None:
    peaks = []
    for blocks in (4, 16):
        model, batch = stack(blocks), torch.randn(ROWS, WIDTH)
        with live_bytes() as alone, torch.no_grad():
            model(batch)
        with live_bytes() as recorded:
            record(model, batch)
        peaks.append((alone.bytes, recorded.bytes))
    assert len(set(peaks)) == 1
    assert peaks[0][0] == peaks[0][1]


@torch.no_grad()
def test_what_is_held_is_what_the_rest_reads() -> None:
    """One residual stream and one zero for all shapes, whatever the depth."""
    model, batch = stack(8), torch.randn(ROWS, WIDTH)
    trace, output = record(model, batch)
    held = Resumption(model, batch, trace)
    for depth, block in enumerate(list(model)[1:8]):
        held.advance(trace.entry([block.up], []))
        assert torch.equal(held.run(), output)
        storages = {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in held.outputs.values()
        }
        assert sorted(storages.values()) == [4] * (depth > 0) + [4 * ROWS * WIDTH]
