"""The benchmark of a real language model: its rules, by a small table, and how it goes on after a row that failed."""

import importlib
import json
import re
import sys

import numpy as np
import pytest

import mpsearch as mps
from tests.benchmarks.conftest import script

PARTS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture
def language_model(models, monkeypatch):
    pytest.importorskip("transformers")
    yield script("language_model", monkeypatch)
    for name in ("language_model", "smollm2", "rows"):
        sys.modules.pop(name, None)


@pytest.fixture
def space(language_model):
    names = [
        f"model.layers.{block}.{'mlp' if part in ('gate', 'up', 'down') else 'self_attn'}.{part}_proj"
        for block in range(32)
        for part in PARTS
    ]
    layers = [mps.Layer(name, "linear", (64, 64), 64 * 64) for name in names]
    usage = np.tile(np.array([2.25, 3.25, 4.25, 8.25]) * 64 * 64 / 8, (len(layers), 1))
    shape = (len(layers), 4)
    table = mps.CostTable(layers, language_model.PRECISIONS, np.zeros(shape), usage={"memory_bytes": usage})
    return language_model.Space(table)


def test_bits_of_plans_count_their_scales(space):
    assert [space.effective_bits(space.uniform(option)) for option in range(4)] == pytest.approx(
        [2.25, 3.25, 4.25, 8.25]
    )
    assert [space.widest(limit) for limit in (2.25, 3.2, 3.25, 5, 9)] == [0, 0, 1, 2, 3]


def test_blocks_are_raised_from_both_ends(language_model, space):
    plan = language_model.ends_higher(space, 2.25 + 3.5 / 32)  # three blocks of 32 fit
    raised = {language_model.block_of(name) for name, option in plan.items() if str(option) == "w3g64"}
    assert raised == {0, 1, 31}
    assert space.effective_bits(plan) == pytest.approx(2.25 + 3 / 32)


@pytest.mark.parametrize(
    ("mix", "layer", "kind"),
    [
        ("Q2_K", "model.layers.9.self_attn.v_proj", "q3_k"),
        ("Q2_K", "model.layers.9.mlp.up_proj", "q2_k"),
        ("Q2_K_S", "model.layers.3.mlp.down_proj", "q4_k"),
        ("Q2_K_S", "model.layers.4.mlp.down_proj", "q2_k"),
        ("Q3_K_M", "model.layers.1.self_attn.v_proj", "q5_k"),
        ("Q3_K_M", "model.layers.2.self_attn.v_proj", "q4_k"),
        ("Q4_K_M", "model.layers.28.mlp.down_proj", "q6_k"),
        ("Q4_K_M", "model.layers.5.mlp.down_proj", "q4_k"),
        ("Q4_K_M", "model.layers.6.mlp.down_proj", "q6_k"),
    ],
)
def test_mixes_of_llama_cpp(language_model, mix, layer, kind):
    assert language_model.llama_cpp_type(mix, layer, 32) == kind


def test_types_become_the_nearest_option(language_model, space):
    plan = language_model.llama_cpp_mix("Q4_K_M", space)
    assert str(plan["model.layers.6.mlp.down_proj"]) == "w8g64"  # 6.56 bits
    assert str(plan["model.layers.6.mlp.up_proj"]) == "w4g64"  # 4.5 bits
    assert set(map(str, language_model.llama_cpp_mix("Q3_K_S", space).values())) == {"w3g64"}


def test_calibration_and_held_out_text_share_no_paragraph(language_model):
    halves = [language_model.smollm2.text(part, seed=0).split("\n\n") for part in ("calibration", "held_out")]
    assert not set(halves[0]) & set(halves[1])
    topics = language_model.smollm2.pydoc_data.topics.topics.values()
    every = {paragraph for topic in topics for paragraph in re.split(r"\n\n+", topic.strip())}
    assert sorted(halves[0] + halves[1]) == sorted(every)


def test_a_row_that_fails_is_told_and_one_that_is_there_does_not_run_again(language_model, tmp_path):
    run = importlib.import_module("rows").run
    program = tmp_path / "row.py"
    program.write_text(
        "import json, sys\nassert sys.argv[1] != 'bad', 'no such row'\njson.dump({}, open(sys.argv[2], 'w'))"
    )
    out = tmp_path / "out.json"
    assert run(str(program), ["bad", out], out) == "exit status 1: AssertionError: no such row"
    assert run(str(program), ["good", out], out) is None
    assert json.loads(out.read_text()) == {}
    assert run(str(program), ["bad", out], out) is None
    program.write_text("import time; time.sleep(60)")
    assert run(str(program), [], tmp_path / "never.json", seconds=0.5) == "not done in 0 s"
