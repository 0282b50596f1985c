"""Expressions of weight, gradient and the like: what a training-free proxy is made of."""

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError, nearest

#: What the leaves of a tree may be; every one has the shape of a layer's weight. See `weight_inputs`.
INPUTS = ("weight", "gradient", "activation", "hessian", "virtual_gradient")

#: Kept away from 0 in divisions by a range or a standard deviation.
_EPSILON = 1e-9


def _replaced(x: Tensor, where: Tensor, value: float) -> Tensor:
    return torch.where(where, torch.full_like(x, value), x)


#: Operations of one operand, as in EMQ's code and its sibling repositories; the softmaxes run over the first axis.
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "exp": torch.exp,
    "frobenius": lambda x: x.square().sum().sqrt(),
    "invert": torch.reciprocal,
    "log": lambda x: _replaced(x, x <= 0, 1.0).log(),
    "log_abs": lambda x: _replaced(x, x == 0, 1.0).abs().log(),
    "log_softmax": lambda x: x.log_softmax(0),
    "mean": torch.mean,
    "mean_abs": lambda x: x.abs().mean(),
    "minmax": lambda x: (x - x.min()) / (x.max() - x.min() + _EPSILON),
    "normalize": lambda x: (x - x.mean()) / (x.std(correction=0) + _EPSILON),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "softmax": lambda x: x.softmax(0),
    "sqrt": lambda x: x.relu().sqrt(),
    "square": torch.square,
    "std": lambda x: x.std(correction=0),
}


def _fitting(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Elementwise, of equal shapes or with a number; nothing else is broadcast."""

    def apply(a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape and a.ndim and b.ndim:
            raise EstimatorError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit")
        return operation(a, b)

    return apply


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if not a.ndim or not b.ndim or len(a) != len(b):
        raise EstimatorError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit for @: their first axes differ")
    return a.reshape(len(a), -1).T @ b.reshape(len(b), -1)


#: Operations of two operands; a @ b is A^T B of the matrices (first axis, all others), a sum over output channels.
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": _fitting(torch.add),
    "-": _fitting(torch.sub),
    "*": _fitting(torch.mul),
    "@": _matmul,
}

_SIGNS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.MatMult: "@"}


@dataclass(frozen=True)
class Tree:
    """An operation with its operands, or an input.

    Attributes:
        name: of `UNARY`, `BINARY` or `INPUTS`.
        parts: one tree an operand.

    >>> tree = Tree("*", (Tree("mean", (Tree("hessian"),)), Tree("square", (Tree("weight"),))))
    >>> str(tree), len(tree), sorted(tree.inputs)
    ('mean(hessian) * square(weight)', 5, ['hessian', 'weight'])
    >>> tree.value({"hessian": torch.tensor([1.0, 3.0]), "weight": torch.tensor([-3.0, 1.0])})
    tensor([18.,  2.])
    """

    name: str
    parts: tuple["Tree", ...] = ()

    def __str__(self) -> str:
        if self.name not in BINARY:
            return self.name + (f"({self.parts[0]})" if self.parts else "")
        left, right = self.parts
        first = f"({left})" if _binds(left) < _binds(self) else str(left)
        second = f"({right})" if _binds(right) <= _binds(self) else str(right)
        return f"{first} {self.name} {second}"

    def __len__(self) -> int:
        return 1 + sum(map(len, self.parts))

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the inputs at its leaves, each once."""
        return frozenset(node.name for node in self.nodes() if not node.parts)

    def nodes(self) -> Iterator["Tree"]:
        """Itself and all trees below, depth first."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    def with_node(self, place: int, other: "Tree") -> "Tree":
        """The tree with another in the place of a node, numbered as `nodes` yields them."""
        if place == 0:
            return other
        parts, start = list(self.parts), 1
        for number, part in enumerate(parts):
            if start <= place < start + len(part):
                parts[number] = part.with_node(place - start, other)
            start += len(part)
        return Tree(self.name, tuple(parts))

    def sorted(self) -> "Tree":
        """The same expression with the operands of + and * in the order of their text, so that a + b and b + a are one."""
        parts = tuple(part.sorted() for part in self.parts)
        return Tree(self.name, tuple(sorted(parts, key=str)) if self.name in ("+", "*") else parts)

    def value(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the expression comes to: a tensor, or a number in a tensor without axes.

        Args:
            inputs: a tensor for each leaf, all of one shape.

        Raises:
            EstimatorError: where shapes do not fit.
        """
        if not self.parts:
            return inputs[self.name]
        values = [part.value(inputs) for part in self.parts]
        return UNARY[self.name](values[0]) if len(values) == 1 else BINARY[self.name](values[0], values[1])

    def score(self, inputs: Mapping[str, Tensor]) -> float:
        """The score of a layer: the mean of the value over its elements, as in EMQ; below 0 it counts as 0.

        A negative score would reward the coarser format. nan and infinities are returned as they are.

        Raises:
            EstimatorError: where shapes do not fit.
        """
        mean = float(self.value(inputs).mean())
        return max(mean, 0.0) if math.isfinite(mean) else mean


def parse(formula: str) -> Tree:
    """Read what `str` of a tree has written.

    Raises:
        EstimatorError: with the part that is no input or operation.

    >>> parse("mean(softmax(log_abs(virtual_gradient)) * sqrt(relu(weight)))").parts[0].name
    '*'
    >>> parse("mean(wieght)")
    Traceback (most recent call last):
    mpsearch.errors.EstimatorError: formula 'mean(wieght)': no input 'wieght'; did you mean 'weight'?
    """
    try:
        return _tree(ast.parse(formula.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise EstimatorError(f"formula {formula!r}: not an expression ({error})") from None
    except EstimatorError as error:
        raise EstimatorError(f"formula {formula!r}: {error}") from None


def _tree(node: ast.expr) -> Tree:
    if isinstance(node, ast.Name):
        if node.id not in INPUTS:
            raise EstimatorError(f"no input {node.id!r}{nearest(node.id, INPUTS)}")
        return Tree(node.id)
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        return Tree(_SIGNS[type(node.op)], (_tree(node.left), _tree(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in UNARY:
            raise EstimatorError(f"no operation {node.func.id!r}{nearest(node.func.id, UNARY)}")
        if len(node.args) != 1 or node.keywords:
            raise EstimatorError(f"{node.func.id} has {len(node.args) + len(node.keywords)} operands, expected 1")
        return Tree(node.func.id, (_tree(node.args[0]),))
    raise EstimatorError(
        f"{ast.unparse(node)!r} is no input, no operation f(x), and none of x + y, x - y, x * y, x @ y"
    )


def _binds(tree: Tree) -> int:
    """How strongly the outermost operation binds."""
    return {"+": 1, "-": 1, "*": 2, "@": 2}.get(tree.name, 3)
