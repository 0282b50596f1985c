"""ExLlamaV3: the recipe of its converter."""

import os
from typing import Any

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted
from mpsearch.files.writing import write_atomically
from mpsearch.files.yaml_writing import yaml_text
from mpsearch.models.unwrapping import unwrapped


def exllamav3(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Recipe for `convert.py -rcp recipe.yaml`: bits of each tensor by full name, the output layer apart (ExLlamaV3 1.6).

    Its trellis codes have 1 to 8 bits a weight and no groups. Every linear layer but the output must have an entry; 16 leaves it alone.

    Args:
        plan: the plan.
        model: checks names; its other linear layers are listed at 16 bits, and its shapes tell the average.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the recipe there, as YAML.

    Returns:
        `target_bpw`, the average over the tensors; `head_bits`; `tensors`.

    Raises:
        ExportError: for what cannot be expressed, or without a model.
    """
    if model is None:
        raise ExportError("exllamav3 needs the model: the recipe names every linear layer, and the average bits")
    model = unwrapped(model)
    plan = fitted(plan, model, "exllamav3", snap=snap)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    bits = {name: plan[name].weight_bits if name in plan else 16 for name in linear}
    head = bits.pop("lm_head", 16)
    weights = {name: linear[name].weight.numel() for name in bits}
    average = sum(bits[name] * weights[name] for name in bits) / max(1, sum(weights.values()))
    content = {"target_bpw": round(average, 4), "head_bits": head, "tensors": bits}
    if path is not None:
        write_atomically(path, yaml_text(content))
    return content


EXLLAMAV3 = Exporter("exllamav3", exllamav3)
