"""Cells on a part of the samples: what they say is what the estimator says of that part, and what they take is counted."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.plan_search.sampled_cells import SampledCells, leading_samples
from mpsearch.sensitivity import KLDivergence, OutputDamage

PRECISIONS = mps.precisions("w2 w3 w4 w6 w8")


def deep(layers=40, width=6):
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*parts, nn.Linear(width, 4))


def batches(count=64, size=16):
    return list(torch.randn(count, 6, generator=torch.Generator().manual_seed(1)).split(size))


@pytest.mark.parametrize("estimator", [KLDivergence(), OutputDamage()])
@pytest.mark.parametrize("samples", [5, 20, 64])
def test_they_are_those_of_the_part_alone(estimator, samples):
    model, data = deep(3), batches()
    options = {"metric": "kl", "progress": False}
    found = mps.profile(model, data, SampledCells(estimator, samples, 64), PRECISIONS, **options)
    expected = mps.profile(model, leading_samples(data, samples), estimator, PRECISIONS, **options)
    assert np.array_equal(found.sensitivity, expected.sensitivity)
    assert found.sensitivity_se is not None
    assert expected.sensitivity_se is not None
    assert np.array_equal(found.sensitivity_se, expected.sensitivity_se)
    assert found.unit == expected.unit


def test_passes_are_over_all_samples_and_no_more_than_was_told():
    model, data = deep(3), batches()
    cells = SampledCells(KLDivergence(), 16, 64)
    table = mps.profile(
        model, data, cells, PRECISIONS, layers=mps.layers(model, data[0])[1:], metric="kl", progress=False
    )
    passes = table.origin["passes"]["forward"]
    assert 0 < passes <= cells.cost(4, 3, 5).forward
    whole = mps.profile(
        model, data, KLDivergence(), PRECISIONS, layers=mps.layers(model, data[0])[1:], metric="kl", progress=False
    )
    assert passes < 0.35 * whole.origin["passes"]["forward"]


def test_a_checkpoint_tells_parts_of_different_size_apart(tmp_path):
    model, data = deep(3), batches()
    few, more = (SampledCells(KLDivergence(), samples, 64) for samples in (8, 48))
    path = tmp_path / "run.db"
    first = mps.profile(model, data, few, PRECISIONS, checkpoint=path, metric="kl", progress=False)
    second = mps.profile(model, data, more, PRECISIONS, checkpoint=path, metric="kl", progress=False)
    assert np.array_equal(
        second.sensitivity, mps.profile(model, data, more, PRECISIONS, metric="kl", progress=False).sensitivity
    )
    again = mps.profile(model, data, few, PRECISIONS, checkpoint=path, metric="kl", progress=False)
    assert np.array_equal(again.sensitivity, first.sensitivity)
    assert again.origin["passes_in_this_run"]["forward"] < 0.5 * first.origin["passes"]["forward"]


def test_the_passes_of_the_default_effort_do_not_grow_with_the_layers():
    """41 layers x 5 precisions: 245 passes by the rule of one a cell."""
    model = deep()
    result = mps.search(model, batches(), mps.Budget(average_bits=4), PRECISIONS, metric="kl", progress=False)
    assert result.settings["max_passes"] == 120
    assert result.passes <= 120
    tables = result.tables["kl-divergence"].origin
    assert "SampledCells(estimator=KLDivergence()" in tables["estimator"]
    assert 0.45 * 120 / 4 < result.settings["stages"]["tables"] < 0.45 * 120 + 10
    assert result.surrogate is not None


def test_a_search_that_goes_on_counts_the_cells_as_one_that_was_never_stopped(tmp_path):
    model = deep(30)
    options = {
        "budget": mps.Budget(average_bits=4),
        "precisions": PRECISIONS,
        "max_passes": 40.0,
        "metric": "kl",
        "progress": False,
    }
    first = mps.search(model, batches(), checkpoint=tmp_path / "run.db", **options)
    again = mps.search(model, batches(), checkpoint=tmp_path / "run.db", **options)
    assert "SampledCells" in first.tables["kl-divergence"].origin["estimator"]
    assert (again.passes, dict(again.plan)) == (first.passes, dict(first.plan))
    assert again.passes_in_this_run is not None
    assert again.passes_in_this_run < 0.3 * first.passes
