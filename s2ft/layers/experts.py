"""Experts whose weights are one parameter [experts, outputs, inputs], and layers that train a few units of each.

transformers stores the experts of a mixture in this way: `gate_up_proj` and `down_proj` of one module. A trainable
layer replaces the parameter, and :func:`experts_forward` becomes the forward of the module. It runs the experts that
have tokens one after the other.
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
    """What S2ColumnExperts and S2RowExperts share. Each expert has its own units: any number of them, or none.

    `weight` is [experts, outputs, inputs]. `s2` contains the slices of the experts one after the other along `dim`:
    [n, inputs] or [outputs, n]. `index` [n] has the units in the same order, `counts` the number of units of each
    expert.
    """

    def __init__(self, weight: nn.Parameter, index: dict[int, Tensor], delta_dtype: torch.dtype | None = None) -> None:
        """Make a trainable layer that uses a parameter without copying it.

        Args:
            weight: The weights [experts, outputs, inputs]. They are frozen.
            index: The selected units [n] int64 by expert, each unit once.
            delta_dtype: dtype of `s2`; default: that of the weight.
        """
        super().__init__()
        self.weight, self.bias = weight.requires_grad_(False), None
        self.counts = [index[e].numel() if e in index else 0 for e in range(weight.shape[0])]
        joined = torch.cat([index[e] for e in sorted(index)])
        self.register_buffer("index", joined.to(weight.device))
        shape = [weight.shape[1], weight.shape[2]]
        shape[self.dim] = joined.numel()
        self.s2 = nn.Parameter(torch.zeros(shape, device=weight.device, dtype=delta_dtype or weight.dtype))
        self._made = self.s2.dtype
        self.register_buffer("base", None)
        self.enabled = True
        self._parts: tuple[Tensor, ...] | None = None

    @property
    def kind(self) -> Kind:
        return EXPERTS

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Run one expert on its effective weight: x [tokens, inputs] → [tokens, outputs]."""
        if self.fused or not self.enabled or not self.counts[expert]:
            return F.linear(x, self.weight[expert])
        parts = self._parts if self._parts is not None else self.s2.split(self.counts, self.dim)
        return indexed_linear(x, self.weight[expert], parts[expert], self.index.split(self.counts)[expert], self.dim)

    def begin(self) -> None:
        """Split s2 before a forward over all experts. Every split makes a gradient of all of s2, so one is enough."""
        if self.fused:
            self._check_fused()
        self._parts = self.delta.split(self.counts, self.dim)

    def end(self) -> None:
        """Drop the split after the forward over all experts."""
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
    """Experts that train outputs (gate, up)."""

    dim = 0


class S2RowExperts(S2Experts):
    """Experts that train inputs (down)."""

    dim = 1


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,  # [tokens, width]
    top_k_index: Tensor,  # [tokens, k] int64
    top_k_weights: Tensor,  # [tokens, k]
) -> Tensor:  # [tokens, width]
    """Run a module of experts: down(act(gate) * up) of each expert, weighted and summed in float32 or wider."""
    trained = [layer for layer in (self.gate_up_proj, self.down_proj) if isinstance(layer, S2Experts)]
    for layer in trained:
        layer.begin()
    try:
        return _run_experts(self, hidden_states, top_k_index, top_k_weights)
    finally:
        for layer in trained:
            layer.end()


def gate_of(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """Find how a module of experts computes act(gate) * up from the output of its `gate_up_proj`.

    Raises:
        ValueError: The class of the module does not define it.
    """
    apply_gate = getattr(experts, "_apply_gate", None)
    if apply_gate is not None:
        return apply_gate
    if type(experts).__name__ == "LigerExperts":  # Liger-Kernel's constructor refuses every other activation
        return _silu_gate
    raise ValueError(
        f"the experts' module must have _apply_gate, which combines gate and up, and {type(experts).__name__} has none"
        ": load the model without kernels that replace the class of its experts"
    )


def _silu_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _run_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    gated = gate_of(self)
    k, flat = top_k_index.shape[1], top_k_index.reshape(-1)
    order = flat.argsort(stable=True)  # the places of each expert follow each other
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    outputs: list[Tensor] = []
    for expert, places in enumerate(order.split(counts)):
        if places.numel() and expert < self.num_experts:  # higher numbers are experts of other devices
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
    """Experts that train nothing. They replace the parameter, so that a hook sees what each expert gets and returns."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, expert: int, tokens: Tensor) -> Tensor:
        """Run one expert: x [n, inputs] → [n, outputs]. `tokens` [n] are the numbers of its tokens in the batch."""
        return F.linear(x, self.weight[expert])


class ExpertsKind(Kind):
    """The weights of all experts of a layer in one parameter [experts, outputs, inputs]."""

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
