"""The contract suite of resources: every registered one passes, every way to cheat is caught."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpsearch import precisions
from mpsearch.decisions.finding import layers
from mpsearch.errors import TableError
from mpsearch.resources import (
    RESOURCES,
    ActivationBytes,
    BitOps,
    KVCacheBytes,
    LatencyTable,
    MeasuredLatency,
    MemoryBytes,
    Resource,
    ResourceCapabilities,
)
from mpsearch.resources.total import Total
from mpsearch.testing import resource_checks

OWN = {"measured-latency": MeasuredLatency(cache=None, rounds=2)}


def registered_checks() -> Iterator[Any]:
    """Every check of every registered resource, under both names; a table of latencies needs a file, see below."""
    for name, resource in RESOURCES.items():
        if name != "latency-table":
            for check_name, check in resource_checks(OWN.get(name) or resource()):
                yield pytest.param(check, id=f"{name}-{check_name}")


@pytest.mark.parametrize("check", list(registered_checks()))
def test_registered_resources(check: Callable[[], None]) -> None:
    check()


def test_a_table_of_latencies(tmp_path):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    rows = [
        f"{layer.name},{precision},{0.001 * layer.macs * precision.weight_bits}"
        for layer in layers(model, batch)
        for precision in precisions("w2 w4 w8 w16")
    ]
    path = tmp_path / "latency.csv"
    path.write_text("layer,precision,latency_s\n" + "\n".join(rows))
    for _, check in resource_checks(LatencyTable(path), model=model, example=batch, options="w2 w4 w8 w16"):
        check()


def test_a_sum_of_resources():
    for _, check in resource_checks(Total((BitOps(), BitOps()))):
        check()
    assert Total((MemoryBytes(), KVCacheBytes())).capabilities.unit == "bytes"


def test_a_function_of_ones_own_passes_all_but_the_declaration():
    def traffic(model, layers, precisions):
        return [[layer.numel * precision.weight_bits / 8 for precision in precisions] for layer in layers]

    assert failing(traffic) == ["declaration"]


@dataclass(frozen=True)
class Cheat:
    """A resource with one thing wrong."""

    honest: Any
    wrong: Callable[..., Any]
    lie: Callable[[ResourceCapabilities], ResourceCapabilities] = lambda declared: declared

    @property
    def capabilities(self) -> ResourceCapabilities:
        """Those of the honest one, but for the lie."""
        return self.lie(self.honest.capabilities)

    def __call__(self, model, layers, precisions, **keywords):
        answer = self.honest(model, layers, precisions, **keywords)
        return self.wrong(answer, model, layers, **keywords)


def failing(resource: Any) -> list[str]:
    names = []
    for name, check in resource_checks(resource):
        try:
            check()
        except AssertionError:
            names.append(name)
    return names


def reference_by_two(answer, *_, **__):
    return replace(answer, reference=answer.reference / 2)


def everything_by_two(answer, *_, **__):
    return Resource(answer.usage / 2, answer.fixed / 2, answer.reference / 2)


def negative(answer, *_, **__):
    return replace(answer, usage=-answer.usage)


def transposed(answer, *_, **__):
    return replace(answer, usage=answer.usage.T)


def by_place(answer, model, layers, **_):
    factors = np.arange(1, len(layers) + 1)[:, None]
    usage = answer.usage * factors
    return replace(answer, usage=usage, reference=float(usage[:, -1].sum()) + answer.fixed)


def noisy(answer, *_, **__):
    return replace(answer, fixed=answer.fixed + np.random.default_rng().uniform(0, 1e9))


def backwards(answer, *_, **__):
    usage = answer.usage[:, ::-1]
    return replace(answer, usage=usage, reference=float(usage[:, -1].sum()) + answer.fixed)


def writes(answer, model, *_, **__):
    next(iter(model.parameters())).data.add_(1.0)
    return answer


def draws(answer, *_, **__):
    torch.rand(())
    return answer


def leaves_a_hook(answer, model, *_, **__):
    model.register_forward_hook(lambda *_: None)
    return answer


def refuses(answer, *_, **__):
    raise TableError("not today")


def reads_weights(answer, model, *_, **__):
    return replace(answer, fixed=answer.fixed + float(next(iter(model.parameters())).device.type == "meta"))


@pytest.mark.parametrize(
    ("cheat", "names"),
    [
        (Cheat(MemoryBytes(), reference_by_two), ["reference of the unquantized plan", "reference in stored bytes", "layer by layer"]),
        (Cheat(MemoryBytes(), everything_by_two), ["reference in stored bytes"]),
        (Cheat(BitOps(), everything_by_two), ["reference in bit operations"]),
        (Cheat(ActivationBytes(), reference_by_two), ["reference of the unquantized plan"]),
        (Cheat(BitOps(), refuses), ["answers"]),
        (Cheat(MemoryBytes(), reads_weights), ["without weights"]),
    ],
)  # fmt: skip
def test_cheats_fail_what_they_break_and_nothing_else(cheat: Cheat, names: list[str]) -> None:
    assert failing(cheat) == names


@pytest.mark.parametrize(
    ("cheat", "name"),
    [
        (Cheat(MemoryBytes(), negative), "not negative"),
        (Cheat(ActivationBytes(), lambda answer, *_, **__: replace(answer, fixed=0.0)), "shape"),
        (Cheat(BitOps(), lambda a, *_, **__: a, lambda declared: replace(declared, peak=True)), "shape"),
        (Cheat(BitOps(), lambda a, *_, **__: a, lambda declared: replace(declared, unit="")), "declaration"),
        (Cheat(MemoryBytes(), by_place), "layer by layer"),
        (Cheat(MemoryBytes(), by_place), "order of layers"),
        (Cheat(MemoryBytes(), noisy), "deterministic"),
        (Cheat(BitOps(), backwards), "monotone in bits"),
        (Cheat(MemoryBytes(), writes), "model untouched"),
        (Cheat(BitOps(), draws), "model untouched"),
        (Cheat(BitOps(), leaves_a_hook), "model untouched"),
        (Cheat(BitOps(), lambda a, *_, **__: replace(a, reference=np.nan)), "reference of the unquantized plan"),
    ],
)
def test_cheats_are_caught(cheat: Cheat, name: str) -> None:
    assert name in failing(cheat)
