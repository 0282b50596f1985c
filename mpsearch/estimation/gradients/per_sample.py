"""Gradients of a layer's weight, one for each sample of a batch, and what they make with a change of the weight."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.operand import Slice
from mpsearch.models.modules.weights import stores_inputs_first, weight_of

#: Gradients made at once.
CHUNK_BYTES = 64 * 2**20

#: The calls of one weight: of each the module, its input (B, ...) and the gradient of its output (B, ...), B a multiple of the number of
#: samples, samples in order. Modules that share the weight may be of several kinds.
Calls = Sequence[tuple[nn.Module, Tensor, Tensor]]


def gradient_bytes(weight: Tensor) -> int:
    """Size of the gradient of one sample."""
    return weight.numel() * max(4, weight.element_size())


def sample_gradients(
    calls: Calls, samples: int, room_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[slice, slice, Tensor]]:
    """D loss_n / d weight for each sample n, a few samples at a time, and of a large weight a few of its rows.

    A linear layer has x_n^T g_n summed over tokens; a convolution the same over unfolded patches; an embedding adds
    the gradient of each token to its row; other modules are differentiated sample by sample. Calls add up. No hook
    of a module runs.

    Args:
        calls: of the weight.
        samples: N.
        room_bytes: size of what is made at once; a sample of a layer whose rows cannot be taken alone is made whole all the same.

    Yields:
        which samples, which rows of the weight, and (n, rows, ...) gradients in float32 or wider.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x, g = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0], [10.0]]])     # one sample of two tokens
    >>> [gradient for _, _, gradient in sample_gradients([(layer, x, g)], 1)]
    [tensor([[[31., 42.]]])]
    """
    weight = weight_of(calls[0][0])
    each, height = gradient_bytes(weight), len(weight)
    step, rows = max(1, room_bytes // max(each, 1)), height
    if each > room_bytes and all(_has_rows(module) for module, _, _ in calls):
        rows = max(1, height * room_bytes // each)
    for start in range(0, samples, step):
        place = slice(start, min(start + step, samples))
        for top in range(0, height, max(rows, 1)):
            part = slice(top, min(top + rows, height))
            yield place, part, functools.reduce(torch.add, (_gradients(*call, samples, place, part) for call in calls))


def _part(x: Tensor, place: slice, samples: int) -> Tensor:
    """(n, B / N, ...) rows of some samples."""
    return x.reshape(samples, -1, *x.shape[1:])[place]


def _float(x: Tensor) -> Tensor:
    """In float32 or wider; numbers of tokens as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _is_table(module: nn.Module) -> bool:
    """An embedding that does no more than look up; some scale or shift."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros"


def _has_rows(module: nn.Module) -> bool:
    """True where the gradient of a few rows of the weight takes no more than these."""
    return isinstance(module, nn.Linear) or stores_inputs_first(module) or _is_table(module)


def _gradients(module: nn.Module, x: Tensor, g: Tensor, samples: int, place: slice, rows: slice) -> Tensor:
    """(n, rows, ...) of some samples and some rows of the weight; all rows of a module that has none (`_has_rows`)."""
    x, g = _part(x, place, samples), _part(g, place, samples)
    if isinstance(module, nn.Linear):
        return torch.einsum("nti,nto->noi", _float(x).flatten(1, -2), _float(g[..., rows]).flatten(1, -2))
    if stores_inputs_first(module):
        return torch.einsum("nti,nto->nio", _float(x[..., rows]).flatten(1, -2), _float(g).flatten(1, -2))
    x, g = _float(x), _float(g)
    if isinstance(module, nn.Embedding) and _is_table(module):
        return _embedding(module, x, g, rows)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and _is_convolution(module):
        return _convolution(module, x, g)
    return torch.stack([_differentiated(module, row, upstream) for row, upstream in zip(x, g, strict=True)])


def projection(calls: Calls, samples: int, changes: Callable[[], Iterator[tuple[slice, Tensor]]]) -> Tensor | None:
    """(N,) <g_n, change> of the gradient of each sample, without making it: what the change makes of the input, times its gradient.

        <g_n, D> = sum over tokens of <g_nt, D x_nt>

    A few rows of the change and one sample are taken at a time; that is a product as large as the layer's own for each change.

    Args:
        calls: of the weight.
        samples: N.
        changes: gives the rows of the change, a few at a time: which of the weight, and what they change by, in float32 or wider.

    Returns:
        In the widest float of the device; None where a module is not known to be linear in its weight.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x, g = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0], [10.0]]])
    >>> projection([(layer, x, g)], 1, lambda: iter([(slice(0, 1), torch.tensor([[1.0, 0.0]]))]))
    tensor([31.], dtype=torch.float64)
    """
    if not all(_has_rows(module) or _is_convolution(module) or isinstance(module, Slice) for module, _, _ in calls):
        return None
    weight = weight_of(calls[0][0])
    total = wide(torch.zeros(samples, device=calls[0][2].device))
    by_rows = [call for call in calls if _has_rows(call[0])]
    at_once = [call for call in calls if not _has_rows(call[0])]
    whole = None
    for rows, change in changes():
        if at_once:
            whole = torch.empty_like(weight, dtype=change.dtype) if whole is None else whole
            whole[rows] = change
        for module, x, g in by_rows:
            for n, (inputs, upstream) in enumerate(_each(x, g, samples)):
                total[n] += _projected(module, inputs, upstream, rows, change)
    if whole is not None:
        for module, x, g in at_once:
            for n, (inputs, upstream) in enumerate(_each(x, g, samples)):
                total[n] += wide((_float(upstream) * _changed(module, _float(inputs), whole)).flatten(1).sum(1)).sum()
    return total


def _each(x: Tensor, g: Tensor, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of each sample."""
    return zip(x.reshape(samples, -1, *x.shape[1:]), g.reshape(samples, -1, *g.shape[1:]), strict=True)


def _projected(module: nn.Module, x: Tensor, g: Tensor, rows: slice, change: Tensor) -> Tensor:
    """Of one sample and some rows of the weight."""
    if isinstance(module, nn.Embedding):
        tokens, upstream = x.flatten(), g.reshape(-1, g.shape[-1])
        hit = (tokens >= rows.start) & (tokens < rows.stop)
        if module.padding_idx is not None:
            hit &= tokens != module.padding_idx
        return wide((_float(upstream[hit]) * change[tokens[hit] - rows.start]).sum(-1)).sum()
    if isinstance(module, nn.Linear):
        return wide((_float(g[..., rows]) * F.linear(_float(x), change)).sum(-1)).sum()
    return wide((_float(g) * (_float(x[..., rows]) @ change)).sum(-1)).sum()


def _changed(module: nn.Module, x: Tensor, change: Tensor) -> Tensor:
    """What a module that is linear in its weight returns with another one, without a bias."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        y: Tensor = module._conv_forward(x, change, None)
        return y
    assert isinstance(module, Slice)
    return module.read(change, x)


def _embedding(module: nn.Embedding, x: Tensor, g: Tensor, rows: slice) -> Tensor:
    gradients = g.new_zeros(len(x), rows.stop - rows.start, module.embedding_dim)
    tokens = x.reshape(len(x), -1)
    samples = torch.arange(len(x), device=x.device)[:, None].expand_as(tokens)
    hit = (tokens >= rows.start) & (tokens < rows.stop)
    if module.padding_idx is not None:
        hit &= tokens != module.padding_idx
    gradients.index_put_((samples[hit], tokens[hit] - rows.start), g.reshape(*tokens.shape, -1)[hit], accumulate=True)
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
