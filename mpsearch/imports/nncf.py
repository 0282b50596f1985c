"""Plans from the constants of an OpenVINO model that NNCF compressed."""

import os
import re
from pathlib import Path
from xml.etree import ElementTree

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import PlanError, nearest
from mpsearch.export.tools.nncf import ELEMENTS
from mpsearch.models.modules.weights import kind_of

_FORMATS = {**ELEMENTS, "nf4": "nf4"}
_FLOATS = ("f64", "f32", "f16", "bf16")
_WEIGHT = re.compile(r"self\.(.+)\.weight(_compressed)?")


def from_nncf(path: str | os.PathLike[str], model: nn.Module | None = None) -> Plan:
    """The plan of an OpenVINO model (`.xml`) converted from PyTorch, by the element types of its weights (NNCF 3.4).

    A weight of rank 3 is in groups along its last axis. Weights in floating point are left alone.

    Args:
        path: of the file.
        model: its linear layers, convolutions and embeddings, those that the file keeps in floating point at `w16`; without it, only
            compressed layers.

    Raises:
        PlanError: for another file, a layer that the model does not have, or a type that no precision writes.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise PlanError(f"{path}: not XML ({error})") from None
    if root.find("layers") is None:
        raise PlanError(f"{path}: no 'layers' of an OpenVINO model")
    chosen: dict[str, Precision] = {}
    for layer in root.iterfind("layers/layer[@type='Const']"):
        match, data = _WEIGHT.fullmatch(layer.attrib["name"]), layer.find("data")
        if match is not None and data is not None and data.attrib["element_type"] not in _FLOATS:
            precision = _precision(data.attrib, f"{path}: {match[1]!r}")
            if chosen.setdefault(match[1], precision) != precision:
                raise PlanError(f"{path}: {match[1]!r} has two weights, at {chosen[match[1]]} and {precision}")
    if model is None:
        return Plan(chosen, origin=_origin(path))
    kinds = {name: kind_of(module) for name, module in model.named_modules()}
    names = [name for name, kind in kinds.items() if kind not in (None, "kv_cache")]
    for name in chosen:
        if name not in names:
            raise PlanError(f"{path}: {name!r} is no quantizable layer of the model{nearest(name, names)}")
    return Plan({name: chosen.get(name, Precision("16")) for name in names}, origin=_origin(path))


def _origin(path: str | os.PathLike[str]) -> dict[str, str]:
    return {"imported": "nncf", "file": str(Path(path))}


def _precision(data: dict[str, str], where: str) -> Precision:
    kind, shape = data["element_type"], [int(side) for side in data["shape"].split(",")]
    if kind not in _FORMATS:
        raise PlanError(f"{where} has the type {kind}, expected one of {', '.join(_FORMATS)}")
    return Precision(_FORMATS[kind], "16", shape[2] if len(shape) == 3 else None)
