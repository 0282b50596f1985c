"""What a multiplier sees of a number format, and the bits that an element takes in memory."""

from mpsearch.core.formats import FLOATS, Number, number_format


def number(name: str, dtype: str) -> Number:
    """What a multiplier sees of a format: of a block format its element, of a GGUF type its integer codes; NF4 is looked up as float16.

    Args:
        name: a number format; `16` is left alone.
        dtype: in which the unquantized tensor is stored.

    >>> number("4", "float32"), number("16", "bfloat16"), number("mxfp4", "float32")
    (Number(bits=4, exponent=0, significand=3), Number(bits=0, exponent=8, significand=8), Number(bits=0, exponent=2, significand=2))
    """
    return FLOATS[dtype] if name == "16" else number_format(name).number


def stored_bits(name: str, dtype: str) -> float:
    """Bits of an element of an activation in a format, scales of blocks included.

    >>> stored_bits("8", "float32"), stored_bits("16", "float32"), stored_bits("mxfp4", "float32")
    (8.0, 32.0, 4.25)
    """
    if name == "16":
        return {"float64": 64.0, "float32": 32.0}.get(dtype, 16.0)
    return number_format(name).input_bits
