"""Gradients of single samples against autograd, one sample at a time."""

import pytest
import torch
from torch import nn

from mpsearch.estimation.gradients.per_sample import gradient_bytes, projection, sample_gradients

SAMPLES = 5


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def tokens(*shape):
    return torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(1))


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


CASES = {
    "linear": (lambda: nn.Linear(4, 3), lambda: values(SAMPLES, 4)),
    "linear on tokens": (lambda: nn.Linear(4, 3), lambda: values(SAMPLES, 7, 4)),
    "linear on a grid of tokens": (lambda: nn.Linear(4, 3), lambda: values(SAMPLES, 2, 3, 4)),
    "linear on samples in several rows": (lambda: nn.Linear(4, 3), lambda: values(SAMPLES * 2, 6, 4)),
    "Conv1D": (lambda: Conv1D(3, 4), lambda: values(SAMPLES, 7, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), lambda: values(SAMPLES, 4, 11)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), lambda: values(SAMPLES, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), lambda: values(SAMPLES, 2, 6, 5)),
    "conv2d in several rows": (lambda: nn.Conv2d(2, 3, 3), lambda: values(SAMPLES * 3, 2, 6, 5)),
    "conv2d stride, padding, dilation": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        lambda: values(SAMPLES, 2, 8, 7),
    ),
    "conv2d same": (
        lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)),
        lambda: values(SAMPLES, 2, 6, 5),
    ),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), lambda: values(SAMPLES, 2, 6, 5)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), lambda: values(SAMPLES, 4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: values(SAMPLES, 4, 5, 5)),
    "conv2d depthwise, two each": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: values(SAMPLES, 4, 5, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), lambda: values(SAMPLES, 2, 6, 5)),
    "conv1d circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), lambda: values(SAMPLES, 2, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), lambda: values(SAMPLES, 2, 4, 5, 4)),
    "conv transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2), lambda: values(SAMPLES, 4, 5)),
    "conv transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        lambda: values(SAMPLES, 4, 5, 4),
    ),
    "embedding": (lambda: nn.Embedding(6, 3), lambda: tokens(SAMPLES, 9)),
    "embedding of one token": (lambda: nn.Embedding(6, 3), lambda: tokens(SAMPLES)),
    "embedding with padding": (lambda: nn.Embedding(6, 3, padding_idx=2), lambda: tokens(SAMPLES, 9)),
}


def truth(module, x, g):
    """(N, ...) by one backward pass for each sample."""
    rows = len(x) // SAMPLES
    found = []
    for n in range(SAMPLES):
        y = module(x[n * rows : (n + 1) * rows])
        found.append(torch.autograd.grad(y, module.weight, g[n * rows : (n + 1) * rows])[0])
    return torch.stack(found)


def gathered(module, calls, samples=SAMPLES):
    parts = list(sample_gradients([(module, x, g) for x, g in calls], samples))
    assert [row for place, _, _ in parts for row in range(samples)[place]] == list(range(samples))
    return torch.cat([gradients for _, _, gradients in parts])


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    make, given = CASES[request.param]
    module, x = make(), given()
    g = torch.randn(module(x).shape)
    return module, x, g


def test_a_loop_over_samples(case):
    module, x, g = case
    found = gathered(module, [(x, g)])
    torch.testing.assert_close(found, truth(module, x, g), rtol=1e-4, atol=1e-5)
    weight = torch.autograd.grad(module(x), module.weight, g)[0]
    torch.testing.assert_close(found.sum(0), weight, rtol=1e-4, atol=1e-5)


