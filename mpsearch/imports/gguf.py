"""Plans from the types of the tensors in a GGUF file."""

import os
from pathlib import Path

from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import PlanError
from mpsearch.export.tools.llama_quantize import tensor_name
from mpsearch.models.modules.weights import kind_of

_UNQUANTIZED = ("F32", "F16", "BF16")


def from_gguf(path: str | os.PathLike[str], model: nn.Module | None = None) -> Plan:
    """The plan of a GGUF file; types of 16 and 32 bits are `w16`.

    Args:
        path: of the file.
        model: names the layers.

    Raises:
        PlanError: without a model, for another file, for a type that no precision writes, or a layer whose tensor the file does not hold.
        MissingPackage: without gguf.
    """
    if model is None:
        raise PlanError(f"{path}: a GGUF file has names of its own; give the model, whose layers they are")
    if not Path(path).is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    library = package("gguf", "gguf")
    try:
        reader = library.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, LookupError) as error:
        raise PlanError(f"{path}: no GGUF file of a model ({error})") from None
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    layers = {}
    for name, module in model.named_modules():
        if kind_of(module) is None:
            continue
        tensor = tensor_name(name, architecture)
        if tensor == "output.weight" and tensor not in types:
            tensor = "token_embd.weight"  # shared with the embedding
        if tensor not in types:
            raise PlanError(f"{path}: no tensor {tensor!r}, the weight of {name!r}")
        layers[name] = _precision(types[tensor], tensor, path)
    return Plan(layers, origin={"imported": "gguf", "file": str(path)})


def _precision(kind: str, tensor: str, path: str | os.PathLike[str]) -> Precision:
    if kind in _UNQUANTIZED:
        return Precision("16")
    try:
        return Precision(kind.lower())
    except PlanError as error:
        raise PlanError(f"{path}: {tensor!r} has the type {kind}: {error}") from None
