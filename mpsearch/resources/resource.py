"""What a resource function returns."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Resource:
    """Use of one resource.

    Attributes:
        usage: (L, P) use by each cell.
        fixed: use that no decision touches.
        reference: use by the unquantized model; nan where it is not known.
    """

    usage: NDArray[np.float64]
    fixed: float
    reference: float
