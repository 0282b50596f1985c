"""Memory of activations."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.models.modules.weights import layer_of
from mpsearch.models.running import Batch, call, preserved, samples
from mpsearch.resources.arithmetic import stored_bits
from mpsearch.resources.resource import Array, Resource, ResourceCapabilities


@dataclass(frozen=True)
class ActivationBytes:
    """Peak bytes of activations while one sample runs: at each step of the real execution, the tensors that are alive.

    A tensor whose only reader is one layer, or one group, is stored in the activation format of that layer, block scales included; one
    that is also read elsewhere (a residual sum, a norm) is left alone. The input of the model is alive all the time, weights and buffers do
    not count, nor does what a kernel needs inside. In the table it is a peak: one row of limits for each step that no other covers.

    A linear layer reads 4 numbers (16 bytes) and writes 8 (32 bytes); the second reads these 8 and writes 2:

    >>> from mpsearch import layers, precisions
    >>> model, row = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.ones(1, 4)
    >>> resource = ActivationBytes()(model, layers(model, row), precisions("w8a8 w8"), example=row)
    >>> resource.usage.tolist(), resource.fixed.tolist(), resource.reference
    ([[[4.0, 16.0], [8.0, 32.0]]], [8.0], 56.0)
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(
        unit="bytes", column="activation_bytes", example=True, peak=True, monotone=True, reference="plan"
    )

    def __call__(
        self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision], *, example: Batch
    ) -> Resource:
        """Count; see `Resource`, with (T, L, P) usage."""
        one_sample = _one_sample(example)
        with preserved(model), torch.no_grad(), _watching(model, [layer.name for layer in layers]) as watch:
            call(model, one_sample)
        row_of = {layer.name: row for row, layer in enumerate(layers)}
        decision_of = {layer.name: layer.decision for layer in layers}
        formats = [precision.activation for precision in precisions]
        shape = (len(watch.full_steps), len(layers), len(precisions) + 1)
        usage = np.zeros(shape)  # the last column: unquantized
        fixed = np.zeros(shape[0])
        steps = np.array(watch.full_steps)
        for piece in watch.every:
            alive = (steps >= piece.born) & (steps < piece.died)
            names = sorted(piece.readers, key=lambda name: row_of.get(name, -1))
            decided = bool(names) and piece.dtype.is_floating_point and "" not in piece.readers
            if decided and len({decision_of[name] for name in names}) == 1:
                dtype = str(piece.dtype).removeprefix("torch.")
                elements = piece.nbytes / piece.dtype.itemsize
                sizes = [piece.nbytes if f == "16" else elements * stored_bits(f, dtype) / 8 for f in formats]
                usage[alive, row_of[names[0]]] += [*sizes, piece.nbytes]
            else:
                fixed[alive] += piece.nbytes
        reference = float((usage[:, :, -1].sum(1) + fixed).max())
        largest = _uncovered(np.concatenate([usage[:, :, :-1].reshape(len(fixed), -1), fixed[:, None]], 1))
        return Resource(usage[largest][:, :, :-1], fixed[largest], reference)


def _one_sample(example: Batch) -> Batch:
    """The example cut to its first sample, in memory of its own."""
    count = samples(example)
    return tree_map(lambda x: x[:1].clone() if isinstance(x, Tensor) and x.ndim and len(x) == count else x, example)


def _uncovered(steps: Array) -> list[int]:
    """Rows of (T, N) that no other row is at least as large as everywhere."""
    active = steps[:, steps.any(axis=0)]
    uncovered: list[int] = []
    for place in np.argsort(-active.sum(axis=1), kind="stable"):
        if not any((active[other] >= active[place]).all() for other in uncovered):
            uncovered.append(int(place))
    return sorted(uncovered)


@dataclass
class _Storage:
    """A piece of memory that activations lie in."""

    nbytes: int
    dtype: torch.dtype
    born: int
    died: float = math.inf
    readers: set[str] = field(default_factory=set)


class _Watch(TorchDispatchMode):
    """Notes when each storage is made, by which layer it is read, and when it is gone."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.every: list[_Storage] = []
        self.storages: dict[int, _Storage] = {}  # by address, which is used again
        self.living: list[tuple[StorageWeakRef, _Storage]] = []
        self.inside: list[str] = [""]
        self.step = 0
        self.full_steps: list[int] = []  # those after which something is freed, and the last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._bury()
        inputs = {_key(x): x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for key, x in inputs.items():
            if key not in self.storages and key not in self.weights:
                self._note(key, x, 0)  # held from outside
        result = func(*args, **(kwargs or {}))
        outputs = {_key(x): x for x in tree_iter(result) if isinstance(x, Tensor)}
        for key, x in outputs.items():
            if key not in inputs:
                self._note(key, x, self.step)
                self.living.append((StorageWeakRef(x.untyped_storage()), self.storages[key]))
        for key in (
            inputs.keys() - outputs.keys() - self.weights
        ):  # what shares memory with the result is only seen anew
            self.storages[key].readers.add(self.inside[-1])
        self.step += 1
        return result

    def _note(self, key: int, x: Tensor, step: int) -> None:
        self.storages[key] = _Storage(x.untyped_storage().nbytes(), x.dtype, step)
        self.every.append(self.storages[key])

    def _bury(self) -> None:
        freed = [piece for held, piece in self.living if held.expired()]
        for piece in freed:
            piece.died = self.step
        if freed:
            self.full_steps.append(self.step - 1)
            self.living = [(held, piece) for held, piece in self.living if piece.died == math.inf]

    def finish(self) -> None:
        """Close the last step."""
        self.full_steps.append(self.step - 1)


def _key(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@contextmanager
def _watching(model: nn.Module, names: Sequence[str]) -> Iterator[_Watch]:
    """The watch, told by hooks which layer is running."""
    watch = _Watch({_key(x) for x in [*model.parameters(), *model.buffers()]})

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: watch.inside.append(name)

    handles = []
    for name in names:
        module = layer_of(model, name)
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(lambda *_: watch.inside.pop() and None))
    try:
        with watch:
            yield watch
        watch.finish()
    finally:
        for handle in handles:
            handle.remove()
