"""llama.cpp: the arguments of `llama-quantize` that give every tensor its type."""

import functools
import os
import re

from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.stacked_experts import layer_weights
from mpsearch.files.writing import write_atomically
from mpsearch.models.modules.experts import place_of
from mpsearch.models.unwrapping import unwrapped

_TYPES = {"fp16": "f16", "fp32": "f32"}


def llama_quantize(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    architecture: str = "llama",
    left_alone: str = "f16",
) -> list[str]:
    r"""Options of `llama-quantize`: `--tensor-type` for each tensor by its anchored GGUF name, and the base type, which comes last.

    The command is `llama-quantize <options but the last> in.gguf out.gguf <last option>`. The base type is a quantized one:
    llama.cpp ignores every other option beside a base type of 16 or 32 bits. Widths that a type's blocks do not divide, where it
    would take another type, are refused. The experts of a block are one tensor a matrix, so they agree.

    Args:
        plan: of GGUF types (`wq4_k`, `wq8_0`, ...).
        model: checks names and shapes; its other layers get the type `left_alone`.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also write `<name>=<type>` lines there, for `--tensor-type-file`.
        architecture: as in `gguf.MODEL_ARCH_NAMES`.
        left_alone: type of the layers that the plan leaves alone: f16, bf16 or f32.

    Raises:
        ExportError: for what cannot be expressed, or a layer that the architecture has no tensor for.
        MissingPackage: without gguf, which knows the names.
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "llama-quantize", snap=snap)
    others = [name for name in layer_weights(model) if name not in plan] if model else []
    kinds = {name: type_name(precision, left_alone) for name, precision in plan.items()} | dict.fromkeys(
        others, left_alone
    )
    types = {tensor: kind for name, kind in kinds.items() for tensor in tensor_names(name, architecture)}
    lines = [f"^{re.escape(name)}$={kind}" for name, kind in types.items()]
    if path is not None:
        write_atomically(path, "".join(f"{line}\n" for line in lines))
    return [*(part for line in lines for part in ("--tensor-type", line)), "Q8_0"]


def type_name(precision: Precision, left_alone: str) -> str:
    """A GGUF type as llama.cpp writes it.

    >>> type_name(Precision("q4_k"), "f16"), type_name(Precision("16"), "f16"), type_name(Precision("fp32"), "f16")
    ('q4_k', 'f16', 'f32')
    """
    return _TYPES.get(precision.weight, precision.weight) if precision.quantizes_weight else left_alone


def tensor_names(layer: str, architecture: str) -> tuple[str, ...]:
    """Names of the tensors of a GGUF file that hold a layer's weight: gate and up of an expert, one matrix, are two of them.

    Raises:
        ExportError: where the architecture is unknown or has no such tensor.
    """
    place = place_of(layer)
    if place is None:
        return (tensor_name(layer, architecture),)
    parts = ("gate_proj", "up_proj") if place.part == "gate_up_proj" else (place.part,)
    return tuple(tensor_name(f"{place.block}.{part}", architecture) for part in parts)


@functools.cache
def tensor_name(layer: str, architecture: str) -> str:
    """Name of a layer's weight in a GGUF file: `blk.0.attn_q.weight`; experts of a block go without their numbers.

    Raises:
        ExportError: where the architecture is unknown or has no such tensor.
    """
    gguf = package("gguf", "gguf")
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(f"llama.cpp knows no architecture {architecture!r}, see gguf.MODEL_ARCH_NAMES")
    blocks = max((int(part) + 1 for part in layer.split(".") if part.isdecimal()), default=1)
    tensor = gguf.get_tensor_name_map(known[architecture], blocks).get_name(layer)
    if tensor is None:
        raise ExportError(f"llama.cpp has no tensor for {layer!r} in the architecture {architecture!r}")
    return f"{tensor}.weight"


LLAMA_QUANTIZE = Exporter(
    "llama-quantize",
    llama_quantize,
    "gguf",
    settings={"architecture": Setting(str, "llama"), "left_alone": Setting(str, "f16")},
    write_needs_package=True,
)
