"""Every error that mpsearch raises on purpose: one message, with the numbers, and nothing else inside."""

import difflib
from collections.abc import Iterable


class MpsearchError(Exception):
    """Root of all errors raised on purpose; anything else is a bug."""


class TableError(MpsearchError, ValueError):
    """A cost table, or a cell of it, is not what it should be."""


class BudgetError(MpsearchError, ValueError):
    """A budget names an unknown resource or a value that is no amount of it."""


class PlanError(MpsearchError, ValueError):
    """A plan, a precision or a plan file is not what it should be."""


class ExportError(MpsearchError, ValueError):
    """The target cannot express a part of the plan."""


class InfeasibleError(MpsearchError, ValueError):
    """No plan meets the budget, and that is proven."""


class EstimatorError(MpsearchError, RuntimeError):
    """An estimator could not score the model."""


class SolverError(MpsearchError, RuntimeError):
    """A solver gave up, or returned something that does not hold."""


class MissingPackage(MpsearchError, ImportError):
    """An optional package is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Suffix for messages about an unknown name: the nearest known one, or the list of all.

    >>> nearest("memory_byte", ["memory_bytes", "bitops"])
    "; did you mean 'memory_bytes'?"
    >>> nearest("zzz", ["memory_bytes", "bitops"])
    '; known: bitops, memory_bytes'
    """
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1)
    if match:
        return f"; did you mean {match[0]!r}?"
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""
