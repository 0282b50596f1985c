"""A plan as it is put into a model, which is taken out again."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from mpsearch.core.precision import Precision
from mpsearch.models.modules.weights import holds_weight, layer_of, sole_readers, weight_of
from mpsearch.models.streaming.offloading import replaced
from mpsearch.quantizers.fake_quantization import Ranges, input_quantizers, inputs, weights_for_calls
from mpsearch.quantizers.quantizer import Quantizer
from mpsearch.quantizers.rounded_weights import RoundedWeights


@dataclass(frozen=True, eq=False)
class PlanInModel:
    """A plan as it is put into a model; it holds no weights, but what makes them.

    Attributes:
        values: parameter -> what makes its quantized value.
        functions: what the inputs of modules pass through.
        name: for messages.
        readers: parameter -> the modules whose calls alone read it: it has its value for their calls. Of other parameters the value is
            there as long as the plan is in the model.
    """

    values: Mapping[nn.Parameter, Callable[[], Tensor]]
    functions: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    name: str = "the plan"
    readers: Mapping[nn.Parameter, Sequence[nn.Module]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        precisions: Mapping[str, Precision],
        rounded: RoundedWeights,
        quantizer: Quantizer,
        ranges: Ranges,
        name: str,
    ) -> "PlanInModel":
        """A plan over the layers of a model; its weights are rounded now, where they were not before.

        Args:
            model: without any plan.
            precisions: layer name -> precision; tied layers agree.
            rounded: where rounded weights are held.
            quantizer: of weights and inputs.
            ranges: of the inputs.
            name: for messages.
        """
        values: dict[nn.Parameter, Callable[[], Tensor]] = {}
        unpacked: set[nn.Parameter] = set()
        for layer, precision in precisions.items():
            module = layer_of(model, layer)
            if not precision.quantizes_weight or not holds_weight(module) or weight_of(module) in values:
                continue
            weight = weight_of(module)
            values[weight] = functools.partial(rounded.value, module, layer, precision, quantizer)
            rounded.prepare(module, layer, precision, quantizer)
            if not weight.is_meta and not rounded.holds(
                module, precision
            ):  # others take values in for calls by themselves
                unpacked.add(weight)
        alone = sole_readers(model) if unpacked else {}
        readers = {weight: alone[weight] for weight in unpacked if weight in alone}
        return cls(values, input_quantizers(model, precisions, quantizer, ranges), name, readers)

    @contextlib.contextmanager
    def inside(self, *read: nn.Module) -> Iterator[None]:
        """The model with the plan in it.

        Args:
            *read: modules whose weights are read apart from their calls.
        """
        apart = {weight for module in read for weight in module.parameters(recurse=False)}
        by_call = {parameter: self.values[parameter] for parameter in self.readers if parameter not in apart}
        rest = {parameter: make for parameter, make in self.values.items() if parameter not in by_call}
        with replaced(rest), weights_for_calls(by_call, self.readers), inputs(self.functions):
            yield

    def within(self, *modules: nn.Module) -> "PlanInModel":
        """What of the plan lies in some modules.

        Args:
            *modules: with all that is in them.
        """
        parts = {part for module in modules for part in module.modules()}
        parameters = {weight for part in parts for weight in part.parameters(recurse=False)}
        return PlanInModel(
            {parameter: make for parameter, make in self.values.items() if parameter in parameters},
            {module: function for module, function in self.functions.items() if module in parts},
            self.name,
            {parameter: readers for parameter, readers in self.readers.items() if parameter in parameters},
        )
