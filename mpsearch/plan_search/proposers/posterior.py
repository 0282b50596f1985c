"""What measured plans say of each cell: a Bayesian linear model of the damage."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

Floats = NDArray[np.float64]
Columns = NDArray[np.int64]


@dataclass(eq=False)
class Posterior:
    """Damage of a plan = sum of the damage of its cells + misfit, with a Gaussian belief about every cell.

    A table is the prior mean m[d, p]; cells of one decision err together: their covariance is m[d, p] m[d, q] (row^2 + [p = q] cell^2).
    Each measured plan is one equation with a misfit of a stated share of its damage (errors of layers add
    and cancel). Samples are drawn by Matheron's rule, a draw of the prior corrected by what was measured, so nothing larger than
    plans x plans is ever solved, by a Cholesky factor that grows by a row a plan. Optimal plans of samples are Thompson's proposals
    (Biometrika 25 (1933) 285-294; for linear models: Agrawal and Goyal, ICML 2013).

    Attributes:
        mean: (D, P) prior; nan = not allowed.
        row: relative error that the cells of a decision share.
        cell: relative error of each cell.
        misfit: standard deviation of a measurement about the sum, as a share of the damage.

    >>> posterior = Posterior(np.array([[4.0, 1.0], [4.0, 1.0]]), misfit=1e-6)
    >>> posterior.add(np.array([0, 1]), 9.0)             # not 5: the cells that it chose do more damage
    >>> damage = posterior.expected()
    >>> round(float(damage[0, 0] + damage[1, 1]), 6), bool(damage[0, 0] > 4), bool(damage[0, 1] > 1)
    (9.0, True, True)
    """

    mean: Floats
    row: float = 0.5
    cell: float = 0.35
    misfit: float = 0.1
    damage: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rows = np.arange(len(self.mean))
        # room for more plans than there are, so that one is added without copying the others
        self._all_plans = np.zeros((1, len(self.mean)), np.int64)
        self._all_values = np.zeros((1, len(self.mean)))  # prior means of the cells of each plan
        self._all_factors = np.zeros((1, 1))  # Cholesky, of the covariance of what was measured
        self._expected: Floats | None = None

    @property
    def plans(self) -> Columns:
        """(N, D) the measured plans."""
        return self._all_plans[: len(self.damage)]

    def add(self, columns: Columns, damage: float) -> None:
        """A plan (D,) was measured; one that does no damage, as was known, teaches nothing."""
        noise = self.misfit * max(damage, self.predict(columns))
        if noise == 0:
            return
        size = len(self.damage)
        own = self.mean[self._rows, columns]
        below = solve_triangular(self._factor, self._overlap(columns, own), lower=True, check_finite=False)
        variance = (self.row**2 + self.cell**2) * float(own @ own) + noise**2
        if size == len(self._all_plans):
            self._all_plans = np.pad(self._all_plans, ((0, size), (0, 0)))
            self._all_values = np.pad(self._all_values, ((0, size), (0, 0)))
            self._all_factors = np.pad(self._all_factors, (0, size))
        self._all_plans[size], self._all_values[size] = columns, own
        self._all_factors[size, :size] = below
        self._all_factors[size, size] = max(variance - float(below @ below), noise**2) ** 0.5
        self.damage.append(damage)
        self.noise.append(noise)
        self._expected = None

    def predict(self, columns: Columns) -> float:
        """Expected damage of a plan."""
        return float(self.expected()[self._rows, columns].sum())

    def expected(self) -> Floats:
        """(D, P) posterior mean, at least 0."""
        if self._expected is None:
            self._expected = self._corrected(self.mean, np.zeros(len(self.plans)))
        return self._expected

    def sample(self, generator: np.random.Generator, spread: float = 1.0) -> Floats:
        """(D, P) a draw of the posterior, at least 0.

        Args:
            generator: of the draw.
            spread: factor on the standard deviations.
        """
        decisions, precisions = self.mean.shape
        error = self.row * generator.standard_normal((decisions, 1))
        error = error + self.cell * generator.standard_normal((decisions, precisions))
        misfit = generator.standard_normal(len(self.plans)) * np.array(self.noise)
        return self._corrected(self.mean * (1 + spread * error), spread * misfit)

    def _corrected(self, prior: Floats, misfit: Floats) -> Floats:
        """A draw of the prior, moved so that it agrees with what was measured."""
        if not self.damage:
            return np.maximum(prior, 0.0)
        residual = np.array(self.damage) - prior[self._rows, self.plans].sum(1) - misfit
        weights = cho_solve((self._factor, True), residual, check_finite=False)
        values = self._values * weights[:, None]  # (N, D)
        cells = self._rows * self.mean.shape[1] + self.plans
        sums = np.bincount(cells.ravel(), values.ravel(), self.mean.size).reshape(self.mean.shape)
        shift = self.cell**2 * sums + self.row**2 * values.sum(0)[:, None]
        draw: Floats = np.maximum(prior + self.mean * shift, 0.0)
        return draw

    @property
    def _values(self) -> Floats:
        return self._all_values[: len(self.damage)]

    @property
    def _factor(self) -> Floats:
        return self._all_factors[: len(self.damage), : len(self.damage)]

    def _overlap(self, columns: Columns, own: Floats) -> Floats:
        """(N,) prior covariance of a plan's damage with that of each measured plan."""
        same = self.row**2 + self.cell**2 * (self.plans == columns)
        covariance: Floats = (self._values * same) @ own
        return covariance
