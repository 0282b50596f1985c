"""Offloaded models against the same models with their values in memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpsearch as mps
from mpsearch.errors import EstimatorError
from mpsearch.models.hugging_face import model_of
from mpsearch.models.running import call, preserved, state_fingerprint, state_stamp
from mpsearch.models.streaming.blocks import Blocks, blocks_of
from mpsearch.models.streaming.offloading import is_offloaded, replaced, resident
from mpsearch.models.streaming.spilling import spilled
from mpsearch.models.streaming.stored import InFile

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("quiet_offloading")


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}


def saved(kind: str, folder: Path) -> Path:
    """A tiny model of random weights, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    make: dict[str, Any] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16(),
        "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=32)
        ),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
        "mamba": lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=16, num_hidden_layers=3, vocab_size=40)
        ),
        "experts": lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **SIZES,
                num_key_value_heads=1,
                head_dim=8,
                moe_intermediate_size=8,
                num_experts=4,
                num_experts_per_tok=2,
            )
        ),
    }
    make[kind]().save_pretrained(folder)
    return folder


def tokens(seed: int) -> dict[str, Tensor]:
    """Two samples of eight tokens."""
    return {"input_ids": torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(seed))}


KINDS = ("llama", "tied", "gpt2", "bert", "mamba", "experts")


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_model_is_the_resident_one(kind: str, tmp_path: Path) -> None:
    folder = str(saved(kind, tmp_path))
    whole, streamed = model_of(folder), model_of(folder, streamed=True)
    assert is_offloaded(streamed)
    assert not is_offloaded(whole)
    assert state_fingerprint(streamed) == state_fingerprint(whole)
    before = state_stamp(streamed)
    batches = [tokens(1), tokens(2)]
    assert mps.layers(streamed, batches[0]) == mps.layers(whole, batches[0])
    with preserved(whole, batches[0]), preserved(streamed, batches[0]), torch.no_grad():
        expected = [call(whole, batch) for batch in batches]
        assert all(torch.equal(call(streamed, batch), one) for batch, one in zip(batches, expected, strict=True))
        assert all(parameter.is_meta for parameter in streamed.parameters())
        blocks = blocks_of(streamed, batches[0])
        assert blocks is not None
        assert blocks.number == 3
        outputs = {number: call(streamed, batches[number]) for _, number in blocks.runs(batches, [])}
    assert all(torch.equal(outputs[number], one) for number, one in enumerate(expected))
    assert state_stamp(streamed) == before
    with torch.no_grad():  # accelerate's hooks are back
        assert torch.equal(streamed(**batches[0]).logits, expected[0])


class Perturbed:
    """A layer with all weights doubled."""

    def __init__(self, blocks: Blocks, layer: str) -> None:
        self.first = blocks.segment_of(layer)
        self.weight: Any = blocks.model.get_submodule(layer).weight

    @contextlib.contextmanager
    def inside(self, segment: int) -> Iterator[None]:
        """See `Variant.inside`."""
        values = {self.weight: self.weight.detach() * 2} if segment == self.first else {}
        with replaced(values):
            yield


@pytest.mark.parametrize("room_bytes", [0, 2**20])
def test_variants_depart_at_their_block(tmp_path: Path, room_bytes: int) -> None:
    folder = str(saved("llama", tmp_path))
    whole, streamed = model_of(folder), model_of(folder, streamed=True)
    names = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head"]
    batches = [tokens(1), tokens(2)]
    with preserved(streamed, batches[0]), torch.no_grad():
        blocks = blocks_of(streamed, batches[0])
        assert blocks is not None
        variants = [Perturbed(blocks, name) for name in names]
        assert [variant.first for variant in variants] == [0, 1, 3, 4]
        outputs = {place: call(streamed, batches[place[1]]) for place in blocks.runs(batches, variants, room_bytes)}
    for variant, name in enumerate(names):
        layer: Any = whole.get_submodule(name)
        with torch.no_grad(), replaced({layer.weight: layer.weight.detach() * 2}):
            for number, batch in enumerate(batches):
                assert torch.equal(outputs[variant, number], call(whole, batch)), name


