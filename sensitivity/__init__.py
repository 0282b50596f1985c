"""Sensitivity estimators: each a file, a frozen dataclass with one method, `estimate`."""

from mpsearch.estimator import Estimator as Estimator
from mpsearch.sensitivity.hessian_trace import HessianTrace as HessianTrace
from mpsearch.sensitivity.kl_divergence import KLDivergence as KLDivergence

#: Name on the command line -> class.
ESTIMATORS: dict[str, type] = {
    "kl-divergence": KLDivergence,
    "hessian-trace": HessianTrace,
}
