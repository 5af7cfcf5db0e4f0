"""Calibration data, checked batch by batch."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from s2ft.distributed import check_all_ranks_agree, is_spread
from s2ft.model.coupling import Coupling, Projection
from s2ft.model.parts import has_one_tower, tower_of

IGNORED = -100  # the label that torch's cross entropy ignores
MAIN_INPUTS = {  # a model's main input: its description, and its number of dimensions, or the smallest one
    "input_ids": ("token ids of shape [sequences, tokens]", 2),
    "pixel_values": ("floating-point pixels of shape [images, channels, height, width]", 4),
    "input_features": ("floating-point features of shape [recordings, mel bins, frames]", 3),
}


@dataclass(frozen=True)
class Batch:
    """The arguments of one forward.

    Attributes:
        size: Number of sequences, images or recordings: the first dimension of the tensors.
        named: Arguments by name.
        positional: Arguments by position, for modules that are not models of transformers.
    """

    size: int
    named: dict[str, Any]
    positional: tuple[Any, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with `change` applied to every tensor."""
        named, positional = tree_map_only(Tensor, change, (self.named, self.positional))
        return replace(self, named=named, positional=positional)

    def row(self, number: int) -> "Batch":
        """Return the sequence, image or recording with this number as a batch of one.

        Raises:
            ValueError: Which of the images belong to a sequence can't be told.
        """
        for name, value in self.named.items():
            is_in_rows = isinstance(value, Tensor) and name.startswith(("pixel_values", "position_ids"))
            if is_in_rows and self.size > 1 and len(value) not in (1, self.size):
                raise ValueError(
                    f"{name} has {len(value)} rows for {self.size} sequences, and the gradient is taken of one "
                    "sequence at a time: give batches of one sequence"
                )
        return self.map(lambda value: value[number : number + 1] if value.dim() and len(value) == self.size else value)


class Calibration:
    """Batches for the statistics of a metric. They are read once, in order.

    Args:
        data: Batches. For a model of transformers, a batch is a dict of tensors, such as a tokenizer, a processor or a
            collator returns, or the tensor of its main input. For any other module, a batch is a tensor or a tuple,
            passed by position, or a dict, passed by name.
        device: Device of the model.
        name: Name of the argument that has the data, for messages.

    Raises:
        TypeError: `data` is not an iterable of batches.
    """

    def __init__(self, data: Iterable, device: torch.device, name: str = "calibration") -> None:
        if isinstance(data, (Mapping, Tensor, str, bytes)) or not isinstance(data, Iterable):
            raise TypeError(f"{name} must be a DataLoader or an iterable of batches, got {type(data).__name__}")
        self.data, self.device, self.name = data, device, name
        self._masks: dict[str, Tensor] = {}  # of the current batch

    def batches(self, model: nn.Module) -> Iterator[Batch]:
        """Yield the batches on the model's device. A terminal shows a progress bar.

        Raises:
            ValueError: A batch does not fit the model, or there is no batch.
        """
        empty, data = True, tqdm(self.data, desc=self.name, unit="batch", disable=None)
        if any(map(is_spread, model.parameters())):
            data = _same_on_all_ranks(data, self.name)
        for number, batch in enumerate(data):
            batch = _checked(batch, f"{self.name} batch {number}", model).map(lambda value: value.to(self.device))
            self._masks = _masks(batch, is_encoder_decoder(model))
            mask = batch.named.get("attention_mask")
            empty = empty and isinstance(mask, Tensor) and not bool((mask != 0).any())
            yield batch
        if empty:
            raise ValueError(f"{self.name} is empty: it has no tokens")

    def without_padding(self, x: Tensor, path: str, positions: str, rows: Tensor | None = None) -> Tensor:
        """Remove the padded positions from the activations of a module.

        If the mask has other positions than the activations (it masks tokens, and the activations have one row per
        sequence, patch or frame), nothing is removed.

        Args:
            x: Activations, shape [..., features].
            path: Name of the module, for messages.
            positions: Which positions the module has, see :func:`positions_of`.
            rows: If x has only some positions of the batch, their numbers, shape [n].

        Returns:
            The activations, shape [n, features].

        Raises:
            ValueError: Some positions are padded, and x does not have the batch as its first dimension.
        """
        mask = self._masks.get(positions)
        if mask is not None and rows is not None:
            x = x[mask.flatten().to(x.device)[rows]]
        elif mask is not None:
            if x.shape[:-1].numel() == mask.numel() and len(x) in (len(mask), mask.numel()):
                x = x.reshape(-1, x.shape[-1])[mask.flatten().to(x.device)]
            elif len(x) != len(mask):
                raise ValueError(
                    f"{path} has activations of shape {tuple(x.shape)}, which the mask of shape "
                    f"{tuple(mask.shape)} does not fit: pass {self.name} batches without padding"
                )
        return x.reshape(-1, x.shape[-1])


def _same_on_all_ranks(data: Iterable, name: str) -> Iterator:
    """Yield batches of which every rank has the same number. Ranks that share weights would wait for each other else.

    Raises:
        RuntimeError: A rank has more batches. It is raised on every rank.
    """
    for number, batch in enumerate(data):
        check_all_ranks_agree(name, f"a batch {number}")
        yield batch
    check_all_ranks_agree(name, "the end")


