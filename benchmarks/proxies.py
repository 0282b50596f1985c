"""What an evolved training-free proxy is worth on networks that it was not evolved on.

    python benchmarks/proxies.py [--signals evolved-on-two snip] [--seeds 0 1 2] [--generations 20] [--population 30]

Truth are the random plans of `benchmarks/sensitivity.py` with their measured damage (240 a network: half of all sizes, half at four
budgets). On two pairs of networks, and on all triples, a proxy is evolved once a seed; the fitness is the mean of Spearman's
correlations over the five sets of plans. The evolved proxies, all that are shipped, and a few other signals for comparison fill
tables from the same calibration data, and are judged on all four networks by their ranks of the random plans and by the measured
damage of their best plan at each budget. Writes benchmarks/results/proxies.csv; rows of other signals and seeds are kept.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from models import MODELS, Trained
from torch import nn

import mpsearch as mps
from mpsearch.core import printing
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.estimation.estimator import Estimator
from mpsearch.estimation.proxies.evolution import ProxyEvolution
from mpsearch.files.writing import write_atomically
from mpsearch.models.running import Batch
from mpsearch.plan_search.proxy_search import ProxyTruth, evolve_proxy
from mpsearch.sensitivity import ESTIMATORS
from mpsearch.sensitivity.evolved_proxy import EvolvedProxy
from sensitivity import PRECISIONS, RESULTS, SIZES, Judge, Truth, lock  # noqa: TID251, the benchmark beside this file

PLANS = 240
#: Row of the table -> sets of networks that a proxy is evolved on, once a set; it is new to the others.
EVOLVED: Mapping[str, Sequence[tuple[str, ...]]] = {
    "evolved-on-two": (("resnet20", "decoder"), ("vit", "mobilenet")),  # a convolutional network and a transformer each
    "evolved-on-three": tuple(itertools.combinations(MODELS, 3)),
}
PROXIES = (
    "snip",
    "synflow",
    "grasp",
    "channel-fisher",
    "gradient-weight",
    "qe",
    "emq",
    "hawq-proxy",
    "hawq-v2-proxy",
)
OTHERS = ("relative-weight-error", "fisher-projection", "kl-divergence")
#: Settings other than the defaults, for time.
SETTINGS: Mapping[str, Mapping[str, Any]] = {"hawq-proxy": {"num_iterations": 3}, "hawq-v2-proxy": {"num_samples": 8}}

#: What tells a row from others.
KEYS = ["signal", "evolved_on", "seed", "model", "average_bits_limit"]

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Network:
    """A network with its judge and its measured plans."""

    name: str
    trained: Trained
    judge: Judge
    truth: Truth

    @property
    def model(self) -> nn.Module:
        """The network itself."""
        return self.trained.model

    def calibration(self, seed: int) -> list[Batch]:
        """Two batches of calibration data, other ones for each seed."""
        size = SIZES[self.name][0]
        return [*self.trained.pool.sample(size, seed).batches(size // 2)]

    def sets(self) -> list[MeasuredPlans]:
        """The random plans of any size, and those at each budget."""
        at = list(self.truth.at.values())
        plans = [self.judge.plan(options) for options in self.truth.options]
        which = [np.flatnonzero(here) for here in (~np.any(at, axis=0), *at)]
        return [MeasuredPlans([plans[n] for n in here], self.truth.damage[here], unit="nats") for here in which]


@functools.cache
def network(name: str) -> Network:
    """A trained network; its plans are measured, or read from the cache."""
    trained = MODELS[name]()
    judge = Judge(name, trained.model, trained.held_out.batches(SIZES[name][1]))
    truth = Truth(judge, PLANS)
    judge.save()
    return Network(name, trained, judge, truth)


def evolved(names: Sequence[str], evolution: ProxyEvolution) -> EvolvedProxy:
    """The proxy of some networks and a seed."""
    seed = evolution.seed
    truths = [ProxyTruth(network(n).model, network(n).calibration(seed), network(n).sets()) for n in names]
    return evolve_proxy(truths, evolution, seed=seed)


def signals(name: str, evolution: ProxyEvolution) -> Iterator[tuple[tuple[str, ...], Estimator]]:
    """The estimators of a row of the table, and what each was evolved on."""
    if name in EVOLVED:
        for names in EVOLVED[name]:
            yield names, evolved(names, evolution)
    else:
        seeded = {"seed": evolution.seed} if "seed" in ESTIMATORS[name].__dataclass_fields__ else {}
        yield (), ESTIMATORS[name](**SETTINGS.get(name, {}), **seeded)


def judged(on: Network, seed: int, name: str, estimator: Estimator, evolved_on: Sequence[str] = ()) -> list[Row]:
    """One row a budget."""
    start = time.process_time()
    table = mps.profile(
        on.model, on.calibration(seed), estimator, PRECISIONS, groups="none", resources=(), progress=False
    )
    seconds = time.process_time() - start
    found = on.truth.judged(table)
    on.judge.save()
    passes = table.origin["passes"]
    origin = estimator.origin if isinstance(estimator, EvolvedProxy) else {}
    return [
        {
            "signal": name,
            "evolved_on": " ".join(evolved_on),
            "seed": seed,
            "model": on.name,
            "average_bits_limit": limit,
            "model_is_new": on.name not in evolved_on,
            "formula": str(estimator) if isinstance(estimator, EvolvedProxy) else "",
            "fitness": origin.get("fitness", math.nan),
            "trees": origin.get("trees", 0),
            "model_fingerprint": on.judge.fingerprint,
            "average_bits": row["average_bits"],
            "kl": row["kl"],
            "kl_se": row["kl_se"],
            "uniform_kl": on.truth.baselines[limit]["uniform_kl"],
            "kl_over_uniform": row["kl"] / on.truth.baselines[limit]["uniform_kl"],
            "spearman": row["spearman"],
            "spearman_at_limit": row["spearman_at_limit"],
            "passes": passes["forward"] + 2 * passes["backward"],
            "cpu_s": seconds,
        }
        for limit, row in found.items()
    ]


def merge(path: Path, rows: Sequence[Row]) -> pd.DataFrame:
    """Put rows into the CSV, in the place of those with the same keys; all rows."""
    found = pd.DataFrame(rows)
    with lock():
        if path.exists():
            found = pd.concat([pd.read_csv(path, keep_default_na=False, na_values=["nan"]), found])
        found = found.drop_duplicates(KEYS, keep="last").sort_values(KEYS)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, found.to_csv(index=False, float_format="%.6g", na_rep="nan"))
    return found


def summary(found: pd.DataFrame) -> str:
    """A line a signal: means over seeds and budgets, for each network; evolved ones apart where the network is new and where not."""
    lines = []
    for (name, new), mine in found.groupby(["signal", "model_is_new"]):
        by_model = [mine[mine["model"] == model] for model in MODELS]
        ratios = [geometric_mean(here["kl_over_uniform"]) for here in by_model]
        ranks = [float(here["spearman"].mean()) for here in by_model]
        ranks_at = [float(here["spearman_at_limit"].mean()) for here in by_model]
        label = name if name not in EVOLVED else f"{name}, {'new to it' if new else 'seen'}"
        means = [geometric_mean(ratios), float(np.mean(ranks)), float(np.mean(ranks_at))]
        lines.append((means[0], [label, *(f"{value:.3g}" for value in (*means, *ratios, *ranks_at))]))
    header = ["signal", "KL/uniform", "Spearman", "at equal size"]
    header += [f"KL/uniform {name}" for name in MODELS] + [f"equal size {name}" for name in MODELS]
    return printing.table(header, [cells for _, cells in sorted(lines)], width=None)


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return math.exp(float(np.mean([math.log(value) for value in values])))


def main() -> int:
    names = (*EVOLVED, *PROXIES, *OTHERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration sets and evolution")
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "proxies.csv", metavar="FILE.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed, name in itertools.product(options.seeds, options.signals):
        start = time.perf_counter()
        for evolved_on, estimator in signals(name, ProxyEvolution(options.generations, options.population, seed=seed)):
            if isinstance(estimator, EvolvedProxy):
                fitness = estimator.origin["fitness"]
                print(f"seed {seed}, on {', '.join(evolved_on)}: {estimator}, fitness {fitness:.3f}", flush=True)
            rows = [judged(network(model), seed, name, estimator, evolved_on) for model in MODELS]
            found = merge(options.out, [row for part in rows for row in part])
        print(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(summary(found))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
