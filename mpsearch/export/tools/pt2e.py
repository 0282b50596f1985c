"""PyTorch 2 export quantization: a quantizer that annotates each layer of an exported graph with its bits."""

import copy
import io
import os
from typing import Any, cast

import torch
from torch import nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import fitted
from mpsearch.export.tracing import traced
from mpsearch.export.verification import Stored, StoredModel
from mpsearch.files.writing import write_atomically
from mpsearch.models.data.batches import arranged
from mpsearch.models.running import Batch, inputs_of
from mpsearch.models.unwrapping import unwrapped
from mpsearch.quantizers.rounding import RoundToNearest

_EXTRA = "torchao"
_OPERATORS = ("aten.linear", "aten.conv1d", "aten.conv2d")


def pt2e(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    snap: bool = False,
    path: str | os.PathLike[str] | None = None,
    example: Batch | None = None,
    outputs: bool = False,
) -> Any:
    """A quantizer for `torchao.quantization.pt2e.quantize_pt2e.prepare_pt2e(exported, quantizer)` (torchao 0.18).

    Linear, Conv1d and Conv2d layers by full name: symmetric weights of 2 to 8 bits with a scale an output channel, the formula of
    `RoundToNearest(scale="max")`; inputs left alone or int8 with one calibrated range. Unlike the quantizers that come with
    torchao, it raises for a layer that the graph does not hold. Batch norms are folded before.

    Args:
        plan: the plan.
        model: checks names and shapes.
        snap: move what cannot be expressed to the nearest instead of refusing it.
        path: also carry the plan out and write the program there, for `torch.export.load(path).module()`.
        example: one batch, to trace and to calibrate what is written.
        outputs: round the output of a layer wherever its input is rounded, as XNNPACK needs it.

    Raises:
        ExportError: for what cannot be expressed; also, from `prepare_pt2e`, for a layer that the graph does not hold.
        MissingPackage: without torchao.
    """
    model = unwrapped(model)
    plan = fitted(plan, model, "pt2e", snap=snap)
    if path is not None:
        if model is None or example is None:
            raise ExportError("pt2e needs the model and an example: what it writes is the program itself")
        _write(path, plan, model, example, outputs)
    base = package("torchao.quantization.pt2e.quantizer", _EXTRA).Quantizer

    wanted = {name: precision for name, precision in plan.items() if precision.quantizes_weight}

    def annotate(_self: Any, graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        missing = set(wanted)
        for node in graph.graph.nodes:
            owner = _owner(node)
            if owner is not None and owner in wanted:
                _annotate(node, wanted[owner], outputs)
                missing.discard(owner)
        if missing:
            raise ExportError(f"the exported graph has no layer {min(missing)!r}")
        return graph

    def validate(_self: Any, _graph: torch.fx.GraphModule) -> None:
        """Nothing is left to check."""

    return type("PlanQuantizer", (base,), {"annotate": annotate, "validate": validate})()


def _write(path: str | os.PathLike[str], plan: Plan, model: nn.Module, example: Batch, outputs: bool) -> None:
    graph, _ = converted(plan, copy.deepcopy(model), example, outputs)
    content = io.BytesIO()
    torch.export.save(torch.export.export(graph, arguments(example, model)), content)
    write_atomically(path, content.getvalue())


def read_pt2e(plan: Plan, model: nn.Module, *, example: Batch, outputs: bool = False) -> StoredModel:
    """Export, prepare, calibrate with the example, convert; every weight behind a dequantization."""
    return stored(plan, *converted(plan, model, example, outputs))


def converted(
    plan: Plan, model: nn.Module, example: Batch, outputs: bool
) -> tuple[torch.fx.GraphModule, dict[str, torch.Tensor]]:
    """The quantized graph, and the weights with batch norms folded in, before they were rounded."""
    steps = package("torchao.quantization.pt2e.quantize_pt2e", _EXTRA)
    args = arguments(example, model)
    with traced("pt2e"):
        exported = torch.export.export(model.eval(), args).module()
    prepared = steps.prepare_pt2e(exported, pt2e(plan, model, outputs=outputs))
    prepared(*args)
    folded = {}
    for node in prepared.graph.nodes:
        if (name := _owner(node)) is not None:
            source = node.args[1]
            while source.op != "get_attr":
                source = source.args[0]
            folded[name] = _constant(prepared, source.target)
    return cast(torch.fx.GraphModule, steps.convert_pt2e(prepared)), folded


def arguments(example: Batch, model: nn.Module) -> tuple[Any, ...]:
    """Positional arguments of the model."""
    inputs = inputs_of(arranged(example, model))
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def stored(plan: Plan, graph: torch.fx.GraphModule, folded: dict[str, torch.Tensor]) -> StoredModel:
    """Every weight behind a dequantization in a quantized graph."""
    layers = {}
    for node in graph.graph.nodes:
        if (name := _owner(node)) is None:
            continue
        dequantize = node.args[1]
        if "dequantize_per_channel" not in str(dequantize.target):
            continue
        codes, scales, zeros, axis, low, high = dequantize.args[:6]
        codes, scales, zeros = (_constant(graph, part.target) for part in (codes, scales, zeros))
        shape = [-1 if at == axis else 1 for at in range(codes.ndim)]
        values = (codes - zeros.reshape(shape)) * scales.reshape(shape)
        bits = (high - low + 1).bit_length()
        activation = "8" if "dequantize" in str(node.args[0].target) else "16"
        precision = Precision(str(bits), activation)
        layers[name] = Stored(
            precision,
            values.to(folded[name].dtype),
            codes,
            sum(part.numel() * part.element_size() for part in (codes, scales, zeros)),
            RoundToNearest(scale="max")(folded[name], precision),
            tolerance=1e-6 * float(folded[name].abs().max()),
        )
    return StoredModel(layers)


def _owner(node: torch.fx.Node) -> str | None:
    """Full name of the layer that a node computes; None for other nodes."""
    if node.op != "call_function" or not str(node.target).startswith(_OPERATORS):
        return None
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return str(path).removeprefix("L['self'].")


def _annotate(node: torch.fx.Node, precision: Precision, outputs: bool) -> None:
    quantizer = package("torchao.quantization.pt2e.quantizer", _EXTRA)
    observers = package("torchao.quantization.pt2e", _EXTRA)
    most = (1 << (precision.weight_bits - 1)) - 1
    weights = quantizer.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-most,
        quant_max=most,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=observers.PerChannelMinMaxObserver,
    )
    inputs = quantizer.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=observers.MinMaxObserver,
    )
    chosen = {node.args[1]: weights} | ({node.args[0]: inputs} if precision.quantizes_activation else {})
    node.meta["quantization_annotation"] = quantizer.QuantizationAnnotation(
        input_qspec_map=chosen,
        output_qspec=inputs if outputs and precision.quantizes_activation else None,
        _annotated=True,
    )


def _constant(graph: Any, target: str) -> torch.Tensor:
    value = graph
    for part in target.split("."):
        value = getattr(value, part)
    return cast(torch.Tensor, value).detach()


PT2E = Exporter(
    "pt2e",
    pt2e,
    "torchao",
    read_pt2e,
    settings={"outputs": Setting(bool, False)},
    read_settings=("outputs",),
    write_needs_package=True,
    write_example=True,
    read_example=True,
    stable_bytes=False,
    write_values=True,
)
