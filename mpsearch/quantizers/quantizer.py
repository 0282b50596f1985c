"""What every quantizer offers, and the one adapter that makes a quantizer of a plain function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.models.running import Batch
from mpsearch.quantizers.packing import Codes
from mpsearch.quantizers.rounding import RoundToNearest

#: Who tells the bytes of a weight: they are those of packed codes and scales; the quantizer tells its own; it tells none, and they are
#: assumed to be those of `RoundToNearest`.
BytesFrom = Literal["packed", "told", "assumed"]
#: `function(weight, precision)`: the weight after quantization and back, same shape, dtype and device; output channels come first.
WeightFunction = Callable[[Tensor, Precision], Tensor]


@runtime_checkable
class Quantizer(Protocol):
    """What turns weights and inputs into what a device will compute with, and tells what that takes.

    `Around` has all of it: a class of one's own derives from it, and says what is different. A plain function
    `quantizer(weight, precision)` is accepted by every door too. `mpsearch.testing.quantizer_checks` holds a quantizer against
    this contract.
    """

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def symmetric(self) -> bool:
        """It has no zero-points."""
        ...

    @property
    def granularity(self) -> Literal["channel", "tensor"]:
        """Where a precision has no groups: a scale for each output channel, or one for the tensor."""
        ...

    @property
    def bytes_from(self) -> BytesFrom:
        """Who tells `stored_bytes`."""
        ...

    @property
    def needs_data(self) -> bool:
        """True until `calibrated` has shown it the inputs of the layers."""
        ...

    @property
    def rounding(self) -> RoundToNearest:
        """The plain rounding at its core: of keys and values in a cache, which come while the model runs."""
        ...

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after quantization and back.

        Args:
            weight: (out, ...) output channels first.
            precision: its weight format and group size; `w16` leaves it as it is.

        Returns:
            Same shape, dtype and device.
        """
        ...

    def encoded(self, weight: Tensor, precision: Precision) -> Codes | None:
        """The same with its codes and scales, by which it is held in a fraction of the memory; None where it tells none.

        Args:
            weight: (out, ...) output channels first.
            precision: its weight format and group size, not `w16`.

        Returns:
            What `values()` of it gives is what a call gives.
        """
        ...

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """An input after quantization and back.

        Args:
            x: any shape, channels last.
            name: the format.
            low: least calibrated value; nan where no calibration data reached the layer.
            high: greatest.

        Returns:
            Same shape, dtype and device.
        """
        ...

    def of_layer(self, name: str) -> "Quantizer":
        """The quantizer of one layer; itself where all layers are alike."""
        ...

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """Bytes of what is stored of a layer's weight (its `weight_shape`, `dtype`): codes, scales, and all else it is made of again."""
        ...

    def calibrated(self, model: nn.Module, batches: Sequence[Batch]) -> "Quantizer":
        """The same with what it needs to know of the inputs; itself where it needs nothing.

        Args:
            model: the one that will be quantized, its weights as they are.
            batches: calibration data.
        """
        ...


