"""Relevance against explicit matrices, loops, conservation, gradient x input, and zennit and lxt where installed."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relevance.propagation import Propagation
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import KLDivergence
from mpsearch.sensitivity.lrp import LRP
from mpsearch.sensitivity.lrp_qvit import LRPQViT, MixQViT
from mpsearch.testing import check_estimator

RULES = ("epsilon", "gamma", "z+", "alpha-beta")


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    torch.manual_seed(0)


def frozen(model, seed=0):
    """In double precision, random also in its norms, no gradients for parameters."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.double))
            module.running_var.copy_(
                torch.rand(module.running_var.shape, generator=generator, dtype=torch.double) + 0.5
            )
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator, dtype=torch.double))
    return model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def relevance(model, x, seed_relevance=None, **rules):
    """Relevance of the input for the sum of all outputs, or for a given relevance of the output."""
    x = x.clone().requires_grad_()
    with Propagation(**rules):
        out = model(x)
    gradient = torch.ones_like(out)
    if seed_relevance is not None:
        gradient = torch.where(out == 0, 0.0, seed_relevance / out.detach())
    return (x * torch.autograd.grad(out, x, gradient)[0]).detach()


# the rules of linear maps, from their definitions


def shared_out(rule, matrix, bias, x, r, epsilon=0.0, gamma=0.25, alpha=2.0):
    """Relevance of the inputs of z = matrix @ x + bias by a loop over all pairs."""

    def stable(u):
        return u + (epsilon if u >= 0 else -epsilon)

    found = np.zeros(len(x))
    for j, row in enumerate(matrix):
        parts = [w * v for w, v in zip(row, x, strict=True)]
        z = sum(parts) + bias[j]
        up = sum(max(c, 0.0) for c in parts) + max(bias[j], 0.0)
        down = sum(min(c, 0.0) for c in parts) + min(bias[j], 0.0)
        for i, c in enumerate(parts):
            if rule == "epsilon":
                found[i] += c / stable(z) * r[j]
            elif rule == "z+":
                found[i] += max(c, 0.0) / stable(up) * r[j]
            elif rule == "alpha-beta":
                found[i] += (alpha * max(c, 0.0) / stable(up) - (alpha - 1) * min(c, 0.0) / stable(down)) * r[j]
            elif z > 0:
                found[i] += (c + gamma * max(c, 0.0)) / stable(z + gamma * up) * r[j]
            else:
                found[i] += (c + gamma * min(c, 0.0)) / stable(z + gamma * down) * r[j]
    return found


def explicit(module, shape):
    """Matrix and bias of an affine module, by pushing unit vectors through it."""
    n = math.prod(shape)
    zero = module(torch.zeros(1, *shape, dtype=torch.double)).reshape(-1)
    columns = module(torch.eye(n, dtype=torch.double).reshape(n, *shape)).reshape(n, -1) - zero
    return columns.T.numpy(), zero.numpy()


MAPS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, (1, 2), groups=2, bias=False), (4, 3, 3)),
    "depthwise, dilated": (lambda: nn.Conv1d(3, 3, 2, dilation=2, groups=3), (3, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 2, stride=2, groups=2), (2, 2, 3)),
    "volume": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 2)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)), (2, 3, 3)),
    "batch norm, grouped": (lambda: nn.Sequential(nn.Conv1d(4, 4, 2, groups=2, bias=False), nn.BatchNorm1d(4)), (4, 4)),
    "batch norm, transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2), nn.BatchNorm1d(6)),
        (4, 3),
    ),
    "batch norm, linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (4,)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", MAPS)
def test_rules_against_the_explicit_matrix(kind, rule):
    make, shape = MAPS[kind]
    module = frozen(make())
    matrix, bias = explicit(module, shape)
    settings = {"epsilon": 0.3, "gamma": 0.7, "alpha": 1.5}
    x, r = draw(1, *shape, seed=1), draw(len(bias), seed=2)
    expected = shared_out(rule, matrix, bias, x.reshape(-1).numpy(), r.numpy(), **settings)
    out = module(x)
    found = relevance(module, x, r.reshape(out.shape), convolution=rule, linear=rule, **settings)
    np.testing.assert_allclose(found.reshape(-1).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_rules_of_convolutions_and_linear_maps_are_set_apart():
    conv, linear = frozen(nn.Conv1d(1, 4, 2)), frozen(nn.Linear(5, 4))
    for module, x, other in ((conv, draw(1, 1, 3), "linear"), (linear, draw(1, 5), "convolution")):
        name = "convolution" if other == "linear" else "linear"
        torch.testing.assert_close(relevance(module, x, **{other: "z+"}), relevance(module, x))
        assert not torch.allclose(relevance(module, x, **{name: "z+"}), relevance(module, x))


def test_batch_norm_elsewhere_is_a_linear_map():
    model = frozen(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.BatchNorm2d(3)))
    matrix, bias = explicit(model[2], (3, 2, 2))
    x = draw(1, 2, 3, 3)
    hidden = model[1](model[0](x)).reshape(-1).numpy()
    middle = shared_out("epsilon", matrix, bias, hidden, np.array(matrix @ hidden + bias))
    outer = shared_out("z+", *explicit(model[0], (2, 3, 3)), x.reshape(-1).numpy(), middle)  # type: ignore[call-arg]
    found = relevance(model, x, convolution="z+", epsilon=0.0)
    np.testing.assert_allclose(found.reshape(-1).numpy(), outer, rtol=1e-9, atol=1e-12)


# whole networks


class Residual(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.branch = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.branch(x)


def cnn(bias=False, norm=nn.Identity, activation=nn.ReLU):
    torch.manual_seed(0)
    branch = (nn.Conv2d(6, 6, 3, padding=1, bias=bias), norm(6), activation(), nn.Conv2d(6, 6, 1, bias=bias))
    return frozen(
        nn.Sequential(
            *(nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=bias), norm(6), activation(), nn.MaxPool2d(2)),
            *(Residual(*branch), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(6, 12, bias=bias), activation(), nn.Linear(12, 3, bias=bias)),
        )
    )


def test_lrp_0_is_gradient_times_input_without_biases():
    model, x = cnn(), draw(2, 2, 8, 8).requires_grad_()
    expected = x * torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(relevance(model, x.detach(), epsilon=0.0), expected)
    total = model(x).sum()
    torch.testing.assert_close(relevance(model, x.detach(), epsilon=0.0).sum(), total)


def test_a_large_epsilon_absorbs():
    model, x = cnn(), draw(2, 2, 8, 8)
    totals = [float(relevance(model, x, model(x).abs(), epsilon=e).sum().abs()) for e in (0.0, 1.0, 100.0)]
    assert totals[0] > totals[1] > totals[2]


class Attention(nn.Module):
    """Causal, two heads of 4, in the manner asked for."""

    def __init__(self, manner, bias=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=bias) for _ in range(4))
        self.manner = manner

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.manner == "fused":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.manner == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2.0
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            out = torch.einsum("bhqk,bhkd->bhqd", weights, v)
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) * 0.5 + torch.where(mask, 0.0, -1e9)
            out = F.softmax(scores, dim=-1) @ v
        return self.out(out.transpose(1, 2).flatten(2))


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(8, 12, bias=False),
            nn.Linear(8, 12, bias=False),
            nn.Linear(12, 8, bias=False),
        )

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def transformer(norm, mlp, manner="matmul"):
    torch.manual_seed(0)
    return frozen(
        nn.Sequential(Residual(norm(), Attention(manner)), Residual(norm(), mlp()), norm(), nn.Linear(8, 5, bias=False))
    )


