"""The door from a model to its decisions."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.layer_options import Options, with_options
from mpsearch.core.precision import Precision
from mpsearch.core.printing import WORTH_A_WORD, undecided_text
from mpsearch.decisions import grouping
from mpsearch.decisions.coverage import undecided
from mpsearch.errors import TableError, nearest, warn
from mpsearch.models.graph import DataFlow, trace
from mpsearch.models.modules.experts import place_of, routers
from mpsearch.models.modules.operand import Operand
from mpsearch.models.modules.weights import canonical, holds_weight, kind_of, named_layers, weight_of
from mpsearch.models.running import Batch, preserved, samples
from mpsearch.targets.rules import TARGETS


def layers(
    model: nn.Module,
    example: Batch,
    *,
    exclude: Sequence[str] = (),
    groups: Literal["auto", "fused", "none"] | Mapping[str, Sequence[str]] = "auto",
    cut: Sequence[str] = (),
    target: str | None = None,
    experts: Literal["each", "block"] = "each",
    decide_routers: bool = False,
    tie_residuals: bool = False,
    kv_cache: bool = False,
    allow: Mapping[str, Options] | None = None,
    fixed: Mapping[str, str | Precision] | str | os.PathLike[str] | None = None,
) -> list[Layer]:
    """Find the quantizable layers of a model, in the order of `named_modules`.

    Linear, Conv1d to 3d (grouped and depthwise too), transposed convolutions and Embedding, with their subclasses, GPT-2's `Conv1D`,
    and what `mpsearch.models.modules.decomposing` takes apart: `nn.MultiheadAttention`, experts in one tensor, parametrized layers. MACs
    come from really running the example: a module that is called several times counts several times, an expert the tokens that it is
    given; one that is not called is reported in a warning and left out, but for experts, whose turn may come with other data. An
    embedding that does not return a row for each number of its first input alone (Whisper's positions) is left alone.

    Parameters of two dimensions and more that functions read are decisions too (`mpsearch.models.modules.functional`): hand-written
    linear layers and bare matrices (`x @ p`, `F.linear`, `einsum`, `bmm`, `F.conv1d`, ...), the matrices of LSTM, GRU and their cells
    (`lstm.weight_ih_l0`), Bilinear, EmbeddingBag, experts in tensors of any layout; named as the parameter, or as the module that holds
    it alone as `weight`. A weight that is read again counts its MACs again. One memory under several parameters is one decision
    (`mpsearch.models.modules.one_memory`). The largest matrices that are not decided on are told in a warning, with their share of all
    weights.

    Layers share a precision, and the name of their group says why, where they share a weight, and under `target` where it needs that:
    what each of these ties costs at a budget tells `mpsearch.tie_prices`, and the result of a search.

    Args:
        model: any module; it comes back as it was.
        example: one batch, as `mpsearch.models.data.batches.arranged` reads it: `(inputs, targets)`, a tensor, a dict of keywords, ...
        exclude: names or patterns (`encoder.*`) of layers to leave alone.
        groups: `auto`; `fused`, where linear layers that read the same tensor and meet in a product are tied too (q/k/v, gate/up: many
            engines compute those as one matrix); `none` (refused where weights are shared); or name -> layers or patterns, added to `auto`.
        cut: names or patterns of layers to take out of the groups that are found; `["*"]` leaves only those that must be.
        target: a name in `mpsearch.export.TARGETS`: what it joins is grouped, what it cannot express is not allowed, and what lies
            inside a module that it sees as one (`nn.MultiheadAttention`, experts in one tensor) is left alone.
        experts: decide on `each` expert, or on a whole `block` of them at once; expert groups are `groups` by pattern.
        decide_routers: routers of experts are decisions too, instead of being left alone.
        tie_residuals: layers whose outputs are added share a precision.
        kv_cache: keys and values of each attention layer are decisions too, of kind `kv_cache`: those that attention of transformers
            puts into its cache (`...self_attn.k_cache`, `...self_attn.v_cache`), and modules `mpsearch.KVCache` of the model's own. Their
            MACs are those of the products that read them.
        allow: options of single layers, name or pattern -> precisions: `{"lm_head": "w8", "*.mlp.*": "w2 w3 w4"}`; of several that match a
            layer the last one counts. All others may have what a run is given.
        fixed: what is decided already, in the same way: a plan, the file of one, or name or pattern -> one precision; it counts
            before `allow`.

    Returns:
        The decisions, with shapes, multiply-accumulates of one sample, and groups.

    Raises:
        TableError: for a model without quantizable layers, a name or pattern that matches nothing, half of a group
            excluded, `kv_cache` of a model that fills none, or a group without an option in common.

    >>> import torch
    >>> [(layer.name, layer.kind, layer.macs) for layer in layers(nn.Sequential(nn.Linear(3, 2)), torch.ones(5, 3))]
    [('0', 'linear', 6)]
    """
    _check_words(target, groups, experts)
    # attention reads the weight of its out_proj itself: a module that takes its place is never called
    own = {n for n, m in model.named_modules() if not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)}
    with preserved(model, example):
        every = named_layers(model)
        candidates, caches = _candidates(model, every, kv_cache)
        asked = {name for pattern in exclude for name in grouping.matching(pattern, [*candidates, *caches], "exclude")}
        excluded = asked if decide_routers else asked.union(routers(model, candidates))
        if target is not None:
            excluded |= _without_a_name(target, candidates, own, excluded)
        if excluded >= set(candidates):
            raise TableError(f"exclude={list(exclude)} leaves no layer")
        tied = grouping.shared_weights(candidates)
        _refuse_partial(tied, excluded)
        run = _run(model, candidates, example, caches)
        if kv_cache and not run.cache_dtypes:
            raise TableError(
                f"kv_cache=True, but the example fills no cache: {type(model).__name__} has neither attention of transformers that "
                "keeps keys and values, nor modules mpsearch.KVCache that they go through"
            )
        excluded |= run.other_tables
        called = _called(candidates, excluded, run.macs, tied)
        cache_dtypes = {name: dtype for name, dtype in run.cache_dtypes.items() if name not in excluded}
        if groups == "none":
            _refuse_shared(tied, called)
            joined: list[grouping.Group] = []
        else:
            joined = list(tied)
            if groups == "fused":
                joined += grouping.same_input(candidates, run.flow)
            if target is not None:
                joined += grouping.joined_by(target, TARGETS[target].fused, candidates)
            if tie_residuals:
                joined += grouping.residual_operands(run.flow)
            if experts == "block":
                joined += grouping.whole_blocks(called)
            joined = grouping.without(joined, cut, candidates)
            _refuse_partial(joined, excluded)
        joined = [
            grouping.Group(members, group.reason, group.binding)
            for group in joined
            if len(members := _of(group, called)) > 1
        ]
        names = [name for name in every if name in called or name in cache_dtypes]
        titles = grouping.named(joined, groups if isinstance(groups, Mapping) else {}, names)
        _tell_undecided(model, every, candidates, [name for name in names if name not in cache_dtypes], asked)
        decisions = [
            _layer(name, every[name], run.macs[name], titles[name], cache_dtypes.get(name), target) for name in names
        ]
    return with_options(decisions, allow, fixed)


def _check_words(target: str | None, groups: object, experts: str) -> None:
    if target is not None and target not in TARGETS:
        raise TableError(f"unknown target {target!r}{nearest(target, TARGETS)}")
    if isinstance(groups, str) and groups not in ("auto", "fused", "none"):
        raise TableError(f"groups={groups!r}, expected 'auto', 'fused', 'none' or name -> layers")
    if experts not in ("each", "block"):
        raise TableError(f"experts={experts!r}, expected 'each' or 'block'")


def _candidates(
    model: nn.Module, every: Mapping[str, nn.Module], kv_cache: bool
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Layers that hold a weight, and caches where they are asked for."""
    candidates = {name: module for name, module in every.items() if holds_weight(module) and weight_of(module).numel()}
    caches = {name: module for name, module in every.items() if not holds_weight(module)} if kv_cache else {}
    if "" in every:
        raise TableError(
            f"the model itself is a {type(model).__name__}: put it into nn.Sequential, so that the layer has a name"
        )
    if not candidates:
        raise TableError("the model has no quantizable layer (Linear, Conv, ConvTranspose or Embedding)")
    return candidates, caches


def _without_a_name(target: str, candidates: Mapping[str, nn.Module], own: set[str], excluded: set[str]) -> set[str]:
    """Layers inside a module that the target sees as one, told in a warning; caches are refused by its options."""
    inside = {name for name, module in candidates.items() if name not in own or isinstance(module, Operand)}
    hidden = sorted(name for name in inside - excluded if not (TARGETS[target].stacked and place_of(name)))
    if hidden:
        warn(f"{target} has no name for {_shown(hidden)}: left alone")
    return set(hidden)


def _refuse_shared(tied: Sequence[grouping.Group], called: Mapping[str, nn.Module]) -> None:
    for group in tied:
        members = _of(group, called)
        if len(members) > 1:
            raise TableError(f"the layers {', '.join(members)} share a weight, so they must share a precision")


def _tell_undecided(
    model: nn.Module,
    every: Mapping[str, nn.Module],
    candidates: Mapping[str, nn.Module],
    decided: Sequence[str],
    asked: set[str],
) -> None:
    """Warn of the largest matrices that nobody decides on, but for those that another warning has told, or the user left out."""
    heard = [weight_of(candidates[name]) for name in candidates.keys() - asked - set(decided)]
    facts = undecided(model, [weight_of(every[name]) for name in decided], asked, heard)
    if facts["untold"] >= WORTH_A_WORD:
        warn(undecided_text(facts))


def _layer(
    name: str, module: nn.Module, macs: int, group: str, cache_dtype: torch.dtype | None, target: str | None
) -> Layer:
    kind = kind_of(module)
    assert kind is not None
    weight = canonical(module).data
    if type(weight) is not Tensor:
        raise TableError(f"the weight of {name!r} is a {type(weight).__name__}, quantized already? exclude it")
    shape = tuple(weight.shape) if cache_dtype is None else ()
    dtype = str(cache_dtype or weight.dtype).removeprefix("torch.")
    return Layer(name, kind, shape, macs, group, dtype, target or "")


def _of(group: grouping.Group, called: Mapping[str, nn.Module]) -> tuple[str, ...]:
    return tuple(name for name in group.members if name in called)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def _refuse_partial(groups: Sequence[grouping.Group], excluded: set[str]) -> None:
    """A group is excluded as a whole or not at all."""
    for group in groups:
        out = [name for name in group.members if name in excluded]
        left = [name for name in group.members if name not in excluded]
        if out and left:
            if group.reason == "shared weight":
                raise TableError(
                    f"{out[0]!r} is excluded but shares its weight with {left[0]!r}: exclude both or neither"
                )
            cut = "" if group.binding else f", or write cut={out}"
            raise TableError(
                f"{out[0]!r} is excluded but in one group with {', '.join(map(repr, left))} ({group.reason}): exclude all or "
                f"none{cut}"
            )


def _called(
    candidates: Mapping[str, nn.Module], excluded: set[str], macs: Mapping[str, int], tied: Sequence[grouping.Group]
) -> dict[str, nn.Module]:
    """The decisions: what the example calls, and experts of a block of which it calls some."""
    blocks = {place.block for name in macs if (place := place_of(name))}
    wanted = {name: module for name, module in candidates.items() if name not in excluded}
    idle = [name for name in wanted if name not in macs]
    waiting = {name for name in idle if (place := place_of(name)) and place.block in blocks}
    elsewhere = {name for group in tied if any(other in macs for other in group.members) for name in group.members}
    lost = [name for name in idle if name not in waiting | elsewhere]
    if lost:
        warn(f"the example never calls {_shown(lost)}: left out of the decisions")
    called = {name: module for name, module in wanted.items() if name in macs or name in waiting}
    if not called:
        raise TableError("the example calls none of the quantizable layers")
    return called


class _Run(NamedTuple):
    """What a run of the example shows.

    Attributes:
        macs: of one sample of each layer that is called, 0 for others.
        flow: which layer reads what.
        other_tables: embeddings that return something else than a row for each number.
        cache_dtypes: of the caches that are filled.
    """

    macs: Counter[str]
    flow: DataFlow
    other_tables: set[str]
    cache_dtypes: dict[str, torch.dtype]


def _run(
    model: nn.Module, candidates: Mapping[str, nn.Module], example: Batch, caches: Mapping[str, nn.Module]
) -> _Run:
    totals: Counter[str] = Counter()
    other_tables: set[str] = set()
    cache_dtypes: dict[str, torch.dtype] = {}

    def observe(name: str, module: nn.Module, argument: Tensor, output: Tensor) -> None:
        if name in caches:
            cache_dtypes[name] = argument.dtype
            return
        totals[name] += _macs(module, argument, output)
        if isinstance(module, nn.Embedding) and (
            output.shape[: argument.ndim] != argument.shape or not _equal(module.forward(argument), output)
        ):
            other_tables.add(name)

    flow = trace(model, candidates, example, observe, caches)
    totals.update(flow.cached_macs)
    number = samples(example)
    macs = Counter({name: round(total / number) for name, total in totals.items()})
    return _Run(macs, flow, other_tables, cache_dtypes)


def _equal(one: Tensor, other: Tensor) -> bool:
    """The same numbers; the same shape where there are none, which tells rows by number from those by position or of another argument."""
    return one.shape == other.shape if one.is_meta else torch.equal(one, other)


def _macs(module: nn.Module, argument: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of one call: each output element sums over the weights that reach it."""
    if kind_of(module) == "embedding":
        return 0
    if isinstance(module, Operand) and not module.kind.startswith("conv"):
        return output.numel() * argument.shape[-1]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # each input element meets the kernels of its channel
        return int(argument.numel() * (module.weight.numel() // module.weight.shape[0]))
    weight = canonical(module)
    return output.numel() * (weight.numel() // weight.shape[0])
