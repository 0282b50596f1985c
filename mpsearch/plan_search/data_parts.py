"""The three parts of a search's data: one to score on, one to select on, one to report on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from mpsearch.errors import EstimatorError
from mpsearch.models.data.batches import missing_labels
from mpsearch.models.data.splitting import check_sizes, split
from mpsearch.models.running import Batch, collect, targets_of
from mpsearch.plan_search.task import size

#: Shares of the data where it is one set.
SHARES = {"score": 0.35, "select": 0.45, "report": 0.20}
#: The same where few passes are spent: what counts then is the sweep.
FEW_SHARES = {"score": 0.55, "select": 0.25, "report": 0.20}


@dataclass(frozen=True, eq=False)
class DataParts:
    """Data that was read once, and its parts.

    Attributes:
        whole: name of an argument -> its batches.
        parts: `score`, `select`, `report` -> batches.
    """

    whole: Mapping[str, list[Batch]]
    parts: Mapping[str, list[Batch]]

    @property
    def every(self) -> list[Batch]:
        """All batches."""
        return [batch for part in self.whole.values() for batch in part]

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each part."""
        return {name: size(part) for name, part in self.parts.items()}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Mapping[str, Iterable[Batch] | None],
        shares: Mapping[str, float],
        seed: int,
        labels_for: str | None,
    ) -> "DataParts":
        """Read the data, and split off the parts that are not given.

        Args:
            model: decides how batches are read.
            data: `batches`, `select`, `report`; None where a part is to be split off.
            shares: of the parts, of all that is split.
            seed: of the split.
            labels_for: what needs labels, for the message; None for nothing.

        Raises:
            EstimatorError: for too little data, or labels that are missing or all ignored.
        """
        whole = {name: collect(batches, model) for name, batches in data.items() if batches is not None}
        if labels_for is not None:
            _check_labels(labels_for, whole)
        missing = {name: share for name, share in shares.items() if name not in whole}
        total = sum(missing.values())
        parts = split(whole["batches"], {name: share / total for name, share in missing.items()}, seed)
        parts |= {name: part for name, part in whole.items() if name in shares}
        check_sizes({name: size(part) for name, part in parts.items()})
        _check_counted(parts)
        return cls(whole, {name: parts[name] for name in shares})


def _check_labels(metric: str, data: Mapping[str, list[Batch]]) -> None:
    for name, part in data.items():
        for number, batch in enumerate(part):
            if targets_of(batch) is None:
                raise EstimatorError(
                    f"the {metric} needs labels, batch {number} of {name} has {missing_labels(batch)}; give "
                    "(inputs, targets), or the metric 'kl'"
                )


def _check_counted(parts: Mapping[str, list[Batch]]) -> None:
    for name, part in parts.items():
        labels = [targets_of(batch) for batch in part]
        if all(values is not None and bool((values == -100).all()) for values in labels):
            raise EstimatorError(f"every label of the {name} part is -100, which means ignored: no prediction counts")
