"""llm-compressor: a recipe, whose groups are those of compressed-tensors."""

import os
from typing import Any, Literal

from torch import nn

from mpsearch.export.compressed_tensors import config_groups
from mpsearch.export.fitting import fitted
from mpsearch.export.yaml_text import yaml_text
from mpsearch.files import write_atomically
from mpsearch.plan import Plan


def llm_compressor(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    vllm: bool = True,
    modifier: Literal["QuantizationModifier", "GPTQModifier"] = "QuantizationModifier",
) -> dict[str, Any]:
    """Recipe for `llmcompressor.oneshot(model=..., recipe=path)`, by full names (llm-compressor 0.14).

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
    plan = fitted(plan, model, "llm-compressor", snap=snap, vllm=vllm)
    content = {"quant_stage": {"quant_modifiers": {modifier: config_groups(plan, model)}}}
    if path is not None:
        write_atomically(path, yaml_text(content))
    return content
