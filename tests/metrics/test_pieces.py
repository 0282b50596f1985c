"""What is summed over rows is taken in pieces of them: the same bits as of all rows at once, and memory that does not grow."""

import pytest
import torch

from mpsearch.metrics.divergences import KL
from mpsearch.metrics.metric import Comparison, Metric, inner_product
from mpsearch.metrics.pieces import all_finite, by_pieces, piece_sizes
from mpsearch.metrics.registry import METRICS
from mpsearch.metrics.runs import run
from mpsearch.metrics.seeds import Draw
from mpsearch.metrics.statistics import cross_entropy, kl_divergence
from mpsearch.metrics.targets import Loss
from mpsearch.models.peak_memory import live_bytes

BY_ROWS = [name for name, metric in METRICS.items() if metric.by_rows and issubclass(metric, Comparison)]
ROWS, WIDTH = 83, 2**15


def logits(rows=ROWS, width=WIDTH, seed=0, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(rows=ROWS, width=WIDTH):
    return torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(2))


def whole(name, a, b):
    """The divergences as formulas of whole float64 matrices."""
    a, b = a.double(), b.double()
    log = torch.nn.functional.logsigmoid
    if name == "kl":
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)
    if name == "bernoulli-kl":
        return (a.sigmoid() * (log(a) - log(b)) + (-a).sigmoid() * (log(-a) - log(-b))).sum(-1)
    return (b - a).square().mean(-1) if name == "mse" else (b - a).square().sum(-1)


def test_pieces_make_up_all_rows_and_none_is_a_row_alone():
    for rows in range(300):
        sizes = piece_sizes(rows, 10**6)
        assert sum(sizes) == rows
        assert max(sizes) <= 17
        assert rows == 1 or 1 not in sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_ROWS)
def test_the_same_bits_as_of_all_rows_at_once(name, dtype):
    a, b = logits(dtype=dtype), logits(seed=1, dtype=dtype)
    index = torch.arange(ROWS) // 3
    values, weights = METRICS[name]().terms(a, b, index, 28)  # type: ignore[attr-defined]
    assert torch.equal(values, whole(name, a, b))
    assert torch.equal(weights, a.double().square().sum(-1) if name == "relative-error" else torch.ones_like(values))


def test_losses_have_the_same_bits():
    rows, right = logits(), labels()
    assert torch.equal(cross_entropy(rows, right), -rows.double().log_softmax(-1)[torch.arange(ROWS), right])
    numbers = logits(seed=1)
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    shares = (numbers > 0).double()
    expected = binary(rows.double(), shares, reduction="none").sum(-1)
    assert torch.equal(Loss("labels").values(rows, shares), expected)
    assert torch.equal(Loss("numbers").values(rows, numbers), (rows.double() - numbers.double()).square().mean(-1))


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("number", [0, 5])
def test_random_outputs_of_pieces_are_those_of_the_whole(name, number):
    """Pieces end within a sample, and draws go on where the last piece ended."""
    metric = METRICS[name]()
    assert isinstance(metric, Comparison)
    rows, index = logits(20, 300), torch.tensor([0] * 3 + [1] * 9 + [3] * 8)
    expected = metric.random_output(rows, index, 4, Draw(7, 1, number))
    drawn = metric.drawn(rows, index, 4, Draw(7, 1, number))
    draw, again = Draw(7, 1, number), Draw(7, 1, number)
    places = [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 20)]
    parts = [metric.random_output(rows[place], index[place], 4, draw) for place in places]
    assert torch.equal(torch.cat(parts), expected)
    sums = [metric.drawn(rows[place], index[place], 4, again) for place in places]
    assert float(sum(sums)) == pytest.approx(float(drawn), rel=1e-9, abs=1e-6)


def test_the_random_output_of_the_kl_by_its_formula():
    rows = logits(40, 2**15)
    signs = 2 * torch.randint(0, 2, rows.shape, generator=Draw(3, 1, 2).own) - 1
    p = rows.double().log_softmax(-1).exp()
    noise = p.sqrt() * signs
    expected = (noise - p * noise.sum(1, keepdim=True)).float()
    assert torch.equal(KL().random_output(rows, torch.arange(40), 40, Draw(3, 1, 2)), expected)


def test_an_inner_product_by_autograd():
    u, rows = logits(5, 7).double(), logits(5, 7, seed=1).requires_grad_()
    product = inner_product(u.float(), rows)
    plain = (u.float().double() * rows.double()).sum()
    assert float(product.detach()) == pytest.approx(float(plain.detach()))
    assert torch.equal(*(torch.autograd.grad(2 * value, rows)[0] for value in (product, plain)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_in_any_piece(bad):
    rows = logits()
    assert all_finite(rows)
    rows[-1, -1] = bad
    assert not all_finite(rows)


def readers():
    """What reads logits, and takes them row by row."""
    for name in BY_ROWS:
        metric: Metric = METRICS[name]()
        assert isinstance(metric, Comparison)
        yield f"{name}: terms", lambda a, b, metric=metric: metric.terms(a, b, torch.arange(len(a)), len(a))
        yield (
            f"{name}: random output",
            lambda a, b, metric=metric: metric.random_output(a, torch.arange(len(a)), len(a), Draw(0, 0, 3)),
        )
    yield "divergence", kl_divergence
    yield "cross-entropy", lambda a, b: cross_entropy(a, labels(len(a)))
    yield "drawn", lambda a, b: KL().drawn(a, torch.arange(len(a)), len(a), Draw(0, 0, 0))
    yield "labels", lambda a, b: Loss("labels").values(a, b)
    yield "numbers", lambda a, b: Loss("numbers").values(a, b)
    yield "finite", lambda a, b: all_finite(a)


@pytest.mark.parametrize(("name", "read"), list(readers()), ids=[name for name, _ in readers()])
def test_memory_does_not_grow_with_rows(name, read):
    """Beside the logits themselves, and a random output in their type."""
    peaks = []
    for rows in (64, 256):
        a, b = logits(rows), logits(rows, seed=1)
        with torch.no_grad(), live_bytes() as live:
            read(a, b)
        peaks.append(live.bytes - (a.numel() * 4 if "output" in name else 0))
    assert peaks[1] < 1.1 * peaks[0] + 2**14
    assert peaks[1] < 9 * 17 * 2**15 * 8


def test_a_plain_function_of_all_rows_does_grow():
    """The measure itself: what is taken at once is seen."""
    peaks = []
    for rows in (64, 256):
        a, b = logits(rows), logits(rows, seed=1)
        with live_bytes() as live:
            whole("kl", a, b)
        peaks.append(live.bytes)
    assert peaks[1] > 3.9 * peaks[0]
    assert peaks[1] >= 4 * a.numel() * 8


def test_a_gradient_flows_through_all_rows():
    a, b = logits(40), logits(40, seed=1).requires_grad_()
    (found,) = torch.autograd.grad(by_pieces(kl_divergence, a, b).sum(), b)
    (expected,) = torch.autograd.grad(whole("kl", a, b).sum(), b)
    assert torch.equal(found, expected)


def test_where_every_prediction_counts_the_rows_are_the_output_itself():
    model, x = torch.nn.Linear(3, 4), torch.randn(2, 5, 3)
    found = run(model, x)
    assert found.rows.data_ptr() == found.output.data_ptr()
    assert found.bytes == 2 * 5 * 4 * 4
    masked = run(model, (x, torch.tensor([[1, 2, 3, 0, -100]] * 2)))
    assert torch.equal(masked.rows, masked.output[:, :4].flatten(0, 1))
