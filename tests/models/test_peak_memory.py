"""Peak memory of a piece of work."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models import peak_memory as part
from mpsearch.models.peak_memory import live_bytes, peak_memory
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


def test_bytes_of_tensors_are_counted_to_the_byte():
    given = torch.ones(1000)
    with live_bytes() as peak:
        given.mul_(2)  # in place
        given.view(10, 100)[0].t()  # views
        assert (peak.bytes, peak.now) == (0, 0)
        twice = given.repeat(2)
        part = twice[:10]
        del twice
        assert (peak.bytes, peak.now) == (8000, 8000)  # what the part lies in
        del part
        assert (peak.bytes, peak.now) == (8000, 0)
        again = given + given
    assert (peak.bytes, peak.now) == (8000, 4000)
    del again
    assert peak.now == 0  # also after the end


def test_what_a_backward_pass_needs_is_counted():
    x = torch.ones(1000, requires_grad=True)
    with live_bytes() as peak:
        total = x.exp().exp().sum()  # each exp keeps its result
        assert peak.now == 8004
        total.backward()
    assert peak.bytes >= 8004 + 4000
    assert peak.now == 4004  # the sum, the gradient


def test_tensors_over_other_memory_count():
    array = np.ones(1000)
    storage = torch.UntypedStorage(4000)
    with live_bytes() as peak:
        over = torch.from_numpy(array), torch.tensor([], dtype=torch.float32).set_(storage)
        assert peak.now == 12000
        del over
        assert peak.now == 4000
        del storage
        assert peak.now == 0


def test_nothing_lies_on_the_meta_device():
    with live_bytes() as peak:
        assert nn.Linear(1000, 1000, device="meta")(torch.empty(1, 1000, device="meta")).is_meta
    assert peak.bytes == 0


def test_layers_run_one_after_the_other_hold_two_outputs():
    x = torch.ones(2, 64)
    for depth in (3, 30):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth)))
        with torch.no_grad(), live_bytes() as peak:
            model(x)
        assert peak.bytes == 2 * x.nbytes
        with live_bytes() as peak:
            model(x)
        assert peak.bytes == depth * x.nbytes  # kept for a backward pass
