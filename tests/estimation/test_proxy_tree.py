"""Expressions against plain loops over numbers, and their text."""

import math

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch.estimation.proxies.tree import BINARY, INPUTS, UNARY, Tree, parse

X = [[1.5, -2.0, 0.0], [0.25, 4.0, -1.0]]
FLAT = [value for row in X for value in row]
MEAN = sum(FLAT) / 6
STD = math.sqrt(sum((value - MEAN) ** 2 for value in FLAT) / 6)


def columns(function):
    """A function of a column, applied to each column of X."""
    found = [function([X[0][j], X[1][j]]) for j in range(3)]
    return [[found[j][i] for j in range(3)] for i in range(2)]


def softmax(column):
    total = sum(math.exp(value) for value in column)
    return [math.exp(value) / total for value in column]


def each(function):
    return [[function(value) for value in row] for row in X]


EXPECTED = {
    "abs": each(abs),
    "exp": each(math.exp),
    "frobenius": math.sqrt(sum(value**2 for value in FLAT)),
    "invert": each(lambda v: 1 / v if v else math.inf),
    "log": each(lambda v: math.log(v) if v > 0 else 0.0),
    "log_abs": each(lambda v: math.log(abs(v)) if v else 0.0),
    "log_softmax": columns(lambda column: [math.log(value) for value in softmax(column)]),
    "mean": MEAN,
    "mean_abs": sum(map(abs, FLAT)) / 6,
    "minmax": each(lambda v: (v + 2) / 6),
    "normalize": each(lambda v: (v - MEAN) / STD),
    "relu": each(lambda v: max(v, 0)),
    "sigmoid": each(lambda v: 1 / (1 + math.exp(-v))),
    "sign": each(lambda v: (v > 0) - (v < 0)),
    "softmax": columns(softmax),
    "sqrt": each(lambda v: math.sqrt(max(v, 0))),
    "square": each(lambda v: v * v),
    "std": STD,
}


def test_every_operation_has_its_plain_program():
    assert set(EXPECTED) == set(UNARY)


@pytest.mark.parametrize("name", list(UNARY))
def test_unary(name):
    x = torch.tensor(X, dtype=torch.float64)
    found = Tree(name, (Tree("weight"),)).value({"weight": x})
    np.testing.assert_allclose(found, EXPECTED[name], rtol=1e-8, atol=1e-12)
    assert x.tolist() == X  # the sibling code of EMQ writes into its operand


@pytest.mark.parametrize("name", ["+", "-", "*"])
@pytest.mark.parametrize("number", ["no", "left", "right"])
def test_elementwise(name, number):
    a, b = torch.tensor(X), torch.tensor(X).flip(0)
    a, b = a.mean() if number == "left" else a, b.mean() if number == "right" else b
    found = parse(f"weight {name} gradient").value({"weight": a, "gradient": b})
    for i in range(2):
        for j in range(3):
            x, y = float(a if number == "left" else a[i, j]), float(b if number == "right" else b[i, j])
            assert float(found[i, j]) == pytest.approx({"+": x + y, "-": x - y, "*": x * y}[name])


def test_matrix_product_sums_over_output_channels():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    found = parse("weight @ gradient").value({"weight": a, "gradient": b})
    p, q = a.reshape(4, 6), b.reshape(4, 6)
    for i in range(6):
        for j in range(6):
            assert float(found[i, j]) == pytest.approx(sum(float(p[k, i] * q[k, j]) for k in range(4)), abs=1e-6)


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("weight + weight @ gradient", r"\(4, 3\) and \(3, 3\) do not fit"),
        ("mean(weight) @ gradient", r"\(\) and \(4, 3\) do not fit for @"),
        ("weight @ (weight @ gradient)", r"\(4, 3\) and \(3, 3\) do not fit for @"),
    ],
)
def test_shapes_that_do_not_fit(formula, words):
    with pytest.raises(mps.EstimatorError, match=words):
        parse(formula).value({"weight": torch.ones(4, 3), "gradient": torch.ones(4, 3)})


