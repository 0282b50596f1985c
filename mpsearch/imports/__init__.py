"""Plans and tables that other tools made, so that they can be measured, compared and improved."""

import os
import re
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.core.table import CostTable
from mpsearch.core.wrapped_names import by_names_of
from mpsearch.errors import MpsearchError, PlanError, TableError, nearest
from mpsearch.imports.compressed_tensors import from_compressed_tensors as from_compressed_tensors
from mpsearch.imports.exllamav2 import exllamav2_table as exllamav2_table
from mpsearch.imports.gguf import from_gguf as from_gguf
from mpsearch.imports.gptqmodel import from_gptqmodel as from_gptqmodel
from mpsearch.imports.modelopt import from_modelopt as from_modelopt
from mpsearch.imports.modelopt import modelopt_table as modelopt_table
from mpsearch.imports.nncf import from_nncf as from_nncf
from mpsearch.models.unwrapping import unwrapped

_T = TypeVar("_T")
#: Tool -> `read(path, model=None)` of the plan that it chose.
IMPORTERS: dict[str, Callable[[str | os.PathLike[str], nn.Module | None], Plan]] = {
    "compressed-tensors": from_compressed_tensors,
    "gguf": from_gguf,
    "gptqmodel": from_gptqmodel,
    "modelopt": from_modelopt,
    "nncf": from_nncf,
}
#: Tool -> `read(path, model=None)` of what it measured.
TABLE_IMPORTERS: dict[str, Callable[[str | os.PathLike[str], nn.Module | None], CostTable]] = {
    "exllamav2": exllamav2_table,
    "modelopt": modelopt_table,
}


def import_plan(path: str | os.PathLike[str], tool: str, model: nn.Module | None = None) -> Plan:
    """The plan that a file of another tool holds.

    Args:
        path: of the file.
        tool: a name in `IMPORTERS`.
        model: names the layers, where the file has only patterns.

    Raises:
        PlanError: for an unknown tool, or where the file holds what no plan can.
        OSError: where the file cannot be read.
        MissingPackage: without the tool's package, where one is needed.
    """
    if tool not in IMPORTERS:
        raise PlanError(f"cannot import a plan from {tool!r}{nearest(tool, IMPORTERS)}")
    plan = _read(IMPORTERS[tool], path, tool, unwrapped(model), PlanError)
    if model is not None:
        plan = by_names_of(plan, [name for name, _ in model.named_modules()])
    if not plan:
        raise PlanError(f"{path}: no layer is decided on")
    return plan


def import_table(path: str | os.PathLike[str], tool: str, model: nn.Module | None = None) -> CostTable:
    """The cost table that another tool's measurements make.

    Args:
        path: of the file.
        tool: a name in `TABLE_IMPORTERS`.
        model: names the layers and tells their shapes, where the file does not.

    Raises:
        TableError: for an unknown tool, or where the file holds what no table can.
        PlanError: for another file, or a number format that no precision writes.
        OSError: where the file cannot be read.
        MissingPackage: without the tool's package, where one is needed.
    """
    if tool not in TABLE_IMPORTERS:
        raise TableError(f"cannot import a table from {tool!r}{nearest(tool, TABLE_IMPORTERS)}")
    return _read(TABLE_IMPORTERS[tool], path, tool, unwrapped(model), TableError)


def _read(
    read: Callable[[str | os.PathLike[str], nn.Module | None], _T],
    path: str | os.PathLike[str],
    tool: str,
    model: nn.Module | None,
    refusal: type[MpsearchError],
) -> _T:
    """A reader expects what its tool writes: whatever it stumbles over otherwise is told as the file's damage."""
    try:
        return read(path, model)
    except (PlanError, TableError) as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from None
    except (MpsearchError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise refusal(f"{path}: not as {tool} writes it ({type(error).__name__}: {error})") from error
