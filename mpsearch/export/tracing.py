"""Failures of a trace, told in one line."""

import contextlib
from collections.abc import Iterator

from mpsearch.errors import ExportError


@contextlib.contextmanager
def traced(target: str) -> Iterator[None]:
    """Whatever stops a trace of the user's model, as an `ExportError` that tells the first cause.

    >>> with traced("toy"):
    ...     raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    Traceback (most recent call last):
    ...
    mpsearch.errors.ExportError: toy cannot trace the model on the example: RuntimeError: mat1 and mat2 shapes cannot be multiplied
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while (before := cause.__cause__ or cause.__context__) is not None:
            cause = before
        lines = [line for line in str(cause).splitlines() if line.strip()]
        reason = f"{type(cause).__name__}: {lines[0].strip()}" if lines else type(cause).__name__
        raise ExportError(f"{target} cannot trace the model on the example: {reason}") from error
