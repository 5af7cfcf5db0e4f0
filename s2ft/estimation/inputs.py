"""Inputs for a model without data: token ids, pixels or sound according to its config, with labels."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.model.discovery.examples import example_of

LOSSES = ("labels", "return_loss")  # inputs that make a model compute its loss


def made_inputs(
    shadow: nn.Module, batch: int, length: int | None, logits: int | None, device: torch.device
) -> dict[str, Any]:
    """Make inputs according to the model's config, with labels if these are tokens."""
    inputs = example_of(shadow, batch, length or 1, device)
    if inputs is None:
        raise ValueError(
            f"{type(shadow).__name__} is not a model of transformers whose inputs s2ft can make: pass example"
        )
    tokens = [value for name, value in inputs.items() if name.endswith("input_ids")]
    if tokens and length is None:
        raise ValueError(f"length must be given for {type(shadow).__name__}, which takes tokens, got None")
    takes = inspect.signature(shadow.forward).parameters
    if logits is not None:
        if "logits_to_keep" not in takes:
            raise ValueError(f"logits={logits}: {type(shadow).__name__} can't compute logits for some positions only")
        if logits > length:
            raise ValueError(f"logits must be at most length, {length}, got {logits}")
        inputs["logits_to_keep"] = logits
    if "labels" in takes and "decoder_input_ids" in inputs:
        inputs["labels"] = inputs.pop("decoder_input_ids")  # the model makes the decoder inputs from its labels
    elif "labels" in takes and tokens and shadow.get_output_embeddings() is not None:
        inputs["labels"] = tokens[0] if logits is None else tokens[0][:, -logits:]
    elif "return_loss" in takes:
        inputs["return_loss"] = True
    return inputs


def with_cache(shadow: nn.Module, inputs: Any, use_cache: bool | None) -> Any:
    """Add use_cache to the inputs if it is set and the model takes it."""
    takes = isinstance(inputs, dict) and "use_cache" in inspect.signature(shadow.forward).parameters
    return {**inputs, "use_cache": use_cache} if takes and use_cache is not None else inputs


def labelled(inputs: dict[str, Any], output: Any) -> dict[str, Any]:
    """Add labels to the inputs if the logits are classes of a row or of a token."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() not in (2, 3):
        return inputs
    dtype = logits.dtype if logits.shape[-1] == 1 else torch.int64  # a single value is a regression
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    return {**inputs, "labels": torch.zeros(logits.shape[:-1], dtype=dtype, device=device)}


def shape_of(inputs: Any) -> tuple[int, int | None]:
    """Return the batch size, and the length if there are tokens."""
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ValueError("example has no tensor whose first dim is the batch")
    tokens = [tensor for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()]
    return len(tensors[0]), tokens[0].shape[1] if tokens else None
