"""Re-running only the part of a model that a perturbation can change."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map, tree_unflatten
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
        after: number of the first call that is entered behind it, those that it makes itself aside.
        read_until: for each tensor of the output, the latest return of a call that read it itself, rather than through calls that it
            made; inf for what the model returns.
        mutated: a later operation wrote into the output.
    """

    module: nn.Module
    start: int
    flops: float
    end: float = math.inf
    after: int = 0
    read_until: list[float] = field(default_factory=list)
    mutated: bool = False


@dataclass(frozen=True, eq=False)
class Trace:
    """Which modules a model calls, in which order, and which outputs are read where; from one run.

    A perturbation of a layer leaves every call as it was that returned before the layer was entered. Those calls need
    not be made again: the re-run gives their outputs, and does for real what is left. Nothing is assumed about the
    structure of the model but that it makes the same calls each time; code between calls is run again.

    Attributes:
        calls: in order of entry; the model itself is the first.
        readers: address of a parameter -> first call that reads it.
        flops: of the whole run.
        activation_bytes: of all outputs together.
        held_bytes: the most that a `Resumption` holds at once for this batch, its output included.
    """

    calls: Sequence[TracedCall]
    readers: Mapping[int, int]
    flops: float
    activation_bytes: int
    held_bytes: int

    @functools.cached_property
    def calls_of(self) -> Mapping[nn.Module, Sequence[int]]:
        """Numbers of the calls of each module."""
        found: dict[nn.Module, list[int]] = {}
        for index, recorded in enumerate(self.calls):
            found.setdefault(recorded.module, []).append(index)
        return found

    def entry(self, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> int:
        """The first call that a change of these modules' inputs or of these parameters reaches.

        Returns:
            index of the call, 0 (= run everything) where none does.
        """
        indices = [index for module in modules for index in self.calls_of.get(module, ())[:1]]
        indices += [self.readers[key] for key in map(_address, parameters) if key in self.readers]
        return min(indices, default=0)

    def share(self, entry: int) -> float:
        """Part of the floating-point operations of a run that a re-run from an entry does."""
        return 1.0 - self.calls[entry].flops / self.flops if self.flops else 1.0

    def finished(self, entry: int) -> list[int]:
        """Outermost calls that have returned when a call is entered."""
        time = self.calls[entry].start
        outermost: list[int] = []
        index = 0
        while index < entry:
            recorded = self.calls[index]
            if recorded.end < time:
                outermost.append(index)
                index = recorded.after
            else:
                index += 1
        return outermost

    def sequences(self, entry: int, concerned: Collection[int]) -> dict[nn.Module, list[int]]:
        """Of the modules of calls, which of their calls a re-run from an entry makes or gives, in order.

        Args:
            entry: where the re-run starts.
            concerned: calls that are told from others; those of a module behind its last one of these are left out.
        """
        time = self.calls[entry].start
        given = set(self.finished(entry))
        last: dict[nn.Module, int] = {}
        for index in concerned:
            module = self.calls[index].module
            last[module] = max(last.get(module, -1), index)
        return {
            module: [i for i in self.calls_of[module] if i <= end and (i in given or self.calls[i].end > time)]
            for module, end in last.items()
        }


def record(model: nn.Module, batch: Batch) -> tuple[Trace, Tensor]:
    """Run the model once and write down its calls; without gradients, and keeping no output alive.

    Returns:
        the trace and the output of `mpsearch.models.running.call`.
    """
    recorder = _Recorder(model)
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
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = {_address(parameter) for parameter in model.parameters() if _address(parameter)}
        self.calls: list[TracedCall] = []
        self.readers: dict[int, int] = {}
        self.flops = 0.0
        self.time = 0
        self.stack: list[int] = []
        self.makers: dict[int, list[tuple[int, int]]] = {}  # storage -> calls that returned it, and as which tensor
        self.seen: dict[int, StorageWeakRef] = {}  # a storage's number is not given out again while this refers to it
        self.sizes: dict[int, list[int]] = {}  # call -> bytes of each tensor that it returned
        self.storage_bytes: dict[int, int] = {}
        self.reads: set[tuple[int, int, int]] = set()  # (call, number of a tensor that it returned, call that read it)

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
        self.calls[index].end, self.calls[index].after = self.time, len(self.calls)
        tensors = [part for part in tree_iter(output) if isinstance(part, Tensor)]
        self.sizes[index] = [tensor.numel() * tensor.element_size() for tensor in tensors]
        self.calls[index].read_until = [-1.0] * len(tensors)
        for number, (tensor, size_bytes) in enumerate(zip(tensors, self.sizes[index], strict=True)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen[storage._cdata] = StorageWeakRef(storage)
            self.makers.setdefault(storage._cdata, []).append((index, number))
            self.storage_bytes[storage._cdata] = size_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        frame = self.stack[-1] if self.stack else 0
        for part in tree_iter((args, kwargs)):
            if isinstance(part, Tensor):
                address = _address(part)
                if address in self.parameters:
                    self.readers.setdefault(address, frame)
                for index, number in self.makers.get(part.untyped_storage()._cdata, ()):
                    self.reads.add((index, number, frame))
        for part in _written(func, args, kwargs):
            for index, _ in self.makers.get(part.untyped_storage()._cdata, ()):
                self.calls[index].mutated = True
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result

    def trace(self, output: Tensor) -> Trace:
        for index, number, frame in self.reads:
            read_until = self.calls[index].read_until
            read_until[number] = max(read_until[number], self.calls[frame].end)
        for index, number in self.makers.get(output.untyped_storage()._cdata, ()):
            self.calls[index].read_until[number] = math.inf
        events = [(0.0, 0)]
        for index, sizes in self.sizes.items():
            recorded = self.calls[index]
            for size_bytes, until in zip(sizes, recorded.read_until, strict=True):
                if until > recorded.end:
                    events += [(recorded.end, size_bytes), (until, -size_bytes)]
        held = most = 0
        for _, size_bytes in sorted(events):
            held += size_bytes
            most = max(most, held)
        most += output.numel() * output.element_size()
        return Trace(self.calls, self.readers, self.flops, sum(self.storage_bytes.values()), most)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    values = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [part for part in tree_iter(values) if isinstance(part, Tensor)]


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

    def __post_init__(self) -> None:
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._re_run = self._replacements(self.entry, None, set(), -1)

    def advance(self, entry: int) -> None:
        """Go on to the entry of a later call, keeping what the rest of the run reads."""
        if entry == self.entry:
            return
        finished = self.trace.finished(entry)
        time = self.trace.calls[entry].start
        outputs = {index: self._held(index, self.outputs[index], time) for index in finished if index in self.outputs}
        wanted = {index for index in finished if index not in self.outputs}

        def keep(index: int, output: Any) -> None:
            copied = _copied(output) if self.trace.calls[index].mutated else output
            outputs[index] = self._held(index, copied, time)

        with contextlib.suppress(_Entered), self._replacements(self.entry, keep, wanted, entry).installed():
            call(self.model, self.batch)
        self.entry, self.outputs = entry, outputs
        self._re_run = self._replacements(entry, None, set(), -1)

    def _held(self, index: int, output: Any, time: int) -> Any:
        """An output as it is held from a time on: of what nobody reads any more, only the shape."""
        parts, layout = tree_flatten(output)
        until = iter(self.trace.calls[index].read_until)
        held = [
            self._shape(part) if isinstance(part, Tensor) and next(until, math.inf) <= time else part for part in parts
        ]
        return tree_unflatten(held, layout)

    def _shape(self, tensor: Tensor) -> Tensor:
        kind = tensor.dtype, tensor.device
        if kind not in self._zeros:
            self._zeros[kind] = tensor.new_zeros(())
        return self._zeros[kind].expand(tensor.shape)

    def run(self) -> Tensor:
        """Run the model from the entry on.

        Returns:
            the output of `mpsearch.models.running.call`.
        """
        with self.entered():
            return call(self.model, self.batch)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a run of the model on the batch costs what comes from the entry on; for one run."""
        return self._re_run.installed()

    def _replacements(
        self, entry: int, keep: Callable[[int, Any], None] | None, wanted: set[int], stop: int
    ) -> "_Replacements":
        """Give the outputs of calls that have finished; hand others to `keep`; stop at a call."""
        concerned = [*self.outputs, *wanted, *([stop] if stop >= 0 else [])]
        return _Replacements(self.trace, self.outputs, self.trace.sequences(entry, concerned), keep, wanted, stop)


class _Replacements:
    """Functions in the place of `forward` of some modules, made once and put in for each run."""

    def __init__(
        self,
        trace: Trace,
        outputs: Mapping[int, Any],
        sequences: Mapping[nn.Module, Sequence[int]],
        keep: Callable[[int, Any], None] | None,
        wanted: Collection[int],
        stop: int,
    ) -> None:
        self.calls, self.outputs, self.keep, self.wanted, self.stop = trace.calls, outputs, keep, wanted, stop
        self.places: dict[nn.Module, int] = {}  # module -> how often this run has called it
        self.functions = {module: self._function(module, sequence) for module, sequence in sequences.items()}

    def _function(self, module: nn.Module, sequence: Sequence[int]) -> Callable[..., Any]:
        calls, outputs, keep, wanted, stop, places = (
            self.calls,
            self.outputs,
            self.keep,
            self.wanted,
            self.stop,
            self.places,
        )
        original = module.forward

        def replayed(*args: Any, **kwargs: Any) -> Any:
            place = places.get(module, 0)
            places[module] = place + 1
            index = sequence[place] if place < len(sequence) else -1
            if index in outputs:
                return _copied(outputs[index]) if calls[index].mutated else outputs[index]
            if index == stop and index >= 0:
                raise _Entered
            output = original(*args, **kwargs)
            if keep is not None and index in wanted:
                keep(index, output)
            return output

        return replayed

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        own = {module: vars(module)["forward"] for module in self.functions if "forward" in vars(module)}
        self.places.clear()
        try:
            for module, function in self.functions.items():
                vars(module)["forward"] = function
            yield
        finally:
            for module in self.functions:
                vars(module).pop("forward", None)
            for module, function in own.items():
                vars(module)["forward"] = function


def _copied(output: Any) -> Any:
    """An output with tensors of its own: what it is copied from is written to."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
