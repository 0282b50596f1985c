"""The contract of an estimator, checked behind the door `profile` on small adversarial models."""

import copy
import functools
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from mpsearch.calibration.families import planned_passes
from mpsearch.calibration.profiling import profile
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.core.precision import precisions as precisions_of
from mpsearch.core.table import UNITS
from mpsearch.decisions.finding import layers as find_layers
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate, Estimator, capabilities_of
from mpsearch.models.running import Batch, collect, data_fingerprint, fingerprint, preserved, samples
from mpsearch.testing.named_checks import Checks, run_all

Floats = NDArray[np.float64]

_OPTIONS = precisions_of("w2 w4 w8 w16")
_TIED, _TWICE = "tied layers", "a layer called twice"


def check_estimator(
    estimator: Estimator,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    precisions: Sequence[Precision] = _OPTIONS,
    monotone: bool = True,
    stops_early: bool = False,
) -> None:
    """Run all of `estimator_checks` and tell every one that fails.

    Args:
        estimator: an instance with the settings to check.
        model: check on this model alone; it comes back as it was.
        batches: its data.
        precisions: the options.
        monotone: whether the estimator promises more damage, in the mean over layers, for fewer weight bits.
        stops_early: whether it may need fewer passes than forecast because it converges.

    Raises:
        AssertionError: with the model, what was expected and what came, for each failing check.
        EstimatorError: for a model without data or data without a model.

    >>> from mpsearch.sensitivity import RelativeWeightError
    >>> check_estimator(RelativeWeightError())
    """
    checks = estimator_checks(
        estimator, model=model, batches=batches, precisions=precisions, monotone=monotone, stops_early=stops_early
    )
    run_all(repr(estimator), checks)


def estimator_checks(
    estimator: Estimator,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    precisions: Sequence[Precision] = _OPTIONS,
    monotone: bool = True,
    stops_early: bool = False,
) -> Checks:
    """The contract of `mpsearch.estimation.estimator.Estimator` as named checks, behind the door `profile`.

    Without a model, on small adversarial ones: convolutions with batch norm and dropout, a depthwise one, a layer of
    zeros, attention with tied weights and padded tokens, a layer called twice beside one never called, a single layer,
    half precision, one sample, no labels, quantized inputs, layers grouped by the user. On each:

    - answers: (D, P) float numbers, finite or nan, a known unit, standard errors of 0 or more (or nan), facts that JSON can hold;
      model, data, settings and random generators as they were; nothing raised but `EstimatorError`, and that on at most three models
      in four;
    - nothing costs nothing: 0 where no weight and no input changes;
    - deterministic: the same bits again, whatever the state of the global random generators;
    - passes: runs of the model counted, and no more than `cost(batches, decisions, precisions)` forecasts where that method exists, and
      on a single layer, where there is nothing to skip, no fewer (give or take one forward pass over quantized inputs).

    On some of them:

    - put back when stopped: the model is as it was after an exception or Ctrl-C at the first and the last forward pass, backward pass
      and call of the quantizer, and Ctrl-C comes through;
    - order: without a `seed`, layers and precisions in reverse order reverse the array;
    - all of a group: every layer of a group counts;
    - tied as one: tied layers score as one layer called twice, in the unit of the loss;
    - fewer bits are worse, in the mean over all layers.

    Each model is answered once, whichever check asks first.

    Args:
        estimator: an instance with the settings to check.
        model: check on this model alone; it comes back as it was.
        batches: its data.
        precisions: the options.
        monotone: whether the estimator promises more damage, in the mean over layers, for fewer weight bits.
        stops_early: whether it may need fewer passes than forecast because it converges.

    Yields:
        Name and check, a function without arguments that raises AssertionError with the model, what was expected and what came.

    Raises:
        EstimatorError: for a model without data or data without a model.

    >>> from mpsearch.sensitivity import RelativeWeightError
    >>> [name for name, check in estimator_checks(RelativeWeightError())][:4]
    ['answers', 'nothing costs nothing', 'deterministic', 'passes']
    """
    if (model is None) != (batches is None):
        raise EstimatorError("check_estimator takes model and batches together, or neither")
    cases: Callable[[], Iterable[_Case]] = functools.partial(_cases, tuple(precisions))
    if model is not None and batches is not None:
        own = _Case("the given model", model, tuple(collect(batches, model)), tuple(precisions))
        cases = functools.partial(tuple, [own])
    answers = _Answers(estimator, cases)
    checks: dict[str, Callable[[], None]] = {
        "answers": answers.check,
        "nothing costs nothing": lambda: answers.each(_check_zero),
        "deterministic": lambda: answers.each(_check_again),
        "passes": lambda: answers.each(functools.partial(_check_passes, stops_early=stops_early)),
        "put back when stopped": lambda: answers.each(_check_interrupts, most=1),
        "order": lambda: answers.each(_check_order, most=3),
        "all of a group": lambda: answers.each(_check_members),
        "tied as one": answers.check_tied,
        "fewer bits are worse": answers.check_monotone,
    }
    if capabilities_of(estimator).seeded:
        del checks["order"]
    if not monotone:
        del checks["fewer bits are worse"]
    for name, check in checks.items():
        yield name, functools.partial(_alone, check)


