"""Numbers of very different size: what is called optimal is, what is called impossible is, by enumeration with correctly rounded sums."""

import itertools
import math

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.core.table import Interactions
from mpsearch.solvers import ILP, Annealing, Bisection, DynamicProgramming, Exact, Greedy
from mpsearch.solvers.feasibility import shifted

SOLVERS = [Exact(), ILP(time_limit_s=5), DynamicProgramming(), Greedy(), Bisection(), Annealing(sweeps=2, chains=4)]


def instance(kind, seed):
    generator = np.random.default_rng(seed)
    rows, columns = int(generator.integers(1, 5)), int(generator.integers(2, 4))
    damage = generator.random((rows, columns))
    use = generator.integers(1, 9, (int(generator.integers(1, 3)), rows, columns)).astype(float)
    pairs = None
    if kind == "use of 24 orders":
        use *= 10.0 ** generator.integers(-12, 12, use.shape)
    elif kind == "below half an ulp of the limit":
        use[:, :1] += 1e16
        use /= 2
    elif kind == "damage of 32 orders":
        damage *= 10.0 ** generator.integers(-12, 20, damage.shape)
    elif kind == "1e20 between interactions" and rows > 1:
        cells = itertools.product(range(rows), range(columns))
        every = [(a, b) for a, b in itertools.combinations(cells, 2) if a[0] != b[0] and generator.random() < 0.5]
        if every:
            value = generator.normal(size=len(every)) * 10.0 ** generator.integers(-1, 21, len(every))
            pairs = Interactions(np.array([a for a, _ in every]), np.array([b for _, b in every]), value)
    chosen = generator.integers(0, columns, rows)
    limits = np.array([math.fsum(u[np.arange(rows), chosen]) for u in use])
    return damage, use, np.nextafter(limits, -np.inf) if seed % 3 == 0 else limits, pairs


def value(damage, pairs, options):
    extra = [] if pairs is None else pairs.chosen(options)
    return math.fsum([*damage[np.arange(len(options)), options], *extra])


def within(use, limits, options):
    return all(math.fsum(u[np.arange(len(options)), options]) <= b for u, b in zip(use, limits, strict=True))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize(
    "kind",
    ["use of 24 orders", "below half an ulp of the limit", "damage of 32 orders", "1e20 between interactions"],
)
def test_nothing_wrong_is_claimed(solver, kind):
    if kind.endswith("interactions") and not isinstance(solver, ILP | Annealing):
        return
    for seed in range(12):
        damage, use, limits, pairs = instance(kind, seed)
        more = {} if pairs is None else {"interactions": pairs}
        choice = solver.choose(damage, use, limits, **more)
        every = itertools.product(range(damage.shape[1]), repeat=len(damage))
        fitting = [np.array(o) for o in every if within(use, limits, np.array(o))]
        if choice.options is None:
            assert choice.status is not Status.INFEASIBLE or not fitting
            continue
        assert within(use, limits, choice.options)
        least = min(value(damage, pairs, o) for o in fitting)
        tolerance = 1e-9 * abs(least)
        assert choice.bound <= least + tolerance
        if choice.status is Status.OPTIMAL:
            assert value(damage, pairs, choice.options) <= least + tolerance


@pytest.mark.parametrize(
    ("solver", "kind", "seed"),
    [("ilp", 1, 1411), ("ilp", 1, 1747), ("ilp", 2, 20), ("exact", 2, 110), ("greedy", 2, 146)],
)
def test_tables_that_were_solved_wrongly(solver, kind, seed):
    generator = np.random.default_rng(seed)
    rows, columns = int(generator.integers(1, 5)), int(generator.integers(2, 4))
    damage = generator.random((rows, columns))
    use = generator.integers(1, 9, (int(generator.integers(1, 3)), rows, columns)).astype(float)
    if kind == 1:
        use *= 10.0 ** generator.integers(-12, 12, use.shape)
    else:
        use[:, :1] += 1e16
        use /= 2
    chosen = np.array([generator.integers(0, columns) for _ in range(rows)])
    limits = np.array([math.fsum(u[np.arange(rows), chosen]) for u in use])
    if generator.random() < 0.3:
        limits = np.nextafter(limits, -np.inf)
    choice = {"ilp": ILP(), "exact": Exact(), "greedy": Greedy()}[solver].choose(damage, use, limits)  # type: ignore[attr-defined]
    every = (np.array(o) for o in itertools.product(range(columns), repeat=rows))
    fitting = [value(damage, None, o) for o in every if within(use, limits, o)]
    if choice.status is Status.OPTIMAL:
        assert value(damage, None, choice.options) == pytest.approx(min(fitting), rel=1e-9)
    assert choice.options is None or choice.bound <= min(fitting) * (1 + 1e-9)


def test_large_least_uses_are_taken_out_without_rounding():
    generator = np.random.default_rng(0)
    for _ in range(50):
        use = 1e15 + generator.integers(0, 64, (1, 4, 3)) / 8
        chosen = generator.integers(0, 3, 4)
        limit = np.array([math.fsum(use[0, np.arange(4), chosen])])
        moved, free = shifted(np.zeros((4, 3)), use, limit)
        assert moved.max() < 64
        for options in map(np.array, itertools.product(range(3), repeat=4)):
            assert within(use, limit, options) == within(moved, free, options)
