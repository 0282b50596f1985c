"""Optimum Quanto: its quantization map."""

import json
import os
from typing import Any

from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted, group_size
from mpsearch.export.verification import Stored, StoredModel, rest_bytes
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.weights import kind_of, weight_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.rounding import RoundToNearest


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
    model = unwrapped(model)
    plan = fitted(plan, model, "quanto", snap=snap)
    content = {
        name: {"weights": f"qint{precision.weight}", "activations": "none"}
        for name, precision in plan.items()
        if precision.quantizes_weight
    }
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def read_quanto(plan: Plan, model: nn.Module) -> StoredModel:
    """Quantize layer by layer and freeze; every layer whose weight became one of its tensors."""
    tool = package("optimum.quanto", "quanto")
    originals = {name: weight_of(m).detach().clone() for name, m in model.named_modules() if kind_of(m) is not None}
    for name, entry in quanto(plan, model).items():
        tool.quantize(model, weights=tool.qtypes[entry["weights"]], include=[name])
    tool.freeze(model)
    layers = {}
    for name, original in originals.items():
        weight: Any = model.get_submodule(name).weight
        if not isinstance(weight, tool.QTensor):
            continue
        bits, columns = weight.qtype.bits, original[0].numel()
        size = getattr(weight, "_group_size", None) or columns
        precision = Precision(str(bits), "16", group_size(size, columns, plan.layers.get(name, Precision("16"))))
        packed = getattr(weight._data, "_data", weight._data)
        scales = [getattr(weight, key) for key in ("_scale", "_shift") if hasattr(weight, key)]
        layers[name] = Stored(
            precision,
            weight.dequantize().detach(),
            weight._data.unpack() if bits < 8 else weight._data,
            sum(part.numel() * part.element_size() for part in (packed, *scales)),
            RoundToNearest(scale="max")(original, precision) if bits == 8 else None,
            tolerance=1e-6 * float(original.abs().max()),
        )
    return StoredModel(layers, rest_bytes(model.state_dict(), layers))


QUANTO = Exporter("quanto", quanto, "optimum-quanto", read_quanto)
