"""A LoRA layer of vLLM that holds slices instead of low-rank factors."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2ft.vllm.compatibility import part_of
from s2ft.vllm.slices.bank import SliceBank
from s2ft.vllm.slices.product import Batch, add_slices_
from s2ft.vllm.slices.spans import (
    extent,
    input_spans,
    is_replicated,
    is_row_parallel,
    output_spans,
    pick,
    pieces,
    spread,
)
from s2ft.vllm.slices.units import KINDS, Budget, Extent, Place

PARTS = "s2ft_parts"  # attribute of a layer: the names of the projections that are fused in it


def encode(index: Tensor, dim: int) -> Tensor:
    """Return what stands for the factor A of a LoRA: dim, then index. vLLM passes it through as one tensor."""
    return torch.cat((torch.tensor([dim]), index.to("cpu", torch.int64)))


def decode(a: Tensor) -> tuple[int, Tensor]:
    """Return dim and index."""
    return int(a[0]), a[1:]


def is_slices(a: Any) -> bool:
    """Whether a factor A of a LoRA stands for slices."""
    return isinstance(a, Tensor) and a.dim() == 1 and a.dtype == torch.int64


def parts_of(a: Any, b: Any) -> list[tuple[Tensor, Tensor] | None]:
    """Return the factors of each projection of a layer, None where the adapter has none."""
    if isinstance(a, Tensor):
        return [(a, b)]
    return [None if one is None else (one, other) for one, other in zip(a, b)]


def with_slices(base: type, budget: Budget) -> type:
    """Derive a class that holds slices from one of vLLM's LoRA layers.

    Args:
        base: A LoRA layer of vLLM for linear layers, not fully sharded.
        budget: Units of each layer.

    Returns:
        The class. vLLM makes its objects as those of `base`.
    """
    name = f"{base.__name__.removesuffix('WithLoRA')}WithSlices"
    return type(name, (SliceLayer, base), {"budget": budget, "__module__": __name__})


class SliceLayer:
    """What the classes have in common. It stands before a LoRA layer of vLLM in the order of classes.

    Attributes:
        banks: The slices of all slots: of outputs, of inputs, both, or none.
        batch: The slot of each token.
    """

    budget: Budget
    banks: tuple[SliceBank, ...]
    batch: Batch

    @classmethod
    def can_replace_layer(
        cls, source_layer: Any, lora_config: Any, packed_modules_list: list, model_config: Any = None, **options: Any
    ) -> bool:
        """Whether this class is the wrapper of a layer. With fully sharded LoRA too: slices are sharded in any case."""
        found = super().can_replace_layer(  # type: ignore[misc]
            source_layer=source_layer,
            lora_config=unsharded(lora_config),
            packed_modules_list=packed_modules_list,
            model_config=model_config,
        )
        if found:
            setattr(source_layer, PARTS, tuple(packed_modules_list))
        return found

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Allocate the banks. The factors of a LoRA are on the meta device: vLLM's warm-up reads their shapes."""
        device, self.device = self.device, torch.device("meta")
        super().create_lora_weights(max_loras, unsharded(lora_config), model_config)  # type: ignore[misc]
        self.device, self._enable_aux_cuda_stream = device, False  # a second stream is for LoRA's two products
        banks = []
        for dim in (0, 1):
            width = extent(self._spans(1 - dim, 1))
            units = self.budget.units(
                self._name(), self._extents(dim), dim, self._is_usual(dim), max_loras, lora_config.max_lora_rank
            )
            if units:
                banks.append(SliceBank(max_loras, units, width, dim, lora_config.lora_dtype, device))
        self.banks = tuple(banks)

    def _name(self) -> str:
        return getattr(self.base_layer, "prefix", "").rpartition(".")[2]

    def _is_usual(self, dim: int) -> bool:
        return is_replicated(self.base_layer) or dim == int(is_row_parallel(self.base_layer))

    def _extents(self, dim: int) -> list[Extent]:
        """The units of each projection of the layer."""
        names, layer = getattr(self.base_layer, PARTS, ()), self.base_layer
        if dim == 1:
            local = extent(input_spans(layer, 0))
            return [Extent(name, layer.input_size, local) for name in names or (self._name(),)]
        found = pieces(layer, 0)
        if len(names) == len(found):
            return [Extent(name, piece.size, piece.local) for name, piece in zip(names, found)]
        size, local = sum(piece.size for piece in found), sum(piece.local for piece in found)
        return [Extent(self._name(), size, local)]

    def _spans(self, dim: int, parts: int, rank: int | None = None) -> list:
        """What a rank has of the outputs (dim 0) or inputs (dim 1). For several projections, a list of each."""
        rank = self.tp_rank if rank is None else rank
        if dim == 1:
            return input_spans(self.base_layer, rank) if parts == 1 else [input_spans(self.base_layer, rank)] * parts
        spans = output_spans(self.base_layer, rank, parts)
        return spans[0] if parts == 1 else spans

    def places(self, path: str) -> dict[int, Place]:
        """Describe the banks, by dim, also those that hold nothing."""
        capacity = {bank.dim: bank.capacity for bank in self.banks}
        keys = {dim: self._name() + ("" if self._is_usual(dim) else f":{KINDS[dim]}") for dim in (0, 1)}
        if is_replicated(self.base_layer):  # the plain name would count for both
            keys = {dim: f"{self._name()}:{KINDS[dim]}" for dim in (0, 1)}
        return {dim: Place(path, keys[dim], capacity.get(dim, 0)) for dim in (0, 1)}

    def needs(self, a: Any, b: Any) -> dict[int, int]:
        """Check the slices of an adapter and count their units.

        Args:
            a: What stands for factor A, of one projection or of each that is fused in the layer.
            b: The rows of values.

        Returns:
            The units by dim. Of several ranks, the most, so that all ranks decide alike.

        Raises:
            ValueError: The slices do not fit the layer.
        """
        parts = parts_of(a, b)
        found: dict[int, int] = {}
        ranks = range(1 if is_replicated(self.base_layer) else self.tp_size)
        for dim in (0, 1):
            counts = []
            for rank in ranks:
                spans = self._each(dim, len(parts), rank)
                mine = [
                    pick(decode(part[0])[1], span)[0].numel()
                    for part, span in zip(parts, spans)
                    if part is not None and decode(part[0])[0] == dim
                ]
                counts.append(sum(mine))
            found[dim] = max(counts)
        self._check(parts)
        return {dim: count for dim, count in found.items() if count}

    def _check(self, parts: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        sizes = [piece.size for piece in pieces(self.base_layer, 0)]
        sizes = [sum(sizes)] if len(parts) == 1 else sizes
        for part, size in zip(parts, sizes):
            if part is None:
                continue
            dim, index = decode(part[0])
            count, width = (size, self.base_layer.input_size)[:: 1 if dim == 0 else -1]
            if part[1].shape != (index.numel(), width):
                raise ValueError(f"values of shape {tuple(part[1].shape)}, expected ({index.numel()}, {width})")
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
                raise ValueError(f"{KINDS[dim]} {int(index.min())} to {int(index.max())}, but the layer has {count}")

    def _each(self, dim: int, parts: int, rank: int | None = None) -> list:
        """The spans of each projection."""
        return [self._spans(dim, 1, rank)] if parts == 1 else self._spans(dim, parts, rank)

    def drop(self, slots: Sequence[int]) -> None:
        """Empty slots whose adapter vLLM has taken out of use."""
        for bank in self.banks:
            bank.clear(slots)

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.drop([index])

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot.

        Args:
            index: Number of the slot.
            lora_a: What stands for factor A, see :func:`encode`, of one projection or of each that is fused.
            lora_b: The rows of values.

        Raises:
            ValueError: The factors are those of a LoRA.
        """
        parts = parts_of(lora_a, lora_b)
        if not all(part is None or is_slices(part[0]) for part in parts):
            self._set_warm_up(index, parts)
            return
        for bank in self.banks:
            units, rows = [], []
            across = self._each(1 - bank.dim, len(parts))
            for part, spans, others in zip(parts, self._each(bank.dim, len(parts)), across):
                if part is None or decode(part[0])[0] != bank.dim:
                    continue
                which, where = pick(decode(part[0])[1], spans)
                units.append(where)
                rows.append(spread(part[1].index_select(0, which), others, bank.values.shape[1]))
            if units:
                bank.put(index, torch.cat(units), torch.cat(rows))
            else:
                bank.clear([index])

    def _set_warm_up(self, index: int, parts: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """vLLM's warm-up measures memory with LoRA of zeros. A full slot of zeros takes as much as an adapter can."""
        if any(part is not None and (part[0].count_nonzero() or part[1].count_nonzero()) for part in parts):
            raise ValueError("this vLLM serves S²FT adapters alone, because S2FT_VLLM_SLICES is set")
        for bank in self.banks:
            units = bank.capacity // bank.slots
            zeros = bank.values.new_zeros(1, 1).expand(units, bank.values.shape[1])
            bank.put(index, torch.arange(units, device=zeros.device), zeros)

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Take the object that knows the slot of each token."""
        super().set_mapping(punica_wrapper)  # type: ignore[misc]
        self.batch = batch_of(punica_wrapper, len(self.lora_a_stacked[0]))

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the slices of each token's adapter."""
        if not self.banks:
            return output
        tokens, sums = x.flatten(0, -2), output.flatten(0, -2)
        for bank in self.banks:
            add_slices_(sums, tokens, bank, self.batch)
        return sums.view(output.shape)


def unsharded(lora_config: Any) -> Any:
    """A copy of vLLM's LoRAConfig that asks for no sharding of LoRA's factors. There are none."""
    changed = copy.copy(lora_config)
    changed.fully_sharded_loras = False
    return changed


def batch_of(punica_wrapper: Any, slots: int) -> Batch:
    """Return the description of the batch that belongs to one of vLLM's punica wrappers.

    vLLM tells the wrapper about every new batch. The description is updated with it.

    Args:
        punica_wrapper: The wrapper, which all layers of a model share.
        slots: Number of adapters at once.
    """
    found = getattr(punica_wrapper, "s2ft_batch", None)
    if found is not None:
        return found
    batch = Batch.like(part_of(punica_wrapper, "_token_lora_indices"), slots)
    update = punica_wrapper.update_metadata

    def update_metadata(mapping: Any, lora_index_to_id: list, *args: Any, **options: Any) -> None:
        update(mapping, lora_index_to_id, *args, **options)
        slot_of = {number: slot for slot, number in enumerate(lora_index_to_id) if number is not None}
        numbers = np.asarray(mapping.index_mapping, dtype=np.int64)
        which, back = np.unique(numbers, return_inverse=True)
        batch.update(np.array([slot_of[n] if n > 0 else -1 for n in which.tolist()], dtype=np.int64)[back])

    punica_wrapper.update_metadata, punica_wrapper.s2ft_batch = update_metadata, batch
    return batch
