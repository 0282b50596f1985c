"""Hostile arguments in Python: an answer, or one line; never an error from the depths."""

import warnings

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.measured_plans import MeasuredPlans

OPTIONS = mps.precisions("w2 w4")
LAYERS = tuple(mps.Layer(name, "linear", (4, 8)) for name in "ab")
TABLE = mps.CostTable(LAYERS, OPTIONS, [[2, 1], [2, 1]], usage={"memory_bytes": [[8, 16], [8, 16]]})
BUDGET, FOUR = mps.Budget(average_bits=3), mps.Plan({"0": mps.Precision("4")})
VALUES = [None, -1, 0, 1.5, float("nan"), float("inf"), 10**30, "x", "", [], {}]
VALUES += [object(), True, b"x", (1, 2, 3), torch.tensor(1.5), lambda *_: 1]
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(X, torch.arange(8) % 3)] * 4


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def profile(batches=BATCHES, estimator=None, options=OPTIONS, **keywords):
    return mps.profile(model(), batches, estimator or mps.sensitivity.Kurtosis(), options, progress=False, **keywords)


def search(**keywords):
    return mps.search(model(), BATCHES, BUDGET, OPTIONS, progress=False, **{"max_passes": 6, **keywords})


CALLS = {
    "average_bits": lambda v: mps.solve(TABLE, mps.Budget(average_bits=v)),
    "memory_bytes": lambda v: mps.solve(TABLE, mps.Budget(memory_bytes=v)),
    "precisions": mps.precisions,
    "Precision": mps.Precision,
    "group size": lambda v: mps.Precision("4", "16", v),
    "budget": lambda v: mps.solve(TABLE, v),
    "table": lambda v: mps.solve(v, BUDGET),
    "minimize": lambda v: mps.solve(TABLE, BUDGET, minimize=v),
    "top": lambda v: mps.solve(TABLE, BUDGET, top=v),
    "solver": lambda v: mps.solve(TABLE, BUDGET, v),
    "over": lambda v: mps.pareto(TABLE, v),
    "method": lambda v: mps.pareto(TABLE, "memory_bytes", method=v),
    "epsilon": lambda v: mps.pareto(TABLE, "memory_bytes", method="epsilon", epsilon=v),
    "at": lambda v: mps.pareto(TABLE, "memory_bytes").at(v),
    "sensitivity": lambda v: mps.CostTable(LAYERS, OPTIONS, v),
    "usage": lambda v: mps.CostTable(LAYERS, OPTIONS, TABLE.sensitivity, usage={"x": v}),
    "fixed_usage": lambda v: mps.CostTable(LAYERS, OPTIONS, TABLE.sensitivity, usage=TABLE.usage, fixed_usage={"memory_bytes": v}),
    "name": mps.Layer,
    "shape": lambda v: mps.Layer("a", "linear", v),
    "macs": lambda v: mps.Layer("a", "linear", (2,), v),
    "damage": lambda v: MeasuredPlans((FOUR,), v),
    "batches": lambda v: profile(v),
    "batch": lambda v: profile([v]),
    "labels": lambda v: profile([(X, v)], mps.sensitivity.KLDivergence()),
    "estimator": lambda v: profile(estimator=v),
    "options": lambda v: profile(options=v),
    "loss": lambda v: profile(estimator=mps.sensitivity.HessianTrace(num_samples=1), loss=v),
    "layers": lambda v: profile(layers=v),
    "quantizer": lambda v: profile(quantizer=v),
    "resources": lambda v: profile(resources=v),
    "plan": lambda v: mps.evaluate(model(), BATCHES, v, progress=False),
    "precision of a plan": lambda v: mps.evaluate(model(), BATCHES, mps.Plan({"0": v}), progress=False),
    "metric": lambda v: mps.evaluate(model(), BATCHES, FOUR, metric=v, progress=False),
    "own loss": lambda v: mps.evaluate(model(), BATCHES, FOUR, loss=v, progress=False),
    **{name: (lambda v, name=name: search(**{name: v})) for name in ("seed", "effort", "tolerance")},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_or_one_line(name):
    before = torch.get_num_threads()
    for value in VALUES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                CALLS[name](value)
            except mps.MpsearchError as error:
                line = str(error)
                assert line.isprintable(), line
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("value", ["x", -1, 0, float("nan"), float("inf"), [], object()])
def test_passes_that_are_no_number(value):
    with pytest.raises(mps.EstimatorError, match="max_passes"):
        search(max_passes=value)
