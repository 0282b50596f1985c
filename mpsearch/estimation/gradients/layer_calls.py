"""One forward pass that hands on the input and the output gradient of every call of a weight."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from mpsearch.core.layer import Layer
from mpsearch.errors import EstimatorError
from mpsearch.estimation.weight_changes import PIECE
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.experts import place_of
from mpsearch.models.modules.operand import Operand
from mpsearch.models.modules.weights import holders, kind_of, weight_of
from mpsearch.models.running import Batch, first_tensor, inputs_of, samples

#: Where the samples lie in a tensor: along its first or second dimension; `last`: in the first behind tokens or
#: windows, as (windows x samples, ...); `none`: it is the same for all.
Layout = Literal["first", "second", "last", "none"]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module that holds a weight.

    Attributes:
        module: what was called.
        layer: that it is a call of; None for another module that shares the weight.
        args: of the call, without gradients.
        keywords: of the call.
    """

    module: nn.Module
    layer: Layer | None
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def x(self) -> Tensor:
        """The first tensor among the arguments, which is the input of a layer."""
        return first_tensor((*self.args, *self.keywords.values()))

    @property
    def alone(self) -> nn.Module:
        """The module as a function of its input alone; a product of attention with its other factor fixed."""
        return self.module.alone(self.args[1]) if isinstance(self.module, Operand) else self.module

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the module."""
        return weight_of(self.module)


class LayerCalls:
    """The calls of some weights over one batch: hooks on the modules that hold them, until `close`.

    Samples must not see each other (batch norm in evaluation mode). They lie along the first dimension of a layer's input,
    or the second, or share the first with tokens or windows. Where its shape leaves doubt, `resolve` tells.

    Args:
        model: what will be run.
        weights: whose calls are seen; where they need no gradient, backward passes carry those of activations only.
        layers: decisions by module.
        batch: what the model will be run on.
        known: layouts of modules that earlier batches have shown; added to.
        modules: whose calls are seen, where not those of all.

    Attributes:
        calls: number of calls of each weight.
        leaves: outputs of the first layers, where backward passes end.
        receiver: called with each call and the gradient of its output, during a backward pass; None: nobody is.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[nn.Parameter, Any],
        layers: Mapping[nn.Module, Layer],
        batch: Batch,
        known: dict[nn.Module, Layout],
        modules: Collection[nn.Module] | None = None,
    ) -> None:
        self.samples = samples(batch)
        self.calls: dict[nn.Parameter, int] = {}
        self.leaves: list[Tensor] = []
        self.receiver: Callable[[Call, Tensor], None] | None = None
        self._layouts: dict[Call, Layout] = {}
        self._known = known
        self._doubtful: dict[Call, Tensor] = {}
        #: a number a sample
        self._flat = any(isinstance(x, Tensor) and x.ndim == 1 for x in tree_iter(inputs_of(batch)))
        self._handles = []
        for module in holders(model):
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight in weights and (modules is None or module in modules):
                see = self._seen(layers.get(module))
                # first, since the user's hooks may change y
                self._handles.append(module.register_forward_hook(see, prepend=True, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks out of the model."""
        for handle in self._handles:
            handle.remove()
        self.leaves, self._doubtful, self._layouts = [], {}, {}  # whose graph holds hooks that hold this

    def _seen(self, layer: Layer | None) -> Callable[..., Any]:
        def see(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], y: Any) -> Tensor | None:
            weight = weight_of(module)
            if not isinstance(y, Tensor):
                raise EstimatorError(
                    f"layer {layer.name if layer else type(module).__name__!r} returns a {type(y).__name__}, expected a tensor: leave it "
                    "out, or use a measured estimator"
                )
            if not torch.is_grad_enabled():
                raise EstimatorError(
                    f"layer {layer.name if layer else type(module).__name__!r} runs without gradients (torch.no_grad in the model?): use a "
                    "measured estimator, such as KLDivergence"
                )
            self.calls[weight] = self.calls.get(weight, 0) + 1
            fresh = None
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            first = not any(isinstance(x, Tensor) and x.requires_grad for x in tree_iter((args, keywords)))
            if first:
                self.leaves.append(y)
            if first or y._is_view():
                y = fresh = y.clone()  # what follows may write into it; a view that is written into loses its hooks
            call = Call(module, layer, _detached(args), _detached(keywords))
            candidates = self._candidates(call)
            if candidates in ((), ("first",)):
                self._layouts[call] = candidates[0] if candidates else "none"
            elif module in self._known:
                self._layouts[call] = self._known[module]
            else:
                self._doubtful[call] = y
            y.register_hook(lambda g: self._receive(call, g))
            return fresh

        return see

    def _receive(self, call: Call, g: Tensor | None) -> None:
        if g is None:
            raise EstimatorError(
                f"no gradient comes back to a {type(call.module).__name__} of shape {tuple(call.weight.shape)}: an operation behind it "
                "cannot be differentiated (quantized already?); use a measured estimator, such as KLDivergence"
            )
        if self.receiver:
            self.receiver(call, g.detach())

    def _candidates(self, call: Call) -> tuple[Layout, ...]:
        """Where the samples may lie in the input of a call, the likeliest first."""
        size, x, tokens = self.samples, call.x, kind_of(call.module) == "embedding"
        if size == 1:
            return ("first",)
        if call.layer is not None and place_of(call.layer.name):  # an expert is given the tokens that chose it
            return ()
        if call.layer is not None and isinstance(call.module, Operand) and not call.module.whole(call.args[1]):
            return ()  # as is a slice of a stack of experts
        layouts: list[Layout] = []
        if len(x) % size == 0 and not (tokens and x.ndim == 1 and not self._flat):
            layouts += ["first"] if len(x) == size else ["first", "last"]
        convolution = (kind_of(call.module) or "").startswith("conv")
        if x.ndim >= (2 if tokens else 3) and x.shape[1] == size and not convolution:
            layouts.append("second")
        return tuple(layouts)

    def resolve(self, rows: Tensor, index: Tensor, name: Callable[[nn.Parameter], str]) -> bool:
        """Find the samples where shapes leave doubt: what comes out for one depends on no rows but its own.

        Args:
            rows: (N, ...) what comes out, such as predictions; empty under a loss of one's own.
            index: (N,) sample of each.
            name: of the layer that holds a weight, for errors.

        Returns:
            True where that took a backward pass.

        Raises:
            EstimatorError: where the predictions of a sample are not known, or cannot be differentiated.
        """
        if not self._doubtful:
            return False
        if not rows.numel():
            call = next(iter(self._doubtful))
            raise EstimatorError(
                f"layer {name(call.weight)!r} has an input of shape {tuple(call.x.shape)} in a batch of "
                f"{self.samples} samples: with an own loss it cannot be told which rows are those of one sample; give "
                "batches of one sample, or the loss 'kl' or 'cross-entropy'"
            )
        sample = int(index[0])
        mine = rows[index == sample]
        rest = torch.arange(self.samples, device=mine.device) != sample
        generator = torch.Generator().manual_seed(0)
        probe = (mine * torch.randn(mine.shape, generator=generator).to(mine)).sum()
        try:
            slopes = torch.autograd.grad(probe, list(self._doubtful.values()), retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise EstimatorError(f"the output of the model cannot be differentiated: {error}") from None
        for call, g in zip(self._doubtful, slopes, strict=True):
            fits: list[Layout] = [
                layout
                for layout in self._candidates(call)
                if g is None or not self._in_order(g, layout).reshape(self.samples, -1)[rest.to(g.device)].any()
            ]
            self._layouts[call] = self._known[call.module] = fits[0] if fits else "none"
        return True

    def by_second(self, state: Tensor, rows: Tensor, index: Tensor) -> bool:
        """True where the samples lie along the second dimension of a state that the predictions are made of.

        Args:
            state: requires a gradient.
            rows: (N, C) predictions; empty under a loss of one's own.
            index: (N,) sample of each.

        Raises:
            EstimatorError: where shapes leave doubt and there are no predictions to tell.
        """
        sizes = [size == self.samples for size in state.shape[:2]]
        if self.samples == 1 or sizes != [True, True] or state.ndim < 3:
            return sizes == [False, True]
        if not rows.numel():
            raise EstimatorError(
                f"the hidden state has shape {tuple(state.shape)} in a batch of {self.samples} samples: with an own loss it cannot be told "
                "which rows are those of one sample; give batches of one sample, or the loss 'kl' or 'cross-entropy'"
            )
        sample = int(index[0])
        mine = rows[index == sample]
        generator = torch.Generator().manual_seed(0)
        probe = (mine * torch.randn(mine.shape, generator=generator).to(mine)).sum()
        (slope,) = torch.autograd.grad(probe, state, retain_graph=True)
        return bool(slope[torch.arange(self.samples, device=slope.device) != sample].any())

    def shared(self, call: Call) -> bool:
        """True for a call with one output for the whole batch, such as one of position embeddings."""
        return self._layouts[call] == "none"

    def rows(self, call: Call, values: Tensor) -> Tensor:
        """A tensor laid out as the input or output of a call, with the rows of a sample next to each other."""
        return self._in_order(values, self._layouts[call])

    def by_sample(self, call: Call, function: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> tuple[Tensor, ...]:
        """(N,) sums of what a function makes of tensors that are laid out as the output of a call, number by number.

        The function is given a piece of each at a time, in the widest float. One output for the whole batch counts for the first sample.
        """
        count = 1 if self.shared(call) else self.samples
        flat = [self.rows(call, part).reshape(count, -1) for part in values]
        pieces = zip(*(part.split(max(1, PIECE // count), 1) for part in flat), strict=True)
        sums = [
            torch.stack(terms).sum(0)
            for terms in zip(*([x.sum(1) for x in function(*map(wide, piece))] for piece in pieces), strict=True)
        ]
        return tuple(torch.cat([x, x.new_zeros(self.samples - count)]) for x in sums)

    def _in_order(self, values: Tensor, layout: Layout) -> Tensor:
        if layout == "second":
            return values.transpose(0, 1)
        if layout == "last":
            return values.reshape(-1, self.samples, *values.shape[1:]).transpose(0, 1).flatten(0, 1)
        return values


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return {key: _detached(part) for key, part in value.items()} if isinstance(value, dict) else value
