"""The contract of a resource, checked on small models against a plain loop over the model."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision, precisions
from mpsearch.decisions.finding import layers as layers_of
from mpsearch.errors import TableError
from mpsearch.models.modules.kv_cache import KVCache
from mpsearch.models.running import samples
from mpsearch.resources.resource import Resource, capabilities_of, example_for
from mpsearch.testing.named_checks import Checks

Function = Callable[..., Any]

_UNQUANTIZED = Precision("16")
_PRECISIONS = "w2 w4 w8 w4a8 w8a8 w16"
_NEAR = 1e-9  # relative, for sums in another order


def resource_checks(
    resource: Function,
    *,
    model: nn.Module | None = None,
    example: Any = None,
    options: Sequence[Precision] | str = _PRECISIONS,
) -> Checks:
    """The contract of a resource as named checks.

    It declares its unit; its numbers are of the declared shape, not negative, `nan` only where an option is not allowed; a layer costs the
    same whatever else is decided; more bits never use less, where it says so; two calls agree, unless it measures; the model, the example
    and the random numbers come back as they were; without weights, on the device `meta`, it counts the same, where it says so. `reference`
    is what the plan that leaves everything alone uses, and where `capabilities.reference` says so, also equal to a plain loop over the
    model: the bytes of its state, or MACs x 16 x 16.

    The models are one of convolutions with batch norm and one of attention with a cache; a resource may refuse one of them with
    `TableError`, not both.

    Args:
        resource: an instance with the settings to check, or a function of (model, layers, precisions).
        model: one of your own instead, without shared weights.
        example: one batch for it.
        options: the precisions, `w16` among them.

    Yields:
        Name and check, a function without arguments that raises AssertionError with what was expected and what came.

    >>> from mpsearch.resources import BitOps
    >>> for name, check in resource_checks(BitOps()):
    ...     check()
    """
    grid = tuple(precisions(options) if isinstance(options, str) else options)
    cases = [_Case("the given model", model, example)] if model is not None else _cases()
    suite = _Suite(resource, cases, grid)
    declared = capabilities_of(resource)
    yield "declaration", suite.check_declaration
    yield "answers", suite.check_answers
    yield "shape", suite.each(_check_shape)
    yield "not negative", suite.each(_check_sign)
    yield "reference of the unquantized plan", suite.each(_check_reference)
    if declared.reference in _TRUTHS:
        yield f"reference in {declared.reference}", suite.each(_check_truth)
    if not declared.measured:
        yield "deterministic", suite.each(_check_again)
        yield "order of layers", suite.each(_check_order)
        if not declared.peak:
            yield "layer by layer", suite.each(_check_alone)
    if declared.monotone:
        yield "monotone in bits", suite.each(_check_monotone)
    yield "model untouched", suite.each(_check_untouched)
    if declared.on_meta:
        yield "without weights", suite.each(_check_meta)


@dataclass(frozen=True)
class _Case:
    """A model and one batch; of the models here the loops below know every operation."""

    name: str
    model: nn.Module
    example: Any
    kv_cache: bool = False
    only_layers: bool = False

    @functools.cached_property
    def layers(self) -> list[Layer]:
        return list(layers_of(self.model, self.example, kv_cache=self.kv_cache))


def _cases() -> list[_Case]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 9, 32), nn.ReLU(), nn.Linear(32, 5),
        )  # fmt: skip
        return [
            _Case("convolutions", convolutions.eval(), torch.randn(4, 3, 8, 8), only_layers=True),
            _Case("attention", _Attention().eval(), torch.randn(2, 7, 16), kv_cache=True),
        ]


class _Attention(nn.Module):
    """One head of attention over a cache, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.k_cache, self.v_cache = KVCache(), KVCache()

    def forward(self, x: Tensor) -> Tensor:
        queries = self.q(x)[:, None]
        keys, values = self.k_cache(self.k(x)[:, None]), self.v_cache(self.v(x)[:, None])
        shares = (queries @ keys.transpose(2, 3) / 4).softmax(dim=3)
        return cast(Tensor, self.out((shares @ values)[:, 0]))


