"""Optimum Quanto: its quantization map."""

import json
import os

from torch import nn

from mpsearch.export.fitting import fitted
from mpsearch.files import write_atomically
from mpsearch.plan import Plan


def quanto(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, str]]:
    """Layer -> `weights`, `activations`: the map that `quantization_map(model)` returns and `requantize` reads (quanto 0.2.7).

    To carry it out: `quantize(model, weights=qtypes[entry["weights"]], include=[layer])` for each layer, then `freeze(model)`. Quanto
    has no choice of group size: 2 and 4 bits come in groups of 128, 8 bits with a scale an output channel.

    Args:
        plan: the plan.
        model: checks names and shapes.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the map there, as JSON.

    Raises:
        ExportError: for what cannot be expressed.

    >>> from mpsearch import Precision
    >>> quanto(Plan({"fc": Precision("4", "16", 128), "out": Precision("16")}))
    {'fc': {'weights': 'qint4', 'activations': 'none'}}
    """
    plan = fitted(plan, model, "quanto", snap=snap)
    content = {
        name: {"weights": f"qint{precision.weight}", "activations": "none"}
        for name, precision in plan.items()
        if precision.quantizes_weight
    }
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content
