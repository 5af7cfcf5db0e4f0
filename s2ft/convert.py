"""attach, detach, merge: turn a model into one that trains its selected units, and back."""
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from s2ft.arch import couplings_of
from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling, Projection, projections_of, unit_name
from s2ft.delta import Delta
from s2ft.fingerprint import fingerprint
from s2ft.layers import S2ColumnLinear, S2Linear, S2RowLinear
from s2ft.ops import act_mul, scatter_add_, swap_
from s2ft.permutation import contiguous_range, coupling_order, expand, inverse, permute_coupling
from s2ft.selection import Selection
from s2ft.selection import select as select_units
from s2ft.verify import Trial

RECORD = "_s2ft"   # the attribute of the model that holds its Attachment


@dataclass
class Mount:
    """One projection's trainable layer and what it stands for."""

    projection: Projection
    linear: nn.Linear    # the module it replaced; both hold the same weight and bias
    layer: S2Linear
    elements: Tensor     # [n] int64: the original element of every unit of layer.s2


@dataclass
class Attachment:
    """Everything s2ft knows about a model it has changed."""

    couplings: List[Coupling]
    fingerprint: Dict[str, Any]
    required_grad: Dict[str, bool]                 # of every parameter, before
    given: bool = False                            # whether the couplings were given by hand
    name: Optional[str] = None                     # the trainable adapter
    config: Optional[S2FTConfig] = None
    selection: Optional[Selection] = None
    orders: List[Tuple[Coupling, Tensor]] = field(default_factory=list)   # couplings whose units moved
    mounts: Dict[str, Mount] = field(default_factory=dict)                # by module path
    fused_blocks: List[str] = field(default_factory=list)                 # modules with gated_forward
    others: Dict[str, object] = field(default_factory=dict)               # loaded adapters by name
    active: Optional[str] = None
    applied: List[Tuple[str, Tensor, Tensor, int]] = field(default_factory=list)   # path, index, base, dim

    @property
    def names(self) -> List[str]:
        return ([] if self.name is None else [self.name]) + list(self.others)


def attachment_of(model: nn.Module) -> Attachment:
    """The model's record. Raises: ValueError when nothing is attached."""
    record = model.__dict__.get(RECORD)
    if record is None:
        raise ValueError(f"{type(model).__name__} has no S²FT adapter: call s2ft.attach or s2ft.load_adapter first")
    return record


# ---- attach ----------------------------------------------------------------------------------------

def attach(model: nn.Module, config: S2FTConfig, name: str = "default", calibration=None, *,
           couplings: Optional[Sequence[Coupling]] = None, verify: Optional[bool] = None, example=None) -> "Report":
    """Make the units that `config` selects the only trainable weights of `model`, in place.

    Everything is checked before a weight moves. The model computes what it did before: in layout
    ``permuted`` the coupled weights and biases are put in a common new order, in ``indexed`` nothing
    moves. All other parameters are frozen.

    A model of no known family is attached by its couplings, for instance a perceptron ``net`` with layers
    ``net.up`` and ``net.down`` of 64 hidden channels::

        mlp = Coupling("ffn", 0, (Projection("u", "net.up", 64, 1, 0),), Projection("d", "net.down", 64, 1, 1))
        attach(model, S2FTConfig(d_ratio=0.1), couplings=[mlp], example=torch.randn(2, 16))

    They are saved in the adapter, so that loading needs none.

    Args:
        model: a model of a known family or with `couplings`, floating-point weights, nothing attached.
        config: what to train. name: of the new adapter.
        calibration: for selections that need data, see :func:`select`.
        couplings: given by hand, of plain nn.Linear layers; a module can be in one of them.
        verify: try the couplings out: put the units of each that can move in another order and run the model
            (in evaluation mode), then run it attached; an output that moves by more than rounding is an error
            that names the coupling. Default: where couplings are given by hand, or an example is.
        example: what to run it on: a tensor, a tuple of arguments or a dict of them. For models of transformers
            one is made from the config.
    Returns: a report that prints as a table of what is trained.
    Raises: ValueError, with the model as it was; TypeError for a config that is none.
    """
    if not isinstance(config, S2FTConfig):
        raise TypeError(f"config must be an S2FTConfig, got {type(config).__name__}")
    check_name(name)
    record = new_attachment(model, couplings)
    selection = select_units(record.couplings, config, model, calibration)
    verify = couplings is not None or example is not None if verify is None else verify
    trial = _try_out(model, record.couplings, example) if verify else None
    mount(model, record, config, selection, name)
    if trial is not None:
        try:
            trial.check_unchanged()
        except BaseException:
            _restore(model, record)
            raise
    return Report.of(model)


