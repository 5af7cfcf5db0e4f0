"""What a model trains: slices of its weights, and weights in full. For attached models and for adapters of PEFT."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.adapter.adapter import sum_deltas
from s2ft.attached.active import extra_parameters, keep_base_of_unfrozen, mounted_deltas
from s2ft.attached.record import Mount, Record, find_record, record_of, unwrapped
from s2ft.config import refuse
from s2ft.distributed import full_shape, full_tensors, full_values, reshard_all
from s2ft.model.weights import Delta, weight_at
from s2ft.ops import effective_units


@dataclass(frozen=True)
class TrainedWeight:
    """A trained slice of one weight of a model, or a weight that is trained in full.

    Attributes:
        weight: Name of the weight in the model without trainable layers.
        shape: Shape of the weight as it is stored.
        base: Its numbers before the training: outputs × inputs (× taps), or those of the whole weight.
        dim: 0 for a slice of outputs, 1 for one of inputs; None for a weight in full.
        index: Positions of the slice's units, ascending, int64 [n].
        expert: Number of the expert, for a weight of several experts.
        transposed: Whether the weight is stored with inputs before outputs.
    """

    weight: str
    shape: torch.Size
    base: Tensor
    dim: int | None = None
    index: Tensor | None = None
    expert: int | None = None
    transposed: bool = False


def source_of(model: nn.Module) -> "AttachedSource | PeftSource":
    """Find what a model trains.

    Args:
        model: An attached model, or a PeftModel with an adapter of s2ft. Wrappers of torch.compile and of DDP are
            looked into.

    Raises:
        ValueError: It has no trainable adapter of s2ft, or trains something that can't be sent.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    model = unwrapped(model)
    if find_record(model) is None and hasattr(model, "get_base_model"):
        return PeftSource(model)
    return AttachedSource(model)


class AttachedSource:
    """The trainable adapter of an attached model.

    Attributes:
        model: The model.
        trained: What it trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._record = model, record_of(model)
        self._check_active()
        slices = {id(mount.layer.s2) for mount in self._record.mounts.values()}
        _check_accounted(model, slices | {id(one) for one in extra_parameters(model, self._record).values()})
        reshard_all(model)
        keep_base_of_unfrozen(model, self._record)
        self._extra, self._selection = list(extra_parameters(model, self._record)), self._record.selection
        bases = self._record.extra.base
        self.trained = [
            *(one for mount in self._record.mounts.values() for one in _parts(model, self._record, mount)),
            *(TrainedWeight(name, bases[name].shape, bases[name]) for name in self._extra),
        ]

    def values(self) -> Iterator[Tensor]:
        """Yield the merged numbers of each entry of `trained`. Every rank of a sharded model must call this.

        Raises:
            RuntimeError: A parameter was unfrozen or frozen since, or another adapter is trained.
            ValueError: The adapter is not active.
        """
        self._check_active()
        if self._record.selection is not self._selection:
            raise RuntimeError("another adapter is trained since the slices were described: make a new SliceSender")
        parameters = extra_parameters(self.model, self._record)
        if list(parameters) != self._extra:
            changed = min(parameters.keys() ^ set(self._extra))
            raise RuntimeError(
                f"{changed} was unfrozen or frozen after the slices were described: make a new SliceSender"
            )
        deltas = mounted_deltas(self._record)
        for one, (name, (mount, part)) in zip(self.trained, self._record.parts.items()):
            base, values = one.base, deltas.pop(name).values.to(one.base.device)
            if mount.layer.rounding is not None:  # what the base's file can hold, as it is merged
                base, values = mount.layer.rounding.summands(base, mount.layer.full_s2().detach(), part.positions)
            yield effective_units(base, values)
        yield from (full_tensors(parameters).values() if parameters else ())

    def _check_active(self) -> None:
        """Raise ValueError unless the model computes with the trainable adapter alone."""
        record = self._record
        if not record.trains:
            raise ValueError(
                "the trainable adapter of the model is not active, so there is nothing to send: "
                + ("attach one" if record.trainable is None else f"call s2ft.set_adapter(model, {record.trainable!r})")
            )
        others = [name for name in record.active if name != record.trainable]
        if others:
            raise ValueError(
                f"adapter {others[0]!r} is active together with the trainable one, and an engine has the base alone: "
                "make the trainable adapter the only active one, or merge the other one and serve the merged base"
            )


def _parts(model: nn.Module, record: Record, mount: Mount) -> Iterator[TrainedWeight]:
    """Read the base's numbers of what a trainable layer trains. A weight that is spread over ranks is gathered."""
    layer = mount.layer
    handle = weight_at(model, mount.parts[0].projection)
    if handle.read_only:
        raise ValueError(
            f"{handle.path} is quantized, and merged numbers can't be written into a quantized weight, neither here "
            "nor in an engine: load the base in bfloat16, or serve the adapter by its name"
        )
    with handle.full() as stored:
        for part in mount.parts:
            one = weight_at(model, part.projection)
            if isinstance(layer.base, Tensor):
                base = layer.base.index_select(layer.dim, part.positions.to(layer.base.device))
            else:
                places = record.current_positions(part.projection, part.elements).to(stored.device)
                base = one.view(stored).index_select(layer.dim, places)
            name = one.path if one.expert is not None else f"{one.path}.weight"
            base = base.to(layer.weight.dtype).clone()
            shape = full_shape(handle.tensor)
            yield TrainedWeight(name, shape, base, layer.dim, part.elements.cpu(), one.expert, one.kind.transposed)


