"""Estimators that read weights alone, and plans, on a model whose weights lie in shards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mpsearch as mps
from mpsearch.models.hugging_face import model_of
from mpsearch.models.streaming.stored import InFile
from mpsearch.sensitivity import QE, AdaPTDivergence, Kurtosis, RelativeWeightError, WeightEntropy
from tests.models.streaming.test_offloaded_models import saved

BATCHES = [{"input_ids": torch.arange(12).reshape(2, 6) % 40}]


def tables_of(folder: Path, *, streamed: bool) -> list[list[list[float]]]:
    estimators = [RelativeWeightError(), Kurtosis(), QE(), WeightEntropy(), AdaPTDivergence()]
    model, options = model_of(folder, streamed=streamed), mps.precisions("w2 w4g8 w8")
    tables = mps.profile(model, BATCHES, estimators, options, progress=False, metric="kl")
    return [table.sensitivity.tolist() for table in tables]


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("room_bytes", [0, 1 << 30])
def test_scores_of_weights_are_those_of_the_resident_model(
    kind: str, room_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpsearch.quantizers.rounded_weights.ROOM_BYTES", room_bytes)
    folder = saved(kind, tmp_path)
    assert tables_of(folder, streamed=True) == tables_of(folder, streamed=False)


def test_weights_are_read_once_for_all_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    values = InFile.values

    def counted(self: InFile) -> Tensor:
        reads.append(self.place)
        return values(self)

    monkeypatch.setattr(InFile, "values", counted)
    model = model_of(saved("llama", tmp_path), streamed=True)
    with mps.Calibration(model, BATCHES, mps.precisions("w2 w4 w8"), progress=False, metric="kl") as calibration:
        context = calibration.context()
        reads.clear()
        RelativeWeightError().estimate(context)
    decided = sum(len(context.parameters(decision)) for decision in context.decisions)
    assert len(reads) == len(set(reads)) == decided


def test_plans_in_a_streamed_model(tmp_path: Path) -> None:
    damages: list[list[float]] = []
    for streamed in (True, False):
        model = model_of(saved("llama", tmp_path), streamed=streamed)
        with mps.Calibration(model, BATCHES, mps.precisions("w2 w4"), progress=False, metric="kl") as calibration:
            names = [layer.name for layer in calibration.layers]
            plans = [mps.Plan(dict.fromkeys(names, option)) for option in calibration.precisions]
            damages.append(calibration.measure(plans).damage.tolist())
    assert damages[0] == pytest.approx(damages[1], rel=1e-6)
    assert damages[0][0] > 0
