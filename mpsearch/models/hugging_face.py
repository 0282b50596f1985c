"""Models of transformers and text as the command line names them: `hf:DIR` and `text:FILE`. Nothing is downloaded."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import MissingPackage
from mpsearch.models.loading import UsageError
from mpsearch.models.running import shifts_labels
from mpsearch.models.streaming.opening import offloaded

#: Tokens of a sample, samples, and samples of a batch.
WINDOW, WINDOWS, BATCH = 512, 128, 4


def model_of(folder: str, *, streamed: bool = False) -> nn.Module:
    """The model that a folder written by `save_pretrained` holds, of the class that its config names, in the dtype that it is stored in.

    Args:
        folder: where it is.
        streamed: its weights stay in their shards, and are read where they are used (`mpsearch.models.streaming`).

    Raises:
        UsageError: where the folder holds none, or its class is unknown to the installed transformers.
        MissingPackage: without transformers.
    """
    transformers = _transformers()
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"model hf:{folder}: no {Path(folder) / 'config.json'}; expected a folder of save_pretrained")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names = config.architectures or ["AutoModel"]
        if not hasattr(transformers, names[0]):
            raise UsageError(f"model hf:{folder}: transformers {transformers.__version__} has no {names[0]}")
        with _without_bars(transformers):
            if streamed:
                return offloaded(folder, getattr(transformers, names[0]), config)
            model: nn.Module = getattr(transformers, names[0]).from_pretrained(
                folder, local_files_only=True, dtype="auto"
            )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"model hf:{folder}: {type(error).__name__}: {_one_line(error)}") from error
    return model.eval()


def text_batches(file: str, model: nn.Module) -> list[dict[str, Tensor]]:
    """Windows of a text, spread evenly over it, tokenized as the folder of the model says.

    Windows have 512 tokens, or as many as the model takes, up to 128 windows in batches of 4. A causal language model is given them as
    labels too.

    Args:
        file: plain text, UTF-8.
        model: of `hf:DIR`.

    Raises:
        UsageError: for no such file, a model that is of no folder, or a text shorter than one window.
        MissingPackage: without transformers.
    """
    folder = getattr(model, "name_or_path", "")
    if not folder:
        raise UsageError(
            f"data text:{file} needs a model hf:DIR, whose tokenizer reads it; got a {type(model).__name__}"
        )
    try:
        text = Path(file).read_text(encoding="utf-8")
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"data text:{file}: {type(error).__name__}: {_one_line(error)}") from error
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    config: Any = model.config
    size = min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)
    count = min(WINDOWS, len(tokens) // size)
    if not count:
        raise UsageError(f"data text:{file}: {len(tokens)} tokens, expected at least one window of {size}")
    starts = torch.linspace(0, len(tokens) - size, count).long()
    windows = tokens[starts[:, None] + torch.arange(size)]
    names = ("input_ids", "labels") if shifts_labels(model) else ("input_ids",)
    return [dict.fromkeys(names, part) for part in windows.split(BATCH)]


@contextlib.contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """Loading a folder takes no time that would be worth a bar on stderr."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackage(
            f"hf:DIR and text:FILE need transformers ({error}); pip install transformers brings it"
        ) from None


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
