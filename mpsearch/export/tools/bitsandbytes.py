"""bitsandbytes in transformers: one width, and the layers to skip."""

import json
import os
import re
import tempfile
from typing import Any

from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted
from mpsearch.export.verification import REFERENCE, Stored, StoredModel, rest_bytes
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.unwrapping import unwrapped


def bitsandbytes(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Keywords of `transformers.BitsAndBytesConfig`: `wnf4`, or `w8a8`, for some linear layers, none for the rest (bitsandbytes 0.50).

    Transformers matches the names to skip by their beginning and their end, so a name that would take a quantized layer along is refused.

    Args:
        plan: of one precision and `w16`.
        model: checks names; its other linear layers are skipped.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the keywords there, as JSON.

    Raises:
        ExportError: for what cannot be expressed, among it two widths in one plan.

    >>> from mpsearch import Precision
    >>> bitsandbytes(Plan({"fc": Precision("nf4"), "out": Precision("16")}))
    {'load_in_4bit': True, 'bnb_4bit_quant_type': 'nf4', 'llm_int8_skip_modules': ['out']}
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "bitsandbytes", snap=snap)
    quantized = {name: precision for name, precision in plan.items() if precision.quantizes_weight}
    widths = {precision.weight for precision in quantized.values()}
    if len(widths) > 1:
        raise ExportError(f"bitsandbytes takes one width a model, the plan has {' and '.join(sorted(widths))}")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] if model else list(plan)
    skipped = [name for name in linear if name not in quantized]
    for name in skipped:
        taken = [other for other in quantized if re.match(name, other) or other.endswith(name)]
        if taken:
            raise ExportError(f"bitsandbytes cannot skip {name!r} without {taken[0]!r}: it matches parts of names")
    kind = {"load_in_8bit": True} if widths == {"8"} else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    content = {**(kind if widths else {}), "llm_int8_skip_modules": skipped}
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def read_bitsandbytes(plan: Plan, model: nn.Module) -> StoredModel:
    """Save a model of transformers and load it with the keywords; every layer that became one of the library's."""
    layers, functional = package("bitsandbytes.nn", "bitsandbytes"), package("bitsandbytes.functional", "bitsandbytes")
    transformers = package("transformers", "bitsandbytes")
    if not hasattr(model, "save_pretrained"):
        raise ExportError("bitsandbytes is verified on a model of transformers, which loads with its settings")
    whole: Any = model
    settings = transformers.BitsAndBytesConfig(**bitsandbytes(plan, model))
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        loaded = type(whole).from_pretrained(
            folder, quantization_config=settings, dtype=whole.dtype, device_map={"": "cpu"}
        )
    stored_layers = {}
    for name, module in loaded.named_modules():
        if not isinstance(module, layers.Linear4bit | layers.Linear8bitLt):
            continue
        original, weight = weight_of(model.get_submodule(name)).detach(), module.weight
        if isinstance(module, layers.Linear4bit):
            state = weight.quant_state
            size = plan[name].group_size and state.blocksize if name in plan else state.blocksize
            precision = Precision(state.quant_type, "16", size)
            values, scales = functional.dequantize_4bit(weight.data, state), state.absmax
            expected = REFERENCE(original, precision)
        else:
            precision, scales = Precision("8", "8"), weight.SCB
            values, expected = weight.data * weight.SCB[:, None] / 127, None
        stored_layers[name] = Stored(
            precision,
            values.detach(),
            None if expected is not None else weight.data,
            weight.data.numel() * weight.data.element_size() + scales.numel() * scales.element_size(),
            expected,
            tolerance=1e-6 * float(original.abs().max()),
        )
    return StoredModel(stored_layers, rest_bytes(loaded.state_dict(), stored_layers))


BITSANDBYTES = Exporter("bitsandbytes", bitsandbytes, "bitsandbytes", read_bitsandbytes)
