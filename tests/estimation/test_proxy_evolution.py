"""The search on fitness that is known."""

import pytest

import mpsearch as mps
from mpsearch.estimation.proxies.evolution import Candidate, ProxyEvolution, _Breeder
from mpsearch.estimation.proxies.tree import BINARY, INPUTS, UNARY, parse

WANTED = parse("mean(hessian) * square(frobenius(weight))")


def likeness(tree):
    """How many of the wanted tree's branches a tree has; each may be used once."""
    left = [str(node) for node in tree.nodes()]
    found = 0
    for node in WANTED.nodes():
        if str(node) in left:
            left.remove(str(node))
            found += 1
    return found / len(WANTED) - 0.001 * len(tree)


class Judge:
    """Counts what it is asked."""

    def __init__(self, accepts=lambda tree: True, fitness=likeness):
        self.accepts, self.fitness, self.asked = accepts, fitness, []

    def __call__(self, tree):
        self.asked.append(tree)
        return (
            Candidate(tree, self.fitness(tree), tuple(map(float, str(tree).encode()))) if self.accepts(tree) else None
        )


@pytest.mark.parametrize("seed", range(3))
def test_the_wanted_tree_is_found(seed):
    found = ProxyEvolution(generations=40, population=40, seed=seed).search(Judge())
    assert found[0].tree.sorted() == WANTED.sorted()


def test_as_many_random_trees_do_not_find_it():
    judge, random = Judge(), Judge()
    ProxyEvolution(generations=40, population=40).search(judge)
    ProxyEvolution(generations=0, population=len(judge.asked)).search(random)
    assert len(random.asked) >= len(judge.asked)
    assert max(map(likeness, random.asked)) < likeness(WANTED) - 0.2


def test_the_same_seed_asks_the_same():
    asked = []
    for seed in (0, 0, 1):
        judge = Judge()
        ProxyEvolution(generations=5, population=10, seed=seed).search(judge)
        asked.append(judge.asked)
    assert asked[0] == asked[1] != asked[2]


def test_no_tree_is_asked_twice_and_none_is_too_large():
    judge = Judge()
    ProxyEvolution(generations=15, population=20, most_nodes=7).search(judge)
    assert len({tree.sorted() for tree in judge.asked}) == len(judge.asked)
    assert max(map(len, judge.asked)) == 7


def test_the_best_is_never_lost_and_the_population_is_in_order():
    judge = Judge()
    found = ProxyEvolution(generations=15, population=20).search(judge)
    assert found[0].fitness == max(map(likeness, judge.asked))
    fitness = [one.fitness for one in found]
    assert fitness == sorted(fitness, reverse=True)
    assert len(found) <= 20


def test_of_trees_with_equal_scores_the_smallest_stays():
    def judge(tree):
        return Candidate(tree, 1.0, (1.0, float("weight" in str(tree))))

    found = ProxyEvolution(generations=10, population=20).search(judge)
    assert len(found) == 2
    assert all(len(one.tree) == 1 for one in found)


def test_newcomers_stand_in_for_children_that_fail_or_are_no_better():
    """With all children refused, every generation still brings new trees."""
    first, failing = set(), Judge(accepts=lambda tree: len(first) < 10 or len(tree) == 3)

    def judge(tree):
        found = failing(tree)
        if found:
            first.add(tree)
        return found

    found = ProxyEvolution(generations=10, population=10).search(judge)
    assert any(len(one.tree) == 3 for one in found)
    flat = Judge(fitness=lambda tree: 0.0)  # no child is better than its parent
    ProxyEvolution(generations=4, population=10).search(flat)
    assert len(flat.asked) == 10 + 4 * (10 + 10)


def test_parents_win_a_tournament_of_three():
    alive = [Candidate(parse("weight"), float(place), (place,)) for place in range(40)]
    breeder = _Breeder(ProxyEvolution())
    won = [breeder.winner(alive).fitness for _ in range(4000)]
    best_of_three = sum(max(a, b, c) for a in range(40) for b in range(40) for c in range(40)) / 40**3
    assert sum(won) / len(won) == pytest.approx(best_of_three, rel=0.02)
    assert breeder.winner([]) is None


def test_priors():
    never = {"gradient": 0, "exp": 0, "@": 0, "activation": 100}
    judge = Judge()
    ProxyEvolution(generations=10, population=20, priors=never).search(judge)
    names = [node.name for tree in judge.asked for node in tree.nodes()]
    assert not {"gradient", "exp", "@"} & set(names)
    judge = Judge(accepts=lambda tree: False)
    ProxyEvolution(generations=20, population=100, priors={"activation": 10}).search(judge)
    names = [node.name for tree in judge.asked for node in tree.nodes()]
    leaves = [name for name in names if name in INPUTS]
    assert leaves.count("activation") / len(leaves) > 0.5  # 10 of 14, fewer since none is asked twice
    binary = [name for name in names if name in BINARY]
    assert binary.count("*") > binary.count("+") > 2 * binary.count("@") > 0


def test_progress():
    steps = []
    ProxyEvolution(generations=3, population=10).search(Judge(), lambda: steps.append(1))
    assert len(steps) == 40


def test_nothing_passes():
    assert ProxyEvolution(generations=2, population=4).search(Judge(accepts=lambda tree: False)) == []


def test_few_trees_there_are():
    """One input, and everything else is ruled out by size: the search ends."""
    judge = Judge()
    only = dict.fromkeys([name for name in INPUTS if name != "weight"], 0)
    found = ProxyEvolution(generations=3, population=4, most_nodes=2, priors=only).search(judge)
    assert len(found) <= 4
    assert len(judge.asked) <= 1 + len(UNARY)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generations": -1}, "generations=-1: expected 0 or more"),
        ({"population": 3}, "population=3: expected 4 or more"),
        ({"most_nodes": 0}, "most_nodes=0"),
        ({"priors": {"exq": 1}}, "'exq', which is no input or operation; did you mean 'exp'"),
        ({"priors": {"exp": -1}}, "the prior of 'exp' is -1, expected a finite number of 0 or more"),
        ({"priors": {"exp": float("nan")}}, "the prior of 'exp' is nan"),
        ({"priors": dict.fromkeys(INPUTS, 0)}, "the prior of every input is 0"),
        ({"priors": dict.fromkeys(BINARY, 0)}, "the prior of every binary operation is 0"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(mps.EstimatorError, match=words):
        ProxyEvolution(**settings)
