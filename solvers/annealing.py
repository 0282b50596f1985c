"""Simulated annealing for tables with pairwise interactions."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.solvers.feasibility import Floats, Options, fits, reachable, shifted, total
from mpsearch.solvers.lagrangian import dual
from mpsearch.solvers.pairs import pair_blocks

if TYPE_CHECKING:
    from mpsearch.core.table import Interactions

_COLDEST = 1e-3  # last temperature, in units of the first
_UPHILL = 0.3  # first temperature, in units of the typical range of a row


@dataclass(frozen=True)
class Annealing:
    """Simulated annealing on the energy `sum_l sensitivity[l, x_l] + sum_pairs interaction` within the limits.

    Kirkpatrick, Gelatt and Vecchi, Science 220 (1983) 671-680. One move draws two rows and redraws their
    options jointly from the Boltzmann distribution over the combinations that keep the limits (or break them
    least), so that a tight budget is kept by paying in one row for the other. Many chains run side by side
    and meet the same rows; their energies are changed by the rows' own terms alone. They start at the plans
    of the separable Lagrangian relaxation and at random ones, cool geometrically, and the best plan that any
    of them met is returned.

    The bound is the separable one plus the least value of each pair of rows: valid, and loose where
    interactions are strong (use `ILP` for a better one up to some 50 rows).

    Attributes:
        seed: of the moves; the same seed gives the same plan.
        sweeps: moves of each chain, in units of L.
        chains: chains side by side.

    >>> from mpsearch.core.table import Interactions
    >>> table, use = np.array([[2.0, 1.0], [2.0, 1.0]]), np.ones((1, 2, 2))
    >>> together = Interactions([[0, 0]], [[1, 0]], [-3.0])  # both at option 0: 2 + 2 - 3
    >>> choice = Annealing(sweeps=5).choose(table, use, np.array([2.0]), interactions=together)
    >>> choice.options.tolist(), choice.bound
    ([0, 0], -1.0)
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities(interactions=True)

    seed: int = 0
    sweeps: int = 300
    chains: int = 64

    def choose(
        self,
        sensitivity: Floats,
        usage: Floats,
        limits: Floats,
        interactions: "Interactions | None" = None,
    ) -> Choice:
        """See `Solver.choose`; `interactions` are added to the objective."""
        usage, limits = shifted(sensitivity, usage, limits)
        allowed = reachable(sensitivity, usage, limits)
        if not allowed.any(axis=1).all():
            return Choice(None, Status.INFEASIBLE, math.inf)
        relaxed = dual(sensitivity, usage, limits, allowed)
        if relaxed.bound == math.inf:
            return Choice(None, Status.INFEASIBLE, math.inf)
        blocks = pair_blocks(interactions, sensitivity.shape[1])
        rng = np.random.default_rng(self.seed)
        chains = _Chains(sensitivity, usage, limits, allowed, blocks, self._starts(relaxed.plans, allowed, rng))
        moves = self.sweeps * len(sensitivity)
        for move in range(moves):
            chains.move(_UPHILL * _COLDEST ** (move / moves), rng)
            if move % len(sensitivity) == 0:
                chains.refresh()
        multipliers = relaxed.multipliers if interactions is None else None
        bound = relaxed.bound + math.fsum(_least(block, allowed, i, k) for (i, k), block in blocks.items())
        best = int(chains.best_energy.argmin())
        stats = {"moves": moves * self.chains}
        if chains.best_energy[best] == math.inf:
            return Choice(None, Status.UNSOLVED, bound, multipliers, stats)
        options = chains.best[best]
        value = total(sensitivity, options) + (interactions.total(options) if interactions is not None else 0.0)
        status = Status.OPTIMAL if value <= bound else Status.FEASIBLE
        return Choice(options, status, min(value, bound), multipliers, stats)

    def _starts(self, plans: list[Options], allowed: NDArray[np.bool_], rng: np.random.Generator) -> Options:
        """(B, L): the last plans of the relaxation for three chains in four, random ones for the others."""
        drawn: Options = np.where(allowed, rng.random((self.chains, *allowed.shape)), -1.0).argmax(axis=2)
        for chain in range(self.chains):
            if chain % 4:
                drawn[chain] = plans[-1 - chain % min(8, len(plans))]
        return drawn


def _least(block: Floats, allowed: NDArray[np.bool_], i: int, k: int) -> float:
    return float(block[np.ix_(allowed[i], allowed[k])].min())


