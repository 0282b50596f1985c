"""The networks of the benchmarks, with their data: a ResNet-20, a small ViT, a MobileNetV2-like net, a small language model.

Each function returns a trained network, a pool to draw calibration data from, and held-out data; the network has seen neither of
the two, but for the ResNet, whose pool is part of its training set. Trained weights are kept in `benchmarks/cache/`, under
a hash of the source and the data that they come from; the same source, data, torch and number of threads give the same weights.
"""

import hashlib
import inspect
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from mpsearch.files.writing import write_atomically
from mpsearch.models.running import fingerprint

DATA = Path(__file__).resolve().parent / "data"  # not in the repository: put or link the two files of `resnet20` there
CACHE = Path(__file__).resolve().parent / "cache"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels: images and digits, or (N, T) tokens and the tokens that follow them."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """All examples in order, `size` at a time."""
        return list(zip(self.inputs.split(size), self.targets.split(size), strict=True))

    def first(self, count: int) -> "Examples":
        """The first `count` examples."""
        return Examples(self.inputs[:count], self.targets[:count])

    def sample(self, count: int, seed: int) -> "Examples":
        """`count` different examples, drawn by `seed`."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Examples(self.inputs[chosen], self.targets[chosen])


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network in evaluation mode, and its data."""

    model: nn.Module
    pool: Examples
    held_out: Examples


def resnet20(folder: Path = DATA) -> Trained:
    """ResNet-20 on CIFAR-10: 20 layers, 0.27 M weights; 1024 training images to calibrate on, 846 test images.

    Args:
        folder: holds resnet20_cifar10.safetensors (He et al. 2015; option-A shortcuts) and cifar10_sample.npz.
    """
    model = ResNet20()
    model.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"), strict=False)
    data = np.load(folder / "cifar10_sample.npz")
    parts = []
    for part in ("calibration", "test"):
        images = (torch.tensor(data[f"{part}_images"]).float() / 255 - MEAN) / STD
        parts.append(Examples(images, torch.tensor(data[f"{part}_labels"])))
    return Trained(model.eval(), *parts)


def vit() -> Trained:
    """A small vision transformer on scikit-learn's digits: 26 layers, 0.11 M weights."""
    training, pool, held_out = _digits()
    return Trained(_trained(ViT, training, _warped, steps=2000, batch=64, rate=2e-3), pool, held_out)


def mobilenet() -> Trained:
    """A MobileNetV2-like net on scikit-learn's digits: 21 layers, six of them depthwise, 0.04 M weights."""
    training, pool, held_out = _digits()
    return Trained(_trained(MobileNet, training, _warped, steps=500, batch=64, rate=5e-3), pool, held_out)


def decoder() -> Trained:
    """A small Llama-like language model on the source of Python's standard library, a token a character: 30 layers, 0.22 M weights."""
    training, pool, held_out = _source_text(window=64, sizes=(20_000, 512, 128))
    return Trained(_trained(Decoder, training, None, steps=1500, batch=32, rate=4e-3), pool, held_out)