def _try_out(model: nn.Module, couplings: List[Coupling], example: Any) -> Trial:
    trial = Trial(model, couplings, example)
    for coupling in couplings:
        if coupling.movable and not _tied(model, coupling):
            trial.check(coupling)
    return trial


def select(model: nn.Module, config: S2FTConfig, calibration=None, *,
           couplings: Optional[Sequence[Coupling]] = None) -> Selection:
    """The units that :func:`attach` would train, without attaching anything: the model stays as it is.

    Args:
        calibration: for selections that need data (activation, product, gradient): a DataLoader or any iterable
            of batches, each a dict of tensors as a tokenizer gives (input_ids [sequences, tokens], attention_mask,
            labels) or a tensor of token ids. It is read once; labels are used for the gradient alone, which takes
            the tokens themselves where there are none.
        couplings: as for :func:`attach`.
    Returns: a selection; it prints as a table, and has save and load.
    Raises: as :func:`attach`.
    """
    return _chosen(model, config, calibration, couplings)[1]


def plan(model: nn.Module, config: S2FTConfig, calibration=None, *,
         couplings: Optional[Sequence[Coupling]] = None) -> "Report":
    """The report that :func:`attach` would return, without attaching anything; arguments as for :func:`select`.

    Selections that look at no weights (random, by hand) can be planned on a model on the meta device.
    """
    found, selection = _chosen(model, config, calibration, couplings)
    return Report.planned(model, found, config, selection)


def _chosen(model: nn.Module, config: S2FTConfig, calibration, given) -> Tuple[List[Coupling], Selection]:
    if not isinstance(config, S2FTConfig):
        raise TypeError(f"config must be an S2FTConfig, got {type(config).__name__}")
    _check_unattached(model)
    couplings = couplings_of(model, given)
    return couplings, select_units(couplings, config, model, calibration)


def _check_unattached(model: nn.Module) -> None:
    if RECORD in model.__dict__:
        raise ValueError(f"{type(model).__name__} has an S²FT adapter already "
                         f"({', '.join(model.__dict__[RECORD].names)}): detach or merge it first")


def new_attachment(model: nn.Module, given: Optional[Sequence[Coupling]] = None) -> Attachment:
    """A record of the untouched model. given: couplings by hand. Raises: ValueError when there is one already."""
    _check_unattached(model)
    couplings = couplings_of(model, given)
    return Attachment(couplings, fingerprint(model, couplings),
                      {key: parameter.requires_grad for key, parameter in model.named_parameters()},
                      given=given is not None)


def check_name(name: str) -> None:
    if not isinstance(name, str) or not name or any(c in name for c in "/\\\0") or name.startswith("."):
        raise ValueError(f"an adapter's name must be a word without slashes, got {name!r}")


def _check_untied(model: nn.Module, couplings: List[Coupling]) -> None:
    for coupling in couplings:
        shared = _tied(model, coupling)
        if shared:
            raise ValueError(f"{' and '.join(shared)} are one tied weight, whose units can't change place: "
                             "use layout='indexed'")


