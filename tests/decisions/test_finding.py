"""`layers` against hand counts, and against a loop."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.modules.weights import canonical, restore
from mpsearch.resources import MemoryBytes
from mpsearch.sensitivity import FisherProjection, KLDivergence


@pytest.mark.parametrize(
    ("module", "shape", "kind", "macs", "weight"),
    [
        (nn.Linear(3, 5), (2, 3), "linear", 15, (5, 3)),
        (nn.Linear(3, 5), (2, 7, 3), "linear", 7 * 15, (5, 3)),
        (nn.Conv1d(2, 4, 3), (2, 2, 8), "conv1d", 6 * 4 * 6, (4, 2, 3)),
        (nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 6, 6), "conv2d", 9 * 8 * 36, (8, 4, 3, 3)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 6, 6), "conv2d", 36 * 8 * 18, (8, 2, 3, 3)),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), "conv2d", 9 * 4 * 9, (4, 1, 3, 3)),
        (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3), "conv3d", 8 * 2 * 8, (2, 1, 2, 2, 2)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), "conv_transpose2d", 25 * 4 * 6 * 9, (6, 4, 3, 3)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5), "conv_transpose1d", 5 * 4 * 3 * 3, (6, 2, 3)),
    ],
)
def test_macs_and_shapes_by_hand(module, shape, kind, macs, weight):
    found = mps.layers(nn.Sequential(module), torch.randn(shape))
    assert [(x.name, x.kind, x.macs, x.weight_shape) for x in found] == [("0", kind, macs, weight)]


def test_transposed_convolutions_by_a_loop():
    """MACs counted one by one: every input element, every output channel of its group, every kernel cell."""
    module = nn.ConvTranspose2d(4, 6, (3, 2), groups=2)
    count = sum(1 for _ in range(4) for _ in range(5 * 5) for _ in range(6 // 2) for _ in range(3 * 2))
    assert mps.layers(nn.Sequential(module), torch.randn(1, 4, 5, 5))[0].macs == count


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose1d(6, 4, 2), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(3, 2)],
)
def test_the_canonical_weight_goes_back(module):
    assert torch.equal(restore(module, canonical(module)), module.weight)


def test_the_channels_of_a_transposed_convolution_are_its_outputs():
    module = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    x = torch.randn(1, 4, 5, 5)
    before = module(x)
    weight = canonical(module).clone()
    weight[4] = 0
    with torch.no_grad():
        module.weight.copy_(restore(module, weight))
    after = module(x)
    assert after[:, 4].abs().max() == 0
    torch.testing.assert_close(after[:, [0, 1, 2, 3, 5]], before[:, [0, 1, 2, 3, 5]])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.twice(self.twice(self.embed(ids))))


def test_repeated_uncalled_and_shared():
    model = Odd().train()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="never calls never"):
        found = {layer.name: layer for layer in mps.layers(model, torch.tensor([[1, 2, 3]]))}
    assert list(found) == ["embed", "twice", "head"]
    assert found["twice"].macs == 2 * 3 * 16
    assert found["embed"].macs == 0
    assert found["embed"].group == found["head"].group == "embed (shared weight)"
    assert found["twice"].group == ""
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not model.twice._forward_hooks


def test_exclude_and_groups():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert [layer.name for layer in mps.layers(model, x, exclude=["1"])] == ["0", "2"]
    assert [layer.group for layer in mps.layers(model, x, groups={"ends": ["0", "2"]})] == ["ends", "", "ends"]
    with pytest.raises(mps.TableError, match="matches no layer"):
        mps.layers(model, x, exclude=["fc*"])
    with pytest.raises(mps.TableError, match="which is no layer"):
        mps.layers(model, x, groups={"g": ["7"]})
    with pytest.raises(mps.TableError, match="leaves no layer"):
        mps.layers(model, x, exclude=["*"])
    with pytest.raises(mps.TableError, match="no quantizable layer"):
        mps.layers(nn.ReLU(), x)


def test_shared_weights_cannot_be_split():
    with pytest.warns(UserWarning, match="never calls"), pytest.raises(mps.TableError, match="share a weight"):
        mps.layers(Odd(), torch.tensor([[1]]), groups="none")
    with pytest.warns(UserWarning, match="never calls"), pytest.raises(mps.TableError, match="splits the layers"):
        mps.layers(Odd(), torch.tensor([[1]]), groups={"g": ["embed", "twice"]})


def test_hooks_are_removed_when_the_model_fails():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        mps.layers(model, torch.ones(1, 3))
    assert not any(module._forward_hooks for module in model.modules())


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 2, 2)

    def forward(self, x):
        return self.up(input=x)


def test_modules_called_with_keywords_are_counted():
    assert mps.layers(Keywords(), torch.ones(1, 3, 4))[0].macs == 4 * 3 * 2 * 2


def test_weights_that_share_memory_are_one_group():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)  # another parameter on the same memory
    found = mps.layers(model, torch.tensor([[1, 2]]))
    assert [layer.group for layer in found] == ["0 (shared weight)"] * 2
    memory = MemoryBytes()(model, found, mps.precisions("w16"))
    assert (memory.usage.sum(), memory.fixed, memory.reference) == (144, 0, 144)


def test_half_of_a_shared_weight_cannot_be_excluded():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(mps.TableError, match="'1' is excluded but shares its weight with '0'"):
        mps.layers(model, torch.tensor([[1, 2]]), exclude=["1"])


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, ids):
        return 3 * super().forward(ids)


class Positions(nn.Embedding):
    """As Whisper's: a part of the table, whatever the numbers are."""

    def forward(self, ids):
        return self.weight[: ids.shape[1]]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.positions, self.head = Scaled(7, 4), Positions(5, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.embed(ids) + self.positions(ids)).mean(1)


