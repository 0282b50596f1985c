"""Where a warning points: at the line of the user's that called mpsearch, however many rooms lie between."""

import sys


def stacklevel() -> int:
    """The `stacklevel` of `warnings.warn` for the nearest line outside mpsearch, counted from the function that asks.

    >>> exec("from mpsearch.calibration.callers_line import stacklevel; level = stacklevel()", names := {"__name__": "script"})
    >>> names["level"]
    1
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mpsearch":
        frame, level = frame.f_back, level + 1
    return level
