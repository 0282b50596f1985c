"""Contract suites for parts written elsewhere: they raise AssertionError with what broke the contract."""

from typing import TYPE_CHECKING, Any

from mpsearch.core.certificate import check_solution as check_solution
from mpsearch.testing.solvers import check_solver as check_solver

if TYPE_CHECKING:
    from mpsearch.testing.estimators import check_estimator as check_estimator


def __getattr__(name: str) -> Any:
    if name == "check_estimator":  # needs torch, which the others do without
        from mpsearch.testing.estimators import check_estimator

        return check_estimator
    raise AttributeError(f"module 'mpsearch.testing' has no attribute {name!r}")
