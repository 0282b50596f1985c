"""Solvers: each chooses one option in each row of a table so that the damage is least within the limits.

A solver is one file with one class of frozen settings, one method, `choose` (`mpsearch.core.solution.Solver`), and `capabilities`, which
declare what it can do beyond the plain contract. To add one, write the file and name it in `SOLVERS`: `mpsearch.testing.solver_checks` runs
over everything that stands there. What a solver needs beyond numpy is imported when it runs.
"""

from mpsearch.core.solution import DeclaredSolver
from mpsearch.solvers.annealing import Annealing as Annealing
from mpsearch.solvers.bisection import Bisection as Bisection
from mpsearch.solvers.brute_force import BruteForce as BruteForce
from mpsearch.solvers.dynamic_programming import DynamicProgramming as DynamicProgramming
from mpsearch.solvers.evolutionary import Evolutionary as Evolutionary
from mpsearch.solvers.exact import Exact as Exact
from mpsearch.solvers.greedy import Greedy as Greedy
from mpsearch.solvers.ilp import ILP as ILP

SOLVERS: dict[str, type[DeclaredSolver]] = {
    "exact": Exact,
    "ilp": ILP,
    "greedy": Greedy,
    "dynamic-programming": DynamicProgramming,
    "annealing": Annealing,
    "evolutionary": Evolutionary,
    "bisection": Bisection,
    "brute-force": BruteForce,
}
