"""How a batch is read: which parts of it the model takes, which are labels, how many samples it has."""

import copy
import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError, warn
from mpsearch.models.data.snapshot import random_states

#: Whatever a data loader yields; `arranged` tells how it is read.
Batch = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Arranged:
    """A batch whose parts are read in another way than `(inputs, targets)`.

    Attributes:
        original: the batch itself, as functions of the user's take it.
        names: of the parts that the model takes, by place or by field, in its order.
        target: of the part that holds the labels; None: no part.
        keywords: the model takes its parts by name.
    """

    original: Any
    names: tuple[int | str, ...]
    target: int | str | None
    keywords: bool = False

    def part(self, name: int | str) -> Any:
        """One part of the batch."""
        return getattr(self.original, name) if isinstance(name, str) else self.original[name]

    @property
    def inputs(self) -> Any:
        """What the model takes: a dict of keywords, or a tuple."""
        if self.keywords:
            return {name: self.part(name) for name in self.names}
        return tuple(self.part(name) for name in self.names)


def arranged(batch: Batch, model: nn.Module) -> Batch:
    """A batch, read by what the model's `forward` takes.

    - A tensor is the input. A mapping of any type holds keywords, and labels under `labels`; one without a key that `forward` knows is its
      only input (`holds_keywords`).
    - `(inputs, targets)`, a tuple or list, where `inputs` is a tensor, a mapping or, for several inputs, a tuple; targets may be None.
    - A tuple of as many parts as `forward` needs, and of more than one, holds inputs alone: `(ids, attention_mask)`, `(a, b, c)`. With one
      part more, the last one holds the labels. So it does where `forward` could take it, but need not; unless it is a mask in place
      and name: of zeros and ones, shaped as the first part, for a parameter that is called a mask or a type. What is assumed there
      is told once (`collect`). A tuple of one part is the input.
    - A named tuple or a dataclass whose fields are parameters of `forward` holds keywords; one further field, or `labels`, the labels. Else
      its fields are read by their order, as those of a tuple.

    Args:
        batch: as a data loader yields it.
        model: is asked for its parameters, not run.

    Returns:
        The batch itself, or `Arranged`.

    Raises:
        EstimatorError: for a tuple that `forward` does not take.

    >>> class Text(nn.Module):
    ...     def forward(self, ids, attention_mask): ...
    >>> ids, mask, labels = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2)
    >>> len(inputs_of(arranged((ids, mask), Text()))), targets_of(arranged((ids, mask), Text()))
    (2, None)
    >>> len(inputs_of(arranged((ids, mask, labels), Text()))), targets_of(arranged((ids, mask, labels), Text()))
    (2, tensor([0., 0.]))
    """
    return _read(batch, model)[0]


def collect(batches: Iterable[Batch], model: nn.Module) -> list[Batch]:
    """The batches as a list, each as `arranged` reads it, so that a loader that can be read only once is read once.

    Warns:
        UserWarning: what is assumed, where a part may be an input or hold labels; the first batch with labels decides for all.

    Raises:
        EstimatorError: where there is none, one has no samples, or the model does not take one.
    """
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise EstimatorError(f"expected a sequence of batches, got one {type(batches).__name__}; write [batch]")
    with random_states():  # a loader draws a seed for its workers, and the order
        loaded = list(batches)
    if not loaded:
        raise EstimatorError("the data set is empty: no batches (an iterator that was already used up?)")
    read = [_read(batch, model) for batch in loaded]
    assumed = next((pair for pair in read if pair[1] and pair[0].target is not None), None)
    assumed = assumed or next((pair for pair in read if pair[1]), None)
    if assumed:
        warn(assumed[1])
    readings = [
        dataclasses.replace(assumed[0], original=batch.original)
        if assumed and doubt and _like(batch, assumed[0])
        else batch
        for batch, doubt in read
    ]
    for number, batch in enumerate(readings):
        if samples(batch) == 0:
            raise EstimatorError(f"batch {number} has no samples")
    return readings


def _like(batch: Arranged, other: Arranged) -> bool:
    """True for batches of the same parts."""
    return {*batch.names, batch.target} - {None} == {*other.names, other.target} - {None}


