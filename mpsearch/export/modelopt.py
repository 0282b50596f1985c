"""NVIDIA ModelOpt: its `quant_cfg`."""

import json
import os
from typing import Any

from torch import nn

from mpsearch.export.fitting import fitted
from mpsearch.export.package import package
from mpsearch.export.verification import Stored
from mpsearch.files import write_atomically
from mpsearch.modules import kind_of, weight_of
from mpsearch.plan import Plan
from mpsearch.precision import Precision
from mpsearch.quantize import RoundToNearest


def modelopt(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Configuration for `modelopt.torch.quantization.quantize(model, config, forward_loop)` (ModelOpt 0.47).

    Everything is switched off first, then one entry a quantizer by full name; the last match wins, and no two names match the same
    quantizer. Symmetric integers of 2 to 8 bits, `RoundToNearest(scale="max")`; inputs of 2 to 8 bits with one calibrated range.

    Args:
        plan: the plan.
        model: checks names and shapes.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write it there, as JSON.

    Raises:
        ExportError: for what cannot be expressed; also for 1 bit, which ModelOpt turns into nan.

    >>> modelopt(Plan({"fc": Precision("4")}))["quant_cfg"][1:]
    [{'quantizer_name': 'fc.weight_quantizer', 'cfg': {'num_bits': 4, 'axis': 0}}]
    """
    plan = fitted(plan, model, "modelopt", snap=snap)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, precision in plan.items():
        if not precision.quantizes_weight:
            continue
        scales = {"axis": 0} if precision.group_size is None else {"block_sizes": {-1: precision.group_size}}
        settings = {"num_bits": precision.weight_bits, **scales}
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": settings})
        if precision.quantizes_activation:
            settings = {"num_bits": precision.activation_bits}
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": settings})
    content = {"quant_cfg": entries, "algorithm": "max"}
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def read_modelopt(plan: Plan, model: nn.Module) -> dict[str, Stored]:
    """Quantize the model; every layer whose weight quantizer is on."""
    quantization: Any = package("modelopt.torch.quantization", "modelopt")
    originals = {name: weight_of(m).detach().clone() for name, m in model.named_modules() if kind_of(m) is not None}
    quantization.quantize(
        model, modelopt(plan, model), lambda _model: None
    )  # inputs are not calibrated to read weights
    found = {}
    for name, original in originals.items():
        layer: Any = model.get_submodule(name)
        if not getattr(getattr(layer, "weight_quantizer", None), "is_enabled", False):
            continue
        blocks = layer.weight_quantizer.block_sizes or {}
        activation = str(layer.input_quantizer.num_bits) if layer.input_quantizer.is_enabled else "16"
        precision = Precision(str(layer.weight_quantizer.num_bits), activation, blocks.get(-1))
        found[name] = Stored(
            precision,
            layer.weight_quantizer(layer.weight).detach(),
            None,
            None,
            None,
            RoundToNearest(scale="max")(original, precision),
            tolerance=1e-6 * float(original.abs().max()),
        )
    return found
