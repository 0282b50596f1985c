"""Measurements of ExLlamaV2, written by its rules and read back as a table."""

import json

import numpy as np
import pytest
from torch import nn

import mpsearch as mps
from mpsearch.imports import import_table


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(64, 32, bias=False)}) for _ in range(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [nn.ModuleDict({"self_attn": Attention(), "block_sparse_moe": Experts()}) for _ in range(2)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.lm_head = nn.Linear(32, 16)


def parameters(bits, shares, size=64):
    return {"group_size": {str(b): size for b in bits}, "bits": bits, "bits_prop": shares, "scale_bits": 4}


def attention(accuracy, total_bits, q, o):
    return {"accuracy": accuracy, "total_bits": total_bits, "q_proj": parameters(*q), "o_proj": parameters(*o)}


THREE_TWO, FOUR = ([3, 2], [0.1, 0.9]), ([4], [1])
OPTIONS = [
    attention(0.80, 14000, THREE_TWO, THREE_TWO),  # 2.1 bits
    attention(0.85, 15000, THREE_TWO, ([3, 2], [0.25, 0.75])),  # 2.15 bits: also nearest to 2, and better
    attention(0.95, 23000, THREE_TWO, FOUR),  # (2.1 x 4096 + 4 x 2048) / 6144 = 2.73: nearest to 3
    attention(0.99, 25000, FOUR, FOUR),
]
EXPERTS = [{"accuracy": 0.9, "total_bits": 16384, "w1": parameters(*FOUR)}]
MEASUREMENT = {
    "measurement": {
        "model.layers.0.self_attn": OPTIONS,
        "model.layers.0.block_sparse_moe": EXPERTS,
        "model.layers.1.parallel_decoder": {"attn": OPTIONS[2:], "mlp": []},
        "model.norm.norm": None,
        "lm_head.linear": None,
    },
    "last_module_idx": 4,
}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "measurement.json").write_text(json.dumps(MEASUREMENT))
    return tmp_path / "measurement.json"


def test_each_block_is_a_group_at_the_widths_of_its_options(path):
    table = import_table(path, "exllamav2", Model())
    first = "model.layers.0.self_attn"
    assert [(layer.name, layer.group, layer.numel) for layer in table.layers] == [
        (f"{first}.q_proj", first, 4096),
        (f"{first}.o_proj", first, 2048),
        ("model.layers.0.block_sparse_moe.experts.0.w1", "model.layers.0.block_sparse_moe", 2048),
        ("model.layers.0.block_sparse_moe.experts.1.w1", "model.layers.0.block_sparse_moe", 2048),
        ("model.layers.1.self_attn.q_proj", "model.layers.1.parallel_decoder.attn", 4096),
        ("model.layers.1.self_attn.o_proj", "model.layers.1.parallel_decoder.attn", 2048),
    ]
    assert [str(precision) for precision in table.precisions] == ["w2", "w3", "w4"]
    nan = np.nan
    np.testing.assert_allclose(table.sensitivity[0:2].sum(0), [0.15, 0.05, 0.01])
    np.testing.assert_allclose(table.sensitivity[2:4].sum(0), [nan, nan, 0.1])
    np.testing.assert_allclose(table.sensitivity[4:6].sum(0), [nan, 0.05, 0.01])
    np.testing.assert_allclose(table.usage["memory_bytes"][0:2].sum(0), [15000 / 8, 23000 / 8, 25000 / 8])
    np.testing.assert_allclose(table.usage["memory_bytes"][0], table.usage["memory_bytes"][1] * 2)
    assert (table.unit, table.origin["options_at_a_width_already_there"]) == ("relative", 1)


def test_the_table_can_be_solved_and_read_again(path, tmp_path):
    table = import_table(path, "exllamav2", Model())
    table.save(tmp_path / "t.csv")
    found = mps.solve(mps.CostTable.load(tmp_path / "t.csv"), mps.Budget(memory_bytes=(15000 + 16384 + 25000) / 8))
    assert found.sensitivity == pytest.approx(0.15 + 0.1 + 0.01)
    assert found.plan["model.layers.0.self_attn.q_proj"] == found.plan["model.layers.0.self_attn.o_proj"]
    assert str(found.plan["model.layers.1.self_attn.q_proj"]) == "w4"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no 'measurement' of ExLlamaV2"),
        ({"measurement": {"model.norm.norm": None}}, "holds no attention or MLP block"),
        ({"measurement": {"model.layers.7.self_attn": OPTIONS}}, r"names 'q_proj' in 'model\.layers\.7\.self_attn'"),
        ({"measurement": {"model.layers.0.self_attn": [{"accuracy": 1}]}}, "are not ExLlamaV2's"),
        ({"measurement": {"model.layers.0.self_attn": ["x"]}}, "names 'x' in"),
        ({"measurement": {"head": [{"accuracy": 1, "q_proj": 1}]}}, "names 'q_proj' in 'head'"),
    ],
)
def test_other_files(path, content, words):
    path.write_text(json.dumps(content))
    with pytest.raises(mps.TableError, match=words):
        import_table(path, "exllamav2", Model())


def test_it_needs_the_model(path):
    with pytest.raises(mps.TableError, match="give the model"):
        import_table(path, "exllamav2")
    with pytest.raises(mps.TableError, match="cannot import a table from 'exllama'; did you mean 'exllamav2'"):
        import_table(path, "exllama")
