"""OMPQ: layers whose features differ from all others deserve bits."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores
from mpsearch.metrics.statistics import wide
from mpsearch.models.observing import Observer, by_sample, observed
from mpsearch.models.running import call, samples

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Orthogonality:
    """Network orthogonality (OMPQ, 2109.07865, and its code).

        ORM(i, j) = <K_i, K_j> / (||K_i|| ||K_j||)      K_i = centred Gram matrix of the flattened outputs of layer i, samples x samples
        theta_i   = exp(-beta sum over j != i of ORM(i, j))
        score(i)  = mean of theta_j over the layers j from i on, in the order in which they first run
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    ORM is linear CKA. OMPQ takes one batch of 32 images and maximizes sum of score x bits; here inner products are
    summed over batches before they are divided, so no features are kept. A baseline: the mean over all later layers
    lets depth alone drive the score, and a group counts the sum of its layers. One forward pass.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.87, 0.59 among plans of equal size; its own plans do 2.49 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        beta: steepness; OMPQ uses 1 to 10.

    Two layers with the same features have ORM 1, so theta = 1/e for both; an error as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    >>> data = [torch.tensor([[1.0], [2.0]])]
    >>> mps.profile(model, data, Orthogonality(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w).sensitivity.round(4)
    array([[0.3679],
           [0.3679]])
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise EstimatorError(f"beta={self.beta}: expected more than 0")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone."""
        return Passes(forward=1)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where every batch has one sample, or features are not finite.
        """
        if all(samples(batch) < 2 for batch in context.batches):
            raise EstimatorError(
                "every batch has one sample; orthogonality compares samples: give batches of 2 or more"
            )
        layers = {layer.name: context.module(layer) for decision in context.decisions for layer in decision.layers}
        products = np.zeros((len(layers), len(layers)))
        order = {name: i for i, name in enumerate(layers)}
        ran: dict[str, None] = {}
        for number, batch in enumerate(context.progress(context.batches, len(context.batches), "orthogonality")):
            grams: dict[str, Tensor] = {}
            with (
                torch.no_grad(),
                observed({module: _gram(name, grams, samples(batch)) for name, module in layers.items()}),
            ):
                call(context.model, batch)
            context.passes.add(len(context.batches), forward=1)
            ran |= dict.fromkeys(grams)
            rows = [order[name] for name in grams]
            flat = torch.stack([_centred(gram).reshape(-1) for gram in grams.values()])
            if not torch.isfinite(flat).all():
                raise EstimatorError(f"the features of a layer are not finite in batch {number}")
            products[np.ix_(rows, rows)] += (flat @ flat.T).numpy()
        rows = [order[name] for name in ran]
        scores = importance(products[np.ix_(rows, rows)], self.beta)
        score = dict.fromkeys(layers, 0.0) | dict(zip(ran, scores, strict=True))
        totals = [sum(score[layer.name] for layer in decision.layers) for decision in context.decisions]
        return cells_from_scores(context, np.array(totals))


def importance(products: Floats, beta: float) -> Floats:
    """Importance of layers from inner products of their centred Gram matrices.

    Args:
        products: (L, L) <K_i, K_j>, in the order in which layers run.
        beta: steepness.

    Returns:
        (L,) mean of theta over each layer and the later ones.

    >>> importance(np.array([[4.0, 0.0], [0.0, 0.0]]), 1.0)    # orthogonal, and constant features: theta = 1
    array([1., 1.])
    """
    sizes = np.sqrt(products.diagonal())
    scale = np.outer(sizes, sizes)
    orm = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    np.fill_diagonal(orm, 0.0)
    theta = np.exp(-beta * orm.sum(axis=1))
    return np.asarray(theta[::-1].cumsum()[::-1] / np.arange(len(theta), 0, -1))


def _gram(name: str, grams: dict[str, Tensor], count: int) -> Observer:
    def see(_given: Tensor, output: Tensor) -> None:
        rows = by_sample(output.detach(), count)
        if len(rows) == count:
            features = wide(rows)
            gram = (features @ features.T).cpu()
            grams[name] = grams[name] + gram if name in grams else gram  # several calls: features side by side

    return see


def _centred(gram: Tensor) -> Tensor:
    mean = gram.mean(0)
    return gram - mean[:, None] - mean[None, :] + mean.mean()
