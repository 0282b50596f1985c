"""How each torch function passes relevance on: one rule a name, in `RULES`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NotImplementedType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from mpsearch.errors import EstimatorError
from mpsearch.estimation.relevance.attention import multi_head_attention
from mpsearch.estimation.relevance.carrying import constant, scaled, shared, tensors_of, with_identity, with_value
from mpsearch.estimation.relevance.linear_maps import LinearMaps
from mpsearch.metrics.statistics import wide

#: How attention shares out relevance.
Attention = Literal["attn-lrp", "cp-lrp"]


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


@dataclass(frozen=True, eq=False)
class Operation:
    """A torch function that the model calls.

    Attributes:
        function: what it calls.
        name: of that, without underscores at its ends.
        args: operands, also those given by name, and other arguments by place.
        keywords: the rest.
        held: the tensors among the arguments that hold relevance.
        origin: the one tensor of which all of these are functions, element by element, where there is one.
    """

    function: Any
    name: str
    args: Sequence[Any]
    keywords: dict[str, Any]
    held: Sequence[Tensor]
    origin: Tensor | None

    def plain(self) -> Any:
        """Its value, with its own gradient."""
        return self.function(*self.args, **self.keywords)

    @property
    def leads(self) -> bool:
        """True where the first argument holds relevance."""
        return bool(self.args) and bool(self.held) and self.held[0] is self.args[0]

    @property
    def alone(self) -> bool:
        """True where the first argument holds relevance, and no other one does."""
        return self.leads and len(self.held) == 1

    @property
    def in_place(self) -> bool:
        """True where it overwrites its first argument."""
        name: str = self.function.__name__
        return name.endswith("_") and not name.endswith("__")


@dataclass(frozen=True, eq=False)
class Settings:
    """What rules are given beside the operation.

    Attributes:
        attention: how attention shares out relevance.
        linear_maps: compute and record what has a weight.
        junctions: sums of two that hold relevance are added here; None where nobody wants them.
        mode: entered again by a rule that leaves an operation to the rules of what it is made of.
    """

    attention: Attention
    linear_maps: LinearMaps
    junctions: list[Junction] | None
    mode: TorchFunctionMode


#: Gives the result of an operation, hung on another gradient; NotImplemented where it has no rule for these arguments.
OperationRule = Callable[[Operation, Settings], Any]


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
POINTWISE = (_ELEMENTWISE - _names("rms_norm normalize")) | _names(
    "add radd sub subtract rsub neg negative mul rmul multiply div divide true_divide"
)
#: Denominators of normalizations are constants (AttnLRP, proposition 3.4).
_DENOMINATORS = _names("sqrt rsqrt std var norm linalg_norm linalg_vector_norm")
#: Functions of (input, weight, bias, ...).
_CONVOLUTIONS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc convolution")
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


def linear_map(operation: Operation, settings: Settings) -> Any:
    """A layer with a weight: see `LinearMaps`."""
    return settings.linear_maps.called(operation.function, operation.name, operation.args, operation.keywords)


def embedding(operation: Operation, settings: Settings) -> Any:
    """Relevance ends in the rows that were looked up."""
    value = operation.plain()
    weight = operation.keywords["weight"] if "weight" in operation.keywords else operation.args[1]
    return settings.linear_maps.record(weight, value, value)


def own_gradient(operation: Operation, settings: Settings) -> Any:
    """Linear in what holds relevance, so that the gradient is the rule."""
    return operation.plain()


def addition(operation: Operation, settings: Settings) -> Any:
    """Summands share by what they contribute; a sum of two that hold relevance is written down."""
    pair = len(operation.held) == 2 and len(operation.args) == 2 and not operation.keywords
    if settings.junctions is None or not pair:
        return operation.plain()
    a, b = operation.args
    parts = (get_gradient_edge(a).node, get_gradient_edge(b).node)
    out: Tensor = a + b
    values = (a.detach().expand_as(out), b.detach().expand_as(out))
    if operation.in_place:  # overwrites a, and often the sum is overwritten next
        values = (out.detach() - b.detach(), values[1])
        out = a.copy_(out)
    versions = [value._version for value in values]
    junction = Junction(parts, out.grad_fn)
    settings.junctions.append(junction)

    def hook(gradient: Tensor) -> None:
        if [value._version for value in values] != versions:
            raise EstimatorError("a summand of a residual sum was overwritten later; use score='absolute'")
        rows = [(wide(value) * wide(gradient)).reshape(len(gradient), -1).sum(1) for value in values]
        junction.relevance = torch.stack(rows, 1)

    out.register_hook(hook)
    return out


def elementwise(operation: Operation, settings: Settings) -> Any:
    """The identity rule: all relevance of an activation goes to its input."""
    if not operation.alone:
        return NotImplemented
    return _identity(operation.function, operation.args, operation.keywords)


def power(operation: Operation, settings: Settings) -> Any:
    """An activation, or with 1/2 or -1/2 a denominator."""
    exponent = operation.args[-1]
    root = operation.name == "pow" and isinstance(exponent, float) and abs(exponent) == 0.5
    return (denominator if root and not operation.in_place else elementwise)(operation, settings)


def denominator(operation: Operation, settings: Settings) -> Any:
    """Roots, deviations and norms: constants, through which no relevance passes."""
    if not operation.alone or operation.in_place:
        return NotImplemented
    return operation.function(operation.args[0].detach(), *operation.args[1:], **operation.keywords)


def moments(operation: Operation, settings: Settings) -> Any:
    """A variance or deviation, which is a constant, with the mean."""
    if not operation.alone:
        return NotImplemented
    spread = operation.function(operation.args[0].detach(), *operation.args[1:], **operation.keywords)[0]
    return spread, operation.plain()[1]


def product(operation: Operation, settings: Settings) -> Any:
    """Equal parts to the factors that hold relevance."""
    place = _PRODUCTS[operation.name]
    args = operation.args
    factors = [*args[:place], *shared(args[place : place + 2]), *args[place + 2 :]]
    if operation.in_place:
        return args[0].copy_(torch.mul(*factors))
    return operation.function(*factors, **operation.keywords)


def multiplication(operation: Operation, settings: Settings) -> Any:
    """X f(x), element by element, is an activation; other factors share."""
    if operation.origin is None or len(operation.held) != 2:
        return product(operation, settings)
    out = with_identity(torch.mul(*(constant(factor) for factor in operation.args)), operation.origin)
    return operation.args[0].copy_(out) if operation.in_place else out


def matrix_product(operation: Operation, settings: Settings) -> Any:
    """A linear map where the last factor is a parameter, else a product."""
    if not operation.keywords and isinstance(operation.args[-1], nn.Parameter):
        return settings.linear_maps.matrix_product(operation.args)
    return product(operation, settings) if operation.held else operation.plain()


def division(operation: Operation, settings: Settings) -> Any:
    """The divisor is a constant; where it alone holds relevance, 1 / x is an activation."""
    args = operation.args
    if operation.leads:
        return operation.function(args[0], *(constant(a) for a in args[1:]), **operation.keywords)
    if operation.keywords:
        return NotImplemented
    return _identity(lambda divisor: args[0] / divisor, args[1:], {})


def softmax(operation: Operation, settings: Settings) -> Any:
    """Taylor decomposition, which is the gradient; a constant for `cp-lrp`."""
    return constant(operation.plain()) if settings.attention == "cp-lrp" else operation.plain()


def log_softmax(operation: Operation, settings: Settings) -> Any:
    """A shift of the logits, of which some may be -inf."""
    x = operation.args[0]
    return x + (operation.plain() - x).detach().nan_to_num(0.0)


def scaled_dot_product(operation: Operation, settings: Settings) -> Any:
    """Attention as two products and a softmax."""

    def attended(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **keywords: Any
    ) -> Any:
        if settings.attention == "cp-lrp":
            query, key, attn_mask = constant(query), constant(key), constant(attn_mask)
        elif query.requires_grad or key.requires_grad or (attn_mask is not None and attn_mask.requires_grad):
            half = 0.5 if value.requires_grad else 1.0
            query, key = (scaled(factor, half) for factor in shared([query, key]))
            value, attn_mask = scaled(value, 0.5), scaled(attn_mask, half)
        return operation.function(query, key, value, attn_mask, *args, **keywords)

    return attended(*operation.args, **operation.keywords)


def whole_attention(operation: Operation, settings: Settings) -> Any:
    """The rules of what multi-head attention is made of."""
    with settings.mode:
        return multi_head_attention(*operation.args, **operation.keywords)


def einsum(operation: Operation, settings: Settings) -> Any:
    """A product: its factors that hold relevance get equal parts."""
    equation, *operands = operation.args
    if not isinstance(equation, str):
        return NotImplemented
    factors = operands[0] if isinstance(operands[0], list | tuple) else operands
    return operation.function(equation, *shared(factors), **operation.keywords)


def gated_linear_unit(operation: Operation, settings: Settings) -> Any:
    """The rules of a sigmoid and a product."""
    args = operation.args
    with settings.mode:
        a, b = args[0].chunk(2, args[1] if len(args) > 1 else operation.keywords.get("dim", -1))
        return a * torch.sigmoid(b)


def normalization(operation: Operation, settings: Settings) -> Any:
    """Linear with a constant deviation; batch normalization in evaluation mode is part of a linear map."""
    function = operation.function
    if function not in _NORMS:
        return NotImplemented
    bound = inspect.signature(function).bind(*operation.args, **operation.keywords)
    bound.apply_defaults()
    options = bound.arguments
    x, weight, bias, eps = options["input"], options["weight"], options["bias"], options["eps"]
    channels = (1, -1) + (1,) * (x.ndim - 2)
    if function is F.batch_norm and not options["training"]:
        scale = torch.rsqrt(options["running_var"] + eps) * (1.0 if weight is None else weight)
        shift = -options["running_mean"] * scale + (0.0 if bias is None else bias)
        return settings.linear_maps.batch_norm(operation.plain(), x, scale, shift)
    if function is F.layer_norm:
        grouped, dims = x, tuple(range(-len(options["normalized_shape"]), 0))
        affine = x.shape[x.ndim - len(dims) :]
    elif function is F.group_norm:
        grouped, dims, affine = x.reshape(len(x), options["num_groups"], -1), (-1,), channels
    elif function is F.instance_norm and options["use_input_stats"]:
        grouped, dims, affine = x, tuple(range(2, x.ndim)), channels
    else:
        raise EstimatorError(f"relevance has no rule for {resolve_name(function)} with statistics of the batch")
    full = grouped.detach().to(torch.promote_types(x.dtype, torch.float32))
    deviation = torch.rsqrt(full.var(dims, unbiased=False, keepdim=True) + eps).to(x.dtype)
    carried = ((grouped - grouped.mean(dims, keepdim=True)) * deviation).reshape(x.shape)
    if weight is not None:
        carried = carried * weight.reshape(affine)
    return with_value(operation.plain().detach(), carried)


_NORMS = (F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm)


def _identity(function: Any, args: Sequence[Any], keywords: dict[str, Any]) -> Tensor:
    x: Tensor = args[0]
    copy = x.detach().clone()
    out = with_identity(function(copy, *args[1:], **keywords), x)
    if copy._version:  # the function works in place
        x.copy_(out)
        return x
    return out


#: Rules of functions that have a weight, or may: asked also where no argument holds relevance, since a weight begins to hold it here.
WEIGHT_RULES: Mapping[str, OperationRule] = {
    **dict.fromkeys(("linear", *_CONVOLUTIONS), linear_map),
    "embedding": embedding,
    **dict.fromkeys(("matmul", "mm", "addmm"), matrix_product),
}
#: Name of a torch function -> its rule. What has none is refused where relevance would have to pass it.
RULES: Mapping[str, OperationRule] = {
    **dict.fromkeys(_LINEAR, own_gradient),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_DENOMINATORS, denominator),
    **dict.fromkeys(_PRODUCTS, product),
    **WEIGHT_RULES,
    "add": addition,
    **dict.fromkeys(("mul", "multiply"), multiplication),
    **dict.fromkeys(("div", "divide", "true_divide"), division),
    "pow": power,
    **dict.fromkeys(("var_mean", "std_mean"), moments),
    "softmax": softmax,
    "log_softmax": log_softmax,
    "scaled_dot_product_attention": scaled_dot_product,
    "multi_head_attention_forward": whole_attention,
    "einsum": einsum,
    "glu": gated_linear_unit,
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "batch_norm"), normalization),
}


def applied(operation: Operation, settings: Settings, rules: Mapping[str, OperationRule]) -> Any:
    """The result of an operation by the rule of its name.

    Raises:
        EstimatorError: where there is none, and the result would hold relevance.
    """
    rule = rules.get(operation.name)
    if rule is None or not (operation.held or operation.name in WEIGHT_RULES):
        result: Any = NotImplemented
    else:
        result = rule(operation, settings)
    if not isinstance(result, NotImplementedType):
        return result
    result = operation.plain()
    if operation.held and any(t.requires_grad for t in tensors_of(result)):
        raise EstimatorError(
            f"relevance has no rule for {resolve_name(operation.function) or operation.name}, which lies between a layer and the output"
        )
    return result
