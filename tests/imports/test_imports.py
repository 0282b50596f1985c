"""Plans of other tools: what was exported comes back, and files written by hand are read by the tool's own rules."""

import argparse
import json

import pytest
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.cli.commands.import_ import run
from mpsearch.cli.screen import Screen
from mpsearch.imports import import_plan
from mpsearch.imports.modelopt import _format


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.lm_head = (nn.Linear(64, 64) for _ in range(3))


PLAN = mps.Plan({"first": mps.Precision("3", "16", 32), "second": mps.Precision("8"), "lm_head": mps.Precision("16")})


@pytest.mark.parametrize("model", [None, Net()], ids=["names", "model"])
def test_what_was_exported_comes_back(tmp_path, model):
    export.gptqmodel(PLAN, model, path=tmp_path / "gptq.json")
    found = import_plan(tmp_path / "gptq.json", "gptqmodel", model)
    assert {**found.layers, "lm_head": mps.Precision("16")} == PLAN.layers
    export.modelopt(PLAN, model, path=tmp_path / "modelopt.json")
    found = import_plan(tmp_path / "modelopt.json", "modelopt", model)
    assert {**found.layers, "lm_head": mps.Precision("16")} == PLAN.layers
    pytest.importorskip("compressed_tensors")
    export.compressed_tensors(PLAN, path=tmp_path / "config.json")
    assert dict(import_plan(tmp_path / "config.json", "compressed-tensors", model)) == PLAN.layers


@pytest.mark.filterwarnings("ignore")
def test_the_checkpoint_folder(tmp_path):
    pytest.importorskip("compressed_tensors")
    export.compressed_tensors(PLAN, Net(), path=tmp_path)
    assert dict(import_plan(tmp_path, "compressed-tensors", Net())) == PLAN.layers
    out = str(tmp_path / "plan.json")
    answer = run(argparse.Namespace(file=str(tmp_path), tool="compressed-tensors", out=out, model=None))
    assert answer.content["layers"] == {name: str(precision) for name, precision in PLAN.items()}
    assert answer.text(Screen()) == "compressed-tensors: a plan with 2 of 3 layers quantized"
    assert dict(mps.Plan.load(tmp_path / "plan.json")) == PLAN.layers


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def scheme(bits, targets, **more):
    return {"targets": targets, "weights": {"num_bits": bits, "type": "int", "strategy": "channel", **more}}


def test_compressed_tensors_exact_then_alphabetical_then_class(tmp_path):
    groups = {
        "a": scheme(8, ["re:.*d"]),
        "b": scheme(4, ["re:.*"]),
        "c": scheme(2, ["first"]),
        "d": scheme(5, ["Linear"]),
    }
    path = write(tmp_path / "c.json", {"quantization_config": {"config_groups": groups, "ignore": ["re:lm_.*"]}})
    found = import_plan(path, "compressed-tensors", Net())
    assert {name: str(p) for name, p in found.items()} == {"first": "w2", "second": "w4", "lm_head": "w16"}
    with pytest.raises(mps.PlanError, match=r"the target 're:\.\*d' is a pattern; give the model"):
        import_plan(path, "compressed-tensors")


def test_compressed_tensors_formats(tmp_path):
    inputs = {"num_bits": 8, "type": "float", "strategy": "token"}
    group = {**scheme(8, ["first"], type="float"), "input_activations": inputs}
    path = write(
        tmp_path / "c.json",
        {"config_groups": {"a": group, "b": scheme(4, ["second"], strategy="group", group_size=32)}},
    )
    found = import_plan(path, "compressed-tensors")
    assert {name: str(p) for name, p in found.items()} == {"first": "wfp8_e4m3afp8_e4m3", "second": "w4g32"}
    for more, words in (
        ({"strategy": "tensor"}, "scales by 'tensor'"),
        ({"type": "float"}, "numbers of 6 bits and type 'float'"),
    ):
        path = write(tmp_path / "c.json", {"config_groups": {"a": scheme(6, ["first"], **more)}})
        with pytest.raises(mps.PlanError, match=words):
            import_plan(path, "compressed-tensors")
    with pytest.raises(mps.PlanError, match="no 'config_groups'"):
        import_plan(write(tmp_path / "c.json", {"bits": 4}), "compressed-tensors")


