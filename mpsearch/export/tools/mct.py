"""Sony's Model Compression Toolkit: bit widths of graph nodes."""

import json
import os

import torch
from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted
from mpsearch.export.tracing import traced
from mpsearch.files.writing import write_atomically
from mpsearch.models.unwrapping import unwrapped

_QUANTIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def mct(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, int]:
    """Node -> weight bits, for `BitWidthConfig().set_manual_weights_bit_width(NodeNameFilter(node), bits, "weight")` (MCT 2.6).

    Its default platform has weights of 2, 4 or 8 bits and inputs of 8, and leaves no layer alone. Nodes are those of the traced
    graph, after batch norms are folded: `features.0` becomes `features_0`, or `features_0_bn` where a batch norm alone follows.

    Args:
        plan: the plan.
        model: is traced.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write it there, as JSON.

    Raises:
        ExportError: for what cannot be expressed, without a model, for a layer that the traced graph does not hold, or one that
            the plan leaves alone.
    """
    if model is None:
        raise ExportError("mct needs the model: it names the nodes of the traced graph")
    model = unwrapped(model)
    plan = fitted(plan, model, "mct", snap=snap)
    nodes: dict[str, str] = {}
    with traced("mct"):
        graph = torch.fx.symbolic_trace(model).graph
    for node in graph.nodes:
        if node.op == "call_module":
            users = [user for user in node.users if user.op == "call_module"]
            followed = len(node.users) == 1 and users and isinstance(model.get_submodule(users[0].target), _NORMS)
            nodes.setdefault(node.target, f"{node.name}_bn" if followed else node.name)
    content = {}
    for name, module in model.named_modules():
        alone = name not in plan or not plan[name].quantizes_weight
        if isinstance(module, _QUANTIZED) and name in nodes and alone:
            raise ExportError(f"mct cannot leave {name!r} alone: where nothing is said, it takes 8 bits; plan w8a8")
    for name, precision in plan.items():
        if precision.quantizes_weight:
            if name not in nodes:
                raise ExportError(f"the traced graph has no node of {name!r}")
            content[nodes[name]] = precision.weight_bits
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


MCT = Exporter("mct", mct)
