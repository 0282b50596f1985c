"""Names from before `mpsearch.checkpoints.store`, until the last module imports the new ones."""

from mpsearch.checkpoints.counting import CountingStore as Counted
from mpsearch.checkpoints.memory import NoStore as NoCheckpoint
from mpsearch.checkpoints.sqlite import SQLiteStore as Checkpoint
from mpsearch.checkpoints.store import Store as Results

__all__ = ["Checkpoint", "Counted", "NoCheckpoint", "Results"]
