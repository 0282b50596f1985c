"""GGUF: a file for llama.cpp with a type for each tensor."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.stacked_experts import layer_weights
from mpsearch.export.tools.llama_quantize import tensor_name, tensor_names
from mpsearch.export.verification import REFERENCE, Stored, StoredModel
from mpsearch.files.writing import replacing
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.experts import place_of
from mpsearch.models.modules.weights import storage_of, weight_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers import ggml

_KEPT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CASTS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
#: Architectures whose queries and keys rotate by halves, as in transformers; the others keep their rows in pairs.
_HALVES = ("qwen3", "qwen3moe")


def gguf(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    architecture: str = "llama",
) -> dict[str, str]:
    """Write a model of transformers (Llama, Mixtral, Qwen3, Qwen3-MoE) as a GGUF file (gguf 0.19); without a path, only tell the types.

    The bytes are those of `RoundToNearest` at `wq4_k`, `wq8_0`, ..., so what llama.cpp runs is what `evaluate` measured. What
    the plan leaves alone keeps its dtype; norms and routers are float32. The experts of a block are one tensor a matrix, so they
    agree; gate and up are two. A vocabulary is not written: llama.cpp runs the file on token numbers, and
    its converter brings the words.

    Args:
        plan: of GGUF types.
        model: with a `config` that tells heads, sizes and the rotary base.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: of the file.
        architecture: as in `gguf.MODEL_ARCH_NAMES`: `llama` (Mixtral too), `qwen3`, `qwen3moe`.

    Returns:
        Tensor name -> type.

    Raises:
        ExportError: for what cannot be expressed, a model without `config`, or a weight that the architecture has no tensor for.
        MissingPackage: without gguf.
    """
    if model is None:
        raise ExportError("gguf needs the model: what it writes is the model itself")
    if architecture == "qwen3moe" and not _config(model).norm_topk_prob:
        raise ExportError(
            "llama.cpp scales the weights of the chosen experts to a sum of 1 in qwen3moe, and the model has norm_topk_prob=False"
        )
    model = unwrapped(model)
    plan = fitted(plan, model, "gguf", snap=snap)
    tensors = _tensors(plan, model, architecture)
    if path is not None:
        with replacing(path) as part:
            _write(part, tensors, model, architecture)
    return {name: kind for name, (kind, _) in tensors.items()}


def read_gguf(plan: Plan, model: nn.Module, *, architecture: str = "llama") -> StoredModel:
    """Write the file, and read every tensor of it that is not stored as the model stores it."""
    library = package("gguf", "gguf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf(plan, model, path=path, architecture=architecture)
        file = library.GGUFReader(path)
        by_name = {tensor.name: tensor for tensor in file.tensors}
        starts = sorted(tensor.data_offset for tensor in file.tensors)
        ends = dict(zip(starts, [*starts[1:], len(file.data)], strict=True))
        sizes = {name: ends[tensor.data_offset] - tensor.data_offset for name, tensor in by_name.items()}
        left_alone = sum(sizes.values())
        counted: set[str] = set()
        layers = {}
        for name, weight in layer_weights(model).items():
            names = tensor_names(name, architecture)
            names = tuple(
                part_name if part_name in by_name else _name_of_tied(model, name, architecture) for part_name in names
            )
            tensors = [by_name[part_name] for part_name in names]
            place = place_of(name)
            parts = [tensor.data if place is None else tensor.data[place.number] for tensor in tensors]
            kind = tensors[0].tensor_type
            format_name = {cast: known for known, cast in _CASTS.items()}.get(kind.name, kind.name.lower())
            planned = plan.layers.get(name, Precision("16"))
            if format_name == _KEPT[weight.dtype] and planned.weight != format_name:
                continue
            values = torch.from_numpy(np.concatenate([library.dequantize(part, kind) for part in parts]))
            precision = Precision(format_name)
            nbytes = (
                sum(sizes[part_name] for part_name in names) if place is None else sum(part.nbytes for part in parts)
            )
            left_alone -= 0 if place is None and names[0] in counted else nbytes
            counted.update(names)
            layers[name] = Stored(
                precision,
                _unrotated(name, values.reshape(weight.shape), model, architecture),
                None,
                nbytes,
                REFERENCE(weight, precision),
                tolerance=1e-6 * float(weight.abs().max()),
            )
        return StoredModel(layers, left_alone)


def _tensors(plan: Plan, model: nn.Module, architecture: str) -> dict[str, tuple[str, Tensor]]:
    """Tensor name -> its type and value: rows in the order of llama.cpp, experts of a block in one tensor (experts, out, in)."""
    layers = layer_weights(model)
    with decomposed(model):
        parameters = dict(model.named_parameters())  # shared weights once, as llama.cpp reads them
    tensors: dict[str, tuple[str, Tensor]] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        value = parameter.detach()
        layer, _, last = name.rpartition(".")
        if last != "weight":
            raise ExportError(f"{architecture!r} has no tensor for {name!r}")
        if layer in layers:
            precision = plan.layers.get(layer, Precision("16"))
            wanted = precision.weight if precision.quantizes_weight else _KEPT[value.dtype]
        else:
            wanted = "fp32"
        kind, names = _CASTS.get(wanted, wanted.upper()), tensor_names(layer, architecture)
        for tensor, rows in zip(names, _rotated(layer, value, model, architecture).chunk(len(names)), strict=True):
            tensors[tensor] = (kind, rows)
            if place_of(layer) is not None:
                experts.setdefault(tensor, []).append(rows)
    return tensors | {tensor: (tensors[tensor][0], torch.stack(parts)) for tensor, parts in experts.items()}


def _write(path: Path, tensors: dict[str, tuple[str, Tensor]], model: nn.Module, architecture: str) -> None:
    library = package("gguf", "gguf")
    writer = library.GGUFWriter(path, architecture)
    try:
        _describe(writer, model)
        for name, (kind, value) in tensors.items():
            data, shape = _data(value, kind)
            writer.add_tensor(name, data, raw_shape=shape, raw_dtype=library.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _name_of_tied(model: nn.Module, name: str, architecture: str) -> str:
    place = storage_of(weight_of(model.get_submodule(name)))
    return next(
        tensor_name(other.removesuffix(".weight"), architecture)
        for other, parameter in model.named_parameters()
        if storage_of(parameter) == place
    )


def _heads(name: str, model: nn.Module, architecture: str) -> int | None:
    """Heads of a projection whose rows llama.cpp keeps in pairs; None for other layers."""
    if architecture in _HALVES:
        return None
    last = name.rpartition(".")[2]
    config = _config(model)
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(last)


def _rotated(name: str, weight: Tensor, model: nn.Module, architecture: str) -> Tensor:
    heads = _heads(name, model, architecture)
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _unrotated(name: str, weight: Tensor, model: nn.Module, architecture: str) -> Tensor:
    heads = _heads(name, model, architecture)
    if heads is None:
        return weight
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _data(value: Tensor, kind: str) -> tuple[np.ndarray[Any, Any], tuple[int, ...]]:
    """Bytes of a tensor in a type, and the shape that the writer wants: of bytes for blocks."""
    if kind == "BF16":
        data = value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        return data, data.shape
    if kind in ("F16", "F32"):
        data = value.to(torch.float16 if kind == "F16" else torch.float32).contiguous().numpy()
        return data, data.shape
    data = ggml.quantize(value.flatten(0, -2), kind.lower()).unflatten(0, value.shape[:-1]).numpy()
    return data, data.shape


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_attention_heads"):
        raise ExportError("gguf needs a model of transformers: model.config tells heads, sizes and the rotary base")
    return config


def _describe(writer: Any, model: nn.Module) -> None:
    config = _config(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_local_experts", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rotary.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if experts is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


GGUF = Exporter(
    "gguf",
    gguf,
    "gguf",
    read_gguf,
    settings={"architecture": Setting(str, "llama")},
    read_settings=("architecture",),
    write_needs_package=True,
    write_values=True,
)
