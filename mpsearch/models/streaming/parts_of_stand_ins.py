"""Layers inside a stand-in, whose weights are parts of a tensor that lies elsewhere: each reads its part alone."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from mpsearch.models.modules.decomposing import StandIn, View
from mpsearch.models.streaming.offloading import Shelf, around_calls, attached, running_device, shelf_of
from mpsearch.models.streaming.stored import Stored


@contextlib.contextmanager
def parts_on_demand(model: nn.Module, stored: Mapping[int, Stored]) -> Iterator[None]:
    """Inside, the layers of stand-ins have shelves of their own, and the originals hold only what no layer has a part of.

    Args:
        model: taken apart, inside `on_demand`.
        stored: what lies elsewhere, by the `id` of the empty tensor.
    """
    device = running_device(model)
    with contextlib.ExitStack() as stack:
        for module in model.modules() if device is not None else ():
            if not isinstance(module, StandIn):
                continue
            shelves: dict[nn.Module, Shelf] = {}
            for view in module.views:
                whole = module.original._parameters[view.of]
                if whole is None or not whole.is_meta or id(whole) not in stored or device is None:
                    continue
                stack.enter_context(_put_aside(module.original, whole))
                shelf = shelves.setdefault(view.layer, Shelf(device))
                parameter = view.layer._parameters[view.name]
                assert parameter is not None
                parameter.requires_grad_(False)  # a graph would hold what is taken out again
                shelf.parameters[parameter] = _reading(view, stored[id(whole)])
                stack.enter_context(attached(parameter, shelf))
            for layer, shelf in shelves.items():
                stack.enter_context(attached(layer, shelf))
                stack.enter_context(around_calls(layer))
        yield


def _reading(view: View, whole: Stored) -> Callable[[], Tensor]:
    return lambda: view.laid_out(whole.rows(view.start, view.stop).values())


@contextlib.contextmanager
def _put_aside(original: nn.Module, whole: nn.Parameter) -> Iterator[None]:
    """A parameter that the original's own call no longer reads."""
    shelf = shelf_of(original)
    if shelf is None:
        yield
        return
    read = shelf.parameters.pop(whole, None)
    try:
        yield
    finally:
        if read is not None:
            shelf.parameters[whole] = read
