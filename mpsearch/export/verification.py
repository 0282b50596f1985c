"""The read-back check: what a target stored, held layer by layer against the plan."""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.core import printing
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.decisions.model_bytes import PlanBytes, plan_bytes
from mpsearch.errors import VerificationError
from mpsearch.export.fitting import counted_for, differing
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.weights import canonical, storage_of
from mpsearch.quantizers.quantizer import checked_quantizer
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.targets.rules import Target

#: The quantizer that `evaluate` measures with by default.
REFERENCE = RoundToNearest()


@dataclass(frozen=True, eq=False)
class Stored:
    """A layer as a target stored it, read from the target's own objects or file.

    Attributes:
        precision: as the target tells it.
        values: dequantized weight, output channels first.
        codes: (out, ...) integer codes, or None where the target has none.
        nbytes: of codes, scales, zero-points and ids; None where the target keeps the weight in float.
        expected: values that the weight should have, by an independent program; None for targets that tune.
        tolerance: allowed difference to `expected`.
    """

    precision: Precision
    values: Tensor
    codes: Tensor | None
    nbytes: int | None
    expected: Tensor | None = None
    tolerance: float = 0.0


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model as a target stored it.

    Attributes:
        layers: every layer that came out quantized.
        left_alone: bytes of all else; None where they cannot be told.
    """

    layers: Mapping[str, Stored]
    left_alone: int | None = None


#: `read(plan, model, **options)`: carry the plan out on a model of one's own, and read what it is stored as.
Reader = Callable[..., StoredModel]


def layer_bytes(state: Mapping[str, Any], name: str) -> int:
    """Bytes of all tensors of a layer in a state, but its bias.

    >>> layer_bytes({"fc.codes": torch.zeros(3, dtype=torch.uint8), "fc.bias": torch.zeros(2), "fc2.codes": torch.zeros(9)}, "fc")
    3
    """
    return sum(_nbytes(value) for key, value in state.items() if _belongs(key, (name,)))


def rest_bytes(state: Mapping[str, Any], names: Collection[str]) -> int:
    """Bytes of all tensors of a state but those of some layers, biases excepted; what shares memory once.

    >>> rest_bytes({"fc.codes": torch.zeros(3, dtype=torch.uint8), "fc.bias": torch.zeros(2), "norm.weight": torch.zeros(2)}, {"fc"})
    16
    """
    rest = [value for key, value in state.items() if isinstance(value, Tensor) and not _belongs(key, names)]
    return sum(_nbytes(value) for value in {storage_of(value): value for value in rest}.values())


def _belongs(key: str, names: Collection[str]) -> bool:
    """True for the name of a tensor in one of the layers, if it is not its bias."""
    parts = key.split(".")
    owner = next((end for end in range(1, len(parts)) if ".".join(parts[:end]) in names), None)
    return owner is not None and parts[owner:] != ["bias"]


def _nbytes(value: Any) -> int:
    """Bytes of a tensor, or of the tensors that a tensor of a library's own is made of."""
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


@dataclass(frozen=True)
class LayerCheck:
    """What was found of one layer.

    Attributes:
        name: of the layer.
        precision: planned and found.
        code_range: least and greatest code, or None.
        nbytes: stored; None where the target keeps the weight in float.
        told: bytes that `memory_bytes` counts for it; 0 where it shares those of another layer.
        difference: greatest difference to the expected values; None where the target tunes.
        relative_error: |w' - w|^2 / |w|^2.
    """

    name: str
    precision: Precision
    code_range: tuple[int, int] | None
    nbytes: int | None
    told: int
    difference: float | None
    relative_error: float


@dataclass(frozen=True)
class Verification:
    """Every layer of a plan as the target stored it; all of it agrees with the plan.

    Attributes:
        target: the target.
        version: of its package.
        layers: one check a quantized layer.
        told_bytes: of the whole model: the plan's `memory_bytes`, else what it would be for the target.
        stored_bytes: of the whole model, read back; None where the tool keeps weights in float.
    """

    target: str
    version: str
    layers: tuple[LayerCheck, ...]
    told_bytes: int
    stored_bytes: int | None

    def __str__(self) -> str:
        rows = [
            [
                printing.short(check.name),
                str(check.precision),
                "." if check.code_range is None else f"{check.code_range[0]}..{check.code_range[1]}",
                "." if check.nbytes is None else str(check.nbytes),
                "tuned" if check.difference is None else f"{check.difference:.2g}",
                f"{check.relative_error:.2g}",
            ]
            for check in self.layers
        ]
        stored = "it keeps weights in float" if self.stored_bytes is None else f"{self.stored_bytes} stored"
        head = f"{self.target} {self.version}: {len(rows)} layers carried out as planned; bytes: {self.told_bytes} told, {stored}"
        columns = ["layer", "precision", "codes", "bytes", "off by", "relative error"]
        return f"{head}\n\n{printing.table(columns, rows)}"