def gelu_mlp():
    return nn.Sequential(nn.Linear(8, 12, bias=False), nn.GELU(), nn.Linear(12, 8, bias=False))


TRANSFORMERS = {
    "vit": lambda manner="matmul": transformer(lambda: nn.LayerNorm(8, bias=False), gelu_mlp, manner),
    "decoder": lambda manner="matmul": transformer(RMSNorm, Gated, manner),
}


@pytest.mark.parametrize("rule", RULES)
def test_relevance_is_conserved_in_cnns(rule):
    """Tanh has no zeros: z+ and alpha-beta lose what an output without contributions of one sign would pass on."""
    model, x = cnn(activation=nn.Tanh), draw(2, 2, 8, 8)
    total = relevance(model, x, convolution=rule, linear=rule, epsilon=1e-12).sum()
    torch.testing.assert_close(total, model(x).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("attention", ["attn-lrp", "cp-lrp"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_relevance_is_conserved_in_transformers(kind, attention):
    """But for what the softmax of AttnLRP absorbs: its Taylor term of order zero, as a bias."""
    model, x = TRANSFORMERS[kind](), draw(2, 6, 8)
    absorbed = 0.0
    if attention == "attn-lrp":
        for sample in (0, 1):
            absorbed += softmax_absorbs(model, x[sample : sample + 1])
    total = relevance(model, x, attention=attention, epsilon=1e-13).sum()
    torch.testing.assert_close(total, model(x).sum() - absorbed, rtol=1e-6, atol=1e-8)


def softmax_absorbs(model, x):
    """R of the attention weights less R of the scores, with only the softmax as a leaf."""
    kept = {}

    def probe(scores, dim):
        weights = torch.softmax(scores, dim)
        kept["scores"], kept["weights"] = scores, weights
        return weights

    original = F.softmax
    try:
        F.softmax = lambda scores, dim: probe(scores, dim)
        x = x.clone().requires_grad_()
        with Propagation(epsilon=1e-13):
            out = model(x)
        g_scores, g_weights = torch.autograd.grad(out.sum(), (kept["scores"], kept["weights"]))
    finally:
        F.softmax = original
    visible = kept["weights"] > 0
    r_scores = (kept["scores"].detach() * g_scores)[visible].sum()
    r_weights = (kept["weights"].detach() * g_weights).sum()
    return float(r_weights - r_scores)


# attention, norms, activations and products, by loops


@pytest.mark.parametrize("attention", ["attn-lrp", "cp-lrp"])
def test_attention_against_loops(attention):
    """One head of width 4 on 3 tokens, R given at its output; q, k, v are the inputs."""
    q, k, v, r = (draw(1, 1, 3, 4, seed=s) for s in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    with Propagation(attention=attention, epsilon=0.0):
        out = (leaves[0] @ leaves[1].mT / 2).softmax(-1) @ leaves[2]
    gradient = torch.autograd.grad(out, leaves, r / out.detach(), allow_unused=True)
    found = [
        np.zeros((3, 4)) if g is None else (t * g).detach()[0, 0].numpy() for t, g in zip(leaves, gradient, strict=True)
    ]

    q, k, v, r = (t[0, 0].numpy() for t in (q, k, v, r))
    expected = [np.zeros((3, 4)) for _ in range(3)]
    for t in range(3):
        scores = [sum(q[t, d] * k[s, d] for d in range(4)) / 2 for s in range(3)]
        weights = [math.exp(x) / sum(math.exp(y) for y in scores) for x in scores]
        r_weights = [0.0] * 3
        for c in range(4):
            z = sum(weights[s] * v[s, c] for s in range(3))
            for s in range(3):
                part = weights[s] * v[s, c] / z * r[t, c]
                half = 1.0 if attention == "cp-lrp" else 0.5
                expected[2][s, c] += half * part
                r_weights[s] += (1 - half) * part
        for s in range(3):
            r_score = scores[s] * (r_weights[s] - weights[s] * sum(r_weights))
            for d in range(4):
                part = q[t, d] * k[s, d] / 2 / scores[s] * r_score
                expected[0][t, d] += part / 2
                expected[1][s, d] += part / 2
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attention", ["attn-lrp", "cp-lrp"])
@pytest.mark.parametrize("manner", ["fused", "einsum"])
def test_attention_is_the_same_however_it_is_written(manner, attention):
    x = draw(2, 6, 8)
    one, other = (relevance(TRANSFORMERS["vit"](m), x, attention=attention) for m in ("matmul", manner))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("attention", ["attn-lrp", "cp-lrp"])
def test_multi_head_attention_of_torch(attention, need_weights):
    torch.manual_seed(0)
    packed = frozen(nn.MultiheadAttention(8, 2, batch_first=True, bias=False))
    plain = frozen(Attention("matmul"))
    plain.out.weight.copy_(packed.out_proj.weight)
    for part, weight in zip((plain.q, plain.k, plain.v), packed.in_proj_weight.chunk(3), strict=True):
        part.weight.copy_(weight)
    mask = torch.full((6, 6), -1e9, dtype=torch.double).triu(1)
    x = draw(2, 6, 8)
    found = relevance(
        lambda x: packed(x, x, x, attn_mask=mask, need_weights=need_weights)[0], x, attention=attention, epsilon=1e-12
    )
    torch.testing.assert_close(found, relevance(plain, x, attention=attention, epsilon=1e-12), rtol=1e-6, atol=1e-9)


def test_queries_without_relevance_leave_all_to_the_values():
    """Where a factor is constant, the other gets all."""
    q, k, v = (draw(1, 1, 3, 4, seed=s) for s in range(3))
    total = (F.scaled_dot_product_attention(q, k, v)).sum()
    found = relevance(lambda v: F.scaled_dot_product_attention(q, k, v), v)
    torch.testing.assert_close(found.sum(), total)
    constant = (q @ k.mT).softmax(-1)
    torch.testing.assert_close(relevance(lambda v: constant @ v, v).sum(), (constant @ v).sum())


NORMS = {
    "layer norm": (nn.LayerNorm((2, 3)), lambda x: x.reshape(4, 6), lambda w: w.reshape(-1)),
    "group norm": (nn.GroupNorm(1, 2), lambda x: x.reshape(4, 6), lambda w: w.repeat_interleave(3)),
    "instance norm": (nn.InstanceNorm1d(2, affine=True), lambda x: x.reshape(8, 3), None),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_linear_with_a_constant_deviation(kind):
    module, rows, weights = NORMS[kind]
    frozen(module)
    x, r = draw(4, 2, 3), draw(4, 2, 3, seed=1)
    flat, r_flat = rows(x).numpy(), rows(r).numpy()
    weight = (module.weight if weights else module.weight.repeat(4)).numpy()
    expected = []
    for n, (row, relevant) in enumerate(zip(flat, r_flat, strict=True)):
        size = len(row)
        scale = np.tile(weight[n], size) if weights is None else weights(module.weight).numpy()
        bias = np.zeros(size)
        if module.bias is not None:
            bias = np.tile(module.bias.repeat(4)[n], size) if weights is None else np.resize(0.0, size)
        matrix = scale[:, None] * (np.eye(size) - 1 / size) / math.sqrt(row.var() + module.eps)
        expected.append(shared_out("epsilon", matrix, bias, row, relevant))
    found = relevance(module, x, r, epsilon=0.0)
    np.testing.assert_allclose(rows(found).numpy(), np.array(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.ELU, nn.LeakyReLU])
def test_activations_pass_all_relevance_on(kind):
    x, r = draw(20), draw(20, seed=1)
    out = kind()(x)
    torch.testing.assert_close(relevance(kind(), x, r), torch.where(out == 0, 0.0, r))


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(8), RMSNorm(), lambda x: F.normalize(x, dim=-1), lambda x: x / x.norm(dim=-1, keepdim=True)]
)
def test_root_mean_square_norms_pass_all_relevance_on(norm):
    if isinstance(norm, nn.Module):
        frozen(norm)
    x, r = draw(3, 8), draw(3, 8, seed=1)
    torch.testing.assert_close(relevance(norm, x, r), r)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5,
        lambda x: x * torch.pow((x * x).mean(-1, keepdim=True), -0.5),
        lambda x: x / ((x**2).mean(-1, keepdim=True) + 1e-6) ** 0.5,
        lambda x: x * (x.norm(dim=-1, keepdim=True).clamp(min=1e-6)).reciprocal(),
    ],
)
def test_powers_of_one_half_are_denominators(norm):
    x, r = draw(3, 8), draw(3, 8, seed=1)
    torch.testing.assert_close(relevance(norm, x, r), r)


def spread_and_mean(x):
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        spread_and_mean,
        lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5),
        lambda x: (x - x.mean(-1, True)) * ((x - x.mean(-1, True)) ** 2).mean(-1, True).add(1e-5).pow(-0.5),
    ],
)
def test_layer_norms_by_hand(norm):
    x, r = draw(3, 8), draw(3, 8, seed=1)
    torch.testing.assert_close(relevance(norm, x, r), relevance(nn.LayerNorm(8, elementwise_affine=False), x, r))