#: Name -> function.
MODELS: dict[str, Callable[[], Trained]] = {
    "resnet20": resnet20,
    "vit": vit,
    "mobilenet": mobilenet,
    "decoder": decoder,
}


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; at a change of width every second pixel, padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = outputs // 4 if stride != 1 or inputs != outputs else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu(y + shortcut)


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2, n = 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for number, (inputs, outputs, stride) in enumerate(widths, 1):
            blocks = [Block(inputs, outputs, stride), Block(outputs, outputs, 1), Block(outputs, outputs, 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for number in (1, 2, 3):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Multi-head attention, written out; causal and with rotary positions where asked."""

    def __init__(self, width: int, heads: int, causal: bool, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.causal:
            q, k = _rotated(q), _rotated(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        mixed: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return mixed


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) for (B, heads, T, d): halves of each head turned by position x frequency."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** -(torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class EncoderBlock(nn.Module):
    """Attention and a GELU network, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=False, bias=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + y


class ViT(nn.Module):
    """Dosovitskiy et al. 2020, on 8 x 8 pixels in patches of 2 x 2, mean instead of a class token."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow (Sandler et al. 2018); a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        width = expansion * inputs
        self.widen = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        filters = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.filter = nn.Sequential(filters, nn.BatchNorm2d(width), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.narrow(self.filter(self.widen(x)))
        return x + y if self.shortcut else y


class MobileNet(nn.Sequential):
    """MobileNetV2 in small: a stem, six inverted residuals, a 1 x 1 convolution and a linear layer."""

    def __init__(self) -> None:
        widths = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 32, 1)]
        super().__init__(
            nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
            *(InvertedResidual(*width) for width in widths),
            nn.Sequential(nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(96, 10),
        )


class DecoderBlock(nn.Module):
    """Causal attention and a SwiGLU network, each behind an RMS norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, causal=True, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        z: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + z


class Decoder(nn.Module):
    """A language model as Llama's (Touvron et al. 2023) over the 128 characters of ASCII."""

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 176, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.blocks = nn.Sequential(*(DecoderBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 128, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits


def _digits() -> Iterator[Examples]:
    """Training, pool and held-out digits: 1000, 400 and 397 of scikit-learn's 1797."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.long)[order]
    return (Examples(images[a:b], labels[a:b]) for a, b in ((0, 1000), (1000, 1400), (1400, None)))


def _warped(images: Tensor) -> Tensor:
    """The images, each turned, sheared, scaled and moved a little; too few digits to teach attention without it."""
    count = len(images)
    turn, scale = 0.25 * torch.randn(count), 1 + 0.1 * torch.randn(count)
    cosine, sine = scale * turn.cos(), scale * turn.sin()
    matrix = torch.stack([cosine, -sine, sine, cosine], 1).view(count, 2, 2) + 0.1 * torch.randn(count, 2, 2)
    affine = torch.cat([matrix, 0.15 * torch.randn(count, 2, 1)], 2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # black beyond the edge


def _source_text(window: int, sizes: tuple[int, int, int]) -> list[Examples]:
    """Windows of the modules at the top of the running Python's standard library, ASCII alone; parts share no module."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [text for text in (file.read_bytes() for file in files) if text.isascii()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    parts = []
    for size in reversed(sizes):  # the small parts first, so that training gets the rest
        rows: list[Tensor] = []
        while order and len(rows) < size:
            tokens = torch.frombuffer(bytearray(texts[order.pop()]), dtype=torch.uint8).long()
            rows += [tokens[start : start + window + 1] for start in range(0, len(tokens) - window, window)]
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:size]
        windows = torch.stack(rows)[chosen]
        parts.append(Examples(windows[:, :-1], windows[:, 1:]))
    return parts[::-1]


def _trained(
    kind: Callable[[], nn.Module],
    training: Examples,
    augment: Callable[[Tensor], Tensor] | None,
    *,
    steps: int,
    batch: int,
    rate: float,
) -> nn.Module:
    """The network with its cached weights, or trained now with AdamW and a one-cycle rate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind()
        parts = {type(module) for module in model.modules() if type(module).__module__ == __name__}
        sources = [inspect.getsource(part) for part in sorted(parts, key=lambda part: part.__name__)]
        recipe = [
            *sources,
            inspect.getsource(_trained),
            str((steps, batch, rate)),
            augment and inspect.getsource(augment),
        ]
        data = fingerprint([training.inputs, training.targets])
        key = hashlib.blake2b("\n".join([*map(str, recipe), data]).encode(), digest_size=8).hexdigest()
        path = cache() / f"{type(model).__name__.lower()}_{key}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.eval()
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for _ in tqdm(range(steps), desc=f"training {type(model).__name__}", disable=None, leave=False):
            chosen = torch.randint(len(training), (batch,))
            inputs, targets = training.inputs[chosen], training.targets[chosen]
            logits = model(inputs if augment is None else augment(inputs))
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    write_atomically(path, save(model.state_dict()))
    return model.eval()


def cache() -> Path:
    """The folder for what can be made again, which git ignores."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    return CACHE