def test_each_block_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    values = InFile.values

    def counted(self: InFile) -> Tensor:
        reads.append(self.offset_bytes)
        return values(self)

    monkeypatch.setattr(InFile, "values", counted)
    streamed = model_of(str(saved("llama", tmp_path)), streamed=True)
    batches = [tokens(seed) for seed in range(3)]
    with preserved(streamed, batches[0]), torch.no_grad():
        blocks = blocks_of(streamed, batches[0])
        assert blocks is not None
        reads.clear()
        for _ in blocks.runs(batches, [Perturbed(blocks, "model.layers.1.mlp.up_proj")]):
            call(streamed, batches[0])
    assert len(reads) == len(set(reads)) == sum(1 for _ in streamed.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_empty_again_after_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    streamed = model_of(str(saved("llama", tmp_path)), streamed=True)
    before = state_stamp(streamed)
    parameters = list(streamed.parameters())

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises((error, EstimatorError)), preserved(streamed, tokens(1)):  # noqa: PT012
        handle = streamed.get_submodule("model.layers.1.mlp.up_proj").register_forward_pre_hook(fail)
        with handle, torch.no_grad():
            call(streamed, tokens(1))
    assert all(parameter.is_meta for parameter in streamed.parameters())
    assert all(a is b for a, b in zip(parameters, streamed.parameters(), strict=True))
    assert state_stamp(streamed) == before
    assert streamed(**tokens(1)).logits.shape == (2, 8, 40)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_plain_model_under_accelerate(tmp_path: Path, offload: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True).eval()).eval()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = model[0], model[1]

        def forward(self, x: Tensor) -> Tensor:
            """Attention over five places."""
            x = self.first(x)
            y: Tensor = self.attention(x, x, x)[0]
            return y

    net, x = Net().eval(), torch.randn(3, 5, 4)
    with preserved(net, x), torch.no_grad():
        expected = call(net, x)
    fingerprint = state_fingerprint(net)
    if offload == "cpu":
        accelerate.cpu_offload(net)
    else:
        accelerate.disk_offload(net, tmp_path)
    assert state_fingerprint(net) == fingerprint
    with preserved(net, x), torch.no_grad():
        assert torch.equal(call(net, x), expected)
        query: Any = net.get_submodule("attention.q_proj")
        assert query.weight.is_meta
        with resident(query):
            assert query.weight.shape == (8, 8)
            assert not query.weight.is_meta
    assert all(parameter.is_meta for parameter in net.parameters())


def test_buffers_hold_what_the_class_gives_them(tmp_path: Path) -> None:
    folder = str(saved("bert", tmp_path))
    whole, streamed = dict(model_of(folder).named_buffers()), dict(model_of(folder, streamed=True).named_buffers())
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(buffer, streamed[name]) for name, buffer in whole.items())


def test_damaged_shards_are_told(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EstimatorError, match="download it again"):
        model_of(str(folder), streamed=True)


def test_plan_of_a_model_without_a_chain_of_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=40, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    whole, streamed = model_of(str(tmp_path)), model_of(str(tmp_path), streamed=True)
    ids = tokens(1)["input_ids"]
    batches = [{"input_ids": ids, "decoder_input_ids": ids}]
    plan = mps.Plan({layer.name: mps.Precision("3") for layer in mps.layers(whole, batches[0])})
    results = [mps.evaluate(model, batches, plan, metric="kl", progress=False) for model in (whole, streamed)]
    assert results[0].kl == results[1].kl > 0


def test_model_without_blocks_has_none() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(1, 2)) is None


def test_blocks_that_skip_are_none() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            """Each layer reads the input too."""
            first = x
            for layer in self.layers:
                x = layer(x + first)
            return x

    assert blocks_of(Skipping().eval(), torch.randn(1, 2)) is None


def test_spill_gives_back_what_it_got() -> None:
    values = {n: torch.randn(3, 4).to(kind) for n, kind in enumerate((torch.float32, torch.bfloat16, torch.float64))}
    with spilled(room_bytes=48) as held:
        for key, value in values.items():
            held[key] = value
        assert all(torch.equal(held[key], value) for key, value in values.items())
        assert held.disk_bytes == 24 + 96
        held.pop(2)
        held[3] = values[2]
        assert held.disk_bytes == 24 + 96  # the room is used again
