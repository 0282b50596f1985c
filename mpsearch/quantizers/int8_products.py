"""Whether the int8 products of this machine are exact.

x86 CPUs without VNNI add pairs of products of an unsigned and a signed byte in 16 bits, where they saturate at 32767
(`vpmaddubsw`): 2 x 255 x 127 becomes half of what it is, and outputs of w8a8 layers are off by several percent. Weights
within -64 .. 64, 7 bits, cannot saturate: 2 x 255 x 64 = 32640. Nothing is inferred from the name of a CPU: a product with a
known answer is computed by the engine in question.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mpsearch.errors import warn

_ROWS, _LENGTH, _COLUMNS = 32, 64, 32


def _torch() -> float:
    import torch

    ones = torch.ones(_ROWS, _LENGTH, dtype=torch.int8)
    product = torch._int_mm(127 * ones, 127 * torch.ones(_LENGTH, _COLUMNS, dtype=torch.int8))
    return float(product[0, 0]) / (127 * 127 * _LENGTH)


def _onnxruntime() -> float:
    weights = np.full((_LENGTH, _COLUMNS), 127, np.int8)
    inputs = np.full((_ROWS, _LENGTH), 255, np.uint8)
    product = _computed("MatMulInteger", inputs, {"w": weights}, "")
    return float(product[0, 0]) / (255 * 127 * _LENGTH)


def _matmul_nbits() -> float:
    constants = {
        "w": np.full((_COLUMNS, _LENGTH // 32, 32), 255, np.uint8),  # 127 beside the zero-point 128
        "s": np.full((_COLUMNS, _LENGTH // 32), 1.0, np.float32),
    }
    settings = {"K": _LENGTH, "N": _COLUMNS, "bits": 8, "block_size": 32, "accuracy_level": 4}
    inputs = np.ones((_ROWS, _LENGTH), np.float32)
    product = _computed("MatMulNBits", inputs, constants, "com.microsoft", **settings)
    return float(product[0, 0]) / (127 * _LENGTH)


def _computed(operator: str, inputs: Any, constants: dict[str, Any], domain: str, **settings: int) -> Any:
    """Output of one ONNX Runtime node of inputs and constants."""
    onnx: Any = importlib.import_module("onnx")
    session: Any = importlib.import_module("onnxruntime").InferenceSession
    helper = onnx.helper
    out = onnx.TensorProto.INT32 if inputs.dtype == np.uint8 else onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *constants], ["y"], domain=domain, **settings)],
        "product",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(inputs.dtype), inputs.shape)],
        [helper.make_tensor_value_info("y", out, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return session(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": inputs})[0]


#: Engine -> a function that computes a product of the largest codes, over what it should be.
PRODUCTS: dict[str, Callable[[], float]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "onnxruntime MatMulNBits": _matmul_nbits,
}


@functools.cache
def saturation(engine: str) -> float:
    """Share of the largest sum of products that an engine loses on this machine: 0 where it is exact, about half where it saturates.

    Args:
        engine: a name in `PRODUCTS`, installed.
    """
    share = 1.0 - PRODUCTS[engine]()
    return share if abs(share) > 1e-3 else 0.0


def warn_of_saturation(engine: str, layers: Iterable[str], remedy: str) -> None:
    """Tell of layers whose outputs an engine computes wrongly on this machine; nothing where its products are exact.

    Args:
        engine: a name in `PRODUCTS`, installed.
        layers: with weights of 8 bits whose products are in int8.
        remedy: what to do.
    """
    names = list(layers)
    if names and (lost := saturation(engine)):
        first = f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        warn(
            f"int8 products of {engine} saturate on this machine: {_LENGTH} products of the largest codes add up to {1 - lost:.2f} "
            f"of their sum, so weights of 8 bits ({first}) give outputs here that are off by several percent; {remedy}"
        )
