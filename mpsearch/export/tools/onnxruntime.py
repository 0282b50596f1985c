"""ONNX Runtime: an ONNX model whose linear layers are products with weights of 2, 4 or 8 bits."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.onnx_graph import layer_nodes
from mpsearch.export.verification import REFERENCE, Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.running import Batch
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.int8_products import warn_of_saturation
from mpsearch.quantizers.packing import Codes
from mpsearch.quantizers.rounding import RoundToNearest

_EXTRA = "onnxruntime"


def onnxruntime(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    example: Batch,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    accuracy_level: int = 0,
    quantizer: RoundToNearest = REFERENCE,
) -> Any:
    """An ONNX model whose linear layers are MatMulNBits nodes, which `onnxruntime.InferenceSession` runs (1.31).

    Integers of 2, 4 or 8 bits in groups. The codes are those of `quantizer`, so what runs is what `evaluate` measured. A
    quantized node is called after its layer.

    Args:
        plan: the plan.
        model: in evaluation mode; it stays as it is.
        example: one batch, to trace the model.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the model there.
        dynamic_shapes: of `torch.onnx.export`; by default the shapes of the example are fixed.
        accuracy_level: of MatMulNBits; 0 computes in float, 4 rounds the inputs to int8 and is several times faster. Where this
            machine's products of weights of 8 bits are not exact, a warning says so.
        quantizer: of the weights; symmetric or not, a scale a group.

    Returns:
        `onnx.ModelProto`.

    Raises:
        ExportError: for what cannot be expressed, or a layer that the traced graph does not hold.
        MissingPackage: without onnxruntime, onnx or onnxscript.
    """
    if model is None:
        raise ExportError("onnxruntime needs the model: what it writes is the model itself")
    model = unwrapped(model)
    plan = fitted(plan, model, "onnxruntime", snap=snap, symmetric=quantizer.symmetric)
    if accuracy_level == 4:
        bytes_wide = (name for name, precision in plan.items() if precision.weight == "8")
        warn_of_saturation("onnxruntime MatMulNBits", bytes_wide, "accuracy_level=0 computes them in float")
    traced, nodes = layer_nodes(plan, model, example, dynamic_shapes)
    graph = traced.graph
    for name, members in nodes.items():
        weight = weight_of(model.get_submodule(name)).detach()
        inputs = _constants(graph, name, quantizer.codes(weight, plan[name]))
        settings = {"K": weight.shape[1], "N": weight.shape[0], "bits": plan[name].weight_bits}
        settings |= {"block_size": plan[name].group_size or weight.shape[1], "accuracy_level": accuracy_level}
        for number, traced_node in enumerate(members):
            node = traced_node if traced_node.op_type == "MatMul" else _without_bias(graph, traced_node)
            product = package("onnx.helper", _EXTRA).make_node(
                "MatMulNBits",
                [node.input[0], *inputs],
                list(node.output),
                name=f"{name}/{number}",
                domain="com.microsoft",
                **settings,
            )
            place = list(graph.node).index(node)
            graph.node.remove(node)
            graph.node.insert(place, product)
    used = {key for node in graph.node for key in node.input} | {output.name for output in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    traced.opset_import.append(package("onnx.helper", _EXTRA).make_opsetid("com.microsoft", 1))
    if path is not None:
        write_atomically(path, traced.SerializeToString())
    return traced


def read_onnxruntime(
    plan: Plan,
    model: nn.Module,
    *,
    example: Batch,
    dynamic_shapes: Any = None,
    accuracy_level: int = 0,
    quantizer: RoundToNearest = REFERENCE,
) -> StoredModel:
    """Write the model, start a session with it, and unpack the codes of every MatMulNBits node."""
    graph = onnxruntime(
        plan,
        model,
        example=example,
        dynamic_shapes=dynamic_shapes,
        accuracy_level=accuracy_level,
        quantizer=quantizer,
    )
    package("onnxruntime", _EXTRA).InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    numpy_helper = package("onnx.numpy_helper", _EXTRA)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    layers, inputs = {}, set()
    for node in graph.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        inputs.update(node.input[1:])
        name = node.name.rpartition("/")[0]
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        bits, size, rows, columns = (settings[key] for key in ("bits", "block_size", "N", "K"))
        packed, scales, *points = (constants[key] for key in node.input[1:])
        groups = columns // size
        codes = _unpacked(packed.reshape(rows, -1), bits, columns).reshape(rows, groups, size)
        zeros = _unpacked(points[0].reshape(rows, -1), bits, groups)[..., None] if points else 1 << (bits - 1)
        values = (codes - zeros) * torch.tensor(scales).reshape(rows, groups, 1)
        precision = Precision(str(bits), "16", size)
        weight = weight_of(model.get_submodule(name)).detach()
        layers[name] = Stored(
            precision,
            values.reshape(weight.shape),
            codes,
            packed.nbytes + scales.nbytes + sum(part.nbytes for part in points),
            quantizer(weight, precision),
        )
    others = [value for key, value in constants.items() if key not in inputs and value.dtype.kind not in "biu"]
    return StoredModel(
        layers, sum(value.nbytes for value in others)
    )  # whole numbers are shapes and axes, which the tracer adds


def _constants(graph: Any, name: str, codes: Codes) -> list[str]:
    """Add packed codes, scales and zero-points of a layer to the graph: their names."""
    from_array = package("onnx.numpy_helper", _EXTRA).from_array
    bits, rows = codes.precision.weight_bits, codes.weight.shape[0]
    assert codes.scales is not None
    half = 1 << (bits - 1)
    levels = (codes.rounded / codes.scales).round() + (half if codes.zeros is None else codes.zeros)
    groups = len(codes.scales) // rows
    parts = {
        "codes": _packed(levels.reshape(rows, -1), bits).reshape(rows, groups, -1),
        "scales": codes.scales.to(codes.weight.dtype).reshape(rows, groups).numpy(),
    }
    if codes.zeros is not None:
        parts["zero_points"] = _packed(codes.zeros.reshape(rows, -1), bits)
    graph.initializer.extend(from_array(value, f"{name}.{key}") for key, value in parts.items())
    return [f"{name}.{key}" for key in parts]


def _packed(codes: Tensor, bits: int) -> np.ndarray[Any, Any]:
    """Codes of each row in bytes, lowest bits first."""
    padded = functional.pad(codes, (0, -codes.shape[1] % (8 // bits))).numpy().astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(padded.reshape(len(codes), -1, 8 // bits) << shifts, axis=2))


def _unpacked(packed: np.ndarray[Any, Any], bits: int, count: int) -> Tensor:
    shifts = np.arange(0, 8, bits)
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return torch.from_numpy(codes.reshape(len(packed), -1)[:, :count].astype(np.int32))


def _without_bias(graph: Any, node: Any) -> Any:
    """A Gemm as a product, which is returned, and an addition where it has a bias."""
    helper = package("onnx.helper", _EXTRA)
    place, (output,), bias = list(graph.node).index(node), node.output, list(node.input[2:])
    product = f"{output} unbiased" if bias else output
    graph.node.remove(node)
    graph.node.insert(place, helper.make_node("MatMul", node.input[:2], [product]))
    if bias:
        graph.node.insert(place + 1, helper.make_node("Add", [product, *bias], [output]))
    return graph.node[place]


ONNXRUNTIME = Exporter(
    "onnxruntime",
    onnxruntime,
    "onnxruntime",
    read_onnxruntime,
    settings={
        "dynamic_shapes": Setting(Any, None),
        "accuracy_level": Setting(int, 0),
        "quantizer": Setting(RoundToNearest, REFERENCE),
    },
    read_settings=(
        "dynamic_shapes",
        "accuracy_level",
        "quantizer",
    ),
    write_needs_package=True,
    write_example=True,
    read_example=True,
    write_values=True,
)
