"""Real kernels of PyTorch and ONNX Runtime for one layer at one precision."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import MissingPackage
from mpsearch.formats import CASTS
from mpsearch.modules import canonical, kind_of
from mpsearch.precision import Precision

#: One run of a layer.
Kernel = Callable[[], Any]


class NoKernel(Exception):
    """Nothing installed runs the layer at the precision; says why."""


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


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def _per_channel(weight: Tensor) -> Tensor:
    """A weight quantized to int8, a scale an output channel."""
    scales = (weight.flatten(1).abs().amax(1) / 127).clamp(min=1e-12).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces the end of quantized tensors; the kernels stay
        return torch.quantize_per_channel(weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8)


def _dynamic_linear(module: nn.Module, x: Tensor) -> Kernel:
    bias = _bias(module)
    packed = torch.ops.quantized.linear_prepack(
        _per_channel(canonical(module).detach().float().contiguous()), None if bias is None else bias.float()
    )
    return lambda: torch.ops.quantized.linear_dynamic(x.float(), packed).to(x.dtype)


def _static_convolution(module: nn.Module, x: Tensor) -> Kernel:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise NoKernel(f"PyTorch runs no int8 convolution with padding {module.padding!r}, {module.padding_mode}")
    name = f"conv{x.ndim - 2}d"
    bias = _bias(module)
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
    made = module.forward(x).float()
    scale_in, zero_in = _range(low, high)
    scale_out, zero_out = _range(*(float(v) for v in made.aminmax()))

    def kernel() -> Tensor:
        found: Tensor = run(
            torch.quantize_per_tensor(x.float(), scale_in, zero_in, torch.quint8), packed, scale_out, zero_out
        )
        return found.dequantize().to(x.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel()
    return kernel


def _range(low: float, high: float) -> tuple[float, int]:
    """Scale and zero-point of unsigned 8 bits."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)


def _int8_weights(module: nn.Module, x: Tensor) -> Kernel:
    weight = canonical(module).detach()
    scales = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    flat, scales, bias = x.reshape(-1, x.shape[-1]), scales.to(x.dtype), _bias(module)

    def kernel() -> Tensor:
        found: Tensor = torch._weight_int8pack_mm(flat, codes, scales)
        return found if bias is None else found + bias

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
    flat, bias = x.reshape(-1, inputs), _bias(module)

    def kernel() -> Tensor:
        found: Tensor = torch._weight_int4pack_mm_for_cpu(flat, packed, size, points)
        return found if bias is None else found + bias

    return kernel


def onnxruntime_kernel(module: nn.Module, x: Tensor, precision: Precision) -> Kernel:
    """A kernel of ONNX Runtime on the CPU, float32 in and out.

    Runs linear layers: left alone (MatMul), `w8a8` (DynamicQuantizeLinear, MatMulInteger), and 2, 4 or 8 bits with groups of 16, 32, 64,
    128 or 256 (MatMulNBits); and convolutions left alone.

    Raises:
        NoKernel: for all else.
        MissingPackage: without onnxruntime and onnx.
    """
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as error:
        raise MissingPackage(
            f"latency_s with engine 'onnxruntime' needs {error.name}: pip install 'mpsearch[onnxruntime]'"
        ) from None
    kind = kind_of(module)
    left_alone = not precision.quantizes_weight and not precision.quantizes_activation
    values = canonical(module).detach().float().numpy()
    constants: dict[str, Any] = {}
    if kind == "linear" and left_alone:
        constants["w"] = np.ascontiguousarray(values.T)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    elif kind == "linear" and precision == Precision("8", "8"):
        scales = np.maximum(np.abs(values).max(1) / 127, 1e-12).astype(np.float32)
        constants["w"] = np.ascontiguousarray(np.round(values / scales[:, None]).astype(np.int8).T)
        constants["s"] = scales
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "sx", "zx"]),
            helper.make_node("MatMulInteger", ["q", "w", "zx"], ["i"]),
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["sx", "s"], ["m"]),
            helper.make_node("Mul", ["f", "m"], ["y"]),
        ]
    elif kind == "linear" and precision.weight in ("2", "4", "8") and precision.group_size in (16, 32, 64, 128, 256):
        if precision.quantizes_activation:
            raise NoKernel(f"ONNX Runtime's MatMulNBits takes inputs that are left alone, got a{precision.activation}")
        outputs, inputs = values.shape
        bits, size = precision.weight_bits, precision.group_size
        blocks = -(-inputs // size)
        drawn = np.random.default_rng(0)  # the time does not depend on the codes
        constants["w"] = drawn.integers(0, 256, (outputs, blocks, size * bits // 8), np.uint8)
        constants["s"] = np.full(outputs * blocks, 0.01, np.float32)
        nodes = [
            helper.make_node(
                "MatMulNBits",
                ["x", "w", "s"],
                ["y"],
                domain="com.microsoft",
                K=inputs,
                N=outputs,
                bits=bits,
                block_size=size,
                accuracy_level=4,
            )  # fmt: skip
        ]
    elif kind in ("conv1d", "conv2d", "conv3d") and left_alone and isinstance(getattr(module, "padding", ""), tuple):
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        constants["w"] = values
        nodes = [
            helper.make_node(
                "Conv",
                ["x", "w"],
                ["y"],
                strides=list(module.stride),
                dilations=list(module.dilation),
                pads=[*module.padding] * 2,
                group=module.groups,
            )  # fmt: skip
        ]
    else:
        raise NoKernel(f"ONNX Runtime runs no {precision} of a {kind} layer here")
    return _session(onnxruntime, nodes, constants, x)


def _session(onnxruntime: Any, nodes: list[Any], constants: dict[str, Any], x: Tensor) -> Kernel:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString(),
        settings,
        providers=["CPUExecutionProvider"],
    )
    given = {"x": x.float().numpy()}
    return lambda: session.run(None, given)
