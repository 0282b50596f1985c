"""GGUF: a file for llama.cpp with a type for each tensor."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch import ggml
from mpsearch.errors import ExportError
from mpsearch.export.fitting import fitted
from mpsearch.export.llama_quantize import tensor_name
from mpsearch.export.package import package
from mpsearch.export.verification import REFERENCE, Stored
from mpsearch.modules import kind_of, storage_of, weight_of
from mpsearch.plan import Plan
from mpsearch.precision import Precision

_KEPT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CASTS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def gguf(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    architecture: str = "llama",
) -> dict[str, str]:
    """Write a Llama-like model of transformers as a GGUF file (gguf 0.19); without a path, only tell the types.

    The bytes are those of `RoundToNearest` at `wq4_k`, `wq8_0`, ..., so what llama.cpp runs is what `evaluate` measured. What
    the plan leaves alone keeps its dtype; norms are float32. A vocabulary is not written: llama.cpp runs the file on token numbers, and
    its converter brings the words.

    Args:
        plan: of GGUF types.
        model: with a `config` that tells heads, sizes and the rotary base.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: of the file.
        architecture: as in `gguf.MODEL_ARCH_NAMES`; those that rotate like Llama.

    Returns:
        Tensor name -> type.

    Raises:
        ExportError: for what cannot be expressed, a model without `config`, or a weight that the architecture has no tensor for.
        MissingPackage: without gguf.
    """
    if model is None:
        raise ExportError("gguf needs the model: what it writes is the model itself")
    plan = fitted(plan, model, "gguf", snap=snap)
    tensors = _tensors(plan, model, architecture)
    if path is not None:
        part = Path(path).with_name(f".{Path(path).name}.part")
        try:
            _write(part, tensors, model, architecture)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return {name: kind for name, (kind, _) in tensors.items()}


def read_gguf(plan: Plan, model: nn.Module, *, architecture: str = "llama") -> dict[str, Stored]:
    """Write the file, and read every tensor of it that is not stored as the model stores it."""
    library = package("gguf", "gguf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        gguf(plan, model, path=path, architecture=architecture)
        file = library.GGUFReader(path)
        kept = {tensor.name: tensor for tensor in file.tensors}
        found = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if kind_of(module) is None:
                continue
            weight = weight_of(module).detach()
            tensor = kept.get(tensor_name(name, architecture)) or kept[_name_of_tied(model, name, architecture)]
            kind = tensor.tensor_type.name
            format_name = {cast: known for known, cast in _CASTS.items()}.get(kind, kind.lower())
            if format_name == _KEPT[weight.dtype]:
                continue
            values = torch.from_numpy(library.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(weight.shape)
            precision = Precision(format_name)
            block, size = library.GGML_QUANT_SIZES[tensor.tensor_type]
            found[name] = Stored(
                precision,
                _unrotated(name, values, model),
                None,
                int(tensor.n_bytes),
                weight.numel() // block * size,
                REFERENCE(weight, precision),
                tolerance=1e-6 * float(weight.abs().max()),
            )
        return found


def _tensors(plan: Plan, model: nn.Module, architecture: str) -> dict[str, tuple[str, Tensor]]:
    """Tensor name -> its type and value, rows in the order of llama.cpp."""
    owners = {
        f"{name}.weight": name
        for name, module in model.named_modules(remove_duplicate=False)
        if kind_of(module) is not None
    }
    found: dict[str, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():  # shared weights once, as llama.cpp reads them
        value = parameter.detach()
        layer, _, last = name.rpartition(".")
        if last != "weight":
            raise ExportError(f"{architecture!r} has no tensor for {name!r}")
        if name in owners:
            precision = plan.layers.get(layer, Precision("16"))
            wanted = precision.weight if precision.quantizes_weight else _KEPT[value.dtype]
        else:
            wanted = "fp32"
        found[tensor_name(layer, architecture)] = (_CASTS.get(wanted, wanted.upper()), _rotated(layer, value, model))
    return found


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


def _heads(name: str, model: nn.Module) -> int | None:
    """Heads of a projection whose rows llama.cpp keeps in pairs; None for other layers."""
    last = name.rpartition(".")[2]
    config = _config(model)
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(last)


def _rotated(name: str, weight: Tensor, model: nn.Module) -> Tensor:
    heads = _heads(name, model)
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _unrotated(name: str, weight: Tensor, model: nn.Module) -> Tensor:
    heads = _heads(name, model)
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
    data = ggml.quantize(value, kind.lower()).numpy()
    return data, data.shape


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_attention_heads"):
        raise ExportError("gguf needs a model of transformers: model.config tells heads, sizes and the rotary base")
    return config


def _describe(writer: Any, model: nn.Module) -> None:
    config = _config(model)
    rotary = getattr(config, "rope_parameters", None) or {}
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rotary.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
