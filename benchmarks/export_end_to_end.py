"""What a plan costs under the real quantizers, against what `evaluate` said.

    python benchmarks/export_end_to_end.py

A small Llama-like language model (benchmarks/models.py, with the names and the layout of transformers' Llama) is searched with the
rules of each target (`mpsearch search --target`), exported, and run on held-out text by the target's own library: gguf alone by
transformers, which unpacks it, and by llama.cpp. Compared are the loss and the KL to the unquantized model with those of the
fake-quantized model in `evaluate`: where a library rounds inputs that the plan leaves alone, as llama.cpp does, with these rounded too.
Writes benchmarks/results/export_end_to_end.csv and .md.
"""

import copy
import csv
import functools
import importlib.metadata
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from llama_cpp import LlamaCpp
from models import Decoder, Examples, Trained, decoder
from torch import Tensor, nn

import mpsearch as mps
from mpsearch import export
from mpsearch.export.verification import REFERENCE
from mpsearch.files.writing import write_atomically
from mpsearch.metrics.statistics import Mean, kl_divergence, log_softmax
from mpsearch.quantizers.quantizer import Quantizer

RESULTS = Path(__file__).resolve().parent / "results"
CALIBRATION = 256  # windows of 64 characters, to search with

#: tokens (B, T) -> logits (B, T, V)
Forward = Callable[[Tensor], Tensor]


