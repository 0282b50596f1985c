"""What gradient estimators differentiate: the loss, drawn labels, or random outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mpsearch.batches import given_of
from mpsearch.errors import EstimatorError
from mpsearch.estimator import Setting
from mpsearch.measure import log_softmax, wide
from mpsearch.model import Batch, call, predictions, samples

#: `token_weights(model, batch)`: (B, T) weights of tokens, of mean 1.
TokenWeights = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Source:
    """A scalar T whose gradients tell what an estimator wants to know, in nats and summed over predictions.

    Attributes:
        kind: `given`: the loss with the data's labels, or the user's own. `drawn`: T = -log p(y), labels y drawn from the
            model's own predictions. `gauss-newton`: T = <u, logits>, random u = sqrt(p) z - p <sqrt(p), z> with
            signs z, of covariance diag(p) - p p^T.
            The last two have mean 0 and the same second moments, those of the Fisher information, which is the
            Hessian of the KL at the model (Martens 2014, 1412.1193, section 9). Drawn labels of a confident model are nearly all
            the same, and what counts comes in rare large gradients; random outputs have far less variance there.
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

    def factors(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """What gradients of tokens are multiplied by; the function may run the model."""
        if self.token_weights is None:
            return None
        with torch.no_grad():
            given = self.token_weights(model, given_of(batch))
        return given.sqrt() if self.root else given


@dataclass(eq=False)
class Predicted:
    """What a forward pass gave, and what can be differentiated of it.

    Attributes:
        counts: (B,) predictions of each sample.
        index: (N,) sample of each prediction.
        logits: (N, C), or empty under a loss of one's own.
        labels: (N,) int64, or None.
        loss: the loss of one's own, or None.
    """

    counts: Tensor
    index: Tensor
    logits: Tensor
    labels: Tensor | None
    loss: Tensor | None

    def scalar(self, source: Source, draw: int, number: int) -> Tensor:
        """The sum over the predictions of the batch of what a source differentiates."""
        if source.kind == "given":
            if self.loss is not None:
                return self.loss * len(self.counts)
            if self.labels is None:
                raise EstimatorError(
                    "this estimator differentiates the loss, which needs labels; give batches (inputs, targets) or a loss"
                )
            return -log_softmax(self.logits).gather(1, self.labels[:, None]).sum()
        log_p = log_softmax(self.logits)
        p = log_p.detach().exp()
        generator = torch.Generator().manual_seed(hash((source.seed, draw, number)) % 2**63)
        if source.kind == "drawn":
            uniform = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p)
            drawn = (p.cumsum(1) < uniform * p.sum(1, keepdim=True)).sum(1, keepdim=True).clamp(max=p.shape[1] - 1)
            return -log_p.gather(1, drawn).sum()
        signs = (2 * torch.randint(0, 2, p.shape, generator=generator) - 1).to(p)
        noise = p.sqrt() * signs
        noise = noise - p * (p.sqrt() * signs).sum(1, keepdim=True)
        return (noise * wide(self.logits)).sum()


def predicted(setting: Setting, batch: Batch, number: int) -> Predicted:
    """One forward pass.

    Raises:
        EstimatorError: where the output of the model, or the loss, is not finite.
    """
    size = samples(batch)
    if callable(setting.loss):
        loss = setting.mean_loss(batch)
        index = torch.arange(size, device=loss.device)
        return Predicted(torch.ones(size, device=loss.device), index, loss.new_zeros(0), None, loss)
    logits, labels, index = predictions(setting.model, call(setting.model, batch), batch)
    if not torch.isfinite(logits.detach()).all():
        raise EstimatorError(f"the output of the model is not finite in batch {number}")
    return Predicted(torch.bincount(index, minlength=size).float(), index, logits, labels, None)
