"""mpsearch: mixed-precision bit allocation for PyTorch, with the proof of how good the answer is.

`search` does all of it, from a model, data and a budget to a measured plan. Step by step: `layers` finds what can be decided, `profile`
fills a `CostTable` with an estimator of `mpsearch.sensitivity`, `solve` and `pareto` choose from it with a solver of `mpsearch.solvers`,
`evaluate` measures the `Plan`, `mpsearch.export` writes it for another quantizer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mpsearch.allocation.fronts import pareto as pareto
from mpsearch.allocation.solving import solve as solve
from mpsearch.allocation.ties import Tie as Tie
from mpsearch.allocation.ties import tie_prices as tie_prices
from mpsearch.core.budget import Budget as Budget
from mpsearch.core.front import Front as Front
from mpsearch.core.layer import Layer as Layer
from mpsearch.core.layer_options import LayerOptions as LayerOptions
from mpsearch.core.plan import Plan as Plan
from mpsearch.core.precision import Precision as Precision
from mpsearch.core.precision import precisions as precisions
from mpsearch.core.solution import Choice as Choice
from mpsearch.core.solution import Solution as Solution
from mpsearch.core.solution import Solver as Solver
from mpsearch.core.solution import Status as Status
from mpsearch.core.table import CostTable as CostTable
from mpsearch.core.table import Interactions as Interactions
from mpsearch.core.table import Peak as Peak
from mpsearch.errors import BudgetError as BudgetError
from mpsearch.errors import EstimatorError as EstimatorError
from mpsearch.errors import ExportError as ExportError
from mpsearch.errors import InfeasibleError as InfeasibleError
from mpsearch.errors import MissingPackage as MissingPackage
from mpsearch.errors import MpsearchError as MpsearchError
from mpsearch.errors import MpsearchWarning as MpsearchWarning
from mpsearch.errors import PlanError as PlanError
from mpsearch.errors import SolverError as SolverError
from mpsearch.errors import TableError as TableError
from mpsearch.errors import VerificationError as VerificationError

if TYPE_CHECKING:
    from mpsearch.calibration.calibration import Calibration as Calibration
    from mpsearch.calibration.evaluating import evaluate as evaluate
    from mpsearch.calibration.measuring import measure_plans as measure_plans
    from mpsearch.calibration.profiling import forecast as forecast
    from mpsearch.calibration.profiling import profile as profile
    from mpsearch.core.evaluation import Evaluation as Evaluation
    from mpsearch.decisions.finding import layers as layers
    from mpsearch.estimation.context import Context as Context
    from mpsearch.estimation.estimator import Estimate as Estimate
    from mpsearch.estimation.estimator import Estimator as Estimator
    from mpsearch.estimation.proxies.evolution import ProxyEvolution as ProxyEvolution
    from mpsearch.evaluation.table_fitting import calibrate as calibrate
    from mpsearch.models.distilling import distill_data as distill_data
    from mpsearch.models.modules.kv_cache import KVCache as KVCache
    from mpsearch.plan_search.goals import LeastResource as LeastResource
    from mpsearch.plan_search.goals import WholeFront as WholeFront
    from mpsearch.plan_search.goals import WithinBudget as WithinBudget
    from mpsearch.plan_search.proxy_search import ProxyTruth as ProxyTruth
    from mpsearch.plan_search.proxy_search import evolve_proxy as evolve_proxy
    from mpsearch.plan_search.result import SearchResult as SearchResult
    from mpsearch.plan_search.searching import search as search
    from mpsearch.quantizers.quantizer import Quantizer as Quantizer

__all__ = [
    "Budget",
    "BudgetError",
    "Calibration",
    "Choice",
    "Context",
    "CostTable",
    "Estimate",
    "Estimator",
    "EstimatorError",
    "Evaluation",
    "ExportError",
    "Front",
    "InfeasibleError",
    "Interactions",
    "KVCache",
    "Layer",
    "LayerOptions",
    "LeastResource",
    "MissingPackage",
    "MpsearchError",
    "MpsearchWarning",
    "Peak",
    "Plan",
    "PlanError",
    "Precision",
    "ProxyEvolution",
    "ProxyTruth",
    "Quantizer",
    "SearchResult",
    "Solution",
    "Solver",
    "SolverError",
    "Status",
    "TableError",
    "Tie",
    "VerificationError",
    "WholeFront",
    "WithinBudget",
    "calibrate",
    "distill_data",
    "evaluate",
    "evolve_proxy",
    "forecast",
    "layers",
    "measure_plans",
    "pareto",
    "precisions",
    "profile",
    "search",
    "solve",
    "tie_prices",
]

__version__ = "0.1.0"

_NEED_TORCH = {  # loaded when first used, so that solving and showing never load torch
    "Calibration": "mpsearch.calibration.calibration",
    "calibrate": "mpsearch.evaluation.table_fitting",
    "distill_data": "mpsearch.models.distilling",
    "Context": "mpsearch.estimation.context",
    "Estimate": "mpsearch.estimation.estimator",
    "Estimator": "mpsearch.estimation.estimator",
    "evaluate": "mpsearch.calibration.evaluating",
    "Evaluation": "mpsearch.core.evaluation",
    "evolve_proxy": "mpsearch.plan_search.proxy_search",
    "KVCache": "mpsearch.models.modules.kv_cache",
    "ProxyEvolution": "mpsearch.estimation.proxies.evolution",
    "ProxyTruth": "mpsearch.plan_search.proxy_search",
    "LeastResource": "mpsearch.plan_search.goals",
    "WholeFront": "mpsearch.plan_search.goals",
    "WithinBudget": "mpsearch.plan_search.goals",
    "layers": "mpsearch.decisions.finding",
    "forecast": "mpsearch.calibration.profiling",
    "measure_plans": "mpsearch.calibration.measuring",
    "profile": "mpsearch.calibration.profiling",
    "Quantizer": "mpsearch.quantizers.quantizer",
    "search": "mpsearch.plan_search.searching",
    "SearchResult": "mpsearch.plan_search.result",
}
_FOLDERS = ("export", "quantizers", "sensitivity", "solvers", "testing")


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(_NEED_TORCH[name]), name)
    if name in _FOLDERS:
        return importlib.import_module(f"mpsearch.{name}")
    raise AttributeError(f"module 'mpsearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NEED_TORCH, *_FOLDERS])
