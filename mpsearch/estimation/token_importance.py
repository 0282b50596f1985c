"""Importance of tokens, for estimators that weigh them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.models.data.batches import Batch, arranged, inputs_of, moved
from mpsearch.models.running import device_of


def attention_received(model: nn.Module, batch: Batch, least: float = 0.005) -> Tensor:
    """Weights of tokens by the attention that they receive (RSQ, 2503.01820, AttnCon).

        r_t = sum over layers, heads and queries of the attention to t, scaled to [least, 1], then to mean 1

    in each sequence. For models of transformers that give attention maps (`attn_implementation="eager"`); RSQ weighs each layer by
    its own map, here one weight serves all layers. Early tokens receive more under a causal mask, as in the paper.

    Args:
        model: takes `output_attentions=True`.
        batch: a dict of keywords, or `(inputs, targets)`.
        least: weight of the token that receives least, relative to the most, 0 to 1.

    Returns:
        (B, T) weights of mean 1 in each row.

    Raises:
        EstimatorError: where the model gives no attention maps.

    >>> class Model(nn.Module):
    ...     def forward(self, x, output_attentions):
    ...         return {"attentions": (torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]),)}    # token 0 receives 1.5, token 1 0.5
    >>> attention_received(Model(), torch.zeros(1, 2), least=0.5)      # 1 and 1/2, of mean 3/4
    tensor([[1.3333, 0.6667]])
    """
    inputs = moved(inputs_of(arranged(batch, model)), device_of(model))
    places = inputs if isinstance(inputs, tuple | list) else () if isinstance(inputs, Mapping) else (inputs,)
    keywords = inputs if isinstance(inputs, Mapping) else {}
    try:
        with torch.no_grad():
            output = model(*places, **keywords, output_attentions=True)
        maps = output["attentions"] if isinstance(output, Mapping) else output.attentions
        received = torch.stack([attention.float().sum((1, 2)) for attention in maps]).sum(0)
    except (TypeError, AttributeError, KeyError) as error:
        raise EstimatorError(
            f"{type(model).__name__} gives no attention maps ({error}); load it with attn_implementation='eager', "
            "or give token_weights=function(model, batch)"
        ) from None
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    scaled = least + (1 - least) * (received - low) / (high - low).clamp(min=1e-12)
    return scaled / scaled.mean(1, keepdim=True)
