"""Integer linear programming through PuLP: the textbook model, with everything that a float solver gets wrong undone."""

import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.errors import SolverError
from mpsearch.solvers.feasibility import Floats, Options, fits, least_usage, reachable, room, shifted, total
from mpsearch.solvers.pairs import pair_blocks

if TYPE_CHECKING:
    from mpsearch.core.table import Interactions

_OBJECTIVE = 1e6  # value that the best known plan has after scaling; the solvers resolve about 1e-6
_RESOLVED = 1e4  # below this value the plan is proven to less than 1e-9 relative: scale again
_ROW = 1e4  # largest right-hand side of a limit
_NARROW = 1e-9  # share of the largest use below which what is free is not scaled to `_ROW`
_TOLERANCE = 1e-9  # integrality and feasibility asked of the solver
_SLACK = 1e-5  # by how much a limit is relaxed in the model; exact arithmetic decides what lies between
_NOISE = 1e-10  # of the damage: rounding beyond that proves nothing
_ROUNDS = 200  # models solved before giving up on a proof


@dataclass(frozen=True)
class ILP:
    """Least damage within any number of budgets, as an integer linear program.

        minimise  sum_lp sensitivity[l, p] x[l, p]
        such that sum_p x[l, p] = 1,  sum_lp usage[r, l, p] x[l, p] <= limits[r],  x binary

    (HAWQ-V3, 2011.10680, section 3.4; every production tool since.) MILP solvers work to absolute tolerances
    near 1e-6, call a plan within them optimal, and lose single units of budgets of 1e12. Therefore: rows are
    shifted to start at 0; the objective is scaled so that the best plan costs 1e6, again after each better
    plan, and cells that cost more than twice that plan are cut to that; limits are relaxed by more than the
    tolerance, so that no plan is lost, and a plan that breaks one in exact arithmetic is cut off by the cover
    it proves, and the model solved again.

    Interactions are linearised over the local polytope: `y >= 0` for each pair of cells of two interacting
    rows, with `sum_q y[lp, kq] = x[l, p]` and `sum_p y[lp, kq] = x[k, q]`. Proven for small L, else a bound
    in the time given.

    Attributes:
        backend: `"highs"` (in process) or `"cbc"` (the program that PuLP brings along; gives no bound of its own).
        time_limit_s: seconds for all models together.

    Raises:
        SolverError: unknown backend.

    >>> choice = ILP().choose(np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> choice.options.tolist(), str(choice.status), choice.bound
    ([1, 0], 'optimal', 3.0)
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities(exact=True, interactions=True)

    backend: Literal["highs", "cbc"] = "highs"
    time_limit_s: float = 60.0

    def __post_init__(self) -> None:
        if self.backend not in ("highs", "cbc"):
            raise SolverError(f"backend {self.backend!r} is unknown to ILP, expected 'highs' or 'cbc'")

    def choose(
        self,
        sensitivity: Floats,
        usage: Floats,
        limits: Floats,
        interactions: "Interactions | None" = None,
    ) -> Choice:
        """See `Solver.choose`; `interactions` are added to the objective."""
        deadline = time.perf_counter() + self.time_limit_s
        usage, limits = shifted(sensitivity, usage, limits)
        allowed = reachable(sensitivity, usage, limits)
        if not allowed.any(axis=1).all():
            return Choice(None, Status.INFEASIBLE, math.inf)
        model = _Model(sensitivity, usage, limits, allowed, interactions)
        scale = _OBJECTIVE / model.largest_cost if model.largest_cost else 1.0
        best: Options | None = None
        best_cost, bound, proven, rounds, cuts = math.inf, 0.0, False, 0, 0
        while not proven and rounds < _ROUNDS and time.perf_counter() < deadline:
            rounds += 1
            model.set_objective(scale, cap=2 * best_cost)
            options, outcome, dual = model.solve(self.backend, deadline - time.perf_counter())
            bound = max(bound, (dual * (1 - 1e-9) - 1e-6) / scale)
            if outcome is Status.INFEASIBLE:
                if best is None:
                    return Choice(None, Status.INFEASIBLE, math.inf, stats={"rounds": rounds, "cuts": cuts})
                break  # contradicts the plan at hand: keep it, claim nothing
            if options is None:
                break
            if not fits(options, usage, limits):
                cuts += model.cut_off(options)
                continue
            cost = model.cost(options)
            if cost < best_cost:
                best, best_cost = options, cost
            if outcome is Status.FEASIBLE:
                break
            proven = best_cost == 0 or best_cost * scale >= _RESOLVED
            scale = _OBJECTIVE / best_cost if best_cost else scale
        stats = {"rounds": rounds, "cuts": cuts}
        outward = model.offset + bound - 1e-14 * (abs(model.offset) + bound + model.magnitude)
        if best is None:
            return Choice(None, Status.UNSOLVED, outward, stats=stats)
        value = model.value(best)
        if proven and model.sharp(best):
            return Choice(best, Status.OPTIMAL, value, stats=stats)
        return Choice(best, Status.FEASIBLE, min(outward, value), stats=stats)


class _Model:
    """The PuLP problem of one table, its costs shifted to be >= 0 with a zero in each row and each pair of rows."""

    def __init__(
        self,
        sensitivity: Floats,
        usage: Floats,
        limits: Floats,
        allowed: "np.ndarray[Any, np.dtype[np.bool_]]",
        interactions: "Interactions | None",
    ) -> None:
        import pulp

        self.pulp = pulp
        self.sensitivity, self.usage, self.limits, self.interactions = (
            sensitivity,
            usage,
            limits,
            interactions,
        )
        self.allowed = allowed
        self.least = least_usage(allowed, usage)
        self.problem = pulp.LpProblem("bits", pulp.LpMinimize)
        binary = {"lowBound": 0, "upBound": 1, "cat": pulp.LpBinary}
        self.cells = {
            (row, column): self.problem.add_variable(f"x_{row}_{column}", **binary)
            for row, column in np.argwhere(allowed).tolist()
        }
        lowest = np.where(allowed, sensitivity, np.inf).min(axis=1)
        self.cell_costs = {cell: float(sensitivity[cell] - lowest[cell[0]]) for cell in self.cells}
        for row in range(len(sensitivity)):
            self._add([(self.cells[row, p], 1.0) for p in np.flatnonzero(allowed[row]).tolist()], "==", 1.0)
        for use, least, limit in zip(usage, self.least, limits, strict=True):
            self._add_limit(use - least[:, None], limit, least)
        self.pairs: dict[tuple[int, int, int, int], Any] = {}
        self.pair_costs: dict[tuple[int, int, int, int], float] = {}
        shifts = [*lowest.tolist(), *self._add_pairs(interactions)]
        self.offset = math.fsum(shifts)
        self.magnitude = math.fsum(abs(shift) for shift in shifts)
        self.largest_cost = max([*self.cell_costs.values(), *self.pair_costs.values()])

    def _add(self, terms: list[tuple[Any, float]], sense: str, right: float) -> None:
        kind = {"==": self.pulp.LpConstraintEQ, "<=": self.pulp.LpConstraintLE}[sense]
        expression = self.pulp.LpAffineExpression(terms)
        self.problem.addConstraint(self.pulp.LpConstraint(expression, sense=kind, rhs=right))

    def _add_limit(self, extra: Floats, limit: float, least: Floats) -> None:
        """One budget over what each cell uses beyond the least of its row, relaxed by more than the tolerances."""
        slack = room(least, limit)
        used = extra[self.allowed]
        if used.max(initial=0.0) == 0 or math.isinf(slack):
            return
        whole = slack < 2**53 and bool((used == np.floor(used)).all())
        unit = float(np.gcd.reduce(used.astype(np.int64))) if whole else 0.0
        # beyond that range of numbers a float solver refuses the row
        scale = min(_ROW / max(slack, _NARROW * float(used.max())), 1 / unit if whole else math.inf)
        right = (math.floor(slack / unit) * unit if whole else slack) * scale
        relaxed = right + max(_SLACK, 0.5 * unit * scale)
        self._add([(x, float(extra[cell]) * scale) for cell, x in self.cells.items() if extra[cell]], "<=", relaxed)

    def _add_pairs(self, interactions: "Interactions | None") -> list[float]:
        """Local polytope of each pair of rows that interact; returns what was subtracted from each block."""
        shifts = []
        for (i, k), block in pair_blocks(interactions, self.sensitivity.shape[1]).items():
            here, there = (np.flatnonzero(self.allowed[row]).tolist() for row in (i, k))
            shift = float(block[np.ix_(here, there)].min())
            shifts.append(shift)
            y = {(p, q): self.problem.add_variable(f"y_{i}_{p}_{k}_{q}", 0, 1) for p in here for q in there}
            for p in here:
                self._add([*((y[p, q], 1.0) for q in there), (self.cells[i, p], -1.0)], "==", 0.0)
            for q in there:
                self._add([*((y[p, q], 1.0) for p in here), (self.cells[k, q], -1.0)], "==", 0.0)
            for (p, q), variable in y.items():
                self.pairs[i, p, k, q] = variable
                self.pair_costs[i, p, k, q] = float(block[p, q]) - shift
        return shifts

    def set_objective(self, scale: float, cap: float) -> None:
        terms = [(x, min(self.cell_costs[cell], cap) * scale) for cell, x in self.cells.items()]
        terms += [(y, min(self.pair_costs[pair], cap) * scale) for pair, y in self.pairs.items()]
        self.problem.objective = self.pulp.LpAffineExpression(terms)

    def solve(self, backend: str, seconds: float) -> tuple[Options | None, Status, float]:
        """Options of the solver's plan, how it ended, and its dual bound (0 where it tells none)."""
        pulp, problem = self.pulp, self.problem
        if backend == "highs":
            from mpsearch.solvers.pulp_highs import SilentHiGHS

            solver = SilentHiGHS(
                mip_rel_gap=0.0,
                mip_abs_gap=0.0,
                time_limit=seconds,
                random_seed=0,
                mip_feasibility_tolerance=_TOLERANCE,
                primal_feasibility_tolerance=_TOLERANCE,
            )
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # it leaves in PuLP 4, which is not allowed here
                solver = pulp.PULP_CBC_CMD(  # no `threads=1`: CBC 2.10.3 then sleeps 10 s now and then
                    msg=False,
                    gapRel=0.0,
                    gapAbs=0.0,
                    timeLimit=seconds,
                    options=[f"integerTolerance {_TOLERANCE}", f"primalTolerance {_TOLERANCE}"],
                )
        problem.solve(solver)
        dual = problem.solverModel.getInfo().mip_dual_bound if backend == "highs" else 0.0
        dual = dual if math.isfinite(dual) else 0.0
        # `status` is "Optimal" for a plan found before the time limit, too: only `sol_status` tells
        if problem.status == pulp.LpStatusInfeasible:
            return None, Status.INFEASIBLE, 0.0
        if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None, Status.UNSOLVED, dual
        weights = np.full(self.sensitivity.shape, -1.0)
        for cell, x in self.cells.items():
            weights[cell] = x.value()
        proven = problem.sol_status == pulp.LpSolutionOptimal
        return weights.argmax(axis=1), Status.OPTIMAL if proven else Status.FEASIBLE, dual

    def cost(self, options: Options) -> float:
        """Shifted objective, free of the rounding that large row constants bring."""
        chosen = options.tolist()
        cells = [self.cell_costs[cell] for cell in enumerate(chosen)]
        pairs = [cost for (i, p, k, q), cost in self.pair_costs.items() if chosen[i] == p and chosen[k] == q]
        return math.fsum(cells + pairs)

    def sharp(self, options: Options) -> bool:
        """False where the shifted costs of plans like this one drown in the rounding of the shifts, which then prove nothing."""
        sizes = [abs(self.sensitivity[cell]) for cell in enumerate(options.tolist())]
        if self.interactions is not None:
            sizes += np.abs(self.interactions.chosen(options)).tolist()
        return bool(4 * np.finfo(float).eps * self.magnitude <= _NOISE * math.fsum(sizes))

    def value(self, options: Options) -> float:
        extra = self.interactions.total(options) if self.interactions is not None else 0.0
        return total(self.sensitivity, options) + extra

    def cut_off(self, options: Options) -> int:
        """Forbid `options` and every choice that breaks a limit for the same reason; returns the cuts added.

        Where rows of a set C alone, all others at their least, exceed a limit, no choice may use as much in
        all of C.
        """
        cuts = 0
        rows = np.arange(len(options))
        for use, least, limit in zip(self.usage, self.least, self.limits, strict=True):
            chosen = use[rows, options]
            if math.fsum(chosen.tolist()) <= limit:
                continue
            order = np.argsort(chosen - least, kind="stable")
            enough, dropped = 0, len(rows)  # bisect how many rows at their least still leave the limit broken
            while dropped - enough > 1:
                middle = (enough + dropped) // 2
                relaxed = chosen.copy()
                relaxed[order[:middle]] = least[order[:middle]]
                enough, dropped = (middle, dropped) if math.fsum(relaxed.tolist()) > limit else (enough, middle)
            cover = order[enough:]
            terms = [
                (self.cells[row, p], 1.0)
                for row in cover.tolist()
                for p in np.flatnonzero(self.allowed[row] & (use[row] >= chosen[row])).tolist()
            ]
            self._add(terms, "<=", len(cover) - 1.0)
            cuts += 1
        return cuts
