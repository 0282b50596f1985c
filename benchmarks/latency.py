"""Predicted latency of whole plans against latency measured end to end: a ResNet, a MobileNet and a decoder, real kernels.

    python benchmarks/latency.py [--plans 16] [--rounds 10] [--repeats 4] [--only resnet20/torch]

For each case the latency of every layer at every precision is measured alone (`MeasuredLatency`), and summed for uniform and random
plans; what lies between layers is what the unquantized model takes beyond the sum of its own. Each plan is also carried out as a whole
and timed. How it is carried out owes nothing to the prediction: PyTorch's own dynamic and static quantized modules, torchao's
`quantize_`, ONNX files of the exporters. All plans of a case are timed in turns, round after round, and the fastest round counts, as in
the prediction; time is processor time of one thread. The roofline has this processor's own peaks, measured here on one large product a
format and one large copy. Weights are random: no kernel looks at them.

Writes benchmarks/results/latency.csv, a row a plan, and benchmarks/results/latency.md.
"""

import argparse
import copy
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from models import Decoder, MobileNet, ResNet20, ViT
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import mpsearch as mps
from mpsearch.core.layer import Layer
from mpsearch.files.writing import write_atomically
from mpsearch.resources import BitOps, MeasuredLatency, Processor, Roofline
from mpsearch.resources.kernels import Kernel, unsigned_range
from mpsearch.resources.measured_latency import Timing, time_in_turns

RESULTS = Path(__file__).resolve().parent / "results"
Engine = Literal["torch", "torchao", "onnxruntime"]


@dataclass(frozen=True)
class Case:
    """One network on one engine.

    Attributes:
        network: makes it.
        example: makes one batch.
        engine: whose kernels run.
        precisions: options of every layer.
        carried_out: `carried_out(model, plan, example)`, the whole plan ready to run.
        dtype: of the model.
    """

    network: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    engine: Engine
    precisions: str
    carried_out: Callable[[nn.Module, mps.Plan, Tensor], Kernel]
    dtype: torch.dtype = torch.float32


class Casted(nn.Module):
    """A layer in bfloat16 within a model of another type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = copy.deepcopy(inner).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.to(torch.bfloat16))
        return y.to(x.dtype)


class Static(nn.Module):
    """PyTorch's quantized convolution, with inputs and outputs of calibrated ranges."""

    def __init__(self, inner: nn.Conv2d, x: Tensor) -> None:
        super().__init__()
        self.scale, self.zero = unsigned_range(*(float(v) for v in x.aminmax()))
        weight = inner.weight.detach()
        scales = (weight.flatten(1).abs().amax(1) / 127).clamp(min=1e-12).double()
        quantized = torch.quantize_per_channel(
            weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8
        )
        groups = {name: getattr(inner, name) for name in ("stride", "padding", "dilation", "groups")}
        self.inner = torch.ao.nn.quantized.Conv2d(inner.in_channels, inner.out_channels, inner.kernel_size, **groups)
        self.inner.set_weight_bias(quantized, inner.bias)
        self.inner.scale, self.inner.zero_point = unsigned_range(*(float(v) for v in inner(x).aminmax()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(torch.quantize_per_tensor(x, self.scale, self.zero, torch.quint8))
        return y.dequantize()


def with_torch(model: nn.Module, plan: mps.Plan, example: Tensor) -> Kernel:
    """`w8a8` by dynamic (linear) and static (convolution) quantized modules, `wbf16abf16` by casts."""
    given: dict[str, Tensor] = {}
    for name in plan:
        model.get_submodule(name).register_forward_hook(
            lambda _module, args, _out, name=name: given.update({name: args[0]})
        )
    model(example)
    made = copy.deepcopy(model)
    dynamic = {name: torch.ao.quantization.per_channel_dynamic_qconfig for name, p in plan.items() if str(p) == "w8a8"}
    for name, precision in plan.items():
        module = model.get_submodule(name)
        if str(precision) == "wbf16abf16":
            made.set_submodule(name, Casted(module))
        elif name in dynamic and isinstance(module, nn.Conv2d):
            made.set_submodule(name, Static(module, given[name]))
    made = torch.ao.quantization.quantize_dynamic(made, dynamic, dtype=torch.qint8)
    return lambda: made(example)


def with_torchao(model: nn.Module, plan: mps.Plan, example: Tensor) -> Kernel:
    """`quantize_` with a configuration a layer."""
    from torchao import quantization

    configs = {
        "w8a8": quantization.Int8DynamicActivationInt8WeightConfig(),
        "w8": quantization.Int8WeightOnlyConfig(),
        "w4g64": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(64)),
    }
    for name, precision in plan.items():
        if precision.quantizes_weight:
            quantization.quantize_(model, configs[str(precision)], filter_fn=lambda _, other, name=name: other == name)
    return lambda: model(example)


def with_onnxruntime(
    export: Callable[..., Any], model: nn.Module, plan: mps.Plan, example: Tensor, **settings: Any
) -> Kernel:
    """The file of an exporter, all of it in one session."""
    import onnxruntime

    made = export(plan, model, example=example, **settings)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: example.numpy()}
    return lambda: session.run(None, given)


