"""llm-compressor: a recipe, whose groups are those of compressed-tensors."""

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted, group_size
from mpsearch.export.stacked_experts import layer_weights, names_apart, renamed
from mpsearch.export.tools.compressed_tensors import config_groups
from mpsearch.export.verification import Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.files.yaml_writing import yaml_text
from mpsearch.models.unwrapping import unwrapped
from mpsearch.targets.rules import rules

_EXTRA = "llm-compressor"
Modifier = Literal["QuantizationModifier", "GPTQModifier"]


def llm_compressor(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    vllm: bool = True,
    modifier: Modifier = "QuantizationModifier",
) -> dict[str, Any]:
    """Recipe for `llmcompressor.oneshot(model=..., recipe=path)`, by full names (llm-compressor 0.14).

    It takes experts in one tensor apart; those of a block that agree are one target, a pattern of their names.

    Args:
        plan: the plan.
        model: checks names and shapes; its other linear layers are listed as ignored.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the recipe there, as YAML.
        vllm: hold layers that vLLM fuses to one precision.
        modifier: rounding to nearest, or GPTQ, which needs data.

    Raises:
        ExportError: for what cannot be expressed.
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "llm-compressor", snap=snap, vllm=vllm)
    groups = config_groups(plan, model, rules("llm-compressor", vllm).fused)
    if model is not None:
        known = names_apart(model)
        for part in (*groups["config_groups"].values(), groups):
            key = "ignore" if "ignore" in part else "targets"
            part[key] = renamed(part[key], known)
    content = {"quant_stage": {"quant_modifiers": {modifier: groups}}}
    if path is not None:
        write_atomically(path, yaml_text(content))
    return content


def read_llm_compressor(plan: Plan, model: nn.Module, *, modifier: Modifier = "QuantizationModifier") -> StoredModel:
    """Save a model of transformers, let llm-compressor round it to nearest; every layer that it gave a scheme."""
    if modifier != "QuantizationModifier":
        raise ExportError(
            f"llm-compressor is verified with QuantizationModifier; {modifier} needs data, and has the same groups"
        )
    tool, tokenizers = package("llmcompressor", _EXTRA), package("tokenizers", _EXTRA)
    forward = package("compressed_tensors.quantization.lifecycle.forward", _EXTRA)
    if not hasattr(model, "save_pretrained"):
        raise ExportError("llm-compressor is verified on a model of transformers, which it loads from a folder")
    whole: Any = model
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        whole.save_pretrained(folder)
        package("transformers", _EXTRA).PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        llm_compressor(plan, model, path=folder / "recipe.yaml", vllm=False)
        compressed = tool.oneshot(model=place, recipe=str(folder / "recipe.yaml"))
    layers, apart = {}, names_apart(model)
    for name, weight in layer_weights(model).items():
        modules = [compressed.get_submodule(part) for part in apart.get(name, (name,))]
        scheme = getattr(modules[0], "quantization_scheme", None)
        if scheme is None:
            continue
        scale = torch.cat([module.weight_scale.detach() for module in modules])
        columns = weight.shape[1]
        planned = plan.layers.get(name, Precision("16"))
        activation = "16" if scheme.input_activations is None else str(scheme.input_activations.num_bits)
        size = group_size(columns // scale.shape[1], columns, planned)
        precision = Precision(str(scheme.weights.num_bits), activation, size)
        values = torch.cat(
            [
                forward.fake_quantize(m.weight.detach(), m.weight_scale.detach(), m.weight_zero_point, scheme.weights)
                for m in modules
            ]
        )
        layers[name] = Stored(
            precision,
            values,
            (values.reshape(scale.numel(), -1) / scale.reshape(-1, 1)).round(),
            None,  # kept in float until it is saved
            _rounded(weight, precision),
            tolerance=1e-6 * float(weight.abs().max()),
        )
    return StoredModel(layers)


def _rounded(weight: Tensor, precision: Precision) -> Tensor:
    """S clip(round(w / s)) with s = 2 max|w| / (2^b - 1), codes -2^(b-1) .. 2^(b-1)-1."""
    half = 1 << (precision.weight_bits - 1)
    rows = weight.reshape(-1, precision.group_size or weight.shape[1])
    scales = rows.abs().amax(1, keepdim=True) / (half - 0.5)
    return ((rows / scales).round().clamp(-half, half - 1) * scales).reshape(weight.shape)


LLM_COMPRESSOR = Exporter(
    "llm-compressor",
    llm_compressor,
    "llmcompressor",
    read_llm_compressor,
    settings={"vllm": Setting(bool, True), "modifier": Setting(Modifier, "QuantizationModifier")},
    read_settings=("modifier",),
)
