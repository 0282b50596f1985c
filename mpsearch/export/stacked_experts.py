"""Experts that a model keeps in one tensor a matrix: as modules of their own, and by the names that checkpoints give them."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.experts import place_of
from mpsearch.models.modules.weights import holds_weight, kind_of, weight_of

#: Layers of an expert by the names that modules, checkpoints and vLLM give them.
_PARTS = "(?:gate_proj|up_proj|gate_up_proj|down_proj|w[123])"


@contextlib.contextmanager
def experts_apart(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Inside, experts of blocks that a plan quantizes are modules of their own; the rest of the model stays as it is."""
    own = dict(model.named_modules())
    blocks = {
        place.block
        for name, precision in plan.items()
        if precision.quantizes_weight and name not in own and (place := place_of(name))
    }
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(decomposed(own[block.rpartition(".")[0]]))
        yield


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers, those of experts among them, however they are kept."""
    own = dict(model.named_modules())
    with decomposed(model):
        named = list(model.named_modules())
    return [name for name, module in named if isinstance(module, nn.Linear) and (name in own or place_of(name))]


def targets(names: Iterable[str], every: Iterable[str]) -> list[str]:
    r"""Names as compressed-tensors takes them; where they are all layers of the experts of a block, one pattern for it.

    Args:
        names: of layers.
        every: the names of all layers.

    >>> targets(["experts.0.w1", "experts.1.w1", "head"], ["experts.0.w1", "experts.1.w1", "head", "tail"])
    ['re:^experts\\.\\d+\\.(?:gate_proj|up_proj|gate_up_proj|down_proj|w[123])$', 'head']
    """
    sizes = Counter(place.block for name in every if (place := place_of(name)))
    blocks = {name: place.block for name in names if (place := place_of(name)) and re.fullmatch(_PARTS, place.part)}
    counts = Counter(blocks.values())
    whole = {block for block in counts if counts[block] == sizes[block]}
    return list(dict.fromkeys(_pattern(blocks[name]) if blocks.get(name) in whole else name for name in names))


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer -> its weight, each expert on its own."""
    with decomposed(model):
        named = list(model.named_modules(remove_duplicate=False))
    return {name: weight_of(m).detach() for name, m in named if kind_of(m) is not None and holds_weight(m)}


def names_apart(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Gate and up of experts, one matrix -> the two layers that tools make of it that take the experts of a model apart."""
    own = dict(model.named_modules())
    stacked = [name for name in linear_layers(model) if name not in own]
    ends = {"gate_up_proj": ("gate_proj", "up_proj")}
    return {
        name: tuple(f"{block}.{end}" for end in ends.get(part, (part,)))
        for name in stacked
        for block, _, part in [name.rpartition(".")]
    }


def checkpoint_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Layers of experts in one tensor -> what they are in checkpoints of transformers: one layer, or gate and up.

    A tensor whose first and second half of rows are marked is converted as the weights are when the model is saved. Experts that
    checkpoints keep in one tensor too, or in another order of rows, are left out.
    """
    if not hasattr(model, "save_pretrained"):
        return {}
    convert = package("transformers.core_model_loading", "compressed-tensors").revert_weight_conversion
    own = dict(model.named_modules())
    places = [place for name in linear_layers(model) if name not in own and (place := place_of(name))]
    counts = Counter((place.block, place.part) for place in places)
    names_of: dict[str, tuple[str, ...]] = {}
    for (block, part), count in counts.items():
        marks = torch.tensor([0.0, 0.0, 1.0, 1.0]).reshape(1, 4, 1).expand(count, 4, 1)  # (experts, out, in)
        saved: dict[int, list[tuple[float, str, Tensor]]] = {}
        for key, value in convert(model, {f"{block}.{part}": marks.clone()}).items():
            if place := place_of(key):
                entry = (float(value.mean()), key.removesuffix(".weight"), value.flatten())
                saved.setdefault(place.number, []).append(entry)
        for number, entries in saved.items():
            entries.sort(key=lambda entry: entry[0])
            if torch.equal(torch.cat([rows for *_, rows in entries]), marks[0].flatten()):
                names_of[f"{block}.{number}.{part}"] = tuple(name for _, name, _ in entries)
    return names_of


def renamed(names: Iterable[str], known: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What `targets` returns, by other names of the layers of experts."""
    blocks = {_pattern(_block(layer)): _pattern(_block(saved[0])) for layer, saved in known.items()}
    parts = [part for name in names for part in known.get(name, (blocks.get(name, name),))]
    return list(dict.fromkeys(parts))


def checkpoint_parts(key: str, value: Tensor, known: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """An entry of a state as checkpoints have it: rows of gate and up apart."""
    layer, _, last = key.rpartition(".")
    if layer not in known:
        yield key, value.contiguous()
        return
    count = len(known[layer])
    if last == "weight_shape":  # (rows, columns)
        parts = [torch.stack([value[0] // count, value[1]]) for _ in range(count)]
    else:
        parts = [part.clone() for part in value.chunk(count)]
    yield from zip((f"{name}.{last}" for name in known[layer]), parts, strict=True)


def _block(layer: str) -> str:
    place = place_of(layer)
    assert place is not None
    return place.block


def _pattern(block: str) -> str:
    return rf"re:^{re.escape(block)}\.\d+\.{_PARTS}$"
