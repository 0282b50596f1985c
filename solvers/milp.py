"""The rows in doubt as an integer program for HiGHS."""

import math

import numpy as np

from mpsearch.solvers.core import Core, Found
from mpsearch.solvers.feasibility import Floats, fits

_TRIES = 8
_NEAR = 1e-9  # of the ceiling: plans closer than that are not told apart


def search(
    core: Core,
    slack: Floats,
    multipliers: Floats,
    ceiling: float,
    usage: Floats,
    limits: Floats,
    *,
    time_limit_s: float,
    max_nodes: int,
) -> Found:
    """Best plan and bound by branch and cut; arguments as in `lists.search`.

    Resources are scaled to the slack and the ceiling to 1, gaps are 0. HiGHS takes limits to 1e-9 of their scale, so its plans are
    checked and, where one breaks a limit, the limit is drawn in and the program solved again; its bound stays that of the
    first program. Excesses closer than 1e-9 of the ceiling count as equal.
    """
    import highspy

    from mpsearch.solvers.highs import silent_highs

    row = np.concatenate([np.full(len(cost) - 1, i) for i, cost in enumerate(core.costs)])
    option = np.concatenate([np.arange(1, len(cost)) for cost in core.costs])
    cost = np.concatenate([cost[1:] for cost in core.costs])
    shift = np.concatenate([moved[1:] for moved in core.shifts])  # (N, R)
    count, resources = len(cost), len(slack)
    scale = np.maximum(np.abs(shift).max(axis=0, initial=0.0), np.finfo(float).tiny)
    paid = float(multipliers @ slack)
    unit = (
        ceiling if math.isfinite(ceiling) and ceiling > 0 else max(float(cost.max(initial=0.0)), np.finfo(float).tiny)
    )
    objective = (cost - shift @ multipliers) / unit * 1e3
    tight = slack.copy()
    proven, largest = -math.inf, 0
    for attempt in range(_TRIES):
        solver = silent_highs(
            mip_rel_gap=0.0,
            mip_abs_gap=0.0,
            mip_feasibility_tolerance=1e-9,
            primal_feasibility_tolerance=1e-9,
            dual_feasibility_tolerance=1e-9,
            time_limit=max(0.1, time_limit_s),
            mip_max_nodes=max_nodes,
        )
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = count, len(core.rows) + resources
        program.col_cost_ = objective
        program.col_lower_, program.col_upper_ = np.zeros(count), np.ones(count)
        program.integrality_ = [highspy.HighsVarType.kInteger] * count
        program.row_lower_ = np.full(program.num_row_, -highspy.kHighsInf)
        program.row_upper_ = np.append(np.ones(len(core.rows)), tight / scale)
        program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        stride = 1 + resources
        index = np.empty((count, stride), np.int32)
        entry = np.empty((count, stride))
        index[:, 0], entry[:, 0] = row, 1.0
        index[:, 1:], entry[:, 1:] = len(core.rows) + np.arange(resources), shift / scale
        program.a_matrix_.start_ = np.arange(0, count * stride + 1, stride, dtype=np.int32)
        program.a_matrix_.index_, program.a_matrix_.value_ = index.ravel(), entry.ravel()
        solver.passModel(program)
        solver.run()
        info = solver.getInfo()
        largest += max(0, int(info.mip_node_count))
        if attempt == 0 and math.isfinite(info.mip_dual_bound):
            proven = info.mip_dual_bound / 1e3 * unit + paid - _NEAR * unit
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            break
        chosen = np.flatnonzero(np.array(solver.getSolution().col_value) > 0.5)
        moves = [(int(row[i]), int(option[i])) for i in chosen]
        options = core.changed(moves)
        if len({r for r, _ in moves}) == len(moves) and fits(options, usage, limits):
            excess = float(cost[chosen].sum() + multipliers @ (slack - shift[chosen].sum(axis=0)))
            near = attempt == 0 and excess - proven <= 2 * _NEAR * unit
            return Found(options, excess if near else max(0.0, proven), largest)
        broken = np.maximum(shift[chosen].sum(axis=0) - tight, 0.0)
        tight = tight - np.maximum(broken, 1e-9 * scale) * (1 + 1e-6)
    return Found(None, max(0.0, proven), largest)
