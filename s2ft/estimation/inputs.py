"""What a model without data is run on: token ids, pixels or sound by its config, with labels."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.model.verify import example_of

LOSSES = ("labels", "return_loss")  # inputs that have a model compute its loss


def made_inputs(
    twin: nn.Module, batch: int, length: int | None, logits: int | None, device: torch.device
) -> dict[str, Any]:
    """Inputs by the model's config, with labels where these are tokens."""
    inputs = example_of(twin, batch, length or 1, device)
    if inputs is None:
        raise ValueError(f"{type(twin).__name__} is no model of transformers whose inputs s2ft can make: pass example=")
    tokens = [value for name, value in inputs.items() if name.endswith("input_ids")]
    if tokens and length is None:
        raise ValueError(f"length must be given for {type(twin).__name__}, which takes tokens, got None")
    if logits is not None:
        _check_logits(twin, logits, length)
        inputs["logits_to_keep"] = logits
    takes = inspect.signature(twin.forward).parameters
    if "labels" in takes and "decoder_input_ids" in inputs:
        inputs["labels"] = inputs.pop("decoder_input_ids")  # the model makes them of its labels
    elif "labels" in takes and tokens and twin.get_output_embeddings() is not None:
        inputs["labels"] = tokens[0] if logits is None else tokens[0][:, -logits:]
    elif "return_loss" in takes:
        inputs["return_loss"] = True
    return inputs


def _check_logits(twin: nn.Module, logits: int, length: int | None) -> None:
    if "logits_to_keep" not in inspect.signature(twin.forward).parameters:
        raise ValueError(f"logits={logits}: {type(twin).__name__} can't be asked for some positions alone")
    if logits > length:
        raise ValueError(f"logits must be at most length, {length}, got {logits}")


def with_cache(twin: nn.Module, inputs: Any, use_cache: bool | None) -> Any:
    """Tell the model, where it is said and the model has one."""
    takes = isinstance(inputs, dict) and "use_cache" in inspect.signature(twin.forward).parameters
    return {**inputs, "use_cache": use_cache} if takes and use_cache is not None else inputs


def call(twin: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return twin(**inputs)
    return twin(*inputs) if isinstance(inputs, (tuple, list)) else twin(inputs)


def can_be_labelled(twin: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether labels are taken and not there yet."""
    return "labels" in inspect.signature(twin.forward).parameters and not any(name in inputs for name in LOSSES)


def labelled(inputs: dict[str, Any], output: Any) -> dict[str, Any]:
    """The inputs with labels as the logits ask for them, where these are for classes of a row, or of a token."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() not in (2, 3):
        return inputs
    dtype = logits.dtype if logits.shape[-1] == 1 else torch.int64  # one value is regression
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    return {**inputs, "labels": torch.zeros(logits.shape[:-1], dtype=dtype, device=device)}


def shape_of(inputs: Any) -> tuple[int, int | None]:
    """Batch, and length where there are tokens."""
    positional = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    values = inputs.values() if isinstance(inputs, dict) else positional
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ValueError("example has no tensor whose first dim is the batch")
    tokens = [tensor for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()]
    return len(tensors[0]), tokens[0].shape[1] if tokens else None
