"""AutoRound: its `layer_config`."""

import json
import os
from typing import Any

import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.stacked_experts import layer_weights, linear_layers, names_apart
from mpsearch.export.verification import Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.data.batches import arranged
from mpsearch.models.running import Batch, inputs_of
from mpsearch.models.unwrapping import unwrapped


def auto_round(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    vllm: bool = True,
) -> dict[str, dict[str, Any]]:
    """`layer_config` of `auto_round.AutoRound`, by full names (auto-round 0.16).

    Names are not escaped: AutoRound escapes them itself. Layers of the model that the plan leaves alone are set to 16 bits. It takes
    experts in one tensor apart, gate and up too.

    Args:
        plan: the plan.
        model: checks names and shapes; its other linear layers are listed at 16 bits.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write it there, as JSON.
        vllm: hold layers that vLLM fuses to one precision.

    Returns:
        Layer -> `bits` (2 to 8, or 16), `group_size` (-1 = a scale a channel), `sym`.

    Raises:
        ExportError: for what cannot be expressed; also for `lm_head`, which AutoRound reports at its bits but writes in float, and for
            rows or columns that are no multiple of 32, whose layers it sets to 16 bits.

    >>> from mpsearch import Precision
    >>> auto_round(Plan({"fc": Precision("4", "16", 32), "out": Precision("16")}))
    {'fc': {'bits': 4, 'group_size': 32, 'sym': True}, 'out': {'bits': 16}}
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "auto-round", snap=snap, vllm=vllm)
    content: dict[str, dict[str, Any]] = {
        name: {"bits": precision.weight_bits, "group_size": precision.group_size or -1, "sym": True}
        if precision.quantizes_weight
        else {"bits": 16}
        for name, precision in plan.items()
    }
    if model is not None:
        apart = names_apart(model)
        content |= {name: {"bits": 16} for name in linear_layers(model) if name not in plan}
        content = {part: settings for name, settings in content.items() for part in apart.get(name, (name,))}
    if path is not None:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return content


def read_auto_round(plan: Plan, model: nn.Module, *, example: Batch) -> StoredModel:
    """Round to nearest with AutoRound, without tuning; every layer that it gave bits below 16."""
    tool, tokenizers = package("auto_round", "auto-round"), package("tokenizers", "auto-round")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    weights, apart = layer_weights(model), names_apart(model)
    originals = {name: weights[name].clone() for name in linear_layers(model)}
    rounding = tool.AutoRound(
        model,
        package("transformers", "auto-round").PreTrainedTokenizerFast(tokenizer_object=words),
        layer_config=auto_round(plan, model, vllm=False),
        iters=0,
        disable_opt_rtn=True,
        dataset=[inputs_of(arranged(example, model))],
        device_map="cpu",
    )
    quantized, _ = rounding.quantize()
    stored_layers = {}
    for name, original in originals.items():
        layers = [quantized.get_submodule(part) for part in apart.get(name, (name,))]
        if getattr(layers[0], "bits", 16) >= 16:
            continue
        size = layers[0].group_size if layers[0].group_size > 0 else None
        values = torch.cat([layer.weight.detach() for layer in layers]).to(original.dtype)
        scales = torch.cat([layer.scale.reshape(-1, 1) for layer in layers]).to(original.dtype)
        stored_layers[name] = Stored(
            Precision(str(layers[0].bits), "16", size),
            values,
            (values.reshape(len(scales), -1) / scales).round(),
            None,  # kept in float until it is saved
        )
    return StoredModel(stored_layers)


AUTO_ROUND = Exporter(
    "auto-round", auto_round, "auto-round", read_auto_round, settings={"vllm": Setting(bool, True)}, read_example=True
)
