"""Latency measured on this machine with real kernels."""

import contextlib
import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import FileError, TableError
from mpsearch.files.schema import checked, parse_json
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.operand import Operand
from mpsearch.models.modules.weights import canonical, kind_of, layer_of
from mpsearch.models.running import Batch, call, check_values, device_of, preserved, samples
from mpsearch.resources.calls import CallSizes, calls_of
from mpsearch.resources.kernels import Kernel, NoKernel
from mpsearch.resources.onnxruntime_kernels import onnxruntime_kernel
from mpsearch.resources.resource import Resource, ResourceCapabilities
from mpsearch.resources.torch_kernels import torch_kernel
from mpsearch.resources.torchao_kernels import torchao_kernel

#: Engine -> `kernel(module, input, precision)`.
_ENGINES = {"torch": torch_kernel, "torchao": torchao_kernel, "onnxruntime": onnxruntime_kernel}


@dataclass(frozen=True)
class Timing:
    """One kernel at one shape.

    Attributes:
        least_s: the fastest of all rounds: what the work takes when nothing disturbs it.
        spread_s: median less the fastest: how much was disturbed.
    """

    least_s: float
    spread_s: float


@dataclass(frozen=True)
class MeasuredLatency:
    """Seconds for one sample, each layer at the shapes and in the batch of the example, with the kernels that are installed.

    The precisions of a layer are timed in turns, round after round, so that a disturbance meets all of them, and the fastest round of
    each counts; one thread on the CPU is timed by its processor time, so that other programs count for nothing. What no kernel runs is
    nan: not allowed. Conversions from and to the dtype of the model are part of a kernel, so layers add up. `fixed` is what is left of
    the time of the whole model, unquantized, when its layers are taken away (0 for `onnxruntime`, which runs layers alone).

    Timings are kept in a file by device, versions, threads, engine, layer shape and precision, and are not taken again.

    Attributes:
        engine: `torch`, `torchao` or `onnxruntime`; `mpsearch.resources.<engine>_kernels` tells what each runs.
        threads: that the kernels may use.
        rounds: of timing, after one to warm up.
        cache: the file; None keeps nothing.

    >>> from mpsearch import layers, precisions
    >>> model, row = nn.Sequential(nn.Linear(64, 64)), torch.ones(1, 64)
    >>> resource = MeasuredLatency(cache=None, rounds=2)(model, layers(model, row), precisions("w3 w16"), example=row)
    >>> bool(np.isnan(resource.usage[0, 0])), bool(resource.usage[0, 1] > 0)
    (True, True)
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(
        unit="s", column="latency_s", example=True, measured=True, reference="plan"
    )

    engine: Literal["torch", "torchao", "onnxruntime"] = "torch"
    threads: int = 1
    rounds: int = 30
    cache: str | Path | None = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "mpsearch" / "latency.json"

    def __post_init__(self) -> None:
        if self.engine not in _ENGINES:
            raise TableError(f"engine {self.engine!r}, expected one of {', '.join(_ENGINES)}")
        if self.threads < 1 or self.rounds < 1:
            raise TableError(f"{self.threads} threads and {self.rounds} rounds, expected at least one of each")

    def __call__(
        self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision], *, example: Batch
    ) -> Resource:
        """Measure; see `Resource`. `reference` is the unquantized model.

        Raises:
            TableError: where no kernel runs a layer at any precision, with the reason of each.
            EstimatorError: for a model without weights.
        """
        check_values(model)
        calls = calls_of(model, [layer.name for layer in layers], example)
        count = samples(example)
        columns = list(dict.fromkeys([*precisions, Precision("16")]))
        known = _read(self.cache)
        timings: dict[str, Timing] = {}
        reasons: dict[str, str] = {}
        with preserved(model), torch.no_grad(), _threads(self.threads):
            work = {
                (layer.name, one): (_timed(layer_of(model, layer.name)), one)
                for layer in layers
                for one in calls[layer.name]
                if not layer.is_cache
            }
            for module, one in work.values():
                keys = {self._key(module, one, precision): precision for precision in columns}
                timings |= {key: known[key] for key in keys if key in known}
                missing = {key: precision for key, precision in keys.items() if key not in timings}
                kernels, refused = self._kernels(module, one, missing)
                reasons |= refused
                timings |= time_in_turns(kernels, self.rounds, device_of(model))
            seconds = np.array(
                [
                    [_of_cache(one) for one in columns]
                    if layer.is_cache
                    else [
                        self._sum(_timed(layer_of(model, layer.name)), calls[layer.name], one, timings)
                        for one in columns
                    ]
                    for layer in layers
                ]
            )
            of_options = seconds[:, [columns.index(one) for one in precisions]]
            for layer, row in zip(layers, of_options, strict=True):
                if np.isnan(row).all() and layer.is_cache:
                    raise TableError(
                        f"latency_s of cache {layer.name!r}: nothing installed runs one in few bits; add w16"
                    )
                if np.isnan(row).all():
                    module, one = _timed(layer_of(model, layer.name)), calls[layer.name][0]
                    refusals = dict.fromkeys(reasons.get(self._key(module, one, p), "") for p in precisions)
                    raise TableError(f"latency_s of layer {layer.name!r}: no kernel runs it: {'; '.join(refusals)}")
            plain = float(seconds[:, columns.index(Precision("16"))].sum())
            rest = max(self._whole(model, example) - plain, 0.0) if self.engine != "onnxruntime" else 0.0
        if self.cache is not None and timings.keys() - known.keys():
            _write(self.cache, timings)
        return Resource(of_options / count, rest / count, (plain + rest) / count)

    def _kernels(
        self, module: nn.Module, sizes: CallSizes, missing: dict[str, Precision]
    ) -> tuple[dict[str, Kernel], dict[str, str]]:
        """Kernels by key, and the reasons where there is none."""
        if not missing:
            return {}, {}
        if isinstance(module, Operand):
            return {}, dict.fromkeys(missing, "it is no layer of torch")
        x = _input(module, sizes)
        kernels, refused = {}, {}
        for key, precision in missing.items():
            try:
                kernels[key] = _ENGINES[self.engine](module, x, precision)
            except NoKernel as error:
                refused[key] = str(error)
        return kernels, refused

    def _sum(
        self, module: nn.Module, calls: list[CallSizes], precision: Precision, timings: dict[str, Timing]
    ) -> float:
        keys = [self._key(module, sizes, precision) for sizes in calls]
        return math.fsum(timings[key].least_s if key in timings else math.nan for key in keys)

    def _key(self, module: nn.Module, sizes: CallSizes, precision: Precision) -> str:
        """What a timing depends on."""
        settings = [
            f"{name}={getattr(module, name)}"
            for name in ("stride", "padding", "dilation", "groups", "output_padding")
            if hasattr(module, name)
        ]
        shape = "x".join(map(str, canonical(module).shape))
        bias = "" if getattr(module, "bias", None) is None else " bias"
        return (
            f"{_machine(module)} | {self.engine} {_version(self.engine)} | {self.threads} threads | {kind_of(module)} {shape}"
            f"{bias} {' '.join(settings)} | {'x'.join(map(str, sizes.shape))} {sizes.dtype} | {precision}"
        )

    def _whole(self, model: nn.Module, example: Batch) -> float:
        """Seconds of one run of the unquantized model; not kept, since a model has no name."""
        return time_in_turns({"": lambda: call(model, example)}, self.rounds, device_of(model))[""].least_s


def _timed(module: nn.Module) -> nn.Module:
    """What is timed for a layer: for a parameter that functions read, a layer of its shape."""
    return (module.plain or module) if isinstance(module, Operand) else module


def _of_cache(precision: Precision) -> float:
    """Attention is part of the rest of the model, where its cache is left alone; else no kernel reads it."""
    return math.nan if precision.quantizes_weight else 0.0


def _input(module: nn.Module, sizes: CallSizes) -> Tensor:
    """An input of the shape and dtype of a call."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    if sizes.dtype.is_floating_point:
        return torch.randn(sizes.shape, generator=generator).to(device, sizes.dtype)
    assert isinstance(module, nn.Embedding)
    return torch.randint(module.num_embeddings, sizes.shape, generator=generator).to(device, sizes.dtype)


