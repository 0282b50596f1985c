"""`evaluate` against forward passes written out."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.metrics.statistics import Mean


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in (7, 4, 9)]


def halve(weight, precision):
    return weight * (1 - 1 / 2**precision.weight_bits)


PLAN = mps.Plan({"0": mps.Precision("2"), "2": mps.Precision("4")})


def test_every_number_against_a_loop_over_samples():
    net = model()
    found = mps.evaluate(net, batches(), PLAN, quantizer=halve)
    quantized = model()
    with torch.no_grad():
        quantized[0].weight *= 0.75
        quantized[2].weight *= 1 - 1 / 16
    kl, loss, hit, reference = [], [], [], []
    for x, y in ((x, y) for batch in batches() for x, y in zip(*batch, strict=True)):
        p, q = (m(x).detach().double().softmax(0) for m in (net, quantized))
        kl.append(sum(float(a * (a.log() - b.log())) for a, b in zip(p, q, strict=True)))
        loss.append(-float(q[y].log()))
        reference.append(-float(p[y].log()))
        hit.append(float(q.argmax() == y))
    for values, mean, se in (
        (kl, found.kl, found.kl_se),
        (loss, found.loss, found.loss_se),
        (hit, found.accuracy, found.accuracy_se),
    ):
        assert mean == pytest.approx(np.mean(values), rel=1e-5)
        assert se == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-5)
    assert found.num_samples == 20
    assert found.reference.kl == 0
    assert found.reference.loss == pytest.approx(np.mean(reference), rel=1e-6)


def test_a_plan_that_changes_nothing_has_no_divergence():
    found = mps.evaluate(model(), batches(), mps.Plan({"0": mps.Precision("16")}))
    assert (found.kl, found.kl_se) == (0, 0)
    assert found.loss == found.reference.loss


def test_weights_on_the_grid_have_no_divergence():
    net = model()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(torch.randint(-7, 8, layer.weight.shape) * 0.3)
            layer.weight[:, 0] = torch.tensor(7) * 0.3  # every channel reaches its largest code
    assert mps.evaluate(net, batches(), mps.Plan({"0": mps.Precision("4"), "2": mps.Precision("4")})).kl == 0


def test_without_labels():
    found = mps.evaluate(model(), [x for x, _ in batches()], PLAN)
    assert (found.loss, found.accuracy, found.loss_se) == (None, None, None)
    assert found.kl > 0


def test_own_loss_and_metric():
    found = mps.evaluate(
        model(),
        batches(),
        PLAN,
        loss=lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]),
        metric=lambda m, batch: float((m(batch[0]).argmax(-1) == batch[1]).double().mean()),
    )
    plain = mps.evaluate(model(), batches(), PLAN)
    assert found.loss == pytest.approx(plain.loss, rel=1e-6)
    assert found.metric == pytest.approx(plain.accuracy, rel=1e-6)
    assert found.reference.metric == pytest.approx(plain.reference.accuracy, rel=1e-6)


def test_tokens_of_a_sequence_are_one_draw():
    """The standard error of correlated predictions is that of the sequences."""
    generator = np.random.default_rng(0)
    spread = []
    for _ in range(400):
        mean = Mean()
        offsets = generator.normal(size=30)
        for sample in offsets:  # ten equal tokens each
            mean.add(torch.full((10,), float(sample)), torch.zeros(10, dtype=torch.long), 1)
        spread.append((mean.value, mean.se))
    values, errors = np.array(spread).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)


class Causal(nn.Module):
    """Ends like a causal language model of transformers: its labels are its inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.embed(input_ids))}


class TinyForCausalLM(Causal):
    pass


@pytest.mark.parametrize(("kind", "shift"), [(Causal, 0), (TinyForCausalLM, 1)])
def test_next_tokens_padding_and_ignored_labels(kind, shift):
    torch.manual_seed(0)
    net = kind()
    ids = torch.tensor([[1, 2, 3, 4], [3, 2, 0, 0]])
    labels = torch.tensor([[1, 2, 3, 4], [3, 2, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = mps.evaluate(
        net,
        [{"input_ids": ids, "attention_mask": mask, "labels": labels}],
        mps.Plan({"head": mps.Precision("2")}),
    )
    logs = net(ids)["logits"].detach().double().log_softmax(-1)
    counted = [(0, t) for t in range(4 - shift)] + [(1, t) for t in range(2 - shift)]
    expected = np.mean([-float(logs[b, t, labels[b, t + shift]]) for b, t in counted])
    assert found.reference.loss == pytest.approx(expected, rel=1e-6)


def test_pixels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 1))
    x, y = torch.randn(2, 1, 4, 5), torch.randint(0, 3, (2, 4, 5))
    found = mps.evaluate(net, [(x, y)], mps.Plan({"0": mps.Precision("2")}))
    assert found.reference.loss == pytest.approx(float(nn.functional.cross_entropy(net(x), y).detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        (mps.Plan({}), mps.PlanError, "no layers"),
        (mps.Plan({"3": mps.Precision("4")}), mps.PlanError, "the plan names '3'"),
        (mps.Plan({"1": mps.Precision("4")}), mps.PlanError, "without a weight"),
    ],
)
def test_plans_that_do_not_fit_the_model(plan, error, words):
    with pytest.raises(error, match=words):
        mps.evaluate(model(), batches(), plan)


def test_an_output_that_is_not_finite():
    net = model()
    data = batches()
    data[1][0][0, 0] = math.inf
    with pytest.raises(mps.EstimatorError, match="batch 1"):
        mps.evaluate(net, data, PLAN)
