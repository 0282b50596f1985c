"""Parameters that a model multiplies itself: found by running an example; each read becomes the call of a module."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mpsearch.models.modules.one_memory import Views, one_memory
from mpsearch.models.modules.operand import Convolution, Layout, Lookup, Operand, Product, Read, View
from mpsearch.models.modules.recurrent import cell, sequence
from mpsearch.models.modules.weights import OPERANDS, Operands, holds_weight, kind_of, weight_of

#: Calls an operand: x -> what one read makes of it.
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Reading:
    """One parameter, or a view of it, in the arguments of a function.

    Attributes:
        view: the parameter or the view.
        kind: of layer that it makes.
        read: what is done with it.
        rows: its dimensions that outputs have too.
        result: from the operand's call to what the function returns.
    """

    view: Tensor
    kind: str
    read: Callable[[View], Read]
    rows: tuple[int, ...]
    result: Callable[[Call], Tensor]
    order: tuple[int, ...] | None = None  # of dimensions in the read, where not as they are
    stack: int = 0  # of the rows, those that number matrices
    groups: int = 1


def _matrix(view: Tensor, stack: Sequence[int], outputs: Sequence[int], summed: Sequence[int], result: Any) -> _Reading:
    """A product with a view whose dimensions have these roles."""
    stack, outputs = ([axis % view.ndim for axis in axes] for axes in (stack, outputs))
    order = (*stack, *outputs, *(axis % view.ndim for axis in summed))
    read = functools.partial(Product, stack=len(stack), outputs=len(outputs))
    return _Reading(view, "linear", read, (*stack, *outputs), result, order, len(stack))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[_Reading]:
    if weight.ndim == 2:
        yield _matrix(weight, (), (0,), (1,), lambda call: _plus(call(x), bias))
        if x.ndim > 1:  # a parameter in the place of the input
            yield _matrix(
                x, (), range(x.ndim - 1), (-1,), lambda call: _plus(call(weight).mT.unflatten(0, x.shape[:-1]), bias)
            )


def _matmul(left: Tensor, right: Tensor) -> Iterator[_Reading]:
    if right.ndim > 1:
        yield _matrix(right, range(right.ndim - 2), (-1,), (-2,), lambda call: call(left))
    if left.ndim > 1 and right.ndim > 1:
        yield _matrix(left, range(left.ndim - 2), (-2,), (-1,), lambda call: call(right.mT).mT)
    elif left.ndim == 2:
        yield _matrix(left, (), (0,), (1,), lambda call: call(right))


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Iterator[_Reading]:
    def scaled(product: Callable[[Call], Tensor], call: Call) -> Tensor:
        return bias * beta + product(call) * alpha

    for reading in _matmul(left, right):
        yield _Reading(
            reading.view,
            "linear",
            reading.read,
            reading.rows,
            functools.partial(scaled, reading.result),
            reading.order,
            reading.stack,
        )


def _einsum(equation: Any, *operands: Any) -> Iterator[_Reading]:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return
    terms, _, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if "..." in equation:
        wide = [i for i, term in enumerate(names) if "..." in term]
        if len(wide) != 1 or "->" not in equation:
            return
        free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
        letters = "".join(free[: operands[wide[0]].ndim - len(names[wide[0]]) + 3])
        names, out = [term.replace("...", letters) for term in names], out.replace("...", letters)
    elif "->" not in equation:
        every = "".join(names)
        out = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    for place in (1, 0):
        own, other, view, x = names[place], names[1 - place], operands[place], operands[1 - place]
        if len(set(own)) < len(own) or len(set(other)) < len(other):
            return
        stack = [c for c in own if c in other and c in out]
        outputs = [c for c in own if c not in other]
        summed = [c for c in own if c in other and c not in out]
        rest = [c for c in other if c not in own]
        if not set(outputs + rest) <= set(out) or not summed or not outputs:
            continue
        strides = dict(zip(own, view.stride(), strict=True))
        summed.sort(key=lambda c: -strides[c])
        ordered = x.permute([other.index(c) for c in stack + rest + summed])
        size = dict(zip(own + other, (*view.shape, *x.shape), strict=True))

        def result(
            call: Call,
            ordered: Tensor = ordered,
            stack: Any = stack,
            rest: Any = rest,
            outputs: Any = outputs,
            size: Any = size,
        ) -> Tensor:
            lead = [size[c] for c in stack]
            y = call(ordered.reshape(*lead, math.prod(size[c] for c in rest), -1))
            y = y.reshape(*lead, *(size[c] for c in rest), *(size[c] for c in outputs))
            axes = stack + rest + outputs
            return y.permute([axes.index(c) for c in out])

        axes = [[own.index(c) for c in part] for part in (stack, outputs, summed)]
        yield _matrix(view, axes[0], axes[1], axes[2], result)


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Iterator[_Reading]:
    if isinstance(dims, int):
        pairs = list(zip(range(a.ndim - dims, a.ndim), range(dims), strict=True))
    else:
        pairs = list(zip(*(([axes] if isinstance(axes, int) else list(axes)) for axes in dims), strict=True))
    letters = "abcdefghijklmnopqrstuvwxyz"
    left, right = list(letters[: a.ndim]), list(letters[a.ndim : a.ndim + b.ndim])
    for first, second in pairs:
        right[second % b.ndim] = left[first % a.ndim]
    shared = set(left) & set(right)
    result = [c for c in left + right if c not in shared]
    yield from _einsum(f"{''.join(left)},{''.join(right)}->{''.join(result)}", a, b)


def _embedding(
    x: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, *_: Any, **__: Any
) -> Iterator[_Reading]:
    if weight.ndim == 2 and max_norm is None:
        yield _Reading(weight, "embedding", functools.partial(Lookup, padding=padding_idx), (0,), lambda call: call(x))


def _embedding_bag(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Iterator[_Reading]:
    def result(call: Call) -> Tensor:
        rows = call(x)
        flat, numbers = rows.reshape(-1, rows.shape[-1]), x.reshape(-1)
        if x.ndim == 2:
            bags, bag = len(x), torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
        else:
            assert offsets is not None
            starts = offsets[:-1] if include_last_offset else offsets
            bags, ends = len(starts), torch.cat([starts[1:], starts.new_tensor([len(numbers)])])
            if include_last_offset:
                ends[-1] = offsets[-1]
            bag = torch.arange(bags, device=x.device).repeat_interleave(ends - starts)
            flat, numbers = (
                flat[starts[0] : ends[-1]] if bags else flat,
                numbers[starts[0] : ends[-1]] if bags else numbers,
            )
        if per_sample_weights is not None:
            flat = flat * per_sample_weights.reshape(-1, 1)
        if padding_idx is not None:
            counted = numbers != padding_idx % len(weight)
            flat, bag = flat[counted], bag[counted]
        sums = flat.new_zeros(bags, flat.shape[-1])
        if mode == "max":
            index = bag[:, None].expand_as(flat)
            return sums.scatter_reduce(0, index, flat, "amax", include_self=False)
        sums = sums.index_add(0, bag, flat)
        if mode == "sum":
            return sums
        return sums / torch.bincount(bag, minlength=bags).clamp(min=1)[:, None]

    if max_norm is None:
        yield _Reading(weight, "embedding", Lookup, (0,), result)


def _bilinear(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[_Reading]:
    def result(call: Call) -> Tensor:
        return _plus(call((first[..., :, None] * second[..., None, :]).flatten(-2)), bias)

    read = functools.partial(Product, outputs=1)
    yield _Reading(weight, "bilinear", read, (0,), result)


def _convolution(function: Callable[..., Tensor], kind: str) -> Callable[..., Iterator[_Reading]]:
    def readings(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **settings: Any
    ) -> Iterator[_Reading]:
        names = ("stride", "padding", "dilation", "groups")
        settings |= dict(zip(names[: len(args)], args, strict=True))
        read = functools.partial(Convolution, function=function, settings=settings)

        def result(call: Call) -> Tensor:
            return _plus(call(x), None if bias is None else bias.reshape(-1, *[1] * (weight.ndim - 2)))

        yield _Reading(weight, kind, read, (0,), result, groups=settings.get("groups", 1))

    return readings


_READINGS: dict[Any, Callable[..., Iterator[_Reading]]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.bilinear: _bilinear,
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), _addmm),
    **dict.fromkeys(
        (
            torch.matmul,
            torch.mm,
            torch.bmm,
            torch.mv,
            Tensor.matmul,
            Tensor.__matmul__,
            Tensor.mm,
            Tensor.bmm,
            Tensor.mv,
        ),
        _matmul,
    ),
    **{getattr(F, name): _convolution(getattr(F, name), name) for name in ("conv1d", "conv2d", "conv3d")},
}
_SEQUENCES = {getattr(torch, name): name for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
_CELLS = {getattr(torch, name): name for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")}

_SEEN = frozenset({*_READINGS, *_SEQUENCES, *_CELLS})


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


@contextlib.contextmanager
def operands(model: nn.Module, example: Any, call: Callable[[nn.Module, Any], object]) -> Iterator[None]:
    """Inside, parameters of two dimensions and more that functions read are decisions, and those reads are calls of modules.

    One run of the example finds them. A matrix of no layer (`x @ self.proj`, an LSTM's) is named as the parameter, or as its module where
    that holds a single `weight`; a layer that is never called, only its weight read, keeps its name. The functions compute what they
    always do where nobody observes them; else an `Operand` computes the product, equal up to rounding.

    Args:
        model: comes back as it was.
        example: one batch.
        call: runs the model on it.
    """
    if OPERANDS in vars(model):
        yield
        return
    with one_memory(model) as views:
        recorder = _Recorder(model, views)
        with recorder.running(), torch.no_grad(), recorder:
            call(model, example)
        read = vars(model)[OPERANDS] = recorder.operands()
        try:
            if not (read.decided or read.reads):
                yield
                return
            calls = _Calls(
                {operand.weight: operand for operand in (*read.decided.values(), *read.reads.values())}, views
            )
            owners = {name: model.get_submodule(name) for name in read.reads}
            with _running(owners, calls.busy), calls:
                yield
        finally:
            del vars(model)[OPERANDS]


@contextlib.contextmanager
def _running(owners: dict[str, nn.Module], busy: set[nn.Parameter]) -> Iterator[None]:
    """Note the weights of modules whose own forward runs: it reads them itself."""

    def noted(module: nn.Module) -> Callable[..., Any]:
        original, weight = module.forward, weight_of(module)

        @functools.wraps(original)
        def forward(*args: Any, **keywords: Any) -> Any:
            inner = weight in busy
            busy.add(weight)
            try:
                return original(*args, **keywords)
            finally:
                if not inner:
                    busy.discard(weight)

        return forward

    own = {module: vars(module).get("forward") for module in owners.values()}
    try:
        for module in own:
            module.forward = noted(module)
        yield
    finally:
        for module, forward in own.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


class _Reads(TorchFunctionMode):
    """Sees functions that read parameters."""

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.views = views
        self.busy: set[nn.Parameter] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.views.of:
            args, kwargs = tree_map_only(Tensor, self.views.live, (args, kwargs))
        if func not in _SEEN:
            return func(*args, **kwargs)
        readings = _READINGS.get(func)
        if readings is not None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            listed = [x for part in args if isinstance(part, list | tuple) for x in part if isinstance(x, Tensor)]
            mapped = any(
                map(torch._C._functorch.is_functorch_wrapped_tensor, (*tensors, *listed))
            )  # `torch.vmap` hides the rows
            if not mapped and any(self.parameter(x) is not None for x in (*tensors, *listed)):
                for reading in readings(*args, **kwargs):
                    parameter = self.parameter(reading.view)
                    if parameter is not None and parameter not in self.busy:
                        return self.read(parameter, reading, lambda: func(*args, **kwargs))
        elif func in _SEQUENCES and not args[-2 if isinstance(args[3], list | tuple) else -3]:
            return self.recurrent(sequence, _SEQUENCES[func], func, args)
        elif func in _CELLS:
            return self.recurrent(cell, _CELLS[func], func, args)
        return func(*args, **kwargs)

    def parameter(self, tensor: Tensor) -> nn.Parameter | None:
        """The parameter that a tensor is, or is a view of."""
        raise NotImplementedError

    def read(self, parameter: nn.Parameter, reading: _Reading, plainly: Callable[[], Tensor]) -> Any:
        """What a function that reads a parameter returns; `plainly` calls it as it is."""
        raise NotImplementedError

    def recurrent(self, steps: Callable[..., Any], kind: str, func: Any, args: Sequence[Any]) -> Any:
        """What a recurrent function returns; `steps` does the same by single products."""
        raise NotImplementedError


def _times(weight: Tensor, x: Tensor) -> _Reading:
    return next(_linear(x, weight))


@dataclass(eq=False)
class _Use:
    """How functions read a parameter."""

    kind: str
    layout: Layout
    groups: int = 1


class _Recorder(_Reads):
    """Notes which parameters are read by functions, and how."""

    def __init__(self, model: nn.Module, views: Views) -> None:
        super().__init__(views)
        self.model = model
        self.layers = {
            name: module
            for name, module in model.named_modules()
            if kind_of(module) is not None and holds_weight(module)
        }
        self.places: dict[nn.Parameter, tuple[str, nn.Module, str]] = {}  # module's name, module, parameter's name
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim > 1 and parameter.numel():
                    self.places.setdefault(parameter, (name, module, key))
        self.uses: dict[nn.Parameter, _Use] = {}
        self.called: set[nn.Parameter] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Tells the reads of layers from those of others."""

        def note(module: nn.Module, _: Any) -> None:
            self.called.add(weight_of(module))

        handles = [module.register_forward_pre_hook(note) for module in self.layers.values()]
        try:
            with _running(self.layers, self.busy):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def parameter(self, tensor: Tensor) -> nn.Parameter | None:
        """The parameter that a tensor is, or is a view of."""
        for owner in (tensor, tensor._base):
            if isinstance(owner, nn.Parameter) and owner in self.places:
                return owner
        return None

    def read(self, parameter: nn.Parameter, reading: _Reading, plainly: Callable[[], Tensor]) -> Any:
        """Note how the parameter is read."""
        if parameter not in self.uses:
            self.uses[parameter] = _Use(reading.kind, _layout(parameter, reading), reading.groups)
        return plainly()

    def recurrent(self, steps: Callable[..., Any], kind: str, func: Any, args: Sequence[Any]) -> Any:
        """Note the matrices among the arguments."""
        for part in args:
            for tensor in part if isinstance(part, list | tuple) else [part]:
                if isinstance(tensor, Tensor) and tensor.ndim == 2 and (own := self.parameter(tensor)) is not None:
                    self.uses.setdefault(own, _Use("linear", _layout(own, _times(tensor, tensor))))
        return func(*args)

    def operands(self) -> Operands:
        """By name: those of no layer or of one that is never called, and further reads of weights of layers."""
        of_layers = {weight_of(module): name for name, module in reversed(self.layers.items())}
        alike = {self._likeness(parameter): use for parameter, use in self.uses.items() if parameter not in of_layers}
        decided, reads = dict[str, Operand](), dict[str, Operand]()
        for parameter in self.places:
            if parameter in of_layers:
                name, use = of_layers[parameter], self.uses.get(parameter)
                if use is None:
                    continue
                called = parameter in self.called
                kind = use.kind if called else kind_of(self.layers[name]) or use.kind
                (reads if called else decided)[name] = Operand(parameter, kind, use.layout, use.groups)
            else:  # an expert without tokens is read as the others are
                use = self.uses.get(parameter) or alike.get(self._likeness(parameter))
                if use is not None and use.layout.fits(parameter):
                    decided[self._name(parameter)] = Operand(parameter, use.kind, use.layout, use.groups)
        return Operands(decided, reads, self.views.within)

    def _likeness(self, parameter: nn.Parameter) -> Any:
        _, module, key = self.places[parameter]
        return type(module), key, parameter.shape

    def _name(self, parameter: nn.Parameter) -> str:
        name, module, key = self.places[parameter]
        if name and key == "weight":
            others = [tensor for tensor in module._parameters.values() if tensor is not None and tensor.ndim > 1]
            if others == [parameter]:
                return name
        return f"{name}.{key}".lstrip(".")


class _Calls(_Reads):
    """Hands reads that somebody observes to operands."""

    def __init__(self, operands: dict[nn.Parameter, Operand], views: Views) -> None:
        super().__init__(views)
        self.operands = operands

    def parameter(self, tensor: Tensor) -> nn.Parameter | None:
        """The parameter that a tensor is, or is a view of."""
        for owner in (tensor, tensor._base):
            if isinstance(owner, nn.Parameter) and owner in self.operands:
                return owner
        return None

    def read(self, parameter: nn.Parameter, reading: _Reading, plainly: Callable[[], Tensor]) -> Any:
        """By the operand, if anybody observes it."""
        operand = self.operands[parameter]
        return reading.result(self._call(operand, reading)) if _apart(operand) else plainly()

    def recurrent(self, steps: Callable[..., Any], kind: str, func: Any, args: Sequence[Any]) -> Any:
        """By products, if anybody observes one."""
        tensors = [x for part in args for x in (part if isinstance(part, list | tuple) else [part])]
        own = [self.parameter(x) for x in tensors if isinstance(x, Tensor)]
        if not any(parameter is not None and _apart(self.operands[parameter]) for parameter in own):
            return func(*args)

        def times(weight: Tensor, x: Tensor) -> Tensor:
            parameter = self.parameter(weight)
            return (
                F.linear(x, weight) if parameter is None else self._call(self.operands[parameter], _times(weight, x))(x)
            )

        return steps(kind, times, args)

    def _call(self, operand: Operand, reading: _Reading) -> Call:
        view = reading.view if reading.order is None else reading.view.permute(reading.order)
        read = reading.read(View.of(view, operand.weight))
        return lambda x: operand(x, read)


def _apart(operand: Operand) -> bool:
    """True where products are made by operands: somebody observes, or differentiates, for which fused functions may have no rule."""
    return operand.has_hooks or torch.is_grad_enabled()


def _layout(parameter: nn.Parameter, reading: _Reading) -> Layout:
    """How a parameter looks to a quantizer, from a view of it whose dimensions are rows or summed over."""
    view, rows, stack = reading.view, reading.rows, reading.stack
    if (view.shape, view.stride()) == (parameter.shape, parameter.stride()):
        plain = (*rows, *(axis for axis in range(parameter.ndim) if axis not in rows))
        return Layout(tuple(parameter.shape), plain, len(rows), math.prod(view.shape[:stack]))
    shape: list[int] = []
    summed: list[bool] = []
    strides = parameter.stride()
    touched: dict[
        int, list[tuple[int, int]]
    ] = {}  # dimension of the parameter -> stride, size of what is summed over there
    for axis, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if axis not in rows and size > 1 and stride > 0:
            fitting = [d for d in range(parameter.ndim) if parameter.shape[d] > 1 and strides[d] <= stride]
            touched.setdefault(max(fitting, key=lambda d: strides[d]), []).append((stride, size))
    for d, whole in enumerate(parameter.shape):
        parts = touched.get(d, [])
        if len(parts) == 1 and parts[0][1] < whole:
            stride, size = parts[0]
            inner = stride // strides[d]
            if whole % (size * inner):  # of no use to a quantizer
                return Layout(tuple(parameter.shape), tuple(range(parameter.ndim)), 0)
            else:  # a part of the dimension: the rest of it is rows
                pieces = [(whole // (size * inner), False), (size, True), (inner, False)]
                shape += [n for n, _ in pieces if n > 1]
                summed += [is_summed for n, is_summed in pieces if n > 1]
                continue
        shape.append(whole)
        summed.append(bool(parts))
    order = sorted(range(len(shape)), key=lambda d: summed[d])
    matrix = view.numel() // max(1, math.prod(view.shape[axis] for axis in rows[:stack]))
    return Layout(tuple(shape), tuple(order), summed.count(False), max(1, parameter.numel() // max(1, matrix)))
