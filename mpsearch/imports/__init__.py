"""Plans that other tools made, so that they can be measured, compared and improved."""

import os
from collections.abc import Callable

from torch import nn

from mpsearch.errors import PlanError, nearest
from mpsearch.imports.compressed_tensors import from_compressed_tensors as from_compressed_tensors
from mpsearch.imports.gguf import from_gguf as from_gguf
from mpsearch.imports.gptqmodel import from_gptqmodel as from_gptqmodel
from mpsearch.plan import Plan

#: Tool -> `read(path, model=None)`.
IMPORTERS: dict[str, Callable[[str | os.PathLike[str], nn.Module | None], Plan]] = {
    "compressed-tensors": from_compressed_tensors,
    "gguf": from_gguf,
    "gptqmodel": from_gptqmodel,
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
        raise PlanError(f"cannot import from {tool!r}{nearest(tool, IMPORTERS)}")
    return IMPORTERS[tool](path, model)
