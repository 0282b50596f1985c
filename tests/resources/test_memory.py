"""`memory_bytes` of a plan against the bytes of the really packed tensors plus everything left alone."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.core.problem import usage_of
from mpsearch.models.modules.weights import canonical
from mpsearch.quantizers import GPTQ, ActivationAware, HadamardRotation, PercentileClip, SmoothQuant
from mpsearch.quantizers.rounding import RoundToNearest
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


def test_a_format_that_cannot_hold_a_layer_is_no_option():
    model = nn.Sequential(nn.Linear(256, 4), nn.Linear(4, 8))
    layers = mps.layers(model, torch.ones(1, 256))
    usage = MemoryBytes()(model, layers, mps.precisions("wq4_k w16")).usage
    np.testing.assert_array_equal(usage, [[4 * 144, 4 * 1024], [np.nan, 4 * 32]])


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


@pytest.mark.parametrize(
    ("target", "text", "expected"),
    [
        ("torchao", "w4g32", 64 * 128 + 256 * (2 + 1)),
        ("torchao", "w2", 64 * 128 + 64 * (2 + 1)),
        ("hqq", "w3g64", 4 * 13 * 64 + 2 * 128 * 2),  # 128 groups, ten to a word
        ("hqq", "w6g64", 64 * 128 + 2 * 128 * 2),
        ("mlx", "w3g32", 64 * 48 + 2 * 256 * 2),
        ("compressed-tensors", "w3g64", 64 * 48 + 128 * 2 + 16),
        ("compressed-tensors", "w8a8", 64 * 128 + 64 * 2),
        ("gptqmodel", "w3g32", 64 * 48 + 4 * 24 + 256 * 2 + 4 * 128),
        ("auto-round", "w4g32", 64 * 64 + 4 * 32 + 256 * 2),
        ("exllamav3", "w4", 128 * 128 // 2 + 2 * 256),  # 64 rows on 128
        ("bitsandbytes", "wnf4g64", 64 * 64 + 128 * 4),
        ("quanto", "w8", 64 * 128 + 64 * 2),
        ("quanto", "w4g128", 64 * 64 + 2 * 64 * 2),
        ("brevitas", "w4", 64 * 64 + 64 * 2),
        ("hqq", "w16", 2 * 64 * 128),
    ],
)
def test_a_target_counts_what_it_stores(target, text, expected):
    model = nn.Sequential(nn.Linear(128, 64)).to(torch.bfloat16)
    layers = mps.layers(model, torch.ones(1, 128, dtype=torch.bfloat16), target=target)
    found = MemoryBytes()(model, layers, mps.precisions(f"{text} w16" if text != "w16" else "w16"))
    assert (found.usage[0, 0], found.fixed, found.reference) == (expected, 128, 2 * (64 * 128 + 64))


def test_codes_of_their_own_for_layers_that_share_a_weight():
    model = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 32, bias=False))
    model[1].weight = model[0].weight
    options, example = mps.precisions("w4g32 w16"), torch.tensor([[1, 2]])
    own = 32 * 32 + 32 * (4 + 1)
    for target, usage in (("torchao", [[own, 4096], [own, 0]]), (None, [[512 + 128, 4096], [0, 0]])):
        found = MemoryBytes()(model, mps.layers(model, example, target=target), options)
        assert found.usage.tolist() == usage
        assert (found.fixed, found.reference) == (0, 4096)


def test_what_a_target_makes_of_the_rest():
    """GGUF keeps norms in float32 at multiples of 32 bytes, and no buffer that a state does not hold."""
    model = nn.Sequential(nn.Linear(32, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    layers = [mps.Layer("0", "linear", (4, 32), target="gguf")]
    found = MemoryBytes()(model, layers, mps.precisions("wq4_0 wbf16 w16"))
    assert found.usage.tolist() == [[96, 256, 256]]  # 4 blocks of 18 bytes, in 96
    assert found.fixed == 32 + 32 + 2 * 16
    assert MemoryBytes()(model, [mps.Layer("0", "linear", (4, 32))], mps.precisions("w4")).fixed == 2 * 8 + 2 * 16 + 400


class Outliers:
    """Keeps one weight of a hundred in 16 bits, with its place."""

    def __call__(self, weight, precision):
        return RoundToNearest()(weight, precision)

    def stored_bytes(self, layer, precision):
        return RoundToNearest().stored_bytes(layer, precision) + 4 * (layer.numel // 100)


def test_a_quantizer_of_ones_own_tells_its_bytes(recwarn):
    model = nn.Sequential(nn.Linear(100, 8, bias=False))
    layers = mps.layers(model, torch.ones(1, 100))
    assert MemoryBytes(Outliers())(model, layers, mps.precisions("w4 w16")).usage.tolist() == [[400 + 32 + 32, 3200]]
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"memory_bytes are those of RoundToNearest: function has no stored_bytes\("):
        assert MemoryBytes(lambda weight, _: weight)(model, layers, mps.precisions("w4")).usage.tolist() == [[432]]


@pytest.mark.parametrize("size", [-1, 2.5, "many", None, float("nan"), float("inf")])
def test_a_quantizer_that_tells_no_bytes_is_refused(size):
    class Wrong(Outliers):
        def stored_bytes(self, layer, precision):
            return size

    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(mps.EstimatorError, match=r"layer '0' at w4: Wrong.stored_bytes returned .*, expected a whole"):
        MemoryBytes(Wrong())(model, mps.layers(model, torch.ones(1, 4)), mps.precisions("w4"))


@pytest.mark.parametrize(
    "quantizer",
    [
        PercentileClip(),
        HadamardRotation(RoundToNearest(symmetric=False)),
        GPTQ({}, quantizer=RoundToNearest(symmetric=False)),
        SmoothQuant({}),
        ActivationAware({}),
        export.MinMax(),
    ],
)
def test_the_quantizers_of_the_package_tell_their_bytes(quantizer, recwarn):
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    found = MemoryBytes(quantizer)(model, mps.layers(model, torch.ones(1, 4)), mps.precisions("w4"))
    assert found.usage.tolist() == [[16 + 32 + (0 if quantizer.symmetric else 4)]]
    assert not recwarn.list


def test_without_weights_equal_shapes_are_not_shared_weights():
    """On the meta device no tensor has an address."""
    tables = []
    for device in ("meta", "cpu"):
        model = nn.Sequential(*(nn.Linear(8, 8, device=device) for _ in range(3)))
        model[2].weight = model[0].weight
        layers = [mps.Layer(name, "linear", (8, 8)) for name in "012"]
        found = MemoryBytes()(model, layers, mps.precisions("w4 w16"))
        tables.append((found.usage.tolist(), found.fixed, found.reference))
    assert tables[0] == tables[1] == ([[64, 256], [64, 256], [0, 0]], 3 * 32, 2 * 256 + 3 * 32)


def test_groups_side_by_side_fill_whole_bytes():
    """Of 7 groups, quanto packs 4 codes of 2 bits, or 2 of 4, into a byte at each place of a group."""
    storage = export.TARGETS["quanto"].storage
    sizes = [storage.stored_bytes((7, 128), "float32", mps.Precision.parse(text)) for text in ("w2g128", "w4g128")]
    assert sizes == [2 * 128 + 2 * 7 * 4, 4 * 128 + 2 * 7 * 4]
