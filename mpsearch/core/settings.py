"""Settings of estimators, solvers and resources, held against their types before any work."""

import dataclasses
import math
import numbers
import types
import typing
from typing import Any

from mpsearch.errors import MpsearchError, nearest


def check_settings(part: Any, refusal: type[MpsearchError]) -> None:
    """Refuse a setting of one of mpsearch's own parts that is no value of its type.

    A whole number is 1 or more, or 0 or more where 0 is its default (a seed); a number is 0 or more unless its default is less, and never
    nan. What else a part asks of its settings it checks itself. Parts of others know themselves.

    Args:
        part: a dataclass.
        refusal: what is raised.

    Raises:
        MpsearchError: `refusal`, with the setting, what it is and what is expected.

    >>> from mpsearch.errors import SolverError
    >>> from mpsearch.solvers import Annealing
    >>> check_settings(Annealing(chains=0), SolverError)
    Traceback (most recent call last):
    mpsearch.errors.SolverError: Annealing: chains=0, expected a whole number of 1 or more
    """
    if not (dataclasses.is_dataclass(part) and type(part).__module__.startswith("mpsearch.")):
        return
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        value, hint = getattr(part, field.name), hints[field.name]
        expected = _expected(hint, value, field.default)
        if expected:
            raise refusal(f"{type(part).__name__}: {field.name}={value!r}, expected {expected}")


def check_kind(value: Any, kind: Any, what: str, refusal: type[MpsearchError]) -> None:
    """Refuse an argument of another type.

    Args:
        value: the argument.
        kind: one type or several, or `callable`.
        what: it is, and how it is written, for the message.
        refusal: what is raised.

    Raises:
        MpsearchError: `refusal`.

    >>> from mpsearch.errors import BudgetError
    >>> check_kind(4, dict, "a budget, mps.Budget(average_bits=4)", BudgetError)
    Traceback (most recent call last):
    mpsearch.errors.BudgetError: expected a budget, mps.Budget(average_bits=4), got the int 4
    """
    if not (kind(value) if kind is callable else isinstance(value, kind)):
        raise refusal(f"expected {what}, got the {type(value).__name__} {value!r}")


def checked_number(value: Any, name: str, kind: type, default: int | float, refusal: type[MpsearchError]) -> Any:
    """An argument, held against what `check_settings` asks of a setting with this type and default.

    >>> from mpsearch.errors import EstimatorError
    >>> checked_number(-1, "seed", int, 0, EstimatorError)
    Traceback (most recent call last):
    mpsearch.errors.EstimatorError: seed=-1, expected a whole number of 0 or more
    """
    expected = _of_kind(kind, value, default)
    if expected:
        raise refusal(f"{name}={value!r}, expected {expected}")
    return kind(value)


def _expected(hint: Any, value: Any, default: Any) -> str:
    """What is expected in place of a value; empty where it fits."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    wanted = [_of_kind(kind, value, default) for kind in kinds]
    return "" if "" in wanted else " or ".join(wanted)


def _of_kind(kind: Any, value: Any, default: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        known = typing.get_args(kind)
        return "" if value in known else f"one of {', '.join(map(str, known))}{nearest(str(value), map(str, known))}"
    if kind is type(None):
        return "" if value is None else "None"
    if kind is bool:
        return "" if isinstance(value, bool) else "True or False"
    if kind is str:
        return "" if isinstance(value, str) else "text"
    if kind is int:
        least = min(default, 1) if isinstance(default, int) else 1
        fits = isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) < 2**63
        return "" if fits else f"a whole number of {least} or more"
    if kind is float:
        lowest = min(default, 0.0) if isinstance(default, int | float) else 0.0
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return "" if real and not math.isnan(value) and value >= lowest else f"a number of {lowest:g} or more"
    return ""
