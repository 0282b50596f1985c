"""Declares the two operators that torchvision asks for on import; its compiled part is for another build of torch.

Import this before whatever imports torchvision.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