def verified(target: Target, version: str, read: Reader, plan: Plan, model: nn.Module, **options: Any) -> Verification:
    """Carry a plan out on a copy of the model, read it back, and compare.

    Compared for each layer: coverage both ways, precision, code range (max - min < 2^b), bytes (equal to those that `memory_bytes` counts),
    values (finite, not all zero, equal to an independent program where there is one, else no worse than 4 times rounding to nearest). For
    the whole model: the bytes stored, with those told for the plan.

    Raises:
        VerificationError: with every difference.
    """
    copied = copy.deepcopy(model)
    with decomposed(model):
        weights = {name: canonical(model.get_submodule(name)).detach() for name in plan}
    counted = plan_bytes(plan, model, target, symmetric=checked_quantizer(options.get("quantizer")).symmetric)
    stored = read(replace(plan, usage={}), copied, **options)  # what its bytes should be is told below
    wanted = {name: p for name, p in plan.items() if p.quantizes_weight or p.quantizes_activation}
    wrong = [f"{name!r} was left alone, the plan says {wanted[name]}" for name in wanted if name not in stored.layers]
    wrong += [f"{name!r} was quantized, the plan leaves it alone" for name in stored.layers if name not in wanted]
    checks = []
    for name, precision in wanted.items():
        if name in stored.layers:
            check, faults = _checked(name, precision, weights[name], stored.layers[name], counted.layers[name])
            checks.append(check)
            wrong += faults
    total = _total(stored, counted) if target.storage.packs and not wrong else None
    told = plan.usage.get("memory_bytes", float(counted.total))
    difference = differing(told, counted.total if total is None else total)
    if difference:
        wrong.append(f"{difference} as {target.name} stores it; {counted_for(target.name)}")
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; ... ({len(wrong)} in all)" if len(wrong) > 5 else "")
        raise VerificationError(f"{target.name} {version} does not carry the plan out: {shown}")
    return Verification(target.name, version, tuple(checks), round(told), total)


def _total(stored: StoredModel, counted: PlanBytes) -> int | None:
    """Bytes of the whole model as they were read back; what cannot be read as it is counted."""
    sizes = {name: layer.nbytes for name, layer in stored.layers.items() if counted.layers[name]}
    if None in sizes.values():
        return None
    left_alone = counted.left_alone + sum(size for name, size in counted.layers.items() if name not in stored.layers)
    return sum(size or 0 for size in sizes.values()) + (left_alone if stored.left_alone is None else stored.left_alone)


def _checked(name: str, wanted: Precision, weight: Tensor, stored: Stored, told: int) -> tuple[LayerCheck, list[str]]:
    faults = []
    if stored.precision != wanted:
        faults.append(f"{name!r} is stored as {stored.precision}, the plan says {wanted}")
    span = None
    if stored.codes is not None:
        span = (int(stored.codes.min()), int(stored.codes.max()))
        if span[1] - span[0] >= 1 << wanted.weight_bits:
            faults.append(
                f"{name!r} has codes {span[0]}..{span[1]}, more than the {1 << wanted.weight_bits} of {wanted}"
            )
    if told and stored.nbytes is not None and stored.nbytes != told:
        faults.append(f"{name!r} takes {stored.nbytes} bytes, memory_bytes counts {told}")
    values = stored.values.to(weight.dtype)
    size = float(weight.double().square().sum())
    if values.shape != weight.shape:
        faults.append(f"{name!r} has the shape {tuple(values.shape)}, expected {tuple(weight.shape)}")
        return LayerCheck(name, stored.precision, span, stored.nbytes, told, None, math.nan), faults
    error = float((values.double() - weight.double()).square().sum())
    difference = None
    if not torch.isfinite(values).all():
        faults.append(f"{name!r} has {int((~torch.isfinite(values)).sum())} weights that are not finite")
    elif size and not values.any():
        faults.append(f"every weight of {name!r} became 0")
    elif stored.expected is not None:
        difference = float((values.double() - stored.expected.double()).abs().max())
        if not difference <= stored.tolerance:
            count = int(((values.double() - stored.expected.double()).abs() > stored.tolerance).sum())
            faults.append(
                f"{count} weights of {name!r} differ, by up to {difference:.3g}, from what {wanted} should give"
            )
    else:
        plain = RoundToNearest(scale="max", symmetric=False)(weight, wanted)
        most = 4 * float((plain.double() - weight.double()).square().sum())
        if error > most:
            faults.append(f"{name!r} is off by {error:.3g} (squared), rounding to nearest by {most / 4:.3g}")
    relative = error / size if size else 0.0
    return LayerCheck(name, stored.precision, span, stored.nbytes, told, difference, relative), faults
