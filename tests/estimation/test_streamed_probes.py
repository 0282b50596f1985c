"""Probes of offloaded models against the same models in memory, and against a plain loop."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpsearch as mps
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.estimation import streamed_probes
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.perturbation import one_at_a_time
from mpsearch.models.hugging_face import model_of
from mpsearch.models.running import call, state_stamp
from mpsearch.models.streaming.offloading import replaced
from mpsearch.models.streaming.stored import InFile
from mpsearch.quantizers.fake_quantization import quantized_weight
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import SQNR, CosineDistance, KLDivergence, LinearityCoefficients, MaskedKL, OutputMSE

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("quiet_offloading"),
    pytest.mark.filterwarnings("ignore::mpsearch.MpsearchWarning"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
TEXT = SIZES | {"vocab_size": 40, "max_position_embeddings": 32}
OPTIONS = mps.precisions("w2 w4a8 w16")


def saved(kind: str, folder: Path) -> str:
    """A tiny model of random weights, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    make: dict[str, Any] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
        "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)),
        "experts": lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **TEXT,
                num_key_value_heads=1,
                head_dim=8,
                moe_intermediate_size=8,
                num_experts=4,
                num_experts_per_tok=2,
            )
        ),
    }
    make[kind]().eval().save_pretrained(folder)
    return str(folder)


def batches(number: int = 3) -> list[dict[str, Tensor]]:
    """Of two samples of eight tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 40, (2, 8), generator=generator)} for _ in range(number)]


ESTIMATORS = [KLDivergence(), OutputMSE(), SQNR(), CosineDistance(), MaskedKL(), LinearityCoefficients(3)]


@pytest.mark.parametrize("kind", ["llama", "tied", "bert", "experts"])
def test_streamed_is_resident(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and standard errors are the same bits: all batches fit into one turn. Alone, in small groups, with states on disk."""
    folder = saved(kind, tmp_path)
    expected = mps.profile(model_of(folder), batches(), ESTIMATORS, OPTIONS, progress=False)
    streamed = model_of(folder, streamed=True)
    before = state_stamp(streamed)
    for room_bytes, together in ((2**20, 1000), (0, 5)):
        monkeypatch.setattr(streamed_probes, "ROOM_BYTES", room_bytes)
        monkeypatch.setattr(streamed_probes, "_together", lambda context, blocks, together=together: together)
        tables = mps.profile(streamed, batches(), ESTIMATORS, OPTIONS, progress=False)
        for one, other in zip(tables, expected, strict=True):
            np.testing.assert_array_equal(one.sensitivity, other.sensitivity)
            np.testing.assert_array_equal(one.sensitivity_se, other.sensitivity_se)
            assert one.unit == other.unit
    assert state_stamp(streamed) == before
    assert all(parameter.is_meta for parameter in streamed.parameters())


@torch.no_grad()
def test_a_plain_loop_gives_the_same_table(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    options = mps.precisions("w2 w3")
    table = mps.profile(model_of(folder, streamed=True), batches(), KLDivergence(), options, groups="none")
    model = model_of(folder)
    plain = [call(model, batch).flatten(0, 1).double().log_softmax(-1) for batch in batches()]
    found = np.zeros((len(table.layers), len(options)))
    for row, layer in enumerate(table.layers):
        module: Any = model.get_submodule(layer.name)
        for column, option in enumerate(options):
            with replaced({module.weight: quantized_weight(module, layer.name, option, RoundToNearest())}):
                other = [call(model, batch).flatten(0, 1).double().log_softmax(-1) for batch in batches()]
            found[row, column] = float(
                torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(plain, other, strict=True)]).mean()
            )
    np.testing.assert_allclose(table.sensitivity, found, rtol=1e-6, atol=1e-9)