def _read(batch: Batch, model: nn.Module) -> tuple[Batch, str]:
    """A batch as it is read, and what is assumed there."""
    names = _fields(batch)
    whole = isinstance(batch, Tensor | Mapping | Arranged | nn.utils.rnn.PackedSequence)
    if whole or not (names or isinstance(batch, tuple | list)):
        return batch, ""
    parameters, needed, most = _parameters(model)
    if names:
        others = [name for name in names if name not in parameters or name == "labels"]
        taken = tuple(name for name in names if name not in others)
        if taken and len(others) <= 1:
            return Arranged(batch, taken, others[0] if others else None, keywords=True), ""
    count = len(names) or len(batch)
    places: tuple[Any, ...] = names if dataclasses.is_dataclass(batch) else tuple(range(count))
    everything = Arranged(batch, places, None)
    labelled = Arranged(batch, places[:-1], places[-1] if places else None)
    parts = [everything.part(place) for place in places]
    if count == 1:
        return everything, ""
    if count == 2 and _several(parts[0], needed):
        return (labelled if dataclasses.is_dataclass(batch) else batch), ""
    if not max(needed, 1) <= count <= max(most, 1) + 1:
        raise EstimatorError(
            f"a batch of {count} parts, where the model takes {_range(needed, most)} ({', '.join(parameters) or 'none'}): expected "
            "(inputs, targets), a tensor or a dict"
        )
    if count == needed:
        return everything, ""
    if count > most or count > len(parameters):
        return (batch if count == 2 and not dataclasses.is_dataclass(batch) else labelled), ""
    name = parameters[count - 1]
    if _is_mask(parts[-1], parts[0], name):
        return everything, f"the last of {count} parts of a batch is taken for {name} and not for labels; {_ADVICE}"
    if _is_switch(model, name) or parts[-1] is None or name in _LABELS:
        return labelled, ""
    return labelled, f"the last of {count} parts of a batch is taken for labels and not for {name}; {_ADVICE}"


_LABELS = ("labels", "label", "targets", "target", "y")
_ADVICE = "give ((inputs, ...), targets), with None for no targets, to say which"


def _fields(batch: Batch) -> tuple[str, ...]:
    """Names of the parts of a named tuple or a dataclass."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        return tuple(field.name for field in dataclasses.fields(batch))
    return tuple(getattr(batch, "_fields", ())) if isinstance(batch, tuple) else ()


def _several(first: Any, needed: int) -> bool:
    """True where the first part alone holds the inputs."""
    return isinstance(first, Mapping) or (isinstance(first, tuple | list) and len(first) >= max(needed, 1))


def _range(needed: int, most: float) -> str:
    if needed == most:
        return f"{needed} input{'s' if needed != 1 else ''}"
    return f"{needed} or more inputs" if math.isinf(most) else f"{needed} to {most:g} inputs"


def _is_mask(part: Any, first: Any, name: str) -> bool:
    if not (isinstance(part, Tensor) and isinstance(first, Tensor) and part.shape == first.shape):
        return False
    return ("mask" in name or "type" in name) and not part.is_complex() and bool(((part == 0) | (part == 1)).all())


def _forward(model: nn.Module) -> inspect.Signature | None:
    """Signature of `forward`, without `self`; that of the module inside of a wrapper."""
    for _ in range(8):
        inner = next((getattr(model, name) for name in ("_orig_mod", "module") if name in model._modules), None)
        if inner is None:
            break
        model = inner
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _parameters(model: nn.Module) -> tuple[tuple[str, ...], int, float]:
    """Parameters of `forward` that may be passed by place, how many are needed, and how many there may be."""
    signature = _forward(model)
    if signature is None:
        return (), 0, math.inf
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(parameter.default is parameter.empty for parameter in named)
    open_ended = inspect.Parameter.VAR_POSITIONAL in kinds
    return tuple(parameter.name for parameter in named), needed, math.inf if open_ended else len(named)


def holds_keywords(inputs: Mapping[str, Any], model: nn.Module) -> bool:
    """False for a mapping that is itself the one input of `forward`: none of its keys is a parameter.

    >>> class OfDict(nn.Module):
    ...     def forward(self, fields): ...
    >>> holds_keywords({"x": 1}, OfDict()), holds_keywords({"fields": 1}, OfDict())
    (False, True)
    """
    signature = _forward(model)
    if signature is None or not inputs:
        return True
    parameters = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_any or _parameters(model)[1] != 1 or not parameters.keys().isdisjoint(inputs)


def _is_switch(model: nn.Module, name: str) -> bool:
    """True for a parameter that takes no tensor by default: a flag, a number, a text."""
    signature = _forward(model)
    default = None if signature is None else signature.parameters[name].default
    return isinstance(default, bool | int | float | str)


def reading_of(batch: Batch) -> dict[str, Any]:
    """How a batch is read where that is not `(inputs, targets)`, as JSON values, for the origin of a result; else nothing.

    >>> reading_of(Arranged((1, 2), (0, 1), None))
    {'batch': {'inputs': [0, 1], 'labels': None}}
    """
    return {"batch": {"inputs": list(batch.names), "labels": batch.target}} if isinstance(batch, Arranged) else {}


def original_of(batch: Batch) -> Any:
    """The batch as the data loader yielded it, for a function of the user's."""
    return batch.original if isinstance(batch, Arranged) else batch


def inputs_of(batch: Batch) -> Any:
    """What the model takes: the batch without its labels."""
    if isinstance(batch, Arranged):
        return batch.inputs
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    if isinstance(batch, tuple | list):
        if len(batch) != 2:
            raise EstimatorError(f"a batch of {len(batch)} parts, expected (inputs, targets), a tensor or a dict")
        return batch[0]
    return batch


def target_part(batch: Batch) -> Any:
    """The part of a batch that holds its labels, of whatever type; None: no part."""
    if isinstance(batch, Arranged):
        return None if batch.target is None else batch.part(batch.target)
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, tuple | list) else None


