"""The read-back check: what a target stored, held layer by layer against the plan."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch import report
from mpsearch.errors import ExportError
from mpsearch.modules import canonical
from mpsearch.plan import Plan
from mpsearch.precision import Precision
from mpsearch.quantize import RoundToNearest
from mpsearch.unfused import unfused

#: The quantizer that `evaluate` measures with by default.
REFERENCE = RoundToNearest()


@dataclass(frozen=True, eq=False)
class Stored:
    """A layer as a target stored it, read from the target's own objects or file.

    Attributes:
        precision: as the target tells it.
        values: dequantized weight, output channels first.
        codes: (out, ...) integer codes, or None where the target has none.
        nbytes: of codes, scales and zero-points; None where the target keeps the weight in float.
        expected_bytes: what they should take by the target's own layout.
        expected: values that the weight should have, by an independent program; None for targets that tune.
        tolerance: allowed difference to `expected`.
    """

    precision: Precision
    values: Tensor
    codes: Tensor | None
    nbytes: int | None
    expected_bytes: int | None
    expected: Tensor | None = None
    tolerance: float = 0.0


#: `read(plan, model, **options)`: carry the plan out on a model of one's own; every layer that came out quantized.
Reader = Callable[..., Mapping[str, Stored]]


@dataclass(frozen=True)
class LayerCheck:
    """What was found of one layer.

    Attributes:
        name: of the layer.
        precision: planned and found.
        code_range: least and greatest code, or None.
        nbytes: stored; None where the target keeps the weight in float.
        difference: greatest difference to the expected values; None where the target tunes.
        relative_error: |w' - w|^2 / |w|^2.
    """

    name: str
    precision: Precision
    code_range: tuple[int, int] | None
    nbytes: int | None
    difference: float | None
    relative_error: float


@dataclass(frozen=True)
class Verification:
    """Every layer of a plan as the target stored it; all of it agrees with the plan.

    Attributes:
        target: the target.
        version: of its package.
        layers: one check a quantized layer.
    """

    target: str
    version: str
    layers: tuple[LayerCheck, ...]

    def __str__(self) -> str:
        rows = [
            [
                report.short(check.name),
                str(check.precision),
                "." if check.code_range is None else f"{check.code_range[0]}..{check.code_range[1]}",
                "." if check.nbytes is None else str(check.nbytes),
                "tuned" if check.difference is None else f"{check.difference:.2g}",
                f"{check.relative_error:.2g}",
            ]
            for check in self.layers
        ]
        head = f"{self.target} {self.version}: {len(rows)} layers carried out as planned"
        columns = ["layer", "precision", "codes", "bytes", "off by", "relative error"]
        return f"{head}\n\n{report.table(columns, rows)}"


def verified(target: str, version: str, read: Reader, plan: Plan, model: nn.Module, **options: Any) -> Verification:
    """Carry a plan out on a copy of the model, read it back, and compare.

    Compared for each layer: coverage both ways, precision, code range (max - min < 2^b), bytes, values (finite, not all zero, equal to an
    independent program where there is one, else no worse than 4 times rounding to nearest).

    Raises:
        ExportError: with every difference.
    """
    copied = copy.deepcopy(model)
    with unfused(model):
        weights = {name: canonical(model.get_submodule(name)).detach() for name in plan}
    found = dict(read(plan, copied, **options))
    wanted = {name: p for name, p in plan.items() if p.quantizes_weight or p.quantizes_activation}
    wrong = [f"{name!r} was left alone, the plan says {wanted[name]}" for name in wanted if name not in found]
    wrong += [f"{name!r} was quantized, the plan leaves it alone" for name in found if name not in wanted]
    checks = []
    for name, precision in wanted.items():
        if name in found:
            check, faults = _checked(name, precision, weights[name], found[name])
            checks.append(check)
            wrong += faults
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; ... ({len(wrong)} in all)" if len(wrong) > 5 else "")
        raise ExportError(f"{target} {version} does not carry the plan out: {shown}")
    return Verification(target, version, tuple(checks))


def _checked(name: str, wanted: Precision, weight: Tensor, stored: Stored) -> tuple[LayerCheck, list[str]]:
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
    if stored.nbytes != stored.expected_bytes:
        faults.append(f"{name!r} takes {stored.nbytes} bytes, expected {stored.expected_bytes}")
    values = stored.values.to(weight.dtype)
    size = float(weight.double().square().sum())
    if values.shape != weight.shape:
        faults.append(f"{name!r} has the shape {tuple(values.shape)}, expected {tuple(weight.shape)}")
        return LayerCheck(name, stored.precision, span, stored.nbytes, None, math.nan), faults
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
    return LayerCheck(name, stored.precision, span, stored.nbytes, difference, error / size if size else 0.0), faults
