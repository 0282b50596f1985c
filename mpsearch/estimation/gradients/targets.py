"""What gradient estimators differentiate: the loss, drawn labels, or random outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.metrics.metric import Comparison, by_sample, inner_product
from mpsearch.metrics.pieces import all_finite
from mpsearch.metrics.seeds import Draw
from mpsearch.metrics.targets import Loss
from mpsearch.models.data.batches import original_of
from mpsearch.models.running import Batch, samples

#: `token_weights(model, batch)`: (B, T) weights of tokens, of mean 1.
TokenWeights = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class GradientTarget:
    """A scalar T whose gradients tell what an estimator wants to know, in the unit of the loss and summed over predictions.

    Attributes:
        kind: `given`: the loss with the data's labels, or the user's own. `drawn`: T = -log p(y), labels y drawn from the
            model's own predictions. `gauss-newton`: T = <u, output>, random u whose covariance is the Hessian of the metric at the
            output: for the KL u = sqrt(p) z - p <sqrt(p), z> with signs z, of covariance diag(p) - p p^T; for squared errors u in
            proportion to z, of covariance in proportion to the identity (`metrics.Comparison.random_output`).
            The last two have mean 0 and the same second moments, those of the Gauss-Newton matrix: for the KL the Fisher
            information, which is its Hessian at the model (Martens 2014, 1412.1193, section 9). Drawn labels of a confident
            model are nearly all the same, and what counts comes in rare large gradients; random outputs have far less variance there.
        draws: backward passes.
        seed: of the draws.
        token_weights: importance of tokens, or None.
        root: gradients of tokens are multiplied by the root of their weight, for signals that square them.
    """

    kind: Literal["drawn", "gauss-newton", "given"]
    draws: int = 1
    seed: int = 0
    token_weights: TokenWeights | None = None
    root: bool = True

    def token_factors(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What gradients of tokens are multiplied by; the function may run the model."""
        if self.token_weights is None:
            return None
        with torch.no_grad():
            weights = self.token_weights(model, original_of(batch))
        return weights.sqrt() if self.root else weights


@dataclass(eq=False)
class Predicted:
    """What a forward pass gave, and what can be differentiated of it.

    Attributes:
        samples: of the batch.
        index: (N,) sample of each prediction.
        logits: (N, C), or empty under a loss of one's own.
        loss: the loss of one's own, a scalar, or None.
        metric: draws outputs; None with a loss of one's own.
        targets: of the data, as the loss that goes with the metric takes them; None without any.
    """

    samples: int
    index: Tensor
    logits: Tensor
    loss: Tensor | None
    metric: Comparison | None = None
    targets: Tensor | None = None

    def counts(self, target: GradientTarget) -> Tensor:
        """(B,) predictions of each sample, or what the metric weighs a sample by."""
        if target.kind != "given" and self.metric is not None:
            weights = self.metric.weights(self.logits.detach(), self.index, self.samples)
            return by_sample(weights, self.index, self.samples)
        return torch.bincount(self.index, minlength=self.samples).float()

    def scalar(self, target: GradientTarget, draw: int, number: int) -> Tensor:
        """The sum over the predictions of the batch of what a target stands for."""
        if target.kind == "given":
            if self.loss is not None:
                return self.loss * self.samples
            if self.metric is None or self.targets is None:
                raise EstimatorError(
                    "this estimator differentiates the loss, which needs labels; give batches (inputs, targets) or a loss"
                )
            return Loss(self.metric.kind).values(self.logits, self.targets).sum()
        if self.metric is None:
            raise EstimatorError("this estimator draws outputs, which a loss of one's own does not tell how")
        place = self.index, self.samples, Draw(target.seed, number, draw)
        if target.kind == "drawn":
            return self.metric.drawn(self.logits, *place)
        return inner_product(self.metric.random_output(self.logits.detach(), *place), self.logits)


def predicted(context: Context, batch: Batch, number: int) -> Predicted:
    """One forward pass.

    Raises:
        EstimatorError: where the output of the model, or the loss, is not finite.
    """
    metric = None if callable(context.loss) else context.comparison
    if metric is None:
        loss = context.mean_loss(batch)
        size = samples(batch)
        return Predicted(size, torch.arange(size, device=loss.device), loss.new_zeros(0), loss)
    run = context.run(batch)
    if not all_finite(run.rows):
        raise EstimatorError(f"the output of the model is not finite in batch {number}")
    targets = Loss(metric.kind).targets(context.model, batch, run)
    return Predicted(run.samples, run.index, run.rows, None, metric, targets)