@dataclass(frozen=True)
class _Suite:
    """One resource on all models; what it answers is counted once for all checks."""

    resource: Function
    cases: Sequence[_Case]
    grid: tuple[Precision, ...]

    def count(self, case: _Case, layers: Sequence[Layer] | None = None, model: nn.Module | None = None) -> Resource:
        """The resource on a model, bare numbers made one."""
        example = case.example
        if model is not None:
            example = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, example)
        answer = self.resource(
            case.model if model is None else model,
            case.layers if layers is None else layers,
            self.grid,
            **example_for(self.resource, example),
        )
        return answer if isinstance(answer, Resource) else Resource(np.asarray(answer, np.float64), 0.0, math.nan)

    @functools.cached_property
    def answers(self) -> dict[str, Resource | TableError]:
        """Case -> answer, or the refusal."""
        answers: dict[str, Resource | TableError] = {}
        for case in self.cases:
            try:
                answers[case.name] = self.count(case)
            except TableError as error:
                answers[case.name] = error
        return answers

    @property
    def unquantized(self) -> int:
        """Column of `w16`."""
        return self.grid.index(_UNQUANTIZED)

    def check_declaration(self) -> None:
        declared = capabilities_of(self.resource)
        assert declared.unit, f"{self.resource!r} declares no unit: capabilities = ResourceCapabilities(unit='bytes')"
        assert _UNQUANTIZED in self.grid, (
            f"options {' '.join(map(str, self.grid))} lack w16, which the reference is held against"
        )

    def check_answers(self) -> None:
        refusals = {name: str(answer) for name, answer in self.answers.items() if isinstance(answer, TableError)}
        assert len(refusals) < len(self.cases), f"{self.resource!r} refused every model: {refusals}"

    def each(self, check: Callable[["_Suite", _Case, Resource], None]) -> Callable[[], None]:
        """One check on every model that the resource takes."""

        def run() -> None:
            for case in self.cases:
                answer = self.answers[case.name]
                if isinstance(answer, Resource):
                    check(self, case, answer)

        return run

    def of(self, case: _Case) -> str:
        """Who and where, for messages."""
        return f"{self.resource!r} on {case.name}"


def _check_shape(suite: _Suite, case: _Case, answer: Resource) -> None:
    shape = (len(case.layers), len(suite.grid))
    peak = capabilities_of(suite.resource).peak
    usage, fixed = answer.usage, np.asarray(answer.fixed)
    expected = (len(usage), *shape) if peak else shape
    assert usage.shape == expected, f"{suite.of(case)}: usage of shape {usage.shape}, expected {expected} (peak={peak})"
    rows = (len(usage),) if peak else ()
    assert fixed.shape == rows, f"{suite.of(case)}: fixed of shape {fixed.shape}, expected {rows}"
    assert not np.isinf(usage).any(), f"{suite.of(case)}: infinite usage, expected a number, or nan = not allowed"
    assert np.isfinite(fixed).all(), f"{suite.of(case)}: fixed is {fixed}, expected finite numbers"


def _check_sign(suite: _Suite, case: _Case, answer: Resource) -> None:
    for name, values in (
        ("usage", answer.usage),
        ("fixed", np.asarray(answer.fixed)),
        ("reference", np.asarray(answer.reference)),
    ):
        assert not (values < 0).any(), f"{suite.of(case)}: {name} holds {np.nanmin(values)}, expected 0 or more"


def _check_reference(suite: _Suite, case: _Case, answer: Resource) -> None:
    if math.isnan(answer.reference):
        known = capabilities_of(suite.resource).reference != "unknown"
        assert not known, f"{suite.of(case)}: reference is nan, declared {capabilities_of(suite.resource).reference!r}"
        return
    plan = answer.of([suite.unquantized] * len(case.layers))
    near = math.isnan(plan) or math.isclose(answer.reference, plan, rel_tol=_NEAR)
    assert near, f"{suite.of(case)}: reference {answer.reference!r}, but every layer at w16 uses {plan!r}"


def _check_truth(suite: _Suite, case: _Case, answer: Resource) -> None:
    kind = capabilities_of(suite.resource).reference
    truth = _TRUTHS[kind](case)
    if truth is not None:
        near = math.isclose(answer.reference, truth, rel_tol=_NEAR)
        assert near, (
            f"{suite.of(case)}: reference {answer.reference!r}, expected {truth!r} {kind}, counted by a plain loop"
        )


def _check_again(suite: _Suite, case: _Case, answer: Resource) -> None:
    _equal(answer, suite.count(case), f"{suite.of(case)}: a second call")


def _check_order(suite: _Suite, case: _Case, answer: Resource) -> None:
    backwards = suite.count(case, case.layers[::-1])
    if not answer.is_peak:  # the steps of a peak may come in another order
        rows = Resource(backwards.usage[::-1], backwards.fixed, backwards.reference)
        _equal(answer, rows, f"{suite.of(case)}: the layers in reverse order")
    for column, precision in enumerate(suite.grid):
        used, again = (one.of([column] * len(case.layers)) for one in (answer, backwards))
        same = np.isclose(used, again, rtol=_NEAR, atol=0.0, equal_nan=True)
        assert same, (
            f"{suite.of(case)}: all at {precision} use {used!r}, and {again!r} with the layers in reverse order"
        )


