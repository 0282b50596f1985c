"""NVIDIA ModelOpt: its `quant_cfg`."""

import json
import os
from collections.abc import Container
from typing import Any

from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.stacked_experts import layer_weights, linear_layers
from mpsearch.export.verification import Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.experts import place_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.rounding import RoundToNearest


def modelopt(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    vllm: bool = False,
) -> dict[str, Any]:
    """Configuration for `modelopt.torch.quantization.quantize(model, config, forward_loop)` (ModelOpt 0.47).

    Everything is switched off first, then one entry a quantizer by full name; the last match wins, and no two names match the same
    quantizer. Symmetric integers of 2 to 8 bits, `RoundToNearest(scale="max")`; inputs of 2 to 8 bits with one calibrated range. Experts in
    one tensor have a quantizer each for their weights, and share one for their inputs.

    Args:
        plan: the plan.
        model: checks names and shapes.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write it there, as JSON.
        vllm: for checkpoints of `export_hf_checkpoint`, which vLLM reads: layers that are fused agree.

    Raises:
        ExportError: for what cannot be expressed; also for 1 bit, which ModelOpt turns into nan.

    >>> modelopt(Plan({"fc": Precision("4")}))["quant_cfg"][1:]
    [{'quantizer_name': 'fc.weight_quantizer', 'cfg': {'num_bits': 4, 'axis': 0}}]
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "modelopt", snap=snap, vllm=vllm)
    own = {name for name, _ in model.named_modules()} if model else set(plan)
    inputs: dict[str, str] = {}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in dict.fromkeys([*plan, *(linear_layers(model) if model else ())]):
        precision = plan.get(name, Precision("16"))
        weight_name, input_name = _quantizers(name, own)
        if inputs.setdefault(input_name, precision.activation) != precision.activation:
            widths = f"{inputs[input_name]} and {precision.activation} bits"
            raise ExportError(f"modelopt has one {input_name!r} for the experts, the plan has inputs of {widths}")
        if precision.quantizes_weight:
            scales = {"axis": 0} if precision.group_size is None else {"block_sizes": {-1: precision.group_size}}
            entries.append({"quantizer_name": weight_name, "cfg": {"num_bits": precision.weight_bits, **scales}})
    entries += [
        {"quantizer_name": name, "cfg": {"num_bits": int(bits)}} for name, bits in inputs.items() if bits != "16"
    ]
    content = {"quant_cfg": entries, "algorithm": "max"}
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def read_modelopt(plan: Plan, model: nn.Module) -> StoredModel:
    """Quantize the model; every layer whose weight quantizer is on."""
    quantization: Any = package("modelopt.torch.quantization", "modelopt")
    originals = {name: weight.clone() for name, weight in layer_weights(model).items()}
    own = {name for name, _ in model.named_modules()}
    quantization.quantize(
        model, modelopt(plan, model), lambda _model: None
    )  # inputs are not calibrated to read weights
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    layers = {}
    for name, original in originals.items():
        weight_name, input_name = _quantizers(name, own)
        if weight_name not in modules or not modules[weight_name].is_enabled:
            continue
        of_weight, of_input = modules[weight_name], modules[input_name]
        blocks = of_weight.block_sizes or {}
        activation = str(of_input.num_bits) if of_input.is_enabled else "16"
        precision = Precision(str(of_weight.num_bits), activation, blocks.get(-1))
        layers[name] = Stored(
            precision,
            of_weight(original).detach(),
            None,
            None,
            RoundToNearest(scale="max")(original, precision),
            tolerance=1e-6 * float(original.abs().max()),
        )
    return StoredModel(layers)


def _quantizers(name: str, own: Container[str]) -> tuple[str, str]:
    """Full names of the quantizers of a layer's weight and input; `own` has the names of the modules of the model."""
    place = place_of(name)
    if place is None or name in own:
        return f"{name}.weight_quantizer", f"{name}.input_quantizer"
    head = f"{place.block}.{place.part}"
    return f"{head}_weight_quantizers.{place.number}", f"{head}_input_quantizer"


MODELOPT = Exporter("modelopt", modelopt, "nvidia-modelopt", read_modelopt, settings={"vllm": Setting(bool, False)})
