"""The tensors that expressions of proxies are built from."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.hessian import (
    differentiable_weights,
    gradient,
    hessian_products,
    mean_gradient,
    ones_like_sample,
    rademacher,
)
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.operand import Operand
from mpsearch.models.modules.weights import channel_axis, weight_of
from mpsearch.models.observing import input_of
from mpsearch.models.running import call, samples
from mpsearch.models.streaming.offloading import replaced


def weight_inputs(
    context: Context, names: Collection[str], *, num_samples: int, seed: int
) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The inputs of `Tree` for every weight, laid out as the weight, in float32 or wider.

        weight            W
        gradient          g = d mean loss / d W; for `kl` of the cross-entropy of the data's labels, or of labels drawn from the model
        activation        root mean square, over samples and places, of the layer's input that each weight multiplies
        hessian           diagonal of the Hessian of the loss, from Hessian-vector products: mean over Rademacher z of z (H z);
                          for `kl` of the Gauss-Newton matrix
        virtual_gradient  gradient of the summed logits for an input of ones

    EMQ (2307.10554) takes feature maps for activations, its sibling code H z of one z for the Hessian. Neither goes well with weights:
    feature maps have another shape, and H z has random signs.

    Args:
        context: model, data and loss.
        names: those wanted; nothing else is computed.
        num_samples: Hessian-vector products a batch.
        seed: of drawn labels and probes.

    Raises:
        EstimatorError: where the model cannot be differentiable_weights, or an input is not finite.
    """
    weights = differentiable_weights(context)
    tensors_of: dict[str, Sequence[Tensor]] = {"weight": [w.detach() for w in weights]}
    if "gradient" in names:
        tensors_of["gradient"] = mean_gradient(context, weights, seed)
    if "activation" in names:
        tensors_of["activation"] = _activations(context, weights)
    if "hessian" in names:
        tensors_of["hessian"] = _hessian_diagonals(context, weights, num_samples, seed)
    if "virtual_gradient" in names:
        tensors_of["virtual_gradient"] = _virtual_gradients(context, weights)
    for name, tensors in tensors_of.items():
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise EstimatorError(f"the {name} of a layer is not finite")
    return {w: {name: tensors_of[name][place] for name in names} for place, w in enumerate(weights)}


def cost(names: Collection[str], batches: int, num_samples: int) -> Passes:
    """Passes over the data that `weight_inputs` takes."""
    passes = Passes()
    if "gradient" in names:
        passes.add(1, forward=1, backward=1)
    if "activation" in names:
        passes.add(1, forward=2, backward=1)
    if "hessian" in names:
        passes.add(1, forward=1, backward=1 + 2 * num_samples)
    if "virtual_gradient" in names:
        passes.add(batches, forward=1, backward=1)
    return passes


def _virtual_gradients(context: Context, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    with torch.enable_grad():
        gradients = gradient(wide(call(context.model, ones_like_sample(context.batches[0]))).sum(), weights)
    context.passes.add(len(context.batches), forward=1, backward=1)
    return gradients


def _activations(context: Context, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """A layer is linear in its weight, so the sum of its outputs for squared inputs has the wanted sums as its gradient."""
    sums = {w: torch.zeros_like(wide(w.detach())) for w in weights}
    places = dict.fromkeys(weights, 0)

    def see(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], y: Tensor) -> None:
        weight, axis = weight_of(module), channel_axis(module)
        x, rest = input_of(args, keywords), args[1:] if isinstance(module, Operand) else ()
        with torch.enable_grad(), replaced({p: wide(p.detach()) for p in module.parameters(recurse=False)}):
            squared = module.forward(wide(x).square() if x.is_floating_point() else x, *rest)
            sums[weight] += torch.autograd.grad(squared.sum(), weight)[0]
        places[weight] += y.numel() // y.shape[axis]

    modules = dict.fromkeys(context.module(layer) for decision in context.decisions for layer in decision.layers)
    handles = [module.register_forward_hook(see, prepend=True, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            for batch in context.progress(context.batches, len(context.batches), "activations"):
                call(context.model, batch)
                context.passes.add(len(context.batches), forward=2, backward=1)
    finally:
        for handle in handles:
            handle.remove()
    return [(sums[w] / max(places[w], 1)).sqrt() for w in weights]


def _hessian_diagonals(context: Context, weights: Sequence[nn.Parameter], num_samples: int, seed: int) -> list[Tensor]:
    total = sum(samples(batch) for batch in context.batches)
    generator = torch.Generator().manual_seed(seed)
    diagonals = [torch.zeros_like(wide(w.detach())) for w in weights]
    for batch in context.progress(context.batches, len(context.batches), "Hessian diagonals"):
        with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            slopes = gradient(context.mean_loss(batch), weights, create_graph=True)
        for _ in range(num_samples):
            signs = [rademacher(w, generator) for w in weights]
            for whole, z, product in zip(diagonals, signs, hessian_products(slopes, weights, signs), strict=True):
                whole.add_(z * product, alpha=samples(batch) / total / num_samples)
        context.passes.add(len(context.batches), forward=1, backward=1 + 2 * num_samples)
    return diagonals
