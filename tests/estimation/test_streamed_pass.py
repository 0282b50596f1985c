"""The sweep over a model whose weights lie elsewhere against that over the same model with its weights."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.estimation.gradients import streamed_pass
from mpsearch.models.hugging_face import model_of
from mpsearch.models.streaming.stored import InFile
from mpsearch.sensitivity import (
    EmpiricalFisher,
    Fisher,
    FisherProjection,
    GaussNewtonTrace,
    GradientImportance,
    GraSP,
    HessianAugmented,
    HessianTrace,
    KFACDiagonal,
    OutputGradient,
    Taylor,
)

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("quiet_offloading")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
#: Of gradients that add over the calls of a weight, and of others.
ADDING = [FisherProjection(), OutputGradient(), Taylor(signed=True)]
OTHERS = [
    Fisher(),
    GaussNewtonTrace(),
    EmpiricalFisher(),
    GradientImportance(),
    HessianAugmented(),
    KFACDiagonal(),
]


def llama(folder, dtype=torch.float32, **changed):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **changed)).to(dtype).save_pretrained(folder)
    return str(folder)


def gpt2(folder):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=40, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def experts(folder):
    torch.manual_seed(0)
    own = {"num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(**SIZES, **own, num_experts=4, num_experts_per_tok=2)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


def text(*shapes):
    """Batches of samples of tokens; of as many samples as tokens, shapes do not tell one from the other."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 40, shape, generator=generator) for shape in shapes]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def profile(model, batches, estimators, options="w4g32 w2g32", **settings):
    return mps.profile(model, batches, estimators, mps.precisions(options), progress=False, **settings)


@pytest.mark.parametrize("options", ["w4g32 w2g32", "w4a8 w3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_model_has_the_bits_of_the_resident_one(tmp_path, dtype, options):
    folder, batches = llama(tmp_path, dtype), text((2, 8), (3, 8), (8, 8))
    estimators = [*ADDING, *OTHERS]
    resident = profile(model_of(folder), batches, estimators, options)
    streamed = profile(model_of(folder, streamed=True), batches, estimators, options)
    for one, other in zip(resident, streamed, strict=True):
        np.testing.assert_array_equal(one.sensitivity, other.sensitivity)
        np.testing.assert_array_equal(one.sensitivity_se, other.sensitivity_se)
        assert (one.sensitivity[:, -1] != 0).all()
    here, there = resident[0].origin["passes"], streamed[0].origin["passes"]
    assert there["forward"] == pytest.approx(here["forward"] + 1)  # blocks are run again to differentiate them
    assert there["backward"] == pytest.approx(here["backward"])


@pytest.mark.parametrize("make", [gpt2, experts, lambda folder: llama(folder, tie_word_embeddings=True)])
def test_tied_heads_and_experts(tmp_path, make):
    """What the two ends of a tied weight find is added up, in another order."""
    folder, batches = make(tmp_path), text((2, 8), (3, 6), (6, 6))
    for one, other in zip(
        profile(model_of(folder), batches, ADDING[:2], loss="kl"),
        profile(model_of(folder, streamed=True), batches, ADDING[:2], loss="kl"),
        strict=True,
    ):
        scale = one.sensitivity.max()
        np.testing.assert_allclose(one.sensitivity, other.sensitivity, rtol=2e-6, atol=1e-6 * scale)


def test_a_weight_with_two_ends_and_what_squares_its_gradient(tmp_path):
    streamed = model_of(llama(tmp_path, tie_word_embeddings=True), streamed=True)
    with pytest.raises(mps.EstimatorError, match=r"'.*' is used before the blocks and behind them.*FisherProjection"):
        profile(streamed, text((2, 8)), Fisher())


def test_two_readings_in_groups_that_fit(tmp_path, monkeypatch):
    folder, batches = llama(tmp_path), text((2, 8), (3, 8), (4, 8))
    streamed = model_of(folder, streamed=True)
    truth = profile(streamed, batches, FisherProjection())
    reads: list[int] = []
    values = InFile.values

    def counted(self):
        reads.append(self.offset_bytes)
        return values(self)

    monkeypatch.setattr(InFile, "values", counted)
    monkeypatch.setattr(streamed_pass, "ROOM_BYTES", 0)  # all on disk
    reads.clear()
    found = []
    for disk_bytes in (2**30, 1):
        monkeypatch.setattr(streamed_pass, "DISK_BYTES", disk_bytes)
        before = len(reads)
        np.testing.assert_array_equal(profile(streamed, batches, FisherProjection()).sensitivity, truth.sensitivity)
        found.append(len(reads) - before)
    assert found[1] > found[0]
    assert (found[1] - found[0]) % 2 == 0  # two more groups


class Conditioned(nn.Module):
    """Blocks that are given what a layer before them makes."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, condition):
            return x + torch.tanh(self.linear(x) + condition)

    def __init__(self):
        super().__init__()
        self.embed, self.condition, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        condition, x = self.condition(x), self.embed(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


class Standardized(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight - self.weight.mean(), self.bias)


def test_gradients_beside_the_hidden_state_are_refused():
    model = accelerate.cpu_offload(Conditioned().eval())
    with pytest.raises(mps.EstimatorError, match=r"beside the hidden state that layers before them make"):
        profile(model, [torch.randn(4, 4)], FisherProjection(), "w4 w2")


class Plain(Conditioned):
    """Blocks that are given the hidden state alone."""

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, 0.0)
        return self.head(x)


def test_a_weight_that_does_more_than_its_layer_shows():
    """The check of the first batch works block by block; the message is its own, whatever else fails on the way out."""
    torch.manual_seed(0)
    model = Plain()
    model.blocks[1].linear = Standardized(8, 8)
    streamed = accelerate.cpu_offload(model.eval())
    with pytest.raises(mps.EstimatorError, match=r"layer 'blocks.1.linear' is .* outside the layer's own forward"):
        profile(streamed, [torch.randn(4, 4)], FisherProjection(), "w4 w2", exclude=["condition"])
    assert all(parameter.is_meta for parameter in streamed.parameters())


@pytest.mark.parametrize("estimator", [HessianTrace(), GraSP()], ids=lambda one: type(one).__name__)
def test_what_differentiates_the_whole_model_is_refused(estimator):
    with pytest.raises(mps.EstimatorError, match=r"through all blocks at once.*GaussNewtonTrace or FisherProjection"):
        profile(accelerate.cpu_offload(Plain().eval()), [torch.randn(4, 4)], estimator, "w4 w2", exclude=["condition"])
