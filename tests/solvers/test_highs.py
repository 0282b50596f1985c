"""Standard output belongs to the caller: HiGHS writes nothing to it, whichever solver makes its first object."""

import json
import subprocess
import sys

import pytest

TABLE = "layer,precision,sensitivity,memory_bytes,latency_s\n" + "".join(
    f"l{i},w{bits},{(i * 37 % 101 + 1) * 4.0**-bits},{(i % 7 + 1) * 1000 * bits},{(i % 5 + 1) * (9 - bits) + i % 3}\n"
    for i in range(12)
    for bits in (2, 3, 4, 8)
)

FIRST_OBJECT = {
    "highs": "from mpsearch.solvers.highs import silent_highs; h = silent_highs(); h.addVar(0.0, 1.0); h.run()",
    "exact": "from mpsearch.solvers import Exact, exact, milp; exact._FEW, search, calls = 1, milp.search, []; "
    "milp.search = lambda *a, **k: calls.append(1) or search(*a, **k); Exact().choose(cost, usage, limits); assert calls",
    "prices": "from mpsearch.solvers.prices import best_prices; best_prices(cost, usage, limits)",
    "ilp": "from mpsearch.solvers import ILP; assert ILP().choose(cost, usage, limits).options is not None",
}
ARRAYS = """
import sys, numpy as np
g = np.random.default_rng(0)
cost, usage = g.random((20, 4)), g.integers(1, 50, (3, 20, 4)).astype(float)
limits = np.floor(0.9 * usage.mean(axis=2).sum(axis=1))
"""


@pytest.mark.parametrize("first", FIRST_OBJECT)
def test_nothing_is_printed(first):
    run = subprocess.run(
        [sys.executable, "-c", f"{ARRAYS}{FIRST_OBJECT[first]}\nassert 'highspy' in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("solver", ["exact", "ilp"])
def test_json_of_two_budgets_is_json(tmp_path, solver):
    (tmp_path / "table.csv").write_text(TABLE)
    budgets = ["--budget", "memory_bytes=50%", "--budget", "latency_s=60%"]
    command = ["solve", "table.csv", *budgets, "--solver", solver, "-o", "plan.json", "--json"]
    run = subprocess.run(
        [sys.executable, "-m", "mpsearch", *command], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert json.loads(run.stdout)["status"] == "optimal"
