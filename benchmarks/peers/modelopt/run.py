"""NVIDIA ModelOpt's `auto_quantize`: weights only, integers of 2, 3, 4, 6 or 8 bits a layer with a scale a channel."""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import modelopt.torch.quantization as mtq
from exchange import BITS, Task, Work, task
from modelopt.torch.quantization.algorithms import get_auto_quantize_config
from torch import Tensor, nn
from torch.nn import functional as F

BATCHES = 4


def formats() -> list[dict[str, Any]]:
    """A weight format for each width; the scale of least squared error, as the judge's."""
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}, "enable": True},
            ],
            "algorithm": "mse",
        }
        for bits in BITS
    ]


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The logits."""
    logits: Tensor = model(batch[0])
    return logits.flatten(0, -2)


def loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy with the labels."""
    return F.cross_entropy(logits, batch[1].flatten())


def search(given: Task) -> None:
    """Score once, solve for each budget."""
    searched = [name for name, module in given.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    batches = given.batches(BATCHES)
    with Work() as work:
        _, state = mtq.auto_quantize(
            given.model,
            constraints={"effective_bits": max(given.limits)},
            data_loader=batches,
            forward_step=forward,
            loss_func=loss if given.variant == "gradient" else None,
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            method=given.variant,
            module_search_spaces=[
                {"module_name_patterns": ["*"], "quantization_formats": formats(), "allow_no_quant": False}
            ],
            quantization_formats=formats(),
        )
    for limit in given.limits:
        with work:
            config = get_auto_quantize_config(state, {"effective_bits": given.left(limit, searched)})
        bits = {}
        for entry in config["quant_cfg"]:
            name, _, part = entry["quantizer_name"].rpartition(".")
            if name in searched and part == "weight_quantizer" and entry["enable"]:
                bits[name] = entry["cfg"]["num_bits"]
        given.save(limit, bits, work)


if __name__ == "__main__":
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        search(task())
