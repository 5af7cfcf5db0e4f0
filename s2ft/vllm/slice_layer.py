"""A LoRA layer of vLLM that holds slices instead of low-rank factors."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2ft.vllm.compatibility import part_of
from s2ft.vllm.slice_bank import SliceBank, SlotBatch, add_slices_

OPTION = "S2FT_VLLM_UNITS"
LEAST, SHARE = 256, 0.05  # of the default: units of a projection, and share of its extent
KINDS = ("outputs", "inputs")
PARTS = "s2ft_parts"  # attribute of a layer: the names of the projections that are fused in it
Part = tuple[Tensor, Tensor] | None  # what stands for the factors A and B of a projection; None where there is none


@dataclass(frozen=True)
class Budget:
    """Units of each layer for one adapter.

    Attributes:
        every: Units of every layer, None if the layers are named or for the default.
        named: Units by the name of a projection or of a fused layer, with ":inputs" or ":outputs" if it is not the dim
            that is usual for the layer.
    """

    every: int | None = None
    named: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read the option.

        Args:
            text: A number of units for every layer, or ``down_proj=512,o_proj=128``. Layers that are not named hold no
                slices then. Empty for the default.

        Raises:
            ValueError: The text has another form.

        Example:
            >>> from s2ft.vllm.slice_layer import Budget
            >>> Budget.parse("down_proj=512, o_proj=128").named
            {'down_proj': 512, 'o_proj': 128}
        """
        text = text.strip()
        if text.isdigit():
            return cls(every=int(text))
        named: dict[str, int] = {}
        for word in text.split(",") if text else ():
            name, _, number = (part.strip() for part in word.partition("="))
            kind = name.partition(":")[2]
            if not (name and number.isdigit()) or ":" in name and kind not in KINDS:
                raise ValueError(
                    f"{OPTION} has {word.strip()!r}: give a number of units for every layer, such as {OPTION}=512, or "
                    f"units by the name of a projection, such as {OPTION}=down_proj=512,o_proj=128"
                )
            named[name] = named.get(name, 0) + int(number)
        return cls(named=named)

    def units(self, layer: str, parts: Mapping[str, tuple[int, int]], dim: int, usual: bool, rank: int) -> int:
        """Return the units of one layer that an adapter can have.

        Args:
            layer: Last part of the layer's path in the engine, such as "qkv_proj".
            parts: The projections of the layer: how many outputs or inputs each has, and how many on each rank.
            dim: 0 for outputs, 1 for inputs.
            usual: Whether adapters of this layer usually have this dim.
            rank: The engine's largest rank of a LoRA.
        """
        if self.named:
            keys = [key for name in {layer, *parts} for key in [name] * usual + [f"{name}:{KINDS[dim]}"]]
            wanted = sum(self.named.get(key, 0) for key in keys)
        elif not usual:
            return 0
        elif self.every is not None:
            wanted = self.every
        else:
            return sum(min(local, max(rank, LEAST, ceil(size * SHARE))) for size, local in parts.values())
        return min(sum(local for _, local in parts.values()), wanted)


def encode(index: Tensor, dim: int) -> Tensor:
    """Return what stands for the factor A of a LoRA: dim, then index. vLLM passes it through as one tensor."""
    return torch.cat((torch.tensor([dim]), index.to("cpu", torch.int64)))


def decode(a: Tensor) -> tuple[int, Tensor]:
    """Return dim and index."""
    return int(a[0]), a[1:]