def _alone(check: Callable[[], None]) -> None:
    """Run a check; the random generators are the caller's."""
    with preserved(nn.Identity()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the example never calls")
        check()


@dataclass(eq=False)
class _Answers:
    """An estimator's answers to all models, each asked for once.

    Attributes:
        estimator: the part that is checked.
        cases: makes the models.
    """

    estimator: Estimator
    cases: Callable[[], Iterable["_Case"]]

    @functools.cached_property
    def _asked(self) -> list["_Witness | AssertionError"]:
        answers: list[_Witness | AssertionError] = []
        for case in self.cases():
            try:
                witness = _run(self.estimator, case)
            except AssertionError as broken:
                answers.append(broken)
                continue
            if witness.answer is not None:
                witness.again = _again(witness)
            answers.append(witness)
        return answers

    @property
    def given(self) -> list["_Witness"]:
        """Where the estimator answered; not where it refused a model, or broke the contract."""
        return [witness for witness in self._asked if isinstance(witness, _Witness) and witness.answer is not None]

    def check(self) -> None:
        """Every model is answered within the contract or refused, and not too many are refused."""
        for witness in self._asked:
            if isinstance(witness, AssertionError):
                raise witness
        refused, number = len(self._asked) - len(self.given), len(self._asked)
        _hold(4 * refused <= 3 * number, f"{self.estimator!r} refused {refused} of {number} models")

    def each(self, check: Callable[["_Witness"], None], most: int | None = None) -> None:
        """Check the first answers, by default all of them."""
        for witness in self.given[:most]:
            check(witness)

    def check_monotone(self) -> None:
        """Of all models together."""
        if self.given:
            _check_monotone(self.given)

    def check_tied(self) -> None:
        """Tied layers against one layer called twice, where both were answered."""
        by_name = {witness.case.name: witness for witness in self.given}
        if {_TIED, _TWICE} <= set(by_name):
            _check_tied(by_name[_TIED], by_name[_TWICE])


@dataclass(frozen=True, eq=False)
class _Case:
    """One model with its data and options."""

    name: str
    model: nn.Module
    batches: tuple[Batch, ...]
    precisions: tuple[Precision, ...]
    groups: Mapping[str, tuple[str, ...]] | None = None

    def layers(self) -> list[Layer]:
        return find_layers(self.model, self.batches[0], groups=self.groups or "auto", cut=["*"])


@dataclass(frozen=True)
class _MaxScale:
    """Symmetric rounding, the largest weight of a channel at the largest code; weights of some shapes are left alone."""

    untouched: tuple[tuple[int, ...], ...] = ()

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        if tuple(weight.shape) in self.untouched:
            return weight.clone()
        wide = weight.float().flatten(1)
        scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (precision.weight_bits - 1) - 1)
        rounded: Tensor = (torch.round(wide / scale) * scale).reshape(weight.shape).to(weight.dtype)
        return rounded


