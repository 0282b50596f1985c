"""A search on a model whose weights lie in shards, against the same search with them in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch.calibration.calibration import Calibration
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.models.hugging_face import model_of
from mpsearch.models.streaming.blocks import Blocks
from mpsearch.models.streaming.offloading import is_offloaded
from mpsearch.plan_search import evaluator as evaluator_module

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PRECISIONS = mps.precisions("w2 w4 w8")


@dataclass(frozen=True)
class ByBits:
    """The noise of rounding, a little more in some decisions; it reads no weights and runs nothing."""

    def estimate(self, context: Context) -> Estimate:
        noise = [4.0**-precision.weight_bits for precision in context.precisions]
        return Estimate(
            np.array([[(1 + d % 3) * x for x in noise] for d in range(len(context.decisions))]), None, "relative"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def tokens(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 40, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in ids.split(8)]


def opened(folder: Path) -> tuple[Any, Any]:
    resident, streamed = model_of(folder), model_of(folder, streamed=True)
    assert is_offloaded(streamed)
    return resident, streamed


class Readings:
    """How often blocks are gone through, and with how many variants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.variants: list[int] = []
        runs = Blocks.runs

        def counted(blocks: Blocks, batches: Any, variants: Any, *rest: Any) -> Any:
            self.variants.append(len(variants))
            return runs(blocks, batches, variants, *rest)

        monkeypatch.setattr(Blocks, "runs", counted)


def plans_for(model: Any, count: int) -> list[mps.Plan]:
    names = [layer.name for layer in mps.layers(model, tokens(8)[0])]
    g = np.random.default_rng(0)
    return [mps.Plan({name: PRECISIONS[g.integers(3)] for name in names}) for _ in range(count)]


def test_measured_plans_are_those_in_memory_and_blocks_are_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, streamed = opened(folder)
    plans, data = plans_for(resident, 5), tokens(24)
    expected = mps.measure_plans(resident, data, plans, metric="kl", progress=False)
    with Calibration(streamed, data, metric="kl", progress=False) as calibration:
        assert calibration.blocks is not None
        readings = Readings(monkeypatch)
        found = calibration.measure(plans)
    assert readings.variants == [5]
    assert np.allclose(found.damage, expected.damage, rtol=1e-6)
    assert found.damage_se is not None
    assert expected.damage_se is not None
    assert np.allclose(found.damage_se, expected.damage_se, rtol=1e-6)


def test_evaluation_is_that_in_memory(folder: Path) -> None:
    resident, streamed = opened(folder)
    (plan,) = plans_for(resident, 1)
    expected, found = (mps.evaluate(model, tokens(24), plan, progress=False) for model in (resident, streamed))
    assert found.kl == pytest.approx(expected.kl, rel=1e-6)
    assert found.kl_se == pytest.approx(expected.kl_se, rel=1e-6)


def test_plans_go_in_groups_that_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpsearch.calibration import streamed_plan_runs

    resident, streamed = opened(folder)
    plans, data = plans_for(resident, 5), tokens(24)
    expected = mps.measure_plans(resident, data, plans, metric="kl", progress=False)
    monkeypatch.setattr(streamed_plan_runs, "STATE_BYTES", 3 * 24 * 8 * 16 * 4)
    with Calibration(streamed, data, metric="kl", progress=False) as calibration:
        assert calibration.blocks is not None
        readings = Readings(monkeypatch)
        found = calibration.measure(plans)
    assert readings.variants == [2, 2, 1]
    assert np.allclose(found.damage, expected.damage, rtol=1e-6)


@pytest.mark.parametrize("large", [False, True])
def test_a_search_takes_the_same_plans_as_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    if large:
        monkeypatch.setattr(evaluator_module, "LARGE_NUMBERS", 0)
    resident, streamed = opened(folder)
    options: dict[str, Any] = {
        "effort": "fast",
        "estimators": [ByBits()],
        "metric": "kl",
        "progress": False,
    }
    budget = mps.Budget(average_bits=4)
    expected = mps.search(resident, tokens(48), budget, PRECISIONS, **options)
    readings = Readings(monkeypatch)
    found = mps.search(streamed, tokens(48), budget, PRECISIONS, **options)
    assert dict(found.plan) == dict(expected.plan)
    assert [dict(plan) for plan in found.plans.plans] == [dict(plan) for plan in expected.plans.plans]
    assert found.passes == expected.passes <= 8
    assert np.allclose(found.plans.damage, expected.plans.damage, rtol=1e-6)
    assert found.measured.kl == pytest.approx(expected.measured.kl, rel=1e-6)
    if large:
        assert max(readings.variants) >= 4
        assert len(readings.variants) < 25


def test_rounds_of_several_plans_take_no_more_passes_than_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "LARGE_NUMBERS", 0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(part for _ in range(6) for part in (torch.nn.Linear(6, 6), torch.nn.Tanh())))
    data = list(torch.randn(96, 6, generator=torch.Generator().manual_seed(1)).split(16))
    for limit in (8.0, 21.0, 40.0):
        result = mps.search(
            model, data, mps.Budget(average_bits=4), PRECISIONS, max_passes=limit, metric="kl", progress=False
        )
        assert result.passes <= limit
        assert len(result.plans) >= 2


def test_default_tables_give_the_same_search(folder: Path) -> None:
    """The sweep runs blocks again for their gradients, which takes no plan away."""
    results = [
        mps.search(model, tokens(32), mps.Budget(average_bits=4), PRECISIONS, effort="fast", progress=False)
        for model in opened(folder)
    ]
    resident, streamed = results
    assert dict(resident.plan) == dict(streamed.plan)
    assert resident.passes == streamed.passes
    assert [dict(plan) for plan in resident.plans.plans] == [dict(plan) for plan in streamed.plans.plans]
    np.testing.assert_allclose(streamed.plans.damage, resident.plans.damage, rtol=1e-6)
    for name, table in resident.tables.items():
        np.testing.assert_allclose(streamed.tables[name].sensitivity, table.sensitivity, rtol=1e-5)
