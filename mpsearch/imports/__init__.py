"""Plans and tables that other tools made, so that they can be measured, compared and improved."""

import os

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.core.table import CostTable
from mpsearch.core.wrapped_names import by_names_of
from mpsearch.errors import PlanError, TableError, nearest
from mpsearch.imports.compressed_tensors import from_compressed_tensors as from_compressed_tensors
from mpsearch.imports.exllamav2 import exllamav2_table as exllamav2_table
from mpsearch.imports.gguf import from_gguf as from_gguf
from mpsearch.imports.gptqmodel import from_gptqmodel as from_gptqmodel
from mpsearch.imports.importer import Importer as Importer
from mpsearch.imports.importer import imported
from mpsearch.imports.modelopt import from_modelopt as from_modelopt
from mpsearch.imports.modelopt import modelopt_table as modelopt_table
from mpsearch.imports.nncf import from_nncf as from_nncf

#: Tool -> what reads the plan that it chose.
IMPORTERS: dict[str, Importer[Plan]] = {
    "compressed-tensors": Importer("compressed-tensors", from_compressed_tensors, exporter="compressed-tensors"),
    "gguf": Importer("gguf", from_gguf, package="gguf", needs_model=True, exporter="gguf"),
    "gptqmodel": Importer("gptqmodel", from_gptqmodel, exporter="gptqmodel"),
    "modelopt": Importer("modelopt", from_modelopt, exporter="modelopt"),
    "nncf": Importer("nncf", from_nncf),
}
#: Tool -> what reads what it measured.
TABLE_IMPORTERS: dict[str, Importer[CostTable]] = {
    "exllamav2": Importer("exllamav2", exllamav2_table, needs_model=True),
    "modelopt": Importer("modelopt", modelopt_table, package="nvidia-modelopt"),
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
    plan = imported(IMPORTERS[tool], path, model, PlanError)
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
    return imported(TABLE_IMPORTERS[tool], path, model, TableError)
