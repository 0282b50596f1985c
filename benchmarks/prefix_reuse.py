"""What re-running only the part behind a quantized layer saves: forward time of KLDivergence against a naive program.

    python benchmarks/prefix_reuse.py [--repeats 3]

ResNet-20 on CIFAR-10 and a transformer of 24 blocks. The naive program quantizes one layer, runs the whole network, and
goes on; both fill the same cells from the same batches, in turns in one process, and must agree to 1e-6. Time is CPU
time of one thread spent inside the network: all else (quantizers, divergences) is the same work. Writes
benchmarks/results/prefix_reuse.csv.
"""

import argparse
import csv
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from models import resnet20
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.files.writing import write_atomically
from mpsearch.metrics.statistics import kl_divergence
from mpsearch.quantizers.fake_quantization import quantized_weight, weights
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import KLDivergence

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = mps.precisions("w2 w4 w8")


class Attention(nn.Module):
    """Pre-norm attention and feed-forward layers around a residual stream."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Token numbers in, logits of the next token out."""

    def __init__(self, blocks: int = 24, width: int = 64, tokens: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(blocks)))
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embed(input_ids)))
        return logits


class Timed(nn.Module):
    """A network, and the CPU seconds spent inside it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        start = time.process_time()
        try:
            logits: Tensor = self.network(x)
            return logits
        finally:
            self.seconds += time.process_time() - start


@torch.no_grad()
def naive(model: Timed, batches: list[Tensor]) -> NDArray[np.float64]:
    """(L, P) mean divergence, each cell by whole runs."""
    found = []
    quantizer = RoundToNearest()
    references = [model(batch) for batch in batches]
    for layer in mps.layers(model, batches[0], groups="none"):
        module = model.get_submodule(layer.name)
        for precision in PRECISIONS:
            value = quantized_weight(module, layer.name, precision, quantizer)
            with weights({module.weight: value}):
                pairs = zip(references, batches, strict=True)
                found.append(torch.cat([kl_divergence(z, model(x)).flatten() for z, x in pairs]).mean())
    return torch.stack(found).reshape(-1, len(PRECISIONS)).numpy()


def images() -> tuple[nn.Module, list[Tensor]]:
    """ResNet-20 and 64 images in two batches."""
    trained = resnet20()
    return trained.model, [x for x, _ in trained.pool.first(64).batches(32)]


def text() -> tuple[nn.Module, list[Tensor]]:
    """The transformer and 8 rows of 32 tokens in two batches."""
    torch.manual_seed(0)
    return Transformer().eval(), list(torch.randint(128, (8, 32)).split(4))


CASES: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {"resnet20": images, "transformer24": text}


def compare(name: str, repeat: int) -> dict[str, str | int | float]:
    """One row: both programs once."""
    network, batches = CASES[name]()
    seconds, totals, found = {}, {}, {}
    order = ("naive", "reused") if repeat % 2 == 0 else ("reused", "naive")
    for way in order:
        model = Timed(network).eval()
        start = time.process_time()
        if way == "naive":
            found[way] = naive(model, batches)
        else:
            table = mps.profile(model, batches, KLDivergence(), PRECISIONS, groups="none", progress=False, resources=())
            found[way] = table.sensitivity
        seconds[way], totals[way] = model.seconds, time.process_time() - start
    difference = float(np.abs(found["naive"] - found["reused"]).max() / found["naive"].max())
    if difference > 1e-6:
        raise AssertionError(
            f"{name}: the tables differ by {difference:.2g} of the largest entry, expected 1e-6 at most"
        )
    return {
        "network": name,
        "repeat": repeat,
        "cells": found["naive"].size,
        "batches": len(batches),
        "naive_forward_cpu_s": round(seconds["naive"], 4),
        "reused_forward_cpu_s": round(seconds["reused"], 4),
        "forward_ratio": round(seconds["reused"] / seconds["naive"], 4),
        "naive_cpu_s": round(totals["naive"], 4),
        "reused_cpu_s": round(totals["reused"], 4),
        "passes_naive": found["naive"].size + 1,
        "passes_reused": round(table.origin["passes"]["forward"], 2),
        "largest_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(name, repeat) for name in CASES for repeat in range(options.repeats)]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(RESULTS / "prefix_reuse.csv", out.getvalue())
    for name in CASES:
        mine = [row for row in rows if row["network"] == name]
        ratio = float(np.median([row["forward_ratio"] for row in mine]))
        print(
            f"{name:>14}: forward time {ratio:.2f} of the naive program's (median of {len(mine)}), "
            f"{mine[0]['passes_reused']} passes instead of {mine[0]['passes_naive']}"
        )


if __name__ == "__main__":
    main()