def is_slices(a: Any) -> bool:
    """Whether a factor A of a LoRA stands for slices."""
    return isinstance(a, Tensor) and a.dim() == 1 and a.dtype == torch.int64


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
        budget: The :class:`Budget` of the class.
        banks: The slices of all slots: of outputs, of inputs, both, or none.
        batch: The :class:`~s2ft.vllm.slice_bank.SlotBatch` that has the slot of each token.
    """

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
        self.banks = ()
        for dim in (0, 1):
            units = self.budget.units(
                self._name(), self._sizes(dim), dim, self._is_usual(dim), lora_config.max_lora_rank
            )
            if units:
                width = int((self._places(1 - dim, 1)[0] >= 0).sum())
                self.banks += (SliceBank(max_loras, units, width, dim, lora_config.lora_dtype, device),)

    def _name(self) -> str:
        return getattr(self.base_layer, "prefix", "").rpartition(".")[2]

    def _is_usual(self, dim: int) -> bool:
        return is_replicated(self.base_layer) or dim == int(is_row_parallel(self.base_layer))

    def _sizes(self, dim: int) -> dict[str, tuple[int, int]]:
        """How many outputs or inputs each projection has, and how many on each rank."""
        names = getattr(self.base_layer, PARTS, ()) or (self._name(),)
        found = [(size, local) for size, local, _ in pieces(self.base_layer, 0, dim)]
        found *= len(names) if dim == 1 else 1
        if len(names) == len(found):
            return dict(zip(names, found))
        return {self._name(): (sum(size for size, _ in found), sum(local for _, local in found))}

    def _places(self, dim: int, parts: int, rank: int | None = None) -> list[Tensor]:
        """Where the outputs (dim 0) or inputs (dim 1) of each projection are on a rank, see :func:`places_of`."""
        return places_of(self.base_layer, self.tp_rank if rank is None else rank, dim, parts)

    def room(self, dim: int) -> tuple[str, int]:
        """The name of a dim in the option, and the units of it that an adapter can have in this layer."""
        is_plain = self._is_usual(dim) and not is_replicated(self.base_layer)  # where the plain name counts for both
        name = self._name() if is_plain else f"{self._name()}:{KINDS[dim]}"
        return name, next((bank.capacity for bank in self.banks if bank.dim == dim), 0)

    def needs(self, parts: Sequence[Part]) -> dict[int, int]:
        """Count the units of an adapter.

        Args:
            parts: The slices of each projection, which have the sizes of the layer.

        Returns:
            The units by dim. Of several ranks, the most, so that all ranks decide alike.

        Raises:
            ValueError: The adapter has another number of projections.
        """
        count = len(pieces(self.base_layer, 0))
        if len(parts) not in (1, count):
            raise ValueError(f"the layer consists of {count} projections, and the adapter has {len(parts)} for it")
        slices = [(number, *decode(part[0])) for number, part in enumerate(parts) if part is not None]
        most = {0: 0, 1: 0}
        for rank in range(1 if is_replicated(self.base_layer) else self.tp_size):
            for dim in most:
                places = self._places(dim, len(parts), rank)
                here = (int((places[number][index] >= 0).sum()) for number, one, index in slices if one == dim)
                most[dim] = max(most[dim], sum(here))
        return {dim: count for dim, count in most.items() if count}

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        for bank in self.banks:
            bank.put(index, bank.index[:0], bank.values[:0])

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot.

        Args:
            index: Number of the slot.
            lora_a: What stands for factor A, see :func:`encode`, of one projection or of each that is fused.
            lora_b: The rows of values.

        Raises:
            ValueError: They are the factors of a LoRA. :func:`s2ft.vllm.layers.admit` has refused such an adapter,
                unless a program has put a loader of its own in place of vLLM's.
        """
        if isinstance(lora_a, Tensor):
            lora_a, lora_b = [lora_a], [lora_b]
        parts: list[Part] = [None if one is None else (one, other) for one, other in zip(lora_a, lora_b)]
        if not all(part is None or is_slices(part[0]) for part in parts):
            if any(part is not None and part[0].any() and part[1].any() for part in parts):
                raise ValueError("a LoRA has no place in this vLLM, which serves S²FT adapters alone")
            # vLLM's warm-up measures memory with LoRA of zeros. A full slot of zeros takes as much as an adapter can.
            for bank in self.banks:
                zeros = bank.values.new_zeros(1, 1).expand(bank.capacity, bank.values.shape[1])
                bank.put(index, torch.arange(bank.capacity), zeros)
            return
        for bank in self.banks:
            units, rows = [bank.index[:0]], [bank.values[:0]]
            places = zip(self._places(bank.dim, len(parts)), self._places(1 - bank.dim, len(parts)))
            for part, (along, across) in zip(parts, places):
                if part is not None and decode(part[0])[0] == bank.dim:
                    where, here = along[decode(part[0])[1]], across >= 0
                    values = part[1].new_zeros(int((where >= 0).sum()), bank.values.shape[1])
                    values[:, across[here]] = part[1][where >= 0][:, here]
                    units.append(where[where >= 0].to(bank.index.device))
                    rows.append(values.to(bank.values))
            bank.put(index, torch.cat(units), torch.cat(rows))

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


