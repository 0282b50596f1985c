"""What each target carries out: one table, read by the exporters and by the search."""

import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mpsearch.core.formats import NUMBER_FORMATS
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.models.modules.experts import place_of, without_number
from mpsearch.targets import storage as stored
from mpsearch.targets.storage import Storage

#: Group sizes that kernels are written for; a target that takes any size is offered these when a plan is snapped.
USUAL_GROUPS = (16, 32, 64, 128, 256)
#: Matrices that are joined: the name of the whole, and the ends of the names of the layers in it, experts without their numbers; `*` is any
#: part, and the same in both. Of those that take a layer the first holds all of whose layers are there, else the last.
Fused = tuple[tuple[str, tuple[str, ...]], ...]
#: What engines join at run time.
FUSED: Fused = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
    ("qkv_proj", ("query", "key", "value")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)
#: vLLM and its kin: one scheme for all matrices of all experts of a block, and each `packed_modules_mapping` of the models of vLLM 0.33.
VLLM: Fused = (
    ("experts", ("experts.*",)),
    ("local_experts", ("local_experts.*",)),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
    ("in_proj_qkvgfab", ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "f_a_proj")),
    ("in_proj_qkvgfab", ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")),
    ("linear_attn.in_proj_qkvg", tuple(f"linear_attn.{part}_proj" for part in "qkvg")),
    ("qkvb_proj", ("q_proj", "k_proj", "v_proj", "b_proj")),
    ("qkv_gate_proj", ("q_proj", "k_proj", "v_proj", "output_gate_proj")),
    ("encoder_attn.kv_proj", ("encoder_attn.k_proj", "encoder_attn.v_proj")),
    ("fused_qkv_a_g_proj", ("q_a_proj", "kv_a_proj_with_mqa", "g_proj")),
    ("merged_qkv", ("wq", "wk", "wv")),
    ("attn.qkv", ("attn.q", "attn.k", "attn.v")),
    ("attn.qkvr", ("attn.wq_du", "attn.wk_dv", "attn.wv_dv", "attn.wr_du")),
    ("attn.fused_wqa_wkv", ("attn.wq_a", "attn.wkv")),
    ("compressor.fused_wkv_wgate", ("compressor.wkv", "compressor.wgate")),
    ("indexer.wk_weights_proj", ("indexer.wk", "indexer.weights_proj")),
    ("kv_proj", ("key_proj", "value_proj")),
    ("gate_up_proj", ("c_fc_0", "c_fc_1")),
    ("merged_proj", ("gate_proj", "dense_h_to_4h")),
    ("fc13", ("fc1", "fc3")),
    *FUSED,
)
#: llama.cpp: a tensor for each matrix of the experts of a block.
GGML: Fused = (("experts.*", ("experts.*",)), ("local_experts.*", ("local_experts.*",)))
_ANY = range(1, 1 << 31)


def integers(low: int, high: int) -> tuple[str, ...]:
    """Integer formats of `low` to `high` bits.

    >>> integers(2, 4)
    ('2', '3', '4')
    """
    return tuple(str(bits) for bits in range(low, high + 1))


