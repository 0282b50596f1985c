"""Plans held against the model that they are for."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_kind
from mpsearch.core.wrapped_names import by_names_of
from mpsearch.errors import PlanError, nearest
from mpsearch.models.modules.weights import holds_weight, layer_of, named_layers, operands_of, weight_of


def named_in(model: nn.Module, plan: Plan) -> Plan:
    """The plan by the names of the model, of which one may be wrapped (torch.compile, data parallelism) and the other not."""
    check_kind(plan, Mapping, "a plan, layer -> precision", PlanError)
    return by_names_of(plan, named_layers(model))


def named_weights(model: nn.Module, plan: Plan) -> list[nn.Parameter]:
    """Weights of the layers that a plan names."""
    modules = [layer_of(model, name) for name in plan]
    return [weight_of(module) for module in modules if holds_weight(module)]


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Hold a plan against the model.

    Raises:
        PlanError: where it names a layer that the model does not have or no weight of its own, or tied weights at two precisions.
    """
    for precision in plan.values():
        check_kind(precision, Precision, "precisions in the plan, mps.Precision('4')", PlanError)
    modules = dict(model.named_modules()) | named_layers(model)
    if not plan:
        raise PlanError("the plan has no layers")
    at: dict[nn.Parameter, str] = {}
    within = operands_of(model).within
    for name, precision in plan.items():
        if name not in modules:
            raise PlanError(f"the plan names {name!r}, which the model does not have{nearest(name, modules)}")
        weight: Any = getattr(modules[name], "weight", None)
        if name in within and within[name] not in plan:
            raise PlanError(f"the weight of {name!r} lies in that of {within[name]!r}: the plan must name that")
        if name not in within and not isinstance(weight, nn.Parameter):
            raise PlanError(f"the plan names {name!r}, a {type(modules[name]).__name__} without a weight")
        first = within.get(name) or at.setdefault(weight, name)
        if (plan[first].weight, plan[first].group_size) != (precision.weight, precision.group_size):
            raise PlanError(f"{first!r} and {name!r} share a weight, but the plan has {plan[first]} and {precision}")
