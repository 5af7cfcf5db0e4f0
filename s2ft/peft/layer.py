"""Modules with S²FT adapters in PEFT: the deltas by adapter, their units, and the forward.

A layer has one weight. The weights of stacked experts are parameters of one module, which PEFT names by
`target_parameters`: its forward runs the experts on their weights plus the sum of the active deltas, as one grouped
product.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from s2ft.adapter.adapter import sum_deltas
from s2ft.config import refuse
from s2ft.layers import EXPERTS, Kind, S2Layer, forward_of, kind_of
from s2ft.layers.experts import stack_of
from s2ft.model.coupling import SIDES
from s2ft.model.weights import Delta
from s2ft.ops import effective_units, multi_adapter_linear, pack_adapters
from s2ft.ops._library import transforms_active

BASE = "__base__"  # PEFT's name for rows of a mixed batch without an adapter


class AdapterDelta(nn.Module):
    """The delta of one adapter on one module.

    It is a module so that its parameter is named s2ft_delta.NAME.values: TRL finds an adapter's parameters by ".NAME.".

    Attributes:
        values: Trainable values, shape [n, in_features] for dim 0 or [out_features, n] for dim 1. Those of a
            convolution have the kernel's dimensions behind.
        index: The outputs (dim 0) or inputs (dim 1) to which the values are added, [n] int64, ascending.
    """

    index: Tensor

    def __init__(self, shape: list[int], units: Any, weight: Tensor, dtype: torch.dtype, init_weights: bool) -> None:
        """Make the delta of some units of a weight of this shape, zero or random, on the weight's device."""
        super().__init__()
        dim, index = units.dim, units.index
        values = torch.zeros(shape[:dim] + [index.numel()] + shape[dim + 1 :], dtype=dtype, device=weight.device)
        self.values = nn.Parameter(values if init_weights else values.normal_(std=0.1))
        self.register_buffer("index", index.to("cpu" if weight.is_meta else weight.device, copy=True))

    def extra_repr(self) -> str:
        return f"units={self.index.numel()}, values={tuple(self.values.shape)}, dtype={self.values.dtype}"


