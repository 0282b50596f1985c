"""The networks of the benchmarks: parts against plainer programs, data, training that repeats."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import mpsearch as mps


def test_attention_against_torch(models):
    torch.manual_seed(0)
    attention = models.Attention(8, heads=2, causal=False, bias=True)
    x = torch.randn(3, 5, 8)
    heads = [part(x).view(3, 5, 2, 4).transpose(1, 2) for part in (attention.q, attention.k, attention.v)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(3, 5, 8)
    torch.testing.assert_close(attention(x), attention.o(expected))


def test_rotary_positions_are_turns_of_complex_numbers(models):
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
    turned = models._rotated(x)
    for position in range(7):
        for pair in range(3):
            number = torch.complex(x[:, position, pair], x[:, position, pair + 3])
            number = number * torch.exp(torch.tensor(1j * position * 10_000 ** (-pair / 3)))
            torch.testing.assert_close(turned[:, position, pair], number.real, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(turned[:, position, pair + 3], number.imag, rtol=1e-5, atol=1e-5)


def test_the_decoder_never_looks_ahead(models):
    torch.manual_seed(0)
    decoder = models.Decoder()
    tokens = torch.randint(128, (2, 12))
    other = tokens.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 128
    first, second = decoder(tokens), decoder(other)
    torch.testing.assert_close(first[:, :8], second[:, :8])
    assert not torch.allclose(first[:, 8], second[:, 8])


@pytest.mark.parametrize(
    ("kind", "example", "count", "outputs"),
    [
        ("ResNet20", torch.zeros(2, 3, 32, 32), 20, (2, 10)),
        ("ViT", torch.zeros(2, 1, 8, 8), 26, (2, 10)),
        ("MobileNet", torch.zeros(2, 1, 8, 8), 21, (2, 10)),
        ("Decoder", torch.zeros(2, 64, dtype=torch.long), 30, (2, 64, 128)),
    ],
)
def test_every_network_has_the_layers_that_its_docstring_says(models, kind, example, count, outputs):
    model = getattr(models, kind)().eval()
    layers = mps.layers(model, example)
    assert (len(layers), tuple(model(example).shape)) == (count, outputs)
    if kind == "MobileNet":
        assert sum(layer.weight_shape[1:] == (1, 3, 3) and layer.weight_shape[0] > 16 for layer in layers) == 6


def test_digits_are_split_without_overlap(models):
    parts = list(models._digits())
    assert [len(part) for part in parts] == [1000, 400, 397]
    together = torch.cat([part.inputs.flatten(1) for part in parts])
    assert len(together.unique(dim=0)) == len(models.load_digits().images)


def test_text_is_read_one_token_ahead_and_split_without_overlap(models):
    parts = models._source_text(window=16, sizes=(200, 50, 20))
    assert [tuple(part.inputs.shape) for part in parts] == [(200, 16), (50, 16), (20, 16)]
    for part in parts:
        assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])
        assert part.targets.max() < 128
    windows = [{tuple(row) for row in part.inputs.tolist()} for part in parts]
    assert len(windows[0] & windows[2]) < 5  # lines that many modules have


def test_samples_are_different_examples_and_repeat(models):
    examples = models.Examples(torch.arange(30)[:, None], torch.arange(30))
    drawn = examples.sample(12, seed=3)
    assert len(drawn.targets.unique()) == 12
    assert torch.equal(drawn.inputs[:, 0], drawn.targets)
    assert torch.equal(drawn.targets, examples.sample(12, seed=3).targets)
    assert not torch.equal(drawn.targets, examples.sample(12, seed=4).targets)
    assert [len(x) for x, _ in drawn.batches(5)] == [5, 5, 2]


def test_training_repeats_bit_for_bit_and_is_cached(models, monkeypatch):
    training, _, held_out = models._digits()
    before = torch.get_rng_state()
    recipe = {"steps": 15, "batch": 16, "rate": 2e-3}
    first = models._trained(models.MobileNet, training, models._warped, **recipe)
    assert torch.equal(torch.get_rng_state(), before)
    (kept,) = models.CACHE.glob("mobilenet_*.safetensors")
    assert (models.CACHE / ".gitignore").read_text() == "*\n"
    kept.unlink()
    again = models._trained(models.MobileNet, training, models._warped, **recipe)
    monkeypatch.setattr(torch.optim, "AdamW", None)  # from now on nothing can be trained
    cached = models._trained(models.MobileNet, training, models._warped, **recipe)
    for other in (again, cached):
        assert torch.equal(first(held_out.inputs), other(held_out.inputs))
    with pytest.raises(TypeError):
        models._trained(models.MobileNet, training, models._warped, **{**recipe, "steps": 16})


def test_the_resnet_is_read_from_its_two_files(models, tmp_path):
    torch.manual_seed(0)
    network = models.ResNet20().eval()
    save_file(network.state_dict(), tmp_path / "resnet20_cifar10.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    arrays = {"calibration": images[:3], "test": images[3:]}
    np.savez(
        tmp_path / "cifar10_sample.npz",
        **{f"{part}_images": array for part, array in arrays.items()},
        **{f"{part}_labels": np.arange(len(array)) for part, array in arrays.items()},
    )
    trained = models.resnet20(tmp_path)
    assert (len(trained.pool), trained.held_out.targets.tolist()) == (3, [0, 1])
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = np.stack([(images[3:, c] / 255 - mean[c]) / std[c] for c in range(3)], axis=1).astype(np.float32)
    torch.testing.assert_close(trained.held_out.inputs, torch.from_numpy(expected))
    torch.testing.assert_close(trained.model(trained.held_out.inputs), network(torch.from_numpy(expected)))