def gelu_in_place(x):
    half = 0.5 * x
    half.mul_(1 + torch.erf(x / math.sqrt(2.0)))
    return half


@pytest.mark.parametrize(
    ("by_hand", "original"),
    [
        (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), nn.GELU("tanh")),
        (gelu_in_place, nn.GELU()),
        (lambda x: x * torch.sigmoid(x), nn.SiLU()),
        (lambda x: x / (1 + torch.exp(-x)), nn.SiLU()),
        (lambda x: x * torch.tanh(F.softplus(x)), nn.Mish()),
        (lambda x: x * F.relu6(x + 3) / 6, nn.Hardswish()),
        (lambda x: F.relu(x).square(), lambda x: F.relu(x) ** 2),
    ],
)
def test_activations_by_hand_pass_all_relevance_on(by_hand, original):
    """A number times a function of itself is one function of one number, whatever constants absorb on the way."""
    x, r = draw(5, 4), draw(5, 4, seed=1)
    with Propagation():
        torch.testing.assert_close(by_hand(x.clone().requires_grad_()).detach(), original(x))
    torch.testing.assert_close(relevance(by_hand, x, r), relevance(original, x, r))


def test_a_tensor_that_was_overwritten_is_no_function_of_what_it_was():
    def written(x):
        y, z = x[..., 0] * 2.0, x[..., 1] * 1.0
        gate = torch.sigmoid(y)
        y += z
        return y * gate

    def plain(x):
        y, z = x[..., 0] * 2.0, x[..., 1] * 1.0
        return (y + z) * torch.sigmoid(y)

    x, r = draw(4, 3, 2), draw(4, 3, seed=1)
    torch.testing.assert_close(relevance(written, x, r), relevance(plain, x, r))
    y, z = 2 * x[..., 0], x[..., 1]
    half = torch.stack([r / 2 * y / (y + z) + r / 2, r / 2 * z / (y + z)], -1)  # of the sum, and of the gate
    torch.testing.assert_close(relevance(plain, x, r), half)


POOLS = {
    "avg": (nn.AvgPool2d(2, stride=1, padding=1), (2, 4, 4)),
    "adaptive avg": (nn.AdaptiveAvgPool2d((3, 1)), (2, 4, 4)),
    "global mean": (lambda x: x.mean((-2, -1)), (2, 4, 4)),
    "avg 1d": (nn.AvgPool1d(2), (3, 6)),
    "concatenation": (lambda x: torch.cat([3 * x[:, 1:], x, -2 * x[:, :1]], 1), (3, 2)),
    "padding": (lambda x: F.pad(x[:, ::2], (1, 1)), (3, 2)),
}


@pytest.mark.parametrize("kind", POOLS)
def test_pooling_and_glue_share_by_contribution(kind):
    module, shape = POOLS[kind]
    matrix, bias = explicit(module, shape)
    x, r = draw(1, *shape, seed=1), draw(len(bias), seed=2)
    out = module(x)
    r = torch.where(out.reshape(-1) == 0, 0.0, r)  # nothing arrives at padding
    rows = [row for row in range(len(bias)) if r[row] != 0]
    expected = shared_out("epsilon", matrix[rows], bias[rows], x.reshape(-1).numpy(), r[rows].numpy())
    found = relevance(module, x, r.reshape(out.shape))
    np.testing.assert_allclose(found.reshape(-1).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.AdaptiveMaxPool1d(3), lambda x: x.unflatten(-1, (3, 2)).amax(-1)])
def test_max_pooling_gives_all_to_the_largest(pool):
    x, r = draw(2, 3, 6), draw(2, 3, 3, seed=1)
    expected = torch.zeros_like(x)
    for n, c, place in np.ndindex(2, 3, 3):
        pair = x[n, c, 2 * place : 2 * place + 2]
        expected[n, c, 2 * place + int(pair.argmax())] = r[n, c, place]
    torch.testing.assert_close(relevance(pool, x, r), expected)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)},
    "float": {"attn_mask": torch.where(torch.ones(5, 5).tril(1) > 0, 0.5, -math.inf).double()},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("attention", ["attn-lrp", "cp-lrp"])
@pytest.mark.parametrize("mask", MASKS)
def test_fused_attention_with_grouped_heads_and_masks(mask, attention):
    """4 heads of queries on 2 of keys and values."""
    settings = MASKS[mask]

    def parts(x):
        return x[:, :4], 2.0 * x[:, 4:6], x[:, 6:] * 3.0

    def fused(x):
        return F.scaled_dot_product_attention(*parts(x), enable_gqa=True, **settings)

    def written(x):
        q, k, v = parts(x)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = q @ k.mT * settings.get("scale", 0.5)  # type: ignore[attr-defined]
        if "attn_mask" in settings or "is_causal" in settings:
            given = settings.get("attn_mask", torch.ones(5, 5, dtype=torch.bool).tril())  # type: ignore[attr-defined]
            scores = scores + (torch.where(given, 0.0, -math.inf).double() if given.dtype == torch.bool else given)
        return scores.softmax(-1) @ v

    x, r = draw(2, 8, 5, 4), draw(2, 4, 5, 4, seed=1)
    torch.testing.assert_close(fused(x), written(x))
    torch.testing.assert_close(
        relevance(fused, x, r, attention=attention), relevance(written, x, r, attention=attention)
    )


