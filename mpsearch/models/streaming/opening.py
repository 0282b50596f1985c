"""Models of transformers whose weights stay in their shards."""

import contextlib
import importlib
import json
import logging
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.errors import EstimatorError, MissingPackage
from mpsearch.models.streaming.stored import InFile, tensors_in


def shard_bytes(folder: str | Path) -> int:
    """Size of the weights in a folder of `save_pretrained`, by the headers of its safetensors files; 0 where it has none."""
    return sum(
        tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        for path in _shards(Path(folder))
        for tensor in tensors_in(path).values()
    )


def offloaded(folder: str | Path, cls: Any, config: Any) -> nn.Module:
    """A model whose weights stay in the safetensors files of a folder, under the offload hooks of accelerate.

    Where the files have a tensor for each parameter, their headers are all that is read. Where transformers makes parameters out of several
    tensors (experts that are stacked), it converts them once, into a folder for temporary files that goes with the model.

    Args:
        folder: of `save_pretrained`.
        cls: of the model.
        config: of the model.

    Raises:
        EstimatorError: for a folder without safetensors files, or a damaged one.
        MissingPackage: without accelerate.
    """
    paths = _shards(Path(folder))
    if not paths:
        raise EstimatorError(
            f"{folder} holds no safetensors files, which weights are streamed from: save the model anew"
        )
    tensors = {name: tensor for path in paths for name, tensor in tensors_in(path).items()}
    model = _by_headers(cls, config, tensors)
    return _converted(folder, cls, config) if model is None else model


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder; where an index names them, those that it names.

    Raises:
        EstimatorError: where one of these is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise EstimatorError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}: download them again"
        )
    return [folder / name for name in names]


def _by_headers(cls: Any, config: Any, tensors: dict[str, InFile]) -> nn.Module | None:
    """The model, where each of its parameters is a tensor of the files by the same name and shape; else None."""
    accelerate = _accelerate()
    dtype = getattr(config, "dtype", None) or next(iter(tensors.values())).dtype
    with accelerate.init_empty_weights(include_buffers=False):
        model: nn.Module = cls._from_config(config, dtype=dtype)
    state = model.state_dict()
    index = {}
    for name, tensor in state.items():
        if name in tensors and tensors[name].shape == tuple(tensor.shape):
            entry = tensors[name]
            index[name] = {
                "safetensors_file": entry.path,
                "weight_name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
    parameters = dict(model.named_parameters())  # tied ones once
    if not parameters.keys() <= index.keys() or any(not tensor.is_meta for tensor in parameters.values()):
        return None
    for name, tensor in model.named_parameters(remove_duplicate=False):  # by the name of the one that is stored
        if name not in index:
            index[name] = next(index[other] for other, one in parameters.items() if one is tensor)
    with _silent("accelerate"):
        dispatched: nn.Module = accelerate.dispatch_model(model, {"": "disk"}, offload_index=index, force_hooks=True)
    return dispatched.eval()


def _converted(folder: str | Path, cls: Any, config: Any) -> nn.Module:
    """The model as transformers offloads it to disk."""
    _accelerate()
    scratch = tempfile.TemporaryDirectory(prefix="mpsearch-")
    with _silent("accelerate"), _silent("transformers"):
        model: nn.Module = cls.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            dtype="auto",
            device_map={"": "disk"},
            offload_folder=scratch.name,
        )
    weakref.finalize(model, scratch.cleanup)
    return model.eval()


def _accelerate() -> Any:
    try:
        return importlib.import_module("accelerate")
    except ImportError as error:
        raise MissingPackage(
            f"streaming a model from its shards needs accelerate ({error}); pip install accelerate brings it"
        ) from None


@contextlib.contextmanager
def _silent(package: str) -> Iterator[None]:
    """What a package tells of offloading is no news."""
    logger = logging.getLogger(package)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
