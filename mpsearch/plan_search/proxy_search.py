"""The door from measured plans to a proxy that ranks as they do."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch.calibration.calibration import Calibration
from mpsearch.checkpoints.keys import FormulaKey
from mpsearch.checkpoints.memory import NoStore
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.checkpoints.store import Store
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.settings import checked_number
from mpsearch.decisions.finding import layers as find_layers
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Loss
from mpsearch.estimation.proxies.evolution import Candidate, ProxyEvolution
from mpsearch.estimation.proxies.inputs import weight_inputs
from mpsearch.estimation.proxies.tree import INPUTS, Tree
from mpsearch.metrics.ranking import spearman
from mpsearch.metrics.statistics import wide
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.running import Batch, collect
from mpsearch.quantizers.registry import AnyQuantizer
from mpsearch.sensitivity.evolved_proxy import EvolvedProxy
from mpsearch.sensitivity.relative_weight_error import RelativeWeightError

Floats = NDArray[np.float64]

#: Fewest plans with a rank correlation.
_LEAST_PLANS = 3


@dataclass(frozen=True, eq=False)
class ProxyTruth:
    """A model with calibration data, and what plans were measured to do to it.

    Attributes:
        model: it comes back bit for bit as it went in.
        batches: calibration data for gradients and activations, read once.
        measured: one set of plans, or several that are ranked by themselves (all sizes; equal size at each budget). The layers are
            those that the plans name.
        quantizer: the one that the plans were measured with; by default `RoundToNearest()`.
        loss: as for `profile`.
    """

    model: nn.Module
    batches: Iterable[Batch]
    measured: MeasuredPlans | Sequence[MeasuredPlans]
    quantizer: AnyQuantizer | None = None
    loss: Loss | Literal["kl", "cross-entropy"] | None = None


def evolve_proxy(
    truth: ProxyTruth | Sequence[ProxyTruth],
    evolution: ProxyEvolution | None = None,
    *,
    num_samples: int = 4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> EvolvedProxy:
    """Find a training-free proxy that ranks plans as they were measured (EMQ, 2307.10554).

        fitness = mean over models of the mean over their sets of plans of Spearman's correlation of predicted and measured damage
        predicted damage of a plan = sum over layers of score(l) x relative squared error of its precision

    with the score an expression (`EvolvedProxy`) of tensors that are computed once. A tree is dropped where shapes do not fit, a
    score is not finite, or all layers of a model score the same. Correlations are of the plans that were searched with: judge the
    proxy on a model that was left out. Give it three models or more: what was evolved on two was worse on others than no score at all
    (`benchmarks/proxies.py`).

    The inputs of all models are held together, 8 bytes a weight for each. `x @ y` takes the square of a layer's input size; for layers
    of many thousand inputs set its prior to 0.

    Args:
        truth: one model, or several.
        evolution: settings of the search; by default `ProxyEvolution()`. An input with the prior 0 is not computed.
        num_samples: Hessian-vector products a batch, for the input `hessian`.
        seed: of drawn labels and probes.
        checkpoint: a file that scores go to as they are found; a run that finds them there goes on, to the same end. Refused where
            weights, data, loss, layers, `num_samples` or `seed` are not those that it was written for.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        The best tree, with the fitness, the correlations and the runners-up in `origin`.

    Raises:
        EstimatorError: for unusable data, too few plans, or where no tree passes.
        PlanError: where plans and model do not fit.

    Damage that is the squared weights' relative error times the mean absolute weight of a layer:

    >>> from mpsearch import Plan, Precision, precisions, profile
    >>> from mpsearch.quantizers.rounding import RoundToNearest
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    >>> for layer, scale in zip(model, (1.0, 4.0, 2.0, 8.0)):
    ...     _ = layer.weight.data.mul_(scale)
    >>> table = profile(model, [torch.ones(1, 4)], EvolvedProxy("mean_abs(weight)"), precisions("w2 w3 w4"))
    >>> rows = np.random.default_rng(0).integers(0, 3, (30, 4))
    >>> plans = [Plan({str(l): table.precisions[p] for l, p in enumerate(row)}) for row in rows]
    >>> damage = [sum(table.sensitivity[l, p] for l, p in enumerate(row)) for row in rows]
    >>> only = dict.fromkeys(("gradient", "activation", "hessian", "virtual_gradient"), 0)
    >>> proxy = evolve_proxy(
    ...     ProxyTruth(model, [torch.ones(1, 4)], MeasuredPlans(plans, damage)), ProxyEvolution(8, 12, priors=only)
    ... )
    >>> print(proxy, round(proxy.origin["fitness"], 3))
    abs(weight) 1.0
    """
    settings = ProxyEvolution() if evolution is None else evolution
    checked_number(num_samples, "num_samples", int, 1, EstimatorError)
    checked_number(seed, "seed", int, 0, EstimatorError)
    names = tuple(name for name in INPUTS if settings.prior(name))
    truths = [truth] if isinstance(truth, ProxyTruth) else list(truth)
    if not truths:
        raise EstimatorError("no truth given: expected a model with measured plans")
    problems = [_problem(model_and_plans, names, num_samples, seed, progress) for model_and_plans in truths]
    store: Store = NoStore()
    if checkpoint is not None:
        store = SQLiteStore(checkpoint, _identity(problems, num_samples, seed))
    trees = 0
    with store, torch.no_grad():
        bar = tqdm(
            total=(settings.generations + 1) * settings.population,
            desc="evolve proxy",
            disable=None if progress else True,
            leave=False,
        )

        def judge(tree: Tree) -> Candidate | None:
            nonlocal trees
            trees += 1
            key = FormulaKey(str(tree))
            scores = store.get(key)
            if scores is None:
                scores = _scores(tree, problems)
                store.put(key, scores)
            return _candidate(tree, problems, [np.array(of_model) for of_model in scores])

        with bar:
            population = settings.search(judge, bar.update)
    if not population:
        raise EstimatorError(f"none of {trees} trees has finite scores that differ between layers")
    best = population[0]
    origin = {
        "fitness": best.fitness,
        "correlations": [
            _correlations(problem, np.array(scores))
            for problem, scores in zip(problems, _scores(best.tree, problems), strict=True)
        ],
        "trees": trees,
        "runners_up": {str(candidate.tree): candidate.fitness for candidate in population[1:6]},
        "evolution": {**asdict(settings), "priors": dict(settings.priors)},
        "truths": [problem.origin for problem in problems],
    }
    return EvolvedProxy(str(best.tree), num_samples, seed, origin)


@dataclass(frozen=True, eq=False)
class _Problem:
    """A truth, made ready.

    Attributes:
        decisions: how many.
        weights: decision and inputs of every weight, the smallest first, where a tree that cannot be computed costs least.
        sets: of every set of plans (N, D), the relative squared error that it puts on each decision, and the damage (N,).
        identity: what the scores of trees depend on.
        origin: for the result.
    """

    decisions: int
    weights: list[tuple[int, dict[str, Tensor]]]
    sets: list[tuple[Floats, Floats]]
    identity: dict[str, str]
    origin: dict[str, Any]


def _problem(truth: ProxyTruth, names: tuple[str, ...], num_samples: int, seed: int, progress: bool) -> _Problem:
    data = collect(truth.batches, truth.model)
    sets = [truth.measured] if isinstance(truth.measured, MeasuredPlans) else list(truth.measured)
    for number, measured in enumerate(sets):
        if len(measured) < _LEAST_PLANS:
            raise EstimatorError(
                f"{len(measured)} measured plans in set {number}, expected {_LEAST_PLANS} or more to rank"
            )
    if not sets:
        raise EstimatorError("no measured plans: expected at least one set")
    named = set(sets[0].layers)
    options = dict.fromkeys(option for measured in sets for plan in measured.plans for option in plan.values())
    with Calibration(
        truth.model,
        data,
        sorted(options, key=str),
        layers=[layer for layer in find_layers(truth.model, data[0]) if layer.name in named] or None,
        quantizer=truth.quantizer,
        loss=truth.loss,
        resources=(),
        progress=progress,
    ) as calibration:
        output = calibration.output_identity
        table = calibration.profile(RelativeWeightError())
        context, decisions = calibration.context(), calibration.decisions
        inputs = weight_inputs(context, names, num_samples=num_samples, seed=seed)
        weights = [
            (u, {name: wide(x) for name, x in inputs[parameter].items()})
            for u, decision in enumerate(decisions)
            for parameter in context.parameters(decision)
        ]
    decision_of = {layer.name: u for u, decision in enumerate(decisions) for layer in decision.layers}
    rows = np.array([decision_of[layer.name] for layer in table.layers])
    member = np.eye(len(decisions))[rows]  # (L, D)
    designs = [table.sensitivity[np.arange(len(rows)), measured.options(table)] @ member for measured in sets]
    facts = {key: table.origin[key] for key in ("model_fingerprint", "data_fingerprint", "quantizer", "loss")}
    return _Problem(
        len(decisions),
        sorted(weights, key=lambda pair: next(iter(pair[1].values())).numel()),
        [(design, measured.damage) for design, measured in zip(designs, sets, strict=True)],
        {
            "weights": facts["model_fingerprint"],
            "output": output,
            "data": facts["data_fingerprint"],
            "loss": described(truth.loss),
            "layers": digest(*(" ".join(layer.name for layer in decision.layers) for decision in decisions)),
        },
        {**facts, "plans": [len(measured) for measured in sets]},
    )


def _identity(problems: Sequence[_Problem], num_samples: int, seed: int) -> dict[str, str]:
    names = [name for name in problems[0].identity if name != "output"]
    own = {name: ", ".join(problem.identity[name] for problem in problems) for name in names}
    outputs = {f"output of model {i}": problem.identity["output"] for i, problem in enumerate(problems)}
    return {**own, **outputs, "num_samples": str(num_samples), "seed": str(seed)}


def _scores(tree: Tree, problems: Sequence[_Problem]) -> list[list[float]]:
    """Of every model the scores of the decisions; empty where a tree does not fit or a score is not finite."""
    every = []
    for problem in problems:
        scores = [0.0] * problem.decisions
        for u, inputs in problem.weights:
            try:
                score = tree.score(inputs)
            except EstimatorError:
                return []
            if not math.isfinite(score):
                return []
            scores[u] += score
        every.append(scores)
    return every


def _candidate(tree: Tree, problems: Sequence[_Problem], scores: Sequence[Floats]) -> Candidate | None:
    """The tree with its fitness; None where it cannot be computed, or tells no layer from another."""
    if not scores or any(np.ptp(of_model) <= 1e-9 * of_model.max() for of_model in scores):
        return None
    means = [np.mean(_correlations(problem, of_model)) for problem, of_model in zip(problems, scores, strict=True)]
    fitness = float(np.mean(means))
    relative = np.concatenate([of_model / of_model.max() for of_model in scores])
    return Candidate(tree, fitness, tuple(relative.tolist())) if math.isfinite(fitness) else None


def _correlations(problem: _Problem, scores: Floats) -> list[float]:
    """Spearman's correlation of each set; scores are brought to 1 so that none overflows."""
    return [spearman(design @ (scores / scores.max()), damage) for design, damage in problem.sets]
