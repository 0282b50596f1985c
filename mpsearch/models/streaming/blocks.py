"""A model as a row of blocks, which are run one after the other: each is loaded once for many variants of the model."""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mpsearch.errors import EstimatorError, MpsearchError
from mpsearch.models.modules.weights import layer_of, weight_of
from mpsearch.models.running import Batch, logits_of, output_of, samples
from mpsearch.models.streaming.offloading import at_rest, broken_off, resident
from mpsearch.models.streaming.spilling import spilled

#: Hidden states that are held in memory, beyond which they lie on disk.
ROOM_BYTES = 256 * 2**20


class Variant(Protocol):
    """The model with something changed: a plan, a cell, a perturbed input.

    Attributes:
        first: the first segment that is changed; up to there it shares the run of the unchanged model.
    """

    @property
    def first(self) -> int:
        """See the class."""
        ...

    def inside(self, segment: int) -> contextlib.AbstractContextManager[object]:
        """What it changes in a segment, whose modules hold their values; asked for once a segment, behind the blocks once a batch."""
        ...


@dataclass(frozen=True, eq=False)
class Entered:
    """A batch on the threshold of the first block.

    Attributes:
        batch: the batch.
        arguments: of each block, with `_HIDDEN` in the place of the hidden state.
        outputs: shape, dtype and device of what the modules before the blocks return, in the order of their calls.
    """

    batch: Batch
    arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    outputs: Mapping[nn.Module, Sequence[Any]]


class _Place:
    """Stands in arguments where the hidden state goes."""


_HIDDEN = _Place()


