"""GPTQModel: the `dynamic` map of its quantization settings."""

import json
import os
import re
from typing import Any

from torch import nn

from mpsearch.export.fitting import fitted
from mpsearch.export.targets import FUSED, fused_groups
from mpsearch.files import write_atomically
from mpsearch.plan import Plan
from mpsearch.precision import Precision


def gptqmodel(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    vllm: bool = False,
) -> dict[str, Any]:
    r"""Keywords of `gptqmodel.QuantizeConfig`: one anchored pattern a layer, the rest of the model excluded (GPTQModel 7.7).

    Patterns are disjoint, so that the order, in which the first match wins, does not matter.

    Args:
        plan: the plan.
        model: checks names and shapes; its other linear layers are excluded.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the keywords there, as JSON.
        vllm: for its reader: 4 and 8 bits, fused layers agree, and the patterns match the fused names too.

    Returns:
        `bits`, `group_size`, `sym`, `desc_act`, `lm_head`, `dynamic`; bits are 2 to 8, a group size of -1 is a scale a channel.

    Raises:
        ExportError: for what cannot be expressed.

    >>> settings = gptqmodel(Plan({"a.fc": Precision("4", "16", 32), "a.out": Precision("16")}))
    >>> settings["dynamic"]
    {'+:^a\\.fc$': {'bits': 4, 'group_size': 32, 'sym': True, 'desc_act': False}, '-:^a\\.out$': {}}
    """
    plan = fitted(plan, model, "gptqmodel-vllm" if vllm else "gptqmodel", snap=snap)
    quantized = {name: precision for name, precision in plan.items() if precision.quantizes_weight}
    fused = {part: name for name, parts in fused_groups(plan, FUSED).items() for part in parts} if vllm else {}
    dynamic: dict[str, dict[str, Any]] = {}
    for name, precision in quantized.items():
        if name not in fused:
            dynamic[f"+:^{re.escape(name)}$"] = _settings(precision)
        else:
            names = [part for part, whole in fused.items() if whole == fused[name]] + [fused[name]]
            dynamic[f"+:^(?:{'|'.join(re.escape(part) for part in names)})$"] = _settings(precision)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] if model else list(plan)
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in linear if name not in quantized}
    content = {
        "bits": 4,  # of a layer that no pattern names; there is none
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in quantized),
        "dynamic": dynamic,
    }
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def _settings(precision: Precision) -> dict[str, Any]:
    return {"bits": precision.weight_bits, "group_size": precision.group_size or -1, "sym": True, "desc_act": False}
