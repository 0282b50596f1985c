"""The door from a table and a handful of measured plans to a table in their unit."""

import dataclasses
from typing import Any

import numpy as np
import scipy.optimize

from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.problem import usage_of
from mpsearch.core.table import Array, CostTable
from mpsearch.errors import TableError
from mpsearch.metrics.ranking import kendall, kendall_se, spearman, spearman_se

_LEAST_PLANS = 3


def calibrate(table: CostTable, measured: MeasuredPlans, *, per_precision: bool = False) -> CostTable:
    """Turn a table that only ranks into the unit of the damage, nats say, by non-negative regression on measured plans.

    The damage m_i of plan i, which puts layer l at precision o_i(l), is fitted by scaled parts of the table,

        m_i ~ sum_p c_p x_ip,   x_ip = sum over layers at p of sensitivity(l, p),   c_p >= 0,

    with one c for all precisions, or one for each. An additive prediction errs in proportion to its size, so squares are
    weighted by 1 / ((c0 x_i)^2 + se_i^2), x_i = sum_p x_ip, c0 = median of |m_i| / x_i: without measurement error, one scale is the
    mean of m_i / x_i. Scales for each precision are drawn towards the common scale c by a prior of mean c and standard
    deviation c, so that a precision that does little in these plans keeps c.

    One scale leaves the ranks of plans as they are; a scale for each precision mends a score whose fall with the bits is off.
    The cross-validated rank correlation says whether it does.

    Args:
        table: L layers, P precisions, usually `relative`.
        measured: plans over its layers, with damage in nats or another unit; at least 3, a dozen is better.
        per_precision: a scale for each precision in place of one.

    Returns:
        The table in that unit, with `sensitivity_se` from scales and table; the error of a scale is common to its cells.
        `origin["calibration"]` holds the scales and their standard errors, and, of each measured damage with its prediction
        from the other plans, Spearman's and Kendall's correlation with standard errors and the median relative error.

    Raises:
        TableError: where plans are too few or their damage has no unit, or their damage does not rise with the table.
        PlanError: where plans and table do not fit.

    Two layers, a table that is half the damage:

    >>> from mpsearch import Layer, Plan, Precision, precisions
    >>> table = CostTable((Layer("a"), Layer("b")), precisions("w2 w4"), [[4, 1], [2, 1]])
    >>> plans = [Plan({"a": Precision(x), "b": Precision(y)}) for x, y in ("22", "24", "42", "44")]
    >>> calibrated = calibrate(table, MeasuredPlans(plans, [12, 10, 6, 4], unit="nats"))
    >>> calibrated.sensitivity.tolist(), calibrated.unit, calibrated.origin["calibration"]["scales"]
    ([[8.0, 2.0], [4.0, 2.0]], 'nats', {'all': 2.0})
    """
    if measured.unit == "relative":
        raise TableError("the measured damage is relative, a ranking; expected nats, or the unit of a metric")
    features, names = _features(table, measured, per_precision)
    usable = int((features.sum(axis=1) > 0).sum())
    if usable < _LEAST_PLANS:
        raise TableError(f"{usable} measured plans that the table gives a damage, expected {_LEAST_PLANS} or more")
    damage = measured.damage
    se = np.zeros_like(damage) if measured.damage_se is None else np.nan_to_num(measured.damage_se)
    scales, scales_se = _fit(features, damage, se)
    if not scales.any():
        raise TableError("the measured damage does not rise with the table: every scale is 0")
    others = [np.arange(len(damage)) != i for i in range(len(damage))]
    without = np.array([_fit(features[rest], damage[rest], se[rest])[0] for rest in others])
    held_out = (features * without).sum(axis=1)
    harmful = damage != 0
    quality = {
        "spearman": spearman(held_out, damage),
        "spearman_se": spearman_se(held_out, damage),
        "kendall": kendall(held_out, damage),
        "kendall_se": kendall_se(held_out, damage),
        "relative_error": float(np.median(np.abs(held_out[harmful] / damage[harmful] - 1))),
    }
    facts = {
        "plans": len(damage),
        "scales": dict(zip(names, scales.tolist(), strict=True)),
        "scales_se": dict(zip(names, scales_se.tolist(), strict=True)),
        **{name: value if np.isfinite(value) else None for name, value in quality.items()},
        "measured": dict(measured.origin),
    }
    return _scaled(table, names, scales, scales_se, measured.unit, facts)


def _features(table: CostTable, measured: MeasuredPlans, per_precision: bool) -> tuple[Array, list[str]]:
    """(N, K) predicted damage of each plan by each scale, and the names of the scales."""
    options = measured.options(table)
    if not per_precision:
        return np.array([[usage_of(table, row)["sensitivity"]] for row in options]), ["all"]
    if table.interactions is not None:
        raise TableError("a table with interactions has one scale: the cells of a pair may have two precisions")
    columns = [p for p in range(len(table.precisions)) if np.nan_to_num(table.sensitivity[:, p]).any()]
    chosen = table.sensitivity[np.arange(options.shape[1]), options]
    features = np.stack([np.where(options == p, chosen, 0.0).sum(axis=1) for p in columns], axis=1)
    return features, [str(table.precisions[p]) for p in columns]


def _fit(features: Array, damage: Array, se: Array) -> tuple[Array, Array]:
    """(K,) scales and their standard errors."""
    total = features.sum(axis=1)
    usable = total > 0
    features, damage, se, total = features[usable], damage[usable], se[usable], total[usable]
    spread = np.hypot(np.median(np.abs(damage) / total) * total, se)
    if not spread.all():  # most plans do no damage at all
        spread = total
    a, b = features / spread[:, None], damage / spread
    together = a.sum(axis=1)
    count, scales = a.shape
    common = max(float(together @ b) / float(together @ together), 0.0)
    if not common:
        return np.zeros(scales), np.zeros(scales)
    sigma = float(np.linalg.norm(b - common * together)) / np.sqrt(count - 1)
    prior = np.eye(scales) * (sigma / common if scales > 1 else 0.0)
    fitted, _ = scipy.optimize.nnls(
        np.vstack([a, prior]), np.append(b, common * prior.sum(axis=1)), maxiter=100 * scales
    )
    return fitted, sigma * np.sqrt(np.diag(np.linalg.pinv(a.T @ a + prior.T @ prior)))


def _scaled(
    table: CostTable, names: list[str], scales: Array, scales_se: Array, unit: str, facts: dict[str, Any]
) -> CostTable:
    place = {name: k for k, name in enumerate(names)}
    of_column = [place.get(str(precision), 0) for precision in table.precisions]  # a column of zeros takes any scale
    factor, factor_se = scales[of_column], scales_se[of_column]
    own = np.zeros_like(table.sensitivity) if table.sensitivity_se is None else table.sensitivity_se
    pairs = table.interactions
    return dataclasses.replace(
        table,
        sensitivity=table.sensitivity * factor,
        sensitivity_se=np.hypot(own * factor, table.sensitivity * factor_se),
        unit=unit,
        origin={**table.origin, "calibration": facts},
        interactions=None if pairs is None else dataclasses.replace(pairs, value=pairs.value * scales[0]),
    )
