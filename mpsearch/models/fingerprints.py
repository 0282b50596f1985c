"""What a run depends on, as text that is the same in every process, and how two of them differ."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import warn
from mpsearch.models.running import fingerprint, state_fingerprint


def described(value: Any) -> str:
    """Settings as text: equal for equal values and equal code, in every process.

    Functions are known by their code, their defaults, and what they close over or read of their module; models and tensors
    by their values; objects without a text of their own by their attributes.

    >>> def times(k):
    ...     return lambda x: k * x
    >>> described(times(2)) == described(times(2)), described(times(2)) == described(times(3))
    (True, False)
    """
    return _Describer()(value)


def digest(*parts: str) -> str:
    """A short name for texts of any length; addresses in them do not count.

    >>> digest("<function f at 0x7f01>") == digest("<function f at 0x7f02>"), len(digest("f"))
    (True, 24)
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", "\0".join(parts))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


#: Signs that an output is summed up with: so many sums, over pieces of so many numbers.
_SUMS, _PIECE = 8, 2**14


def output_identity(model: nn.Module, output: Tensor) -> str:
    """What the unquantized model says of some samples: a hash of it, and random sums that tell how far another one is away.

    With signs s of expectation 0, the mean of <s, y - y'>^2 over draws is |y - y'|^2 (Alon, Matias & Szegedy, The space complexity of
    approximating the frequency moments, 1996), so two outputs can be compared by a few numbers of each.

    Args:
        model: tells in which type it computes.
        output: of any shape.

    Returns:
        JSON: `hash`, `shape`, `eps` of the coarsest type, `norm`, `sums`.
    """
    types = {tensor.dtype for tensor in (output, *model.parameters()) if tensor.is_floating_point()}
    generator = torch.Generator().manual_seed(0)
    signs = (2 * torch.randint(0, 2, (_SUMS, _PIECE), generator=generator) - 1).double()
    sums, square = torch.zeros(_SUMS, dtype=torch.float64), 0.0
    for piece in output.detach().reshape(-1).split(_PIECE):
        values = piece.double().cpu()
        turn = 2 * int(torch.randint(0, 2, (), generator=generator)) - 1
        sums += turn * (signs[:, : len(values)] @ values)
        square += float(values.square().sum())
    return json.dumps(
        {
            "hash": fingerprint([output]),
            "shape": list(output.shape),
            "eps": max(torch.finfo(kind).eps for kind in types),
            "norm": math.sqrt(square),
            "sums": sums.tolist(),
        }
    )


def difference(stored: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """In what two identities differ, in words that follow `for`; None where they are the same.

    Outputs that agree to half of the digits of their type are taken for the same model on another machine, or with another number of
    threads: there a warning tells that results agree within rounding.

    >>> difference({"weights": "a", "data": "b"}, {"weights": "a", "data": "c"})
    'other data: it has b, this run has c'
    """
    for name in sorted({**wanted, **stored}, key=_is_output):  # which come of all the others
        ours, theirs = wanted.get(name), stored.get(name)
        if ours == theirs:
            continue
        if ours is None or theirs is None or not _is_output(name):
            return (
                f"a model whose {name} it does not tell, as older versions did not"
                if theirs is None and _is_output(name)
                else f"other {name}: it has {theirs}, this run has {ours}"
            )
        try:
            change, tolerance = _change(json.loads(theirs), json.loads(ours))
        except (ValueError, KeyError, TypeError):
            return f"another {name}, which cannot be read"
        if not change <= tolerance:
            return (
                f"another {name}: unquantized, on the first samples, the two differ by {change:.2g} of its size, and rounding explains "
                f"{tolerance:.2g} (another forward, an attribute, other code with the same weights?)"
            )
        warn(
            f"the output of the unquantized model differs by {change:.2g} of its size from that of the earlier run, as on another machine "
            "or with another number of threads: results agree within rounding, not bit for bit"
        )
    return None


def _is_output(name: str) -> bool:
    """True for what `output_identity` tells: `output`, `output of model 1`."""
    return name.startswith("output")


def _change(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """How far two outputs are apart, over the size of the larger one, and what rounding may do."""
    tolerance = math.sqrt(max(first["eps"], second["eps"]))
    if first["shape"] != second["shape"]:
        return math.inf, tolerance
    apart = math.sqrt(np.mean(np.square(np.subtract(first["sums"], second["sums"]))))
    return apart / max(first["norm"], second["norm"], 1e-300), tolerance


class _Describer:
    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # values are kept, so that no address is given out twice

    def __call__(self, value: Any) -> str:
        if isinstance(value, tuple):
            return f"({self._listed(value)})"
        if isinstance(value, frozenset | set):
            return f"{{{', '.join(sorted(map(self, value)))}}}"
        if isinstance(value, types.CodeType):
            return digest(value.co_code.hex(), self(value.co_consts), repr((value.co_names, value.co_freevars)))
        if isinstance(value, np.ndarray) and value.dtype != object:
            return (
                f"array {fingerprint([torch.from_numpy(value.reshape(-1).view(np.uint8))])} {value.dtype} {value.shape}"
            )
        if isinstance(value, Tensor):
            return f"tensor {fingerprint([value])}"
        if isinstance(value, type | types.ModuleType):
            return value.__name__
        if value is None or isinstance(value, str | bytes | int | float):
            return repr(value)
        if id(value) in self.seen:
            return f"again {self.seen[id(value)][0]}"
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, nn.Module):
            return f"{value!r} {state_fingerprint(value)}"
        if isinstance(value, list):
            return f"[{self._listed(value)}]"
        if isinstance(value, Mapping):
            return f"{{{self._listed(value.items())}}}"
        if isinstance(value, functools.partial):
            return f"partial{self((value.func, value.args, value.keywords))}"
        if isinstance(value, types.MethodType):
            return f"{self(value.__func__)} of {self(value.__self__)}"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if dataclasses.is_dataclass(value):
            parts = [f"{field.name}={self(getattr(value, field.name))}" for field in dataclasses.fields(value)]
            return f"{type(value).__qualname__}({', '.join(parts)}) {self._methods(value)}"
        if repr(value) == object.__repr__(value):
            return f"{type(value).__qualname__} {self(getattr(value, '__dict__', {}))} {self._methods(value)}"
        return repr(value)

    def _methods(self, value: Any) -> str:
        return digest(*(self(part) for part in vars(type(value)).values() if isinstance(part, types.FunctionType)))

    def _listed(self, values: Any) -> str:
        return ", ".join(map(self, values))

    def _function(self, value: types.FunctionType) -> str:
        closed: dict[str, Any] = {}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # nothing is there yet
                closed[name] = cell.cell_contents
        names = [name for name in _names(value.__code__) if name in value.__globals__]
        read = {name: value.__globals__[name] for name in names if _counts(value.__globals__[name], value)}
        text = digest(self(value.__code__), self((value.__defaults__, value.__kwdefaults__, closed, read)))
        return f"{value.__qualname__} {text}"


def _counts(value: Any, reader: types.FunctionType) -> bool:
    """True for constants, tensors and models of a module, and for its own functions; other things may be a record of the run."""
    if isinstance(value, types.FunctionType):
        return value.__module__ == reader.__module__
    return isinstance(value, str | int | float | tuple | Tensor | nn.Module)


def _names(code: types.CodeType) -> list[str]:
    """Names that a function and the functions inside it look up."""
    inner = (name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names(part))
    return list(dict.fromkeys([*code.co_names, *inner]))