# ---- which positions are padding -----------------------------------------------------------------------


def positions_of(model: nn.Module, coupling: Coupling, projection: Projection) -> str:
    """Return which positions a projection's activations have.

    They are those of the "encoder" or the "decoder", the "tokens" of a model that is neither, or "other" ones without
    padding. The names decide, because an encoder and a decoder may have inputs of equal length.
    """
    if coupling.kind == "cross-attention" and projection.key in ("k", "v"):
        return "encoder"
    tower = "language" if has_one_tower(model) else tower_of(model, projection.path)
    if tower in ("vision", "projector") or (tower == "audio" and not is_encoder_decoder(model)):
        return "other"  # images or sound beside the text
    if not is_encoder_decoder(model):
        return "tokens"
    return next((name for name in projection.path.split(".") if name in ("encoder", "decoder")), "other")


def _masks(batch: Batch, encoder_decoder: bool) -> dict[str, Tensor]:
    """Return a mask for each kind of positions with padding: True for those that count, shape [sequences, length]."""
    get = batch.named.get
    if encoder_decoder:
        masks: dict[str, Any] = {"encoder": get("attention_mask"), "decoder": get("decoder_attention_mask")}
        labels = get("labels")
        if masks["decoder"] is None and isinstance(labels, Tensor) and labels.dim() == 2:
            masks["decoder"] = labels != IGNORED
    else:
        masks = {"tokens": get("attention_mask"), "encoder": get("encoder_attention_mask")}
    masks = {name: mask != 0 for name, mask in masks.items() if isinstance(mask, Tensor) and mask.dim() == 2}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


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
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    has_labels = takes_labels and named.get("labels") is not None
    if is_encoder_decoder(model) and not has_decoder_inputs(named) and not has_labels:
        raise ValueError(
            f"{where} needs decoder_input_ids{', or labels to make them from,' if takes_labels else ''} for "
            f"the decoder of {type(model).__name__} (it has {', '.join(map(str, named))})"
        )
    for name, expected, reference in _expected_shapes(named, len(named[main]), model):
        value, shape = named.get(name), _shape(named.get(name))
        if value is not None and (not isinstance(value, Tensor) or shape[: len(expected)] != expected):
            form = f"{expected}" if len(expected) > 1 else f"({expected[0]}, ...)"
            raise ValueError(
                f"{where}: {name} must have shape {form} to fit {reference} {_shape(named[reference])}, "
                f"got {shape if isinstance(value, Tensor) else type(value).__name__}"
            )
    return Batch(len(named[main]), named)


def _for_module(batch: Any, where: str) -> Batch:
    """Check a batch for a module that is not a model of transformers. Its inputs are not known."""
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


def _check_input(named: dict[str, Any], name: str, where: str, role: str = "") -> None:
    """Raise ValueError if an input is missing, empty, or has a wrong type or number of dimensions."""
    what, dims = MAIN_INPUTS.get(name, ("a tensor whose first dim is the batch", 1))
    value = named.get(name)
    if isinstance(value, Tensor) and value.numel():
        fits = value.dim() == dims if name == "input_ids" else value.dim() >= dims  # videos have frames too
        if fits and (name not in MAIN_INPUTS or value.is_floating_point() == (name != "input_ids")):
            return
    got = f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    has = f" (it has {', '.join(map(str, named))})" if value is None and named else ""
    raise ValueError(f"{where} needs {name}, {role}{what}, got {got}{has}")


def has_decoder_inputs(named: dict[str, Any]) -> bool:
    return any(named.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))


def _expected_shapes(named: dict[str, Any], size: int, model: Any) -> Iterator[tuple]:
    """Yield the name of an input, the shape it must start with, and the name of the input that this follows from."""
    main, ids = model.main_input_name, named.get("input_ids")
    labels: tuple[tuple, str] = (size,), main
    if is_encoder_decoder(model):
        if named.get("decoder_input_ids") is not None:
            yield "decoder_input_ids", (size,), main
            labels = _shape(named["decoder_input_ids"]), "decoder_input_ids"
            yield "decoder_attention_mask", *labels
        elif named.get("labels") is not None:
            yield "decoder_attention_mask", _shape(named["labels"]), "labels"
    elif main == "input_ids" and model.get_output_embeddings() is not None:  # a label for every token
        kept = named.get("logits_to_keep")  # s2ft's collator makes labels for the kept logits only
        labels = (size, kept if isinstance(kept, int) and kept else named["input_ids"].shape[1]), main
    yield "attention_mask", *(((size,), main) if ids is None else (tuple(ids.shape), "input_ids"))
    yield "labels", *labels


def _shape(value: Any) -> tuple:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


# ---- what kind of model it is ----------------------------------------------------------------------------


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal_lm(model: nn.Module) -> bool:
    """Return True if the model's loss shifts the labels, so that the tokens themselves can be the labels."""
    return (
        getattr(model, "main_input_name", None) == "input_ids"
        and not is_encoder_decoder(model)
        and cast(Any, model).can_generate()
    )
