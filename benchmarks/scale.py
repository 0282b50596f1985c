"""What a search takes as models grow: time, passes and peak memory, resident and streamed, beside the size of the weights.

    python benchmarks/scale.py [--rows ROW ...] [--timeout SECONDS] [--again]

A row is a model and a mode, such as `1B streamed`. The models have the shape of Llama (and of Qwen3-MoE), weights drawn at random in
bfloat16 and written shard by shard, a block each, so that making one takes no more memory than a block; the text is random tokens. So
the damage says nothing, the time and the memory do. Modes:

- `resident`: read by transformers, searched in memory;
- `streamed`: searched from the shards, block by block;
- `limited`: the same where the process may allocate no more than a quarter of the weights above what that interpreter has (1.2 GB for
  the models of about a billion weights, 256 MB at least), held by `RLIMIT_DATA`: the heap and all private writable mappings; shards
  mapped read-only do not count, and the system can drop their pages;
- `offloaded`: behind the hooks of accelerate, weights on disk (`disk_offload`);
- `spread`: `device_map="auto"`, over the devices that there are;
- `opened`: layers, groups and bytes are found without weights, no data is run.

Each row runs in a process of its own and is kept in `benchmarks/cache/scale/` and in the CSV as soon as it is finished; `--again` runs
those that are there once more. Memory is counted above an interpreter that has searched a model of a few thousand weights, so that torch,
transformers and mpsearch are loaded: the resident set, and the same without pages of files (`rows.py`). What a row is held against:

- resident: weights + 2 x the largest layer + 1.5 x what a forward pass of one batch keeps for its backward pass;
- all others: the plan and the measured damage are those of the resident row (to the bit, or by how much not).

Writes benchmarks/results/scale.csv and .md.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from models import cache
from rows import end_rows_too, keep, kept, measured, run
from safetensors.torch import save_file
from torch import Tensor, nn

import mpsearch as mps
from mpsearch.files.writing import write_atomically
from mpsearch.models.fingerprints import digest
from mpsearch.models.hugging_face import model_of
from mpsearch.models.peak_memory import live_bytes

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = mps.precisions("w2g64 w4g64 w8g64")
LIMIT = 3.5  # effective bits
QUANTIZER = "rtn-max"  # scales by the largest value: rounding is no part of the question
#: The least that a limited row may allocate.
LEAST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Shape:
    """A model of random weights.

    Attributes:
        hidden: width of the residual stream.
        blocks: number of them.
        inner: width inside an MLP, or of an expert.
        heads: of queries; keys and values have `shared_heads`.
        vocabulary: classes.
        experts: a block; 0: a dense model.
        tied: the head is the embedding.
    """

    hidden: int
    blocks: int
    inner: int
    heads: int
    shared_heads: int
    vocabulary: int = 32_000
    experts: int = 0
    tied: bool = True

    def config(self) -> Any:
        """Of transformers."""
        common = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.blocks,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.shared_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 2048,
            "dtype": "bfloat16",
        }
        if not self.experts:
            return transformers.LlamaConfig(**common, architectures=["LlamaForCausalLM"])
        return transformers.Qwen3MoeConfig(
            **common,
            architectures=["Qwen3MoeForCausalLM"],
            moe_intermediate_size=self.inner,
            num_experts=self.experts,
            num_experts_per_tok=min(4, self.experts),
            decoder_sparse_step=1,
            norm_topk_prob=True,
        )

    def block(self, number: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights of a block, as checkpoints have them."""
        head = self.hidden // self.heads
        rows = {"q": self.heads * head, "k": self.shared_heads * head, "v": self.shared_heads * head, "o": self.hidden}
        columns = dict.fromkeys("qkv", self.hidden) | {"o": self.heads * head}
        place = f"model.layers.{number}"
        for part in "qkvo":
            yield f"{place}.self_attn.{part}_proj.weight", (rows[part], columns[part])
        norms = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
        if self.experts:
            norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
            yield f"{place}.mlp.gate.weight", (self.experts, self.hidden)
        for name, size in norms.items():
            yield f"{place}.{name}.weight", (size,)
        for mlp in [f"mlp.experts.{expert}" for expert in range(self.experts)] or ["mlp"]:
            for part, shape in {
                "gate": (self.inner, self.hidden),
                "up": (self.inner, self.hidden),
                "down": (self.hidden, self.inner),
            }.items():
                yield f"{place}.{mlp}.{part}_proj.weight", shape

    def shards(self) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
        """Names and shapes of what is in each file: the embedding, the blocks, the norm and the head."""
        matrix = (self.vocabulary, self.hidden)
        yield [("model.embed_tokens.weight", matrix)]
        for number in range(self.blocks):
            yield list(self.block(number))
        yield [("model.norm.weight", (self.hidden,)), *([] if self.tied else [("lm_head.weight", matrix)])]

    @property
    def weights(self) -> int:
        """Number of them."""
        return sum(torch.Size(shape).numel() for shard in self.shards() for _, shape in shard)

    @property
    def largest_layer(self) -> int:
        """Weights of the largest matrix."""
        return max(torch.Size(shape).numel() for shard in self.shards() for _, shape in shard)


