"""What goes into layers and what comes out of them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

#: `see(input, output)` of one call.
Observer = Callable[[Tensor, Tensor], None]


@contextlib.contextmanager
def observed(observers: Mapping[nn.Module, Observer]) -> Iterator[None]:
    """Show the input of modules (the first floating-point tensor, else the first tensor) and the output to functions, at every call."""
    handles = []

    def hook(see: Observer) -> Callable[..., None]:
        def show(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            see(input_of(args, keywords), output)

        return show

    try:
        for module, see in observers.items():
            handles.append(module.register_forward_hook(hook(see), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The input of a call: the first floating-point tensor, else the first tensor."""
    tensors = [x for x in (*args, *keywords.values()) if isinstance(x, Tensor)]
    return next((x for x in tensors if x.is_floating_point()), tensors[0])


def by_sample(x: Tensor, samples: int) -> Tensor:
    """(samples, rest) view of a feature map; windows and flattened tokens of a sample lie next to each other.

    A tensor whose length is no multiple of the number of samples is taken row by row.

    >>> import torch
    >>> by_sample(torch.zeros(6, 5), 2).shape, by_sample(torch.zeros(3, 5), 2).shape
    (torch.Size([2, 15]), torch.Size([3, 5]))
    """
    return x.reshape(samples if len(x) % samples == 0 else len(x), -1)
