"""HiGHS that never prints."""

import highspy


class _Silent(highspy.Highs):
    def enableCallbacks(self) -> None:
        """The first call of the constructor, which from 1.16 on prints a header unless output is off by then."""
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


def silent_highs(**options: float | int | bool) -> highspy.Highs:
    """An empty HiGHS object on one thread that writes nothing to the process's output.

    Args:
        options: of HiGHS, by its own names.

    >>> highs = silent_highs(time_limit=1.0)
    >>> highs.getOptionValue("output_flag")[1], highs.getOptionValue("threads")[1]
    (False, 1)
    """
    solver = _Silent()  # type: ignore[no-untyped-call]
    for name, value in {"output_flag": False, "threads": 1, **options}.items():
        solver.setOptionValue(name, value)
    return solver