class Count:
    """Counts how often values are read from shards, by their place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: dict[int, int] = {}
        values = InFile.values

        def counted(stored: InFile) -> Tensor:
            self.reads[stored.offset_bytes] = self.reads.get(stored.offset_bytes, 0) + 1
            return values(stored)

        monkeypatch.setattr(InFile, "values", counted)


@pytest.mark.parametrize(("together", "groups"), [(1000, 1), (16, 3)])
def test_readings_and_roundings(together: int, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading a group, however many batches; each cell is rounded once."""
    count = Count(monkeypatch)
    streamed = model_of(saved("llama", tmp_path), streamed=True)
    rounded: list[tuple[int, str]] = []

    def quantizer(weight: Tensor, precision: Any) -> Tensor:
        rounded.append((weight.numel(), str(precision)))
        return RoundToNearest()(weight, precision)

    monkeypatch.setattr(streamed_probes, "_together", lambda context, blocks: together)
    options = mps.precisions("w2 w4")
    with mps.Calibration(streamed, batches(), options, quantizer=quantizer, groups="none") as calibration:
        context = calibration.context()
        rounded.clear()
        count.reads.clear()
        estimate: Estimate = one_at_a_time(context, [KLDivergence()])[0]
        cells = len(context.decisions) * 2
    assert np.isfinite(estimate.sensitivity).all()
    assert len(rounded) == cells == 3 * 7 * 2 + 4
    assert -(-cells // together) == groups
    in_blocks = sorted(count.reads.values())[: 3 * 9]  # 9 weights a block
    assert set(in_blocks) == {groups}
    assert context.passes.forward > groups
    assert context.passes.forward < groups + cells


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", tmp_path)
    monkeypatch.setattr(streamed_probes, "_together", lambda context, blocks: 12)
    store = MemoryStore({})
    runs = streamed_probes._run
    groups: list[int] = []

    def stopping(context: Any, blocks: Any, group: Any, *rest: Any) -> None:
        if len(groups) == 2:
            raise KeyboardInterrupt
        groups.append(len(group))
        runs(context, blocks, group, *rest)

    def estimate() -> Estimate:
        streamed = model_of(folder, streamed=True)
        before = state_stamp(streamed)
        try:
            with mps.Calibration(streamed, batches(), OPTIONS, groups="none", progress=False) as calibration:
                context = calibration.context()
                object.__setattr__(context, "checkpoint", store)
                found = one_at_a_time(context, [KLDivergence()])[0]
                passes.append(context.passes.forward)
                return found
        finally:
            assert state_stamp(streamed) == before
            assert all(parameter.is_meta for parameter in streamed.parameters())

    passes: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(streamed_probes, "_run", stopping)
        with pytest.raises(KeyboardInterrupt):
            estimate()
    resumed = estimate()
    store = MemoryStore({})
    whole = estimate()
    np.testing.assert_array_equal(resumed.sensitivity, whole.sensitivity)
    np.testing.assert_array_equal(resumed.sensitivity_se, whole.sensitivity_se)
    assert passes[0] < passes[1]
    assert np.array_equal(estimate().sensitivity, whole.sensitivity)
    assert passes[2] == 0


class Bar:
    """What a progress bar is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, step: int) -> None:
        """So much further."""
        self.steps.append(step)


def test_the_bar_moves_while_probes_travel(tmp_path: Path) -> None:
    streamed = model_of(saved("llama", tmp_path), streamed=True)
    bar, totals = Bar(), []
    with mps.Calibration(streamed, batches(), OPTIONS, groups="none", progress=False) as calibration:
        context = calibration.context()
        object.__setattr__(context, "progress", lambda _, total, label: totals.append(total) or bar)
        one_at_a_time(context, [KLDivergence()])
    assert sum(bar.steps) == totals[0] == 23 * 3 * 3
    assert len([step for step in bar.steps if step]) > 20
    assert min(bar.steps) >= 0


class Unlisted(nn.Module):
    """Layers that stand in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def test_a_model_without_blocks_runs_whole() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(4, 6), torch.arange(4) % 3) for _ in range(2)]
    model = Unlisted().eval()
    expected = mps.profile(model, data, [KLDivergence(), MaskedKL()], OPTIONS)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tables = mps.profile(offloaded, data, [KLDivergence(), MaskedKL()], OPTIONS)
    for one, other in zip(tables, expected, strict=True):
        np.testing.assert_allclose(one.sensitivity, other.sensitivity, rtol=1e-6)
    words = [str(one.message) for one in told if "has no blocks" in str(one.message)]
    assert len(words) == 1
    assert "each of 8 probes reads all its weights for each of 2 batches: 19 readings" in words[0]