def test_gptqmodel_first_match_decides(tmp_path):
    dynamic = {"+:fir": {"bits": 8, "group_size": 64}, "-:.*d": {}, "+:sec": {"bits": 2}}
    content = {"bits": 4, "group_size": 128, "dynamic": dynamic}
    found = import_plan(write(tmp_path / "g.json", content), "gptqmodel", Net())
    assert {name: str(p) for name, p in found.items()} == {"first": "w8g64", "second": "w16"}
    found = import_plan(write(tmp_path / "g.json", {**content, "lm_head": True, "dynamic": {}}), "gptqmodel", Net())
    assert {name: str(p) for name, p in found.items()} == dict.fromkeys(["first", "second", "lm_head"], "w4g128")
    with pytest.raises(mps.PlanError, match=r"'\+:fir' matches more than one name"):
        import_plan(write(tmp_path / "g.json", content), "gptqmodel")
    with pytest.raises(mps.PlanError, match="unknown key 'nbits' under 'x', which GPTQModel ignores"):
        import_plan(write(tmp_path / "g.json", {"bits": 4, "dynamic": {"x": {"nbits": 2}}}), "gptqmodel", Net())
    with pytest.raises(mps.PlanError, match="no 'bits' and 'dynamic'"):
        import_plan(write(tmp_path / "g.json", {"dynamic": {}}), "gptqmodel")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_gguf(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes)
    model = transformers.LlamaForCausalLM(config)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    plan = {name: mps.Precision("q8_0" if "self_attn" in name else "16") for name in names}
    plan["model.layers.0.mlp.down_proj"] = mps.Precision("q3_k")
    export.gguf(mps.Plan(plan), model, path=tmp_path / "m.gguf")
    assert dict(import_plan(tmp_path / "m.gguf", "gguf", model)) == plan
    with pytest.raises(mps.PlanError, match="names of its own; give the model"):
        import_plan(tmp_path / "m.gguf", "gguf")
    (tmp_path / "x.gguf").write_text("GGML, not GGUF, and long enough to be read")
    with pytest.raises(mps.PlanError, match="no GGUF file of a model"):
        import_plan(tmp_path / "x.gguf", "gguf", model)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **{**sizes, "num_hidden_layers": 2}))
    with pytest.raises(mps.PlanError, match=r"no tensor 'blk\.1\.attn_q\.weight'"):
        import_plan(tmp_path / "m.gguf", "gguf", other)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}, ("4", 128)),
        ({"num_bits": (4, 3), "block_sizes": None}, ("fp8_e4m3", None)),
        ({"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}, ("nvfp4", None)),
        ({"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}, ("mxfp4", None)),
        ({"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}, ("mxfp8", None)),
        ({"num_bits": (4, 3), "block_sizes": {-1: 128}}, "numbers of .* no precision writes that"),
        ([{"num_bits": 4}, {"num_bits": (4, 3)}], "one number format after another"),
    ],
)
def test_modelopt_formats(settings, expected):
    if isinstance(expected, tuple):
        assert _format(settings, "x") == expected
    else:
        with pytest.raises(mps.PlanError, match=expected):
            _format(settings, "x")


def test_mistakes(tmp_path):
    with pytest.raises(mps.PlanError, match="cannot import a plan from 'ggfu'; did you mean 'gguf'"):
        import_plan("x", "ggfu")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(mps.PlanError, match="not JSON"):
        import_plan(tmp_path / "x.json", "gptqmodel")
    with pytest.raises(mps.PlanError, match="expected an object, got list"):
        import_plan(write(tmp_path / "x.json", []), "gptqmodel")
    with pytest.raises(OSError, match="No such file"):
        import_plan(tmp_path / "none.json", "gptqmodel")


def test_names_that_match_nothing_are_refused(tmp_path):
    path = write(tmp_path / "c.json", {"config_groups": {"a": scheme(8, ["first", "secnd"])}, "ignore": ["elsewhere"]})
    with pytest.raises(
        mps.PlanError, match="the target 'secnd' matches no linear layer of the model; did you mean 'second'"
    ):
        import_plan(path, "compressed-tensors", Net())
    path = write(tmp_path / "g.json", {"bits": 4, "dynamic": {"+:^secnd$": {"bits": 8}}})
    with pytest.raises(
        mps.PlanError, match=r"'\+:\^secnd\$' matches no linear layer of the model, which GPTQModel ignores"
    ):
        import_plan(path, "gptqmodel", Net())
    path = write(tmp_path / "m.json", export.modelopt(mps.Plan({"secnd": mps.Precision("4")})))
    with pytest.raises(mps.PlanError, match="'secnd' is no module of the model; did you mean 'second'"):
        import_plan(path, "modelopt", Net())
    path = write(tmp_path / "g.json", {"bits": 4, "dynamic": {}})
    with pytest.raises(mps.PlanError, match=r"g.json: no layer is decided on"):
        import_plan(path, "gptqmodel")


def test_gptqmodel_folder(tmp_path):
    export.gptqmodel(PLAN, Net(), path=tmp_path / "quantize_config.json")
    assert dict(import_plan(tmp_path, "gptqmodel")) == PLAN.layers


def openvino(path, **weights):
    """A file as OpenVINO writes it: constants with names, types and shapes, and nodes that take them."""
    rows = [
        f'<layer id="{i}" name="self.{name}.weight{end}" type="Const"><data element_type="{kind}" shape="{shape}"/></layer>'
        for i, (name, (kind, shape, end)) in enumerate(weights.items())
    ]
    rows.append(
        '<layer id="9" name="__module.first/aten::linear/MatMul" type="MatMul"><data transpose_b="true"/></layer>'
    )
    path.write_text(f'<?xml version="1.0"?><net name="m"><layers>{"".join(rows)}</layers></net>')
    return path


def test_nncf_element_types(tmp_path):
    weights = {
        "first": ("u3", "64, 2, 32", ""),
        "second": ("i8", "64, 64", ""),
        "lm_head": ("f16", "64, 64", "_compressed"),
    }
    path = openvino(tmp_path / "m.xml", **weights)
    assert dict(import_plan(path, "nncf", Net())) == PLAN.layers
    assert dict(import_plan(path, "nncf")) == {name: PLAN[name] for name in ("first", "second")}
    path = openvino(tmp_path / "m.xml", first=("nf4", "64, 1, 64", ""), second=("u4", "64, 64", "_compressed"))
    assert [str(p) for p in import_plan(path, "nncf").values()] == ["wnf4g64", "w4"]
    for weights, words in (
        ({"frist": ("i4", "64, 64", "")}, "'frist' is no quantizable layer of the model; did you mean 'first'"),
        ({"first": ("f8e4m3", "64, 64", "")}, "'first' has the type f8e4m3, expected one of u2"),
        ({"first": ("i4", "64, x", "")}, "not as nncf writes it"),
    ):
        with pytest.raises(mps.PlanError, match=words):
            import_plan(openvino(tmp_path / "m.xml", **weights), "nncf", Net())
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(mps.PlanError, match="no 'layers' of an OpenVINO model"):
        import_plan(tmp_path / "m.xml", "nncf")
    (tmp_path / "m.xml").write_text("{}")
    with pytest.raises(mps.PlanError, match="not XML"):
        import_plan(tmp_path / "m.xml", "nncf")
