"""Each of the eight registries has a suite: every part that it names yields checks by name."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from mpsearch import testing
from mpsearch.export import EXPORTERS
from mpsearch.imports import IMPORTERS, TABLE_IMPORTERS
from mpsearch.plan_search.proposers import PROPOSERS
from mpsearch.quantizers import QUANTIZERS
from mpsearch.quantizers.formats import FORMATS
from mpsearch.resources import RESOURCES
from mpsearch.sensitivity import ESTIMATORS
from mpsearch.solvers import SOLVERS
from mpsearch.testing.named_checks import run_all

#: Seam -> registries and how a part of it is handed to the suite; its own test, `test_<seam>s.py`, runs the checks.
SEAMS: dict[str, tuple[tuple[Mapping[str, Any], ...], Callable[[str, Any], Any]]] = {
    "estimator": ((ESTIMATORS,), lambda name, part: part()),
    "solver": ((SOLVERS,), lambda name, part: part()),
    "resource": ((RESOURCES,), lambda name, part: part("latency.csv") if name == "latency-table" else part()),
    "quantizer": ((QUANTIZERS,), lambda name, part: name),
    "format": ((FORMATS,), lambda name, part: name),
    "exporter": ((EXPORTERS,), lambda name, part: part),
    "importer": ((IMPORTERS, TABLE_IMPORTERS), lambda name, part: part),
    "proposer": ((PROPOSERS,), lambda name, part: part()),
}


def parts() -> Iterator[Any]:
    for seam, (registries, handed) in SEAMS.items():
        for registry in registries:
            for name, part in registry.items():
                yield pytest.param(seam, handed(name, part), id=f"{seam}-{name}")


@pytest.mark.parametrize(("seam", "part"), list(parts()))
def test_every_registered_part_has_named_checks(seam: str, part: Any) -> None:
    checks = list(getattr(testing, f"{seam}_checks")(part))
    names = [name for name, _ in checks]
    assert len(names) >= 3
    assert len(set(names)) == len(names)
    assert all(isinstance(name, str) and callable(check) for name, check in checks)


def test_every_suite_is_listed():
    listed = {name for name in dir(testing) if name.endswith("_checks")} - {"named_checks"}
    assert listed == {f"{seam}_checks" for seam in SEAMS} | {"checkpoint_checks"}
    assert all(callable(getattr(testing, name)) for name in listed)


def test_a_suite_loads_what_it_needs_and_no_more():
    code = (
        "import sys; from mpsearch import testing; testing.solver_checks, dir(testing); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_all_checks_are_run_and_every_failure_is_told():
    def fails(message: str) -> Callable[[], None]:
        def check() -> None:
            raise AssertionError(message)

        return check

    with pytest.raises(AssertionError, match=r"^Part\(\): 2 of 3 checks failed\nfirst: expected 1\nlast: expected 3$"):
        run_all("Part()", [("first", fails("expected 1")), ("second", lambda: None), ("last", fails("expected 3"))])
