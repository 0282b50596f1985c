"""The contract of an exporter, checked on a small transformer, with the real tool where it is installed."""

import copy
import functools
import inspect
import tempfile
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch.core.layer import Layer
from mpsearch.core.packages import version
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError, MissingPackage, MpsearchError, VerificationError
from mpsearch.export.exporter import Exporter, carried_out
from mpsearch.models.modules.weights import canonical
from mpsearch.models.running import call, first_tensor
from mpsearch.testing.named_checks import Checks

#: Precisions that plans are made of: what a target lacks of them is left out.
_OFFERED = "w4g32 w8g32 wq4_0 wq8_0 w4a8 w8a8 w4 w8 w4a4 wbf16 wfp8_e4m3afp8_e4m3 wnf4g64"
#: What no tool has: odd widths, activations alone.
_NEVER = "w9g48 w10a8 w16a7 w4a3g48"
_SETS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",), ("lm_head",))
_SIZE, _INNER, _WORDS = 64, 128, 96
_EXAMPLE = torch.zeros(1, 8, dtype=torch.long)
_OUTPUT = "the output of the model that it returns"


def exporter_checks(exporter: Exporter, *, model: nn.Module | None = None, example: Any = None) -> Checks:
    """The contract of an exporter as named checks, on a small transformer with the names of Llama, or a model of your own.

    Its declaration is that of its functions. Every decision of a plan reaches what it writes: with another precision, or without the
    decision, it writes something else (of a model that it returns, the outputs count too) or refuses; and where it has a reader, the real
    tool carries out each layer as planned, codes, values and bytes.
    It refuses with `ExportError` what it cannot express and layers that the model lacks, and then writes nothing. It
    writes one whole file or folder and leaves nothing beside it; the same plan gives the same bytes; plan, model and example stay as they
    are.

    A check is skipped (`unittest.SkipTest`) where it needs a package, by the exporter's declaration, that is not installed.

    Args:
        exporter: one of `mpsearch.export.EXPORTERS`, or your own.
        model: for a tool that takes models of a kind of its own; its linear layers end in the names of Llama's.
        example: one batch for it.

    Yields:
        Name and check, a function without arguments that raises AssertionError with what was expected and what came.

    >>> from mpsearch.export import EXPORTERS
    >>> for name, check in exporter_checks(EXPORTERS["neutral"]):
    ...     check()
    """
    suite = _Suite(exporter, small_transformer() if model is None else model, _EXAMPLE if model is None else example)
    yield "declaration", suite.check_declaration
    yield "takes a plan", suite.check_plan
    if exporter.stable_bytes:
        yield "every decision is written", suite.check_decisions
    if exporter.target is not None:
        yield "refuses what it cannot express", suite.check_refusal
    yield "refuses a layer that the model lacks", suite.check_unknown_layer
    yield "one whole file", suite.check_whole
    if exporter.stable_bytes:
        yield "deterministic", suite.check_again
    yield "plan and model untouched", suite.check_untouched
    if exporter.read is not None:
        yield "read back", suite.check_read


