"""Calibration data, checked batch by batch, and running the model on it without leaving a trace."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from s2ft.model.coupling import Coupling, Projection
from s2ft.model.modes import evaluation_mode
from s2ft.text.encoding import IGNORED

MAIN_INPUTS = {  # what a model's main input must be: in words, and its dims, or the least of them
    "input_ids": ("token ids of shape [sequences, tokens]", 2),
    "pixel_values": ("floating-point pixels of shape [images, channels, height, width]", 4),
    "input_features": ("floating-point features of shape [recordings, mel bins, frames]", 3),
}


@dataclass(frozen=True)
class Batch:
    """What the model's forward gets: arguments by name, and for a module that is not of transformers by position."""

    size: int  # sequences, images or whatever the first dim counts
    named: dict[str, Any]
    positional: tuple[Any, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """With every tensor changed."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            named={name: changed(value) for name, value in self.named.items()},
            positional=tuple(changed(value) for value in self.positional),
        )


class Calibration:
    """Batches for statistics.

    For a model of transformers: dicts of tensors as a tokenizer, a processor or a collator gives them, or tensors
    of its main input alone. For any other module: tensors or tuples, passed by position, or dicts, passed by name.
    Read once, in order. Raises: TypeError for what can't be iterated, ValueError for a batch that can't be meant.
    """

    def __init__(self, data: Iterable, device: torch.device) -> None:
        if isinstance(data, (Mapping, Tensor, str, bytes)) or not isinstance(data, Iterable):
            raise TypeError(f"calibration must be a DataLoader or an iterable of batches, got {type(data).__name__}")
        self.data, self.device = data, device
        self._masks: dict[str, Tensor] = {}  # of the current batch

    def batches(self, model: nn.Module) -> Iterator[Batch]:
        """The batches on the model's device, under a progress bar where there is a terminal."""
        empty = True
        for number, batch in enumerate(tqdm(self.data, desc="calibration", unit="batch", disable=None)):
            batch = _checked(batch, f"calibration batch {number}", model).map(lambda value: value.to(self.device))
            self._masks = _masks(batch, _is_encoder_decoder(model))
            mask = batch.named.get("attention_mask")
            empty = empty and isinstance(mask, Tensor) and not bool((mask != 0).any())
            yield batch
        if empty:
            raise ValueError("calibration is empty: it gave no tokens")

    def counted(self, x: Tensor, path: str, stack: str, rows: Tensor | None = None) -> Tensor:
        """The activations x [..., features] of module `path` without the padding of its stack: [n, features].

        Where the stack's mask is over other positions (tokens, where x has one row a sequence, patches or frames)
        all of them count. rows: where x [n, features] has some positions of the batch only, their numbers [n].
        Raises: ValueError for x that is not by sequences at all, where some are padded.
        """
        mask = self._masks.get(stack)
        if mask is not None and rows is not None:
            x = x[mask.flatten().to(x.device)[rows]]
        elif mask is not None:
            if x.shape[:-1].numel() == mask.numel() and len(x) in (len(mask), mask.numel()):
                x = x.reshape(-1, x.shape[-1])[mask.flatten().to(x.device)]
            elif len(x) != len(mask):
                raise ValueError(
                    f"{path} has activations of shape {tuple(x.shape)}, which the mask of shape "
                    f"{tuple(mask.shape)} does not fit: give calibration batches without padding"
                )
        return x.reshape(-1, x.shape[-1])


# ---- which positions are padding -----------------------------------------------------------------------


def stack_of(model: nn.Module, coupling: Coupling, projection: Projection) -> str:
    """Whose positions a projection's activations are: of an "encoder", a "decoder", or of a model that is neither
    the "tokens"; "other" where nothing is padded. By name, as an encoder and a decoder may be of equal length."""
    names = projection.path.split(".")
    if coupling.kind == "cross-attention" and projection.key in ("k", "v"):
        return "encoder"
    if any(name == "visual" or name.startswith(("vision", "image_", "audio")) for name in names):
        return "other"  # a tower beside the text's
    if not _is_encoder_decoder(model):
        return "tokens"
    return next((name for name in names if name in ("encoder", "decoder")), "other")


def _masks(batch: Batch, encoder_decoder: bool) -> dict[str, Tensor]:
    """By stack, which positions count: [sequences, length], bool. Stacks without padding are left out."""
    given = batch.named.get
    if encoder_decoder:
        masks = {"encoder": given("attention_mask"), "decoder": given("decoder_attention_mask")}
        labels = given("labels")
        if masks["decoder"] is None and isinstance(labels, Tensor) and labels.dim() == 2:
            masks["decoder"] = labels != IGNORED
    else:
        masks = {"tokens": given("attention_mask"), "encoder": given("encoder_attention_mask")}
    masks = {stack: mask != 0 for stack, mask in masks.items() if isinstance(mask, Tensor) and mask.dim() == 2}
    return {stack: mask for stack, mask in masks.items() if not bool(mask.all())}


# ---- checking a batch ------------------------------------------------------------------------------------


def _checked(batch: Any, where: str, model: nn.Module) -> Batch:
    main = getattr(model, "main_input_name", None)  # transformers' name for it
    if main is None:
        return _for_module(batch, where)
    if isinstance(batch, Tensor):
        batch = {main if batch.is_floating_point() else "input_ids": batch}
    if not isinstance(batch, Mapping):
        what = "token ids" if main == "input_ids" else main
        raise ValueError(f"{where} must be a dict of tensors or a tensor of {what}, got {type(batch).__name__}")
    named = dict(batch)
    _check_input(named, main, where, f"{type(model).__name__}'s main input, " if main != "input_ids" else "")
    if _is_encoder_decoder(model):
        _check_decoder(named, where, model)
    for name, expected, reference in _expected_shapes(named, len(named[main]), model):
        _check_shape(named, name, expected, reference, where)
    return Batch(len(named[main]), named)


def _for_module(batch: Any, where: str) -> Batch:
    """For a module that is not of transformers, whose inputs are not known."""
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        raise ValueError(f"{where} must be a tensor, a tuple of tensors or a dict of them, got {type(batch).__name__}")
    named = dict(batch) if isinstance(batch, Mapping) else {}
    positional = (batch,) if isinstance(batch, Tensor) else () if named else tuple(batch)
    tensors = [value for value in (*positional, *named.values()) if isinstance(value, Tensor) and value.dim()]
    if not tensors or not all(tensor.numel() for tensor in tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"{where} must have tensors whose first dim is the batch, none of them empty, got "
            f"{f'shapes {shapes}' if shapes else 'none'}"
        )
    return Batch(len(tensors[0]), named, positional)


def _check_input(named: dict[str, Any], name: str, where: str, whose: str = "") -> None:
    """Raises: ValueError where an input is missing, empty, or not of the type or the number of dims it must have."""
    what, dims = MAIN_INPUTS.get(name, ("a tensor whose first dim is the batch", 1))
    value = named.get(name)
    if isinstance(value, Tensor) and value.numel():
        fits = value.dim() == dims if name == "input_ids" else value.dim() >= dims  # videos have frames too
        if fits and (name not in MAIN_INPUTS or value.is_floating_point() == (name != "input_ids")):
            return
    got = f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    has = f" (it has {', '.join(map(str, named))})" if value is None and named else ""
    raise ValueError(f"{where} needs {name}, {whose}{what}, got {got}{has}")


def _check_decoder(named: dict[str, Any], where: str, model: nn.Module) -> None:
    """Raises: ValueError where an encoder-decoder gets nothing for its decoder."""
    makes_them = "labels" in inspect.signature(model.forward).parameters
    if not _has_decoder_inputs(named) and not (makes_them and named.get("labels") is not None):
        raise ValueError(
            f"{where} needs decoder_input_ids{', or labels to make them from,' if makes_them else ''} for "
            f"the decoder of {type(model).__name__} (it has {', '.join(map(str, named))})"
        )


def _has_decoder_inputs(named: dict[str, Any]) -> bool:
    return any(named.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))


