"""Values that carry the gradient of something else: with it a backward pass becomes the propagation of relevance."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_of(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)


def constant(value: Any) -> Any:
    """The same value, through which no relevance passes."""
    return value.detach() if isinstance(value, Tensor) else value


def with_value(value: Tensor, carried: Tensor) -> Tensor:
    """`value`, with the gradient of `carried`."""
    return value + (carried - carried.detach())


def with_identity(value: Tensor, x: Tensor) -> Tensor:
    """`value` as x (value / x), the quotient held constant; nothing from an x of 0, which holds no relevance."""
    point = x.detach()
    quotient = value / torch.where(point == 0, 1.0, point)
    usable = point.isfinite() & (point != 0) & quotient.isfinite()
    return with_value(value, torch.where(usable, x, 0.0) * torch.where(usable, quotient, 0.0))


def scaled(x: Any, factor: float) -> Any:
    """The same value, with `factor` times the gradient; what holds no relevance as it is."""
    if factor == 1 or not isinstance(x, Tensor) or not x.requires_grad:
        return x
    same = x.view_as(x)
    same.register_hook(lambda gradient: factor * gradient)
    return same


def shared(factors: Sequence[Any]) -> list[Any]:
    """Factors of a product: those that hold relevance get equal parts of it."""
    held = sum(isinstance(factor, Tensor) and factor.requires_grad for factor in factors)
    return [scaled(factor, 1 / max(held, 1)) for factor in factors]
