"""Stacked experts with S²FT adapters in PEFT.

The weights of all experts are parameters of one module, which PEFT names by `target_parameters`. The module is wrapped,
and its forward runs the experts on their weights plus the sum of the active deltas, as one grouped product.
"""

from typing import Any

import torch
from torch import Tensor, nn

from s2ft.layers import EXPERTS, Kind, forward_of
from s2ft.layers.experts import stack_of
from s2ft.model.delta import Delta
from s2ft.ops import effective_units, grouped_linear
from s2ft.ops._lock import LOCK, finish_interrupted
from s2ft.ops._memory import check_private
from s2ft.peft.layer import AdapterDelta, S2FTPeftLayer, check_same_dim, hooks_of, sum_of_adapters
from s2ft.peft.units import ModuleUnits


class _Effective(nn.Module):
    """Takes the place of a parameter for one forward: the experts' weights with a delta added to some units."""

    def __init__(self, weight: nn.Parameter, transposed: bool, delta: Delta, most: int) -> None:
        super().__init__()
        self.__dict__["weight"] = weight  # not as a parameter of this object
        self.transposed, self.delta, self.most = transposed, delta, most

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Run the experts: x [rows, inputs], those of expert 0 first, → [rows, outputs]."""
        stack, index = stack_of(self.weight, self.transposed), self.delta.index.to(x.device)
        values = self.delta.values.to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            return grouped_linear(x.to(stack.dtype), stack, values, index, offsets, self.delta.dim, self.most)


class S2FTPeftExperts(S2FTPeftLayer):
    """A module of experts with the deltas of all its adapters. PEFT creates it when an adapter is injected.

    It computes and merges as :class:`S2FTPeftLayer` does. An adapter has a delta for each parameter that it trains. The
    units of all experts are numbered through: unit u of expert e is e times the units of an expert, plus u.

    Args:
        base_layer: The module whose parameters are the weights of the experts.
        adapter_name: Name of the first adapter.
        units: The selected units of each parameter, by the parameter's name in the module.
        init_weights: True starts the deltas at zero, False at random.

    Attributes:
        base_layer: The module that this one wraps.
        s2ft_delta: By adapter, the :class:`AdapterDelta` of each parameter.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, units: dict[str, ModuleUnits], init_weights: bool
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(hooks_of(base_layer))
        self.base_layer = base_layer
        self.s2ft_delta = nn.ModuleDict()
        self.dims: dict[str, int] = {}
        self.transposed: dict[str, bool] = {}
        self._replaced_units: dict[str, tuple[Tensor, Tensor]] = {}  # index and base values by parameter, while merged
        self._most: dict[tuple[str, ...], int] = {}  # most units of one expert, by parameter and adapters
        self._addresses: dict[str, int] = {}  # of the memory that check_private has checked
        self._active_adapter, self.merged_adapters, self._disable_adapters = adapter_name, [], False
        self.update_experts(adapter_name, units, init_weights)

    @property
    def kind(self) -> Kind:
        return EXPERTS

    def check_dims(self, adapter_name: str, units: dict[str, ModuleUnits]) -> None:
        """Raise ValueError if an adapter trains the other dim of a parameter than the adapters of this layer."""
        for name, one in units.items():
            check_same_dim(adapter_name, one.dim, self.dims.get(name, one.dim))

    def update_experts(self, adapter_name: str, units: dict[str, ModuleUnits], init_weights: bool) -> None:
        """Add an adapter to this layer, see the class."""
        deltas = nn.ModuleDict()
        for name, one in units.items():
            weight = getattr(self.base_layer, name)
            self.dims[name], self.transposed[name] = one.dim, one.transposed
            shape = list(stack_of(weight, one.transposed).shape[1:])
            shape[one.dim] = one.index.numel()
            delta = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            deltas[name] = AdapterDelta(
                delta if init_weights else delta.normal_(std=0.1),
                one.index.to("cpu" if weight.is_meta else weight.device, copy=True),
            )
        self.s2ft_delta[adapter_name] = deltas
        self._most.clear()
        self.set_adapter(self.active_adapters)

    # ---- forward -------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Run the experts with the active adapters.

        Args:
            args: Arguments of the module: hidden states and routing, with one row for each token.
            adapter_names: For a mixed batch, the adapter of each sequence, or "__base__".
            kwargs: Keyword arguments of the module.

        Returns:
            What the module returns.
        """
        if adapter_names is not None:
            self._check_rows(args, adapter_names)
            adapter_names = self._row_names(args[0], adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer.forward(*args, **kwargs)
        if adapter_names is not None:
            here = [name for name in dict.fromkeys(adapter_names) if name in self.s2ft_delta]
            return self._row_by_row(args, adapter_names, here)
        names = [name for name in self.active_adapters if name in self.s2ft_delta]
        if self.merged or not names:
            return self.base_layer.forward(*args, **kwargs)
        return self._run(names, args, kwargs)

    def _run(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the module's experts with an object in the place of each parameter that has a delta."""
        module = self.base_layer
        other = object.__new__(type(module))  # the module itself does not change: another thread may run it
        other.__dict__.update(module.__dict__)
        effective = {name: self._effective_of(name, names) for name in self.dims if self._has(name, names)}
        parameters = module._parameters.items()
        other.__dict__["_parameters"] = {name: value for name, value in parameters if name not in effective}
        other.__dict__["_modules"] = {**module._modules, **effective}
        return forward_of(module)(other, *args, **kwargs)

    def _has(self, parameter: str, names: list[str]) -> bool:
        return any(parameter in self.s2ft_delta[name] for name in names)

    def _effective_of(self, parameter: str, names: list[str]) -> _Effective:
        weight, delta = getattr(self.base_layer, parameter), self.sum_of(parameter, names)
        if not torch.compiler.is_compiling() and self._addresses.get(parameter) != weight.data_ptr():
            check_private(parameter, weight)
            self._addresses[parameter] = weight.data_ptr()
        key = (parameter, *names)
        if key not in self._most:  # once, because the count waits for a GPU
            size = self._size(parameter)
            self._most[key] = int(torch.bincount(delta.index // size).max())
        return _Effective(weight, self.transposed[parameter], delta, self._most[key])

    def _size(self, parameter: str) -> int:
        """Number of units of one expert."""
        return stack_of(getattr(self.base_layer, parameter), self.transposed[parameter]).shape[1 + self.dims[parameter]]

    def sum_of(self, parameter: str, names: list[str]) -> Delta:
        """Add up the deltas of adapters on one parameter. Those without a delta there count as zero."""
        return sum_of_adapters(self.dims[parameter], self._parts(parameter, [(name, 1.0) for name in names]))

    def _parts(self, parameter: str, weights: list[tuple[str, float]]) -> list[tuple[AdapterDelta, float]]:
        deltas = ((self.s2ft_delta[name], weight) for name, weight in weights if name in self.s2ft_delta)
        return [(delta[parameter], weight) for delta, weight in deltas if parameter in delta]

    def _check_rows(self, args: tuple, names: list[str]) -> None:
        is_by_token = len(args) > 1 and all(isinstance(one, Tensor) and len(one) == len(args[0]) for one in args)
        if not is_by_token:
            raise ValueError(
                f"adapter_names: {type(self.base_layer).__name__} does not get one row for each token, so sequences "
                "with different adapters can't be in one batch: run one batch for each adapter"
            )

    def _row_by_row(self, args: tuple, adapter_names: list[str], here: list[str]) -> Tensor:
        names = [name if name in here else None for name in adapter_names]
        outputs, order = [], []
        for name in dict.fromkeys(names):
            rows = torch.tensor([i for i, one in enumerate(names) if one == name], device=args[0].device)
            part = tuple(one[rows] for one in args)
            outputs.append(self.base_layer.forward(*part) if name is None else self._run([name], part, {}))
            order.append(rows)
        return torch.cat(outputs)[torch.cat(order).argsort()]

    # ---- merge and unmerge ---------------------------------------------------------------------------

    def _places(self, parameter: str, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """View the weights as [experts, units, elements of a unit], and find the units of an index there."""
        dim, weight = self.dims[parameter], getattr(self.base_layer, parameter).detach()
        index = index.to(weight.device)
        size = self._size(parameter)
        return stack_of(weight, self.transposed[parameter]).transpose(1, 1 + dim), (index // size, index % size)

    @torch.no_grad()
    def _check_finite(self, names: list[str]) -> None:
        for some in (*([name] for name in names), names):
            for parameter in self.dims:
                if self._has(parameter, some) and not bool(torch.isfinite(self._sums(parameter, some)[2]).all()):
                    raise ValueError(
                        "NaNs detected in the merged weights. "  # PEFT's words
                        f"The adapter {', '.join(some)} seems to be broken"
                    )

    def _sums(self, parameter: str, names: list[str]) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The experts, the places of the adapters' units there, and base + sum at these places."""
        delta = self.sum_of(parameter, names)
        experts, places = self._places(parameter, delta.index)
        values = delta.values.detach().transpose(0, delta.dim).to(experts.device)
        return experts, places, effective_units(experts[places], values)

    @torch.no_grad()
    def write_sum(self, names: list[str]) -> None:
        for parameter in self.dims:
            if not self._has(parameter, names):
                continue
            with LOCK:
                finish_interrupted()
                experts, places, sums = self._sums(parameter, names)
                # kept before anything is written, so that restore_base works after an interrupt at any point
                self._replaced_units[parameter] = self.sum_of(parameter, names).index.clone(), experts[places]
                experts[places] = sums

    @torch.no_grad()
    def restore_base(self) -> None:
        for parameter, (index, base) in self._replaced_units.items():
            experts, places = self._places(parameter, index)
            with LOCK:
                finish_interrupted()
                experts[places] = base.to(experts)
        self._replaced_units = {}

    # ---- called by PEFT and by the tuner ---------------------------------------------------------------

    def deltas_of(self, adapter: str) -> dict[str, AdapterDelta]:
        return {f"{name}.": delta for name, delta in self.s2ft_delta[adapter].items()}

    def set_sum(self, adapter: str, parts: list[tuple[str, float]]) -> None:
        for parameter, delta in self.s2ft_delta[adapter].items():
            total = sum_of_adapters(self.dims[parameter], self._parts(parameter, parts))
            delta.values = nn.Parameter(total.values.detach().clone(), requires_grad=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Raise ValueError: an adapter has a delta for each of several parameters."""
        raise ValueError("stacked experts have several weights, so PEFT can't get the one of an adapter")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: dim={dim}" for name, dim in self.dims.items())
