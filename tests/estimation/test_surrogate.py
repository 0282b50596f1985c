"""The additive-output surrogate against the model itself where outputs are additive."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.checkpoints.keys import ReferenceKey, ShiftIndex, ShiftIndexKey, ShiftKey
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.estimation.surrogate import OutputShifts, Surrogate, surrogate
from mpsearch.metrics.statistics import kl_divergence
from mpsearch.sensitivity import FisherProjection, KLDivergence


class Sum(nn.Module):
    """Outputs of the layers add up: so do the shifts."""

    def __init__(self, classes=4, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.Linear(5, classes) for _ in range(layers)])

    def forward(self, x):
        return sum(part(x * (i + 1)) for i, part in enumerate(self.parts))


def data(count=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 5, generator=generator) for _ in range(count)]


def made(model, batches, precisions="w2 w3 w16", **options):
    shifts = OutputShifts(**options)
    with mps.Calibration(model, batches, mps.precisions(precisions)) as calibration:
        table = calibration.profile(KLDivergence(), observers=[shifts])
        return shifts.surrogate(len(calibration.decisions), calibration.precisions), table


def test_it_is_the_model_where_outputs_are_additive():
    model, batches = Sum().eval(), data()
    found, table = made(model, batches)
    names = [layer.name for layer in table.layers]
    for options in itertools.product(range(3), repeat=3):
        plan = mps.Plan({name: table.precisions[p] for name, p in zip(names, options, strict=True)})
        expected = mps.evaluate(model, batches, plan).kl
        assert found.damage(np.array(options)) == pytest.approx(expected, rel=5e-4, abs=1e-7)


def test_single_cells_are_those_of_the_table_and_cells_that_change_nothing_have_no_shift():
    found, table = made(Sum().eval(), data())
    for u, p in itertools.product(range(3), range(3)):
        options = np.full(3, 2)
        options[u] = p
        assert found.damage(options) == pytest.approx(table.sensitivity[u, p], rel=5e-4, abs=1e-12)  # rounded
    assert not found.shifts[:, 2].any()
    assert found.damage(np.full(3, 2)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_classes_taken_as_one_give_a_lower_bound(classes):
    """The log-sum inequality: KL of a coarser partition is at most that of a finer one; with all classes it is equal."""
    batches = data()
    model = Sum(classes=20).eval()
    full, _ = made(model, batches)
    coarse, _ = made(model, batches, classes=classes)
    assert coarse.log_p.shape == (16, classes)
    assert np.allclose(np.exp(coarse.log_p).sum(-1), 1)
    for u, p in itertools.product(range(3), range(2)):  # one cell at a time: the shift is exact
        options = np.full(3, 2)
        options[u] = p
        assert coarse.damage(options) <= full.damage(options) + 1e-12
        assert (coarse.damage(options) == pytest.approx(full.damage(options))) == (classes == 20)
        assert coarse.damage(options) > 0


def test_a_sample_of_predictions_spread_over_the_batches():
    batches = data(4, 8)
    found, _ = made(Sum().eval(), batches, predictions=12)
    assert found.log_p.shape == (12, 4)
    model = Sum().eval()
    expected = torch.cat([torch.log_softmax(model(x)[:3].double(), -1) for x in batches]).detach().numpy()
    assert np.allclose(found.log_p, expected, atol=1e-6)


def test_damage_of_changes_is_damage_after_each():
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=(6, 4)))
    found = Surrogate(torch.log_softmax(logits, -1).numpy(), generator.normal(size=(3, 2, 6, 4)))
    start = np.array([0, 1, 0])
    changes = [((0, 1),), ((1, 0), (2, 1)), ((0, 1), (1, 0), (2, 1))]
    plans = [[1, 1, 0], [0, 0, 1], [1, 0, 1]]
    values = found.damage_of_changes(start, changes)
    for value, options in zip(values, plans, strict=True):
        shifted = logits + sum(torch.from_numpy(found.shifts[u, p]) for u, p in enumerate(options))
        assert value == pytest.approx(float(kl_divergence(logits, shifted).mean()))
        assert value == pytest.approx(found.damage(np.array(options)))


def test_nothing_without_one_at_a_time_runs():
    shifts = OutputShifts()
    with mps.Calibration(Sum().eval(), data(), mps.precisions("w2 w4")) as calibration:
        calibration.profile(FisherProjection(), observers=[shifts])
    assert shifts.surrogate(3, mps.precisions("w2 w4")) is None


class Killed(Exception):
    """Stands for a kill."""


def test_an_interrupted_run_is_shown_what_it_has_not_seen(tmp_path):
    """Shifts and scores are those of a run in one go, whether it was killed, or had scores and no shifts."""
    expected, table = made(Sum().eval(), data())

    def run(bound=10**6, observe=True, path=tmp_path / "run.db"):
        calls = 0

        class Bounded(OutputShifts):
            def observe(self, *args):
                nonlocal calls
                calls += 1
                if calls > bound:
                    raise Killed
                super().observe(*args)

        store = SQLiteStore(path.with_suffix(".shifts"), {})
        with store, mps.Calibration(Sum().eval(), data(), mps.precisions("w2 w3 w16"), checkpoint=path) as calibration:
            shifts = Bounded(store)
            table = calibration.profile(KLDivergence(), observers=[shifts] if observe else [])
            return shifts.surrogate(3, calibration.precisions), table, calls

    with pytest.raises(Killed):
        run(bound=5)
    found, resumed, calls = run()
    assert 0 < calls < 12  # 3 layers, 2 options that change something, 2 batches
    np.testing.assert_array_equal(found.shifts, expected.shifts)
    np.testing.assert_array_equal(resumed.sensitivity, table.sensitivity)

    other = tmp_path / "other.db"
    assert run(observe=False, path=other)[0] is None
    found, resumed, calls = run(path=other)
    assert calls == 12
    np.testing.assert_array_equal(found.shifts, expected.shifts)
    np.testing.assert_array_equal(resumed.sensitivity, table.sensitivity)


def test_shifts_take_two_bytes_a_number_in_the_store_and_in_the_array():
    store = MemoryStore({})
    found, _ = made(Sum(classes=200).eval(), data(4, 8), store=store, classes=10)
    assert found.shifts.dtype == np.float16
    assert found.shifts.nbytes == 3 * 3 * 32 * 10 * 2
    cells = store.rows(ShiftKey).values()
    assert len(cells) == 4 * 3 * 2
    assert max(map(len, cells)) < 8 * 10 * 2 + 200


def test_shifts_of_full_width_that_an_earlier_version_stored_are_read():
    store, reference = MemoryStore({}), torch.log_softmax(torch.randn(3, 5).double(), -1)
    shift = torch.randn(3, 5).double()
    store.put(ShiftIndexKey(), ShiftIndex(["x"], False))
    store.put(ReferenceKey("x"), reference)
    store.put(ShiftKey("x", 0, "w2"), shift)
    found = surrogate(store, 1, mps.precisions("w2 w16"))
    expected = float(kl_divergence(reference, reference + shift).mean())
    assert found.damage(np.array([0])) == pytest.approx(expected, rel=2e-3)
    assert found.damage(np.array([1])) == pytest.approx(0, abs=1e-15)
    store.put(ShiftKey("x", 0, "w2"), shift[:2])
    with pytest.raises(mps.EstimatorError, match="do not fit each other"):
        surrogate(store, 1, mps.precisions("w2 w16"))
