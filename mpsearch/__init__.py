"""mpsearch: mixed-precision bit allocation for PyTorch, with the proof of how good the answer is.

`search` does all of it, from a model, data and a budget to a measured plan. Step by step: `layers` finds what can be decided, `profile`
fills a `CostTable` with an estimator of `mpsearch.sensitivity`, `solve` and `pareto` choose from it with a solver of `mpsearch.solvers`,
`evaluate` measures the `Plan`, `mpsearch.export` writes it for another quantizer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers read these; a test holds them against the list below
    from mpsearch.allocation.fronts import pareto as pareto
    from mpsearch.allocation.solving import solve as solve
    from mpsearch.allocation.ties import Tie as Tie
    from mpsearch.allocation.ties import tie_prices as tie_prices
    from mpsearch.calibration.calibration import Calibration as Calibration
    from mpsearch.calibration.evaluating import evaluate as evaluate
    from mpsearch.calibration.measuring import measure_plans as measure_plans
    from mpsearch.calibration.profiling import forecast as forecast
    from mpsearch.calibration.profiling import profile as profile
    from mpsearch.core.budget import Budget as Budget
    from mpsearch.core.evaluation import Evaluation as Evaluation
    from mpsearch.core.forecast import Forecast as Forecast
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
    from mpsearch.decisions.finding import layers as layers
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
    from mpsearch.plan_search.results.result import SearchResult as SearchResult
    from mpsearch.plan_search.searching import search as search
    from mpsearch.quantizers.quantizer import Quantizer as Quantizer

__version__ = "0.1.0"

#: Public name -> module that it is loaded from at the first use: `import mpsearch` is quick, and solving and showing never load torch.
_MODULES = {
    "Budget": "mpsearch.core.budget",
    "BudgetError": "mpsearch.errors",
    "Calibration": "mpsearch.calibration.calibration",
    "Choice": "mpsearch.core.solution",
    "Context": "mpsearch.estimation.context",
    "CostTable": "mpsearch.core.table",
    "Estimate": "mpsearch.estimation.estimator",
    "Estimator": "mpsearch.estimation.estimator",
    "EstimatorError": "mpsearch.errors",
    "Evaluation": "mpsearch.core.evaluation",
    "ExportError": "mpsearch.errors",
    "Forecast": "mpsearch.core.forecast",
    "Front": "mpsearch.core.front",
    "InfeasibleError": "mpsearch.errors",
    "Interactions": "mpsearch.core.table",
    "KVCache": "mpsearch.models.modules.kv_cache",
    "Layer": "mpsearch.core.layer",
    "LayerOptions": "mpsearch.core.layer_options",
    "LeastResource": "mpsearch.plan_search.goals",
    "MissingPackage": "mpsearch.errors",
    "MpsearchError": "mpsearch.errors",
    "MpsearchWarning": "mpsearch.errors",
    "Peak": "mpsearch.core.table",
    "Plan": "mpsearch.core.plan",
    "PlanError": "mpsearch.errors",
    "Precision": "mpsearch.core.precision",
    "ProxyEvolution": "mpsearch.estimation.proxies.evolution",
    "ProxyTruth": "mpsearch.plan_search.proxy_search",
    "Quantizer": "mpsearch.quantizers.quantizer",
    "SearchResult": "mpsearch.plan_search.results.result",
    "Solution": "mpsearch.core.solution",
    "Solver": "mpsearch.core.solution",
    "SolverError": "mpsearch.errors",
    "Status": "mpsearch.core.solution",
    "TableError": "mpsearch.errors",
    "Tie": "mpsearch.allocation.ties",
    "VerificationError": "mpsearch.errors",
    "WholeFront": "mpsearch.plan_search.goals",
    "WithinBudget": "mpsearch.plan_search.goals",
    "calibrate": "mpsearch.evaluation.table_fitting",
    "distill_data": "mpsearch.models.distilling",
    "evaluate": "mpsearch.calibration.evaluating",
    "evolve_proxy": "mpsearch.plan_search.proxy_search",
    "forecast": "mpsearch.calibration.profiling",
    "layers": "mpsearch.decisions.finding",
    "measure_plans": "mpsearch.calibration.measuring",
    "pareto": "mpsearch.allocation.fronts",
    "precisions": "mpsearch.core.precision",
    "profile": "mpsearch.calibration.profiling",
    "search": "mpsearch.plan_search.searching",
    "solve": "mpsearch.allocation.solving",
    "tie_prices": "mpsearch.allocation.ties",
}
#: Packages that need no import of their own.
_PACKAGES = ("errors", "export", "quantizers", "sensitivity", "solvers", "testing")

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"mpsearch.{name}")
    raise AttributeError(f"module 'mpsearch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_PACKAGES})
