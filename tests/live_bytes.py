"""The most bytes of tensors that a piece of work has alive at once, counted operation by operation."""

from typing import Any, Self

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that operations inside make; what was there before does not count.

    >>> with LiveBytes() as live:
    ...     for _ in range(3):
    ...         _ = torch.ones(10, dtype=torch.float64) + 1      # freed before the next
    >>> live.peak
    160
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            reference = StorageWeakRef(tensor.untyped_storage())
            if reference.cdata not in self._live:
                self._before.setdefault(reference.cdata, reference)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference.cdata not in self._before:
                self._live.setdefault(reference.cdata, (reference, storage.nbytes()))
        for known in (self._live, self._before):
            for key in [key for key, held in known.items() if _gone(held)]:
                del known[key]
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _gone(held: Any) -> bool:
    reference = held[0] if isinstance(held, tuple) else held
    return bool(reference.expired())


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in tree_iter(value) if isinstance(part, Tensor)]
