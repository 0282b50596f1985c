"""The state of a model as a file."""

import io
import os

import torch
from torch import nn

from mpsearch.files.writing import write_atomically


def write_state(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write the state of a model with `torch.save`, atomically."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    write_atomically(path, content.getvalue())
