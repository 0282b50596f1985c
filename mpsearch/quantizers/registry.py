"""Every quantizer by name, and the one place where a name, a function or an object becomes a quantizer that is ready to work."""

from collections.abc import Sequence

from torch import nn

from mpsearch.errors import EstimatorError, nearest
from mpsearch.models.running import Batch
from mpsearch.quantizers.awq import ActivationAware
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.hadamard import HadamardRotation
from mpsearch.quantizers.min_max import MinMax
from mpsearch.quantizers.percentile import PercentileClip
from mpsearch.quantizers.quantizer import Quantizer, WeightFunction, checked_quantizer
from mpsearch.quantizers.rounding import RoundByLargest, RoundToNearest
from mpsearch.quantizers.smoothquant import SmoothQuant

#: Name in Python and on the command line -> class.
QUANTIZERS: dict[str, type[Quantizer]] = {
    "rtn": RoundToNearest,
    "rtn-max": RoundByLargest,
    "min-max": MinMax,
    "percentile": PercentileClip,
    "hadamard": HadamardRotation,
    "smoothquant": SmoothQuant,
    "awq": ActivationAware,
    "gptq": GPTQ,
}
#: What a door takes as its quantizer: a name of `QUANTIZERS`, a quantizer, or a function of a weight and a precision.
AnyQuantizer = str | Quantizer | WeightFunction


def resolve_quantizer(
    quantizer: AnyQuantizer | None, model: nn.Module | None = None, batches: Sequence[Batch] | None = None
) -> Quantizer:
    """The quantizer that a door was asked for, ready to work where there is data.

    A name becomes the class of that name with its default settings, a function is put in the one adapter, and what looks at the inputs of
    layers (`needs_data`) is shown them, once. A door calls it twice: without a model before any work, so that what is no quantizer is
    refused at once; and with the prepared model and its calibration data. What is ready comes back as it is.

    Args:
        quantizer: a name of `QUANTIZERS`, an object, a function; None = `RoundToNearest()`.
        model: the one that will be quantized, its weights as they are; None = not yet.
        batches: calibration data.

    Raises:
        EstimatorError: for an unknown name, or what is neither a quantizer nor a function.

    >>> import torch
    >>> resolve_quantizer("rtn-max"), resolve_quantizer("gptq").needs_data
    (RoundByLargest(symmetric=True, scale='max', granularity='channel', activation='tensor'), True)
    >>> resolve_quantizer("gptq", nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)]).needs_data
    False
    """
    if isinstance(quantizer, str):
        if quantizer not in QUANTIZERS:
            raise EstimatorError(f"unknown quantizer {quantizer!r}{nearest(quantizer, QUANTIZERS)}")
        quantizer = QUANTIZERS[quantizer]()
    ready = checked_quantizer(quantizer)
    if model is None or batches is None or not ready.needs_data:
        return ready
    return ready.calibrated(model, batches)
