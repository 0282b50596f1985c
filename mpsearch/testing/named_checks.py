"""Named checks: what every contract suite yields, and how all of them are run at once."""

import unittest
from collections.abc import Callable, Iterable, Iterator

#: Name and check; a check takes no argument and raises AssertionError with what was expected and what came.
Checks = Iterator[tuple[str, Callable[[], None]]]


def run_all(part: str, checks: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Run every check, also after one that fails.

    Args:
        part: what is checked, for the message.
        checks: of one part.

    Raises:
        AssertionError: names every check that failed, with its message.

    >>> def fails():
    ...     raise AssertionError("expected 1, got 2")
    >>> run_all("Part()", [("one", lambda: None), ("two", fails)])
    Traceback (most recent call last):
    AssertionError: Part(): 1 of 2 checks failed
    two: expected 1, got 2
    """
    count = 0
    failures: dict[str, AssertionError] = {}
    for name, check in checks:
        count += 1
        try:
            check()
        except unittest.SkipTest:  # a package that it needs is not installed
            count -= 1
        except AssertionError as error:
            failures[name] = error
    if failures:
        lines = [f"{name}: {error}" for name, error in failures.items()]
        raise AssertionError("\n".join([f"{part}: {len(failures)} of {count} checks failed", *lines])) from next(
            iter(failures.values())
        )
