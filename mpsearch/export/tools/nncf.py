"""NNCF: passes of `compress_weights`, one a precision."""

import json
import os
from typing import Any

import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted, group_size
from mpsearch.export.tools.pt2e import arguments
from mpsearch.export.tracing import traced
from mpsearch.export.verification import Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.running import Batch
from mpsearch.models.unwrapping import unwrapped

_EXTRA = "nncf"
_COMPRESSIBLE = ("MatMul", "Gather", "Convolution", "GroupConvolution")
#: Element types of compressed constants -> bits.
ELEMENTS = {"u2": "2", "u3": "3", "u4": "4", "i4": "4", "u8": "8", "i8": "8"}


def nncf(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Passes for an OpenVINO model, in order: the layers, and keywords of `compress_weights` (NNCF 3.4).

    NNCF has no map from layer to bits. Each pass is `compress_weights(model, mode=CompressWeightsMode(mode), group_size=group_size,
    all_layers=all_layers, ignored_scope=IgnoredScope(names=...))` with the nodes of all layers that it does not list; the node of a
    layer is `__module.<layer>/aten::linear/MatMul`. 3 bits come last, in one pass: after it no other runs. 2 and 3 bits exist for OpenVINO
    models alone.

    Args:
        plan: the plan.
        model: checks names and shapes.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the passes there, as JSON.

    Raises:
        ExportError: for what cannot be expressed, among it two group sizes at 3 bits.

    >>> for step in nncf(Plan({"a": Precision("4", "16", 32), "b": Precision("8")})):
    ...     print(step)
    {'layers': ['b'], 'mode': 'int8_sym', 'group_size': None, 'all_layers': None}
    {'layers': ['a'], 'mode': 'int4_sym', 'group_size': 32, 'all_layers': True}
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "nncf", snap=snap)
    chosen = {precision for precision in plan.values() if precision.quantizes_weight}
    sizes = sorted(str(precision) for precision in chosen if precision.weight == "3")
    if len(sizes) > 1:
        raise ExportError(f"nncf takes one pass with 3 bits, the plan has {' and '.join(sizes)}: agree on a group size")
    passes = [
        {
            "layers": [name for name in plan if plan[name] == precision],
            "mode": f"int{precision.weight}_sym",
            "group_size": None if precision.weight == "8" else precision.group_size or -1,
            "all_layers": None if precision.weight == "8" else True,
        }
        for precision in sorted(chosen, key=_order)
    ]
    if path is not None:
        write_atomically(path, json.dumps(passes, indent=1) + "\n")
    return passes


def read_nncf(plan: Plan, model: nn.Module, *, example: Batch) -> StoredModel:
    """Convert the model to OpenVINO, run the passes, and let its kernels unpack every constant of few bits."""
    openvino, tool = package("openvino", _EXTRA), package("nncf", _EXTRA)
    with traced("nncf"):
        graph = openvino.convert_model(model, example_input=arguments(example, model))
    for step in nncf(plan, model):
        graph = _compressed(tool, graph, **step)
    constants = {op.get_friendly_name(): op for op in graph.get_ops() if op.get_type_name() == "Constant"}
    layers = {}
    for name, module in model.named_modules():
        constant = constants.get(f"self.{name}.weight")
        element = constant and constant.get_element_type().get_type_name()
        if constant is None or element not in ELEMENTS:
            continue
        weight, bits = weight_of(module).detach(), ELEMENTS[element]
        scale, zero = constants[f"self.{name}.weight/scale"], constants.get(f"self.{name}.weight/zero_point")
        codes = torch.from_numpy(_computed(openvino, _user(constant)))
        scales = torch.from_numpy(scale.data).to(weight.dtype)
        zeros = 0 if zero is None else torch.from_numpy(_computed(openvino, _user(zero))).to(weight.dtype)
        size = weight.shape[1] if codes.ndim == 2 else codes.shape[2]
        planned = plan.layers.get(name, Precision("16"))
        layers[name] = Stored(
            Precision(bits, "16", group_size(size, weight.shape[1], planned)),
            ((codes.to(weight.dtype) - zeros) * scales).reshape(weight.shape),
            codes,
            sum(part.data.nbytes for part in (constant, scale, zero) if part is not None),
        )
    return StoredModel(layers)


def _compressed(
    tool: Any, graph: Any, layers: list[str], mode: str, group_size: int | None, all_layers: bool | None
) -> Any:
    """One pass."""
    wanted = {f"__module.{name}/aten::linear/MatMul" for name in layers}
    nodes = {op.get_friendly_name() for op in graph.get_ops() if op.get_type_name() in _COMPRESSIBLE}
    if wanted - nodes:
        raise ExportError(f"the converted graph has no node {min(wanted - nodes)!r}")
    return tool.compress_weights(
        graph,
        mode=tool.CompressWeightsMode(mode),
        group_size=group_size,
        all_layers=all_layers,
        ignored_scope=tool.IgnoredScope(names=sorted(nodes - wanted)),
    )


def _user(constant: Any) -> Any:
    """The node that a constant goes to."""
    return next(iter(constant.output(0).get_target_inputs())).get_node()


def _computed(openvino: Any, node: Any) -> Any:
    """What OpenVINO computes at a node that depends on constants alone."""
    return openvino.compile_model(openvino.Model([node.output(0)], []), "CPU")([])[0]


def _order(precision: Precision) -> tuple[bool, int, int]:
    return precision.weight == "3", -precision.weight_bits, precision.group_size or 0


NNCF = Exporter("nncf", nncf, "nncf", read_nncf, read_example=True)
