"""Where a warning points: at the line of the user's that called mpsearch, however many rooms lie between."""

import sys

_INSIDE = ("mpsearch", "functools", "contextlib")


def stacklevel() -> int:
    """The `stacklevel` of `warnings.warn` for the nearest line outside mpsearch, counted from the function that asks.

    Properties that are made once and context managers pass through modules of Python's, which do not count as outside.

    >>> exec("from mpsearch.core.callers_line import stacklevel; level = stacklevel()", names := {"__name__": "script"})
    >>> names["level"]
    1
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
