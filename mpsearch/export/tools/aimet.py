"""AIMET: encodings of parameters."""

import json
import os
from typing import Any

from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.tools.pt2e import arguments
from mpsearch.export.verification import REFERENCE, Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.weights import canonical
from mpsearch.models.running import Batch
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.rounding import RoundToNearest


def aimet(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    quantizer: RoundToNearest = REFERENCE,
) -> dict[str, Any]:
    """Encodings for `QuantizationSimModel.load_encodings(path, strict=True, partial=False)`: a scale an output channel (AIMET 2.42).

    By default (`partial=True`) AIMET keeps 8 bits for all that the plan leaves alone.

    Integers of 2 to 16 bits; the scales are those of `quantizer`. An encoding holds min = s offset and max = min + (2^b - 1) s, with
    offset = -2^(b-1). That is one code more than the reference has: where a scale clips, as the default's may, AIMET's weights are
    as near or nearer; with `RoundToNearest(scale="max")`, which clips nothing, they are the same.

    Args:
        plan: the plan.
        model: its weights give the scales.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the encodings there, as JSON.
        quantizer: of the weights; symmetric, a scale a channel.

    Raises:
        ExportError: for what cannot be expressed, or without a model.
    """
    if model is None or not quantizer.symmetric or quantizer.granularity != "channel":
        raise ExportError("aimet needs the model, whose weights give the scales: symmetric, one an output channel")
    model = unwrapped(model)
    plan = fitted(plan, model, "aimet", snap=snap)
    encodings = {}
    for name, precision in plan.items():
        if not precision.quantizes_weight:
            continue
        scales = quantizer.codes(canonical(model.get_submodule(name)).detach(), precision).scales
        assert scales is not None
        least, levels = -(1 << (precision.weight_bits - 1)), (1 << precision.weight_bits) - 1
        encodings[f"{name}.weight"] = [
            {
                "bitwidth": precision.weight_bits,
                "dtype": "int",
                "is_symmetric": "True",
                "min": scale * least,
                "max": scale * (least + levels),
                "scale": scale,
                "offset": least,
            }
            for scale in scales.reshape(-1).tolist()
        ]
    content = {"version": "0.6.1", "activation_encodings": {}, "param_encodings": encodings}
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def read_aimet(plan: Plan, model: nn.Module, *, example: Batch, quantizer: RoundToNearest = REFERENCE) -> StoredModel:
    """Simulate the model, load the encodings, and let its quantizers round; every layer that has one for its weight."""
    simulated = package("aimet_torch.quantsim", "aimet").QuantizationSimModel(model, arguments(example, model))
    encodings = aimet(plan, model, quantizer=quantizer)
    simulated.load_encodings(encodings, strict=True, partial=False)
    layers = {}
    for name, module in simulated.model.named_modules():
        rounding: Any = dict(getattr(module, "param_quantizers", {})).get("weight")
        if rounding is None:
            continue
        weight = canonical(model.get_submodule(name)).detach()
        precision = Precision(str(rounding.bitwidth))
        scales = quantizer.codes(weight, precision).scales
        assert scales is not None
        scales = scales.reshape(-1, *[1] * (weight.ndim - 1)).to(weight.dtype)
        least, levels = -(1 << (rounding.bitwidth - 1)), 1 << rounding.bitwidth
        codes = (weight / scales).round().clamp(least, least + levels - 1)
        layers[name] = Stored(
            precision,
            rounding(weight).dequantize().detach(),
            codes,
            None,  # kept in float
            codes * scales,
            tolerance=1e-6 * float(weight.abs().max()),
        )
    return StoredModel(layers)


AIMET = Exporter(
    "aimet",
    aimet,
    "aimet-torch",
    read_aimet,
    settings={"quantizer": Setting(RoundToNearest, REFERENCE)},
    read_settings=("quantizer",),
    read_example=True,
    write_values=True,
)
