"""Import every public module and run a small search; for an environment that holds the declared dependencies alone."""

import importlib
import pkgutil

import torch
from torch import nn

import mpsearch as mps
from mpsearch.cli import main


def modules() -> list[str]:
    """Names of all modules of the package, but for `__main__`, which would run."""
    found = pkgutil.walk_packages(mps.__path__, "mpsearch.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


def small_search() -> mps.SearchResult:
    """A search over two layers, as a user's first one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batches = [(torch.randn(16, 16), torch.randint(0, 4, (16,))) for _ in range(4)]
    return mps.search(model, batches, mps.Budget(average_bits=4), mps.precisions("w2 w4 w8"), progress=False)


if __name__ == "__main__":
    names = modules()
    for name in names:
        importlib.import_module(name)
    for name in dir(mps):
        getattr(mps, name)
    result = small_search()
    result.save("result")
    result.report("report.html")
    assert main(["completion", "bash"]) == 0
    print(f"{len(names)} modules imported; {result.verdict}")