def test_calls_of_one_weight_add_up(case):
    module, x, g = case
    other = x.flip(0)
    torch.testing.assert_close(
        gathered(module, [(x, g), (other, 2 * g)]),
        truth(module, x, g) + truth(module, other, 2 * g),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("kept", [1, 2, 4, 100])
def test_few_samples_at_a_time(case, kept):
    module, x, g = case
    parts = list(sample_gradients([(module, x, g)], SAMPLES, room_bytes=kept * gradient_bytes(module.weight)))
    assert [len(gradients) for _, _, gradients in parts] == [
        min(kept, SAMPLES - start) for start in range(0, SAMPLES, kept)
    ]
    found = torch.cat([gradients for _, _, gradients in parts])
    torch.testing.assert_close(found, truth(module, x, g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("room_bytes", [1, 40])
def test_a_weight_beyond_the_limit_goes_sample_by_sample_in_rows(case, room_bytes):
    """Where a few rows are no dearer than their share."""
    module, x, g = case
    found = torch.full((SAMPLES, *module.weight.shape), torch.nan)
    for place, rows, gradients in sample_gradients([(module, x, g)], SAMPLES, room_bytes):
        assert len(gradients) == 1
        assert 4 * gradients.numel() <= max(room_bytes, 4 * module.weight[0].numel()) or rows == slice(
            0, len(module.weight)
        )
        found[place, rows] = gradients
    torch.testing.assert_close(found, truth(module, x, g), rtol=1e-4, atol=1e-5)


def test_projections_without_the_gradients(case):
    """Of two calls, with the change a few rows at a time."""
    module, x, g = case
    change = torch.randn_like(module.weight)
    other = x.flip(0)

    def rows():
        yield slice(0, 1), change[:1]
        yield slice(1, len(change)), change[1:]

    found = projection([(module, x, g), (module, other, 2 * g)], SAMPLES, rows)
    if found is None:
        assert isinstance(module, nn.modules.conv._ConvNd)
        return
    gradients = truth(module, x, g) + truth(module, other, 2 * g)
    expected = (gradients.detach() * change.detach()).flatten(1).double().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_sample_for_the_whole_batch(case):
    """The sum over samples, which calls without a sample dimension are taken as."""
    module, x, g = case
    found = gathered(module, [(x, g)], samples=1)
    weight = torch.autograd.grad(module(x), module.weight, g)[0]
    torch.testing.assert_close(found[0], weight, rtol=1e-4, atol=1e-5)


def test_half_precision_is_summed_in_float32(case):
    """The inputs are those of bfloat16; the sums are float32's, far closer than bfloat16's own 2^-8."""
    module, x, g = case
    half = module.bfloat16()
    low = x.bfloat16() if x.is_floating_point() else x
    found = gathered(half, [(low, g.bfloat16())])
    assert found.dtype == torch.float32
    high = low.float() if x.is_floating_point() else x
    torch.testing.assert_close(found, truth(module.float(), high, g.bfloat16().float()), rtol=1e-4, atol=1e-4)


def test_double_stays_double():
    module, x = nn.Linear(4, 3).double(), values(SAMPLES, 7, 4).double()
    g = values(SAMPLES, 7, 3).double()
    found = gathered(module, [(x, g)])
    torch.testing.assert_close(found, truth(module, x, g), rtol=1e-13, atol=1e-13)


def test_hooks_of_the_module_do_not_run(case):
    """A sweep calls this from inside the hooks of the module."""
    module, x, g = case
    module.register_forward_hook(lambda *_: pytest.fail("the module's hook ran"))
    gathered(module, [(x, g)])
    assert module.weight.grad is None
    assert module.weight.requires_grad


def test_a_weight_held_by_modules_of_two_kinds():
    """A tied embedding and head."""
    table, head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
    head.weight = table.weight
    numbers, x, g_table, g_head = (
        tokens(SAMPLES, 7),
        values(SAMPLES, 7, 3),
        values(SAMPLES, 7, 3),
        values(SAMPLES, 7, 6),
    )
    (found,) = (part for _, _, part in sample_gradients([(table, numbers, g_table), (head, x, g_head)], SAMPLES))
    torch.testing.assert_close(found, truth(table, numbers, g_table) + truth(head, x, g_head))
