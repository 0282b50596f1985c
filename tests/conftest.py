"""What tests of several packages use."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet_offloading() -> Iterator[None]:
    """Accelerate tells of every model that it offloads, and transformers shows a bar for every file."""
    transformers = pytest.importorskip("transformers")
    logger = logging.getLogger("accelerate")
    before = logger.level
    logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    yield
    logger.setLevel(before)