class S2FTPeftLayer(nn.Module, BaseTunerLayer):
    """A base layer with the deltas of all its adapters. PEFT creates it when an adapter is injected.

    The forward multiplies once, by the weight plus the sum of the active deltas. This is bit for bit the weight that
    `merge` writes. `unmerge` copies the base back. The weight of a quantized base is not changed: the sum is multiplied
    separately and added to the output.

    Args:
        base_layer: The layer to wrap: a linear layer, Conv1D, a convolution or a quantized linear layer.
        adapter_name: Name of the first adapter.
        units: The selected :class:`.ModuleUnits` by weight; the weight of a layer has the name "".
        init_weights: True starts the delta at zero, False at random.

    Attributes:
        base_layer: The layer that this one wraps.
        s2ft_delta: The :class:`AdapterDelta` of each adapter, by name.
        dims: The dim of each weight.
        dim: 0 if the adapters train outputs, 1 if they train inputs.

    Example:
        >>> from peft import get_peft_model
        >>> from s2ft.peft import S2FTPeftConfig
        >>> peft_model = get_peft_model(model, S2FTPeftConfig(d_ratio=0.1))
        >>> layer = model.model.layers[0].mlp.down_proj
        >>> layer.s2ft_delta["default"].values.shape
        torch.Size([64, 13])
    """

    adapter_layer_names = ("s2ft_delta",)

    def __init__(self, base_layer: Any, adapter_name: str, units: dict[str, Any], init_weights: bool = True) -> None:
        super().__init__()
        # Hooks of the base layer run on this one instead, which calls only its forward.
        names = [key for key in vars(base_layer) if "_hook" in key and "state_dict" not in key and key != "_hf_hook"]
        self.__dict__.update({key: vars(base_layer)[key] for key in names})
        self.base_layer, self.s2ft_delta = base_layer, cast(Any, nn.ModuleDict())
        self.dims: dict[str, int] = {}  # by weight
        self.transposed: dict[str, bool] = {}  # whether a weight of stacked experts is [experts, inputs, outputs]
        self._replaced: dict[str, tuple[Tensor, Tensor]] = {}  # index and base values by weight, while merged
        self._running: dict[str, tuple[list, S2Layer]] = {}  # deltas and the layer that computes with them, by weight
        self._active_adapter, self.merged_adapters, self._disable_adapters = adapter_name, [], False
        self.update_layer(adapter_name, units, init_weights)

    def check_dims(self, adapter_name: str, units: dict[str, Any]) -> None:
        """Check that an adapter trains the same dim of each weight as the adapters of this layer.

        Args:
            adapter_name: Name of the adapter, for the message.
            units: Its units by weight.

        Raises:
            ValueError: It trains the other dim.
        """
        for name, one in units.items():
            is_other = one.dim != self.dims.get(name, one.dim)
            if is_other and any(name in self.deltas_of(other) for other in self.s2ft_delta):  # not of a deleted one
                raise ValueError(
                    f"adapter {adapter_name!r} trains {SIDES[one.dim]} of a module, and another adapter trains its "
                    f"{SIDES[self.dims[name]]}: give both the same dim"
                )

    def update_layer(self, adapter_name: str, units: dict[str, Any], init_weights: bool) -> None:
        """Add an adapter to this layer.

        Args:
            adapter_name: Name of the adapter.
            units: Its units by weight.
            init_weights: True starts the deltas at zero, False at random.
        """
        shape, dtype = list(self.kind.shape(self.base_layer)), self.kind.delta_dtype(self.base_layer)
        self.out_features, self.in_features = shape[:2]
        self.dim = self.dims[""] = units[""].dim
        self.s2ft_delta[adapter_name] = AdapterDelta(shape, units[""], self.base_layer.weight, dtype, init_weights)
        self.set_adapter(self.active_adapters)

    @property
    def kind(self) -> Kind:
        """The kind of the base layer."""
        return kind_of(self.base_layer)

    # ---- forward -------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Run the base layer with the active adapters.

        Args:
            args: Arguments of the base layer: the input [rows, ..., in_features] first.
            adapter_names: For a mixed batch, the adapter of each row, or "__base__". If x has k times as many rows as
                there are names (OPT's FFN joins all tokens), each name applies to k rows that follow each other.
            kwargs: Further arguments of the base layer.

        Returns:
            What the base layer returns: [rows, ..., out_features].
        """
        if adapter_names is not None:
            adapter_names = self._row_names(args, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._run_base(*args, **kwargs)
        if adapter_names is not None:
            here = [name for name in dict.fromkeys(adapter_names) if name in self.s2ft_delta]
            return self._mixed(args, adapter_names, here)
        names = [name for name in self.active_adapters if name in self.s2ft_delta]
        return self._run_base(*args, **kwargs) if self.merged or not names else self._run(names, args, kwargs)

    def _run_base(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer on its weight without the deltas that are not merged."""
        self.put_base_back()
        return self.base_layer.forward(*args, **kwargs)

    def sum_of(self, weight: str, names: Sequence[str], factors: Sequence[float] | None = None) -> Delta:
        """Add up the deltas of adapters on one weight. Those without a delta there count as zero.

        Args:
            weight: Name of the weight.
            names: Names of adapters.
            factors: A factor for each; default: 1.

        Returns:
            The sum, on the units of any of them. Gradients flow to each delta.
        """
        found = (
            (self.deltas_of(name).get(weight), factor) for name, factor in zip(names, factors or [1.0] * len(names))
        )
        deltas = [(Delta(self.dims[weight], one.index, one.values), factor) for one, factor in found if one is not None]
        return deltas[0][0] if len(deltas) == 1 and deltas[0][1] == 1 else sum_deltas(deltas)

    def trained_by(self, names: Sequence[str]) -> list[str]:
        """Return the weights on which some of the layer's adapters have a delta.

        Args:
            names: Names of adapters.

        Returns:
            The names of the weights.
        """
        return [weight for weight in self.dims if any(weight in self.deltas_of(name) for name in names)]

    def _run(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the base layer on its weight plus the deltas of adapters."""
        hook = getattr(self.base_layer, "_hf_hook", None)
        in_place = hook is None and not self.kind.read_only and not torch.compiler.is_compiling()
        # A view is memory of FSDP version 1, which gathers it again for the backward.
        if in_place and not self.base_layer.weight._is_view():
            return self._trainable("", names).forward(*args, **kwargs)
        self.put_base_back()  # a forward before, that was not compiled, has left base + delta
        delta, run = self.sum_of("", names), self.kind.run_with_delta
        if hook is None or self.kind.read_only:
            return run(self.base_layer, args[0], delta.values, delta.index, self.dim, *args[1:], **kwargs)
        (x, *rest), kwargs = hook.pre_forward(self.base_layer, *args, **kwargs)  # it loads weights that are offloaded
        values, index = delta.values.to(x.device), delta.index.to(x.device)
        return hook.post_forward(self.base_layer, run(self.base_layer, x, values, index, self.dim, *rest, **kwargs))

    # ---- base + delta in the weight, from the forward to the step of the optimizer -----------------------

    def _trainable(self, weight: str, names: Sequence[str]) -> S2Layer:
        """The layer that computes with the deltas of adapters on one weight.

        PEFT and its users expect the base in the weight. So the base is back after the step of the optimizer, and
        whenever the weight is merged, saved, copied, or asked for.
        """
        is_grad_enabled = torch.is_grad_enabled()  # tensors of inference mode have no versions and no gradients
        with torch.inference_mode(False), torch.set_grad_enabled(is_grad_enabled):
            return self._layer_of(weight, names)

    def _layer_of(self, weight: str, names: Sequence[str]) -> S2Layer:
        delta = self.sum_of(weight, names)
        key = [self.deltas_of(name).get(weight) for name in names]
        known, layer = cast("tuple[Any, Any]", self._running.get(weight, (None, None)))
        if known != key:
            self.put_base_back()
            layer = self._new_layer(weight, delta.index.clone())
            layer.after_step = layer.unfuse  # type: ignore[method-assign, assignment]
            layer.effective_weight = partial(self._effective, layer.effective_weight)  # type: ignore[method-assign]
            self._running[weight] = key, layer
        layer._parameters.update(self._parameters_of(weight), s2=delta.values)
        if torch.is_grad_enabled():  # as the hook of a model does: code may write into `data`
            layer.write_before_next_forward()
        return layer.train(self.training)

    def _effective(self, effective_weight: Callable, s2: Tensor, weight: Tensor) -> Tensor:
        """The effective weight for a backward, before which another adapter may have been written into the weight."""
        if not transforms_active():  # torch.func runs on copies
            self.put_base_back()
        return effective_weight(s2, weight)

    def _new_layer(self, weight: str, index: Tensor) -> S2Layer:
        return cast(Any, self.kind.layers)[self.dim].from_module(self.base_layer, index=index)

    def _parameters_of(self, weight: str) -> dict[str, nn.Parameter | None]:
        return self.base_layer._parameters

    def put_base_back(self) -> None:
        """Make the weights hold the base. A compiled graph asks at each call whether they do, and breaks if not.

        Raises:
            RuntimeError: The model is exported, and the weights hold base + delta.
        """
        if any(layer.fused for _, layer in self._running.values()):
            if torch.compiler.is_exporting():
                raise RuntimeError("the weights hold base + delta since a forward: call state_dict() before export")
            self._unfuse()

    @torch.compiler.disable(reason="the weights hold base + delta since a forward: call state_dict() before")
    def _unfuse(self) -> None:
        for _, layer in self._running.values():
            layer.unfuse()

    def get_base_layer(self) -> nn.Module:
        """The base layer, with the base in its weights."""
        self.put_base_back()
        return super().get_base_layer()

    def _apply(self, fn, recurse=True):
        self.put_base_back()
        self._running = {}  # whose numbers of units are on the old device
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        self.put_base_back()  # the base layer is saved after this module
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.put_base_back()  # the base layer and the units are loaded after this module
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.put_base_back()
        return {**self.__dict__, "_running": {}}

    # ---- mixed batches -------------------------------------------------------------------------------

    def _row_names(self, args: tuple, names: list[str]) -> list[str]:
        """The adapter's name of each row. Errors have PEFT's wording, which users search for."""
        x = args[0]
        refuse(
            (
                not names or len(x) % len(names),
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)}",
            ),
            (
                self.merged,
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.",
            ),
        )
        return [name for name in names for _ in range(len(x) // len(names))]

    def _mixed(self, args: tuple, adapter_names: list[str], here: list[str]) -> Any:
        """Run a mixed batch: one product by the base for all rows plus the adapters' parts. With gradients, and for
        convolutions, the rows of each adapter run separately."""
        if not here:
            return self._run_base(args[0])
        needs_grad = torch.is_grad_enabled() and any(self.s2ft_delta[name].values.requires_grad for name in here)
        if needs_grad or not self.kind.is_linear:
            return self._row_by_row(args[:1], adapter_names, here)
        y = self._run_base(args[0])
        deltas = [self.s2ft_delta[name] for name in here]
        packed = pack_adapters([(delta.index, delta.values.detach().to(y.dtype)) for delta in deltas], self.dim)
        which = torch.tensor([here.index(name) if name in here else -1 for name in adapter_names], device=y.device)
        return multi_adapter_linear(args[0].to(y.dtype), y, *packed, which, self.dim)

    def _row_by_row(self, args: tuple, adapter_names: list[str], here: list[str]) -> Any:
        names = [name if name in here else BASE for name in adapter_names]
        parts, order = [], []
        for name in dict.fromkeys(names):
            rows = torch.tensor([i for i, one in enumerate(names) if one == name], device=args[0].device)
            part = tuple(one[rows] for one in args)
            parts.append(self._run_base(*part) if name == BASE else self._run([name], part, {}))
            order.append(rows)
        back = torch.cat(order).argsort()
        if isinstance(parts[0], tuple):  # a router returns several tensors
            return tuple(torch.cat(each)[back] for each in zip(*parts))
        return torch.cat(parts)[back]

    # ---- merge and unmerge ---------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the sum of adapters into the weight, together with those that are merged already.

        Args:
            safe_merge: Check first that the result is finite.
            adapter_names: The adapters; default: the active ones.

        Raises:
            ValueError: The base is quantized, or `safe_merge` is set and the result is not finite. The weight has not
                changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.s2ft_delta]
        if not names:
            return
        if self.kind.read_only:
            raise ValueError(self.kind.read_only)
        merged = self.merged_adapters + names
        self.restore_base()
        try:
            if safe_merge:
                self._check_finite(merged)
            self.merged_adapters = merged
        finally:
            self.write_sum(self.merged_adapters)

    def _check_finite(self, names: list[str]) -> None:
        self.put_base_back()
        for some in (*([name] for name in names), names):  # separately, so that the message names the adapter
            for weight in self.trained_by(some):
                if not bool(torch.isfinite(self._sums(weight, some)[1]).all()):
                    raise ValueError(
                        "NaNs detected in the merged weights. "  # PEFT's words
                        f"The adapter {', '.join(some)} seems to be broken"
                    )

    def _places(self, weight: str, index: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """View a weight with its units in front, and find the units of an index there."""
        matrix = self.kind.matrix(self.base_layer)
        return matrix.transpose(0, self.dim), (index.to(matrix.device),)

    @torch.no_grad()
    def _sums(self, weight: str, names: list[str]) -> tuple[Tensor, Tensor]:
        """The index of the units of adapters in a weight, and base + sum there, which are rounded once."""
        delta = self.sum_of(weight, names)
        view, places = self._places(weight, delta.index)
        values = delta.values.detach().transpose(0, delta.dim).to(view.device)
        return delta.index, effective_units(view[places], values)

    def unmerge(self) -> None:
        """Copy the base back into the weight, bit for bit."""
        if not self.merged:
            warnings.warn("nothing is merged, so there is nothing to unmerge", stacklevel=2)
            return
        self.restore_base()
        self.merged_adapters = []

    @torch.no_grad()
    def write_sum(self, names: list[str]) -> None:
        """Add the sum of adapters to the weights, which must hold the base, and keep the base's values.

        Args:
            names: Names of adapters that this layer has.
        """
        self.put_base_back()
        for weight in self.trained_by(names):
            index, sums = self._sums(weight, names)
            view, places = self._places(weight, index)
            # kept before anything is written, so that restore_base works after an interrupt at any point
            self._replaced[weight] = index.clone(), view[places]
            view[places] = sums

    @torch.no_grad()
    def restore_base(self) -> None:
        """Copy the base back into the weights without changing `merged_adapters`."""
        self.put_base_back()
        for weight, (index, base) in self._replaced.items():
            view, places = self._places(weight, index)
            view[places] = base.to(view)
        self._replaced = {}

    # ---- called by the tuner and by PEFT -------------------------------------------------------------

    def deltas_of(self, adapter: str) -> dict[str, AdapterDelta]:
        """Return the deltas of an adapter by weight; the weight of a layer has the name "".

        Args:
            adapter: Name of the adapter.

        Returns:
            The deltas; none if the adapter does not train this module.
        """
        return {"": self.s2ft_delta[adapter]} if adapter in self.s2ft_delta else {}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return an adapter's delta as a dense tensor.

        Args:
            adapter: Name of the adapter.

        Returns:
            The delta, with the shape of the base layer's weight.
        """
        delta = self.s2ft_delta[adapter]
        dense = torch.zeros(self.base_layer.weight.shape, dtype=delta.values.dtype, device=delta.values.device)
        self.kind.view(dense).transpose(0, self.dim)[delta.index] = delta.values.detach().transpose(0, self.dim)
        return dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can convert an adapter to a LoRA.

        Args:
            adapter_name: Name of the adapter.

        Returns:
            True if the base layer is linear and not quantized.
        """
        return self.kind.is_linear and not self.kind.read_only

    def extra_repr(self) -> str:
        return ", ".join(f"{name or 'weight'}: dim={dim}" for name, dim in self.dims.items())


# ---- stacked experts ----------------------------------------------------------------------------------


class S2FTPeftExperts(S2FTPeftLayer):
    """A module of experts with the deltas of all its adapters. PEFT creates it when an adapter is injected.

    It computes and merges as :class:`S2FTPeftLayer` does. An adapter has a delta for each parameter that it trains. The
    units of all experts are numbered through: unit u of expert e is e times the units of an expert, plus u.

    Args:
        base_layer: The module whose parameters are the weights of the experts.
        adapter_name: Name of the first adapter.
        units: The selected units by the parameter's name in the module.
        init_weights: True starts the deltas at zero, False at random.

    Attributes:
        base_layer: The module that this one wraps.
        s2ft_delta: By adapter, the :class:`AdapterDelta` of each parameter.
    """

    @property
    def kind(self) -> Kind:
        return EXPERTS

    def update_layer(self, adapter_name: str, units: dict[str, Any], init_weights: bool) -> None:
        deltas = nn.ModuleDict()
        for name, one in units.items():
            weight = getattr(self.base_layer, name)
            self.dims[name], self.transposed[name] = one.dim, one.transposed
            shape = list(stack_of(weight, one.transposed).shape[1:])
            deltas[name] = AdapterDelta(shape, one, weight, weight.dtype, init_weights)
        self.s2ft_delta[adapter_name] = deltas
        self.set_adapter(self.active_adapters)

    # ---- forward -------------------------------------------------------------------------------------

    def _run(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the module's experts with an object in the place of each parameter that has a delta."""
        module = self.base_layer
        other = object.__new__(type(module))  # the module itself does not change: another thread may run it
        other.__dict__.update(module.__dict__)
        parameters, compiles = module._parameters.items(), torch.compiler.is_compiling()
        effective = {
            name: self._effective_weight(name, names) if compiles else self._trainable(name, names)
            for name in self.trained_by(names)
        }
        other.__dict__["_parameters"] = {name: value for name, value in parameters if name not in effective}
        other.__dict__["_modules"] = {**module._modules, **effective}
        return forward_of(module)(other, *args, **kwargs)

    def _effective_weight(self, weight: str, names: Sequence[str]) -> Tensor:
        """A copy of the experts' weights with the deltas added. A compiled graph can't write them."""
        self.put_base_back()
        delta = self.sum_of(weight, names)
        view, places = self._places(weight, delta.index)
        sums = effective_units(view[places], delta.values.transpose(0, delta.dim))
        return stack_of(view.index_put(places, sums).transpose(1, 1 + delta.dim), self.transposed[weight])

    def _new_layer(self, weight: str, index: Tensor) -> S2Layer:
        size, transposed = self._size(weight), self.transposed[weight]
        experts = {e: index[index // size == e] % size for e in (index // size).unique().tolist()}
        return EXPERTS.layers[self.dims[weight]](getattr(self.base_layer, weight), experts, transposed=transposed)

    def _parameters_of(self, weight: str) -> dict[str, nn.Parameter | None]:
        return {"weight": getattr(self.base_layer, weight)}

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
        return dict(self.s2ft_delta[adapter].items()) if adapter in self.s2ft_delta else {}

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Raise ValueError: an adapter has a delta for each of several parameters."""
        raise ValueError("stacked experts have several weights, so PEFT can't get the one of an adapter")
