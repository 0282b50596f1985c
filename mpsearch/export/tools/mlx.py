"""MLX: the predicate that tells its quantizer what to do with each layer."""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.export.exporter import Exporter
from mpsearch.export.fitting import fitted
from mpsearch.export.verification import Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.weights import kind_of, storage_of, weight_of
from mpsearch.models.unwrapping import unwrapped


def mlx(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
) -> Callable[..., dict[str, Any] | bool]:
    """`predicate(path, module)` for `mlx.nn.quantize(class_predicate=...)` and `mlx_lm.convert(quant_predicate=...)` (MLX 0.32).

    2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128; linear layers and embeddings, packed densely.

    Args:
        plan: the plan.
        model: checks names and shapes.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write the `quantization` part of `config.json` there, as mlx_lm reads it.

    Raises:
        ExportError: for what cannot be expressed.

    >>> predicate = mlx(Plan({"fc": Precision("4", "16", 64)}))
    >>> predicate("fc", None), predicate("other", None)
    ({'bits': 4, 'group_size': 64}, False)
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "mlx", snap=snap)
    settings = {
        name: {"bits": precision.weight_bits, "group_size": precision.group_size}
        for name, precision in plan.items()
        if precision.quantizes_weight
    }
    if path is not None:
        others = (
            {name: False for name, m in model.named_modules() if kind_of(m) and name not in settings} if model else {}
        )
        content = {"group_size": 64, "bits": 4, "mode": "affine", **settings, **others}
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def predicate(layer: str, _module: Any, *_: Any) -> dict[str, Any] | bool:
        return settings.get(layer, False)

    return predicate


def read_mlx(plan: Plan, model: nn.Module) -> StoredModel:
    """Quantize MLX layers with the model's weights under the model's names; every layer that came out quantized."""
    core, layers = package("mlx.core", "mlx"), package("mlx.nn", "mlx")
    tree = _tree(model)
    layers.quantize(tree, class_predicate=mlx(plan, model))
    stored_layers = {}
    for name, module in tree.named_modules():
        if not isinstance(module, layers.QuantizedLinear | layers.QuantizedEmbedding):
            continue
        weight = weight_of(model.get_submodule(name)).detach()
        words = np.array(module.weight)
        bits, size = module.bits, module.group_size
        values = core.dequantize(module.weight, module.scales, module.biases, size, bits)
        precision = Precision(str(bits), "16", size)
        stored_layers[name] = Stored(
            precision,
            torch.from_numpy(np.array(values.astype(core.float32))).to(weight.dtype),
            torch.from_numpy(_codes(words, bits)),
            words.nbytes + module.scales.nbytes + module.biases.nbytes,
        )
    holders = _holders(model)
    return StoredModel({name: stored_layers[holders[name]] for name in holders if holders[name] in stored_layers})


def _codes(words: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Codes in a row of words, lowest bits first."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(len(words), -1, bits)
    return np.asarray((stream.astype(np.int64) << np.arange(bits)).sum(-1))


def _holders(model: nn.Module) -> dict[str, str]:
    """Linear layers and embeddings -> the first with the same weight, which is the one that mlx_lm writes and reads."""
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    first: dict[Any, str] = {}
    return {name: first.setdefault(storage_of(weight_of(module)), name) for name, module in named}


def _tree(model: nn.Module) -> Any:
    """MLX modules of the linear layers and embeddings, at the paths that they have in the model."""
    core, layers = package("mlx.core", "mlx"), package("mlx.nn", "mlx")
    root = layers.Module()
    types = {torch.float32: core.float32, torch.float16: core.float16, torch.bfloat16: core.bfloat16}
    for name, holder in _holders(model).items():
        if name != holder:
            continue
        module = model.get_submodule(name)
        weight = weight_of(module).detach()
        rows, columns = weight.shape
        counterpart = (
            layers.Linear(columns, rows, bias=False)
            if isinstance(module, nn.Linear)
            else layers.Embedding(rows, columns)
        )
        counterpart.weight = core.array(weight.float().numpy()).astype(types[weight.dtype])
        place, (*parents, last) = root, name.split(".")
        for part in parents:
            if part not in place:
                setattr(place, part, layers.Module())
            place = place[part]
        setattr(place, last, counterpart)
    return root


MLX = Exporter("mlx", mlx, "mlx", read_mlx)
