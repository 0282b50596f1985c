"""Brevitas: layers replaced by its quantized ones, each with its bits."""

import copy
import os
from typing import Any

from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted
from mpsearch.export.state_file import write_state
from mpsearch.export.verification import Stored, StoredModel
from mpsearch.models.modules.weights import kind_of, weight_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.rounding import RoundToNearest

_EXTRA = "brevitas"


def brevitas(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A copy of the model with Brevitas' layers, for further training or export to QONNX (Brevitas 0.13).

    Symmetric integers of 2 to 8 bits with a scale an output channel, `RoundToNearest(scale="max")`; inputs of 2 to 8 bits with
    one scale that the first batches in training mode set. One bit, which it turns into nan, is refused.

    Args:
        plan: the plan.
        model: it stays as it is.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the state of the copy there, with `torch.save`.

    Raises:
        ExportError: for what cannot be expressed.
        MissingPackage: without Brevitas.
    """
    if model is None:
        raise ExportError("brevitas needs the model: what it makes are its layers")
    model = unwrapped(model)
    plan = fitted(plan, model, "brevitas", snap=snap)
    copied = _quantized(plan, copy.deepcopy(model))
    if path is not None:
        write_state(path, copied)
    return copied


def read_brevitas(plan: Plan, model: nn.Module) -> StoredModel:
    """Replace the layers; every one whose weight is quantized."""
    originals = {name: weight_of(m).detach().clone() for name, m in model.named_modules() if kind_of(m) is not None}
    layers = package("brevitas.nn", _EXTRA)
    stored_layers = {}
    for name, module in _quantized(plan, model).named_modules():
        if not isinstance(module, layers.QuantLinear | layers.QuantConv1d | layers.QuantConv2d | layers.QuantConv3d):
            continue
        layer: Any = module
        quantized = layer.quant_weight()
        activation = "16"
        if layer.input_quant.is_quant_enabled:
            activation = str(int(layer.input_quant.bit_width()))
        precision = Precision(str(int(quantized.bit_width)), activation)
        codes = quantized.int().detach()
        stored_layers[name] = Stored(
            precision,
            quantized.value.detach(),
            codes,
            None,  # kept in float
            RoundToNearest(scale="max")(originals[name], precision),
            tolerance=1e-6 * float(originals[name].abs().max()),
        )
    return StoredModel(stored_layers)


def _quantized(plan: Plan, model: nn.Module) -> nn.Module:
    layers = package("brevitas.nn", _EXTRA)
    scaled = package("brevitas.quant.scaled_int", _EXTRA)
    replace = package("brevitas.graph.quantize", _EXTRA).layerwise_quantize
    kinds = {
        nn.Linear: layers.QuantLinear,
        nn.Conv1d: layers.QuantConv1d,
        nn.Conv2d: layers.QuantConv2d,
        nn.Conv3d: layers.QuantConv3d,
    }
    names = [name for name, module in model.named_modules() if type(module) in kinds]
    for with_input in (False, True):  # a layer without an input quantizer and one with are two settings of its map
        chosen = {n for n, p in plan.items() if p.quantizes_weight and p.quantizes_activation == with_input}
        if not chosen:
            continue
        settings: dict[str, Any] = {
            "weight_quant": scaled.Int8WeightPerChannelFloat,
            "weight_bit_width": lambda _module, name: plan[name].weight_bits,
            "bias_quant": None,
            "return_quant_tensor": False,
        }
        if with_input:
            settings |= {
                "input_quant": scaled.Int8ActPerTensorFloat,
                "input_bit_width": lambda _module, name: plan[name].activation_bits,
            }
        model = replace(
            model,
            {kind: (layer, settings) for kind, layer in kinds.items()},
            name_blacklist=[name for name in names if name not in chosen],
        )
    return model


BREVITAS = Exporter("brevitas", brevitas, "brevitas", read_brevitas, write_needs_package=True, write_values=True)
