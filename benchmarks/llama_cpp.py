"""llama.cpp itself, by the C functions in xllamacpp's extension module: not a public interface, for comparisons alone."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_INT, _POINTER = ctypes.c_int32, ctypes.POINTER


class _Settings(ctypes.Structure):
    """Any of its structures of settings, passed on as they come; longer than each of them."""

    _fields_ = (("content", ctypes.c_char * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", _INT),
        ("token", _POINTER(_INT)),
        ("embd", ctypes.c_void_p),
        ("pos", _POINTER(_INT)),
        ("n_seq_id", _POINTER(_INT)),
        ("seq_id", _POINTER(_POINTER(_INT))),
        ("logits", _POINTER(ctypes.c_int8)),
    )


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_model_default_params": (_Settings, ()),
    "llama_context_default_params": (_Settings, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _Settings)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, _Settings)),
    "llama_set_n_threads": (None, (ctypes.c_void_p, _INT, _INT)),
    "llama_get_memory": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_memory_clear": (None, (ctypes.c_void_p, ctypes.c_bool)),
    "llama_batch_init": (_Batch, (_INT, _INT, _INT)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (_INT, (ctypes.c_void_p, _Batch)),
    "llama_get_logits": (_POINTER(ctypes.c_float), (ctypes.c_void_p,)),
    "llama_free": (None, (ctypes.c_void_p,)),
    "llama_model_free": (None, (ctypes.c_void_p,)),
    "ggml_quantize_chunk": (ctypes.c_size_t, (_INT, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p)),
}


@functools.cache
def _library() -> Any:
    import xllamacpp

    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_SILENT, None)
    found.llama_backend_init()
    return found


_SILENT = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class LlamaCpp:
    """A GGUF file, run by llama.cpp on one thread, with its default 16-bit cache of keys and values."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        library = _library()
        self._vocabulary = vocabulary
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._context = library.llama_init_from_model(self._model, library.llama_context_default_params())
        library.llama_set_n_threads(self._context, 1, 1)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), T up to 512."""
        return torch.stack([self._row(row.tolist()) for row in tokens])

    def close(self) -> None:
        library = _library()
        library.llama_free(self._context)
        library.llama_model_free(self._model)

    def _row(self, tokens: list[int]) -> Tensor:
        library = _library()
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        status = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp stopped with status {status}")
        found = library.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(found, (len(tokens), self._vocabulary)).copy())


def quantized(weight: Tensor, kind: str) -> Tensor:
    """The bytes (N, K / block * bytes) uint8 that ggml makes of a matrix (N, K) float32 in a type, without importances."""
    import gguf

    value = gguf.GGMLQuantizationType[kind.upper()]
    block, size = gguf.GGML_QUANT_SIZES[value]
    rows = np.ascontiguousarray(weight.numpy(), np.float32)
    out = np.empty((rows.shape[0], rows.shape[1] // block * size), np.uint8)
    _library().ggml_quantize_chunk(int(value), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    return torch.from_numpy(out)
