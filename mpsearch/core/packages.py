"""Optional packages, loaded when something needs them."""

import importlib
import importlib.metadata
from typing import Any

from mpsearch.errors import MissingPackage


def package(module: str, extra: str, purpose: str = "") -> Any:
    """A module of an optional package.

    Args:
        module: its import name.
        extra: the extra of mpsearch that brings it.
        purpose: what needs it, for the message.

    Raises:
        MissingPackage: where it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        problem = f"{purpose} needs {module} ({error})" if purpose else f"{module} cannot be imported ({error})"
        raise MissingPackage(f"{problem}; pip install 'mpsearch[{extra}]' brings it") from None


def version(distribution: str) -> str:
    """Version of an installed distribution.

    Raises:
        MissingPackage: where it is not installed.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise MissingPackage(f"{distribution} is not installed; 'pip install {distribution}' brings it") from None
