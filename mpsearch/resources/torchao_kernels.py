"""Real kernels of torchao."""

import copy

import torch
from torch import Tensor, nn

from mpsearch.core.packages import package
from mpsearch.core.precision import Precision
from mpsearch.models.modules.weights import kind_of
from mpsearch.resources.kernels import Kernel, NoKernel


def torchao_kernel(module: nn.Module, x: Tensor, precision: Precision) -> Kernel:
    """A kernel of torchao, not compiled.

    Runs layers left alone; and linear layers at `w8a8` (a scale for each token), `w8`, and 1 to 7 bits, with groups or a scale an output
    channel (which it widens at every call: smaller, not faster).

    Raises:
        NoKernel: for all else.
        MissingPackage: without torchao.
    """
    if not precision.quantizes_weight and not precision.quantizes_activation:
        return lambda: module.forward(x)
    bits = precision.weight_bits
    if kind_of(module) != "linear" or type(module).__name__ == "Conv1D" or not precision.weight.isdecimal() or bits > 8:
        raise NoKernel(f"torchao runs no {precision} of a {kind_of(module)} layer")
    quantization = package("torchao.quantization", "torchao", "latency_s with engine 'torchao'")
    size = precision.group_size
    if precision == Precision("8", "8"):
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    elif precision.quantizes_activation:
        raise NoKernel(f"torchao runs inputs of 8 bits with weights of 8, got {precision}")
    elif precision == Precision("8"):
        config = quantization.Int8WeightOnlyConfig()
    else:
        scales = quantization.PerAxis(0) if size is None else quantization.PerGroup(size)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=scales)
    holder = nn.Sequential(copy.deepcopy(module))
    try:
        quantization.quantize_(holder, config)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise NoKernel(f"torchao refuses {precision} of {tuple(x.shape)}: {error}") from None
    return lambda: holder(x)
