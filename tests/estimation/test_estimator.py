"""What estimators share."""

import torch

from mpsearch import Precision
from mpsearch.estimation.context import KEPT_BYTES, QuantizedWeights


def test_quantized_weights_are_kept_up_to_a_size():
    kept = QuantizedWeights()
    large = torch.empty(KEPT_BYTES // 4 - 10, device="meta")  # float32
    kept.put((1, Precision("4")), large)
    kept.put((2, Precision("4")), torch.zeros(11))
    kept.put((3, Precision("4")), torch.zeros(10))
    assert [key for key, _ in kept.values] == [1, 3]
    assert kept.held_bytes == KEPT_BYTES
