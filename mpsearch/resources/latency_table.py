"""Latency from a table of one's own."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import PlanError, TableError, nearest
from mpsearch.resources.resource import Resource, ResourceCapabilities

_BY_LAYER = ("layer", "precision", "latency_s")
_BY_SHAPE = ("kind", "weight_shape", "macs", "precision", "latency_s")


@dataclass(frozen=True)
class LatencyTable:
    """Seconds for one sample, from a CSV measured elsewhere.

    The columns are `layer,precision,latency_s`, or `kind,weight_shape,macs,precision,latency_s` with shapes such as `64x3x3x3` and the
    multiply-accumulates of one sample; the precision may be `w16`. `nan` means that the device does not run it: not allowed.

    Attributes:
        path: the file.
        interpolate: a cell that is not in the file lies on the line between its neighbours in multiply-accumulates, of
            the same kind and precision; refused beyond the smallest and the largest.
        fixed_s: seconds of all that no decision touches.

    >>> import tempfile
    >>> from mpsearch import precisions
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
    ...     _ = file.write("layer,precision,latency_s\\nfc,w4,0.5\\nfc,w8,nan\\n")
    ...     file.flush()
    ...     LatencyTable(file.name)(nn.Identity(), [Layer("fc")], precisions("w4 w8")).usage
    array([[0.5, nan]])
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(unit="s", on_meta=True)

    path: str | Path
    interpolate: bool = False
    fixed_s: float = 0.0

    def __call__(self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision]) -> Resource:
        """Look the cells up; see `Resource`.

        Raises:
            TableError: for a malformed file, a layer that is not there, or a cell that is missing.
        """
        by_layer, known = self._read()
        if by_layer:
            names = {layer.name for layer in layers}
            for (name, _), _ in known.items():
                if name not in names:
                    raise TableError(f"{self.path}: {name!r} is no layer of the decisions{nearest(name, names)}")
        columns = [*precisions, Precision("16")]
        usage = np.full((len(layers), len(columns)), math.nan)
        for row, layer in enumerate(layers):
            key = layer.name if by_layer else _shape_key(layer.kind, layer.weight_shape, layer.macs)
            for column, precision in enumerate(columns):
                if (key, str(precision)) in known:
                    usage[row, column] = known[key, str(precision)]
                elif column == len(precisions):
                    continue  # of the unquantized model, not asked for
                elif self.interpolate:
                    usage[row, column] = self._between(layer, precision, layers, known, by_layer)
                else:
                    raise TableError(
                        f"{self.path}: no latency_s of {key!r} at {precision} (layer {layer.name!r}); measure it, write nan "
                        "where the device does not run it, or set interpolate=True"
                    )
        return Resource(usage[:, :-1], self.fixed_s, float(usage[:, -1].sum()) + self.fixed_s)

    def _between(
        self,
        layer: Layer,
        precision: Precision,
        layers: Sequence[Layer],
        known: dict[tuple[str, str], float],
        by_layer: bool,
    ) -> float:
        """On the line between neighbours."""
        if by_layer:
            places = [(other.kind, other.macs, other.name) for other in layers]
        else:
            places = [(key.split(",")[0], int(key.split(",")[2]), key) for key, _ in known]
        points = sorted(
            {
                (macs, known[key, str(precision)])
                for kind, macs, key in places
                if kind == layer.kind and math.isfinite(known.get((key, str(precision)), math.nan))
            }
        )
        if not points or not points[0][0] <= layer.macs <= points[-1][0]:
            span = f"{points[0][0]} to {points[-1][0]}" if points else "none"
            raise TableError(
                f"{self.path}: layer {layer.name!r} at {precision} needs a {layer.kind} of {layer.macs} MACs; those of the "
                f"file: {span}"
            )
        return float(np.interp(layer.macs, [macs for macs, _ in points], [seconds for _, seconds in points]))

    def _read(self) -> tuple[bool, dict[tuple[str, str], float]]:
        """True for a file by layer; (key, precision) -> seconds."""
        try:
            with open(self.path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.reader(file, strict=True))
        except UnicodeDecodeError as error:
            raise TableError(f"{self.path}: byte {error.start} is not UTF-8 text, so this is no CSV") from None
        except csv.Error as error:
            raise TableError(f"{self.path}: no CSV ({error})") from None
        header = tuple(cell.strip() for cell in rows[0]) if rows else ()
        if header not in (_BY_LAYER, _BY_SHAPE):
            raise TableError(
                f"{self.path}: columns {','.join(header) or 'none'}; expected {','.join(_BY_LAYER)} or {','.join(_BY_SHAPE)}"
            )
        cells: dict[tuple[str, str], float] = {}
        for line, row in enumerate(rows[1:], 2):
            if not row:
                continue
            try:
                *key, precision, seconds = (cell.strip() for cell in row)
                name = key[0] if header == _BY_LAYER else _shape_key(key[0], _shape(key[1]), int(key[2]))
                place, value = (name, str(Precision.parse(precision))), float(seconds)
            except (ValueError, IndexError, PlanError) as error:
                raise TableError(f"{self.path}, line {line}: {error}") from None
            if len(row) != len(header) or value < 0 or math.isinf(value):
                raise TableError(
                    f"{self.path}, line {line}: {','.join(row)}; expected {','.join(header)} with 0 or more seconds, or nan"
                )
            if place in cells:
                raise TableError(f"{self.path}, line {line}: {place[0]} at {place[1]} occurs twice")
            cells[place] = value
        return header == _BY_LAYER, cells


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _shape_key(kind: str, shape: tuple[int, ...], macs: int) -> str:
    return f"{kind},{'x'.join(map(str, shape))},{macs}"