class PeftSource:
    """The active adapters of a PeftModel.

    Attributes:
        model: The PeftModel.
        trained: What it trains.
    """

    def __init__(self, model: nn.Module) -> None:
        from s2ft.peft import S2FTPeftConfig
        from s2ft.peft.layer import S2FTPeftLayer
        from s2ft.peft.native_adapter import saved_modules

        self.model, base = model, model.get_base_model()
        self.names = list(model.active_adapters)
        for name in self.names:
            config = model.peft_config[name]
            refuse(
                (
                    not isinstance(config, S2FTPeftConfig),
                    f"adapter {name!r} of the PeftModel is of {type(config).__name__}, and slices can be sent of "
                    "S2FTPeftConfig only: let TRL send the merged weights",
                ),
                (
                    getattr(config, "trainable_token_indices", None) is not None,
                    f"adapter {name!r} has trainable_token_indices, which are not sent: train the embedding in full "
                    "(modules_to_save), or let TRL send the merged weights",
                ),
            )
        self._layers = {
            path: module
            for path, module in base.named_modules()
            if isinstance(module, S2FTPeftLayer) and any(name in module.s2ft_delta for name in self.names)
        }
        self._saved = saved_modules(base, self.names)
        self._check_active(unmerged=True)
        _check_accounted(model, self._known())
        reshard_all(model)
        self.trained = [one for path, layer in self._layers.items() for one in self._slices(path, layer)]
        for (module, _), path in zip(self._in_use(), self._saved):
            for name, value in full_tensors(dict(module.original_module.named_parameters())).items():
                self.trained.append(TrainedWeight(f"{path}.{name}", value.shape, value.clone()))
        if not self.trained:
            raise ValueError(f"the PeftModel trains nothing with its active adapters ({', '.join(self.names)})")

    def values(self) -> Iterator[Tensor]:
        """Yield the merged numbers of each entry of `trained`, see :meth:`AttachedSource.values`."""
        self._check_active()
        _check_accounted(self.model, self._known())
        bases = iter(self.trained)
        for layer in self._layers.values():
            for _, dim, _, deltas, size in self._weights(layer):
                total = _sum(dim, deltas)
                for _, places, _ in _by_expert(total.index, size):
                    base = next(bases).base
                    yield effective_units(base, total.values.index_select(dim, places).to(base.device))
        for module, name in self._in_use():
            yield from full_tensors(dict(module.modules_to_save[name].named_parameters())).values()

    def _in_use(self) -> Iterator[tuple[Any, str]]:
        for path, module in self._saved.items():
            names = [name for name in self.names if name in module.modules_to_save]
            if len(names) > 1:
                raise ValueError(f"adapters {' and '.join(names)} both have {path} in full: make one of them active")
            yield module, names[0]

    def _weights(self, layer: Any) -> Iterator[tuple[str, int, bool, list[Any], int | None]]:
        """Yield each weight of a layer that is trained.

        That is its name, the dim of its units, whether it is stored transposed, the adapters' deltas, and of stacked
        experts the units of one.
        """
        for name in layer.trained_by(self.names):
            deltas = [layer.deltas_of(one)[name] for one in self.names if name in layer.deltas_of(one)]
            if name:
                dim, transposed = layer.dims[name], layer.transposed[name]
                size = full_shape(getattr(layer.base_layer, name))[1:]
                yield name, dim, transposed, deltas, size[1 - dim if transposed else dim]
            else:  # a layer, which has one weight
                yield "weight", layer.dim, layer.kind.transposed, deltas, None

    def _slices(self, path: str, layer: Any) -> Iterator[TrainedWeight]:
        """Read the base's numbers of what the adapters of a layer train."""
        if layer.kind.read_only:
            raise ValueError(
                f"{path} is quantized, and merged numbers can't be written into a quantized weight, neither here nor "
                "in an engine: load the base in bfloat16, or serve the adapter by its name"
            )
        layer.put_base_back()
        for name, dim, transposed, deltas, size in self._weights(layer):
            weight, index = getattr(layer.base_layer, name), _sum(dim, deltas).index
            with full_values(weight) as stored:
                for expert, _, units in _by_expert(index, size):
                    matrix = layer.kind.view(stored) if expert is None else stored[expert]
                    matrix = matrix.t() if expert is not None and transposed else matrix
                    base, units = matrix.index_select(dim, units.to(stored.device)).clone(), units.cpu()
                    yield TrainedWeight(f"{path}.{name}", full_shape(weight), base, dim, units, expert, transposed)

    def _known(self) -> set[int]:
        trained = [layer.s2ft_delta[name] for layer in self._layers.values() for name in layer.s2ft_delta]
        trained += [module.modules_to_save for module in self._saved.values()]
        return {id(parameter) for module in trained for parameter in module.parameters()}

    def _check_active(self, unmerged: bool = False) -> None:
        """Raise ValueError unless the model computes with the adapters that it had at the beginning."""
        if list(self.model.active_adapters) != self.names:
            raise ValueError(
                f"the active adapters are {', '.join(self.model.active_adapters)}, and the slices of "
                f"{', '.join(self.names)} were described: make a new SliceSender"
            )
        for path, layer in self._layers.items():
            refuse(
                (
                    layer.disable_adapters,
                    f"the adapters of {path} are disabled, so there is nothing to send: enable them",
                ),
                (unmerged and layer.merged, "adapters of the PeftModel are merged: call unmerge_adapter first"),
            )


def _sum(dim: int, deltas: list[Any]) -> Delta:
    """The sum of adapters' deltas. Those that are spread over ranks are gathered."""
    full = full_tensors({str(number): delta.values for number, delta in enumerate(deltas)})
    parts = [
        (Delta(dim, delta.index, values.to(delta.values.dtype)), 1.0) for delta, values in zip(deltas, full.values())
    ]
    return parts[0][0] if len(parts) == 1 else sum_deltas(parts)


def _by_expert(index: Tensor, size: int | None) -> Iterator[tuple[int | None, Tensor, Tensor]]:
    """Yield each expert that has units in an index, their places there, and their numbers in the expert."""
    if size is None:
        yield None, torch.arange(index.numel(), device=index.device), index
        return
    for expert in (index // size).unique().tolist():
        places = (index // size == expert).nonzero().squeeze(1)
        yield expert, places, index[places] % size


def _check_accounted(model: nn.Module, known: set[int]) -> None:
    """Raise ValueError if a parameter is trained that would not be sent."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise ValueError(
                f"{name} requires a gradient, and it is neither a slice nor a weight in full of the adapter, so that "
                "it would not be sent: freeze it, or name its module in modules_to_save"
            )
