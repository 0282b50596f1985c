"""A parameter that a model multiplies itself, outside of any layer, as a module that is called for each such product."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """How a parameter looks to a quantizer: rows that are scaled together, each over what one output sums over.

    Attributes:
        shape: of the parameter, where need be with dimensions split: (experts x ffn, hidden) is (experts, ffn, hidden).
        order: of these dimensions, those of the rows first.
        rows: number of dimensions of the rows.
        matrices: that lie in it, such as those of experts.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    rows: int
    matrices: int = 1

    def fits(self, weight: Tensor) -> bool:
        """True for a parameter with rows and something to sum over, and as many numbers."""
        return 0 < self.rows < len(self.order) and math.prod(self.shape) == weight.numel()

    def canonical(self, weight: Tensor) -> Tensor:
        """(rows, summed over ...).

        >>> Layout((2, 3, 4), (0, 2, 1), 2).canonical(torch.zeros(2, 3, 4)).shape      # two experts of 3 inputs, 4 outputs
        torch.Size([8, 3])
        """
        ordered = weight.reshape(self.shape).permute(self.order)
        return ordered if self.rows == 1 else ordered.flatten(0, self.rows - 1)

    def restored(self, canonical: Tensor, stored: Tensor) -> Tensor:
        """Undo `canonical`: laid out in memory as the parameter is."""
        sizes = [self.shape[axis] for axis in self.order]
        inverse = sorted(range(len(self.order)), key=lambda axis: self.order[axis])
        return torch.empty_like(stored, device=canonical.device).copy_(
            canonical.reshape(sizes).permute(inverse).reshape(stored.shape)
        )


@dataclass(frozen=True)
class View:
    """A view of a parameter: the whole, a transpose, the slice of an expert."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, parameter: Tensor) -> "View":
        """Where a view lies in its parameter."""
        return cls(tuple(view.shape), view.stride(), int(view.storage_offset() - parameter.storage_offset()))

    def __call__(self, parameter: Tensor) -> Tensor:
        """The same view of a parameter laid out alike, in the graph."""
        if (self.size, self.stride) == (tuple(parameter.shape), parameter.stride()):
            return parameter
        return parameter.as_strided(self.size, self.stride, int(parameter.storage_offset()) + self.offset)


@dataclass(frozen=True)
class Product:
    """x (..., in) times a view that holds one matrix (out, in), or a stack of them (..., out, in).

    Attributes:
        view: with the dimensions of the stack first, then those of the outputs, then those that are summed over.
        stack: number of dimensions of the stack.
        outputs: number of dimensions of the outputs.
    """

    view: View
    stack: int = 0
    outputs: int = 1

    def __call__(self, parameter: Tensor, x: Tensor) -> Tensor:
        """(..., out)."""
        matrix = self.view(parameter)
        if self.stack + self.outputs + 1 != matrix.ndim or self.outputs != 1:
            stack, outputs = matrix.shape[: self.stack], matrix.shape[self.stack : self.stack + self.outputs]
            matrix = matrix.reshape(*stack, math.prod(outputs), -1)
        return F.linear(x, matrix) if matrix.ndim == 2 else x @ matrix.mT


@dataclass(frozen=True)
class Lookup:
    """Rows of a view by their numbers.

    Attributes:
        view: (rows, columns).
        padding: number of a row without a gradient.
    """

    view: View
    padding: int | None = None

    def __call__(self, parameter: Tensor, x: Tensor) -> Tensor:
        """(*x.shape, columns)."""
        return F.embedding(x, self.view(parameter), self.padding)


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution with a view as its kernels, without its bias."""

    view: View
    function: Callable[..., Tensor]
    settings: dict[str, Any]

    def __call__(self, parameter: Tensor, x: Tensor) -> Tensor:
        """As the function."""
        return self.function(x, self.view(parameter), **self.settings)


#: What is done with a parameter, and which part of it.
Read = Product | Lookup | Convolution


class Operand(nn.Module):
    """A parameter that is read by functions: each read is a call of a module, whose hooks see it and whose input can be quantized.

    Attributes:
        weight: the parameter itself.
        kind: of layer: `linear`, `bilinear`, `embedding`, `conv1d`, ...
        layout: how it looks to a quantizer.
        groups: of a convolution.

    >>> read = Product(View((3, 2), (1, 3), 0))            # x @ parameter
    >>> Operand(nn.Parameter(torch.ones(2, 3)), "linear", Layout((2, 3), (1, 0), 1))(torch.ones(1, 2), read)
    tensor([[2., 2., 2.]], grad_fn=<MmBackward0>)
    """

    def __init__(self, weight: nn.Parameter, kind: str, layout: Layout, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.kind, self.layout, self.groups = weight, kind, layout, groups
        self.eval()

    @property
    def has_hooks(self) -> bool:
        """True where somebody observes its calls."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def forward(self, x: Tensor, read: Read) -> Tensor:
        """One read of the parameter."""
        return read(self.weight, x)

    def whole(self, read: Read) -> bool:
        """True for a read of all of the parameter as one matrix, in which each row of x has its own output."""
        return not (isinstance(read, Product) and read.stack) and math.prod(read.view.size) == self.weight.numel()

    @property
    def plain(self) -> nn.Module | None:
        """The layer of torch that does as much to an input of this shape; None for stacks, and what torch has no layer for."""
        canonical = self.layout.canonical(self.weight.detach())
        if self.kind not in ("linear", "embedding") or canonical.ndim > 2 or self.layout.rows > 1:
            return None
        rows, columns = canonical.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta") if self.kind == "linear" else None
        return _shared(linear or nn.Embedding(rows, columns, device="meta"), nn.Parameter(canonical))

    def alone(self, read: Read) -> nn.Module:
        """A module that takes x alone and does one read: a layer of torch where it is one."""
        if self.weight.ndim != 2 or not self.whole(read):
            return Slice(self.weight, read)
        rows, columns = self.weight.shape
        if isinstance(read, Product):
            if read.view.stride == self.weight.stride():
                return _shared(nn.Linear(columns, rows, bias=False, device="meta"), self.weight)
            return _shared(Transposed(), self.weight)
        if isinstance(read, Lookup):
            return _shared(nn.Embedding(rows, columns, read.padding, device="meta"), self.weight)
        return Slice(self.weight, read)


class Transposed(nn.Module):
    """A linear layer that stores (in, out)."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """X @ weight."""
        return x @ self.weight


class Slice(nn.Module):
    """One read of a part of a parameter, or of a stack of matrices."""

    def __init__(self, weight: nn.Parameter, read: Read) -> None:
        super().__init__()
        self.weight, self.read = weight, read

    def forward(self, x: Tensor) -> Tensor:
        """The read."""
        return self.read(self.weight, x)


def _shared(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    module.weight = weight
    return module
