"""Is mixed precision worth it here? The answer, in words and numbers."""

from dataclasses import dataclass

from mpsearch.core import amounts, printing

#: Standard errors that a difference must have to count.
CLEAR = 2.0


@dataclass(frozen=True)
class Verdict:
    """Whether mixed precision is worth it.

    Attributes:
        wins: True: mixed precision is measurably better; False: uniform is, or is the best plan found; None: no
            measurable difference.
        text: a sentence for a person.
    """

    wins: bool | None
    text: str


def verdict(unit: str, uniform: str | None, difference: float, se: float, *, chosen: bool) -> Verdict:
    """Compare the plan of a search with the best uniform precision that fits.

    Args:
        unit: of the damage.
        uniform: its name; None where no uniform precision fits.
        difference: damage of the uniform precision less that of the plan, on the report part.
        se: standard error of the difference.
        chosen: the plan is that uniform precision.

    >>> verdict("nats", "w3", 0.5, 0.1, chosen=False)
    Verdict(wins=True, text='mixed precision wins by 0.5 ± 0.1 nats over uniform w3')
    >>> verdict("nats", "w3", 0.1, 0.1, chosen=False).wins is None
    True
    """
    if uniform is None:
        return Verdict(True, "no uniform precision fits the budget; mixed precision meets it")
    if chosen:
        return Verdict(False, f"uniform {uniform} is the best plan found")
    amount = f"{printing.damage(abs(difference), se)} {unit}"
    if difference > CLEAR * se:
        return Verdict(True, f"mixed precision wins by {amount} over uniform {uniform}")
    if difference < -CLEAR * se:
        return Verdict(False, f"uniform is better: {uniform} by {amount}; it is returned")
    return Verdict(
        None,
        f"no measurable difference from uniform {uniform}: {printing.damage(difference, se)} {unit}",
    )


def tolerance_verdict(
    resource: str,
    use: float,
    uniform: str | None,
    uniform_use: float,
    tolerance: float,
    damage: float,
    se: float,
    unit: str,
    *,
    chosen: bool,
) -> Verdict:
    """Compare the cheapest plan within a tolerated damage with the cheapest uniform precision within it.

    Args:
        resource: what was minimized.
        use: of the plan.
        uniform: name of the cheapest uniform precision within the tolerance; None where there is none.
        uniform_use: its use.
        tolerance: damage that is tolerated.
        damage: of the plan on the report part.
        se: its standard error.
        unit: of the damage.
        chosen: the plan is that uniform precision.

    >>> tolerance_verdict("memory_bytes", 750.0, "w4", 1000.0, 0.1, 0.08, 0.02, "nats", chosen=False).text
    'mixed precision takes 25.0 % less memory than uniform w4; damage 0.08 ± 0.02 nats on held-out data, 0.1 tolerated'
    """
    damage_text = (
        f"damage {printing.damage(damage, se)} {unit} on held-out data, {printing.damage(tolerance)} tolerated"
    )
    if damage - CLEAR * se > tolerance:
        damage_text += ": more than the tolerance; give more data, or a smaller tolerance"
    if uniform is None:
        return Verdict(True, f"no uniform precision stays within the tolerance; {damage_text}")
    if chosen:
        return Verdict(False, f"uniform {uniform} is the cheapest plan found; {damage_text}")
    if use >= uniform_use:
        return Verdict(
            None, f"mixed precision takes as much {amounts.label(resource)} as uniform {uniform}; {damage_text}"
        )
    saved = printing.percent(1 - use / uniform_use)
    return Verdict(
        True, f"mixed precision takes {saved} less {amounts.label(resource)} than uniform {uniform}; {damage_text}"
    )
