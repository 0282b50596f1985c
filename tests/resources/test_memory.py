"""`memory_bytes` of a plan against the bytes of the really packed tensors plus everything left alone."""

import itertools

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.modules import canonical
from mpsearch.problem import usage_of
from mpsearch.quantize import RoundToNearest
from mpsearch.resources import MemoryBytes


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3, groups=1)
        self.norm = nn.BatchNorm1d(5)
        self.up = nn.ConvTranspose1d(5, 3, 2)
        self.mid = nn.Linear(3, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.left = nn.Linear(11, 2)

    def forward(self, ids):
        x = self.norm(self.conv(self.embed(ids).transpose(1, 2)))
        return self.left(self.head(self.mid(self.up(x).transpose(1, 2))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "quantizer", [RoundToNearest(), RoundToNearest(symmetric=False), RoundToNearest(granularity="tensor")]
)
def test_every_plan_to_the_byte(dtype, quantizer):
    model = Model().to(dtype).eval()
    batch = torch.tensor([[1, 2, 3, 4, 5]])
    layers = mps.layers(model, batch, exclude=["left"])
    options = mps.precisions("w3 w8g4 w16")
    found = MemoryBytes(quantizer)(model, layers, options)
    table = mps.CostTable(
        layers, options, found.usage * 0, usage={"memory_bytes": found.usage}, fixed_usage={"memory_bytes": found.fixed}
    )
    stored = sum(
        t.numel() * t.element_size() for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    )
    assert found.reference == stored
    names = [layer.name for layer in layers]
    assert names == ["embed", "conv", "up", "mid", "head"]
    packed, decided = {}, 0
    for name in names[:4]:  # the head's weight is the embedding's
        weight = canonical(model.get_submodule(name)).detach()
        decided += weight.numel() * weight.element_size()
        for column, option in enumerate(options):
            whole = weight.numel() * weight.element_size()
            packed[name, column] = quantizer.codes(weight, option).pack().nbytes if option.quantizes_weight else whole
    for columns in itertools.product(range(3), repeat=5):
        if columns[0] != columns[4]:
            continue  # one tensor has one precision
        total = sum(packed[name, column] for name, column in zip(names[:4], columns[:4], strict=True))
        assert usage_of(table, torch.tensor(columns).numpy())["memory_bytes"] == total + stored - decided


def test_the_profile_counts_with_its_quantizer():
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    tables = [
        mps.profile(model, [torch.ones(1, 4)], mps.sensitivity.KLDivergence(), mps.precisions("w4"), quantizer=q)
        for q in (RoundToNearest(), RoundToNearest(symmetric=False), lambda weight, precision: weight)
    ]
    assert [table.usage["memory_bytes"][0, 0] for table in tables] == [16 + 32, 16 + 32 + 4, 16 + 32]


@pytest.mark.parametrize("text", ["wnf4", "wnf4g3", "wfp6_e2m3g4", "wmxfp4", "wmxint8", "wnvfp4", "wbfp5g4", "wbf16"])
def test_other_formats_to_the_byte(text):
    model, option = Model().eval(), mps.Precision.parse(text)
    layers = mps.layers(model, torch.tensor([[1, 2, 3, 4, 5]]))
    found = MemoryBytes()(model, layers, [option])
    packed = [
        RoundToNearest().codes(canonical(model.get_submodule(layer.name)).detach(), option).pack().nbytes
        for layer in layers
    ]
    packed[[layer.name for layer in layers].index("head")] = 0  # the embedding's weight
    assert found.usage[:, 0].tolist() == packed


def test_a_format_that_cannot_hold_a_layer_is_refused_by_name():
    model = nn.Sequential(nn.Linear(256, 4), nn.Linear(4, 8))
    layers = mps.layers(model, torch.ones(1, 256))
    assert MemoryBytes()(model, layers[:1], mps.precisions("wq4_k w16")).usage.tolist() == [[4 * 144, 4 * 1024]]
    with pytest.raises(
        mps.EstimatorError, match=r"layer '1' at wq4_k: q4_k packs rows of a multiple of 256 weights, got 4"
    ):
        MemoryBytes()(model, layers, mps.precisions("wq4_k"))


FORMATS = (
    " ".join(f"w{bits}" for bits in range(1, 16))
    + " w4g16 w3g7 wnf4g32 wnf4 wfp3_e1m1 wfp3_e2m0 wfp5_e2m2 wfp7_e3m3 wfp8_e4m3 wfp8_e5m2 wfp8_e3m4g16 wbf16 wfp16 wfp32"
    + " wmxfp4 wmxfp6_e2m3 wmxfp6_e3m2 wmxfp8 wmxfp8_e5m2 wmxint8 wnvfp4 wbfp3 wbfp8g32"
    + " wq4_0 wq4_1 wq5_0 wq5_1 wq8_0 wq2_k wq3_k wq4_k wq5_k wq6_k wiq4_nl wiq4_xs wtq1_0 wtq2_0"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_format_to_the_byte(dtype):
    model = nn.Sequential(nn.Linear(512, 3, bias=False), nn.Linear(3, 2)).to(dtype)
    options = mps.precisions(FORMATS)
    quantizer = RoundToNearest(scale="max")
    found = MemoryBytes(quantizer)(model, [mps.Layer("0", "linear", (3, 512))], options)
    weight = model[0].weight.detach()
    assert found.usage[0].tolist() == [quantizer.codes(weight, option).pack().nbytes for option in options]


def test_llama_3_1_8b_at_q4_k_m_has_the_bits_that_llama_cpp_publishes():
    """From the types that llama-quantize gives its tensors: 4.8944 bits a weight."""

    def matrix(outputs, inputs):  # of the right shape, without the memory
        made = nn.Linear(1, 1, bias=False)
        made.weight = nn.Parameter(torch.empty(1, dtype=torch.bfloat16).expand(outputs, inputs), requires_grad=False)
        return made

    def more_bits(block):  # llama.cpp: the first and last eighth, and every third between
        return block < 4 or block >= 28 or (block - 4) % 3 == 2

    model, types = nn.Module(), {}
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    tensors = [
        (f"{name}{block}", shape, name in ("v", "down") and more_bits(block))
        for block in range(32)
        for name, shape in shapes.items()
    ]
    for name, shape, more in [*tensors, ("tokens", (128256, 4096), False), ("output", (128256, 4096), True)]:
        model.add_module(name, matrix(*shape))
        types[name] = more
    for number in range(65):
        model.register_buffer(f"norm{number}", torch.empty(1).expand(4096))  # float32 in the file
    layers = [mps.Layer(name, "linear", tuple(model.get_submodule(name).weight.shape)) for name in types]
    found = MemoryBytes()(model, layers, mps.precisions("wq4_k wq6_k"))
    total = sum(row[int(types[layer.name])] for row, layer in zip(found.usage, layers, strict=True)) + found.fixed
    weights = sum(layer.numel for layer in layers) + 65 * 4096
    assert round(8 * total / weights, 4) == 4.8944
