"""ONNX Runtime with quantized inputs: static QDQ by `TensorQuantOverrides`."""

import copy
import dataclasses
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.onnx_graph import layer_nodes, transposed
from mpsearch.export.verification import REFERENCE, Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.data.batches import arranged
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.running import Batch, inputs_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.int8_products import warn_of_saturation
from mpsearch.quantizers.rounding import RoundToNearest

_EXTRA = "onnxruntime"


def onnxruntime_static(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    example: Batch,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    quantizer: RoundToNearest = REFERENCE,
    reduce_range: bool = False,
) -> Any:
    """An ONNX model with quantize and dequantize nodes around its linear layers and convolutions (onnxruntime 1.31).

    Symmetric weights of 2 to 8 bits with a scale an output channel, kept in int8; inputs in uint8 with one range, calibrated on the
    example. Scales and codes are those of `quantizer`, given as overrides of each tensor.

    Args:
        plan: the plan.
        model: in evaluation mode; it stays as it is.
        example: one batch, to trace and to calibrate.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the model there.
        dynamic_shapes: of `torch.onnx.export`; by default the shapes of the example are fixed.
        quantizer: of the weights; symmetric, a scale a channel.
        reduce_range: round weights of 8 bits to 7, codes -63 .. 63: `w8a8` then does what `evaluate` measures as `w7a8`, and is
            the same on every CPU. Without it, x86 CPUs without VNNI compute such layers wrongly, unless the session's option
            `session.x64quantprecision` is `"1"`; on such a machine a warning says so.

    Returns:
        `onnx.ModelProto`.

    Raises:
        ExportError: for what cannot be expressed, or a layer that the traced graph does not hold.
        MissingPackage: without onnxruntime, onnx or onnxscript.
    """
    if model is None or not quantizer.symmetric or quantizer.granularity != "channel":
        raise ExportError(
            "onnxruntime-static needs the model, and a quantizer with symmetric codes and a scale a channel"
        )
    model = unwrapped(model)
    plan = _ranged(fitted(plan, model, "onnxruntime-static", snap=snap), reduce_range)
    tools = package("onnxruntime.quantization", _EXTRA)
    rounded = copy.deepcopy(model)
    scales = {}
    for name, precision in plan.items():
        if precision.quantizes_weight:
            weight = weight_of(rounded.get_submodule(name))
            codes = quantizer.codes(weight.detach(), precision)
            assert codes.scales is not None
            scales[name] = codes.scales.reshape(-1).numpy()
            weight.data.copy_(codes.values())  # an override sets the scale, but clips at int8 alone
    graph, nodes = layer_nodes(plan, rounded, example, dynamic_shapes)
    overrides = {}
    for name, members in nodes.items():
        for number, node in enumerate(members):
            node.name = f"{name}/{number}"
            settings = {"quant_type": tools.QuantType.QInt8, "axis": 1 if transposed(node) else 0}
            overrides[node.input[1]] = [{**settings, "scale": s, "zero_point": np.int8(0)} for s in scales[name]]
    if nodes:  # an empty list of nodes would mean all of them
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model.onnx"
            tools.quantize_static(
                graph,
                out,
                _reader(graph, inputs_of(arranged(example, model))),
                nodes_to_quantize=[node.name for members in nodes.values() for node in members],
                op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                per_channel=True,
                extra_options={"TensorQuantOverrides": overrides},
            )
            graph = package("onnx", _EXTRA).load(out)
    if path is not None:
        write_atomically(path, graph.SerializeToString())
    return graph


def read_onnxruntime_static(
    plan: Plan,
    model: nn.Module,
    *,
    example: Batch,
    dynamic_shapes: Any = None,
    quantizer: RoundToNearest = REFERENCE,
    reduce_range: bool = False,
) -> StoredModel:
    """Write the model, start a session with it, and read the dequantized weight of every product that has one."""
    proto = onnxruntime_static(
        plan, model, example=example, dynamic_shapes=dynamic_shapes, quantizer=quantizer, reduce_range=reduce_range
    )
    package("onnxruntime", _EXTRA).InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    to_array = package("onnx.numpy_helper", _EXTRA).to_array
    constants = {tensor.name: to_array(tensor) for tensor in proto.graph.initializer}
    sources = {node.output[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    layers = {}
    for node in proto.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or node.input[1] not in sources:
            continue
        name = node.name.rpartition("/")[0]
        parts = [constants[key] for key in sources[node.input[1]].input]
        codes, scales = (torch.from_numpy(part.copy()) for part in parts[:2])
        codes = codes.T if transposed(node) else codes
        weight = weight_of(model.get_submodule(name)).detach()
        values = codes * scales.reshape(-1, *[1] * (codes.ndim - 1))
        span = int(codes.max()) - int(codes.min())  # the container is int8 whatever the plan: its codes tell the bits
        wanted = plan.layers.get(name, Precision("16"))
        bits = wanted.weight if span < 1 << wanted.weight_bits else str(span.bit_length())
        precision = Precision(bits, "8" if node.input[0] in sources else "16")
        layers[name] = Stored(
            precision,
            values,
            codes,
            sum(part.nbytes for part in parts),
            quantizer(weight, _reduced(precision) if reduce_range else precision),
            tolerance=1e-6 * float(weight.abs().max()),
        )
    return StoredModel(layers)


def _ranged(plan: Plan, reduce_range: bool) -> Plan:
    """The plan as its weights are rounded; a word where this machine's products need less than 8 bits."""
    if reduce_range:
        return dataclasses.replace(plan, layers={name: _reduced(precision) for name, precision in plan.items()})
    warn_of_saturation(
        "onnxruntime",
        (name for name, precision in plan.items() if precision.quantizes_weight and precision.weight == "8"),
        "export with reduce_range=True, or set the session's option session.x64quantprecision to 1",
    )
    return plan


def _reduced(precision: Precision) -> Precision:
    return dataclasses.replace(precision, weight="7") if precision.weight == "8" else precision


def _reader(traced: Any, inputs: Any) -> Any:
    """Inputs of the model as onnxruntime reads calibration data: once."""
    if isinstance(inputs, dict):
        feeds: dict[str, Any] = inputs
    else:
        values: Iterable[Any] = inputs if isinstance(inputs, tuple | list) else (inputs,)
        feeds = {entry.name: value for entry, value in zip(traced.graph.input, values, strict=True)}
    batches = iter([{name: value.numpy() for name, value in feeds.items()}])
    base = package("onnxruntime.quantization", _EXTRA).CalibrationDataReader
    return type("Example", (base,), {"get_next": lambda _self: next(batches, None)})()


ONNXRUNTIME_STATIC = Exporter(
    "onnxruntime-static",
    onnxruntime_static,
    "onnxruntime",
    read_onnxruntime_static,
    settings={
        "dynamic_shapes": Setting(Any, None),
        "quantizer": Setting(RoundToNearest, REFERENCE),
        "reduce_range": Setting(bool, False),
    },
    read_settings=(
        "dynamic_shapes",
        "quantizer",
        "reduce_range",
    ),
    write_needs_package=True,
    write_example=True,
    read_example=True,
    write_values=True,
)