class Llama(nn.Module):
    """A decoder's weights in transformers' Llama, which returns logits alone."""

    def __init__(self, trained: Decoder) -> None:
        super().__init__()
        first = trained.blocks[0]
        config = transformers.LlamaConfig(
            vocab_size=trained.embedding.num_embeddings,
            hidden_size=trained.embedding.embedding_dim,
            intermediate_size=first.up.out_features,
            num_hidden_layers=len(trained.blocks),
            num_attention_heads=first.attention.heads,
            rms_norm_eps=torch.finfo(torch.float32).eps,
            max_position_embeddings=64,
        )
        whole = transformers.LlamaForCausalLM(config)
        names = {"norm": "model.norm", "head": "lm_head", "embedding": "model.embed_tokens"}
        names |= {f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
        names |= {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
        names |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        state = {}
        for name, value in trained.state_dict().items():
            part = name.removesuffix(".weight")
            if part.startswith("blocks."):
                _, number, inner = part.split(".", 2)
                state[f"model.layers.{number}.{names[inner]}.weight"] = value
            else:
                state[f"{names[part]}.weight"] = value
        whole.load_state_dict(state)
        self.config, self.model, self.lm_head = config, whole.model, whole.lm_head
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(tokens, use_cache=False).last_hidden_state)
        return logits

    def whole(self) -> Any:
        """The model of transformers, with the same weights."""
        made = transformers.LlamaForCausalLM(self.config)
        made.load_state_dict(self.state_dict())
        return made.eval()


@dataclass(frozen=True)
class Case:
    """A target, its precisions and limits, how it runs a plan, and what it rounds inputs to that the plan leaves alone."""

    name: str
    target: str
    distribution: str
    precisions: str
    average_bits: tuple[float, ...]
    run: Callable[[mps.Plan, Llama, Path], Forward]
    quantizer: Quantizer = REFERENCE
    inputs: str = "16"


def torchao(plan: mps.Plan, model: Llama, folder: Path) -> Forward:
    from torchao.quantization import quantize_

    real = copy.deepcopy(model)
    quantize_(real, export.torchao(plan, model), filter_fn=None)
    return real


def compressed_tensors(plan: mps.Plan, model: Llama, folder: Path) -> Forward:
    export.compressed_tensors(plan, model.whole(), path=folder)
    real = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda tokens: real(tokens).logits


def onnxruntime(accuracy_level: int) -> Callable[[mps.Plan, Llama, Path], Forward]:
    def run(plan: mps.Plan, model: Llama, folder: Path) -> Forward:
        from onnxruntime import InferenceSession

        path, example = folder / "model.onnx", torch.zeros(2, 64, dtype=torch.long)
        batch = ({0: torch.export.Dim("batch")},)
        export.onnxruntime(plan, model, example=example, path=path, dynamic_shapes=batch, accuracy_level=accuracy_level)
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda tokens: torch.from_numpy(session.run(None, {name: tokens.numpy()})[0])

    return run


def gguf(plan: mps.Plan, model: Llama, folder: Path) -> Forward:
    export.gguf(plan, model.whole(), path=folder / "model.gguf")
    real = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    return lambda tokens: real(tokens).logits


def llama_cpp(plan: mps.Plan, model: Llama, folder: Path) -> Forward:
    export.gguf(plan, model.whole(), path=folder / "model.gguf")
    return LlamaCpp(folder / "model.gguf", model.config.vocab_size)


INTEGERS = "w2g16 w3g16 w4g16 w6g16 w8g16"
NBITS = "w2g16 w4g16 w8g16"
INPUTS = "w2a8g16 w4a8g16 w8a8g16"
BLOCKS = "wq4_0 wiq4_nl wq5_0 wq8_0 w16"  # the 176 columns of the down projections divide into no block: they stay at 16 or 32
CASES = (
    Case("torchao", "torchao", "torchao", INTEGERS, (2.5, 3, 4), torchao, export.MinMax()),
    Case("torchao, 8-bit inputs", "torchao", "torchao", INPUTS, (3, 4), torchao, export.MinMax()),
    Case("compressed-tensors", "compressed-tensors", "compressed-tensors", INTEGERS, (2.5, 3, 4), compressed_tensors),
    Case("onnxruntime", "onnxruntime", "onnxruntime", NBITS, (2.5, 3, 4), onnxruntime(0)),
    Case("onnxruntime, int8 kernels", "onnxruntime", "onnxruntime", NBITS, (3, 4), onnxruntime(4)),
    Case("gguf", "gguf", "gguf", BLOCKS, (7, 8.5), gguf),
    Case("gguf, llama.cpp", "gguf", "xllamacpp", BLOCKS, (7, 8.5), llama_cpp, inputs="q8_0"),
)


@functools.cache
def searched(
    model: Llama, trained: Trained, target: str, precisions: str, quantizer: Quantizer, average_bits: float
) -> mps.SearchResult:
    """The best plan that can be found with the rules of a target, within an average number of bits."""
    calibration = trained.pool.first(CALIBRATION).batches(32)
    layers = mps.layers(model, calibration[0], exclude=["model.embed_tokens", "lm_head"], target=target, groups="fused")
    return mps.search(
        model,
        calibration,
        mps.Budget(average_bits=average_bits),
        mps.precisions(precisions),
        report=trained.held_out.batches(32),
        layers=layers,
        quantizer=quantizer,
        progress=False,
    )


def measured(run: Forward, model: Llama, held_out: Examples) -> tuple[float, float]:
    """Loss and KL to the unquantized model, as `evaluate` computes them, of anything that returns logits."""
    loss, divergence = Mean(), Mean()
    with torch.no_grad():
        for tokens, targets in held_out.batches(32):
            logits = run(tokens).double().flatten(0, 1)
            index = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
            divergence.add(kl_divergence(model(tokens).flatten(0, 1), logits), index, len(tokens))
            loss.add(-log_softmax(logits).gather(-1, targets.reshape(-1, 1))[:, 0], index, len(tokens))
    return loss.value, divergence.value


def row(case: Case, limit: float, model: Llama, trained: Trained) -> dict[str, Any]:
    """Search, export, run."""
    found = searched(model, trained, case.target, case.precisions, case.quantizer, limit)
    plan, held_out = found.plan, trained.held_out
    run_as = {
        n: replace(p, activation=case.inputs) if p.quantizes_weight and not p.quantizes_activation else p
        for n, p in plan.items()
    }
    predicted = mps.evaluate(model, held_out.batches(32), mps.Plan(run_as), quantizer=case.quantizer, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = case.run(plan, model, Path(folder))
        exported_s = time.perf_counter() - start
        loss, divergence = measured(run, model, held_out)
    assert predicted.loss is not None
    assert predicted.loss_se is not None
    assert predicted.reference is not None
    assert predicted.reference.loss is not None
    return {
        "target": case.name,
        "version": importlib.metadata.version(case.distribution),
        "average_bits": limit,
        "precisions": " ".join(sorted({str(p) for p in plan.values()})),
        "memory_bytes": plan.usage["memory_bytes"],
        "passes": found.passes,
        "unquantized_loss": predicted.reference.loss,
        "predicted_loss": predicted.loss,
        "predicted_loss_se": predicted.loss_se,
        "real_loss": loss,
        "difference": loss - predicted.loss,
        "difference_over_damage": (loss - predicted.loss) / abs(predicted.loss - predicted.reference.loss),
        "predicted_kl": predicted.kl,
        "predicted_kl_se": predicted.kl_se,
        "real_kl": divergence,
        "uniform": found.uniform[0] if found.uniform else "",
        "uniform_kl": found.uniform[1].kl if found.uniform else "",
        "export_s": exported_s,
        "held_out_windows": len(held_out),
    }


def markdown(found: list[dict[str, Any]]) -> str:
    """The table of the README."""
    lines = [
        "| carried out by | bits | held-out loss, predicted | real | difference | KL, predicted | real |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        lines.append(
            f"| {row['target']} {row['version']} | {row['average_bits']:g} | {row['predicted_loss']:.4f} | {row['real_loss']:.4f} | "
            f"{row['difference']:+.1e} | {row['predicted_kl']:.4f} ± {row['predicted_kl_se']:.4f} | {row['real_kl']:.4f} |"
        )
    first = found[0]
    return (
        "\n".join(lines)
        + f"\n\nUnquantized: {first['unquantized_loss']:.4f}; {first['held_out_windows']} held-out windows of 64 characters.\n"
    )


def main() -> int:
    trained = decoder()
    assert isinstance(trained.model, Decoder)
    model = Llama(trained.model)
    tokens = trained.held_out.inputs[:8]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), trained.model(tokens), rtol=1e-4, atol=1e-4)
    found = []
    for case in CASES:
        for limit in case.average_bits:
            found.append(row(case, limit, model, trained))
            kl, real = found[-1]["predicted_kl"], found[-1]["real_kl"]
            print(f"{case.name:28} {limit:4g} bits: KL {kl:.5f}, really {real:.5f}", flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "export_end_to_end.csv", text.getvalue())
    write_atomically(RESULTS / "export_end_to_end.md", markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