def targets_of(batch: Batch) -> Tensor | None:
    """The labels of a batch as a tensor, or None: where there are none, or none that are numbers (text, boxes)."""
    target = target_part(batch)
    if target is None or isinstance(target, Tensor):
        return target
    try:
        values = np.asarray(
            [np.asarray(part) if isinstance(part, Tensor) else part for part in target]
            if isinstance(target, tuple | list)
            else target
        )
    except (TypeError, ValueError, RuntimeError):
        return None
    return torch.as_tensor(values) if values.dtype.kind in "biuf" else None


def missing_labels(batch: Batch) -> str:
    """What a batch has in place of labels, for messages."""
    target = target_part(batch)
    if target is None:
        return "none"
    inner = next((leaf for leaf in leaves(target) if leaf is not target), None)
    return f"a {type(target).__name__}" + (f" of {type(inner).__name__}" if inner is not None else "")


def samples(batch: Batch) -> int:
    """Number of samples of a batch: the length of the first tensor of its inputs, at any depth, that has one.

    >>> samples(({"a": [torch.tensor(3.0), (torch.zeros(5, 2),)]}, None))
    5
    """
    tensors = [leaf for leaf in leaves(inputs_of(batch)) if isinstance(leaf, Tensor)]
    first = next((tensor for tensor in tensors if tensor.ndim), None)
    if first is None:
        raise EstimatorError(
            f"a batch without a tensor: {type(original_of(batch)).__name__}"
            + ("; its tensors hold one number each, expected an axis of samples" if tensors else "")
        )
    return len(first)


def first_tensor(value: Any) -> Tensor:
    """The first tensor of what a model takes, at any depth.

    Raises:
        EstimatorError: where there is none.
    """
    for leaf in leaves(value):
        if isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, nn.utils.rnn.PackedSequence):
            return leaf.data
    raise EstimatorError(f"a batch without a tensor: {type(value).__name__}")


def moved(value: Any, device: torch.device) -> Any:
    """A batch, or a part of one, on a device; containers keep their types."""
    return mapped(value, lambda leaf: _moved(leaf, device))


def _moved(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        copied = leaf.to(device)  # loaded in inference mode, it would take no gradients
        return copied.clone() if copied.is_inference() and not torch.is_inference_mode_enabled() else copied
    return copy.copy(leaf).to(device) if _moves_itself(leaf) else leaf


def _moves_itself(value: Any) -> bool:
    """True for packed sequences, graphs and the like."""
    return not isinstance(value, Tensor | type | nn.Module) and callable(getattr(value, "to", None))


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested containers that is none, in order: tensors, arrays, numbers, text."""
    if isinstance(value, Arranged):
        value = value.original
    parts = _parts(value)
    if parts is None:
        yield value
        return
    for part in parts:
        yield from leaves(part)


def _parts(value: Any) -> Iterable[Any] | None:
    """What a container holds; None for what is none: packed sequences are as one."""
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return None
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, tuple | list):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested containers with every leaf changed, each container of the type that it was.

    >>> mapped({"a": [1, (2, 3)]}, lambda leaf: leaf + 1)
    {'a': [2, (3, 4)]}
    """
    if isinstance(value, Arranged):
        return dataclasses.replace(value, original=mapped(value.original, change))
    if _parts(value) is None:
        return change(value)
    return rebuilt(value, lambda part: mapped(part, change))


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A container of the same type with its parts changed; what is no container, itself."""
    if isinstance(value, Mapping):
        return like(value, {key: change(part) for key, part in value.items()})
    if isinstance(value, tuple | list):
        return like(value, [change(part) for part in value])
    if _parts(value) is None:
        return value
    clone = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(clone, field.name, change(getattr(value, field.name)))
    return clone


def like(container: Any, parts: Any) -> Any:
    """Other parts in a container of the same type: a named tuple, a `UserDict`, an output of transformers; else a dict, tuple or list."""
    if isinstance(container, Mapping):
        if type(container) is dict:
            return parts
        try:
            clone: Any = copy.copy(container)
            for key, part in parts.items():
                clone[key] = part
        except (TypeError, AttributeError, NotImplementedError):  # one that cannot be written to
            return parts
        return clone
    if hasattr(container, "_fields"):
        return type(container)(*parts)
    return parts if isinstance(container, list) else tuple(parts)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A short hash of the values of tensors, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        _hash(tensor, digest)
    return digest.hexdigest()


def data_fingerprint(batches: Sequence[Batch]) -> str:
    """A short hash of all batches: of everything in them, with its names."""
    digest = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        parts = _parts(value)
        if isinstance(value, Arranged):
            digest.update(f"{value.names} {value.target}".encode())
            add(value.original)
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                digest.update(f"{key!r}:".encode())
                add(value[key])
        elif parts is not None:
            for part in parts:
                add(part)
        elif isinstance(value, Tensor):
            _hash(value, digest)
        elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, bytes | str | int | float | complex | None):
            digest.update(f"{value!r},".encode("utf-8", "backslashreplace"))

    for batch in batches:
        add(batch)
    return digest.hexdigest()


def _hash(tensor: Tensor, digest: Any) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    flat = flat.contiguous().cpu().resolve_conj().resolve_neg().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
