"""Qualcomm AIMET's automatic mixed precision: weights at 2, 3, 4, 6 or 8 bits a layer, symmetric, a scale a channel."""

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchvision_operators  # noqa: F401

# isort: split
import torch
from aimet_torch.amp.mixed_precision_algo import EvalCallbackFactory
from aimet_torch.common.defs import CallbackFunc, QuantizationDataType, QuantScheme
from aimet_torch.mixed_precision import choose_mixed_precision
from aimet_torch.nn import QuantizationMixin
from aimet_torch.quantsim import QuantizationSimModel
from exchange import BITS, Task, Work, task
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCHES = 4
INPUT_BITS = 16  # of the candidates; no input is quantized


def simulation(model: nn.Module, inputs: Tensor) -> QuantizationSimModel:
    """The network with quantizers of weights alone."""
    QuantizationMixin.ignore(nn.RMSNorm)  # which it does not know; nothing but weights is quantized here
    sim = QuantizationSimModel(
        model,
        inputs,
        quant_scheme=QuantScheme.post_training_tf_enhanced,
        default_param_bw=max(BITS),
        config_file="default",
    )
    for _, module in sim.named_qmodules():
        for quantizers in (module.input_quantizers, module.output_quantizers):
            for place in range(len(quantizers)):
                quantizers[place] = None
        for name in list(module.param_quantizers):
            if name != "weight" or not isinstance(module, nn.Conv2d | nn.Linear):
                module.param_quantizers[name] = None
    return sim


def scored(given: Task, batches: Sequence[Tensor]) -> list[tuple[str, int]]:
    """Layers and widths from the least to the most damage, as the tool sorts them for its greedy search."""
    sim = simulation(given.model, batches[0])
    loader: Any = DataLoader(given.calibration.inputs, batch_size=len(batches[0]))  # type: ignore[arg-type]
    integer = QuantizationDataType.int
    score = EvalCallbackFactory(loader).sqnr(len(given.calibration))
    with tempfile.TemporaryDirectory() as folder:
        choose_mixed_precision(
            sim,
            batches[0],
            [((INPUT_BITS, integer), (bits, integer)) for bits in reversed(BITS)],
            score,
            score,
            allowed_accuracy_drop=None,
            results_dir=folder,
            clean_start=True,
            forward_pass_callback=CallbackFunc(lambda model, _: [model(batch) for batch in batches]),
            use_all_amp_candidates=True,
        )
        found = json.loads((Path(folder) / ".cache" / "accuracy_list.json").read_text())
    order = []
    for ((_, name),), candidate, *_ in found:
        order.append((name, int(candidate.rstrip(")").rsplit("(", 1)[1].split(",")[0])))
    return order


def search(given: Task) -> None:
    """Score once; follow the tool's greedy order down to each budget, where the tool itself stops at a loss of accuracy."""
    searched = [name for name, module in given.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    batches = [inputs for inputs, _ in given.batches(BATCHES)]
    with Work() as work, torch.no_grad():
        order = scored(given, batches)
    size = sum(given.layers[name] for name in searched)
    for limit in given.limits:
        bits = dict.fromkeys(searched, max(BITS))
        for name, width in order:
            if sum(bits[layer] * given.layers[layer] for layer in searched) <= given.left(limit, searched) * size:
                break
            bits[name] = width
        given.save(limit, bits, work)


if __name__ == "__main__":
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        search(task())
