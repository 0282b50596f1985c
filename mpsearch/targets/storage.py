"""How each tool stores a weight, and what it makes of all that is left alone: bytes from shapes alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpsearch.core.formats import number_format
from mpsearch.core.layer import DTYPE_BYTES
from mpsearch.core.precision import Precision
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest

#: A GGUF file starts each tensor at a multiple of it.
_GGUF_ALIGNMENT = 32


@dataclass(frozen=True)
class Matrix:
    """A weight that is to be stored at a precision.

    Attributes:
        rows: output channels.
        columns: weights of each.
        dtype_bytes: of an unquantized weight.
        precision: number format and group size.
        symmetric: the quantizer has no zero-points; for the tools that leave that open.
        alone: it is a tensor of its own; False for one of the experts in a tensor.
    """

    rows: int
    columns: int
    dtype_bytes: int
    precision: Precision
    symmetric: bool = True
    alone: bool = True

    @property
    def numel(self) -> int:
        """Weights."""
        return self.rows * self.columns

    @property
    def bits(self) -> int:
        """Nominal bits of a code."""
        return self.precision.weight_bits

    @property
    def groups(self) -> int:
        """Groups of a row; 1 where a row has one scale."""
        return -(-self.columns // (self.precision.group_size or max(1, self.columns)))

    @property
    def scales(self) -> int:
        """Groups of all rows."""
        return self.rows * self.groups

    @property
    def row_words(self) -> int:
        """32-bit words that the codes of a row fill, without gaps but for the last word."""
        return -(-self.columns * self.bits // 32)


@dataclass(frozen=True)
class Storage:
    """What a tool stores.

    Attributes:
        weight: bytes of codes, scales, zero-points and ids of a quantized weight.
        text: the same in words.
        kept_layer_bytes: of one number of a layer that is left alone; None: as the model has it.
        others_bytes: of one number of all else (norms, biases); None: as the model has it.
        alignment: of tensors, in bytes.
        unties: it quantizes layers that share a weight one by one, so that each has codes of its own.
        splits_experts: gate and up of an expert, one matrix of the model, become two.
        packs: False for a tool that simulates: its own files hold the weights in float.
    """

    weight: Callable[[Matrix], int]
    text: str
    kept_layer_bytes: int | None = None
    others_bytes: int | None = None
    alignment: int = 1
    unties: bool = False
    splits_experts: bool = False
    packs: bool = True

    def stored_bytes(
        self,
        shape: Sequence[int],
        dtype: str,
        precision: Precision,
        *,
        symmetric: bool = True,
        in_experts: bool = False,
        gate_and_up: bool = False,
    ) -> int:
        """Bytes of the weight of a layer.

        Args:
            shape: output channels first.
            dtype: in which it is stored unquantized.
            precision: its precision; w16 leaves it alone.
            symmetric: see `Matrix`.
            in_experts: it is one of the experts that the model keeps in one tensor.
            gate_and_up: it is the gate and the up projection of an expert in one matrix.

        Raises:
            EstimatorError: where the format cannot hold such rows.

        10 codes of 3 bits share a word of HQQ: of 128 groups, 13 words for each place in a group; scale and zero-point are bfloat16.

        >>> HQQ.stored_bytes((64, 128), "bfloat16", Precision.parse("w3g64"))
        3840
        """
        outputs = shape[0] if len(shape) > 1 else 1
        columns = math.prod(shape) // max(1, outputs)
        if not precision.quantizes_weight:
            return self.kept_bytes(outputs * columns, DTYPE_BYTES[dtype], of_layer=True, alone=not in_experts)
        parts = 2 if gate_and_up and self.splits_experts and outputs % 2 == 0 else 1
        matrix = Matrix(outputs // parts, columns, DTYPE_BYTES[dtype], precision, symmetric, not in_experts)
        return parts * self._aligned(self.weight(matrix), matrix.alone)

    def kept_bytes(self, numel: int, element_bytes: int, *, of_layer: bool, alone: bool = True) -> int:
        """Bytes of a tensor that is left alone.

        Args:
            numel: its numbers.
            element_bytes: of one of them in the model.
            of_layer: it is the weight of a layer that could be quantized, no norm or bias.
            alone: see `Matrix`.

        >>> GGUF.kept_bytes(100, 2, of_layer=False)     # a norm in bfloat16 becomes float32, and 400 bytes a multiple of 32
        416
        """
        own = self.kept_layer_bytes if of_layer else self.others_bytes
        return self._aligned(numel * (element_bytes if own is None else own), alone)

    def _aligned(self, size: int, alone: bool) -> int:
        return -(-size // self.alignment) * self.alignment if alone else size


def _packed(m: Matrix) -> int:
    return packed_bytes(m.numel, m.rows, m.dtype_bytes, m.precision, RoundToNearest(symmetric=m.symmetric))


def _torchao(m: Matrix) -> int:
    return m.numel + m.scales * (m.dtype_bytes + 1)


def _compressed_tensors(m: Matrix) -> int:
    if m.precision.quantizes_activation:  # int-quantized
        return m.numel + m.scales * m.dtype_bytes
    return 4 * m.rows * m.row_words + m.scales * m.dtype_bytes + 16


def _matmul_nbits(m: Matrix) -> int:
    size = m.precision.group_size or m.columns
    blocks = m.scales * -(-size * m.bits // 8)
    return blocks + m.scales * m.dtype_bytes + (0 if m.symmetric else m.rows * -(-m.groups * m.bits // 8))


def _qdq(m: Matrix) -> int:
    return m.numel + m.rows * (4 + 1)


def _ggml(m: Matrix) -> int:
    return _packed(m)  # casts, or blocks whose scales are inside


def _hqq(m: Matrix) -> int:
    size = m.precision.group_size or m.columns
    groups = m.numel // size
    column = 4 * -(-groups // 10) if m.bits == 3 else -(-groups * {5: 8, 6: 8}.get(m.bits, m.bits) // 8)
    return column * size + 2 * groups * m.dtype_bytes


def _mlx(m: Matrix) -> int:
    return 4 * m.rows * m.row_words + 2 * m.scales * m.dtype_bytes


def _int8_graph(m: Matrix) -> int:
    return m.numel + m.rows * (4 + 8)


def _gptq(m: Matrix) -> int:
    words = -(-m.columns * m.bits // 32) * m.rows + m.groups * -(-m.rows * m.bits // 32)
    return 4 * words + 2 * m.scales


def _gptq_with_ids(m: Matrix) -> int:
    return _gptq(m) + 4 * m.columns


def _exllamav3(m: Matrix) -> int:
    rows, columns = (-(-size // 128) * 128 for size in (m.rows, m.columns))
    return rows * columns * m.bits // 8 + 2 * (rows + columns)


def _nncf(m: Matrix) -> int:
    return -(-m.numel * m.bits // 8) + 2 * m.scales + (1 if m.bits in (2, 3) else 0)


def _quanto(m: Matrix) -> int:
    if m.bits == 8:
        return m.numel + m.rows * m.dtype_bytes
    size = m.precision.group_size or m.columns
    return -(-m.scales * m.bits // 8) * size + 2 * m.scales * m.dtype_bytes


def _bitsandbytes(m: Matrix) -> int:
    if number_format(m.precision.weight).family == "codebook":
        return -(-m.numel // 2) + 4 * -(-m.numel // 64)
    return m.numel + 4 * m.rows


#: Where no target is named.
PACKED = Storage(_packed, "codes packed without padding, a scale in the weight's dtype for each group or channel")
TORCHAO = Storage(
    _torchao, "codes of any width in int8, a scale in the weight's dtype and an int8 zero-point a group", unties=True
)
COMPRESSED_TENSORS = Storage(
    _compressed_tensors,
    "the codes of a row in 32-bit words (in int8 with quantized inputs), a scale in the weight's dtype a group, 16 bytes of shape",
    splits_experts=True,
)
ONNXRUNTIME = Storage(
    _matmul_nbits, "the codes of a group in whole bytes, a scale in the weight's dtype, zero-points of the codes' bits"
)
ONNXRUNTIME_STATIC = Storage(_qdq, "codes in int8, a float32 scale and an int8 zero-point a channel")
GGUF = Storage(
    _ggml,
    "blocks with their scales inside, tensors at multiples of 32 bytes; all but layers in float32",
    others_bytes=4,
    alignment=_GGUF_ALIGNMENT,
)
LLAMA_QUANTIZE = Storage(
    _ggml,
    "blocks with their scales inside, tensors at multiples of 32 bytes; other layers in float16, all else in float32",
    kept_layer_bytes=2,
    others_bytes=4,
    alignment=_GGUF_ALIGNMENT,
)
HQQ = Storage(
    _hqq,
    "3-bit codes ten to a 32-bit word, 5 and 6 bits in bytes, a scale and a zero-point in the weight's dtype a group",
)
MLX = Storage(_mlx, "the codes of a row in 32-bit words, a scale and a bias in the weight's dtype a group")
INT8_GRAPH = Storage(_int8_graph, "codes in int8, a float32 scale and an int64 zero-point a channel")
GPTQMODEL = Storage(
    _gptq_with_ids,
    "codes and zero-points in 32-bit words, a float16 scale a group, the group of each column as int32",
    splits_experts=True,
)
AUTO_ROUND = Storage(_gptq, "codes and zero-points in 32-bit words, a float16 scale a group", splits_experts=True)
EXLLAMAV3 = Storage(
    _exllamav3, "trellis codes on multiples of 128 rows and columns, a float16 scale a row and a column"
)
NNCF = Storage(_nncf, "packed codes, a float16 scale a group, a zero-point a weight at 2 and 3 bits")
QUANTO = Storage(
    _quanto,
    "codes of 2 or 4 groups side by side in bytes, a scale in the weight's dtype, below 8 bits a shift too, a group",
)
BITSANDBYTES = Storage(_bitsandbytes, "packed codes, a float32 scale a block of 64, at 8 bits a channel")
#: Tools that simulate: bytes of what their plan is deployed as.
SIMULATED = Storage(_packed, f"as deployed: {PACKED.text}; the tool itself simulates, on weights in float", packs=False)
