"""Running a model on calibration data without leaving a trace in it."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from s2ft.distributed import reshard_all
from s2ft.model.modes import evaluation_mode, forward_hooks, remove_new_hooks
from s2ft.selection.batches import IGNORED, Batch, has_decoder_inputs, is_causal_lm, is_encoder_decoder


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and take its gradients away for the time of the context.

    A model of FSDP2 has its shards before and afterwards. Afterwards the mode and the forward hooks of every module,
    and requires_grad and the gradient of every parameter, are restored, also after an error.
    """
    reshard_all(model)
    hooks = forward_hooks(model)
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        with evaluation_mode(model):
            yield
    finally:
        remove_new_hooks(hooks)
        reshard_all(model)
        for parameter, required, gradient in parameters:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient


def run_forward(model: nn.Module, batch: Batch) -> None:
    """Run one forward for its activations, without a loss or a cache, and with one logit per sequence.

    An encoder-decoder without decoder inputs keeps its labels, because it makes the decoder inputs from them.
    """
    known = inspect.signature(model.forward).parameters
    if is_encoder_decoder(model):
        needs_labels = not has_decoder_inputs(batch.named)
    else:  # a custom module may require labels
        needs_labels = "labels" in known and known["labels"].default is inspect.Parameter.empty
    dropped = {"return_loss", "logits_to_keep"} | (set() if needs_labels else {"labels"})
    named = {name: value for name, value in batch.named.items() if name not in dropped}
    kept = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    model(*batch.positional, **{**named, **kept, **_no_cache(model)})


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss.

    Raises:
        ValueError: The model has none.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    takes_labels = any(p.name == "labels" or p.kind is p.VAR_KEYWORD for p in parameters)
    try:
        output = model(*batch.positional, **{**batch.named, **_no_cache(model)}) if takes_labels else None
    except TypeError as error:
        if "labels" not in str(error):
            raise
        output = None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"selection='gradient' needs a model that computes a loss from labels; {type(model).__name__} does not"
        )
    return loss


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """Return the argument that switches the cache of keys and values off. A cache would keep activations."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def single_sequences(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Yield the sequences, images or recordings of a batch one by one, with their labels.

    A sequence without a label to predict is left out.

    Raises:
        ValueError: The model needs labels, or it has no loss for a single sequence.
    """
    labels = _labels(model, batch)
    first = 1 if is_causal_lm(model) else 0  # a causal model never predicts the first token
    for i in range(batch.size):
        one = batch.row(i)
        if labels is None:
            yield one
        elif labels.is_floating_point() or bool((labels[i : i + 1].flatten()[first:] != IGNORED).any()):
            yield replace(one, named={**one.named, "labels": labels[i : i + 1]})


def _labels(model: nn.Module, batch: Batch) -> Tensor | None:
    """Return the labels, shape [sequences, ...]. For a causal model without labels they are the tokens.

    If the model takes no labels, the result is None.
    """
    if batch.named.get("labels") is not None:
        return batch.named["labels"]
    if is_causal_lm(model):
        ids, mask = batch.named["input_ids"], batch.named.get("attention_mask")
        if mask is None:
            return ids
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)  # padding predicts nothing
        return labels
    takes = inspect.signature(model.forward).parameters
    if "labels" in takes:
        raise ValueError(
            f"selection='gradient' needs labels in every calibration batch: {type(model).__name__} is not a "
            "causal language model, which could use its tokens as labels"
        )
    if "return_loss" in takes:
        raise ValueError(
            "selection='gradient' computes the loss of one sequence at a time, and the contrastive loss of "
            f"{type(model).__name__} compares the pairs of a batch, so one pair has none. Use "
            "selection='activation' or 'product'"
        )
    return None


def keep_checkpointing(model: nn.Module) -> list:
    """Keep gradient checkpointing on in evaluation mode, and return the hooks that do so.

    A block checkpoints only if its training flag is on. The inputs of the first blocks require gradients here, because
    a checkpointed block passes gradients on only if its input requires one.
    """
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    if not blocks:
        return []
    # Imported here, because it takes seconds.
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [block for block in blocks if isinstance(block, GradientCheckpointingLayer)]
    hooks = []
    for block in layers or blocks:  # without such layers, the model's own modules test the flag
        block.training = True
        if hasattr(block, "_gradient_checkpointing_func"):
            hooks.append(_EvaluatedInside(block))
    hooks.append(model.register_forward_pre_hook(_with_gradients, with_kwargs=True))
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embeddings is not None:
        hooks.append(embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True)))
    return hooks


class _EvaluatedInside:
    """Switches a block's training flag off inside its checkpoint, where it would switch dropout on."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.checkpoint = block, block._gradient_checkpointing_func
        block._gradient_checkpointing_func = self

    def __call__(self, function: Callable, *inputs: Any, **more: Any) -> Any:
        def evaluated(*inputs: Any) -> Any:
            self.block.training = False
            try:
                return function(*inputs)
            finally:  # a checkpoint may end its second run early, by an exception
                self.block.training = True

        return self.checkpoint(evaluated, *inputs, **more)

    def remove(self) -> None:
        self.block._gradient_checkpointing_func = self.checkpoint


def _with_gradients(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Make floating-point inputs (pixels and sound, which no embedding table reads) require a gradient."""

    def differentiable(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_(True) if floating else value

    return tuple(map(differentiable, inputs)), {name: differentiable(value) for name, value in named.items()}
