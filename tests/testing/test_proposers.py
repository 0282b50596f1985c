"""Every registered proposer keeps the contract; proposers with a planted fault turn its suite red, and by the right check."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from mpsearch.plan_search.proposers import PROPOSERS, Columns, Posterior, Proposer, Record
from mpsearch.testing import proposer_checks


@pytest.mark.parametrize(
    ("name", "check"),
    [(f"{name}: {title}", check) for name, cls in PROPOSERS.items() for title, check in proposer_checks(cls())],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_registered_proposers_keep_the_contract(name, check):
    check()


def test_proposers_that_are_registered_are_proposers_without_settings():
    assert all(isinstance(cls(), Proposer) for cls in PROPOSERS.values())


@dataclass
class Neighbour:
    """A draw among the neighbours of the best plan: nothing is wrong with it."""

    def propose(self, record: Record, posterior: Posterior) -> Columns | None:
        if record.best is None:
            return None
        for _ in range(4):
            columns = record.best.copy()
            row = record.generator.integers(len(columns))
            columns[row] = record.generator.choice(np.flatnonzero(record.allowed[row]))
            if record.new(columns) and record.fits(columns):
                return columns
        return None


class LeavesTheBudget(Neighbour):
    def propose(self, record, posterior):
        return np.array([np.flatnonzero(row)[-1] for row in record.allowed])


class TakesRefused(Neighbour):
    def propose(self, record, posterior):
        columns = np.array([np.flatnonzero(row)[0] for row in record.allowed])
        refused = np.argwhere(~record.allowed)
        if len(refused):
            columns[refused[0][0]] = refused[0][1]
        return columns


class Repeats(Neighbour):
    def propose(self, record, posterior):
        return record.best


class DrawsGlobally(Neighbour):
    def propose(self, record, posterior):
        random.random()
        return super().propose(record, posterior)


class Fresh(Neighbour):
    def propose(self, record, posterior):
        record.generator = np.random.default_rng()
        return super().propose(record, posterior)


class Writes(Neighbour):
    def propose(self, record, posterior):
        columns = super().propose(record, posterior)
        if columns is not None:
            posterior.add(columns, 1.0)
        return columns


@dataclass
class Remembers(Neighbour):
    """Gives other plans in a second search."""

    turns: list[int] = field(default_factory=list)

    def propose(self, record, posterior):
        self.turns.append(0)
        return super().propose(record, posterior) if len(self.turns) % 7 else None


class NeedsAPlan(Neighbour):
    def propose(self, record, posterior):
        return super().propose(record, posterior) if record.measured[min(record.measured)] else None


class Nothing(Neighbour):
    def propose(self, record, posterior):
        return None


class Floats(Neighbour):
    def propose(self, record, posterior):
        return np.zeros(len(record.allowed))


def failures(proposer):
    failed = {}
    for name, check in proposer_checks(proposer):
        try:
            check()
        except AssertionError as error:
            failed[name] = str(error)
    return failed


def test_a_simple_proposer_passes():
    assert failures(Neighbour()) == {}


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        (LeavesTheBudget, "limits kept", "<= memory_bytes <="),
        (TakesRefused, "options allowed", "expected allowed options, got column"),
        (Repeats, "new plans", "in a row that had been measured"),
        (DrawsGlobally, "no global state", "drew from a global generator"),
        (Fresh, "deterministic", "proposed other plans with the same seed"),
        (Writes, "record untouched", "changed the posterior"),
        (Remembers, "deterministic", "proposed other plans with the same seed"),
        (NeedsAPlan, "empty record", "raised ValueError on a record without a plan"),
        (Nothing, "answers", "proposed no plan on any of 18 problems"),
        (Floats, "plans", "whole numbers from 0 to"),
    ],
)
def test_a_planted_fault_turns_its_check_red(fault, check, words):
    failed = failures(fault())
    assert check in failed
    assert words in failed[check]
