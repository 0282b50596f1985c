"""Whether a model is the same function in every call."""

from typing import Any

import torch
from torch import nn

from mpsearch.errors import EstimatorError
from mpsearch.models.data.splitting import few_tokens
from mpsearch.models.running import Batch, call, logits_of, not_finite, output_of

#: Samples that are run twice.
PROBED = 8


def probed_output(model: nn.Module, batch: Batch) -> Any:
    """All that the model returns for the first samples of a batch, which two passes must agree on.

    Catches dropout that evaluation mode does not turn off, other randomness, and models that remember their calls.

    Args:
        model: in evaluation mode.
        batch: its first `PROBED` samples are run, of long texts fewer.

    Raises:
        EstimatorError: where the passes differ, or the output is not finite.
    """
    samples = few_tokens(batch, PROBED)
    with torch.no_grad():
        output = output_of(model, samples)
        first, second = logits_of(output), call(model, samples)
    if not torch.isfinite(first).all():
        raise EstimatorError(f"the output of the unquantized model on the first batch is not finite{not_finite(model)}")
    if first.shape != second.shape:
        raise EstimatorError(
            f"two passes over the same batch return {tuple(first.shape)} and {tuple(second.shape)}: the model is random in evaluation mode"
        )
    change, size = (float(values.abs().amax()) if values.numel() else 0.0 for values in (first - second, first))
    if change > 1e-4 * size:
        raise EstimatorError(
            f"two passes over the same batch differ by up to {change:.3g}, the output is up to {size:.3g}: the model is random in "
            "evaluation mode (functional dropout without training=self.training?), or remembers its calls"
        )
    return output
