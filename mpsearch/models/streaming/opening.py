"""Models of transformers whose weights stay in their shards."""

import contextlib
import importlib
import json
import logging
import math
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    """The model, where each of its parameters and persistent buffers is a tensor of the files by the same name and shape; else None."""
    accelerate = _accelerate()
    dtype = getattr(config, "dtype", None) or next(iter(tensors.values())).dtype
    model = _without_values(cls, config, dtype)
    if model is None:
        return None
    parameters = dict(model.named_parameters())  # tied ones once
    own = model.state_dict()
    stored = [name for name in own if name in parameters or not own[name].is_meta]
    if any(name not in tensors or tensors[name].shape != tuple(own[name].shape) for name in stored):
        return None
    for name in set(stored) - parameters.keys():
        own[name].copy_(tensors[name].values())
    index = {}
    for name, tensor in model.named_parameters(
        remove_duplicate=False
    ):  # tied ones by the name of the one that is stored
        key = next(other for other, parameter in parameters.items() if parameter is tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        index[name] = {"safetensors_file": tensors[key].path, "weight_name": key, "dtype": dtype}
    with _silent("accelerate"):
        dispatched: nn.Module = accelerate.dispatch_model(model, {"": "disk"}, offload_index=index, force_hooks=True)
    return dispatched.eval()


def _without_values(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model with parameters on the meta device and buffers that hold their values; None where the class does not say what these are.

    Nothing is allocated for the parameters, not even for a moment, as `accelerate.init_empty_weights` would.
    """
    with torch.device("meta"):
        model: Any = cls._from_config(config, dtype=dtype)
    model.tie_weights()
    fresh: list[Tensor] = []
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)  # it was, on the meta device
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.full_like(buffer, _unset(buffer), device="cpu")
                if name in module._non_persistent_buffers_set:
                    fresh.append(module._buffers[name])
    model.initialize_weights()
    return None if any(_is_unset(buffer) for buffer in fresh) else model


def _unset(buffer: Tensor) -> float | int | bool:
    """A value that no buffer has everywhere, but for those of 0 and 1."""
    if buffer.dtype == torch.bool:
        return False
    return math.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min


def _is_unset(buffer: Tensor) -> bool:
    value = _unset(buffer)
    same = buffer.isnan() if buffer.is_floating_point() else buffer == value
    return bool(same.all()) and buffer.numel() > 0


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
