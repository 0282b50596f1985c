"""What re-running only the part behind a quantized layer saves: the whole time of KLDivergence against a naive program.

    python benchmarks/prefix_reuse.py [--repeats 3]

ResNet-20 on CIFAR-10 and a Llama of 24 blocks. The naive program quantizes one layer, runs the whole network, and goes on; each weight is
rounded once by both, and the naive divergence is in float32. Both fill the same cells from the same batches, in turns in one process, and
must agree. All that `profile` does counts: finding the layers, rounding, runs, divergences, fingerprints. Seconds of the wall clock and of
one thread; quantized by the largest weight and by the search for the scale of least squared error, the default. Writes
benchmarks/results/prefix_reuse.csv.
"""

import argparse
import csv
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import resnet20
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mpsearch as mps
from mpsearch.files.writing import write_atomically
from mpsearch.models.running import call
from mpsearch.models.streaming.offloading import replaced
from mpsearch.quantizers.fake_quantization import quantized_weight
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import KLDivergence

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = mps.precisions("w2 w4 w8")
SCALES = ("max", "mse")


@dataclass(frozen=True)
class Seconds:
    """Of the wall clock, and of the processor in this process."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    """What a function returns, and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@torch.no_grad()
def naive(model: nn.Module, batches: list[Any], quantizer: RoundToNearest) -> NDArray[np.float64]:
    """(L, P) mean divergence, each cell by whole runs."""
    found = []
    references = [_log_p(model, batch) for batch in batches]
    for layer in mps.layers(model, batches[0], groups="none"):
        module = model.get_submodule(layer.name)
        for precision in PRECISIONS:
            value = quantized_weight(module, layer.name, precision, quantizer)
            with replaced({module.weight: value}):
                pairs = zip(references, batches, strict=True)
                found.append(
                    torch.cat([(log_p.exp() * (log_p - _log_p(model, x))).sum(-1) for log_p, x in pairs]).mean()
                )
    return torch.stack(found).reshape(-1, len(PRECISIONS)).double().numpy()


def _log_p(model: nn.Module, batch: Any) -> Tensor:
    """(N, C) log probabilities."""
    return torch.log_softmax(call(model, batch).flatten(0, -2).float(), -1)


def images() -> tuple[nn.Module, list[Tensor]]:
    """ResNet-20 and 64 images in two batches."""
    trained = resnet20()
    return trained.model, [x for x, _ in trained.pool.first(64).batches(32)]


def llama(blocks: int = 24, width: int = 64, classes: int = 256) -> nn.Module:
    """A Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        vocab_size=classes,
    )
    return LlamaForCausalLM(config).eval()


def text() -> tuple[nn.Module, list[Tensor]]:
    """The Llama and 128 tokens in two batches."""
    return llama(), list(torch.randint(256, (4, 32)).split(2))


CASES: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {"resnet20": images, "llama24": text}


def compare(name: str, scale: str, repeat: int) -> dict[str, str | int | float]:
    """One row: both programs once."""
    network, batches = CASES[name]()
    quantizer = RoundToNearest(scale=scale)
    programs: dict[str, Callable[[], Any]] = {
        "naive": lambda: naive(network, batches, quantizer),
        "reused": lambda: mps.profile(
            network,
            batches,
            KLDivergence(),
            PRECISIONS,
            groups="none",
            progress=False,
            resources=(),
            quantizer=quantizer,
        ),
    }
    found, seconds = {}, {}
    for way in programs if repeat % 2 == 0 else reversed(programs):
        found[way], seconds[way] = timed(programs[way])
    table = found["reused"]
    difference = float(np.abs(found["naive"] - table.sensitivity).max() / found["naive"].max())
    if difference > 1e-4:
        raise AssertionError(
            f"{name}: the tables differ by {difference:.2g} of the largest entry, expected what float32 rounds, 1e-4 at most"
        )
    return {
        "network": name,
        "scale": scale,
        "repeat": repeat,
        "cells": table.sensitivity.size,
        "batches": len(batches),
        "naive_wall_s": round(seconds["naive"].wall, 3),
        "reused_wall_s": round(seconds["reused"].wall, 3),
        "naive_cpu_s": round(seconds["naive"].cpu, 3),
        "reused_cpu_s": round(seconds["reused"].cpu, 3),
        "times_faster": round(seconds["naive"].wall / seconds["reused"].wall, 3),
        "times_less_cpu": round(seconds["naive"].cpu / seconds["reused"].cpu, 3),
        "passes_naive": table.sensitivity.size + 1,
        "passes_reused": round(table.origin["passes"]["forward"], 2),
        "largest_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(name, scale, r) for name in CASES for scale in SCALES for r in range(options.repeats)]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(RESULTS / "prefix_reuse.csv", out.getvalue())
    for name in CASES:
        for scale in SCALES:
            mine = [row for row in rows if row["network"] == name and row["scale"] == scale]
            wall, cpu = (float(np.median([row[key] for row in mine])) for key in ("times_faster", "times_less_cpu"))
            print(
                f"{name:>10} {scale}: {wall:.2f} times faster by the clock, {cpu:.2f} by the processor (medians of {len(mine)}), "
                f"{mine[0]['passes_reused']} passes instead of {mine[0]['passes_naive']}"
            )


if __name__ == "__main__":
    main()
