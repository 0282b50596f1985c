"""What an estimator is handed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpsearch.checkpoints.memory import NoStore
from mpsearch.checkpoints.store import Store
from mpsearch.core.decision import Decision
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.decisions.mask import leaves_alone
from mpsearch.errors import EstimatorError, MpsearchError
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.runs import Run, run
from mpsearch.metrics.targets import Loss as TargetLoss
from mpsearch.models.data.batches import missing_labels, original_of
from mpsearch.models.head import OutputLayer
from mpsearch.models.modules.weights import layer_of, weight_of
from mpsearch.models.replay import Trace, record
from mpsearch.models.running import Batch, predictions, targets_of
from mpsearch.models.streaming.blocks import Blocks
from mpsearch.models.streaming.offloading import replaced, resident
from mpsearch.quantizers.fake_quantization import Ranges, input_quantizer, with_input
from mpsearch.quantizers.quantizer import Quantizer
from mpsearch.quantizers.rounded_weights import RoundedWeights

#: `loss(model, batch)` returns a scalar.
Loss = Callable[[nn.Module, Batch], Tensor]


class OutputObserver(Protocol):
    """Is shown the output of every perturbation that estimators of one perturbation at a time run, and takes from it what it wants.

    What it takes has to last where the run has a checkpoint: it is not shown again what it has seen.
    """

    @property
    def settings(self) -> str:
        """Tells it from other observers."""
        ...

    def observe(self, context: "Context", probe: Probe, reference: Output, output: Output) -> None:
        """See one batch.

        Args:
            context: of the run.
            probe: the perturbation.
            reference: what the unquantized model says.
            output: what the perturbed model says.
        """
        ...


@dataclass(frozen=True, eq=False)
class Context:
    """Everything that an estimator may use. The door has checked it, and restores the model afterwards.

    Attributes:
        model: in evaluation mode.
        batches: B calibration batches.
        decisions: D decisions.
        precisions: P options.
        quantizer: of the weights.
        ranges: of the inputs, where a precision quantizes them.
        loss: a metric that compares with the unquantized output, the loss with the data's targets, or the user's own.
        progress: wraps an iterable in a progress bar: `progress(iterable, total, label)`.
        passes: the estimator counts its runs here.
        checkpoint: where finished work goes, and is found again after an interruption.
        rounded: the rounded weights of the run, each made once.
        beside: what outputs are compared by beside a loss of the user's own.
        observers: are shown the outputs of perturbations.
        blocks: of a model whose weights lie elsewhere, where it has blocks that run one after the other: they are loaded one by one.
        output_layer: makes the output, where that is large: it is left out of runs, and makes logits a few rows at a time.
    """

    model: nn.Module
    batches: Sequence[Batch]
    decisions: Sequence[Decision]
    precisions: Sequence[Precision]
    quantizer: Quantizer
    ranges: Ranges
    loss: Comparison | TargetLoss | Loss
    progress: Callable[..., Any]
    passes: Passes = field(default_factory=Passes)
    checkpoint: Store = field(default_factory=NoStore)
    rounded: RoundedWeights = field(default_factory=RoundedWeights)
    beside: Comparison | None = None
    observers: Sequence[OutputObserver] = ()
    blocks: Blocks | None = None
    output_layer: OutputLayer | None = None

    def module(self, layer: Layer) -> nn.Module:
        """The module of a layer."""
        return layer_of(self.model, layer.name)

    def parameters(self, decision: Decision) -> dict[nn.Parameter, Layer]:
        """The distinct weights of a decision (tied ones once), each with a layer that holds it; none of a cache."""
        holders: dict[nn.Parameter, Layer] = {}
        for layer in decision.layers:
            if not layer.is_cache:
                holders.setdefault(weight_of(self.module(layer)), layer)
        return holders

    def quantizes_input(self, layer: Layer, precision: Precision) -> bool:
        """Whether a precision changes what a layer is given: of a cache the weight format does.

        Args:
            layer: whose input it is.
            precision: of the layer.
        """
        return precision.quantizes_weight if layer.is_cache else precision.quantizes_activation

    @property
    def quantizes_inputs(self) -> bool:
        """True where any precision changes what any layer is given."""
        layers = [layer for decision in self.decisions for layer in decision.layers]
        return any(self.quantizes_input(layer, precision) for precision in self.precisions for layer in layers)

    def quantized(self, layer: Layer, precision: Precision) -> Tensor:
        """Q(W) of a layer, laid out as the weight; rounded the first time, and from then on looked up.

        Args:
            layer: whose weight it is.
            precision: of the layer.
        """
        module = self.module(layer)
        if leaves_alone(self.quantizer, layer.name, precision):
            with resident(module):
                return weight_of(module).detach()
        return self.rounded.value(module, layer.name, precision, self.quantizer)

    def quantized_weights(self, decisions: Sequence[Decision], precision: Precision) -> dict[nn.Parameter, Tensor]:
        """Q(W) of every weight of some decisions that a precision quantizes, tied ones once.

        Args:
            decisions: whose weights.
            precision: of all of them.
        """
        if not precision.quantizes_weight:
            return {}
        return {
            parameter: self.quantized(layer, precision)
            for decision in decisions
            for parameter, layer in self.parameters(decision).items()
        }

    def perturbation(self, layer: Layer, precision: Precision) -> Tensor:
        """Q(W) - W of a layer, laid out as the weight, in float32 or wider.

        Args:
            layer: whose weight it is.
            precision: of the layer.
        """
        module = self.module(layer)
        with resident(module):
            weight = weight_of(module).detach()
            wide = torch.promote_types(weight.dtype, torch.float32)
            return self.quantized(layer, precision).to(wide) - weight.to(wide)

    def local_output(
        self, layer: Layer, precision: Precision, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Tensor:
        """What the module of a layer returns on its own, at a precision, for the arguments of one of its calls.

        Args:
            layer: the layer.
            precision: of its weight and its input.
            args: of the call, by position.
            keywords: of the call, by name.
        """
        module = self.module(layer)
        function = input_quantizer(module, layer.name, precision, self.quantizer, self.ranges)
        if function is not None:
            args, keywords = with_input(module, args, keywords, function)
        changed = precision.quantizes_weight and not layer.is_cache
        values = {weight_of(module): self.quantized(layer, precision)} if changed else {}
        with torch.no_grad(), replaced(values):
            output: Tensor = module.forward(*args, **keywords)
        return output

    @property
    def comparison(self) -> Comparison | None:
        """What the loss compares by, or, of the loss with the data's targets, what fits it; `beside` the user's own."""
        if isinstance(self.loss, TargetLoss):
            return self.loss.comparison
        return self.loss if isinstance(self.loss, Comparison) else self.beside

    @property
    def unit(self) -> str:
        """Unit of a small rise of the loss."""
        return "nats" if callable(self.loss) else self.loss.unit

    def predictions(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows, labels and sample numbers of the predictions that count, with the rows as the loss reads them.

        Args:
            output: of the model, what counts of it.
            batch: that it is of.

        Returns:
            (N, C) rows, logits where the output is probabilities; (N,) labels or None; (N,) sample of each.
        """
        rows, labels, index = predictions(self.model, output, batch)
        return self._read(rows), labels, index

    def output(self, batch: Batch) -> Output:
        """What the model, as it stands, says of a batch: one forward pass."""
        found = self.run_in_pieces(batch)
        return Output(found.held, found.labels, found.index, found.samples, found.head)

    def run(self, batch: Batch) -> Run:
        """One forward pass, with the rows as the loss reads them."""
        as_it_is = run(self.model, batch)
        return replace(as_it_is, held=self._read(as_it_is.held))

    def run_in_pieces(self, batch: Batch) -> Run:
        """The same where no gradient is to reach the layer that makes the output: where that is large, hidden states are held."""
        as_it_is = run(self.model, batch, self.output_layer)
        if as_it_is.head is None:
            return replace(as_it_is, held=self._read(as_it_is.held))
        return replace(as_it_is, head=as_it_is.head.then(self._read))

    def trace(self) -> Trace:
        """The calls of the model in a run of the first batch (`mpsearch.models.replay`); one forward pass."""
        layer = self.output_layer
        if layer is None:
            return record(self.model, self.batches[0])[0]
        with layer.left_out():
            trace, hidden = record(self.model, self.batches[0])
        return replace(trace, flops=trace.flops + 2 * hidden.numel() * layer.module.out_features)

    @property
    def reads_as_it_is(self) -> bool:
        """False where logits are taken of an output of probabilities."""
        rows = torch.full((1, 2), 0.5)
        return self._read(rows) is rows

    def _read(self, rows: Tensor) -> Tensor:
        reader = self.beside if callable(self.loss) else self.loss
        return rows if reader is None else reader.rows(rows)

    def mean_loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar in the graph: one forward pass.

        A comparison is the one with the model itself, held fixed: 0 here, with zero gradient, and its Hessian is the Gauss-Newton
        matrix; of the KL that of the cross-entropy (Fisher information).

        Raises:
            EstimatorError: where it is no finite scalar.
        """
        if callable(self.loss):
            try:
                value = self.loss(self.model, original_of(batch))
            except MpsearchError:
                raise
            except Exception as error:
                raise EstimatorError(
                    f"the loss fails, expected loss(model, batch) -> one number: {type(error).__name__}: {error}"
                ) from error
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise EstimatorError(f"the loss returned {type(value).__name__}, expected a tensor with one number")
            value = value.reshape(())
        elif isinstance(self.loss, Comparison):
            output = self.run(batch)
            value = self.loss.mean(output.rows.detach(), output.rows, output.index, output.samples)
        else:
            output = self.run(batch)
            targets = self.loss.targets(self.model, batch, output)
            if targets is None:
                raise EstimatorError(
                    f"the loss needs labels that fit the output, the batch has {missing_labels(batch)}; give (inputs, targets) or "
                    "another loss"
                )
            value = self.loss.values(output.rows, targets).mean()
        if not torch.isfinite(value.detach()):
            raise EstimatorError(f"the loss is {float(value.detach())}, expected a finite number")
        return value

    def has_labels(self) -> bool:
        """True where every batch has labels."""
        return all(targets_of(batch) is not None for batch in self.batches)

    def cells(self) -> Iterator[tuple[int, int]]:
        """Row and column of every cell."""
        return ((u, p) for u in range(len(self.decisions)) for p in range(len(self.precisions)))
