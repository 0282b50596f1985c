"""A model as an ONNX graph, and where its layers are in it."""

import ast
from typing import Any

import numpy as np
import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError
from mpsearch.export.tracing import traced
from mpsearch.models.data.batches import arranged
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.running import Batch, inputs_of

_OPERATORS = ("MatMul", "Gemm", "Conv")


def layer_nodes(plan: Plan, model: nn.Module, example: Batch, dynamic_shapes: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Trace a model.

    A node belongs to the innermost module of its scope, and must hold that module's weight.

    Args:
        plan: the layers to find; those that it quantizes.
        model: float32, in evaluation mode.
        example: one batch.
        dynamic_shapes: of `torch.onnx.export`.

    Returns:
        `onnx.ModelProto`, and the nodes of each layer: MatMul (weight transposed), Gemm or Conv.

    Raises:
        ExportError: for a model that cannot be traced, a layer that the graph does not hold, or weights that are not float32.
    """
    numpy_helper = package("onnx.numpy_helper", "onnxruntime")
    package("onnxscript", "onnxruntime")
    nodes: dict[str, list[Any]] = {name: [] for name, precision in plan.items() if precision.quantizes_weight}
    weights = {name: weight_of(model.get_submodule(name)).detach() for name in nodes}
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise ExportError(f"onnxruntime takes float32 weights, {name!r} has {weight.dtype}; call model.float()")
    inputs = inputs_of(arranged(example, model))
    positional = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    call: dict[str, Any] = {"kwargs": inputs} if isinstance(inputs, dict) else {"args": positional}
    with traced("onnxruntime"):
        program = torch.onnx.export(model, **call, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes)
    assert program is not None
    proto = program.model_proto
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        owner = next((name for name in reversed(ast.literal_eval(scopes)[:-1]) if name), None)
        if owner not in nodes or node.op_type not in _OPERATORS or node.input[1] not in constants:
            continue
        stored = numpy_helper.to_array(constants[node.input[1]])
        if transposed(node):
            stored = stored.T
        if not np.array_equal(stored, weights[owner].numpy()):
            raise ExportError(f"the node {node.name!r} of the traced graph does not hold the weight of {owner!r}")
        nodes[owner].append(node)
    for name, members in nodes.items():
        if not members:
            raise ExportError(
                f"the traced graph has no product with the weight of {name!r}: does the example reach it?"
            )
    return proto, nodes


def transposed(node: Any) -> bool:
    """True where the weight of a product has its output channels last."""
    return node.op_type != "Conv" and not any(a.name == "transB" and a.i for a in node.attribute)
