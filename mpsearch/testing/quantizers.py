"""A contract suite for quantizers, as named checks."""

import copy
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision, precisions
from mpsearch.errors import EstimatorError
from mpsearch.models.modules.weights import layer_of, weight_of
from mpsearch.quantizers.packing import group_of
from mpsearch.quantizers.quantizer import Quantizer, WeightFunction
from mpsearch.quantizers.registry import resolve_quantizer
from mpsearch.quantizers.rounding import RoundToNearest

#: Precisions of weights that every quantizer is asked for, least bits first, and what it may refuse.
_ALWAYS, _MAYBE = precisions("w2 w3 w4 w8 w4g4"), precisions("wfp4_e2m1 wmxfp4 wnf4 wbfp4 wbf16")


@dataclass(frozen=True)
class _Case:
    """A quantizer that is ready, and the layers that it is tried on."""

    quantizer: Quantizer
    model: nn.Module
    batches: list[Tensor]
    pack: Callable[[Tensor, Precision], Iterable[Tensor | bytes]] | None

    @property
    def names(self) -> tuple[str, ...]:
        return ("conv", "linear")

    def weight(self, name: str) -> Tensor:
        return weight_of(layer_of(self.model, name)).detach().clone()

    def layer(self, name: str) -> Layer:
        return Layer(name, "linear", tuple(self.weight(name).shape))

    def values(self, name: str, precision: Precision, weight: Tensor | None = None) -> Tensor | None:
        """The weight after quantization and back; None for a format that it may refuse, and does."""
        weight = self.weight(name) if weight is None else weight.clone()
        try:
            return self.quantizer.of_layer(name)(weight, precision)
        except EstimatorError as error:
            if precision in _MAYBE:
                return None
            raise AssertionError(f"{precision} is refused for a layer of {tuple(weight.shape)}: {error}") from None

    @functools.cached_property
    def cells(self) -> list[tuple[str, Precision, Tensor, Tensor]]:
        """Name, precision, weight and values of all that it takes."""
        cells = []
        for name in self.names:
            for precision in (*_ALWAYS, *_MAYBE):
                values = self.values(name, precision)
                if values is not None:
                    cells.append((name, precision, self.weight(name), values))
        return cells