def _check_alone(suite: _Suite, case: _Case, answer: Resource) -> None:
    for row, layer in enumerate(case.layers):
        try:
            alone = suite.count(case, [layer])
        except TableError:  # a file of other layers, no cache among the decisions
            continue
        same = np.allclose(alone.usage[0], answer.usage[row], rtol=_NEAR, atol=0.0, equal_nan=True)
        assert same, (
            f"{suite.of(case)}: {layer.name!r} uses {answer.usage[row]}, and {alone.usage[0]} where it alone is decided"
        )
        if not math.isnan(alone.reference):
            plan = alone.of([suite.unquantized])
            near = math.isnan(plan) or math.isclose(alone.reference, plan, rel_tol=_NEAR)
            assert near, f"{suite.of(case)}, {layer.name!r} alone: reference {alone.reference!r}, but w16 uses {plan!r}"


def _check_monotone(suite: _Suite, case: _Case, answer: Resource) -> None:
    for (i, few), (j, many) in _pairs(suite.grid):
        more = answer.usage[..., i] > answer.usage[..., j] * (1 + _NEAR)
        if more.any():
            row = int(np.argwhere(more)[0][-1])
            raise AssertionError(
                f"{suite.of(case)}: {case.layers[row].name!r} uses {answer.usage[..., row, i].tolist()} at {few}, "
                f"more than {answer.usage[..., row, j].tolist()} at {many}"
            )


def _pairs(grid: Sequence[Precision]) -> Iterator[tuple[tuple[int, Precision], tuple[int, Precision]]]:
    """Columns of which the second has no fewer bits anywhere."""
    for first in enumerate(grid):
        for second in enumerate(grid):
            few, many = first[1], second[1]
            if few.weight_bits <= many.weight_bits and few.activation_bits <= many.activation_bits and few != many:
                yield first, second


def _check_untouched(suite: _Suite, case: _Case, answer: Resource) -> None:
    before, numbers = _state(case), torch.get_rng_state()
    suite.count(case)
    after = _state(case)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert not changed, f"{suite.of(case)} changed {', '.join(sorted(changed))}"
    assert torch.equal(numbers, torch.get_rng_state()), f"{suite.of(case)} drew random numbers"


def _state(case: _Case) -> dict[str, Any]:
    """What must be the same afterwards, by name."""
    state: dict[str, Any] = {}
    for name, tensor in case.model.state_dict(keep_vars=True).items():
        values = tensor.detach().clone().numpy().tobytes()
        state[name] = (tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad is None, values)
    for name, module in case.model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        state[f"module {name!r}"] = (type(module), module.training, hooks, sorted(vars(module)))
    for place, leaf in enumerate(tree_leaves(case.example)):
        state[f"example {place}"] = leaf.clone().numpy().tobytes() if isinstance(leaf, Tensor) else leaf
    return state


def _check_meta(suite: _Suite, case: _Case, answer: Resource) -> None:
    model = copy.deepcopy(case.model).to("meta")
    _equal(answer, suite.count(case, model=model), f"{suite.of(case)}: without weights, on the device meta")


def _equal(expected: Resource, got: Resource, where: str) -> None:
    for name in ("usage", "fixed", "reference"):
        wanted, came = np.asarray(getattr(expected, name)), np.asarray(getattr(got, name))
        same = wanted.shape == came.shape and np.allclose(wanted, came, rtol=_NEAR, atol=0.0, equal_nan=True)
        assert same, f"{where}: {name} {came.tolist()}, expected {wanted.tolist()}"


def _stored_bytes(case: _Case) -> float:
    """Bytes of every tensor of the state, each once."""
    tensors = {tensor.data_ptr(): tensor for tensor in case.model.state_dict().values()}
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


def _bit_operations(case: _Case) -> float | None:
    """MACs x 16 x 16 of one sample, where only layers multiply: outputs x numbers of a row of the weight."""
    if not case.only_layers:
        return None
    macs = 0

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * math.prod(cast(Tensor, module.weight).shape[1:])

    handles = [m.register_forward_hook(add) for m in case.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        case.model(case.example)
    for handle in handles:
        handle.remove()
    return 256.0 * macs / samples(case.example)


#: What `capabilities.reference` promises -> a plain loop over the model; None where the loop does not know the model.
_TRUTHS: dict[str, Callable[[_Case], float | None]] = {"stored bytes": _stored_bytes, "bit operations": _bit_operations}
