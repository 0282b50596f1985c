"""ExecuTorch: a program for its runtime, by way of PyTorch 2 export quantization."""

import copy
import os
from typing import Any, Literal

import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.tools.pt2e import arguments, converted, stored
from mpsearch.export.verification import StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.running import Batch
from mpsearch.models.unwrapping import unwrapped

_EXTRA = "executorch"
Backend = Literal["portable", "xnnpack"]


def executorch(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    example: Batch,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    backend: Backend = "portable",
) -> bytes:
    """A `.pte` program that `executorch.runtime` runs (ExecuTorch 1.5), with the codes and ranges of `export.pt2e`.

    With its portable kernels, weights are unpacked and the rest is float: exact, and slow; the program needs its quantized operators.
    XNNPACK computes in int8, outputs rounded too. (It computes wrong outputs, without an error, where inputs alone are.)

    Args:
        plan: the plan.
        model: in evaluation mode; it stays as it is.
        example: one batch, to trace and to calibrate.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the program there.
        backend: the kernels.

    Raises:
        ExportError: for what cannot be expressed, or a model that cannot be traced.
        MissingPackage: without ExecuTorch or torchao.
    """
    if model is None:
        raise ExportError("executorch needs the model: what it writes is the model itself")
    model = unwrapped(model)
    plan = fitted(plan, model, "executorch", snap=snap)
    graph, _ = converted(plan, copy.deepcopy(model), example, backend == "xnnpack")
    program = _program(graph, arguments(example, model), backend)
    if path is not None:
        write_atomically(path, program)
    return program


def read_executorch(plan: Plan, model: nn.Module, *, example: Batch, backend: Backend = "portable") -> StoredModel:
    """Read the weights of the graph, and run the program: its output must be the graph's.

    Raises:
        ExportError: where the runtime's output is off by more than 1e-5 of its range, or 5 % where the kernels round outputs.
    """
    graph, folded = converted(plan, model, example, backend == "xnnpack")
    runtime = package("executorch.runtime", _EXTRA).Runtime.get()
    program = _program(graph, arguments(example, model), backend)  # the runtime reads it where it lies
    loaded = runtime.load_program(program)
    with torch.no_grad():
        expected = graph(*arguments(example, model))
        real = loaded.load_method("forward").execute(list(arguments(example, model)))[0].clone()
    most = 1e-5 if backend == "portable" else 0.05  # codes on the edge fall to the other side, layer after layer
    off = float((real - expected).abs().max() / (expected.max() - expected.min()))
    if not off <= most:
        raise ExportError(
            f"executorch: the program's output is off by {off:.2g} of its range, at most {most:.2g} expected"
        )
    return stored(plan, graph, folded)


def _program(graph: torch.fx.GraphModule, args: tuple[Any, ...], backend: Backend) -> bytes:
    package("executorch.kernels.quantized", _EXTRA)  # registers the operators of quantized graphs
    partitioners: list[Any] = []
    if backend == "xnnpack":
        partitioners.append(
            package("executorch.backends.xnnpack.partition.xnnpack_partitioner", _EXTRA).XnnpackPartitioner()
        )
    lower = package("executorch.exir", _EXTRA).to_edge_transform_and_lower
    exported = torch.export.export(graph, args)
    return bytes(lower(exported, partitioner=partitioners).to_executorch().buffer)


EXECUTORCH = Exporter(
    "executorch",
    executorch,
    "executorch",
    read_executorch,
    settings={"backend": Setting(Backend, "portable")},
    read_settings=("backend",),
    write_needs_package=True,
    write_example=True,
    read_example=True,
    write_values=True,
)