def test_embeddings_with_a_forward_of_their_own():
    """One that scales is a decision, and its gradient has the scale; one that reads no numbers is left alone."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    model, plain = Tokens(), Tokens()
    plain.embed = nn.Embedding(7, 4)
    with torch.no_grad():
        plain.embed.weight.copy_(3 * model.embed.weight)
    found = [
        mps.profile(net, [ids], FisherProjection(draws=4), mps.precisions("w2 w4"), progress=False)
        for net in (model, plain)
    ]
    assert [layer.name for layer in found[0].layers] == ["embed", "head"]
    torch.testing.assert_close(*(torch.from_numpy(table.sensitivity.copy()) for table in found), rtol=1e-4, atol=0)


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.embed = nn.Embedding(7, 4), nn.Embedding(7, 4)
        self.embed.weight = self.shared.weight

    def forward(self, ids):
        return self.embed(ids)


def test_another_name_of_a_decided_weight_is_no_warning(recwarn):
    assert [layer.name for layer in mps.layers(Alias(), torch.tensor([[1]]))] == ["embed"]
    assert not recwarn.list


def test_a_model_that_is_a_layer_itself_is_told_to_wrap_it():
    with pytest.raises(mps.TableError, match=r"the model itself is a Linear: put it into nn.Sequential"):
        mps.layers(nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_weights_is_no_decision():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.nothing, self.head = nn.Linear(4, 0), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x) + self.nothing(x).sum()

    assert [layer.name for layer in mps.layers(Wide(), torch.ones(1, 4))] == ["head"]


def test_a_weight_that_is_more_than_a_tensor_is_refused_unless_excluded():
    """As those that tools have quantized in place."""

    class Packed(torch.Tensor):
        pass

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(1, 4)
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Packed))
    with pytest.raises(mps.TableError, match=r"the weight of '0' is a Packed, quantized already\? exclude it"):
        mps.layers(model, x)
    assert [layer.name for layer in mps.layers(model, x, exclude=["0"])] == ["1"]


def test_a_layer_may_return_more_than_its_output():
    class Scored(nn.Linear):
        def forward(self, x):
            return super().forward(x), x.argmax(-1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = Scored(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.first(x)[0])

    found = mps.layers(Net(), torch.ones(5, 2, 4))
    assert [(layer.name, layer.macs) for layer in found] == [("first", 2 * 12), ("head", 2 * 6)]
    table = mps.profile(Net(), [torch.randn(5, 4)], KLDivergence(), mps.precisions("w2 w16"), progress=False)
    assert (table.sensitivity[:, 0] > 0).all()