class Around:
    """A quantizer around another one, which gets all that is not said otherwise.

    Attributes:
        quantizer: the one within.

    >>> class Doubled(Around):
    ...     def __call__(self, weight, precision):
    ...         return 2 * self.quantizer(weight, precision)
    >>> doubled = Doubled(RoundToNearest(symmetric=False))
    >>> isinstance(doubled, Quantizer), doubled.symmetric, doubled.stored_bytes(Layer("fc", "linear", (8, 4)), Precision("4"))
    (True, False, 52)
    """

    quantizer: Any

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    @property
    def name(self) -> str:
        """Of the class."""
        return type(self).__name__

    @property
    def symmetric(self) -> bool:
        """As within."""
        return bool(self.quantizer.symmetric)

    @property
    def granularity(self) -> Literal["channel", "tensor"]:
        """As within."""
        granularity: Literal["channel", "tensor"] = self.quantizer.granularity
        return granularity

    @property
    def bytes_from(self) -> BytesFrom:
        """As within."""
        bytes_from: BytesFrom = self.quantizer.bytes_from
        return bytes_from

    @property
    def needs_data(self) -> bool:
        """It looks at weights alone, where it does not say otherwise."""
        return False

    @property
    def rounding(self) -> RoundToNearest:
        """As within."""
        rounding: RoundToNearest = self.quantizer.rounding
        return rounding

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after quantization and back, as within."""
        values: Tensor = self.quantizer(weight, precision)
        return values

    def encoded(self, weight: Tensor, precision: Precision) -> Codes | None:
        """None: it tells no codes, where it does not say otherwise."""
        del weight, precision
        return None

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """An input after quantization and back, as within."""
        values: Tensor = self.quantizer.activation_values(x, name, low, high)
        return values

    def of_layer(self, name: str) -> Quantizer:
        """Itself: all layers are alike, where it does not say otherwise."""
        del name
        return self

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """Bytes of the packed weight of a layer, as within."""
        size: int = self.quantizer.stored_bytes(layer, precision)
        return size

    def calibrated(self, model: nn.Module, batches: Sequence[Batch]) -> Self:
        """Itself: it needs no data, where it does not say otherwise."""
        del model, batches
        return self


@runtime_checkable
class _TellsBytes(Protocol):
    def stored_bytes(self, layer: Layer, precision: Precision) -> int: ...


@runtime_checkable
class _RoundsInputs(Protocol):
    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor: ...


@runtime_checkable
class _DiffersByLayer(Protocol):
    def of_layer(self, name: str) -> Any: ...


@runtime_checkable
class _HasZeroPoints(Protocol):
    symmetric: bool


@runtime_checkable
class _Wraps(Protocol):
    quantizer: Any


@dataclass(frozen=True, repr=False)
class Adapted(Around):
    """A function, or an object with a part of the protocol, as a `Quantizer`: what it lacks is that of `RoundToNearest`.

    Of an object with a `quantizer` of its own that one counts; `symmetric`, `activation_values`, `of_layer` and `stored_bytes` are taken
    where they are there.

    Attributes:
        function: `function(weight, precision)`, or an object whose `of_layer(name)` is one.
        quantizer: what it is around.
    """

    function: Any
    quantizer: Quantizer

    @classmethod
    def of(cls, function: Any) -> "Adapted":
        """Of what a user gave."""
        if isinstance(function, _Wraps):
            return cls(function, checked_quantizer(function.quantizer))
        if isinstance(function, _HasZeroPoints):
            return cls(function, RoundToNearest(symmetric=bool(function.symmetric)))
        return cls(function, RoundToNearest())

    @property
    def name(self) -> str:
        """Of the class of the object."""
        return type(self.function).__name__

    @property
    def bytes_from(self) -> BytesFrom:
        """Told by the object, or assumed."""
        return "told" if isinstance(self.function, _TellsBytes) else "assumed"

    @property
    def rounding(self) -> RoundToNearest:
        """Of what it is around; the default one of a function."""
        return self.quantizer.rounding if isinstance(self.function, _Wraps) else RoundToNearest()

    def __repr__(self) -> str:
        return repr(self.function)

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """What the function returns."""
        values: Tensor = self.function(weight, precision)
        return values

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """By the object, where it rounds inputs."""
        if isinstance(self.function, _RoundsInputs):
            return self.function.activation_values(x, name, low, high)
        inner = self.quantizer if isinstance(self.function, _Wraps) else RoundToNearest()
        return inner.activation_values(x, name, low, high)

    def of_layer(self, name: str) -> Quantizer:
        """The object's for a layer, where it has one."""
        return checked_quantizer(self.function.of_layer(name)) if isinstance(self.function, _DiffersByLayer) else self

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """What the object tells, else as `RoundToNearest` with its zero-points packs them.

        Raises:
            EstimatorError: where it tells no whole number of bytes.
        """
        if not precision.quantizes_weight or not isinstance(self.function, _TellsBytes):
            return RoundToNearest(symmetric=self.symmetric).stored_bytes(layer, precision)
        return checked_bytes(self.function.stored_bytes(layer, precision), self.name)


def checked_bytes(size: Any, name: str) -> int:
    """A number of bytes that a quantizer told.

    Args:
        size: what it told.
        name: of the quantizer.

    Raises:
        EstimatorError: where that is no whole number.
    """
    try:
        whole = int(size)
    except (TypeError, ValueError, OverflowError):
        whole = -1
    if whole < 0 or whole != size:
        raise EstimatorError(f"{name}.stored_bytes returned {size!r}, expected a whole number of bytes, 0 or more")
    return whole


def checked_quantizer(quantizer: Quantizer | WeightFunction | None) -> Quantizer:
    """What is given as a quantizer; `RoundToNearest()` for None, a function in an adapter.

    Raises:
        EstimatorError: for what is neither a function nor tells those of single layers.

    >>> plain = checked_quantizer(lambda weight, precision: weight)
    >>> plain.bytes_from, plain.stored_bytes(Layer("fc", "linear", (8, 4)), Precision("4")), checked_quantizer(plain) is plain
    ('assumed', 48, True)
    """
    if quantizer is None:
        return RoundToNearest()
    if isinstance(quantizer, type) or not (callable(quantizer) or isinstance(quantizer, _DiffersByLayer)):
        raise EstimatorError(
            f"expected a quantizer, quantizer(weight, precision), got the {type(quantizer).__name__} {quantizer!r}"
        )
    return quantizer if isinstance(quantizer, Quantizer) else Adapted.of(quantizer)


def stored_bytes(quantizer: Quantizer, layer: Layer, precision: Precision) -> int:
    """Bytes of the weight of a layer as a quantizer stores it; as it is at `w16`.

    Args:
        quantizer: of the weight.
        layer: with the shape and dtype of its weight.
        precision: its weight format and group size.

    Raises:
        EstimatorError: where the format cannot hold such rows, or the quantizer tells no whole number of bytes.

    >>> stored_bytes(RoundToNearest(symmetric=False), Layer("fc", "linear", (8, 4)), Precision("4"))   # 16 + 8 x 4 + 8 / 2
    52
    """
    if not precision.quantizes_weight:
        return RoundToNearest().stored_bytes(layer, precision)
    return checked_bytes(quantizer.stored_bytes(layer, precision), quantizer.name)
