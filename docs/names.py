"""Writes `names.md`, what can be named on the command line, from the code: `python docs/names.py`."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mpsearch.core.formats import NUMBER_FORMATS, NumberFormat
from mpsearch.export import EXPORTERS, READERS, TARGETS
from mpsearch.imports import IMPORTERS, TABLE_IMPORTERS
from mpsearch.plan_search.proposers import PROPOSERS
from mpsearch.quantizers import QUANTIZERS
from mpsearch.resources import DEVICES, RESOURCES
from mpsearch.sensitivity import ESTIMATORS
from mpsearch.solvers import SOLVERS
from mpsearch.targets.rules import Target
from mpsearch.targets.storage import PACKED

#: Tools whose models in memory are still in float.
PACKED_WHEN_SAVED = ("auto-round", "llm-compressor")

PAGE = """# Names

What can be named on the command line, with the settings that `--option NAME=VALUE` gives and their defaults. Where no default is
told, the value is a path, a precision, `file.py:function`, or an object that only Python can give. In Python the same parts are classes
and functions, with formula, unit and source in their docstrings: `help(mpsearch.sensitivity.Fisher)`.

This page is written by `python docs/names.py`.

## Estimators

`mpsearch profile --estimator NAME`, `mpsearch.sensitivity`. [What each is worth](../benchmarks/results/sensitivity_table.md) was
measured on three networks. Numbers such as 2001.00281 are arXiv papers; a *unit* is a layer, or a group of layers that share a precision.

| name | what it scores | settings |
| --- | --- | --- |
{estimators}

## Solvers

`mpsearch solve --solver NAME`, `mpsearch.solvers`. The default is `exact`; for a table with interactions it is `ilp` up to 24 rows, and
`annealing` beyond.

| name | method | settings |
| --- | --- | --- |
{solvers}

## Proposers

`mpsearch search --proposer NAME`, `search(..., proposers=[NAME])`, `mpsearch.plan_search.proposers`. They name the plans that a search
measures next, in turn; by default `additive-output` begins, `thompson` goes on, and in the last third `moves` and `crossing` join it.

| name | what it proposes | settings |
| --- | --- | --- |
{proposers}

## Quantizers

`--quantizer NAME`, `--quantizer-option NAME=VALUE` of `profile`, `search` and `evaluate`; `quantizer="NAME"` in Python,
`mpsearch.quantizers`. What looks at the inputs of layers takes them from the data of the run, in `evaluate` from `--calibration`.

| name | method | settings |
| --- | --- | --- |
{quantizers}

## Resources

`--resources LIST`, `mpsearch.resources`. The columns `memory_bytes`, `bitops`, `latency_s` (measured), `activation_bytes`,
`kv_cache_bytes` and `energy_j` go by their own names; `COLUMN=NAME` puts any of these into a column of your choice:
`memory_bytes,latency_s=roofline:device=t4`. Settings stand behind colons. `COLUMN=file.py:function` is one of your own.

| name | what it counts | settings |
| --- | --- | --- |
{resources}

Devices of `roofline`: {devices}. `DEVICES[name].source` says where their numbers come from, and which are assumed.

## Number formats