@pytest.mark.parametrize("attention", ["attn-lrp", "cp-lrp"])
def test_a_bias_of_the_scores_that_is_computed_holds_relevance(attention):
    q = draw(2, 3, 4, 6)

    def values(bias):
        return q + bias.sum(-1, keepdim=True)

    def written(bias):
        return (q @ q.mT / math.sqrt(6) + bias).softmax(-1) @ values(bias)

    def fused(bias):
        return F.scaled_dot_product_attention(q, q, values(bias), bias)

    bias, r = draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 6, seed=2)
    torch.testing.assert_close(
        relevance(fused, bias, r, attention=attention), relevance(written, bias, r, attention=attention)
    )


def test_a_product_gives_half_to_each():
    def parts(x):
        return x.chunk(2, -1)

    x, r = draw(3, 8), draw(3, 4, seed=1)
    for product in (lambda x: parts(x)[0] * parts(x)[1], lambda x: torch.einsum("ij,ij->ij", *parts(x))):
        torch.testing.assert_close(relevance(product, x, r), torch.cat([r / 2, r / 2], -1))
    torch.testing.assert_close(relevance(lambda x: x * 3.0, x, torch.cat([r, r], -1)), torch.cat([r, r], -1))
    torch.testing.assert_close(relevance(lambda x: x**2, x, torch.cat([r, r], -1)), torch.cat([r, r], -1))
    torch.testing.assert_close(relevance(lambda x: x * x, x, torch.cat([r, r], -1)), torch.cat([r, r], -1))
    gated = relevance(nn.GLU(), x, r)
    torch.testing.assert_close(gated, torch.cat([r / 2, r / 2], -1))


@pytest.mark.parametrize(("rule", "attention"), list(zip(RULES, ["attn-lrp", "cp-lrp"] * 2, strict=True)))
def test_the_values_are_those_of_the_model(rule, attention):
    networks = [(cnn(bias=True, norm=nn.BatchNorm2d), draw(2, 2, 8, 8))]
    networks += [(TRANSFORMERS[kind](manner), draw(2, 6, 8)) for kind in TRANSFORMERS for manner in ("einsum", "fused")]
    for model, x in networks:
        for dtype in (torch.float, torch.bfloat16):
            model, given = model.to(dtype), x.to(dtype, copy=True).requires_grad_()
            with Propagation(convolution=rule, linear=rule, attention=attention):
                out = model(given)
            assert torch.equal(out, model(x.to(dtype)))
        model.double()


# the same network, written otherwise


class InPlace(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv1, self.norm1, _, self.conv2 = block.branch
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.conv2(out)
        out += x
        return out


@pytest.mark.parametrize("rule", RULES)
def test_in_place_operations_change_nothing(rule):
    model = cnn(bias=True, norm=nn.BatchNorm2d)
    other = nn.Sequential(*model)
    other[2], other[4], other[8] = nn.ReLU(inplace=True), InPlace(model[4]), nn.ReLU(inplace=True)
    x = draw(2, 2, 8, 8)
    assert torch.equal(model(x), other(x))
    one, two = (relevance(m, x, convolution=rule, linear=rule) for m in (model, other))
    torch.testing.assert_close(one, two)


def test_what_was_written_in_place_is_read_from_the_tensor():
    def written(x):
        y, z = x * 2.0, x * 3.0
        F.relu_(y)
        y.add_(z)
        y.mul_(z)
        return y

    def plain(x):
        return (F.relu(2.0 * x) + 3.0 * x) * (3.0 * x)

    x, r = draw(4, 3), draw(4, 3, seed=1)
    for sums in (False, True):
        torch.testing.assert_close(written(x), plain(x))
        torch.testing.assert_close(relevance(written, x, r, sums=sums), relevance(plain, x, r, sums=sums))


def test_batch_norm_is_not_folded_over_an_activation_in_place():
    one, other = (frozen(nn.Sequential(nn.Linear(4, 3), nn.ReLU(i), nn.BatchNorm1d(3))) for i in (False, True))
    other.load_state_dict(one.state_dict())
    x = draw(5, 4)
    torch.testing.assert_close(relevance(other, x, linear="z+"), relevance(one, x, linear="z+"))


def test_batch_norm_of_tokens_is_not_folded_into_a_linear_map():
    linear, norm, x = nn.Linear(3, 4), nn.BatchNorm1d(5), draw(2, 5, 3)
    model = frozen(nn.Sequential(linear, norm))
    apart = relevance(lambda x: norm(linear(x).clone()), x, linear="z+")
    torch.testing.assert_close(relevance(model, x, linear="z+"), apart)


def functional(model, x):
    x = F.max_pool2d(
        F.relu(
            F.batch_norm(
                F.conv2d(x, model[0].weight, model[0].bias, stride=2, padding=1),
                model[1].running_mean,
                model[1].running_var,
                model[1].weight,
                model[1].bias,
            )
        ),
        2,
    )
    branch = model[4].branch
    hidden = torch.relu(branch[1](torch.conv2d(x, branch[0].weight, branch[0].bias, padding=1)))
    x = torch.add(x, F.conv2d(input=hidden, weight=branch[3].weight, bias=branch[3].bias))
    x = F.linear(x.mean((2, 3)), model[7].weight, model[7].bias).clamp(min=0)
    return torch.addmm(model[9].bias, x, model[9].weight.T)


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_functional_glue_is_seen(rule):
    model, x = cnn(bias=True, norm=nn.BatchNorm2d), draw(2, 2, 8, 8)
    torch.testing.assert_close(functional(model, x), model(x))
    one, two = (relevance(m, x, convolution=rule, epsilon=1e-12) for m in (model, lambda x: functional(model, x)))
    torch.testing.assert_close(one, two)


def test_zennit_agrees():
    pytest.importorskip("zennit.composites")
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import LayerMapComposite
    from zennit.layer import Sum
    from zennit.rules import AlphaBeta, Epsilon, Gamma, Norm, Pass, ZPlus
    from zennit.types import Activation, AvgPool, Convolution
    from zennit.types import Linear as Dense

    class Summed(nn.Module):
        def __init__(self, branch):
            super().__init__()
            self.branch, self.sum = branch, Sum()

        def forward(self, x):
            return self.sum(torch.stack([x, self.branch(x)], -1))

    e = 1e-3
    rules = {"epsilon": Epsilon(e), "gamma": Gamma(0.4, e), "z+": ZPlus(e), "alpha-beta": AlphaBeta(2.0, 1.0, e)}
    x, r = draw(2, 2, 8, 8), draw(2, 3, seed=1)
    for conv, linear in [(c, d) for c in rules for d in rules]:
        model = cnn(bias=True, norm=nn.BatchNorm2d)
        other = nn.Sequential(*model)
        other[4] = Summed(model[4].branch)
        found = relevance(model, x, r, convolution=conv, linear=linear, epsilon=e, gamma=0.4)
        # theirs stabilizes sums and pools too, by too little to see
        layers = [(Activation, Pass()), (Sum, Norm(1e-12)), (AvgPool, Norm(1e-12))]
        layers += [(Convolution, rules[conv]), (Dense, rules[linear])]
        given = x.clone().requires_grad_()
        with LayerMapComposite(layers, canonizers=[SequentialMergeBatchNorm()]).context(other) as modified:
            for module in modified.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = 0.0  # zennit leaves it in the norms that it has merged
            (expected,) = torch.autograd.grad(modified(given), given, r)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


class LXT(nn.Module):
    """The decoder block of `transformer` in the explicit functions of lxt."""

    def __init__(self, block, attention):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x):
        from lxt.explicit import functional as lf
        from lxt.explicit.rules import epsilon_lrp, identity

        (norm1, attend), (norm2, mlp), norm3, head = (
            self.block[0].branch,
            self.block[1].branch,
            self.block[2],
            self.block[3],
        )

        def norm(module, x):
            if isinstance(module, nn.LayerNorm):
                return lf.layer_norm_grad_fn.apply(x, module.weight, module.bias, module.eps, 1e-12)
            return lf.rms_norm_identity(x, module.weight, 1e-6)

        def linear(module, x):
            return lf.linear_epsilon(x, module.weight, module.bias, 1e-12)

        h = norm(norm1, x)
        q, k, v = (linear(f, h).unflatten(-1, (2, 4)).transpose(1, 2) for f in (attend.q, attend.k, attend.v))
        mask = torch.where(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), 0.0, -1e9).double()
        if self.attention == "cp-lrp":
            weights = torch.softmax(q @ k.mT / 2 + mask, -1).detach()
            out = epsilon_lrp(torch.matmul, 1e-12, weights, v)
        else:
            scores = lf.mul2(lf.matmul(q, k.mT.contiguous(), epsilon=1e-12), torch.tensor(0.5))
            weights = lf.softmax(lf.add2(scores, mask, epsilon=1e-12), -1)
            out = lf.matmul(weights, v, epsilon=1e-12)
        x = lf.add2(x, linear(attend.out, out.transpose(1, 2).flatten(2)), epsilon=1e-12)
        h = norm(norm2, x)
        if isinstance(mlp, Gated):
            h = linear(mlp.down, lf.mul2(identity(F.silu, linear(mlp.gate, h)), linear(mlp.up, h)))
        else:
            h = linear(mlp[2], identity(F.gelu, linear(mlp[0], h)))
        return linear(head, norm(norm3, lf.add2(x, h, epsilon=1e-12)))


