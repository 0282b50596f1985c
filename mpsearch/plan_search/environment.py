"""What a result was computed with."""

import platform


def environment() -> dict[str, str]:
    """Versions of mpsearch, Python, torch and numpy, the machine, and the threads that torch was given.

    >>> sorted(environment())
    ['machine', 'mpsearch', 'numpy', 'platform', 'python', 'threads', 'torch']
    """
    import numpy as np
    import torch

    import mpsearch

    return {
        "mpsearch": mpsearch.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