def _folded_resnet() -> nn.Module:
    """With batch norms folded into the convolutions, as the exporter of ONNX does anyway."""
    made: nn.Module = fuse(ResNet20().eval())
    return made


def _decoder() -> nn.Module:
    return Decoder(width=256, heads=8, hidden=704, depth=4)


def _tokens() -> Tensor:
    return torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0))


def _vit() -> nn.Module:
    return ViT(width=256, heads=8, depth=4)


def _patches() -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _images(channels: int, size: int) -> Tensor:
    return torch.randn(32, channels, size, size, generator=torch.Generator().manual_seed(0))


_CIFAR, _DIGITS = functools.partial(_images, 3, 32), functools.partial(_images, 1, 32)
_STATIC = functools.partial(with_onnxruntime, lambda *args, **kw: mps.export.onnxruntime_static(*args, **kw))
_NBITS = functools.partial(with_onnxruntime, lambda *args, **kw: mps.export.onnxruntime(*args, accuracy_level=4, **kw))
CASES = {
    "resnet20/torch": Case(ResNet20, _CIFAR, "torch", "w16 wbf16abf16 w8a8", with_torch),
    "mobilenet/torch": Case(MobileNet, _DIGITS, "torch", "w16 wbf16abf16 w8a8", with_torch),
    "resnet20/onnxruntime": Case(_folded_resnet, _CIFAR, "onnxruntime", "w16 w8a8", _STATIC),
    "decoder/torch": Case(_decoder, _tokens, "torch", "w16 wbf16abf16 w8a8", with_torch),
    "decoder/torchao": Case(_decoder, _tokens, "torchao", "w16 w8a8 w8 w4g64", with_torchao),
    "vit bf16/torchao": Case(_vit, _patches, "torchao", "w16 w8a8 w8 w4g64", with_torchao, torch.bfloat16),
    "decoder/onnxruntime": Case(_decoder, _tokens, "onnxruntime", "w16 w8g64 w4g64 w2g64", _NBITS),
}


def peaks() -> Processor:
    """This processor, one thread: operations a second of one large product a format, bytes a second of one large copy."""
    size = 1024
    linear, x = nn.Linear(size, size, bias=False), torch.randn(size, size)
    plain, half = linear.weight.detach().T, linear.weight.detach().T.bfloat16()
    eight = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(linear)), {nn.Linear}, dtype=torch.qint8)
    source, target = torch.zeros(1 << 24), torch.empty(1 << 24)
    narrow = x.bfloat16()
    found = time_in_turns(
        {
            "fp32": lambda: x @ plain,
            "bf16": lambda: narrow @ half,
            "8": lambda: eight(x),
            "copy": lambda: target.copy_(source),
        },
        10,
        torch.device("cpu"),
    )
    rates = {name: 2 * size**3 / found[name].least_s for name in ("fp32", "bf16", "8")}
    return Processor(rates, 2 * source.numel() * 4 / found["copy"].least_s, 0.0, "measured by benchmarks/latency.py")


def plans(
    layers: list[Layer], precisions: tuple[mps.Precision, ...], usage: np.ndarray, count: int
) -> list[np.ndarray]:
    """Columns of each layer (L,): uniform plans as far as kernels go, and random ones from nearly none to all quantized."""
    allowed = [np.flatnonzero(np.isfinite(row)) for row in usage]
    generator = np.random.default_rng(0)
    found = []
    for column in range(len(precisions)):
        found.append(np.array([column if column in row else 0 for row in allowed]))
    for share in np.linspace(0.1, 1.0, count):
        drawn = [generator.choice(row) if generator.random() < share else 0 for row in allowed]
        found.append(np.array(drawn))
    return found


