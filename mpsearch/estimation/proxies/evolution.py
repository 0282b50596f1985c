"""Evolution of expressions, for `evolve_proxy`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from mpsearch.core.settings import checked_number
from mpsearch.errors import EstimatorError, nearest
from mpsearch.estimation.proxies.tree import BINARY, INPUTS, UNARY, Tree

#: How often each name is drawn, against the others of its kind; 1 where nothing is said. EMQ's operation-sampling priors in
#: the proportions of its sibling code, with the product first: it is what scales one statistic by another.
PRIORS: Mapping[str, float] = {"*": 0.6, "+": 0.3, "-": 0.05, "@": 0.05}

#: Chance that a place for a unary operation stays empty, that a new tree has two branches, and that two parents are crossed.
_EMPTY, _BRANCHED, _CROSSED = 0.3, 0.6, 0.5
_PLACES = 2  # for unary operations above each input of a new tree, as in EMQ
_TOURNAMENT = 3
_TRIALS = 50  # at a tree that was not judged before


@dataclass(frozen=True)
class Candidate:
    """A tree that passed the screening.

    Attributes:
        tree: the expression.
        fitness: larger is better.
        scores: what the tree gives every layer, up to a factor: trees with equal scores are one proxy.
    """

    tree: Tree
    fitness: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ProxyEvolution:
    """Genetic programming as in EMQ (2307.10554, section 3): operation-sampling priors, screening, diversity-prompting selection.

    New trees are EMQ's: one input under unary operations, or two such branches under a binary one. A child is bred from
    winners of tournaments by exchange of branches, then changed in one place: an operation or input drawn anew, put in, taken
    out, or a branch replaced. Trees that came before, and trees with the scores of a smaller one, are dropped. Diversity-prompting
    selection: where a child fails the screening or is no better than its parent, a new tree is judged beside it, and a
    quarter of the next generation is kept for the best of these. Three of EMQ's structures become one: a sequence and
    a tree are trees, and a graph is a tree with a branch that occurs twice.

    Attributes:
        generations: after the first, which is of new trees.
        population: trees kept, and children a generation.
        priors: name of an input or operation -> how often it is drawn, against others of its kind, over `PRIORS`; 0: never.
        most_nodes: largest tree.
        seed: the same seed, the same trees.

    >>> def judge(tree):    # wanted: a tree that says gradient often
    ...     return Candidate(tree, str(tree).count("gradient"), tuple(map(float, str(tree).encode())))
    >>> evolution = ProxyEvolution(generations=20, population=20, most_nodes=5)
    >>> str(evolution.search(judge)[0].tree).count("gradient")
    3
    """

    generations: int = 30
    population: int = 40
    priors: Mapping[str, float] = field(default_factory=dict)
    most_nodes: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        checked_number(self.seed, "seed", int, 0, EstimatorError)
        for name, least in (("generations", 0), ("population", 4), ("most_nodes", 1)):
            if getattr(self, name) < least:
                raise EstimatorError(f"{name}={getattr(self, name)}: expected {least} or more")
        known = (*INPUTS, *UNARY, *BINARY)
        for name, weight in self.priors.items():
            if name not in known:
                raise EstimatorError(f"a prior for {name!r}, which is no input or operation{nearest(name, known)}")
            if not 0 <= weight < float("inf"):
                raise EstimatorError(f"the prior of {name!r} is {weight}, expected a finite number of 0 or more")
        for kind, names in (("input", INPUTS), ("unary operation", UNARY), ("binary operation", BINARY)):
            if not any(self.prior(name) for name in names):
                raise EstimatorError(f"the prior of every {kind} is 0, expected one above")

    def prior(self, name: str) -> float:
        """How often a name is drawn, against others of its kind."""
        return self.priors.get(name, PRIORS.get(name, 1.0))

    def search(
        self, judge: Callable[[Tree], Candidate | None], advance: Callable[[], object] = lambda: None
    ) -> list[Candidate]:
        """Evolve.

        Args:
            judge: returns None for a tree that fails the screening; asked once for each tree.
            advance: called once for each of the (generations + 1) x population children.

        Returns:
            The last population, best first; empty where no tree passed.
        """
        breeder, scored = _Breeder(self), set[Tree]()

        def judged(propose: Callable[[], Tree]) -> Candidate | None:
            """The first of some trees that is small enough and new, if it passes."""
            for _ in range(_TRIALS):
                tree = propose().sorted()
                if len(tree) <= self.most_nodes and tree not in scored:
                    scored.add(tree)
                    return judge(tree)
            return None

        alive: list[Candidate] = []
        guests = self.population // 4
        for _ in range(self.generations + 1):
            parents, children, newcomers = alive, list[Candidate](), list[Candidate]()
            for _ in range(self.population):
                parent = breeder.winner(parents)
                child = judged(partial(breeder.child, parent, parents)) if parent else None
                if child:
                    children.append(child)
                if not child or not parent or child.fitness <= parent.fitness:
                    newcomer = judged(breeder.tree)
                    if newcomer:
                        newcomers.append(newcomer)
                advance()
            best = _distinct([*parents, *children, *newcomers])
            survivors = best[: self.population - guests]
            alive = [*survivors, *(candidate for candidate in best[len(survivors) :] if candidate in newcomers)][
                : self.population
            ]
        return alive


class _Breeder:
    """Draws new trees, and children of trees, from the priors and chances of a search."""

    def __init__(self, settings: ProxyEvolution) -> None:
        self._random = np.random.default_rng(settings.seed)
        self._chances = {}
        for kind in (INPUTS, tuple(UNARY), tuple(BINARY)):
            weights = np.array([settings.prior(name) for name in kind])
            self._chances[kind] = weights / weights.sum()

    def winner(self, alive: Sequence[Candidate]) -> Candidate | None:
        """The best of a few; None where nobody is."""
        drawn = [alive[place] for place in self._random.integers(len(alive), size=_TOURNAMENT)] if alive else []
        return min(drawn, key=_order, default=None)

    def tree(self) -> Tree:
        """A new one: one branch, or two."""
        if self._random.random() < _BRANCHED:
            return self._above(Tree(self._name(BINARY), (self._branch(), self._branch())), 1)
        return self._branch()

    def child(self, parent: Candidate, others: Sequence[Candidate]) -> Tree:
        """A parent, crossed or not with another winner, and changed in one place."""
        tree = parent.tree
        if self._random.random() < _CROSSED:
            donor = self.winner(others)
            assert donor is not None
            tree = tree.with_node(self._place(tree), self._node(donor.tree))
        return self._changed(tree)

    def _changed(self, tree: Tree) -> Tree:
        place = self._place(tree)
        node = list(tree.nodes())[place]
        change = self._random.integers(5)
        if change == 0:  # another operation or input
            kind = INPUTS if not node.parts else UNARY if len(node.parts) == 1 else BINARY
            other = Tree(self._name(kind), node.parts)
        elif change == 1:  # put in, with one operand
            other = Tree(self._name(UNARY), (node,))
        elif change == 2:  # put in, with two
            other = Tree(self._name(BINARY), (node, self._branch()))
        elif change == 3 and node.parts:  # taken out
            other = node.parts[self._random.integers(len(node.parts))]
        else:
            other = self._branch()
        return tree.with_node(place, other)

    def _branch(self) -> Tree:
        return self._above(Tree(self._name(INPUTS)), _PLACES)

    def _above(self, tree: Tree, places: int) -> Tree:
        for _ in range(places):
            if self._random.random() >= _EMPTY:
                tree = Tree(self._name(UNARY), (tree,))
        return tree

    def _name(self, kind: Iterable[str]) -> str:
        names = tuple(kind)
        return names[self._random.choice(len(names), p=self._chances[names])]

    def _place(self, tree: Tree) -> int:
        return int(self._random.integers(len(tree)))

    def _node(self, tree: Tree) -> Tree:
        return list(tree.nodes())[self._place(tree)]


def _order(candidate: Candidate) -> tuple[float, int, str]:
    """Best first; of equals the smaller tree."""
    return -candidate.fitness, len(candidate.tree), str(candidate.tree)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first, without trees that score as a better or smaller one does."""
    by_scores: dict[tuple[float, ...], Candidate] = {}
    for candidate in sorted(candidates, key=_order):
        by_scores.setdefault(tuple(round(score, 9) for score in candidate.scores), candidate)
    return list(by_scores.values())
