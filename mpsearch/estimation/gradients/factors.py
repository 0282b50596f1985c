"""Second moments of the inputs and output gradients of layers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.gradients.per_sample import unfolded
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.weights import stores_inputs_first


@dataclass(frozen=True)
class Factors:
    """Second moments of one call of a layer.

    Attributes:
        inputs_first: the weight is stored (inputs, outputs).
        inputs: (N, G, I) mean over places of x^2, G groups of I inputs (channels x kernel).
        gradients: (N, O) sum over places of g^2.
        noises: by number of precision, (N, G, I) mean over places of the squared error of the input.
    """

    inputs_first: bool
    inputs: Tensor
    gradients: Tensor
    noises: dict[int, Tensor]


def factors(module: nn.Module, x: Tensor, g: Tensor, samples: int, noises: Mapping[int, Tensor]) -> Factors:
    """Second moments of the inputs and output gradients of a call, for each sample.

    Raises:
        EstimatorError: for a kind of layer that has none here.
    """
    if isinstance(module, nn.Embedding):
        tokens = x.reshape(samples, -1)
        counts = wide(g).new_zeros(samples, module.num_embeddings)
        counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=counts.dtype))
        inputs = counts[:, None] / tokens.shape[1]
        return Factors(True, inputs, wide(g).reshape(samples, -1, g.shape[-1]).square().sum(1), {})
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros":
        gradients = wide(g).square().flatten(2).sum(2).reshape(samples, -1, g.shape[1]).sum(1)

        def mean_square(z: Tensor) -> Tensor:
            patches = unfolded(module, z.to(torch.promote_types(z.dtype, torch.float32))).square()
            places = patches.reshape(samples, -1, *patches.shape[1:]).mean((1, 3))
            return wide(places).reshape(samples, module.groups, -1)

        return Factors(False, mean_square(x), gradients, {p: mean_square(noise) for p, noise in noises.items()})
    transposed = stores_inputs_first(module)
    if isinstance(module, nn.Linear) or transposed:

        def over_tokens(z: Tensor) -> Tensor:
            return wide(z).square().reshape(samples, -1, z.shape[-1]).mean(1)[:, None]

        gradients = wide(g).square().reshape(samples, -1, g.shape[-1]).sum(1)
        return Factors(transposed, over_tokens(x), gradients, {p: over_tokens(noise) for p, noise in noises.items()})
    raise EstimatorError(
        f"no second moments for a {type(module).__name__}: linear, conv1d, conv2d and embedding layers have them; "
        "leave the layer out, or use FisherProjection"
    )
