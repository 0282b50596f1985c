"""`mpsearch export`: a plan written for another quantizer, and read back."""

import argparse
import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.core.plan import Plan
from mpsearch.errors import nearest
from mpsearch.models.loading import UsageError, loaded_batches, part

if TYPE_CHECKING:
    from mpsearch.export import Exporter


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("plan", help="plan, .json")
    parser.add_argument(
        "--to", required=True, metavar="TARGET", help="torchao, compressed-tensors, onnxruntime, gguf, ..."
    )
    parser.add_argument("--model", help="file.py:function or package.module:function returning a module")
    parser.add_argument(
        "--data", help="the same, returning batches: the first one traces the model, where the target needs it"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="setting of the target; may be repeated"
    )
    parser.add_argument(
        "--snap", action="store_true", help="move what the target lacks to the nearest at no more bytes"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="carry the plan out with the real tool, read it back, and compare the bytes with those told",
    )
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        type=shared_arguments.file_or_folder,
        metavar="FILE",
        help="the target's own file or folder",
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Write the plan for the target."""
    content, text = write(
        Plan.load(arguments.plan),
        arguments.to,
        arguments.out,
        arguments.model and shared_arguments.model(arguments.model),
        arguments.data and loaded_batches(arguments.data),
        settings=arguments.option,
        snap=arguments.snap,
        verify=arguments.verify,
    )
    return Answer(content, lambda screen: screen.prose(text), (arguments.out,))


def write(
    plan: Plan, target: str, out: str, model: Any, batches: Any, *, settings: Sequence[str], snap: bool, verify: bool
) -> tuple[dict[str, Any], str]:
    """Write a plan for a target.

    Args:
        plan: the plan.
        target: a name in `export.EXPORTERS`.
        out: where to.
        model: the module, or None.
        batches: the first one is the example, or None.
        settings: `name=value`, of the exporter.
        snap: move what the target lacks to the nearest.
        verify: read back what the tool makes of it.

    Returns:
        For machines, for people.

    Raises:
        UsageError: for an unknown target or setting, or where the model or the data is missing.
        EstimatorError: for data without samples.
        ExportError: for what the target cannot express.
        VerificationError: for what it does not carry out.
    """
    from mpsearch import export
    from mpsearch.models.running import collect

    if target not in export.EXPORTERS:
        raise UsageError(f"unknown target {target!r}{nearest(target, export.EXPORTERS)}")
    if verify and target not in export.READERS:
        raise UsageError(f"{target} cannot be verified here; known: {', '.join(export.READERS)}")
    if model is None and (verify or snap):
        raise UsageError(f"{'--verify' if verify else '--snap'} needs --model")
    exporter = export.EXPORTERS[target]
    values = _settings(exporter, settings)
    example: dict[str, Any] = {}
    if exporter.write_example or (verify and exporter.read_example):
        if batches is None:
            raise UsageError(f"{target} runs the model: it needs --data")
        example["example"] = collect(batches, model)[0]
    content: dict[str, Any] = {"target": target, "file": out}
    lines = [f"{target}: {sum(p.quantizes_weight for p in plan.values())} of {len(plan)} layers quantized"]
    if snap and target in export.TARGETS:
        snapped = export.snapped(plan, model, target, vllm=values.get("vllm"))
        content["snapped"] = {name: [str(before), str(after)] for name, (before, after, _) in snapped.changes.items()}
        content["usage"] = dict(snapped.plan.usage)
        lines.append(str(snapped))
        plan = snapped.plan
    if verify:
        with _calm():
            read_settings = {name: values[name] for name in exporter.read_settings}
            report = export.verify(plan, model, target, **read_settings, **(example if exporter.read_example else {}))
        content["verified"] = [
            {**dataclasses.asdict(check), "precision": str(check.precision)} for check in report.layers
        ]
        content |= {"told_bytes": report.told_bytes, "stored_bytes": report.stored_bytes}
        lines += ["", str(report)]
    with _calm():
        exporter(plan, model, path=out, **values, **(example if exporter.write_example else {}))
    content["layers"] = {name: str(precision) for name, precision in plan.items()}
    return content, "\n".join(lines)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """What a tool prints goes to stderr, results alone to stdout; its log, and what it deprecates, are not the user's."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


def _settings(exporter: "Exporter", settings: Sequence[str]) -> dict[str, Any]:
    """Settings of the exporter from `name=value` texts."""
    fields = [
        (name, setting.kind, dataclasses.field(default=setting.default)) for name, setting in exporter.settings.items()
    ]
    values = part(exporter.name, {exporter.name: dataclasses.make_dataclass("Settings", fields)}, "target", settings)
    return {name: getattr(values, name) for name in exporter.settings}


COMMAND = Command(
    "export",
    "write a plan for another quantizer, and read back what it does",
    "export plan.json --to brevitas --model nets.py:net --verify -o net.pt",
    add,
    run,
)
