"""What an importer is, and how a file is read with one."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.core.table import CostTable
from mpsearch.errors import MpsearchError, PlanError, TableError
from mpsearch.models.unwrapping import unwrapped

Result = TypeVar("Result", Plan, CostTable)


@dataclass(frozen=True)
class Importer(Generic[Result]):
    """What reads the files of another tool. Called like its function: `IMPORTERS["gguf"](path, model)`.

    Attributes:
        name: as in `IMPORTERS` or `TABLE_IMPORTERS`.
        read: `read(path, model=None)`; it may stumble over a damaged file as it likes, `imported` tells that in one line.
        package: the distribution that reads the file; empty where none is needed.
        needs_model: the file alone does not name the layers.
        exporter: the name in `mpsearch.export.EXPORTERS` that writes such files; empty where none does.
    """

    name: str
    read: Callable[..., Result]
    package: str = ""
    needs_model: bool = False
    exporter: str = ""

    def __call__(self, path: str | os.PathLike[str], model: nn.Module | None = None) -> Result:
        """Read a file; see `read`."""
        return self.read(path, model)


def imported(
    importer: Importer[Result],
    path: str | os.PathLike[str],
    model: nn.Module | None,
    refusal: type[MpsearchError],
) -> Result:
    """Read a file; an importer expects what its tool writes, and whatever it stumbles over otherwise is told as the file's damage.

    Args:
        importer: of the tool.
        path: of the file.
        model: names the layers.
        refusal: the class of errors for damage.

    Raises:
        PlanError, TableError: in one line that names the file.
        OSError: where it cannot be read.
        MissingPackage: without the tool's package, where one is needed.
    """
    try:
        return importer(path, unwrapped(model))
    except (PlanError, TableError) as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from None
    except (MpsearchError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise refusal(f"{path}: not as {importer.name} writes it ({type(error).__name__}: {error})") from error