def test_a_tree_by_hand():
    """mean(softmax(log|G|) sqrt(relu(W))): EMQ's, with G = ((1, 2), (3, 2)), W = ((4, -1), (9, 16))."""
    inputs = {
        "virtual_gradient": torch.tensor([[1.0, -2.0], [-3.0, 2.0]]),
        "weight": torch.tensor([[4.0, -1.0], [9.0, 16.0]]),
    }
    tree = parse("mean(softmax(log_abs(virtual_gradient)) * sqrt(relu(weight)))")
    assert tree.score(inputs) == pytest.approx((1 / 4 * 2 + 1 / 2 * 0 + 3 / 4 * 3 + 1 / 2 * 4) / 4)


@pytest.mark.parametrize(
    ("formula", "score"),
    [
        ("weight", 0.0),  # a negative mean counts as 0
        ("abs(weight)", 2.0),
        ("invert(weight - weight)", math.inf),
        ("log(abs(weight)) - invert(weight - weight)", -math.inf),
    ],
)
def test_score(formula, score):
    assert parse(formula).score({"weight": torch.tensor([-3.0, 1.0])}) == score


def random_tree(rng, depth):
    kind = int(rng.integers(3)) if depth else 0
    if kind == 0:
        return Tree(str(rng.choice(INPUTS)))
    names = (UNARY, BINARY)[kind - 1]
    return Tree(str(rng.choice(list(names))), tuple(random_tree(rng, depth - 1) for _ in range(kind)))


def test_text_is_read_back_to_the_same_tree():
    rng = np.random.default_rng(0)
    for _ in range(500):
        tree = random_tree(rng, 5)
        assert parse(str(tree)) == tree
        assert len(tree) == len(list(tree.nodes()))


def test_parentheses_only_where_they_are_needed():
    for text in (
        "weight + gradient * hessian",
        "(weight + gradient) * hessian",
        "weight - (gradient - hessian)",
        "weight * (gradient @ hessian)",
        "weight - gradient - hessian",
    ):
        assert str(parse(text)) == text


def test_the_order_of_operands_of_sums_and_products_does_not_matter():
    assert parse("weight + abs(gradient * hessian)").sorted() == parse("abs(hessian * gradient) + weight").sorted()
    assert parse("weight - gradient").sorted() != parse("gradient - weight").sorted()
    assert parse("weight @ gradient").sorted() != parse("gradient @ weight").sorted()


def test_nodes_are_replaced_in_the_order_that_they_are_counted():
    tree = parse("mean(weight * gradient) + abs(hessian)")
    for place, node in enumerate(tree.nodes()):
        changed = tree.with_node(place, Tree("activation"))
        assert list(changed.nodes())[place] == Tree("activation")
        assert len(changed) == len(tree) - len(node) + 1
        assert tree.with_node(place, node) == tree


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("", "not an expression"),
        ("mean(", "not an expression"),
        ("maen(weight)", "no operation 'maen'; did you mean 'mean'"),
        ("mean(wieght)", "no input 'wieght'; did you mean 'weight'"),
        ("mean(weight, gradient)", "mean has 2 operands, expected 1"),
        ("mean(x=weight)", "mean has 1 operands, expected 1|mean has"),
        ("weight / gradient", "is no input, no operation"),
        ("weight ** 2", "is no input, no operation"),
        ("2 * weight", "'2' is no input"),
        ("-weight", "is no input"),
        ("mean", "no input 'mean'"),
        ("weight.mean()", "is no input"),
        ("__import__('os').getcwd()", "is no input"),
    ],
)
def test_what_is_no_formula_is_refused(formula, words):
    with pytest.raises(mps.EstimatorError, match=words) as caught:
        parse(formula)
    assert str(caught.value).startswith(f"formula {formula!r}: ")