class _Stopped(BaseException):
    """The last block has been reached. Not an `Exception`: models may catch those."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a model, and what comes before and behind them.

    Segment 0 is all that runs before the first block, segments 1 to K are the blocks, segment K + 1 is what runs behind the last. The
    hidden state is the one tensor that goes from block to block; other arguments are those that the model itself hands to each block, and
    do not depend on earlier blocks.

    Attributes:
        model: inside `mpsearch.models.running.preserved`.
        names: of the K blocks, in the order of their calls.
        before: modules with parameters of their own that run before the first block.
        behind: those that run behind the last.
        outputs: what each block returns, with `_HIDDEN` in the place of the hidden state.
    """

    model: nn.Module
    names: tuple[str, ...]
    before: tuple[nn.Module, ...]
    behind: tuple[nn.Module, ...]
    outputs: tuple[Any, ...]

    @property
    def number(self) -> int:
        """K, how many there are."""
        return len(self.names)

    def segment_of(self, layer: str) -> int:
        """The first segment that a change of a layer concerns.

        >>> class Stack(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.head = nn.Embedding(5, 2), nn.Linear(2, 5)
        ...         self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        ...     def forward(self, x):
        ...         x = self.embed(x)
        ...         for layer in self.layers:
        ...             x = layer(x)
        ...         return self.head(x)
        >>> blocks = blocks_of(Stack().eval(), torch.tensor([[1, 2]]))
        >>> [blocks.segment_of(name) for name in ("embed", "layers.0", "layers.1", "head")]
        [0, 1, 2, 3]
        """
        module = layer_of(self.model, layer)
        return min(self.segments_of(module if module in self._segments else weight_of(module)))

    def segments_of(self, part: nn.Module | nn.Parameter) -> Sequence[int]:
        """The segments that use a module or a weight; all where that is not known."""
        return self._segments.get(part, range(self.number + 2))

    @functools.cached_property
    def _segments(self) -> dict[nn.Module | nn.Parameter, list[int]]:
        segments: dict[nn.Module | nn.Parameter, list[int]] = {}
        for segment in range(self.number + 2):
            parts = dict.fromkeys(part for module in self.modules(segment) for part in module.modules())
            for part in parts:
                segments.setdefault(part, []).append(segment)
            for parameter in self.parameters(segment):
                segments.setdefault(parameter, []).append(segment)
        return segments

    def parameters(self, segment: int) -> list[nn.Parameter]:
        """The weights that a segment uses, those that are tied once."""
        return list(dict.fromkeys(own for module in self.modules(segment) for own in module.parameters()))

    def state_bytes(self, batches: Sequence[Batch]) -> int:
        """Bytes of the hidden states of one variant over batches, between two blocks, by those of the first batch."""
        with torch.no_grad(), self.resident(0):
            _, hidden = self.enter(batches[0])
        return math.ceil(hidden.nbytes * sum(map(samples, batches)) / max(samples(batches[0]), 1))

    def modules(self, segment: int) -> tuple[nn.Module, ...]:
        """What runs in a segment."""
        if segment == 0:
            return self.before
        if segment > self.number:
            return self.behind
        return (self._block(segment),)

    @contextlib.contextmanager
    def resident(self, segment: int) -> Iterator[None]:
        """The modules of a segment hold their values."""
        with resident(*self.modules(segment)):
            yield

    def enter(self, batch: Batch) -> tuple[Entered, Tensor]:
        """Run what comes before the blocks, as the model stands; nothing behind is run.

        Returns:
            the batch on the threshold, and its hidden state there.
        """
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: dict[nn.Module, list[Any]] = {module: [] for module in self.before}
        hidden: list[Tensor] = []

        def recorder(number: int) -> Callable[..., Any]:
            def record(*args: Any, **keywords: Any) -> Any:
                args, keywords, state = _taken_out(args, keywords, hidden[-1] if hidden else None)
                hidden.append(state)
                arguments.append((args, keywords))
                if number == self.number:
                    raise _Stopped
                return self._returned(number, state)

            return record

        def note(module: nn.Module, _args: Any, output: Any) -> None:
            outputs[module].append(tree_map(_shape_of, output))

        handles = [module.register_forward_hook(note) for module in self.before]
        forwards = {self._block(number): recorder(number) for number in range(1, self.number + 1)}
        try:
            with contextlib.suppress(_Stopped), at_rest(*forwards), _forwards(forwards):
                output_of(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
            broken_off(self.model)
        return Entered(batch, arguments, outputs), hidden[0]

    def run(self, segment: int, entered: Entered, hidden: Tensor) -> Tensor:
        """Run one block, as it stands.

        Args:
            segment: 1 to K.
            entered: the batch.
            hidden: the state in front of the block.

        Returns:
            the state behind it.

        Raises:
            EstimatorError: where it fails.
        """
        args, keywords = entered.arguments[segment - 1]
        put_in, fresh = _put_in(hidden), _Fresh()
        try:
            output = self._block(segment)(*fresh(put_in(args)), **fresh(put_in(keywords)))
        except MpsearchError:
            raise
        except Exception as error:
            raise EstimatorError(
                f"block {self.names[segment - 1]!r} fails on a state of shape {tuple(hidden.shape)}: {type(error).__name__}: {error}"
            ) from error
        return _state_of(output)

    @contextlib.contextmanager
    def behind_blocks(self, entered: Entered, hidden: Tensor) -> Iterator[None]:
        """Inside, a run of the whole model on the batch costs what comes behind the blocks: they are taken to return this state.

        Args:
            entered: the batch that is run.
            hidden: the state behind the last block.
        """

        def given(number: int) -> Callable[..., Any]:
            return lambda *_args, **_keywords: self._returned(number, hidden)

        forwards: dict[nn.Module, Callable[..., Any]] = {
            self._block(number): given(number) for number in range(1, self.number + 1)
        }
        for module, shapes in entered.outputs.items():
            forwards[module] = _repeating(shapes)
        with at_rest(*forwards), _forwards(forwards):
            yield

    def runs(
        self, batches: Sequence[Batch], variants: Sequence[Variant], room_bytes: int = ROOM_BYTES
    ) -> Iterator[tuple[int | None, int]]:
        """Run variants of the model on batches, block by block, each of which is loaded once.

        Hidden states of all variants and batches are held between blocks, in memory up to a limit and beyond it on disk.

        Args:
            batches: B batches.
            variants: V variants.
            room_bytes: of memory for hidden states.

        Yields:
            (number of the variant, or None for the model itself, number of the batch): until the next one is asked for, a run of the
            whole model on that batch gives what the variant gives, and costs what comes behind the blocks. A batch comes with the model
            itself first, then with all variants.
        """
        entered: list[Entered] = []
        with torch.no_grad(), spilled(room_bytes) as held:
            with self.resident(0):
                for number, batch in enumerate(batches):
                    threshold, held[None, number] = self.enter(batch)
                    entered.append(threshold)
                for place, variant in enumerate(variants):
                    if variant.first == 0:
                        with variant.inside(0):
                            for number, batch in enumerate(batches):
                                _, held[place, number] = self.enter(batch)
            for segment in range(1, self.number + 1):
                with self.resident(segment):
                    for place, variant in enumerate(
                        variants
                    ):  # those that depart here before the shared state is written over
                        if variant.first <= segment:
                            with variant.inside(segment):
                                for number, threshold in enumerate(entered):
                                    state = held[place if (place, number) in held else None, number]
                                    held[place, number] = self.run(segment, threshold, state)
                    for number, threshold in enumerate(entered):
                        held[None, number] = self.run(segment, threshold, held[None, number])
            last = self.number + 1
            with self.resident(last):
                for number, threshold in enumerate(entered):
                    with self.behind_blocks(threshold, held[None, number]):
                        yield None, number
                    for place, variant in enumerate(variants):
                        state = held[place if (place, number) in held else None, number]
                        with variant.inside(last), self.behind_blocks(threshold, state):
                            yield place, number
                        held.pop((place, number))
                    held.pop((None, number))

    def _block(self, segment: int) -> nn.Module:
        return self.model.get_submodule(self.names[segment - 1])

    def _returned(self, segment: int, hidden: Tensor) -> Any:
        """A hidden state as a block returns it."""
        output = self.outputs[segment - 1]
        return _put_in(hidden)(output) if isinstance(output, tuple) else hidden


def blocks_of(model: nn.Module, batch: Batch) -> Blocks | None:
    """The blocks of a model, found by one run; None where it has none that can be run one after the other.

    They are the modules of the `nn.ModuleList` that holds the most weights. Each must be called once and in order, be given what the one
    before it returned, and nothing else that depends on it. This is seen by comparing a run of the model with a run by blocks.

    Args:
        model: inside `mpsearch.models.running.preserved`.
        batch: that it is run on; a short one is enough.
    """
    lists = [
        (name, part)
        for name, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) > 1 and all(_numbers(child) for child in part)
    ]
    for name, part in sorted(lists, key=lambda pair: -_numbers(pair[1]))[:3]:
        names = tuple(f"{name}.{key}" for key in part._modules)
        blocks = _seen(model, names, batch)
        if blocks is not None:
            return blocks
    return None


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _seen(model: nn.Module, names: tuple[str, ...], batch: Batch) -> Blocks | None:
    """The blocks of these names, where they behave as such in a run."""
    order = {model.get_submodule(name): number for number, name in enumerate(names)}
    inside = {part for module in order for part in module.modules()}
    calls: list[int] = []
    state: list[Any] = [None]
    chained = [True]
    before: dict[nn.Module, None] = {}
    behind: dict[nn.Module, None] = {}
    outputs: list[Any] = []

    def called(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module not in order:
            (behind if calls else before)[module] = None
            return
        chained[0] &= order[module] == len(calls)
        if calls:
            chained[0] &= any(part is state[0] for part in (*args, *keywords.values()))
        calls.append(order[module])

    def returned(_module: nn.Module, _args: Any, output: Any) -> None:
        try:
            state[0] = _state_of(output)
        except EstimatorError:
            chained[0] = False
        outputs.append((_HIDDEN, *map(_shape_of, output[1:])) if isinstance(output, tuple | list) else _HIDDEN)

    own = [
        module
        for module in model.modules()
        if module._parameters and module not in inside and order.keys().isdisjoint(module.modules())
    ]
    handles: list[Any] = [module.register_forward_pre_hook(called, with_kwargs=True) for module in [*own, *order]]
    handles += [module.register_forward_hook(returned) for module in order]
    try:
        with torch.no_grad():
            whole = output_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not chained[0] or len(calls) != len(names):
        return None
    blocks = Blocks(
        model, names, tuple(module for module in before if module not in behind), tuple(behind), tuple(outputs)
    )
    return blocks if _agrees(blocks, batch, whole) else None


def _agrees(blocks: Blocks, batch: Batch, whole: Any) -> bool:
    """A run by blocks gives what a run of the model gives."""
    try:
        for _ in blocks.runs([batch], []):
            output = output_of(blocks.model, batch)
    except EstimatorError:  # of a model that cannot do with a state that is not its own
        return False
    expected, got = logits_of(whole), logits_of(output)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return expected.shape == got.shape and torch.allclose(got, expected, rtol=1e-6, atol=1e-6 * scale)


def _taken_out(
    args: tuple[Any, ...], keywords: dict[str, Any], state: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """The arguments of a block without its hidden state, and that.

    Args:
        args: by position.
        keywords: by name.
        state: the very tensor; of the first block the first floating-point tensor.
    """
    for place, value in enumerate(args):
        if _is_hidden(value, state):
            return (*args[:place], _HIDDEN, *args[place + 1 :]), keywords, value
    for name, value in keywords.items():
        if _is_hidden(value, state):
            return args, {**keywords, name: _HIDDEN}, value
    raise EstimatorError("a block is not given what the block before it returned")


def _is_hidden(value: Any, state: Tensor | None) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and (value is state if state is not None else value.is_floating_point())


def _put_in(hidden: Tensor) -> Callable[[Any], Any]:
    def put_in(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(hidden if part is _HIDDEN else part for part in value)
        return {name: hidden if part is _HIDDEN else part for name, part in value.items()}

    return put_in


class _Fresh:
    """Arguments with copies of the objects that a block may write to, such as a cache of keys and values; tensors are shared."""

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if type(value) is dict:
            return {name: self(part) for name, part in value.items()}
        if value is None or isinstance(value, Tensor | nn.Module | str | int | float | torch.dtype | torch.device):
            return value
        return copy.deepcopy(value)


def _state_of(output: Any) -> Tensor:
    """The hidden state in what a block returns: the tensor, or the first of several things.

    Raises:
        EstimatorError: where that is none.
    """
    state = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(state, Tensor):
        raise EstimatorError(f"a block returns {type(state).__name__}, expected a tensor")
    return state


@contextlib.contextmanager
def _forwards(functions: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other functions in the place of what modules do; their hooks rest."""
    with contextlib.ExitStack() as stack:
        for module, function in functions.items():
            if "forward" in vars(module):
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(vars(module).pop, "forward", None)
            module.forward = function
        yield


def _shape_of(value: Any) -> Any:
    """Of a tensor its shape alone, as one that takes no room."""
    return value.new_zeros(()).expand(value.shape) if isinstance(value, Tensor) else value


def _repeating(outputs: Sequence[Any]) -> Callable[..., Any]:
    place = [0]

    def repeat(*_args: Any, **_keywords: Any) -> Any:
        output = outputs[place[0] % len(outputs)]
        place[0] += 1
        return output

    return repeat
