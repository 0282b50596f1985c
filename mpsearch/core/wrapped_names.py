"""Names of layers with and without what wraps a model: torch.compile, data parallelism, activation checkpoints."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from mpsearch.core.plan import Plan
from mpsearch.errors import PlanError

#: Names that wrappers give to the module inside: torch.compile, DataParallel and DistributedDataParallel, FSDP, checkpoint_wrapper.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PART = re.compile(rf"(?<![^.\s(])(?:{'|'.join(_WRAPPERS)})\.")


def plain(name: str) -> str:
    """A name, or the title of a group, without the names that wrappers give.

    >>> plain("_orig_mod.layers.0.module.q_proj"), plain("my_module.fc"), plain("module")
    ('layers.0.q_proj', 'my_module.fc', 'module')
    """
    return _PART.sub("", name)


def by_names_of(plan: Plan, names: Iterable[str]) -> Plan:
    """The plan by the names of a model: a layer that is wrapped here and not there, or the other way round, is the same.

    Args:
        plan: any plan.
        names: of the modules and parameters of the model.

    Returns:
        The plan itself where nothing is renamed. A name that fits nothing stays as it is.

    Raises:
        PlanError: where a name fits several layers, or two names fit one.

    >>> from mpsearch import Precision
    >>> dict(by_names_of(Plan({"_orig_mod.fc": Precision("4")}), ["fc", "head"]))
    {'fc': Precision(weight='4', activation='16', group_size=None)}
    """
    own = set(names)
    if plan.keys() <= own:
        return plan
    by_plain_name: dict[str, list[str]] = {}
    for name in sorted(own):
        by_plain_name.setdefault(plain(name), []).append(name)
    renamed = {name: _match(name, own, by_plain_name) for name in plan}
    taken: dict[str, str] = {}
    for name, new in renamed.items():
        if taken.setdefault(new, name) != name:
            raise PlanError(f"{taken[new]!r} and {name!r} of the plan are both the layer {new!r}")
    if all(name == new for name, new in renamed.items()):
        return plan
    return replace(plan, layers={new: plan[name] for name, new in renamed.items()})


def _match(name: str, own: set[str], by_plain: Mapping[str, list[str]]) -> str:
    if name in own:
        return name
    candidates = by_plain.get(plain(name), [])
    if len(candidates) > 1:
        raise PlanError(f"the plan's {name!r} may be {' or '.join(map(repr, candidates))}: rename it")
    return candidates[0] if candidates else name
