"""`mpsearch demo`: the whole way from a trained network to measured plans, on scikit-learn's digits."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import mpsearch as mps
from mpsearch import report
from mpsearch.errors import MissingPackage
from mpsearch.evaluation import Evaluation
from mpsearch.plot import Measured
from mpsearch.problem import uniform, usage_of
from mpsearch.sensitivity import HessianTrace, KLDivergence

PRECISIONS = "w2 w3 w4 w6 w8"
BUDGETS = (2.5, 3.0, 4.0)  # average weight bits


@dataclass(frozen=True)
class Result:
    """What the demo found: `content` for machines, `text` for a person."""

    content: dict[str, Any]
    text: str


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
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(found.target, dtype=torch.long)[order]
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
            for chosen in torch.randperm(len(images)).split(64):
                shift = torch.randint(-1, 2, (2,)).tolist()
                loss = nn.functional.cross_entropy(model(images[chosen].roll(shift, (2, 3))), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def run(out: Path, *, seed: int = 0, epochs: int = 25, width: int = 24) -> Result:
    """Train, profile, solve, measure, and write `table.csv`, `plan.json`, `front.csv` and `front.png`.

    Args:
        out: folder, made if need be.
        seed: of data split, training and probes.
        epochs: of training.
        width: channels of the network.
    """
    training, calibration, test = digits(seed)
    model = train(*training, seed, epochs, width)
    calibrated = [(x, y) for x, y in zip(calibration[0].split(128), calibration[1].split(128), strict=True)]
    held_out = [(x, y) for x, y in zip(test[0].split(256), test[1].split(256), strict=True)]
    precisions = mps.precisions(PRECISIONS)
    tables = mps.profile(model, calibrated, [KLDivergence(), HessianTrace(num_samples=16, seed=seed)], precisions)
    judge = tables[0]

    uniforms = []
    for name, totals in uniform(judge):
        plan = mps.Plan({layer.name: mps.Precision.parse(name) for layer in judge.layers})
        uniforms.append((name, totals, mps.evaluate(model, held_out, plan)))
    rows = []
    for limit in BUDGETS:
        for label, table in zip(("KL", "Hessian trace"), tables, strict=True):
            solution = mps.solve(table, mps.Budget(average_bits=limit))
            assert solution.plan is not None
            rows.append((limit, label, solution, mps.evaluate(model, held_out, solution.plan)))

    out.mkdir(parents=True, exist_ok=True)
    judge.save(out / "table.csv")
    tables[1].save(out / "table-hessian-trace.csv")
    chosen = next(row for row in rows if row[0] == 3.0 and row[1] == "KL")[2]
    assert chosen.plan is not None
    chosen.plan.save(out / "plan.json")
    front = mps.pareto(judge, "memory_bytes")
    front.save(out / "front.csv")
    front.plot(
        out / "front.png",
        mark=chosen,
        measured=[_series("plans, measured on held-out digits", rows), _uniform_series(uniforms)],
        title="Digits network: damage over memory",
    )
    comparisons = [_comparison(row, uniforms, judge) for row in rows]
    content = {
        "budgets": comparisons,
        "uniform": [
            {
                "precision": n,
                "memory_bytes": t["memory_bytes"],
                "kl": e.kl,
                "kl_se": e.kl_se,
                "accuracy": e.accuracy,
            }
            for n, t, e in uniforms
        ],
        "files": [
            str(out / name) for name in ("table.csv", "table-hessian-trace.csv", "plan.json", "front.csv", "front.png")
        ],
    }
    return Result(content, _text(model, comparisons, uniforms, out, uniforms[0][2]))


def _series(label: str, rows: list[tuple[float, str, mps.Solution, Evaluation]]) -> Measured:
    return Measured(
        label,
        [row[2].usage["memory_bytes"] for row in rows],
        [row[3].kl for row in rows],
        [row[3].kl_se for row in rows],
    )


def _uniform_series(uniforms: list[tuple[str, dict[str, float], Evaluation]]) -> Measured:
    return Measured(
        "uniform precision, measured",
        [totals["memory_bytes"] for _, totals, _ in uniforms],
        [found.kl for *_, found in uniforms],
        [found.kl_se for *_, found in uniforms],
        uniform=True,
    )


def _comparison(
    row: tuple[float, str, mps.Solution, Evaluation],
    uniforms: list[tuple[str, dict[str, float], Evaluation]],
    judge: mps.CostTable,
) -> dict[str, Any]:
    """A plan beside the uniform precision that a user would take instead: the cheapest with at least as many bytes."""
    limit, label, solution, measured = row
    assert solution.plan is not None
    size = usage_of(judge, _columns(judge, solution.plan))["memory_bytes"]
    larger = [u for u in uniforms if u[1]["memory_bytes"] >= size]
    name, totals, other = min(larger, key=lambda u: u[1]["memory_bytes"])
    difference = other.kl - measured.kl
    error = math.hypot(other.kl_se, measured.kl_se)
    verdict = "mixed wins" if difference > 2 * error else "uniform wins" if difference < -2 * error else "no difference"
    return {
        "average_bits_limit": limit,
        "estimator": label,
        "average_bits": solution.usage["average_bits"],
        "memory_bytes": size,
        "predicted": solution.sensitivity,
        "status": str(solution.status),
        "kl": measured.kl,
        "kl_se": measured.kl_se,
        "accuracy": measured.accuracy,
        "uniform": name,
        "uniform_memory_bytes": totals["memory_bytes"],
        "uniform_kl": other.kl,
        "uniform_kl_se": other.kl_se,
        "uniform_accuracy": other.accuracy,
        "verdict": verdict,
    }


def _columns(table: mps.CostTable, plan: mps.Plan) -> Any:
    import numpy as np

    return np.array([table.precisions.index(plan[layer.name]) for layer in table.layers])


def _text(
    model: nn.Module,
    comparisons: list[dict[str, Any]],
    uniforms: list[tuple[str, dict[str, float], Evaluation]],
    out: Path,
    any_evaluation: Evaluation,
) -> str:
    reference = any_evaluation.reference
    assert reference is not None
    weights = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"A network of {weights} parameters on handwritten digits, {report.percent(reference.accuracy)} right on "
        f"{reference.num_samples} held-out images.",
        "Damage is the KL divergence from the unquantized network in nats; ± is one standard error.",
        "",
        report.table(
            ["budget", "by", "plan", "predicted", "measured", "right", "instead", "measured", "right", ""],
            [
                [
                    f"{c['average_bits_limit']:g} bits",
                    c["estimator"].split()[0],
                    f"{c['average_bits']:.2f} b",
                    report.damage(c["predicted"]),
                    report.damage(c["kl"], c["kl_se"]),
                    report.percent(c["accuracy"]),
                    c["uniform"],
                    report.damage(c["uniform_kl"], c["uniform_kl_se"]),
                    report.percent(c["uniform_accuracy"]),
                    c["verdict"],
                ]
                for c in comparisons
            ],
        ),
        "",
        "'instead' is the smallest uniform precision with at least the plan's bytes.",
        "Every plan is proven optimal for its table." if all(c["status"] == "optimal" for c in comparisons) else "",
        "",
        report.table(
            ["uniform", "memory", "measured damage", "right"],
            [
                [
                    name,
                    report.amount("memory_bytes", totals["memory_bytes"]),
                    report.damage(found.kl, found.kl_se),
                    report.percent(found.accuracy),
                ]
                for name, totals, found in uniforms
            ],
        ),
        "",
        f"{out}/: table.csv, table-hessian-trace.csv, plan.json (3 bits, KL), front.csv, front.png",
    ]
    return "\n".join(lines)
