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
#: Files of weights, or those that name them.
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.gguf", "*.h5", "*.msgpack")


def model_of(folder: str, *, streamed: bool = False, shapes_suffice: bool = False) -> nn.Module:
    """The model that a folder written by `save_pretrained` holds, of the class that its config names, in the dtype that it is stored in.

    A folder with a config alone gives a model without weights, on the meta device: its layers and costs are those of the real one.

    Args:
        folder: where it is.
        streamed: its weights stay in their shards, and are read where they are used (`mpsearch.models.streaming`).
        shapes_suffice: leave its weights alone, where there are some.

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
            if shapes_suffice or not any(map(any, map(Path(folder).glob, _WEIGHTS))):
                return _without_weights(transformers, names[0], config)
            if streamed:
                return offloaded(folder, getattr(transformers, names[0]), config)
            model: nn.Module = getattr(transformers, names[0]).from_pretrained(
                folder, local_files_only=True, dtype="auto"
            )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"model hf:{folder}: {type(error).__name__}: {_one_line(error)}") from error
    return model.eval()


def _without_weights(transformers: Any, name: str, config: Any) -> nn.Module:
    """A model on the meta device."""
    cls = getattr(transformers, name)
    make = cls.from_config if name == "AutoModel" else cls._from_config
    with torch.device("meta"):
        model: nn.Module = make(config, dtype=config.dtype or torch.float32)
    return model.eval()


def example_of(model: nn.Module) -> dict[str, Tensor]:
    """One sample of what a model of transformers takes, by the sizes in its config: a window of tokens, or an image.

    A window has 512 tokens, or as many as the model takes.

    Raises:
        UsageError: for a model that takes something else.
    """
    name = str(getattr(model, "main_input_name", ""))
    config: Any = getattr(model, "config", None)
    if name == "input_ids":
        tokens = torch.zeros(1, _window(config), dtype=torch.long)
        names = (name, "decoder_input_ids") if config.is_encoder_decoder else (name,)
        return dict.fromkeys(names, tokens)
    if name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        return {name: torch.zeros(1, config.num_channels, config.image_size, config.image_size)}
    raise UsageError(
        f"a {type(model).__name__} takes {name or 'inputs of its own'}, which no config gives: give --data with one batch"
    )


def _window(config: Any) -> int:
    return min(WINDOW, getattr(config, "max_position_embeddings", None) or WINDOW)


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
    size = _window(config)
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
