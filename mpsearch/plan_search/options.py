"""What `search` can be told beyond its own arguments."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TypedDict

from mpsearch.core.layer_options import Groups
from mpsearch.core.layer_options import Options as LayerPrecisions
from mpsearch.core.precision import Precision
from mpsearch.errors import nearest
from mpsearch.estimation.context import Loss
from mpsearch.estimation.estimator import Estimator
from mpsearch.models.running import Batch
from mpsearch.plan_search.proposers import Proposer
from mpsearch.plan_search.results.result import SearchResult
from mpsearch.resources.columns import ResourceFunction


class SearchOptions(TypedDict, total=False):
    """Further keywords of `search`, each with its default in brackets.

    Attributes:
        select: data to select plans on (45 % of the batches; 25 % where passes are few).
        report: data to report on, which nothing else sees (20 % of the batches).
        loss: `loss(model, batch) -> scalar` of your own, for `metric="loss"` (None).
        higher_is_better: direction of a metric of your own (False).
        tolerance: find the least `minimize` with a damage of at most this, as `LeastResource` does (None).
        minimize: resource, with `tolerance`, or of a front without a budget (`memory_bytes`).
        front: measure a whole Pareto curve, as `WholeFront` does (False).
        estimators: tables to start from instead of the default ones (None).
        proposers: who names the plans to measure, in place of the default ones: names in `mpsearch.plan_search.proposers.PROPOSERS`, or
            objects with the method `propose` (None).
        exclude: names or patterns of layers to leave alone, where `layers` is not given (none).
        groups: layers that share a precision, as for `mps.layers` (`auto`).
        allow: precisions of single layers, `{"lm_head": "w8", "*.mlp.*": "w2 w3"}`, as for `mps.layers`; those that are not in
            `precisions` are columns that other layers may not have (None). Uniform precision, which the plan is compared with, is then
            uniform where that is allowed.
        fixed: what is decided already: a plan, its file, or name or pattern -> one precision (None).
        resources: names of resources, or functions of your own by name (`memory_bytes` and `bitops`).
        checkpoint: a file that finished work goes to; a run that finds it there goes on, and ends with the same result (None).
        previous: a result, or the folder that it was saved to, of a search on the same model and data: all that it has run is free (None).
        memory_bytes: the most that the search may hold, the weights included (`8GB`, `50%`): what needs more is refused before it starts
            (all that is free).
        progress: show a bar on stderr where that is a terminal (True).
    """

    select: Iterable[Batch] | None
    report: Iterable[Batch] | None
    loss: Loss | None
    higher_is_better: bool
    tolerance: float | None
    minimize: str
    front: bool
    estimators: Sequence[Estimator] | None
    proposers: Sequence[str | Proposer] | None
    exclude: Sequence[str]
    groups: Groups
    allow: Mapping[str, LayerPrecisions] | None
    fixed: Mapping[str, str | Precision] | str | PathLike[str] | None
    resources: Sequence[str] | Mapping[str, ResourceFunction]
    checkpoint: str | Path | None
    previous: SearchResult | str | Path | None
    memory_bytes: float | str | None
    progress: bool


def with_defaults(options: SearchOptions, others: Iterable[str]) -> SearchOptions:
    """All options, those that are not given at their defaults.

    Args:
        options: by name.
        others: further keywords of `search`, for the message.

    Raises:
        TypeError: for an unknown name, with the nearest one.

    >>> with_defaults({"front": True}, ())["minimize"]
    'memory_bytes'
    """
    defaults: SearchOptions = {
        "select": None,
        "report": None,
        "loss": None,
        "higher_is_better": False,
        "tolerance": None,
        "minimize": "memory_bytes",
        "front": False,
        "estimators": None,
        "proposers": None,
        "exclude": (),
        "groups": "auto",
        "allow": None,
        "fixed": None,
        "resources": ("memory_bytes", "bitops"),
        "checkpoint": None,
        "previous": None,
        "memory_bytes": None,
        "progress": True,
    }
    for name in options:
        if name not in defaults:
            raise TypeError(f"search() has no argument {name!r}{nearest(name, (*defaults, *others))}")
    return {**defaults, **options}
