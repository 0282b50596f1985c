"""The module inside what wraps a model."""

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module | None)


def unwrapped(model: Model) -> Model:
    """The module inside torch.compile, DataParallel and DistributedDataParallel, whose names other tools know; others as they are.

    >>> from torch import nn
    >>> type(unwrapped(nn.DataParallel(nn.Linear(1, 1)))).__name__
    'Linear'
    """
    inner = model
    while inner is not None:
        parallel = isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel)
        child = inner._modules.get("module" if parallel else "_orig_mod")
        if child is None:
            break
        inner = child  # type: ignore[assignment]
    return inner