def quantizer_checks(
    quantizer: Quantizer | WeightFunction | str,
    *,
    pack: Callable[[Tensor, Precision], Iterable[Tensor | bytes]] | None = None,
    idempotent: bool = True,
    no_worse_than_rounding: Literal["weights", "outputs"] | None = None,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a quantizer promises, as named checks that raise `AssertionError` with what they found.

    It is tried on a convolution and a linear layer of a small model, whose inputs it is shown where it asks for them.

    Args:
        quantizer: a name of `QUANTIZERS`, an object or a function.
        pack: `pack(weight, precision)`, the tensors and bytes that it really stores, to hold `stored_bytes` against; without it bytes are
            held against those of packed codes, or against the least that the values can be told apart in.
        idempotent: quantizing again moves a weight by no more than half of what the first time does; False where the largest
            weight is clipped each time.
        no_worse_than_rounding: it promises no more squared error than the plain rounding within, of weights or of the outputs of a layer.

    Yields:
        A name, and a function of no arguments.

    >>> for name, check in quantizer_checks("rtn"):
    ...     check()
    """
    torch_state = torch.random.get_rng_state()
    case = _case(quantizer, pack)
    torch.random.set_rng_state(torch_state)
    yield "it has the whole protocol", lambda: _protocol(case)
    yield "shape, dtype and device are kept", lambda: _shape(case)
    yield "values are finite", lambda: _finite(case)
    yield "w16 leaves a weight as it is", lambda: _left_alone(case)
    yield "the weight that came in is untouched", lambda: _untouched(case)
    yield "the same weight gives the same values, whatever the seed", lambda: _deterministic(case)
    if idempotent:
        yield "quantizing again changes little", lambda: _again(case)
    yield "more bits, less error", lambda: _error_falls(case)
    yield "the layers are those of of_layer", lambda: _layers(case)
    yield "stored bytes are those of what is stored", lambda: _bytes(case)
    yield "inputs keep shape and dtype, and are finite", lambda: _inputs(case)
    yield "equal settings have equal texts", lambda: _text(case)
    if no_worse_than_rounding is not None:
        yield "no worse than plain rounding", lambda: _no_worse(case, no_worse_than_rounding)


def _case(
    quantizer: Quantizer | WeightFunction | str, pack: Callable[[Tensor, Precision], Iterable[Tensor | bytes]] | None
) -> _Case:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(4, 8, 3))
    model.add_module("flat", nn.Flatten())
    model.add_module("linear", nn.Linear(8 * 4, 16))
    generator = torch.Generator().manual_seed(0)
    for name in ("conv", "linear"):
        weight = weight_of(layer_of(model, name))
        weight.data = torch.randn(weight.shape, generator=generator) / math.sqrt(weight[0].numel())
    batches = [
        torch.randn(16, 4, 4, 4, generator=generator) * torch.linspace(0.5, 2, 4)[:, None, None] for _ in range(2)
    ]
    return _Case(resolve_quantizer(quantizer, model, batches), model, batches, pack)


def _protocol(case: _Case) -> None:
    quantizer = case.quantizer
    assert isinstance(quantizer, Quantizer), f"{type(quantizer).__name__} lacks a part of mpsearch.Quantizer"
    assert isinstance(quantizer.name, str), f"the name is {quantizer.name!r}, expected a text"
    assert quantizer.name, "the name is empty"
    assert quantizer.symmetric in (True, False), f"symmetric is {quantizer.symmetric!r}, expected True or False"
    assert quantizer.granularity in ("channel", "tensor"), f"granularity is {quantizer.granularity!r}"
    assert quantizer.bytes_from in ("packed", "told", "assumed"), f"bytes_from is {quantizer.bytes_from!r}"
    assert isinstance(quantizer.rounding, RoundToNearest), (
        f"rounding is {quantizer.rounding!r}, expected a RoundToNearest"
    )
    assert not quantizer.needs_data, "it asks for data after it was calibrated"
    assert quantizer.calibrated(case.model, case.batches) is quantizer, "it is calibrated again when it is ready"


def _shape(case: _Case) -> None:
    for name, precision, weight, _ in case.cells:
        for dtype in (torch.float32, torch.bfloat16):
            values = case.values(name, precision, weight.to(dtype))
            assert values is not None
            assert (values.shape, values.dtype, values.device) == (weight.shape, dtype, weight.device), (
                f"{name} at {precision}: {tuple(values.shape)} {values.dtype}, expected {tuple(weight.shape)} {dtype}"
            )


def _finite(case: _Case) -> None:
    for name, precision, weight, values in case.cells:
        assert torch.isfinite(values).all(), f"{name} at {precision}: values are not finite"
        zeros = case.values(name, precision, torch.zeros_like(weight))
        assert zeros is not None
        assert torch.isfinite(zeros).all(), f"{name} at {precision}: zeros became values that are not finite"


def _left_alone(case: _Case) -> None:
    for name in case.names:
        weight = case.weight(name)
        values = case.quantizer.of_layer(name)(weight, Precision("16"))
        assert torch.equal(values, weight), (
            f"{name} at w16 is changed by up to {float((values - weight).abs().max()):.3g}"
        )


def _untouched(case: _Case) -> None:
    for name, precision, weight, _ in case.cells:
        passed = weight.clone()
        case.quantizer.of_layer(name)(passed, precision)
        assert torch.equal(passed, weight), f"{name} at {precision}: the weight itself was written to"


def _deterministic(case: _Case) -> None:
    state = torch.random.get_rng_state()
    try:
        for name, precision, _, values in case.cells:
            torch.manual_seed(7)
            before = torch.random.get_rng_state()
            again = case.values(name, precision)
            assert again is not None
            assert torch.equal(again, values), f"{name} at {precision}: other values the second time"
            assert torch.equal(before, torch.random.get_rng_state()), (
                f"{name} at {precision}: the global generator was drawn from"
            )
    finally:
        torch.random.set_rng_state(state)


def _again(case: _Case) -> None:
    for name, precision, weight, values in case.cells:
        twice = case.values(name, precision, values)
        assert twice is not None
        change, error = float((twice - values).norm()), float((values - weight).norm())
        assert change <= 0.5 * error + 1e-6 * float(weight.norm()), (
            f"{name} at {precision}: quantized again it moves by {change:.3g}, the first time by {error:.3g}"
        )


def _error_falls(case: _Case) -> None:
    for name in case.names:
        weight = case.weight(name)
        last = float("inf")
        for precision in (p for p in _ALWAYS if p.group_size is None):
            values = case.values(name, precision)
            assert values is not None
            error = float((values - weight).norm() / weight.norm())
            assert error < last, f"{name} at {precision}: a relative error of {error:.3g}, with fewer bits {last:.3g}"
            last = error
        assert last < 0.05, f"{name} at w8: a relative error of {last:.3g}, expected less than 5 %"


def _layers(case: _Case) -> None:
    for name in case.names:
        of_layer = case.quantizer.of_layer(name)
        assert isinstance(of_layer, Quantizer), (
            f"of_layer({name!r}) is a {type(of_layer).__name__}, expected a Quantizer"
        )
        facts = ("symmetric", "granularity", "bytes_from")
        for fact, own, whole in (
            (facts[0], of_layer.symmetric, case.quantizer.symmetric),
            (facts[1], of_layer.granularity, case.quantizer.granularity),
            (facts[2], of_layer.bytes_from, case.quantizer.bytes_from),
        ):
            assert own == whole, f"{fact} of layer {name!r} is {own!r}, of the quantizer {whole!r}"
        for precision in _ALWAYS:
            sizes = (
                of_layer.stored_bytes(case.layer(name), precision),
                case.quantizer.stored_bytes(case.layer(name), precision),
            )
            assert sizes[0] == sizes[1], (
                f"{name} at {precision}: {sizes[0]} bytes by of_layer, {sizes[1]} by the quantizer"
            )


def _bytes(case: _Case) -> None:
    quantizer = case.quantizer
    plain = RoundToNearest(symmetric=quantizer.symmetric, granularity=quantizer.granularity)
    for name, precision, weight, values in case.cells:
        size = quantizer.stored_bytes(case.layer(name), precision)
        assert size == int(size) >= 0, f"{name} at {precision}: {size!r} bytes, expected a whole number"
        if case.pack is not None:
            stored = sum(_size(part) for part in case.pack(weight, precision))
            assert size == stored, f"{name} at {precision}: {size} bytes are told, {stored} are packed"
            continue
        packed = plain.codes(values, precision).pack()
        if quantizer.bytes_from == "packed":
            assert size == packed.nbytes, f"{name} at {precision}: {size} bytes are told, {packed.nbytes} are packed"
            continue
        least, why = _least_bytes(values, precision, quantizer), "their codes alone take"
        if torch.equal(packed.unpack(tuple(values.shape)), values):
            least, why = packed.nbytes, "packed codes and scales of these values take"
        assert size >= least, f"{name} at {precision}: {size} bytes are told, {why} {least}"
    for name in case.names:
        whole = case.weight(name).numel() * 4
        size = quantizer.stored_bytes(case.layer(name), Precision("16"))
        assert size == whole, f"{name} at w16: {size} bytes are told, the weight has {whole}"


def _size(part: Tensor | bytes) -> int:
    return len(part) if isinstance(part, bytes | bytearray) else part.nbytes


def _least_bytes(values: Tensor, precision: Precision, quantizer: Quantizer) -> int:
    """Whole bytes of codes that tell the values under one scale apart, were every scale free."""
    rows = values.reshape(1 if quantizer.granularity == "tensor" else len(values), -1)
    size = group_of(precision) or rows.shape[1]
    parts = [part for row in rows for part in row.split(size)]
    least: int = math.ceil(sum(part.numel() * math.ceil(math.log2(max(1, len(part.unique())))) for part in parts) / 8)
    return least


def _inputs(case: _Case) -> None:
    generator = torch.Generator().manual_seed(1)
    taken = []
    for name, channels in (("conv", 4), ("linear", 32)):
        of_layer = case.quantizer.of_layer(name)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, 5, channels, generator=generator).to(dtype)
            for text in ("8", "mxfp8"):
                before = x.clone()
                try:
                    values = of_layer.activation_values(x, text, float(x.min()), float(x.max()))
                except EstimatorError:
                    continue
                taken.append(text)
                assert (values.shape, values.dtype) == (x.shape, dtype), (
                    f"inputs of {name} at a{text}: {tuple(values.shape)} {values.dtype}, expected {tuple(x.shape)} {dtype}"
                )
                assert torch.isfinite(values).all(), f"inputs of {name} at a{text} are not finite"
                assert torch.equal(x, before), f"inputs of {name} at a{text} were written to"
                error = float((values - x).float().norm() / x.float().norm())
                assert error < 0.2, (
                    f"inputs of {name} at a{text}: a relative error of {error:.3g}, expected less than 20 %"
                )
            empty = x[:0]
            assert of_layer.activation_values(empty, "mxfp8", math.nan, math.nan).shape == empty.shape
    assert taken, "no format of inputs is taken, neither 8 nor mxfp8"


def _text(case: _Case) -> None:
    """What tables and results know a quantizer by."""
    text, other = (re.sub(r" at 0x\w+", "", repr(q)) for q in (case.quantizer, copy.deepcopy(case.quantizer)))
    assert other == text, f"a copy of {text} is printed as {other}"


def _no_worse(case: _Case, of: Literal["weights", "outputs"]) -> None:
    captured: dict[str, Tensor] = {}
    modules = {name: layer_of(case.model, name) for name in case.names}
    handles = [
        module.register_forward_hook(lambda _module, args, _output, name=name: captured.update({name: args[0]}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        case.model(torch.cat(case.batches))
    for handle in handles:
        handle.remove()

    def error(name: str, values: Tensor, weight: Tensor) -> float:
        if of == "weights":
            return float((values - weight).double().square().sum())
        change = (values - weight).double()
        x = captured[name].double()
        out = nn.functional.conv2d(x, change) if change.ndim == 4 else x @ change.T
        return float(out.square().sum())

    for name, precision, weight, values in case.cells:
        plain = case.quantizer.rounding(weight, precision)
        own, limit = error(name, values, weight), error(name, plain, weight)
        assert own <= limit * (1 + 1e-6), (
            f"{name} at {precision}: a squared error of {of} of {own:.5g}, plain rounding {limit:.5g}"
        )
