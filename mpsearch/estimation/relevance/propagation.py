"""Layer-wise relevance propagation by one ordinary backward pass, for models whose glue is functional.

The relevance of a tensor x is x * dL/dx, where L is the sum of the explained logits, once every operation has a backward
pass that is its relevance rule: a linear map keeps its own (LRP-0), others are replaced while the model runs. So no
module is exchanged and no graph is traced: `Propagation` sees every torch function of a forward pass, `x + f(x)`,
`F.gelu(x)` and `q @ k.mT` as well as modules, computes the same values, and hangs another gradient on them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from mpsearch.errors import EstimatorError
from mpsearch.metrics.statistics import wide

#: How a linear map shares out relevance.
Rule = Literal["epsilon", "gamma", "z+", "alpha-beta"]
#: How attention does.
Attention = Literal["attn-lrp", "cp-lrp"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Linear in what holds relevance, or a choice among its elements: the gradient is the rule.
_LINEAR = _names(
    """
    view reshape reshape_as view_as flatten ravel unflatten permute transpose swapaxes swapdims movedim moveaxis t
    adjoint squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile contiguous clone to type
    type_as float double half bfloat16 cpu cuda get getitem setitem narrow select index_select gather take_along_dim
    chunk split tensor_split unbind unfold fold roll flip tril triu diagonal cat concat concatenate stack hstack vstack
    pad constant_pad_nd where masked_fill masked_select scatter scatter_add index_add index_copy index_put copy zero
    fill view_as_real view_as_complex add sub subtract rsub neg negative positive sum mean cumsum dropout dropout1d
    dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout interpolate upsample pixel_shuffle
    pixel_unshuffle channel_shuffle avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max min amax amin maximum
    minimum topk sort requires_grad
    """
)
#: One number in, one number out, or scaled by a norm: the identity rule, all relevance goes to the input.
_ELEMENTWISE = _names(
    """
    relu relu6 leaky_relu prelu elu selu celu gelu silu mish hardswish hardtanh hardsigmoid sigmoid logsigmoid tanh
    softplus softsign erf exp pow square abs clamp clamp_min clamp_max rdiv reciprocal rms_norm normalize
    """
)
#: An element of the result is made from the same element of all that holds relevance.
_POINTWISE = (_ELEMENTWISE - _names("rms_norm normalize")) | _names(
    "add radd sub subtract rsub neg negative mul rmul multiply div divide true_divide"
)
#: Denominators of normalizations are constants (AttnLRP, proposition 3.4).
_DENOMINATORS = _names("sqrt rsqrt std var norm linalg_norm linalg_vector_norm")
#: Products of two tensors, and the place of the first factor.
_PRODUCTS = {
    "mul": 0,
    "multiply": 0,
    "matmul": 0,
    "rmatmul": 0,
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "dot": 0,
    "addmm": 1,
    "baddbmm": 1,
}

#: Tensors that a product or a sum may be given by name, in order.
_OPERANDS = ("input", "mat1", "mat2", "batch1", "batch2", "other")

#: The body of multi-head attention, open to the mode: the original hands itself over as one function.
_open_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


@dataclass(frozen=True, eq=False)
class Flow:
    """One use of a weight.

    Attributes:
        weight: the parameter.
        node: where its output hangs in the autograd graph.
    """

    weight: nn.Parameter
    node: Any


@dataclass(eq=False)
class Junction:
    """A sum of two tensors that both hold relevance.

    Attributes:
        parts: where the two hang in the autograd graph.
        node: where the sum does.
        relevance: (R, 2) of the two, summed over all but the first dimension; known after the backward pass.
    """

    parts: tuple[Any, Any]
    node: Any
    relevance: Tensor | None = None


#: Keeps some elements of a tensor.
_Sign = Callable[[Tensor], Tensor]


def _positive(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def _negative(t: Tensor) -> Tensor:
    return t.clamp(max=0)


@dataclass(frozen=True)
class _Affine:
    """A linear map z = W x + b at its input; the weight is (out, in / groups, ...), or `transposed` (in, out / groups, ...)."""

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rule: Rule
    transposed: bool

    def output(self) -> Tensor:
        return self.apply(self.x, self.weight, self.bias)

    def part(self, first: _Sign, second: _Sign) -> Tensor:
        """first(W) x+ + second(W) x- + first(b)."""
        upper = self.apply(_positive(self.x), first(self.weight), None if self.bias is None else first(self.bias))
        below = _negative(self.x)
        return upper + self.apply(below, second(self.weight), None) if below.any() else upper

    def then(self, scale: Tensor, shift: Tensor) -> "_Affine":
        """The map to scale z + shift, with one number a channel."""
        weight, rest = self.weight, [1] * (self.weight.ndim - 2)
        if self.transposed:
            groups = len(scale) // weight.shape[1]
            grouped = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, *rest)
            weight = grouped.reshape(weight.shape)
        else:
            weight = weight * scale.reshape(-1, 1, *rest)
        return replace(self, weight=weight, bias=shift if self.bias is None else self.bias * scale + shift)


class Propagation(TorchFunctionMode):
    """Run a model inside this, and `x * torch.autograd.grad(logits.sum(), x)[0]` is the relevance of x.

    What requires a gradient holds relevance: leaves, and what is made of them inside; parameters must not. Biases and other
    constants absorb theirs, as in every rule below (Bach et al. 2015; Montavon et al. 2019; AttnLRP: Achtibat et al.
    2024, 2402.05602). For the output
    z = W x + b with relevance R_j, and with + and - for the positive and negative elements,

        u+ = W+ x+ + W- x- + b+,    u- = W- x+ + W+ x- + b-,

    and a linear map gives input i its part of

        epsilon      z, of R_j:  x_i sum_j w_ji R_j / (z_j + epsilon sign z_j)
        z+           u+, of R_j
        alpha-beta   u+, of alpha R_j, less its part of u-, of (alpha - 1) R_j
        gamma        z + gamma u+ where z_j > 0, z + gamma u- where z_j < 0, of R_j

    (the sign-wise gamma rule: Andeol et al. 2021). Batch normalization is folded into the linear map before it. Sums share
    by signed contribution, pooling gives to the maximum or by contribution, activations and root mean square norms pass
    all on, other norms are linear maps with a constant deviation. A product of two tensors that hold relevance gives
    half to each, but x f(x), element by element, is an activation: 0.5 x (1 + erf(x / sqrt 2)) passes all on, as GELU.
    Attention: `attn-lrp` treats its two products so, and the softmax s by its Taylor decomposition,
    x_i (R_i - s_i sum R); for `cp-lrp` (Ali et al. 2022, 2202.07304) its weights are constants, all goes to the values.
    Roots, powers of 1/2 and -1/2, deviations and norms are taken for denominators, which are constants; a softmax written
    with exp and a sum is an activation and a constant.

    Anything else that relevance would have to pass is refused by name, also what torch functions do not show: autograd
    functions of the model's own, scripted and compiled code.

    Attributes:
        flows: every use of a parameter as the weight of a linear map or an embedding, in order.
        junctions: every sum of two tensors that hold relevance, in order, if `sums`.
        leaves: where the backward pass ends: outputs of weights whose input holds no relevance.

    For z = 3 * 2 - 1 * 4 the inputs share R = z = 2 as 6 and -4:

    >>> layer = nn.Linear(2, 1, bias=False).requires_grad_(False)
    >>> layer.weight.copy_(torch.tensor([[3.0, -1.0]])).shape
    torch.Size([1, 2])
    >>> x = torch.tensor([[2.0, 4.0]], requires_grad=True)
    >>> with Propagation(epsilon=0.0):
    ...     z = layer(x)
    >>> (x * torch.autograd.grad(z.sum(), x)[0]).tolist()
    [[6.0, -4.0]]
    """

    def __init__(
        self,
        *,
        convolution: Rule = "epsilon",
        linear: Rule = "epsilon",
        attention: Attention = "attn-lrp",
        epsilon: float = 1e-6,
        gamma: float = 0.25,
        alpha: float = 2.0,
        sums: bool = False,
        observe: Callable[[nn.Parameter, Tensor], None] | None = None,
    ) -> None:
        """Set the rules.

        Args:
            convolution: rule of convolutions.
            linear: rule of other linear maps.
            attention: rule of attention.
            epsilon: added to denominators, with their sign; 0 for LRP-0.
            gamma: weight of what agrees with the output, for `gamma`.
            alpha: weight of the positive parts, for `alpha-beta`.
            sums: keep `junctions`.
            observe: called in the backward pass with a weight and the relevance of the output that it made (behind a
                folded batch normalization), shaped as that output.
        """
        super().__init__()
        self.flows: list[Flow] = []
        self.junctions: list[Junction] = []
        self.leaves: list[Tensor] = []
        self._rules: dict[bool, Rule] = {True: convolution, False: linear}
        self._attention = attention
        self._epsilon, self._gamma, self._alpha = epsilon, gamma, alpha
        self._sums, self._observe = sums, observe
        self._maps: MutableMapping[Tensor, tuple[_Affine, Tensor, int]] = WeakTensorKeyDictionary()
        self._seen: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()
        self._sources: MutableMapping[Tensor, tuple[Tensor, int, int]] = WeakTensorKeyDictionary()

    def branches(self, output: Tensor) -> dict[Flow, tuple[Junction, int] | None]:
        """The innermost branch that each flow lies in.

        Args:
            output: logits, before the backward pass.

        Returns:
            Flow -> the first sum that has it on one side only, and the side; None where there is no such sum. Flows
            that do not reach the output are left out.

        Raises:
            EstimatorError: where the output is made by an operation that torch functions do not show.
        """
        self._check_seen([output])
        bits = {flow.node: 1 << place for place, flow in enumerate(self.flows)}
        known: dict[Any, int] = {}
        all_flows = _below(get_gradient_edge(output).node, bits, known)
        sides: list[tuple[Junction, int, int]] = []
        for junction in [junction for junction in self.junctions if junction.node in known]:
            a, b = (_below(node, bits, known) for node in junction.parts)
            sides += [(junction, 0, a & ~b), (junction, 1, b & ~a)]
        found: dict[Flow, tuple[Junction, int] | None] = {}
        for flow in self.flows:
            bit = bits[flow.node]
            if all_flows & bit:
                found[flow] = next(((junction, side) for junction, side, only in sides if only & bit), None)
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute what the model asks for, with the backward pass of the rule."""
        kwargs = dict(kwargs or {})
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        args = (*args, *(kwargs.pop(name) for name in _OPERANDS if name in kwargs))
        name: str = func.__name__.strip("_")
        held = [t for t in _tensors((args, kwargs)) if t.requires_grad]
        self._check_seen(held)
        source = self._source(held) if name in _POINTWISE else None
        result = self._apply(func, name, args, kwargs, held, source)
        for t in _tensors((args, kwargs, result)):
            if t.requires_grad:
                self._seen[t] = None
                if t._base is not None:  # written to through a view
                    self._seen[t._base] = None
        if source is not None and result is not source:
            self._sources[result] = (source, source._version, result._version)
        return result

    def _check_seen(self, tensors: Sequence[Tensor]) -> None:
        """Refuse what an operation has made that torch functions do not show."""
        for t in tensors:
            if t.grad_fn is not None and t not in self._seen and (t._base is None or t._base not in self._seen):
                raise EstimatorError(
                    f"relevance has no rule for {t.grad_fn.name()}, an operation that torch functions do not show "
                    "(an autograd function of the model's own, scripted, compiled?)"
                )

    def _source(self, held: Sequence[Tensor]) -> Tensor | None:
        """The one tensor of which all of these are functions, element by element; itself for one of another kind."""
        found = []
        for t in held:
            source, *versions = self._sources.get(t, (t, 0, 0))
            found.append(source if versions == [source._version, t._version] else t)
        return found[0] if found and all(source is found[0] for source in found) else None

    def _apply(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        held: Sequence[Tensor],
        source: Tensor | None,
    ) -> Any:
        """Compute one function by its rule; `held` are the arguments that hold relevance, made from `source` alone or None."""
        if name == "linear" or name.startswith("conv"):
            return self._linear_map(func, name, args, kwargs)
        if name == "embedding":
            return self._embedding(func, args, kwargs)
        if name in ("matmul", "mm", "addmm") and not kwargs and isinstance(args[-1], nn.Parameter):
            return self._matrix_product(args)
        if not held:
            return func(*args, **kwargs)
        leads = bool(args) and held[0] is args[0]
        alone = leads and len(held) == 1
        match name:
            case "add" if self._sums and len(held) == 2 and len(args) == 2 and not kwargs:
                return self._sum(func, args)
            case _ if name in _LINEAR:
                return func(*args, **kwargs)
            case "mul" | "multiply" if source is not None and len(held) == 2:
                out = self._identity(torch.mul(*(_constant(a) for a in args)), source)
                return args[0].copy_(out) if _in_place(func) else out
            case _ if name in _PRODUCTS:
                return self._product(func, name, args, kwargs)
            case "div" | "divide" | "true_divide" if leads:
                return func(args[0], *(_constant(a) for a in args[1:]), **kwargs)
            case "div" | "divide" | "true_divide" if not kwargs:
                return self._elementwise(lambda b: args[0] / b, args[1:], {})
            case _ if alone and not _in_place(func) and (name in _DENOMINATORS or _is_root(name, args)):
                return func(args[0].detach(), *args[1:], **kwargs)
            case "var_mean" | "std_mean" if alone:
                return func(args[0].detach(), *args[1:], **kwargs)[0], func(*args, **kwargs)[1]
            case _ if name in _ELEMENTWISE and alone:
                return self._elementwise(func, args, kwargs)
            case "softmax":
                result = func(*args, **kwargs)
                return result.detach() if self._attention == "cp-lrp" else result
            case "log_softmax":  # a shift of the logits, of which some may be -inf
                return args[0] + (func(*args, **kwargs) - args[0]).detach().nan_to_num(0.0)
            case "scaled_dot_product_attention":
                return self._scaled_dot_product(func, *args, **kwargs)
            case "multi_head_attention_forward":
                with self:
                    return _open_attention(*args, **kwargs)
            case "einsum" if isinstance(args[0], str):
                return func(args[0], *_shared(args[1] if isinstance(args[1], list | tuple) else args[1:]), **kwargs)
            case "glu":
                with self:
                    a, b = args[0].chunk(2, args[1] if len(args) > 1 else kwargs.get("dim", -1))
                    return a * torch.sigmoid(b)
            case "layer_norm" | "group_norm" | "instance_norm" | "batch_norm" if func in _NORMS:
                return self._norm(func, args, kwargs)
        result = func(*args, **kwargs)
        if any(t.requires_grad for t in _tensors(result)):
            raise EstimatorError(
                f"relevance has no rule for {resolve_name(func) or name}, which lies between a layer and the output"
            )
        return result

    def _linear_map(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "weight", "bias")
        given = dict(zip(names[: len(args)], args[: len(names)], strict=True)) | {
            k: kwargs.pop(k) for k in names if k in kwargs
        }

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out: Tensor = func(x, weight, bias, *args[3:], **kwargs)
            return out

        rule = self._rules[name != "linear"]
        affine = _Affine(apply, given["input"], given["weight"], given.get("bias"), rule, "transpose" in name)
        return self._ruled(affine, affine.weight)

    def _matrix_product(self, args: Sequence[Any]) -> Tensor:
        """`x @ weight` and `bias + x @ weight`, as GPT-2's `Conv1D` writes it."""
        bias, x, weight = args if len(args) == 3 else (None, *args)

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = x @ weight
            return out if bias is None else out + bias

        return self._ruled(_Affine(apply, x, weight, bias, self._rules[False], True), weight)

    def _ruled(self, affine: _Affine, parameter: Tensor, known: Tensor | None = None) -> Tensor:
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
            if affine.rule == "epsilon":
                carried = self._quotient(z, plain)
            elif affine.rule == "z+":
                carried = self._quotient(z, affine.part(_positive, _negative))
            elif affine.rule == "alpha-beta":
                carried = self._alpha * self._quotient(z, affine.part(_positive, _negative))
                carried = carried - (self._alpha - 1) * self._quotient(z, affine.part(_negative, _positive))
            else:
                more, less = self._favouring(_positive), self._favouring(_negative)
                carried = self._quotient(_positive(z), affine.part(more, less))
                carried = carried + self._quotient(_negative(z), affine.part(less, more))
            out = _with_value(value, carried)
        out = self._made(parameter, value, out)
        if out.requires_grad:
            self._maps[out] = (affine, parameter, out._version)
        return out

    def _favouring(self, sign: _Sign) -> _Sign:
        return lambda t: t + self._gamma * sign(t)

    def _quotient(self, value: Tensor, u: Tensor) -> Tensor:
        """`u (value / u)`, the quotient held constant and stabilized; finite, also in half precision."""
        down = u.detach()
        stable = torch.where(down < 0, down - self._epsilon, down + self._epsilon)
        quotient = value / torch.where(down == 0, torch.inf, stable)
        most = torch.finfo(value.dtype).max
        return u * quotient.clamp(-most, most)

    def _made(self, weight: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """Record the output of a weight: `value` is its own copy, `out` carries the gradient."""
        if not isinstance(weight, nn.Parameter):
            return out
        if not out.requires_grad:
            leaf = value.detach().requires_grad_()
            self.leaves.append(leaf)
            out = leaf.clone()
        observe = self._observe
        if observe is not None:
            out.register_hook(lambda gradient: observe(weight, wide(value) * wide(gradient)))
        self.flows.append(Flow(weight, out.grad_fn))
        return out

    def _embedding(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        value = func(*args, **kwargs)
        return self._made(kwargs["weight"] if "weight" in kwargs else args[1], value, value)

    def _sum(self, func: Any, args: Sequence[Any]) -> Tensor:
        """A sum of two that hold relevance, watched."""
        a, b = args
        parts = (get_gradient_edge(a).node, get_gradient_edge(b).node)
        out: Tensor = a + b
        values = (a.detach().expand_as(out), b.detach().expand_as(out))
        if func.__name__ == "add_":  # overwrites a, and often the sum is overwritten next
            values = (out.detach() - b.detach(), values[1])
            out = a.copy_(out)
        versions = [value._version for value in values]
        junction = Junction(parts, out.grad_fn)
        self.junctions.append(junction)

        def hook(gradient: Tensor) -> None:
            if [value._version for value in values] != versions:
                raise EstimatorError("a summand of a residual sum was overwritten later; use score='absolute'")
            rows = [(wide(value) * wide(gradient)).reshape(len(gradient), -1).sum(1) for value in values]
            junction.relevance = torch.stack(rows, 1)

        out.register_hook(hook)
        return out

    def _product(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        place = _PRODUCTS[name]
        factors = [*args[:place], *_shared(args[place : place + 2]), *args[place + 2 :]]
        if _in_place(func):
            out: Tensor = args[0].copy_(torch.mul(*factors))
        else:
            out = func(*factors, **kwargs)
        return out

    def _elementwise(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        x: Tensor = args[0]
        copy = x.detach().clone()
        out = self._identity(func(copy, *args[1:], **kwargs), x)
        if copy._version:  # `func` works in place
            x.copy_(out)
            return x
        return out

    def _identity(self, value: Tensor, x: Tensor) -> Tensor:
        """`value` as x (value / x), the quotient held constant; nothing from an x of 0, which holds no relevance."""
        given = x.detach()
        quotient = value / torch.where(given == 0, 1.0, given)
        usable = given.isfinite() & (given != 0) & quotient.isfinite()
        return _with_value(value, torch.where(usable, x, 0.0) * torch.where(usable, quotient, 0.0))

    def _scaled_dot_product(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self._attention == "cp-lrp":
            query, key, attn_mask = _constant(query), _constant(key), _constant(attn_mask)
        elif query.requires_grad or key.requires_grad or (attn_mask is not None and attn_mask.requires_grad):
            half = 0.5 if value.requires_grad else 1.0
            query, key = (_scaled(factor, half) for factor in _shared([query, key]))
            value, attn_mask = _scaled(value, 0.5), _scaled(attn_mask, half)
        out: Tensor = func(query, key, value, attn_mask, *args, **kwargs)
        return out

    def _norm(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Linear with a constant deviation; batch normalization in evaluation mode is part of a linear map."""
        given = inspect.signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        x, weight, bias, eps = options["input"], options["weight"], options["bias"], options["eps"]
        channels = (1, -1) + (1,) * (x.ndim - 2)
        if func is F.batch_norm and not options["training"]:
            scale = torch.rsqrt(options["running_var"] + eps) * (1.0 if weight is None else weight)
            shift = -options["running_mean"] * scale + (0.0 if bias is None else bias)
            before, parameter, version = self._maps.get(x, (None, x, 0))
            tokens = before is not None and before.weight.ndim == 2 < x.ndim  # the channels are not those of the weight
            if before is None or version != x._version or tokens:
                return _with_value(func(*args, **kwargs).detach(), x * scale.view(channels))
            return self._ruled(before.then(scale, shift), parameter, func(*args, **kwargs))
        if func is F.layer_norm:
            grouped, dims = x, tuple(range(-len(options["normalized_shape"]), 0))
            affine = x.shape[x.ndim - len(dims) :]
        elif func is F.group_norm:
            grouped, dims, affine = x.reshape(len(x), options["num_groups"], -1), (-1,), channels
        elif func is F.instance_norm and options["use_input_stats"]:
            grouped, dims, affine = x, tuple(range(2, x.ndim)), channels
        else:
            raise EstimatorError(f"relevance has no rule for {resolve_name(func)} with statistics of the batch")
        full = grouped.detach().to(torch.promote_types(x.dtype, torch.float32))
        deviation = torch.rsqrt(full.var(dims, unbiased=False, keepdim=True) + eps).to(x.dtype)
        carried = ((grouped - grouped.mean(dims, keepdim=True)) * deviation).reshape(x.shape)
        if weight is not None:
            carried = carried * weight.reshape(affine)
        return _with_value(func(*args, **kwargs).detach(), carried)


_NORMS = (F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm)


def _below(node: Any, bits: Mapping[Any, int], known: dict[Any, int]) -> int:
    """The flows from which a node is made, as bits; `known` is filled on the way."""
    stack = [node]
    while stack:
        top = stack[-1]
        if top in known:
            stack.pop()
            continue
        parts = [part for part, _ in top.next_functions if part is not None]
        missing = [part for part in parts if part not in known]
        if missing:
            stack.extend(missing)
            continue
        mask = bits.get(top, 0)
        for part in parts:
            mask |= known[part]
        known[top] = mask
    return known[node]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _in_place(func: Any) -> bool:
    name: str = func.__name__
    return name.endswith("_") and not name.endswith("__")


def _is_root(name: str, args: Sequence[Any]) -> bool:
    """True for a power of 1/2 or -1/2."""
    return name == "pow" and isinstance(args[-1], float) and abs(args[-1]) == 0.5


def _with_value(value: Tensor, carried: Tensor) -> Tensor:
    """`value`, with the gradient of `carried`."""
    return value + (carried - carried.detach())


def _scaled(x: Any, factor: float) -> Any:
    """The same value, with `factor` times the gradient; what holds no relevance as it is."""
    if factor == 1 or not isinstance(x, Tensor) or not x.requires_grad:
        return x
    same = x.view_as(x)
    same.register_hook(lambda gradient: factor * gradient)
    return same


def _shared(factors: Sequence[Any]) -> list[Any]:
    """Factors of a product: those that hold relevance get equal parts of it."""
    held = sum(isinstance(factor, Tensor) and factor.requires_grad for factor in factors)
    return [_scaled(factor, 1 / max(held, 1)) for factor in factors]
