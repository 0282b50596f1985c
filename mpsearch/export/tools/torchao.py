"""torchao: a map from layer to weight-only or dynamic-activation configuration."""

import json
import os
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted, group_size
from mpsearch.export.verification import Stored, StoredModel, layer_bytes, rest_bytes
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.weights import kind_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.min_max import MinMax
from mpsearch.targets.rules import VLLM, fused_groups


def torchao(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    symmetric: bool = False,
    vllm: bool = False,
) -> Any:
    """`FqnToConfig` with one exact name a quantized layer; `quantize_(model, config, filter_fn=None)` carries it out (torchao 0.18).

    Integers of 1 to 8 bits, a scale an output channel or group; `a8` is int8 with a scale a token. torchao keeps codes of
    any width in int8. `export.MinMax` is what it does to a weight: `evaluate(..., quantizer=export.MinMax())` measures that.

    Args:
        plan: the plan.
        model: checks names, shapes and shared weights.
        snap: move what torchao cannot express to the nearest instead of refusing it.
        path: also write the configuration there, as JSON that `torchao.core.config.config_from_dict` reads.
        symmetric: no zero-points; 1 bit needs them.
        vllm: add the names of the layers that vLLM fuses (`qkv_proj`, `gate_up_proj`), which must agree.

    Returns:
        `torchao.quantization.FqnToConfig`. In transformers, `TorchAoConfig(quant_type=config, modules_to_not_convert=[],
        include_input_output_embeddings=True)`: by default that leaves `lm_head` alone.

    Raises:
        ExportError: for what torchao cannot express.
        MissingPackage: without torchao.
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "torchao", snap=snap, vllm=vllm)
    if symmetric and any(precision.weight == "1" for precision in plan.values()):
        name = next(name for name, precision in plan.items() if precision.weight == "1")
        raise ExportError(f"torchao cannot express w1 for {name!r} without zero-points: its codes would be -1 and 0")
    entries = {name: p for name, p in plan.items() if p.quantizes_weight}
    if vllm:
        entries |= {name: plan[parts[0]] for name, parts in fused_groups(plan, VLLM).items() if parts[0] in entries}
    configs = OrderedDict((name, _config(precision, symmetric)) for name, precision in entries.items())
    config = package("torchao.quantization", "torchao").FqnToConfig(configs)
    if path is not None:
        content = package("torchao.core.config", "torchao").config_to_dict(config)
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    return config


def read_torchao(plan: Plan, model: nn.Module, *, symmetric: bool = False) -> StoredModel:
    """Quantize the model with torchao; every layer whose weight became one of its tensors."""
    quantization = package("torchao.quantization", "torchao")
    originals = {name: m.weight.detach().clone() for name, m in model.named_modules() if kind_of(m) is not None}
    quantization.quantize_(model, torchao(plan, model, symmetric=symmetric), filter_fn=None)
    layers, state = {}, model.state_dict()
    for name, original in originals.items():
        weight = model.get_submodule(name).weight
        if not isinstance(weight, quantization.IntxUnpackedToInt8Tensor):
            continue
        bits = int(str(weight.target_dtype).removeprefix("torch.int"))
        group = group_size(weight.block_size[1], original.shape[1], plan.layers.get(name, Precision("16")))
        activation = "16" if weight.activation_quantization is None else "8"
        precision = Precision(str(bits), activation, group)
        layers[name] = Stored(
            precision,
            weight.dequantize(),
            weight.qdata,
            layer_bytes(state, name),
            MinMax(symmetric)(original, precision),
        )
    return StoredModel(layers, rest_bytes(state, layers))


def _config(precision: Precision, symmetric: bool) -> Any:
    quantization = package("torchao.quantization", "torchao")
    granularity = package("torchao.quantization.granularity", "torchao")
    mapping = quantization.MappingType.SYMMETRIC if symmetric else quantization.MappingType.ASYMMETRIC
    scales = granularity.PerAxis(0) if precision.group_size is None else granularity.PerGroup(precision.group_size)
    dtype = getattr(torch, f"int{precision.weight_bits}")
    if precision.quantizes_activation:
        return quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=scales, weight_mapping_type=mapping
        )
    return quantization.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=scales, mapping_type=mapping)


TORCHAO = Exporter(
    "torchao",
    torchao,
    "torchao",
    read_torchao,
    settings={"symmetric": Setting(bool, False), "vllm": Setting(bool, False)},
    read_settings=("symmetric",),
    write_needs_package=True,
)
