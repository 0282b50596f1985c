"""NNCF's passes; carried out where it is installed."""

import json

import pytest
import torch

import mpsearch as mps
from mpsearch import export
from mpsearch.imports import import_plan


def test_nncf_passes_are_disjoint_and_three_bits_come_last(llama, plan_of, tmp_path):
    plan = plan_of(llama, q_proj="w3g32", k_proj="w2g64", v_proj="w4g32", o_proj="w8", up_proj="w3g32", down_proj="w16")
    passes = export.nncf(plan, llama, path=tmp_path / "passes.json")
    assert json.loads((tmp_path / "passes.json").read_text()) == passes
    assert [step["mode"] for step in passes] == ["int8_sym", "int4_sym", "int2_sym", "int3_sym"]
    done = [(name, step["mode"], step["group_size"] or -1) for step in passes for name in step["layers"]]
    wanted = {n: (n, f"int{p.weight}_sym", p.group_size or -1) for n, p in plan.items() if p.quantizes_weight}
    assert sorted(done) == sorted(wanted.values())
    with pytest.raises(mps.ExportError, match="a scale an output channel there"):
        export.nncf(plan_of(llama, o_proj="w8g32"), llama)
    with pytest.raises(mps.ExportError, match="one pass with 3 bits, the plan has w3g32 and w3g64"):
        export.nncf(plan_of(llama, q_proj="w3g32", up_proj="w3g64"), llama)


def carried_out(graph, layers, mode, group_size, all_layers):
    """A pass, as the documentation of the exporter tells it."""
    import nncf

    nodes = [op.get_friendly_name() for op in graph.get_ops() if op.get_type_name() in ("MatMul", "Gather")]
    ignored = set(nodes) - {f"__module.{layer}/aten::linear/MatMul" for layer in layers}
    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode(mode),
        group_size=group_size,
        all_layers=all_layers,
        ignored_scope=nncf.IgnoredScope(names=sorted(ignored)),
    )


@pytest.mark.filterwarnings("ignore")
def test_carried_out_and_read_from_its_file(llama, plan_of, tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    plan = plan_of(
        llama,
        q_proj="w3g32",
        k_proj="w2g64",
        v_proj="w4g32",
        o_proj="w8",
        gate_proj="w4",
        down_proj="w16",
        lm_head="w2g16",
    )
    example = torch.arange(8)[None]
    found = export.verify(plan, llama, "nncf", example=example)
    assert {check.name: check.precision for check in found.layers} == {n: p for n, p in plan.items() if str(p) != "w16"}
    graph = openvino.convert_model(llama, example_input=example)
    for step in export.nncf(plan, llama):
        graph = carried_out(graph, **step)
    for half in (False, True):
        openvino.save_model(graph, tmp_path / "model.xml", compress_to_fp16=half)
        imported = import_plan(tmp_path / "model.xml", "nncf", llama)
        assert dict(imported) == {name: plan.get(name, mps.Precision("16")) for name in imported}
        assert set(plan) < set(imported)