def time_in_turns(kernels: dict[str, Kernel], rounds: int, device: torch.device) -> dict[str, Timing]:
    """The kernels in turns; what one thread does on the CPU counts by its own clock, which stands still while others have the processor."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {key: [] for key in kernels}
    for number in range(rounds + 1):
        for key, kernel in kernels.items():
            start = clock()
            kernel()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first warms up
                times[key].append(clock() - start)
    return {key: Timing(min(taken), statistics.median(taken) - min(taken)) for key, taken in times.items()}


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(module: nn.Module) -> str:
    """Name of the processor, or of the graphics card, that holds a module."""
    device = next(module.parameters()).device
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return _processor()


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def _version(engine: str) -> str:
    try:
        return metadata.version(engine) + ("" if engine == "torch" else f", torch {torch.__version__}")
    except metadata.PackageNotFoundError:
        return "missing"


def _read(path: str | Path | None) -> dict[str, Timing]:
    if path is None or not Path(path).expanduser().is_file():
        return {}
    try:
        return checked(parse_json(Path(path).expanduser().read_bytes()), dict[str, Timing])
    except FileError as error:
        raise TableError(f"{path} is no file of timings ({error}); delete it") from None


def _write(path: str | Path, timings: dict[str, Timing]) -> None:
    """Add to the file, also to what another process has added since."""
    place = Path(path).expanduser()
    place.parent.mkdir(parents=True, exist_ok=True)
    every = _read(place) | timings
    content = {key: {"least_s": timing.least_s, "spread_s": timing.spread_s} for key, timing in sorted(every.items())}
    write_atomically(place, json.dumps(content, indent=1) + "\n")
