"""The posterior against the formula of a Gaussian with a dense covariance."""

import numpy as np
import pytest

from mpsearch.plan_search.proposers import Posterior

U, P = 4, 3


def dense(posterior):
    """Mean (U P,) and covariance of all cells given the plans, from the joint Gaussian."""
    mean = posterior.mean.reshape(-1)
    size = len(mean)
    covariance = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            if i // P == j // P:
                covariance[i, j] = mean[i] * mean[j] * (posterior.row**2 + (i == j) * posterior.cell**2)
    chosen = np.zeros((len(posterior.plans), size))
    for number, options in enumerate(posterior.plans):
        chosen[number, np.arange(U) * P + options] = 1
    gram = chosen @ covariance @ chosen.T + np.diag(np.square(posterior.noise))
    gain = covariance @ chosen.T @ np.linalg.inv(gram)
    return mean + gain @ (posterior.damage - chosen @ mean), covariance - gain @ chosen @ covariance


@pytest.fixture
def posterior():
    generator = np.random.default_rng(0)
    found = Posterior(generator.uniform(1, 2, (U, P)), row=0.15, cell=0.1, misfit=0.05)
    for _ in range(5):
        options = generator.integers(0, P, U)
        found.add(options, found.mean[np.arange(U), options].sum() * generator.uniform(0.8, 1.2))
    return found


def test_the_mean(posterior):
    mean, _ = dense(posterior)
    assert np.allclose(posterior.expected().reshape(-1), mean, rtol=1e-10)
    options = np.array([0, 1, 2, 0])
    assert posterior.predict(options) == pytest.approx(mean.reshape(U, P)[np.arange(U), options].sum())


def test_the_covariance_over_many_draws(posterior):
    mean, covariance = dense(posterior)
    generator = np.random.default_rng(1)
    draws = np.array([posterior.sample(generator).reshape(-1) for _ in range(20_000)])
    scale = np.sqrt(np.diag(covariance))
    assert np.abs((draws.mean(0) - mean) / scale).max() < 5 / np.sqrt(len(draws))
    found = np.cov(draws.T) / np.outer(scale, scale)
    assert np.abs(found - covariance / np.outer(scale, scale)).max() < 7 / np.sqrt(len(draws))
    wide = np.array([posterior.sample(generator, 2.0).reshape(-1) for _ in range(5_000)])
    assert np.allclose(wide.std(0), 2 * scale, rtol=0.1)


def test_the_prior_without_plans():
    prior = Posterior(np.array([[4.0, 1.0], [2.0, 0.0]]), row=0.3, cell=0.1)
    assert np.array_equal(prior.expected(), prior.mean)
    generator = np.random.default_rng(0)
    draws = np.array([prior.sample(generator) for _ in range(20_000)])
    assert np.allclose(draws.std(0), prior.mean * np.hypot(0.3, 0.1), rtol=0.05)
    assert np.corrcoef(draws[:, 0, 0], draws[:, 0, 1])[0, 1] == pytest.approx(0.09 / 0.1, abs=0.02)
    assert abs(np.corrcoef(draws[:, 0, 0], draws[:, 1, 0])[0, 1]) < 0.03


def test_damage_is_never_negative():
    posterior = Posterior(np.array([[1.0, 0.1], [1.0, 0.1]]), misfit=0.01)
    posterior.add(np.array([0, 0]), -3.0)
    assert (posterior.expected() >= 0).all()
    assert (posterior.sample(np.random.default_rng(0), 5.0) >= 0).all()


def test_plans_that_do_no_damage_and_are_repeated():
    """Nothing singular: unquantized cells, the same plan twice, a plan of damage 0."""
    posterior = Posterior(np.array([[1.0, 0.0], [1.0, 0.0]]))
    for options, damage in (([1, 1], 0.0), ([0, 1], 1.2), ([0, 1], 1.2), ([0, 0], 0.0), ([1, 1], 0.0)):
        posterior.add(np.array(options), damage)
    assert np.isfinite(posterior.expected()).all()
    assert np.isfinite(posterior.sample(np.random.default_rng(0))).all()
    assert posterior.expected()[:, 1].tolist() == [0.0, 0.0]