@dataclass(frozen=True)
class _Suite:
    """One exporter and a model."""

    exporter: Exporter
    model: nn.Module
    example: Any

    @functools.cached_property
    def layers(self) -> dict[str, Layer]:
        linear = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        return {name: Layer(name, "linear", tuple(canonical(module).shape)) for name, module in linear.items()}

    @functools.cached_property
    def precisions(self) -> list[Precision]:
        """What the target takes of what is offered."""
        offered = [Precision.parse(text) for text in _OFFERED.split()]
        target, layer = self.exporter.target, self.layers["model.layers.0.mlp.down_proj"]
        return [p for p in offered if target is None or target.refusal(layer, p) is None]

    @functools.cached_property
    def plan(self) -> Plan:
        """Two precisions if it takes two, on all layers that it takes them on; else fewer of either."""
        refusals = []
        for plan in self._candidates():
            try:
                with _scratch() as folder:
                    self.write(plan, folder / "plan")
            except ExportError as error:
                refusals.append(str(error))
            else:
                return plan
        raise AssertionError(f"{self.exporter.name} took no plan: {refusals[:3]}")

    def _candidates(self) -> Iterator[Plan]:
        for sets in (_SETS, _SETS[:-1], (_SETS[1], _SETS[3])):
            for step in (1, 0):
                for first in range(len(self.precisions)):
                    chosen = [
                        self.precisions[(first + place % 2 * step) % len(self.precisions)] for place in range(len(sets))
                    ]
                    yield Plan({name: p for ends, p in zip(sets, chosen, strict=True) for name in self._named(ends)})

    def _named(self, ends: tuple[str, ...]) -> list[str]:
        return [name for name in self.layers if name.rpartition(".")[2] in ends]

    @property
    def joined(self) -> list[list[str]]:
        """Layers of the plan that are decided together."""
        return [names for ends in _SETS if (names := [name for name in self._named(ends) if name in self.plan])]

    @functools.cached_property
    def whole(self) -> dict[str, bytes]:
        """What it writes for the plan."""
        written = self.written(self.plan)
        assert written is not None, f"{self.exporter.name} took the plan once, and then refused it"
        return written

    def write(self, plan: Plan, path: Path) -> Any:
        """Write a plan, or skip the check where that needs a package that is not there."""
        if self.exporter.write_needs_package:
            self._need_package()
        example = {"example": self.example} if self.exporter.write_example else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tool, and of bytes told that are not those that it stores
            try:
                return self.exporter(plan, self.model, path=path.with_suffix(".json"), **example)
            except MissingPackage as error:
                if not self.exporter.write_needs_package:
                    raise AssertionError(f"write needs a package and does not declare it: {error}") from None
                raise unittest.SkipTest(str(error)) from None

    def _need_package(self) -> None:
        try:
            version(self.exporter.package)
        except MissingPackage as error:
            raise unittest.SkipTest(str(error)) from None

    def written(self, plan: Plan) -> dict[str, bytes] | None:
        """Bytes by file, and of the output of a model that it returns; None where it refuses."""
        with _scratch() as folder:
            try:
                result = self.write(plan, folder / "plan")
            except ExportError:
                return None
            outputs = {}
            if isinstance(result, nn.Module):
                with torch.no_grad():
                    outputs[_OUTPUT] = first_tensor(call(result, self.example)).float().numpy().tobytes()
            return _files(folder) | outputs

    def check_declaration(self) -> None:
        exporter = self.exporter
        parameters = _keywords(exporter.write)
        assert ("example" in parameters) == exporter.write_example, (
            f"write_example={exporter.write_example}, write takes {[*parameters]}"
        )
        own = {name: default for name, default in parameters.items() if name not in ("snap", "path", "example")}
        declared = {name: setting.default for name, setting in exporter.settings.items()}
        assert own == declared, f"write has the settings {own}, declared are {declared}"
        if exporter.read is not None:
            read = _keywords(exporter.read)
            assert ("example" in read) == exporter.read_example, (
                f"read_example={exporter.read_example}, read takes {[*read]}"
            )
            assert set(read) - {"example"} == set(exporter.read_settings), (
                f"read takes {[*read]}, declared {exporter.read_settings}"
            )
            assert exporter.package, "it has a reader and declares no package"
            assert exporter.target is not None, (
                f"it has a reader and no entry {exporter.name!r} in TARGETS, which tells bytes"
            )

        stable = exporter.stable_bytes or exporter.read is not None
        assert stable, (
            "its bytes are not stable and it has no reader: nothing can tell whether it writes every decision"
        )

    def check_plan(self) -> None:
        assert len(self.plan) >= 1, "no decision is taken"

    def check_decisions(self) -> None:
        for names in self.joined:
            before = self.plan[names[0]]
            for precision in (p for p in self.precisions if p != before):
                changed = self.written(Plan({**self.plan, **dict.fromkeys(names, precision)}))
                if changed is not None:
                    same = changed == self.whole
                    assert not same, (
                        f"{self.exporter.name} writes the same for {', '.join(names)} at {before} and {precision}"
                    )
                    break
            less = Plan({name: p for name, p in self.plan.items() if name not in names})
            if less and not self.exporter.write_example:  # tracing takes seconds
                same = self.written(less) == self.whole
                assert not same, (
                    f"{self.exporter.name} writes the same whether {', '.join(names)} is in the plan or not"
                )

    def check_refusal(self) -> None:
        name, target = "model.layers.0.mlp.down_proj", self.exporter.target
        assert target is not None
        lacking = [Precision.parse(text) for text in _NEVER.split()]
        lacking = [p for p in lacking if target.refusal(self.layers[name], p) is not None]
        assert lacking, f"{target.name} takes each of {_NEVER}"
        for precision in lacking:
            self._check_nothing_written(
                Plan({**self.plan, name: precision}), f"{name} at {precision}, which it cannot express"
            )

    def check_unknown_layer(self) -> None:
        for name in ("model.layers.7.mlp.down_proj", "down_proj"):
            precision = next(iter(self.plan.values()))
            self._check_nothing_written(Plan({**self.plan, name: precision}), f"layer {name!r}, which the model lacks")

    def _check_nothing_written(self, plan: Plan, what: str) -> None:
        with _scratch() as folder:
            try:
                self.write(plan, folder / "plan")
            except ExportError:
                assert not _files(folder), f"{self.exporter.name} refused {what}, and wrote {sorted(_files(folder))}"
                return
            except MpsearchError as error:
                raise AssertionError(f"{self.exporter.name}, {what}: {error!r}, expected ExportError") from error
        raise AssertionError(f"{self.exporter.name} took {what}, expected ExportError")

    def check_whole(self) -> None:
        files = [Path(name) for name in self.whole if name != _OUTPUT]
        assert files, f"{self.exporter.name} wrote nothing"
        tops = sorted({path.parts[0] for path in files})
        assert tops == ["plan.json"], f"{self.exporter.name} was told to write plan.json, and wrote {tops}"
        if files == [Path("plan.json")] and self.exporter.stable_bytes:
            with _scratch() as folder:
                (folder / "plan.json").write_bytes(b"x" * 1_000_000)
                self.write(self.plan, folder / "plan")
                self._check_same(_files(folder), "over a longer, older file")

    def check_again(self) -> None:
        again = self.written(copy.deepcopy(self.plan))
        assert again is not None, f"{self.exporter.name} took the plan once, and then refused it"
        self._check_same(again, "a second time")

    def _check_same(self, written: Mapping[str, bytes], when: str) -> None:
        differing = [name for name in written if written[name] != self.whole.get(name)]
        assert not differing, f"{self.exporter.name} wrote other bytes {when}: {', '.join(differing)}"

    def check_untouched(self) -> None:
        plan, before = copy.deepcopy(self.plan), _state(self.model)
        self.written(self.plan)
        assert dict(plan) == dict(self.plan), f"{self.exporter.name} changed the plan"
        after = _state(self.model)
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        assert not changed, f"{self.exporter.name} changed {', '.join(sorted(changed))} of the model"

    def check_read(self) -> None:
        self._need_package()
        example = {"example": self.example} if self.exporter.read_example else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = carried_out(self.exporter, self.plan, self.model, **example)
        except MissingPackage as error:
            raise unittest.SkipTest(str(error)) from None
        except VerificationError as error:
            raise AssertionError(str(error)) from error
        quantized = [name for name, p in self.plan.items() if p.quantizes_weight or p.quantizes_activation]
        names = sorted(check.name for check in report.layers)
        assert names == sorted(quantized), f"read back {names}, expected {sorted(quantized)}"


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _state(model: nn.Module) -> dict[str, Any]:
    """What must be the same afterwards, by name."""
    state: dict[str, Any] = {
        name: (x.data_ptr(), x.clone().numpy().tobytes()) for name, x in model.state_dict().items()
    }
    for name, module in model.named_modules():
        state[f"module {name!r}"] = (type(module), module.training, sorted(vars(module)), len(module._forward_hooks))
    return state


def small_transformer() -> nn.Module:
    """One block with the names of Llama: attention, an MLP, an output layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Transformer().eval()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(_SIZE, _SIZE, bias=False))
        for name in ("gate_proj", "up_proj"):
            self.mlp.add_module(name, nn.Linear(_SIZE, _INNER, bias=False))
        self.mlp.add_module("down_proj", nn.Linear(_INNER, _SIZE, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = cast(Any, self.self_attn), cast(Any, self.mlp)
        q, k, v = (
            f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return cast(Tensor, x + mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


class _Transformer(nn.Module):
    """One block, with the names of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.add_module("embed_tokens", nn.Embedding(_WORDS, _SIZE))
        self.model.add_module("layers", nn.ModuleList([_Block()]))
        self.model.add_module("norm", nn.RMSNorm(_SIZE))
        self.lm_head = nn.Linear(_SIZE, _WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        model = cast(Any, self.model)
        x = model.embed_tokens(tokens)
        for block in model.layers:
            x = block(x)
        return cast(Tensor, self.lm_head(model.norm(x)))
