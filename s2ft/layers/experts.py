"""Experts whose weights are stacked [experts, O, I] in one parameter, and train a few units of each.

transformers keeps a mixture's experts so: `gate_up_proj` and `down_proj` of one module. A stack stands in the
parameter's place, and the module gets :func:`experts_forward`, which runs the experts that have tokens one by one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.distributed import Shard
from s2ft.layers.base import S2Layer
from s2ft.layers.kind import Kind
from s2ft.ops import indexed_linear


class S2Experts(S2Layer):
    """What S2ColumnExperts and S2RowExperts share. Each expert has its own units, any number of them or none.

    `weight` [experts, O, I] is frozen. `s2` is trainable: the experts' slices one after the other along `dim`,
    [n, I] or [O, n]; `index` [n] has the unit of each, `counts` how many each expert has.
    """

    def __init__(self, weight: nn.Parameter, index: dict[int, Tensor], delta_dtype: torch.dtype | None = None) -> None:
        """weight: taken over, no copy. index: units [n] int64 by expert, different ones."""
        super().__init__()
        self.weight, self.bias = weight.requires_grad_(False), None
        self.counts = [index[e].numel() if e in index else 0 for e in range(weight.shape[0])]
        joined = torch.cat([index[e] for e in sorted(index)])
        self.register_buffer("index", joined.to(weight.device))
        shape = [weight.shape[1], weight.shape[2]]
        shape[self.dim] = joined.numel()
        self.s2 = nn.Parameter(torch.zeros(shape, device=weight.device, dtype=delta_dtype or weight.dtype))
        self._made = self.s2.dtype
        self.register_buffer("base", None)  # the replaced slices, while fused
        self.enabled = True
        self._parts: tuple[Tensor, ...] | None = None

    @property
    def kind(self) -> Kind:
        return EXPERTS

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [tokens, I] → [tokens, O] by one expert's effective weight."""
        if self.fused or not self.enabled or not self.counts[expert]:
            return F.linear(x, self.weight[expert])
        parts = self._parts if self._parts is not None else self.s2.split(self.counts, self.dim)
        return indexed_linear(x, self.weight[expert], parts[expert], self.index.split(self.counts)[expert], self.dim)

    def begin(self) -> None:
        """Split s2 once for a forward over all experts: each split's backward makes a gradient of all of s2."""
        if self.fused:
            self._check_fused()
        self._parts = self.delta.split(self.counts, self.dim)

    def end(self) -> None:
        self._parts = None

    def _units(self) -> Tensor:
        found = [
            weight.index_select(self.dim, index)
            for weight, index in zip(self.weight.detach(), self.index.split(self.counts))
        ]
        return torch.cat(found, self.dim)

    def write_units_of(self, weight: Tensor, values: Tensor) -> None:
        parts = zip(weight.detach(), self.index.split(self.counts), values.split(self.counts, self.dim))
        for matrix, index, part in parts:
            matrix.transpose(0, self.dim)[index] = part.transpose(0, self.dim)

    def extra_repr(self) -> str:
        return f"experts={len(self.counts)}, weight={tuple(self.weight.shape[1:])}, {self._selected()}"


class S2ColumnExperts(S2Experts):
    """Stack that trains outputs of its experts (gate, up)."""

    dim = 0


class S2RowExperts(S2Experts):
    """Stack that trains inputs of its experts (down)."""

    dim = 1


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,  # [tokens, width]
    top_k_index: Tensor,  # [tokens, k] int64
    top_k_weights: Tensor,  # [tokens, k]
) -> Tensor:  # [tokens, width]
    """The forward of a module of experts: down(act(gate) * up) of each, weighted and added up, in float32 at least."""
    trained = [layer for layer in (self.gate_up_proj, self.down_proj) if isinstance(layer, S2Experts)]
    for layer in trained:
        layer.begin()
    try:
        return _run_experts(self, hidden_states, top_k_index, top_k_weights)
    finally:
        for layer in trained:
            layer.end()


def gate_of(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """How this module of experts makes act(gate) * up of the output of its `gate_up_proj`.

    Raises: ValueError for a class that does not say.
    """
    own = getattr(experts, "_apply_gate", None)
    if own is not None:
        return own
    if type(experts).__name__ == "LigerExperts":  # Liger-Kernel's constructor refuses every other activation
        return _silu_gate
    raise ValueError(
        f"{type(experts).__name__} has no _apply_gate, so it is not known how its experts combine gate "
        "and up: load the model without kernels that replace the class of its experts"
    )


def _silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _run_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    gated = gate_of(self)
    k, flat = top_k_index.shape[1], top_k_index.reshape(-1)
    order = flat.argsort(stable=True)  # all places of one expert in a row
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    outputs: list[Tensor] = []
    for expert, places in enumerate(order.split(counts)):
        if places.numel() and expert < self.num_experts:  # beyond: places that another device's experts have
            tokens = places // k
            inner = gated(_project(self.gate_up_proj, hidden_states[tokens], expert, tokens))
            outputs.append(_project(self.down_proj, inner, expert, tokens) * top_k_weights.reshape(-1)[places, None])
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    result = torch.zeros(hidden_states.shape, dtype=wide, device=hidden_states.device)
    if outputs:
        here = order[: sum(counts[: self.num_experts])] // k
        result = result.index_add(0, here, torch.cat(outputs).to(wide))
    return result.to(hidden_states.dtype)


def _project(weights: nn.Parameter | nn.Module, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
    if isinstance(weights, ObservedExperts):
        return weights(x, expert, tokens)
    return weights(x, expert) if isinstance(weights, nn.Module) else F.linear(x, weights[expert])


class ObservedExperts(nn.Module):
    """A stack that trains nothing, in the parameter's place so that a hook sees what passes each expert."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        """x [tokens of the expert, I] → [.., O]; tokens: their numbers in the batch."""
        return F.linear(x, self.weight[expert])


class ExpertsKind(Kind):
    """The weights of all experts in one parameter [experts, outputs, inputs]."""

    name = "parameters [experts, outputs, inputs]"
    layers = (S2ColumnExperts, S2RowExperts)

    def matches(self, found: Any) -> bool:
        return isinstance(found, Tensor)

    def weight(self, holder: nn.Module | Tensor) -> Tensor:
        return holder.weight if isinstance(holder, nn.Module) else holder

    def view(self, tensor: Tensor, expert: int | None = None) -> Tensor:
        return tensor[expert]

    def shard(self, shard: Shard, expert: int | None = None) -> Shard:
        weights, start = shard.tensor, shard.start
        number = expert - start[0]
        is_here = 0 <= number < weights.shape[0]
        return Shard(weights[number] if is_here else weights.new_empty(0, *weights.shape[2:]), start[1:])


EXPERTS = ExpertsKind()
