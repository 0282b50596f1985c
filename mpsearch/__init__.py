"""mpsearch: mixed-precision bit allocation for PyTorch, with the proof of how good the answer is.

`search` does all of it, from a model, data and a budget to a measured plan. Step by step: `layers` finds what can be decided, `profile`
fills a `CostTable` with an estimator of `mpsearch.sensitivity`, `solve` and `pareto` choose from it with a solver of `mpsearch.solvers`,
`evaluate` measures the `Plan`, `mpsearch.export` writes it for another quantizer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mpsearch._pareto import pareto as pareto
from mpsearch._solve import solve as solve
from mpsearch.budget import Budget as Budget
from mpsearch.errors import BudgetError as BudgetError
from mpsearch.errors import EstimatorError as EstimatorError
from mpsearch.errors import ExportError as ExportError
from mpsearch.errors import InfeasibleError as InfeasibleError
from mpsearch.errors import MissingPackage as MissingPackage
from mpsearch.errors import MpsearchError as MpsearchError
from mpsearch.errors import PlanError as PlanError
from mpsearch.errors import SolverError as SolverError
from mpsearch.errors import TableError as TableError
from mpsearch.errors import VerificationError as VerificationError
from mpsearch.front import Front as Front
from mpsearch.layer import Layer as Layer
from mpsearch.plan import Plan as Plan
from mpsearch.precision import Precision as Precision
from mpsearch.precision import precisions as precisions
from mpsearch.solution import Choice as Choice
from mpsearch.solution import Solution as Solution
from mpsearch.solution import Solver as Solver
from mpsearch.solution import Status as Status
from mpsearch.table import CostTable as CostTable
from mpsearch.table import Interactions as Interactions
from mpsearch.table import Peak as Peak
from mpsearch.ties import Tie as Tie
from mpsearch.ties import tie_prices as tie_prices

if TYPE_CHECKING:
    from mpsearch._calibrate import calibrate as calibrate
    from mpsearch._evaluate import evaluate as evaluate
    from mpsearch._evolve_proxy import ProxyTruth as ProxyTruth
    from mpsearch._evolve_proxy import evolve_proxy as evolve_proxy
    from mpsearch._layers import layers as layers
    from mpsearch._measure_plans import measure_plans as measure_plans
    from mpsearch._profile import forecast as forecast
    from mpsearch._profile import profile as profile
    from mpsearch._search import search as search
    from mpsearch.distill import distill_data as distill_data
    from mpsearch.evaluation import Evaluation as Evaluation
    from mpsearch.kv_cache import KVCache as KVCache
    from mpsearch.proxy_evolution import ProxyEvolution as ProxyEvolution
    from mpsearch.search_result import SearchResult as SearchResult

__all__ = [
    "Budget",
    "BudgetError",
    "Choice",
    "CostTable",
    "EstimatorError",
    "Evaluation",
    "ExportError",
    "Front",
    "InfeasibleError",
    "Interactions",
    "KVCache",
    "Layer",
    "MissingPackage",
    "MpsearchError",
    "Peak",
    "Plan",
    "PlanError",
    "Precision",
    "ProxyEvolution",
    "ProxyTruth",
    "SearchResult",
    "Solution",
    "Solver",
    "SolverError",
    "Status",
    "TableError",
    "Tie",
    "VerificationError",
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
    "calibrate": "mpsearch._calibrate",
    "distill_data": "mpsearch.distill",
    "evaluate": "mpsearch._evaluate",
    "Evaluation": "mpsearch.evaluation",
    "evolve_proxy": "mpsearch._evolve_proxy",
    "KVCache": "mpsearch.kv_cache",
    "ProxyEvolution": "mpsearch.proxy_evolution",
    "ProxyTruth": "mpsearch._evolve_proxy",
    "layers": "mpsearch._layers",
    "forecast": "mpsearch._profile",
    "measure_plans": "mpsearch._measure_plans",
    "profile": "mpsearch._profile",
    "search": "mpsearch._search",
    "SearchResult": "mpsearch.search_result",
}
_FOLDERS = ("export", "sensitivity", "solvers", "testing")


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(importlib.import_module(_NEED_TORCH[name]), name)
    if name in _FOLDERS:
        return importlib.import_module(f"mpsearch.{name}")
    raise AttributeError(f"module 'mpsearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NEED_TORCH, *_FOLDERS])
