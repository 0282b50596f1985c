"""Plans for a trained ResNet-20 on CIFAR-10, measured against uniform precision.

    python benchmarks/cifar_resnet20.py --data DIR

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
from models import DATA, resnet20

import mpsearch as mps
from mpsearch.core import printing
from mpsearch.core.problem import uniform, usage_of
from mpsearch.display.figures import Measured
from mpsearch.files.writing import write_atomically
from mpsearch.sensitivity import HessianTrace, KLDivergence

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = "w2 w3 w4 w6 w8"
BUDGETS = (2.5, 3.0, 4.0, 5.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument("--calibration", type=int, default=512, help="images for the tables")
    options = parser.parse_args()
    trained = resnet20(options.data)
    model, test = trained.model, trained.held_out.batches(282)
    calibration = trained.pool.first(options.calibration).batches(128)
    start = time.perf_counter()

    names = [layer.name for layer in mps.layers(model, test[0])]
    plain = mps.evaluate(model, test, mps.Plan({names[0]: mps.Precision("16")}))
    print(f"unquantized: {printing.percent(plain.accuracy, plain.accuracy_se)} right, cross-entropy {plain.loss:.4f}")
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
                printing.table(
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
