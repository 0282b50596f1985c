"""A U-Net as diffusion models have it: time steps, skips that are concatenated, attention at the bottom, transposed convolutions."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.models.modules.weights import canonical
from mpsearch.models.running import preserved
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources import BitOps
from mpsearch.sensitivity import FisherProjection, KLDivergence

OPTIONS = mps.precisions("w2 w4 w8a8 w16")


class Residual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.time, self.skip = nn.Linear(8, outputs), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.Embedding(10, 8)
        self.start, self.end = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 3, 3, 1, 1)
        self.outer, self.inner = Residual(4, 4), Residual(8, 8)
        self.down, self.up = nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.merge = Residual(8, 4)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        time = self.steps(time)
        outer = self.outer(self.start(images), time)
        inner = self.inner(self.down(outer), time)
        tokens = inner.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        inner = tokens.transpose(1, 2).reshape(inner.shape)
        return self.end(self.merge(torch.cat([outer, self.up(inner)], 1), time))


DATA = {
    "images": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "time": torch.tensor([1, 3, 5, 7]),
}


def squared_error(model, batch):
    """How far the predicted noise is from the images, of which the network knows nothing."""
    return (model(batch["images"], batch["time"]) - batch["images"]).square().mean()


@pytest.fixture(scope="module")
def tables():
    model = UNet()
    return model, mps.profile(
        model, [DATA], [KLDivergence(), FisherProjection()], OPTIONS, loss=squared_error, groups="fused", progress=False
    )


def test_listed(tables):
    _, (table, _) = tables
    kinds = {layer.name: layer.kind for layer in table.layers}
    assert (kinds["up"], kinds["down"], kinds["steps"]) == ("conv_transpose2d", "conv2d", "embedding")
    groups = {layer.group for layer in table.layers if layer.name.startswith("attention.")}
    assert groups == {"attention.q_proj (same input)", ""}
    macs = {layer.name: layer.macs for layer in table.layers}
    assert macs["start"] == 64 * 3 * 4 * 9
    assert macs["up"] == 16 * 8 * 4 * 4  # each of 16 inputs of 8 channels meets 4 kernels of 2 x 2
    assert macs["outer.time"] == 8 * 4


def test_scored_by_a_gradient_and_by_measurement(tables):
    for table in tables[1]:
        assert (table.sensitivity[:, 3] == 0).all()
        assert (table.sensitivity[:, 0] > 0).all() or table is tables[1][
            1
        ]  # gradients at a step that is not asked are 0
        assert table.sensitivity[:, 0].sum() > table.sensitivity[:, 1].sum() > 0


def test_solved_evaluated_and_recomputed_from_the_quantized_model(tables):
    model, (table, _) = tables
    best = mps.solve(table, mps.Budget(memory_bytes="30%"))
    measured = mps.evaluate(model, [DATA], best.plan, loss=squared_error, progress=False)
    assert measured.metric > 0
    assert measured.loss != measured.reference.loss
    with preserved(model):
        weights = {name: canonical(model.get_submodule(name)).detach() for name in best.plan}
        decided = sum(weight.numel() * 4 for weight in weights.values())
        every = sum(parameter.numel() * 4 for parameter in model.parameters())
        packed = sum(
            RoundToNearest().codes(weight, best.plan[name]).pack().nbytes
            if best.plan[name].quantizes_weight
            else 4 * weight.numel()
            for name, weight in weights.items()
        )
    assert best.usage["memory_bytes"] == packed + every - decided
    left = BitOps()(model, table.layers, OPTIONS, example=DATA).fixed
    assert left == 256 * 2 * 16 * 16 * 8  # the products of attention: 16 x 16 places, 8 channels
    bits = {
        layer.name: layer.macs * best.plan[layer.name].weight_bits * best.plan[layer.name].activation_bits
        for layer in table.layers
    }
    assert best.usage["bitops"] == sum(bits.values()) + left
