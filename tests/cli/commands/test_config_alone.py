"""A folder with a config.json alone: what a model weighs, a table from elsewhere solved, no weight read."""

import json

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.cli import main
from mpsearch.models.hugging_face import example_of, model_of

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LINEAR = [
    f"model.layers.{block}.{part}"
    for block in range(2)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


@pytest.fixture
def config(tmp_path):
    """What a user writes by hand."""
    folder = tmp_path / "llama"
    folder.mkdir()
    facts = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **SIZES, **HEADS}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def table(tmp_path):
    """As another tool writes it: names, precisions, damages; nothing of sizes."""
    rows = [f"{name},{bits},{(number + 1) * 4.0**-bits}" for number, name in enumerate(LINEAR) for bits in (2, 4, 8)]
    path = tmp_path / "measured.csv"
    path.write_text("layer,precision,sensitivity\n" + "\n".join(row.replace(",", ",w", 1) for row in rows) + "\n")
    return path


def run(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_alone_is_shown(config, capsys):
    shown = run(capsys, "show", f"hf:{config}", "--precisions", "w4 w16")
    settings = transformers.AutoConfig.from_pretrained(config)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    layers = mps.layers(model, {"input_ids": torch.zeros(1, 64, dtype=torch.long)})
    assert [(x["name"], x["macs"]) for x in shown["layers"]] == [(layer.name, layer.macs) for layer in layers]
    assert shown["reference"]["memory_bytes"] == 2 * sum(p.numel() for p in model.parameters()) + sum(
        buffer.numel() * buffer.element_size() for buffer in model.buffers()
    )
    assert main(["show", f"hf:{config}"]) == 0
    assert "a sample is 64 tokens, by config.json" in capsys.readouterr().out


def test_no_weight_is_made_nor_read(config, monkeypatch):
    (config / "model.safetensors").write_bytes(b"no weights")
    model = model_of(str(config), shapes_suffice=True)
    assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in model.parameters())
    assert example_of(model)["input_ids"].shape == (1, 64)


def test_a_table_from_elsewhere_is_solved_and_the_plan_weighed(config, table, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    solved = run(
        capsys,
        "solve",
        table,
        "--model",
        f"hf:{config}",
        "--budget",
        "average_bits=4",
        "--resources",
        "memory_bytes",
        "-o",
        plan,
    )
    assert set(solved["layers"]) == set(LINEAR)
    assert solved["usage"]["average_bits"] <= 4
    weighed = run(capsys, "show", f"hf:{config}", "--plan", plan, "--resources", "memory_bytes")
    assert weighed["usage"]["memory_bytes"] == solved["usage"]["memory_bytes"]
    model = model_of(str(config))
    rows = {name: model.get_submodule(name).weight for name in LINEAR}
    bits = {name: mps.Precision.parse(text).weight_bits for name, text in solved["layers"].items()}
    packed = sum(weight.numel() * bits[name] // 8 + 2 * len(weight) for name, weight in rows.items())
    rest = sum(p.numel() * p.element_size() for p in model.parameters()) - 2 * sum(w.numel() for w in rows.values())
    rest += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert weighed["usage"]["memory_bytes"] == packed + rest
    assert main(["show", f"hf:{config}", "--plan", str(plan)]) == 0
    assert "under the plan" in capsys.readouterr().out
    exported = tmp_path / "recipe.json"
    assert main(["export", str(plan), "--to", "neutral", "--model", f"hf:{config}", "-o", str(exported)]) == 0
    assert exported.is_file()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"model.layers.0.mlp.gate": "w4"}, "'model.layers.0.mlp.gate' of the plan is no decision of the model"),
        ({LINEAR[0]: "wq4_k"}, "q4_k packs rows in multiples of 256"),
    ],
)
def test_a_plan_of_another_model_is_refused(config, tmp_path, capsys, plan, words):
    path = tmp_path / "plan.json"
    mps.Plan({name: mps.Precision.parse(text) for name, text in plan.items()}).save(path)
    assert main(["show", f"hf:{config}", "--plan", str(path)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_table_of_another_model_is_refused(config, tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("layer,precision,sensitivity\nfc,w4,1.0\n")
    assert main(["solve", str(path), "--model", f"hf:{config}", "--budget", "average_bits=4"]) == 2
    assert "'fc' of the table is no decision of the model" in capsys.readouterr().err


def test_what_needs_values_is_refused_in_one_line(config, tmp_path, capsys):
    data = tmp_path / "data.py"
    data.write_text("import torch\ndef batches():\n    return [{'input_ids': torch.zeros(2, 8, dtype=torch.long)}]\n")
    arguments = [
        "profile",
        f"hf:{config}",
        "--data",
        f"{data}:batches",
        "--precisions",
        "w4",
        "-o",
        str(tmp_path / "t.csv"),
    ]
    assert main([*arguments, "--quiet"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "is on the meta device, without values: load the weights first; without them layers, costs, show" in err


def test_other_models_need_data():
    with pytest.raises(mps.MpsearchError, match="give --data"):
        example_of(nn.Linear(1, 1))
