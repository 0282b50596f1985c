"""Gradients of a layer's weight, one for each sample of a batch."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpsearch.models.modules.weights import stores_inputs_first, weight_of

#: Gradients made at once.
CHUNK_BYTES = 64 * 2**20


def sample_gradients(calls: Sequence[tuple[nn.Module, Tensor, Tensor]], samples: int) -> Iterator[tuple[slice, Tensor]]:
    """D loss_n / d weight for each sample n, a few samples at a time.

    A linear layer has x_n^T g_n summed over tokens; a convolution the same over unfolded patches; an embedding adds
    the gradient of each token to its row; other modules are differentiated sample by sample. Calls add up. No hook
    of a module runs.

    Args:
        calls: of each call of the weight the module, its input (B, ...) and the gradient of its output (B, ...), B a
            multiple of `samples`, samples in order. Modules that share the weight may be of several kinds.
        samples: N.

    Yields:
        which samples, and (n, *weight.shape) gradients in float32 or wider.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x, g = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0], [10.0]]])     # one sample of two tokens
    >>> [gradient for _, gradient in sample_gradients([(layer, x, g)], 1)]
    [tensor([[[31., 42.]]])]
    """
    weight = weight_of(calls[0][0])
    each = weight.numel() * max(4, weight.element_size())
    step = max(1, CHUNK_BYTES // each)
    for start in range(0, samples, step):
        place = slice(start, min(start + step, samples))
        parts = (_gradients(module, _part(x, place, samples), _part(g, place, samples)) for module, x, g in calls)
        yield place, functools.reduce(torch.add, parts)


def _part(x: Tensor, place: slice, samples: int) -> Tensor:
    """(n, B / N, ...) rows of some samples, in float32 or wider."""
    x = x.reshape(samples, -1, *x.shape[1:])[place]
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _gradients(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return torch.einsum("nti,nto->noi", x.flatten(1, -2), g.flatten(1, -2))
    if stores_inputs_first(module):
        return torch.einsum("nti,nto->nio", x.flatten(1, -2), g.flatten(1, -2))
    if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:  # some scale or shift
        return _embedding(module, x, g)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros":
        return _convolution(module, x, g)
    return torch.stack([_differentiated(module, row, upstream) for row, upstream in zip(x, g, strict=True)])


def _embedding(module: nn.Embedding, x: Tensor, g: Tensor) -> Tensor:
    gradients = g.new_zeros(len(x), *module.weight.shape)
    tokens = x.reshape(len(x), -1)
    rows = torch.arange(len(x), device=x.device)[:, None].expand_as(tokens)
    gradients.index_put_((rows, tokens), g.reshape(*tokens.shape, -1), accumulate=True)
    if module.padding_idx is not None:
        gradients[:, module.padding_idx] = 0
    return gradients


def _convolution(module: nn.Conv1d | nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    samples, groups = len(x), module.groups
    patches = unfolded(module, x.flatten(0, 1))
    patches = patches.reshape(samples, -1, groups, patches.shape[1] // groups, patches.shape[2])
    upstream = g.flatten(3).reshape(samples, -1, groups, module.out_channels // groups, patches.shape[-1])
    return torch.einsum("nrgcl,nrgol->ngoc", patches, upstream).reshape(samples, *module.weight.shape)


def unfolded(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """(B, channels x kernel, places) the patches that a convolution sees."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if isinstance(module.padding, str):
        pads = [0, 0] * len(kernel)
        if module.padding == "same":
            for axis, (k, d) in enumerate(zip(kernel, dilation, strict=True)):
                whole = d * (k - 1)
                pads[2 * axis : 2 * axis + 2] = [whole // 2, whole - whole // 2]
        x = F.pad(x, [side for axis in reversed(range(len(kernel))) for side in pads[2 * axis : 2 * axis + 2]])
        padding: tuple[int, ...] = (0,) * len(kernel)
    else:
        padding = module.padding
    if len(kernel) == 1:
        return F.unfold(x[:, :, None], (1, *kernel), (1, *dilation), (0, *padding), (1, *stride))
    return F.unfold(x, kernel, dilation, padding, stride)


class _Bare(nn.Module):
    """A module without its hooks: the caller may be one of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The module's own forward."""
        y: Tensor = self.module.forward(x)
        return y


def _differentiated(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    values = {name: p.detach().to(g.dtype) for name, p in module.named_parameters(prefix="module", recurse=False)}
    with torch.enable_grad():
        values["module.weight"].requires_grad_()
        y = torch.func.functional_call(_Bare(module), values, (x,))
        return torch.autograd.grad(y, values["module.weight"], g)[0]