def _tied(model: nn.Module, coupling: Coupling) -> List[str]:
    """The names of a parameter that moves with the coupling and has several; empty where none has."""
    owners: Dict[int, List[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    moving = [model.get_parameter(vector.path) for vector in coupling.vectors]
    for projection in coupling.projections:
        module = model.get_submodule(projection.path)
        moving += [module.weight] + [module.bias] * (projection.dim == 0 and module.bias is not None)
    return next((owners[id(parameter)] for parameter in moving if len(owners[id(parameter)]) > 1), [])


def mount(model: nn.Module, record: Attachment, config: S2FTConfig, selection: Selection, name: str) -> None:
    """Freeze the model, move units (layout permuted) and put trainable layers in. Checks come first."""
    touched = [coupling for coupling in record.couplings
               if any(projection.path in selection for projection in coupling.projections)]
    orders = {}
    if config.layout == "permuted":
        movable = [coupling for coupling in touched if coupling.movable]
        _check_untied(model, movable)
        orders = {coupling: _order(coupling, selection) for coupling in movable}
    record.name, record.config, record.selection, record.active = name, config, selection, name
    try:
        _mount_all(model, record, touched, orders)
    except BaseException:   # out of memory, an interrupt: leave no half-converted model
        _restore(model, record)
        raise


def _mount_all(model: nn.Module, record: Attachment, touched: List[Coupling],
               orders: Dict[Coupling, Tensor]) -> None:
    setattr(model, RECORD, record)
    model.requires_grad_(False)
    for coupling in touched:
        order = orders.get(coupling)
        if order is not None:
            permute_coupling(model, coupling, order)
            record.orders.append((coupling, order))
        for projection in coupling.projections:
            if projection.path in record.selection:
                units = record.selection[projection.path]
                record.mounts[projection.path] = _mount(model, projection, units, order, record.config)
        if record.config.fuse_ffn:
            _fuse_block(model, coupling, record)


def gated_forward(activation: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of a gated FFN, x [..., width] → [..., width], that keeps gate and up for the backward
    and of their product only what the down projection keeps."""
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), activation))
    return forward


def _fuse_block(model: nn.Module, coupling: Coupling, record: Attachment) -> None:
    """Give the coupling's block :func:`gated_forward`, unless someone has replaced its forward already."""
    if coupling.activation is not None and "forward" not in model.get_submodule(coupling.block).__dict__:
        block = model.get_submodule(coupling.block)
        block.forward = MethodType(gated_forward(coupling.activation), block)
        record.fused_blocks.append(coupling.block)


def _order(coupling: Coupling, selection: Selection) -> Tensor:
    producers = [selection[p.path] for p in coupling.producers if p.path in selection]
    consumer = selection[coupling.consumer.path] if coupling.consumer.path in selection else None
    return coupling_order(coupling.consumer.count, producers, consumer)


def _mount(model: nn.Module, projection: Projection, units: Tensor, order: Optional[Tensor],
           config: S2FTConfig) -> Mount:
    linear = model.get_submodule(projection.path)
    positions = units if order is None else inverse(order)[units]
    found = contiguous_range(positions)
    where = {}
    if found is not None:
        start, end = found
        where = {"start": start * projection.unit, "end": end * projection.unit}
        units = torch.arange(start, end) if order is None else order[start:end]
    else:
        where = {"index": expand(positions, projection.unit)}
    kind = S2ColumnLinear if projection.dim == 0 else S2RowLinear
    layer = kind.from_linear(linear, **where, delta_dtype=config.delta_dtype_for(linear.weight.dtype))
    model.set_submodule(projection.path, layer)
    return Mount(projection, linear, layer, expand(units, projection.unit))


# ---- back ------------------------------------------------------------------------------------------

def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off and give back the base model, bit for bit, as it was before attach."""
    record = attachment_of(model)
    take_off(model, record)
    return _restore(model, record)


def merge(model: nn.Module) -> nn.Module:
    """Write the active adapter into the weights and give back the plain model, in original order.

    The weights are, bit for bit, those the adapter was trained with.
    Raises: ValueError when no adapter is active.
    """
    record = attachment_of(model)
    if record.active is None:
        raise ValueError("no adapter is active, so there is nothing to merge: set_adapter first, or detach")
    if record.active == record.name:
        for mount in record.mounts.values():
            mount.layer.fuse()
    return _restore(model, record)   # an adapter that is applied stands in the weights already


def _restore(model: nn.Module, record: Attachment) -> nn.Module:
    for path in record.fused_blocks:
        del model.get_submodule(path).forward
    for path, mount in record.mounts.items():
        mount.linear.weight, mount.linear.bias = mount.layer.weight, mount.layer.bias
        mount.linear.train(mount.layer.training)
        model.set_submodule(path, mount.linear)
    for coupling, order in record.orders:
        permute_coupling(model, coupling, inverse(order))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(record.required_grad.get(key, parameter.requires_grad))
    delattr(model, RECORD)
    return model


# ---- putting adapters on and taking them off -----------------------------------------------------------

def take_off(model: nn.Module, record: Attachment) -> None:
    """Make no adapter active; the weights hold the base, bit for bit."""
    for mount in record.mounts.values():
        mount.layer.unfuse()
        mount.layer.enabled = False
    for path, index, base, dim in reversed(record.applied):
        swap_(model.get_submodule(path).weight.detach(), index, base, dim)
    record.applied.clear()
    record.active = None


def put_on(model: nn.Module, record: Attachment, name: str, deltas: Dict[str, Delta]) -> None:
    """Make adapter `name` active; nothing else may be. The trainable one is added during the forward,
    the weights of any other are written into the model and the base they replace is kept."""
    if name == record.name:
        for mount in record.mounts.values():
            mount.layer.enabled = True
    else:
        for path, delta in deltas.items():
            weight = model.get_submodule(path).weight.detach()
            index = _current_index(record, path, delta).to(weight.device)
            values = delta.values.to(weight.device)
            base = torch.empty_like(values, dtype=weight.dtype)
            scatter_add_(weight, index, values, delta.dim, replaced=base)
            record.applied.append((path, index, base, delta.dim))
    record.active = name


def _current_index(record: Attachment, path: str, delta: Delta) -> Tensor:
    """Where the delta's elements lie now that units may have moved."""
    for coupling, order in record.orders:
        for projection in coupling.projections:
            if projection.path == path:
                return expand(inverse(order), projection.unit)[delta.index]
    return delta.index


def fuse(model: nn.Module) -> None:
    """Write the active adapter into the weights until :func:`unfuse`: plain linears, for generation."""
    record = attachment_of(model)
    if record.active is not None and record.active == record.name:
        for mount in record.mounts.values():
            mount.layer.fuse()


def unfuse(model: nn.Module) -> None:
    """Copy the base back, bit for bit, so that training can go on."""
    for mount in attachment_of(model).mounts.values():
        mount.layer.unfuse()


@torch.no_grad()
def mounted_deltas(record: Attachment) -> Dict[str, Delta]:
    """The trainable adapter's deltas in original coordinates, copied."""
    deltas = {}
    for path, mount in record.mounts.items():
        index, by_index = mount.elements.sort()
        values = mount.layer.s2.detach().index_select(mount.layer.dim, by_index.to(mount.layer.s2.device))
        deltas[path] = Delta(mount.layer.dim, index, values)
    return deltas


@torch.no_grad()
def set_mounted_deltas(record: Attachment, deltas: Dict[str, Delta]) -> None:
    """Copy deltas of the same selection into the trainable layers."""
    for path, delta in deltas.items():
        mount = record.mounts[path]
        position = inverse(mount.elements.argsort()).to(mount.layer.s2.device)
        mount.layer.s2.copy_(delta.values.to(mount.layer.s2.device).index_select(delta.dim, position))


# ---- report ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """What is trained of one projection of one layer."""

    projection: Projection
    units: int
    parameters: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """What is trained of one projection over all layers."""

    projection: str
    layers: int
    units: str        # e.g. "46 of 1536 channels"
    parameters: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Report:
    """What attach did, or would do; prints as a table."""

    name: str
    layout: str
    rows: List[Row]
    trainable: int
    total: int        # parameters of the base model

    @classmethod
    def of(cls, model: nn.Module) -> "Report":
        """What is trained of a model with an adapter attached, read from the layers themselves."""
        record = attachment_of(model)
        parts = [Part(mount.projection, mount.elements.numel() // mount.projection.unit, mount.layer.s2.numel(),
                      mount.layer.s2.dtype) for mount in record.mounts.values()]
        total = sum(parameter.numel() for parameter in model.parameters()) - sum(part.parameters for part in parts)
        return cls._from(record.name, record.config, parts, total)

    @classmethod
    def planned(cls, model: nn.Module, couplings: List[Coupling], config: S2FTConfig, selection: Selection) -> "Report":
        """What would be trained of the untouched model, whose weights are not looked at."""
        parts = []
        for projection in projections_of(couplings):
            if projection.path in selection:
                weight = model.get_submodule(projection.path).weight
                units = selection[projection.path].numel()
                parts.append(Part(projection, units, units * projection.unit * weight.shape[1 - projection.dim],
                                  config.delta_dtype_for(weight.dtype)))
        return cls._from("planned", config, parts, sum(parameter.numel() for parameter in model.parameters()))

    @classmethod
    def _from(cls, name: str, config: S2FTConfig, parts: List["Part"], total: int) -> "Report":
        groups: Dict[Tuple, List[Part]] = {}
        for part in parts:
            alike = (_name_in_layer(part.projection.path), part.projection.key, part.projection.count, part.units)
            groups.setdefault(alike, []).append(part)
        rows = [Row(shown, len(group), f"{units} of {count} {unit_name(group[0].projection)}",
                    sum(part.parameters for part in group), group[0].dtype)
                for (shown, _, count, units), group in groups.items()]
        return cls(name, config.layout, rows, sum(row.parameters for row in rows), total)

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        width = max(12, *(len(row.projection) + 1 for row in self.rows))
        lines = [f"{'projection':<{width}}{'layers':>7}  {'units a layer':<24}{'parameters':>14}  dtype"]
        lines += [f"{row.projection:<{width}}{row.layers:>7}  {row.units:<24}{row.parameters:>14,}  "
                  f"{str(row.dtype).removeprefix('torch.')}" for row in self.rows]
        return "\n".join(lines + [f"adapter {self.name!r}, layout {self.layout}: {self.trainable:,} of "
                                  f"{self.total:,} parameters are trained ({self.share:.2%})"])


def _name_in_layer(path: str) -> str:
    """The part of a path that all layers have in common: what follows the last number, if anything does."""
    names = path.split(".")
    numbers = [i for i, name in enumerate(names[:-1]) if name.isdigit()]
    return path if names[-1].isdigit() or not numbers else ".".join(names[numbers[-1] + 1:])
