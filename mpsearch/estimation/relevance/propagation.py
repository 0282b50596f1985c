"""Layer-wise relevance propagation by one ordinary backward pass, for models whose glue is functional.

The relevance of a tensor x is x * dL/dx, where L is the sum of the explained logits, once every operation has a backward
pass that is its relevance rule: a linear map keeps its own (LRP-0), others are replaced while the model runs. So no
module is exchanged and no graph is traced: `Propagation` sees every torch function of a forward pass, `x + f(x)`,
`F.gelu(x)` and `q @ k.mT` as well as modules, computes the same values, and hangs another gradient on them.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from mpsearch.errors import EstimatorError
from mpsearch.estimation.relevance.carrying import tensors_of
from mpsearch.estimation.relevance.linear_maps import Flow, LinearMaps, Rule
from mpsearch.estimation.relevance.rules import (
    POINTWISE,
    RULES,
    Attention,
    Junction,
    Operation,
    OperationRule,
    Settings,
    applied,
)

#: Tensors that a product or a sum may be given by name, in order.
_OPERANDS = ("input", "mat1", "mat2", "batch1", "batch2", "other")


class Propagation(TorchFunctionMode):
    """Run a model inside this, and `x * torch.autograd.grad(logits.sum(), x)[0]` is the relevance of x.

    What requires a gradient holds relevance: leaves, and what is made of them inside; parameters must not. Biases and other
    constants absorb theirs, as in every rule below (Bach et al. 2015; Montavon et al. 2019; AttnLRP: Achtibat et al.
    2024, 2402.05602). For the output
    z = W x + b with relevance R_j, and with + and - for the positive and negative elements,

        u+ = W+ x+ + W- x- + b+,    u- = W- x+ + W+ x- + b-,

    and a linear map gives input i its part of

        epsilon      z, of R_j:  x_i sum_j w_ji R_j / (z_j + epsilon sign z_j)
        z+           u+, of R_j
        alpha-beta   u+, of alpha R_j, less its part of u-, of (alpha - 1) R_j
        gamma        z + gamma u+ where z_j > 0, z + gamma u- where z_j < 0, of R_j

    (the sign-wise gamma rule: Andeol et al. 2021). Batch normalization is folded into the linear map before it. Sums share
    by signed contribution, pooling gives to the maximum or by contribution, activations and root mean square norms pass
    all on, other norms are linear maps with a constant deviation. A product of two tensors that hold relevance gives
    half to each, but x f(x), element by element, is an activation: 0.5 x (1 + erf(x / sqrt 2)) passes all on, as GELU.
    Attention: `attn-lrp` treats its two products so, and the softmax s by its Taylor decomposition,
    x_i (R_i - s_i sum R); for `cp-lrp` (Ali et al. 2022, 2202.07304) its weights are constants, all goes to the values.
    Roots, powers of 1/2 and -1/2, deviations and norms are taken for denominators, which are constants; a softmax written
    with exp and a sum is an activation and a constant.

    Anything else that relevance would have to pass is refused by name, also what torch functions do not show: autograd
    functions of the model's own, scripted and compiled code.

    Attributes:
        flows: every use of a parameter as the weight of a linear map or an embedding, in order.
        junctions: every sum of two tensors that hold relevance, in order, if `sums`.
        leaves: where the backward pass ends: outputs of weights whose input holds no relevance.

    For z = 3 * 2 - 1 * 4 the inputs share R = z = 2 as 6 and -4:

    >>> layer = nn.Linear(2, 1, bias=False).requires_grad_(False)
    >>> layer.weight.copy_(torch.tensor([[3.0, -1.0]])).shape
    torch.Size([1, 2])
    >>> x = torch.tensor([[2.0, 4.0]], requires_grad=True)
    >>> with Propagation(epsilon=0.0):
    ...     z = layer(x)
    >>> (x * torch.autograd.grad(z.sum(), x)[0]).tolist()
    [[6.0, -4.0]]
    """

    def __init__(
        self,
        *,
        convolution: Rule = "epsilon",
        linear: Rule = "epsilon",
        attention: Attention = "attn-lrp",
        epsilon: float = 1e-6,
        gamma: float = 0.25,
        alpha: float = 2.0,
        sums: bool = False,
        observe: Callable[[nn.Parameter, Tensor], None] | None = None,
        rules: Mapping[str, OperationRule] | None = None,
    ) -> None:
        """Set the rules.

        Args:
            convolution: rule of convolutions.
            linear: rule of other linear maps.
            attention: rule of attention.
            epsilon: added to denominators, with their sign; 0 for LRP-0.
            gamma: weight of what agrees with the output, for `gamma`.
            alpha: weight of the positive parts, for `alpha-beta`.
            sums: keep `junctions`.
            observe: called in the backward pass with a weight and the relevance of the output that it made (behind a
                folded batch normalization), shaped as that output.
            rules: further rules, or others, by the name of the torch function.
        """
        super().__init__()
        self._maps = LinearMaps(convolution, linear, epsilon, gamma, alpha, observe)
        self.flows: list[Flow] = self._maps.flows
        self.leaves: list[Tensor] = self._maps.leaves
        self.junctions: list[Junction] = []
        self._settings = Settings(attention, self._maps, self.junctions if sums else None, self)
        self._rules = RULES if rules is None else {**RULES, **rules}
        self._seen: MutableMapping[Tensor, None] = WeakTensorKeyDictionary()
        self._origins: MutableMapping[Tensor, tuple[Tensor, int, int]] = WeakTensorKeyDictionary()

    def branches(self, output: Tensor) -> dict[Flow, tuple[Junction, int] | None]:
        """The innermost branch that each flow lies in.

        Args:
            output: logits, before the backward pass.

        Returns:
            Flow -> the first sum that has it on one side only, and the side; None where there is no such sum. Flows
            that do not reach the output are left out.

        Raises:
            EstimatorError: where the output is made by an operation that torch functions do not show.
        """
        self._check_seen([output])
        bits = {flow.node: 1 << place for place, flow in enumerate(self.flows)}
        known: dict[Any, int] = {}
        all_flows = _below(get_gradient_edge(output).node, bits, known)
        sides: list[tuple[Junction, int, int]] = []
        for junction in [junction for junction in self.junctions if junction.node in known]:
            a, b = (_below(node, bits, known) for node in junction.parts)
            sides += [(junction, 0, a & ~b), (junction, 1, b & ~a)]
        branches: dict[Flow, tuple[Junction, int] | None] = {}
        for flow in self.flows:
            bit = bits[flow.node]
            if all_flows & bit:
                branches[flow] = next(((junction, side) for junction, side, only in sides if only & bit), None)
        return branches

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute what the model asks for, with the backward pass of the rule."""
        kwargs = dict(kwargs or {})
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        args = (*args, *(kwargs.pop(name) for name in _OPERANDS if name in kwargs))
        name: str = func.__name__.strip("_")
        held = [t for t in tensors_of((args, kwargs)) if t.requires_grad]
        self._check_seen(held)
        origin = self._origin(held) if name in POINTWISE else None
        result = applied(Operation(func, name, args, kwargs, held, origin), self._settings, self._rules)
        for t in tensors_of((args, kwargs, result)):
            if t.requires_grad:
                self._seen[t] = None
                if t._base is not None:  # written to through a view
                    self._seen[t._base] = None
        if origin is not None and result is not origin:
            self._origins[result] = (origin, origin._version, result._version)
        return result

    def _check_seen(self, tensors: Sequence[Tensor]) -> None:
        """Refuse what an operation has made that torch functions do not show."""
        for t in tensors:
            if t.grad_fn is not None and t not in self._seen and (t._base is None or t._base not in self._seen):
                raise EstimatorError(
                    f"relevance has no rule for {t.grad_fn.name()}, an operation that torch functions do not show "
                    "(an autograd function of the model's own, scripted, compiled?)"
                )

    def _origin(self, held: Sequence[Tensor]) -> Tensor | None:
        """The one tensor of which all of these are functions, element by element; itself for one of another kind."""
        origins = []
        for t in held:
            origin, *versions = self._origins.get(t, (t, 0, 0))
            origins.append(origin if versions == [origin._version, t._version] else t)
        return origins[0] if origins and all(origin is origins[0] for origin in origins) else None


def _below(node: Any, bits: Mapping[Any, int], known: dict[Any, int]) -> int:
    """The flows from which a node is made, as bits; `known` is filled on the way."""
    stack = [node]
    while stack:
        top = stack[-1]
        if top in known:
            stack.pop()
            continue
        parts = [part for part, _ in top.next_functions if part is not None]
        missing = [part for part in parts if part not in known]
        if missing:
            stack.extend(missing)
            continue
        mask = bits.get(top, 0)
        for part in parts:
            mask |= known[part]
        known[top] = mask
    return known[node]
