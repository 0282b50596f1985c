"""GPTQModel: the `dynamic` map of its quantization settings."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted, group_size
from mpsearch.export.stacked_experts import layer_weights, linear_layers, names_apart
from mpsearch.export.verification import Stored, StoredModel, rest_bytes
from mpsearch.files.writing import write_atomically
from mpsearch.models.data.batches import arranged
from mpsearch.models.running import Batch, inputs_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.targets.rules import VLLM, fused_groups

_EXTRA = "gptqmodel"


def gptqmodel(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    vllm: bool = False,
) -> dict[str, Any]:
    r"""Keywords of `gptqmodel.QuantizeConfig`: one anchored pattern a layer, the rest of the model excluded (GPTQModel 7.7).

    Patterns are disjoint, so that the order, in which the first match wins, does not matter. It takes experts in one tensor apart, gate
    and up too.

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
    model = unwrapped(model)
    plan = fitted(plan, model, "gptqmodel", snap=snap, vllm=vllm)
    quantized = {name: precision for name, precision in plan.items() if precision.quantizes_weight}
    fused = fused_groups(plan, VLLM) if vllm else {}
    joined = {whole: members for whole, members in fused.items() if members[0] in quantized}
    alone = quantized.keys() - {name for members in joined.values() for name in members}
    apart = names_apart(model) if model else {}
    dynamic: dict[str, dict[str, Any]] = {}
    for name, precision in quantized.items():
        if name in alone:
            dynamic |= {f"+:^{re.escape(part)}$": _settings(precision) for part in apart.get(name, (name,))}
    for whole, members in joined.items():
        names = [*(part for name in members for part in apart.get(name, (name,))), whole]
        dynamic[f"+:^(?:{'|'.join(re.escape(name) for name in names)})$"] = _settings(quantized[members[0]])
    every = linear_layers(model) if model else list(plan)
    left_alone = [part for name in every if name not in quantized for part in apart.get(name, (name,))]
    if vllm:  # which asks by the name of the whole
        left_alone += [whole for whole, members in fused_groups(every, VLLM).items() if members[0] not in quantized]
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in left_alone}
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


def read_gptqmodel(plan: Plan, model: nn.Module, *, example: Batch) -> StoredModel:
    """Save a model of transformers, quantize it with GPTQ on the example, and unpack every layer with packed codes."""
    tool, tokenizers = package("gptqmodel", _EXTRA), package("tokenizers", _EXTRA)
    if not hasattr(model, "save_pretrained"):
        raise ExportError("gptqmodel is verified on a model of transformers, which it loads from a folder")
    whole: Any = model
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    samples = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        for row in inputs_of(arranged(example, model))
    ]
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        package("transformers", _EXTRA).PreTrainedTokenizerFast(tokenizer_object=words, pad_token="").save_pretrained(
            folder
        )
        config = tool.QuantizeConfig(**gptqmodel(plan, model), offload_to_disk=False)
        loaded = tool.GPTQModel.load(folder, config, device="cpu", dtype=whole.dtype)
        loaded.quantize(samples, batch_size=1)
        target = Path(folder) / "quantized"
        loaded.save(target)
        loaded = tool.GPTQModel.load(target, backend=tool.BACKEND.TORCH, device="cpu", dtype=torch.float16)
    layers, apart = {}, names_apart(model)
    for name, weight in layer_weights(model).items():
        modules = [loaded.model.get_submodule(part) for part in apart.get(name, (name,))]
        if not hasattr(modules[0], "qweight"):
            continue
        groups, columns, bits = len(modules[0].scales), weight.shape[1], int(modules[0].bits)
        size = group_size(columns // groups, columns, plan.layers.get(name, Precision("16")))
        values = torch.cat([m.dequantize_weight().detach().to(weight.dtype) for m in modules], 1)  # (in, out)
        scales = torch.cat([m.scales.detach()[m.g_idx.long()].to(weight.dtype) for m in modules], 1)
        parts = [part for m in modules for part in (m.qweight, m.qzeros, m.scales, m.g_idx)]
        layers[name] = Stored(
            Precision(str(bits), "16", size),
            values.T,
            (values / scales).round(),
            sum(part.numel() * part.element_size() for part in parts),
        )
    names = {part for name in layers for part in apart.get(name, (name,))}
    return StoredModel(layers, rest_bytes(loaded.model.state_dict(), names))


def _settings(precision: Precision) -> dict[str, Any]:
    settings = {"bits": precision.weight_bits, "group_size": precision.group_size or -1, "sym": True, "desc_act": False}
    return settings if precision.group_size else {**settings, "act_group_aware": False}  # which needs groups


GPTQMODEL = Exporter(
    "gptqmodel", gptqmodel, "gptqmodel", read_gptqmodel, settings={"vllm": Setting(bool, False)}, read_example=True
)