def measured(kernels: Mapping[str, Kernel], rounds: int) -> dict[str, Timing]:
    """Each plan as a whole, in turns."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return time_in_turns(dict(kernels), rounds, torch.device("cpu"))


def run(name: str, case: Case, processor: Processor, count: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """One row a plan: layers alone and whole plans are timed in turns too, so that both see the machine at its best."""
    torch.manual_seed(0)
    model = case.network().eval().to(case.dtype)
    example = case.example()
    example = example.to(case.dtype) if example.is_floating_point() else example
    options = mps.precisions(case.precisions)
    layers = [x for x in mps.layers(model, example, groups="none") if x.kind != "embedding"]
    if case.engine == "onnxruntime" and "a8" not in case.precisions:  # MatMulNBits is of linear layers
        layers = [x for x in layers if x.kind == "linear"]
    alone = MeasuredLatency(case.engine, rounds=rounds, cache=None)
    predicted = [alone(model, layers, options, example=example)]
    batch = len(example)
    chosen = plans(layers, options, predicted[0].usage, count)
    names = [layer.name for layer in layers]
    kernels = {}
    for number, places in enumerate(chosen):
        plan = mps.Plan({layer: options[p] for layer, p in zip(names, places, strict=True)})
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernels[str(number)] = case.carried_out(copy.deepcopy(model), plan, example)
    wholes = []
    for number in range(repeats):
        wholes.append(measured(kernels, rounds))
        if number:
            predicted.append(alone(model, layers, options, example=example))
    found = {key: min((one[key] for one in wholes), key=lambda one: one.least_s) for key in kernels}
    usage = np.min([one.usage for one in predicted], axis=0)
    columns = {
        "predicted_s": usage,
        "roofline_s": Roofline(processor)(model, layers, options, example=example).usage,
        "bitops": BitOps()(model, layers, options).usage,
    }
    rows = []
    for number, places in enumerate(chosen):
        one = found[str(number)]
        total = {key: float(values[np.arange(len(names)), places].sum()) for key, values in columns.items()}
        total["predicted_s"] += found["0"].least_s / batch - float(usage[:, 0].sum())
        rows.append(
            {
                "case": name,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "plan": number,
                "uniform": str(options[number]) if number < len(options) else "",
                "quantized_layers": int((places > 0).sum()),
                "layers": len(names),
                "measured_s": one.least_s / batch,
                "spread_s": one.spread_s / batch,
                **total,
            }
        )
    return rows


def summary(found: pd.DataFrame) -> str:
    """A line a case, as Markdown."""
    lines = [
        "| case | unquantized | plans | predicted: mean error | bias | rank correlation | roofline: rank | BitOps: rank |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, every in found.groupby("case", sort=False):
        rows = every[every.plan > 0]  # the unquantized one is predicted by itself
        error = rows.predicted_s - rows.measured_s
        keys = ("predicted_s", "roofline_s", "bitops")
        ranks = [
            spearmanr(rows[key], rows.measured_s).statistic if rows[key].nunique() > 1 else math.nan for key in keys
        ]
        lines.append(
            f"| {name} | {1e3 * every.measured_s.iloc[0]:.2f} ms | {1e3 * rows.measured_s.min():.2f} to "
            f"{1e3 * rows.measured_s.max():.2f} ms | {1e3 * error.abs().mean():.3f} ms, "
            f"{100 * (error.abs() / rows.measured_s).mean():.1f} % | {100 * (error / rows.measured_s).mean():+.1f} % | "
            + " | ".join("all equal" if math.isnan(rank) else f"{rank:.2f}" for rank in ranks)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the cases and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=16, help="random plans a case")
    parser.add_argument("--rounds", type=int, default=10, help="of timing")
    parser.add_argument("--repeats", type=int, default=4, help="of layers alone and whole plans")
    parser.add_argument("--only", choices=CASES, help="one case, printed and not written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = peaks()
    print("peaks:", {k: f"{v:.3g}" for k, v in processor.operations.items()}, f"{processor.bytes_per_s:.3g} bytes/s")
    rows: list[dict[str, Any]] = []
    for name, case in CASES.items():
        if options.only in (None, name):
            rows += run(name, case, processor, options.plans, options.rounds, options.repeats)
            print(summary(pd.DataFrame(rows)), flush=True)
    if options.only is None:
        found = pd.DataFrame(rows)
        write_atomically(RESULTS / "latency.csv", found.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        write_atomically(RESULTS / "latency.md", summary(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
