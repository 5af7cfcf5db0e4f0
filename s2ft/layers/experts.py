"""Experts whose weights are one parameter for all of them, and layers that train a few units of each.

transformers stores the experts of a mixture in this way: `gate_up_proj` and `down_proj` of one module, each [experts,
outputs, inputs], in some families [experts, inputs, outputs]. A trainable layer replaces the parameter, and a function
of this file becomes the forward of the module. Tokens are sorted by expert, and each weight is one grouped product, as
in transformers' own `grouped_mm`. The host never waits for the routing.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2ft.distributed import Shard, full_shape
from s2ft.layers.base import S2Layer, beside
from s2ft.layers.linear import Kind, is_intercepted, product
from s2ft.ops import Slice, act_mul
from s2ft.ops._grouped import columns_to_keep, delta_gradient, grouped_mm
from s2ft.ops._library import below_autograd, without_autocast
from s2ft.ops.act_mul import ACTIVATIONS


class S2Experts(S2Layer):
    """What S2ColumnExperts and S2RowExperts share. Each expert has its own units: any number of them, or none.

    `weight` is [experts, outputs, inputs], or [experts, inputs, outputs] if `transposed`. `s2` contains the slices of
    the experts one after the other along `dim`: [n, inputs] or [outputs, n]. `index` [n] has the units in the same
    order, `counts` the number of units of each expert.
    """

    index: Tensor
    first: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        index: dict[int, Tensor],
        delta_dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        """Make a trainable layer that uses a parameter without copying it.

        Args:
            weight: The weights of all experts. They are frozen.
            index: The selected units [n] int64 by expert, each unit once.
            delta_dtype: dtype of `s2`; default: that of the weight.
            transposed: Whether the weights are [experts, inputs, outputs].
        """
        super().__init__()
        self.weight, self.transposed = weight.requires_grad_(False), transposed
        self.register_parameter("bias", None)
        experts, *shape = full_shape(weight)
        if transposed:
            shape = shape[::-1]
        self.counts = [index[e].numel() if e in index else 0 for e in range(experts)]
        first = [torch.full_like(index[e], e * shape[self.dim]) for e in sorted(index)]
        joined = torch.cat([index[e] for e in sorted(index)])
        self.register_buffer("index", beside(joined, weight))
        # What the op adds to the number of a unit, because it counts through all experts.
        self.register_buffer("first", beside(torch.cat(first), weight), persistent=False)
        shape[self.dim] = joined.numel()
        self._make_s2(shape, delta_dtype or weight.dtype)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Run the experts on their effective weights.

        Args:
            x: Inputs of all experts [rows, inputs], those of expert 0 first.
            offsets: Row where each expert's inputs end, [experts] int32. Rows after the last are undefined.

        Returns:
            The outputs [rows, outputs].
        """
        if not self.enabled:
            return project(self.weight, x, offsets, self.transposed)
        with without_autocast(x):
            return product(self, x.to(self.weight.dtype), offsets)

    def _units(self, weight: Tensor) -> Tensor:
        experts, places = self._by_expert(weight)
        return experts[places].transpose(0, self.dim).contiguous()

    def _by_expert(self, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """View a tensor of the weight's shape as [experts, units, elements of a unit], and find the units there."""
        stack = stack_of(weight.detach(), self.transposed)
        return stack.transpose(1, 1 + self.dim), (self.first // stack.shape[1 + self.dim], self.index)

    def write_units_of(self, weight: Tensor, values: Tensor) -> None:
        experts, places = self._by_expert(weight)
        experts[places] = values.transpose(0, self.dim)

    def _with_units(self, weight: Tensor, values: Tensor) -> Tensor:
        experts, places = self._by_expert(weight)
        experts = experts.index_put(places, values.transpose(0, self.dim)).transpose(1, 1 + self.dim)
        return stack_of(experts, self.transposed)

    def _slices(self, weight: Tensor, s2: Tensor) -> list[Slice]:
        pieces = zip(self._pieces(s2), self._pieces(cast(Tensor, self.base)))
        return [
            Slice(self.kind.view(weight, expert), base, values, units, self.dim)
            for (expert, units, values), (*_, base) in pieces
        ]

    def _pieces(self, values: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        units, parts = self.index.split(self.counts), values.split(self.counts, self.dim)
        yield from ((expert, *pair) for expert, pair in enumerate(zip(units, parts)) if self.counts[expert])

    def extra_repr(self) -> str:
        return f"experts={len(self.counts)}, weight={tuple(full_shape(self.weight)[1:])}, {super().extra_repr()}"


class S2ColumnExperts(S2Experts):
    """Experts that train outputs (gate, up)."""

    dim = 0


class S2RowExperts(S2Experts):
    """Experts that train inputs (down)."""

    dim = 1


class ObservedExperts(nn.Module):
    """Experts that train nothing. They replace the parameter, so that a hook sees what each expert gets and returns."""

    def __init__(self, weight: nn.Parameter, transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def forward(self, x: Tensor, offsets: Tensor, tokens: Tensor | None) -> Tensor:
        """Run the experts, see :meth:`S2Experts.forward`. `tokens` [rows] are the numbers of the rows' tokens."""
        return project(self.weight, x, offsets, self.transposed)


def stack_of(weight: Tensor, transposed: bool) -> Tensor:
    """View the weights of all experts as [experts, outputs, inputs]."""
    return weight.transpose(1, 2) if transposed else weight


def project(
    weights: Tensor | nn.Module, x: Tensor, offsets: Tensor, transposed: bool = False, tokens: Tensor | None = None
) -> Tensor:
    """Run the experts of a parameter or a layer: x [rows, inputs] → [rows, outputs].

    Args:
        weights: The parameter, or the layer that replaces it.
        x: Inputs of all experts, those of expert 0 first.
        offsets: Row where each expert's inputs end, [experts] int32.
        transposed: Whether the parameter is [experts, inputs, outputs].
        tokens: Numbers of the rows' tokens, [rows], for a layer that is observed; None if they are not known.
    """
    if isinstance(weights, ObservedExperts):
        return weights(x, offsets, tokens)
    if isinstance(weights, nn.Module):
        return weights(x, offsets)
    with without_autocast(x):
        return grouped_mm(x.to(weights.dtype), stack_of(weights, transposed).transpose(1, 2), offsets)


# ---- forwards of the modules around --------------------------------------------------------------------------


def forward_of(experts: nn.Module) -> Callable[..., Tensor]:
    """Find the function that runs a module of experts whose parameters may be trainable layers.

    Returns:
        A function of the module and the arguments of its forward.

    Raises:
        ValueError: The class of the module does not define how its experts compute, or has another forward than the
            one that is known: a derived class may add something, or someone has put a function in the class.
    """
    found = _FORWARDS.get(type(experts).__name__)  # these compute without _apply_gate and act_fn
    where = ("transformers.integrations.moe", "liger_kernel.") if found is None else ("transformers.models.",)
    if found is None:
        activation_of(experts)
    module = getattr(type(experts).forward, "__globals__", {}).get("__name__", "an unknown module")
    if not module.startswith(where):
        raise ValueError(
            f"the forward of {type(experts).__name__} is a function of {module}, which can't run trainable experts: "
            "put that of transformers' use_experts_implementation in the class, or train other layers by couplings="
        )
    return found or experts_forward


def activation_of(experts: Any) -> Callable[[Tensor], Tensor]:
    """Find what a module of experts computes between its two products: mostly act(gate) * up.

    Raises:
        ValueError: The class of the module does not define it.
    """
    if not getattr(experts, "has_gate", True) and hasattr(experts, "act_fn"):
        return experts.act_fn
    apply_gate = getattr(experts, "_apply_gate", None)
    if apply_gate is not None:
        return apply_gate
    if type(experts).__name__ == "LigerExperts":  # Liger-Kernel's constructor refuses every other activation
        return partial(_act_mul, "silu")
    raise ValueError(
        f"the experts' module must have _apply_gate, which combines gate and up, and {type(experts).__name__} has none"
        ": load the model without kernels that replace the class of its experts"
    )


def act_mul_of(experts: nn.Module) -> str | None:
    """Find the activation with which :func:`s2ft.ops.act_mul` computes what is between a module's two products.

    Returns:
        The activation; None if the class computes anything else there.
    """
    from transformers.activations import ACT2FN  # not at the top, where it would load transformers with every import
    from transformers.integrations import moe

    if type(experts).__name__ == "LigerExperts":
        return "silu"
    default = getattr(moe, "_default_apply_gate", None)
    if (
        default is None
        or getattr(getattr(experts, "_apply_gate", None), "__func__", None) is not default
        or not getattr(experts, "has_gate", True)
    ):
        return None
    kinds = {type(ACT2FN[name]): act for act, row in ACTIVATIONS.items() for name in row.hidden_acts}
    return kinds.get(type(experts.act_fn))


def _act_mul(activation: str, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return act_mul(gate, up, activation)  # which reads both where they are


def experts_forward(
    self: Any,
    hidden_states: Tensor,  # [tokens, width]
    top_k_index: Tensor,  # [tokens, k] int64
    top_k_weights: Tensor,  # [tokens, k]
    activation: str | None = None,
    act_class: type | None = None,
) -> Tensor:  # [tokens, width]
    """Run a module of experts, down(act(gate) * up) of each, and sum their weighted outputs of every token.

    The steps and their rounding are those of transformers' `grouped_mm`. With an `activation`, act_mul computes
    act(gate) * up, while the module's `act_fn` is of `act_class` and has no hooks. For the backward it keeps gate and
    up, and not act(gate).
    """
    act_fn = getattr(self, "act_fn", None)
    changed = type(act_fn) is not act_class or isinstance(act_fn, nn.Module) and is_intercepted(act_fn)
    act = activation_of(self) if activation is None or changed else partial(_act_mul, activation)
    k = top_k_index.shape[-1]
    experts, order = top_k_index.reshape(-1).sort()
    tokens = order // k
    x = hidden_states[tokens]
    first = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
    count = EXPERTS.weight(getattr(self, first)).shape[0]
    numbers = torch.arange(count, device=experts.device)  # nothing waits for a GPU
    offsets = torch.searchsorted(experts, numbers, right=True, out_int32=True)  # the row where each expert ends
    # Experts of other devices have the numbers after those of this device, and their rows are zero here. transformers
    # says whether there are any; a class without its flag may have them.
    others = (experts >= count)[:, None] if getattr(self, "_is_expert_parallel", True) else None

    def keep(rows: Tensor) -> Tensor:
        return rows if others is None else rows.masked_fill(others, 0.0)

    rows = (offsets, experts if others is None else experts.clamp(max=count - 1), tokens)
    inner = keep(_project(self, first, keep(x), *rows))
    outer = keep(_project(self, "down_proj", act(inner), *rows))
    if getattr(self, "has_post_expert_norm", False):
        outer = self.post_expert_norm(outer)
    weighted = outer * top_k_weights.reshape(-1)[order, None]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return weighted[places].view(-1, k, outer.shape[1]).sum(1).to(hidden_states.dtype)


def _project(self: nn.Module, name: str, x: Tensor, offsets: Tensor, experts: Tensor, tokens: Tensor) -> Tensor:
    y = project(getattr(self, name), x, offsets, getattr(self, "is_transposed", False), tokens)
    return y + getattr(self, f"{name}_bias")[experts] if getattr(self, "has_bias", False) else y


def _batched_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4: every expert gets every token, already weighted. hidden_states is [experts * tokens, width]."""
    count = EXPERTS.weight(self.gate_up_proj).shape[0]
    each = hidden_states.shape[0] // count
    offsets = torch.arange(1, count + 1, dtype=torch.int32, device=hidden_states.device) * each
    tokens = torch.arange(hidden_states.shape[0], device=hidden_states.device) % each
    gate, up = project(self.gate_up_proj, hidden_states, offsets, True, tokens).chunk(2, dim=-1)
    return project(self.down_proj, up * self.act_fn(gate), offsets, True, tokens)


def _sorted_forward(self: Any, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """JetMoE: one product of all experts. `inputs` [rows, width] are sorted, with expert_size rows for each."""
    return project(self.weight, inputs, torch.tensor(expert_size, device=inputs.device).cumsum(0, dtype=torch.int32))


_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "Llama4TextExperts": _batched_forward,
    "JetMoeParallelExperts": _sorted_forward,
}


# ---- the kind --------------------------------------------------------------------------------------------


class ExpertsKind(Kind):
    """The weights of all experts of a layer in one parameter."""

    layers = (S2ColumnExperts, S2RowExperts)

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed
        self.name = f"parameters [experts, {'inputs, outputs' if transposed else 'outputs, inputs'}]"

    def matches(self, found: Any) -> bool:
        return isinstance(found, Tensor)

    def weight(self, holder: Any) -> Tensor:
        return holder if isinstance(holder, Tensor) else holder.weight

    def view(self, tensor: Tensor, expert: int | None = None) -> Tensor:
        return tensor[expert].t() if self.transposed else tensor[expert]

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Tensor) -> Tensor:
        return below_autograd(grouped_mm, x, stack_of(weight, self.transposed).transpose(1, 2), call)

    def keep(self, layer: Any, x: Tensor, call: Tensor) -> Tensor:
        if layer.dim == 0:
            return x
        stack = stack_of(layer.weight, self.transposed)
        return columns_to_keep(x, stack, layer.index + layer.first, max(layer.counts), call)

    def grad_of_x(self, grad: Tensor, weight: Tensor, shape: torch.Size, call: Tensor) -> Tensor:
        return below_autograd(grouped_mm, grad, stack_of(weight, self.transposed), call)

    def grad_of_s2(self, layer: Any, grad: Tensor, kept: Tensor, s2: Tensor, call: Tensor, plain: bool) -> Tensor:
        stack, index = stack_of(layer.weight, self.transposed), layer.index + layer.first
        sizes = stack.shape[0], stack.shape[1 + layer.dim]
        return delta_gradient(grad, kept, s2, index, max(layer.counts), call, layer.dim, *sizes)

    def shard(self, shard: Shard, expert: int | None = None) -> Shard:
        weights, start = shard.tensor, cast("Sequence[Any]", shard.start)  # of a weight that is spread
        number = cast(int, expert) - start[0]
        matrix = weights[number] if 0 <= number < weights.shape[0] else weights.new_empty(0, *weights.shape[2:])
        start = start[1:]
        return Shard(matrix.t(), start[::-1]) if self.transposed else Shard(matrix, start)


EXPERTS, TRANSPOSED_EXPERTS = S2Experts.kinds = ExpertsKind(), ExpertsKind(transposed=True)
