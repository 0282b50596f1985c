"""What an exporter is, and how its tool is asked whether it carries a plan out."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mpsearch.core.packages import version
from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError
from mpsearch.export.fitting import fitted
from mpsearch.export.verification import Reader, Verification, verified
from mpsearch.models.running import check_values, without_weights
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.quantizer import checked_quantizer
from mpsearch.targets.rules import TARGETS, Target


@dataclass(frozen=True)
class Setting:
    """A setting of an exporter.

    Attributes:
        kind: its type, by which the command line reads `--option NAME=VALUE`.
        default: its value where nothing is said.
    """

    kind: Any
    default: Any


@dataclass(frozen=True)
class Exporter:
    """A tool that plans are written for. Called like its function: `EXPORTERS["gguf"](plan, model, path="types.json")`.

    Attributes:
        name: as in `EXPORTERS`.
        write: `write(plan, model=None, *, snap=False, path=None, **settings)`, returns what the tool takes and writes it to `path`.
        package: the distribution that carries the plan out; empty where nothing here can.
        read: `read(plan, model, **settings)`, carries the plan out with the real tool and reads it back; None where nothing here can.
        settings: of `write`, by name.
        read_settings: those among them that `read` takes too.
        write_needs_package: `write` itself does not work without the package.
        write_values: it writes weights, so it needs their values.
        write_example: `write` runs or traces the model, so it takes one batch as `example`.
        read_example: so does `read`.
        stable_bytes: the same plan is written as the same bytes; not where a library writes addresses of objects into its file.
    """

    name: str
    write: Callable[..., Any]
    package: str = ""
    read: Reader | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    read_settings: tuple[str, ...] = ()
    write_needs_package: bool = False
    write_values: bool = False
    write_example: bool = False
    read_example: bool = False
    stable_bytes: bool = True

    @property
    def target(self) -> Target | None:
        """What the tool can express; None where anything goes."""
        return TARGETS.get(self.name)

    @property
    def __signature__(self) -> inspect.Signature:
        """For `help`: the arguments of `write`."""
        return inspect.signature(self.write)

    def __call__(self, plan: Plan, model: nn.Module | None = None, **options: Any) -> Any:
        """Write a plan; see `write`.

        Raises:
            ExportError: for what the tool cannot express.
            EstimatorError: where it writes weights, and the model has none.
            MissingPackage: where `write` needs the package and it is not installed.
        """
        if self.write_values and model is not None and without_weights(model):
            check_values(model)
        return self.write(plan, model, **options)


def carried_out(exporter: Exporter, plan: Plan, model: nn.Module, **options: Any) -> Verification:
    """Carry a plan out with the real tool on a copy of the model, read the result back, and compare; see `mpsearch.export.verify`.

    Raises:
        ExportError: for what the tool cannot express, or where it cannot be read back.
        VerificationError: where anything differs: coverage, precision, code range, bytes, values.
        MissingPackage: without the tool.
    """
    if exporter.read is None or exporter.target is None:
        raise ExportError(f"{exporter.name!r} cannot be verified here: nothing reads it back")
    model = unwrapped(model)
    symmetric = checked_quantizer(options.get("quantizer")).symmetric
    fitting = fitted(replace(plan, usage={}), model, exporter.target.name, vllm=False, symmetric=symmetric)
    plan = replace(fitting, usage=plan.usage)
    return verified(exporter.target, version(exporter.package), exporter.read, plan, model, **options)
