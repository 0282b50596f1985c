"""Parameters that functions read, and not layers, are decisions: evaluated as a copy of the model that has the quantized numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.models.modules.functional import operands
from mpsearch.models.modules.weights import canonical, layer_of, operands_of, restore
from mpsearch.models.running import call, preserved
from mpsearch.quantizers.input_statistics import input_statistics
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import FisherProjection, KLDivergence

W16 = mps.Precision("16")


def normal(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


class Reads(nn.Module):
    """One parameter of a shape, read by a function."""

    def __init__(self, shape, read):
        super().__init__()
        self.first, self.matrix, self.read = nn.Linear(5, 6), normal(*shape), read

    def forward(self, x):
        return self.read(torch.tanh(self.first(x)), self.matrix)


def slices(h, w):
    """As experts behind each other in one matrix (experts x ffn, hidden)."""
    parts = w.view(3, 4, 6)
    return sum(torch.relu(h @ parts[i].T) @ parts[i] for i in range(3))


#: shape of the parameter, how it is read (h: (4, 7, 6)), kind, shape for quantizers, MACs of a sample
READS = {
    "linear": ((4, 6), F.linear, "linear", (4, 6), 7 * 24),
    "linear, bias": ((4, 6), lambda h, w: F.linear(h, w, w.new_ones(4)), "linear", (4, 6), 7 * 24),
    "@": ((6, 4), lambda h, w: h @ w, "linear", (4, 6), 7 * 24),
    "matmul of a transpose": ((4, 6), lambda h, w: torch.matmul(h, w.T), "linear", (4, 6), 7 * 24),
    "from the left": ((7, 7), lambda h, w: w @ h, "linear", (7, 7), 7 * 7 * 6),
    "addmm": ((6, 4), lambda h, w: torch.addmm(w.new_ones(4), h[:, 0], w, alpha=2.0), "linear", (4, 6), 24),
    "bmm": ((3, 6, 4), lambda h, w: torch.bmm(h.mean(1)[None].expand(3, -1, -1), w).sum(0), "linear", (12, 6), 3 * 24),
    "bmm, out first": ((3, 4, 6), lambda h, w: torch.bmm(h.mean(1)[None].expand(3, -1, -1), w.mT).sum(0), "linear", (12, 6), 72),
    "einsum": ((6, 2, 3), lambda h, w: torch.einsum("bth,hnd->btnd", h, w).flatten(2), "linear", (6, 6), 7 * 36),
    "einsum, two summed": ((4, 2, 3), lambda h, w: torch.einsum("btnd,hnd->bth", h.unflatten(2, (2, 3)), w), "linear", (4, 2, 3), 168),
    "einsum, ellipsis": ((4, 6), lambda h, w: torch.einsum("...i,oi->...o", h, w), "linear", (4, 6), 7 * 24),
    "einsum of experts": ((3, 6, 4), lambda h, w: torch.einsum("bth,eho->beto", h, w).sum(1), "linear", (12, 6), 7 * 72),
    "tensordot": ((6, 4), lambda h, w: torch.tensordot(h, w, 1), "linear", (4, 6), 7 * 24),
    "conv1d": ((4, 6, 3), lambda h, w: F.conv1d(h.mT, w, None, 1, 1).mT, "conv1d", (4, 6, 3), 7 * 72),
    "depthwise": ((6, 1, 3), lambda h, w: F.conv1d(h.mT, w, padding=1, groups=6).mT, "conv1d", (6, 1, 3), 7 * 18),
    "lookup": ((9, 6), lambda h, w: h + F.embedding((h[..., 0] > 0).long(), w), "embedding", (9, 6), 0),
    "slices of a matrix": ((12, 6), slices, "linear", (12, 6), 2 * 7 * 72),
    "slices, summed over": (
        (12, 6), lambda h, w: sum(torch.relu(h[..., :4] @ w.view(3, 4, 6)[i]) for i in range(3)), "linear", (18, 4), 7 * 72,
    ),
    "twice": ((6, 6), lambda h, w: F.linear(torch.tanh(F.linear(h, w)), w), "linear", (6, 6), 2 * 7 * 36),
}  # fmt: skip


def data():
    return [torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def model_of(name):
    torch.manual_seed(0)
    shape, read, *_ = READS[name]
    return Reads(shape, read).eval()


def by_hand(model, name, precision):
    """A copy of the model whose layer has the quantized numbers."""
    with preserved(model, data()[0]):
        layer = layer_of(model, name)
        value = restore(layer, RoundToNearest()(canonical(layer).detach(), precision))
        place = next(n for n, p in model.named_parameters() if p is layer.weight)
    changed = copy.deepcopy(model)
    changed.get_parameter(place).data = value
    return changed


@pytest.mark.parametrize("name", READS)
def test_a_parameter_that_a_function_reads(name):
    _, _, kind, shape, macs = READS[name]
    model = model_of(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    layer, first = mps.layers(model, data()[0])
    assert (layer.name, layer.kind, layer.weight_shape, layer.macs) == ("matrix", kind, shape, macs)
    options = mps.precisions("w2 w3")
    table = mps.profile(model, data(), KLDivergence(), options, layers=[layer, first], progress=False)
    for column, precision in enumerate(options):
        found = mps.evaluate(model, data(), mps.Plan({"first": W16, "matrix": precision}), metric="kl", progress=False)
        changed, kl = by_hand(model, "matrix", precision), []
        for x in data():
            p, q = (F.log_softmax(net(x), -1).double() for net in (model, changed))
            kl.append(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
        assert found.kl == pytest.approx(float(sum(kl)) / 2, rel=1e-4)
        assert table.sensitivity[0, column] == pytest.approx(found.kl, rel=1e-9)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert operands_of(model).decided == {}


@pytest.mark.parametrize("name", READS)
def test_calls_that_are_watched_make_the_same_output_and_gradient(name):
    model, x = model_of(name), data()[0].requires_grad_()
    plain = model(x)
    expected = torch.autograd.grad(plain.square().sum(), [x, model.matrix])
    calls = []
    with preserved(model, data()[0]):
        layer_of(model, "matrix").register_forward_hook(lambda module, args, y: calls.append(args))
        watched = model(x)
        found = torch.autograd.grad(watched.square().sum(), [x, model.matrix])
    assert calls
    torch.testing.assert_close(watched, plain)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in READS if name not in ("from the left", "lookup")])
def test_inputs_are_quantized_too(name):
    model = model_of(name)
    plans = [mps.Plan({"first": W16, "matrix": precision}) for precision in (W16, mps.Precision("16", "4"))]
    none, some = (mps.evaluate(model, data(), plan, metric="kl", progress=False).kl for plan in plans)
    assert none == 0 < some


@pytest.mark.parametrize("name", ["linear", "@", "einsum", "conv1d", "twice", "lookup"])
def test_gradients_of_samples_tell_the_same_as_those_of_one_sample_at_a_time(name):
    """First-order estimates of the layer, against a model whose parameter is differentiated by autograd."""
    model, precision = model_of(name), mps.Precision("3")
    table = mps.profile(model, data(), FisherProjection(draws=1), [precision], progress=False)
    alone = [x[None] for batch in data() for x in batch]
    again = mps.profile(model, alone, FisherProjection(draws=1), [precision], progress=False)
    assert 0 < table.sensitivity[0, 0] < 20 * again.sensitivity[0, 0] < 400 * table.sensitivity[0, 0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)
        self.cell, self.head = nn.GRUCell(12, 5), nn.Bilinear(5, 5, 3)
        self.bag = nn.EmbeddingBag(9, 5, mode="sum")

    def forward(self, ids):
        h = self.cell(self.lstm(self.table(ids))[0][:, -1]) + self.bag(ids)
        return self.head(h, h)


def test_modules_that_hold_several_matrices():
    torch.manual_seed(0)
    model, ids = Recurrent().eval(), torch.randint(0, 9, (3, 7))
    found = {layer.name: layer for layer in mps.layers(model, ids)}
    assert list(found) == [
        "table",
        *(f"lstm.weight_{part}_l{n}{way}" for n in (0, 1) for way in ("", "_reverse") for part in ("ih", "hh")),
        "cell.weight_ih", "cell.weight_hh", "head", "bag",
    ]  # fmt: skip
    assert found["lstm.weight_hh_l1"].macs == 7 * 24 * 6
    assert found["lstm.weight_ih_l1_reverse"].macs == 7 * 24 * 12
    assert (found["head"].kind, found["head"].macs, found["bag"].kind) == ("bilinear", 75, "embedding")
    assert sum(layer.numel for layer in found.values()) == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    before = model(ids)
    table = mps.profile(model, [ids], FisherProjection(), mps.precisions("w2 w4 w4a8"), progress=False)
    free = [layer.name for layer, row in zip(table.layers, table.sensitivity, strict=True) if not row.all()]
    assert free == ["lstm.weight_hh_l1_reverse", "cell.weight_hh"]  # whose state is 0
    assert torch.equal(model(ids), before)
    statistics = input_statistics(model, [ids])
    assert statistics["lstm.weight_hh_l0"].gram.shape == (1, 6, 6)


class Tied(nn.Module):
    """A head by a function; a layer of which only the weight is read."""

    def __init__(self):
        super().__init__()
        self.table, self.scan, self.unused = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return F.linear(self.table(ids) @ self.scan.weight.T, self.table.weight)


def test_weights_of_layers_that_functions_read():
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 20, (3, 5))
    with pytest.warns(UserWarning, match="never calls unused"):
        found = {layer.name: layer.macs for layer in mps.layers(model, ids)}
    assert found == {"table": 5 * 160, "scan": 5 * 64}
    layers = [mps.Layer("table", "embedding", (20, 8)), mps.Layer("scan", "linear", (8, 8))]
    estimators = [FisherProjection(), KLDivergence()]
    tables = mps.profile(model, [ids], estimators, mps.precisions("w3 w4"), layers=layers, progress=False)
    assert (tables[0].sensitivity > 0).all()
    assert (
        mps.evaluate(
            model, [ids], mps.Plan({"scan": mps.Precision("16", "3"), "table": W16}), metric="kl", progress=False
        ).kl
        > 0
    )


def test_what_nobody_watches_runs_as_it_is():
    """The same numbers bit for bit, by the functions of the model."""
    torch.manual_seed(0)
    model, ids = Recurrent().eval(), torch.randint(0, 9, (3, 7))
    with torch.no_grad():
        expected = model(ids)
        with operands(model, ids, call):
            assert torch.equal(model(ids), expected)


def test_a_table_that_is_added_is_no_decision():
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.first = normal(5, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x + self.positions)

    with pytest.warns(UserWarning, match="positions"):
        assert [layer.name for layer in mps.layers(Positioned(), torch.ones(2, 5, 4))] == ["first"]


def test_a_target_has_no_name_for_them():
    model = model_of("@")
    with pytest.warns(UserWarning, match="torchao has no name for matrix: left alone"):
        assert [layer.name for layer in mps.layers(model, data()[0], target="torchao")] == ["first"]


def test_a_read_inside_vmap_is_told_and_left_alone():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.first = normal(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(torch.vmap(lambda row: self.matrix @ row)(x))

    with pytest.warns(UserWarning, match="matrix"):
        assert [layer.name for layer in mps.layers(Mapped(), torch.ones(2, 4))] == ["first"]


@pytest.mark.parametrize("estimator", [mps.sensitivity.ChannelFisher(), mps.sensitivity.SalienceGroups()])
def test_channels_of_a_matrix_that_is_read_both_ways_round_are_refused_by_name(estimator):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = normal(4, 6)

        def forward(self, x):
            return torch.relu(x @ self.matrix) @ self.matrix.T

    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    with pytest.raises(mps.EstimatorError, match=r"'matrix' .* both ways round"):
        mps.profile(Tied(), [batch], estimator, mps.precisions("w2 w4"), progress=False)
