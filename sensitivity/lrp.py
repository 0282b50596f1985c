"""Layer-wise relevance propagation."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import Floats, cells_from_scores, unit_scores
from mpsearch.estimation.relevance.linear_maps import Flow, Rule
from mpsearch.estimation.relevance.propagation import Propagation
from mpsearch.estimation.relevance.rules import Attention, Junction
from mpsearch.metrics.statistics import Mean
from mpsearch.models.observing import by_sample
from mpsearch.models.running import Batch, call, predictions, samples


@dataclass(frozen=True)
class LRP:
    """How much of the prediction's relevance a layer carries (Bach et al. 2015), times its relative quantization error.

    The logit of the label, of the predicted class where there is none, of every prediction of a batch is propagated back by the rules of
    `mpsearch.estimation.relevance.propagation.Propagation`. With R the relevance of a layer's output, each of its elements or summed over a
    sample, and T the explained logits,

        score(l) = mean over samples of sum |R| / mean over samples of sum |T|        (`absolute`)
        score(l) = mean over samples of |R_branch| / (|R_branch| + |R_skip|)          (`branch`)
        sensitivity(l, o) = score(l) x ||Q(W) - W||^2 / ||W||^2                       [relative]

    where R_branch and R_skip enter the innermost sum with only the one of them from the layer (1 for a layer without such
    a sum, 0 for one that no relevance reaches; where both have the same sign it is the share R_branch / (R_branch + R_skip)).
    The plain sum of R is no score: relevance is conserved, so that it is the same in every layer of a chain.
    `absolute` is the default since `branch` cannot tell the layers of one branch, or of a network without
    branches, from each other. A weight used several times, or tied, adds up its uses.

    A baseline: relevance says what the prediction rests on, not what it does when that is disturbed, and it grows with depth
    where it cancels. `cp-lrp` gives query and key layers no relevance, so plans give them the fewest bits.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.94, 0.78 among plans of equal size; its own plans do 1.53 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        convolution: rule of convolutions: `epsilon`, `gamma`, `z+` or `alpha-beta`.
        linear: rule of other linear maps.
        attention: `attn-lrp` (Achtibat et al. 2024) or `cp-lrp` (Ali et al. 2022).
        score: `absolute` or `branch`.
        epsilon: stabilizer of denominators, 0 or more.
        gamma: of the gamma rule, 0 or more.
        alpha: of the alpha-beta rule, 1 or more; beta = alpha - 1.

    Logit 2 = 3 * 2 - 1 * 4 from a layer that doubles: R = (6, -4), so the first layer scores (6 + 4) / 2, the last 2 / 2.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(2 * torch.eye(2)), model[1].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> table = mps.profile(model, [torch.tensor([[1.0, 2.0]])], LRP(), mps.precisions("w4 w16"),
    ...                     quantizer=lambda weight, precision: 1.5 * weight)    # relative squared error 1/4
    >>> table.sensitivity.round(4)
    array([[1.25, 0.  ],
           [0.25, 0.  ]])
    """

    convolution: Rule = "epsilon"
    linear: Rule = "epsilon"
    attention: Attention = "attn-lrp"
    score: Literal["absolute", "branch"] = "absolute"
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0

    def __post_init__(self) -> None:
        for name, kind in (("convolution", Rule), ("linear", Rule), ("attention", Attention)):
            _check_choice(name, getattr(self, name), get_args(kind))
        _check_choice("score", self.score, ("absolute", "branch"))
        for name, least in (("epsilon", 0.0), ("gamma", 0.0), ("alpha", 1.0)):
            if not getattr(self, name) >= least:
                raise EstimatorError(f"{name}={getattr(self, name)}: expected {least:g} or more")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone; others take one forward pass more, for their error."""
        return Passes(forward=1, backward=1)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: for an operation without a rule, a layer whose use is not seen, or a relevance that is not
                finite.
        """
        return cells_from_scores(context, *unit_relevance(self, context))


def unit_relevance(lrp: LRP, context: Context) -> tuple[Floats, Floats]:
    """Score of each decision, without a bit axis, from one forward and one backward pass.

    Returns:
        (D,) scores and (D,) standard errors; the weights of a decision add up.

    Raises:
        EstimatorError: as `LRP.estimate`.
    """
    for parameter in context.model.parameters():
        parameter.requires_grad_(False)
    names = {p: layer.name for decision in context.decisions for p, layer in context.parameters(decision).items()}
    means = {p: Mean() for p in names}
    explained = Mean()
    for number, batch in enumerate(context.progress(context.batches, len(context.batches), "LRP")):
        count = samples(batch)
        sums = {p: torch.zeros(count, dtype=torch.float64) for p in names}
        total = _absolute(lrp, context, batch, sums) if lrp.score == "absolute" else _branch(lrp, context, batch, sums)
        context.passes.add(len(context.batches), forward=1, backward=1)
        index = torch.arange(count)
        explained.add(total, index, count)
        for p, values in sums.items():
            if not torch.isfinite(values).all():
                raise EstimatorError(
                    f"the relevance of layer {names[p]!r} is not finite in batch {number}; "
                    "half precision overflows where float32 or bfloat16 do not"
                )
            means[p].add(values, index, count)
    scale = explained.value if explained.value > 0 else 1.0
    score = unit_scores(context, {p: mean.value / scale for p, mean in means.items()})
    variance = unit_scores(context, {p: (mean.se / scale) ** 2 for p, mean in means.items()})
    return score, np.sqrt(variance)


Sums = dict[nn.Parameter, Tensor]


def _absolute(lrp: LRP, context: Context, batch: Batch, sums: Sums) -> Tensor:
    """Add sum |R| of each sample to `sums`; returns the sum of the explained |logits|."""

    def observe(weight: nn.Parameter, relevance: Tensor) -> None:
        if weight in sums:
            sums[weight] += _by_sample(relevance.abs(), samples(batch))

    return _propagate(_propagation(lrp, observe=observe), context, batch, sums)[1]


def _branch(lrp: LRP, context: Context, batch: Batch, sums: Sums) -> Tensor:
    """Add the branch share of each sample to `sums`; returns ones."""
    propagation = _propagation(lrp, sums=True)
    branches, _ = _propagate(propagation, context, batch, sums)
    count = samples(batch)
    for flow, branch in branches.items():
        if flow.weight not in sums:
            continue
        if branch is None:
            sums[flow.weight] += 1.0
            continue
        junction, side = branch
        assert junction.relevance is not None  # it lies below the output
        sides = torch.stack([_by_sample(r, count) for r in junction.relevance.unbind(1)]).abs()
        sums[flow.weight] += sides[side] / sides.sum(0).clamp_min(torch.finfo(sides.dtype).tiny)
    return torch.ones(count, dtype=torch.float64)


def _propagation(lrp: LRP, **keywords: Any) -> Propagation:
    return Propagation(
        convolution=lrp.convolution,
        linear=lrp.linear,
        attention=lrp.attention,
        epsilon=lrp.epsilon,
        gamma=lrp.gamma,
        alpha=lrp.alpha,
        **keywords,
    )


def _propagate(
    propagation: Propagation, context: Context, batch: Batch, sums: Sums
) -> tuple[dict[Flow, tuple[Junction, int] | None], Tensor]:
    """Forward and backward; the branches of all uses of weights, and the sum of |explained logits| of each sample."""
    with torch.enable_grad():
        with propagation:
            output = call(context.model, batch)
        seen = {flow.weight for flow in propagation.flows}
        unseen = [
            layer.name
            for decision in context.decisions
            for p, layer in context.parameters(decision).items()
            if p not in seen
        ]
        if unseen:
            raise EstimatorError(
                f"no relevance for layer {unseen[0]!r}: its weight enters no linear map, convolution or embedding that "
                "torch functions show (compiled, scripted, changed on the way, or run without gradients?)"
            )
        if not output.requires_grad:
            raise EstimatorError("no relevance reaches any layer: the output is cut off from them")
        branches = propagation.branches(output)
        logits, labels, index = predictions(context.model, output, batch)
        chosen = logits.argmax(-1) if labels is None else labels
        explained = logits.gather(1, chosen[:, None])[:, 0]
        try:
            torch.autograd.grad(explained.sum(), propagation.leaves, allow_unused=True)
        except CheckpointError:
            raise EstimatorError(
                "relevance cannot go through torch.utils.checkpoint: turn it off in evaluation mode"
            ) from None
    total = torch.zeros(samples(batch), dtype=torch.float64)
    return branches, total.index_add_(0, index.cpu(), explained.detach().abs().double().cpu())


def _by_sample(relevance: Tensor, count: int) -> Tensor:
    """(count,) sums over the samples, which lie in the first dimension; where they do not, the mean for each."""
    rows = by_sample(relevance, count).sum(1).cpu().double()
    return rows if len(rows) == count else rows.sum().expand(count) / count


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EstimatorError(f"{name}={value!r}: expected one of {', '.join(choices)}")
