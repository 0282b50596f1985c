"""HQQ: linear layers replaced by its own, each with its bits and group size."""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted
from mpsearch.export.state_file import write_state
from mpsearch.export.verification import Stored, StoredModel, rest_bytes
from mpsearch.models.unwrapping import unwrapped


def hqq(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A copy of the model with `HQQLinear` in the place of each quantized layer (hqq 0.2.8).

    1, 2, 3, 4, 5, 6 or 8 bits in groups along the inputs (`axis=1`). Its own `AutoHQQHFModel` takes one setting for layers of one name in
    all blocks; replacing them one by one does not. HQQ tunes zero-points, so it does better than rounding to nearest.

    Args:
        plan: the plan.
        model: it stays as it is.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the state of the copy there, with `torch.save`.

    Raises:
        ExportError: for what cannot be expressed.
        MissingPackage: without hqq.
    """
    if model is None:
        raise ExportError("hqq needs the model: what it makes are its layers")
    model = unwrapped(model)
    plan = fitted(plan, model, "hqq", snap=snap)
    copied = copy.deepcopy(model)
    _replace(plan, copied)
    if path is not None:
        write_state(path, copied)
    return copied


def read_hqq(plan: Plan, model: nn.Module) -> StoredModel:
    """Replace the layers, and unpack the codes of every `HQQLinear`."""
    core = package("hqq.core.quantize", "hqq")
    _replace(plan, model)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, core.HQQLinear):
            continue
        layer: Any = module
        meta = layer.meta
        bits, size = int(meta["nbits"]), int(meta["group_size"])
        groups = layer.in_features * layer.out_features // size
        codes: Tensor = core.Quantizer.unpack[meta["packing"]](layer.W_q.detach(), dtype=torch.uint8)[:groups]
        layers[name] = Stored(
            Precision(str(bits), "16", size),
            layer.dequantize().detach(),
            codes,
            sum(part.numel() * part.element_size() for part in (layer.W_q, meta["scale"], meta["zero"])),
        )
    return StoredModel(layers, rest_bytes(model.state_dict(), layers))


def _replace(plan: Plan, model: nn.Module) -> None:
    core = package("hqq.core.quantize", "hqq")
    for name, precision in plan.items():
        if precision.quantizes_weight:
            layer: Any = model.get_submodule(name)
            settings = core.BaseQuantizeConfig(nbits=precision.weight_bits, group_size=precision.group_size, axis=1)
            quantized = core.HQQLinear(
                layer, settings, compute_dtype=layer.weight.dtype, device=str(layer.weight.device), del_orig=False
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized)


HQQ = Exporter("hqq", hqq, "hqq", read_hqq, write_needs_package=True, write_values=True)