def batch_of(punica_wrapper: Any, slots: int) -> SlotBatch:
    """Return the description of the batch that belongs to one of vLLM's punica wrappers.

    vLLM tells the wrapper about every new batch. The description is updated with it.

    Args:
        punica_wrapper: The wrapper, which all layers of a model share.
        slots: Number of adapters at once.
    """
    found = getattr(punica_wrapper, "s2ft_batch", None)
    if found is not None:
        return found
    tokens = part_of(punica_wrapper, "_token_lora_indices")
    batch = SlotBatch(tokens.numel(), slots, tokens.device)
    update = punica_wrapper.update_metadata

    def update_metadata(mapping: Any, lora_index_to_id: list, *args: Any, **options: Any) -> None:
        update(mapping, lora_index_to_id, *args, **options)
        slot_of = {number: slot for slot, number in enumerate(lora_index_to_id) if number is not None}
        which, back = np.unique(np.asarray(mapping.index_mapping, dtype=np.int64), return_inverse=True)
        batch.update(np.array([slot_of[n] if n > 0 else -1 for n in which.tolist()], dtype=np.int64)[back])

    punica_wrapper.update_metadata, punica_wrapper.s2ft_batch = update_metadata, batch
    return batch


# ---- which outputs and inputs of a layer a rank of tensor parallelism has ----------------------------
#
# The layers are those of vLLM, known by their attributes, so that stand-ins can be tested without vLLM.


# The outputs of a projection that is fused in a layer or is the layer's only one, or the inputs of a layer: how many
# there are on all ranks, how many a rank has, and which part of them, counted in parts of that size.
Piece = tuple[int, int, int]


def is_row_parallel(layer: Any) -> bool:
    """Whether a layer's inputs are divided among the ranks."""
    return hasattr(layer, "input_is_parallel")


def is_replicated(layer: Any) -> bool:
    """Whether every rank has the whole layer."""
    return not is_row_parallel(layer) and not hasattr(layer, "gather_output")


def pieces(layer: Any, rank: int, dim: int = 0) -> list[Piece]:
    """Describe the outputs or the inputs of a layer.

    Args:
        layer: A linear layer of vLLM.
        rank: Rank of tensor parallelism.
        dim: 0 for outputs, 1 for inputs.

    Returns:
        The outputs of the fused projections in their order, one piece for a layer that is a single projection; or the
        inputs, which all of them share.
    """
    if dim == 1 and is_row_parallel(layer):
        return [(layer.input_size, layer.input_size_per_partition, rank)]
    if dim == 1:
        return [(layer.input_size, layer.input_size, 0)]
    if is_row_parallel(layer):
        return [(layer.output_size, layer.output_size, 0)]
    if is_replicated(layer):
        return [(size, size, 0) for size in getattr(layer, "output_sizes", [layer.output_size])]
    if hasattr(layer, "num_kv_head_replicas"):
        keys, values = layer.head_size, getattr(layer, "v_head_size", layer.head_size)
        shard = rank // layer.num_kv_head_replicas  # a key head may be on several ranks
        return [
            (layer.total_num_heads * keys, layer.num_heads * keys, rank),
            (layer.total_num_kv_heads * keys, layer.num_kv_heads * keys, shard),
            (layer.total_num_kv_heads * values, layer.num_kv_heads * values, shard),
        ]
    return [(size, size // layer.tp_size, rank) for size in getattr(layer, "output_sizes", [layer.output_size])]


def places_of(layer: Any, rank: int, dim: int, parts: int) -> list[Tensor]:
    """Where the outputs or inputs of each projection are in a rank's part of a layer.

    Args:
        layer: A linear layer of vLLM.
        rank: Rank of tensor parallelism.
        dim: 0 for outputs, 1 for inputs.
        parts: Number of projections that the checkpoint has for the layer: 1 if it has one weight for all.

    Returns:
        For each projection, the place of each of its outputs or inputs, int64; -1 for those of other ranks.
    """
    found, at = [], 0
    for size, local, shard in pieces(layer, rank, dim):
        places, first = torch.full((size,), -1), local * shard
        places[first : first + local] = torch.arange(at, at + local)
        found.append(places)
        at += local
    if dim == 1:
        return found * parts
    return [torch.cat(found)] if parts == 1 else found