@dataclass(eq=False)
class _Witness:
    """Stands between the door and the estimator and sees what passes; stops it at a given call, if asked."""

    estimator: Estimator
    case: _Case
    quantizer: _MaxScale
    stop: int = 0
    error: type[BaseException] = KeyboardInterrupt
    answer: Estimate | None = None
    refusal: EstimatorError | None = None
    again: "_Witness | AssertionError | None" = None
    context: Context | None = None
    calls: list[str] = field(default_factory=list)
    runs: float = 0.0
    armed: bool = False

    def __repr__(self) -> str:
        return repr(self.estimator)

    @property
    def where(self) -> str:
        return f"{self.estimator!r} on {self.case.name}"

    @property
    def scores(self) -> dict[str, Floats]:
        """Row of each unit."""
        assert self.answer is not None
        assert self.context is not None
        return {
            decision.name: row for decision, row in zip(self.context.decisions, self.answer.sensitivity, strict=True)
        }

    def tick(self, kind: str) -> None:
        """Note a call of the quantizer or of the model inside the estimator."""
        if self.armed:
            self.calls.append(kind)
            if len(self.calls) == self.stop:
                raise self.error("stopped by check_estimator")

    def quantize(self, weight: Tensor, precision: Precision) -> Tensor:
        self.tick("quantizer")
        return self.quantizer(weight, precision)

    def estimate(self, context: Context) -> Estimate:
        total = sum(samples(batch) for batch in context.batches)

        def finished(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            self.runs += samples(args[0] if args else keywords) / total
            for part in tree_iter(output):
                if isinstance(part, Tensor) and part.requires_grad:
                    part.register_hook(lambda _gradient: self.tick("backward"))

        self.context = context
        handles = [
            context.model.register_forward_pre_hook(lambda *_: self.tick("forward")),
            context.model.register_forward_hook(finished, with_kwargs=True),
        ]
        self.armed = True
        try:
            self.answer = self.estimator.estimate(context)
        except EstimatorError as error:
            self.refusal = error
            raise
        finally:
            self.armed = False
            for handle in handles:
                handle.remove()
        _check_answer(self.where, self.answer, (len(context.decisions), len(context.precisions)))
        return self.answer


def _run(
    estimator: Estimator,
    case: _Case,
    *,
    layers: Sequence[Layer] | None = None,
    quantizer: _MaxScale = _MaxScale(),
    stop: int = 0,
    error: type[BaseException] = KeyboardInterrupt,
) -> _Witness:
    """One estimate behind the door; what it may not raise or change is an AssertionError."""
    witness = _Witness(estimator, case, quantizer, stop, error)
    before = _snapshot(estimator, case)
    try:
        profile(
            case.model,
            case.batches,
            witness,
            case.precisions,
            layers=case.layers() if layers is None else layers,
            quantizer=witness.quantize,
            resources=(),
            progress=False,
        )
    except (Exception, KeyboardInterrupt) as raised:
        if isinstance(raised, AssertionError) and witness.answer is not None:
            raise  # of the answer itself
        stopped = bool(stop) and isinstance(raised, error)
        if isinstance(raised, KeyboardInterrupt) and not stopped:
            raise  # the user's own
        refused = raised is witness.refusal and (not stop or error is not KeyboardInterrupt)
        if not stopped and not refused:
            raise AssertionError(f"{witness.where}: {type(raised).__name__}: {raised}") from raised
        witness.answer = None
    after = _snapshot(estimator, case)
    changed = [name for name in before if before[name] != after.get(name)]
    what = f" after {error.__name__} at call {stop} ({witness.calls[-1]})" if stop else ""
    _hold(before == after, f"{witness.where}: {', '.join(changed) or 'the model'} changed{what}")
    return witness


def _snapshot(estimator: Estimator, case: _Case) -> dict[str, Any]:
    """All that a caller could notice."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 the user's global state
    state: dict[str, Any] = {
        "the random generators": (random.getstate(), repr(numpy_state), fingerprint([torch.get_rng_state()])),
        "the data": data_fingerprint(case.batches),
        "the settings": _settings(estimator),
    }
    for name, parameter in case.model.named_parameters():
        grad = parameter.grad
        gradient = None if grad is None else (id(grad), fingerprint([grad]))
        state[f"parameter {name}"] = (parameter.data_ptr(), fingerprint([parameter]), parameter.requires_grad, gradient)
    for name, buffer in case.model.named_buffers():
        state[f"buffer {name}"] = fingerprint([buffer])
    for name, module in case.model.named_modules():
        hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        state[f"module {name!r}"] = (type(module), module.training, sorted(vars(module)), hooks)
    return state


def _settings(estimator: Estimator) -> str:
    """The attributes of an estimator, as text; those in slots are not looked at."""
    try:
        return repr(vars(estimator))
    except TypeError:
        return ""


def _check_zero(witness: _Witness) -> None:
    """A cell that changes nothing has the score 0, or is not allowed."""
    answer, context = witness.answer, witness.context
    assert answer is not None
    assert context is not None
    for u, p in context.cells():
        decision, precision = context.decisions[u], context.precisions[p]
        changed = precision.quantizes_activation or any(
            context.perturbation(layer, precision).any() for layer in context.parameters(decision).values()
        )
        value = float(answer.sensitivity[u, p])
        same = changed or value == 0 or np.isnan(value)
        _hold(same, f"{witness.where}: {value} for {decision.name!r} at {precision}, which changes nothing, expected 0")


def _again(witness: _Witness) -> "_Witness | AssertionError":
    """The same once more, with the global random generators elsewhere."""
    torch.manual_seed(1234)
    random.seed(1234)
    np.random.seed(1234)  # noqa: NPY002 the global generator must not matter
    try:
        return _run(witness.estimator, witness.case)
    except AssertionError as broken:
        return broken


def _check_again(witness: _Witness) -> None:
    """The same bits, whatever the global random generators are at."""
    second_run, answer = witness.again, witness.answer
    if isinstance(second_run, AssertionError):
        raise second_run
    assert answer is not None
    assert second_run is not None
    again = second_run.answer
    if again is None:
        raise AssertionError(f"{witness.where}: an answer, and then a refusal")
    pairs = {
        "sensitivity": (answer.sensitivity, again.sensitivity),
        "sensitivity_se": (answer.sensitivity_se, again.sensitivity_se),
    }
    for name, (first, second) in pairs.items():
        same = first is second is None or (
            first is not None and second is not None and np.array_equal(first, second, equal_nan=True)
        )
        _hold(same, f"{witness.where}: {name} is {_text(first)} and then {_text(second)}")


def _check_answer(where: str, answer: Estimate, shape: tuple[int, int]) -> None:
    arrays: dict[str, Any] = {"sensitivity": answer.sensitivity}
    if answer.sensitivity_se is not None:
        arrays["sensitivity_se"] = answer.sensitivity_se
    for name, values in arrays.items():
        kind = f"{values.dtype} array" if isinstance(values, np.ndarray) else type(values).__name__
        _hold(kind == "float64 array", f"{where}: {name} is a {kind}, expected a float64 array")
        _hold(
            values.shape == shape, f"{where}: {name} has shape {values.shape}, expected {shape} (decisions, precisions)"
        )
        _hold(not np.isinf(values).any(), f"{where}: {name} is not finite: {_text(values)}")
    errors = arrays.get("sensitivity_se", np.zeros(shape))
    _hold(not (errors < 0).any(), f"{where}: a negative standard error: {_text(errors)}")
    _hold(answer.unit in UNITS, f"{where}: unit {answer.unit!r}, expected one of {', '.join(UNITS)}")
    try:
        json.dumps(dict(answer.facts))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{where}: facts {answer.facts!r} cannot be JSON ({error})") from None


def _check_passes(witness: _Witness, *, stops_early: bool) -> None:
    context, where = witness.context, witness.where
    assert context is not None
    used, runs = context.passes, witness.runs
    _hold(used.forward > 0 or not runs, f"{where}: {runs:g} forward passes were made, none is counted")
    # on one layer and one batch there is nothing to share, skip or reuse
    single = len(context.batches) == len(context.decisions) == len(context.decisions[0].layers) == 1
    short = single and used.forward < runs - 1e-6
    _hold(not short, f"{where}: {runs:g} forward passes were made, {used.forward:g} are counted")
    cost = planned_passes(witness.estimator, len(context.batches), len(context.decisions), len(context.precisions))
    if cost is None:
        return
    # a forecast may leave out the pass that looks at inputs, or count it where none are quantized
    observed = any(option.quantizes_activation for option in context.precisions)
    kinds = {"forward": (used.forward, cost.forward, 1.0), "backward": (used.backward, cost.backward, 0.0)}
    for name, (counted, expected, spare) in kinds.items():
        fewer = counted < expected - spare - 1e-6 and single and not stops_early
        right = counted <= expected + spare * observed + 1e-6 and not fewer
        _hold(right, f"{where}: {counted:g} {name} passes, cost() forecasts {expected:g}")


def _check_interrupts(witness: _Witness) -> None:
    """Stop it at the first and last call of each kind."""
    calls = witness.calls
    stops = {calls.index(kind) + 1 for kind in calls} | {len(calls) - calls[::-1].index(kind) for kind in calls}
    for stop in sorted(stops):
        for error in (KeyboardInterrupt, ValueError):
            stopped = _run(witness.estimator, witness.case, stop=stop, error=error)
            what = f"{error.__name__} at call {stop} of {len(calls)} ({calls[stop - 1]})"
            mended = stopped.answer is not None and error is ValueError and _equal(stopped.scores, witness.scores)
            _hold(stopped.answer is None or mended, f"{witness.where}: {what} was swallowed")


def _equal(one: Mapping[str, Floats], other: Mapping[str, Floats]) -> bool:
    """Scores by name agree but for rounding: work that failed was done again in another way."""
    return all(np.allclose(row, other[name], rtol=1e-5, equal_nan=True) for name, row in one.items())


def _check_order(witness: _Witness) -> None:
    case = witness.case
    assert witness.context is not None
    backwards = replace(case, precisions=case.precisions[::-1])
    layers = [layer for decision in witness.context.decisions[::-1] for layer in decision.layers]
    other_way = _run(witness.estimator, backwards, layers=layers)
    _hold(other_way.answer is not None, f"{witness.where}: refuses the layers in reverse order")
    expected, reverse = witness.scores, other_way.scores
    scale = max(float(np.nanmax(np.abs(row), initial=0.0)) for row in expected.values())
    for name, row in expected.items():
        other = reverse[name][::-1]
        same = np.allclose(other, row, rtol=1e-5, atol=1e-9 * scale, equal_nan=True)
        _hold(same, f"{witness.where}: {name!r} is {_text(row)}, in reverse order {_text(other)}")


def _check_members(witness: _Witness) -> None:
    """With one member of a group perturbed, the score is not 0 where that member's own is not."""
    case = witness.case
    shapes = {layer.name: layer.weight_shape for layer in case.layers()}
    for title, members in (case.groups or {}).items():
        for member in members:
            others = _MaxScale(tuple(shape for name, shape in shapes.items() if name != member))
            alone = _run(witness.estimator, replace(case, groups=None), quantizer=others).scores[member]
            grouped = _run(witness.estimator, case, quantizer=others).scores[title]
            counted = (alone == 0) | (grouped != 0)
            _hold(
                bool(counted.all()),
                f"{witness.where}: {member!r} alone is {_text(alone)}, in its group {_text(grouped)}",
            )


def _check_tied(tied: _Witness, twice: _Witness) -> None:
    """Two modules with one weight are the same function as one module called twice, so in nats the same damage."""
    assert tied.answer is not None
    for (name, row), other in zip(tied.scores.items(), twice.scores.values(), strict=True):
        same = tied.answer.unit == "relative" or np.allclose(row, other, rtol=1e-5, equal_nan=True)
        _hold(same, f"{tied.where}: {name!r} is {_text(row)}, as one layer called twice {_text(other)}")


def _check_monotone(witnesses: Sequence[_Witness]) -> None:
    """The mean over all units, each scaled to its largest score, falls as weight bits rise."""
    options = [p for p in witnesses[0].case.precisions if p.quantizes_weight and not p.quantizes_activation]
    bits = {option.weight_bits: option for option in options}
    rising = [bits[b] for b in sorted(bits)]
    scaled = []
    for witness in witnesses:
        if set(rising) <= set(witness.case.precisions):
            columns = [witness.case.precisions.index(option) for option in rising]
            rows = [row[columns] for row in witness.scores.values()]
            scaled += [row / np.abs(row).max() for row in rows if np.isfinite(row).all() and row.any()]
    if scaled:
        mean = np.mean(scaled, axis=0)
        what = f"{witnesses[0].estimator!r}: mean score {_text(mean)} at {sorted(bits)} weight bits"
        _hold(bool((np.diff(mean) <= 0).all()), f"{what}, expected less for more bits")


def _text(values: Floats | None) -> str:
    return "None" if values is None else str(values.tolist())


def _hold(condition: bool, message: str) -> None:
    """Assert, also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def _cases(options: tuple[Precision, ...]) -> Iterator[_Case]:
    """The adversaries, each in a state of its own: mixed modes, a frozen parameter, a gradient, a hook."""
    torch.manual_seed(0)
    images, rows = [torch.randn(n, 1, 6, 6) for n in (5, 3)], [torch.randn(n, 6) for n in (6, 4)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    text = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), "attention_mask": mask}
    weights = tuple(option for option in options if option.quantizes_weight) or options
    convolutions, decoder, twice, tied = _Convolutions(), _Decoder(), _twins(tied=False), _twins(tied=True)
    single, plain = nn.Sequential(nn.Linear(6, 3)), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    half, halves = copy.deepcopy(plain).bfloat16(), [x.bfloat16() for x in rows]
    labels = decoder(**text)["logits"].argmax(-1).masked_fill(mask == 0, -100)
    labelled = _labelled(plain, rows)
    grouped = {"pair": ("0", "2")}

    yield _Case("convolutions with batch norm", _marked(convolutions), _labelled(convolutions, images), options)
    yield _Case("attention with tied weights", _marked(decoder), ({**text, "labels": labels},), options)
    yield _Case(_TWICE, _marked(twice), _labelled(twice, rows), options)
    yield _Case(_TIED, _marked(tied), _labelled(tied, rows), options)
    yield _Case("a single layer", _marked(single), _labelled(single, rows[:1]), weights)
    yield _Case("half precision", half, _labelled(half, halves), options)
    yield _Case("one sample", plain, _labelled(plain, [rows[0][:1]]), options)
    yield _Case("no labels", plain, tuple(rows), options)
    yield _Case("quantized inputs", plain, labelled, precisions_of("w4a4 w8a8 w16a4 w16"))
    yield _Case("layers grouped by the user", plain, labelled, options, grouped)


def _labelled(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Batch, ...]:
    """Batches whose labels are the model's own predictions, so that it is right as a trained one is."""
    with torch.no_grad(), preserved(model):
        return tuple((x, model(x).argmax(-1)) for x in inputs)


def _marked(model: nn.Module) -> nn.Module:
    model.train()
    first, *_, last = list(model.parameters())
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    model.register_forward_hook(lambda *_: None)
    return model


class _Convolutions(nn.Module):
    """Batch norm, a depthwise convolution, a branch of zeros, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, stride=2)
        self.zeros = nn.Conv2d(4, 4, 1)
        nn.init.zeros_(self.zeros.weight)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.norm(self.conv(x)))))
        x = x + self.zeros(x)
        output: Tensor = self.fc(self.drop(x.mean((2, 3))))
        return output


class _Decoder(nn.Module):
    """One block of a language model; fused attention, and a head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        y = self.norm(x)
        q, k, v = (project(y)[:, None] for project in (self.q, self.k, self.v))
        seen = attention_mask[:, None, None].bool() & torch.ones(x.shape[1], x.shape[1]).tril().bool()
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0]
        return {"logits": self.head(x)}


class _Twins(nn.Module):
    """Two layers of one weight, or one layer called twice; beside it one that is never called."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = nn.Linear(6, 6)
        if tied:
            self.outer = nn.Linear(6, 6)
            self.outer.weight, self.outer.bias = self.inner.weight, self.inner.bias
        else:
            self.never = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.inner(torch.relu(self.first(x))))
        x = torch.relu(self.outer(x) if self.tied else self.inner(x))
        output: Tensor = self.last(x)
        return output


def _twins(*, tied: bool) -> nn.Module:
    """The same weights whether tied or called twice."""
    torch.manual_seed(1)
    return _Twins(tied)
