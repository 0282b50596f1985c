"""Linear maps, and how they share out relevance among their inputs."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mpsearch.errors import EstimatorError
from mpsearch.estimation.relevance.carrying import with_value
from mpsearch.metrics.statistics import wide

#: How a linear map shares out relevance; the formulas stand with `mpsearch.estimation.relevance.propagation.Propagation`.
Rule = Literal["epsilon", "gamma", "z+", "alpha-beta"]
#: Keeps some elements of a tensor.
_Sign = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Flow:
    """One use of a weight.

    Attributes:
        weight: the parameter.
        node: where its output hangs in the autograd graph.
    """

    weight: nn.Parameter
    node: Any


def _positive(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def _negative(t: Tensor) -> Tensor:
    return t.clamp(max=0)


@dataclass(frozen=True)
class Affine:
    """A linear map z = W x + b at its input; the weight is (out, in / groups, ...), or `transposed` (in, out / groups, ...)."""

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rule: Rule
    transposed: bool

    def output(self) -> Tensor:
        """Z = W x + b, with the gradient of the map itself."""
        return self.apply(self.x, self.weight, self.bias)

    def part(self, first: _Sign, second: _Sign) -> Tensor:
        """first(W) x+ + second(W) x- + first(b)."""
        upper = self.apply(_positive(self.x), first(self.weight), None if self.bias is None else first(self.bias))
        below = _negative(self.x)
        return upper + self.apply(below, second(self.weight), None) if below.any() else upper

    def then(self, scale: Tensor, shift: Tensor) -> "Affine":
        """The map to scale z + shift, with one number a channel."""
        weight, rest = self.weight, [1] * (self.weight.ndim - 2)
        if self.transposed:
            groups = len(scale) // weight.shape[1]
            grouped = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, *rest)
            weight = grouped.reshape(weight.shape)
        else:
            weight = weight * scale.reshape(-1, 1, *rest)
        return replace(self, weight=weight, bias=shift if self.bias is None else self.bias * scale + shift)


@dataclass(eq=False)
class LinearMaps:
    """The linear maps of a forward pass, computed by their rules and written down.

    Attributes:
        convolution: rule of convolutions.
        linear: rule of other linear maps.
        epsilon: added to denominators, with their sign.
        gamma: weight of what agrees with the output, for `gamma`.
        alpha: weight of the positive parts, for `alpha-beta`.
        observe: called in the backward pass with a weight and the relevance of its output.
        flows: every use of a parameter as the weight of a linear map or an embedding, in order.
        leaves: outputs of weights whose input holds no relevance.
    """

    convolution: Rule
    linear: Rule
    epsilon: float
    gamma: float
    alpha: float
    observe: Callable[[nn.Parameter, Tensor], None] | None
    flows: list[Flow] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    _maps: MutableMapping[Tensor, tuple[Affine, Tensor, int]] = field(default_factory=WeakTensorKeyDictionary)

    def called(self, function: Any, name: str, args: Sequence[Any], keywords: dict[str, Any]) -> Tensor:
        """A torch function of (input, weight, bias, ...)."""
        names = ("input", "weight", "bias")
        tensors = {k: keywords[k] for k in names if k in keywords}
        tensors |= dict(zip(names[: len(args)], args[: len(names)], strict=True))
        rest = {k: value for k, value in keywords.items() if k not in names}

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out: Tensor = function(x, weight, bias, *args[3:], **rest)
            return out

        rule = self.linear if name == "linear" else self.convolution
        x, weight, bias = tensors["input"], tensors["weight"], tensors.get("bias")
        return self._ruled(Affine(apply, x, weight, bias, rule, "transpose" in name), weight)

    def matrix_product(self, args: Sequence[Any]) -> Tensor:
        """`x @ weight` and `bias + x @ weight`, as GPT-2's `Conv1D` writes it."""
        bias, x, weight = args if len(args) == 3 else (None, *args)

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = x @ weight
            return out if bias is None else out + bias

        return self._ruled(Affine(apply, x, weight, bias, self.linear, True), weight)

    def batch_norm(self, value: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Batch normalization in evaluation mode, scale x + shift: folded into the linear map that made x, if one did.

        Args:
            value: what it returns.
            x: (B, C, ...).
            scale: (C,).
            shift: (C,).
        """
        before, parameter, version = self._maps.get(x, (None, x, 0))
        tokens = before is not None and before.weight.ndim == 2 < x.ndim  # the channels are not those of the weight
        if before is None or version != x._version or tokens:
            return with_value(value.detach(), x * scale.view((1, -1) + (1,) * (x.ndim - 2)))
        return self._ruled(before.then(scale, shift), parameter, value)

    def record(self, weight: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """Write down the output of a weight: `value` is its own copy, `out` carries the gradient."""
        if not isinstance(weight, nn.Parameter):
            return out
        if not out.requires_grad:
            leaf = value.detach().requires_grad_()
            self.leaves.append(leaf)
            out = leaf.clone()
        observe = self.observe
        if observe is not None:
            out.register_hook(lambda gradient: observe(weight, wide(value) * wide(gradient)))
        self.flows.append(Flow(weight, out.grad_fn))
        return out

    def _ruled(self, affine: Affine, parameter: Tensor, known: Tensor | None = None) -> Tensor:
        """The output of a linear map (`known` but for rounding), with the gradient of its rule.

        sum_k c_k u_k (z / u_k), quotients held constant.
        """
        if affine.weight.requires_grad:
            raise EstimatorError("relevance has no rule for a linear map whose weight depends on the input")
        plain = affine.output()
        z = plain.detach()
        value = z if known is None else known.detach()
        out = value
        if plain.requires_grad:
            out = with_value(value, self._carried(affine, plain, z))
        out = self.record(parameter, value, out)
        if out.requires_grad:
            self._maps[out] = (affine, parameter, out._version)
        return out

    def _carried(self, affine: Affine, plain: Tensor, z: Tensor) -> Tensor:
        if affine.rule == "epsilon":
            return self._quotient(z, plain)
        if affine.rule == "z+":
            return self._quotient(z, affine.part(_positive, _negative))
        if affine.rule == "alpha-beta":
            carried = self.alpha * self._quotient(z, affine.part(_positive, _negative))
            return carried - (self.alpha - 1) * self._quotient(z, affine.part(_negative, _positive))
        more, less = self._favouring(_positive), self._favouring(_negative)
        carried = self._quotient(_positive(z), affine.part(more, less))
        return carried + self._quotient(_negative(z), affine.part(less, more))

    def _favouring(self, sign: _Sign) -> _Sign:
        return lambda t: t + self.gamma * sign(t)

    def _quotient(self, value: Tensor, u: Tensor) -> Tensor:
        """`u (value / u)`, the quotient held constant and stabilized; finite, also in half precision."""
        down = u.detach()
        stable = torch.where(down < 0, down - self.epsilon, down + self.epsilon)
        quotient = value / torch.where(down == 0, torch.inf, stable)
        most = torch.finfo(value.dtype).max
        return u * quotient.clamp(-most, most)
