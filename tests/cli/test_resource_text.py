"""`--resources`: columns, kinds and settings as text."""

import json

import pytest

import mpsearch as mps
from mpsearch.cli import main
from mpsearch.cli.resource_text import resource_functions
from mpsearch.models.loading import UsageError
from mpsearch.resources import BitOps, KVCacheBytes, LatencyTable, MeasuredLatency, MemoryBytes, Roofline


def test_names_settings_and_kinds():
    found = resource_functions(
        "memory_bytes, kv_cache_bytes:context=8192:batch=4:keys=w8,latency_s:engine=onnxruntime:threads=2,"
        "edge_s=roofline:device=cortex-m,t4_s=latency-table:path=t4.csv:interpolate=true,bitops"
    )
    assert found == {
        "memory_bytes": MemoryBytes(),
        "kv_cache_bytes": KVCacheBytes(8192, 4, mps.Precision("8")),
        "latency_s": MeasuredLatency("onnxruntime", 2),
        "edge_s": Roofline("cortex-m"),
        "t4_s": LatencyTable("t4.csv", interpolate=True),
        "bitops": BitOps(),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory", "unknown resource 'memory'; did you mean 'memory_bytes'"),
        ("latency_s=roof", "unknown resource 'roof'; did you mean 'roofline'"),
        ("kv_cache_bytes:contex=1", "has no option 'contex'; did you mean 'context'"),
        ("kv_cache_bytes:context=long", "is 'long', expected a whole number"),
        ("kv_cache_bytes:8192", "option '8192': expected name=value"),
        ("bitops,bitops", "resource 'bitops' occurs twice"),
        ("coins=nowhere.py:coins", "no file nowhere.py"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(UsageError, match=message):
        resource_functions(text)


def test_a_setting_that_the_resource_itself_refuses():
    with pytest.raises(mps.TableError, match="unknown device profile 't5'; known: a100, "):
        resource_functions("latency_s=roofline:device=t5")


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "def net(): return torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "def data(): return [torch.ones(2, 4)]\n"
        "def coins(model, layers, precisions): return [[7.0] * len(precisions)] * len(layers)\n"
    )
    resources = "coins=nets.py:coins,latency_s=roofline:device=cortex-m"
    assert main(["show", "nets.py:net", "--data", "nets.py:data", "--resources", resources, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["range"]
    assert found.keys() == {"coins", "latency_s"}
    assert found["coins"] == [7.0, 7.0]
