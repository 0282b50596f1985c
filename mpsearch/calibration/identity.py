"""What a score depends on, so that results in a file are gone on from by the same run alone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.core.wrapped_names import plain
from mpsearch.decisions.mask import leaves_alone, only_allowed, refused_options
from mpsearch.metrics.divergences import KL
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.targets import Loss as TargetLoss
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.modules.weights import layer_of, weight_of
from mpsearch.models.running import fingerprint
from mpsearch.models.streaming.offloading import resident
from mpsearch.quantizers.quantizer import Quantizer
from mpsearch.quantizers.rounded_weights import RoundedWeights


def run_identity(
    model: nn.Module,
    output: str,
    weights: str,
    data: str,
    decided: Sequence[Layer],
    options: Sequence[Precision],
    quantizer: Quantizer,
    loss: Any,
    rounded: RoundedWeights,
) -> dict[str, str]:
    """What a score depends on: the model by its weights and by its output on a few samples.

    The quantizer is known by its settings and by what it does to the smallest layer.
    """
    allowed = only_allowed(quantizer, decided, options, refused_options(decided, options))

    def values(module: nn.Module, name: str, option: Precision) -> Tensor:
        if leaves_alone(allowed, name, option):
            with resident(module):
                return weight_of(module).detach()
        return rounded.value(module, name, option, quantizer)

    sizes = {layer.name: layer.numel for layer in decided if not layer.is_cache}
    smallest = [(layer_of(model, name), name) for name in sorted(sizes, key=lambda name: sizes[name])[:1]]
    return {
        "weights": weights,
        "output": output,
        "data": data,
        "layers": digest(*(_told_apart(layer) for layer in decided)),
        "precisions": " ".join(map(str, options)),
        "quantizer": digest(
            described(quantizer),
            fingerprint(values(*layer, option) for layer in smallest for option in options),
        ),
        "loss": title(loss) if loss in (KL(), TargetLoss()) else f"{title(loss)} {digest(described(loss))}",
    }


def title(loss: Any) -> str:
    """Name of a loss for people."""
    if isinstance(loss, TargetLoss):
        return {"classes": "cross-entropy", "labels": "binary cross-entropy", "numbers": "squared error"}[loss.kind]
    return loss.name if isinstance(loss, Comparison) else _name(loss)


def _told_apart(layer: Layer) -> str:
    """What of a layer a score depends on, besides its weight: what it may not have is never run."""
    return f"{plain(layer.name)} {plain(layer.group)}" + (
        f" {' '.join(map(str, layer.allowed))}" if layer.allowed else ""
    )


def _name(function: Any) -> str:
    """Name of a function, the same in every process."""
    return getattr(function, "__qualname__", None) or type(function).__qualname__