@pytest.mark.parametrize("attention", ["attn-lrp", "cp-lrp"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_lxt_agrees(kind, attention):
    pytest.importorskip("lxt.explicit.rules")
    model, x, r = TRANSFORMERS[kind](), draw(2, 6, 8), draw(2, 6, 5, seed=1)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(LXT(model, attention)(given), given, r)
    found = relevance(model, x, r, attention=attention, epsilon=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_softmax_by_hand_keeps_masked_scores_out():
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    x = draw(3, 4, 4)

    def softmax(x):
        parts = torch.exp(x.masked_fill(~mask, -math.inf))
        return parts / parts.sum(-1, keepdim=True)

    given = x.clone().requires_grad_()
    with Propagation():
        out = softmax(given)
    torch.testing.assert_close(out.detach(), x.masked_fill(~mask, -math.inf).softmax(-1))
    assert relevance(softmax, x).isfinite().all()
    torch.testing.assert_close(relevance(softmax, x).sum(), softmax(x).sum())


def test_log_softmax_is_a_shift():
    model, x = cnn(), draw(2, 2, 8, 8)
    found = relevance(lambda x: model(x).log_softmax(-1)[:, 1], x)
    torch.testing.assert_close(found, relevance(lambda x: model(x)[:, 1], x))
    barred = torch.tensor([[0.0, 0.0, -math.inf]])
    found = relevance(lambda x: (model(x) + barred).log_softmax(-1)[:, 1], x)
    torch.testing.assert_close(found, relevance(lambda x: model(x)[:, 1], x))


def test_arguments_by_name_and_operands_in_a_list():
    x, y = draw(2, 3), draw(2, 3, seed=1)
    torch.testing.assert_close(relevance(lambda x: F.gelu(input=x), x, y), y)
    found = relevance(lambda x: torch.einsum("ij,ij->ij", [x, F.relu(input=x) + x]), x, y)
    torch.testing.assert_close(found, y)


def test_operands_by_name():
    x = draw(2, 3, 3)
    for named, plain in (
        (lambda x: torch.mul(input=x[:1], other=x[1:]), lambda x: x[:1] * x[1:]),
        (lambda x: torch.mul(x[:1], other=x[1:]), lambda x: x[:1] * x[1:]),
        (lambda x: torch.bmm(input=x, mat2=2 * x), lambda x: torch.bmm(x, 2 * x)),
        (lambda x: torch.addmm(x[0], mat1=x[0], mat2=x[1]), lambda x: torch.addmm(x[0], x[0], x[1])),
    ):
        r = draw(*plain(x).shape, seed=1)
        torch.testing.assert_close(relevance(named, x, r), relevance(plain, x, r))


def test_what_is_written_through_a_view_holds_relevance():
    def through(x):
        out = torch.zeros(2, 6, dtype=torch.double)
        left, right = out[:, :3], out[:, 3:]
        left.copy_(2.0 * x)
        right += x
        return out * 3.0

    x, r = draw(2, 3), draw(2, 6, seed=1)
    torch.testing.assert_close(relevance(through, x, r), r[:, :3] + r[:, 3:])


def test_numbers_by_tensors_and_fractions():
    x, r = draw(2, 3), draw(2, 3, seed=1)
    torch.testing.assert_close(relevance(lambda x: 2.0 / x, x, r), r)
    torch.testing.assert_close(relevance(lambda x: torch.div(torch.tensor(2.0), x), x, r), r)
    total = relevance(lambda x: x / x.sum(-1, keepdim=True), x, r)
    torch.testing.assert_close(total, r)


# what has no rule


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@torch.library.custom_op("mpsearch_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


twice.register_autograd(lambda ctx, gradient: 2 * gradient)


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


class Then(nn.Module):
    """A linear layer, a function, and another."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class At(Then):
    """The same with the function at the end."""

    def forward(self, x):
        return self.function(self.last(self.first(x)))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last(F.linear(h, h.T @ h))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Then(torch.sin), "torch.sin"),
        (Then(lambda x: x.abs_().sqrt_()), "sqrt_"),
        (Then(lambda x: torch.fft.fft(x).real), "fft"),
        (Then(Doubled.apply), "Doubled"),
        (At(Doubled.apply), "Doubled"),
        (Then(twice), "twice"),
        (Then(torch.ops.aten.sin.default), "aten.sin"),
        (Then(lambda x: x * torch.logsumexp(x, -1, keepdim=True)), "torch.logsumexp"),
        (Then(lambda x: torch.cumprod(x, -1)), "torch.cumprod"),
        (Then(lambda x: F.batch_norm(x, None, None, training=True)), "statistics of the batch"),
        (Mixing(), "weight depends on the input"),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)), "cut off"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(model, name):
    settings = LRP(attention="cp-lrp")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(mps.EstimatorError, match=name):
        mps.profile(model, [torch.randn(5, 3)], settings, mps.precisions("w4"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", [Then, At])
def test_scripted_code_is_refused_by_name(kind):
    with pytest.raises(mps.EstimatorError, match=r"Sin.*torch functions do not show"):
        mps.profile(kind(torch.jit.script(Scripted())), [torch.randn(5, 3)], LRP(), mps.precisions("w4"))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("settings", [LRP(), LRP(score="branch"), LRPQViT(), MixQViT()])
def test_the_model_is_as_it_was_after_ctrl_c(settings, where):
    def stop(_gradient=None):
        raise KeyboardInterrupt

    class Stopping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.norm(self.first(x))
            if not h.requires_grad:
                return self.last(h)
            stop() if where == "forward" else h.register_hook(stop)
            return self.last(h)

    model, generator = Stopping().train(), torch.get_rng_state()
    model.first.bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        mps.profile(model, [torch.ones(5, 3)], settings, mps.precisions("w4"), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.first.parameters()] == [True, False]
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch._C._len_torch_function_stack() == 0


def test_checkpoints_of_activations_are_refused():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            inner = torch.utils.checkpoint.checkpoint(lambda y: torch.relu(self.first(y)), x, use_reentrant=False)
            return self.last(inner)

    with pytest.raises(mps.EstimatorError, match=r"cannot go through torch\.utils\.checkpoint: turn it off"):
        mps.profile(Again(), [torch.randn(5, 3)], LRP(), mps.precisions("w4"), progress=False)


def test_a_recurrent_layer_is_refused_by_name():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.cell = nn.Linear(3, 4), nn.LSTM(4, 2, batch_first=True)

        def forward(self, x):
            return self.cell(self.first(x))[0][:, -1]

    with pytest.raises(mps.EstimatorError, match="lstm"):
        mps.profile(Recurrent(), [torch.randn(5, 2, 3)], LRP(), mps.precisions("w4"))


def test_an_in_place_denominator_is_refused_but_not_a_plain_one():
    model = Then(lambda x: x / (x * x).mean(-1, keepdim=True).sqrt())
    assert (mps.profile(model, [torch.randn(5, 3)], LRP(), mps.precisions("w4")).sensitivity > 0).all()


def test_a_layer_that_torch_functions_do_not_show_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight, self.bias)

    with pytest.raises(mps.EstimatorError, match=r"layer '0'.*changed on the way"):
        mps.profile(nn.Sequential(Scaled(3, 4), nn.Linear(4, 2)), [torch.randn(5, 3)], LRP(), mps.precisions("w4"))


# layer scores


def profiled(model, batches, settings, options="w4", **keywords):
    return mps.profile(model, batches, settings, mps.precisions(options), progress=False, **keywords)


def tenth(weight, precision):
    """Relative squared error 0.01."""
    return 1.1 * weight if precision.quantizes_weight else weight


def test_absolute_scores_against_a_loop_over_samples():
    """Relevance of layer outputs from the part of the network behind each, one sample at a time."""
    model, x = cnn(bias=True), draw(5, 2, 8, 8)
    labels = torch.tensor([0, 2, 1, 1, 0])
    table = profiled(model, [(x[:3], labels[:3]), (x[3:], labels[3:])], LRP("z+", "gamma"), quantizer=tenth)
    behind = {"0": (0, 1), "7": (7, 8), "9": (9, 10)}
    for name, (place, end) in behind.items():
        sums, totals = [], []
        for image, label in zip(x, labels, strict=True):
            hidden = model[: place + 1](image[None])
            r = relevance(lambda h, e=end, y=label: model[e:](h)[:, y], hidden, None, convolution="z+", linear="gamma")
            sums.append(float(r.abs().sum()))
            totals.append(abs(float(model(image[None])[0, label])))
        expected = np.mean(sums) / np.mean(totals) * 0.01
        row = [layer.name for layer in table.layers].index(name)
        assert table.sensitivity[row, 0] == pytest.approx(expected, rel=1e-6)
        se = np.std(sums, ddof=1) / math.sqrt(5) / np.mean(totals) * 0.01
        assert table.sensitivity_se[row, 0] == pytest.approx(se, rel=1e-6)


def test_the_predicted_class_is_explained_where_there_are_no_labels():
    model, x = cnn(), draw(5, 2, 8, 8)
    with_labels, without = (profiled(model, [b], LRP()).sensitivity for b in ((x, model(x).argmax(-1)), x))
    np.testing.assert_allclose(with_labels, without, rtol=1e-12)
    others = profiled(model, [(x, model(x).argmin(-1))], LRP()).sensitivity
    assert not np.allclose(others, without)


def two_branches():
    """y = h + b2(relu(b1(h))), h = stem(x), logits = head(y), by hand: one number wide."""
    model = nn.Sequential(nn.Linear(1, 1), Residual(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), nn.Linear(1, 1))
    for module, weight in zip(
        (model[0], model[1].branch[0], model[1].branch[2], model[2]), (2.0, 3.0, 0.5, -1.0), strict=True
    ):
        module.weight.data.fill_(weight)
        module.bias.data.zero_()
    return model


def test_branch_shares_by_hand():
    """x = 1: h = 2, branch = 3, of 5; x = -1: h = -2, branch = 0."""
    model = two_branches()
    table = profiled(model, [torch.tensor([[1.0], [-1.0]])], LRP(score="branch"), quantizer=tenth)
    np.testing.assert_allclose(table.sensitivity[:, 0], 0.01 * np.array([1.0, 0.3, 0.3, 1.0]), rtol=1e-5)
    np.testing.assert_allclose(table.sensitivity_se[:, 0], 0.01 * np.array([0.0, 0.3, 0.3, 0.0]), rtol=1e-5, atol=1e-9)
    table = profiled(model, [torch.tensor([[-1.0], [-2.0]])], LRP(score="branch"), quantizer=tenth)
    assert table.sensitivity[:, 0].tolist() == pytest.approx([0.01, 0, 0, 0.01])  # a branch of zeros


def test_opposing_branches_have_shares_of_their_sizes():
    """H = 2, branch = -3 / 2 h = -3: shares 2/5 and 3/5, not -2 and 3."""
    model = two_branches()
    model[1].branch[2].weight.data.fill_(-0.5)
    table = profiled(model, [torch.tensor([[1.0]])], LRP(score="branch"), quantizer=tenth)
    np.testing.assert_allclose(table.sensitivity[:, 0], 0.01 * np.array([1.0, 0.6, 0.6, 1.0]), rtol=1e-5)


def test_shares_of_the_innermost_branch_and_of_a_shortcut_with_a_layer():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shortcut, self.inner, self.head = (nn.Linear(2, 2) for _ in range(4))
            self.deep = Residual(nn.Linear(2, 2))

        def forward(self, x):
            h = self.stem(x)
            outer = self.deep(self.inner(h))
            outer += self.shortcut(h)
            return self.head(F.relu_(outer))

    torch.manual_seed(3)
    model, x = frozen(Shortcut()), draw(1, 2)
    table = profiled(model, [x], LRP(score="branch"), quantizer=tenth)
    found = dict(zip((layer.name for layer in table.layers), table.sensitivity[:, 0] / 0.01, strict=True))
    h = model.stem(x)
    a, b = model.deep(model.inner(h)), model.shortcut(h)
    logit = model.head((a + b).relu()).argmax()
    r = relevance(lambda s: model.head(s.relu())[:, logit], a + b) / (a + b)
    ra, rb = abs(float((a * r).sum())), abs(float((b * r).sum()))
    c = model.inner(h)
    rc, rd = (abs(float((t * r).sum())) for t in (c, model.deep.branch(c)))
    expected = {
        "stem": 1.0,
        "head": 1.0,
        "shortcut": rb / (ra + rb),
        "inner": ra / (ra + rb),
        "deep.branch.0": rd / (rc + rd),
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_sum_beside_the_way_to_the_output_is_no_branch():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.other, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.stem(x)
            return self.head(h), h.clone() + self.other(x)

    table = profiled(Beside(), [torch.randn(4, 3)], LRP(score="branch"), quantizer=tenth)
    assert table.sensitivity[:, 0] / 0.01 == pytest.approx([1, 0, 1], rel=1e-5)


def test_a_part_without_gradients_is_refused():
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            with torch.no_grad():
                h = self.stem(x)
            return self.head(h)

    with pytest.raises(mps.EstimatorError, match=r"layer 'stem'.*run without gradients"):
        profiled(Still(), [torch.randn(4, 3)], LRP())


def test_a_summand_that_is_overwritten_later_is_refused():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.first(x)
            y = h + self.second(h)
            h.mul_(2.0)
            return self.head(y)

    model = Overwriting()
    assert (profiled(model, [torch.randn(4, 3)], LRP()).sensitivity > 0).all()
    with pytest.raises(mps.EstimatorError, match="overwritten"):
        profiled(model, [torch.randn(4, 3)], LRP(score="branch"))


def test_scores_become_cells_by_relative_squared_error():
    model, x = cnn(), draw(5, 2, 8, 8).float()
    model = model.float()
    table = profiled(model, [x], LRP(), "w2 w4 w16 w16a4")
    unit = profiled(model, [x], LRP(), quantizer=lambda w, p: 2 * w).sensitivity[:, 0]
    quantizer = RoundToNearest()
    for row, layer in enumerate(table.layers):
        weight = model.get_submodule(layer.name).weight
        for column in (0, 1):
            error = quantizer(weight, table.precisions[column]) - weight
            expected = unit[row] * float(error.square().sum() / weight.square().sum())
            assert table.sensitivity[row, column] == pytest.approx(expected, rel=1e-5)
    assert (table.sensitivity[:, 2] == 0).all()
    assert (table.sensitivity[:, 3] > 0).all()
    assert table.unit == "relative"


def test_relevance_of_every_layer_of_a_decoder():
    """GPT-2's transposed linear layers, positions and tokens, a tied head, padding, labels shifted by hand."""

    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.nf = outputs
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 3), nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(6, 8)
            self.mix, self.back, self.head = Conv1D(24, 8), Conv1D(8, 8), nn.Linear(8, 7, bias=False)
            self.norm, self.head.weight = nn.LayerNorm(8), self.tokens.weight

        def forward(self, input_ids, attention_mask):
            h = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
            q, k, v = self.mix(self.norm(h)).split(8, -1)
            allowed = attention_mask[:, None].bool() & torch.ones(6, 6).tril().bool()
            h = h + self.back(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))
            return {"logits": self.head(h)}

    torch.manual_seed(0)
    model = Decoder()
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": torch.randint(0, 7, (3, 6)), "attention_mask": mask}
    batch["labels"] = batch["input_ids"].roll(-1, 1)
    for settings in (LRP(), LRP(score="branch"), LRP(linear="gamma"), LRP(attention="cp-lrp", score="branch")):
        table = profiled(model, [batch], settings, quantizer=tenth)
        assert [layer.name for layer in table.layers] == ["tokens", "positions", "mix", "back", "head"]
        assert (table.sensitivity > 0).all()
    found = dict(zip((layer.name for layer in table.layers), table.sensitivity[:, 0] / 0.01, strict=True))
    assert found["mix"] == pytest.approx(found["back"])
    # tokens and positions meet in one sum; the tied head adds 1 to the tokens, and the two of a group share alike
    assert 2 * found["tokens"] - 1 + found["positions"] == pytest.approx(1, rel=1e-5)
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][1, 4:] = 3  # padded
    same = profiled(model, [other], LRP(attention="cp-lrp", score="branch"), quantizer=tenth)
    np.testing.assert_array_equal(same.sensitivity, table.sensitivity)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models_of_transformers(kind):
    """Relevance of tokens is conserved (no biases) and the same for eager and fused attention; every layer has some."""
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 17, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        settings = transformers.LlamaConfig(
            **size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
        kind_of_model = transformers.LlamaForCausalLM
    else:
        settings = transformers.GPT2Config(**size, n_embd=16, n_layer=2, n_head=4, n_positions=16)
        kind_of_model = transformers.GPT2LMHeadModel
    made = []
    for manner in ("eager", "sdpa"):
        settings._attn_implementation = manner
        torch.manual_seed(0)
        made.append(kind_of_model(settings).double().eval().requires_grad_(False))
        assert made[-1].config._attn_implementation == manner
    batch = {"input_ids": torch.arange(12).reshape(2, 6) + 3}
    for attention in ("attn-lrp", "cp-lrp"):
        tables = [profiled(model, [batch], LRP(attention=attention), quantizer=tenth) for model in made]
        np.testing.assert_allclose(tables[0].sensitivity, tables[1].sensitivity, rtol=1e-6, atol=1e-12)
        silent = {layer.name for layer, row in zip(tables[0].layers, tables[0].sensitivity, strict=True) if row[0] == 0}
        ends = ("q_proj", "k_proj") if attention == "cp-lrp" else ()
        assert all(name.endswith(ends) for name in silent)
    model = made[1]
    if kind == "gpt2":
        model.transformer.wpe.weight.zero_()  # the positions would take their part
    x = draw(2, 6, 16)
    explained = model(inputs_embeds=x).logits.amax(-1).sum()
    found = relevance(lambda x: model(inputs_embeds=x).logits.amax(-1), x, attention="cp-lrp", epsilon=1e-13)
    torch.testing.assert_close(found.sum(), explained, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision(dtype, tolerance, rule):
    """As in single precision on the same weights and inputs, whose contributions of one sign are often none."""
    networks = [(cnn(bias=True, norm=nn.BatchNorm2d), draw(4, 2, 8, 8))]
    networks += [(TRANSFORMERS[kind]("fused"), draw(4, 6, 8)) for kind in TRANSFORMERS]
    for model, x in networks:
        rounded, x = model.to(dtype), x.to(dtype)
        half = profiled(rounded, [x], LRP(rule, rule), quantizer=tenth).sensitivity
        full = profiled(rounded.float(), [x.float()], LRP(rule, rule), quantizer=tenth).sensitivity
        np.testing.assert_allclose(half, full, rtol=tolerance, atol=tolerance * float(full.max()))


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_of_small_and_large_numbers(rule):
    """Quotients are kept finite, so that values stay; the variance of large inputs does not overflow."""
    linear = nn.Linear(8, 16, bias=False, dtype=torch.half).requires_grad_(False)
    x = torch.cat([draw(20, 8) * 10.0 ** torch.arange(-7, 3).repeat(2)[:, None], torch.zeros(2, 8).double()]).half()
    assert relevance(linear, -x.abs() if rule == "z+" else x.relu(), linear=rule).isfinite().all()
    opposed = torch.tensor([[1e-5, -10.0]]).half()
    with Propagation(linear=rule):
        out = F.linear(opposed.requires_grad_(), torch.ones(1, 2).half())
    assert out.tolist() == [[-10.0]]
    for function in (torch.sigmoid, F.gelu, F.silu, torch.exp):
        assert relevance(function, x).isfinite().all()
    large = (300 * draw(3, 8)).half()
    r = draw(3, 8, seed=1).half()
    exact = relevance(nn.LayerNorm(8, elementwise_affine=False), large.double(), r.double())
    norm = relevance(nn.LayerNorm(8, elementwise_affine=False, dtype=torch.half), large, r)
    torch.testing.assert_close(norm.double(), exact, rtol=0.02, atol=0.02)


def test_queries_and_keys_have_no_relevance_under_cp_lrp():
    model, x = TRANSFORMERS["vit"]().float(), draw(3, 6, 8).float()
    names = [f"0.branch.1.{part}" for part in "qkv"]
    for settings, empty in (
        (LRP(attention="cp-lrp"), True),
        (LRP(attention="cp-lrp", score="branch"), True),
        (LRP(), False),
    ):
        table = profiled(model, [x], settings, groups="none")
        rows = {layer.name: row for layer, row in zip(table.layers, table.sensitivity, strict=True)}
        assert [bool(rows[name][0] > 0) for name in names] == [not empty, not empty, True]


@pytest.mark.parametrize("settings", [LRP(epsilon=0.5), LRP("gamma", gamma=2.0), LRP("alpha-beta", alpha=3.0)])
def test_settings_change_scores(settings):
    model, x = cnn(), draw(5, 2, 8, 8)
    plain = LRP(settings.convolution)
    assert not np.allclose(profiled(model, [x], settings).sensitivity, profiled(model, [x], plain).sensitivity)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"convolution": "w2"}, "convolution='w2': expected one of epsilon, gamma"),
        ({"linear": "x"}, "linear='x'"),
        ({"attention": "x"}, "expected one of attn-lrp, cp-lrp"),
        ({"score": "sum"}, "score='sum'"),
        ({"epsilon": -1.0}, "epsilon=-1.0: expected 0 or more"),
        ({"gamma": math.nan}, "gamma=nan"),
        ({"alpha": 0.5}, "alpha=0.5: expected 1 or more"),
    ],
)
def test_wrong_settings_are_refused(keywords, message):
    with pytest.raises(mps.EstimatorError, match=message):
        LRP(**keywords)


