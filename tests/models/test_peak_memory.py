"""Peak memory of a piece of work."""

import sys

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models import peak_memory as part
from mpsearch.models.peak_memory import peak_memory
from mpsearch.sensitivity import KLDivergence

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@linux
def test_a_large_tensor_is_seen_also_when_it_is_gone():
    with peak_memory(CPU) as peak:
        held = torch.ones(256 * 2**20, dtype=torch.uint8)  # more than an allocator keeps of earlier work
        del held
        assert peak.bytes is None  # filled when the work is over
    assert 250 * 2**20 < peak.bytes < 300 * 2**20


@linux
def test_the_peak_of_earlier_work_does_not_count():
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    del held
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes < 16 * 2**20


@linux
def test_it_is_told_after_an_error():
    found = []

    def work():
        with peak_memory(CPU) as peak:
            found.append(peak)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 its own
        work()
    assert found[0].bytes >= 0


def test_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(part, "_reset", lambda: False)
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None


def test_the_table_tells_it():
    table = mps.profile(
        nn.Sequential(nn.Linear(4, 2)), [torch.ones(2, 4)], KLDivergence(), mps.precisions("w4"), progress=False
    )
    assert table.origin["peak_memory_bytes"] is None or table.origin["peak_memory_bytes"] >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_allocator_of_a_gpu():
    device = torch.device("cuda")
    kept = torch.ones(2**20, device=device)
    with peak_memory(device) as peak:
        held = torch.ones(2**20, device=device)
        del held
    assert peak.bytes == 4 * kept.numel()
