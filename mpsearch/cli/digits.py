"""`mpsearch demo`: the whole way from a trained network to measured plans, on scikit-learn's digits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import mpsearch as mps
from mpsearch.errors import MissingPackage

PRECISIONS = "w2 w3 w4 w6 w8"
BUDGETS = (2.5, 3.0, 4.0)  # average weight bits
MIDDLE = 3.0  # the one whose result is kept, with its curve


@dataclass(frozen=True)
class Result:
    """The network of the demo and its searches.

    Attributes:
        parameters: of the network.
        searches: average weight bits -> result of the search within them.
    """

    parameters: int
    searches: Mapping[float, mps.SearchResult]

    @property
    def middle(self) -> mps.SearchResult:
        """The result that is kept, with its whole measured curve."""
        return self.searches[MIDDLE]


class DigitsNet(nn.Sequential):
    """Four convolutions with batch norm, one of them depthwise, and a linear layer: 8 x 8 digits to 10 classes."""

    def __init__(self, width: int = 24) -> None:
        def block(inputs: int, outputs: int, groups: int = 1, stride: int = 1) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        super().__init__(
            *block(1, width),
            *block(width, width, groups=width),
            *block(width, 2 * width, stride=2),
            *block(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training, calibration and held-out images and labels: 1000, 256 and 541 of scikit-learn's 1797.

    Raises:
        MissingPackage: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackage("the demo needs scikit-learn: pip install 'mpsearch[demo]'") from None
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.long)[order]
    parts = [(images[a:b], labels[a:b]) for a, b in ((0, 1000), (1000, 1256), (1256, None))]
    return parts[0], parts[1], parts[2]


def train(images: Tensor, labels: Tensor, seed: int, epochs: int, width: int = 24) -> nn.Module:
    """Train a `DigitsNet` with AdamW and a one-cycle rate; same seed, same network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet(width)
        steps = -(-len(images) // 64)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * steps)
        for _ in tqdm(range(epochs), desc="training", disable=None, leave=False):
            for batch in torch.randperm(len(images)).split(64):
                shift = torch.randint(-1, 2, (2,)).tolist()
                loss = nn.functional.cross_entropy(model(images[batch].roll(shift, (2, 3))), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def run(out: Path, *, seed: int = 0, epochs: int = 25, width: int = 24) -> Result:
    """Train, search at every budget, and write the result of the middle one with its whole measured curve into a folder.

    Args:
        out: folder, made if need be.
        seed: of data split, training and search.
        epochs: of training.
        width: channels of the network.
    """
    training, calibration, test = digits(seed)
    model = train(*training, seed, epochs, width)
    batches = list(zip(calibration[0].split(128), calibration[1].split(128), strict=True))
    held_out = list(zip(test[0].split(256), test[1].split(256), strict=True))
    precisions = mps.precisions(PRECISIONS)
    searches: dict[float, mps.SearchResult] = {}
    for limit in (MIDDLE, *(limit for limit in BUDGETS if limit != MIDDLE)):
        searches[limit] = mps.search(
            model,
            batches,
            mps.Budget(average_bits=limit),
            precisions,
            report=held_out,
            front=limit == MIDDLE,
            previous=searches.get(MIDDLE),
            seed=seed,
        )
    searches[MIDDLE].save(out)
    searches[MIDDLE].front.plot(out / "front.png", mark=searches[MIDDLE].plan, title="Digits network: measured damage")
    return Result(
        sum(parameter.numel() for parameter in model.parameters()), {limit: searches[limit] for limit in BUDGETS}
    )
