"""Plans for a trained ResNet-20 on CIFAR-10, measured against uniform precision.

    python benchmarks/cifar_resnet20.py --data ../shared/data

DIR holds resnet20_cifar10.safetensors (He et al. 2015; option-A shortcuts) and cifar10_sample.npz. Writes
benchmarks/results/cifar_resnet20.csv and .png.
"""

import argparse
import csv
import io
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch import report
from mpsearch.files import write_atomically
from mpsearch.plot import Measured
from mpsearch.problem import uniform, usage_of
from mpsearch.sensitivity import HessianTrace, KLDivergence

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = "w2 w3 w4 w6 w8"
BUDGETS = (2.5, 3.0, 4.0, 5.0)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


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
        return self.linear(x.mean((2, 3)))


def network(folder: Path) -> nn.Module:
    model = ResNet20()
    model.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"), strict=False)
    return model.eval()


def batches(folder: Path, part: str, size: int, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
    data = np.load(folder / "cifar10_sample.npz")
    images = (torch.tensor(data[f"{part}_images"][:count]).float() / 255 - MEAN) / STD
    labels = torch.tensor(data[f"{part}_labels"][:count])
    return list(zip(images.split(size), labels.split(size), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), metavar="DIR")
    parser.add_argument("--calibration", type=int, default=512, help="images for the tables")
    options = parser.parse_args()
    model, test = network(options.data), batches(options.data, "test", 282)
    calibration = batches(options.data, "calibration", 128, options.calibration)
    start = time.perf_counter()

    names = [layer.name for layer in mps.layers(model, test[0])]
    plain = mps.evaluate(model, test, mps.Plan({names[0]: mps.Precision("16")}))
    print(f"unquantized: {report.percent(plain.accuracy, plain.accuracy_se)} right, cross-entropy {plain.loss:.4f}")
    assert plain.accuracy is not None
    if round(plain.accuracy, 3) != 0.917:
        print(
            f"expected 91.7 % on the test images, got {100 * plain.accuracy:.2f} %: wrong weights or data",
            file=sys.stderr,
        )
        return 1

    tables = mps.profile(model, calibration, [KLDivergence(), HessianTrace(num_samples=32)], mps.precisions(PRECISIONS))
    uniforms = []
    for name, totals in uniform(tables[0]):
        plan = mps.Plan(dict.fromkeys(names, mps.Precision.parse(name)))
        uniforms.append((name, totals, mps.evaluate(model, test, plan)))
    rows = []
    for limit in BUDGETS:
        for table in tables:
            found = mps.solve(table, mps.Budget(average_bits=limit))
            assert found.plan is not None
            measured = mps.evaluate(model, test, found.plan)
            columns = np.array([table.precisions.index(found.plan[name]) for name in names])
            size = usage_of(table, columns)["memory_bytes"]
            other, totals, baseline = min(
                (u for u in uniforms if u[1]["memory_bytes"] >= size), key=lambda u: u[1]["memory_bytes"]
            )
            error = math.hypot(measured.kl_se, baseline.kl_se)
            rows.append(
                {
                    "average_bits_limit": limit,
                    "estimator": str(table.origin["estimator"]).split("(")[0],
                    "forward_passes": table.origin["passes"]["forward"],
                    "backward_passes": table.origin["passes"]["backward"],
                    "average_bits": found.usage["average_bits"],
                    "memory_bytes": size,
                    "status": str(found.status),
                    "predicted_kl": found.sensitivity,
                    "kl": measured.kl,
                    "kl_se": measured.kl_se,
                    "loss": measured.loss,
                    "loss_se": measured.loss_se,
                    "accuracy": measured.accuracy,
                    "accuracy_se": measured.accuracy_se,
                    "uniform": other,
                    "uniform_memory_bytes": totals["memory_bytes"],
                    "uniform_kl": baseline.kl,
                    "uniform_kl_se": baseline.kl_se,
                    "uniform_loss": baseline.loss,
                    "uniform_accuracy": baseline.accuracy,
                    "kl_difference": baseline.kl - measured.kl,
                    "kl_difference_se": error,
                    "test_images": measured.num_samples,
                }
            )
            print(
                report.table(
                    list(rows[-1])[:13],
                    [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in list(rows[-1].values())[:13]]],
                )
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "cifar_resnet20.csv", text.getvalue())

    series = [
        Measured(
            f"plans by {kind}, measured",
            [row["memory_bytes"] for row in rows if row["estimator"] == kind],
            [row["kl"] for row in rows if row["estimator"] == kind],
            [row["kl_se"] for row in rows if row["estimator"] == kind],
        )
        for kind in ("KLDivergence", "HessianTrace")
    ]
    series.append(
        Measured(
            "uniform precision, measured",
            [totals["memory_bytes"] for _, totals, _ in uniforms],
            [found.kl for *_, found in uniforms],
            [found.kl_se for *_, found in uniforms],
            uniform=True,
        )
    )
    mps.pareto(tables[0]).plot(
        RESULTS / "cifar_resnet20.png",
        measured=series,
        title="ResNet-20 on CIFAR-10: damage over memory, 846 test images",
    )
    print(f"{time.perf_counter() - start:.0f} s; wrote {RESULTS / 'cifar_resnet20.csv'} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
