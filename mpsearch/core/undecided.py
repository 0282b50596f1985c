"""What no decision touches, in words."""

from collections.abc import Mapping
from typing import Any

#: Matrices of this share of all weights and more are worth a word.
WORTH_A_WORD = 0.01
#: Names in one sentence.
_SHOWN = 5


def sentence(facts: Mapping[str, Any]) -> str:
    """What is undecided in one line; empty where it is less than a hundredth of the weights, and no layer is without an option.

    >>> sentence({"share": 0.31, "parameters": {"pos": 0.2, "table": 0.1}, "vectors": 0.01})
    '31 % of the weights are not decided on and stay at full width: pos 20 %, table 10 %, norms and biases 1 %'
    """
    left = without_option(facts.get("without_option", {}))
    share = facts.get("share", 0.0)
    if share < WORTH_A_WORD:
        return left
    named = list(facts.get("parameters", {}).items())
    parts = [f"{name} {_percent(part)}" for name, part in named[:_SHOWN] if part > 0]
    others = facts.get("others", {})
    number = len(named[_SHOWN:]) + others.get("number", 0)
    if number:
        rest = sum(part for _, part in named[_SHOWN:]) + others.get("share", 0.0)
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
    shown = ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")
    return f"no option fits {shown}: left alone ({reasons[names[0]]})" if names else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"