class _Chains:
    """B plans of one table, what they use, what they cost, and the best that each has met."""

    def __init__(
        self,
        sensitivity: Floats,
        usage: Floats,
        limits: Floats,
        allowed: NDArray[np.bool_],
        blocks: dict[tuple[int, int], Floats],
        options: Options,
    ) -> None:
        rows, columns = sensitivity.shape
        if rows == 1:  # a second row that changes nothing, since moves take two
            sensitivity, usage = (
                np.vstack([sensitivity, np.zeros(columns)]),
                np.pad(usage, ((0, 0), (0, 1), (0, 0))),
            )
            allowed = np.vstack([allowed, np.arange(columns) == 0])
            options = np.pad(options, ((0, 0), (0, 1)))
        self.damage = np.where(allowed, sensitivity, np.inf)
        self.use = np.ascontiguousarray(np.where(allowed, usage, 0.0).transpose(1, 2, 0))  # (L, P, R)
        rounding = len(allowed) * np.finfo(float).eps * np.abs(self.use).max(axis=1).sum(axis=0)
        whole = (self.use == np.floor(self.use)).all(axis=(0, 1))
        self.limits = np.where(whole, np.floor(limits), limits + rounding)
        self.exact_usage, self.exact_limits = usage, limits  # decide on what lies between
        self.unit = np.maximum(np.ptp(self.use, axis=1).max(axis=0), np.finfo(float).tiny)
        self.blocks = blocks
        self.neighbours, self.pair_values = _neighbours(blocks, *allowed.shape)
        self.options = options
        self.real_rows = rows
        ranges = np.array([np.ptp(self.damage[row, allowed[row]]) for row in range(len(allowed))])
        for (i, k), block in blocks.items():
            ranges[[i, k]] += np.ptp(block) / 2
        self.typical_range = float(np.median(ranges[ranges > 0])) if ranges.any() else 1.0
        self.best = options[:, :rows].copy()
        self.best_energy = np.full(len(options), np.inf)
        self.refresh()

    def refresh(self) -> None:
        """Sum use and energy anew, so that rounding does not add up."""
        rows = np.arange(self.options.shape[1])
        self.used = self.use[rows, self.options].sum(axis=1)  # (B, R)
        self.energy = self.damage[rows, self.options].sum(axis=1)
        for (i, k), block in self.blocks.items():
            self.energy += block[self.options[:, i], self.options[:, k]]
        self._remember()

    def _remember(self) -> None:
        better = (self.energy < self.best_energy) & (self.used <= self.limits).all(axis=1)
        for chain in np.flatnonzero(better):
            if fits(self.options[chain], self.exact_usage, self.exact_limits):
                self.best[chain] = self.options[chain, : self.real_rows]
                self.best_energy[chain] = self.energy[chain]

    def field(self, row: int) -> Floats:
        """(B, P): what each option of a row would cost, all other rows as they are."""
        near = self.neighbours[row]
        if not len(near):
            return np.broadcast_to(self.damage[row], (len(self.options), self.damage.shape[1]))
        flat = self.options[:, near] + np.arange(len(near)) * self.damage.shape[1]
        added: Floats = self.damage[row] + self.pair_values[row].take(flat, axis=0).sum(axis=1)
        return added

    def move(self, heat: float, rng: np.random.Generator) -> None:
        """Redraw two rows of every chain; `heat` is the temperature in units of a row's range, of damage and of use."""
        i, k = sorted(rng.choice(self.options.shape[1], 2, replace=False).tolist())
        chains, columns = np.arange(len(self.options)), self.damage.shape[1]
        here, there = self.options[:, i], self.options[:, k]
        pair = self.field(i)[:, :, None] + self.field(k)[:, None, :]  # (B, P, P)
        if (i, k) in self.blocks:
            block = self.blocks[i, k]
            pair += block - block[:, there].T[:, :, None] - block[here][:, None, :]
        used = self.used - self.use[i, here] - self.use[k, there]
        after = used[:, None, None] + (self.use[i][:, None] + self.use[k])  # (B, P, P, R)
        excess = (np.maximum(after - self.limits, 0.0) / self.unit).sum(axis=3).reshape(len(chains), -1)
        possible = np.isfinite(self.damage[i][:, None] + self.damage[k]).ravel()
        excess[:, ~possible] = np.inf
        pair = pair.reshape(len(chains), -1)
        now = pair[chains, here * columns + there]
        inside = excess.min(axis=1, keepdims=True) == 0
        energy = np.where(inside, pair / self.typical_range, 0.0) + np.where(inside & (excess > 0), np.inf, excess)
        drawn = (rng.gumbel(size=pair.shape) - energy / heat).argmax(axis=1)  # a Boltzmann draw
        self.options[:, i], self.options[:, k] = np.divmod(drawn, columns)
        self.used = after.reshape(len(chains), columns * columns, -1)[chains, drawn]
        self.energy += pair[chains, drawn] - now
        self._remember()


def _neighbours(
    blocks: dict[tuple[int, int], Floats], rows: int, columns: int
) -> tuple[list[NDArray[np.int64]], list[Floats]]:
    """For each row, the rows it interacts with, and (neighbours x P, P) the values by neighbour's and own option."""
    near: list[list[int]] = [[] for _ in range(rows)]
    values: list[list[Floats]] = [[] for _ in range(rows)]
    for (i, k), block in blocks.items():
        near[i].append(k)
        values[i].append(block.T)
        near[k].append(i)
        values[k].append(block)
    return [np.array(n, np.int64) for n in near], [np.concatenate(v) if v else np.empty((0, columns)) for v in values]
