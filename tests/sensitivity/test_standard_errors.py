"""Standard errors cover: calibration sets drawn from a pool, scores against those of the whole pool.

The truth is the score on the pool, by as many draws as make its own error small. At 3 standard errors a set of 96 samples must
cover it in at least 95 % of 60 repetitions: a normal distribution has 99.7 %, squares have longer tails.
"""

import functools

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity import (
    SQNR,
    CosineDistance,
    DeltaLoss,
    EmpiricalFisher,
    Fisher,
    FisherProjection,
    GaussNewtonTrace,
    GradientImportance,
    HessianAugmented,
    KFACDiagonal,
    KLDivergence,
    LayerOutputError,
    LinearityCoefficients,
    MaskedKL,
    OutputGradient,
    OutputMSE,
    PathShapley,
    PredictionDifference,
    TaskMetric,
    Taylor,
)

POOL, SAMPLES, REPETITIONS = 256, 96, 60

#: Family -> estimators, with what scores the pool.
FAMILIES = {
    "given labels": {one: one for one in (Taylor(signed=True), EmpiricalFisher(), GradientImportance())},
    "random outputs": {
        FisherProjection(): FisherProjection(60),
        HessianAugmented(): HessianAugmented(60),
        Fisher(): Fisher(200),
        GaussNewtonTrace(): GaussNewtonTrace(60),
        OutputGradient(): OutputGradient(60),
        KFACDiagonal(): KFACDiagonal(60),
    },
    "measured": {
        one: one
        for one in (
            KLDivergence(),
            OutputMSE(),
            SQNR(),
            CosineDistance(),
            PredictionDifference(),
            TaskMetric(),
            MaskedKL(),
        )
    },
    "a layer alone": {LayerOutputError(): LayerOutputError()},
    "over batches": {one: one for one in (DeltaLoss(), PathShapley(2, coverage=False))},
}


def shifted(weight, precision):
    steps = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
    return weight + torch.cos(1 + 2 * steps) * 0.2


@functools.cache
def pool():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.randn(POOL, 4), torch.randint(0, 3, (POOL,))


@pytest.mark.parametrize("family", FAMILIES)
def test_coverage(family):
    model, x, y = pool()
    estimators = FAMILIES[family]
    loss = "cross-entropy" if family == "given labels" else "kl"
    run = functools.partial(mps.profile, model, precisions=mps.precisions("w4"), loss=loss, quantizer=shifted)
    generator = torch.Generator().manual_seed(1)
    whole, size = [(x, y)], 32
    if family == "over batches":  # a score of a batch depends on its size
        size = 8
        orders = torch.cat([torch.randperm(POOL, generator=generator) for _ in range(4)])
        whole = list(zip(x[orders].split(size), y[orders].split(size), strict=True))
    truths = [table.sensitivity for table in run(whole, estimator=list(estimators.values()))]  # type: ignore[attr-defined]
    hits = np.zeros((len(estimators), 2))
    for seed in range(REPETITIONS):
        at = torch.randint(0, POOL, (SAMPLES,), generator=generator)
        batches = list(zip(x[at].split(size), y[at].split(size), strict=True))
        drawn = [type(one)(**{**vars(one), "seed": seed}) if hasattr(one, "seed") else one for one in estimators]  # type: ignore[attr-defined]
        for row, (table, truth) in enumerate(zip(run(batches, estimator=drawn), truths, strict=True)):
            hits[row] += (abs(table.sensitivity - truth) <= 3 * table.sensitivity_se)[:, 0]
    covered = hits.mean(1) / REPETITIONS
    assert (covered >= 0.95).all(), dict(zip(estimators, covered, strict=True))


def test_slopes_over_random_noise():
    """LinearityCoefficients: over draws of the noise, on the same samples; the truth is the mean over all seeds.

    15 levels, of which large ones weigh most, count as (sum x^2)^2 / sum x^4 = 8; 3.5 is the 99 % quantile of t for 7
    degrees of freedom.
    """
    model, x, _ = pool()
    seeds = [LinearityCoefficients(seed=seed) for seed in range(REPETITIONS)]
    tables = mps.profile(model, [x[:64]], seeds, mps.precisions("w4"))
    found = np.array([table.sensitivity[:, 0] for table in tables])
    errors = np.array([table.sensitivity_se[:, 0] for table in tables])
    assert (abs(found - found.mean(0)) <= 3.5 * errors).mean() >= 0.95
    np.testing.assert_allclose(np.sqrt((errors**2).mean(0)), found.std(0, ddof=1), rtol=0.4)
