"""compressed-tensors: the checkpoint format that vLLM reads."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError, warn
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted, group_size
from mpsearch.export.stacked_experts import (
    checkpoint_names,
    checkpoint_parts,
    experts_apart,
    linear_layers,
    renamed,
    targets,
)
from mpsearch.export.verification import REFERENCE, Stored, StoredModel, layer_bytes, rest_bytes
from mpsearch.files.writing import write_atomically
from mpsearch.models.running import without_weights
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.targets.rules import Fused, fused_groups, lacking, rules


def compressed_tensors(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    vllm: bool = True,
    quantizer: RoundToNearest = REFERENCE,
) -> Any:
    """`QuantizationConfig` with a group for every precision, targets by exact and disjoint names (compressed-tensors 0.20).

    Symmetric integers of 2 to 8 bits, a scale an output channel or group; `w8a8` is int8 with a scale a token. The codes in the
    folder are those of `quantizer`, so what vLLM runs is bit for bit what `evaluate` measured.

    The experts of a block that agree are one target, a pattern of their names; in the folder each has matrices of its own, named as in
    checkpoints of the model. vLLM has 4 and 8 bits for them, one precision a block. transformers takes one precision for the experts of
    all blocks, and misreads or refuses others, which a warning says.

    Args:
        plan: the plan.
        model: checks names, shapes and shared weights; its other linear layers are listed as ignored.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write there: a folder with the compressed weights and `config.json`, where there is a model; the model stays
            as it is. Without a model, or one without weights, the configuration as JSON.
        vllm: hold q/k/v, gate/up and experts, which vLLM fuses, to one precision.
        quantizer: of the weights in the folder; symmetric, a scale a channel.

    Returns:
        `compressed_tensors.quantization.QuantizationConfig`.

    Raises:
        ExportError: for what cannot be expressed.
        MissingPackage: without compressed-tensors.
    """
    if not quantizer.symmetric or quantizer.granularity != "channel":
        raise ExportError("compressed-tensors is written with symmetric codes and a scale a channel or group")
    model = unwrapped(model)
    plan = fitted(plan, model, "compressed-tensors", snap=snap, vllm=vllm)
    if model is not None:
        _check_experts(plan, model)
    config = _config(plan, model, rules("compressed-tensors", vllm).fused)
    if path is not None and (model is None or without_weights(model)):
        write_atomically(path, json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    elif path is not None and model is not None:
        copied, known = copy.deepcopy(model), checkpoint_names(model)
        with experts_apart(copied, plan):
            _save(_compressed(plan, copied, config, quantizer), Path(path), known, config.ignore)
    return config


def read_compressed_tensors(plan: Plan, model: nn.Module, *, quantizer: RoundToNearest = REFERENCE) -> StoredModel:
    """Compress the model; every layer whose weight lies packed in its state, which is that of the folder."""
    known = checkpoint_names(model)
    with experts_apart(model, plan):
        return _read(plan, model, quantizer, known)


def _read(plan: Plan, model: nn.Module, quantizer: RoundToNearest, known: Mapping[str, tuple[str, ...]]) -> StoredModel:
    helpers = package("compressed_tensors.compressors", "compressed-tensors")
    originals = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    _compressed(plan, model, _config(plan, model), quantizer)
    layers, whole = {}, _state(model, known)
    for name, original in originals.items():
        module: Any = model.get_submodule(name)
        state = {key: value.detach() for key, value in module.state_dict().items()}
        if "weight_scale" not in state:
            continue
        scheme = module.quantization_scheme
        bits, scale = scheme.weights.num_bits, state["weight_scale"]
        if "weight_packed" in state:
            codes = helpers.unpack_from_int32(state["weight_packed"], bits, torch.Size(state["weight_shape"].tolist()))
        else:
            codes = state["weight"]
        group = group_size(
            original.shape[1] // scale.shape[1], original.shape[1], plan.layers.get(name, Precision("16"))
        )
        activation = "16" if scheme.input_activations is None else str(scheme.input_activations.num_bits)
        precision = Precision(str(bits), activation, group)
        values = (codes.reshape(scale.numel(), -1).to(scale.dtype) * scale.reshape(-1, 1)).reshape(original.shape)
        layers[name] = Stored(
            precision,
            values,
            codes,
            sum(layer_bytes(whole, part) for part in known.get(name, (name,))),
            quantizer(original, precision),
        )
    names = {part for name in layers for part in known.get(name, (name,))}
    return StoredModel(layers, rest_bytes(whole, names))


def _state(model: nn.Module, known: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The state of a compressed model, experts by their names in checkpoints."""
    return {
        name: part for key, value in model.state_dict().items() for name, part in checkpoint_parts(key, value, known)
    }