def _expected_shapes(named: dict[str, Any], size: int, model: nn.Module) -> Iterator[tuple]:
    """(name, shape it must have or begin with, name of the input that asks for it) of a batch of `size`."""
    main, ids = model.main_input_name, named.get("input_ids")
    labels = (size,), main
    if _is_encoder_decoder(model):
        if named.get("decoder_input_ids") is not None:
            yield "decoder_input_ids", (size,), main
            labels = _shape(named["decoder_input_ids"]), "decoder_input_ids"
            yield "decoder_attention_mask", *labels
        elif named.get("labels") is not None:
            yield "decoder_attention_mask", _shape(named["labels"]), "labels"
    elif main == "input_ids" and _predicts_tokens(model):
        kept = named.get("logits_to_keep")  # labels of the kept logits, as this library's collator has them
        labels = (size, kept if isinstance(kept, int) and kept else ids.shape[1]), main
    yield "attention_mask", *(((size,), main) if ids is None else (tuple(ids.shape), "input_ids"))
    yield "labels", *labels


def _check_shape(named: dict[str, Any], name: str, expected: tuple, reference: str, where: str) -> None:
    given = named.get(name)
    if given is not None and (not isinstance(given, Tensor) or _shape(given)[: len(expected)] != expected):
        form = f"{expected}" if len(expected) > 1 else f"({expected[0]}, ...)"
        raise ValueError(
            f"{where}: {name} must have shape {form} as {reference} {_shape(named[reference])} ask for, "
            f"got {_shape(given) if isinstance(given, Tensor) else type(given).__name__}"
        )


def _shape(value: Any) -> tuple:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


# ---- what kind of model it is ----------------------------------------------------------------------------


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_causal_lm(model: nn.Module) -> bool:
    """Whether the model's loss shifts the labels, so that its own tokens can be the labels."""
    return (
        getattr(model, "main_input_name", None) == "input_ids"
        and not _is_encoder_decoder(model)
        and model.can_generate()
    )


def _predicts_tokens(model: nn.Module) -> bool:
    """Whether there is a label for every token."""
    return model.get_output_embeddings() is not None


