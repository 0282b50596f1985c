"""Every error that mpsearch raises on purpose: one message, with the numbers, and nothing else inside; and what it warns with."""

import difflib
import sys
import warnings
from collections.abc import Iterable

#: Top names of modules that a warning does not point at.
_INSIDE = ("mpsearch", "functools", "contextlib")
#: Characters of a message, at most: what a damaged file holds may have megabytes.
_LONGEST = 1500


def one_line(text: object) -> str:
    """Text for a message: on one line, without characters that steer a terminal, and not endless.

    >>> print(one_line("no layer 'a\\x1b[2J\\n b'"))
    no layer 'a\\x1b[2J b'
    """
    line = " ".join(str(text).split())
    if len(line) > _LONGEST:
        line = f"{line[: 2 * _LONGEST // 3]} ... {line[-_LONGEST // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class MpsearchError(Exception):
    """Root of all errors raised on purpose; anything else is a bug."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class MpsearchWarning(UserWarning):
    """What mpsearch tells and goes on: what it assumed, left alone or approximated.

    `warnings.filterwarnings("error", category=mps.MpsearchWarning)` makes errors of them.
    """


def warn(text: str) -> None:
    """Tell something and go on: the warning points at the user's line that called mpsearch, however many rooms lie between.

    Properties that are made once and context managers pass through modules of Python's, which do not count as the user's.

    >>> with warnings.catch_warnings(record=True) as told:
    ...     exec("from mpsearch.errors import warn; warn('assumed')", {"__name__": "script"})
    >>> told[0].category.__name__, told[0].lineno
    ('MpsearchWarning', 1)
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, MpsearchWarning, stacklevel=level)


class FileError(MpsearchError, ValueError):
    """A file does not hold what it should; the door that reads it says which file, and what it was read as."""


class TableError(MpsearchError, ValueError):
    """A cost table, or a cell of it, is not what it should be."""


class BudgetError(MpsearchError, ValueError):
    """A budget names an unknown resource or a value that is no amount of it."""


class PlanError(MpsearchError, ValueError):
    """A plan, a precision or a plan file is not what it should be."""


class ExportError(MpsearchError, ValueError):
    """The target cannot express a part of the plan."""


class VerificationError(ExportError):
    """What the target made of a plan is not what the plan says."""


class InfeasibleError(MpsearchError, ValueError):
    """No plan meets the budget, and that is proven."""


class EstimatorError(MpsearchError, RuntimeError):
    """An estimator could not score the model."""


class MemoryShortage(EstimatorError):
    """Work needs more memory than there is; told before it starts."""


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
