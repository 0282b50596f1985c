"""Real kernels of PyTorch."""

import copy
import warnings

import torch
from torch import Tensor, nn

from mpsearch.core.precision import Precision
from mpsearch.models.modules.weights import canonical, kind_of
from mpsearch.quantizers.formats.casts import CASTS
from mpsearch.resources.kernels import Kernel, NoKernel, bias_of, unsigned_range


def torch_kernel(module: nn.Module, x: Tensor, precision: Precision) -> Kernel:
    """A kernel of PyTorch; conversions from and to the dtype of the input are part of it.

    Runs: what is left alone; casts (`wbf16abf16`); on the CPU `w8a8`, linear layers with inputs quantized on the spot, convolutions with
    calibrated inputs; and of a bfloat16 model `w8` and `w4g32` to `w4g256` of linear layers (weights alone).

    Raises:
        NoKernel: for all else.
    """
    kind, dtype = kind_of(module), str(x.dtype).removeprefix("torch.")
    if not precision.quantizes_weight and not precision.quantizes_activation:
        return lambda: module.forward(x)
    if precision.weight in CASTS:
        target = CASTS[precision.weight]
        if precision.activation != precision.weight and (precision.quantizes_activation or x.dtype != target):
            raise NoKernel(
                f"weights of {precision.weight} need inputs of {precision.weight}: w{precision.weight}a{precision.weight}"
            )
        cast = copy.deepcopy(module).to(target)
        if not x.is_floating_point():
            return lambda: cast.forward(x)
        return lambda: cast.forward(x.to(target)).to(x.dtype)
    if x.device.type == "cpu" and precision == Precision("8", "8") and kind == "linear":
        return _dynamic_linear(module, x)
    if x.device.type == "cpu" and precision == Precision("8", "8") and kind in ("conv1d", "conv2d", "conv3d"):
        return _static_convolution(module, x)
    if x.device.type == "cpu" and kind == "linear" and x.dtype == torch.bfloat16:
        if precision == Precision("8"):
            return _int8_weights(module, x)
        if (
            precision.weight == "4"
            and not precision.quantizes_activation
            and precision.group_size in (32, 64, 128, 256)
        ):
            return _int4_weights(module, x, precision.group_size)
    raise NoKernel(f"PyTorch runs no {precision} of a {kind} layer with {dtype} inputs on {x.device.type}")


def _per_channel(weight: Tensor) -> Tensor:
    """A weight quantized to int8, a scale an output channel."""
    scales = (weight.flatten(1).abs().amax(1) / 127).clamp(min=1e-12).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces the end of quantized tensors; the kernels stay
        return torch.quantize_per_channel(weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8)


def _dynamic_linear(module: nn.Module, x: Tensor) -> Kernel:
    bias = bias_of(module)
    packed = torch.ops.quantized.linear_prepack(
        _per_channel(canonical(module).detach().float().contiguous()), None if bias is None else bias.float()
    )
    return lambda: torch.ops.quantized.linear_dynamic(x.float(), packed).to(x.dtype)


def _static_convolution(module: nn.Module, x: Tensor) -> Kernel:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise NoKernel(f"PyTorch runs no int8 convolution with padding {module.padding!r}, {module.padding_mode}")
    name = f"conv{x.ndim - 2}d"
    bias = bias_of(module)
    pack, run = getattr(torch.ops.quantized, f"{name}_prepack"), getattr(torch.ops.quantized, name)
    weight = _per_channel(module.weight.detach().float())
    packed = pack(
        weight,
        None if bias is None else bias.float(),
        list(module.stride),
        list(module.padding),
        list(module.dilation),
        module.groups,
    )
    low, high = (float(v) for v in x.float().aminmax())
    y = module.forward(x).float()
    scale_in, zero_in = unsigned_range(low, high)
    scale_out, zero_out = unsigned_range(*(float(v) for v in y.aminmax()))

    def kernel() -> Tensor:
        product: Tensor = run(
            torch.quantize_per_tensor(x.float(), scale_in, zero_in, torch.quint8), packed, scale_out, zero_out
        )
        return product.dequantize().to(x.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel()
    return kernel


def _int8_weights(module: nn.Module, x: Tensor) -> Kernel:
    weight = canonical(module).detach()
    scales = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    flat, scales, bias = x.reshape(-1, x.shape[-1]), scales.to(x.dtype), bias_of(module)

    def kernel() -> Tensor:
        product: Tensor = torch._weight_int8pack_mm(flat, codes, scales)
        return product if bias is None else product + bias

    return kernel


def _int4_weights(module: nn.Module, x: Tensor, size: int) -> Kernel:
    weight = canonical(module).detach().float()
    outputs, inputs = weight.shape
    if inputs % size or outputs % 16:
        raise NoKernel(f"PyTorch packs int4 weights in groups of {size} and rows of 16, got {outputs} x {inputs}")
    groups = weight.reshape(outputs, -1, size)
    scales = (groups.abs().amax(2) / 7).clamp(min=1e-12)
    codes = ((groups / scales[..., None]).round() + 8).clamp(0, 15).to(torch.int32).reshape(outputs, inputs)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    points = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1).contiguous().to(x.dtype)
    flat, bias = x.reshape(-1, inputs), bias_of(module)

    def kernel() -> Tensor:
        product: Tensor = torch._weight_int4pack_mm_for_cpu(flat, packed, size, points)
        return product if bias is None else product + bias

    return kernel
