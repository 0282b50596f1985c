"""Resources as the command line names them: `memory_bytes,latency_s=roofline:device=a100,coins=costs.py:coins`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from mpsearch.models.loading import UsageError, load, part


def resource_functions(text: str, quantizer: Any = None) -> dict[str, Callable[..., Any]]:
    """Column -> resource function.

    Each item is the name of a column, or `column=kind`, with settings behind colons: `kv_cache_bytes:context=8192:batch=4`. A kind with
    a dot is a function of one's own, `file.py:function`.

    Args:
        text: the items, between commas.
        quantizer: of the run, for resources that count with one and are given none; None = their own default.

    Raises:
        UsageError: for an unknown column, kind or setting, a value of the wrong kind, or a column that occurs twice.

    >>> resource_functions("bitops,latency_s=roofline:device=t4")["latency_s"].device
    't4'
    """
    from mpsearch.resources import RESOURCES
    from mpsearch.resources.columns import usual_resources

    usual = usual_resources(RESOURCES)
    functions: dict[str, Callable[..., Any]] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        name, *settings = item.split(":")
        column, _, kind = name.partition("=")
        if column in functions:
            raise UsageError(f"resource {column!r} occurs twice in {text!r}")
        if "." in kind:
            functions[column] = load(item.partition("=")[2], "resource")
        else:
            resource = part(kind or column, RESOURCES if kind else usual, "resource", settings)
            chosen = any(setting.partition("=")[0].strip() == "quantizer" for setting in settings)
            if quantizer is not None and not chosen and resource.capabilities.quantizer:
                resource = dataclasses.replace(resource, quantizer=quantizer)
            functions[column] = resource
    return functions