@pytest.mark.parametrize("score", ["absolute", "branch"])
def test_samples_in_parts_or_at_once(score):
    model, x = cnn(bias=True, norm=nn.BatchNorm2d), draw(7, 2, 8, 8)
    one, two = (profiled(model, b, LRP(score=score)) for b in ([x], [x[:2], x[2:]]))
    np.testing.assert_allclose(one.sensitivity, two.sensitivity, rtol=1e-9)
    np.testing.assert_allclose(one.sensitivity_se, two.sensitivity_se, rtol=1e-6)


def test_passes():
    model, batches = cnn().float(), [draw(5, 2, 8, 8).float(), draw(3, 2, 8, 8).float()]
    for settings in (LRP(), LRP(score="branch"), LRPQViT()):
        assert settings.cost(2, 5, 1) == Passes(1, 1)
        assert profiled(model, batches, settings).origin["passes"] == {"forward": 1, "backward": 1}
    measured = profiled(model, batches, KLDivergence()).origin["passes"]
    mixed = profiled(model, batches, MixQViT()).origin["passes"]
    assert mixed == {"forward": pytest.approx(measured["forward"] + 1), "backward": 1}
    forecast = MixQViT().cost(2, 5, 1)
    assert mixed["forward"] <= forecast.forward
    assert forecast == Passes(KLDivergence().cost(2, 5, 1).forward + 1, 1)


