"""Calibration data, checked batch by batch, and running the model on it without leaving a trace."""
import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Dict, List

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

IGNORED = -100   # the label that torch's cross entropy leaves out


class Calibration:
    """Batches for statistics: dicts of tensors as a tokenizer or a collator gives them, or tensors of token ids.

    Read once, in order. Raises: TypeError for what can't be iterated, ValueError for a batch that can't be meant.
    """

    def __init__(self, data: Iterable, device: torch.device) -> None:
        if isinstance(data, (Mapping, Tensor, str, bytes)) or not isinstance(data, Iterable):
            raise TypeError("calibration must be a DataLoader or an iterable of batches, "
                            f"got {type(data).__name__}")
        self.data, self.device = data, device
        self.tokens = 0   # seen so far, without padding
        self._real = torch.empty(0, dtype=torch.bool)   # of the current batch [tokens]

    def batches(self) -> Iterator[Dict[str, Any]]:
        """The batches on the model's device, under a progress bar where there is a terminal."""
        for number, batch in enumerate(tqdm(self.data, desc="calibration", unit="batch", disable=None)):
            batch = _checked(batch, number)
            mask = batch.get("attention_mask")
            mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
            self._real = (mask != 0).flatten().to(self.device)
            self.tokens += int(self._real.sum())
            yield {name: value.to(self.device) if isinstance(value, Tensor) else value
                   for name, value in batch.items()}
        if not self.tokens:
            raise ValueError("calibration is empty: it gave no tokens")

    def real_tokens(self, x: Tensor, path: str) -> Tensor:
        """x [..., features] of the current batch without its padding: [tokens, features]."""
        x = x.reshape(-1, x.shape[-1])
        if x.shape[0] != self._real.numel():
            raise ValueError(f"{path} has {x.shape[0]} activations for {self._real.numel()} calibration tokens")
        real = self._real.to(x.device)
        return x if bool(real.all()) else x[real]


def _checked(batch: Any, number: int) -> Dict[str, Any]:
    where = f"calibration batch {number}"
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise ValueError(f"{where} must be a dict of tensors or a tensor of token ids, got {type(batch).__name__}")
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        got = f"shape {tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{where} needs input_ids, token ids of shape [sequences, tokens], got {got}")
    lengths = {"attention_mask": ids.shape[1], "labels": ids.shape[1]}
    if isinstance(batch.get("logits_to_keep"), int) and batch["logits_to_keep"]:
        lengths["labels"] = batch["logits_to_keep"]   # labels of the kept logits, as this library's collator has them
    for name, length in lengths.items():
        given = batch.get(name)
        if given is not None and (not isinstance(given, Tensor) or given.shape != (ids.shape[0], length)):
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{where}: {name} must have shape {(ids.shape[0], length)} as input_ids "
                             f"{tuple(ids.shape)} ask for, got {got}")
    return dict(batch)


# ---- running the model -------------------------------------------------------------------------------

@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, without gradients left from before; afterwards each module's mode, each
    parameter's requires_grad and its gradient are what they were, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required, gradient in parameters:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextlib.contextmanager
def hooks_removed() -> Iterator[List[RemovableHandle]]:
    """A list for handles of hooks: they are removed afterwards, whatever happened."""
    handles: List[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def run_forward(model: nn.Module, batch: Dict[str, Any]) -> None:
    """One forward for its activations: without a loss, a cache, or more logits than one a sequence."""
    known = inspect.signature(model.forward).parameters
    batch = {name: value for name, value in batch.items() if name not in ("labels", "logits_to_keep")}
    model(**{**batch, **({"logits_to_keep": 1} if "logits_to_keep" in known else {}), **_no_cache(model)})


def loss_of(model: nn.Module, batch: Dict[str, Any]) -> Tensor:
    """The model's own loss. Raises: ValueError where it has none."""
    try:
        output = model(**{**batch, **_no_cache(model)}) if _takes_labels(model) else None
    except TypeError as error:
        if "labels" not in str(error):
            raise
        output = None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError("selection='gradient' needs a model that computes a loss from labels; "
                         f"{type(model).__name__} does not")
    return loss


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == "labels" or p.kind is p.VAR_KEYWORD for p in parameters)


def _no_cache(model: nn.Module) -> Dict[str, bool]:
    """A cache of keys and values would hold activations of every layer."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def sequences(batch: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """The sequences of a batch one by one, each with labels: those given, or its own tokens without padding.
    One without a label to predict is left out."""
    ids = batch["input_ids"]
    labels = batch.get("labels")
    if labels is None:
        labels, mask = ids, batch.get("attention_mask")
        if mask is not None:
            labels = ids.masked_fill(mask == 0, IGNORED)
            labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)   # padding predicts nothing
    for i in range(ids.shape[0]):
        if bool((labels[i, 1:] != IGNORED).any()):   # the first token is never predicted
            yield {**{name: value[i:i + 1] if isinstance(value, Tensor) and value.dim() and len(value) == len(ids)
                      else value for name, value in batch.items()}, "labels": labels[i:i + 1]}


def checkpointing_kept(model: nn.Module) -> List[RemovableHandle]:
    """Let blocks that checkpoint go on doing so in evaluation mode: they ask for their own training flag. The
    embeddings' output gets a gradient, which a block may need to pass one on. Gives the hooks it has set."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for block in blocks:
        block.training = True
    embeddings = model.get_input_embeddings() if blocks and hasattr(model, "get_input_embeddings") else None
    if embeddings is None:
        return []
    return [embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))]
