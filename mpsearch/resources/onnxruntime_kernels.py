"""Real kernels of ONNX Runtime."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.core.packages import package
from mpsearch.core.precision import Precision
from mpsearch.models.modules.weights import canonical, kind_of
from mpsearch.resources.kernels import Kernel, NoKernel, unsigned_range

_FLOAT = 1  # onnx.TensorProto.FLOAT


def onnxruntime_kernel(module: nn.Module, x: Tensor, precision: Precision) -> Kernel:
    """A kernel of ONNX Runtime on the CPU, float32 in and out.

    Biases are left out. Runs linear layers: left alone (MatMul), `w8a8` (DynamicQuantizeLinear, MatMulInteger), and 2, 4 or 8 bits with
    groups of 16, 32, 64, 128 or 256 (MatMulNBits); and convolutions, left alone or `w8a8` with calibrated inputs (QLinearConv).

    Raises:
        NoKernel: for all else.
        MissingPackage: without onnxruntime and onnx.
    """
    helper = package("onnx", "onnxruntime", "latency_s with engine 'onnxruntime'").helper
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
            helper.make_node("Cast", ["i"], ["f"], to=_FLOAT),
            helper.make_node("Mul", ["sx", "s"], ["m"]),
            helper.make_node("Mul", ["f", "m"], ["y"]),
        ]
    elif kind == "linear" and precision.weight in ("2", "4", "8") and precision.group_size in (16, 32, 64, 128, 256):
        if precision.quantizes_activation:
            raise NoKernel(f"ONNX Runtime's MatMulNBits takes inputs that are left alone, got a{precision.activation}")
        constants["w"], constants["s"] = _blocks_of_bits(values, precision.weight_bits, precision.group_size)
        settings = {"K": values.shape[1], "N": values.shape[0], "bits": precision.weight_bits}
        settings |= {"block_size": precision.group_size, "accuracy_level": 4}  # products in int8
        nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **settings)]
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (left_alone or precision == Precision("8", "8")):
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise NoKernel(
                f"a convolution with padding {module.padding!r}, {module.padding_mode} is not handed to ONNX Runtime"
            )
        settings = {"strides": list(module.stride), "dilations": list(module.dilation), "group": module.groups}
        settings["pads"] = [*module.padding] * 2
        if left_alone:
            constants["w"] = values
            nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **settings)]
        else:
            constants |= _static(module, x, values)
            names = ["q", "sx", "zx", "w", "sw", "zw", "sy", "zy"]
            nodes = [
                helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
                helper.make_node("QLinearConv", names, ["i"], **settings),
                helper.make_node("DequantizeLinear", ["i", "sy", "zy"], ["y"]),
            ]
    else:
        raise NoKernel(f"ONNX Runtime runs no {precision} of a {kind} layer here")
    return _session(nodes, constants, x)


def _static(module: nn.Module, x: Tensor, values: NDArray[np.float32]) -> dict[str, Any]:
    """Codes of the weight, and scales and zero-points of weight, input and output."""
    scales = np.maximum(np.abs(values).reshape(len(values), -1).max(1) / 127, 1e-12).astype(np.float32)
    codes = np.round(values / scales.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
    constants: dict[str, Any] = {"w": codes, "sw": scales, "zw": np.zeros(len(scales), np.int8)}
    with torch.no_grad():
        y = module.forward(x)
    for name, tensor in (("x", x), ("y", y)):
        scale, zero = unsigned_range(*(float(v) for v in tensor.float().aminmax()))
        constants |= {f"s{name}": np.float32(scale), f"z{name}": np.uint8(zero)}
    return {key: np.asarray(value) for key, value in constants.items()}


def _blocks_of_bits(values: NDArray[np.float32], bits: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A weight as MatMulNBits stores it: (N, blocks, bytes), lowest bits first, zero at 2^(bits - 1); a scale a block."""
    outputs, inputs = values.shape
    blocks = np.pad(values, ((0, 0), (0, -inputs % size))).reshape(outputs, -1, size)
    half = 1 << (bits - 1)
    scales = np.maximum(np.abs(blocks).max(2, keepdims=True) / max(half - 1, 1), 1e-12)
    codes = np.clip(np.round(blocks / scales) + half, 0, 2 * half - 1).astype(np.uint8)
    parts = codes.reshape(*codes.shape[:2], -1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(parts, axis=3), scales.astype(np.float32).reshape(-1)


def _session(nodes: list[Any], constants: dict[str, Any], x: Tensor) -> Kernel:
    onnx = package("onnx", "onnxruntime", "latency_s with engine 'onnxruntime'")
    onnxruntime = package("onnxruntime", "onnxruntime", "latency_s with engine 'onnxruntime'")
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [onnx.helper.make_tensor_value_info("x", _FLOAT, list(x.shape))],
        [onnx.helper.make_tensor_value_info("y", _FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString(),
        settings,
        providers=["CPUExecutionProvider"],
    )
    feeds = {"x": x.float().numpy()}
    return lambda: session.run(None, feeds)[0]
