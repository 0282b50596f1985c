"""Contract suites for parts written elsewhere.

`<seam>_checks(part)` yields named checks, functions without arguments that raise AssertionError with what broke the contract, so that one
failure does not hide the others:

    @pytest.mark.parametrize(("name", "check"), list(solver_checks(MySolver())), ids=lambda value: value if isinstance(value, str) else "")
    def test_my_solver(name, check):
        check()

`check_estimator` and `check_solver` run all of them at once. A check that needs a package that is not installed raises
`unittest.SkipTest`, which pytest and unittest show as skipped.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsearch.core.certificate import check_solution as check_solution
    from mpsearch.testing.checkpoints import checkpoint_checks as checkpoint_checks
    from mpsearch.testing.estimators import check_estimator as check_estimator
    from mpsearch.testing.estimators import estimator_checks as estimator_checks
    from mpsearch.testing.exporters import exporter_checks as exporter_checks
    from mpsearch.testing.formats import format_checks as format_checks
    from mpsearch.testing.importers import importer_checks as importer_checks
    from mpsearch.testing.proposers import proposer_checks as proposer_checks
    from mpsearch.testing.quantizers import quantizer_checks as quantizer_checks
    from mpsearch.testing.resources import resource_checks as resource_checks
    from mpsearch.testing.solvers import check_solver as check_solver
    from mpsearch.testing.solvers import solver_checks as solver_checks

#: Name -> module, loaded when first used: solvers are checked without torch.
_MODULES = {
    "check_estimator": "mpsearch.testing.estimators",
    "check_solution": "mpsearch.core.certificate",
    "check_solver": "mpsearch.testing.solvers",
    "checkpoint_checks": "mpsearch.testing.checkpoints",
    "estimator_checks": "mpsearch.testing.estimators",
    "exporter_checks": "mpsearch.testing.exporters",
    "format_checks": "mpsearch.testing.formats",
    "importer_checks": "mpsearch.testing.importers",
    "proposer_checks": "mpsearch.testing.proposers",
    "quantizer_checks": "mpsearch.testing.quantizers",
    "resource_checks": "mpsearch.testing.resources",
    "solver_checks": "mpsearch.testing.solvers",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'mpsearch.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
