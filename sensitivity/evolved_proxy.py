"""A training-free proxy given as a formula."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError, FileError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.proxies.inputs import cost, weight_inputs
from mpsearch.estimation.proxies.tree import Tree, parse
from mpsearch.estimation.relative_error import cells_from_scores, unit_scores
from mpsearch.files.schema import checked, parse_json
from mpsearch.files.writing import write_atomically
from mpsearch.metrics.statistics import wide

_VERSION = 1


class _File(TypedDict):
    mpsearch_proxy: int
    formula: str
    num_samples: int
    seed: int
    origin: dict[str, Any]


@dataclass(frozen=True)
class EvolvedProxy:
    """A score written as an expression, as `mps.evolve_proxy` finds them (after EMQ, 2307.10554).

        score(l) = max(mean over elements of formula(inputs of l), 0)
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    The inputs are `weight`, `gradient`, `activation`, `hessian` and `virtual_gradient`, each a tensor laid out as the layer's
    weight (see `mpsearch.estimation.proxies.inputs.weight_inputs`); the operations are those of `mpsearch.estimation.proxies.tree`, f(x)
    or one of x + y, x - y, x * y, x @ y. Only what the formula names is computed: a formula of weights takes no passes. Layers that share
    a precision add up. EMQ multiplies the score by the bits in place of the error.

    A baseline: formulas evolved on three small networks gave a fourth plans with 0.32 of the damage of uniform precision, where EMQ's
    has 0.43, relative error without any score 0.40, SNIP 0.26 and `KLDivergence` 0.24; those evolved on two had 0.51 on others
    (`benchmarks/proxies.py`). Fitness does not tell which: it was 0.89 and 0.90.

    Attributes:
        formula: such as `mean(softmax(log_abs(virtual_gradient)) * sqrt(relu(weight)))`, which is EMQ's published one.
        num_samples: Hessian-vector products a batch, for `hessian`.
        seed: of drawn labels and probes.
        origin: how it was found; JSON values.

    HAWQ-V2 is an expression too: mean Hessian diagonal times squared norm times relative error. For the loss 3/2 w1^2 +
    1/2 w2^2 at weights (3, 1) that is 2 x 10; an error as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> loss = lambda model, batch: (torch.tensor([[1.5, 0.5]]) * model[0].weight ** 2).sum() + 0 * model(batch).sum()
    >>> proxy = EvolvedProxy("mean(hessian) * square(frobenius(weight))")
    >>> mps.profile(model, [torch.ones(1, 2)], proxy, mps.precisions("w4"), loss=loss, quantizer=lambda w, p: 2 * w).sensitivity
    array([[20.]])
    """

    formula: str
    num_samples: int = 4
    seed: int = 0
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise EstimatorError(f"num_samples={self.num_samples}: expected 1 or more")
        object.__setattr__(self, "formula", str(parse(self.formula)))

    def __str__(self) -> str:
        return self.formula

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone; a run of one sample is counted as one batch."""
        return cost(parse(self.formula).inputs, batches, self.num_samples)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where an input cannot be computed, shapes do not fit, or a score is not finite.
        """
        tree = parse(self.formula)
        inputs_of = weight_inputs(context, tree.inputs, num_samples=self.num_samples, seed=self.seed)
        names = {p: layer.name for decision in context.decisions for p, layer in context.parameters(decision).items()}
        with torch.no_grad():
            scores = {weight: _score(tree, inputs, names[weight]) for weight, inputs in inputs_of.items()}
        return cells_from_scores(context, unit_scores(context, scores))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the proxy as JSON, atomically."""
        content = {
            "mpsearch_proxy": _VERSION,
            **{key: getattr(self, key) for key in ("formula", "num_samples", "seed")},
            "origin": dict(self.origin),
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EvolvedProxy":
        """Read a proxy.

        Raises:
            EstimatorError: for a file that holds none, or one of another version.
            OSError: where the file cannot be read.
        """
        try:
            content = parse_json(Path(path).read_bytes())
            if not isinstance(content, dict) or content.get("mpsearch_proxy") != _VERSION:
                raise FileError(f'expected an object with "mpsearch_proxy": {_VERSION}')
            file = checked(content, _File)
            return cls(file["formula"], file["num_samples"], file["seed"], file["origin"])
        except (FileError, EstimatorError) as error:
            raise EstimatorError(f"{path}: {error}") from None


def _score(tree: Tree, inputs: Mapping[str, Tensor], layer: str) -> float:
    try:
        score = tree.score({name: wide(x) for name, x in inputs.items()})
    except EstimatorError as error:
        raise EstimatorError(f"{tree} in layer {layer!r}: {error}") from None
    if not math.isfinite(score):
        raise EstimatorError(f"{tree} is {score} in layer {layer!r}, expected a finite number")
    return score
