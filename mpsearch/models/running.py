"""How a model is run, where its logits and labels are, and how the model is left as it was found."""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mpsearch.errors import EstimatorError, MpsearchError
from mpsearch.models.data.batches import Batch as Batch
from mpsearch.models.data.batches import arranged as arranged
from mpsearch.models.data.batches import collect as collect
from mpsearch.models.data.batches import data_fingerprint as data_fingerprint
from mpsearch.models.data.batches import fingerprint as fingerprint
from mpsearch.models.data.batches import first_tensor as first_tensor
from mpsearch.models.data.batches import holds_keywords
from mpsearch.models.data.batches import inputs_of as inputs_of
from mpsearch.models.data.batches import moved as moved
from mpsearch.models.data.batches import samples as samples
from mpsearch.models.data.batches import targets_of as targets_of
from mpsearch.models.data.snapshot import random_states, snapshot
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.functional import operands
from mpsearch.models.streaming.offloading import is_offloaded, offloaded_tensors, on_demand, running_device
from mpsearch.models.streaming.parts_of_stand_ins import parts_on_demand
from mpsearch.models.streaming.stored import InFile, InMemory

#: Attribute of a model that is taken apart, as long as the search looks at it.
APART = "_mpsearch_apart"


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter, or where an offloaded model runs; the CPU for a model without any."""
    running = running_device(model)
    if running is not None:
        return running
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def call(model: nn.Module, batch: Batch) -> Tensor:
    """What counts of the model's output on one batch: the output itself, its `logits`, or its first part.

    Raises:
        EstimatorError: where the model fails on the batch, or the output holds no tensor of floating-point numbers.
    """
    return logits_of(output_of(model, batch))


def output_of(model: nn.Module, batch: Batch) -> Any:
    """Run the model on one batch; what it returns, whole.

    Models of transformers that make the decoder's tokens from labels are given these.

    Raises:
        EstimatorError: where the model fails on the batch.
    """
    batch = arranged(batch, model)
    inputs = moved(inputs_of(batch), device_of(model))
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift and isinstance(inputs, Mapping) and "decoder_input_ids" not in inputs:
        labels = targets_of(batch)
        if labels is not None:
            inputs = {**inputs, "decoder_input_ids": shift(labels=moved(labels, device_of(model)))}
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs) if holds_keywords(inputs, model) else model(inputs)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    except MpsearchError:
        raise
    except Exception as error:
        shape, (reason, *_) = tuple(first_tensor(inputs).shape), [*str(error).splitlines(), ""]
        raise EstimatorError(
            f"the model fails on a batch of shape {shape}: {type(error).__name__}: {reason}"
        ) from error


def logits_of(output: Any) -> Tensor:
    """What counts of a model's output: it itself, its `logits`, or its first part.

    Raises:
        EstimatorError: where it holds no tensor.
    """
    if isinstance(output, Mapping):
        named = [output[name] for name in ("logits", "sentence_embedding") if name in output]
        floats = [part for part in output.values() if isinstance(part, Tensor) and part.is_floating_point()]
        output = next(iter([*named, *floats, *output.values()]), None)
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise EstimatorError(f"the model returned {type(output).__name__}, expected a tensor or an object with .logits")
    if not output.is_floating_point():
        hint = "take its real and imaginary part (torch.view_as_real)" if output.is_complex() else "logits, not classes"
        raise EstimatorError(f"the model returned {output.dtype}, expected floating-point numbers: {hint}")
    return output


def predictions(model: nn.Module, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits, labels and sample numbers, one row for each prediction that counts.

    A prediction is a sample, a token or a pixel. Padding (attention mask 0) and ignored labels (-100) do not count; a causal
    language model of transformers is scored on the next token.

    Args:
        model: tells whether labels are shifted.
        logits: (B, C), (B, T, C) or, with pixels, (B, C, H, W).
        batch: the batch that gave them.

    Returns:
        (N, C) logits, (N,) int64 labels or None, (N,) int64 index of the sample of each.

    Raises:
        EstimatorError: for an output without dimensions.
    """
    if logits.ndim == 0:
        raise EstimatorError("the model returned a single number, expected an output for each sample: a loss?")
    batch = arranged(batch, model)
    targets = targets_of(batch)
    labels = None
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        labels = moved(targets, logits.device).long()
    if logits.ndim > 3 or (
        labels is not None
        and logits.ndim == 3
        and labels.shape == (logits.shape[0], *logits.shape[2:])
        and labels.shape != logits.shape[:-1]
    ):
        logits = logits.movedim(1, -1)
    if logits.ndim < 2:
        logits = logits[:, None]
    counts = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    side = "decoder_" if hasattr(model, "prepare_decoder_input_ids_from_labels") else ""
    inputs = inputs_of(batch)
    mask = inputs.get(f"{side}attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == counts.shape:
        counts &= mask.to(counts.device).bool()
    if labels is not None and labels.shape == logits.shape[:-1]:
        if shifts_labels(model):
            logits, labels, counts = logits[:, :-1], labels[:, 1:], counts[:, :-1]
        counts = counts & (labels != -100)
        labels = labels[counts]
    else:
        labels = None
    index = torch.arange(len(counts), device=logits.device).reshape(-1, *[1] * (counts.ndim - 1)).expand_as(counts)
    if counts.all():  # a mask would copy them
        return logits.flatten(0, -2).contiguous(), labels, index[counts]
    return logits[counts], labels, index[counts]


def shifts_labels(model: nn.Module) -> bool:
    """True for the causal language models of transformers, whose labels are the inputs."""
    name = type(model).__name__
    return getattr(model, "loss_type", None) == "ForCausalLM" or name.endswith(("ForCausalLM", "LMHeadModel"))


@contextlib.contextmanager
def preserved(model: nn.Module, example: Batch = None) -> Iterator[None]:
    """Evaluation mode inside; outside, the model and every random generator are as they were (`unchanged`).

    Parameters that functions read, and not layers, are decisions of their own where an example is given to find them by
    (`mpsearch.models.modules.functional`). Fused weights lie in modules of their own (`mpsearch.models.modules.decomposing`). Compiled
    modules run as they are written. The values of an offloaded model are put in where they are used
    (`mpsearch.models.streaming.offloading`). A model without weights is on the meta device with all of its buffers, and runs of it tell
    shapes. Inside another one of the same model nothing is taken apart again.

    Raises:
        EstimatorError: where only a part of the model has values, or it has no evaluation mode.
    """
    check_values(model, shapes_suffice=True)
    inner = APART in vars(model)
    with unchanged(model):
        try:
            model.eval()
        except NotImplementedError as error:  # of an exported program
            raise EstimatorError(
                f"{type(model).__name__} has no evaluation mode: {error}; give the module itself"
            ) from None
        if without_weights(model):
            for module in model.modules():  # `unchanged` puts them back
                module._buffers.update({n: x.to("meta") for n, x in module._buffers.items() if x is not None})
        with contextlib.ExitStack() as inside:
            if not inner:
                stored = offloaded_tensors(model)
                for context in (torch.inference_mode(False), _uncompiled(), on_demand(model), decomposed(model)):
                    inside.enter_context(context)  # what is made inside may take gradients
                inside.enter_context(parts_on_demand(model, stored))
                vars(model)[APART] = True
                inside.callback(vars(model).pop, APART, None)
            if example is not None:
                inside.enter_context(operands(model, example, call))
            yield


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Outside, the model and every random generator are as they were, whatever happens inside.

    Training flags, `requires_grad`, gradients, buffers, attributes with what is in them (`mpsearch.models.data.snapshot`), hooks and random
    states are put back; what a model keeps elsewhere (globals of its file) is not. Parameters are never written to: quantized weights
    are put in their place and taken out again (`mpsearch.models.streaming.offloading.replaced`).
    """
    restore = snapshot(model)
    grads = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        with random_states():
            yield
    finally:
        restore()
        for parameter, requires_grad, grad in grads:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compilers would take hooks and quantized weights for new programs, and compile each anew."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # since PyTorch 2.6
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def without_weights(model: nn.Module) -> bool:
    """True for a model whose parameters are all on the meta device, and whose values lie nowhere.

    >>> without_weights(nn.Linear(1, 1, device="meta")), without_weights(nn.Linear(1, 1))
    (True, False)
    """
    return all(parameter.is_meta for parameter in model.parameters()) and not (
        next(model.parameters(), None) is None or is_offloaded(model)
    )


def check_values(model: nn.Module, *, shapes_suffice: bool = False) -> None:
    """Refuse parameters and buffers without values, and parameters that are no plain tensors.

    Args:
        model: any module.
        shapes_suffice: take a model without weights too.

    Raises:
        EstimatorError: names the first of them.
    """
    parameters = dict(model.named_parameters())
    no_weights = without_weights(model)
    offloaded = is_offloaded(model) or (no_weights and shapes_suffice)
    hint = (
        "; without them layers, costs, show, solve with a table from elsewhere and export of a configuration work"
        if no_weights
        else ""
    )
    for name, tensor in itertools.chain(parameters.items(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise EstimatorError(f"{name!r} has no shape yet: run the model once on a batch")
        if tensor.is_meta and not offloaded:
            raise EstimatorError(f"{name!r} is on the meta device, without values: load the weights first{hint}")
        if tensor.is_nested:
            raise EstimatorError(f"{name!r} is a nested tensor, expected a plain one")
    for name, tensor in parameters.items():
        if is_traceable_wrapper_subclass(tensor):
            raise EstimatorError(
                f"{name!r} is a {type(tensor).__name__}, quantized or spread over devices already: give the model with plain weights"
            )
        if tensor.layout is not torch.strided:
            raise EstimatorError(f"{name!r} is stored as {tensor.layout}: make it dense, weight.to_dense()")
        if tensor.is_inference():
            raise EstimatorError(
                f"{name!r} was made inside torch.inference_mode(), so it takes no gradients: make the model outside, or copy it with "
                "copy.deepcopy there"
            )


def not_finite(model: nn.Module) -> str:
    """Suffix for messages about an output that is not finite: the first parameter that holds nan or infinity.

    >>> layer = nn.Linear(1, 1)
    >>> _ = layer.bias.data.fill_(float("nan"))
    >>> not_finite(layer)
    ": 'bias' holds 1 nan"
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        for word, bad in (("nan", torch.isnan(parameter)), ("infinity", torch.isinf(parameter))):
            if bad.any():
                return f": {name!r} holds {int(bad.sum())} {word}"
    return ""


def state_fingerprint(model: nn.Module) -> str:
    """A short hash of all parameters and buffers; those of an offloaded model are read one after the other."""
    check_values(model)
    stored = offloaded_tensors(model)
    tensors, places = [*model.parameters(), *model.buffers()], set[Any]()

    def values() -> Iterator[Tensor]:
        for tensor in tensors:
            outside = stored.get(id(tensor))
            if outside is None:
                yield tensor
            elif (outside.place, tensor.dtype) not in places:  # tied weights count once
                places.add((outside.place, tensor.dtype))
                yield outside.values()

    return fingerprint(values())


def state_stamp(model: nn.Module) -> tuple[Any, ...]:
    """What shows that a model is as it was: a hash of all that is in memory, and the places of what lies in files, which is not read."""
    stored = offloaded_tensors(model)
    tensors = [(tensor, stored.get(id(tensor))) for tensor in (*model.parameters(), *model.buffers())]
    files = tuple(outside.place for _, outside in tensors if isinstance(outside, InFile))
    held = (outside.values() if isinstance(outside, InMemory) else tensor for tensor, outside in tensors)
    return fingerprint(tensor for tensor in held if not tensor.is_meta), files