# ---- running the model -------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, without gradients left from before; afterwards each module's mode, each
    parameter's requires_grad and its gradient are what they were, whatever happened."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        with evaluation_mode(model):
            yield
    finally:
        for parameter, required, gradient in parameters:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient


@contextlib.contextmanager
def hooks_removed() -> Iterator[list]:
    """A list for handles of hooks, which have remove(): they are removed afterwards, whatever happened."""
    handles: list = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def run_forward(model: nn.Module, batch: Batch) -> None:
    """One forward for its activations: without a loss, a cache, or more logits than one a sequence. An
    encoder-decoder that gets no decoder inputs keeps its labels, from which it makes them."""
    known = inspect.signature(model.forward).parameters
    dropped = {"return_loss", "logits_to_keep"}
    if not _needs_labels(model, batch):
        dropped.add("labels")
    named = {name: value for name, value in batch.named.items() if name not in dropped}
    model(
        *batch.positional,
        **{**named, **({"logits_to_keep": 1} if "logits_to_keep" in known else {}), **_no_cache(model)},
    )


def _needs_labels(model: nn.Module, batch: Batch) -> bool:
    if _is_encoder_decoder(model):
        return not _has_decoder_inputs(batch.named)
    labels = inspect.signature(model.forward).parameters.get("labels")
    return labels is not None and labels.default is labels.empty  # a module of one's own may insist on them


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss. Raises: ValueError where it has none."""
    try:
        output = model(*batch.positional, **{**batch.named, **_no_cache(model)}) if _takes_labels(model) else None
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


def _takes_labels(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == "labels" or p.kind is p.VAR_KEYWORD for p in parameters)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """A cache of keys and values would hold activations of every layer."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def sequences(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """The sequences, images or recordings of a batch one by one, each with its labels. One without a label to
    predict is left out. Raises: ValueError where there must be labels, or one alone has no loss."""
    labels = _labels(model, batch)
    first = 1 if _is_causal_lm(model) else 0  # a causal model never predicts the first token
    for i in range(batch.size):
        one = batch.map(lambda value: value[i : i + 1] if value.dim() and len(value) == batch.size else value)
        if labels is None:
            yield one
        elif labels.is_floating_point() or bool((labels[i : i + 1].flatten()[first:] != IGNORED).any()):
            yield replace(one, named={**one.named, "labels": labels[i : i + 1]})


def _labels(model: nn.Module, batch: Batch) -> Tensor | None:
    """[sequences, ...]: those given, or of a causal model the tokens themselves; None for a model that takes none."""
    if batch.named.get("labels") is not None:
        return batch.named["labels"]
    if _is_causal_lm(model):
        return _own_tokens(batch.named["input_ids"], batch.named.get("attention_mask"))
    takes = inspect.signature(model.forward).parameters
    if "labels" in takes:
        raise ValueError(
            f"selection='gradient' needs labels in every calibration batch: {type(model).__name__} is no "
            "causal language model, whose tokens are labels enough"
        )
    if "return_loss" in takes:
        raise ValueError(
            "selection='gradient' takes the loss of one sequence at a time, and the contrastive loss of "
            f"{type(model).__name__} tells the pairs of a batch apart: one pair alone has none. Use "
            "selection='activation' or 'product'"
        )
    return None


def _own_tokens(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Labels [sequences, tokens]: the token ids without padding."""
    if mask is None:
        return ids
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)  # padding predicts nothing
    return labels


def checkpointing_kept(model: nn.Module) -> list:
    """Let blocks that checkpoint go on doing so in evaluation mode: they ask for their own training flag. What comes
    to the first blocks gets a gradient, which a block may need to pass one on. Gives the hooks it has set."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    if not blocks:
        return []
    from transformers.modeling_layers import GradientCheckpointingLayer  # not at the top: it takes seconds

    layers = [block for block in blocks if isinstance(block, GradientCheckpointingLayer)]
    hooks = []
    for block in layers or blocks:  # without such layers, the stack itself asks
        block.training = True
        if hasattr(block, "_gradient_checkpointing_func"):
            hooks.append(_EvaluatedInside(block))
    hooks.append(model.register_forward_pre_hook(_with_gradients, with_kwargs=True))
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embeddings is not None:
        hooks.append(embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True)))
    return hooks


class _EvaluatedInside:
    """Has a block's training flag off within its checkpoint, where it would mean dropout, until removed."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.checkpoint = block, block._gradient_checkpointing_func
        block._gradient_checkpointing_func = self

    def __call__(self, function: Callable, *inputs: Any, **more: Any) -> Any:
        def evaluated(*inputs: Any) -> Any:
            self.block.training = False
            try:
                return function(*inputs)
            finally:  # a checkpoint may leave its second run early, by an exception
                self.block.training = True

        return self.checkpoint(evaluated, *inputs, **more)

    def remove(self) -> None:
        self.block._gradient_checkpointing_func = self.checkpoint


def _with_gradients(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The inputs of a model, where pixels and sound, which no table of embeddings takes, require a gradient."""

    def differentiable(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_(True) if floating else value

    return tuple(map(differentiable, inputs)), {name: differentiable(value) for name, value in named.items()}
