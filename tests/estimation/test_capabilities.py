"""What estimators declare, and what holds for those that declare nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.forecast import Forecast
from mpsearch.estimation.estimator import Capabilities, Estimate, capabilities_of
from mpsearch.estimation.passes import Passes
from mpsearch.sensitivity import ESTIMATORS, FisherProjection, KLDivergence, RelativeWeightError


class Plain:
    """A class of a user's, with the one method that is needed."""

    def estimate(self, context: Any) -> Estimate:
        return Estimate(np.ones((len(context.decisions), len(context.precisions))), unit="relative")


def test_a_plain_class_is_an_estimator() -> None:
    model, data = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), [torch.randn(5, 4)]
    assert capabilities_of(Plain()) == Capabilities()
    table = mps.profile(model, data, Plain(), mps.precisions("w2 w4"))
    assert table.sensitivity.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert mps.forecast(model, data, Plain(), mps.precisions("w2 w4")) == Forecast()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_registered_estimator_forecasts(name: str) -> None:
    cost = capabilities_of(ESTIMATORS[name]()).cost
    assert cost is not None
    assert isinstance(cost(2, 3, 4), Passes)


def test_what_is_declared_is_read() -> None:
    gradients, runs, weights = (
        capabilities_of(part) for part in (FisherProjection(), KLDivergence(), RelativeWeightError())
    )
    assert (gradients.scores_members, runs.scores_members, weights.scores_members) == ("free", "runs", "no")
    assert (gradients.seeded, runs.seeded, weights.seeded) == (True, False, False)
    assert (gradients.scores_caches, runs.scores_caches, weights.scores_caches) == (True, True, False)
    assert gradients.together is not None
    assert runs.together is not gradients.together
    assert weights.together is None
