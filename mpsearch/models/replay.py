"""Re-running only the part of a model that a perturbation can change."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from mpsearch.models.running import Batch, call


@dataclass
class TracedCall:
    """One call of a module during the recorded run.

    Attributes:
        module: what was called.
        start: time of entry, in events.
        flops: spent before entry.
        end: time of return; inf while it runs.
        read_until: the latest return of a call that read the output itself, rather than through calls that it made.
        mutated: a later operation wrote into the output.
    """

    module: nn.Module
    start: int
    flops: float
    end: float = math.inf
    read_until: float = -1.0
    mutated: bool = False


@dataclass(frozen=True, eq=False)
class Trace:
    """Which modules a model calls, in which order, and which outputs are read where; from one run.

    A perturbation of a layer leaves every call as it was that returned before the layer was entered. Those calls need
    not be made again: the re-run gives their outputs, and does for real what is left. Nothing is assumed about the
    structure of the model but that it makes the same calls each time; code between calls is run again.

    Attributes:
        calls: in order of entry; the model itself is the first.
        readers: storage of a parameter -> first call that reads it.
        flops: of the whole run.
        activation_bytes: of all outputs together.
        held_bytes: the most that a `Resumption` holds at once for this batch, its output included.
    """

    calls: Sequence[TracedCall]
    readers: Mapping[int, int]
    flops: float
    activation_bytes: int
    held_bytes: int

    def entry(self, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> int:
        """The first call that a change of these modules' inputs or of these parameters reaches.

        Returns:
            index of the call, 0 (= run everything) where none does.
        """
        wanted = {id(module) for module in modules}
        indices = [i for i, recorded in enumerate(self.calls) if id(recorded.module) in wanted][:1]
        indices += [self.readers[key] for key in map(_storage, parameters) if key in self.readers]
        return min(indices, key=lambda i: self.calls[i].start, default=0)

    def share(self, entry: int) -> float:
        """Part of the floating-point operations of a run that a re-run from an entry does."""
        return 1.0 - self.calls[entry].flops / self.flops if self.flops else 1.0

    def finished(self, entry: int) -> list[int]:
        """Outermost calls that have returned when a call is entered."""
        time = self.calls[entry].start
        outermost: list[int] = []
        covered = -1.0
        for i, recorded in enumerate(self.calls):
            if recorded.end < time and recorded.start > covered:
                outermost.append(i)
                covered = recorded.end
        return outermost

    def running(self, entry: int) -> list[int]:
        """Calls that have not returned when a call is entered, and all later ones."""
        return [i for i, recorded in enumerate(self.calls) if recorded.end > self.calls[entry].start]


def record(model: nn.Module, batch: Batch) -> tuple[Trace, Tensor]:
    """Run the model once and write down its calls; without gradients.

    Returns:
        the trace and the output of `mpsearch.models.running.call`.
    """
    recorder = _Recorder()
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(recorder.enter))
            handles.append(module.register_forward_hook(recorder.leave, prepend=True))
        with torch.no_grad(), recorder:
            output = call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.trace(output), output


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[TracedCall] = []
        self.readers: dict[int, int] = {}
        self.flops = 0.0
        self.time = 0
        self.stack: list[int] = []
        self.makers: dict[int, list[int]] = {}  # storage -> calls that returned it
        self.outputs: dict[int, list[tuple[Tensor, int]]] = {}  # kept alive, so that no storage is given out twice
        self.reads: list[tuple[int, int]] = []  # (call that returned a tensor, call that read it)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # spares loading the compiler, a second at the first run

    def enter(self, module: nn.Module, _args: Any) -> None:
        self.time += 1
        self.stack.append(len(self.calls))
        self.calls.append(TracedCall(module, self.time, self.flops))

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.time += 1
        index = self.stack.pop()
        self.calls[index].end = self.time
        tensors = self.outputs[index] = [(t, t._version) for t in tree_iter(output) if isinstance(t, Tensor)]
        for tensor, _ in tensors:
            self.makers.setdefault(_storage(tensor), []).append(index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        frame = self.stack[-1] if self.stack else 0
        for key in read:
            self.readers.setdefault(key, frame)
            self.reads += [(maker, frame) for maker in self.makers.get(key, ())]
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in read:
                self.makers.pop(_storage(tensor), None)  # fresh memory at an old address
                self.readers.pop(_storage(tensor), None)
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result

    def trace(self, output: Tensor) -> Trace:
        for maker, frame in self.reads:
            self.calls[maker].read_until = max(self.calls[maker].read_until, self.calls[frame].end)
        for maker in self.makers.get(_storage(output), ()):
            self.calls[maker].read_until = math.inf
        sizes: dict[int, int] = {}
        for index, tensors in self.outputs.items():
            self.calls[index].mutated = any(tensor._version != version for tensor, version in tensors)
            sizes |= {_storage(tensor): tensor.numel() * tensor.element_size() for tensor, _ in tensors}
        events = [(0.0, 0)]
        for index, tensors in self.outputs.items():
            recorded = self.calls[index]
            size = sum(tensor.numel() * tensor.element_size() for tensor, _ in tensors)
            if recorded.read_until > recorded.end:
                events += [(recorded.end, size), (recorded.read_until, -size)]
        held = most = 0
        for _, size in sorted(events):
            held += size
            most = max(most, held)
        most += output.numel() * output.element_size()
        return Trace(self.calls, self.readers, self.flops, sum(sizes.values()), most)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Entered(BaseException):
    """The model has come to the call where the next re-run starts. Not an `Exception`: models may catch those."""


@dataclass(eq=False)
class Resumption:
    """One batch, held at the entry of one call: the model can be run from there on any number of times.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> batch = torch.ones(1, 1)
    >>> trace, output = record(net, batch)
    >>> second = trace.entry([net[1]], [net[1].weight])
    >>> held = Resumption(net, batch, trace)
    >>> held.advance(second)
    >>> called = []
    >>> handle = net[0].register_forward_pre_hook(lambda module, args: called.append(module.forward.__name__))
    >>> bool((held.run() == output).all()), called     # the first layer's output is given, not computed
    (True, ['replayed'])
    """

    model: nn.Module
    batch: Batch
    trace: Trace
    entry: int = 0
    outputs: dict[int, Any] = field(default_factory=dict)

    def advance(self, entry: int) -> None:
        """Go on to the entry of a later call, keeping what the rest of the run reads."""
        if entry == self.entry:
            return
        finished = self.trace.finished(entry)
        time = self.trace.calls[entry].start
        outputs = {index: self._held(index, self.outputs[index], time) for index in finished if index in self.outputs}
        wanted = {index for index in finished if index not in self.outputs}

        def keep(index: int, output: Any) -> None:
            if index in wanted:
                copied = _copied(output) if self.trace.calls[index].mutated else output
                outputs[index] = self._held(index, copied, time)

        with contextlib.suppress(_Entered), self._instrumented(keep, wanted, entry):
            call(self.model, self.batch)
        self.entry, self.outputs = entry, outputs

    def _held(self, index: int, output: Any, time: int) -> Any:
        """An output as it is held from a time on: where nobody reads it any more, only its shape."""
        if self.trace.calls[index].read_until > time:
            return output
        return tree_map(lambda x: x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else x, output)

    def run(self) -> Tensor:
        """Run the model from the entry on.

        Returns:
            the output of `mpsearch.models.running.call`.
        """
        with self._instrumented(None, set(), -1):
            return call(self.model, self.batch)

    @contextlib.contextmanager
    def _instrumented(self, keep: Any, wanted: set[int], stop: int) -> Iterator[None]:
        """Give the outputs of finished calls; hand others to `keep`; stop at a call."""
        calls, outputs = self.trace.calls, self.outputs
        finished = self.trace.finished(self.entry)
        concerned = {id(calls[i].module) for i in [*finished, *wanted, *([stop] if stop >= 0 else [])]}
        order: dict[nn.Module, list[int]] = {}
        for index in sorted([*finished, *self.trace.running(self.entry)]):
            if id(calls[index].module) in concerned:
                order.setdefault(calls[index].module, []).append(index)

        def replacement(module: nn.Module, sequence: Iterator[int]) -> Any:
            original = module.forward

            def replayed(*args: Any, **kwargs: Any) -> Any:
                index = next(sequence, -1)
                if index in outputs:
                    return _copied(outputs[index]) if calls[index].mutated else outputs[index]
                if index == stop and index >= 0:
                    raise _Entered
                output = original(*args, **kwargs)
                if keep is not None and index >= 0:
                    keep(index, output)
                return output

            return replayed

        own = {module: vars(module)["forward"] for module in order if "forward" in vars(module)}
        try:
            for module, sequence in order.items():
                module.forward = replacement(module, iter(sequence))
            yield
        finally:
            for module in order:
                vars(module).pop("forward", None)
                if module in own:
                    module.forward = own[module]


def _copied(output: Any) -> Any:
    """An output with tensors of its own: what it is copied from is written to."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
