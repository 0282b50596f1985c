"""What the runners of all tools share: the task they are given, the plans they hand back, and a count of the work between."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # mpsearch as it stands
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # models.py

from models import MODELS, Examples

import mpsearch as mps

BITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True, eq=False)
class Task:
    """What a tool is given.

    Attributes:
        variant: of the tool's method.
        name: the network, in `models.MODELS`.
        model: the network itself.
        calibration: the calibration set.
        seed: of what the tool draws.
        limits: average bits.
        folder: where the plans go.
        layers: name -> number of weights, of all decisions.
    """

    variant: str
    name: str
    model: nn.Module
    calibration: Examples
    seed: int
    limits: Sequence[float]
    folder: Path
    layers: Mapping[str, int]

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The calibration set in so many batches."""
        return self.calibration.batches(-(-len(self.calibration) // count))

    def fixed(self, limit: float, searched: Sequence[str]) -> dict[str, int]:
        """Bits of the layers that the tool does not search: the least that is not below the budget."""
        width = min(bits for bits in BITS if bits >= limit)
        return {name: width for name in self.layers if name not in searched}

    def left(self, limit: float, searched: Sequence[str]) -> float:
        """Average bits that remain for the layers that the tool searches."""
        total = limit * sum(self.layers.values())
        total -= sum(bits * self.layers[name] for name, bits in self.fixed(limit, searched).items())
        return total / sum(self.layers[name] for name in searched)

    def save(self, limit: float, bits: Mapping[str, int], work: "Work") -> None:
        """Write a plan, with the passes and the seconds that it took."""
        chosen = {**self.fixed(limit, list(bits)), **bits}
        plan = mps.Plan(
            {name: mps.Precision(str(chosen[name])) for name in self.layers},
            budget={"average_bits": limit},
            origin={"passes": work.operations / self._operations(), "cpu_s": work.seconds},
        )
        plan.save(self.folder / f"{limit}.json")

    def _operations(self) -> int:
        with Work() as one, torch.no_grad():
            self.model(self.calibration.inputs)
        return one.operations


def task() -> Task:
    """The task on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant")
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("seed", type=int)
    parser.add_argument("samples", type=int, help="of the calibration set")
    parser.add_argument("folder", type=Path)
    parser.add_argument("limits", type=float, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    trained = MODELS[given.model]()
    found = mps.layers(trained.model, trained.held_out.batches(2)[0], groups="none")
    return Task(
        given.variant,
        given.model,
        trained.model,
        trained.pool.sample(given.samples, given.seed),
        given.seed,
        given.limits,
        given.folder,
        {layer.name: layer.numel for layer in found},
    )


class Work:
    """Counts the operations of matrix products and convolutions, whoever calls them, and CPU seconds, while it is entered."""

    def __init__(self) -> None:
        self._count, self.seconds = _Count(), 0.0

    @property
    def operations(self) -> int:
        """Multiplications and additions so far."""
        return self._count.operations

    def __enter__(self) -> "Work":
        self._start = time.process_time()
        self._count.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._count.__exit__(*error)  # type: ignore[no-untyped-call]
        self.seconds += time.process_time() - self._start


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        count: Callable[..., int] | None = flop_registry.get(function._overloadpacket)
        if count is None and function is not torch.ops.prim.device.default:
            with self:
                parts = function.decompose(*args, **keywords)  # in inference mode linear layers arrive whole
            if parts is not NotImplemented:
                return parts
        result = function(*args, **keywords)
        if function is torch.ops.aten.convolution_backward.default:  # PyTorch's own count forgets the groups
            slope, inputs, weight, *_, transposed, _, _, wanted = args
            forward = conv_flop_count(inputs.shape, weight.shape, slope.shape, transposed)
            self.operations += int(sum(wanted[:2]) * forward)
        elif count is not None:
            self.operations += int(count(*args, **keywords, out_val=result))  # while a tool traces, sizes are tensors
        return result