@dataclass(frozen=True)
class Scheme:
    """Precisions that a target carries out on some kinds of layer, every combination of its parts.

    Attributes:
        weights: number formats of the weight.
        activations: number formats of the input; `"16"` = left alone.
        per_channel: one scale an output channel is possible.
        group_sizes: that are possible; a group must divide the columns.
        kinds: kinds of layer, as in `Layer.kind`.
        columns: the columns of the weight must be a multiple of it.
        rows: its rows must be; gate and up of experts in one matrix are two layers to who asks for more than 1.
        groups: so must the groups of all its rows, where codes of so many lie in one byte.
        pointwise: of convolutions, only those with a kernel of one position.
        experts: for layers of experts too.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...] = ("16",)
    per_channel: bool = True
    group_sizes: Container[int] = ()
    kinds: tuple[str, ...] = ("linear",)
    columns: int = 1
    rows: int = 1
    groups: int = 1
    pointwise: bool = False
    experts: bool = True

    def takes(self, layer: Layer) -> bool:
        """True for the kind of the layer; an unknown kind may be any."""
        return (not layer.kind or layer.kind in self.kinds) and (self.experts or not place_of(layer.name))

    def takes_group(self, size: int | None) -> bool:
        """True where there is such a group size; None = a scale an output channel."""
        return self.per_channel if size is None else size in self.group_sizes

    def misfit(self, layer: Layer, size: int | None) -> str | None:
        """What of the shape of a layer it cannot take with groups of a size; None where it fits, and for unknown shapes."""
        shape = layer.weight_shape
        if len(shape) < 2:
            return None
        if self.pointwise and any(side > 1 for side in shape[2:]):
            return "it puts a scale on every kernel position, so it takes kernels of 1 there"
        columns = math.lcm(self.columns, size or 1)
        if shape[1] % columns:
            return f"it needs columns in multiples of {columns}, the weight has {shape[1]}"
        halved = place_of(layer.name) and layer.name.endswith("gate_up_proj")
        rows = shape[0] // 2 if halved and self.rows > 1 else shape[0]
        if rows % self.rows:
            return f"it needs rows in multiples of {self.rows}, the weight has {rows}"
        groups = math.prod(shape) // (size or math.prod(shape[1:]))
        if groups % self.groups:
            return f"it needs groups in multiples of {self.groups}, the weight has {groups} of {size}"
        return None

    def precisions(self, layer: Layer, sizes: set[int | None]) -> Iterator[Precision]:
        """What it offers a layer, with these group sizes and the usual ones."""
        for size in [None, *sorted({*USUAL_GROUPS, *(s for s in sizes if s)})]:
            if self.takes_group(size) and self.misfit(layer, size) is None:
                yield from (Precision(w, a, size) for w in self.weights for a in self.activations)


@dataclass(frozen=True)
class Target:
    """A tool that carries plans out.

    Attributes:
        name: as in `export.EXPORTERS`.
        schemes: what it can express; `w16` (left alone) can always be expressed.
        fused: groups of layers that it, or the engine that reads its files, joins at run time: one precision a group.
        stacked: it reaches the layers of experts that the model keeps in one tensor of shape (experts, out, in).
        storage: the bytes of what it stores.
        in_float: ends of the names of layers that it writes in float whatever it is told.
    """

    name: str
    schemes: tuple[Scheme, ...]
    fused: Fused = ()
    stacked: bool = False
    storage: Storage = stored.PACKED
    in_float: tuple[str, ...] = ()

    def stored_bytes(self, layer: Layer, precision: Precision, *, symmetric: bool = True) -> int:
        """Bytes of a layer's weight as the target stores it, with scales, zero-points and ids; of one that is left alone with w16.

        Args:
            layer: its shape and dtype count; a part of the experts in one tensor is known by its name.
            precision: one that the target can give it.
            symmetric: the quantizer has no zero-points; for the targets that leave that open.

        Raises:
            EstimatorError: where the format cannot hold such rows.

        8192 codes of 4 bits lie in int8, and each of 128 groups has a float32 scale and an int8 zero-point.

        >>> TARGETS["torchao"].stored_bytes(Layer("fc", "linear", (64, 128)), Precision.parse("w4g64"))
        8832
        """
        place = place_of(layer.name) if self.stacked else None
        return self.storage.stored_bytes(
            layer.weight_shape,
            layer.dtype,
            precision,
            symmetric=symmetric,
            in_experts=place is not None,
            gate_and_up=place is not None and place.part == "gate_up_proj",
        )

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        """Why the target cannot give a layer a precision, and what it can; None where it can.

        >>> TARGETS["onnxruntime"].refusal(Layer("fc", "linear", (8, 64)), Precision.parse("w3g32"))
        "onnxruntime cannot express w3g32 for 'fc': it takes weights of 2, 4, 8 there"
        >>> TARGETS["onnxruntime"].refusal(Layer("fc", "linear", (8, 64)), Precision.parse("w4g32"))
        """
        if not precision.quantizes_weight and not precision.quantizes_activation:
            return None
        head = f"{self.name} cannot express {precision} for {layer.name!r}: "
        if f".{layer.name}".endswith(tuple(f".{end}" for end in self.in_float)):
            return f"{head}it writes that layer in float; plan w16"
        fitting = [s for s in self.schemes if s.takes(layer)]
        if not fitting:
            kinds = sorted({kind for s in self.schemes for kind in s.kinds})
            return f"{head}it quantizes {', '.join(kinds)}, not {layer.kind}"
        by_weight = [s for s in fitting if precision.weight in s.weights]
        if not by_weight:
            return f"{head}it takes weights of {_listed(s.weights for s in fitting)} there"
        by_input = [s for s in by_weight if precision.activation in s.activations]
        if not by_input:
            return f"{head}it takes activations of {_listed(s.activations for s in by_weight)} there"
        grouped = [s for s in by_input if s.takes_group(precision.group_size)]
        if not grouped:
            return f"{head}it takes {_groups_text(by_input)} there"
        misfits = [s.misfit(layer, precision.group_size) for s in grouped]
        return head + misfits[0] if misfits[0] and all(misfits) else None

    def offers(self, layer: Layer, sizes: set[int | None]) -> set[Precision]:
        """Every precision that the target can give a layer, with these group sizes and the usual ones."""
        offered = {p for scheme in self.schemes if scheme.takes(layer) for p in scheme.precisions(layer, sizes)}
        return {Precision("16"), *(p for p in offered if self.refusal(layer, p) is None)}


def fused_groups(names: Iterable[str], fused: Fused) -> dict[str, tuple[str, ...]]:
    """Full name of every joined matrix -> those of the layers that are in it.

    >>> fused_groups(["a.q_proj", "a.k_proj", "a.o_proj"], VLLM)
    {'a.qkv_proj': ('a.q_proj', 'a.k_proj')}
    >>> fused_groups(["a.experts.0.w2", "a.experts.1.w2"], GGML)
    {'a.experts.w2': ('a.experts.0.w2', 'a.experts.1.w2')}
    """
    stems = {name: without_number(name) for name in names}
    present = frozenset(stems.values())
    members: dict[str, list[str]] = {}
    for name, stem in stems.items():
        if parts := _joined(stem, fused, present):
            members.setdefault(parts[0], []).append(name)
    return {whole: tuple(parts) for whole, parts in members.items()}


def lacking(names: Iterable[str], fused: Fused) -> dict[str, tuple[str, ...]]:
    """Full name of every joined matrix of two layers and more -> names of further layers of it that the model does not have.

    An engine asks for them all the same: a model whose keys are its values has no `v_proj`, and its joined matrix has three parts.

    >>> lacking(["a.q_proj", "a.k_proj", "b.q_proj"], VLLM)
    {'a.qkv_proj': ('a.v_proj',)}
    """
    names = list(names)
    present = frozenset(without_number(name) for name in names)
    lacks = {}
    for whole, members in fused_groups(names, fused).items():
        _, *parts = _joined(without_number(members[0]), fused, present)
        absent = tuple(part for part in parts if part not in present and "*" not in part)
        if len(members) > 1 and absent:
            lacks[whole] = absent
    return lacks


def _joined(name: str, fused: Fused, present: Container[str]) -> tuple[str, ...]:
    """Full names of the matrix that a layer is joined in and of the layers of that; empty where there is none.

    Args:
        name: of the layer, without the number of an expert.
        fused: what is joined.
        present: names of the layers of the model.
    """
    path = name.split(".")
    matrix: tuple[str, ...] = ()
    for title, ends in fused:
        for end in ends:
            parent, tail = path[: -1 - end.count(".")], path[-1 - end.count(".") :]
            if fnmatchcase(".".join(tail), end):
                whole, *parts = (".".join((*parent, part)) for part in (title.replace("*", tail[-1]), *ends))
                matrix = (whole, *parts)
                if all("*" in part or part in present for part in parts):
                    return matrix
    return matrix


def _listed(formats: Iterable[tuple[str, ...]]) -> str:
    return ", ".join(dict.fromkeys(name for names in formats for name in names))


def _groups_text(schemes: list[Scheme]) -> str:
    sizes = [size for size in USUAL_GROUPS if any(size in s.group_sizes for s in schemes)]
    parts = ["a scale an output channel"] if any(s.per_channel for s in schemes) else []
    if any(s.group_sizes == _ANY for s in schemes):
        parts.append("any group size")
    elif sizes:
        parts.append(f"group sizes of {', '.join(map(str, sizes))}")
    return " or ".join(parts)


_CONVS = ("conv1d", "conv2d", "conv3d")
_GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_VLLM = (
    Scheme(integers(2, 8), group_sizes=_ANY, experts=False),
    Scheme(("4", "8"), group_sizes=_ANY),
    Scheme(("8",), ("8",)),
)
_AUTO_ROUND = (
    Scheme(integers(2, 8), group_sizes=_GPTQ_GROUPS, columns=32, rows=32, experts=False),
    Scheme(("4", "8"), group_sizes=_GPTQ_GROUPS, columns=32, rows=32),
)
_GGUF_TYPES = [entry for entry in NUMBER_FORMATS.values() if entry.family in ("gguf block", "cast")]
_GGUF = tuple(
    Scheme(
        tuple(entry.name for entry in _GGUF_TYPES if (entry.block or 1) == columns),
        kinds=("linear", "embedding"),
        columns=columns,
    )
    for columns in (256, 32, 1)
)
_MLX = Scheme(
    ("2", "3", "4", "5", "6", "8"), per_channel=False, group_sizes=(32, 64, 128), kinds=("linear", "embedding")
)
_HQQ = tuple(
    Scheme(weights, per_channel=False, group_sizes=range(8, 1 << 31, 8), groups=groups)
    for weights, groups in ((("1",), 8), (("2",), 4), (("3",), 1), (("4",), 2), (("5", "6", "8"), 1))
)
_TORCHAO = (
    Scheme(integers(1, 8), group_sizes=_ANY, kinds=("linear", "embedding")),
    Scheme(integers(1, 8), kinds=("conv2d",), pointwise=True),
    Scheme(integers(1, 8), ("8",), group_sizes=_ANY),
)
_ANY_INPUT = ("16", *integers(2, 8))
_MODELOPT = Scheme(integers(2, 8), _ANY_INPUT, group_sizes=_ANY, kinds=("linear", *_CONVS))

#: Every target; measured against the released tools, see the exporters' docstrings for the versions.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("torchao", _TORCHAO, storage=stored.TORCHAO),
        Target("torchao-vllm", _TORCHAO, VLLM, storage=stored.TORCHAO),
        Target("compressed-tensors", _VLLM, VLLM, stacked=True, storage=stored.COMPRESSED_TENSORS),
        Target("vllm", _VLLM, VLLM, stacked=True, storage=stored.COMPRESSED_TENSORS),  # by way of compressed-tensors
        Target("llm-compressor", _VLLM, VLLM, stacked=True, storage=stored.COMPRESSED_TENSORS),
        Target(
            "onnxruntime",
            (Scheme(("2", "4", "8"), per_channel=False, group_sizes=USUAL_GROUPS),),
            storage=stored.ONNXRUNTIME,
        ),
        Target(
            "onnxruntime-static",
            (Scheme(integers(2, 8), ("8",), kinds=("linear", "conv1d", "conv2d")),),
            storage=stored.ONNXRUNTIME_STATIC,
        ),
        Target("gguf", _GGUF, GGML, stacked=True, storage=stored.GGUF),
        Target("llama-quantize", _GGUF, GGML, stacked=True, storage=stored.LLAMA_QUANTIZE),
        Target(
            "gptqmodel",
            (Scheme(integers(2, 8), group_sizes=_GPTQ_GROUPS, columns=32, rows=32),),
            stacked=True,
            storage=stored.GPTQMODEL,
        ),
        Target(
            "gptqmodel-vllm",
            (Scheme(("4", "8"), group_sizes=_GPTQ_GROUPS, columns=32, rows=32),),
            VLLM,
            stacked=True,
            storage=stored.GPTQMODEL,
        ),
        Target("auto-round", _AUTO_ROUND, VLLM, stacked=True, storage=stored.AUTO_ROUND, in_float=("lm_head",)),
        Target("hqq", _HQQ, storage=stored.HQQ),
        Target("mlx", (_MLX,), storage=stored.MLX),
        Target(
            "pt2e",
            (Scheme(integers(2, 8), ("8", "16"), kinds=("linear", "conv1d", "conv2d")),),
            storage=stored.INT8_GRAPH,
        ),
        Target(
            "executorch",
            (Scheme(integers(2, 8), ("8", "16"), kinds=("linear", "conv1d", "conv2d")),),
            storage=stored.INT8_GRAPH,
        ),
        Target("brevitas", (Scheme(integers(2, 8), _ANY_INPUT, kinds=("linear", *_CONVS)),), storage=stored.SIMULATED),
        Target("exllamav3", (Scheme(integers(1, 8)),), storage=stored.EXLLAMAV3),
        Target("aimet", (Scheme(integers(2, 16), kinds=("linear", *_CONVS)),), storage=stored.SIMULATED),
        Target("mct", (Scheme(("2", "4", "8"), ("8",), kinds=("linear", *_CONVS)),), storage=stored.SIMULATED),
        Target("modelopt", (_MODELOPT,), stacked=True, storage=stored.SIMULATED),
        Target("modelopt-vllm", (_MODELOPT,), VLLM, stacked=True, storage=stored.SIMULATED),
        Target("nncf", (Scheme(("2", "3", "4"), group_sizes=_ANY), Scheme(("8",))), storage=stored.NNCF),
        Target(
            "quanto", (Scheme(("2", "4"), per_channel=False, group_sizes=(128,)), Scheme(("8",))), storage=stored.QUANTO
        ),
        Target(
            "bitsandbytes", (Scheme(("nf4",), group_sizes=(64,)), Scheme(("8",), ("8",))), storage=stored.BITSANDBYTES
        ),
    )
}


def rules(target: str, vllm: bool | None = None) -> Target:
    """A target as the option `vllm` of its exporter makes it.

    Args:
        target: a name in `TARGETS`.
        vllm: its files are for vLLM, or they are not; None: the exporter has no such option, or it is left as it is.

    >>> [bool(rules(*options).fused) for options in (("torchao",), ("torchao", True), ("llm-compressor",), ("llm-compressor", False))]
    [False, True, True, False]
    """
    if vllm is False:
        rules_of_files = TARGETS[target]
        schemes = tuple(replace(scheme, experts=True) for scheme in rules_of_files.schemes)
        return replace(rules_of_files, fused=(), schemes=schemes)
    return TARGETS.get(f"{target}-vllm", TARGETS[target]) if vllm else TARGETS[target]
