"""The door from a model to its decisions."""

import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import TableError, nearest
from mpsearch.layer import Layer
from mpsearch.model import Batch, call, preserved, samples
from mpsearch.modules import canonical, kind_of, storage_of, weight_of


def layers(
    model: nn.Module,
    example: Batch,
    *,
    exclude: Sequence[str] = (),
    groups: Literal["auto", "none"] | Mapping[str, Sequence[str]] = "auto",
) -> list[Layer]:
    """Find the quantizable layers of a model, in the order of `named_modules`.

    Linear, Conv1d to 3d (grouped and depthwise too), transposed convolutions and Embedding, with their subclasses, and GPT-2's `Conv1D`.
    MACs come from really running the example: a module that is called several times counts several times; one that is not called is
    reported in a warning and left out. Layers that share a weight are one group.

    Args:
        model: any module; it comes back as it was.
        example: one batch: `(inputs, targets)`, a tensor or a dict of keywords.
        exclude: names or patterns (`encoder.*`) of layers to leave alone.
        groups: `auto` (shared weights), `none` (refused where weights are shared), or name -> layers, added to the shared weights.

    Raises:
        TableError: for a model without quantizable layers, or a name or pattern that matches nothing, or half of a
            shared weight excluded.

    >>> [(layer.name, layer.kind, layer.macs) for layer in layers(nn.Sequential(nn.Linear(3, 2)), torch.ones(5, 3))]
    [('0', 'linear', 6)]
    """
    found = {name: module for name, module in model.named_modules() if kind_of(module) is not None}
    if not found:
        raise TableError("the model has no quantizable layer (Linear, Conv, ConvTranspose or Embedding)")
    excluded: list[str] = []
    for pattern in exclude:
        matched = fnmatch.filter(found, pattern)
        if not matched:
            raise TableError(f"exclude={pattern!r} matches no layer{nearest(pattern, found)}")
        excluded += matched
        for name in matched:
            found.pop(name)
    if not found:
        raise TableError(f"exclude={list(exclude)} leaves no layer")
    kept = {storage_of(weight_of(module)): name for name, module in found.items()}
    for name in excluded:
        tied = kept.get(storage_of(weight_of(model.get_submodule(name))))
        if tied is not None:
            raise TableError(f"{name!r} is excluded but shares its weight with {tied!r}: exclude both or neither")
    macs = _count(model, found, example)
    idle = [name for name in found if macs[name] is None]
    if idle:
        shown = ", ".join(idle[:5]) + (f", ... ({len(idle)} in all)" if len(idle) > 5 else "")
        warnings.warn(f"the example never calls {shown}: left out of the decisions", stacklevel=2)
    called = {name: module for name, module in found.items() if macs[name] is not None}
    if not called:
        raise TableError("the example calls none of the quantizable layers")
    group = _groups(called, groups)
    made = []
    for name, module in called.items():
        weight = canonical(module)
        kind = kind_of(module)
        assert kind is not None
        made.append(
            Layer(
                name,
                kind,
                tuple(weight.shape),
                int(macs[name] or 0),
                group[name],
                str(weight.dtype).removeprefix("torch."),
            )
        )
    return made


def _count(model: nn.Module, found: Mapping[str, nn.Module], example: Batch) -> dict[str, int | None]:
    """MACs of one sample of each module; None where it is not called."""
    totals: dict[str, int | None] = dict.fromkeys(found)
    count = samples(example)

    def watch(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def see(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            given = args[0] if args else next(iter(keywords.values()))
            totals[name] = (totals[name] or 0) + _macs(module, given, output)

        return see

    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in found.items()]
    try:
        with preserved(model), torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: None if total is None else round(total / count) for name, total in totals.items()}


def _macs(module: nn.Module, given: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of one call: each output element sums over the weights that reach it."""
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # each input element meets the kernels of its channel
        return int(given.numel() * (module.weight.numel() // module.weight.shape[0]))
    weight = canonical(module)
    return output.numel() * (weight.numel() // weight.shape[0])


def _groups(
    found: Mapping[str, nn.Module], groups: Literal["auto", "none"] | Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Name of the group of each layer; empty for a layer of its own."""
    holders: dict[tuple[torch.device, int, int], list[str]] = {}
    for name, module in found.items():
        holders.setdefault(storage_of(weight_of(module)), []).append(name)
    group = dict.fromkeys(found, "")
    for names in holders.values():
        if len(names) > 1:
            if groups == "none":
                raise TableError(f"the layers {', '.join(names)} share a weight, so they must share a precision")
            group.update(dict.fromkeys(names, f"{names[0]} (shared weight)"))
    for title, members in groups.items() if isinstance(groups, Mapping) else ():
        for name in members:
            if name not in found:
                raise TableError(f"group {title!r} names {name!r}, which is no layer{nearest(name, found)}")
            if group[name] not in ("", title):
                tied = [other for other, at in group.items() if at == group[name]]
                if not set(tied) <= set(members):
                    raise TableError(f"group {title!r} splits the layers {', '.join(tied)}, which share a weight")
            group[name] = title
    return group