What may stand after `w` and `a` in a [precision](files.md#precision), beside the integers `1` to `16`, `fp<n>_e<e>m<m>` and `bfp<n>`.

| name | what it is | bits | numbers that share a scale |
| --- | --- | --- | --- |
{formats}

## Tools to export to

`mpsearch export --to NAME`, `mpsearch.export`. "Read back": `--verify` carries the plan out with the real tool, compares every layer, its
bytes to the byte, and those of the whole model with `memory_bytes` of the plan to 1 %; exit status 1 where anything differs.

| name | what is written | settings | read back |
| --- | --- | --- | --- |
{exporters}

## Bytes as a tool stores them

With `--target NAME`, `layers(..., target=NAME)`, `memory_bytes` counts what the tool stores, padding and ids included, and what it makes of
all that is left alone; buffers that a state does not hold are not stored. "Checked": `--verify` reads these bytes back; else they follow
the tool's code. Without a target: {packed}.

A plan that is exported to a tool that stores it in other bytes than it was counted in is told with both numbers. Options that use as much
as a finer one, as 6 bits in HQQ do as much as 8, are left out of a search that limits nothing else. A quantizer of your own tells its bytes
by a method `stored_bytes(layer, precision)`; without one they are those of `RoundToNearest`, and that is told.

| name | a quantized weight | checked |
| --- | --- | --- |
{storages}

Not counted: 68 bytes of settings that HQQ's state keeps a layer, the tables of values in bitsandbytes' states, whole numbers that a tracer
adds to ONNX graphs. GPTQModel and AutoRound write the bias of a quantized layer in float16.

## Tools to import from

`mpsearch import --from NAME`, `mpsearch.imports`.

| name | what is read |
| --- | --- |
{importers}
"""


def page() -> str:
    """The page, with the first line of each docstring."""
    exporters = _rows(
        ((name, exporter.write) for name, exporter in EXPORTERS.items()),
        lambda name: _settings({key: setting.default for key, setting in EXPORTERS[name].settings.items()}),
        lambda name: _yes(name in READERS),
    )
    return PAGE.format(
        estimators=_rows(ESTIMATORS.items(), lambda name: _fields(ESTIMATORS[name])),
        solvers=_rows(SOLVERS.items(), lambda name: _fields(SOLVERS[name])),
        proposers=_rows(PROPOSERS.items(), lambda name: _fields(PROPOSERS[name])),
        quantizers=_rows(QUANTIZERS.items(), lambda name: _fields(QUANTIZERS[name])),
        resources=_rows(RESOURCES.items(), lambda name: _fields(RESOURCES[name])),
        devices=", ".join(f"`{name}`" for name in DEVICES),
        formats="\n".join(_number_format(facts) for facts in NUMBER_FORMATS.values() if not facts.parametric),
        exporters=exporters,
        packed=PACKED.text,
        storages="\n".join(_stored(name, target) for name, target in TARGETS.items()),
        importers=_rows((name, x.read) for known in (IMPORTERS, TABLE_IMPORTERS) for name, x in known.items()),
    )


def _stored(name: str, target: Target) -> str:
    checked = target.storage.packs and name in READERS and name not in PACKED_WHEN_SAVED
    also = "; layers that share a weight have codes of their own" if target.storage.unties else ""
    return f"| `{name}` | {target.storage.text}{also} | {_yes(checked)} |"


def _number_format(facts: NumberFormat) -> str:
    kind = f"a list of {len(facts.values)} values" if facts.values else facts.family.replace("gguf", "GGUF")
    kind += f" of `{facts.element}`" if facts.element else ""
    if not facts.scale:
        shared = ""
    elif facts.block is None:
        shared = "a row, or a group"
    else:
        shared = str(facts.block) if facts.fixed_block else f"{facts.block}, or a group"
    return f"| `{facts.name}` | {kind} | {facts.bits} | {shared} |"


def _rows(parts: Iterable[tuple[str, Any]], *columns: Callable[[str], str]) -> str:
    lines = []
    for name, part in parts:
        about = (inspect.getdoc(part) or "").split("\n")[0].replace("|", r"\|")
        lines.append(" | ".join([f"| `{name}`", about, *(column(name) for column in columns)]) + " |")
    return "\n".join(lines)


def _fields(cls: Any) -> str:
    return _settings({field.name: field.default for field in dataclasses.fields(cls)})


def _settings(defaults: Mapping[str, Any]) -> str:
    told = {name: f"={x}" if isinstance(x, int | float | str) else "" for name, x in defaults.items()}
    return ", ".join(f"`{name}{default}`" for name, default in told.items())


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