@pytest.mark.parametrize("settings", [LRP(), LRP("z+", "gamma", "cp-lrp", "branch"), LRPQViT(), MixQViT()])
def test_contract(settings):
    check_estimator(settings)


# LRP-QViT and Mix-QViT


def test_lrp_qvit_gives_bits_in_order_of_relevance():
    model, x = cnn().float(), draw(5, 2, 8, 8).float()
    score = profiled(model, [x], LRP("z+"), quantizer=lambda w, p: 2 * w).sensitivity[:, 0]
    table = profiled(model, [x], LRPQViT(LRP("z+")), "w2 w4 w4a8 w16")
    share = score / score.sum()
    np.testing.assert_allclose(table.sensitivity, np.outer(share, [14 / 32, 12 / 32, 20 / 32, 0]), rtol=1e-6)
    assert table.unit == "relative"
    assert (profiled(model, [x], LRPQViT(), "w2 w8", quantizer=lambda w, p: w).sensitivity == 0).all()


@pytest.mark.parametrize("limit", ["30%", "40%", "55%"])
def test_the_cheapest_plan_of_lrp_qvit_has_the_most_bits_by_relevance(limit):
    """Against an enumeration of all plans."""
    model, x = cnn().float(), draw(5, 2, 8, 8).float()
    score = profiled(model, [x], LRP(), quantizer=lambda w, p: 2 * w).sensitivity[:, 0]
    table = profiled(model, [x], LRPQViT(), "w2 w4a8 w8", resources=("memory_bytes",))
    solution = mps.solve(table, mps.Budget(memory_bytes=limit))
    budget = float(limit.rstrip("%")) / 100 * table.reference_usage["memory_bytes"] - table.fixed_usage["memory_bytes"]
    bits = np.array([p.weight_bits + min(p.activation_bits, 16) for p in table.precisions])
    usage, rows = table.usage["memory_bytes"], np.arange(len(score))
    fitting = [o for o in np.ndindex(*[3] * len(score)) if usage[rows, list(o)].sum() <= budget]
    best = max(float((score * bits[list(o)]).sum()) for o in fitting)
    chosen = [table.precisions.index(solution.plan[layer.name]) for layer in table.layers]
    assert float((score * bits[chosen]).sum()) == pytest.approx(best, rel=1e-9)


def test_mix_qvit_is_relevance_times_measured_divergence():
    model, x = cnn().float(), draw(5, 2, 8, 8).float()
    lrp = LRP(score="branch")
    score = profiled(model, [x], lrp, quantizer=lambda w, p: 2 * w).sensitivity[:, 0]
    measured = profiled(model, [x], KLDivergence(), "w2 w4 w16")
    table = profiled(model, [x], MixQViT(lrp), "w2 w4 w16")
    np.testing.assert_allclose(table.sensitivity, (score / score.sum())[:, None] * measured.sensitivity, rtol=1e-6)
    assert (table.sensitivity_se[:, 0] > 0).all()
    assert (table.sensitivity[:, 2] == 0).all()
    assert table.unit == "relative"
