"""NNCF: passes of `compress_weights`, one a precision."""

import json
import os
from typing import Any

from torch import nn

from mpsearch.export.fitting import fitted
from mpsearch.files import write_atomically
from mpsearch.plan import Plan
from mpsearch.precision import Precision


def nncf(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> list[dict[str, Any]]:
    """Passes for an OpenVINO model, in order: `mode`, `group_size` and the layers to compress; all others are ignored (NNCF 3.4).

    NNCF has no map from layer to bits. Each pass is `compress_weights(model, mode=CompressWeightsMode(mode), group_size=group_size,
    all_layers=True, ignored_scope=IgnoredScope(names=...))` with the nodes of the layers that it does not list; the node of a layer is
    `__module.<layer>/aten::linear/MatMul`. 3 bits come last: after them no other pass runs. 2 and 3 bits exist for OpenVINO models alone.

    Args:
        plan: the plan.
        model: checks names and shapes.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the passes there, as JSON.

    Raises:
        ExportError: for what cannot be expressed.

    >>> nncf(Plan({"a": Precision("4", "16", 32), "b": Precision("8")}))
    [{'mode': 'int8_sym', 'group_size': -1, 'layers': ['b']}, {'mode': 'int4_sym', 'group_size': 32, 'layers': ['a']}]
    """
    plan = fitted(plan, model, "nncf", snap=snap)
    chosen = {precision for precision in plan.values() if precision.quantizes_weight}
    passes = [
        {
            "mode": f"int{precision.weight}_sym",
            "group_size": precision.group_size or -1,
            "layers": [name for name in plan if plan[name] == precision],
        }
        for precision in sorted(chosen, key=_order)
    ]
    if path is not None:
        write_atomically(path, json.dumps(passes, indent=1) + "\n")
    return passes


def _order(precision: Precision) -> tuple[bool, int, int]:
    return precision.weight == "3", -precision.weight_bits, precision.group_size or 0
