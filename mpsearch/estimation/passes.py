"""Runs of a model, counted in passes over the data."""

from dataclasses import dataclass


@dataclass
class Passes:
    """Runs of the model so far, each over all batches counted as 1."""

    forward: float = 0.0
    backward: float = 0.0

    def add(self, batches: int, *, forward: float = 0.0, backward: float = 0.0) -> None:
        """Count runs over one of `batches` batches."""
        self.forward += forward / batches
        self.backward += backward / batches

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)
