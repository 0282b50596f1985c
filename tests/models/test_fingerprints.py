"""Text that a run is known by: equal in another process for equal values and code, different otherwise."""

import ast
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mpsearch.models.fingerprints import described, difference, digest, output_identity
from mpsearch.quantizers.rounding import RoundToNearest

CODE = """
import functools, torch
from torch import nn
from torch.nn import functional as F
from mpsearch.models.fingerprints import described

def scaled(x):
    return FACTOR * x

FACTOR = 2.0
torch.manual_seed(0)

class Loss:
    def __init__(self, teacher, words):
        self.teacher, self.words, self.own = teacher, words, self

    def __call__(self, model, batch):
        return self.part(model(batch), self.teacher(batch))

    def part(self, a, b):
        return F.mse_loss(a, b)

def made(teacher, memory):
    data = {"tokens": torch.arange(4), "names": {"b", "a", "c"}, "memory": memory}
    def own(model, batch, weight=0.5):
        inner = lambda y: scaled(y) + len(data)
        return weight * inner(F.mse_loss(model(batch), teacher(batch)))
    return own

teacher = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
found = [
    described(made(teacher, object())),
    described(Loss(teacher, {"x", "y", "z"})),
    described(functools.partial(made(teacher, []), weight=0.25)),
    described(Loss(teacher, ()).__call__),
]
"""


def run(code):
    names = {"__name__": "script"}
    exec(code, names)
    return names["found"]


def test_the_same_in_another_process_and_different_for_other_code():
    first = run(CODE)
    there = [sys.executable, "-c", f"\n\n{CODE}\nprint(ascii(found))"]  # other lines, addresses, order of hashes
    assert ast.literal_eval(subprocess.run(there, capture_output=True, text=True, check=True).stdout) == first
    assert len(set(first)) == 4
    changed = {  # what it concerns: function, object, partial function, bound method
        "FACTOR = 2.0": ("FACTOR = 3.0", [0, 2]),
        "manual_seed(0)": ("manual_seed(1)", [0, 1, 2, 3]),
        "FACTOR * x": ("FACTOR + x", [0, 2]),
        "+ len(data)": ("- len(data)", [0, 2]),
        '"b", "a"': ('"b", "d"', [0, 2]),
        "arange(4)": ("arange(5)", [0, 2]),
        "weight=0.5)": ("weight=0.75)", [0, 2]),
        "weight=0.25)": ("weight=0.75)", [2]),
        "return F.mse_loss(a, b)": ("return F.l1_loss(a, b)", [1, 3]),
        '"y", "z"': ('"y"', [1]),
        "teacher, ()": ("teacher, (1,)", [3]),
    }
    for old, (new, places) in changed.items():
        assert CODE.count(old) == 1
        other = run(CODE.replace(old, new))
        assert [i for i in range(4) if other[i] != first[i]] == places, new


def closure(value):
    return lambda: value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2000), torch.cat([torch.zeros(1000), torch.ones(1), torch.zeros(999)])),  # repr is abridged
        (torch.zeros(2), torch.zeros(2).double()),
        (np.zeros(3), np.zeros(3, np.float32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        ([1, 2], (1, 2)),
        (1, True),
        ({"a": 1}, {"a": 2}),
        (nn.ReLU(), nn.Tanh()),
        (nn.Dropout(0.1), nn.Dropout(0.2)),
        (functools.partial(int, base=2), functools.partial(int, base=3)),
        (RoundToNearest(), RoundToNearest(scale="max")),
        ("1", 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_in_a_closure_count(one, other):
    assert described(closure(one)) != described(closure(other))
    if not isinstance(one, nn.Module):
        assert described(closure(one)) == described(closure(one))


def test_equal_models_are_equal():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    assert described(closure(first)) != described(closure(second))
    second.load_state_dict(first.state_dict())
    assert described(closure(first)) == described(closure(second.eval()))


def test_what_refers_to_itself():
    loop = [1]
    loop.append(loop)

    def recursive(n):
        return recursive(n - 1) if n else 0

    assert described(loop) == "[1, again 0]"
    assert described(recursive) == described(recursive)


def test_a_record_of_the_run_in_the_module_does_not_count():
    noting = run("LOG = []\n\ndef noting():\n    LOG.append(1)\n\nfound = noting\n")
    before = described(noting)
    noting()
    assert described(noting) == before


def test_digests_of_parts():
    assert digest("a", "b") != digest("ab")
    assert digest("<f at 0x1>") == digest("<f at 0x2>")


def output(change=0.0, dtype=torch.float32, shape=(8, 5000)):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return {"output": output_identity(nn.Identity(), (values + change * noise).to(dtype))}


def test_outputs_are_held_against_what_rounding_does(recwarn):
    assert difference(output(), output()) is None
    assert not recwarn
    with pytest.warns(UserWarning, match="results agree within rounding, not bit for bit"):
        assert difference(output(), output(1e-5)) is None
    assert "differ by 0.01" in difference(output(), output(1e-2))
    with pytest.warns(UserWarning, match="within rounding"):
        assert difference(output(dtype=torch.bfloat16), output(1e-2, torch.bfloat16)) is None
    assert "differ by inf" in difference(output(), output(shape=(8, 5001)))


def test_sums_of_an_output_tell_how_far_away_another_one_is():
    """Within what 8 draws allow, wherever the difference lies."""
    for place in (slice(0, 1), slice(3, 4), slice(None)):
        values = torch.ones(8, 70_000)
        other = values.clone()
        other[place, ::7] += 0.5
        expected = float((other - values).norm() / other.norm())
        told = difference(*({"output": output_identity(nn.Identity(), y)} for y in (values, other)))
        assert 0.4 * expected < float(told.partition("differ by ")[2].split()[0]) < 1.8 * expected


def test_identities_that_tell_no_output():
    assert difference({"weights": "a"}, {"weights": "a", **output()}) == (
        "a model whose output it does not tell, as older versions did not"
    )
    assert difference({"weights": "b"}, {"weights": "a", **output()}) == "other weights: it has b, this run has a"
    assert difference({"output": "{}"}, output()) == "another output, which cannot be read"