SHAPES: Mapping[str, Shape] = {
    "0.1B": Shape(768, 12, 2048, 12, 4),
    "0.3B": Shape(1024, 24, 2816, 16, 4),
    "1B": Shape(2048, 22, 5632, 32, 4),
    "7B": Shape(4096, 32, 11_008, 32, 32, tied=False),
    "0.1B of 128,256 classes": Shape(768, 12, 2048, 12, 4, vocabulary=128_256),
    "MoE of 4 x 8 experts": Shape(256, 4, 128, 4, 2, vocabulary=4096, experts=8),
    "MoE of 48 x 64 experts": Shape(512, 48, 256, 8, 2, experts=64),
}
OPENED = "MoE of 48 x 64 experts"
MODES = ("resident", "streamed", "limited", "offloaded", "spread", "opened")
#: What runs unless told: not what takes an hour, a device that is not there, or a model on request.
ROWS = (
    *(f"{name} {mode}" for name in ("0.1B", "0.3B", "1B") for mode in MODES[:3]),
    *(f"{name} {mode}" for name in ("0.1B of 128,256 classes", "MoE of 4 x 8 experts") for mode in MODES[:2]),
    "0.1B offloaded",
    f"{OPENED} opened",
    "1B opened",
    "7B opened",
)


@dataclass(frozen=True)
class Data:
    """Random tokens: `samples` windows of `tokens`, `batch` at a time."""

    samples: int = 24
    tokens: int = 64
    batch: int = 2
    seed: int = 0

    def batches(self, vocabulary: int) -> list[dict[str, Tensor]]:
        """Tokens (batch, tokens), with themselves as labels."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(vocabulary, (self.samples, self.tokens), generator=generator)
        return [dict.fromkeys(("input_ids", "labels"), rows) for rows in ids.split(self.batch)]


def folder_of(name: str) -> Path:
    """The folder of a model, written the first time."""
    shape = SHAPES[name]
    folder = cache() / "scale" / f"model {digest(str(shape))[:12]}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _write(shape, part)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _write(shape: Shape, folder: Path) -> None:
    shape.config().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    count = shape.blocks + 2
    files, total = {}, 0
    for number, shard in enumerate(shape.shards(), 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {}
        for name, size in shard:
            drawn = torch.empty(size, dtype=torch.bfloat16)
            # norms are ones; products keep their size: no hidden state grows with the depth
            tensors[name] = drawn.fill_(1) if len(size) == 1 else drawn.normal_(0, size[1] ** -0.5, generator=generator)
            files[name], total = file, total + drawn.nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


# How a mode opens a model.


def _resident(folder: Path) -> nn.Module:
    return model_of(str(folder))


def _streamed(folder: Path) -> nn.Module:
    return model_of(str(folder), streamed=True)


def _offloaded(folder: Path) -> nn.Module:
    from accelerate import disk_offload

    model = model_of(str(folder))
    disk_offload(model, str(folder / "offloaded"), execution_device=torch.device("cpu"))
    return model


def _spread(folder: Path) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="auto", local_files_only=True
    )
    return model.eval()


OPENERS: Mapping[str, Callable[[Path], nn.Module]] = {
    "resident": _resident,
    "streamed": _streamed,
    "limited": _streamed,
    "offloaded": _offloaded,
    "spread": _spread,
}


def warm_up(shape: Shape) -> None:
    """A search of a model of the same kind with a few thousand weights, so that all is loaded that a search needs."""
    small = Shape(64, 2, 64, 2, 1, vocabulary=64, experts=min(shape.experts, 2))
    with tempfile.TemporaryDirectory() as folder:
        _write(small, Path(folder))
        found(_resident(Path(folder)), Data(tokens=4).batches(64))


def found(model: nn.Module, batches: list[dict[str, Tensor]], seed: int = 0) -> mps.SearchResult:
    """A `fast` search."""
    budget = mps.Budget(effective_bits=LIMIT)
    return mps.search(model, batches, budget, PRECISIONS, effort="fast", quantizer=QUANTIZER, seed=seed, progress=False)


def search(name: str, mode: str, data: Data, out: Path) -> None:
    """A row: a `fast` search in a mode."""
    shape, folder = SHAPES[name], folder_of(name)
    weights_bytes = 2 * shape.weights
    quarter = weights_bytes // 4 if weights_bytes < 2e9 else max(weights_bytes // 4, 1_200_000_000)
    limit = max(quarter, LEAST_BYTES) if mode == "limited" else None
    batches = data.batches(shape.vocabulary)
    warm_up(shape)
    with measured(limit) as usage:
        model = OPENERS[mode](folder)
        result = found(model, batches, data.seed)
    keep(
        out,
        {
            "layers": len(result.plan),
            "passes": result.passes,
            "seconds": usage.seconds,
            "cpu_seconds": usage.cpu_seconds,
            "limit_bytes": limit,
            "peak_memory_bytes": usage.peak_bytes,
            "peak_anonymous_bytes": usage.peak_anonymous_bytes,
            "damage": result.measured.kl,
            "plan": digest(str(sorted((name, str(precision)) for name, precision in result.plan.items()))),
        },
    )


def open_without_weights(name: str, out: Path) -> None:
    """Layers, groups and bytes of a model on the `meta` device."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[name].config(), dtype=torch.bfloat16).eval()
    with measured() as usage:
        layers = mps.layers(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")})
    keep(
        out,
        {
            "layers": len(layers),
            "seconds": usage.seconds,
            "cpu_seconds": usage.cpu_seconds,
            "peak_memory_bytes": usage.peak_bytes,
            "peak_anonymous_bytes": usage.peak_anonymous_bytes,
        },
    )


def measure_activations(name: str, data: Data, out: Path) -> None:
    """What a forward pass of one batch keeps for a backward pass, its outputs included."""
    model = model_of(str(folder_of(name)))
    batch = data.batches(SHAPES[name].vocabulary)[0]
    with live_bytes() as peak:
        loss = model(**batch).loss
    del loss
    keep(out, {"activations_bytes": peak.bytes})


def job(name: str, mode: str, data: Data, out: Path) -> None:
    """A row in this process."""
    transformers.logging.disable_progress_bar()
    if mode == "model":
        folder_of(name)
    elif mode == "activations":
        measure_activations(name, data, out)
    elif mode == "opened":
        open_without_weights(name, out)
    else:
        search(name, mode, data, out)


def finished(row: str, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Run a row, or read it where it is there already."""
    name, _, mode = row.rpartition(" ")
    shape = SHAPES[name]
    folder = cache() / "scale"
    head = {
        "row": row,
        "weights_bytes": 2 * shape.weights,
        "largest_layer_bytes": 2 * shape.largest_layer,
        "tokens": data.samples * data.tokens,
        "classes": shape.vocabulary,
    }

    def one(mode: str, *, again: bool = False) -> tuple[dict[str, Any], str | None]:
        key = digest(f"{shape} {mode} {data} {PRECISIONS} {LIMIT} {QUANTIZER}")[:16]
        out = folder / f"{key}.json"
        if again:
            out.unlink(missing_ok=True)
        arguments = [
            "--job",
            name,
            mode,
            out,
            "--samples",
            data.samples,
            "--tokens",
            data.tokens,
            "--batch",
            data.batch,
        ]
        problem = run(__file__, arguments, out, options.timeout)
        return kept(out) or {}, problem

    if mode != "opened":
        run(__file__, ["--job", name, "model", folder], folder_of_or_missing(name))
    found, problem = one(mode, again=options.again)
    if problem:
        return {**head, "problem": problem}
    if mode == "resident":
        activations, problem = one("activations")
        found |= activations if problem is None else {}
    return {**head, **found}


def folder_of_or_missing(name: str) -> Path:
    """Where the folder of a model is, or will be."""
    return cache() / "scale" / f"model {digest(str(SHAPES[name]))[:12]}"


def held(row: Mapping[str, Any], rows: pd.DataFrame) -> str:
    """What a row is held against, in words."""
    name, _, mode = str(row["row"]).rpartition(" ")
    if isinstance(row.get("problem"), str):
        return str(row["problem"])
    if mode == "opened":
        return ""
    if mode == "resident":
        if pd.isna(row.get("activations_bytes")):
            return ""
        bound = row["weights_bytes"] + 2 * row["largest_layer_bytes"] + 1.5 * row["activations_bytes"]
        return f"{'within' if row['peak_memory_bytes'] <= bound else 'ABOVE'} {bound / 1e9:.2f} GB"
    words = [] if pd.isna(row["limit_bytes"]) else [f"within {row['limit_bytes'] / 1e9:.2f} GB"]
    resident = rows[(rows["row"] == f"{name} resident") & (rows["tokens"] == row["tokens"])]
    if len(resident) and not pd.isna(resident.iloc[0]["damage"]):
        other = resident.iloc[0]
        apart = abs(row["damage"] - other["damage"]) / max(abs(other["damage"]), 1e-300)
        same = "same bits" if apart == 0 else f"damage differs by {apart:.0e}"
        words.append(same if row["plan"] == other["plan"] else f"ANOTHER PLAN, {same}")
    return ", ".join(words)


def markdown(rows: pd.DataFrame) -> str:
    """A line a row."""
    head = ["model and mode", "weights", "layers", "passes", "seconds", "peak", "without files", "held against"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]

    def gigabytes(value: Any) -> str:
        return "" if value is None or pd.isna(value) else f"{value / 1e9:.2f} GB"

    def number(value: Any, digits: int) -> str:
        return "" if value is None or pd.isna(value) else f"{value:.{digits}f}"

    for _, row in rows.iterrows():
        cells = [
            row["row"],
            gigabytes(row["weights_bytes"]),
            number(row.get("layers"), 0),
            number(row.get("passes"), 1),
            number(row.get("seconds"), 1),
            gigabytes(row.get("peak_memory_bytes")),
            gigabytes(row.get("peak_anonymous_bytes")),
            held(row, rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def merge(path: Path, row: Mapping[str, Any]) -> pd.DataFrame:
    """Put a row into the CSV, in the place of an older one."""
    old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["row"])
    fresh = pd.DataFrame([row])
    others = old[old["row"] != row["row"]]
    both = pd.concat([others, fresh], ignore_index=True) if len(others) else fresh
    names = [f"{name} {mode}" for name in SHAPES for mode in MODES]
    both = both.sort_values("row", key=lambda column: column.map(names.index), ignore_index=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, both.to_csv(index=False, lineterminator="\n"))
    write_atomically(path.with_suffix(".md"), markdown(both))
    return both


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{name} {mode}" for name in SHAPES for mode in MODES]
    parser.add_argument("--rows", nargs="+", choices=every, default=ROWS, metavar="ROW", help=f"of {', '.join(every)}")
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="SECONDS", help="of a row (default: %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="run rows that are there once more")
    parser.add_argument("--samples", type=int, default=Data.samples, help="windows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=Data.tokens, help="of a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=Data.batch, help="windows at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.csv", metavar="FILE.csv")
    parser.add_argument("--job", nargs=3, metavar=("MODEL", "MODE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = Data(options.samples, options.tokens, options.batch)
    if options.job:
        name, mode, file = options.job
        job(name, mode, data, Path(file))
        return 0
    end_rows_too()
    rows = pd.DataFrame()
    for row in options.rows:
        found = finished(row, data, options)
        rows = merge(options.out, found)
        line = held(found, rows) if len(rows) else ""
        taken = f"{found['seconds']:.1f} s, {found['peak_memory_bytes'] / 1e9:.2f} GB" if "seconds" in found else ""
        print(f"{row}: {taken} {line}", flush=True)
    print(f"wrote {options.out} and a table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