def config_groups(plan: Plan, model: nn.Module | None, fused: Fused) -> dict[str, Any]:
    """`config_groups`, one for every precision, and `ignore`, as plain data.

    Of layers that are joined both lists name the others that the engine asks for too, where the model has none of that name.
    """
    linear = linear_layers(model) if model else list(plan)
    joined, absent = fused_groups(linear, fused), lacking(linear, fused)
    named = {joined[whole][0]: parts for whole, parts in absent.items()}
    names: dict[Precision, list[str]] = {}
    for name, precision in plan.items():
        if precision.quantizes_weight:
            names.setdefault(precision, []).extend((name, *named.get(name, ())))
    common = {"type": "int", "symmetric": True}
    groups: dict[str, Any] = {}
    every = dict.fromkeys([*linear, *plan])
    for precision, members in sorted(names.items(), key=lambda item: str(item[0])):
        size = precision.group_size
        scales = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
        groups[f"group_{precision}"] = {
            "targets": targets(members, every),
            "weights": {"num_bits": precision.weight_bits, **common, **scales},
        }
        if precision.quantizes_activation:
            inputs = {"num_bits": precision.activation_bits, **common, "strategy": "token", "dynamic": True}
            groups[f"group_{precision}"]["input_activations"] = inputs
    quantized = {name for members in names.values() for name in members}
    # vLLM refuses a linear layer that is in neither list
    ignored = [part for name in linear if name not in quantized for part in (name, *named.get(name, ()))]
    return {"config_groups": groups, "ignore": targets(ignored, every)}


def _check_experts(plan: Plan, model: nn.Module) -> None:
    own, known = dict(model.named_modules()), checkpoint_names(model)
    stacked = {name: plan.get(name, Precision("16")) for name in linear_layers(model) if name not in own}
    for name, precision in stacked.items():
        if precision.quantizes_weight and name not in known:
            raise ExportError(
                f"compressed-tensors cannot express {precision} for {name!r}: checkpoints of the model keep its experts in one tensor; "
                "plan w16, or leave it out"
            )
    precisions = {str(precision) if precision.quantizes_weight else "w16" for precision in stacked.values()}
    if len(precisions) > 1:
        warn(
            f"experts have {', '.join(sorted(precisions))}: vLLM reads them, transformers misreads or refuses all but one precision"
        )


def _config(plan: Plan, model: nn.Module | None, fused: Fused = ()) -> Any:
    quantization = package("compressed_tensors.quantization", "compressed-tensors")
    return quantization.QuantizationConfig.model_validate(config_groups(plan, model, fused))


def _compressed(plan: Plan, model: nn.Module, config: Any, quantizer: RoundToNearest) -> nn.Module:
    """Compress a model in place."""
    quantization = package("compressed_tensors.quantization", "compressed-tensors")
    quantization.apply_quantization_config(model, config)
    for name, precision in plan.items():
        if precision.quantizes_weight:
            module: Any = model.get_submodule(name)
            codes = quantizer.codes(module.weight.detach(), precision)
            assert codes.scales is not None
            module.weight_scale.data.copy_(codes.scales.reshape(module.weight_scale.shape))
            # compressing clips at -2^(b-1), the quantizer one code above; in half precision, it would round a second time
            module.weight = nn.Parameter(codes.rounded.reshape(module.weight.shape), requires_grad=False)
    compressor = package("compressed_tensors.compressors", "compressed-tensors").ModelCompressor
    compressor.from_pretrained_model(model).compress_model(model)
    return model


def _save(model: nn.Module, folder: Path, known: Mapping[str, tuple[str, ...]], ignored: list[str]) -> None:
    """A folder in the layout of transformers, experts by their names in checkpoints."""
    compressor = package("compressed_tensors.compressors", "compressed-tensors").ModelCompressor
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(model, known)
    if hasattr(model, "save_pretrained"):
        cast(Any, model).save_pretrained(folder, state_dict=state)
    else:
        package("safetensors.torch", "compressed-tensors").save_file(state, folder / "model.safetensors")
        write_atomically(folder / "config.json", "{}\n")
    compressed = compressor.from_pretrained_model(model)
    if compressed.quantization_config is not None:  # None where nothing is quantized
        for group in compressed.quantization_config.config_groups.values():
            group.targets = renamed(group.targets, known)
        compressed.quantization_config.ignore = renamed([*compressed.quantization_config.ignore, *ignored], known)
    compressed.update_config(folder)


COMPRESSED_TENSORS = Exporter(
    "compressed-tensors",
    compressed_tensors,
    "compressed-tensors",
    read_compressed_tensors,
    settings={"vllm": Setting(bool, True), "quantizer": Setting(RoundToNearest, REFERENCE)},
    read_settings=("quantizer",),
    write_needs_package=True,
)
