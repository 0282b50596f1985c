"""The memory that is free, as the kernel tells it."""

import resource

import pytest
import torch

from mpsearch.models.free_memory import FreeMemory, free_memory

CPU = torch.device("cpu")


def machine(folder, **files):
    """A root folder with these files; `__` in a name stands for a slash."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_machine(tmp_path):
    root = machine(tmp_path, proc__meminfo="MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:      4 kB\n")
    assert free_memory(CPU, root) == FreeMemory(4096, "free on the machine")


def test_control_groups_of_version_2_with_those_above(tmp_path):
    root = machine(tmp_path, proc__meminfo="MemAvailable: 1000 kB\n", proc__self__cgroup="0::/user/job\n")
    groups = root / "sys/fs/cgroup"
    (groups / "user/job").mkdir(parents=True)
    machine(groups / "user/job", **{"memory.max": "max\n", "memory.current": "700\n"})
    machine(groups / "user", **{"memory.max": "1000\n", "memory.current": "800\n"})
    machine(groups / "user", **{"memory.stat": "anon 600\ninactive_file 150\nactive_file 50\n"})
    assert free_memory(CPU, root) == FreeMemory(1000 - 800 + 150, "left of the limit of the control group /user/job")


@pytest.mark.parametrize("inside", [True, False])
def test_control_groups_of_version_1_also_where_the_path_is_of_outside(tmp_path, inside):
    root = machine(tmp_path, proc__self__cgroup="9:cpu,cpuacct:/\n4:memory:/docker/abc\n")
    group = root / "sys/fs/cgroup/memory" / ("docker/abc" if inside else "")
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000\n")
    (group / "memory.usage_in_bytes").write_text("2000\n")
    (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 10\n")
    assert free_memory(CPU, root).bytes == 3010
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    assert free_memory(CPU, root) is None


@pytest.mark.parametrize(("field", "limit"), [("VmSize", "RLIMIT_AS"), ("VmData", "RLIMIT_DATA")])
def test_limits_of_the_process(tmp_path, monkeypatch, field, limit):
    root = machine(
        tmp_path, proc__meminfo="MemAvailable: 1000 kB\n", proc__self__status=f"Name:\tx\n{field}:\t  3 kB\n"
    )
    number = getattr(resource, limit)
    none = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (5000 if asked == number else none, none))
    assert free_memory(CPU, root) == FreeMemory(5000 - 3072, f"left of the limit {limit} of the process")


def test_a_system_that_tells_nothing(tmp_path):
    assert free_memory(CPU, tmp_path) is None
    assert free_memory(torch.device("meta")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    before = free_memory(device)
    held = torch.ones(2**26, device=device)
    after = free_memory(device)
    assert after.by == f"free on {device}"
    assert before.bytes - after.bytes >= held.nbytes
    del held
    assert free_memory(device).bytes > after.bytes  # what the allocator keeps is free
