"""Models and data that are given by name: `hf:DIR`, `text:FILE`, `file.py:function`."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from mpsearch.errors import EstimatorError
from mpsearch.models.hugging_face import model_of, text_batches
from mpsearch.models.loading import UsageError, call, loaded_batches
from mpsearch.models.running import Batch
from mpsearch.models.streaming.opening import shard_bytes

#: What work on a model takes beside its weights at least, as a share of them: it is streamed where that does not fit.
_BESIDE = 0.25


def model_named(spec: str, *, memory_bytes: int | None = None, shapes_suffice: bool = False) -> nn.Module:
    """The module that a name stands for.

    Args:
        spec: `hf:DIR`, a folder of `save_pretrained`; `file.py:function` or `package.module:function`, which returns a module.
        memory_bytes: that may be used. Weights of a folder that do not fit, with room beside them, stay in their shards and are read block
            by block.
        shapes_suffice: the weights of a folder are not read.

    Raises:
        UsageError: where there is no such folder or function, it fails, or it returns something else.
    """
    if spec.startswith("hf:"):
        folder = spec.removeprefix("hf:")
        streamed = memory_bytes is not None and is_too_large(folder, memory_bytes)
        return model_of(folder, streamed=streamed, shapes_suffice=shapes_suffice)
    module = call(spec, "model")
    if not isinstance(module, nn.Module):
        raise UsageError(f"model {spec!r} returned a {type(module).__name__}, expected a torch.nn.Module")
    return module


def is_too_large(folder: str, memory_bytes: int) -> bool:
    """True where the weights of a folder do not fit into so much memory with room beside them."""
    return shard_bytes(folder) * (1 + _BESIDE) > memory_bytes


def batches_named(spec: str, model: nn.Module) -> list[Any]:
    """The batches that a name stands for.

    Args:
        spec: `text:FILE`, read with the tokenizer of the model; `file.py:function` or `package.module:function`.
        model: that they are for.

    Raises:
        UsageError: where there is no such file or function, or it fails.
    """
    if spec.startswith("text:"):
        return list(text_batches(spec.removeprefix("text:"), model))
    return loaded_batches(spec)


def opened(
    model: nn.Module | str, batches: Iterable[Batch] | str, *, memory_bytes: int | None = None
) -> tuple[nn.Module, Iterable[Batch]]:
    """A model and its data, opened where they are given by name.

    Args:
        model: a module, or what `model_named` reads.
        batches: batches, or what `batches_named` reads.
        memory_bytes: as for `model_named`.

    Raises:
        EstimatorError: for something that is no module.

    >>> module, data = opened(nn.Linear(1, 1), [])
    >>> type(module).__name__, data
    ('Linear', [])
    """
    if isinstance(model, str):
        model = model_named(model, memory_bytes=memory_bytes)
    if not isinstance(model, nn.Module):
        raise EstimatorError(
            f"the model is a {type(model).__name__}, expected a torch.nn.Module, or a name such as 'hf:folder'"
        )
    return model, batches_named(batches, model) if isinstance(batches, str) else batches
