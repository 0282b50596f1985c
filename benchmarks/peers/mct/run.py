"""Sony's Model Compression Toolkit: mixed precision of weights at 2, 3, 4, 6 or 8 bits a layer, symmetric, a threshold a channel."""

import contextlib
import copy
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torchvision_operators  # noqa: F401

# isort: split
import model_compression_toolkit as mct
import torch
from exchange import BITS, Task, Work, task
from model_compression_toolkit.core import CoreConfig, MixedPrecisionQuantizationConfig, ResourceUtilization
from model_compression_toolkit.core.common.mixed_precision.mixed_precision_quantization_config import (
    MpDistanceWeighting,
)
from model_compression_toolkit.target_platform_capabilities.constants import KERNEL_ATTR, WEIGHTS_N_BITS
from model_compression_toolkit.target_platform_capabilities.schema.mct_current_schema import TargetPlatformCapabilities
from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0.tpc import (
    generate_tpc,
    get_op_quantization_configs,
)
from torch import Tensor, nn

BATCHES = 4


def platform() -> TargetPlatformCapabilities:
    """Sony's IMX500, first version, with more widths and inputs left alone."""
    widest, _, other = get_op_quantization_configs()
    options = [
        widest.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: bits}}, enable_activation_quantization=False)
        for bits in reversed(BITS)
    ]
    return generate_tpc(
        default_config=other.clone_and_edit(enable_activation_quantization=False),
        base_config=options[0],
        mixed_precision_cfg_list=options,
        name="weights",
    ).model_copy(update={"is_simd_padding": False})


class Attention(nn.Module):
    """Causal attention with rotary positions over a fixed number of tokens: the tool's graph holds no computed sizes."""

    def __init__(self, original: Any, tokens: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = original.q, original.k, original.v, original.o
        self.heads, self.tokens, self.width = original.heads, tokens, original.q.out_features
        half = self.width // self.heads // 2
        angle = torch.arange(tokens)[:, None] * 10_000.0 ** -(torch.arange(half) / half)
        self.cosine: Tensor = angle.cos()
        self.sine: Tensor = angle.sin()
        self.mask: Tensor = torch.full((tokens, tokens), -1e9).triu(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to (B, T, width)."""
        shape = -1, self.tokens, self.heads, self.width // self.heads
        q, k, v = (part(x).reshape(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = self.turned(q) @ self.turned(k).transpose(-1, -2) / math.sqrt(shape[-1]) + self.mask
        mixed: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, self.tokens, self.width))
        return mixed

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions."""
        a, b = torch.chunk(x, 2, -1)
        return torch.cat([a * self.cosine - b * self.sine, a * self.sine + b * self.cosine], -1)


def search(given: Task) -> None:
    """Each budget scores anew: the tool keeps no table."""
    searched = [name for name, module in given.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    flat = {name.replace(".", "_"): name for name in searched}
    model: Any = copy.deepcopy(given.model)
    batches = [inputs for inputs, _ in given.batches(BATCHES)]
    if given.name == "decoder":  # the tool's data are floats, so a language model begins behind its embedding
        batches = [model.embedding(tokens).detach() for tokens in batches]
        model.embedding = nn.Identity()
        for block in model.blocks:
            block.attention = Attention(block.attention, batches[0].shape[1])
        with torch.no_grad():
            difference = float((model(batches[0]) - given.model(given.batches(BATCHES)[0][0])).abs().max())
        if difference > 1e-4:
            raise ValueError(f"the logits of the rewritten network differ by {difference}")

    def data() -> Iterator[list[torch.Tensor]]:
        for batch in batches:
            yield [batch]

    settings: dict[str, Any] = (
        {"distance_weighting_method": MpDistanceWeighting.HESSIAN} if given.variant == "hessian" else {}
    )
    for limit in given.limits:
        memory_bytes = given.left(limit, searched) * sum(given.layers[name] for name in searched) / 8
        with Work() as work:
            quantized, _ = mct.ptq.pytorch_post_training_quantization(
                model,
                data,
                target_resource_utilization=ResourceUtilization(weights_memory=memory_bytes),
                core_config=CoreConfig(mixed_precision_config=MixedPrecisionQuantizationConfig(**settings)),
                target_platform_capabilities=platform(),
            )
        bits = {}
        for name, module in quantized.named_modules():
            for quantizer in getattr(module, "weights_quantizers", {}).values():
                bits[flat[name.removesuffix("_bn").removeprefix("_")]] = int(quantizer.num_bits)
        given.save(limit, bits, work)


if __name__ == "__main__":
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        search(task())
