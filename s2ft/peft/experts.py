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
from s2ft.ops import grouped_linear
from s2ft.ops._memory import check_private
from s2ft.peft.layer import AdapterDelta, S2FTPeftLayer
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
        self._set_up(base_layer, adapter_name)
        self.transposed: dict[str, bool] = {}
        self._most: dict[tuple[str, ...], int] = {}  # most units of one expert, by parameter and adapters
        self._addresses: dict[str, int] = {}  # of the memory that check_private has checked
        self.update_experts(adapter_name, units, init_weights)

    @property
    def kind(self) -> Kind:
        return EXPERTS

    def update_experts(self, adapter_name: str, units: dict[str, ModuleUnits], init_weights: bool) -> None:
        """Add an adapter to this layer, see the class."""
        deltas = nn.ModuleDict()
        for name, one in units.items():
            weight = getattr(self.base_layer, name)
            self.dims[name], self.transposed[name] = one.dim, one.transposed
            shape = list(stack_of(weight, one.transposed).shape[1:])
            deltas[name] = AdapterDelta.new(shape, one.dim, one.index, weight, weight.dtype, init_weights)
        self.s2ft_delta[adapter_name] = deltas
        self._most.clear()
        self.set_adapter(self.active_adapters)

    # ---- forward -------------------------------------------------------------------------------------

    def _run(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the module's experts with an object in the place of each parameter that has a delta."""
        module = self.base_layer
        other = object.__new__(type(module))  # the module itself does not change: another thread may run it
        other.__dict__.update(module.__dict__)
        effective = {name: self._effective_of(name, names) for name in self.trained_by(names)}
        parameters = module._parameters.items()
        other.__dict__["_parameters"] = {name: value for name, value in parameters if name not in effective}
        other.__dict__["_modules"] = {**module._modules, **effective}
        return forward_of(module)(other, *args, **kwargs)

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

    def _row_names(self, args: tuple, names: list[str]) -> list[str]:
        is_by_token = len(args) > 1 and all(isinstance(one, Tensor) and len(one) == len(args[0]) for one in args)
        if not is_by_token:
            raise ValueError(
                f"adapter_names: {type(self.base_layer).__name__} does not get one row for each token, so sequences "
                "with different adapters can't be in one batch: run one batch for each adapter"
            )
        return super()._row_names(args, names)

    def _mixed(self, args: tuple, adapter_names: list[str], here: list[str]) -> Any:
        return self._row_by_row(args, adapter_names, here)

    # ---- merge, and what PEFT and the tuner call ---------------------------------------------------------

    def _places(self, weight: str, index: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """View the weights as [experts, units, elements of a unit], and find the units of an index there."""
        stack = stack_of(getattr(self.base_layer, weight).detach(), self.transposed[weight])
        index, size = index.to(stack.device), self._size(weight)
        return stack.transpose(1, 1 + self.dims[weight]), (index // size, index % size)

    def deltas_of(self, adapter: str) -> dict[str, AdapterDelta]:
        return dict(self.s2ft_delta[adapter].items())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Raise ValueError: an adapter has a delta for each of several parameters."""
        raise ValueError("stacked experts have several weights, so PEFT can't get the one of an adapter")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: dim={dim}" for name, dim in self.dims.items())
