"""Text for a person: aligned tables, damages, shares, bars, names that fit; amounts of a resource are in `mpsearch.core.amounts`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Metric -> what its damage is, on an axis.
DAMAGE = {
    "kl": "KL to the unquantized model [nats]",
    "bernoulli-kl": "KL of the labels to the unquantized model [nats]",
    "mse": "squared error to the unquantized model",
    "relative-error": "relative error to the unquantized model",
    "psnr": "squared error over squared peak",
    "cosine": "cosine distance to the unquantized model",
    "loss": "rise of the loss [nats]",
    "accuracy": "drop of the accuracy",
}
#: Matrices of this share of all weights and more are worth a word.
WORTH_A_WORD = 0.01
#: Names in one sentence.
_NAMED = 5


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = 80) -> str:
    """Columns aligned, the first to the left, the others to the right, and cut to fit.

    Args:
        header: names of the columns.
        rows: cells.
        width: columns of text; names in the first column are shortened to fit, but not below 12; None: no limit.

    >>> print(table(["layer", "bits"], [["conv1", "8"], ["fc", "16"]]))
    layer  bits
    -----  ----
    conv1     8
    fc       16
    >>> print(table(["layer", "bits"], [["model.layers.10.q_proj", "8"]], width=20))
    layer          bits
    -------------  ----
    m.l.10.q_proj     8
    """
    lines = [list(row) for row in [header, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    if width is not None:
        room = max(width - sum(widths[1:]) - 2 * (len(widths) - 1), 12)
        for line in lines:
            line[0] = short(line[0], room)
        widths[0] = max(len(line[0]) for line in lines)
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def passes(forward: float, backward: float) -> str:
    """Runs of the model over the data.

    >>> passes(14.5, 0), passes(1, 32)
    ('14.5 forward passes', '1 forward and 32 backward passes')
    """
    if not backward:
        return f"{forward:.4g} forward passes"
    return f"{forward:.4g} forward and {backward:.4g} backward passes"


def counted(origin: Mapping[str, Any]) -> str:
    """How the resources of a table are counted, in words; empty where its origin does not say.

    >>> counted({"counted": {"memory_bytes": "as hqq stores it"}}), counted({})
    ('memory_bytes: as hqq stores it', '')
    """
    facts = origin.get("counted", {})
    return "; ".join(f"{name}: {text}" for name, text in facts.items()) if isinstance(facts, Mapping) else ""


def damage(value: float | None, se: float | None = None) -> str:
    """A damage with three digits and its standard error.

    >>> damage(0.012345, 0.0012), damage(1.5e-7), damage(None)
    ('0.0123 ± 0.0012', '1.5e-07', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.3g}"
    return text if se is None or not math.isfinite(se) else f"{text} ± {se:.2g}"


def percent(value: float | None, se: float | None = None) -> str:
    """A share in percent with its standard error.

    >>> percent(0.917, 0.0095), percent(None)
    ('91.7 ± 0.9 %', '-')
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if se is None or not math.isfinite(se) else f"{100 * value:.1f} ± {100 * se:.1f} %"


def bar(bits: float, most: float, width: int = 24) -> str:
    """A bar for a number of bits.

    >>> bar(4, 8, 8)
    '████'
    """
    return "█" * max(1, round(width * bits / most)) if bits else ""


def short(name: str, width: int = 32) -> str:
    """A name that fits, without characters that move a terminal's cursor.

    Words are cut to their first letter, numbers never, from the left until it fits; else the middle is left out.

    >>> short("model.layers.10.self_attn.q_proj", 24), short("model.layers.10.self_attn.q_proj", 8)
    ('m.l.10.self_attn.q_proj', 'm.l…proj')
    >>> short("a\\x1b[2J")
    'a�[2J'
    """
    *parts, last = "".join(c if c.isprintable() else "�" for c in name).split(".")
    for place in range(len(parts) + 1):
        name = ".".join([*(part if part.isdigit() else part[:1] for part in parts[:place]), *parts[place:], last])
        if len(name) <= width:
            return name
    head = (width - 1) * 2 // 5 + (width <= 20)
    return f"{name[:head]}…{name[-(width - 1 - head) :]}"


def undecided_text(facts: Mapping[str, Any]) -> str:
    """What is undecided in one line; empty where it is less than a hundredth of the weights, and no layer is without an option.

    >>> undecided_text({"share": 0.31, "parameters": {"pos": 0.2, "table": 0.1}, "vectors": 0.01})
    '31 % of the weights are not decided on and stay at full width: pos 20 %, table 10 %, norms and biases 1 %'
    """
    left = without_option(facts.get("without_option", {}))
    share = facts.get("share", 0.0)
    if share < WORTH_A_WORD:
        return left
    named = list(facts.get("parameters", {}).items())
    parts = [f"{name} {_percent(part)}" for name, part in named[:_NAMED] if part > 0]
    others = facts.get("others", {})
    number = len(named[_NAMED:]) + others.get("number", 0)
    if number:
        rest = sum(part for _, part in named[_NAMED:]) + others.get("share", 0.0)
        parts.append(f"{number} further {_percent(rest)}")
    if facts.get("vectors"):
        parts.append(f"norms and biases {_percent(facts['vectors'])}")
    if facts.get("excluded"):
        parts.append(f"excluded {_percent(facts['excluded'])}")
    shares = f"{_percent(share)} of the weights are not decided on and stay at full width: {', '.join(parts)}"
    return "; ".join(filter(None, [shares, left]))


def without_option(reasons: Mapping[str, str]) -> str:
    """Which layers are left alone, since no option fits them, with the reason of the first; empty for none.

    >>> without_option({"gate": "q8_0 packs rows in multiples of 32 weights, the weight has 4", "b": "the same"})
    'no option fits gate, b: left alone (q8_0 packs rows in multiples of 32 weights, the weight has 4)'
    """
    names = list(reasons)
    shown = ", ".join(names[:_NAMED]) + (f", ... ({len(names)} in all)" if len(names) > _NAMED else "")
    return f"no option fits {shown}: left alone ({reasons[names[0]]})" if names else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"
