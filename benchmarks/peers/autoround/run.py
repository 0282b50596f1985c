"""Intel AutoRound's AutoScheme, for language models: weights at 2, 3, 4, 6 or 8 bits a layer, symmetric, a scale a channel."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from auto_round.auto_scheme import delta_loss
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
from auto_round.schemes import QuantizationScheme
from exchange import BITS, Task, Work, task
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 8  # the tool's default


def llama(decoder: Any) -> tuple[LlamaForCausalLM, dict[str, str]]:
    """The same network as transformers write it, and its names of our layers.

    Raises:
        ValueError: where its logits differ from the original's.
    """
    block, count = decoder.blocks[0], len(decoder.blocks)
    config = LlamaConfig(
        vocab_size=decoder.embedding.num_embeddings,
        hidden_size=decoder.embedding.embedding_dim,
        intermediate_size=block.gate.out_features,
        num_hidden_layers=count,
        num_attention_heads=block.attention.heads,
        rms_norm_eps=torch.finfo(torch.float32).eps,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    parts = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    for i in range(count):
        parts[f"blocks.{i}.norm1"] = f"model.layers.{i}.input_layernorm"
        parts[f"blocks.{i}.norm2"] = f"model.layers.{i}.post_attention_layernorm"
        parts |= {f"blocks.{i}.attention.{p}": f"model.layers.{i}.self_attn.{p}_proj" for p in "qkvo"}
        parts |= {f"blocks.{i}.{p}": f"model.layers.{i}.mlp.{p}_proj" for p in ("gate", "up", "down")}
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(
        {f"{parts[name.removesuffix('.weight')]}.weight": w for name, w in decoder.state_dict().items()}
    )
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        difference = float((model(tokens).logits - decoder(tokens)).abs().max())
    if difference > 1e-4:
        raise ValueError(f"the logits of the rewritten network differ by {difference}")
    return model, parts


@contextlib.contextmanager
def calibration(tokens: Tensor) -> Iterator[None]:
    """The tool's loader of texts replaced by tokens."""
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(BATCH)]
    loader: Any = delta_loss.get_dataloader
    delta_loss.get_dataloader = lambda *_, **__: batches
    try:
        yield
    finally:
        delta_loss.get_dataloader = loader


def search(given: Task) -> None:
    """Score once, choose for each budget."""
    options = [QuantizationScheme(bits=bits, group_size=-1, sym=True, data_type="int", act_bits=16) for bits in BITS]
    work = Work()
    for limit in given.limits:
        model, parts = llama(given.model)
        scheme = AutoScheme(
            avg_bits=limit,
            options=list(options),
            ignore_scale_zp_bits=True,
            batch_size=BATCH,
            nsamples=len(given.calibration),
            seqlen=given.calibration.inputs.shape[1],
            enable_torch_compile=False,
            low_gpu_mem_usage=False,
            low_cpu_mem_usage=False,
        )
        names = {parts[name]: name for name in given.layers}
        with work, calibration(given.calibration.inputs):
            found: Mapping[str, Any] = GenScheme(
                scheme, model, list(names), {}, dataset="calibration", device_map="cpu", tokenizer=object()
            ).get_layer_config()
        given.save(limit, {names[name]: found[name]["bits"] for name in names}, work)


if __name__ == "__main__":
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        os.environ["AR_AUTO_SCHEME_CACHE"] = folder  # the names of kept scores do not tell calibration sets apart
        search(task())
